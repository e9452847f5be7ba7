"""Your own pictures: `path` is a folder, or a zip or tar; what `--config images=PATH` uses."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kt.config import Dataset
from kt.core import entries as tree
from kt.core.step import ConfigError, DataError
from kt.sources import archive, folder

MAX_PIXELS = 100_000_000  # for counting alone, nothing is decoded


def entries(dataset: Dataset) -> Iterator[tree.Entry]:
    """Gives the files of the folder or the archive.

    Raises:
        DataError: There is neither, or a split or class is missing.
    """
    return _source(dataset).entries(dataset)


def origin(dataset: Dataset) -> dict[str, Any]:
    """Says where the pictures came from."""
    return _source(dataset).origin(dataset)


def count_pictures(path: str) -> tuple[int, bool]:
    """Counts the pictures for training without labels, by their names alone.

    Returns:
        Their number (half of train where there is no `train-unlabelled`), and whether there are
        labelled pictures in `train/` and `test/`.

    Raises:
        ConfigError: There is nothing at `path`.
        DataError: It is no folder, zip or tar, or a split or class is missing.
    """
    where = Path(path)
    if not where.exists():
        raise ConfigError(f"images: expected a folder, a zip or a tar, found nothing at {path!r}")
    files = (folder if where.is_dir() else archive).files
    if not os.access(where, os.R_OK):
        raise DataError(f"images: {path!r} may not be read; change its permissions")
    if not where.is_dir() and not archive.is_archive(where):
        raise DataError(
            f"images: expected a folder, a zip or a tar, found another file at {path!r}"
        )
    listed = tree.entries(lambda: files(where), MAX_PIXELS, path)
    counts = Counter(entry.split for entry in listed if entry.usable)
    return counts[tree.POOL] or counts[tree.TRAIN] // 2, counts[tree.TRAIN] > 0


def has_labels(dataset: Dataset) -> bool:
    """Says whether a data set has labelled pictures, by their names; published sets have.

    A path that is not there is for `ingest` to refuse.
    """
    if dataset.source not in ("pictures", "folder", "archive"):
        return True
    if not dataset.path or not Path(dataset.path).exists():
        return True
    return count_pictures(dataset.path)[1]


def _source(dataset: Dataset):
    if not dataset.path or not Path(dataset.path).exists():
        raise DataError(f"expected a folder, a zip or a tar, found nothing at {dataset.path!r}")
    return folder if Path(dataset.path).is_dir() else archive
