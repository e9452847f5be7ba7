"""Average precision of ranked images, and its mean over classes.

Images of equal score stand at one place of the ranking: no order among them is made up, so that the
result does not depend on the order of the images.
"""

from __future__ import annotations

import numpy as np

from kt.core.step import DataError

POINTS = 10  # recall 0, 0.1, ..., 1


def ranking(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts what is found down to each distinct score, the highest first.

    Args:
        scores: (N,) float.
        positive: (N,) bool.

    Returns:
        Positives and images with at least that score, (distinct scores,) int64 each.

    Raises:
        DataError: A score is not a number; it would have no place.
    """
    if np.isnan(scores).any():
        raise DataError(
            f"scores to rank by: expected numbers, {int(np.isnan(scores).sum())} of {len(scores)} "
            "are none; the network or its training diverged: lower the learning rate"
        )
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True)[: len(ranked)])
    return np.cumsum(positive[order])[last], last + 1


def by_area(scores: np.ndarray, positive: np.ndarray) -> float:
    """Gives the area under precision over recall as steps, without interpolation, 0..1.

    Arguments as in `ranking`, at least one image positive. The devkits since VOC2010 also raise
    each precision to the highest at any larger recall; this is the plain sum, scikit-learn's.
    """
    found, seen = ranking(scores, positive)
    return float((np.diff(found, prepend=0) * found / seen).sum() / found[-1])


def by_points(scores: np.ndarray, positive: np.ndarray) -> float:
    """Gives the 11-point average precision of VOC2007, 0..1; arguments as in `by_area`."""
    found, seen = ranking(scores, positive)
    return eleven_points(found, seen, int(found[-1]))


def eleven_points(found: np.ndarray, seen: np.ndarray, positives: int) -> float:
    """Gives the mean over recall 0, 0.1, ..., 1 of the highest precision there or above, 0..1.

    Recalls are compared as whole numbers: 3 of 10 found is a recall of 0.3. Where a recall is never
    reached, the precision is 0.

    Args:
        found: (R,) int64, positives down to each distinct score, as `ranking` gives them.
        seen: (R,) int64, all down to that score.
        positives: How many there are to find, at least as many as are found.
    """
    best = np.append(highest(found, seen), 0.0)
    return float(best[np.searchsorted(POINTS * found, np.arange(POINTS + 1) * positives)].mean())


def highest(found: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Gives the highest precision at each score and below it, (R,) float64; arguments as above."""
    return np.maximum.accumulate((found / seen)[::-1])[::-1]


def over_classes(scores: np.ndarray, signs: np.ndarray) -> dict[str, float]:
    """Gives `map_11` and `map_area`, the means over the classes that have a positive.

    Args:
        scores: (N, C) float.
        signs: (N, C), 1 present, -1 absent, 0 not counted (VOC's difficult objects).

    Raises:
        DataError: No class has a positive.
    """
    classes = [c for c in range(signs.shape[1]) if (signs[:, c] > 0).any()]
    if not classes:
        raise DataError("mean average precision: expected an image of some class, found none")
    parts = [(scores[:, c][signs[:, c] != 0], signs[:, c][signs[:, c] != 0] > 0) for c in classes]
    return {
        "map_11": float(np.mean([by_points(*part) for part in parts])),
        "map_area": float(np.mean([by_area(*part) for part in parts])),
    }
