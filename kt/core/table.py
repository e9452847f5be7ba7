"""HDF5 tables: written whole or not at all, checked by each reader.

Every file carries the root attributes `format`, `version`, `config` (JSON), `provenance` (JSON),
`digest` and, written last, `complete`. One writer, a temporary name in the same folder, fsync,
rename. Each array carries its own digest, from which the table's is made. What a reader never sees
unchecked: HDF5 itself has checksums for its bookkeeping and for every chunk, `load` and `strings`
compare the digest, and arrays that are memory-mapped have a checksum for each MiB beside them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np

from kt.core import step
from kt.core.ending import lack
from kt.core.step import DataError

VERSION = 2
CHUNK_BYTES = 1 << 20  # known to be fast: chunks of about 1 MiB, see docs/design.md
CHUNK_ROWS = 1 << 14  # at most: several narrow arrays are written side by side, each with a chunk
CACHE_BYTES = CHUNK_BYTES  # of an array that is read; HDF5's 8 MiB would fill as tables grow
BOOKKEEPING = ("v110", "v110")  # of HDF5: the first whose headers and attributes have checksums
CHECKS = "_checks"  # behind the name of a memory-mapped array: that of its checksums


@contextlib.contextmanager
def create(path: Path, format: str, config, parents: Sequence[Path] = ()) -> Iterator[h5py.File]:
    """Opens a new table; it takes its place only if the block ends without an error.

    Args:
        path: Where the table will stand.
        format: What it holds, such as `features`; readers check it.
        config: The settings it was made with, anything JSON can hold.
        parents: Artefacts it was made from; their digests go into its provenance.
    """
    with step.replacing(path) as temporary, h5py.File(temporary, "w", libver=BOOKKEEPING) as file:
        file.attrs["version"] = VERSION
        put_text(file, "format", format)
        put_text(file, "config", json.dumps(config, default=step.plain, sort_keys=True))
        yield file
        for name in sorted(file):
            if "digest" not in file[name].attrs:
                _seal(file, name)
        put_text(file, "digest", _combined(file))
        origin = step.provenance({str(parent): digest(parent) for parent in parents})
        put_text(file, "provenance", json.dumps(origin))
        file.attrs["complete"] = True


def add(
    file: h5py.File, name: str, shape: tuple[int, ...], dtype, contiguous=False
) -> h5py.Dataset:
    """Adds an empty array to a table.

    Its chunks are whole rows of about 1 MiB with a checksum; contiguous for what is memory-mapped.
    """
    dtype = np.dtype(dtype)
    if contiguous or 0 in shape:
        return file.create_dataset(name, shape, dtype)
    rows = max(1, min(shape[0], CHUNK_ROWS, CHUNK_BYTES // max(_row_bytes(shape, dtype), 1)))
    chunk_bytes = rows * _row_bytes(shape, dtype)
    # HDF5's own cache of 8 MiB is the fastest; narrow arrays would fill it as they grow longer.
    cache = 2 * chunk_bytes if rows == CHUNK_ROWS else None
    return file.create_dataset(
        name, shape, dtype, chunks=(rows, *shape[1:]), fletcher32=True, rdcc_nbytes=cache
    )


def put(file: h5py.File, name: str, array: np.ndarray) -> None:
    """Adds a whole array to a table."""
    array = np.asarray(array)
    add(file, name, array.shape, array.dtype)[...] = array


def put_strings(file: h5py.File, name: str, strings: Sequence[str]) -> None:
    """Adds UTF-8 strings (N,) to a table, all as wide as the longest.

    HDF5 keeps strings of any width where no checksum reaches them.
    """
    encoded = [string.encode() for string in strings]
    width = max(map(len, encoded), default=1) or 1
    put(file, name, np.array(encoded, h5py.string_dtype("utf-8", width)))


class Column:
    """An array that grows row by row; its digest is taken on the way, so nothing is read again."""

    def __init__(self, file: h5py.File, name: str, shape: tuple[int, ...], dtype):
        """Adds the array to the table."""
        self.dataset = add(file, name, shape, dtype)
        self.done = 0
        self.hash = hashlib.sha256()

    def append(self, block: np.ndarray) -> None:
        """Writes the next rows."""
        block = np.ascontiguousarray(block, self.dataset.dtype)
        self.dataset[self.done : self.done + len(block)] = block
        self.hash.update(block.data)
        self.done += len(block)
        if self.done == len(self.dataset):
            put_text(self.dataset, "digest", self.hash.hexdigest())


def put_text(owner: h5py.File | h5py.Dataset, name: str, value: str) -> None:
    """Sets an attribute to a text.

    A text of a fixed length stands among what HDF5 has checksums for. Its texts of any length do
    not, and one flipped byte of them can make a reader hang.
    """
    owner.attrs[name] = np.bytes_(value.encode())


def text(owner: h5py.File | h5py.Dataset, name: str) -> str:
    """Gives an attribute that is a text, or `none`."""
    return np.bytes_(owner.attrs.get(name, b"none")).decode("utf-8", "replace")


def load(file: h5py.File, name: str) -> np.ndarray:
    """Reads one array of an open table and compares its digest.

    Raises:
        DataError: The array is not what was written.
    """
    array = file[name][...]
    found = hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
    if found != text(file[name], "digest"):
        raise DataError(f"{file.filename} is damaged: {name!r} is not what was written; {REMOVE}")
    return array


def verify(file: h5py.File, name: str) -> None:
    """Compares the checksums of an array that will be memory-mapped; raises as `load` does."""
    dataset = file[name]
    sums = load(file, name + CHECKS) if dataset.nbytes else ()
    rows = block_rows(dataset)
    for number, wanted in enumerate(sums):
        block = np.ascontiguousarray(dataset[number * rows : (number + 1) * rows])
        if zlib.crc32(block.data) != wanted:
            raise DataError(
                f"{file.filename} is damaged: {name!r} is not what was written; {REMOVE}"
            )


def strings(file: h5py.File, name: str) -> list[str]:
    """Reads the UTF-8 strings of one array; raises as `load` does."""
    return [string.decode() for string in load(file, name).tolist()]


REMOVE = "remove it and run again"


@contextlib.contextmanager
def read(path: Path, format: str, arrays: dict[str, int]) -> Iterator[h5py.File]:
    """Opens a table that another step wrote.

    Args:
        path: The table.
        format: What it must hold.
        arrays: Its arrays and their number of dimensions; the first lengths of all whose name
            is not marked with a leading `*` must agree.

    Raises:
        DataError: It is missing, broken, incomplete, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"expected a {format} table at {path}, found no file")
    try:
        file = h5py.File(path, "r", rdcc_nbytes=CACHE_BYTES)
    except OSError as error:
        raise DataError(
            f"{path} is not a readable HDF5 file ({error}); remove it, run again"
        ) from error
    with file:
        try:
            _check(file, path, format, arrays)
        except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            if lack(error):
                raise
            raise DataError(f"{path} is damaged ({error}); {REMOVE}") from error
        try:
            yield file
        except OSError as error:
            if error.errno is not None or lack(error):  # the system's, not HDF5's
                raise
            raise DataError(f"{path} is damaged ({error}); {REMOVE}") from error


def _check(file: h5py.File, path: Path, format: str, arrays: dict[str, int]) -> None:
    found = text(file, "format"), file.attrs.get("version")
    if found != (format, VERSION):
        raise DataError(
            f"{path}: expected format {format!r} version {VERSION}, found {found[0]!r} version "
            f"{found[1]}; {REMOVE}"
        )
    if not file.attrs.get("complete", False):
        raise DataError(f"{path} is not complete: its writer was stopped; {REMOVE}")
    for name in file:
        _check_array(file, path, name)
    lengths = {}
    for marked, dimensions in arrays.items():
        name = marked.lstrip("*")
        if name not in file:
            raise DataError(f"{path}: expected an array {name!r}, found {sorted(file)}")
        if file[name].ndim != dimensions:
            raise DataError(
                f"{path}: {name!r} must have {dimensions} dimensions, has {file[name].shape}"
            )
        if marked == name:
            lengths[name] = file[name].shape[0]
    if len(set(lengths.values())) > 1:
        raise DataError(f"{path}: arrays of one table must be equally long, found {lengths}")
    if text(file, "digest") != _combined(file):
        raise DataError(f"{path} was altered: its content does not fit its digest; {REMOVE}")


def own(file: h5py.File, path: Path, name: str) -> h5py.Dataset:
    """Gives an array that stands in this file; links and arrays elsewhere are refused.

    Raises:
        DataError: It is another thing, or not there.
    """
    link = file.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink) or not isinstance(file[name], h5py.Dataset):
        raise DataError(f"{path}: {name!r} must be an array of this file; such files are refused")
    dataset = file[name]
    if dataset.external or dataset.is_virtual:
        raise DataError(f"{path}: array {name!r} points outside the file; such files are refused")
    return dataset


def _check_array(file: h5py.File, path: Path, name: str) -> None:
    """Refuses what is not an array of plain values that stand in this file."""
    dataset = own(file, path, name)
    if dataset.dtype.hasobject or dataset.ndim == 0:
        raise DataError(f"{path}: {name!r} holds {dataset.dtype}, {dataset.shape}; refused")
    # Rows that were never written would read as zeros, and as many as the header likes to say.
    if dataset.id.get_storage_size() < dataset.nbytes:
        raise DataError(f"{path}: {name!r} has {dataset.shape}, but is not all there; {REMOVE}")


# ---------------------------------------------------------------------------- digests


@contextlib.contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """Opens an HDF5 file for a look at its names and texts, unchecked.

    Raises:
        DataError: It is not there, or damaged where one looks.
    """
    try:
        with h5py.File(path, "r", rdcc_nbytes=CACHE_BYTES) as file:
            yield file
    except FileNotFoundError:
        raise DataError(f"expected a table at {path}, found no file") from None
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        if getattr(error, "errno", None) is not None or lack(error):
            raise
        raise DataError(f"{path} is damaged ({error}); {REMOVE}") from error


def digest(path: Path) -> str:
    """Gives the digest of an artefact: an HDF5 table's own, the SHA-256 of any other file."""
    path = Path(path)
    if path.suffix == ".h5":
        with opened(path) as file:
            return text(file, "digest")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def block_rows(dataset: h5py.Dataset) -> int:
    """Gives how many rows of a memory-mapped array, about 1 MiB, share one checksum."""
    return max(1, CHUNK_BYTES // max(_row_bytes(dataset.shape, dataset.dtype), 1))


def _seal(file: h5py.File, name: str) -> None:
    """Reads one array back for its digest, and for its checksums if it is to be memory-mapped."""
    dataset, total, sums = file[name], hashlib.sha256(), []
    rows, mapped = block_rows(dataset), dataset.chunks is None and dataset.nbytes > 0
    for first in range(0, dataset.shape[0], rows):
        block = np.ascontiguousarray(dataset[first : first + rows])
        total.update(block.data)
        if mapped:
            sums.append(zlib.crc32(block.data))
    put_text(dataset, "digest", total.hexdigest())
    if mapped:
        put(file, name + CHECKS, np.array(sums, np.uint32))
        _seal(file, name + CHECKS)


def _combined(file: h5py.File) -> str:
    """Hashes names, types, shapes and digests of all arrays."""
    parts = ((name, file[name]) for name in sorted(file))
    lines = (f"{name} {x.dtype} {x.shape} {text(x, 'digest')}\n" for name, x in parts)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _row_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape[1:]) * dtype.itemsize
