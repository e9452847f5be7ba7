"""Cuts pairs of neighbouring patches: whole batches, on any device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from kt.core import draws
from kt.core.task import Context, Plan, Task
from kt.core.tiles import TilesHead, cut, filled, mix, standardise, without_green_magenta

# Row and column of each neighbour, by label, from the centre patch.
NEIGHBOURS = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1) if row or column]


class PairTask(Task):
    """The task of `kt/tasks/context.py`; its draws stand in `plan`."""

    num_classes = len(NEIGHBOURS)
    num_views = 2
    whole_images = False

    def __init__(self, options, context: Context, geometry):
        """Keeps sizes in pixels."""
        super().__init__(context)
        self.options = options
        self.patch, self.step, self.jitter, self.room = geometry
        self.view_size = self.patch

    def plan(self, index: Tensor, epoch: int) -> Plan:
        """Draws the neighbour, the places of both patches and their colours.

        Returns:
            `rows` (B, 1), `labels` (B,); `source` (B, 2), 0; `top` and `left` (B, 2, 3), the corner
            of each patch in pixels, the same for all channels; `colour` (B, 3, 3), the matrix
            applied to the channels.
        """
        seed, ids = self.context.seed, self.context.ids[index]
        labels = draws.integers(seed, "neighbour", epoch, ids, 1, self.num_classes)[:, 0]
        place = draws.integers(seed, "place", epoch, ids, 2, self.room + 1)
        moved = draws.integers(seed, "jitter", epoch, ids, 4, 2 * self.jitter + 1).view(-1, 2, 2)
        towards = torch.tensor(NEIGHBOURS)[labels] * self.step
        corner = (place + self.step)[:, None] + moved  # (B, patch, axis)
        corner[:, 1] += towards
        top, left = (edge[..., None].repeat(1, 1, 3) for edge in corner.unbind(2))
        return {
            "rows": index[:, None], "labels": labels, "source": torch.zeros_like(moved[..., 0]),
            "top": top, "left": left, "colour": self._colour(ids, epoch),
        }  # fmt: skip

    def _colour(self, ids: Tensor, epoch: int) -> Tensor:
        """Gives (B, 3, 3): a direction removed, one channel three times, or no change."""
        draw = draws.uniform(self.context.seed, "colour", epoch, ids, 1)[:, :, None]
        kept = draws.integers(self.context.seed, "channel", epoch, ids, 1, 3)
        projection, same = self.options.projection, torch.eye(3)
        alone = same[kept].expand(-1, 3, 3)
        other = torch.where(draw < projection + self.options.dropping, alone, same)
        return torch.where(draw < projection, without_green_magenta(), other)

    def views(self, images: Tensor, plan: Plan) -> Tensor:
        """Gives normalised patches (B, 2, 3, p, p)."""
        return standardise(cut(mix(images, plan["colour"]), plan, self.patch))

    def fill(self, images: np.ndarray, plan: Plan) -> Tensor:
        """Gives the same patches by one compiled loop."""
        return filled(images, plan, self.patch)

    def head(self, map_shape: tuple[int, int, int]) -> nn.Module:
        """Gives fc6 for each patch alone, fc7 over both, softmax: late fusion."""
        return TilesHead(map_shape, self.num_views, self.options, self.num_classes)
