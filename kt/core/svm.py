"""Linear support vector machines, one against the rest, all classes at once."""

from __future__ import annotations

import torch
from torch import Tensor

from kt.core.convex import minimise


def signs(labels: Tensor, num_classes: int) -> Tensor:
    """Gives (N, C) float32: 1 present, -1 absent, 0 not counted.

    Args:
        labels: (N,) int64, or of several labels an image these very signs (N, C).
        num_classes: C.
    """
    if labels.ndim == 2:
        return labels.float()
    return 2 * torch.nn.functional.one_hot(labels, num_classes).float() - 1


def fit(
    rows: Tensor, signs: Tensor, start: Tensor, cost: float, positive: float, iterations: int
) -> Tensor:
    """Fits for each class: half the squared weights + cost * sum of squared hinge losses.

    As LIBLINEAR does (Fan et al., JMLR 2008), the bias is the weight of a constant feature and is
    kept small like the others. Fewer rows than features are fitted in the space they span, where
    the best weights lie: the same result from fewer numbers.

    Args:
        rows: (N, D) float32.
        signs: (N, C) float32 as of `signs`; where it is 0 the loss is a constant.
        start: (D + 1, C) float32 weights to start from.
        cost: C of the literature.
        positive: Factor to the losses of positives.
        iterations: Of L-BFGS, at most.

    Returns:
        (D + 1, C) float32; the last row holds the biases.
    """
    if len(rows) < rows.shape[1]:
        basis, inside = torch.linalg.qr(rows.T)  # (D, N) and (N, N): rows.T = basis @ inside
        start = torch.cat([basis.T @ start[:-1], start[-1:]])
        found = _fit(inside.T, signs, start, cost, positive, iterations)
        return torch.cat([basis @ found[:-1], found[-1:]])
    return _fit(rows, signs, start, cost, positive, iterations)


def _fit(rows, signs, start, cost: float, positive: float, iterations: int) -> Tensor:
    share = torch.where(signs > 0, positive, 1.0)
    scale = 1 / (cost * len(rows))  # gradients of one size for any cost, for one tolerance

    def loss_and_gradient(weights: Tensor) -> tuple[Tensor, Tensor]:
        lack = (1 - signs * decide(rows, weights)).clamp(min=0)
        loss = scale / 2 * weights.square().sum() + (share * lack.square()).sum() / len(rows)
        error = -2 * share * signs * lack / len(rows)
        return loss, torch.cat([rows.T @ error, error.sum(0)[None]]) + scale * weights

    return minimise(loss_and_gradient, start, iterations)


def decide(rows: Tensor, weights: Tensor) -> Tensor:
    """Gives the decision values (N, C) of rows (N, D); above 0 speaks for the class."""
    return rows @ weights[:-1] + weights[-1]
