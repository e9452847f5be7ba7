"""Clusters of the network's own features: agreement with labels, and with themselves.

`nmi`, `purity` and `hungarian` (accuracy with clusters and classes matched one to one; paper,
section 5): k-means with as many clusters as classes on the features of train, test images assigned,
compared with their labels. `view_nmi` needs no labels: k-means is fitted on one augmented view of
up to `view_images` pictures of the pool, and that view and another one are assigned; their
agreement says how far the network sees the same thing in both (ours). No training has seen the
crops.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kt.config import Count, Plugin, Settings

NEEDS_LABELS = False
FROZEN = True
VIEWS = 10**6  # their epochs: no training has seen these crops


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
    """Gives nmi, purity and hungarian of the clusters of test images."""
    from kt import cluster
    from kt.core import judge

    layer = backbone.layers[-1]
    train, test = (
        _unit(judge.features(backbone, split.pack, 1)[layer].numpy())
        for split in (data.train, data.test)
    )
    k = min(data.num_classes, len(train))
    centroids, _ = cluster.kmeans(train, k, options.iterations, 3, False, seed)
    found, labels = cluster.assign(test, centroids)[0], data.test.labels.numpy()
    measures = {"nmi": judge.nmi, "purity": judge.purity, "hungarian": judge.hungarian}
    return {name: measure(found, labels) for name, measure in measures.items()}


def view_agreement(backbone, pool, options: Options, seed: int) -> float:
    """Gives the NMI of the clusters of two views of the same images."""
    import torch

    from kt import cluster
    from kt.core import draws, judge

    order = draws.permutation(seed, "views", 0, torch.from_numpy(pool.ids))
    index = order[: options.view_images].sort().values
    one, two = (views(backbone, pool, index, options, seed, number) for number in (0, 1))
    k = min(options.view_clusters, len(index) // 2)
    centroids, _ = cluster.kmeans(one, k, options.iterations, 1, False, seed)
    return judge.nmi(cluster.assign(one, centroids)[0], cluster.assign(two, centroids)[0])


def views(backbone, pool, index, options: Options, seed: int, number: int):
    """Gives features (n, D) float32 of unit length of the `number`-th augmented view."""
    import torch

    from kt.core import task as tasks
    from kt.core.backbone import pool as average
    from kt.pretext_train import build_task

    ids = torch.from_numpy(pool.ids)
    context = tasks.Context(
        pool.size, ids, backbone.mean.cpu(), backbone.std.cpu(), seed, ids * 0, 1
    )
    where = backbone.mean.device
    task, found = build_task(options.task, context), []
    with torch.inference_mode():
        for part in index.split(500):
            images = torch.from_numpy(pool.images[part.numpy()]).to(where)
            # By tensor operations: for so few images loading compiled loops takes longer.
            made, _ = task.batch(images[:, None], part, VIEWS + number)
            found.append(average(backbone(made[:, 0]), 1).cpu())
    return _unit(torch.cat(found).numpy())


def _unit(rows):
    import numpy as np

    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
