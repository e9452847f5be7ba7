"""Training on pictures of all sizes with boxes or masks, for the evaluations on PASCAL VOC.

Beside the one loop for packed images (`kt/core/training.py`), which cuts equal views from a pack
and counts right labels: here a picture is read from its file, and the loss is the network's own.
Chance is a function of seed, epoch and picture here as there, and a stopped training goes on
exactly where it was.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kt.config import Schedule
from kt.core import draws, hardware, images, judge, lock, resume, step, training
from kt.core.backbone import Backbone, average
from kt.core.ending import Flag
from kt.core.optimiser import Optimiser
from kt.core.step import ConfigError, DataError, Interrupted

PLACED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)  # parts that decide where a map's cells lie
LARGEST = 128  # stride of a map, pixels; the map of fully connected layers is one cell


def strides(backbone: Backbone, layers: Sequence[str]) -> dict[str, float]:
    """Gives the pixels from one cell of each layer's map to the next."""
    small, large = (backbone.map_shapes(size, layers) for size in (256, 512))
    return {name: 256 / max(large[name][1] - small[name][1], 1) for name in layers}


def stride(backbone: Backbone, layer: str) -> float:
    """Gives the pixels from one cell of a layer's map to the next."""
    return strides(backbone, [layer])[layer]


def first_centre(backbone: Backbone, layer: str) -> float:
    """Gives the pixel, from 0, in whose middle lies the middle of what a layer's first cell sees.

    Without padding a map begins well inside the picture: at pixel 17 in this project's AlexNet,
    which a box or a mask of a whole cell would miss. Convolutions and poolings are followed where
    they stand in a row; branches move nothing where they are padded by half of what they see, as
    residual blocks are. Of anything else cells are taken to tile the picture (ours).
    """
    centre, jump = 0.0, 1.0
    apart = strides(backbone, backbone.layers[: backbone.layers.index(layer) + 1])
    for name, stage in backbone.up_to(layer).items():
        for part in _row(stage):
            moves = [_moved(one) for one in part.modules() if isinstance(one, PLACED)]
            if isinstance(part, PLACED):
                centre += moves[0] * jump
                jump *= _first(part.stride)
            elif any(moves):
                return (apart[layer] - 1) / 2
        jump = apart[name if name in apart else layer]
    return centre


def _row(stage: nn.Module) -> list[nn.Module]:
    """Gives the parts of a stage in the order of computation."""
    if isinstance(stage, nn.Sequential):
        return [part for one in stage for part in _row(one)]
    return [stage]


def _moved(part: nn.Module) -> float:
    """Gives how far a part's first cell lies from its input's, in cells of the input."""
    half = _first(getattr(part, "dilation", 1)) * (_first(part.kernel_size) - 1) / 2
    named = {"same": half, "valid": 0}
    return half - (named[part.padding] if part.padding in named else _first(part.padding))


def _first(value: int | tuple[int, ...]) -> int:
    return value[0] if isinstance(value, tuple) else value


class Trunk(nn.Module):
    """A copy of a backbone up to a layer, to be trained on.

    Batch norms keep the statistics that they came with: those of a few pictures are too noisy, as
    is usual in detection. The trunk alone is computed in the type of `Schedule.precision`.
    """

    def __init__(self, backbone: Backbone, layer: str | None, size: int, settings: Schedule):
        """Takes pictures of `size` pixels to learn the numbers of channels.

        Raises:
            ConfigError: There is no such layer, or the pictures are too small.
        """
        super().__init__()
        last = backbone.check_layer(layer)
        kept = backbone.layers[: backbone.layers.index(last) + 1]
        self.channels = {name: backbone.map_shape(size, name)[0] for name in kept}
        self.out_channels = self.channels[last]
        self.layers = kept
        self.before = 0  # pixels of the mean colour that stand above and left of a picture
        self.backbone = Backbone(copy.deepcopy(backbone.up_to(last)))
        self.backbone.mean.copy_(backbone.mean)
        self.backbone.std.copy_(backbone.std)
        self.dtype = hardware.precision(settings.precision, hardware.device())

    def forward(self, pictures: Tensor) -> Tensor:
        """Maps normalised pictures (B, 3, H, W) to the last map (B, M, h, w) float32."""
        if self.before:
            pictures = functional.pad(pictures, (self.before, 0, self.before, 0))
        return self.maps(pictures, self.layers[-1:])[self.layers[-1]]

    def maps(self, pictures: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Gives the maps of several layers, float32."""
        half = self.dtype != torch.float32
        with torch.autocast(pictures.device.type, self.dtype, enabled=half):
            found = self.backbone.maps(pictures, layers)
        return {name: maps.float() for name, maps in found.items()}

    def train(self, mode: bool = True) -> Trunk:
        """Switches between training and use; batch norms stay as in use."""
        super().train(mode)
        for part in self.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()
        return self


class Classifier(nn.Module):
    """A trunk under one linear layer on its pooled map."""

    def __init__(self, trunk: Trunk, edge: int, size: int, num_classes: int):
        """Pools the map to at most edge x edge for pictures of `size` pixels."""
        super().__init__()
        self.trunk, self.edge = trunk, edge
        channels, height, width = trunk.backbone.map_shape(size)
        self.head = nn.Linear(channels * min(height, edge) * min(width, edge), num_classes)

    def forward(self, pictures: Tensor) -> Tensor:
        """Maps normalised pictures (B, 3, S, S) to scores (B, C) float32."""
        maps = self.trunk(pictures)
        edges = [min(side, self.edge) for side in maps.shape[-2:]]
        return self.head(average(maps, edges).flatten(1))


class FCN(nn.Module):
    """A fully convolutional network (Long et al., CVPR 2015).

    A 1x1 convolution scores each place of the last map; scores are enlarged bilinearly, each cell's
    from the middle of what it sees, on their way to the picture's size those of earlier layers are
    added (FCN-16s, FCN-8s), which begin as zeros.
    """

    def __init__(self, trunk: Trunk, skips: Sequence[str], num_classes: int):
        """Takes the layers to add, in any order.

        Raises:
            ConfigError: The trunk has no such layer, or its last map is one cell at any size.
        """
        super().__init__()
        self.trunk, self.num_classes, order = trunk, num_classes, trunk.layers
        self.last = order[-1]
        found = {trunk.backbone.check_layer(name) for name in skips} - {self.last}
        self.skips = sorted(found, key=order.index, reverse=True)
        self.cells = {
            name: (first_centre(trunk.backbone, name), stride(trunk.backbone, name))
            for name in (self.last, *self.skips)
        }
        if self.cells[self.last][1] > LARGEST:
            raise ConfigError(
                f"layer: expected one whose map grows with the picture, that of {self.last} does "
                f"not; take another of {', '.join(order[:-1])}"
            )
        self.heads = nn.ModuleDict(
            {n: nn.Conv2d(trunk.channels[n], num_classes, 1) for n in (self.last, *self.skips)}
        )
        for name in self.skips:
            nn.init.zeros_(self.heads[name].weight)
            nn.init.zeros_(self.heads[name].bias)

    def forward(self, pictures: Tensor) -> Tensor:
        """Maps normalised pictures (B, 3, H, W) to scores (B, C, H, W) float32."""
        maps = self.trunk.maps(pictures, [self.last, *self.skips])
        scores, cells = self.heads[self.last](maps[self.last]), self.cells[self.last]
        for name in self.skips:
            finer = self.heads[name](maps[name])
            scores = enlarged(scores, cells, finer.shape[-2:], self.cells[name]) + finer
            cells = self.cells[name]
        return enlarged(scores, cells, pictures.shape[-2:], (0.0, 1.0))


def enlarged(scores: Tensor, cells, size: Sequence[int], finer) -> Tensor:
    """Reads scores (B, C, h, w) bilinearly at a finer grid's cells; beyond the border as there.

    Two products, since their backward pass is deterministic everywhere.

    Args:
        scores: Of a grid.
        cells: The pixel of its first cell's middle, and the pixels from one cell to the next.
        size: (H, W) of the finer grid.
        finer: The same of its cells.

    Returns:
        (B, C, H, W).
    """
    rows, columns = (
        _read_at(number, side, cells, finer, scores.device).to(scores.dtype)
        for number, side in zip(size, scores.shape[-2:], strict=True)
    )
    return rows @ scores @ columns.T


def _read_at(number: int, side: int, cells, finer, where: torch.device) -> Tensor:
    """Gives what each of `side` cells adds to each of `number` places, (number, side) float32."""
    given, read = (torch.arange(one, device=where) for one in (side, number))
    places = ((finer[0] + read * finer[1] - cells[0]) / cells[1]).clamp(0, side - 1)
    return (1 - (places[:, None] - given).abs()).clamp(min=0)


@dataclasses.dataclass
class Job:
    """One training.

    Attributes:
        network: What is trained, in place.
        names: Of the N pictures.
        load: From row and epoch to a picture; on threads, so from files and draws alone.
        loss: From a list of what it gives to the loss, in training mode, on the network's device.
        settings: From the config.
        seed: Of order, draws and dropout.
        name: For progress lines.
        state: Folder for resume states, or None.
        fingerprint: Settings that a resume state must share.
    """

    network: nn.Module
    names: Sequence[str]
    load: Callable[[int, int], Any]
    loss: Callable[[list], Tensor]
    settings: Schedule
    seed: int
    name: str
    state: Path | None
    fingerprint: dict

    def __post_init__(self):
        """Hashes the names, once; the order is that of the epoch under way."""
        self.ids = torch.from_numpy(images.key_ids(list(self.names)))
        self.order: Tensor | None = None


def train(job: Job) -> nn.Module:
    """Trains the network; gives it on its device, ready for use.

    Raises:
        DataError: The loss is not finite; step and pictures are named.
        Interrupted: A signal came; the resume state is written.
    """
    where, settings = hardware.device(), job.settings
    network = job.network.to(where).train()
    hardware.set_up(where, settings.deterministic)
    torch.backends.cudnn.benchmark = False  # of each new size of picture it would time anew
    optimiser = Optimiser(network, settings, hardware.precision(settings.precision, where))
    batch = min(settings.batch, len(job.names))
    per_epoch = len(job.names) // batch
    total = per_epoch * settings.epochs
    kept = None if job.state is None else lock.claim(job.state)  # as long as the name lives
    first = _resume(job, optimiser, where)
    writer = resume.Writer(job.state, job.fingerprint, network)
    generator = hardware.generator(where)
    progress = step.Progress(job.name, total * batch, "img", first * batch)
    step.detail(
        "%s: %d pictures, %d steps of %d on %s", job.name, len(job.names), total, batch, where
    )
    threads = max(1, hardware.delivery_threads(where))
    try:
        with Flag() as stop, ThreadPoolExecutor(threads, "load") as pool:
            ahead = _begun(job, first, per_epoch, batch, pool) if first < total else None
            for number in range(first, total):
                rows, content = ahead[0], [one.result() for one in ahead[1]]
                if number + 1 < total:
                    ahead = _begun(job, number + 1, per_epoch, batch, pool)
                generator.manual_seed(training._step_seed(job.seed, number))
                loss = job.loss(content)
                value = float(loss.detach())  # read once: it waits for a GPU
                _check_finite(job, value, number + 1, rows)
                optimiser.scaled(loss).backward()
                optimiser.step(settings.lr * training.rate(number, total, settings))
                progress.add(batch, f"loss {value:.3f}")
                if stop.is_set() or writer.due():
                    _save(writer, job, optimiser, number + 1)
                if stop.is_set():
                    raise Interrupted(f"{job.name}: stopped at step {number + 1}; run it again")
    finally:
        writer.close()
        if kept:
            kept.close()
    progress.close()
    return network.eval()


def fingerprint(backbone: Backbone, options, names: Sequence[str], seed: int) -> dict:
    """Gives what a resume state must share with whoever goes on."""
    listed = hashlib.sha256("\n".join(names).encode()).hexdigest()
    digest = judge.weights_digest(backbone)
    return {"network": digest, "options": options, "pictures": listed, "seed": seed}


def chances(names: Sequence[str], seed: int, epoch: int, count: int) -> Tensor:
    """Draws (B, count) float32 in [0, 1) for pictures in an epoch, by seed and name alone."""
    ids = torch.from_numpy(images.key_ids(list(names)))
    return draws.uniform(seed, "voc views", epoch, ids, count)


def _begun(
    job: Job, number: int, per_epoch: int, batch: int, pool: ThreadPoolExecutor
) -> tuple[list[int], list[Future]]:
    """Begins to read the pictures of a step; an epoch's order depends on seed and names alone."""
    epoch, place = divmod(number, per_epoch)
    if job.order is None or place == 0:
        job.order = draws.permutation(job.seed, "voc order", epoch, job.ids)
    rows = job.order[place * batch : (place + 1) * batch].tolist()
    return rows, [pool.submit(job.load, row, epoch) for row in rows]


def _check_finite(job: Job, loss: float, number: int, rows: list[int]) -> None:
    if not math.isfinite(loss):
        raise DataError(
            f"{job.name}: the loss is {loss} at step {number} (lr up to {job.settings.lr:.2g}); "
            f"pictures of the batch: {[job.names[row] for row in rows]}; lower the learning rate "
            "or look at these pictures"
        )


def _save(writer: resume.Writer, job: Job, optimiser: Optimiser, number: int) -> None:
    state = {"network": job.network.state_dict(), "optimiser": optimiser.state_dict()}
    writer.save(number, {**state, "step": number})


def _resume(job: Job, optimiser: Optimiser, where: torch.device) -> int:
    """Takes over the newest state of the same settings; gives the step to go on from."""
    content = None if job.state is None else resume.newest(job.state, job.fingerprint, where)
    if content is None:
        return 0
    job.network.load_state_dict(content["network"])
    optimiser.load_state_dict(content["optimiser"])
    step.log.info("%s: goes on at step %d", job.name, content["step"])
    return content["step"]
