"""A linear probe for every layer: multinomial logistic regression on standardised features.

The backbone is frozen and in eval mode; each layer's map is pooled (paper, section 5: to about
9,000 dimensions), features are standardised by the training images, the weights are found by
L-BFGS, which needs no schedule (Kolesnikov et al., CVPR 2019). The regularisation is chosen on a
held-out part of train, never on test; then all of train is fitted with it. Features that take more
than `judge.MOST_BYTES` are streamed from a file, and the fit runs where the network does.
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
    from kt.core.standardised import standardised

    kept, out = judge.held_out(data.train)
    labels, found = data.train.labels, []
    for layer, *features in pooling.probes(backbone, data, options):
        rows, queries = standardised(*features, backbone.mean.device)
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
        rows: (N, D) float32, standardised, or `Streamed`.
        labels: (N,) int64.
        start: (D + 1, C) float32 weights to start from.
        penalty: Acts on the weights, not on the biases.
        iterations: Of L-BFGS, at most.

    Returns:
        (D + 1, C) float32; the last row holds the biases.
    """
    import torch

    from kt.core.convex import minimise

    def target(part, like):
        return torch.nn.functional.one_hot(labels[part], start.shape[1]).to(like)

    def blocks():
        return ((block, target(part, block)) for part, block in rows.blocks())

    whole = [(rows, target(slice(None), rows))] if isinstance(rows, torch.Tensor) else None

    def loss_and_gradient(weights):
        loss, slope, bias = 0.0, 0.0, 0.0
        for some, wanted in whole or blocks():
            logs = (some @ weights[:-1] + weights[-1]).log_softmax(1)
            error = (logs.exp() - wanted) / len(rows)
            loss = loss - (logs * wanted).sum() / len(rows)
            slope, bias = slope + some.T @ error, bias + error.sum(0)
        loss = loss + penalty / 2 * weights[:-1].square().sum()
        return loss, torch.cat([slope + penalty * weights[:-1], bias[None]])

    torch.backends.cuda.matmul.allow_tf32 = False  # a line search needs all digits of the loss
    return minimise(loss_and_gradient, start.to(rows.mean if whole is None else rows), iterations)


def predict(rows, weights):
    """Gives the likeliest labels (N,) int64 for rows (N, D), or `Streamed` ones."""
    import torch

    blocks = [rows] if isinstance(rows, torch.Tensor) else (block for _, block in rows.blocks())
    found = [(some @ weights[:-1] + weights[-1]).argmax(1).cpu() for some in blocks]
    return torch.cat(found)
