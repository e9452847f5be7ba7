"""What every step's `main` shares: exit codes, log, first lines, provenance, progress.

A step is a module with `add_arguments(parser)` and `run(arguments)`; it ends with
`step.main(__doc__, add_arguments, run)`. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import kt
from kt.core import launch, lock

# Some only to be at hand for every step.
from kt.core.ending import (  # noqa: F401
    ConfigError,
    DataError,
    Interrupted,
    ResourceError,
    StepError,
    exit_code,
    lack,
    line,
)
from kt.core.files import (  # noqa: F401
    check_space,
    free_bytes,
    plain,
    read_json,
    replacing,
    write_json,
    write_text,
)

log = logging.getLogger("kt")
# Options that do not say what is made.
HOW = ("log", "threads", "processes", "nodes", "delivery_threads")
GPUS = "GPUs held"  # in the log, where `kt.plan` looks for it


def main(doc, add_arguments, run) -> None:
    """Parses the command line, runs the step and ends the process with the promised exit code."""
    parser = argparse.ArgumentParser(
        prog=f"python -m kt.{Path(sys.argv[0]).stem}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--log", type=Path, help="also write the log to this file")
    parser.add_argument("--threads", type=int, help="CPU threads to use (all by default)")
    arguments = parser.parse_args()
    if share := int(os.environ.get("LOCAL_WORLD_SIZE", 0)):  # torchrun would give each one thread
        arguments.threads = max(1, (arguments.threads or len(os.sched_getaffinity(0))) // share)
    _limit_threads(arguments.threads)
    gc.freeze()  # modules stay; Python would look through them for garbage, also at its end
    launch.report_in()
    code = exit_code(_work, run, arguments)
    launch.report_out(code)
    if "RANK" in os.environ:
        # Threads of torch.distributed may still run; torn down under them, a process that has done
        # its work now and then aborts ("terminate called without an active exception").
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _work(run, arguments) -> None:
    """Runs the step in one or several processes, unless another one is found to have done it."""
    _start_log(arguments)
    if "RANK" in os.environ:  # whoever launched this one is the writer
        _run(run, arguments)
        return
    if launch.NODE in os.environ:
        launch.launch_here(arguments)
    with lock.sole_writer(Path(arguments.output), _said(arguments)) as mine:
        if not mine:
            log.info("%s: made meanwhile by that process", arguments.output)
        elif max(getattr(arguments, "processes", 1), getattr(arguments, "nodes", 1)) > 1:
            if code := launch.launch(arguments):
                sys.exit(code)
        else:
            _run(run, arguments)


def _said(arguments) -> list[str]:
    """Gives the program and the options that say what is made."""
    made = {name: value for name, value in vars(arguments).items() if name not in HOW}
    return [Path(sys.argv[0]).stem, json.dumps(made, default=plain, sort_keys=True)]


def _run(run, arguments) -> None:
    try:
        run(arguments)
        detail("%s: %d", GPUS, _gpus_held())
    except Exception as error:
        if lack(error) != "disk" or getattr(error, "filename", None):
            raise
        place = Path(arguments.output)
        raise ResourceError(
            f"{place} cannot be written: {line(error)}; {free_bytes(place)} bytes are free there"
        ) from error


def _gpus_held() -> int:
    """Gives the number of GPUs that all processes of this step compute on, each on one."""
    hardware = sys.modules.get("kt.core.hardware")  # not imported here, since it imports torch
    return int(os.environ.get("WORLD_SIZE", 1)) if hardware and hardware.holds_gpu() else 0


def _limit_threads(threads) -> None:
    """Sets the thread pools' sizes; works because no step imports numpy's users before this."""
    if threads:
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[variable] = str(threads)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Keeps Python from looking for garbage during imports, which make objects that stay.

    Around torch's import it saves 0.3 s (measured on 2 cores).
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # or the next look would go through all that was imported
        gc.enable()


def _start_log(arguments) -> None:
    logging.raiseExceptions = False  # a full disk must not end in a traceback of the log
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if arguments.log:
        arguments.log.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(arguments.log, mode="a", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
    # Of several processes one tells what goes on.
    first = os.environ.get("RANK", "0") == "0" and (
        launch.NODE not in os.environ or "RANK" in os.environ
    )
    log.setLevel(logging.INFO if first else logging.ERROR)
    log.propagate = False
    # The terminal is the user's: under Snakemake the settings go to the log file only.
    quiet = arguments.log and os.environ.get("KT_WORKFLOW")
    if quiet:
        handlers[0].addFilter(lambda record: not getattr(record, "detail", False))
    step_name = Path(sys.argv[0]).stem
    detail(
        "%s, version %s, git %s, python %s on %s",
        step_name,
        kt.__version__,
        git_state(),
        platform.python_version(),
        platform.node(),
    )
    detail("settings %s", json.dumps(vars(arguments), default=plain, sort_keys=True))


def detail(message: str, *values) -> None:
    """Logs a line for the log file, kept off the terminal when the workflow runs the step."""
    log.info(message, *values, extra={"detail": True})


@functools.cache
def git_state() -> str:
    """Gives the commit that the code stands at, `+changes` if edited, or `none` outside git."""
    root = Path(kt.__file__).parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+changes", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "none"
    return found.stdout.strip() or "none"


@functools.cache
def start_time() -> float:
    """Gives the moment of the first call in seconds; called when the module is loaded."""
    return time.time()


start_time()


def provenance(parents: dict[str, str] | None = None, **more) -> dict:
    """Gives where an artefact comes from: version, git, parents' digests, host, seconds so far."""
    return {
        "version": kt.__version__,
        "git": git_state(),
        "parents": parents or {},
        "host": platform.node(),
        "seconds": round(time.time() - start_time(), 3),
        **more,
    }


class Progress:
    """Says rate and time left: a bar on a terminal, a plain line every few seconds elsewhere."""

    def __init__(self, name: str, total: int, unit: str, done: int = 0, every: float = 10.0):
        """Starts to count `done` of `total` units; plain lines come every `every` seconds."""
        self.name, self.total, self.unit, self.every = name, total, unit, every
        self.done = self.first = done
        self.start = self.last = time.monotonic()
        self.bar = None
        if sys.stderr.isatty() and not os.environ.get("KT_WORKFLOW"):
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, unit=unit, desc=name, leave=False)

    def add(self, number: int, note: str = "") -> None:
        """Counts `number` more units; `note` (loss and the like) stands behind the rate."""
        self.done += number
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(number)
            if note:
                self.bar.set_postfix_str(note, refresh=False)
        elif now - self.last >= self.every:
            self.last = now
            rate = (self.done - self.first) / (now - self.start)
            left = (self.total - self.done) / rate if rate else float("inf")
            log.info(
                "%s: %d %%, %.0f %s/s, %.0f s left%s",
                self.name,
                100 * self.done / max(self.total, 1),
                rate,
                self.unit,
                left,
                f", {note}" if note else "",
            )

    def close(self) -> None:
        """Takes the bar away."""
        if self.bar is not None:
            self.bar.close()
