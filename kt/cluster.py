"""Clusters features with k-means (step b of the paper).

The features are first centred, reduced, whitened and normalised as the settings say; the transform
travels with the centroids (`kt.core.transform`). All is done block by block in the order of the
keys. Several processes (`--processes`, and `--nodes` under Slurm) share out the rows; the result
differs by rounding alone. By hand:

    python -m kt.cluster --features features.h5 --k 100 --seed 0 --output clusters.h5 \
      --settings '{"centre": true, "pca": 64, "whiten": true, "l2": true, "spherical": false,
                   "iterations": 50, "redo": 1, "memory_mb": 2000, "sample": null,
                   "warm_start": null}'
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kt import features as tables
from kt.core import auto, blocks, lloyd, step, table
from kt.core.lloyd import assign, kmeans
from kt.core.reached import Reached
from kt.core.spread import Spread, own_part, spread
from kt.core.step import ConfigError
from kt.core.transform import Transform, fit_transform, project

if TYPE_CHECKING:
    from kt.config import Clustering

__all__ = [
    "Transform", "assign", "fit_transform", "kmeans", "nearest", "project", "read_clusters",
]  # fmt: skip
WARM_SHARE = 0.75  # of the iterations, on the sub-sample of a warm start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    from kt import config  # 0.1 s that pseudo_labels, which needs this module, does without

    parser.add_argument("--features", type=Path, required=True, help="table to cluster")
    parser.add_argument("--k", required=True, help="number of clusters, or auto")
    parser.add_argument(
        "--lower", type=int, default=0, help="1: half of the images, if k is more than they are"
    )
    parser.add_argument("--layer", default="", help="of the features, for --k auto")
    parser.add_argument("--choice", type=Path, help="that `kt.choose` wrote, for --k auto")
    parser.add_argument(
        "--settings", type=config.json_of(config.Clustering), required=True, help="JSON, see above"
    )
    parser.add_argument("--memory-mb", type=int, help="instead of the settings': same result")
    parser.add_argument("--seed", type=int, required=True, help="of the first centroids")
    parser.add_argument(
        "--processes", type=int, default=1, help="that share the rows, on each node"
    )
    parser.add_argument("--nodes", type=int, default=1, help="of a Slurm job, for more processes")
    parser.add_argument("--output", type=Path, required=True, help="table to write")


def run(arguments: argparse.Namespace) -> None:
    """Fits transform and centroids, in key order, and counts the rows of each cluster."""
    settings, where = arguments.settings, str(arguments.features)
    if arguments.memory_mb:
        settings = settings.model_copy(update={"memory_mb": arguments.memory_mb})
    _, k = auto.settled(arguments.choice, arguments.layer, arguments.k)
    if k < 1:
        raise ConfigError(f"--k: expected 1 or more, found {k}")
    with tables.read(arguments.features) as found:
        number, dimensions = found.rows.shape
    if arguments.lower and k > number:
        step.log.warning("cluster: k = %d is lowered to half of the %d images", k, number)
        k = max(2, number // 2)
    if number < k:
        raise ConfigError(
            f"clusters: k = {k} is more than the {number} images of {where}; "
            "choose a smaller k or more images"
        )
    folder = arguments.output.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    step.check_space(arguments.output, most_bytes(k, dimensions, settings))
    part = own_part()
    made_of = json.dumps(
        [
            table.digest(arguments.features),
            settings.model_dump(exclude={"memory_mb"}),
            k,
            arguments.seed,
        ]
    )
    place = arguments.output.with_name(f".{arguments.output.name}.state")
    reached = Reached(place, json.dumps(made_of), part.number == 1)
    with tables.read(arguments.features, folder) as whole:
        found = tables.share(whole, part)
        own = Spread(found.rows, getattr(found.rows, "first", 0), number, part)
        if part.of > 1 and np.ptp(own.every(np.float64(reached.found))):
            reached.forget()  # others do not see it, or not yet; sums of several would mean nothing
        if reached.found:
            step.log.info("cluster: goes on after %d iterations", reached.found)
        transform = fit_transform(own, settings, found.keys, where)
        rows = training_rows(own, transform, settings, k, arguments.seed, arguments.output)
        centroids, objective = fit(rows, settings, k, arguments.seed, reached)
        sizes, total = np.zeros(k, np.int64), 0.0
        for labels, distances in nearest(found, transform, centroids, where):
            sizes += np.bincount(labels, minlength=k)
            total += float(distances.sum(dtype=np.float64))
        sizes, total = own.total(sizes), float(own.total(total))
    if part.number == 1:
        _write(arguments, k, transform, centroids, objective, sizes, rows.number)
    reached.remove()
    _report(k, sizes, objective, total / number)


# ---------------------------------------------------------------------------- k-means


def training_rows(
    features, transform: Transform, settings: Clustering, k: int, seed: int, output: Path
) -> Spread:
    """Gives the projected rows that k-means learns from, (n, E) float32: all, or a sample.

    Those of this process stand in memory up to `memory_mb`, beyond that in a scratch file beside
    the output.
    """
    features = spread(features)
    number = features.number
    picked = sample(number, settings.sample, k, seed)
    count = number if picked is None else len(picked)
    own = slice(features.first, features.first + len(features))
    if picked is not None:
        own = features.own(picked)
    shape = own.stop - own.start, transform.width
    size = 4 * shape[0] * shape[1]
    here = 1 if features.part.of == 1 else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    fits = size * here <= settings.memory_mb << 20  # of all processes of this machine
    step.log.info(
        "cluster: k-means learns from %s %d of %d rows of %d dimensions, %s",
        "all" if count == number else f"a sample (clustering.sample = {settings.sample}) of",
        count, number, transform.width, "in memory" if fits else "from a scratch file",
    )  # fmt: skip
    if fits:
        rows = np.empty(shape, np.float32)
    else:
        step.check_space(output, size)
        rows = blocks.Scratch(output.absolute().parent, shape)

    def put(first: int, block: np.ndarray) -> None:
        """Projects the picked rows of a block, or all; to stream and mask is quicker than to seek.

        By the threads of `each`: copies are most of the work on a sample.
        """
        low, high = first, first + len(block)
        if picked is not None:
            low, high = np.searchsorted(mine, (low, high))
            block = block[mine[low:high] - first]
        rows[low:high] = project(block, transform)

    mine = None if picked is None else picked[own] - features.first
    for _ in blocks.each(put, features):
        pass
    return Spread(rows, own.start, count, features.part)


def sample(number: int, per_centroid: int | None, k: int, seed: int) -> np.ndarray | None:
    """Draws `per_centroid` * k row numbers in ascending order; None where that is all."""
    if per_centroid is None or per_centroid * k >= number:
        return None
    return np.sort(lloyd.permuted(number, per_centroid * k, seed))


def fit(
    rows, settings: Clustering, k: int, seed: int, reached: Reached | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Runs k-means on the rows, warm-started if the settings say so; gives what `kmeans` does."""
    rows = spread(rows)
    picked = sample(rows.number, settings.warm_start, k, seed)
    iterations, redo, start = settings.iterations, settings.redo, None
    if picked is not None and iterations > 1:
        early = min(iterations - 1, max(1, int(WARM_SHARE * iterations)))
        iterations -= early
        step.log.info(
            "cluster: warm start (clustering.warm_start = %d), %d iterations on %d of %d rows, "
            "then %d on all", settings.warm_start, early, len(picked), rows.number, iterations,
        )  # fmt: skip
        start, _ = kmeans(
            rows.take(picked), k, early, redo, settings.spherical, seed, reached=reached
        )
    return kmeans(rows, k, iterations, redo, settings.spherical, seed, start, reached)


def nearest(
    found: tables.Features, transform: Transform, centroids: np.ndarray, where: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Gives nearest centroids (n,) int64 and squared distances (n,) float32, block by block.

    Raises:
        DataError: A feature is not finite.
    """

    def prepare(first: int, block: np.ndarray) -> np.ndarray:
        blocks.check_finite(block, found.keys, where, first)
        return project(block, transform)

    return lloyd.nearest(found.rows, centroids, prepare)


# ---------------------------------------------------------------------------- the table


def most_bytes(k: int, dimensions: int, settings: Clustering) -> int:
    """Gives the bytes that a table of clusters has at most: PCA may keep fewer components."""
    kept = min(settings.pca or dimensions, dimensions)
    floats = k * kept + dimensions * (1 + (kept if settings.pca else 0))
    return 4 * floats + 8 * (k + settings.iterations)


def _write(arguments, k: int, transform: Transform, centroids, objective, sizes, rows: int) -> None:
    settings = {**arguments.settings.model_dump(), "k": k, "seed": arguments.seed}
    settings["rows"] = rows
    nothing = np.zeros((len(transform.mean), 0), np.float32)
    projection = nothing if transform.projection is None else transform.projection
    arrays = {
        "centroids": centroids, "mean": transform.mean, "projection": projection,
        "sizes": sizes, "objective": objective,
    }  # fmt: skip
    with table.create(arguments.output, "clusters", settings, [arguments.features]) as file:
        for name, array in arrays.items():
            table.put(file, name, array)
        file.attrs["l2"] = transform.l2


def read_clusters(path: Path) -> tuple[np.ndarray, np.ndarray, Transform]:
    """Reads centroids (K, E), sizes (K,) and the transform."""
    names = {"centroids": 2, "*mean": 1, "*projection": 2, "sizes": 1, "*objective": 1}
    with table.read(path, "clusters", names) as file:
        centroids, mean, projection, sizes = (
            table.load(file, name) for name in ("centroids", "mean", "projection", "sizes")
        )
        l2 = bool(file.attrs["l2"])
    return centroids, sizes, Transform(mean, projection if projection.size else None, l2)


def _report(k: int, sizes: np.ndarray, objective: np.ndarray, distance: float) -> None:
    empty = int((sizes == 0).sum())
    step.log.info(
        "cluster: k = %d, sizes %d to %d, %d empty, mean squared distance %.4g, "
        "objective %.6g -> %.6g",
        k, sizes.min(), sizes.max(), empty, distance, objective[0], objective[-1],
    )  # fmt: skip
    if empty:
        step.log.warning("cluster: %d of %d clusters are empty and get no label", empty, k)


if __name__ == "__main__":
    step.main(__doc__, add_arguments, run)
