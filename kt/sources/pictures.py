"""Your own pictures: `path` is a folder, also of tar shards, or a zip or tar.

What `--config images=PATH` uses.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kt.config import Dataset, plugin
from kt.core import entries as tree
from kt.core import layouts
from kt.core.layouts import POOL, TRAIN
from kt.core.parts import Part
from kt.core.step import ConfigError, DataError
from kt.sources import archive, folder, tars

LABELS = True  # it heeds those of a data set's settings
PATIENCE = 2.0  # seconds
MOST_REASONS = 20
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


def indexed(dataset: Dataset, kept: Path, part: Part, threads: int):
    """Gives the source of the pictures, with an index in a folder where it needs one."""
    source = _source(dataset)
    return source.indexed(dataset, kept, part, threads) if source is tars else source


def count_pictures(dataset: Dataset, enough: float = math.inf) -> tuple[int, bool]:
    """Counts the pictures for training without labels, by their names alone.

    Args:
        dataset: Its `path` is a folder or an archive.
        enough: Tar shards, whose headers are slow to read, are counted up to this number.

    Returns:
        Their number, with those of train that will be taken, and whether there are labelled
        pictures for train and test.

    Raises:
        ConfigError: There is nothing at `path`.
        DataError: It is no folder, zip or tar, a split or class is missing, or `labels` do not fit.
    """
    path, labels = str(dataset.path), dataset.labels
    where = Path(path)
    if not where.exists():
        raise ConfigError(f"images: expected a folder, a zip or a tar, found nothing at {path!r}")
    if not os.access(where, os.R_OK):
        raise DataError(f"images: {path!r} may not be read; change its permissions")
    if not where.is_dir() and not archive.is_archive(where):
        raise DataError(
            f"images: expected a folder, a zip or a tar, found another file at {path!r}"
        )
    if where.is_dir() and tars.are_at(where):
        tars.check_labels(labels)
        return tars.count(where, enough, dataset)
    counts = by_split(path, labels)
    pool, train = counts[POOL], counts[TRAIN]
    return pool + layouts.from_train(pool, train, dataset), train > 0


def by_split(path: str, labels: str | None = None) -> Counter[str]:
    """Counts the pictures of a folder or an archive that is no tar shard, by split and by names."""
    return Counter(entry.split for entry in _listed(path, labels) if entry.usable)


def _listed(path: str, labels: str | None) -> Iterator[tree.Entry]:
    where = Path(path)
    files = (folder if where.is_dir() else archive).files
    return tree.entries(lambda: files(where), MAX_PIXELS, path, labels=labels)


def unread(path: str, labels: str | None = None) -> str:
    """Says which files of a folder or an archive count as no pictures, and why, for errors."""
    where, reasons = Path(path), Counter()
    if where.is_dir() and tars.are_at(where):
        return ""
    for entry in _listed(path, labels):
        why = tree.kind_of(entry.refused)
        if entry.ignored:
            ending = Path(entry.key).suffix.lower() or "without an ending"
            why = f"no pictures that are known, {ending}"
            why = why if why in reasons or len(reasons) < MOST_REASONS else "of other endings"
        reasons[why] += not entry.usable
    return tree.refusals(reasons) + tars.unread(where)


def changed_since(path: str, when: float) -> bool:
    """Says whether files came or went below a path, or it was replaced.

    By the times of folders and archives alone; of a large tree what can be seen in two seconds.
    A picture that was written over is not seen.

    Args:
        path: Of a folder or an archive.
        when: Seconds, as of `os.stat`.
    """
    if not os.path.isdir(path):
        return os.path.exists(path) and _changed(path) > when
    if _changed(path) > when:
        return True
    until, waiting, ours = time.monotonic() + PATIENCE, [path], os.path.abspath("results")
    while waiting:
        place = waiting.pop()
        if os.stat(place).st_mtime > when:
            return True
        for entry in os.scandir(place):
            if entry.is_dir(follow_symlinks=False):
                if entry.name[0] != "." and os.path.abspath(entry.path) != ours:
                    waiting.append(entry.path)
            elif entry.name.endswith(".tar") and _changed(entry.path) > when:
                return True
            if time.monotonic() > until:
                return False
    return False


def _changed(path: str) -> float:
    """Gives when a file or folder was written, or it or a link moved to its place."""
    found = os.stat(path), os.lstat(path)
    return max(time for one in found for time in (one.st_mtime, one.st_ctime))


def has_labels(dataset: Dataset) -> bool:
    """Says whether a data set has labelled pictures, by their names or by what its source says.

    Of sources that say nothing it has: published sets do. A path that is not there is for `ingest`
    to refuse.
    """
    if dataset.source not in ("pictures", "folder", "archive", "tars"):
        says = getattr(plugin("sources", dataset.source), "has_labels", None)
        return says is None or says(dataset)
    if not dataset.path or not Path(dataset.path).exists():
        return True
    return count_pictures(dataset, tree.FEWEST)[1]


def _source(dataset: Dataset):
    if not dataset.path or not Path(dataset.path).exists():
        raise DataError(f"expected a folder, a zip or a tar, found nothing at {dataset.path!r}")
    if not Path(dataset.path).is_dir():
        return archive
    return tars if tars.are_at(Path(dataset.path)) else folder
