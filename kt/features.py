"""Writes the features of one layer of a teacher for all images of a pack (step b of the paper).

The layer's map is pooled to at most map x map and flattened; nothing is normalised here. Features
that were made elsewhere are taken as they are (`kt.core.given`). By hand:

    python -m kt.features --model results/teachers/deep/s0 --layer block2 --map 1 --pool mean \
      --pack results/data/fashion_mnist/train-unlabelled.h5 --output features.h5
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from kt.core import auto, parts, step
from kt.core.step import ConfigError, DataError

if TYPE_CHECKING:
    import h5py
    import numpy as np

    from kt.core import blocks, images

BATCH = 256  # images at most
AHEAD = 4  # batches that may wait to be written
ARRAYS = {"features": 2, "keys": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--model", type=Path, help="folder of the teacher")
    parser.add_argument("--layer", help="as in model.json")
    parser.add_argument("--map", type=int, help="pool the map to map x map")
    parser.add_argument("--pool", choices=["mean", "max"], default="mean", help="how")
    parser.add_argument("--mirror", action="store_true", help="average with the mirror image")
    parser.add_argument("--choice", type=Path, help="that `kt.choose` wrote, for --layer auto")
    parser.add_argument("--given", type=Path, help=".npy or HDF5 of features, instead of a model")
    parser.add_argument(
        "--keys", type=Path, help="of its rows: a text file, one a line, or the HDF5"
    )
    parser.add_argument("--pack", type=Path, required=True, help="packed images")
    parts.add_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="table to write")


def run(arguments: argparse.Namespace) -> None:
    """Writes the features that a network computes, or given ones.

    Raises:
        ConfigError: The options are not those of one of the two.
    """
    made = (arguments.model, arguments.layer, arguments.map)
    given = (arguments.given, arguments.keys)
    if None not in made and given == (None, None):
        arguments.layer, _ = auto.settled(arguments.choice, arguments.layer, "0")
        if arguments.parts:
            sources = [arguments.pack, arguments.model / "model.safetensors"]
            parts.gather(
                arguments.parts, arguments.output, "features", ARRAYS, arguments.pack, sources
            )
        else:
            compute(arguments)
    elif None not in given and set(made) == {None} and arguments.part.of == 1:
        take(arguments)
    else:
        raise ConfigError("expected --model --layer --map, or --given --keys without --part")


def take(arguments: argparse.Namespace) -> None:
    """Copies the given features of the pack's images into the table."""
    import numpy as np

    from kt.core import blocks, given, table

    features, keys, rows = given.read(arguments.given, arguments.keys, arguments.pack)
    number, dimensions = len(rows), features.shape[1]
    step.check_space(arguments.output, number * (4 * dimensions + keys.itemsize))
    settings = {"given": str(arguments.given)}
    parents = [arguments.pack, arguments.given, arguments.keys]
    with table.create(arguments.output, "features", settings, parents) as file:
        names = table.Column(file, "keys", (number,), keys.dtype)
        column = table.Column(file, "features", (number, dimensions), np.float32)
        for first in range(0, number, BATCH):
            part = slice(first, first + BATCH)
            with np.errstate(over="ignore"):  # what is too large is found to be so
                block = features[rows[part]].astype(np.float32)
            blocks.check_finite(block, keys[part], str(arguments.given))
            names.append(keys[part])
            column.append(block)
    left = len(features) - number
    step.log.info(
        "features: %d images x %d dimensions, %d rows not needed", number, dimensions, left
    )


def compute(arguments: argparse.Namespace) -> None:
    """Streams the pack through the network into the table."""
    with step.importing():
        import numpy as np
        import torch

        from kt.core import blocks, hardware, images, model, table
        from kt.core.backbone import fold_norms

    pack = images.layout(arguments.pack)
    first, last = images.span(arguments.pack, batch_of(pack), arguments.part)
    number = last - first
    where = hardware.device()
    hardware.set_up(where, deterministic=True)  # parts are the same as the whole
    backbone = model.load(arguments.model, where)
    fold_norms(backbone)
    backbone.to(memory_format=torch.channels_last)
    channels, height, width = backbone.map_shape(pack.shape[-1], arguments.layer)
    dimensions = channels * min(height, arguments.map) * min(width, arguments.map)
    step.check_space(arguments.output, number * (4 * dimensions + pack.keys.itemsize))
    options = ("model", "layer", "map", "pool", "mirror")
    settings = arguments.part.mark({key: getattr(arguments, key) for key in options})
    if (computed_in := hardware.extracted_in(where)) != torch.float32:  # parts must agree on it
        settings["computed_in"] = str(computed_in).removeprefix("torch.")
    parents = [arguments.pack, arguments.model / "model.safetensors"]
    progress = step.Progress(f"features {arguments.layer}", number, "img")
    with table.create(arguments.output, "features", settings, parents) as file:
        keys = table.Column(file, "keys", (number,), pack.keys)
        features = table.Column(file, "features", (number, dimensions), np.float32)

        def write(names: np.ndarray, block: np.ndarray) -> None:
            blocks.check_finite(block, names, f"layer {arguments.layer}")
            keys.append(names)
            features.append(block)

        described = describe(
            backbone, arguments.layer, arguments.map, arguments.pack, arguments.pool,
            arguments.mirror, arguments.part,
        )  # fmt: skip
        for count in _aside(write, described):
            progress.add(count)
    progress.close()
    step.log.info("features: %d images x %d dimensions of %s", number, dimensions, arguments.layer)


def describe(
    backbone, layer: str, edge: int, pack: Path, kind: str = "mean", mirror: bool = False,
    part: parts.Part = parts.WHOLE,
) -> Iterator[tuple]:  # fmt: skip
    """Gives keys (B,) bytes and features (B, D) float32 of the pack, batch by batch."""
    import torch

    from kt.core import hardware, images
    from kt.core.backbone import pooled

    where = backbone.mean.device

    def begun() -> Iterator[tuple]:
        for keys, pixels in images.stream(pack, batch_of(images.layout(pack)), part):
            # Not across the `yield`: it would switch gradients off for whoever asks.
            with torch.inference_mode(), hardware.mixed(where):
                ready = backbone.normalise(hardware.sent(torch.from_numpy(pixels), where))
                found = pooled(backbone, ready, [layer], edge, kind, mirror)[layer]
            yield keys, hardware.fetched(found)

    for keys, fetch in hardware.one_behind(begun(), where):
        yield keys, fetch().numpy()


def batch_of(pack: images.Layout) -> int:
    """Gives the images that a network looks at together, by their size alone."""
    from kt.core import images

    return min(BATCH, images.at_once(pack.shape[-1]))


def _aside(write, found: Iterator[tuple]) -> Iterator[int]:
    """Calls `write(keys, block)` for each pair in a thread of its own, while the next is made."""
    with ThreadPoolExecutor(1) as writer:
        waiting: deque = deque()
        for keys, block in found:
            waiting.append(writer.submit(write, keys, block))
            if len(waiting) > AHEAD:
                waiting.popleft().result()
            yield len(keys)
        for written in waiting:
            written.result()


# ---------------------------------------------------------------------------- reading


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of one split.

    Attributes:
        rows: (N, D) float32, to be read in slices.
        keys: (N,) UTF-8 bytes, to be read in slices.
    """

    rows: h5py.Dataset | blocks.Scratch
    keys: h5py.Dataset | np.ndarray


@contextlib.contextmanager
def read(path: Path, scratch: Path | None = None) -> Iterator[Features]:
    """Opens a table of features.

    Args:
        path: The table.
        scratch: Folder for a sorted copy where the rows must come in the order of their keys and do
            not stand so; None takes them as they stand.

    Raises:
        DataError: It is no such table, or a key stands there twice.
    """
    import numpy as np

    from kt.core import table

    with table.read(path, "features", ARRAYS) as file:
        rows, keys = file["features"], file["keys"]
        if rows.dtype != np.float32 or keys.dtype.kind != "S":
            raise DataError(
                f"{path}: expected features float32 and keys UTF-8, found {rows.dtype} and "
                f"{keys.dtype}"
            )
        if scratch is not None and not _ascending(keys):
            rows, keys = _sorted(rows, keys, path, scratch)
        yield Features(rows, keys)


def share(found: Features, part: parts.Part) -> Features:
    """Gives a part of the rows, cut between the blocks that they are worked on in."""
    if part.of == 1:
        return found
    from kt.core import blocks

    first, last = part.span(found.rows.shape[0], blocks.height(found.rows))
    return Features(blocks.Slice(found.rows, first, last), found.keys[first:last])


def _ascending(keys) -> bool:
    """Says whether keys stand in order, each once; looks at a part of them at a time."""
    last = None
    for first in range(0, len(keys), 1 << 16):
        part = keys[first : first + (1 << 16)]
        if (last is not None and part[0] <= last) or (part[1:] <= part[:-1]).any():
            return False
        last = part[-1]
    return True


def _sorted(rows, keys, path: Path, folder: Path):
    """Copies rows to a scratch file in the order of their keys; gives it and the sorted keys."""
    import numpy as np

    from kt.core import blocks

    names = keys[...]
    order = np.argsort(names, kind="stable")
    repeated = len(names) - len(np.unique(names))
    if repeated:
        raise DataError(f"{path}: {repeated} keys are repeated, each must stand once")
    step.check_space(folder / "scratch", 4 * rows.shape[0] * rows.shape[1])
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    copy = blocks.Scratch(folder, rows.shape)
    for first, last in blocks.bounds(rows):
        for row, to in zip(rows[first:last], place[first:last].tolist(), strict=True):
            copy[to : to + 1] = row
    return copy, names[order]


if __name__ == "__main__":
    step.main(__doc__, add_arguments, run)
