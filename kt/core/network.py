"""A backbone under a task's head, and what it costs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kt.core.backbone import Backbone
from kt.core.task import Task


class Network(nn.Module):
    """A backbone under a task's head."""

    def __init__(self, backbone: Backbone, task: Task):
        """Builds the head for the maps that the task's views give."""
        super().__init__()
        self.backbone = backbone
        self.head = task.head(backbone.map_shape(task.view_size))

    def forward(self, views: Tensor) -> Tensor:
        """Maps views (B, V, 3, h, w) to logits (B, C)."""
        images = views.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        maps = self.backbone(images)
        return self.head(maps.unflatten(0, views.shape[:2]))


def multiply_adds(network: Network, task: Task) -> float:
    """Gives the multiply-adds of one forward pass of one image with all its views.

    Convolutions and matrix products alone count, as in torch's FlopCounterMode, which would bring
    in torch's compiler (1.6 s a job) and is the reference in the tests.
    """
    size, training = task.view_size, network.training
    views = network.backbone.mean.new_zeros(2, task.num_views, 3, size, size)
    network.eval()
    found = counted(network, lambda: network(views))
    network.train(training)
    return found / len(views)


def counted(network: nn.Module, work: Callable[[], object]) -> int:
    """Gives the multiply-adds of the network's convolutions and matrix products in `work`."""
    found = []

    def count(layer: nn.Module, inputs, output: Tensor) -> None:
        found.append(output.numel() * layer.weight[0].numel())

    layers = [part for part in network.modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        work()
    for hook in hooks:
        hook.remove()
    return sum(found)
