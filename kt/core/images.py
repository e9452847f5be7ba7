"""Packed images and, apart from them, labels.

`{split}.h5` holds `images` uint8 (N, 3, S, S), contiguous so that it is memory-mapped, and unique
`keys`; with `storage: jpeg` not `images` but `data` uint8 (bytes,), JPEGs one after the other, and
`offsets` int64 (N + 1,). For every MiB there is a checksum, and each reader checks all once (see
`kt.core.table`). `{split}-labels.h5` holds `labels` int64 (N,), -1 for unknown, `keys`, `classes`.
Pretext training, clustering and pseudo-labelling are never handed the second file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from kt.core import blocks, encoded, table
from kt.core.parts import WHOLE, Part
from kt.core.step import DataError


@dataclasses.dataclass(frozen=True, eq=False)
class Pack:
    """Images of one split, in key order.

    Attributes:
        images: (N, 3, S, S) uint8, a read-only memory map, or JPEGs that are decoded when rows
            are asked for (`kt.core.encoded`).
        keys: (N,) unique names.
        ids: (N,) int64, a hash of each key: what random draws depend on.
        path: The file.
    """

    images: np.ndarray | encoded.Encoded
    keys: list[str]
    ids: np.ndarray
    path: Path

    def __len__(self) -> int:
        """Number of images."""
        return len(self.keys)

    @property
    def size(self) -> int:
        """Edge of the square images in pixels."""
        return self.images.shape[-1]

    @property
    def at_once(self) -> int:
        """Images that a network looks at together."""
        return at_once(self.size)


@dataclasses.dataclass(frozen=True)
class Labels:
    """True labels of one split.

    Attributes:
        labels: (N,) int64, -1 where unknown.
        keys: (N,) names, the same as the pack's.
        classes: (C,) names.
    """

    labels: np.ndarray
    keys: list[str]
    classes: list[str]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the images of a packed split stand in its file.

    Attributes:
        shape: (N, 3, S, S).
        offset: Of the first byte.
        sums: CRC-32 of every so many rows, uint32.
        rows: So many.
        keys: The type of the keys.
    """

    shape: tuple[int, ...]
    offset: int
    sums: np.ndarray
    rows: int
    keys: np.dtype


ARRAYS = {"images": 4, "keys": 1}
LARGE = 16 << 30  # bytes of pixels; more do not stay in the memory of an ordinary machine


def at_once(size: int) -> int:
    """Gives the images a network looks at together: 500 of 96 px, of larger ones as many pixels."""
    return max(1, 500 * 96**2 // max(size, 96) ** 2)


def layout(path: Path) -> Layout:
    """Looks at a packed split, and not yet at its images.

    Raises:
        DataError: The file is not a complete pack of square uint8 RGB images.
    """
    if _is_encoded(path):
        found, keys = _read_encoded(path, checked=False)
        return Layout(found.shape, 0, np.zeros(0, np.uint32), 1, keys.dtype)
    with table.read(path, "images", ARRAYS) as file:
        dataset, offset = file["images"], file["images"].id.get_offset()
        shape = dataset.shape
        if dataset.dtype != np.uint8 or shape[1] != 3 or shape[2] != shape[3]:
            raise DataError(
                f"{path}: expected images (N, 3, S, S) uint8, found {shape} {dataset.dtype}"
            )
        if shape[0] and (offset is None or "images" + table.CHECKS not in file):
            raise DataError(
                f"{path}: images must be stored contiguously, with checksums, to be memory-mapped"
            )
        sums = table.load(file, "images" + table.CHECKS) if shape[0] else np.zeros(0, np.uint32)
        return Layout(shape, offset or 0, sums, table.block_rows(dataset), file["keys"].dtype)


def read_pack(path: Path) -> Pack:
    """Opens a packed split, after a look at every byte of it.

    Raises:
        DataError: The file is not a complete pack of square uint8 RGB images with unique keys.
    """
    if _is_encoded(path):
        images, names = _read_encoded(path)
        keys = [name.decode() for name in names.tolist()]
    else:
        found = layout(path)
        for _ in _checked(path, found, 1, WHOLE):
            pass
        with table.read(path, "images", ARRAYS) as file:
            keys = table.strings(file, "keys")
        images = np.zeros(found.shape, np.uint8)
        if len(keys):
            images = np.memmap(path, np.uint8, "r", found.offset, found.shape)
    if len(set(keys)) != len(keys):
        raise DataError(
            f"{path}: expected unique keys, found {len(keys) - len(set(keys))} repeated"
        )
    return Pack(images, keys, key_ids(keys), Path(path))


def span(path: Path, batch: int, part: Part) -> tuple[int, int]:
    """Gives first and last (exclusive) of the images that `stream` gives of a part."""
    found = layout(path)
    return part.span(found.shape[0], _height(found, batch))


def _height(found: Layout, batch: int) -> int:
    """Gives how many images are read at a time: whole blocks of a checksum."""
    return -(-batch // found.rows) * found.rows


def stream(path: Path, batch: int, part: Part = WHOLE) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Reads a packed split, or a part, from the first to the last image; memory does not grow.

    Args:
        path: The pack.
        batch: Most images at a time.
        part: Of its images; they come in the same batches as without parts.

    Yields:
        Keys (B,) as UTF-8 bytes, and images (B, 3, S, S) uint8.

    Raises:
        DataError: As `read_pack` does, but for keys that are repeated.
    """
    if _is_encoded(path):
        images, keys = _read_encoded(path)
        start, end = part.span(len(keys), batch)
        for first in range(start, end, batch):
            last = min(first + batch, end)
            yield keys[first:last], images[first:last]
        return
    found = layout(path)
    with table.read(path, "images", ARRAYS) as file:
        keys = file["keys"]
        for first, images in _checked(path, found, batch, part):
            names = keys[first : first + len(images)]
            parts = max(1, -(-len(images) // batch))
            yield from zip(np.array_split(names, parts), np.array_split(images, parts), strict=True)


def _checked(path: Path, found: Layout, least: int, part: Part) -> Iterator[tuple[int, np.ndarray]]:
    """Reads the images of a part in blocks of `least` or more and compares their checksums.

    Plain reads: memory-mapped pages would count as the process's memory.
    """
    height = _height(found, least)
    start, end = part.span(found.shape[0], height)
    with open(path, "rb") as file:
        for first in range(start, end, height):
            number = min(height, end - first)
            images = np.empty((number, *found.shape[1:]), np.uint8)
            blocks.read_at(file.fileno(), images, found.offset + first * images[0].nbytes)
            for low in range(0, number, found.rows):
                wanted = found.sums[(first + low) // found.rows]
                if zlib.crc32(images[low : low + found.rows]) != wanted:
                    raise DataError(
                        f"{path} is damaged: among images {first + low} to "
                        f"{first + min(low + found.rows, number) - 1} a byte is not what was "
                        f"written; {table.REMOVE}"
                    )
            yield first, images


def _is_encoded(path: Path) -> bool:
    """Says whether a readable pack holds JPEGs; of anything else `table.read` tells the fault."""
    try:
        with table.opened(path) as file:
            return "data" in file and "images" not in file
    except (OSError, DataError):
        return False


def _read_encoded(path: Path, checked: bool = True) -> tuple[encoded.Encoded, np.ndarray]:
    """Opens a pack of JPEGs; gives its images and keys (N,) bytes.

    Args:
        path: The pack.
        checked: Look at every byte of the images, which takes as long as reading them.
    """
    with table.read(path, "images", {"*data": 1, "*offsets": 1, "keys": 1}) as file:
        if checked:
            table.verify(file, "data")
        found, keys = encoded.read(file, path), table.load(file, "keys")
    if len(keys) != len(found):
        raise DataError(f"{path}: expected {len(found)} keys, found {len(keys)}; {table.REMOVE}")
    return found, keys


def read_labels(path: Path) -> Labels:
    """Reads the true labels of one split.

    Raises:
        DataError: The file is not a complete table of labels.
    """
    with table.read(path, "labels", {"labels": 1, "keys": 1, "*classes": 1}) as file:
        return Labels(
            table.load(file, "labels"), table.strings(file, "keys"), table.strings(file, "classes")
        )


def key_ids(keys: Sequence[str]) -> np.ndarray:
    """Gives a 63-bit hash of each key, (N,) int64: the same on every machine and in any order."""
    digests = (hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    values = np.frombuffer(b"".join(digests), "<u8") >> np.uint64(1)
    return values.astype(np.int64)


def rows_of(
    keys: Sequence[str],
    wanted: Sequence[str],
    where: str,
    advice: str = "the files were made from different data, run the workflow again",
) -> np.ndarray:
    """Gives for each of the `wanted` keys its row in `keys`, (len(wanted),) int64.

    Args:
        keys: Of the rows, each once.
        wanted: Those that are looked for.
        where: They are looked for, for the message.
        advice: What the message ends with where some are missing.

    Raises:
        DataError: A key is repeated or missing; both counts and an example are named.
    """
    position = {key: row for row, key in enumerate(keys)}
    if len(position) != len(keys):
        raise DataError(
            f"{where}: {len(keys) - len(position)} keys are repeated, each must stand once"
        )
    missing = [key for key in wanted if key not in position]
    if missing:
        raise DataError(
            f"{where}: {len(missing)} of {len(wanted)} keys are missing, "
            f"for example {missing[0]!r}; {advice}"
        )
    return np.fromiter((position[key] for key in wanted), np.int64, len(wanted))
