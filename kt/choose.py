"""Chooses the layer of a teacher and the number of clusters k without labels: `auto` in the config.

Two augmented views of the same images are described by the teacher. k-means is fitted on one view,
both are assigned, and what the cluster of one view tells of the cluster of the other is measured:
their mutual information, less that of views of different images (which is chance). Few clusters can
tell little, of very many the two views of an image seldom have the same: between them lies the k
that tells most. A layer's information is that of its best k; first layers win too easily, since
colours survive what views change, so the deepest layer with at least half of the highest
information is taken. Source: ours, in the spirit of prediction strength (Tibshirani and Walther,
2005); tried on photographs, see docs/explanation.md. By hand:

    python -m kt.choose --model results/teachers/deep/s0 --layers block2 block3 --map 1 \
      --pack results/data/images/train-unlabelled.h5 --clustering '{...}' --choice '{...}' \
      --seed 0 --output choice.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from kt import config
from kt.core import step
from kt.core.auto import AUTO
from kt.core.step import DataError

DEEP_ENOUGH = 0.5  # of the highest information
SHUFFLES = 3  # of pairs, to measure chance
PER_CLUSTER = 5  # images at least; more clusters are not tried


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--model", type=Path, required=True, help="folder of the teacher")
    parser.add_argument("--layers", nargs="+", required=True, help=f"to choose from; {AUTO}: all")
    parser.add_argument("--map", type=int, required=True, help="pool the map to map x map")
    parser.add_argument("--pool", choices=["mean", "max"], default="mean", help="how")
    parser.add_argument("--mirror", action="store_true", help="average with the mirror image")
    parser.add_argument("--pack", type=Path, required=True, help="unlabelled images")
    parser.add_argument(
        "--clustering", type=config.json_of(config.Clustering), required=True, help="JSON"
    )
    parser.add_argument("--choice", type=config.json_of(config.Choice), required=True, help="JSON")
    parser.add_argument("--seed", type=int, required=True, help="of views and first centroids")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")


def run(arguments: argparse.Namespace) -> None:
    """Measures every layer at every k and writes what is best."""
    with step.importing():
        from kt.core import hardware, images, model, table

    pack = images.read_pack(arguments.pack)
    where = hardware.device()
    hardware.set_up(where, deterministic=True)
    backbone = model.load(arguments.model, where)
    wanted = backbone.layers if AUTO in arguments.layers else arguments.layers
    layers = [layer for layer in backbone.layers if layer in set(map(backbone.check_layer, wanted))]
    measured = measure(backbone, pack, layers, arguments)
    layer, numbers = best(measured)
    for row in measured:
        step.log.info("choose: %(layer)s, k = %(k)d: %(information).3f nats", row)
    step.log.info("choose: layer %s, k = %d", layer, numbers[layer])
    parents = {
        str(path): table.digest(path)
        for path in (arguments.pack, arguments.model / "model.safetensors")
    }
    found = {"layer": layer, "k": numbers, "measured": measured}
    step.write_json(arguments.output, {**found, "provenance": step.provenance(parents)})


def measure(backbone, pack, layers: list[str], arguments: argparse.Namespace) -> list[dict]:
    """Gives a row `layer, k, information` for each, layers in forward order, k ascending."""
    from kt import cluster
    from kt.core import views

    choice, seed = arguments.choice, arguments.seed
    index = views.chosen(pack, choice.images, seed)
    numbers = [k for k in sorted(choice.clusters) if k * PER_CLUSTER <= len(index)]
    if not numbers:
        raise DataError(
            f"{arguments.pack}: expected at least {min(choice.clusters) * PER_CLUSTER} images to "
            f"choose k = {min(choice.clusters)} by, found {len(index)}; name k and layer instead "
            f"of {AUTO}, or lower choice.clusters"
        )
    both = [
        views.features(
            backbone,
            pack,
            index,
            choice.task,
            seed,
            number,
            layers,
            arguments.map,
            arguments.pool,
            arguments.mirror,
        )  # fmt: skip
        for number in (0, 1)
    ]
    rows = []
    for layer in layers:
        one, two = (found[layer].numpy() for found in both)
        if (one == one[0]).all():  # a dead layer tells nothing
            rows += [{"layer": layer, "k": k, "information": 0.0} for k in numbers]
            continue
        transform = cluster.fit_transform(one, arguments.clustering, where=f"layer {layer}")
        one, two = cluster.project(one, transform), cluster.project(two, transform)
        for k in numbers:
            centroids, _ = cluster.fit(one, arguments.clustering, k, seed)
            assigned = [cluster.assign(view, centroids)[0] for view in (one, two)]
            rows.append({"layer": layer, "k": k, "information": information(*assigned, seed)})
    return rows


def information(one: np.ndarray, two: np.ndarray, seed: int = 0) -> float:
    """Gives the mutual information of two labellings (N,) int64 beyond chance, in nats.

    Chance is the mean over shuffled pairs: with many clusters and few images it is far from zero.
    """
    from kt.core.judge import mutual_information

    random = np.random.default_rng(seed)
    shuffled = [mutual_information(one, random.permutation(two)) for _ in range(SHUFFLES)]
    return mutual_information(one, two) - float(np.mean(shuffled))


def best(measured: list[dict]) -> tuple[str, dict[str, int]]:
    """Gives the layer and each layer's k.

    Args:
        measured: Rows `layer, k, information`, layers in forward order, k ascending. Of equal ones
            the first is taken.
    """
    top: dict[str, dict] = {}
    for row in measured:
        if row["layer"] not in top or row["information"] > top[row["layer"]]["information"]:
            top[row["layer"]] = row
    # A dead layer's 0 is not more than what others have by chance, a little above or below.
    least = max(DEEP_ENOUGH * max(row["information"] for row in top.values()), 1e-12)
    deep = [name for name, row in top.items() if row["information"] >= least]
    # Where no view tells anything of the other, nothing speaks against the last layer.
    return (deep or list(top))[-1], {name: row["k"] for name, row in top.items()}


if __name__ == "__main__":
    step.main(__doc__, add_arguments, run)
