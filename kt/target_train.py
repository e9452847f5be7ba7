"""Trains a target network from scratch on pseudo-labels (step d of the paper), or on true labels.

Labels are joined to the images by key; every label must have its image. By hand:

    python -m kt.target_train --pack results/data/fashion_mnist/train-unlabelled.h5 \
      --pseudo-labels pseudo_labels.h5 --data-report results/data/fashion_mnist/report.json \
      --backbone '{"name": "plain", "widths": [16, 32], "strides": [2, 2]}' \
      --task ... --training ... \
      --epochs 10 --seed 0 --output target
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from kt import config
from kt.core import step
from kt.core.step import ConfigError, DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--pack", type=Path, required=True, help="images to train on")
    parser.add_argument("--labels", type=Path, help="true labels: the supervised bound")
    parser.add_argument(
        "--transfer",
        type=config.json_of(config.Plugin),
        default=config.Plugin(name="hard"),
        help="JSON: kind and options",
    )
    parser.add_argument(
        "--pseudo-labels", type=Path, nargs="+", default=[], help="tables of clusters, by key"
    )
    parser.add_argument(
        "--features", type=Path, nargs="+", default=[], help="for kinds that need them"
    )
    parser.add_argument("--clusters", type=Path, nargs="+", default=[], help="one for each of them")
    parser.add_argument("--data-report", type=Path, required=True, help="holds mean and std")
    parser.add_argument(
        "--backbone",
        type=config.json_of(config.Plugin),
        required=True,
        help="JSON: name and options",
    )
    parser.add_argument(
        "--task", type=config.json_of(config.Plugin), required=True, help="JSON: name and options"
    )
    parser.add_argument(
        "--training",
        type=config.json_of(config.Training),
        required=True,
        help="JSON, all its values",
    )
    parser.add_argument("--epochs", type=int, required=True, help="passes, `effort` included")
    parser.add_argument(
        "--few-images",
        type=config.json_of(config.FewImages),
        help="JSON: more epochs for packs of fewer images",
    )
    parser.add_argument("--budget-of", type=Path, help="make as many steps as on this pack")
    parser.add_argument("--seed", type=int, required=True, help="of weights and draws")
    parser.add_argument(
        "--describe", type=config.json_object, default={}, help="fields of model.json"
    )
    parser.add_argument("--state", type=Path, help="folder of resume states")
    parser.add_argument("--processes", type=int, default=1, help="that share it, on each node")
    parser.add_argument("--nodes", type=int, default=1, help="that share it, of a Slurm job")
    parser.add_argument("--delivery-threads", type=int, help="that fill batches ahead")
    parser.add_argument("--output", type=Path, required=True, help="folder of the model")


def run(arguments: argparse.Namespace) -> None:
    """Trains and writes the model."""
    with step.importing():
        import torch

        from kt.core import amounts, images, model, parallel, resume, table, training
        from kt.core.network import Network
        from kt.pretext_train import (
            build_task,
            fingerprint,
            more_epochs,
            pool_context,
            progress_name,
            training_summary,
        )

    arguments.backbone = config.pinned(arguments.backbone)
    pack = images.read_pack(arguments.pack)
    labels, num_classes, transfer = what_to_learn(arguments, pack)
    usable = labels >= 0 if transfer is None else transfer.usable
    number = num_classes if transfer is None else transfer.outputs
    train, held_out = training.hold_out(pack)
    train, held_out = train[usable[train]], held_out[usable[held_out]]
    if len(train) < 2 or number < 2:
        raise DataError(
            f"{arguments.pack}: expected at least 2 labelled images of 2 classes, found "
            f"{len(train)} of {number}"
        )
    context = pool_context(pack, arguments.data_report, arguments.seed, labels, num_classes)
    context = dataclasses.replace(context, transfer=transfer)
    backbone = model.fresh(arguments.backbone, arguments.seed)
    backbone.mean, backbone.std = context.mean.clone(), context.std.clone()
    task = build_task(arguments.task, context)
    learned = images.layout(arguments.budget_of).shape[0] if arguments.budget_of else len(pack)
    epochs = more_epochs(arguments, learned)
    if arguments.budget_of:
        learned -= training.number_held_out(learned)
        batch = arguments.training.batch
        epochs = amounts.epochs_for(epochs * amounts.seen(learned, batch), len(train), batch)
    parents = [arguments.pack, *parents_of(arguments)]
    digests = [table.digest(path) for path in parents]
    torch.manual_seed(arguments.seed)  # the head's weights
    job = training.Job(
        Network(backbone, task), task, pack, train, held_out, arguments.training, epochs,
        arguments.seed, progress_name(arguments), arguments.output / "log.jsonl",
        resume.place(arguments.state, digests), {**fingerprint(arguments), "digests": digests},
        arguments.delivery_threads,
    )  # fmt: skip
    records = training.train(job)
    if parallel.rank():
        return  # the first process writes
    text = "".join(json.dumps(record) + "\n" for record in records)
    step.write_text(arguments.output / "log.jsonl", text)
    description = {
        **arguments.describe, "size": pack.size,
        "task": arguments.task.model_dump(), "training": training_summary(job),
        "transfer": None if arguments.labels else arguments.transfer.model_dump(),
        "num_labels": number,
        "provenance": step.provenance(dict(zip(map(str, parents), digests, strict=True))),
    }  # fmt: skip
    model.save(arguments.output, backbone, arguments.backbone, description)
    resume.finish(arguments.state, job.state)


def parents_of(arguments: argparse.Namespace) -> list[Path]:
    """Lists the tables that say what is to be learned."""
    true = [arguments.labels] if arguments.labels else []
    return [*true, *arguments.pseudo_labels, *arguments.features, *arguments.clusters]


def what_to_learn(arguments: argparse.Namespace, pack):
    """Reads true labels, or what teachers say, for the pack's images.

    Returns:
        (N,) int64 labels, all -1 where a kind of transfer has none; their number; the kind of
        transfer, None for true labels.

    Raises:
        ConfigError: Options that do not go together.
        DataError: Keys are missing, extra or repeated.
    """
    import torch

    from kt.core import images
    from kt.core.transfer import Taught
    from kt.pseudo_labels import read_pseudo_labels

    if arguments.labels:
        if len(parents_of(arguments)) > 1:
            raise ConfigError("--labels: goes with none of --pseudo-labels, --features, --clusters")
        true = images.read_labels(arguments.labels)
        return joined(true.labels, true.keys, pack, arguments.labels), len(true.classes), None
    name, given = arguments.transfer.name, arguments.transfer.options()
    module, options = config.plugin("transfers", name), config.options("transfers", name, given)
    taught = []
    if module.NEEDS == "labels":
        for path in arguments.pseudo_labels:
            labels, keys, number = read_pseudo_labels(path)
            taught.append(Taught(joined(labels, keys, pack, path), number))
    elif len(arguments.features) == len(arguments.clusters):
        pairs = zip(arguments.features, arguments.clusters, strict=True)
        taught = [described(*paths, pack) for paths in pairs]
    if not taught:
        wanted = (
            "--pseudo-labels" if module.NEEDS == "labels" else "as many --features as --clusters"
        )
        raise ConfigError(f"--transfer {name}: needs {wanted}")
    labels = taught[0].labels
    nothing = torch.full((len(pack),), -1) if labels is None else labels
    return nothing, taught[0].num_labels, module.build(options, taught, arguments.seed)


def joined(values, keys: list[str], pack, where: Path):
    """Puts the values (N, ...) of keys into the pack's order, as a tensor.

    Raises:
        DataError: Keys are missing, extra or repeated.
    """
    import torch

    from kt.core import images

    rows = images.rows_of(keys, pack.keys, str(where))
    if len(keys) != len(pack):
        raise DataError(f"{where}: {len(keys)} rows for {len(pack)} images of {pack.path}")
    return torch.from_numpy(values[rows])


def described(features: Path, clusters: Path, pack):
    """Reads what a teacher's layer says of the pack's images, after the clusters' transform."""
    import numpy as np
    import torch

    from kt import cluster
    from kt import features as tables
    from kt.core import blocks
    from kt.core.transfer import Taught

    centroids, sizes, transform = cluster.read_clusters(clusters)
    with tables.read(features) as found:
        rows = np.empty((len(found.keys), centroids.shape[1]), np.float32)
        for first, last in blocks.bounds(found.rows):
            rows[first:last] = cluster.project(found.rows[first:last], transform)
        keys = [key.decode() for key in found.keys[...].tolist()]
    return Taught(
        rows=joined(rows, keys, pack, features), centroids=torch.from_numpy(centroids[sizes > 0])
    )


if __name__ == "__main__":
    step.main(__doc__, add_arguments, run)
