"""A plain convolutional network with batch norm: the small target (ours).

Layers `conv1`, `conv2`, ...: 3x3 convolution with a stride, batch norm, ReLU.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kt.config import Count, Settings
from kt.core.step import ConfigError


class Options(Settings):
    """Options of the backbone in the config."""

    widths: Annotated[list[Count], Field(min_length=1, description="channels of each convolution")]
    strides: Annotated[list[Count], Field(min_length=1, description="step of each convolution, pixels")]


def layers(options: Options) -> list[str]:
    """Names the layers without building them."""
    return [f"conv{number}" for number in range(1, len(options.widths) + 1)]


def stages(options: Options) -> dict:
    """Gives the stages in order, He-initialised.

    Raises:
        ConfigError: Not one stride per width.
    """
    from torch import nn

    one_stride_per_width(options.widths, options.strides)
    found, channels = {}, 3
    for number, (width, stride) in enumerate(zip(options.widths, options.strides, strict=True), 1):
        conv = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        found[f"conv{number}"] = nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        channels = width
    return found


def one_stride_per_width(widths: list[int], strides: list[int]) -> None:
    """Raises ConfigError if the two lists are not equally long."""
    if len(widths) != len(strides):
        raise ConfigError(
            f"backbone.strides: expected one for each of the {len(widths)} widths, found "
            f"{len(strides)}"
        )
