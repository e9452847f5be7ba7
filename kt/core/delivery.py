"""Batches ready for the step: drawn in blocks, filled ahead by threads, in order.

On a CPU the views are written by compiled loops straight from the memory map; for an accelerator
the images are gathered into pinned memory, copied without waiting, and the views made there.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kt.core.images import Pack
from kt.core.task import Plan, Task

PLANNED = 2048  # images drawn at once: some 60 small operations cost the same for any number


def load_batch(
    task: Task, pack: Pack, index: Tensor, epoch: int, where: torch.device
) -> tuple[Tensor, Tensor]:
    """Gives views and labels of some images.

    Args:
        task: Says how.
        pack: The images.
        index: (B,) int64 rows.
        epoch: Which pass.
        where: The device.

    Returns:
        (B, V, 3, h, w) float32 and (B,) int64, on the device.
    """
    return _ready(task, *_fetch(task, pack, task.plan(index, epoch), where), where)


def batches(
    task: Task,
    pack: Pack,
    order: Tensor,
    batch: int,
    epoch: int,
    where: torch.device,
    threads: int,
    done: int = 0,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields the batches of an epoch; the same for any number of threads.

    Whatever is done, the same images are drawn together: the last bit of what is drawn can depend
    on it, since vector instructions and what is left over for single ones round differently.

    Args:
        task: Says what is drawn.
        pack: The images.
        order: (n,) int64 rows, n a multiple of `batch`.
        batch: Images in each.
        epoch: Which pass.
        where: The device.
        threads: That fill ahead; 0: the caller's own.
        done: How many batches to leave out, of which an earlier run made steps.

    Yields:
        (B,) int64 rows; (B, V, 3, h, w) float32 and (B,) int64 on the device.
    """
    size = max(1, PLANNED // batch) * batch
    whole, begun = divmod(done * batch, size)
    blocks = [(block, range(0, len(block), batch)) for block in order.split(size)[whole:]]
    if begun:
        blocks[0] = (blocks[0][0], blocks[0][1][begun // batch :])
    if not threads:
        for block, starts in blocks:
            plan = task.plan(block, epoch)
            for first in starts:
                fetched = _fetch(task, pack, _part(plan, first, batch), where)
                yield block[first : first + batch], *_ready(task, *fetched, where)
        return
    pool, waiting = ThreadPoolExecutor(threads, "delivery"), deque()
    try:
        for index, fetch in _fetches(task, pack, blocks, batch, epoch, where, pool):
            waiting.append((index, pool.submit(fetch)))
            if len(waiting) > 2 * threads:
                index, future = waiting.popleft()
                yield index, *_ready(task, *future.result(), where)
        for index, future in waiting:
            yield index, *_ready(task, *future.result(), where)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _fetches(task, pack, blocks, batch: int, epoch: int, where, pool):
    """Yields each batch's rows and what fetches it; a block's draws are a job of their own."""
    for block, starts in blocks:
        # Handed in before the fetches that wait for it, so one thread is enough.
        planned = pool.submit(task.plan, block, epoch)
        for first in starts:
            yield (
                block[first : first + batch],
                partial(_fetch_planned, task, pack, planned, first, batch, where),
            )


def _fetch_planned(task, pack, planned, first: int, batch: int, where):
    return _fetch(task, pack, _part(planned.result(), first, batch), where)


def _part(plan: Plan, first: int, number: int) -> Plan:
    return {name: value[first : first + number] for name, value in plan.items()}


def _fetch(task: Task, pack: Pack, plan: Plan, where: torch.device) -> tuple[Tensor, Plan]:
    """Does all that a thread can do: views for a CPU, else gathered images."""
    if not isinstance(pack.images, np.ndarray):  # JPEGs: decoded for this batch alone
        rows = plan["rows"]
        decoded = pack.images[rows.flatten().numpy()]
        pack = dataclasses.replace(pack, images=decoded)
        plan = plan | {"rows": torch.arange(rows.numel()).view(rows.shape)}
    if where.type == "cpu":
        return task.fill(pack.images, plan), plan
    return _gathered(pack, plan, pin=where.type == "cuda")


def _gathered(pack: Pack, plan: Plan, pin: bool) -> tuple[Tensor, Plan]:
    """Gives the images of a plan's rows, (B, R, 3, H, W) uint8, and the plan, in pinned memory."""
    from kt.core import compiled

    rows = plan["rows"]
    images = torch.empty(*rows.shape, *pack.images.shape[1:], dtype=torch.uint8, pin_memory=pin)
    compiled.gather(pack.images, rows.flatten().numpy(), images.flatten(0, 1).numpy())
    return images, {name: value.pin_memory() if pin else value for name, value in plan.items()}


def _ready(task: Task, found: Tensor, plan: Plan, where: torch.device) -> tuple[Tensor, Tensor]:
    if where.type == "cpu":
        return found, plan["labels"]
    plan = {name: value.to(where, non_blocking=True) for name, value in plan.items()}
    return task.views(found.to(where, non_blocking=True), plan), plan["labels"]
