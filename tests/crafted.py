"""Packs, contexts, settings and tasks in memory, as small as the tests need them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from drawing import picture

from kt import config
from kt.core import images, judge, table
from kt.core.task import Context
from kt.pretext_train import build_task

JIGSAW = {
    "name": "jigsawpp", "permutations": 20, "min_distance": 6, "occlusions": 2, "grey": 0.5,
    "projection": 0.25, "tile_features": 16, "hidden": 32, "map": 2, "dropout": 0.0,
}  # fmt: skip
LABELS = {
    "name": "classification", "crop": 1.0, "flip": 0.0, "brightness": 0.0, "contrast": 0.0,
    "saturation": 0.0, "balance": False, "hidden": 0,
}  # fmt: skip
TRAINING = {
    "epochs": 1, "batch": 32, "optimiser": "adamw", "lr": 0.004, "momentum": 0.9,
    "weight_decay": 0.02, "schedule": "cosine", "milestones": [], "warmup": 0.05,
    "label_smoothing": 0.0, "precision": "float32", "compile": False,
    "deterministic": False,
}  # fmt: skip
PLAIN = {"name": "plain", "widths": [8, 16], "strides": [2, 2]}
CLUSTERING = {
    "centre": True, "pca": None, "whiten": False, "l2": False, "spherical": False,
    "iterations": 20, "redo": 1, "memory_mb": 100, "sample": None, "warm_start": None,
}  # fmt: skip


def training(**changes) -> config.Training:
    """Gives training settings, `TRAINING` but for the changes."""
    return config.Training(**(TRAINING | changes))


def clustering(**changes) -> config.Clustering:
    """Gives clustering settings, `CLUSTERING` but for the changes."""
    return config.Clustering(**(CLUSTERING | changes))


def plugin(values: dict, **changes) -> config.Plugin:
    """Gives a plug-in's name and options."""
    return config.Plugin(**(values | changes))


def names(number: int, prefix: str = "image") -> list[str]:
    """Gives so many keys, in order."""
    return [f"{prefix}-{row:05d}" for row in range(number)]


def noise(number: int, size: int, seed: int = 0) -> np.ndarray:
    """Draws images of independent pixels, (N, 3, S, S) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (number, 3, size, size), np.uint8)


def scenes(number: int, size: int, seed: int = 0) -> np.ndarray:
    """Draws images that darken from a point near the centre, so that each tile tells its place."""
    random = np.random.default_rng(seed)
    row, column = np.mgrid[:size, :size] / size
    centre = random.uniform(0.42, 0.58, (2, number, 1, 1))
    height = np.hypot(row - centre[0], column - centre[1])[:, None]
    colour = random.uniform(150, 300, (number, 3, 1, 1))
    pixels = 250 - colour * height + random.normal(0, 4, (number, 3, size, size))
    return pixels.clip(0, 255).astype(np.uint8)


def landscapes(number: int, size: int, seed: int = 0) -> np.ndarray:
    """Draws `scenes` that darken from top to bottom, too, so that they have an upright side."""
    shade = np.linspace(1, 0.4, size)[:, None]
    return (scenes(number, size, seed) * shade).astype(np.uint8)


def discs(number: int, size: int, first: int = 0) -> tuple[np.ndarray, torch.Tensor]:
    """Draws discs in the colours of three classes: (N, 3, S, S) uint8 and labels (N,) int64."""
    labels = np.arange(number) % 3
    drawn = [picture(int(label), first + row, size) for row, label in enumerate(labels)]
    return np.stack(drawn).transpose(0, 3, 1, 2).copy(), torch.from_numpy(labels)


def pack(pixels: np.ndarray, keys: list[str] | None = None) -> images.Pack:
    """Gives a pack that stands in memory."""
    keys = keys or names(len(pixels))
    return images.Pack(pixels, keys, images.key_ids(keys), Path("in-memory"))


def write_pack(path: Path, pixels: np.ndarray, keys: list[str]) -> Path:
    """Writes a pack as ingest does."""
    with table.create(path, "images", {}) as file:
        table.add(file, "images", pixels.shape, np.uint8, contiguous=True)[...] = pixels
        table.put_strings(file, "keys", keys)
    return path


def write_features(path: Path, features: np.ndarray, keys: list[str]) -> Path:
    """Writes a table of features."""
    with table.create(path, "features", {}) as file:
        table.put(file, "features", np.asarray(features, np.float32))
        table.put_strings(file, "keys", keys)
    return path


def context(size: int, number: int, seed: int = 0, labels=None, num_classes: int = 0) -> Context:
    """Gives the context of a task over the first so many `names`."""
    ids = torch.from_numpy(images.key_ids(names(number)))
    mean, std = torch.tensor([0.45, 0.5, 0.4]), torch.tensor([0.2, 0.25, 0.3])
    return Context(size, ids, mean, std, seed, labels, num_classes)


def jigsaw(size: int = 45, number: int = 64, seed: int = 0, **changes):
    """Builds a jigsaw task."""
    return build_task(plugin(JIGSAW, **changes), context(size, number, seed))


def labelling(size: int, labels: torch.Tensor, seed: int = 0, **changes):
    """Builds a label task."""
    number = int(labels.max()) + 1
    return build_task(plugin(LABELS, **changes), context(size, len(labels), seed, labels, number))


def data(train: int = 30, test: int = 30, size: int = 16, pool: int = 40) -> judge.Data:
    """Gives discs of three classes as what evaluations see."""
    seen, labels = discs(train, size)
    unseen, true = discs(test, size, 1000)
    return judge.Data(
        pack(discs(pool, size, 2000)[0], names(pool, "pool")),
        judge.Split(pack(seen, names(train, "train")), labels),
        judge.Split(pack(unseen, names(test, "test")), true),
        3,
    )
