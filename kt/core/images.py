"""Packed images and, apart from them, labels.

`{split}.h5` holds `images` uint8 (N, 3, S, S), contiguous so that it is memory-mapped, and unique
`keys`; with `storage: jpeg` not `images` but `data` uint8 (bytes,), JPEGs one after the other, and
`offsets` int64 (N + 1,). `{split}-labels.h5` holds `labels` int64 (N,), -1 for unknown, `keys` and
`classes`.
Pretext training, clustering and pseudo-labelling are never handed the second file.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from kt.core import encoded, table
from kt.core.step import DataError

SPLITS = ("train-unlabelled", "train", "test")


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


def read_pack(path: Path) -> Pack:
    """Opens a packed split.

    Raises:
        DataError: The file is not a complete pack of square uint8 RGB images with unique keys.
    """
    if _is_encoded(path):
        return _read_encoded(path)
    with table.read(path, "images", {"images": 4, "keys": 1}) as file:
        dataset = file["images"]
        shape, offset = dataset.shape, dataset.id.get_offset()
        keys = table.strings(file, "keys")
        if dataset.dtype != np.uint8 or shape[1] != 3 or shape[2] != shape[3]:
            raise DataError(
                f"{path}: expected images (N, 3, S, S) uint8, found {shape} {dataset.dtype}"
            )
    if len(set(keys)) != len(keys):
        raise DataError(
            f"{path}: expected unique keys, found {len(keys) - len(set(keys))} repeated"
        )
    if shape[0] == 0:
        images = np.zeros(shape, np.uint8)
    elif offset is None:
        raise DataError(f"{path}: images must be stored contiguously to be memory-mapped")
    else:
        images = np.memmap(path, np.uint8, "r", offset, shape)
    return Pack(images, keys, key_ids(keys), Path(path))


def _is_encoded(path: Path) -> bool:
    """Says whether a readable pack holds JPEGs; of anything else `table.read` tells the fault."""
    try:
        with h5py.File(path, "r") as file:
            return "data" in file and "images" not in file
    except OSError:
        return False


def _read_encoded(path: Path) -> Pack:
    with table.read(path, "images", {"*data": 1, "*offsets": 1, "keys": 1}) as file:
        images, keys = encoded.read(file, path), table.strings(file, "keys")
    if len(keys) != len(images) or len(set(keys)) != len(keys):
        raise DataError(
            f"{path}: expected {len(images)} unique keys, found {len(keys)}, "
            f"{len(keys) - len(set(keys))} of them repeated"
        )
    return Pack(images, keys, key_ids(keys), Path(path))


def read_labels(path: Path) -> Labels:
    """Reads the true labels of one split.

    Raises:
        DataError: The file is not a complete table of labels.
    """
    with table.read(path, "labels", {"labels": 1, "keys": 1, "*classes": 1}) as file:
        return Labels(
            file["labels"][...], table.strings(file, "keys"), table.strings(file, "classes")
        )


def key_ids(keys: Sequence[str]) -> np.ndarray:
    """Gives a 63-bit hash of each key, (N,) int64: the same on every machine and in any order."""
    digests = (hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    values = np.frombuffer(b"".join(digests), "<u8") >> np.uint64(1)
    return values.astype(np.int64)


def rows_of(keys: Sequence[str], wanted: Sequence[str], where: str) -> np.ndarray:
    """Gives for each of the `wanted` keys its row in `keys`, (len(wanted),) int64.

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
            f"for example {missing[0]!r}; "
            "the files were made from different data, run the workflow again"
        )
    return np.fromiter((position[key] for key in wanted), np.int64, len(wanted))
