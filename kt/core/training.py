"""The one training loop: pretext, target, fine-tuning and the supervised bound.

Order, views and labels of a step are functions of (seed, epoch, image), so the position in a
training is one integer and a stopped training goes on exactly where it was. Under torchrun the
processes share each batch (`kt/core/parallel.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import threading
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kt.config import Training
from kt.core import draws, hardware, lock, parallel, resume, step
from kt.core.delivery import batches, load_batch
from kt.core.ending import Flag
from kt.core.images import Pack
from kt.core.network import Network, has_idle, precision
from kt.core.optimiser import Optimiser
from kt.core.step import ConfigError, DataError, Interrupted, ResourceError, log
from kt.core.task import Task

TYPES = (torch.float32, torch.bfloat16, torch.float16)
HELD_OUT, MOST_HELD_OUT = 0.05, 1000  # share and number of a pack's images, for the curve alone
VALIDATIONS = 20  # at most so many over a training
LOG_EVERY = 1.0  # seconds, at least: the log is written whole, and safely, each time
LOOK = 20  # steps between two looks at the loss on an accelerator: each one waits for it


@dataclasses.dataclass
class Job:
    """One training.

    Attributes:
        network: What is trained, in place.
        task: Makes views and labels.
        pack: The images.
        train: (n,) int64 rows to train on.
        held_out: (m,) int64 rows to validate on; may be empty.
        settings: From the config.
        epochs: Passes over the n rows.
        seed: Of order and dropout.
        name: For progress lines.
        log: Where the JSON lines go, or None.
        state: Folder for resume states, or None.
        fingerprint: Settings that a resume state must share.
        delivery: Threads that fill batches ahead, or None for as many as are likely to pay.
        computed_in: The type of its convolutions, once it has begun.
    """

    network: Network
    task: Task
    pack: Pack
    train: Tensor
    held_out: Tensor
    settings: Training
    epochs: int
    seed: int
    name: str
    log: Path | None = None
    state: Path | None = None
    fingerprint: dict = dataclasses.field(default_factory=dict)
    delivery: int | None = None
    computed_in: torch.dtype | None = None


def train(job: Job) -> list[dict]:
    """Trains the network and gives the records of its log, one per epoch.

    Raises:
        DataError: The loss is not finite; step and images are named.
        Interrupted: A signal came; the resume state is written.
    """
    parallel.connect()
    run = _Run(job)
    run.resume()
    with Flag() as stop:
        run.loop(stop)
    return run.records


class _Run:
    """The state of one training: everything that a resume state holds, and what it needs."""

    def __init__(self, job: Job):
        self.job, settings = job, job.settings
        self.device = hardware.device()
        self.dtype = precision(job.network, job.task, settings.precision, self.device)
        if not parallel.agree(TYPES.index(self.dtype)):
            self.dtype = torch.float32  # `auto` on machines of several kinds
        job.computed_in = self.dtype
        self.batch = global_batch(settings, len(job.train))
        self.steps_per_epoch = len(job.train) // self.batch
        self.total = self.steps_per_epoch * job.epochs
        parallel.synchronise(job.network, self.batch // parallel.size())
        job.network.to(self.device).to(memory_format=torch.channels_last)
        self.optimiser = Optimiser(job.network, settings, self.dtype)
        self.dropout = hardware.generator(self.device)
        idle = functools.partial(has_idle, job.network, job.task)
        self.network = parallel.wrap(job.network, idle)
        hardware.set_up(self.device, settings.deterministic)
        if settings.compile and self.device.type == "cuda":
            # By default torch gives up at the 8th network of a process; `nonlinear` has more.
            torch._dynamo.config.recompile_limit = 64
            self.network = torch.compile(self.network)
        threads = job.delivery
        self.threads = hardware.delivery_threads(self.device) if threads is None else threads
        self.step = 0
        self.seconds = 0.0
        self.records: list[dict] = []
        self.logged = 0.0
        self.writer = resume.Writer(job.state, job.fingerprint, job.network)
        self.sums = torch.zeros(2, device=self.device)  # of the epoch: loss, share right
        self.counted = 0

    def loop(self, stop: threading.Event) -> None:
        """Runs the steps that are left."""
        job = self.job
        say = log.info if job.log else step.detail  # fine-tuning runs by the dozen
        say(
            "%s: %d images, %d epochs, %d steps of %d, %s on %s, %d processes, %d delivery threads",
            job.name, len(job.train), job.epochs, self.total, self.batch, self.dtype, self.device,
            parallel.size(), self.threads,
        )  # fmt: skip
        progress = step.Progress(job.name, self.total * self.batch, "img", self.step * self.batch)
        # By records, not by steps: a state may stand between an epoch's last step and its record.
        try:
            for epoch in range(len(self.records), job.epochs):
                self._epoch(epoch, progress, stop)
                self._record(epoch)
            if job.log and os.environ.get(resume.KEEP):
                self.save()
                # Nothing else on a GPU does: others would be gone before the first has their sums.
                parallel.wait()
        finally:
            self.writer.close()
        progress.close()
        parallel.separate(job.network)
        job.network.eval()

    def _epoch(self, epoch: int, progress: step.Progress, stop: threading.Event) -> None:
        job, start = self.job, time.monotonic()
        job.network.train()
        order = job.task.order(job.train, epoch)[: self.steps_per_epoch * self.batch]
        own = self.batch // parallel.size()
        mine, done = parallel.deal(order, self.batch), self.step - epoch * self.steps_per_epoch
        for index, views, labels in batches(
            job.task, job.pack, mine, own, epoch, self.device, self.threads, done
        ):
            loss = self._step(index, views, labels)
            self.step += 1
            shown = "" if loss is None else f", loss {loss:.3f}"
            progress.add(self.batch, f"epoch {epoch + 1}/{job.epochs}{shown}")
            stopped, due = self._agree(stop)
            if stopped or due:
                self.seconds += time.monotonic() - start
                start = time.monotonic()
                self._check_finite(self.step, index)
                self._check_weights()
                self.save()
                if stopped:
                    self.writer.close()
                    parallel.wait()  # or torchrun would end the one that writes with the others
                    raise Interrupted(
                        f"{job.name}: stopped at step {self.step}; run it again to go on"
                    )
        self._check_finite(self.step, order[:0])
        self._check_weights()
        self.seconds += time.monotonic() - start

    def _agree(self, stop: threading.Event) -> tuple[bool, bool]:
        """Says whether to stop and whether to save here; several processes do both together."""
        found = stop.is_set(), self.writer.due()
        if parallel.size() == 1:
            return found
        if self.device.type == "cuda" and self.step % LOOK:  # asking waits for the device
            return False, False
        return tuple(
            parallel.total(torch.tensor(found, device=self.device).float()).bool().tolist()
        )

    def _step(self, index: Tensor, views: Tensor, labels: Tensor) -> float | None:
        """Makes one step; gives the loss, or None where asking would stall an accelerator."""
        settings = self.job.settings
        lr = settings.lr * rate(self.step, self.total, settings)
        self.dropout.manual_seed(_step_seed(self.job.seed, self.step))
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.network(views).float()
        loss = self.job.task.loss(logits, labels, settings.label_smoothing)
        self.optimiser.scaled(loss).backward()
        self.optimiser.step(lr)
        self.sums += torch.stack([loss.detach(), self.job.task.right(logits.detach(), labels)])
        self.counted += 1
        if self.device.type == "cuda" and (self.step + 1) % LOOK:
            return None
        self._check_finite(self.step + 1, index)
        return float(loss.detach())

    def _check_finite(self, number: int, index: Tensor) -> None:
        """Ends a training whose loss was not finite at a step or, not looked at, before it."""
        value = float(self.sums[0])
        if not math.isfinite(value):
            job, keys = self.job, [self.job.pack.keys[row] for row in index.tolist()]
            before = "" if self.device.type == "cpu" else f", or up to {LOOK - 1} steps before it"
            raise DataError(
                f"{job.name}: the loss is {value} at step {number}{before} (epoch "
                f"{(number - 1) // self.steps_per_epoch + 1}, lr up to {job.settings.lr:.2g}); "
                f"images of the batch: {keys}; lower the learning rate or look at these images"
            )

    def _check_weights(self) -> None:
        """Ends a training that the last step before a state or an epoch's end has spoilt.

        A loss tells of the step before; at the end there is no other.
        """
        weights = list(self.job.network.state_dict().items())
        sums = torch.stack([value.float().abs().max() for _, value in weights if value.numel()])
        if not torch.isfinite(sums).all():
            bad = [name for name, value in weights if not torch.isfinite(value.float()).all()]
            raise DataError(
                f"{self.job.name}: {len(bad)} weights are not finite after step {self.step}, such "
                f"as {bad[0]}, though the loss before it was; lower the learning rate "
                f"(up to {self.job.settings.lr:.2g})"
            )

    def _record(self, epoch: int) -> None:
        job = self.job
        loss, top1 = (parallel.total(self.sums) / parallel.size() / self.counted).tolist()
        self.sums.zero_()
        self.counted = 0
        record = {"epoch": epoch + 1, "step": self.step, "loss": loss, "top1": top1}
        every = max(1, job.epochs // VALIDATIONS)
        if len(job.held_out) and ((epoch + 1) % every == 0 or epoch + 1 == job.epochs):
            start = time.monotonic()
            record |= validate(job.network, job.task, job.pack, job.held_out, self.batch)
            record["validation_seconds"] = round(time.monotonic() - start, 3)
        record["seconds"] = round(self.seconds, 3)
        record["images_per_second"] = round(self.step * self.batch / max(self.seconds, 1e-9), 1)
        self.records.append(record)
        step.detail("%s: %s", job.name, json.dumps(record))
        done, now = len(self.records) == job.epochs, time.monotonic()
        if job.log and parallel.rank() == 0 and (done or now > self.logged + LOG_EVERY):
            self.logged = now
            step.write_text(job.log, "".join(json.dumps(row) + "\n" for row in self.records))

    def save(self) -> None:
        """Copies the state; it is written while the training goes on."""
        self.writer.save(
            self.step,
            {
                "network": self.job.network.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "step": self.step,
                "seconds": self.seconds,
                "records": json.dumps(self.records),
                "sums": parallel.total(self.sums.clone()) / parallel.size(),
                "counted": self.counted,
            },
        )

    def resume(self) -> None:
        """Goes on from the newest readable state of the same settings, if there is one."""
        job = self.job
        if job.state is None:
            return
        if parallel.rank() == 0:
            self.lock = lock.claim(job.state)
        content = resume.newest(job.state, job.fingerprint, self.device)
        # All have read before one writes; and none goes on alone from what others do not see.
        if not parallel.agree(0 if content is None else content["step"] + 1):
            raise ResourceError(
                f"{job.state}: expected all processes to find the same state, found several; if "
                "files are seen late here, run it again"
            )
        if content is None:
            return
        job.network.load_state_dict(content["network"])
        self.optimiser.load_state_dict(content["optimiser"])
        self.records = json.loads(content["records"])
        for name in ("step", "seconds", "sums", "counted"):
            setattr(self, name, content[name])
        log.info("%s: goes on at step %d of %d", job.name, self.step, self.total)


def global_batch(settings: Training, number: int) -> int:
    """Gives the images of a step, of all processes together, for so many training images.

    Raises:
        ConfigError: They cannot be dealt out evenly.
        DataError: There is not an image for each process.
    """
    processes = parallel.size()
    if number < processes:
        raise DataError(
            f"expected at least an image for each of {processes} processes to train on, found "
            f"{number}; add images or use fewer processes"
        )
    if settings.batch % processes:
        raise ConfigError(
            f"training.batch: {settings.batch} images cannot be dealt out to {processes} processes "
            "evenly; choose another batch or another number of processes"
        )
    return min(settings.batch, number // processes * processes)


@torch.no_grad()
def validate(
    network: Network, task: Task, pack: Pack, index: Tensor, batch: int
) -> dict[str, float]:
    """Gives loss and top-1 on held-out images, whose draws (epoch -1) never change."""
    network.eval()
    where = next(network.parameters()).device
    loss = right = 0.0
    most = max(batch, min(256, pack.at_once))
    own = -(-most // parallel.size())  # a GPU that shares a batch may not have room for all of it
    parts = -(-len(index) // most)  # of sizes alike: none of one image among large ones
    for part in index.tensor_split(max(parts, 1)):
        views, labels = load_batch(task, pack, part, -1, where)
        logits = torch.cat([network(some) for some in views.split(own)])
        loss += float(task.loss(logits, labels)) * len(part)
        right += float(task.right(logits, labels)) * len(part)
    return {"validation_loss": loss / len(index), "validation_top1": right / len(index)}


def rate(done: int, total: int, settings: Training) -> float:
    """Gives the learning rate's factor in 0..1 at a step: warm-up, then cosine or steps of 1/10."""
    warmup = round(settings.warmup * total)
    if done < warmup:
        return (done + 1) / warmup
    share = (done - warmup) / max(total - warmup, 1)
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    return 0.1 ** sum(done >= milestone * total for milestone in settings.milestones)


def hold_out(
    pack: Pack, fraction: float = HELD_OUT, most: int = MOST_HELD_OUT
) -> tuple[Tensor, Tensor]:
    """Splits rows into training and held-out ones by a hash of their keys.

    Returns:
        (n,) and (m,) int64 rows.
    """
    number = number_held_out(len(pack), fraction, most)
    order = draws.permutation(0, "hold out", 0, torch.from_numpy(pack.ids))
    return order[number:].sort().values, order[:number].sort().values


def number_held_out(number: int, fraction: float = HELD_OUT, most: int = MOST_HELD_OUT) -> int:
    """Gives how many of so many rows are held out."""
    return min(most, int(fraction * number))


def pack_batches(pack: Pack, index: Tensor, batch: int):
    """Yields uint8 images (B, 3, S, S) of the rows, at most `batch` at a time, for inference.

    The parts are equally large but for one image: none weighs more in statistics over parts.
    """
    for part in index.tensor_split(max(1, -(-len(index) // batch))):
        yield torch.from_numpy(np.ascontiguousarray(pack.images[part.numpy()]))


def _step_seed(seed: int, number: int) -> int:
    digest = hashlib.blake2b(f"{seed}/step/{number}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")
