"""Raw pixels as a hand-crafted teacher (ours): the cheapest that a learned one must surpass.

One layer, `pixels`: the image averaged to `edge` x `edge`, normalised by channel, without weights.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kt.config import Count, Settings

ANY_SIZE = True  # no image is too small


class Options(Settings):
    """Options of the backbone in the config."""

    edge: Annotated[Count, Field(description="the image is averaged to edge x edge pixels")]


def layers(options: Options) -> list[str]:
    """Names the only layer."""
    return ["pixels"]


def stages(options: Options) -> dict:
    """Gives the one stage."""
    from torch import nn

    return {"pixels": nn.AdaptiveAvgPool2d(options.edge)}
