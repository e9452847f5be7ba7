"""Means over seeds, their intervals, and what a difference proves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

TIE = 0.02  # smaller gaps count as none: a choice of ours, see docs/explanation.md
ROUNDING = 1e-9  # .62 - .60 is a little more than .02 in floats, .42 - .40 a little less
FEWEST_SEEDS, FEWEST_IMAGES = 2, 50  # that say how far a gap may be chance (ours)

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
# Source: NIST/SEMATECH e-Handbook of Statistical Methods, section 1.3.6.7.2, column 0.975.
T_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
NORMAL_95 = 1.960  # the same of the normal distribution


class Interval(NamedTuple):
    """A mean over n seeds and the half-width of its 95 % interval.

    Attributes:
        mean: Over the seeds.
        half: None where neither several seeds nor test images tell it.
        n: Number of seeds.
        images: Number of test images, if they are in it.
    """

    mean: float
    half: float | None
    n: int
    images: int = 0


def interval(values: Iterable[float], images: np.ndarray | None = None) -> Interval:
    """Gives the mean of one value per seed and its 95 % interval, over seeds and test images.

    All seeds are judged on the same images, so the spread over seeds does not show what another
    draw of test images would change: five seeds on 1,000 images that differ by chance alone would
    often pass for a proof. Both spreads are measured, by Student's t, and added in squares. What
    seeds and images do together counts twice, which makes the interval a little too wide (ours; the
    crossed random effects of variance analysis).

    Args:
        values: One per seed.
        images: (T,) float, what each test image adds to the mean, averaged over the seeds; None
            where it is not known, which leaves the spread over seeds alone.

    """
    values = list(values)
    halves = []
    if len(values) > 1:
        halves.append(_half(statistics.stdev(values), len(values)))
    covered = len(images) if images is not None and len(images) > 1 else 0
    if covered:
        halves.append(_half(float(images.std(ddof=1)), len(images)))
    half = math.hypot(*halves) if halves else None
    return Interval(statistics.fmean(values), half, len(values), covered)


def _half(deviation: float, number: int) -> float:
    freedom = number - 1
    if freedom <= len(T_95):
        quantile = T_95[freedom - 1]
    else:  # the first terms of t's expansion around the normal distribution
        z = NORMAL_95
        quantile = (
            z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        )
    return quantile * deviation / number**0.5


def outcome(gap: Interval, images: int = 0) -> str:
    """Says `beats`, `tie` or `behind`; clear is what passes the interval and two points.

    `unjudged` are gaps of one seed, whose interval knows nothing of another training, or of very
    few test images, whose spread is not known itself. The interval holds the teacher fixed; two
    points stand for the noise of training it again.

    Args:
        gap: Of two arms.
        images: Of the test, where the interval does not know; 0: nobody does.
    """
    if gap.n < FEWEST_SEEDS or 0 < (gap.images or images) < FEWEST_IMAGES:
        return "unjudged"
    if abs(gap.mean) <= max(TIE, gap.half or 0.0) + ROUNDING:
        return "tie"
    return "beats" if gap.mean > 0 else "behind"
