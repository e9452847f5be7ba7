"""Scores of PASCAL VOC: average precision of rankings and of boxes, intersection over union.

By the rules of the devkit (VOCevalcls, VOCevaldet, VOCevalseg): what is difficult counts neither
for nor against; an object is found once, what finds it again is wrong. 11-point averages are those
of VOC2007, areas those of VOC2010 and later (Everingham et al., IJCV 2010, section 4.2).

Differs from the devkit: what has equal scores stands at one place of the ranking, as in
`kt.core.precision`, so that no result depends on the order of pictures or boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kt.core import precision
from kt.core.step import DataError
from kt.core.voc import VOID, Objects

OVERLAP = 0.5  # intersection over union from which a box finds an object


class Curve(NamedTuple):
    """What a ranking finds down to each of its R distinct scores.

    Attributes:
        found: (R,) int64, right ones with at least that score.
        seen: (R,) int64, all that count with at least that score.
        positives: How many there are to find.
    """

    found: np.ndarray
    seen: np.ndarray
    positives: int


class Boxes(NamedTuple):
    """What was detected in one picture.

    Attributes:
        boxes: (n, 4) float32: left, top, right, bottom, pixels.
        labels: (n,) int64.
        scores: (n,) float32.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


def eleven_points(curve: Curve) -> float:
    """Averages the best precision at recalls of 0, 0.1, ..., 1 and above, 0..1."""
    return precision.eleven_points(*curve)


def area(curve: Curve) -> float:
    """Gives the area under the best precision at each recall and above, 0..1."""
    gained = np.diff(curve.found, prepend=0)
    best = precision.highest(curve.found, curve.seen)
    return float((gained * best).sum() / curve.positives)


def mean_precision(curves: Sequence[Curve]) -> dict[str, float]:
    """Gives `map_11` and `map_area`, means over the classes that can be found.

    Raises:
        DataError: No class can.
    """
    known = [curve for curve in curves if curve.positives]
    if not known:
        raise DataError("expected objects of some class to find, all are difficult or missing")
    return {
        "map_11": float(np.mean([eleven_points(curve) for curve in known])),
        "map_area": float(np.mean([area(curve) for curve in known])),
    }


def ranking(scores: np.ndarray, truth: np.ndarray) -> Curve:
    """Ranks pictures by the score of one class.

    Args:
        scores: (N,) float.
        truth: (N,) 1 shown, -1 not, 0 difficult: left out.
    """
    counted = truth != 0
    found = precision.ranking(scores[counted], truth[counted] == 1)
    return Curve(*found, int((truth == 1).sum()))


def detection(found: Sequence[Boxes], truth: Sequence[Objects], label: int) -> Curve:
    """Matches the boxes of one class to its objects, best score first.

    A box belongs to the object of its class in its picture that it overlaps most. With an overlap
    of `OVERLAP` or more it is right the first time, wrong again, and left out if that is difficult.
    Which of several boxes of equal score is the first changes no count down to that score.

    Args:
        found: For each picture what was detected.
        truth: For each picture what is there.
        label: The class.
    """
    pictures = np.repeat(np.arange(len(found)), [(one.labels == label).sum() for one in found])
    scores = np.concatenate([one.scores[one.labels == label] for one in found])
    boxes = np.concatenate([one.boxes[one.labels == label] for one in found])
    wanted = [one.boxes[one.labels == label] for one in truth]
    difficult = [one.difficult[one.labels == label] for one in truth]
    taken = [np.zeros(len(one), bool) for one in wanted]
    counted, right = [], []
    for row in np.argsort(-scores, kind="stable"):
        picture = pictures[row]
        overlap = overlaps(boxes[row], wanted[picture])
        nearest = overlap.argmax() if len(overlap) else -1
        hit = nearest >= 0 and overlap[nearest] >= OVERLAP
        if hit and difficult[picture][nearest]:
            continue
        counted.append(row)
        right.append(hit and not taken[picture][nearest])
        if hit:
            taken[picture][nearest] = True
    ranked = precision.ranking(scores[np.array(counted, int)], np.array(right, bool))
    return Curve(*ranked, sum(int((~one).sum()) for one in difficult))


def overlaps(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Gives intersection over union of a box (4,) with others (n, 4), (n,) float64."""
    box, others = box.astype(np.float64), others.astype(np.float64)
    edges = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    common = edges.clip(0).prod(1)
    return common / ((box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - common)


def confusion(truth: np.ndarray, predicted: np.ndarray, number: int) -> np.ndarray:
    """Counts pixels by true and predicted class, (C, C) int64; void ones are left out.

    Args:
        truth: Any shape, uint8, 0..C-1 or `VOID`.
        predicted: The same shape, 0..C-1.
        number: C.
    """
    kept = truth != VOID
    pairs = truth[kept].astype(np.int64) * number + predicted[kept]
    return np.bincount(pairs, minlength=number * number).reshape(number, number)


def miou(counts: np.ndarray) -> float:
    """Gives the mean over classes of intersection over union, 0..1.

    A class that is neither there nor predicted has no value and is left out.

    Args:
        counts: (C, C) as `confusion` gives them.
    """
    common = np.diag(counts)
    union = counts.sum(0) + counts.sum(1) - common
    if not union.any():
        raise DataError("expected pixels of some class, all are void")
    return float((common[union > 0] / union[union > 0]).mean())
