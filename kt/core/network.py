"""A backbone under a task's head, and what it costs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kt.core import hardware, step
from kt.core.backbone import Backbone
from kt.core.task import Task

LOOKED = 2  # empty images that are passed through a network to learn of its maps


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
    return counted(network, lambda: _look(network, task)) / LOOKED


def has_idle(network: Network, task: Task) -> bool:
    """Says whether there are weights that no gradient reaches, such as a layer left over."""
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    found = torch.autograd.grad(_look(network, task).sum(), weights, allow_unused=True)
    return any(gradient is None for gradient in found)


def _look(network: Network, task: Task) -> Tensor:
    """Passes `LOOKED` empty images through the network and leaves it as it was."""
    size, training = task.view_size, network.training
    views = network.backbone.mean.new_zeros(LOOKED, task.num_views, 3, size, size)
    network.eval()
    found = network(views)
    network.train(training)
    return found


def precision(network: Network, task: Task, wanted: str, where: torch.device) -> torch.dtype:
    """Gives the type a training computes convolutions in, as `hardware.precision` does.

    But float32 on a CPU where the stride of a convolution is more than its map, as in a ResNet on
    tiles of 9 px: in bfloat16 PyTorch's gradients of its weights are then whatever stood in memory
    (all 101 such cases of 2,376 tried with torch 2.14.1 on AVX512-BF16, no other case).
    """
    found = hardware.precision(wanted, where)
    if where.type != "cpu" or found == torch.float32:
        return found
    beyond: list[str] = []

    def note(name: str, layer: nn.Conv2d, images: Tensor) -> None:
        if any(edge < stride for edge, stride in zip(images.shape[2:], layer.stride, strict=True)):
            beyond.append(name)

    hooks = [
        layer.register_forward_pre_hook(lambda layer, given, name=name: note(name, layer, given[0]))
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d)
    ]
    with torch.no_grad():
        _look(network, task)
    for hook in hooks:
        hook.remove()
    if beyond:
        step.detail("in float32: the stride of %s is more than its map", ", ".join(beyond))
        return torch.float32
    return found


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
