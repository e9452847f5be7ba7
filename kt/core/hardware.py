"""Where networks are computed, and in what type."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import re
import tempfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from kt.core.ending import ResourceError, log

MOST_DELIVERY_THREADS = 4
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of mallopt, in malloc.h


def keep_freed_memory() -> None:
    """Has glibc keep what is freed for the next batch.

    By itself it returns pieces of 32 MB and more to the system, which hands out and clears each
    page anew: most of the time of a batch of puzzles of 255 px (measured: four times the rest).
    And all threads share one heap: those of their own that it gives to threads hold 64 MB at most
    and go back whole when empty (measured: half of the time of a delivery by one thread).
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_ARENA_MAX, 1)


keep_freed_memory()  # before the first batch, and the first thread
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for `deterministic`; read only once


def device() -> torch.device:
    """Gives the device of this process: a GPU that is free, if any.

    Raises:
        ResourceError: A GPU was given to this process, and PyTorch cannot use it.
    """
    if os.environ.get("KT_DEVICE") == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        _check_that_none_is_missed()
        return torch.device("cpu")
    return torch.device("cuda", _claimed())


@functools.cache
def _check_that_none_is_missed() -> None:
    """Ends the step, or warns, where it would compute on the CPU in silence beside a GPU."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen in ("", "-1", "NoDevFiles"):  # the user's wish, or Slurm's word for none
        return
    problem = (
        f"PyTorch {torch.__version__} finds no GPU that it can use (one built for CUDA 13 needs "
        "driver 580 or newer, and `python -c 'import torch; torch.cuda.init()'` says more); "
        "install a build for the driver that is there, or set KT_DEVICE=cpu to compute on the CPU"
    )
    there = os.path.exists("/dev/nvidiactl")
    if os.environ.get("SLURM_JOB_GPUS") or (seen and there):
        raise ResourceError(f"a GPU was given to this process, but {problem}")
    if seen or there:  # a variable alone may be left over
        log.warning("a GPU is spoken of, but %s", problem)


@functools.cache
def _claimed() -> int:
    """Claims one of the GPUs that a scheduler left to this process; several steps run side by side.

    The claim is a lock that goes with the process. Where all are taken, one is shared, but by two
    processes of one training only if they are more than there are GPUs: NCCL refuses that.
    """
    known = known_gpus()
    if not known:
        raise ResourceError(
            f"PyTorch {torch.__version__} was not built for {torch.cuda.get_device_name(0)}, only "
            f"for {', '.join(torch.cuda.get_arch_list())}; install a build that was, or set "
            "KT_DEVICE=cpu to compute on the CPU"
        )
    # Numbers differ between processes, these do not.
    names = [torch.cuda.get_device_properties(number).uuid for number in known]
    chosen = first = int(os.environ.get("LOCAL_RANK", os.getpid())) % len(known)
    with contextlib.suppress(OSError):  # there is no place for locks
        chosen = _choose(names, first)
    torch.cuda.set_device(known[chosen])
    return known[chosen]


def holds_gpu() -> bool:
    """Says whether this process has claimed a GPU."""
    return _claimed.cache_info().currsize > 0


def known_gpus() -> list[int]:
    """Lists the GPUs of this process that PyTorch was built for."""
    torch.cuda.init()  # before it GPUs are counted that a process cannot have, such as MIG's parts
    return [number for number in range(torch.cuda.device_count()) if _is_known(number)]


def _is_known(number: int) -> bool:
    """Says whether PyTorch was built for a GPU; on an older one its first kernel fails."""
    built = [re.fullmatch(r"sm_(\d+)(\d)[a-z]?", name) for name in torch.cuda.get_arch_list()]
    oldest = min((tuple(map(int, one.groups())) for one in built if one), default=(0, 0))
    return torch.cuda.get_device_capability(number) >= oldest


def _choose(names: list[str], first: int) -> int:
    """Locks a GPU that nobody has, else one that no other process of this training has."""
    ours = _byte_of_training()
    with _lock_file("turn") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # one chooses at a time
        _held.extend(map(_lock_file, names))
        for start, taken in ((0, (ANYONE, ours)), (first, (ours,))):
            for number in range(start, start + len(names)):
                if _lock(_held[number % len(names)], taken):
                    return number % len(names)
    return first


ANYONE = 0  # the byte of a GPU's file that is locked by who has it for itself
_held: list = []  # open lock files, a GPU each


def _lock_file(name: str):
    return open(Path(tempfile.gettempdir()) / f"kt-gpu-{os.getuid()}-{name}.lock", "a")


def _lock(file, taken: tuple[int, ...]) -> bool:
    """Locks all of some bytes of a file, or none; says whether it could."""
    try:
        for place in taken:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except OSError:
        fcntl.lockf(file, fcntl.LOCK_UN)
        return False
    return True


def _byte_of_training() -> int:
    """Gives the byte that this process locks, as do all that torchrun started together."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", str(os.getpid()))
    return 1 + zlib.crc32(name.encode())


def delivery_threads(where: torch.device) -> int:
    """Gives the threads that fill batches ahead where nothing is said: none on a single core."""
    cores = torch.get_num_threads()
    if where.type == "cuda":
        return min(MOST_DELIVERY_THREADS, cores)
    return int(cores > 1)


def precision(wanted: str, where: torch.device) -> torch.dtype:
    """Gives the type that convolutions are computed in.

    bfloat16 pays only where the hardware computes it (measured: 1.8x with AVX512-BF16, nothing
    without), so `auto` asks the hardware.
    """
    if wanted != "auto":
        return getattr(torch, wanted)
    if where.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    # Private in torch, so it may be gone in another version: then float32, which is always right.
    has = (
        getattr(torch.cpu, name, bool)
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return torch.bfloat16 if any(probe() for probe in has) else torch.float32


def generator(where: torch.device) -> torch.Generator:
    """Gives the generator that layers on a device draw from.

    `torch.manual_seed` seeds those of all kinds of devices, and for kinds that have not started it
    notes down the call with its stack: 0.4 ms and some memory in each step.
    """
    if where.type == "cpu":
        return torch.default_generator
    torch.cuda.init()
    return torch.cuda.default_generators[torch.cuda.current_device()]


def set_up(where: torch.device, deterministic: bool = False) -> None:
    """On CUDA lets float32 products use TF32, and picks convolutions by timing them.

    Args:
        where: The device.
        deterministic: The same numbers each time, for which they are not timed.
    """
    if where.type != "cuda":
        return
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = not deterministic
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # setting loads the compiler
        torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # else each batch is filled twice


def sent(values: Tensor, where: torch.device) -> Tensor:
    """Copies values of the CPU to a device; waits neither for the copy nor for work before it."""
    return values.pin_memory().to(where, non_blocking=True) if where.type == "cuda" else values


def fetched(values: Tensor) -> Callable[[], Tensor]:
    """Begins to copy values of a device to the CPU; gives what waits for them and gives them."""
    here = values.to("cpu", non_blocking=True)  # of a GPU: into pinned memory
    if values.device.type == "cuda":
        done = torch.cuda.current_stream(values.device).record_event()
        return lambda: done.synchronize() or here
    return lambda: here


def one_behind(begun: Iterator, where: torch.device) -> Iterator:
    """Gives each of what is begun in turn; on an accelerator when the next has been begun.

    So it has work while the CPU waits for what it gave before.
    """
    waiting: deque = deque()
    for one in begun:
        waiting.append(one)
        if len(waiting) > (where.type != "cpu"):
            yield waiting.popleft()
    yield from waiting


def mixed(where: torch.device) -> torch.autocast:
    """Switches to the type of extraction."""
    enabled = extracted_in(where) != torch.float32
    return torch.autocast(where.type, torch.bfloat16, enabled=enabled)


def extracted_in(where: torch.device) -> torch.dtype:
    """Gives the type that features are computed in: bfloat16 where a GPU has it, else float32."""
    dtype = precision("auto", where)  # float16 might not hold what a network gives
    return dtype if where.type == "cuda" and dtype == torch.bfloat16 else torch.float32
