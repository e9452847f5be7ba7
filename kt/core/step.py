"""What every step's `main` shares: exit codes, log, first lines, provenance, progress.

A step is a module with `add_arguments(parser)` and `run(arguments)`; it ends with
`step.main(__doc__, add_arguments, run)`. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import errno
import functools
import json
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import kt

log = logging.getLogger("kt")


class StepError(Exception):
    """An error that a user can mend; its text says what was expected, found, where, what to do."""

    exit_code = 1


class ConfigError(StepError):
    """The configuration or the command line is wrong."""

    exit_code = 2


class DataError(StepError):
    """The images or an artefact are not what they should be."""

    exit_code = 3


class ResourceError(StepError):
    """Disk, memory or an accelerator is missing."""

    exit_code = 4


class Interrupted(StepError):
    """A signal stopped the step; its state is kept and running it again goes on."""

    exit_code = 75


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
    _limit_threads(arguments.threads)
    if getattr(arguments, "processes", 1) > 1 and "RANK" not in os.environ:
        sys.exit(_launch(arguments.processes))
    _start_log(arguments)
    code = _exit_code(run, arguments)
    if code and "KT_EXIT_CODES" in os.environ:
        Path(os.environ["KT_EXIT_CODES"], os.environ.get("RANK", "0")).write_text(str(code))
    sys.exit(code)


def _launch(processes: int) -> int:
    """Runs this command in several processes by torchrun; gives the exit code of the step.

    torchrun itself ends with 1 whatever happened, and ends all processes when one fails; so the
    lowest code is that of the one that failed first, the others were interrupted.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, "-m", f"kt.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder:
        started = subprocess.Popen(command, env={**os.environ, "KT_EXIT_CODES": folder})
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda *_: started.terminate())
        code = started.wait()
        codes = [int(path.read_text()) for path in Path(folder).iterdir()]
    return min(codes, default=code)


def _exit_code(run, arguments) -> int:
    try:
        run(arguments)
    except StepError as error:
        log.error("error: %s", error)
        return error.exit_code
    except KeyboardInterrupt:
        log.error("error: interrupted; run the same command again")
        return Interrupted.exit_code
    except (MemoryError, OSError) as error:
        if isinstance(error, MemoryError) or error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EROFS,
            errno.EACCES,
            errno.ENOMEM,
        ):
            log.error("error: %s: %s", type(error).__name__, error)
            return ResourceError.exit_code
        raise
    return 0


def _limit_threads(threads) -> None:
    """Sets the thread pools' sizes; works because no step imports numpy's users before this."""
    if threads:
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[variable] = str(threads)


def _start_log(arguments) -> None:
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if arguments.log:
        arguments.log.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(arguments.log, mode="a", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
    first = os.environ.get("RANK", "0") == "0"  # of several processes one tells what goes on
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


def plain(value):
    """Turns paths and settings into what JSON can hold (for `json.dumps(default=plain)`)."""
    if hasattr(value, "model_dump"):
        return value.model_dump()
    return str(value)


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


def check_space(path: Path, needed: int) -> None:
    """Refuses work whose result would not fit on the disk.

    Args:
        path: What will be written; it and some of its folders need not be there yet.
        needed: Bytes.

    Raises:
        ResourceError: Names the path and both numbers.
    """
    folder = Path(path).absolute().parent
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(
            f"{path}: {needed} bytes are needed, {free} are free in {folder}; make room there or "
            "put the results elsewhere"
        )


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


def write_text(path: Path, text: str) -> None:
    """Writes a text file beside its place, syncs it and renames it: never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    """Writes `value` as indented JSON through `write_text`; NaN is refused."""
    write_text(path, json.dumps(value, indent=1, default=plain, allow_nan=False) + "\n")


def read_json(path: Path):
    """Reads a JSON file that another step wrote.

    Raises:
        DataError: The file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"expected a JSON file at {path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); remove it and run again") from error


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
