"""Rounds: a target that was trained on its teachers' clusters becomes the next teacher.

Source: DeepCluster (Caron et al., ECCV 2018) clusters a network's own features again and again;
here each round trains a target from scratch, so that the last one has the same budget as any other.
With `keep` the first teachers' clusters stay beside the target's own, each with heads of their own.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kt.config import Config, Count, Name, layers
from kt.core.step import ConfigError
from kt.transfers import multi_k
from kt.transfers.multi_k import build, clusters  # noqa: F401 (a head for each of all)

NEEDS = "labels"
TOGETHER = True
BY_K = True


class Options(multi_k.Options):
    """Options of the kind in the config."""

    rounds: Annotated[int, Field(ge=2, description="trainings in all, the first on the teachers")]
    keep: Annotated[bool, Field(description="the teachers teach in later rounds, too")]
    target: Annotated[Name, Field(description="whose networks teach the rounds between")]
    layer: Annotated[
        Name | None,
        Field(description="of these networks, whose features are clustered; null: last"),
    ]
    map: Annotated[Count, Field(description="the layer's map is pooled to map x map")]


def check(given: Options, config: Config) -> None:
    """Refuses a target that is not there, and one whose last layer nothing tells."""
    if given.target not in config.targets:
        raise ConfigError(f"target: {given.target!r} is none of {', '.join(config.targets)}")
    backbone = config.targets[given.target].backbone
    known = layers(backbone)
    if known is None and given.layer is None:
        raise ConfigError(f"layer: name one, backbone {backbone.name} does not say its layers")


def teaching_layer(given: Options, config: Config) -> str:
    """Gives the layer's name, also where the options leave it to be the last."""
    return given.layer or layers(config.targets[given.target].backbone)[-1]
