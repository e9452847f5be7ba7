"""Trains a teacher on its pretext task (step a of the paper), or leaves its weights as they are.

They are random, or were trained elsewhere (`--weights`).

Reads a pack of unlabelled images; writes model.safetensors and model.json (the backbone alone, with
batch-norm statistics of whole images), log.jsonl, and examples.h5 with solved held-out puzzles.
By hand:

    python -m kt.pretext_train --pack results/data/fashion_mnist/train-unlabelled.h5 \
      --data-report results/data/fashion_mnist/report.json --output results/teachers/deep/s0 \
      --backbone '{"name": "residual", "widths": [32, 64], "strides": [1, 2], "blocks": 1}' \
      --task null --seed 0
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kt import config
from kt.core import step

STATISTICS_BATCH = 256  # of them at once, less of large ones
STATISTICS_IMAGES = 2048  # enough for batch-norm statistics of a few hundred channels
EXAMPLES = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--pack", type=Path, required=True, help="images to train on")
    parser.add_argument("--data-report", type=Path, required=True, help="holds mean and std")
    parser.add_argument(
        "--backbone",
        type=config.json_of(config.Plugin),
        required=True,
        help="JSON: name and options",
    )
    parser.add_argument("--task", type=_task, required=True, help="null: no training")
    parser.add_argument("--weights", type=_weights, help="JSON: from where; null: random")
    parser.add_argument("--training", type=_training, help="JSON; null where there is no task")
    parser.add_argument("--epochs", type=int, default=0, help="passes, `effort` included")
    parser.add_argument(
        "--few-images",
        type=config.json_of(config.FewImages),
        help="JSON: more epochs for packs of fewer images",
    )
    parser.add_argument(
        "--budget", type=json.loads, default=[], help="trainings whose summed cost sets the epochs"
    )
    parser.add_argument("--seed", type=int, required=True, help="of weights and draws")
    parser.add_argument(
        "--describe", type=config.json_object, default={}, help="fields of model.json"
    )
    parser.add_argument("--state", type=Path, help="folder of resume states")
    parser.add_argument("--processes", type=int, default=1, help="that share it, on each node")
    parser.add_argument("--nodes", type=int, default=1, help="that share it, of a Slurm job")
    parser.add_argument("--delivery-threads", type=int, help="that fill batches ahead")
    parser.add_argument("--output", type=Path, required=True, help="folder of the model")


def _task(text: str):
    return None if text == "null" else config.json_of(config.Plugin)(text)


def _training(text: str):
    return None if text == "null" else config.json_of(config.Training)(text)


def _weights(text: str):
    return None if text == "null" else config.json_of(config.Weights)(text)


def run(arguments: argparse.Namespace) -> None:
    """Trains, re-estimates the batch-norm statistics on whole images, and writes the model."""
    with step.importing():
        import torch

        from kt.core import backbone as backbones
        from kt.core import foreign, images, model, parallel, resume, training

    arguments.backbone = config.pinned(arguments.backbone)
    if arguments.task and not (arguments.training and (arguments.epochs > 0 or arguments.budget)):
        raise step.ConfigError("--task: needs --training, and --epochs of at least 1 or a --budget")
    pack = images.read_pack(arguments.pack)
    train, held_out = training.hold_out(pack)
    backbone = model.fresh(arguments.backbone, arguments.seed)
    context = pool_context(pack, arguments.data_report, arguments.seed)
    if arguments.backbone.name != "hog":  # a descriptor takes pixels as they are
        backbone.mean, backbone.std = context.mean.clone(), context.std.clone()
    description = {**arguments.describe, "size": pack.size}
    if arguments.weights:
        description["weights"] = foreign.load(backbone, arguments.backbone, arguments.weights)
    records, examples = [], None
    if arguments.task:
        came = description.get("weights")
        job = _job(arguments, backbone, context, pack, train, held_out, came)
        records = training.train(job)
    if parallel.rank():
        return  # the first process writes
    if arguments.task:
        examples = solved_puzzles(job) if hasattr(job.task, "tiles") else None
        description["task"] = arguments.task.model_dump()
        description["num_labels"] = job.task.num_classes
        description["training"] = training_summary(job)
    number = min(len(train), STATISTICS_IMAGES)
    chosen = train[torch.linspace(0, len(train) - 1, number, dtype=torch.float64).long()]
    # Statistics that came with the weights are those of the network; nobody trained it here.
    as_it_is = arguments.weights and not arguments.task
    if not as_it_is and (not arguments.task or not job.task.whole_images):
        at_once = min(STATISTICS_BATCH, pack.at_once)
        backbones.estimate_statistics(backbone, training.pack_batches(pack, chosen, at_once))
    _write(arguments, backbone, description, records, examples)
    if arguments.task:
        resume.finish(arguments.state, job.state)


def _job(arguments, backbone, context, pack, train, held_out, weights: dict | None):
    import torch

    from kt.core import resume, table, training
    from kt.core.network import Network, multiply_adds

    task = build_task(arguments.task, context)
    digest = table.digest(arguments.pack)
    digests = [digest, *([weights["digest"]] if weights and "digest" in weights else [])]
    torch.manual_seed(arguments.seed)  # the head's weights
    network = Network(backbone, task)
    job = training.Job(
        network, task, pack, train, held_out, arguments.training, more_epochs(arguments, len(pack)),
        arguments.seed, progress_name(arguments), arguments.output / "log.jsonl",
        resume.place(arguments.state, digests),
        {**fingerprint(arguments), "digest": digest, "weights": weights},
        arguments.delivery_threads,
    )  # fmt: skip
    if arguments.budget:
        cost = sum(map(_cost, arguments.budget))
        job.epochs = max(1, round(cost / multiply_adds(network, task) / len(train)))
        step.log.info("%s: the summed multiply-adds buy %d epochs", job.name, job.epochs)
    return job


def more_epochs(arguments: argparse.Namespace, images: int) -> int:
    """Gives the epochs on a pack of so many images, raised if it is small and the option is on."""
    few = arguments.few_images
    return few.epochs(arguments.epochs, images) if few else arguments.epochs


def _cost(part: dict) -> float:
    """Gives the multiply-adds of another training's forward passes.

    Args:
        part: Its backbone, task, num_classes, epochs, few_images and pack.
    """
    import torch

    from kt.core import images, model, training
    from kt.core.network import Network, multiply_adds
    from kt.core.task import Context

    number, *_, size = images.layout(Path(part["pack"])).shape
    ids = torch.arange(2)
    context = Context(size, ids, torch.zeros(3), torch.ones(3), 0, ids * 0, part["num_classes"])
    task = build_task(config.check(config.Plugin, part["task"]), context)
    backbone = model.fresh(config.check(config.Plugin, part["backbone"]), 0)
    epochs = config.check(config.FewImages, part["few_images"]).epochs(part["epochs"], number)
    learned = number - training.number_held_out(number)
    return multiply_adds(Network(backbone, task), task) * epochs * learned


def build_task(plugin: config.Plugin, context):
    """Builds a task from its name and options."""
    module = config.plugin("tasks", plugin.name)
    return module.build(config.options("tasks", plugin.name, plugin.options(), "task"), context)


def pool_context(pack, data_report: Path, seed: int, labels=None, num_classes: int = 0):
    """Gives what a task is built with, for a pack and the channel statistics of its data set."""
    import torch

    from kt.core.order import block_of
    from kt.core.task import Context

    report = step.read_json(data_report)
    mean, std = (torch.tensor(report[key], dtype=torch.float32) for key in ("mean", "std"))
    ids = torch.from_numpy(pack.ids)
    std, block = std.clamp(min=1e-3), block_of(pack.images)
    return Context(pack.size, ids, mean, std, seed, labels, num_classes, block)


def progress_name(arguments: argparse.Namespace) -> str:
    """Gives what progress lines call a training: the model's name and seed."""
    described = arguments.describe
    return f"{described.get('name', arguments.output)} s{described.get('seed', arguments.seed)}"


def fingerprint(arguments: argparse.Namespace) -> dict:
    """Gives the settings that a resume state must share."""
    ignored = (
        "log",
        "threads",
        "processes",
        "nodes",
        "delivery_threads",
        "output",
        "state",
        "describe",
    )
    return {key: value for key, value in vars(arguments).items() if key not in ignored}


def training_summary(job) -> dict:
    """Gives what model.json says of a training: settings, images, cost, device."""
    from kt.core import parallel
    from kt.core.network import multiply_adds

    return {
        **job.settings.model_dump(),
        "epochs": job.epochs,
        "images": len(job.train),
        "multiply_adds": multiply_adds(job.network, job.task),
        "processes": parallel.size(),
        "computed_in": str(job.computed_in),
        "device": str(job.network.backbone.mean.device),
    }


def solved_puzzles(job) -> dict:
    """Lets the network solve held-out puzzles: tiles as shown, permutations, labels, answers."""
    import torch

    from kt.core import delivery

    task, index = job.task, job.held_out[:EXAMPLES]
    if not len(index):
        index = job.train[:EXAMPLES]
    where = next(job.network.parameters()).device
    plan = task.plan(index, -1)
    rows = plan["rows"]
    images = torch.from_numpy(job.pack.images[rows.flatten().numpy()]).unflatten(0, rows.shape)
    tiles = task.tiles(images, plan)
    with torch.no_grad():
        views, labels = delivery.load_batch(task, job.pack, index, -1, where)
        predicted = job.network.eval()(views).argmax(1)
    return {
        "tiles": tiles.clamp(0, 255).round().byte().numpy(),
        "permutations": task.permutations.byte().numpy(),
        "labels": labels.cpu().numpy(),
        "predicted": predicted.cpu().numpy(),
        "replaced": plan["source"].bool().numpy(),
    }


def _write(arguments, backbone, description: dict, records: list, examples: dict | None) -> None:
    import numpy as np

    from kt.core import model, table

    parents = {str(arguments.pack): table.digest(arguments.pack)}
    if "digest" in description.get("weights", {}):
        parents[arguments.weights.path] = description["weights"]["digest"]
    description["provenance"] = step.provenance(parents)
    text = "".join(json.dumps(record) + "\n" for record in records)
    step.write_text(arguments.output / "log.jsonl", text)
    with table.create(arguments.output / "examples.h5", "puzzles", {}, [arguments.pack]) as file:
        for name, array in (examples or {"tiles": np.zeros((0, 9, 3, 1, 1), np.uint8)}).items():
            table.put(file, name, array)
    model.save(arguments.output, backbone, arguments.backbone, description)


if __name__ == "__main__":
    step.main(__doc__, add_arguments, run)
