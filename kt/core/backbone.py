"""A backbone: the convolutional trunk of a network, from images to the map of a named layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kt.core.ending import ConfigError, lack


class Backbone(nn.Module):
    """Stages in a row, each with a name; the names are the layers, but for those of a `Joint`.

    The input normalisation belongs to the network and is saved with its weights.

    Attributes:
        layers: Names of the layers, first to last.
        recipe: Name and options that `build` made it of.
    """

    recipe: tuple[str, dict]

    def __init__(self, stages: dict[str, nn.Module]):
        """Takes the stages in forward order."""
        super().__init__()
        self.stages = nn.ModuleDict(stages)
        for stage in stages.values():
            _spare_input(stage)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("std", torch.ones(3))

    @property
    def layers(self) -> list[str]:
        """Names of the layers, first to last."""
        return [
            layer
            for name, stage in self.stages.items()
            for layer in (stage.layers if isinstance(stage, Joint) else [name])
        ]

    def forward(self, images: Tensor, layer: str | None = None) -> Tensor:
        """Maps normalised images (B, 3, H, W) float32 to the map (B, M, h, w) of a layer.

        Args:
            images: Normalised as `normalise` does.
            layer: Its name; the last one by default.
        """
        layer = self.check_layer(layer)
        return self.maps(images, [layer])[layer]

    def maps(self, images: Tensor, layers: Iterable[str]) -> dict[str, Tensor]:
        """Gives the maps of several layers in one pass."""
        wanted = {self.check_layer(layer) for layer in layers}
        found = {}
        for name, stage in self.stages.items():
            if len(found) == len(wanted):
                break
            several = stage(images) if isinstance(stage, Joint) else {name: stage(images)}
            found.update((layer, several[layer]) for layer in several if layer in wanted)
            images = several[next(reversed(several))]
        return found

    def up_to(self, layer: str) -> dict[str, nn.Module]:
        """Gives the stages that a layer's map needs, by name; of a `Joint` the whole."""
        found = {}
        for name, stage in self.stages.items():
            found[name] = stage
            if layer in (stage.layers if isinstance(stage, Joint) else [name]):
                break
        return found

    def normalise(self, images: Tensor) -> Tensor:
        """Turns uint8 images (B, 3, H, W) into the float32 that `forward` expects, channels last.

        A row of pixels at a time: three channels in turn would leave vector units idle (measured:
        a third of the time).
        """
        width = images.shape[-1]
        found = images.to(torch.float32, memory_format=torch.channels_last, copy=True)
        scale, shift = 1.0 / (255.0 * self.std), self.mean / self.std
        found.permute(0, 2, 3, 1).flatten(2).mul_(scale.repeat(width)).sub_(shift.repeat(width))
        return found

    @torch.inference_mode()
    def features(self, images: Tensor, layer: str | None = None, map: int = 1) -> Tensor:
        """Gives pooled features of uint8 images.

        Args:
            images: (B, 3, H, W) uint8 RGB.
            layer: Which one; the last by default.
            map: The map is pooled to at most map x map.

        Returns:
            (B, D) float32, D = M * map * map.

        Raises:
            ConfigError: They are other than that.
        """
        images = torch.as_tensor(images)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ConfigError(
                f"expected images (B, 3, H, W) uint8, found {tuple(images.shape)} {images.dtype}"
            )
        images = images.to(self.mean.device)
        return pool(self(self.normalise(images), layer), map)

    def check_layer(self, layer: str | None) -> str:
        """Gives the layer's name, the last one for None.

        Raises:
            ConfigError: There is no such layer; the known ones are listed.
        """
        if layer is None:
            return self.layers[-1]
        if layer not in self.layers:
            raise ConfigError(f"layer {layer!r} is not one of {', '.join(self.layers)}")
        return layer

    def map_shape(self, size: int, layer: str | None = None) -> tuple[int, int, int]:
        """Gives (M, h, w) of a layer's map for images of `size` pixels, as `map_shapes` does."""
        layer = self.check_layer(layer)
        return self.map_shapes(size, [layer])[layer]

    def map_shapes(self, size: int, layers: Iterable[str]) -> dict[str, tuple[int, int, int]]:
        """Gives (M, h, w) of the maps of layers for images of `size` pixels, in one pass.

        Raises:
            ConfigError: The images are too small for the network.
        """
        training = self.training
        try:
            with torch.inference_mode():
                found = self.eval().maps(self.mean.new_zeros(1, 3, size, size), layers)
        except (RuntimeError, AssertionError) as error:  # timm asserts sizes
            if lack(error):
                raise
            raise ConfigError(
                f"images or tiles of {size} px do not fit this backbone: {error}"
            ) from None
        finally:
            self.train(training)
        return {name: tuple(maps.shape[1:]) for name, maps in found.items()}


class Residual(nn.Module):
    """A residual block: ReLU of body plus shortcut."""

    def __init__(self, body: nn.Module, shortcut: nn.Module):
        """Takes both branches; their maps must have the same shape."""
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (B, M, h, w) to the block's map."""
        return functional.relu(self.body(maps) + self.shortcut(maps))


class Joint(nn.Module):
    """A model whose layers cannot be told apart as stages: one part that gives several maps.

    Attributes:
        layers: Names of its maps, first to last.
    """

    def __init__(self, model: nn.Module, layers: list[str], channels_last: bool):
        """Takes a model that gives a list of maps, their names, and if they are (B, h, w, M)."""
        super().__init__()
        self.model, self.layers, self.channels_last = model, layers, channels_last

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps (B, 3, H, W) to a map (B, M, h, w) for each layer."""
        found = self.model(images)
        if self.channels_last:
            found = [maps.permute(0, 3, 1, 2) for maps in found]
        return dict(zip(self.layers, found, strict=True))


class Descriptor(nn.Module):
    """A hand-crafted descriptor as a stage: no weights, computed image by image with numpy."""

    def __init__(self, describe: Callable[[np.ndarray], np.ndarray]):
        """Takes a function from one image (H, W, 3) float32 to its map (h, w, M)."""
        super().__init__()
        self.describe = describe

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (B, 3, H, W) to (B, M, h, w) float32."""
        pixels = images.permute(0, 2, 3, 1).float().cpu().numpy()
        maps = np.stack([self.describe(image) for image in pixels]).astype(np.float32)
        return torch.from_numpy(maps).permute(0, 3, 1, 2).to(images.device)


def _spare_input(stage: nn.Module) -> None:
    """Lets a stage that begins in place leave alone what it is given: the map of the one before."""
    for part in stage.modules():
        if [*part.children()]:
            continue
        if getattr(part, "inplace", False):
            part.inplace = False
        if not isinstance(part, nn.Identity | nn.Dropout | nn.Sequential):
            return


def pool(maps: Tensor, edge: int, kind: str = "mean") -> Tensor:
    """Pools maps (B, M, h, w) to at most edge x edge and flattens them, (B, D) float32.

    Args:
        maps: Of a layer.
        edge: The map's, afterwards.
        kind: `mean`, or `max` as in the paper.
    """
    height, width = maps.shape[-2:]
    pooling = {"mean": average, "max": functional.adaptive_max_pool2d}
    return pooling[kind](maps.float(), (min(height, edge), min(width, edge))).flatten(1)


def average(maps: Tensor, cells: Sequence[int]) -> Tensor:
    """Averages maps (B, M, H, W) over a grid of cells (h, w), as `adaptive_avg_pool2d` does.

    That one's backward pass has no deterministic form on CUDA; where one is asked for, these are
    two products.
    """
    if not (maps.requires_grad and torch.are_deterministic_algorithms_enabled()):
        return functional.adaptive_avg_pool2d(maps, cells)
    rows, columns = (
        _shares(number, side, maps.device).to(maps.dtype)
        for number, side in zip(cells, maps.shape[2:], strict=True)
    )
    return rows @ maps @ columns.T


def _shares(cells: int, side: int, where: torch.device) -> Tensor:
    """Gives what each of `side` places has in each cell's mean, (cells, side) float32.

    Made on the device: a copy from the CPU would wait for all that the device has still to do.
    """
    cell, place = torch.arange(cells, device=where)[:, None], torch.arange(side, device=where)
    first, last = cell * side // cells, -(-(cell + 1) * side // cells)
    return ((place >= first) & (place < last)) / (last - first)


def pooled(
    backbone: Backbone, images: Tensor, layers: list[str], edge: int, kind: str, mirror: bool
) -> dict[str, Tensor]:
    """Gives pooled features (B, D) of layers of normalised images (B, 3, H, W).

    Args:
        backbone: In eval mode.
        images: Normalised.
        layers: Names.
        edge: See `pool`.
        kind: See `pool`.
        mirror: Whether they are averaged over the image and its mirror image.
    """
    found = {layer: pool(map, edge, kind) for layer, map in backbone.maps(images, layers).items()}
    if mirror:
        other = pooled(backbone, images.flip(-1), layers, edge, kind, False)
        found = {layer: (rows + other[layer]) / 2 for layer, rows in found.items()}
    return found


def build(name: str, options: dict) -> Backbone:
    """Builds a backbone with fresh weights.

    Args:
        name: File in `kt/backbones`.
        options: Checked against the `Options` of that file.

    Raises:
        ConfigError: Unknown name or wrong options.
    """
    from kt import config

    checked = config.options("backbones", name, options, f"backbone {name}")
    found = Backbone(config.plugin("backbones", name).stages(checked))
    found.recipe = (name, options)
    return found


def fold_norms(backbone: Backbone) -> None:
    """Folds each batch norm behind a convolution into its weights, in place, for eval mode.

    The same features but for rounding, a tenth quicker; only those that follow one another in an
    `nn.Sequential` are sure to do so in the forward pass.
    """
    rows = [part for part in backbone.modules() if isinstance(part, nn.Sequential)]
    for row in rows:
        for (name, conv), (next_name, norm) in itertools.pairwise(row.named_children()):
            known = type(norm) is nn.BatchNorm2d and norm.running_mean is not None
            if type(conv) is nn.Conv2d and known:
                setattr(row, name, fuse_conv_bn_eval(conv, norm))
                setattr(row, next_name, nn.Identity())


@torch.no_grad()
def estimate_statistics(backbone: Backbone, images: Iterable[Tensor]) -> None:
    """Sets the batch-norm statistics to those of whole images, cumulative over the batches.

    A network trained on tiles has seen each with its own mean and deviation; its running statistics
    do not fit whole images (measured: k-NN .42 instead of .50). The same goes for random weights,
    whose statistics are those of nothing.

    Args:
        backbone: Changed in place; left in eval mode.
        images: Batches (B, 3, H, W) uint8.
    """
    norms = [
        part for part in backbone.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)
    ]
    backbone.eval()
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    for norm in norms:
        norm.train()
    for batch in images:
        backbone(backbone.normalise(batch.to(backbone.mean.device)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    backbone.eval()
