"""Pictures in a zip or tar (also compressed), read as a stream and never extracted.

`path` is the archive; what its folders mean stands in `kt/sources/folder.py`. Members whose names
lead out of it, links and devices are left out and listed.
"""

from __future__ import annotations

import functools
import hashlib
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kt.config import Dataset
from kt.core import entries as tree
from kt.core.step import DataError

BROKEN = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError,
    OSError, ValueError, LookupError, ArithmeticError, RuntimeError,
)  # fmt: skip

UTF8 = 0x800  # flag of a zip's member
LABELS = True  # it heeds those of a data set's settings


def entries(dataset: Dataset) -> Iterator[tree.Entry]:
    """Gives the members of the archive in the order in which they stand in it.

    Raises:
        DataError: It is missing or broken, or a split or class is missing.
    """
    path = _root(dataset)
    stamp = path.stat().st_mtime_ns, path.stat().st_size
    return tree.entries(lambda: files(path), dataset.max_pixels, str(path), stamp, dataset.labels)


def origin(dataset: Dataset) -> dict[str, Any]:
    """Says where the pictures came from, with the archive's digest."""
    path = _root(dataset)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"archive": str(path), "bytes": path.stat().st_size, "sha256": digest}


def is_archive(path: Path) -> bool:
    """Tells from the content whether a file is a zip or a tar."""
    return _is_tar(path) or zipfile.is_zipfile(path)


def _is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except BROKEN:  # compressed, and cut off
        return False


def files(path: Path) -> Iterator[tree.File]:
    """Lists the members that are no folders; each can be read until the next one is asked for.

    Raises:
        DataError: The archive is broken.
    """
    listing = _tar(path) if _is_tar(path) else _zip(path)
    while True:
        # Errors of the archive are told here; what a caller does with a member is its own matter.
        try:
            file = next(listing, None)
        except BROKEN as error:
            raise DataError(f"{path} is broken or cut off: {error}; fetch it again") from None
        if file is None:
            return
        yield file


def _root(dataset: Dataset) -> Path:
    if not dataset.path or not Path(dataset.path).is_file():
        raise DataError(f"expected a zip or tar at {dataset.path!r}, found no file there")
    if not is_archive(Path(dataset.path)):
        raise DataError(
            f"expected a zip or tar at {dataset.path!r}, the file is neither, or cut off"
        )
    return Path(dataset.path)


def _zip(path: Path) -> Iterator[tree.File]:
    with zipfile.ZipFile(path) as archive:
        names = [_name(member) for member in archive.infolist()]
        if not any("/" in name for name in names):  # some tools of Windows write its own sign
            names = [name.replace("\\", "/") for name in names]
        for member, name in zip(archive.infolist(), names, strict=True):
            kind = stat.S_IFMT(member.external_attr >> 16)
            refused = "" if kind in (0, stat.S_IFREG) else "a link or device"
            if member.flag_bits & 1:
                refused = "encrypted"
            if not name.endswith("/"):
                read = functools.partial(_content, functools.partial(archive.open, member))
                stamp = f"{member.file_size} {member.CRC}"
                yield tree.File(name, member.file_size, read, refused, stamp)


def _name(member: zipfile.ZipInfo) -> str:
    """Gives a member's name; some tools write UTF-8 and do not say so."""
    if member.flag_bits & UTF8:
        return member.filename
    try:
        return member.filename.encode("cp437").decode()
    except UnicodeError:
        return member.filename


def _tar(path: Path) -> Iterator[tree.File]:
    changed = path.stat().st_mtime_ns  # members have no digest
    with tarfile.open(path, "r:*") as archive:
        for member in members(archive):
            refused = "" if member.isreg() else "a link or device"
            if member.islnk():
                refused = "a second link to a file, which `tar --hard-dereference` would store"
            if not member.isdir():
                read = functools.partial(_content, functools.partial(archive.extractfile, member))
                stamp = f"{member.size} {member.mtime} {changed}"
                yield tree.File(member.name, member.size, read, refused, stamp)


def members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Gives the members of an open tar to its end; none is kept.

    Raises:
        TarError: It is cut off, or anything of `BROKEN`.
    """
    while (member := archive.next()) is not None:
        archive.members = []  # else every header ever read is kept
        yield member
    # Python takes a header that is cut or broken for the end; the true end is a block of zeros.
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("it does not end with an end mark")


def _content(opening: Callable) -> bytes:
    """Reads one member; whatever is wrong with it becomes an OSError, as with any other file."""
    try:
        with opening() as file:
            return file.read()
    except BROKEN as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
