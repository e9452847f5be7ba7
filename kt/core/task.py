"""What a task is: it turns a batch of images into views and labels and owns the head.

Pretext tasks, pseudo-labels, fine-tuning and the supervised bound are all tasks, so one training
loop serves every network.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kt.core import draws
from kt.core.order import WINDOW, block_order
from kt.core.transfer import Transfer

# What was drawn for B images: tensors whose first dimension is B, by name.
Plan = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Context:
    """What a task is built with.

    Attributes:
        size: Edge of the images in pixels.
        ids: (N,) int64, one per row of the pack.
        mean: (3,) channel means of the pool in 0..1.
        std: (3,) channel standard deviations in 0..1.
        seed: Of every draw.
        labels: (N,) int64 with -1 for rows without one, or None for pretext tasks.
        num_classes: Number of labels, 0 for pretext tasks.
        transfer: What is learned instead of labels, or None.
        block: Consecutive rows that are read together, or 0 where any row is read as quickly.
    """

    size: int
    ids: Tensor
    mean: Tensor
    std: Tensor
    seed: int
    labels: Tensor | None = None
    num_classes: int = 0
    block: int = 0
    transfer: Transfer | None = None


class Task:
    """Base of the tasks in `kt/tasks`; a task says how views and labels come about.

    Attributes:
        num_classes: C, the number of labels.
        num_views: V, the number of views of an image.
        view_size: Edge of a view in pixels.
        whole_images: Whether views are whole images; if not, batch-norm statistics are
            re-estimated on whole images before the backbone is used.
    """

    num_classes: int
    num_views = 1
    view_size: int
    whole_images = True

    def __init__(self, context: Context):
        """Keeps the context."""
        self.context = context

    def order(self, index: Tensor, epoch: int) -> Tensor:
        """Gives the rows of one epoch in training order, (n,) int64, from the rows at hand."""
        ids, seed = self.context.ids[index], self.context.seed
        if self.context.block:
            return index[block_order(ids, seed, epoch, self.context.block, WINDOW)]
        return index[draws.permutation(seed, "order", epoch, ids)]

    def plan(self, index: Tensor, epoch: int) -> Plan:
        """Draws everything by which views differ, each image's share a function of its id alone.

        Args:
            index: (B,) int64 rows.
            epoch: Which pass; -1 for validation, whose draws never change.

        Returns:
            Tensors of length B: at least `rows` (B, R) int64, the images needed, one's own first,
            and `labels` (B,) int64.
        """
        raise RuntimeError(f"{type(self).__name__} must define plan")

    def views(self, images: Tensor, plan: Plan) -> Tensor:
        """Makes views by tensor operations, on any device.

        Args:
            images: (B, R, 3, H, W) uint8, the images of `plan["rows"]`.
            plan: Of B images, on the same device.

        Returns:
            (B, V, 3, h, w) float32.
        """
        raise RuntimeError(f"{type(self).__name__} must define views")

    def fill(self, images: np.ndarray, plan: Plan) -> Tensor:
        """Makes the same views straight from all N images (N, 3, H, W) uint8, on one CPU core.

        Tasks with a compiled loop use it here.
        """
        return self.views(torch.from_numpy(images[plan["rows"].numpy()]), plan)

    def batch(self, images: Tensor, index: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Gives views of (B, R, 3, H, W) uint8 images, and labels: `plan` and `views` in one."""
        drawn = self.plan(index, epoch)
        plan = {name: value.to(images.device) for name, value in drawn.items()}
        return self.views(images, plan), plan["labels"]

    def head(self, map_shape: tuple[int, int, int]) -> nn.Module:
        """Gives the module from maps (B, V, M, h, w) to logits (B, C).

        Args:
            map_shape: (M, h, w) of the backbone's last layer for one view.
        """
        raise RuntimeError(f"{type(self).__name__} must define head")

    def loss(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """Gives the mean loss of logits (B, C) float32 against the plan's labels: cross-entropy."""
        return functional.cross_entropy(logits, labels, label_smoothing=smoothing)

    def right(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Gives the share of the logits (B, C) whose largest is that of the label, () float32."""
        return (logits.argmax(1) == labels).float().mean()
