"""Packs one data set: pictures of any source to square uint8 arrays, labels apart from them.

Writes to `--output`: `{train-unlabelled,train,test}.h5` (images), `{split}-labels.h5` (labels) and
`report.json`; a split that the source lacks has no rows. What is decoded is kept in shards in
`--state` until the packs stand, so that a run that was stopped goes on behind them. By hand:

    python -m kt.ingest --seed 0 --output results/data/photos --dataset '{"source": "pictures",
        "path": "photos.zip", "size": 64, "unlabelled": null, "labelled": null, "test": null,
        "max_bad_fraction": 0.01, "max_pixels": 100000000, "near_copies": 0.25,
        "storage": "pixels"}'
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from kt import config
from kt.core import jpeg, layouts, lock, spill, step, table
from kt.core import listing as listings
from kt.core.entries import FEWEST
from kt.core.images import LARGE
from kt.core.layouts import POOL, SPLITS, TEST, TRAIN
from kt.core.listing import Listing
from kt.core.parts import WHOLE, Part, parse
from kt.core.rows import Rows
from kt.core.shards import Shards
from kt.core.step import DataError, log

FLAT = 0.02  # deviation of the pool, of 1: photographs have 0.2 and more
SAMPLE = 10_000  # images of an encoded pool whose mean and deviation are taken


def add_arguments(parser) -> None:
    """Declares the options of this step."""
    parser.add_argument(
        "--dataset", type=config.json_of(config.Dataset), required=True, help="JSON, see above"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the packed data set")
    parser.add_argument("--seed", type=int, required=True, help="of the draws of subsets")
    parser.add_argument("--state", type=Path, help="folder of the shards; a killed run goes on")
    parser.add_argument(
        "--part", type=parse, default=WHOLE,
        help="such as 2/4: only decode this much of it into --state; --output is a mark",
    )  # fmt: skip


def run(arguments) -> None:
    """Lists, chooses, decodes, compares, writes; all files take their places at the end."""
    dataset, output = arguments.dataset, arguments.output.resolve()
    source = config.plugin("sources", dataset.source)
    if arguments.part.of > 1 and not arguments.state:
        raise step.ConfigError("--part: needs --state, where the others leave theirs")
    threads = arguments.threads or os.cpu_count() or 1
    with _workplace(output, arguments.state, arguments.part) as (folder, state):
        if hasattr(source, "indexed"):
            source = source.indexed(dataset, state, arguments.part, threads)
        listed = listings.create(source.entries(dataset), folder, arguments.seed)
        splits = choose(listed, dataset)
        chosen = spill.where(folder, splits >= 0)
        splits = splits[chosen]
        _check_numbers(_counts(splits), dataset, listed)
        shards = Shards(state, listed, chosen, dataset)
        _check_space(folder, state, len(chosen), dataset)
        _warn_of_memory(_counts(splits)[POOL], dataset)
        shards.decode(source, threads, arguments.part)
        if arguments.part.of > 1:
            step.write_text(output, f"{shards.count} shards in all, see {state}\n")
            return
        rows = Rows(shards, splits, folder / "rows")
        _check_faults(rows, dataset)
        left_out = rows.leave_out_copies(dataset.near_copies)
        left = {split: len(rows.of(split)) for split in SPLITS}
        copies = left_out["left_out_of_pool"] + left_out["left_out_of_train"]
        _check_numbers(left, dataset, listed, copies)
        _check_classes(rows, dataset)
        settings = {"dataset": dataset, "seed": arguments.seed}
        packs = folder / "packs"
        histogram = _write_tables(rows, packs, settings)
        report = {
            "dataset": dataset.model_dump(),
            **rows.describe(),
            **left_out,
            **_normalisation(histogram),
            "origin": source.origin(dataset) | layouts.origin(dataset.labels),
            "defaults": _defaults(dataset),
            "seconds": round(time.time() - step.start_time(), 3),
        }
        step.write_json(packs / "report.json", report)
        _warn_of_flat_pictures(report)
        _publish(packs, output)
        shutil.rmtree(state, ignore_errors=True)  # NFS keeps the names of files that are open
    log.info("%s", _summary(report))


@contextlib.contextmanager
def _workplace(output: Path, state: Path | None, part: Part) -> Iterator[tuple[Path, Path]]:
    """Gives a folder beside the output and that of the shards, both for this process alone.

    The first is always the same, so that the next run takes away what a killed one left there. The
    second is shared by those who do parts of the work.
    """
    folder = output.with_name(f".{output.name}.ingest")
    missing = [parent for parent in folder.parents if not parent.exists()]
    own = lock.claim(folder)
    other = lock.claim(state) if state and part.of == 1 else None
    state = state or folder / "shards"
    state.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "packs", ignore_errors=True)
    if part.of == 1:
        for half in [*folder.glob(".*.tmp"), *state.glob(".*.tmp")]:
            half.unlink(missing_ok=True)
    try:
        yield folder, state
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: something was made
            for parent in missing:
                parent.rmdir()
        for file in filter(None, (own, other)):
            file.close()


# ---------------------------------------------------------------------------- choosing


def choose(listed: Listing, dataset: config.Dataset) -> np.ndarray:
    """Draws each split's share, as the limits say; what the pool lacks is drawn from train.

    Each class keeps a label.

    Returns:
        (N,) int8, the number of the split that an entry is chosen for, else -1.
    """
    splits, order = listed.columns["split"], listed.in_drawn_order()

    def of(number: int) -> np.ndarray:
        parts = (part[splits[part] == number] for part in spill.parts(order))
        return spill.stored(listed.folder, np.int64, parts)

    ranked = [of(number) for number in range(len(SPLITS))]
    pool, train = SPLITS.index(POOL), SPLITS.index(TRAIN)
    whole = ranked[train]
    number = layouts.from_train(len(ranked[pool]), len(whole), dataset)
    first = _one_of_each(whole, whole[number:][: dataset.labelled], listed)
    if number or len(first):
        blocks = (part[~np.isin(part, first)] for part in spill.parts(whole))
        others = spill.stored(listed.folder, np.int64, blocks)
        parts = itertools.chain(spill.parts(ranked[pool]), spill.parts(others[:number]))
        ranked[pool] = spill.stored(listed.folder, np.int64, parts)
        parts = itertools.chain([first], spill.parts(others[number:]))
        ranked[train] = spill.stored(listed.folder, np.int64, parts)
    limits = (dataset.unlabelled, dataset.labelled, dataset.test)
    chosen = np.full(len(splits), -1, np.int8)
    for number, limit in enumerate(limits):
        chosen[ranked[number][:limit]] = number
    return chosen


def _one_of_each(train: np.ndarray, labelled: np.ndarray, listed: Listing) -> np.ndarray:
    """Gives a row of each class of train, (n,) int64; none where no class lacks a label."""
    labels, rows = listed.columns["label"], np.full(len(listed.classes), -1)
    lacking = np.zeros(len(listed.classes), bool)
    for part in spill.parts(train):
        known = part[labels[part] >= 0]
        rows[labels[known]] = known  # of several the last one counts
        lacking[labels[known]] = True
    for part in spill.parts(labelled):
        lacking[labels[part][labels[part] >= 0]] = False
    return np.sort(rows[rows >= 0]) if lacking.any() else np.empty(0, np.int64)


def _counts(splits: np.ndarray) -> dict[str, int]:
    return {split: int((splits == number).sum()) for number, split in enumerate(SPLITS)}


def _check_numbers(
    counts: dict[str, int], dataset: config.Dataset, listed: Listing, copies: int = 0
) -> None:
    left_out = f", and {copies} were left out as copies of test images" if copies else ""
    if counts[POOL] < FEWEST:
        shown = "".join(f"\n  {key!r} ({reason})" for key, reason in listed.refused[:5])
        raise DataError(
            f"{dataset.source} {dataset.path or ''}: expected at least {FEWEST} images to learn "
            f"from without labels, found {counts[POOL]}; {listed.ignored} other files are no "
            f"pictures, {listed.num_refused} were refused{left_out}{shown}"
        )
    for split, other in ((TRAIN, TEST), (TEST, TRAIN)):
        if counts[other] and not counts[split]:
            raise DataError(
                f"{dataset.path}: {other} has images, but none of {split} could be used{left_out}"
            )


def _check_classes(rows: Rows, dataset: config.Dataset) -> None:
    """Warns where a class is left in one of train and test alone: by copies, bad files, limits.

    Raises:
        DataError: No class has two images in train, which no evaluation can choose by; that would
            come to light when all networks are trained.
    """
    there: dict[str, Counter[int]] = {}
    for split in (TRAIN, TEST):
        blocks = (rows.labels(part) for part in spill.parts(rows.of(split)))
        there[split] = Counter(label for block in blocks for label in block.tolist())
    if max(there[TRAIN].values(), default=2) < 2:
        raise DataError(
            f"{dataset.source} {dataset.path or ''}: expected a class with two or more labelled "
            "images to train on, since the evaluations choose layers and penalties on held-out "
            f"ones; found one image in each of {len(there[TRAIN])} classes. Add labelled images, "
            "have fewer learned from without labels (`unlabelled`), or work without labels"
        )
    for split, other in ((TRAIN, TEST), (TEST, TRAIN)):
        alone = there[other].keys() - there[split].keys()
        lost = sorted(rows.listing.classes[label] for label in alone)
        if lost:
            log.warning(
                "%d classes have images in %s and none is left in %s, such as %s: copies of test "
                "images and bad files are left out, and limits draw; their images judge no network",
                len(lost), other, split, ", ".join(map(repr, lost[:5])),
            )  # fmt: skip


def _check_space(folder: Path, state: Path, number: int, dataset: config.Dataset) -> None:
    """Compares what shards and packs will take with what is free; shards that are there count."""
    # Bytes a pixel: photographs as JPEGs take 0.6 to 1 at 64 px and 0.5 from 255 px on.
    row = dataset.size**2 * (3 if dataset.storage == "pixels" else 0.6 + 32 / dataset.size)
    there = sum(path.stat().st_size for path in state.glob("shard-*.h5"))
    needed = int(2 * number * row) - there
    step.check_space(folder / "packs", needed)


def _warn_of_memory(pool: int, dataset: config.Dataset) -> None:
    """Warns where training would read pixels off a disk in each epoch, and if image by image."""
    needed = 3 * dataset.size**2 * pool if dataset.storage == "pixels" else 0
    there = memory()
    if needed > there:
        log.warning(
            "the pixels of %d images to learn from take %.1f GB, more than the %.1f GB of this "
            "machine's memory: each epoch will read them off the disk%s. With `storage: jpeg` "
            "in the settings of the data set it reads stretches of a fifth to two fifths of that",
            pool, needed / 1e9, there / 1e9, "" if needed > LARGE else ", image by image",
        )  # fmt: skip


def memory() -> int:
    """Gives the bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check_faults(rows: Rows, dataset: config.Dataset) -> None:
    if len(rows.faults) > dataset.max_bad_fraction * len(rows.splits):
        bad = sorted((rows.keys([place])[0], why) for place, why in rows.faults.items())
        for key, why in bad:
            step.detail("bad: %r: %s", key, why)
        shown = "".join(f"\n  {key!r}: {why}" for key, why in bad[:5])
        shown += f"\n  and {len(bad) - 5} more, see the log" if len(bad) > 5 else ""
        raise DataError(
            f"{len(bad)} of {len(rows.splits)} chosen files are bad, more than the tolerated "
            f"share max_bad_fraction = {dataset.max_bad_fraction}; mend or remove them, or allow "
            f"more of them in the data set's settings:{shown}"
        )


# ---------------------------------------------------------------------------- writing


def _write_tables(rows: Rows, folder: Path, settings) -> np.ndarray:
    """Writes images and labels of all splits; gives the pool's histogram (3, 256) int64.

    Folders of the pool are classes only where train has a class of that name: without train they
    are just folders.
    """
    names, known = rows.listing.classes, set()
    for part in itertools.chain(*(spill.parts(rows.all_of(split)) for split in (TRAIN, TEST))):
        known.update(rows.labels(part).tolist())
    classes = sorted(names[label] for label in known if label >= 0)
    index = {name: number for number, name in enumerate(classes)}
    to_class = np.array([*(index.get(name, -1) for name in names), -1], np.int64)  # -1 is the last
    for split in SPLITS:
        picked = rows.of(split)
        with table.create(folder / f"{split}.h5", "images", settings) as file:
            _put_keys(file, rows, picked)
            found = _put_images(file, rows, picked)
        if split == POOL:
            histogram = found
        with table.create(folder / f"{split}-labels.h5", "labels", settings) as file:
            _put_keys(file, rows, picked)
            labels = (to_class[rows.labels(part)] for part in spill.parts(picked))
            table.put(file, "labels", spill.stored(rows.listing.folder, np.int64, labels))
            table.put_strings(file, "classes", classes)
    return histogram


def _put_keys(file: h5py.File, rows: Rows, picked: np.ndarray) -> None:
    """Adds `keys`, some thousand at a time: strings take much memory."""

    def parts():
        for part in spill.parts(picked):
            yield [key.encode() for key in rows.keys(part)]

    width = max((len(key) for part in parts() for key in part), default=1)
    keys = table.Column(file, "keys", (len(picked),), h5py.string_dtype("utf-8", width))
    for part in parts():
        keys.append(np.array(part, keys.dataset.dtype))


def _put_images(file: h5py.File, rows: Rows, picked: np.ndarray) -> np.ndarray:
    """Adds `images`, or JPEGs as `data` and `offsets`; gives the histogram (3, 256) int64."""
    size = rows.size
    histogram = np.zeros((3, 256), np.int64)
    if rows.shards.dataset.storage == "pixels":
        images = table.add(file, "images", (len(picked), 3, size, size), np.uint8, True)
        for first, block in rows.blocks(picked):
            pixels = np.stack(block).reshape(-1, 3, size, size)
            images[first : first + len(block)] = pixels
            histogram += _histogram(pixels)
        return histogram
    lengths = (rows.found["length"][part] for part in spill.parts(picked))
    offsets = spill.stored(rows.listing.folder, np.int64, itertools.chain([[0]], lengths))
    np.cumsum(offsets, out=offsets)
    table.put(file, "offsets", offsets)
    file.attrs["size"] = size
    data = table.add(file, "data", (int(offsets[-1]),), np.uint8, True)
    for first, block in rows.blocks(picked):
        data[offsets[first] : offsets[first + len(block)]] = np.concatenate(block)
    for place in picked[:: -(-len(picked) // SAMPLE) or 1]:
        histogram += _histogram(rows.pixels(place)[None])
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


def _warn_of_flat_pictures(report: dict[str, Any]) -> None:
    """Warns where the pool is nearly of one grey: most often 16 bits of which few are used."""
    if max(report["std"]) < FLAT:
        log.warning(
            "the images to learn from are nearly all of one grey (mean %s, deviation %s of 1): "
            "networks will see little. Pictures of 16 bits are divided by 257; where yours use "
            "only part of the range, name it in `levels` of the data set",
            *(", ".join(f"{value:.3f}" for value in report[name]) for name in ("mean", "std")),
        )


def _defaults(dataset: config.Dataset) -> str:
    size, near = dataset.size, dataset.near_copies
    stored = f" Kept as JPEG of quality {jpeg.QUALITY}." if dataset.storage == "jpeg" else ""
    looked = "with equal pixels" if near is None else f"that differ by at most {near:g} of contrast"
    return (
        "Each picture was turned upright, made RGB, cut to its centre square and resized to "
        f"{size} x {size} pixels with antialiasing (bicubic); smaller ones were enlarged.{stored} "
        f"Left out as copies of test images: pictures {looked}."
    )


def _summary(report: dict[str, Any]) -> str:
    counts = ", ".join(f"{split} {found['images']}" for split, found in report["splits"].items())
    out = report["left_out_of_pool"] + report["left_out_of_train"]
    near = report["near_copies_in_pool"] + report["near_copies_in_train"]
    return (
        f"images: {counts}; rejected {report['rejected_total']}, left out as copies of test images "
        f"{out} ({near} of them near copies), ignored {report['ignored']}"
    )


if __name__ == "__main__":
    step.main(__doc__, add_arguments, run)
