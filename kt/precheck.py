"""Finds, before the first job, mistakes that neither the configuration nor a dry run shows.

Some networks have to be built to tell their layers (timm, most models of torchvision, files of your
own), and PASCAL VOC has to be where it is said to be, with all its lists. Found only by the job
that needs it, such a mistake would show when teachers have been trained. The workflow calls this
when a run starts:

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
    """Looks for PASCAL VOC, and builds the networks that have to be.

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
    """Says whether a network's options leave open what layers it has, or if there is such a one."""
    joint = getattr(config.plugin("backbones", backbone.name), "JOINT", False)
    return joint or config.layers(backbone) is None


def _layers(backbone: Plugin) -> list[str]:
    """Lists the layers of a network, built where it must be."""
    return _built(config.dumps(backbone)) if _must_be_built(backbone) else config.layers(backbone)


@functools.cache
def _built(backbone: str) -> list[str]:
    from kt.core import model

    return model.fresh(config.json_of(Plugin)(backbone), 0).layers


@contextlib.contextmanager
def _under(key: str) -> Iterator[None]:
    """Puts a dotted key before what an error says."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{key}.{error}") from None


if __name__ == "__main__":
    main()
