"""Pillow's bicubic resize of a square to a square as one compiled loop: the same pixels, quicker.

The arithmetic is Pillow's own (`src/libImaging/Resample.c`): weights of 22 bits, first along the
rows, rounded to bytes, then along the columns. It is in whole numbers, so that every machine gives
the same result. (torch's antialiased resize has weights of 16 bits and differs by up to 2 levels.)
numba takes a second to load: `kt.core.decode` does so where there is enough work.
"""

from __future__ import annotations

import functools
import math
import threading

import numpy as np

from kt.core.compiled import compiled_at_once, numba  # told where to keep code

BITS = 22  # of the weights, as in Pillow
SUPPORT = 2.0  # of the cubic kernel, in pixels of the smaller image
ROWS = 32  # rows at a time, side by side in one vector
LANES = 3 * ROWS
# Of the compiled loop: a square of any strides, `first` and `factors`, three scratches, the result.
SIGNATURE = numba.void(
    numba.types.Array(numba.uint8, 3, "A", readonly=True),
    *(numba.int64[::1], numba.int32[:, ::1]),
    *([numba.uint8[:, ::1]] * 4),
)
_local = threading.local()


@functools.lru_cache(256)
def weights(edge: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Gives for each pixel of the result its first pixel (S,) int64 and weights (S, T) int32.

    T is a multiple of 4: what is over has the weight 0 and may lie outside of the picture.
    """
    scale = edge / size
    shrink = max(scale, 1.0)
    support = SUPPORT * shrink
    centre = (np.arange(size) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + support + 0.5).astype(np.int64), edge)
    taps = 4 * math.ceil(int((last - first).max()) / 4)
    place = np.arange(taps) + first[:, None]
    values = _cubic((place - centre[:, None] + 0.5) * (1.0 / shrink))
    values[place >= last[:, None]] = 0.0
    values /= np.cumsum(values, 1)[:, -1:]  # summed one after the other, as Pillow does
    rounded = np.trunc(values * (1 << BITS) + np.where(values < 0, -0.5, 0.5))
    return first, rounded.astype(np.int32)


def _cubic(x: np.ndarray) -> np.ndarray:
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def resize(square: np.ndarray, size: int) -> np.ndarray:
    """Resizes (E, E, 3) uint8 to (3, size, size) uint8."""
    edge = len(square)
    first, factors = weights(edge, size)
    high = edge + factors.shape[1]
    out = np.empty((size, 3 * size), np.uint8)
    band, shrunk = _scratch("band", high, LANES), _scratch("shrunk", size, LANES)
    _resize(square, first, factors, band, shrunk, _scratch("middle", high, 3 * size), out)
    return np.ascontiguousarray(out.reshape(size, 3, size).transpose(1, 0, 2))


def _scratch(name: str, height: int, width: int) -> np.ndarray:
    """Gives memory that each thread keeps: fresh pages cost as much as a pass."""
    count = height * width
    kept = getattr(_local, name, None)
    if kept is None or len(kept) < count:
        kept = np.empty(count, np.uint8)
        setattr(_local, name, kept)
    return kept[:count].reshape(height, width)


@numba.njit(nogil=True, cache=True)
def _weigh(rows, first, factors, total, out):
    """Sums rows by weight, four at a time, and rounds to 0..255."""
    total[:] = np.int32(1 << (BITS - 1))
    for j in range(0, len(factors), 4):
        p, q, r, s = factors[j], factors[j + 1], factors[j + 2], factors[j + 3]
        a, b = rows[first + j], rows[first + j + 1]
        c, d = rows[first + j + 2], rows[first + j + 3]
        for i in range(len(total)):
            total[i] += (
                p * np.int32(a[i]) + q * np.int32(b[i]) + r * np.int32(c[i]) + s * np.int32(d[i])
            )
    for i in range(len(total)):
        out[i] = min(max(total[i] >> BITS, 0), 255)


@compiled_at_once(SIGNATURE)
def _resize(pixels, first, factors, band, shrunk, middle, out):
    edge, size = len(pixels), len(out)
    band[edge:] = 0
    middle[edge:] = 0
    total = np.empty(LANES, np.int32)
    for y in range(0, edge, ROWS):
        height = min(ROWS, edge - y)
        for row in range(height):
            line = pixels[y + row]
            for x in range(edge):
                for channel in range(3):
                    band[x, channel * ROWS + row] = line[x, channel]
        for x in range(size):
            _weigh(band, first[x], factors[x], total, shrunk[x])
        for row in range(height):
            line = middle[y + row]
            for channel in range(3):
                for x in range(size):
                    line[channel * size + x] = shrunk[x, channel * ROWS + row]
    total = np.empty(3 * size, np.int32)
    for y in range(size):
        _weigh(middle, first[y], factors[y], total, out[y])
