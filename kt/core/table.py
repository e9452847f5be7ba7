"""HDF5 tables: written whole or not at all, checked by each reader.

Every file carries the root attributes `format`, `version`, `config` (JSON), `provenance` (JSON),
`digest` (of all arrays) and, written last, `complete`. One writer, a temporary name in the same
folder, fsync, rename.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np

from kt.core import step
from kt.core.step import DataError

VERSION = 1
STRINGS = 4096  # at a time
CHUNK_BYTES = 1 << 20  # known to be fast: chunks of about 1 MiB, see docs/design.md


@contextlib.contextmanager
def create(path: Path, format: str, config, parents: Sequence[Path] = ()) -> Iterator[h5py.File]:
    """Opens a new table; it takes its place only if the block ends without an error.

    Args:
        path: Where the table will stand.
        format: What it holds, such as `features`; readers check it.
        config: The settings it was made with, anything JSON can hold.
        parents: Artefacts it was made from; their digests go into its provenance.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with h5py.File(temporary, "w") as file:
            file.attrs["format"], file.attrs["version"] = format, VERSION
            file.attrs["config"] = json.dumps(config, default=step.plain, sort_keys=True)
            yield file
            file.attrs["digest"] = _digest_arrays(file)
            origin = step.provenance({str(parent): digest(parent) for parent in parents})
            file.attrs["provenance"] = json.dumps(origin)
            file.attrs["complete"] = True
        with open(temporary, "rb+") as raw:
            os.fsync(raw.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def add(
    file: h5py.File, name: str, shape: tuple[int, ...], dtype, contiguous=False
) -> h5py.Dataset:
    """Adds an empty array to a table.

    Its chunks are whole rows of about 1 MiB with a checksum; contiguous for what is memory-mapped.
    """
    dtype = np.dtype(dtype)
    if contiguous or 0 in shape:
        return file.create_dataset(name, shape, dtype)
    row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
    rows = max(1, min(shape[0], CHUNK_BYTES // max(row_bytes, 1)))
    return file.create_dataset(name, shape, dtype, chunks=(rows, *shape[1:]), fletcher32=True)


def put(file: h5py.File, name: str, array: np.ndarray) -> None:
    """Adds a whole array to a table."""
    array = np.asarray(array)
    add(file, name, array.shape, array.dtype)[...] = array


def put_strings(file: h5py.File, name: str, strings: Sequence[str]) -> None:
    """Adds UTF-8 strings (N,) to a table."""
    dataset = file.create_dataset(name, (len(strings),), h5py.string_dtype("utf-8"))
    if len(strings):
        dataset[...] = np.array(list(strings), dtype=object)


def strings(file: h5py.File, name: str) -> list[str]:
    """Reads the UTF-8 strings of one array."""
    return list(file[name].asstr()[...])


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
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(
            f"{path} is not a readable HDF5 file ({error}); remove it, run again"
        ) from error
    with file:
        _check(file, path, format, arrays)
        try:
            yield file
        except OSError as error:
            if error.errno is not None:  # the system's, not HDF5's
                raise
            raise DataError(f"{path} is damaged ({error}); remove it and run again") from error


def _check(file: h5py.File, path: Path, format: str, arrays: dict[str, int]) -> None:
    found = file.attrs.get("format"), file.attrs.get("version")
    if found != (format, VERSION):
        raise DataError(
            f"{path}: expected format {format!r} version {VERSION}, found {found[0]!r} version "
            f"{found[1]}"
        )
    if not file.attrs.get("complete", False):
        raise DataError(f"{path} is not complete: its writer was stopped; remove it and run again")
    lengths = {}
    for marked, dimensions in arrays.items():
        name = marked.lstrip("*")
        link = file.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink) or not isinstance(file[name], h5py.Dataset):
            raise DataError(f"{path}: expected an array {name!r}, found {sorted(file)}")
        dataset = file[name]
        if dataset.external or dataset.is_virtual:
            raise DataError(
                f"{path}: array {name!r} points outside the file; such files are refused"
            )
        if dataset.ndim != dimensions:
            raise DataError(
                f"{path}: {name!r} must have {dimensions} dimensions, has {dataset.shape}"
            )
        if marked == name:
            lengths[name] = dataset.shape[0]
    if len(set(lengths.values())) > 1:
        raise DataError(f"{path}: arrays of one table must be equally long, found {lengths}")


def digest(path: Path) -> str:
    """Gives the digest of an artefact: an HDF5 table's own, the SHA-256 of any other file."""
    path = Path(path)
    if path.suffix == ".h5":
        with h5py.File(path, "r") as file:
            return str(file.attrs.get("digest", "none"))
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_arrays(file: h5py.File) -> str:
    """Hashes names, types, shapes and bytes of all arrays, a few MiB at a time."""
    total = hashlib.sha256()
    for name in sorted(file):
        dataset = file[name]
        total.update(f"{name} {dataset.dtype} {dataset.shape}\n".encode())
        row_bytes = int(np.prod(dataset.shape[1:], dtype=np.int64)) * dataset.dtype.itemsize
        rows = max(1, 8 * CHUNK_BYTES // max(row_bytes, 1))
        for first in range(0, dataset.shape[0] if dataset.ndim else 0, rows):
            if dataset.dtype == object:
                _digest_strings(dataset, first, min(first + rows, len(dataset)), total)
            else:
                total.update(np.ascontiguousarray(dataset[first : first + rows]).data)
    return total.hexdigest()


def _digest_strings(dataset: h5py.Dataset, first: int, last: int, total) -> None:
    """Hashes strings, one a line, some thousand at a time: each takes 100 bytes in memory."""
    for start in range(first, last, STRINGS):
        strings = dataset[start : min(start + STRINGS, last)].tolist()
        total.update(("\n" * (start > first) + "\n".join(map(repr, strings))).encode())
