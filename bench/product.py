"""Everything that the benchmark asks of kt, one small function for each; nothing is measured here.

Steps are called as their rules call them: `run(arguments)` in this process where start-up is left
out, `command(...)` where it counts. torch is imported only where it is needed.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kt import config
from kt.core import files, images, table

ROOT = Path(__file__).parent.parent
# What `kt.pretext_train`, the heaviest step, says when all is imported and its first step is due.
FIRST_LINE_OF_WORK = "images, 1 epochs"
# Plain k-means on all rows, as bare faiss does it; options not named here are the default run's.
PLAIN_KMEANS = {
    "centre": False, "pca": None, "whiten": False, "l2": False, "spherical": False, "redo": 1,
}  # fmt: skip


@functools.cache  # a step reads its configuration once, too
def settings(size: int) -> config.Config:
    """Gives the default run's settings at 28 px, those of photographs at other sizes."""
    return config.resolve(ROOT, {} if size == 28 else {"images": "photos"})


def clustering(iterations: int) -> config.Clustering:
    """Gives the settings of plain k-means."""
    return settings(28).clustering.model_copy(update={**PLAIN_KMEANS, "iterations": iterations})


# ---------------------------------------------------------------------------- artefacts


def write_pack(path: Path, pixels: np.ndarray, keys: list[str]) -> Path:
    """Writes a pack as ingest does."""
    with table.create(path, "images", {}) as file:
        table.add(file, "images", pixels.shape, np.uint8, contiguous=True)[...] = pixels
        table.put_strings(file, "keys", keys)
    return path


def read_pack(path: Path) -> images.Pack:
    """Opens a pack as the steps do: a memory map."""
    return images.read_pack(path)


def write_features(path: Path, features: np.ndarray, keys: list[str], block: int = 256) -> Path:
    """Writes a table of features block by block, as `kt.features` does."""
    with table.create(path, "features", {}) as file:
        table.put_strings(file, "keys", keys)
        column = table.Column(file, "features", features.shape, np.float32)
        for first in range(0, len(features), block):
            column.append(features[first : first + block])
    return path


def sampled(number: int, count: int) -> np.ndarray:
    """Gives the rows that clustering draws of so many, (count,) int64, ascending."""
    from kt import cluster as stage

    return stage.sample(number, 1, count, 0)


def sample_features(path: Path, count: int) -> np.ndarray:
    """Reads those rows of a table of features as clustering does, (count, D) float32."""
    from kt import cluster as stage
    from kt import features

    values = clustering(1).model_copy(update={"sample": 1})
    with features.read(path) as found:
        same = stage.Transform(np.zeros(found.rows.shape[1], np.float32), None, False)
        return stage.training_rows(found.rows, same, values, count, 0, path)


def write_model(folder: Path, plugin: config.Plugin, size: int) -> Path:
    """Writes a network with fresh weights."""
    from kt.core import model

    model.save(folder, model.fresh(plugin, 0), plugin, {"size": size})
    return folder


def load_model(folder: Path):
    """Loads a network for use."""
    import kt

    return kt.load_backbone(folder)


def tiny_backbone() -> config.Plugin:
    """Gives the smallest network that does something; its layer is `conv1`."""
    return config.Plugin(name="plain", widths=[8], strides=[2])


# ---------------------------------------------------------------------------- puzzles and training


def context(pack: images.Pack, labels=None, num_classes: int = 0):
    """Gives what a task is built with."""
    import torch

    from kt.core.task import Context

    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.25)
    ids = torch.from_numpy(pack.ids)
    return Context(pack.size, ids, mean, std, 0, labels, num_classes)


def jigsaw(pack: images.Pack):
    """Builds the default run's puzzle for a pack."""
    from kt.core import hardware  # noqa: F401 - sets the heap up, as in each training
    from kt.pretext_train import build_task

    return build_task(settings(28).teachers["deep"].task, context(pack))


def puzzles(task, pack: images.Pack, index, epoch: int):
    """Gives tiles (B, 9, 3, t, t) float32 and labels (B,) of rows (B,), as the training does."""
    import torch

    from kt.core import delivery

    return delivery.load_batch(task, pack, index, epoch, torch.device("cpu"))


def deliver(task, pack: images.Pack, batch: int, epoch: int) -> Iterator:
    """Gives all batches of an epoch ready for the step, by as many threads as the training takes.

    Yields:
        (B, 9, 3, t, t) float32 and (B,) int64.
    """
    import torch

    from kt.core import delivery, hardware

    where = torch.device("cpu")
    order = task.order(torch.arange(len(pack)), epoch)[: len(pack) // batch * batch]
    threads = hardware.delivery_threads(where)
    for _, views, labels in delivery.batches(task, pack, order, batch, epoch, where, threads):
        yield views, labels


def network(kind: str, pack: images.Pack):
    """Gives task, network and training settings of the teacher or the target.

    Args:
        kind: `pretext` or `target`.
        pack: Its size decides which run's settings are taken.
    """
    import torch

    from kt.core import model
    from kt.core.network import Network
    from kt.pretext_train import build_task

    chosen = settings(pack.size)
    part = chosen.teachers["deep"] if kind == "pretext" else chosen.targets["small"]
    labels = torch.arange(len(pack)) % 100
    about = context(pack) if kind == "pretext" else context(pack, labels, 100)
    task = build_task(part.task, about)
    torch.manual_seed(0)
    return task, Network(model.fresh(part.backbone, 0), task), part.training


def train(task, net, pack: images.Pack, values: config.Training, epochs: int, folder: Path) -> None:
    """Trains as the steps do, with a log and a place for resume states."""
    import torch

    from kt.core import training

    rows = torch.arange(len(pack))
    training.train(
        training.Job(
            net,
            task,
            pack,
            rows,
            rows[:0],
            values,
            epochs,
            0,
            "bench",
            log=folder / "log.jsonl",
            state=folder / "state",
        )  # fmt: skip
    )


def device():
    """Gives where a training runs."""
    from kt.core import hardware

    return hardware.device()


def precision(values: config.Training, where):
    """Gives the type that a training computes in."""
    from kt.core import hardware

    return hardware.precision(values.precision, where)


# ---------------------------------------------------------------------------- steps in this process


def hurry() -> None:
    """Loads what ingest loads for a set of some thousand photographs or more."""
    from kt.core import decode

    decode.hurry()


def decode(payload: bytes, size: int) -> np.ndarray:
    """Gives packed pixels (3, S, S) uint8 of a file's bytes, as ingest does."""
    from kt.core.decode import decode as decoded

    return decoded(payload, size, 10**8).pixels


def extract(model: Path, layer: str, pack: Path, output: Path) -> None:
    """Runs `kt.features`."""
    from kt import features
    from kt.core.parts import WHOLE

    features.run(
        argparse.Namespace(
            model=model,
            layer=layer,
            map=1,
            pool="mean",
            mirror=False,
            choice=None,
            given=None,
            keys=None,
            pack=pack,
            part=WHOLE,
            parts=[],
            output=output,
            threads=None,
        )  # fmt: skip
    )


def cluster(features: Path, k: int, iterations: int, output: Path) -> None:
    """Runs `kt.cluster`."""
    from kt import cluster as stage

    values = clustering(iterations)
    stage.run(
        argparse.Namespace(
            features=features,
            k=str(k),
            layer="",
            lower=False,
            choice=None,
            settings=values,
            memory_mb=None,
            seed=0,
            output=output,
            threads=None,
        )  # fmt: skip
    )


def assign(features: Path, clusters: Path, output: Path) -> None:
    """Runs `kt.pseudo_labels`."""
    from kt import pseudo_labels
    from kt.core.parts import WHOLE

    pseudo_labels.run(
        argparse.Namespace(
            features=features,
            clusters=clusters,
            describe={},
            part=WHOLE,
            parts=[],
            output=output,
            threads=None,
        )  # fmt: skip
    )


# ---------------------------------------------------------------------------- steps as processes


def command(name: str, **options) -> list[str]:
    """Gives the command line of a step: `python -m kt.NAME --option value`."""
    parts = [sys.executable, "-m", f"kt.{name}"]
    for option, value in options.items():
        parts += [f"--{option.replace('_', '-')}", str(value)]
    return parts


def ingest_command(archive: Path, size: int, output: Path, threads: int) -> list[str]:
    """Gives the command that packs an archive."""
    given = {"path": str(archive), "size": size, "unlabelled": None}
    dataset = config.dumps(settings(64).datasets["images"].model_copy(update=given))
    return command("ingest", dataset=dataset, seed=0, output=output, threads=threads)


def pretext_command(pack: Path, report: Path, output: Path, threads: int) -> list[str]:
    """Gives the command that trains the default run's teacher for one epoch.

    Args:
        pack: Images.
        report: Where a data report with mean and standard deviation is written.
        output: Folder of the model.
        threads: CPU threads.
    """
    part = settings(28).teachers["deep"]
    files.write_json(report, {"mean": [0.5] * 3, "std": [0.25] * 3})
    values = {name: config.dumps(getattr(part, name)) for name in ("backbone", "task", "training")}
    return command(
        "pretext_train", pack=pack, data_report=report, epochs=1, seed=0, output=output,
        threads=threads, **values,
    )  # fmt: skip


def cluster_command(
    features: Path, k: int, iterations: int, output: Path, threads: int, memory_mb: int = 2000
) -> list[str]:
    """Gives the command that clusters; features beyond `memory_mb` stay in a file."""
    values = clustering(iterations).model_copy(update={"memory_mb": memory_mb})
    return command(
        "cluster", features=features, k=k, settings=config.dumps(values), seed=0, output=output,
        threads=threads,
    )  # fmt: skip


def features_command(model: Path, layer: str, pack: Path, output: Path, threads: int) -> list[str]:
    """Gives the command that extracts features."""
    return command(
        "features", model=model, layer=layer, map=1, pack=pack, output=output, threads=threads
    )


def assign_command(features: Path, clusters: Path, output: Path) -> list[str]:
    """Gives the command that labels."""
    return command("pseudo_labels", features=features, clusters=clusters, output=output, threads=1)


def snakemake(folder: Path, *options: str, cores: int, overlay: Path | None, **values) -> list[str]:
    """Gives the command that runs the workflow with its own profile.

    Args:
        folder: Results go below it.
        *options: Targets, or more of Snakemake's options.
        cores: How many it may use.
        overlay: A file over config.yaml, or None.
        **values: For `--config`.
    """
    config_file = ["--configfile", str(overlay)] if overlay else []
    given = [f"{key}={value}" for key, value in values.items()]
    return [
        sys.executable, "-m", "snakemake", *options, "--cores", str(cores),
        "--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder), *config_file,
        *(["--config", *given] if given else []),
    ]  # fmt: skip
