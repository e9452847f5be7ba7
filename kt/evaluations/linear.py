"""A linear probe for every layer: multinomial logistic regression on standardised features.

The backbone is frozen and in eval mode; each layer's map is pooled (paper, section 5: to about
9,000 dimensions), features are standardised by the training images, the weights are found by
L-BFGS, which needs no schedule (Kolesnikov et al., CVPR 2019). The regularisation is chosen on a
held-out part of train, never on test; then all of train is fitted with it.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kt.config import Count
from kt.core.pooling import Pooling

NEEDS_LABELS = True
FROZEN = True
CHOOSES = True


class Options(Pooling):
    """Options of the evaluation in the config."""

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

    from kt.core import judge, pooling

    kept, out = judge.held_out(data.train)
    labels, found = data.train.labels, []
    for layer, rows, queries in pooling.probes(backbone, data, options):
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
        found += judge.records({"validation_top1": best}, len(out), layer=layer)
        found += judge.judged(predict(queries, weights), data.test.labels, layer=layer)
    return found


def fit(rows, labels, start, penalty: float, iterations: int):
    """Fits multinomial logistic regression: mean cross-entropy + penalty / 2 * squared weights.

    Args:
        rows: (N, D) float32, standardised.
        labels: (N,) int64.
        start: (D + 1, C) float32 weights to start from.
        penalty: Acts on the weights, not on the biases.
        iterations: Of L-BFGS, at most.

    Returns:
        (D + 1, C) float32; the last row holds the biases.
    """
    import torch

    from kt.core.convex import minimise

    target = torch.nn.functional.one_hot(labels, start.shape[1]).to(rows.dtype)

    def loss_and_gradient(weights):
        logs = (rows @ weights[:-1] + weights[-1]).log_softmax(1)
        loss = -(logs * target).sum() / len(rows) + penalty / 2 * weights[:-1].square().sum()
        error = (logs.exp() - target) / len(rows)
        return loss, torch.cat([rows.T @ error + penalty * weights[:-1], error.sum(0)[None]])

    return minimise(loss_and_gradient, start, iterations)


def predict(rows, weights):
    """Gives the likeliest labels (N,) int64 for rows (N, D)."""
    return (rows @ weights[:-1] + weights[-1]).argmax(1)
