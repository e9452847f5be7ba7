"""Packs one data set: pictures of any source to square uint8 arrays, labels apart from them.

Writes to `--output`: `{train-unlabelled,train,test}.h5` (images), `{split}-labels.h5` (labels) and
`report.json`; a split that the source lacks has no rows. By hand:

    python -m kt.ingest --seed 0 --output results/data/photos --dataset '{"source": "pictures",
        "path": "photos.zip", "size": 64, "unlabelled": null, "labelled": null, "test": null,
        "max_bad_fraction": 0.01, "max_pixels": 100000000}'
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from kt import config
from kt.core import step, table
from kt.core.entries import POOL, SPLITS, TEST, TRAIN, Entry
from kt.core.rows import Rows
from kt.core.step import DataError, ResourceError, log

FEWEST = 10  # images to learn from without labels
MOST_OF_TRAIN = 0.9  # that the pool may take where there is no train-unlabelled


def add_arguments(parser) -> None:
    """Declares the options of this step."""
    parser.add_argument(
        "--dataset", type=config.json_of(config.Dataset), required=True, help="JSON, see above"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the packed data set")
    parser.add_argument("--seed", type=int, required=True, help="of the draws of subsets")


def run(arguments) -> None:
    """Lists, chooses, decodes, compares, writes; all files take their places at the end."""
    dataset, output = arguments.dataset, arguments.output.resolve()
    source = config.plugin("sources", dataset.source)
    listed = list(source.entries(dataset))
    rows = Rows(choose([entry for entry in listed if entry.usable], dataset, arguments.seed))
    others = [entry for entry in listed if not entry.usable]
    _check_numbers(Counter(rows.splits.tolist()), dataset, others)
    output.parent.mkdir(parents=True, exist_ok=True)
    _check_space(output.parent, len(rows.entries), dataset.size)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        scratch = Path(folder) / "scratch"
        rows.decode(source, dataset, scratch, arguments.threads or os.cpu_count() or 1)
        _check_faults(rows, dataset)
        left_out = rows.leave_out_copies()
        _check_numbers({split: len(rows.of(split)) for split in SPLITS}, dataset, others)
        settings = {"dataset": dataset, "seed": arguments.seed}
        histogram = _write_tables(rows, scratch, Path(folder), dataset.size, settings)
        report = {
            "dataset": dataset.model_dump(),
            **rows.describe(others, dataset.size),
            **left_out,
            **_normalisation(histogram),
            "origin": source.origin(dataset),
            "defaults": _defaults(dataset.size),
            "seconds": round(time.time() - step.start_time(), 3),
        }
        step.write_json(Path(folder) / "report.json", report)
        _publish(Path(folder), output)
    log.info("%s", _summary(report))


# ---------------------------------------------------------------------------- choosing


def choose(found: list[Entry], dataset: config.Dataset, seed: int) -> list[Entry]:
    """Draws each split's share; a missing pool is drawn from train.

    The order of the draw is that of a hash of seed and key, so that it depends on nothing else.

    Returns:
        The chosen entries in order of split and key.
    """

    def rank(entry: Entry) -> bytes:
        return hashlib.blake2b(f"{seed} {entry.key}".encode(), digest_size=16).digest()

    splits: dict[str, list[Entry]] = {split: [] for split in SPLITS}
    for entry in sorted(found, key=rank):
        splits[entry.split].append(entry)
    if not splits[POOL] and splits[TRAIN]:
        splits[POOL], splits[TRAIN] = _divide(splits[TRAIN], dataset)
    limits = {POOL: dataset.unlabelled, TRAIN: dataset.labelled, TEST: dataset.test}
    return [
        entry
        for split in SPLITS
        for entry in sorted(splits[split][: limits[split]], key=lambda entry: entry.key)
    ]


def _divide(train: list[Entry], dataset: config.Dataset) -> tuple[list[Entry], list[Entry]]:
    """Splits train into a pool without labels and the rest.

    Half and half where nothing is said, or where too few would keep their labels.
    """
    number = dataset.unlabelled
    if number is None:
        labelled = dataset.labelled
        number = len(train) // 2 if labelled is None else max(0, len(train) - labelled)
    if number > MOST_OF_TRAIN * len(train):  # `unlabelled` is a limit, the labels are needed, too
        number = len(train) // 2
    pool = [dataclasses.replace(entry, split=POOL) for entry in train[:number]]
    return pool, train[number:]


def _check_numbers(counts, dataset: config.Dataset, others: list[Entry]) -> None:
    if counts.get(POOL, 0) < FEWEST:
        ignored = sum(entry.ignored for entry in others)
        refused = [f"{entry.key!r} ({entry.refused})" for entry in others if not entry.ignored]
        shown = "".join(f"\n  {line}" for line in refused[:5])
        raise DataError(
            f"{dataset.source} {dataset.path or ''}: expected at least {FEWEST} images to learn "
            f"from without labels, found {counts.get(POOL, 0)}; {ignored} other files are no "
            f"pictures, {len(refused)} were refused{shown}"
        )
    for split, other in ((TRAIN, TEST), (TEST, TRAIN)):
        if counts.get(other) and not counts.get(split):
            raise DataError(
                f"{dataset.path}: {other} has images, but none of {split} could be used"
            )


def _check_space(folder: Path, number: int, size: int) -> None:
    needed = 2 * number * 3 * size * size  # the scratch file and the tables
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(f"{folder}: {needed} bytes are needed for a while, {free} are free")


def _check_faults(rows: Rows, dataset: config.Dataset) -> None:
    bad = [row for row, fault in enumerate(rows.faults) if fault]
    if len(bad) > dataset.max_bad_fraction * len(rows.entries):
        shown = "".join(f"\n  {rows.entries[row].key!r}: {rows.faults[row]}" for row in bad[:5])
        raise DataError(
            f"{len(bad)} of {len(rows.entries)} chosen files are bad, more than the tolerated "
            f"share max_bad_fraction = {dataset.max_bad_fraction}; mend or remove them:{shown}"
        )


# ---------------------------------------------------------------------------- writing


def _write_tables(rows: Rows, scratch: Path, folder: Path, size: int, settings) -> np.ndarray:
    """Writes images and labels of all splits; gives the pool's histogram (3, 256) int64.

    Folders of the pool are classes only where train has a class of that name: without train they
    are just folders.
    """
    known = {entry.class_name for entry in rows.entries if entry.split != POOL} - {None}
    histogram = np.zeros((3, 256), np.int64)
    for split in SPLITS:
        classes = sorted(known)
        index = {name: number for number, name in enumerate(classes)}
        picked = rows.of(split)
        keys = [rows.entries[row].key for row in picked]
        labels = [index.get(rows.entries[row].class_name, -1) for row in picked]
        with table.create(folder / f"{split}.h5", "images", settings) as file:
            table.put_strings(file, "keys", keys)
            images = table.add(file, "images", (len(picked), 3, size, size), np.uint8, True)
            for first, block in rows.blocks(scratch, picked, size):
                images[first : first + len(block)] = block
                if split == POOL:
                    histogram += _histogram(block)
        with table.create(folder / f"{split}-labels.h5", "labels", settings) as file:
            table.put_strings(file, "keys", keys)
            table.put(file, "labels", np.array(labels, np.int64))
            table.put_strings(file, "classes", classes)
    return histogram


def _histogram(block: np.ndarray) -> np.ndarray:
    channels = (block[:, channel].ravel() for channel in range(3))
    return np.stack([np.bincount(channel, minlength=256) for channel in channels])


def _publish(folder: Path, output: Path) -> None:
    """Moves all files to their places, the report last: where it stands all is whole."""
    output.mkdir(exist_ok=True)
    report = output / "report.json"
    report.unlink(missing_ok=True)
    for split in SPLITS:
        for name in (f"{split}.h5", f"{split}-labels.h5"):
            os.replace(folder / name, output / name)
    os.replace(folder / "report.json", report)


# ---------------------------------------------------------------------------- reporting


def _normalisation(histogram: np.ndarray) -> dict[str, list[float]]:
    """Gives mean and standard deviation by channel, in 0..1, of the pool."""
    values = np.arange(256) / 255
    share = histogram / histogram.sum(1, keepdims=True)
    mean = share @ values
    variance = (share * (values - mean[:, None]) ** 2).sum(1)
    return {"mean": mean.round(6).tolist(), "std": np.sqrt(variance).round(6).tolist()}


def _defaults(size: int) -> str:
    return (
        "Each picture was turned upright, made RGB, cut to its centre square and resized to "
        f"{size} x {size} pixels with antialiasing (bicubic); smaller ones were enlarged."
    )


def _summary(report: dict[str, Any]) -> str:
    counts = ", ".join(f"{split} {found['images']}" for split, found in report["splits"].items())
    out = report["left_out_of_pool"] + report["left_out_of_train"]
    return (
        f"images: {counts}; rejected {report['rejected_total']}, left out as copies of test images "
        f"{out}, ignored {report['ignored']}"
    )


if __name__ == "__main__":
    step.main(__doc__, add_arguments, run)
