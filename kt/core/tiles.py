"""Cuts, mixes and normalises the tiles of jigsaw puzzles: whole batches, on any device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from kt.core import draws
from kt.core.backbone import average
from kt.core.order import neighbour
from kt.core.permutations import NUM_TILES
from kt.core.task import Context, Plan, Task


class JigsawTask(Task):
    """Puzzles of `kt/tasks/jigsawpp.py` and `jigsaw.py`; what is drawn stands in `plan`."""

    num_views = NUM_TILES
    whole_images = False

    def __init__(self, options, context: Context, geometry, permutations, occlusions: int):
        """Keeps sizes in pixels, the permutations (P, 9) and the most tiles to be replaced."""
        super().__init__(context)
        self.options, self.occlusions = options, occlusions
        self.cell, self.tile, self.offset, self.shift = geometry
        self.view_size = self.tile
        self.num_classes = len(permutations)
        self.permutations = torch.from_numpy(permutations).long()

    def rows(self, index: Tensor, epoch: int) -> Tensor:
        """Gives own row and that of another image, (B, 2); (B, 1) where none is replaced."""
        if not self.occlusions:
            return index[:, None]
        number = len(self.context.ids)
        draw = draws.bits(self.context.seed, "other", epoch, self.context.ids[index], 1)[:, 0]
        # All images are one block where any is read as quickly.
        other = neighbour(index, draw, self.context.block or number, number)
        return torch.stack([index, other], 1)

    def plan(self, index: Tensor, epoch: int) -> Plan:
        """Draws what each slot of each puzzle shows.

        Returns:
            `rows` (B, R) and `labels` (B,); per slot (B, 9): `cell`, `source` (0 own image, 1 the
            other); `top` and `left` (B, 9, 3), the corner of each channel's window in pixels;
            `colour` (B, 3, 3), the matrix applied to the channels.
        """
        seed, ids = self.context.seed, self.context.ids[index]
        labels = draws.integers(seed, "permutation", epoch, ids, 1, self.num_classes)[:, 0]
        cell = self.permutations[labels]
        source = self._replaced(ids, epoch).long()
        foreign = draws.choices(seed, "foreign", epoch, ids, NUM_TILES, NUM_TILES)
        cell = torch.where(source == 1, foreign, cell)
        offset = draws.integers(seed, "offset", epoch, ids, 2 * NUM_TILES, self.offset + 1)
        shift = draws.integers(seed, "shift", epoch, ids, 6 * NUM_TILES, self.shift + 1)
        corner = offset.view(-1, 2, NUM_TILES, 1) + shift.view(-1, 2, NUM_TILES, 3)
        top = corner[:, 0] + (cell // 3 * self.cell)[..., None]
        left = corner[:, 1] + (cell % 3 * self.cell)[..., None]
        return {
            "rows": self.rows(index, epoch), "labels": labels, "cell": cell, "source": source,
            "top": top, "left": left, "colour": self._colour(ids, epoch),
        }  # fmt: skip

    def _replaced(self, ids: Tensor, epoch: int) -> Tensor:
        """Says which slots are replaced, (B, 9) bool: 0 to `occlusions` of them, equally likely."""
        seed = self.context.seed
        number = draws.integers(seed, "occlusions", epoch, ids, 1, self.occlusions + 1)
        rank = draws.choices(seed, "occluded", epoch, ids, NUM_TILES, NUM_TILES)
        return rank < number

    def _colour(self, ids: Tensor, epoch: int) -> Tensor:
        """Gives (B, 3, 3): plain grey, Doersch's colour projection, or no change."""
        draw = draws.uniform(self.context.seed, "grey", epoch, ids, 1)[:, :, None]
        grey, projection = self.options.grey, self.options.projection
        mean = torch.full((3, 3), 1 / 3)
        other = torch.where(draw < grey + projection, without_green_magenta(), torch.eye(3))
        return torch.where(draw < grey, mean, other)

    def tiles(self, images: Tensor, plan: Plan) -> Tensor:
        """Gives the tiles before they are normalised, (B, 9, 3, t, t) float32."""
        return cut(mix(images, plan["colour"]), plan, self.tile)

    def views(self, images: Tensor, plan: Plan) -> Tensor:
        """Gives normalised tiles (B, 9, 3, t, t)."""
        return standardise(self.tiles(images, plan))

    def fill(self, images: np.ndarray, plan: Plan) -> Tensor:
        """Gives the same tiles by one compiled loop."""
        return filled(images, plan, self.tile)

    def head(self, map_shape: tuple[int, int, int]) -> nn.Module:
        """Gives the context-free network's head: fc6 per tile, fc7 over all, softmax."""
        return TilesHead(map_shape, NUM_TILES, self.options, self.num_classes)


class TilesHead(nn.Module):
    """Sees each tile alone through fc6 and all together only in fc7 (paper, section 4)."""

    def __init__(self, map_shape: tuple[int, int, int], tiles: int, options, num_classes: int):
        """Builds the layers for maps (M, h, w) of so many tiles."""
        super().__init__()
        channels, height, width = map_shape
        self.pool = (min(height, options.map), min(width, options.map))
        inputs = channels * self.pool[0] * self.pool[1]
        self.tile = nn.Sequential(
            nn.Linear(inputs, options.tile_features), nn.ReLU(), nn.Dropout(options.dropout)
        )
        self.all = nn.Sequential(
            nn.Linear(tiles * options.tile_features, options.hidden),
            nn.ReLU(),
            nn.Dropout(options.dropout),
            nn.Linear(options.hidden, num_classes),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (B, V, M, h, w) to logits (B, C)."""
        pooled = average(maps.flatten(0, 1), self.pool)
        return self.all(self.tile(pooled.flatten(1)).unflatten(0, maps.shape[:2]).flatten(1))


def without_green_magenta() -> Tensor:
    """Gives (3, 3), the projection I - a'a / (a a') with a = (-1, 2, -1).

    Source: Doersch et al., ICCV 2015, section 3.1; also in the code of Jigsaw++.
    """
    direction = torch.tensor([[-1.0, 2.0, -1.0]])
    return torch.eye(3) - direction.T @ direction / (direction @ direction.T)


def mix(images: Tensor, colour: Tensor) -> Tensor:
    """Multiplies the channels of each image by its matrix.

    Args:
        images: (B, R, 3, H, W) uint8.
        colour: (B, 3, 3) float32.

    Returns:
        (B, R, 3, H, W) float32, in grey levels.
    """
    flat = images.to(torch.float32).flatten(3)
    return (colour[:, None] @ flat).view(images.shape)


def cut(images: Tensor, plan: Plan, tile: int) -> Tensor:
    """Cuts all tiles of all puzzles with one gather.

    Args:
        images: (B, R, 3, H, W), any dtype.
        plan: `source` (B, V), `top` and `left` (B, V, 3).
        tile: Edge of a tile in pixels.

    Returns:
        (B, V, 3, tile, tile) of the same dtype.
    """
    batch, sources, channels, height, width = images.shape
    device = images.device
    image = torch.arange(batch, device=device)[:, None] * sources + plan["source"]
    plane = image[..., None] * channels + torch.arange(channels, device=device)
    first = (plane * height + plan["top"]) * width + plan["left"]
    steps = torch.arange(tile, device=device)
    window = steps[:, None] * width + steps
    return images.flatten()[first[..., None, None] + window]


def standardise(tiles: Tensor) -> Tensor:
    """Gives each tile zero mean and unit variance over its pixels and channels.

    The variance is taken from the differences (never E[x^2] - m^2, wrong on flat tiles). A tile
    whose standard deviation is under one grey level is flat and is divided by one level.

    Args:
        tiles: (B, V, 3, t, t) float32 in grey levels.
    """
    centred = tiles - tiles.mean((2, 3, 4), keepdim=True)
    deviation = centred.square().mean((2, 3, 4), keepdim=True).sqrt()
    return centred / deviation.clamp(min=1.0)


def filled(images: np.ndarray, plan: Plan, tile: int) -> Tensor:
    """Does `mix`, `cut` and `standardise` by one compiled loop.

    Args:
        images: (N, 3, H, W) uint8, all images.
        plan: `rows` (B, R), `source` (B, V), `top` and `left` (B, V, 3), `colour` (B, 3, 3).
        tile: Edge of a tile in pixels.

    Returns:
        (B, V, 3, tile, tile) float32.
    """
    from kt.core import compiled  # costs half a second, and an accelerator needs none of it

    found = torch.empty(*plan["source"].shape, 3, tile, tile)
    names = ("rows", "source", "top", "left", "colour")
    compiled.puzzles(images, *(plan[name].numpy() for name in names), found.numpy())
    return found
