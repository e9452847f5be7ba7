"""Augments whole batches of images and trains them against labels, on any device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kt.core import draws
from kt.core.task import Context, Plan, Task

ASPECT = 4 / 3  # widest crop, as in torchvision's RandomResizedCrop


class ClassificationTask(Task):
    """The task of `kt/tasks/classification.py`."""

    def __init__(self, options, context: Context):
        """Keeps options; labels stand in the context."""
        super().__init__(context)
        self.options = options
        self.view_size = context.size
        self.taught = context.transfer
        self.num_classes = self.taught.outputs if self.taught else context.num_classes

    def order(self, index: Tensor, epoch: int) -> Tensor:
        """Gives the rows of an epoch; balanced over labels if the options say so.

        Over those of the first head, where there are several; kinds of transfer that learn from
        features have none.
        """
        labels = self.context.labels
        if self.taught:
            labels = None if self.taught.labels is None else self.taught.labels[:, 0]
        if labels is None or not self.options.balance:
            return super().order(index, epoch)
        return balanced(labels[index], index, self.context.seed, epoch)

    def plan(self, index: Tensor, epoch: int) -> Plan:
        """Draws crops and colours; plain images for validation, epoch -1.

        Returns:
            `rows` (B, 1), `labels` (B,), or (B, ...) of a kind of transfer, and what
            `drawn_augmentation` gives.
        """
        context = self.context
        labels = self.taught.values(index) if self.taught else context.labels[index]
        drawn = drawn_augmentation(self.options, context, index, epoch)
        return {"rows": index[:, None], "labels": labels, **drawn}

    def views(self, images: Tensor, plan: Plan) -> Tensor:
        """Gives normalised views (B, 1, 3, H, W)."""
        return augmented(images[:, 0], plan)[:, None]

    def fill(self, images: np.ndarray, plan: Plan) -> Tensor:
        """Gives the same views by one compiled loop, channels last, as the network wants them."""
        return filled_augmented(images, plan)[:, None]

    def loss(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """Gives the cross-entropy, or the loss of the kind of transfer."""
        taught = self.taught or super()
        return taught.loss(logits, labels, smoothing)

    def right(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Gives the share of right labels, or what the kind of transfer has for it."""
        taught = self.taught or super()
        return taught.right(logits, labels)

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


def drawn_augmentation(options, context: Context, index: Tensor, epoch: int) -> Plan:
    """Draws crops and colours of the rows (B,) int64; plain images for validation, epoch -1.

    Args:
        options: `kt.tasks.classification.Augmentation`.
        context: Gives seed, ids, mean and deviation.
        index: (B,) int64 rows.
        epoch: Which pass.

    Returns:
        `matrix` (B, 3, 3) and `offset` (B, 3), from pixels 0..255 to normalised colours; `theta`
        (B, 2, 3), the affine map of each crop, unless all views are whole images.
    """
    found = {}
    factors = torch.zeros(len(index), 3)
    if epoch >= 0:
        draw = draws.uniform(context.seed, "augment", epoch, context.ids[index], 8)
        if options.crop < 1 or options.flip:
            found["theta"] = _crops(draw[:, :5], options)
        most = torch.tensor([options.brightness, options.contrast, options.saturation])
        factors = most * (2 * draw[:, 5:] - 1)
    found["matrix"], found["offset"] = _colours(1 + factors, context)
    return found


def augmented(images: Tensor, plan: Plan) -> Tensor:
    """Crops, recolours and normalises images (B, 3, H, W) uint8, (B, 3, H, W) float32."""
    found = images.to(torch.float32)
    if "theta" in plan:
        grid = _grid(plan["theta"], *found.shape[2:])
        found = functional.grid_sample(found, grid, padding_mode="reflection", align_corners=False)
    mixed = torch.baddbmm(plan["offset"][:, :, None], plan["matrix"], found.flatten(2))
    return mixed.view(found.shape)


def _grid(theta: Tensor, height: int, width: int) -> Tensor:
    """Gives where crops (B, 2, 3), which do not turn, take their pixels: (B, H, W, 2) in -1..1.

    As `affine_grid` does, whose matrix product a GPU in TF32 puts a tenth of a pixel beside.
    """
    sides = enumerate((width, height))
    places = [(2 * torch.arange(side, device=theta.device) + 1) / side - 1 for _, side in sides]
    x, y = (theta[:, i, i, None] * place + theta[:, i, 2, None] for i, place in enumerate(places))
    return torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1)


def filled_augmented(images: np.ndarray, plan: Plan) -> Tensor:
    """Does the same by one compiled loop from all N images; channels last in memory."""
    from kt.core import compiled  # costs half a second, and an accelerator needs none of it

    channels, height, width = images.shape[1:]
    found = torch.empty(len(plan["rows"]), height, width, channels)
    if "theta" not in plan:
        plan = plan | {"theta": torch.eye(2, 3).expand(len(found), 2, 3)}
    drawn = (plan[name].numpy() for name in ("theta", "matrix", "offset"))
    compiled.crops(images, plan["rows"][:, 0].numpy(), *drawn, found.numpy())
    return found.permute(0, 3, 1, 2)


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


def _crops(draw: Tensor, options) -> Tensor:
    """Gives (B, 2, 3) affine maps of random crops inside the image, mirrored by chance."""
    area = options.crop + (1 - options.crop) * draw[:, 0]
    aspect = (ASPECT ** (2 * draw[:, 1] - 1)).clamp(area, 1 / area)  # neither side sticks out
    width, height = (area * aspect).sqrt(), (area / aspect).sqrt()
    mirror = torch.where(draw[:, 4] < options.flip, -1.0, 1.0)
    theta = torch.zeros(len(draw), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width * mirror, height
    theta[:, 0, 2] = (1 - width) * (2 * draw[:, 2] - 1)
    theta[:, 1, 2] = (1 - height) * (2 * draw[:, 3] - 1)
    return theta


def _colours(factors: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """Gives brightness, contrast, saturation and normalisation as one matrix and one offset.

    Args:
        factors: (B, 3) of the three; 1 changes nothing.
        context: Mean and standard deviation of the channels.

    Returns:
        (B, 3, 3) and (B, 3) float32, to be applied to pixels 0..255.
    """
    bright, contrast, saturation = factors.unbind(1)
    grey = torch.full((3, 3), 1 / 3)
    matrix = grey + saturation[:, None, None] * (torch.eye(3) - grey)
    matrix = matrix * (bright * contrast)[:, None, None]
    # x -> b (c (S x - m) + m) on 0..1, m the mean grey; then less the mean, by the deviation.
    offset = (bright * (1 - contrast) * context.mean.mean())[:, None] - context.mean
    return matrix / (255 * context.std[:, None]), offset / context.std
