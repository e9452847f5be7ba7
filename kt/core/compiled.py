"""Compiled loops that make views straight from the uint8 images of a pack, on one CPU core.

They read each pixel where it lies in the memory map and write each view once. The same arithmetic
as tensor operations stands in `kt/core/tiles.py`, `augment.py` and `turns.py`, for accelerators and
as the reference; both are fed by the same draws. The compiled code is kept beside this file, so
only the first run on a machine compiles (some seconds); the interpreter lock is free meanwhile.
Each machine has a folder of its own: the lock below may not reach across nodes that share files.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def _place(*folders: Path) -> Path:
    """Gives the first folder that can be written, or one that goes with this process."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            return folder
    folder = Path(tempfile.mkdtemp(prefix="kt-compiled-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


if "NUMBA_CACHE_DIR" not in os.environ:
    os.environ["NUMBA_CACHE_DIR"] = str(
        _place(
            Path(__file__).parent / "__pycache__" / platform.node(),
            Path(os.path.expanduser("~/.cache/kt"), platform.node()),
        )
    )

import numba  # noqa: E402 (reads the variable)
import numpy as np  # noqa: E402


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other processes from the compiled code that is kept in a folder."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a folder that may not be written, or has no locks
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / "kt.lock", "a"))  # NFS locks what one writes
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compiled(function):
    """Compiles a loop when it is first called with arguments of some types, and keeps the code.

    Numba names a file in its index and writes it afterwards. Of two processes that keep code for
    different types at once, one could so leave its code under the name of the other's, which from
    then on would run on arrays that are laid out otherwise (seen, numba 0.68). So one at a time.
    """
    # Sums may be taken in any order: four times as quick; the tests hold it to float tolerance.
    fastmath = {"reassoc", "contract", "nsz"}
    made = numba.njit(cache=True, nogil=True, fastmath=fastmath)(function)
    kept = made._cache
    for name in ("load_overload", "save_overload"):
        setattr(kept, name, _alone(Path(kept.cache_path))(getattr(kept, name)))
    return made


def compiled_at_once(signature):
    """Compiles a loop in whole numbers for arguments of known types where it stands."""

    def make(function):
        with _alone(Path(os.environ["NUMBA_CACHE_DIR"])):
            return numba.njit(signature, cache=True, nogil=True)(function)

    return make


@compiled
def puzzles(images, rows, source, top, left, colour, tiles) -> None:
    """Cuts, mixes and standardises the tiles of puzzles.

    Args:
        images: (N, 3, H, W) uint8.
        rows: (B, R) int64, own image and others.
        source: (B, V) int64, which of the R images a slot shows.
        top: (B, V, 3) int64, first row of each channel's window.
        left: (B, V, 3) int64, first column.
        colour: (B, 3, 3) float32, applied to the channels.
        tiles: (B, V, 3, t, t) float32 to be filled: zero mean and unit variance each, the variance
            from differences to the mean; under one grey level of deviation only centred.
    """
    for puzzle in range(tiles.shape[0]):
        matrix = colour[puzzle]
        plain = True
        for i in range(3):
            for j in range(3):
                plain &= matrix[i, j] == (1.0 if i == j else 0.0)
        for slot in range(tiles.shape[1]):
            image = images[rows[puzzle, source[puzzle, slot]]]
            tile = tiles[puzzle, slot]
            if plain:
                _copy(image, top[puzzle, slot], left[puzzle, slot], tile)
            else:
                _mix(image, top[puzzle, slot], left[puzzle, slot], matrix, tile)
            _standardise(tile.ravel())


@compiled
def _copy(image, top, left, tile) -> None:
    # Unsigned indices: numba need not ask whether they count from the end, and vectorises.
    size = np.uint64(tile.shape[2])
    for channel in range(3):
        first = np.uint64(left[channel])
        for y in range(np.uint64(tile.shape[1])):
            row = np.uint64(top[channel]) + y
            for x in range(size):
                tile[channel, y, x] = image[channel, row, first + x]


@compiled
def _mix(image, top, left, matrix, tile) -> None:
    size = np.uint64(tile.shape[2])
    for channel in range(3):
        red, green, blue = matrix[channel]
        first = np.uint64(left[channel])
        for y in range(np.uint64(tile.shape[1])):
            row = np.uint64(top[channel]) + y
            for x in range(size):
                tile[channel, y, x] = (
                    red * image[0, row, first + x]
                    + green * image[1, row, first + x]
                    + blue * image[2, row, first + x]
                )


@compiled
def _standardise(values) -> None:
    total = np.float32(0)
    for i in range(values.size):
        total += values[i]
    mean = total / np.float32(values.size)
    squares = np.float32(0)
    for i in range(values.size):
        squares += (values[i] - mean) * (values[i] - mean)
    deviation = np.sqrt(squares / np.float32(values.size))
    scale = np.float32(1) / max(deviation, np.float32(1))
    for i in range(values.size):
        values[i] = (values[i] - mean) * scale


@compiled
def crops(images, rows, theta, matrix, offset, views) -> None:
    """Crops, mirrors, resizes (bilinear) and recolours images.

    Each row of a crop is recoloured and brought to its width once, then rows are mixed: a row of
    the view takes two of them, and neighbours share one (measured at 28 px: a third less time than
    row by row of the view, at 96 px the same).

    Args:
        images: (N, 3, H, W) uint8.
        rows: (B,) int64.
        theta: (B, 2, 3) float32, diagonal maps from view to image, both in -1..1, as
            `torch.nn.functional.affine_grid` has it.
        matrix: (B, 3, 3) float32, applied to the channels.
        offset: (B, 3) float32, added to them.
        views: (B, h, w, 3) float32 to be filled.
    """
    height, width = images.shape[2], np.uint64(images.shape[3])  # unsigned: see `_copy`
    tall, wide = views.shape[1], views.shape[2]
    low, high = np.empty((2, wide), np.uint64)
    share = np.empty(wide, np.float32)
    line = np.empty((3, images.shape[3]), np.float32)
    bands = np.empty((height, wide * 3), np.float32)
    for view in range(views.shape[0]):
        image, mix = images[rows[view]], matrix[view]
        for x in range(wide):
            low[x], high[x], share[x] = _between(x, wide, theta[view, 0], 0, images.shape[3])
        top, below_top, _ = _between(0, tall, theta[view, 1], 1, height)
        bottom, below_bottom, _ = _between(tall - 1, tall, theta[view, 1], 1, height)
        for y in range(min(top, bottom), max(below_top, below_bottom) + 1):
            row = np.uint64(y)
            for channel in range(3):
                red, green, blue = mix[channel]
                shift = offset[view, channel]
                for x in range(width):
                    line[channel, x] = (
                        red * image[0, row, x] + green * image[1, row, x] + blue * image[2, row, x]
                    ) + shift
            for x in range(np.uint64(wide)):
                left, right, weight = low[x], high[x], share[x]
                for channel in range(np.uint64(3)):
                    value = line[channel, left]
                    value += weight * (line[channel, right] - value)
                    bands[row, x * np.uint64(3) + channel] = value
        found = views[view].reshape(tall, wide * 3)
        for y in range(tall):
            above, below, part = _between(y, tall, theta[view, 1], 1, height)
            upper, lower = np.uint64(above), np.uint64(below)
            for x in range(np.uint64(wide * 3)):
                found[y, x] = bands[upper, x] + part * (bands[lower, x] - bands[upper, x])


@compiled
def _between(index, number, theta, axis, size):
    """Gives the two pixels that a view's pixel lies between, and the share of the second."""
    place = (2 * index + 1) / number - 1
    place = ((place * theta[axis] + theta[2] + 1) * size - 1) / 2
    place = min(max(place, 0.0), size - 1.0)
    low = int(place)
    return low, min(low + 1, size - 1), np.float32(place - low)


@compiled
def turn(views, turns) -> None:
    """Turns square images (B, S, S, M) counter-clockwise in place by quarter turns (B,) int64."""
    last = views.shape[1] - 1
    for view in range(views.shape[0]):
        if turns[view] == 0:
            continue
        upright, found = views[view].copy(), views[view]
        for y in range(views.shape[1]):
            for x in range(views.shape[2]):
                if turns[view] == 1:
                    row, column = x, last - y
                elif turns[view] == 2:
                    row, column = last - y, last - x
                else:
                    row, column = last - x, y
                for channel in range(views.shape[3]):
                    found[y, x, channel] = upright[row, column, channel]


@compiled
def gather(images, rows, found) -> None:
    """Copies images (N, 3, H, W) uint8 of the rows (B,) int64 to `found` (B, 3, H, W)."""
    for i in range(len(rows)):
        found[i] = images[rows[i]]
