"""Clusters features with k-means (step b of the paper).

The features are first centred, reduced, whitened and normalised as the settings say; the transform
travels with the centroids, and `project` is the only place that applies it. All is done block by
block in the order of the keys. By hand:

    python -m kt.cluster --features features.h5 --k 100 --seed 0 --output clusters.h5 \
      --settings '{"centre": true, "pca": 64, "whiten": true, "l2": true, "spherical": false,
                   "iterations": 50, "redo": 1, "memory_mb": 2000, "sample": null,
                   "warm_start": null}'
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kt import features as tables
from kt.core import auto, blocks, lloyd, step, table
from kt.core.lloyd import assign, kmeans
from kt.core.step import ConfigError, DataError

if TYPE_CHECKING:
    from kt.config import Clustering

__all__ = ["assign", "fit_transform", "kmeans", "nearest", "project", "read_clusters"]
WARM_SHARE = 0.75  # of the iterations, on the sub-sample of a warm start


@dataclasses.dataclass(frozen=True)
class Transform:
    """What is done to features before distances are taken.

    Attributes:
        mean: (D,) float32, zeros without centring.
        projection: (D, E) float32, or None to keep all D dimensions.
        l2: Whether rows are scaled to unit length.
    """

    mean: np.ndarray
    projection: np.ndarray | None
    l2: bool

    @property
    def width(self) -> int:
        """E, the number of dimensions after it."""
        return len(self.mean) if self.projection is None else self.projection.shape[1]


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
    parser.add_argument("--seed", type=int, required=True, help="of the first centroids")
    parser.add_argument("--output", type=Path, required=True, help="table to write")


def run(arguments: argparse.Namespace) -> None:
    """Fits transform and centroids, in key order, and counts the rows of each cluster."""
    settings, where = arguments.settings, str(arguments.features)
    _, k = auto.settled(arguments.choice, arguments.layer, arguments.k)
    with tables.read(arguments.features) as found:
        number = len(found.keys)
    if arguments.lower and k > number:
        step.log.info("cluster: k = %d is lowered to half of the %d images", k, number)
        k = max(2, number // 2)
    if number < k:
        raise ConfigError(
            f"clusters: k = {k} is more than the {number} images of {where}; "
            "choose a smaller k or more images"
        )
    folder = arguments.output.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    with tables.read(arguments.features, folder) as found:
        transform = fit_transform(found.rows, settings, found.keys, where)
        rows = training_rows(found.rows, transform, settings, k, arguments.seed, arguments.output)
        centroids, objective = fit(rows, settings, k, arguments.seed)
        sizes, total = np.zeros(k, np.int64), 0.0
        for labels, distances in nearest(found, transform, centroids, where):
            sizes += np.bincount(labels, minlength=k)
            total += float(distances.sum(dtype=np.float64))
    _write(arguments, k, transform, centroids, objective, sizes, len(rows))
    _report(k, sizes, objective, total / number)


# ---------------------------------------------------------------------------- transform


def fit_transform(features, settings: Clustering, keys=None, where: str = "features") -> Transform:
    """Fits centring, PCA and whitening.

    Args:
        features: (N, D) float32, see `kt.core.blocks`.
        settings: `pca` is lowered to what N and D allow, and said so.
        keys: (N,) names as bytes, for the message.
        where: The table, for the message.

    Raises:
        DataError: All rows are the same, or a value is not finite.
    """
    number, mean, scatter = _moments(features, bool(settings.pca), keys, where)
    projection = None
    if settings.pca:
        projection = _principal(scatter / max(number - 1, 1), number, settings)
    kept = mean if settings.centre or settings.pca else np.zeros_like(mean)
    return Transform(kept.astype(np.float32), projection, settings.l2)


def _moments(features, squares: bool, keys, where: str) -> tuple[int, np.ndarray, np.ndarray]:
    """Gives N, the mean (D,) and, if wanted, the sum of outer products of the centred rows (D, D).

    In float64, joined block by block from each block's own mean, so that a large mean takes nothing
    away from the differences. Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise
    algorithm for computing sample variances", 1979.
    """

    def part(first: int, block: np.ndarray):
        tables.check_finite(block, keys if keys is not None else _Numbers(), where, first)
        wide = block.astype(np.float64)
        mean = wide.mean(0)
        wide -= mean
        return len(block), mean, wide.T @ wide if squares else 0.0, block.min(0), block.max(0)

    number, mean, scatter, lowest, highest = 0, 0.0, 0.0, np.inf, -np.inf
    for count, centre, products, low, high in blocks.each(part, features):
        away, share = centre - mean, count / (number + count)
        if squares:
            scatter = scatter + products + np.outer(away, away) * (number * share)
        mean, number = mean + away * share, number + count
        lowest, highest = np.minimum(lowest, low), np.maximum(highest, high)
    if np.max(highest - lowest, initial=0) == 0:
        raise DataError(
            f"{where}: all {number} rows of the features are the same; nothing to cluster"
        )
    return number, mean, scatter


class _Numbers:
    """Names rows by their numbers."""

    def __getitem__(self, row: int) -> bytes:
        return str(row).encode()


def _principal(covariance: np.ndarray, number: int, settings: Clustering) -> np.ndarray:
    """Gives the (D, E) projection on principal components, scaled to unit variance if whitened."""
    variances, directions = np.linalg.eigh(covariance)
    # Components without variance carry rounding noise only; whitening would blow it up.
    useful = int((variances > variances[-1] * 1e-6).sum())
    # With about as many components as rows, whitened rows are all equally far from each other.
    kept = min(settings.pca, useful, max(1, number // 4))
    if kept < settings.pca:
        step.log.info("cluster: %d components kept, pca asked for %d", kept, settings.pca)
    variances, directions = variances[::-1][:kept], directions[:, ::-1][:, :kept]
    scale = 1 / np.sqrt(variances) if settings.whiten else np.ones(kept)
    return (directions * scale).astype(np.float32)


def project(features: np.ndarray, transform: Transform) -> np.ndarray:
    """Applies the transform to (N, D) float32 features; gives (N, E) float32."""
    projected = features - transform.mean
    if transform.projection is not None:
        projected = projected @ transform.projection
    if transform.l2:
        length = np.linalg.norm(projected, axis=1, keepdims=True)
        projected = projected / np.maximum(length, 1e-12)
    return np.ascontiguousarray(projected, dtype=np.float32)


# ---------------------------------------------------------------------------- k-means


def training_rows(
    features, transform: Transform, settings: Clustering, k: int, seed: int, output: Path
):
    """Gives the projected rows that k-means learns from, (n, E) float32: all, or a sample.

    They stand in memory up to `memory_mb`, beyond that in a scratch file beside the output.
    """
    number = len(features)
    picked = sample(number, settings.sample, k, seed)
    count = number if picked is None else len(picked)
    shape, size = (count, transform.width), 4 * count * transform.width
    fits = size <= settings.memory_mb << 20
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
            low, high = np.searchsorted(picked, (low, high))
            block = block[picked[low:high] - first]
        rows[low:high] = project(block, transform)

    for _ in blocks.each(put, features):
        pass
    return rows


def sample(number: int, per_centroid: int | None, k: int, seed: int) -> np.ndarray | None:
    """Draws `per_centroid` * k row numbers in ascending order; None where that is all."""
    if per_centroid is None or per_centroid * k >= number:
        return None
    return np.sort(lloyd.permuted(number, per_centroid * k, seed))


def fit(rows, settings: Clustering, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Runs k-means on the rows, warm-started if the settings say so; gives what `kmeans` does."""
    picked = sample(len(rows), settings.warm_start, k, seed)
    iterations, redo, start = settings.iterations, settings.redo, None
    if picked is not None and iterations > 1:
        early = min(iterations - 1, max(1, int(WARM_SHARE * iterations)))
        iterations -= early
        step.log.info(
            "cluster: warm start (clustering.warm_start = %d), %d iterations on %d of %d rows, "
            "then %d on all", settings.warm_start, early, len(picked), len(rows), iterations,
        )  # fmt: skip
        some = blocks.take(rows, picked)
        start, _ = kmeans(some, k, early, redo, settings.spherical, seed)
    return kmeans(rows, k, iterations, redo, settings.spherical, seed, start)


def nearest(
    found: tables.Features, transform: Transform, centroids: np.ndarray, where: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Gives nearest centroids (n,) int64 and squared distances (n,) float32, block by block.

    Raises:
        DataError: A feature is not finite.
    """

    def prepare(first: int, block: np.ndarray) -> np.ndarray:
        tables.check_finite(block, found.keys, where, first)
        return project(block, transform)

    return lloyd.nearest(found.rows, centroids, prepare)


# ---------------------------------------------------------------------------- the table


def _write(arguments, k: int, transform: Transform, centroids, objective, sizes, rows: int) -> None:
    settings = {**arguments.settings.model_dump(), "k": k, "seed": arguments.seed}
    settings["rows"] = rows
    nothing = np.zeros((len(transform.mean), 0), np.float32)
    projection = nothing if transform.projection is None else transform.projection
    arrays = {
        "centroids": centroids, "mean": transform.mean, "projection": projection,
        "sizes": sizes, "objective": objective,
    }  # fmt: skip
    step.check_space(arguments.output, sum(array.nbytes for array in arrays.values()))
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
