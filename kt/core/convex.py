"""Minima of smooth convex losses by L-BFGS: the linear probes and the SVMs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def minimise(
    loss_and_gradient: Callable[[Tensor], tuple[Tensor, Tensor]], start: Tensor, iterations: int
) -> Tensor:
    """Finds the weights of the least loss.

    Args:
        loss_and_gradient: From weights of the shape and type of `start` to () and a gradient.
        start: Where to begin.
        iterations: Of SciPy's L-BFGS, at most.

    Returns:
        Weights like `start`.
    """
    from scipy.optimize import minimize  # torch.optim would compile its way in: 1.6 s a process

    def flat(values: np.ndarray) -> tuple[float, np.ndarray]:
        loss, gradient = loss_and_gradient(torch.from_numpy(values).to(start).view_as(start))
        return float(loss), gradient.flatten().cpu().numpy().astype(np.float64)

    found = minimize(
        flat, start.flatten().double().cpu().numpy(), jac=True, method="L-BFGS-B",
        options={"maxiter": iterations, "gtol": 1e-5, "ftol": 0},
    )  # fmt: skip
    return torch.from_numpy(found.x).to(start).view_as(start)
