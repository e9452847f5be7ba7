"""A small residual network with batch norm: the deep teacher (after He et al., CVPR 2016).

Layers `stem`, `block1`, `block2`, ...: a 3x3 stem, then one stage per width, each with `blocks`
residual blocks, the first with the stage's stride.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from kt.backbones.plain import one_stride_per_width
from kt.config import Count, Settings

ANY_SIZE = True  # no image is too small


class Options(Settings):
    """Options of the backbone in the config."""

    widths: Annotated[list[Count], Field(min_length=1, description="channels of each stage")]
    strides: Annotated[list[Count], Field(min_length=1, description="step of each stage, pixels")]
    blocks: Annotated[Count, Field(description="residual blocks in each stage")]
    _lengths = model_validator(mode="after")(one_stride_per_width)


def layers(options: Options) -> list[str]:
    """Names the layers without building them."""
    return ["stem", *(f"block{number}" for number in range(1, len(options.widths) + 1))]


def stages(options: Options) -> dict:
    """Gives the stages in order, He-initialised."""
    from torch import nn

    from kt.core.backbone import Residual

    def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1):
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        return nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def block(inputs: int, outputs: int, stride: int):
        body = nn.Sequential(
            convolution(inputs, outputs, stride=stride),
            nn.ReLU(inplace=True),
            convolution(outputs, outputs),
        )
        same = stride == 1 and inputs == outputs
        return Residual(body, nn.Identity() if same else convolution(inputs, outputs, 1, stride))

    channels = options.widths[0]
    found = {"stem": nn.Sequential(convolution(3, channels), nn.ReLU(inplace=True))}
    for number, (width, stride) in enumerate(zip(options.widths, options.strides, strict=True), 1):
        first = block(channels, width, stride)
        rest = [block(width, width, 1) for _ in range(options.blocks - 1)]
        found[f"block{number}"] = nn.Sequential(first, *rest)
        channels = width
    return found
