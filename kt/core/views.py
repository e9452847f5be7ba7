"""Features of augmented views of the same images: what choices without labels look at."""

from __future__ import annotations

import torch
from torch import Tensor

from kt.config import Plugin
from kt.core import draws, hardware
from kt.core import task as tasks
from kt.core.backbone import Backbone, pooled
from kt.core.images import Pack

VIEWS = 10**6  # their epochs: no training has seen these crops


def chosen(pack: Pack, number: int, seed: int) -> Tensor:
    """Draws (n,) int64 rows, ascending, at most `number`; by the keys, whatever their order."""
    return draws.permutation(seed, "views", 0, torch.from_numpy(pack.ids))[:number].sort().values


@torch.inference_mode()
def features(
    backbone: Backbone,
    pack: Pack,
    index: Tensor,
    task: Plugin,
    seed: int,
    number: int,
    layers: list[str],
    edge: int = 1,
    kind: str = "mean",
    mirror: bool = False,
) -> dict[str, Tensor]:
    """Gives pooled features of the `number`-th augmented view of each image.

    Args:
        backbone: In eval mode, on its device.
        pack: The images.
        index: (n,) int64, rows of them.
        task: A label task, whose augmentation makes the views.
        seed: Of the draws.
        number: Views of different numbers are drawn independently.
        layers: Of the backbone.
        edge: A layer's map is pooled to at most edge x edge.
        kind: How, `mean` or `max`.
        mirror: Whether features are averaged over the view and its mirror image.

    Returns:
        layer -> (n, D) float32, on the CPU.
    """
    from kt.pretext_train import build_task

    ids, where = torch.from_numpy(pack.ids), backbone.mean.device
    context = tasks.Context(
        pack.size, ids, backbone.mean.cpu(), backbone.std.cpu(), seed, ids * 0, 1
    )
    made, found = build_task(task, context), {layer: [] for layer in layers}
    for part in index.split(pack.at_once):
        images = torch.from_numpy(pack.images[part.numpy()]).to(where)
        # By tensor operations: for so few images loading compiled loops takes longer.
        views, _ = made.batch(images[:, None], part, VIEWS + number)
        with hardware.mixed(where):
            described = pooled(backbone, views[:, 0], layers, edge, kind, mirror)
        for layer in layers:
            found[layer].append(described[layer].float().cpu())
    return {layer: torch.cat(parts) for layer, parts in found.items()}
