"""What `config.yaml` may say: typed, checked, and the source of the steps' JSON options.

Imports no torch, so that a dry run answers at once. Checks overlays by hand; config.yaml lies below
them always: `python -m kt.config presets/cifar10.yaml`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from kt.core import coherence, replaced
from kt.core.checking import check, layers, nearest, options, pinned, plugin, plugins
from kt.core.schema import (
    ARMS,
    AUTO,
    CRASHES,
    NAME,
    PRETRAINED,
    Choice,
    Clustering,
    Config,
    Count,
    Dataset,
    FewImages,
    Fraction,
    Name,
    Plugin,
    Schedule,
    Settings,
    Target,
    Teacher,
    Training,
    Transfer,
    Use,
    Weights,
)
from kt.core.step import ConfigError

# The steps and plug-ins take all of these from here.
__all__ = [
    "ARMS", "AUTO", "Choice", "Clustering", "Config", "Count", "Dataset", "FewImages", "Fraction",
    "NAME", "Name", "PRETRAINED", "Plugin", "Schedule", "Settings", "Target", "Teacher", "Training",
    "Transfer", "Use", "Weights", "check", "layers", "options", "pinned", "plugin", "plugins",
]  # fmt: skip


# ---------------------------------------------------------------------------- reading


class Loader(yaml.SafeLoader):
    """The safe loader; of a key that stands twice YAML would silently keep the second value."""

    def compose_mapping_node(self, anchor):
        """Reads one mapping.

        Raises:
            YAMLError: A key stands twice.
        """
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(
                    f"{key.value!r} stands twice, in lines {lines[key.value]} and {line}; put what "
                    "belongs to it in one place"
                )
            lines[key.value] = line
        return node


def read(path: Path) -> dict[str, Any]:
    """Reads one YAML file with the safe loader.

    Raises:
        ConfigError: It is missing, not YAML, not a mapping, or says a key twice.
    """
    try:
        value = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, *CRASHES) as error:
        raise ConfigError(
            f"{path} is not valid YAML: {str(error) or type(error).__name__}"
        ) from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(value).__name__}")
    return value


# Null means something at these keys: no training, random weights, no fine-tuning.
KEPT_NULL = ("task", "weights", "finetune")


LIKE = ("teachers", "targets")  # whose entries may be `like` another


def merge(base, overlay):
    """Lays `overlay` over `base`, mapping by mapping.

    A mapping whose `name` differs replaces the base's (the options of another plug-in make no
    sense); null removes an entry of a mapping whose value is a mapping.
    """
    if not (isinstance(base, dict) and isinstance(overlay, dict)):
        return overlay
    named = isinstance(overlay.get("name"), str)  # a plug-in, not an entry that is called so
    if named and overlay["name"] != base.get("name"):
        return overlay
    merged = dict(base)
    for key, value in overlay.items():
        merged[key] = merge(base[key], value) if key in base else value
    return {
        key: value
        for key, value in merged.items()
        if value is not None or not isinstance(base.get(key), dict) or key in KEPT_NULL
    }


def with_nulls(value):
    """Gives a configuration in which the text `null`, as it comes from --config, is null."""
    if isinstance(value, dict):
        return {key: with_nulls(one) for key, one in value.items()}
    if isinstance(value, list):
        return [with_nulls(one) for one in value]
    return None if value == "null" else value


def resolve(root: Path, *overlays: dict[str, Any], check_plugins: bool = True) -> Config:
    """Gives the checked configuration: config.yaml, own-pictures preset, then the overlays.

    Args:
        root: The folder with `config.yaml` and `presets/`.
        *overlays: What each `--configfile` and `--config` said.
        check_plugins: Whether plug-ins' own options are checked, too.

    Raises:
        ConfigError: Anything in it is wrong.
    """
    values = read(Path(root) / "config.yaml")
    images = [overlay["images"] for overlay in overlays if "images" in overlay]
    if images and images[-1]:  # the last word counts
        values = merge(values, read(Path(root) / "presets" / "photos.yaml"))
    _follow(values, overlays)
    before = values
    for overlay in overlays:
        values = merge(values, overlay)
    for kind in ("datasets", "teachers", "transfers", "targets", "evaluations"):
        if isinstance(values.get(kind), dict):  # null removes an entry, also one that is not there
            values[kind] = {k: v for k, v in values[kind].items() if v is not None}
    for kind in LIKE:
        if isinstance(values.get(kind), dict):
            values[kind] = _expand_likes(values[kind], kind)
    config = check(Config, values)
    if config.images:
        _put_path(config)
    elif config.labels:
        raise ConfigError(
            f"labels: are those of `images`, which is null, found {config.labels!r}; for another "
            "data set give datasets.NAME.labels"
        )
    replaced.follow(config, before, _said(overlays))
    coherence.check_names(config)
    if check_plugins:
        coherence.check_plugins(config)
    return config


def _put_path(config: Config) -> None:
    dataset = config.datasets.get("images")
    if dataset is None:
        raise ConfigError(
            "images: is set, but datasets.images is missing (see presets/photos.yaml)"
        )
    given = {"path": config.images} | ({"labels": config.labels} if config.labels else {})
    config.datasets["images"] = dataset.model_copy(update=given)


def _follow(values: dict[str, Any], overlays: tuple) -> None:
    """Lets the transfers that we ship follow what overlays do to the teachers they name.

    A teacher that was set to null no longer teaches; a kind that takes its teachers together goes
    as a whole, since with fewer it would be another one. Of a teacher with other layers the first
    one takes the place of a layer that is gone. What overlays say of transfers stays as it is.
    """
    said = _said(overlays)
    for name, transfer in values["transfers"].items():
        wanted = [_moved(part, said) for part in transfer["of"]]
        left = [part for part in wanted if part]
        if wanted and (not left or (left != wanted and _together(transfer))):
            values["transfers"][name] = None
        else:
            values["transfers"][name] = {**transfer, "of": left}


def _said(overlays: tuple) -> dict[str, Any]:
    """Gives what the overlays say of teachers, by name; None of those that are removed."""
    said: dict[str, Any] = {}
    for overlay in overlays:
        if isinstance(teachers := overlay.get("teachers"), dict):
            for name, teacher in teachers.items():
                before = said.get(name) or {}
                said[name] = merge(before, teacher) if isinstance(teacher, dict) else None
    return said


def _moved(part: str, said: dict[str, Any]) -> str | None:
    """Gives who teaches after the overlays, None for nobody."""
    teacher, _, layer = part.partition("/")
    given = said.get(teacher, {})
    if given is None or given.get("layers") == []:
        return None
    layers = given.get("layers")
    if layer and isinstance(layers, list) and layer not in layers:
        return f"{teacher}/{layers[0]}"
    return part


def _together(transfer: dict[str, Any]) -> bool:
    return plugin("transfers", transfer["kind"]["name"]).TOGETHER


def _expand_likes(entries: dict[str, Any], kind: str) -> dict[str, Any]:
    """Resolves `like: other`: values not given are copied from the other teacher or target."""

    def expand(name: str, seen: tuple[str, ...]):
        own = entries[name]
        if not isinstance(own, dict) or "like" not in own:
            return own
        other = own["like"]
        if not isinstance(other, str) or other not in entries or other in seen:
            raise ConfigError(
                f"{kind}.{name}.like: expected another of the {kind}, found {other!r}"
                f"{nearest(str(other), [key for key in entries if key != name])}"
            )
        given = {key: value for key, value in own.items() if key != "like"}
        return merge(expand(other, (*seen, name)), given)

    return {name: expand(name, (name,)) for name in entries}


# ---------------------------------------------------------------------------- for the steps


def json_object(text: str) -> dict:
    """Reads a JSON object; a type for `argparse`."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, found {text[:40]!r}")
    return found


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
        found = resolve(Path(__file__).parent.parent, *map(read, arguments.files))
        print(yaml.safe_dump(found.model_dump(mode="json")))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(ConfigError.exit_code)


if __name__ == "__main__":
    main()
