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
import json
import shutil
from pathlib import Path

from kt import config
from kt.core import step
from kt.core.step import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--pack", type=Path, required=True, help="images to train on")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pseudo-labels", type=Path, help="table of clusters, by key")
    source.add_argument("--labels", type=Path, help="true labels: the supervised bound")
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
    parser.add_argument("--budget-of", type=Path, help="make as many steps as on this pack")
    parser.add_argument("--seed", type=int, required=True, help="of weights and draws")
    parser.add_argument("--describe", type=json.loads, default={}, help="fields of model.json")
    parser.add_argument("--state", type=Path, help="folder of resume states")
    parser.add_argument("--processes", type=int, default=1, help="that share the training")
    parser.add_argument("--delivery-threads", type=int, help="that fill batches ahead")
    parser.add_argument("--output", type=Path, required=True, help="folder of the model")


def run(arguments: argparse.Namespace) -> None:
    """Trains and writes the model."""
    with step.importing():
        import torch

        from kt.core import images, model, parallel, resume, table, training
        from kt.core.network import Network
        from kt.pretext_train import (
            build_task,
            fingerprint,
            pool_context,
            progress_name,
            training_summary,
        )

    pack = images.read_pack(arguments.pack)
    labels, num_classes = joined_labels(arguments, pack)
    train, held_out = training.hold_out(pack, 0.05, 1000)
    train, held_out = train[labels[train] >= 0], held_out[labels[held_out] >= 0]
    if len(train) < 2 or num_classes < 2:
        raise DataError(
            f"{arguments.pack}: expected at least 2 labelled images of 2 classes, found "
            f"{len(train)} of {num_classes}"
        )
    context = pool_context(pack, arguments.data_report, arguments.seed, labels, num_classes)
    backbone = model.fresh(arguments.backbone, arguments.seed)
    backbone.mean, backbone.std = context.mean.clone(), context.std.clone()
    task = build_task(arguments.task, context)
    epochs = arguments.epochs
    if arguments.budget_of:
        other = len(training.hold_out(images.read_pack(arguments.budget_of), 0.05, 1000)[0])
        epochs = max(1, round(epochs * other / len(train)))
    parent = arguments.labels or arguments.pseudo_labels
    digests = [table.digest(arguments.pack), table.digest(parent)]
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
    parents = dict(zip(map(str, (arguments.pack, parent)), digests, strict=True))
    description = {
        **arguments.describe, "size": pack.size,
        "task": arguments.task.model_dump(), "training": training_summary(job),
        "num_labels": num_classes, "provenance": step.provenance(parents),
    }  # fmt: skip
    model.save(arguments.output, backbone, arguments.backbone, description)
    if arguments.state:
        shutil.rmtree(arguments.state, ignore_errors=True)


def joined_labels(arguments: argparse.Namespace, pack):
    """Joins labels to the pack's images by key.

    Returns:
        (N,) int64 tensor in the pack's order, and the number of labels.

    Raises:
        DataError: Keys are missing, extra or repeated.
    """
    import torch

    from kt.core import images
    from kt.pseudo_labels import read_pseudo_labels

    if arguments.labels:
        true = images.read_labels(arguments.labels)
        labels, keys, number = true.labels, true.keys, len(true.classes)
    else:
        labels, keys, number = read_pseudo_labels(arguments.pseudo_labels)
    where = str(arguments.labels or arguments.pseudo_labels)
    rows = images.rows_of(keys, pack.keys, where)
    if len(keys) != len(pack):
        raise DataError(f"{where}: {len(keys)} labels for {len(pack)} images of {arguments.pack}")
    return torch.from_numpy(labels[rows]), number


if __name__ == "__main__":
    step.main(__doc__, add_arguments, run)
