"""Linear SVMs, one class against the rest, on frozen features of every layer; few labels, too.

As in VISSL's benchmark (Goyal et al., "Scaling and benchmarking self-supervised visual
representation learning", ICCV 2019; paper, section 5, follow-up work): features of unit length,
squared hinge loss, positives weigh double. The cost is chosen on a held-out part of train, never on
test (ours); then all of train is fitted with it. With few labels k images of each class are drawn
from the rest of train, `draws` times, and the scores are averaged; the cost is chosen on the same
held-out part, which holds more labels than the k.

The network's label is that of the highest decision value. Where images have several labels there is
no top-1, and mean average precision takes its place.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kt.config import Count
from kt.core.pooling import Pooling

NEEDS_LABELS = True
FROZEN = True
CHOOSES = True  # not with several labels an image: validation_map chooses layers alone
RULES = {"top1": "validation_top1", "map_area": "validation_map"}  # held-out scores, by metric


class Options(Pooling):
    """Options of the evaluation in the config."""

    costs: Annotated[
        list[Annotated[float, Field(gt=0)]],
        Field(min_length=1, description="tried: factor to the losses (C)"),
    ]
    positive_weight: Annotated[
        float, Field(gt=0, description="factor to the losses of a class's own images; VISSL: 2")
    ]
    iterations: Annotated[Count, Field(description="of L-BFGS, at most")]
    labels_per_class: Annotated[list[Count], Field(description="few labels; [] for none")]
    draws: Annotated[Count, Field(description="of the few labels, averaged")]


def evaluate(backbone, data, options: Options, seed: int) -> list[dict]:
    """Gives for each layer records with all labels and, by `labels_per_class`, with few of them."""
    import statistics

    from torch.nn import functional

    from kt.core import judge, pooling, svm

    main = "top1" if data.train.labels.ndim == 1 else "map_area"
    train, test = (svm.signs(split.labels, data.num_classes) for split in (data.train, data.test))
    kept, out = judge.held_out(data.train)
    few, found = few_labels(train, kept, data.train.pack.ids, options, seed), []
    for layer, *features in pooling.probes(backbone, data, options):
        rows, queries = (functional.normalize(judge.whole(one)) for one in features)
        cost, (start,), right = choose(rows, train, [kept], out, options, main)
        found += judge.records({RULES[main]: right}, len(out), layer=layer)
        weights = svm.fit(rows, train, start, cost, options.positive_weight, options.iterations)
        decisions = svm.decide(queries, weights)
        values = scores(decisions, test, main)
        if main == "top1":
            found += judge.judged(decisions.argmax(1), data.test.labels, values, layer=layer)
        else:
            found += judge.records(values, len(queries), layer=layer)
        for number, draws in few.items():
            _, fitted, _ = choose(rows, train, draws, out, options, main)
            values = [scores(svm.decide(queries, one), test, main)[main] for one in fitted]
            mean = {main: statistics.fmean(values)}
            found += judge.records(mean, len(queries), layer=layer, labels_per_class=number)
    return found


def few_labels(signs, kept, ids, options: Options, seed: int) -> dict[int, list]:
    """Draws k rows of each class, all of a smaller one, `draws` times for each k.

    Args:
        signs: (N, C) float32, 1 present.
        kept: (n,) int64 rows to draw from.
        ids: (N,) int64 of the images, which decide the draws.
        options: Of the evaluation.
        seed: Of the draws.

    Returns:
        k -> (at most C * k,) int64 rows of each draw; a k that no class has is left out.
    """
    import torch

    from kt.core import draws, step

    largest, found = int((signs[kept] > 0).sum(0).max()), {}
    for number in options.labels_per_class:
        if number > largest:
            step.log.warning(
                "svm: %d labels per class left out, the largest class has %d", number, largest
            )
            continue
        found[number] = []
        for repetition in range(options.draws):
            own = torch.from_numpy(ids)[kept]
            order = kept[draws.permutation(seed, f"svm {number}", repetition, own)]
            rows = [order[column[order] > 0][:number] for column in signs.T]
            found[number].append(torch.cat(rows).unique())
    return found


def choose(rows, signs, draws: list, out, options: Options, main: str) -> tuple[float, list, float]:
    """Fits each draw with every cost and takes the cost that is best on held-out rows.

    Args:
        rows: (N, D) float32 of unit length.
        signs: (N, C) float32.
        draws: Rows to fit, (n,) int64 each.
        out: (m,) int64 rows to choose on.
        options: Of the evaluation.
        main: The metric that decides.

    Returns:
        The cost, the weights (D + 1, C) of each draw with it, and the mean held-out score.
    """
    import statistics

    from kt.core import svm

    fitted = [dict(by_cost(rows[index], signs[index], options)) for index in draws]
    right = {
        cost: statistics.fmean(
            scores(svm.decide(rows[out], one[cost]), signs[out], main)[main] for one in fitted
        )
        for cost in sorted(options.costs)
    }
    cost = max(right, key=right.get)
    return cost, [one[cost] for one in fitted], right[cost]


def by_cost(rows, signs, options: Options):
    """Yields (cost, weights), the smallest cost first; each starts from the one before."""
    import torch

    from kt.core import svm

    weights = torch.zeros(rows.shape[1] + 1, signs.shape[1])
    for cost in sorted(options.costs):
        weights = svm.fit(rows, signs, weights, cost, options.positive_weight, options.iterations)
        yield cost, weights


def scores(decisions, signs, main: str) -> dict[str, float]:
    """Gives map_11 and map_area of decisions (N, C); where there is a top-1, its scores, too."""
    from kt.core import judge, precision

    found = precision.over_classes(decisions.numpy(), signs.numpy())
    if main == "top1":
        found = judge.scores(decisions.argmax(1), signs.argmax(1)) | found
    return found
