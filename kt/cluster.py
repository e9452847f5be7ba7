"""Clusters features with k-means (step b of the paper).

The features are first centred, reduced, whitened and normalised as the settings say; the transform
travels with the centroids, and `project` is the only place that applies it. By hand:

    python -m kt.cluster --features features.h5 --k 100 --seed 0 --output clusters.h5 \
      --settings '{"centre": true, "pca": 64, "whiten": true, "l2": true, "spherical": false,
                   "iterations": 50, "redo": 1}'
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np

from kt import config
from kt.core import images, step, table
from kt.core.step import ConfigError, DataError
from kt.features import check_finite

RESTART = 15486557  # between the seeds of two restarts, as faiss has it


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--features", type=Path, required=True, help="table to cluster")
    parser.add_argument("--k", type=int, required=True, help="number of clusters")
    parser.add_argument(
        "--settings", type=config.json_of(config.Clustering), required=True, help="JSON, see above"
    )
    parser.add_argument("--seed", type=int, required=True, help="of the first centroids")
    parser.add_argument("--output", type=Path, required=True, help="table to write")


def run(arguments: argparse.Namespace) -> None:
    """Fits transform and centroids on all rows, in key order."""
    with table.read(arguments.features, "features", {"features": 2, "keys": 1}) as file:
        keys = table.strings(file, "keys")
        features = file["features"][...]
    order = images.rows_of(keys, sorted(keys), str(arguments.features))
    features = features[order]
    check_finite(features, sorted(keys), str(arguments.features))
    settings, k = arguments.settings, arguments.k
    if len(features) < k:
        raise ConfigError(
            f"clusters: k = {k} is more than the {len(features)} images of {arguments.features}; "
            "choose a smaller k or more images"
        )
    transform = fit_transform(features, settings)
    projected = project(features, transform)
    centroids, objective = kmeans(
        projected, k, settings.iterations, settings.redo, settings.spherical, arguments.seed
    )
    nearest, distances = assign(projected, centroids)
    sizes = np.bincount(nearest, minlength=k)
    _write(arguments, transform, centroids, objective, sizes)
    _report(k, sizes, objective, float(distances.mean()))


def fit_transform(features: np.ndarray, settings: config.Clustering) -> Transform:
    """Fits centring, PCA and whitening.

    Args:
        features: (N, D) float32.
        settings: `pca` is lowered to what N and D allow, and said so.

    Raises:
        DataError: All rows are the same.
    """
    mean = features.mean(0, dtype=np.float64)
    if np.ptp(features, axis=0).max(initial=0) == 0:
        raise DataError(
            f"all {len(features)} rows of the features are the same; nothing to cluster"
        )
    projection = None
    if settings.pca:
        projection = _principal(features, mean, settings)
    kept = mean if settings.centre or settings.pca else np.zeros_like(mean)
    return Transform(kept.astype(np.float32), projection, settings.l2)


def _principal(features: np.ndarray, mean: np.ndarray, settings: config.Clustering) -> np.ndarray:
    """Gives the (D, E) projection on principal components, scaled to unit variance if whitened."""
    centred = features - mean.astype(np.float32)
    covariance = (centred.T @ centred).astype(np.float64) / max(len(features) - 1, 1)
    variances, directions = np.linalg.eigh(covariance)
    # Components without variance carry rounding noise only; whitening would blow it up.
    useful = int((variances > variances[-1] * 1e-6).sum())
    # With about as many components as rows, whitened rows are all equally far from each other.
    kept = min(settings.pca, useful, max(1, len(features) // 4))
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


def kmeans(
    rows: np.ndarray, k: int, iterations: int, redo: int, spherical: bool, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Runs faiss's Lloyd iterations on all rows (no sub-sampling).

    Args:
        rows: (N, E) float32.
        k: Number of centroids, at most N.
        iterations: How many.
        redo: Restarts; the best objective wins.
        spherical: Centroids of unit length.
        seed: Of the initial centroids.

    Returns:
        (k, E) float32 centroids and the objective before each update of the best run, float64, at
        most `iterations` of them (faiss ends where nothing changes any more): the sum of squared
        distances, or of inner products if spherical.
    """
    import faiss

    def run(number: int):
        model = faiss.Kmeans(
            rows.shape[1], k, niter=iterations, spherical=spherical,
            seed=(seed + number * RESTART) % 2**31,
            max_points_per_centroid=len(rows), min_points_per_centroid=1,
        )  # fmt: skip
        model.train(rows)
        return model

    # Not by faiss's own restarts, which give the objectives of all of them in one row.
    runs = [run(number) for number in range(redo)]
    best = (max if spherical else min)(runs, key=lambda model: model.obj[-1])
    return best.centroids, np.asarray(best.obj, np.float64)


def assign(rows: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gives each row's nearest centroid (N,) int64 and the squared distance (N,) float32.

    For spherical centroids on unit rows the nearest is also the one of the largest cosine.
    """
    import faiss

    index = faiss.IndexFlatL2(centroids.shape[1])
    index.add(np.ascontiguousarray(centroids))
    distances, nearest = index.search(rows, 1)
    return nearest[:, 0], distances[:, 0]


def _write(arguments, transform: Transform, centroids, objective, sizes) -> None:
    settings = {**arguments.settings.model_dump(), "k": arguments.k, "seed": arguments.seed}
    nothing = np.zeros((len(transform.mean), 0), np.float32)
    projection = nothing if transform.projection is None else transform.projection
    with table.create(arguments.output, "clusters", settings, [arguments.features]) as file:
        table.put(file, "centroids", centroids)
        table.put(file, "mean", transform.mean)
        table.put(file, "projection", projection)
        table.put(file, "sizes", sizes)
        table.put(file, "objective", objective)
        file.attrs["l2"] = transform.l2


def read_clusters(path: Path) -> tuple[np.ndarray, np.ndarray, Transform]:
    """Reads centroids (K, E), sizes (K,) and the transform."""
    arrays = {"centroids": 2, "*mean": 1, "*projection": 2, "sizes": 1, "*objective": 1}
    with table.read(path, "clusters", arrays) as file:
        projection = file["projection"][...]
        transform = Transform(
            file["mean"][...], projection if projection.size else None, bool(file.attrs["l2"])
        )
        return file["centroids"][...], file["sizes"][...], transform


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
