"""Finds, before the first job, mistakes that neither the configuration nor a dry run shows.

Some networks have to be built to tell their layers (timm, most models of torchvision, files of your
own) and which images they take (AlexNet: none that are too small; transformers: of one size), and
PASCAL VOC has to be where it is said to be, with all its lists, and what is trained on it has to
fit the targets. Found only by the job that needs it, such a mistake would show when teachers have
been trained. The workflow calls this when a run starts:

    python -m kt.precheck --settings '{...}'            the whole configuration as JSON
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Iterator

from kt import config, workflow
from kt.config import Config, Plugin
from kt.core import coherence, step
from kt.core.step import ConfigError


def main() -> None:
    """Parses the command line; ends with 2 where something is wrong, of a list of VOC with 3."""
    parser = argparse.ArgumentParser(
        prog="python -m kt.precheck",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--settings", type=config.json_of(Config), required=True)
    sys.exit(step.exit_code(check, parser.parse_args().settings))


def is_needed(settings: Config) -> bool:
    """Says whether there is anything that only `check` finds, which takes seconds."""
    return any(map(_must_be_built, _backbones(settings).values())) or any(_on_voc(settings))


def check(settings: Config) -> None:
    """Looks for PASCAL VOC, and builds the networks that have to be and gives them an image.

    Raises:
        ConfigError: Something is wrong; begins with its dotted key.
        DataError: A list of PASCAL VOC is.
    """
    for name in _on_voc(settings):
        given = config.options("evaluations", name, settings.evaluations[name])
        with _under(f"evaluations.{name}"):
            config.plugin("evaluations", name).pictures(given)
    for key, backbone in _backbones(settings).items():
        with _under(key):
            _layers(backbone)
    coherence.check_layers(settings, _layers)
    for key, backbone in _backbones(settings).items():
        if _must_be_built(backbone):
            _check_sizes(settings, key, backbone)
    for name in _on_voc(settings):
        given = config.options("evaluations", name, settings.evaluations[name])
        for target, other in settings.targets.items():
            with _under(f"evaluations.{name} of targets.{target}", ": "):
                network = _built(config.dumps(other.backbone))
                config.plugin("evaluations", name).build(network, given)


def _backbones(settings: Config) -> dict[str, Plugin]:
    """Gives all networks of a run by dotted key."""
    found = {f"targets.{name}": target.backbone for name, target in settings.targets.items()}
    for name in workflow.at_work(settings):
        found[f"teachers.{name}"] = workflow.backbone(settings, settings.teachers[name])
    return found


def _on_voc(settings: Config) -> Iterator[str]:
    """Gives the evaluations on PASCAL VOC."""
    for name in settings.evaluations:
        if hasattr(config.plugin("evaluations", name), "YEAR"):
            yield name


def _must_be_built(backbone: Plugin) -> bool:
    """Says whether a network's options leave open what layers it has and what images it takes."""
    any_size = getattr(config.plugin("backbones", backbone.name), "ANY_SIZE", False)
    return not any_size or config.layers(backbone) is None


def _layers(backbone: Plugin) -> list[str]:
    """Lists the layers of a network, built where it must be."""
    if _must_be_built(backbone):
        return _built(config.dumps(backbone)).layers
    return config.layers(backbone)


@functools.cache
def _built(backbone: str):
    from kt.core import model

    return model.fresh(config.json_of(Plugin)(backbone), 0)


def _check_sizes(settings: Config, key: str, backbone: Plugin) -> None:
    """Gives a network an image of each size that it will see."""
    network = _built(config.dumps(backbone))
    for what, size, layers in _looks(settings, key, network.layers):
        try:
            network.map_shapes(size, layers)
        except ConfigError as error:
            raise ConfigError(
                f"{key}.backbone: {error}; these are {what}: choose another network or another size"
            ) from None


def _looks(settings: Config, key: str, layers: list[str]) -> Iterator[tuple[str, int, list[str]]]:
    """Gives what a network will look at: in words, the size in pixels, and up to which layers."""
    section, _, name = key.partition(".")
    sizes = {role: settings.datasets[dataset].size for role, dataset in settings.use}
    whole = {role: f"images of the set {dataset!r}" for role, dataset in settings.use}
    if section == "targets":
        yield whole["target"], sizes["target"], layers
        yield whole["evaluate"], sizes["evaluate"], layers
        return
    teacher = settings.teachers[name]
    if workflow.trains(teacher):
        from kt import compute

        size = compute.task_of(teacher.task, sizes["pretext"]).view_size
        yield f"{teacher.task.name}'s views of {whole['pretext']}", size, layers
    if teacher.layers and not teacher.features:
        described = layers if config.AUTO in teacher.layers else teacher.layers
        for role in ("cluster", "target"):
            yield whole[role], sizes[role], described
    if teacher.evaluate_as:
        yield whole["evaluate"], sizes["evaluate"], layers


@contextlib.contextmanager
def _under(key: str, link: str = ".") -> Iterator[None]:
    """Puts a dotted key before what an error says."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{key}{link}{error}") from None


if __name__ == "__main__":
    main()
