"""Pictures in a folder, searched recursively; `path` is the folder.

With `train-unlabelled/`, `train/CLASS/` and `test/CLASS/` the splits are those; without any of them
every picture is unlabelled. Links to folders are not followed, links to files only inside the root.
"""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kt.config import Dataset
from kt.core import entries as tree
from kt.core.step import DataError

LABELS = True  # it heeds those of a data set's settings


def entries(dataset: Dataset) -> Iterator[tree.Entry]:
    """Gives the files of the folder in name order.

    Raises:
        DataError: There is no such folder, or a split or class is missing.
    """
    root = _root(dataset)
    return tree.entries(lambda: files(root), dataset.max_pixels, str(root), labels=dataset.labels)


def origin(dataset: Dataset) -> dict[str, Any]:
    """Says where the pictures came from."""
    return {"folder": str(dataset.path)}


def files(root: Path) -> Iterator[tree.File]:
    """Lists all files below `root`, folder by folder in name order."""
    real_root = os.path.realpath(root)
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        try:
            found = sorted(os.listdir(os.path.join(root, folder)))  # names alone: they may be many
        except OSError as error:
            if any(map(tree.stands_aside, folder.split("/"))):  # as a disk's own may be closed
                continue
            raise DataError(
                f"{root}: cannot list the folder {folder!r}: {error.strerror}"
            ) from None
        for item in found:
            name = os.path.join(folder, item)
            path = os.path.join(root, name)
            try:
                linked = os.lstat(path)
                status = os.stat(path) if stat.S_ISLNK(linked.st_mode) else linked
            except OSError as error:
                reason = f"cannot be opened: {error.strerror}"
                yield tree.File(name, 0, functools.partial(_content, path), reason)
                continue
            if stat.S_ISDIR(linked.st_mode):
                waiting.append(name)
            else:
                refused = _refusal(path, linked.st_mode, status.st_mode, real_root)
                stamp = f"{status.st_size} {status.st_mtime_ns}"
                read = functools.partial(_content, path)
                yield tree.File(name, status.st_size, read, refused, stamp)


def _root(dataset: Dataset) -> Path:
    if not dataset.path or not Path(dataset.path).is_dir():
        raise DataError(f"expected a folder with pictures at {dataset.path!r}, found none there")
    return Path(dataset.path)


def _content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _refusal(path: str, linked: int, mode: int, real_root: str) -> str:
    if stat.S_ISLNK(linked):
        if stat.S_ISDIR(mode):
            return "a link to a folder, not followed"
        if os.path.commonpath([os.path.realpath(path), real_root]) != real_root:
            return "a link that leads out of the folder"
    return "" if stat.S_ISREG(mode) else "no regular file"
