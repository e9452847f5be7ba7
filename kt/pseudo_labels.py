"""Gives every image the index of its nearest centroid as pseudo-label (step c of the paper).

Labels run 0..C-1 over the clusters that are not empty; an image whose nearest centroid was empty
when the clusters were made is left out (-1). Rows carry keys and are joined by them. By hand:

    python -m kt.pseudo_labels --features features.h5 --clusters clusters.h5 --output labels.h5
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from kt import cluster
from kt.core import step, table
from kt.core.step import DataError
from kt.features import check_finite

ROWS = 16384  # projected at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--features", type=Path, required=True, help="of the images to label")
    parser.add_argument("--clusters", type=Path, required=True, help="centroids")
    parser.add_argument("--describe", type=config_json, default={}, help="teacher, layer, k")
    parser.add_argument("--output", type=Path, required=True, help="table to write")


def config_json(text: str) -> dict:
    """Reads a JSON mapping."""
    import json

    return dict(json.loads(text))


def run(arguments: argparse.Namespace) -> None:
    """Streams the features past the centroids."""
    centroids, sizes, transform = cluster.read_clusters(arguments.clusters)
    with table.read(arguments.features, "features", {"features": 2, "keys": 1}) as file:
        keys, features = table.strings(file, "keys"), file["features"]
        if features.shape[1] != len(transform.mean):
            raise DataError(
                f"{arguments.features} has {features.shape[1]} dimensions, {arguments.clusters} "
                f"was made from {len(transform.mean)}; use features of the same teacher, layer and "
                "map"
            )
        nearest = np.empty(len(keys), np.int64)
        distances = np.empty(len(keys), np.float32)
        for first in range(0, len(keys), ROWS):
            part = slice(first, first + ROWS)
            check_finite(features[part], keys[part], str(arguments.features))
            projected = cluster.project(features[part], transform)
            nearest[part], distances[part] = cluster.assign(projected, centroids)
    labels = compact(sizes)[nearest]
    parents = [arguments.features, arguments.clusters]
    with table.create(arguments.output, "pseudo_labels", arguments.describe, parents) as file:
        table.put(file, "labels", labels)
        table.put(file, "clusters", nearest)
        table.put(file, "distances", distances)
        table.put_strings(file, "keys", keys)
        file.attrs["num_labels"] = int((sizes > 0).sum())
    left_out = int((labels < 0).sum())
    step.log.info(
        "pseudo-labels: %d images, %d labels, %d left out", len(keys), sum(sizes > 0), left_out
    )


def compact(sizes: np.ndarray) -> np.ndarray:
    """Gives the label of each cluster, (K,) int64: 0..C-1 in cluster order, -1 for empty ones."""
    return np.where(sizes > 0, np.cumsum(sizes > 0) - 1, -1)


def read_pseudo_labels(path: Path) -> tuple[np.ndarray, list[str], int]:
    """Reads labels (N,) int64, keys (N,) and the number of labels C."""
    arrays = {"labels": 1, "clusters": 1, "distances": 1, "keys": 1}
    with table.read(path, "pseudo_labels", arrays) as file:
        return file["labels"][...], table.strings(file, "keys"), int(file.attrs["num_labels"])


if __name__ == "__main__":
    step.main(__doc__, add_arguments, run)
