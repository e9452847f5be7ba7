"""SGD with momentum and AdamW, in the fused kernels that `torch.optim` uses.

Constructing a `torch.optim` optimiser imports torch's compiler, 1.6 s in every training job
(measured on 2 cores; a workflow has dozens of short ones). The arithmetic is the kernels' own; the
tests hold it against `torch.optim`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kt.config import Training

EPSILON = 1e-8  # of AdamW, as in torch.optim
SECOND_BETA = 0.999


class Optimiser:
    """Updates a network's weights; weight decay acts on matrices and kernels, not on vectors."""

    def __init__(self, network: nn.Module, settings: Training):
        """Sets up the state for weights that stand on their device."""
        self.settings = settings
        weights = [weight for weight in network.parameters() if weight.requires_grad]
        self.groups = [
            ([weight for weight in weights if weight.ndim > 1], settings.weight_decay),
            ([weight for weight in weights if weight.ndim <= 1], 0.0),
        ]
        self.first = {weight: torch.zeros_like(weight) for weight in weights}  # momentum
        adam = settings.optimiser == "adamw"
        self.second = {weight: torch.zeros_like(weight) for weight in weights} if adam else {}
        self.steps = 0

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Makes one update from the gradients, and forgets them.

        Args:
            lr: Learning rate of this step.
        """
        self.steps += 1
        for group, decay in self.groups:
            weights = [weight for weight in group if weight.grad is not None]
            if weights:
                self._update(weights, [weight.grad for weight in weights], lr, decay)
            for weight in weights:
                weight.grad = None

    def _update(self, weights: list[Tensor], grads: list[Tensor], lr: float, decay: float) -> None:
        momentum = self.settings.momentum
        first = [self.first[weight] for weight in weights]
        if self.settings.optimiser == "sgd":
            torch._fused_sgd_(
                weights, grads, first if momentum else [], weight_decay=decay, momentum=momentum,
                lr=lr, dampening=0.0, nesterov=False, maximize=False, is_first_step=False,
            )  # fmt: skip
            return
        second = [self.second[weight] for weight in weights]
        steps = [torch.tensor(float(self.steps), device=weights[0].device)] * len(weights)
        torch._fused_adamw_(
            weights, grads, first, second, [], steps, lr=lr, beta1=momentum, beta2=SECOND_BETA,
            weight_decay=decay, eps=EPSILON, amsgrad=False, maximize=False,
        )  # fmt: skip

    def state_dict(self) -> dict:
        """Gives what a resumed training needs: steps and moments in the weights' order."""
        moments = [list(found.values()) for found in (self.first, self.second)]
        return {"steps": self.steps, "first": moments[0], "second": moments[1]}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Takes over a state of the same network and settings."""
        self.steps = state["steps"]
        for mine, found in ((self.first, state["first"]), (self.second, state["second"])):
            for tensor, other in zip(mine.values(), found, strict=True):
                tensor.copy_(other)
