"""Augments whole batches of images and trains them against labels, on any device."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from kt.core import draws
from kt.core.task import Context, Task, normalise

ASPECT = 4 / 3  # widest crop, as in torchvision's RandomResizedCrop


class ClassificationTask(Task):
    """The task of `kt/tasks/classification.py`."""

    def __init__(self, options, context: Context):
        """Keeps options; labels stand in the context."""
        super().__init__(context)
        self.options = options
        self.view_size = context.size
        self.num_classes = context.num_classes

    def order(self, index: Tensor, epoch: int) -> Tensor:
        """Gives the rows of an epoch; balanced over labels if the options say so."""
        if not self.options.balance:
            return super().order(index, epoch)
        return balanced(self.context.labels.cpu()[index], index, self.context.seed, epoch)

    def batch(self, images: Tensor, index: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Gives augmented (plain for validation, epoch -1) normalised views and labels."""
        views = normalise(images[:, 0], self.context.mean, self.context.std)
        if epoch >= 0:
            views = augment(views, self.context, self.options, index, epoch)
        return views[:, None], self.context.labels[index]

    def head(self, map_shape: tuple[int, int, int]) -> nn.Module:
        """Gives a global average, a hidden layer if wanted, and a linear layer."""
        return LabelHead(map_shape[0], self.options.hidden, self.num_classes)


class LabelHead(nn.Module):
    """Average over the map, then one or two fully connected layers."""

    def __init__(self, channels: int, hidden: int, num_classes: int):
        """Builds the layers for M channels."""
        super().__init__()
        layers: list[nn.Module] = []
        if hidden:
            layers = [nn.Linear(channels, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden or channels, num_classes))

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (B, V, M, h, w) to logits (B, C); several views are averaged."""
        return self.layers(maps.mean((1, 3, 4)))


def balanced(labels: Tensor, index: Tensor, seed: int, epoch: int) -> Tensor:
    """Draws rows so that every label is equally likely (DeepCluster's uniform sampling).

    Args:
        labels: (n,) int64 of the rows.
        index: (n,) int64 rows.
        seed: Of the draws.
        epoch: Which pass.

    Returns:
        (n,) int64 rows, some repeated; a function of (seed, epoch, position).
    """
    by_label = labels.argsort(stable=True)
    present, counts = labels[by_label].unique_consecutive(return_counts=True)
    first = counts.cumsum(0) - counts
    draw = draws.bits(seed, "balance", epoch, torch.arange(len(index)), 2)
    group = draw[:, 0] % len(present)
    return index[by_label[first[group] + draw[:, 1] % counts[group]]]


def augment(views: Tensor, context: Context, options, index: Tensor, epoch: int) -> Tensor:
    """Crops, flips and recolours normalised images, each by its own draw.

    Args:
        views: (B, 3, H, W) float32, normalised by the context's mean and std.
        context: Seed, ids, mean and std.
        options: `crop`, `flip`, `brightness`, `contrast`, `saturation`.
        index: (B,) int64 rows.
        epoch: Which pass.

    Returns:
        (B, 3, H, W) float32.
    """
    draw = draws.uniform(context.seed, "augment", epoch, context.ids[index], 8)
    if options.crop < 1 or options.flip:
        grid = functional.affine_grid(
            _crops(draw[:, :5], options), views.shape, align_corners=False
        )
        views = functional.grid_sample(views, grid, padding_mode="reflection", align_corners=False)
    if options.brightness or options.contrast or options.saturation:
        views = _recolour(views, draw[:, 5:], context, options)
    return views


def _crops(draw: Tensor, options) -> Tensor:
    """Gives (B, 2, 3) affine maps of random crops inside the image, mirrored by chance."""
    area = options.crop + (1 - options.crop) * draw[:, 0]
    aspect = (ASPECT ** (2 * draw[:, 1] - 1)).clamp(area, 1 / area)  # neither side sticks out
    width, height = (area * aspect).sqrt(), (area / aspect).sqrt()
    mirror = torch.where(draw[:, 4] < options.flip, -1.0, 1.0)
    theta = torch.zeros(len(draw), 2, 3, device=draw.device)
    theta[:, 0, 0], theta[:, 1, 1] = width * mirror, height
    theta[:, 0, 2] = (1 - width) * (2 * draw[:, 2] - 1)
    theta[:, 1, 2] = (1 - height) * (2 * draw[:, 3] - 1)
    return theta


def _recolour(views: Tensor, draw: Tensor, context: Context, options) -> Tensor:
    """Applies brightness, contrast and saturation as one matrix and one offset per image."""
    amount = torch.tensor(
        [options.brightness, options.contrast, options.saturation], device=draw.device
    )
    bright, contrast, saturation = (1 + amount * (2 * draw - 1)).unbind(1)
    same = torch.eye(3, device=draw.device)
    grey = torch.full((3, 3), 1 / 3, device=draw.device)
    matrix = grey + saturation[:, None, None] * (same - grey)
    matrix = matrix * (bright * contrast)[:, None, None]
    # In pixel space: x -> b (c (S x - m) + m); carried over to normalised images.
    pixel_mean = context.mean.mean()
    offset = matrix @ context.mean + (bright * (1 - contrast) * pixel_mean)[:, None] - context.mean
    matrix = matrix * context.std[None, None, :] / context.std[None, :, None]
    mixed = (matrix @ views.flatten(2)).view(views.shape)
    return mixed + (offset / context.std)[:, :, None, None]
