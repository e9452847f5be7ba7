"""Means over seeds, their intervals, and what a difference proves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

TIE = 0.02  # gaps below two points were within the noise of one pre-training seed

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
# Source: NIST/SEMATECH e-Handbook of Statistical Methods, section 1.3.6.7.2, column 0.975.
T_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
NORMAL_95 = 1.960  # the same of the normal distribution, for the many test images


class Interval(NamedTuple):
    """A mean over n seeds and the half-width of its 95 % interval, None where nothing tells it."""

    mean: float
    half: float | None
    n: int


def interval(values: Iterable[float], images: np.ndarray | None = None) -> Interval:
    """Gives the mean of one value per seed and its 95 % interval, over seeds and test images.

    All seeds are judged on the same images, so the spread over seeds does not show what another
    draw of test images would change: five seeds on 1,000 images that differ by chance alone would
    often pass for a proof. Both spreads are measured and added in squares: Student's t over seeds,
    the normal distribution over images. What seeds and images do together counts twice, which
    makes the interval a little too wide (ours; the crossed random effects of variance analysis).

    Args:
        values: One per seed.
        images: (T,) float, what each test image adds to the mean, averaged over the seeds; None
            where it is not known, which leaves the spread over seeds alone.

    Returns:
        The interval. More than 31 values use the quantile of 30 degrees of freedom, which is a
        little too wide.
    """
    values = list(values)
    halves = []
    if len(values) > 1:
        quantile = T_95[min(len(values) - 1, len(T_95)) - 1]
        halves.append(quantile * statistics.stdev(values) / len(values) ** 0.5)
    if images is not None and len(images) > 1:
        halves.append(NORMAL_95 * float(images.std(ddof=1)) / len(images) ** 0.5)
    return Interval(statistics.fmean(values), math.hypot(*halves) if halves else None, len(values))


def outcome(gap: Interval) -> str:
    """Says `beats`, `tie` or `behind`; clear is what passes the interval and two points.

    The interval holds the teacher fixed; two points stand for the noise of training it again.
    """
    if abs(gap.mean) <= max(TIE, gap.half or 0.0):
        return "tie"
    return "beats" if gap.mean > 0 else "behind"
