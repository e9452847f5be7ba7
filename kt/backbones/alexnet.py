"""The trunk of AlexNet as the paper uses it (Krizhevsky et al., NeurIPS 2012; Caffe's variant).

Layers `conv1` ... `conv5`, each behind its ReLU and before any pooling: the maps that the paper
clusters (conv4) and probes. `conv2` and `conv3` begin with 3x3 max-pooling, stride 2, and local
response normalisation, in Caffe's order. What the paper pools behind conv5 is left to the head (a
task's `map`) and to the features (a teacher's `map` and `pool: max`). With `units` come `fc6` and
`fc7`, as convolutions: pooling, 6x6 places (averaged where the map is not of that size, as in
torchvision's AlexNet), each with ReLU and dropout.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kt.config import Count, Settings

CHANNELS = (96, 256, 384, 384, 256)
KERNELS = (11, 5, 3, 3, 3)
PADDINGS = (0, 2, 1, 1, 1)
GROUPS = (1, 2, 1, 2, 2)  # conv 2, 4 and 5 were split over two GPUs; the paper keeps it
PLACES = 6  # that fc6 sees, squared: those of images of 227 px behind conv5 and pooling
DROPOUT = 0.5  # behind fc6 and fc7


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
    units: Annotated[
        Count | None,
        Field(description="of fc6 and fc7, kept as layers; paper: 4096; null: convolutions alone"),
    ] = None


def layers(options: Options) -> list[str]:
    """Names the layers without building them."""
    found = [f"conv{number}" for number in range(1, len(CHANNELS) + 1)]
    return [*found, "fc6", "fc7"] if options.units else found


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
    if options.units:
        found["fc6"] = nn.Sequential(*_places(), *_fully(inputs, options.units, PLACES))
        found["fc7"] = nn.Sequential(*_fully(options.units, options.units, 1))
    return found


def _places() -> list:
    """Gives what stands behind conv5: pooling, and PLACES x PLACES means of what is left."""
    from torch import nn

    from kt.core.backbone import average

    class Places(nn.Module):
        """Averages a map, by a mean whose gradients CUDA has deterministic."""

        def forward(self, maps):
            return average(maps, (PLACES, PLACES))

    return [nn.MaxPool2d(3, 2, ceil_mode=True), Places()]


def _fully(inputs: int, units: int, places: int) -> list:
    """Gives a fully connected layer as a convolution that sees all places."""
    from torch import nn

    conv = nn.Conv2d(inputs, units, places)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    nn.init.zeros_(conv.bias)
    return [conv, nn.ReLU(inplace=True), nn.Dropout(DROPOUT)]


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
