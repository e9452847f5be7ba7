"""Weighted k-nearest neighbours on L2-normalised features of the last layer.

Each of the k nearest training images votes with exp(cosine / temperature) (Wu et al., "Unsupervised
Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018). `validation_top1` is
measured on a held-out part of train against the rest; test images are judged against all of train.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kt.config import Count, Settings

NEEDS_LABELS = True
FROZEN = True
CHOOSES = True
COSINES = 2**27  # that stand in memory at once


class Options(Settings):
    """Options of the evaluation in the config."""

    neighbours: Annotated[Count, Field(description="k; fewer where train has fewer images")]
    temperature: Annotated[float, Field(gt=0, description="of the votes' weights")]
    map: Annotated[Count, Field(description="the last layer's map is pooled to map x map")]


def evaluate(backbone, data, options: Options, seed: int) -> list[dict]:
    """Gives records of top1, mean_class_accuracy and validation_top1."""
    from torch.nn import functional

    from kt.core import judge

    layer = backbone.layers[-1]
    train, test = (
        functional.normalize(judge.whole(judge.features(backbone, split.pack, options.map)[layer]))
        for split in (data.train, data.test)
    )
    labels = data.train.labels
    kept, out = judge.held_out(data.train)
    guess = vote(train[out], train[kept], labels[kept], data.num_classes, options)
    found = judge.records(
        {"validation_top1": judge.scores(guess, labels[out])["top1"]}, len(out), layer=layer
    )
    predicted = vote(test, train, labels, data.num_classes, options)
    return found + judge.judged(predicted, data.test.labels, layer=layer)


def vote(queries, train, labels, num_classes: int, options: Options):
    """Lets the nearest training rows vote.

    Args:
        queries: (Q, D) float32 of unit length.
        train: (N, D) float32 of unit length.
        labels: (N,) int64.
        num_classes: C.
        options: `neighbours` and `temperature`.

    Returns:
        (Q,) int64 predicted labels.
    """
    import torch

    predicted = []
    for part in queries.split(min(2048, max(1, COSINES // len(train)))):
        cosine, nearest = (part @ train.T).topk(min(options.neighbours, len(train)), 1)
        weights = ((cosine - cosine[:, :1]) / options.temperature).exp()
        votes = torch.zeros(len(part), num_classes).scatter_add_(1, labels[nearest], weights)
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)
