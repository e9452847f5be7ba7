"""Gives every image the index of its nearest centroid as pseudo-label (step c of the paper).

Labels run 0..C-1 over the clusters that are not empty; an image whose nearest centroid was empty
when the clusters were made is left out (-1). Rows carry keys and are joined by them. By hand:

    python -m kt.pseudo_labels --features features.h5 --clusters clusters.h5 --output labels.h5
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from kt import cluster, features
from kt.core import parts, step, table
from kt.core.step import DataError

ARRAYS = {"labels": 1, "clusters": 1, "distances": 1, "keys": 1}
ROW_BYTES = 8 + 8 + 4  # label, cluster, distance


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--features", type=Path, required=True, help="of the images to label")
    parser.add_argument("--clusters", type=Path, required=True, help="centroids")
    parser.add_argument("--describe", type=config_json, default={}, help="teacher, layer, k")
    parts.add_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="table to write")


def config_json(text: str) -> dict:
    """Reads a JSON mapping."""
    import json

    return dict(json.loads(text))


def run(arguments: argparse.Namespace) -> None:
    """Streams the features past the centroids, or puts parts together."""
    if arguments.parts:
        sources = [arguments.features, arguments.clusters]
        output, keys = arguments.output, arguments.features
        parts.gather(arguments.parts, output, "pseudo_labels", ARRAYS, keys, sources)
        return
    centroids, sizes, transform = cluster.read_clusters(arguments.clusters)
    with features.read(arguments.features) as found:
        number, dimensions = found.rows.shape
        if dimensions != len(transform.mean):
            raise DataError(
                f"{arguments.features} has {dimensions} dimensions, {arguments.clusters} "
                f"was made from {len(transform.mean)}; use features of the same teacher, layer and "
                "map"
            )
        found = features.share(found, arguments.part)
        number = len(found.keys)
        step.check_space(arguments.output, number * (ROW_BYTES + found.keys.dtype.itemsize))
        left_out = write(arguments, found, centroids, sizes, transform)
    step.log.info(
        "pseudo-labels: %d images, %d labels, %d left out", number, sum(sizes > 0), left_out
    )


def write(
    arguments, found: features.Features, centroids, sizes: np.ndarray, transform: cluster.Transform
) -> int:
    """Writes the table row by row; gives how many images get no label."""
    number, left_out, first = len(found.keys), 0, 0
    label_of = compact(sizes)
    parents = [arguments.features, arguments.clusters]
    settings = arguments.part.mark(arguments.describe)
    with table.create(arguments.output, "pseudo_labels", settings, parents) as file:
        types = {"labels": np.int64, "clusters": np.int64, "distances": np.float32}
        columns = {
            name: table.Column(file, name, (number,), dtype)
            for name, dtype in {**types, "keys": found.keys.dtype}.items()
        }
        for clusters, distances in cluster.nearest(
            found, transform, centroids, str(arguments.features)
        ):
            labels = label_of[clusters]
            keys = found.keys[first : first + len(labels)]
            for column, block in zip(
                columns.values(), (labels, clusters, distances, keys), strict=True
            ):
                column.append(block)
            first += len(labels)
            left_out += int((labels < 0).sum())
        file.attrs["num_labels"] = int((sizes > 0).sum())
    return left_out


def compact(sizes: np.ndarray) -> np.ndarray:
    """Gives the label of each cluster, (K,) int64: 0..C-1 in cluster order, -1 for empty ones."""
    return np.where(sizes > 0, np.cumsum(sizes > 0) - 1, -1)


def read_pseudo_labels(path: Path) -> tuple[np.ndarray, list[str], int]:
    """Reads labels (N,) int64, keys (N,) and the number of labels C."""
    with table.read(path, "pseudo_labels", ARRAYS) as file:
        labels, keys = table.load(file, "labels"), table.strings(file, "keys")
        return labels, keys, int(file.attrs["num_labels"])


if __name__ == "__main__":
    step.main(__doc__, add_arguments, run)
