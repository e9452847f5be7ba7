"""Packed images as JPEGs: a fifth to two fifths of the bytes, decoded when rows are asked for.

What `kt.core.images.Pack.images` is for a pack with `storage: jpeg`: it has a shape and gives rows
as the array of pixels does. Batches are decoded by threads.
"""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np

from kt.core import jpeg, table
from kt.core.step import DataError, ResourceError, lack, line

FEW = 8  # images that one thread decodes as fast as several


class Encoded:
    """Images of one split, (N, 3, S, S) uint8 to whoever reads rows.

    Attributes:
        shape: (N, 3, S, S).
        dtype: uint8.
        data: (bytes,) uint8, JPEGs one after the other, a read-only memory map.
        offsets: (N + 1,) int64, where each begins and the last one ends.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, data: np.ndarray, offsets: np.ndarray, size: int, where: Path):
        """Takes what `read` found."""
        self.data, self.offsets, self.where = data, offsets, where
        self.shape = (len(offsets) - 1, 3, size, size)

    def __len__(self) -> int:
        """Number of images."""
        return self.shape[0]

    def __getitem__(self, index) -> np.ndarray:
        """Decodes rows.

        Args:
            index: An integer, a slice or (B,) integers.

        Returns:
            (3, S, S) uint8 for an integer, else (B, 3, S, S).

        Raises:
            IndexError: There is no such row.
            DataError: An image is broken; the file and the row are named.
        """
        rows = np.arange(len(self))[index]
        if rows.ndim == 0:
            return self._decode(int(rows))
        out = np.empty((len(rows), *self.shape[1:]), np.uint8)

        def fill(number: int) -> None:
            out[number] = self._decode(int(rows[number]))

        if len(rows) <= FEW:
            for number in range(len(rows)):
                fill(number)
        else:
            list(_pool(os.getpid()).map(fill, range(len(rows))))
        return out

    def _decode(self, row: int) -> np.ndarray:
        content = self.data[self.offsets[row] : self.offsets[row + 1]]
        try:
            return decode(content, self.shape[-1])
        except DataError as error:
            raise DataError(f"{self.where}: image of row {row} {error}; run again") from None


def read(file: h5py.File, path: Path) -> Encoded:
    """Opens the encoded images of an open pack.

    Raises:
        DataError: Its arrays do not fit together.
    """
    offsets = table.load(file, "offsets")
    size, length = int(file.attrs.get("size", 0)), file["data"].shape[0]
    fits = offsets.dtype == np.int64 and file["data"].dtype == np.uint8 and size > 0
    fits = fits and len(offsets) and offsets[0] == 0 and offsets[-1] == length
    if not fits or np.any(np.diff(offsets) < 0):
        raise DataError(
            f"{path}: expected JPEGs one after the other in `data` (bytes,) uint8 and where each "
            f"begins in `offsets` (N + 1,) int64, found {length} bytes and {offsets.shape} offsets "
            f"of images of {size} px; remove it and run again"
        )
    place = file["data"].id.get_offset()
    data = np.memmap(path, np.uint8, "r", place, (length,)) if length else np.empty(0, np.uint8)
    return Encoded(data, offsets, size, Path(path))


def decode(content: np.ndarray, size: int) -> np.ndarray:
    """Decodes one packed JPEG, (3, S, S) uint8; torchvision's decoder where torch is loaded.

    Raises:
        DataError: It is broken or has another size.
    """
    try:
        pixels = _decoded(content.tobytes())
    except (RuntimeError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"is broken ({error})") from error
    if pixels.shape != (size, size, 3):
        raise DataError(f"has {pixels.shape} pixels instead of {(size, size, 3)}")
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _decoded(content: bytes) -> np.ndarray:
    try:
        return _decoder()(content)
    except RuntimeError as error:
        if lack(error):
            raise ResourceError(f"no memory to decode an image: {line(error)}") from None
        return jpeg.by_pillow(content)  # such as progressive ones, which not every decoder takes


@functools.cache
def _decoder() -> jpeg.Decoder:
    """Gives the quickest decoder: torchvision's, if this process has use for torch anyway."""
    import sys

    found = jpeg.by_torchvision() if "torch" in sys.modules else None
    return found or jpeg.by_pillow


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Gives the threads of a process; after a fork there are others."""
    return ThreadPoolExecutor(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
