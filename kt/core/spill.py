"""Columns too long for memory: arrays in files that are mapped, so that the system may drop them.

What a million pictures are sorted by, and the orders that come of it, stand in files without names,
which are gone with the process. All work goes through them block by block, or in place.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

BLOCK = 4096
HALF, LOW = np.uint64(32), np.uint64(2**32 - 1)


def parts(column: np.ndarray) -> Iterator[np.ndarray]:
    """Gives a column (n,) in blocks."""
    return (column[first : first + BLOCK] for first in range(0, len(column), BLOCK))


def stored(folder: Path, dtype, blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Puts blocks one after the other into a file of the folder, (n,) of the type."""
    with tempfile.TemporaryFile(dir=folder) as file:
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype).data)
        file.flush()
        return mapped(file, dtype, "r+")


def where(folder: Path, mask: np.ndarray) -> np.ndarray:
    """Gives the places where a mask, (n,) bool, is true, (m,) int64."""
    blocks = enumerate(parts(mask))
    places = (np.flatnonzero(part) + number * BLOCK for number, part in blocks)
    return stored(folder, np.int64, places)


def mapped(file: BinaryIO | Path, dtype, mode="r") -> np.ndarray:
    """Gives all of a file as an array, (n,) of the type."""
    size = file.stat().st_size if isinstance(file, Path) else file.tell()
    if size == 0:  # cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(file, dtype, mode).view(np.ndarray)  # parts of a memmap take long to make


def placed(folder: Path, blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Sorts numbers below 2**32, (n,) uint64: the number in the upper half, its place below."""

    def both():
        first = 0
        for block in blocks:
            yield block.astype(np.uint64) << HALF | np.arange(
                first, first + len(block), dtype=np.uint64
            )
            first += len(block)

    found = stored(folder, np.uint64, both())
    found.sort()
    return found


def arranged(folder: Path, rows: np.ndarray, keys: Iterable[Callable]) -> np.ndarray:
    """Sorts rows, (n,) int64, by several keys.

    Args:
        folder: Takes the files.
        rows: (n,) int64.
        keys: From the least to the most important one; each gives (b,) numbers below 2**32 for a
            block of rows.
    """
    for key in keys:
        order = placed(folder, (key(part) for part in parts(rows)))
        rows = stored(folder, np.int64, (rows[part & LOW] for part in parts(order)))
    return rows


def contains(column: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Says which values, (b,), stand in a sorted column, (b,) bool."""
    if not len(column):
        return np.zeros(len(values), bool)
    return column[np.searchsorted(column, values).clip(max=len(column) - 1)] == values
