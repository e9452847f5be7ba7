"""The trunk of AlexNet as the paper uses it (Krizhevsky et al., NeurIPS 2012; Caffe's variant).

Layers `conv1` ... `conv5`, each behind its ReLU and before any pooling: the maps that the paper
clusters (conv4) and probes. `conv2` and `conv3` begin with 3x3 max-pooling, stride 2, and local
response normalisation, in Caffe's order. What the paper pools behind conv5 is left to the head (a
task's `map`) and to the features (a teacher's `map` and `pool: max`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kt.config import Settings

CHANNELS = (96, 256, 384, 384, 256)
KERNELS = (11, 5, 3, 3, 3)
PADDINGS = (0, 2, 1, 1, 1)
GROUPS = (1, 2, 1, 2, 2)  # conv 2, 4 and 5 were split over two GPUs; the paper keeps it


class Options(Settings):
    """Options of the backbone in the config."""

    stride: Annotated[
        Literal[2, 4],
        Field(description="of conv1: 4 for whole images, 2 for tiles (paper, section 4)"),
    ]
    norm: Annotated[
        Literal["lrn", "batch", "none"],
        Field(description="lrn as in the paper, batch norm before each ReLU, or none"),
    ]


def layers(options: Options) -> list[str]:
    """Names the layers without building them."""
    return [f"conv{number}" for number in range(1, len(CHANNELS) + 1)]


def stages(options: Options) -> dict:
    """Gives the stages in order, He-initialised.

    Differs from the paper: its Gaussian of 0.01 leaves deep trunks at chance for long.
    """
    from torch import nn

    found, inputs = {}, 3
    for number, (channels, kernel, padding, groups) in enumerate(
        zip(CHANNELS, KERNELS, PADDINGS, GROUPS, strict=True), 1
    ):
        batch, stride = options.norm == "batch", options.stride if number == 1 else 1
        conv = nn.Conv2d(inputs, channels, kernel, stride, padding, groups=groups, bias=not batch)
        # By inputs: torch's count of outputs would forget the groups.
        nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        norm = [nn.BatchNorm2d(channels)] if batch else []
        between = _between(options.norm) if number in (2, 3) else []
        found[f"conv{number}"] = nn.Sequential(*between, conv, *norm, nn.ReLU(inplace=True))
        inputs = channels
    return found


def _between(norm: str) -> list:
    """Gives what stands behind conv1 and conv2; Caffe rounds the size of a pooled map up."""
    from torch import nn
    from torch.nn import functional

    class ResponseNorm(nn.LocalResponseNorm):
        """In float32, since squares leave float16, and by a mean that CUDA has deterministic."""

        def forward(self, maps):
            squares = maps.float().square().flatten(2)[:, None]  # (B, 1, M, H W)
            padded = functional.pad(squares, (0, 0, self.size // 2, (self.size - 1) // 2))
            means = functional.avg_pool2d(padded, (self.size, 1), 1).view(maps.shape)
            return (maps / (self.k + self.alpha * means) ** self.beta).to(maps.dtype)

    pool = nn.MaxPool2d(3, 2, ceil_mode=True)
    return [pool, ResponseNorm(5, 1e-4, 0.75, 1.0)] if norm == "lrn" else [pool]
