"""A plain convolutional network with batch norm: the small target (ours).

Layers `conv1`, `conv2`, ...: 3x3 convolution with a stride, batch norm, ReLU.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from kt.config import Count, Settings

ANY_SIZE = True  # no image is too small


def one_stride_per_width(options):
    """Gives the options back, or raises ValueError if the two lists are not equally long."""
    if len(options.widths) != len(options.strides):
        raise ValueError(
            f"strides: expected one for each of the {len(options.widths)} widths, found "
            f"{len(options.strides)}"
        )
    return options


class Options(Settings):
    """Options of the backbone in the config."""

    widths: Annotated[list[Count], Field(min_length=1, description="channels of each convolution")]
    strides: Annotated[
        list[Count], Field(min_length=1, description="step of each convolution, pixels")
    ]
    _lengths = model_validator(mode="after")(one_stride_per_width)


def layers(options: Options) -> list[str]:
    """Names the layers without building them."""
    return [f"conv{number}" for number in range(1, len(options.widths) + 1)]


def stages(options: Options) -> dict:
    """Gives the stages in order, He-initialised."""
    from torch import nn

    found, channels = {}, 3
    for number, (width, stride) in enumerate(zip(options.widths, options.strides, strict=True), 1):
        conv = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        found[f"conv{number}"] = nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        channels = width
    return found
