"""Rows too many for memory: a file that is sliced like an array, and work on them block by block.

Rows are anything that has a `shape` and gives an array for a slice: an array, a `Scratch`, a data
set of HDF5.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import threadpoolctl

from kt.core.ending import DataError

MOST_ROWS = 4096  # of a block; more fall out of the processor's cache
MOST_BYTES = 16 << 20


class Scratch:
    """Rows (N, D) float32 in a file without a name, which is gone with the process.

    Read and written by plain calls: memory-mapped pages would count as the process's memory.
    """

    def __init__(self, folder: Path, shape: tuple[int, int]):
        """Makes an empty file in the folder."""
        self.shape = shape
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (lives as long as this)

    def __len__(self) -> int:
        """Number of rows."""
        return self.shape[0]

    def __getitem__(self, part: slice) -> np.ndarray:
        """Reads rows without a step."""
        first, last, _ = part.indices(len(self))
        block = np.empty((max(0, last - first), self.shape[1]), np.float32)
        read_at(self.file.fileno(), block, first * self.shape[1] * 4)
        return block

    def __setitem__(self, part: slice, block: np.ndarray) -> None:
        """Writes rows without a step."""
        if not len(block):
            return
        raw = memoryview(np.ascontiguousarray(block, np.float32)).cast("B")
        offset = part.start * self.shape[1] * 4
        while len(raw):
            done = os.pwrite(self.file.fileno(), raw, offset)
            raw, offset = raw[done:], offset + done


class Slice:
    """Some of the rows of anything that gives an array for a slice; no copy."""

    def __init__(self, rows, first: int, last: int):
        """Takes the rows from `first` to `last` (exclusive)."""
        self.rows, self.first, self.shape = rows, first, (last - first, *rows.shape[1:])

    def __len__(self) -> int:
        """Number of rows."""
        return self.shape[0]

    def __getitem__(self, part: slice) -> np.ndarray:
        """Reads rows without a step."""
        first, last, _ = part.indices(len(self))
        return self.rows[self.first + first : self.first + last]


def read_at(file: int, block: np.ndarray, offset: int) -> None:
    """Fills an array from an open file.

    Raises:
        OSError: The file ends too early.
    """
    raw = memoryview(block).cast("B") if block.size else memoryview(b"")
    while len(raw):
        done = os.preadv(file, [raw], offset)
        if not done:
            raise OSError(f"the file ends {len(raw)} bytes too early")
        raw, offset = raw[done:], offset + done


def bounds(rows) -> Iterator[tuple[int, int]]:
    """Gives first and last (exclusive) of blocks of rows, sized by their width alone."""
    for first in range(0, rows.shape[0], height(rows)):
        yield first, min(first + height(rows), rows.shape[0])


def height(rows) -> int:
    """Gives the rows of a block, by their width."""
    return max(1, min(MOST_ROWS, MOST_BYTES // max(4 * rows.shape[1], 1)))


def take(rows, picked: np.ndarray) -> np.ndarray:
    """Gives the picked rows, whose numbers ascend, (n, D) float32.

    Reads blocks and takes rows out of them: HDF5 is several times slower if asked for single rows.
    """
    found = np.empty((len(picked), rows.shape[1]), np.float32)
    for first, last in bounds(rows):
        low, high = np.searchsorted(picked, (first, last))
        if low < high:
            part = rows[first:last]
            np.take(part, picked[low:high] - first, 0, out=found[low:high], mode="clip")
    return found


def check_finite(features: np.ndarray, keys, where: str, first: int = 0) -> None:
    """Refuses NaN and Inf.

    Args:
        features: (n, D) float32.
        keys: Names; that of the first row is `keys[first]`.
        where: For the message.
        first: See `keys`.

    Raises:
        DataError: Names the images.
    """
    bad = np.flatnonzero(~np.isfinite(features).all(1))
    if len(bad):
        names = (keys[first + int(row)] for row in bad[:5])
        shown = ", ".join(repr(name.decode("utf-8", "replace")) for name in names)
        raise DataError(
            f"{where}: features of {len(bad)} images are not finite, among them {shown}"
        )


def each(function: Callable, rows) -> Iterator:
    """Gives `function(first, block)` for all blocks of rows, in their order.

    Blocks are computed side by side, each by one thread. So what comes out does not depend on the
    number of threads, and the parts between two matrix products are shared out, too.

    Args:
        function: Takes the number of the block's first row and the block, (n, D) float32.
        rows: (N, D).
    """
    with _controller().limit(limits=1, user_api="blas"), ThreadPoolExecutor(threads()) as pool:
        waiting: deque = deque()
        for first, last in bounds(rows):
            waiting.append(pool.submit(function, first, rows[first:last]))
            if len(waiting) > threads():
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def threads() -> int:
    """Gives the threads that a step was given (`--threads` sets the variable), or all cores."""
    return int(os.environ.get("OMP_NUM_THREADS") or 0) or len(os.sched_getaffinity(0))


@functools.cache
def _controller() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController()
