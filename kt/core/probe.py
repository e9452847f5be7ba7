"""What work costs here and now: short runs of the pipeline's own code on drawn images.

`kt.plan` asks where no earlier run tells. Each question takes some seconds and is asked once.
"""

from __future__ import annotations

import functools
import io
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import kt
from kt import config, workflow

SECONDS = 2.0  # of each run that is timed
LEAST = 512  # images
FIRST, GROWTH = 2, 4  # images of a first run, and how many times more the next one sees
# Of the images whose features are extracted at once: a map of 64 channels is 256 MB.
PIXELS = 1 << 20
MEMORY = 2 << 30  # bytes of this process; a run that takes it beyond is the last
LR = 1e-9  # weights stay as they are: noise teaches nothing, and the loss must stay finite
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


def _growing(work: Callable[[int], int], most: int, seconds: float) -> Rate:
    """Gives what an image costs, by runs of more and more images until one fills some seconds.

    So a large network takes neither the time nor the memory of whole batches.

    Args:
        work: Does it with so many images, and gives how many it really were.
        most: Images of the largest run, which is repeated until it fills the seconds.
        seconds: How long a run must take for its rate to stand.
    """
    from kt.core import hardware

    number, on_gpu = min(FIRST, most), hardware.device().type == "cuda"
    work(number)  # loads libraries and compiled loops
    while True:
        if on_gpu and number > FIRST:
            work(number)  # each new size has its convolutions picked by timing them
        before, begun, used = _peak(), time.perf_counter(), time.process_time()
        seen = work(number)
        spent = Rate(time.perf_counter() - begun, time.process_time() - used)
        large = not on_gpu and _peak() > max(before, MEMORY)  # CUDA's libraries alone are
        if spent.seconds >= seconds or large:
            return spent.times(1 / seen)
        if number == most:
            return _timed(lambda: work(most), seconds).times(1 / seen)
        number = min(GROWTH * number, most)


def _peak() -> int:
    """Gives the most memory that this process had so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


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

    def used() -> float:
        found = resource.getrusage(resource.RUSAGE_CHILDREN)
        return found.ru_utime + found.ru_stime

    before, begun = used(), time.perf_counter()
    root = Path(kt.__file__).parent.parent  # kt is found there whether it is installed or not
    subprocess.run([sys.executable, "-c", modules], check=True, cwd=root)
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
    # Not compiled: each of these short trainings would be compiled anew.
    given = config.json_of(config.Training)(settings)
    values = given.model_copy(update={"lr": LR, "compile": False})
    most = max(LEAST // values.batch, 2) * values.batch
    pack = _pack(most, size)
    rows, classes = torch.arange(len(pack)), workflow.BUDGET_CLASSES
    spread = torch.full((3,), 0.25)
    context = Context(size, rows, 2 * spread, spread, 0, rows % classes, classes)
    made = build_task(config.json_of(config.Plugin)(task), context)
    net = network.Network(model.fresh(config.json_of(config.Plugin)(backbone), 0), made)

    def work(number: int) -> int:
        some, batch = rows[:number], min(values.batch, number)
        training.train(training.Job(net, made, pack, some, rows[:0], values, 1, 0, "probe"))
        return number // batch * batch

    return _growing(work, most, SECONDS)


@functools.cache
def extraction(backbone: str, size: int, threads: int, layer: str | None = None) -> Rate:
    """Gives what an image costs whose features are extracted, up to a layer or the last one."""
    import torch

    from kt.core import hardware, model, training

    _say(f"features of {json.loads(backbone)['name']}{f', {layer}' if layer else ''}", threads)
    net = model.fresh(config.json_of(config.Plugin)(backbone), 0).eval()
    net.to(hardware.device()).to(memory_format=torch.channels_last)
    most = max(1, min(LEAST // 2, PIXELS // size**2))
    (images,) = training.pack_batches(_pack(most, size), torch.arange(most), most)

    def work(number: int) -> int:
        with torch.inference_mode(), hardware.mixed(hardware.device()):
            maps = net(net.normalise(images[:number].to(hardware.device())), layer)
            float(maps[0, 0, 0, 0])  # waits for an accelerator
        return number

    return _growing(work, most, SECONDS / 4)


@functools.cache
def product(threads: int) -> Rate:
    """Gives what a multiply-add of matrix products costs, with which rows are clustered."""
    import torch

    from kt.core import lloyd

    _say("matrix products", threads)
    where = lloyd.device() or "cpu"
    one, two = torch.ones(4096, 128, device=where), torch.ones(128, 1024, device=where)
    spent = _timed(lambda: float((one @ two)[0, 0]), SECONDS / 8)  # which waits for a GPU
    return spent.times(1 / (4096 * 128 * 1024))


@functools.cache
def decoding(size: int, is_photograph: bool) -> Rate:
    """Gives what a picture costs on one core: a JPEG of 500x375, or pixels of the packed size."""
    from kt.core import decode

    content = _noise((size, size))
    if is_photograph:
        _photograph(PHOTOGRAPH).save(buffer := io.BytesIO(), "JPEG", quality=90)
        content = buffer.getvalue()
    return _timed(lambda: decode.decode(content, size, 10**8), SECONDS / 8)


@functools.cache
def unpacking(size: int) -> Rate:
    """Gives what an image of a pack of JPEGs costs on one core each time it is read."""
    import numpy as np

    from kt.core import encoded, jpeg

    payload = jpeg.encode(_photograph((size, size)), jpeg.QUALITY, subsampling=0)
    content = np.frombuffer(payload, np.uint8)
    return _timed(lambda: encoded.decode(content, size), SECONDS / 8)


def _photograph(shape: tuple[int, int]):
    """Draws a picture, width by height, with little detail: noise would be all detail."""
    from PIL import Image

    return Image.fromarray(_noise((40, 30))).resize(shape)


def _noise(shape: tuple[int, int]):
    """Draws pixels (height, width, 3) uint8 from width and height."""
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (*shape[::-1], 3), np.uint8)


def _say(what: str, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    print(f"probing {what}", file=sys.stderr)
