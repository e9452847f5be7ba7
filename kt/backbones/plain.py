"""A plain convolutional network with batch norm: the small target (ours).

Layers `conv1`, `conv2`, ...: 3x3 convolution, batch norm, ReLU; each but the first halves the map.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kt.config import Count, Settings


class Options(Settings):
    """Options of the backbone in the config."""

    widths: Annotated[list[Count], Field(min_length=1, description="channels of each convolution")]


def stages(options: Options) -> dict:
    """Gives the stages in order, He-initialised."""
    from torch import nn

    found, channels = {}, 3
    for number, width in enumerate(options.widths, 1):
        conv = nn.Conv2d(channels, width, 3, stride=1 if number == 1 else 2, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        found[f"conv{number}"] = nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        channels = width
    return found
