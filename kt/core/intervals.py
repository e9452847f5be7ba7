"""Means over seeds, their intervals, and what a difference proves."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import NamedTuple

TIE = 0.02  # gaps below two points were within the noise of one pre-training seed

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
# Source: NIST/SEMATECH e-Handbook of Statistical Methods, section 1.3.6.7.2, column 0.975.
T_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


class Interval(NamedTuple):
    """A mean over seeds and the half-width of its 95 % interval, None for one seed."""

    mean: float
    half: float | None
    n: int


def interval(values: Iterable[float]) -> Interval:
    """Gives the mean of one value per seed and its 95 % Student-t interval.

    More than 31 values use the quantile of 30 degrees of freedom, which is a little too wide.
    """
    values = list(values)
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None, len(values))
    quantile = T_95[min(len(values) - 1, len(T_95)) - 1]
    return Interval(mean, quantile * statistics.stdev(values) / len(values) ** 0.5, len(values))


def outcome(gap: Interval) -> str:
    """Says `beats`, `tie` or `behind`; clear is what passes the interval and two points.

    The interval holds the teacher fixed; two points stand for the noise of training it again.
    """
    if abs(gap.mean) <= max(TIE, gap.half or 0.0):
        return "tie"
    return "beats" if gap.mean > 0 else "behind"
