"""Writes the features of one layer of a teacher for all images of a pack (step b of the paper).

The layer's map is averaged to at most map x map and flattened; nothing is normalised here. By hand:

    python -m kt.features --model results/teachers/deep/s0 --layer block2 --map 1 \
      --pack results/data/fashion_mnist/train-unlabelled.h5 --output features.h5
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kt.core import step
from kt.core.step import DataError

BATCH = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--model", type=Path, required=True, help="folder of the teacher")
    parser.add_argument("--layer", required=True, help="as in model.json")
    parser.add_argument("--map", type=int, required=True, help="pool the map to map x map")
    parser.add_argument("--pack", type=Path, required=True, help="packed images")
    parser.add_argument("--output", type=Path, required=True, help="table to write")


def run(arguments: argparse.Namespace) -> None:
    """Streams the pack through the network into the table."""
    import numpy as np
    import torch

    from kt.core import images, model, table, training

    pack = images.read_pack(arguments.pack)
    backbone = model.load(arguments.model, training.device())
    channels, height, width = backbone.map_shape(pack.size, arguments.layer)
    dimensions = channels * min(height, arguments.map) * min(width, arguments.map)
    settings = {"layer": arguments.layer, "map": arguments.map, "model": str(arguments.model)}
    parents = [arguments.pack, arguments.model / "model.safetensors"]
    progress = step.Progress(f"features {arguments.layer}", len(pack), "img")
    with table.create(arguments.output, "features", settings, parents) as file:
        table.put_strings(file, "keys", pack.keys)
        features = table.add(file, "features", (len(pack), dimensions), np.float32)
        first = 0
        for batch in training.pack_batches(pack, torch.arange(len(pack)), BATCH):
            block = backbone.features(batch, arguments.layer, arguments.map).cpu().numpy()
            check_finite(block, pack.keys[first : first + len(block)], f"layer {arguments.layer}")
            features[first : first + len(block)] = block
            first += len(block)
            progress.add(len(block))
    progress.close()
    step.log.info(
        "features: %d images x %d dimensions of %s", len(pack), dimensions, arguments.layer
    )


def check_finite(features, keys: list[str], where: str) -> None:
    """Refuses NaN and Inf.

    Args:
        features: (N, D) float32.
        keys: (N,) names.
        where: For the message.

    Raises:
        DataError: Names the images.
    """
    import numpy as np

    bad = np.flatnonzero(~np.isfinite(features).all(1))
    if len(bad):
        shown = ", ".join(repr(keys[row]) for row in bad[:5])
        raise DataError(
            f"{where}: features of {len(bad)} images are not finite, among them {shown}"
        )


if __name__ == "__main__":
    step.main(__doc__, add_arguments, run)
