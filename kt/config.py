"""What `config.yaml` may say: typed, checked, and the source of the steps' JSON options.

Imports no torch, so that a dry run answers at once. Checks overlays by hand; config.yaml lies below
them always: `python -m kt.config presets/cifar10.yaml`.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import pkgutil
import reprlib
import sys
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kt.core.step import ConfigError

ARMS = ("random", "direct", "transfer", "untrained", "hog", "supervised", "longer")
SHORT = reprlib.Repr()  # aliases of YAML can make a value of a few bytes endless in print
SHORT.maxlevel, SHORT.maxstring, SHORT.maxother = 2, 200, 200
# What PyYAML raises on numbers, dates and nesting that are none, beside its own errors.
CRASHES = (ValueError, TypeError, AttributeError, LookupError, RecursionError)
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
OF = NAME[:-1] + r"(/[A-Za-z0-9][A-Za-z0-9_.-]*)?$"
Name = Annotated[str, Field(pattern=NAME, max_length=100)]  # part of file names
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
PRETRAINED = "pretrained"  # as a path of weights: published ones
Three = {"min_length": 3, "max_length": 3}  # red, green, blue


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, strings are coerced by declared type."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Plugin(Settings):
    """Names one file of `kt/tasks` or `kt/backbones`; its options stand beside the name."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: Annotated[str, Field(description="file name of the plug-in")]

    def options(self) -> dict[str, Any]:
        """Gives all values but the name."""
        return dict(self.model_extra or {})


class Dataset(Settings):
    """One set of images and where it comes from."""

    source: Annotated[str, Field(description="file of kt/sources that reads it")]
    path: Annotated[str | None, Field(description="folder or archive, where the source needs one")]
    size: Annotated[int, Field(ge=12, le=1024, description="edge of the packed images, pixels")]
    unlabelled: Annotated[Count | None, Field(description="most images without labels; null: all")]
    labelled: Annotated[Count | None, Field(description="most labelled training images; null: all")]
    test: Annotated[Count | None, Field(description="most test images; null: all")]
    max_bad_fraction: Annotated[
        Fraction, Field(description="share of unreadable files to tolerate")
    ]
    max_pixels: Annotated[int, Field(ge=1024, description="larger images are refused unopened")]
    near_copies: Annotated[
        Fraction | None,
        Field(description="copies of test images differ by less of the contrast; null: exact only"),
    ]
    storage: Annotated[
        Literal["pixels", "jpeg"], Field(description="of the packs; jpeg for more than the memory")
    ]


class Use(Settings):
    """Which data set serves which step; the four may differ (paper, section 3)."""

    pretext: Annotated[Name, Field(description="teachers are trained on it")]
    cluster: Annotated[Name, Field(description="k-means is fitted on it")]
    target: Annotated[Name, Field(description="it gets pseudo-labels and trains the target")]
    evaluate: Annotated[Name, Field(description="models are judged on its train and test splits")]


class Schedule(Settings):
    """How weights are learned, whatever the loss."""

    epochs: Annotated[Count, Field(description="passes over the images, times `effort`")]
    batch: Annotated[Count, Field(description="images a step")]
    optimiser: Annotated[Literal["sgd", "adamw"], Field(description="sgd (Nesterov off) or adamw")]
    lr: Annotated[float, Field(gt=0, description="highest learning rate")]
    momentum: Annotated[float, Field(ge=0, lt=1, description="of sgd; first beta of adamw")]
    weight_decay: Annotated[float, Field(ge=0, description="on weights, not on biases and norms")]
    schedule: Annotated[
        Literal["cosine", "step"], Field(description="cosine to 0, or lr / 10 steps")
    ]
    milestones: Annotated[list[Fraction], Field(description="of `step`: shares of the training")]
    warmup: Annotated[Fraction, Field(description="share of the steps with linearly rising lr")]
    precision: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Field(description="auto: bfloat16 where the hardware computes it, else float32"),
    ]
    deterministic: Annotated[
        bool, Field(description="on CUDA the same bits each time, slower; on a CPU always")
    ]


class Training(Schedule):
    """How a network is trained on packed images; one loop serves every such network."""

    label_smoothing: Annotated[Fraction, Field(description="of the cross-entropy")]
    compile: Annotated[bool, Field(description="torch.compile, on CUDA only")]


class Weights(Settings):
    """Weights that were trained elsewhere."""

    path: Annotated[
        str,
        Field(
            min_length=1,
            description=f"`.safetensors`, or what torch.save wrote of weights; `{PRETRAINED}`: "
            "those that torchvision or timm publish",
        ),
    ]
    mean: Annotated[
        Annotated[list[Fraction], Field(**Three)] | None,
        Field(description="of their images by channel; null: theirs if known, or ours"),
    ]
    std: Annotated[
        Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(**Three)] | None,
        Field(description="the same for the standard deviation"),
    ]


class Teacher(Settings):
    """A network or descriptor that describes images; its features are clustered."""

    backbone: Annotated[Plugin | Name, Field(description="plug-in and options, or a target's name")]
    task: Annotated[Plugin | None, Field(description="pretext task; null: is not trained")]
    training: Annotated[Training, Field(description="of the pretext training")]
    seeds: Annotated[Count | None, Field(description="how many are trained; null: `seeds`")]
    budget: Annotated[
        list[Name],
        Field(description="teachers and targets whose summed multiply-adds set the epochs; [] off"),
    ]
    weights: Annotated[
        Weights | None, Field(description="to start from, or with task null to use; null: random")
    ]
    features: Annotated[
        str | None,
        Field(description="`.npy` of features made elsewhere, for every layer; null: computed"),
    ]
    layers: Annotated[list[Name], Field(description="layers to transfer from; [] none")]
    map: Annotated[Count, Field(description="the layer's map is pooled to map x map")]
    pool: Annotated[Literal["mean", "max"], Field(description="how it is pooled")]
    transfer_as: Annotated[Literal[ARMS], Field(description="arm of the targets it teaches")]
    evaluate_as: Annotated[
        Literal[ARMS] | None, Field(description="arm under which it is judged itself; null: is not")
    ]


class Transfer(Settings):
    """A kind of transfer, and from which teachers."""

    kind: Annotated[Plugin, Field(description="file of kt/transfers and its options")]
    of: Annotated[
        list[Annotated[str, Field(pattern=OF)]],
        Field(description="`teacher` (all its layers) or `teacher/layer`; []: every teacher"),
    ]


class Clustering(Settings):
    """k-means and the transform before it."""

    centre: Annotated[bool, Field(description="subtract the mean")]
    pca: Annotated[Count | None, Field(description="keep so many principal components; null: off")]
    whiten: Annotated[bool, Field(description="unit variance of the components (needs pca)")]
    l2: Annotated[bool, Field(description="unit length of each row")]
    spherical: Annotated[bool, Field(description="centroids of unit length, cosine assignment")]
    iterations: Annotated[Count, Field(description="of Lloyd's algorithm")]
    redo: Annotated[Count, Field(description="restarts; the best objective wins")]
    memory_mb: Annotated[
        Count, Field(description="MiB of rows kept in memory; more go to a scratch file")
    ]
    sample: Annotated[
        Count | None, Field(description="learn from so many rows per centroid; null: all")
    ]
    warm_start: Annotated[
        Count | None,
        Field(description="rows per centroid for the first 3/4 of the iterations; null: off"),
    ]


class Target(Settings):
    """A network that learns the pseudo-labels from scratch."""

    backbone: Annotated[Plugin, Field(description="plug-in and options")]
    task: Annotated[Plugin, Field(description="a label task, with its augmentation")]
    training: Annotated[Training, Field(description="on pseudo-labels, and for `supervised`")]
    supervised: Annotated[bool, Field(description="also train it on all true labels, the bound")]


def _as_list(value):
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = yaml.safe_load(value)
        except (yaml.YAMLError, *CRASHES) as error:
            raise ValueError("expected a list such as [50, 100]") from error
    return value if isinstance(value, list) else [value]


class Config(Settings):
    """Everything a run depends on."""

    seed: Annotated[int, Field(ge=0, description="first of the seeds")]
    seeds: Annotated[Count, Field(description="repetitions of target training and label draws")]
    effort: Annotated[float, Field(gt=0, description="multiplies every epoch count (at least 1)")]
    images: Annotated[str | None, Field(description="folder, zip or tar with your own pictures")]
    clusters: Annotated[
        list[Annotated[int, Field(ge=2)]],
        Field(min_length=1, description="values of k"),
        BeforeValidator(_as_list),
    ]
    datasets: Annotated[dict[Name, Dataset], Field(min_length=1, description="by name")]
    use: Annotated[Use, Field(description="which data set serves which step")]
    teachers: Annotated[dict[Name, Teacher], Field(min_length=1, description="by name")]
    clustering: Annotated[Clustering, Field(description="k-means")]
    transfers: Annotated[
        dict[Name, Transfer], Field(min_length=1, description="kinds of transfer, by name")
    ]
    targets: Annotated[dict[Name, Target], Field(min_length=1, description="by name")]
    evaluations: Annotated[
        dict[Name, dict[str, Any]], Field(description="by name of the file in kt/evaluations")
    ]
    verdict: Annotated[
        list[Name], Field(description="evaluations whose validation score picks teacher, layer, k")
    ]


# ---------------------------------------------------------------------------- plug-ins


def plugins(kind: str) -> list[str]:
    """Lists the plug-ins of a folder of kt (`tasks`, `backbones`, ...): their file names."""
    package = importlib.import_module(f"kt.{kind}")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def plugin(kind: str, name: str, key: str = ""):
    """Imports one plug-in's module; none of them imports torch before it is used.

    Raises:
        ConfigError: There is no such file; the nearest is named.
    """
    if name not in plugins(kind):
        raise ConfigError(
            f"{key or kind}: no file kt/{kind}/{name}.py{_nearest(name, plugins(kind))}"
        )
    return importlib.import_module(f"kt.{kind}.{name}")


def options(kind: str, name: str, values: dict[str, Any], key: str = "") -> Settings:
    """Checks the options of one plug-in against the `Options` in its file."""
    return check(plugin(kind, name, key).Options, values, key)


# ---------------------------------------------------------------------------- checking


def check(model: type[Settings], values, key: str = ""):
    """Validates `values`; a failure names every wrong key with value and what is allowed.

    Raises:
        ConfigError: With one line for each fault.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_explain(model, fault, key) for fault in error.errors(include_url=False)]
        raise ConfigError(
            "\n  ".join(["the configuration is not valid:", *dict.fromkeys(lines)])
        ) from None


def _explain(model, fault, key: str) -> str:
    place = [str(part) for part in fault["loc"] if str(part) not in ("Plugin", "Settings")]
    place = [part for part in place if not part.startswith(("constrained-", "function-"))]
    dotted = ".".join(([key] if key else []) + place)
    if fault["type"] == "extra_forbidden":
        return f"{dotted}: unknown key{_nearest(place[-1], _keys(model, place[:-1]))}"
    if fault["type"] == "missing":
        return f"{dotted}: missing; every value must be given (see config.yaml)"
    return f"{dotted}: {fault['msg']}, found {SHORT.repr(fault['input'])}"


def _keys(model, place: list[str]) -> list[str]:
    """Lists the keys allowed at a dotted place of a model."""
    for part in place:
        field = model.model_fields.get(part)
        if field is not None:
            inner = _inner_models(field.annotation)
            if not inner:
                return []
            model = inner[0]
    return list(model.model_fields)


def _inner_models(annotation) -> list[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [found for part in typing.get_args(annotation) for found in _inner_models(part)]


def _nearest(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), 1, 0.5)
    hint = f"; did you mean {close[0]!r}?" if close else "; "
    return f"{hint} known: {', '.join(known)}" if known else ""


# ---------------------------------------------------------------------------- reading


def read(path: Path) -> dict[str, Any]:
    """Reads one YAML file with the safe loader.

    Raises:
        ConfigError: It is missing, not YAML, or not a mapping.
    """
    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, *CRASHES) as error:
        raise ConfigError(
            f"{path} is not valid YAML: {str(error) or type(error).__name__}"
        ) from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(value).__name__}")
    return value


def merge(base, overlay):
    """Lays `overlay` over `base`, mapping by mapping.

    A mapping whose `name` differs replaces the base's (the options of another plug-in make no
    sense); null removes an entry of a mapping whose value is a mapping.
    """
    if not (isinstance(base, dict) and isinstance(overlay, dict)):
        return overlay
    if "name" in overlay and overlay["name"] != base.get("name"):
        return overlay
    merged = dict(base)
    for key, value in overlay.items():
        merged[key] = merge(base[key], value) if key in base else value
    return {
        key: value
        for key, value in merged.items()
        if value is not None or not isinstance(base.get(key), dict) or key in ("task", "weights")
    }


def resolve(root: Path, overlay: dict[str, Any], check_plugins: bool = True) -> Config:
    """Gives the checked configuration: config.yaml, own-pictures preset, then the overlay.

    Args:
        root: The folder with `config.yaml` and `presets/`.
        overlay: What `--configfile` and `--config` said.
        check_plugins: Whether plug-ins' own options are checked, too.

    Raises:
        ConfigError: Anything in it is wrong.
    """
    values = read(Path(root) / "config.yaml")
    if overlay.get("images"):
        values = merge(values, read(Path(root) / "presets" / "photos.yaml"))
    values = merge(values, overlay)
    for kind in ("datasets", "teachers", "transfers", "targets", "evaluations"):
        if isinstance(values.get(kind), dict):  # null removes an entry, also one that is not there
            values[kind] = {k: v for k, v in values[kind].items() if v is not None}
    if isinstance(values.get("teachers"), dict):
        values["teachers"] = _expand_likes(values["teachers"])
    config = check(Config, values)
    if config.images:
        _put_path(config)
    _check_names(config)
    if check_plugins:
        _check_plugins(config)
    return config


def _put_path(config: Config) -> None:
    dataset = config.datasets.get("images")
    if dataset is None:
        raise ConfigError(
            "images: is set, but datasets.images is missing (see presets/photos.yaml)"
        )
    config.datasets["images"] = dataset.model_copy(update={"path": config.images})


def _expand_likes(teachers: dict[str, Any]) -> dict[str, Any]:
    """Resolves `like: other`: values not given are copied from the other teacher."""

    def expand(name: str, seen: tuple[str, ...]):
        own = teachers[name]
        if not isinstance(own, dict) or "like" not in own:
            return own
        other = own["like"]
        if not isinstance(other, str) or other not in teachers or other in seen:
            raise ConfigError(
                f"teachers.{name}.like: expected another teacher, found {other!r}"
                f"{_nearest(str(other), [key for key in teachers if key != name])}"
            )
        given = {key: value for key, value in own.items() if key != "like"}
        return merge(expand(other, (*seen, name)), given)

    return {name: expand(name, (name,)) for name in teachers}


def _check_names(config: Config) -> None:
    """Checks that every name that refers to something refers to something that is there."""

    def known(key: str, name: str, names) -> None:
        if name not in names:
            raise ConfigError(f"{key}: {name!r} is not defined{_nearest(name, list(names))}")

    for role, name in config.use:
        known(f"use.{role}", name, config.datasets)
    for name, teacher in config.teachers.items():
        if isinstance(teacher.backbone, str):
            known(f"teachers.{name}.backbone", teacher.backbone, config.targets)
        for part in teacher.budget:
            known(f"teachers.{name}.budget", part, [*config.teachers, *config.targets])
            if part == name or (part in config.teachers and config.teachers[part].budget):
                raise ConfigError(
                    f"teachers.{name}.budget: {part!r} has no budget of its own to add"
                )
        _check_foreign(name, teacher)
    both = set(config.teachers) & set(config.targets)
    if both:
        raise ConfigError(
            f"teachers and targets must have different names, both have {sorted(both)}"
        )
    for name, transfer in config.transfers.items():
        for part in transfer.of:
            teacher, _, layer = part.partition("/")
            known(f"transfers.{name}.of", teacher, config.teachers)
            if layer and layer not in config.teachers[teacher].layers:
                raise ConfigError(
                    f"transfers.{name}.of: {layer!r} is not among teachers.{teacher}.layers"
                    f"{_nearest(layer, config.teachers[teacher].layers)}"
                )
    for name in config.verdict:
        known("verdict", name, config.evaluations)
    if len(set(config.clusters)) != len(config.clusters):
        raise ConfigError(f"clusters: each k once, found {config.clusters}")
    _check_sizes(config)


def _check_foreign(name: str, teacher: Teacher) -> None:
    """Checks what a teacher brings along from elsewhere."""
    if teacher.features and (teacher.weights or teacher.evaluate_as):
        other = "weights" if teacher.weights else "evaluate_as"
        raise ConfigError(
            f"teachers.{name}.features: there is no network where features are given, so "
            f"teachers.{name}.{other} must be null"
        )
    if teacher.features and not teacher.features.endswith(".npy"):
        raise ConfigError(
            f"teachers.{name}.features: expected a .npy file, found {teacher.features!r}"
        )


def _check_sizes(config: Config) -> None:
    dataset = config.datasets[config.use.cluster]
    if dataset.unlabelled and dataset.unlabelled < max(config.clusters):
        raise ConfigError(
            f"clusters: k = {max(config.clusters)} is more than the {dataset.unlabelled} images of "
            f"datasets.{config.use.cluster}.unlabelled; choose a smaller k or more images"
        )
    if config.clustering.whiten and config.clustering.pca is None:
        raise ConfigError("clustering.whiten: needs clustering.pca, found null")


def _check_plugins(config: Config) -> None:
    for name, dataset in config.datasets.items():
        plugin("sources", dataset.source, f"datasets.{name}.source")
    size = {role: config.datasets[name].size for role, name in config.use}
    for name, other in list(config.targets.items()):  # first: teachers may name a target's backbone
        _check_plugin("backbones", other.backbone, f"targets.{name}.backbone")
        config.targets[name] = other.model_copy(update={"backbone": pinned(other.backbone)})
        _check_task(other.task, size["target"], f"targets.{name}.task")
    for name, transfer in config.transfers.items():
        _check_transfer(config, name, transfer)
    for name, teacher in list(config.teachers.items()):
        _check_layers(config, name, teacher)
        if teacher.task:
            _check_task(teacher.task, size["pretext"], f"teachers.{name}.task")
    for name, values in config.evaluations.items():
        checked = options("evaluations", name, values, f"evaluations.{name}")
        if hasattr(checked, "task"):
            _check_task(checked.task, size["evaluate"], f"evaluations.{name}.task")


def _check_transfer(config: Config, name: str, transfer: Transfer) -> None:
    key = f"transfers.{name}.kind"
    checked = _check_plugin("transfers", transfer.kind, key)
    if name == "hard" != transfer.kind.name:
        raise ConfigError(
            f"{key}: the name `hard` is for the kind hard, whose paths have no name, found "
            f"{transfer.kind.name}; choose another name"
        )
    module = plugin("transfers", transfer.kind.name)
    if hasattr(module, "check"):
        try:
            module.check(checked, config)
        except ConfigError as error:
            raise ConfigError(f"{key}.{error}") from None


def _check_layers(config: Config, name: str, teacher: Teacher) -> None:
    """Checks a teacher's layers now: features are taken long after the training has started."""
    value = teacher.backbone
    if isinstance(value, str):
        value = config.targets[value].backbone
    checked = _check_plugin("backbones", value, f"teachers.{name}.backbone")
    known = plugin("backbones", value.name).layers(checked)
    for layer in teacher.layers:
        if known is not None and layer not in known and not teacher.features:
            raise ConfigError(
                f"teachers.{name}.layers: {layer!r} is not a layer{_nearest(layer, known)}"
            )
    publishes = hasattr(plugin("backbones", value.name), "published")
    if teacher.weights and teacher.weights.path == PRETRAINED and not publishes:
        raise ConfigError(
            f"teachers.{name}.weights.path: nobody publishes weights of backbone {value.name}; "
            "name a file"
        )
    if isinstance(teacher.backbone, Plugin):
        config.teachers[name] = teacher.model_copy(update={"backbone": pinned(value)})


def pinned(backbone: Plugin) -> Plugin:
    """Adds what a backbone depends on beside its options, the digest of a file of code."""
    pin = getattr(plugin("backbones", backbone.name), "pin", dict)
    return Plugin(name=backbone.name, **pin(backbone.options()))


def _check_task(value: Plugin, size: int, key: str) -> None:
    checked = _check_plugin("tasks", value, key)
    try:
        plugin("tasks", value.name).check(checked, size)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def _check_plugin(kind: str, value: Plugin, key: str) -> Settings:
    return options(kind, value.name, value.options(), key)


# ---------------------------------------------------------------------------- for the steps


def json_of(model: type[Settings]):
    """Gives a type for `argparse` that reads JSON and checks it as `model`."""

    def parse(text: str):
        try:
            return check(model, json.loads(text))
        except (ValueError, RecursionError, ConfigError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    parse.__name__ = model.__name__
    return parse


def dumps(value) -> str:
    """Gives settings as one line of JSON, the same for the same values."""
    return json.dumps(value, default=lambda item: item.model_dump(), sort_keys=True)


def main() -> None:
    """Checks configuration files and prints what they give."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="overlays on config.yaml")
    arguments = parser.parse_args()
    try:
        overlay: dict[str, Any] = {}
        for path in arguments.files:
            overlay = merge(overlay, read(path))
        print(
            yaml.safe_dump(resolve(Path(__file__).parent.parent, overlay).model_dump(mode="json"))
        )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(ConfigError.exit_code)


if __name__ == "__main__":
    main()
