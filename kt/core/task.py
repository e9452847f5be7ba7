"""What a task is: it turns a batch of images into views and labels and owns the head.

Pretext tasks, pseudo-labels, fine-tuning and the supervised bound are all tasks, so one training
loop serves every network.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from kt.core import draws


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
    """

    size: int
    ids: Tensor
    mean: Tensor
    std: Tensor
    seed: int
    labels: Tensor | None = None
    num_classes: int = 0


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

    def to(self, device: torch.device) -> Task:
        """Moves the tensors that `batch` needs to the device that trains."""
        values = {
            field.name: getattr(self.context, field.name).to(device)
            for field in dataclasses.fields(self.context)
            if isinstance(getattr(self.context, field.name), Tensor)
        }
        self.context = dataclasses.replace(self.context, **values)
        return self

    def order(self, index: Tensor, epoch: int) -> Tensor:
        """Gives the rows of one epoch in training order, (n,) int64, from the rows at hand."""
        ids = self.context.ids.cpu()[index]
        return index[draws.permutation(self.context.seed, "order", epoch, ids)]

    def rows(self, index: Tensor, epoch: int) -> Tensor:
        """Gives the rows of the images that a batch needs, (B, R) int64; the first is its own."""
        return index[:, None]

    def batch(self, images: Tensor, index: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Makes views and labels.

        Args:
            images: (B, R, 3, H, W) uint8, the images of `rows`.
            index: (B,) int64 rows, on the same device.
            epoch: Which pass; -1 for validation, whose draws never change.

        Returns:
            (B, V, 3, h, w) float32 and (B,) int64.
        """
        raise RuntimeError(f"{type(self).__name__} must define batch")

    def head(self, map_shape: tuple[int, int, int]) -> nn.Module:
        """Gives the module from maps (B, V, M, h, w) to logits (B, C).

        Args:
            map_shape: (M, h, w) of the backbone's last layer for one view.
        """
        raise RuntimeError(f"{type(self).__name__} must define head")


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Scales images of 0..255 to zero mean and unit variance, (..., 3, H, W) float32."""
    scale = 1.0 / (255.0 * std)
    return images.to(torch.float32) * scale[:, None, None] - (mean / std)[:, None, None]
