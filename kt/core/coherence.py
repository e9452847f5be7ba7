"""Checks that the parts of a configuration fit each other, before any job runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kt.core.checking import layers, nearest, options, pinned, plugin, plugins
from kt.core.ending import ConfigError
from kt.core.schema import AUTO, PRETRAINED, Config, Plugin, Teacher, Transfer


def check_names(config: Config) -> None:
    """Checks that every name that refers to something refers to something that is there."""

    def known(key: str, name: str, names) -> None:
        if name not in names:
            raise ConfigError(f"{key}: {name!r} is not defined{nearest(name, list(names))}")

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
        _check_arm(name, teacher)
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
                    f"{nearest(layer, config.teachers[teacher].layers)}"
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
    if teacher.features and not teacher.features.endswith((".npy", ".h5", ".hdf5")):
        raise ConfigError(
            f"teachers.{name}.features: expected a .npy or .h5 file, found {teacher.features!r}"
        )


def _check_arm(name: str, teacher: Teacher) -> None:
    """Checks that what is judged beside the targets is what the name of its arm says."""
    if teacher.evaluate_as and isinstance(teacher.backbone, Plugin):
        raise ConfigError(
            f"teachers.{name}.evaluate_as: expected null or the name of a target as "
            f"teachers.{name}.backbone, found the backbone {teacher.backbone.name}: arms differ by "
            "what was learned, not by architecture"
        )
    where = f"teachers.{name}.evaluate_as: expected null or "
    if teacher.evaluate_as in ("direct", "longer") and not teacher.task:
        raise ConfigError(
            f"{where}a network that learns a pretext task, found {teacher.evaluate_as!r} and "
            f"teachers.{name}.task: null; give it a task. Where that comes by `like` of a teacher "
            "that was trained elsewhere, give that teacher an entry of its own"
        )
    if teacher.evaluate_as == "random" and (teacher.task or teacher.weights):
        key = "task" if teacher.task else "weights"
        raise ConfigError(
            f"{where}a network with random weights, found 'random' and teachers.{name}.{key}; make "
            f"teachers.{name}.{key} null"
        )


def _check_sizes(config: Config) -> None:
    dataset = config.datasets[config.use.cluster]
    largest = max(config.numbers, default=0)
    if dataset.unlabelled and dataset.unlabelled < largest:
        raise ConfigError(
            f"clusters: k = {largest} is more than the {dataset.unlabelled} images of "
            f"datasets.{config.use.cluster}.unlabelled; choose a smaller k or more images"
        )
    if config.clustering.whiten and config.clustering.pca is None:
        raise ConfigError("clustering.whiten: needs clustering.pca, found null")


def check_plugins(config: Config) -> None:
    """Checks the options of every plug-in; pins what a backbone depends on beside them."""
    for name, dataset in config.datasets.items():
        source = plugin("sources", dataset.source, f"datasets.{name}.source")
        if dataset.labels and not getattr(source, "LABELS", False):
            raise ConfigError(
                f"datasets.{name}.labels: the source {dataset.source} has labels of its own, so "
                f"expected null, found {dataset.labels!r}"
            )
    size = {role: config.datasets[name].size for role, name in config.use}
    for name, other in list(config.targets.items()):  # first: teachers may name a target's backbone
        backbone = _check_plugin("backbones", other.backbone, f"targets.{name}.backbone")
        task = _check_task(other.task, size["target"], f"targets.{name}.task", True)
        changes = {"backbone": pinned(backbone), "task": task}
        config.targets[name] = other.model_copy(update=changes)
        _check_batch(other, f"targets.{name}")
    for name, transfer in config.transfers.items():
        _check_transfer(config, name, transfer)
    for name, teacher in list(config.teachers.items()):
        _check_teacher(config, name, teacher)
        if teacher.task:
            task = _check_task(teacher.task, size["pretext"], f"teachers.{name}.task", False)
            config.teachers[name] = config.teachers[name].model_copy(update={"task": task})
    _check_task(config.choice.task, size["cluster"], "choice.task", True)
    for name, values in config.evaluations.items():
        checked = options("evaluations", name, values, f"evaluations.{name}")
        config.evaluations[name] = _as_read(values, checked.model_dump(mode="json"))
        if hasattr(checked, "task"):
            task = _check_task(checked.task, size["evaluate"], f"evaluations.{name}.task", True)
            if "task" in values:
                config.evaluations[name]["task"] = _as_read(values["task"], task.model_dump())
            _check_batch(checked, f"evaluations.{name}")
    check_layers(config, layers)
    _check_verdict(config)


def check_layers(config: Config, layers_of: Callable[[Plugin], list[str] | None]) -> None:
    """Checks every layer that is named: it is needed long after the training has started.

    Args:
        config: The configuration.
        layers_of: Lists the layers of a backbone; None where it does not know them.

    Raises:
        ConfigError: With the dotted key and the nearest layer that there is.
    """
    for key, owner, layer in _named_layers(config):
        named = isinstance(owner, str)
        known = layers_of(config.targets[owner].backbone if named else owner)
        if known is not None and layer not in known:
            whose = f" of targets.{owner}" if named else ""
            raise ConfigError(f"{key}: {layer!r} is not a layer{whose}{nearest(layer, known)}")


def _named_layers(config: Config) -> Iterator[tuple[str, str | Plugin, str]]:
    """Gives the dotted key of each layer that is named, whose it is (a backbone, a target), it."""
    for name, teacher in config.teachers.items():
        for layer in teacher.layers if not teacher.features else []:
            if layer != AUTO:
                yield f"teachers.{name}.layers", teacher.backbone, layer
    for name, transfer in config.transfers.items():
        checked = options("transfers", transfer.kind.name, transfer.kind.options())
        if getattr(checked, "layer", None):
            yield f"transfers.{name}.kind.layer", checked.target, checked.layer
    for name, values in config.evaluations.items():
        checked = options("evaluations", name, values)
        one = getattr(checked, "layer", None)
        named = {"layer": [one] if one else []}
        named |= {key: getattr(checked, key, []) for key in ("layers", "skips")}
        for key, some in named.items():
            for layer in some:
                for target in config.targets:
                    yield f"evaluations.{name}.{key}", target, layer


def _check_verdict(config: Config) -> None:
    """Checks that what is to choose measures something to choose by."""

    def chooses(name: str) -> bool:
        return getattr(plugin("evaluations", name), "CHOOSES", False)

    if wrong := [name for name in config.verdict if not chooses(name)]:
        able = filter(chooses, plugins("evaluations"))
        raise ConfigError(
            f"verdict: expected evaluations that measure a validation score, {', '.join(able)}; "
            f"found {', '.join(wrong)}, by which nothing can be chosen; take it out"
        )


def _check_transfer(config: Config, name: str, transfer: Transfer) -> None:
    key = f"transfers.{name}.kind"
    kind = _check_plugin("transfers", transfer.kind, key)
    config.transfers[name] = transfer.model_copy(update={"kind": kind})
    if name == "hard" != transfer.kind.name:
        raise ConfigError(
            f"{key}: the name `hard` is for the kind hard, whose paths have no name, found "
            f"{transfer.kind.name}; choose another name"
        )
    module = plugin("transfers", transfer.kind.name)
    for part in transfer.of if module.TOGETHER else []:  # with fewer it would be another one
        if part in config.teachers and not config.teachers[part].layers:
            raise ConfigError(
                f"transfers.{name}.of: {part!r} teaches nothing, since teachers.{part}.layers is "
                "[]; name a layer there, or take it out of here"
            )
    if hasattr(module, "check"):
        try:
            module.check(options("transfers", kind.name, kind.options()), config)
        except ConfigError as error:
            raise ConfigError(f"{key}.{error}") from None


def _check_teacher(config: Config, name: str, teacher: Teacher) -> None:
    """Checks a teacher's network, and whether what is `auto` can be chosen with it."""
    value = teacher.backbone
    if isinstance(value, str):
        value = config.targets[value].backbone
    value = _check_plugin("backbones", value, f"teachers.{name}.backbone")
    if AUTO in teacher.layers and len(teacher.layers) > 1:
        raise ConfigError(
            f"teachers.{name}.layers: {AUTO} chooses one of all layers and stands alone, found "
            f"{teacher.layers}"
        )
    unseen = {"clusters": config.clusters if teacher.layers else []}
    unseen[f"teachers.{name}.layers"] = teacher.layers
    for key, values in unseen.items():
        if teacher.features and AUTO in values:
            raise ConfigError(
                f"{key}: {AUTO} needs a network that can look at two views of an image, and "
                f"teachers.{name}.features are given, not computed; name what you want"
            )
    publishes = hasattr(plugin("backbones", value.name), "published")
    if teacher.weights and teacher.weights.path == PRETRAINED and not publishes:
        raise ConfigError(
            f"teachers.{name}.weights.path: nobody publishes weights of backbone {value.name}; "
            "name a file"
        )
    if isinstance(teacher.backbone, Plugin):
        config.teachers[name] = teacher.model_copy(update={"backbone": pinned(value)})


def _as_read(given, read):
    """Gives values as they were given, but text as what it was read as.

    All numbers on the command line are text. Left so, they would be other values than the same
    numbers in a file, after which everything is made anew.
    """
    if isinstance(given, dict) and isinstance(read, dict):
        return {key: _as_read(value, read.get(key, value)) for key, value in given.items()}
    if isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        return [_as_read(*pair) for pair in zip(given, read, strict=True)]
    return read if isinstance(given, str) else given


def _check_task(value: Plugin, size: int, key: str, given: bool) -> Plugin:
    """Checks a task's options, and whether it learns labels that it is given, or its own.

    Returns:
        The task with its options as they were read.
    """
    task = _check_plugin("tasks", value, key)

    def takes_labels(name: str) -> bool:
        return getattr(plugin("tasks", name), "LABELS", False)

    if takes_labels(value.name) != given:
        able = [name for name in plugins("tasks") if takes_labels(name) == given]
        what = "learns the labels it is given" if given else "has labels of its own"
        raise ConfigError(
            f"{key}: expected a task that {what}, found {value.name}; there is {', '.join(able)}"
        )
    try:
        plugin("tasks", value.name).check(options("tasks", task.name, task.options()), size)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None
    return task


def _check_batch(learner, key: str) -> None:
    """Checks that a hidden layer in the head, which is normalised, sees more than one image."""
    training = getattr(learner, "training", None)
    if training and training.batch < 2 and learner.task.options().get("hidden"):
        raise ConfigError(
            f"{key}.training.batch: expected 2 or more where {key}.task.hidden is not 0, found 1"
        )


def _check_plugin(kind: str, value: Plugin, key: str) -> Plugin:
    """Checks the options of a plug-in; gives it with these as they were read."""
    checked = options(kind, value.name, value.options(), key)
    return Plugin(name=value.name, **_as_read(value.options(), checked.model_dump(mode="json")))
