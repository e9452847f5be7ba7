"""Files that other steps read: written whole or not at all, with room for them checked before."""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from kt.core.ending import DataError, ResourceError, lack, line

CHECKSUM = "checksum"  # in JSON: SHA-256 of all else, keys sorted
FORGOTTEN = 2 * 86400  # seconds until what a writer on another machine left is taken to be dead


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a name beside `path` to write to; it takes the place if the block ends without error.

    The file is synced before it is renamed: at any moment the old one or the new one stands there.

    Raises:
        ResourceError: The disk is full or may not be written; path and free bytes are named.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{_machine()}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        elsewhere = getattr(error, "filename", None) not in (None, str(temporary))
        if lack(error) != "disk" or elsewhere:
            raise
        raise ResourceError(
            f"{path} cannot be written: {line(error)}; {free_bytes(path)} bytes are free "
            "there; make room and run again"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Removes what killed writers of the same file left beside it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{_machine()}.*.tmp"):
        pid = left.name.split(".")[-2]
        if pid.isdigit() and not _lives(int(pid)):
            left.unlink(missing_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > FORGOTTEN:
                left.unlink()


@functools.cache
def _machine() -> str:
    """Names this machine in a few characters, since others may write to the same folder."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _lives(pid: int) -> bool:
    with contextlib.suppress(OSError):
        os.kill(pid, 0)
        return True
    return False


def check_space(path: Path, needed: int) -> None:
    """Refuses work whose result would not fit on the disk.

    Args:
        path: What will be written; it and some of its folders need not be there yet.
        needed: Bytes.

    Raises:
        ResourceError: Names the path and both numbers.
    """
    free = free_bytes(path)
    if needed > free:
        raise ResourceError(
            f"{path}: {needed} bytes are needed, {free} are free there; make room or put the "
            "results elsewhere"
        )


def free_bytes(path: Path) -> int:
    """Gives the bytes free where a file stands, or will stand."""
    folder = Path(path).absolute().parent
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def write_text(path: Path, text: str) -> None:
    """Writes a text file beside its place, syncs it and renames it: never half a file."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Mapping | list) -> None:
    """Writes `value` as indented JSON through `write_text`; NaN is refused.

    A mapping gets a `checksum` of all else in it, which `read_json` asks for.
    """
    if isinstance(value, Mapping):
        value = json.loads(json.dumps(value, default=plain, allow_nan=False))
        value[CHECKSUM] = _checksum(value)
    write_text(path, json.dumps(value, indent=1, default=plain, allow_nan=False) + "\n")


def read_json(path: Path, checked: bool = True):
    """Reads a JSON file that another step wrote; without its checksum, which must fit.

    Args:
        path: The file.
        checked: Whether a mapping must have a checksum at all.

    Raises:
        DataError: The file is missing, is not JSON or was altered.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"expected a JSON file at {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); remove it and run again") from error
    if isinstance(content, dict):
        found = content.pop(CHECKSUM, None)
        wanted = _checksum(content)
        if found != wanted and (checked or found is not None):
            raise DataError(
                f"{path} is not as it was written (checksum {wanted}, expected {found}); remove it "
                "and run again"
            )
    elif checked:
        raise DataError(f"{path}: expected a mapping, found {str(content)[:80]}")
    return content


def _checksum(content: Mapping) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def plain(value):
    """Turns paths and settings into what JSON can hold (for `json.dumps(default=plain)`)."""
    if hasattr(value, "model_dump"):
        return value.model_dump()
    return str(value)
