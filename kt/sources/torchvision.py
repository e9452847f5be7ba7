"""Data sets of torchvision: CIFAR10, CIFAR100, STL10, Imagenette.

`path` is the name and, after a colon, the folder that holds the files, such as `CIFAR10:data`. What
is missing there is downloaded by torchvision, which checks its digest.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kt.config import Dataset
from kt.core.entries import POOL, TEST, TRAIN, Entry
from kt.core.step import DataError

# The splits of each, under the names that torchvision gives them.
SPLITS = {
    "CIFAR10": {TRAIN: {"train": True}, TEST: {"train": False}},
    "CIFAR100": {TRAIN: {"train": True}, TEST: {"train": False}},
    "STL10": {POOL: {"split": "unlabeled"}, TRAIN: {"split": "train"}, TEST: {"split": "test"}},
    "Imagenette": {TRAIN: {"split": "train"}, TEST: {"split": "val"}},
}
OF_FILES = ("Imagenette",)  # the others are arrays of pixels


def entries(dataset: Dataset) -> Iterator[Entry]:
    """Gives the pictures split by split, in torchvision's order.

    Raises:
        DataError: `path` names no known set, or its files are neither there nor to be had.
    """
    name, folder = _name_and_folder(dataset)
    for split, options in SPLITS[name].items():
        if name in OF_FILES:
            options = {**options, "size": "160px" if dataset.size <= 160 else "320px"}
            yield from _files(split, _opened(name, folder, options))
        else:
            yield from _arrays(split, _opened(name, folder, options))


def origin(dataset: Dataset) -> dict[str, Any]:
    """Says where the pictures came from."""
    name, folder = _name_and_folder(dataset)
    return {"torchvision": name, "folder": folder}


def _name_and_folder(dataset: Dataset) -> tuple[str, str]:
    name, colon, folder = (dataset.path or "").partition(":")
    if name not in SPLITS or not folder:
        raise DataError(
            f"source torchvision: expected a path such as CIFAR10:FOLDER with one of "
            f"{', '.join(SPLITS)}, found {dataset.path!r}"
        )
    return name, folder


def _opened(name: str, folder: str, options: dict[str, Any]):
    """Gives torchvision's data set; downloads what is not there."""
    import torchvision

    kind = getattr(torchvision.datasets, name)
    for download in (False, True):
        try:
            return kind(folder, download=download, **options)
        except (RuntimeError, OSError) as error:
            fault = error
    raise DataError(
        f"{name}: not in {folder!r}, and torchvision could not download it ({fault}); "
        "put its files there"
    )


def _arrays(split: str, opened) -> Iterator[Entry]:
    """Reads sets that torchvision holds as one array."""
    labels = getattr(opened, "targets", None)
    labels = opened.labels if labels is None else labels
    for row, (image, label) in enumerate(zip(opened.data, labels, strict=True)):
        # STL10 alone keeps the channels first.
        image = image.transpose(1, 2, 0) if image.shape[0] == 3 else image
        known = opened.classes[label] if label >= 0 else None
        yield Entry(
            split, f"{split}/{row:06d}", known, functools.partial(np.ascontiguousarray, image)
        )


def _files(split: str, opened) -> Iterator[Entry]:
    """Reads sets that torchvision holds as image files; a class has several names."""
    for row in range(len(opened)):
        path, label = opened._samples[row]
        name = opened.classes[label]
        name = name if isinstance(name, str) else name[0]
        key = f"{split}/{opened.wnids[label]}/{Path(path).name}"
        yield Entry(split, key, name, Path(path).read_bytes)
