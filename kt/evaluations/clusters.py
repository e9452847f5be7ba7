"""Clusters of the network's own features: agreement with labels, and with themselves.

`nmi`, `purity` and `hungarian` (accuracy with clusters and classes matched one to one; paper,
section 5): k-means with as many clusters as classes on the features of train, test images assigned,
compared with their labels. `view_nmi` needs no labels: k-means is fitted on one augmented view of
up to `view_images` pictures of the pool, and that view and another one are assigned; their
agreement says how far the network sees the same thing in both (ours). No training has seen the
crops. Features that put all images into one cluster agree in nothing: 0.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kt.config import Count, Plugin, Settings

NEEDS_LABELS = False
FROZEN = True
CHOOSES = False


class Options(Settings):
    """Options of the evaluation in the config."""

    iterations: Annotated[Count, Field(description="of k-means")]
    view_clusters: Annotated[int, Field(ge=2, description="k of the label-free agreement")]
    view_images: Annotated[Count, Field(description="images of the pool used for it, at most")]
    task: Annotated[Plugin, Field(description="label task whose augmentation makes the views")]


def evaluate(backbone, data, options: Options, seed: int) -> list[dict]:
    """Gives records of view_nmi and, with labels, of nmi, purity and hungarian."""
    from kt.core import judge

    number = min(options.view_images, len(data.pool))
    found = judge.records({"view_nmi": view_agreement(backbone, data.pool, options, seed)}, number)
    if data.train is not None:
        values = label_agreement(backbone, data, options, seed)
        found += judge.records(values, len(data.test.labels))
    return found


def label_agreement(backbone, data, options: Options, seed: int) -> dict[str, float]:
    """Gives nmi, purity and hungarian of the clusters of test images; nmi 0 if one holds all."""
    from kt import cluster
    from kt.core import judge

    layer = backbone.layers[-1]
    train, test = (
        _unit(judge.features(backbone, split.pack, 1)[layer][:])
        for split in (data.train, data.test)
    )
    k = min(data.num_classes, len(train))
    centroids, _ = cluster.kmeans(train, k, options.iterations, 3, False, seed)
    found, labels = cluster.assign(test, centroids)[0], data.test.labels.numpy()
    measures = {"nmi": judge.nmi, "purity": judge.purity, "hungarian": judge.hungarian}
    values = {name: measure(found, labels) for name, measure in measures.items()}
    if found.min() == found.max():  # by its formula a dead layer agrees with labels of one class
        values["nmi"] = 0.0
    return values


def view_agreement(backbone, pool, options: Options, seed: int) -> float:
    """Gives the NMI of the clusters of two views of the same images; 0 if one holds them all."""
    from kt import cluster
    from kt.core import judge, views

    layer = backbone.layers[-1]
    index = views.chosen(pool, options.view_images, seed)
    one, two = (
        _unit(views.features(backbone, pool, index, options.task, seed, number, [layer])[layer])
        for number in (0, 1)
    )
    k = min(options.view_clusters, len(index) // 2)
    centroids, _ = cluster.kmeans(one, k, options.iterations, 1, False, seed)
    found = [cluster.assign(rows, centroids)[0] for rows in (one, two)]
    # NMI calls two labellings of one cluster equal, 1: a dead layer would be the best of all.
    if any(labels.min() == labels.max() for labels in found):
        return 0.0
    return judge.nmi(*found)


def _unit(rows):
    import numpy as np

    rows = np.asarray(rows)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
