"""Networks whose first layers are kept as they are while all above is trained from scratch."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from kt.core.backbone import Backbone, Joint, build
from kt.core.step import ConfigError


class Frozen(nn.Module):
    """A stage that stays: no gradients, and eval mode whatever the network's is."""

    def __init__(self, stage: nn.Module):
        """Takes the stage."""
        super().__init__()
        self.stage = stage.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Frozen:
        """Leaves the stage in eval mode: batch-norm statistics stay, too."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Maps as the stage does."""
        return self.stage(images)


def fresh_above(backbone: Backbone, layer: str) -> Backbone:
    """Gives a copy on the CPU that is frozen up to a layer and has fresh weights above it.

    Args:
        backbone: Built by `kt.core.backbone.build`; left as it is.
        layer: The last frozen one.

    Raises:
        ConfigError: Layers that come as one cannot be frozen apart.
    """
    if any(isinstance(stage, Joint) for stage in backbone.stages.values()):
        raise ConfigError(
            "evaluations.nonlinear: this backbone gives the maps of its layers all at once, none "
            "can be frozen alone; expected null"
        )
    found = build(*backbone.recipe)
    found.mean, found.std = backbone.mean.cpu().clone(), backbone.std.cpu().clone()
    for name in backbone.layers[: backbone.layers.index(layer) + 1]:
        found.stages[name] = Frozen(copy.deepcopy(backbone.stages[name]).cpu())
    return found
