"""Near copies: pictures that are another one resized or encoded anew.

Each packed picture has a print, 8 x 8 block means of its grey; prints that are near to one of a
test image are looked for with matrix products, and the few pairs that are found are compared in
colour on 16 x 16 blocks. A copy differs by a small share of the picture's contrast. Measured on
photographs of 32 to 96 pixels: copies of half to double size in JPEG and WebP of quality 40 and
more differ by 0.03 to 0.2 (99 of 100), other pictures by more than 0.33; a brighter or mirrored
copy is not found.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np

PRINT = 8  # blocks along an edge
FINE = 16
NEAR = 8.0  # grey levels between prints (root of the mean square) to look closer
BLOCK = 1 << 22  # numbers of a matrix product at a time
ROWS = 1 << 14  # whose prints are held, or blocks at a time


def block_means(pixels: np.ndarray, blocks: int) -> np.ndarray:
    """Gives the rounded means of blocks of (..., S, S) uint8 or uint16, (..., b, b) int64."""
    inside = _inside(pixels.shape[-1], blocks)
    # Whole numbers below 2**24: exact in float32, on any machine.
    sums = (inside @ pixels.astype(np.float32) @ inside.T).astype(np.int64)
    heights = inside.sum(1).astype(np.int64)
    counts = heights[:, None] * heights
    return (2 * sums + counts) // (2 * counts)


@functools.cache
def _inside(size: int, blocks: int) -> np.ndarray:
    """Says which pixels of an edge are in which block, (b, S) float32 of 0 and 1."""
    edges = np.arange(blocks + 1) * size // blocks
    place = np.arange(size)
    return ((place >= edges[:-1, None]) & (place < edges[1:, None])).astype(np.float32)


def print_of(pixels: np.ndarray) -> np.ndarray:
    """Gives a picture's print, (64,) uint8, from its packed pixels (3, S, S) uint8."""
    grey = pixels.sum(0, dtype=np.uint16)
    return (block_means(grey, PRINT) // 3).astype(np.uint8).ravel()


def near(prints: np.ndarray, test: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields rows of `prints` (N, 64) uint8 with the rows of `test` (T, 64) that are near them."""
    if not len(test):
        return
    centred = test.astype(np.float32) - 128
    lengths = (centred**2).sum(1)
    height = max(1, BLOCK // len(test))
    for first in range(0, len(prints), height):
        block = prints[first : first + height].astype(np.float32) - 128
        distances = (block**2).sum(1)[:, None] + lengths - 2 * block @ centred.T
        close = distances < NEAR**2 * PRINT**2
        for row in np.flatnonzero(close.any(1)):
            yield first + int(row), np.flatnonzero(close[row])


class Compared:
    """Test images in colour on few blocks, each looked at when it is first needed."""

    def __init__(self, number: int, pixels: Callable[[int], np.ndarray]):
        """Takes their number T and what gives the packed pixels (3, S, S) uint8 of one."""
        self.pixels, self.number = pixels, number
        self.contrast = np.full(number, np.nan)
        self.blocks = np.zeros((0, 0), np.uint8)

    def differences(self, image: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Gives how far `image` (3, S, S) uint8 is from each of `others` (n,), (n,) float64.

        As a share of the other's contrast: 0 is the same, about 1.4 two unrelated pictures; a flat
        picture is like its equal only.
        """
        mine = _fine(image).ravel()
        if not self.blocks.size:
            self.blocks = np.zeros((self.number, len(mine)), np.uint8)
        for one in others[np.isnan(self.contrast[others])]:
            fine = _fine(self.pixels(one))
            self.blocks[one], self.contrast[one] = fine.ravel(), fine.std(axis=(1, 2)).mean()
        parts = (others[first : first + ROWS] for first in range(0, len(others), ROWS))
        gaps = (self.blocks[part].astype(np.int32) - mine for part in parts)
        distances = np.sqrt(np.concatenate([(gap**2).mean(1) for gap in gaps]))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(distances == 0, 0.0, distances / self.contrast[others])


def _fine(pixels: np.ndarray) -> np.ndarray:
    return block_means(pixels, min(FINE, pixels.shape[-1]))


def find(
    rows: np.ndarray,
    test: np.ndarray,
    prints: Callable[[np.ndarray], np.ndarray],
    pixels: Callable[[int], np.ndarray],
    limit: float,
) -> Iterator[tuple[int, int, float]]:
    """Yields rows that are near copies: the row, the test row, their difference.

    Args:
        rows: (N,) to look at.
        test: (T,) to compare with.
        prints: Gives the prints of rows, (n, 64) uint8.
        pixels: Gives the packed pixels of one row.
        limit: Most difference.
    """
    of_test, compared = prints(test), Compared(len(test), lambda at: pixels(test[at]))
    for first in range(0, len(rows), ROWS):
        part = rows[first : first + ROWS]
        for row, candidates in near(prints(part), of_test):
            found = compared.differences(pixels(part[row]), candidates)
            least = int(found.argmin())
            if found[least] <= limit:
                yield int(part[row]), int(test[candidates[least]]), float(found[least])
