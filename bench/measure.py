"""The arithmetic of the benchmark: alternating rounds, ratios by pair, growth, the probe."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Pair = tuple[float, float]  # seconds of product and peer, one after the other


@dataclasses.dataclass
class Run:
    """What a row is measured with.

    Attributes:
        rounds: How often.
        cores: Threads that it may use.
        scratch: A folder that all rows of one benchmark share.
        full: Whether the default run is made in full.
    """

    rounds: int
    cores: int
    scratch: Path
    full: bool = False

    def folder(self, name: str) -> Path:
        """Gives a folder in the scratch folder."""
        path = self.scratch / name
        path.mkdir(parents=True, exist_ok=True)
        return path


@dataclasses.dataclass
class Measured:
    """What came out.

    Attributes:
        values: One for each round; the row's value is their median.
        against: The peer or the floor, with its version.
        pairs: Seconds of product and peer by round, where there are such.
        more: Whatever else the record should say, as JSON.
    """

    values: list[float]
    against: str
    pairs: list[Pair] = dataclasses.field(default_factory=list)
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def value(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.values)


def seconds(function: Callable[[], Any]) -> float:
    """Gives the wall-clock seconds of a call, or those that it gives back as a float."""
    start = time.perf_counter()
    own = function()
    return own if isinstance(own, float) else time.perf_counter() - start


def alternate(
    product: Callable[[], Any], peer: Callable[[], Any], rounds: int, warm: bool = True
) -> list[Pair]:
    """Times product, peer, product, peer, ..., so that both see the same state of the machine.

    Args:
        product: One round of the product.
        peer: The same work by the peer or the floor.
        rounds: How many pairs.
        warm: Whether one pair is made before, untimed.
    """
    if warm:
        peer()
        product()
    return [(seconds(product), seconds(peer)) for _ in range(rounds)]


def speeds(pairs: Sequence[Pair]) -> list[float]:
    """Gives by pair how many times as fast as the peer the product is (a floor: its share)."""
    return [peer / product for product, peer in pairs]


def costs(pairs: Sequence[Pair]) -> list[float]:
    """Gives by pair how many times as long as the peer the product takes."""
    return [product / peer for product, peer in pairs]


def worst(cases: dict[str, Measured], pick: Callable = min) -> Measured:
    """Gives the case furthest from its goal, and with it the medians of all.

    Args:
        cases: By name.
        pick: `min` where larger is better, `max` where smaller is.
    """
    name = pick(cases, key=lambda case: cases[case].value)
    medians = {case: round(found.value, 4) for case, found in cases.items()}
    more = {**cases[name].more, "worst": name, "cases": medians}
    return dataclasses.replace(cases[name], more=more)


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Fits time = c * size ** e by least squares of the logarithms, and gives e."""
    x, y = [math.log(size) for size in sizes], [math.log(one) for one in times]
    return statistics.linear_regression(x, y).slope


def growth(work: dict[int, Callable[[], Any]], rounds: int) -> Measured:
    """Times work of several sizes in turn and fits an exponent for each round.

    Args:
        work: The function of each size.
        rounds: How often all sizes are gone through.
    """
    work[min(work)]()
    times = [[seconds(function) for function in work.values()] for _ in range(rounds)]
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    by_size = {size: round(one, 4) for size, one in zip(work, medians, strict=True)}
    return Measured(
        [exponent(list(work), one) for one in times],
        "growth in proportion: exponent 1",
        more={"seconds_by_size": by_size},
    )


def probe(edge: int = 1536, times: int = 3) -> float:
    """Gives the GFLOP/s of a fixed matrix product in float32, the best of a few."""
    import numpy as np

    matrix = np.ones((edge, edge), np.float32)
    out = np.empty_like(matrix)
    best = min(seconds(lambda: np.dot(matrix, matrix, out=out) is None) for _ in range(times))
    return 2 * edge**3 / best / 1e9
