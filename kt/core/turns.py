"""Turns whole images by quarter turns: whole batches, on any device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from kt.core import draws
from kt.core.augment import LabelHead, augmented, drawn_augmentation, filled_augmented
from kt.core.task import Context, Plan, Task

TURNS = 4


class RotationTask(Task):
    """The task of `kt/tasks/rotation.py`; its draws stand in `plan`."""

    num_classes = TURNS

    def __init__(self, options, context: Context):
        """Keeps the options."""
        super().__init__(context)
        self.options = options
        self.view_size = context.size

    def plan(self, index: Tensor, epoch: int) -> Plan:
        """Draws augmentation, as for labels, and the turn: each one once in four epochs.

        Returns:
            `rows` (B, 1), `labels` (B,), and what `drawn_augmentation` gives.
        """
        seed, ids = self.context.seed, self.context.ids[index]
        labels = draws.choices(seed, "turn", epoch // TURNS, ids, TURNS, TURNS)[:, epoch % TURNS]
        drawn = drawn_augmentation(self.options, self.context, index, epoch)
        return {"rows": index[:, None], "labels": labels, **drawn}

    def views(self, images: Tensor, plan: Plan) -> Tensor:
        """Gives normalised, turned views (B, 1, 3, S, S)."""
        return turned(augmented(images[:, 0], plan), plan["labels"])[:, None]

    def fill(self, images: np.ndarray, plan: Plan) -> Tensor:
        """Gives the same views by two compiled loops, channels last."""
        from kt.core import compiled  # costs half a second, and an accelerator needs none of it

        found = filled_augmented(images, plan)
        compiled.turn(found.permute(0, 2, 3, 1).numpy(), plan["labels"].numpy())
        return found[:, None]

    def head(self, map_shape: tuple[int, int, int]) -> nn.Module:
        """Gives a global average, a hidden layer if wanted, and a linear layer."""
        return LabelHead(map_shape[0], self.options.hidden, self.num_classes)


def turned(images: Tensor, turns: Tensor) -> Tensor:
    """Turns each square image counter-clockwise, with one gather.

    Args:
        images: (B, M, S, S), any dtype.
        turns: (B,) int64, quarter turns 0..3.

    Returns:
        (B, M, S, S) of the same dtype.
    """
    places = torch.arange(images[0, 0].numel(), device=images.device).view(images.shape[2:])
    source = torch.stack([places.rot90(turn).flatten() for turn in range(TURNS)])[turns]
    flat = images.flatten(2)
    return flat.gather(2, source[:, None].expand_as(flat)).view(images.shape)
