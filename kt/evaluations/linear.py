"""A linear probe for every layer: multinomial logistic regression on standardised features.

The backbone is frozen and in eval mode; each layer's map is pooled (paper, section 5: to about
9,000 dimensions), features are standardised by the training images, the weights are found by
L-BFGS, which needs no schedule (Kolesnikov et al., CVPR 2019). The regularisation is chosen on a
held-out part of train, never on test; then all of train is fitted with it.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kt.config import Count, Settings

NEEDS_LABELS = True
FROZEN = True


class Options(Settings):
    """Options of the evaluation in the config."""

    map: Annotated[Count, Field(description="each layer's map is pooled to map x map")]
    penalties: Annotated[
        list[Annotated[float, Field(gt=0)]],
        Field(
            min_length=1,
            description="tried: penalty / 2 x sum of squared weights, beside the mean "
            "cross-entropy",
        ),
    ]
    iterations: Annotated[Count, Field(description="of L-BFGS, at most")]


def evaluate(backbone, data, options: Options, seed: int) -> list[dict]:
    """Gives for each layer records of top1, mean_class_accuracy and validation_top1."""
    import torch

    from kt.core import judge

    train = judge.features(backbone, data.train.pack, options.map)
    test = judge.features(backbone, data.test.pack, options.map)
    kept, out = judge.held_out(data.train)
    labels, found = data.train.labels, []
    for layer in backbone.layers:
        rows, queries = train[layer], test[layer]
        mean, std = rows.mean(0), rows.std(0).clamp(min=1e-6)
        rows, queries = (rows - mean) / std, (queries - mean) / std
        best, penalty, start = -1.0, 0.0, torch.zeros(rows.shape[1] + 1, data.num_classes)
        for candidate in sorted(options.penalties, reverse=True):  # each starts from the one before
            weights = fit(rows[kept], labels[kept], start, candidate, options.iterations)
            top1 = judge.scores(predict(rows[out], weights), labels[out])["top1"]
            if top1 > best:
                best, penalty, chosen = top1, candidate, weights
            start = weights
        weights = fit(rows, labels, chosen, penalty, options.iterations)
        values = judge.scores(predict(queries, weights), data.test.labels)
        found += judge.records({"validation_top1": best}, len(out), layer=layer)
        found += judge.records(values, len(queries), layer=layer)
    return found


def fit(rows, labels, start, penalty: float, iterations: int):
    """Fits multinomial logistic regression: mean cross-entropy + penalty / 2 * squared weights.

    Args:
        rows: (N, D) float32, standardised.
        labels: (N,) int64.
        start: (D + 1, C) float32 weights to start from.
        penalty: Acts on the weights, not on the biases.
        iterations: Of SciPy's L-BFGS, at most.

    Returns:
        (D + 1, C) float32; the last row holds the biases.
    """
    import numpy as np
    import torch
    from scipy.optimize import minimize  # torch.optim would compile its way in: 1.6 s a process

    target = torch.nn.functional.one_hot(labels, start.shape[1]).to(rows.dtype)

    def loss_and_gradient(flat):
        weights = torch.from_numpy(flat).to(rows).view_as(start)
        logs = (rows @ weights[:-1] + weights[-1]).log_softmax(1)
        loss = -(logs * target).sum() / len(rows) + penalty / 2 * weights[:-1].square().sum()
        error = (logs.exp() - target) / len(rows)
        gradient = torch.cat([rows.T @ error + penalty * weights[:-1], error.sum(0)[None]])
        return float(loss), gradient.flatten().cpu().numpy().astype(np.float64)

    found = minimize(
        loss_and_gradient, start.flatten().double().cpu().numpy(), jac=True, method="L-BFGS-B",
        options={"maxiter": iterations, "gtol": 1e-5, "ftol": 0},
    )  # fmt: skip
    return torch.from_numpy(found.x).to(start).view_as(start)


def predict(rows, weights):
    """Gives the likeliest labels (N,) int64 for rows (N, D)."""
    return (rows @ weights[:-1] + weights[-1]).argmax(1)
