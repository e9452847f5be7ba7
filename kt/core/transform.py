"""What is done to features before distances are taken: centred, reduced, whitened, normalised.

`fit_transform` learns it from all rows, block by block; `project` alone applies it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from kt.core import blocks, step
from kt.core.spread import Spread, spread
from kt.core.step import DataError

if TYPE_CHECKING:
    from kt.config import Clustering


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


def fit_transform(features, settings: Clustering, keys=None, where: str = "features") -> Transform:
    """Fits centring, PCA and whitening.

    Args:
        features: (N, D) float32, see `kt.core.blocks`, or a `Spread` of them over processes.
        settings: `pca` is lowered to what N and D allow, and said so.
        keys: (n,) names of this process's rows as bytes, for the message.
        where: The table, for the message.

    Raises:
        DataError: All rows are the same, or a value is not finite.
    """
    number, mean, scatter = _moments(spread(features), bool(settings.pca), keys, where)
    projection = None
    if settings.pca:
        projection = _principal(scatter / max(number - 1, 1), number, settings)
    kept = mean if settings.centre or settings.pca else np.zeros_like(mean)
    return Transform(kept.astype(np.float32), projection, settings.l2)


def _moments(features: Spread, squares: bool, keys, where: str):
    """Gives N, the mean (D,) and, if wanted, the sum of outer products of the centred rows (D, D).

    In float64, joined block by block from each block's own mean, so that a large mean takes nothing
    away from the differences. Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise
    algorithm for computing sample variances", 1979.
    """

    def part(first: int, block: np.ndarray):
        blocks.check_finite(block, keys if keys is not None else _Numbers(), where, first)
        wide = block.astype(np.float64)
        mean = wide.mean(0)
        wide -= mean
        return len(block), mean, wide.T @ wide if squares else 0.0, block.min(0), block.max(0)

    width = features.shape[1]
    number, mean, scatter = 0, np.zeros(width), np.zeros((width, width) if squares else ())
    lowest, highest = np.full(width, np.inf), np.full(width, -np.inf)
    for count, centre, products, low, high in blocks.each(part, features):
        away, share = centre - mean, count / (number + count)
        if squares:
            scatter += products  # in place: D x D may be large
            scatter += np.outer(away, away) * (number * share)
        mean, number = mean + away * share, number + count
        lowest, highest = np.minimum(lowest, low), np.maximum(highest, high)
    if features.part.of > 1:
        centre = features.total(mean * number) / features.number
        away = mean - centre
        if squares:
            scatter = features.total(scatter + np.outer(away, away) * number)
        number, mean = features.number, centre
        lowest, highest = features.every(lowest).min(0), features.every(highest).max(0)
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
