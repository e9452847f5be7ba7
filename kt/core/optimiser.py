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


SCALE = 2.0**16  # of the loss in float16, to begin with, as in torch.amp.GradScaler
GROW_AFTER = 2000  # steps without overflow


class Optimiser:
    """Updates a network's weights; weight decay acts on matrices and kernels, not on vectors.

    In float16 it scales the loss, and leaves out a step whose gradients overflow (Micikevicius et
    al., "Mixed precision training", ICLR 2018), without waiting for the device.
    """

    def __init__(
        self, network: nn.Module, settings: Training, computed_in: torch.dtype = torch.float32
    ):
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
        where = weights[0].device
        self.steps = torch.zeros((), device=where)
        half = computed_in == torch.float16
        self.scale = torch.full((1,), SCALE, device=where) if half else None
        self.grown = torch.zeros(1, dtype=torch.int32, device=where)
        self.overflow = torch.zeros(1, device=where) if half else None

    def scaled(self, loss: Tensor) -> Tensor:
        """Gives the loss to run backward from."""
        return loss if self.scale is None else loss * self.scale[0]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Makes one update from the gradients, and forgets them.

        Args:
            lr: Learning rate of this step.
        """
        self.steps += 1
        if self.scale is not None:
            self._unscale()
        for group, decay in self.groups:
            weights = [weight for weight in group if weight.grad is not None]
            if weights:
                self._update(weights, [weight.grad for weight in weights], lr, decay)
            for weight in weights:
                weight.grad = None

    def _unscale(self) -> None:
        grads = [w.grad for group, _ in self.groups for w in group if w.grad is not None]
        self.overflow.zero_()
        inverse = self.scale.reciprocal()
        torch._amp_foreach_non_finite_check_and_unscale_(grads, self.overflow, inverse)
        torch._amp_update_scale_(self.scale, self.grown, self.overflow, 2.0, 0.5, GROW_AFTER)
        self.steps -= self.overflow[0]

    def _update(self, weights: list[Tensor], grads: list[Tensor], lr: float, decay: float) -> None:
        momentum = self.settings.momentum
        first = [self.first[weight] for weight in weights]
        if self.settings.optimiser == "sgd":
            torch._fused_sgd_(
                weights, grads, first if momentum else [], weight_decay=decay, momentum=momentum,
                lr=lr, dampening=0.0, nesterov=False, maximize=False, is_first_step=False,
                found_inf=self.overflow,
            )  # fmt: skip
            return
        second = [self.second[weight] for weight in weights]
        steps = [self.steps] * len(weights)
        torch._fused_adamw_(
            weights, grads, first, second, [], steps, lr=lr, beta1=momentum, beta2=SECOND_BETA,
            weight_decay=decay, eps=EPSILON, amsgrad=False, maximize=False,
            found_inf=self.overflow,
        )  # fmt: skip

    def state_dict(self) -> dict:
        """Gives what a resumed training needs: steps and moments in the weights' order."""
        found = {"steps": self.steps, "scale": self.scale, "grown": self.grown}
        return {**found, "first": [*self.first.values()], "second": [*self.second.values()]}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Takes over a state of the same network and settings.

        It may be of a machine with another precision: a scale that it lacks begins anew.
        """
        for name in ("steps", "grown", "scale"):
            if getattr(self, name) is not None and state[name] is not None:
                getattr(self, name).copy_(state[name])
        for mine, found in ((self.first, state["first"]), (self.second, state["second"])):
            for tensor, other in zip(mine.values(), found, strict=True):
                tensor.copy_(other)
