"""Training and extraction through the product against the same network's bare loops."""

from __future__ import annotations

import copy
import itertools
import shutil

import torch
from torch.nn import functional

from bench import drawn, product
from bench.measure import Measured, Run, alternate, seconds, speeds, worst

SECONDS = 1.5  # that a bare training should last
READY = 8  # batches that stand ready, taken in turn
IMAGES = {"cpu": 1024, "cuda": 8192}  # of an epoch
EXTRACTED = {28: 8192, 64: 2048}  # size: images
BATCH = 256


def train_of_bare(run: Run) -> Measured:
    """Compares `training.train` with the bare loop: pretext and target, 28 and 64 px.

    On one core, which is what each of two trainings side by side has in a run on two; the threads
    of the product share it.
    """
    torch.set_num_threads(run.cores)
    kinds = itertools.product(("pretext", "target"), (28, 64))
    return worst({f"{kind} {size} px": _trained(run, kind, size) for kind, size in kinds})


def train_of_bare_cuda(run: Run) -> Measured:
    """The same on a GPU, at 64 px."""
    return worst({f"{kind} 64 px": _trained(run, kind, 64) for kind in ("pretext", "target")})


def _pack(run: Run, size: int, number: int):
    path = run.scratch / f"training-{size}-{number}.h5"
    if not path.exists():
        product.write_pack(path, drawn.images(number, size), drawn.keys(number))
    return product.read_pack(path)


def _trained(run: Run, kind: str, size: int) -> Measured:
    where = product.device()
    pack = _pack(run, size, IMAGES[where.type])
    task, network, values = product.network(kind, pack)
    precision = product.precision(values, where)
    bare = copy.deepcopy(network).to(where, memory_format=torch.channels_last)
    ready = []
    for first in range(0, READY * values.batch, values.batch):
        index = torch.arange(first, first + values.batch) % len(pack)
        views, labels = product.puzzles(task, pack, index, 0)
        ready.append((views.to(where), labels.to(where)))
    bare_loop(bare, ready, 3, values, precision)
    steps = SECONDS / seconds(lambda: bare_loop(bare, ready, 10, values, precision)) * 10
    in_an_epoch = len(pack) // values.batch
    epochs = max(1, round(steps / in_an_epoch))
    folder = run.folder(f"{kind}-{size}")

    def ours():
        shutil.rmtree(folder)
        folder.mkdir()
        product.train(task, network, pack, values, epochs, folder)

    pairs = alternate(
        ours, lambda: bare_loop(bare, ready, epochs * in_an_epoch, values, precision), run.rounds
    )
    about = f"{epochs * in_an_epoch} steps of {values.batch}, {precision} on {where.type}"
    return Measured(speeds(pairs), f"bare loop, torch {torch.__version__}", pairs, {"about": about})


def bare_loop(network, ready: list, steps: int, values, precision: torch.dtype) -> None:
    """Trains on batches that are there, with torch's own fused optimiser and nothing else."""
    network.train()
    where = ready[0][0].device.type
    optimiser = torch.optim.AdamW(
        network.parameters(), values.lr, weight_decay=values.weight_decay, fused=True
    )
    for number in range(steps):
        views, labels = ready[number % len(ready)]
        with torch.autocast(where, precision, enabled=precision != torch.float32):
            logits = network(views)
        functional.cross_entropy(logits.float(), labels).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    if where == "cuda":
        torch.cuda.synchronize()


def extract_of_bare(run: Run) -> Measured:
    """Compares `kt.features` in this process with the bare channels_last loop."""
    torch.set_num_threads(run.cores)
    return worst({f"{size} px": _extracted(run, size, EXTRACTED[size]) for size in EXTRACTED})


def _extracted(run: Run, size: int, number: int) -> Measured:
    pack = _pack(run, size, number)
    plugin = product.settings(size).teachers["deep"].backbone
    model = product.write_model(run.folder(f"model-{size}"), plugin, size)
    backbone = product.load_model(model).to(memory_format=torch.channels_last)
    pixels = torch.from_numpy(pack.images[...].copy())
    scale = torch.full((3, 1, 1), 1 / 255)

    @torch.inference_mode()
    def floor():
        for batch in pixels.split(BATCH):
            images = batch.contiguous(memory_format=torch.channels_last)
            backbone(images * scale).float().mean((2, 3))

    def ours():
        product.extract(model, backbone.layers[-1], pack.path, run.scratch / "features.h5")

    pairs = alternate(ours, floor, run.rounds)
    about = f"{number} images of {size} px, float32"
    return Measured(speeds(pairs), f"bare loop, torch {torch.__version__}", pairs, {"about": about})
