"""What work costs here and now: short runs of the pipeline's own code on drawn images.

`kt.plan` asks where no earlier run tells. Each question takes some seconds and is asked once.
"""

from __future__ import annotations

import functools
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from kt import config, workflow

SECONDS = 2.0  # of each run that is timed
LEAST = 512  # images
PHOTOGRAPH = (500, 375)
LIGHT, HEAVY = "import numpy, h5py, kt.config", "import kt.core.judge, kt.pretext_train"


class Rate(NamedTuple):
    """What a piece of work costs.

    Attributes:
        seconds: By the clock.
        cpu: Of all threads together.
    """

    seconds: float
    cpu: float

    def times(self, number: float) -> Rate:
        """Gives what so many of them cost."""
        return Rate(self.seconds * number, self.cpu * number)


def _timed(work, least: float | None = None) -> Rate:
    """Gives what one call costs, after a first one, from calls that fill some seconds together."""
    work()
    number, begun, used = 0, time.perf_counter(), time.process_time()
    while not number or time.perf_counter() - begun < (SECONDS if least is None else least):
        work()
        number += 1
    spent = Rate(time.perf_counter() - begun, time.process_time() - used)
    return spent.times(1 / number)


def _pack(number: int, size: int):
    """Draws so many images of noise."""
    import numpy as np

    from kt.core.images import Pack

    pixels = np.random.default_rng(0).integers(0, 256, (number, 3, size, size), np.uint8)
    keys = [f"image-{row}" for row in range(number)]
    return Pack(pixels, keys, np.arange(number), Path("drawn"))


@functools.cache
def start(modules: str) -> Rate:
    """Gives what it costs to start a job: a process that imports what a step does."""
    import resource

    def used() -> float:
        found = resource.getrusage(resource.RUSAGE_CHILDREN)
        return found.ru_utime + found.ru_stime

    before, begun = used(), time.perf_counter()
    subprocess.run([sys.executable, "-c", modules], check=True)
    return Rate(time.perf_counter() - begun, used() - before)


@functools.cache
def training(backbone: str, task: str, settings: str, size: int, threads: int) -> Rate:
    """Gives what an image costs that the training loop sees.

    Args:
        backbone: JSON.
        task: JSON. What is learned of a teacher stands as classes here.
        settings: JSON of config.Training.
        size: Edge of the images in pixels.
        threads: That compute.
    """
    import torch

    from kt.core import model, network, training
    from kt.core.task import Context
    from kt.pretext_train import build_task

    _say(f"training {json.loads(backbone)['name']}", threads)
    values = config.json_of(config.Training)(settings)
    pack = _pack(max(LEAST, 2 * values.batch), size)
    rows, classes = torch.arange(len(pack)), workflow.BUDGET_CLASSES
    spread = torch.full((3,), 0.25)
    context = Context(size, rows, 2 * spread, spread, 0, rows % classes, classes)
    made = build_task(config.json_of(config.Plugin)(task), context)
    net = network.Network(model.fresh(config.json_of(config.Plugin)(backbone), 0), made)

    def work() -> None:
        training.train(training.Job(net, made, pack, rows, rows[:0], values, 1, 0, "probe"))

    return _timed(work).times(1 / (len(pack) // values.batch * values.batch))


@functools.cache
def extraction(backbone: str, size: int, threads: int) -> Rate:
    """Gives what an image costs whose features are extracted, those of all layers together."""
    import torch

    from kt.core import hardware, model, training

    _say(f"features of {json.loads(backbone)['name']}", threads)
    net = model.fresh(config.json_of(config.Plugin)(backbone), 0).eval()
    net.to(hardware.device()).to(memory_format=torch.channels_last)
    pack = _pack(LEAST // 2, size)
    (images,) = training.pack_batches(pack, torch.arange(len(pack)), len(pack))

    def work() -> None:
        with torch.inference_mode(), hardware.mixed(hardware.device()):
            found = net.maps(net.normalise(images.to(hardware.device())), list(net.layers))
            sum(float(maps[0, 0, 0, 0]) for maps in found.values())  # waits for an accelerator

    return _timed(work, SECONDS / 4).times(1 / len(pack))


@functools.cache
def product(threads: int) -> Rate:
    """Gives what a multiply-add of matrix products costs, with which rows are clustered."""
    import torch

    _say("matrix products", threads)
    one, two = torch.ones(4096, 128), torch.ones(128, 1024)
    return _timed(lambda: one @ two, SECONDS / 8).times(1 / (4096 * 128 * 1024))


@functools.cache
def decoding(size: int, is_photograph: bool) -> Rate:
    """Gives what a picture costs on one core: a JPEG of 500x375, or pixels of the packed size."""
    import numpy as np
    from PIL import Image

    from kt.core import decode

    shape = (*PHOTOGRAPH[::-1], 3) if is_photograph else (size, size, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    if is_photograph:
        coarse = Image.fromarray(pixels[:30, :40]).resize(PHOTOGRAPH)  # noise would be all detail
        coarse.save(buffer := io.BytesIO(), "JPEG", quality=90)
        pixels = buffer.getvalue()
    return _timed(lambda: decode.decode(pixels, size, 10**8), SECONDS / 8)


def _say(what: str, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    print(f"probing {what}", file=sys.stderr)
