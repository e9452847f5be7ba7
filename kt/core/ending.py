"""How a step ends: the errors a user can mend, exit codes, signals, and what a full disk says.

Imports next to nothing, and takes the signals as soon as it is imported by a step.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import sys
import threading
import time

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


# ---------------------------------------------------------------------------- signals

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ECHO = 1.0  # seconds
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
MEMORY = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
LACKS = {
    "disk": "the disk is full or may not be written; make room or change the permissions",
    "memory": "memory, threads or open files ran out; allow more, or use smaller batches or images",
    "accelerator": "the GPU, its driver and PyTorch do not go together, or another one has it",
}
# Libraries raise RuntimeError, ImportError and errors of their own with nothing but a text.
DISK_TEXT = re.compile(r"no space left|disk quota|file too large|read-only file system", re.I)
MEMORY_TEXT = re.compile(
    r"out of memory|not enough memory|bad_alloc|failed to map segment|can't start new thread"
    r"|(can't|cannot|could not|unable to|failed to|couldn't) allocate|memory allocation failed"
    r"|std::length_error|no more memory|creating shared memory|status_alloc_failed"
    r"|unable to find an engine",
    re.I,
)
ACCELERATOR_TEXT = re.compile(
    r"no kernel image|busy or unavailable|duplicate gpu|driver .*(too old|insufficient)"
    r"|no cuda-capable|invalid device ordinal",
    re.I,
)


class _Ending:
    """What signals do: the first raises KeyboardInterrupt, so that `finally` blocks tidy up."""

    def __init__(self):
        self.at_once = True  # before the work and after it there is nothing to tidy up
        self.signal = ""
        self.heard: float | None = None  # when the first one came
        self.launched = False
        self.unheeded = False

    def on_signal(self, number, frame) -> None:
        if is_echo():
            return
        if self.at_once or self.signal:
            os.write(2, b"error: stopped by a signal; run the same command again\n")
            os._exit(Interrupted.exit_code)
        self.signal = signal.Signals(number).name
        raise KeyboardInterrupt(self.signal)


_ending = _Ending()


def _is_program() -> bool:
    """Says whether this process is `python -m kt.NAME`: only then are signals ours to handle."""
    words = sys.orig_argv  # the name of the main module is not known yet
    return "-m" in words[:-1] and words[words.index("-m") + 1].startswith("kt.")


def is_echo() -> bool:
    """Says whether a signal is but the echo of the first: one act of stopping comes several times.

    A scheduler signals each process of a job, and launchers among them hand it on. For processes
    that were launched all later ones are echoes; the launcher ends them if it must be at once.
    """
    now = time.monotonic()
    if _ending.heard is None:
        _ending.heard = now
        return False
    return _ending.launched or now - _ending.heard < ECHO


def heed_launcher() -> None:
    """Makes this process one that was launched."""
    _ending.launched = True


def catch_signals() -> None:
    """Makes SIGTERM, SIGINT and SIGUSR1 end this process with 75, tidily once the work began."""
    for number in SIGNALS:
        signal.signal(number, _ending.on_signal)


if _is_program():  # at once, since imports take a second
    catch_signals()


class Flag:
    """While it is entered, the first signal of `SIGNALS` sets an event, a later one exits.

    One that came too late to be heeded is left to the next flag.
    """

    def __enter__(self) -> threading.Event:
        """Takes the signals over and gives the event."""
        self.event = threading.Event()
        if _ending.unheeded:
            self.event.set()
        else:
            _ending.heard = None
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self.before[number] = signal.signal(number, self._on_signal)
        return self.event

    def _on_signal(self, number, frame) -> None:
        if is_echo():
            return
        if self.event.is_set():
            os._exit(Interrupted.exit_code)
        self.event.set()

    def __exit__(self, *exception) -> None:
        """Gives the signals back."""
        _ending.unheeded = self.event.is_set() and exception[0] is None
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _explained(error: BaseException) -> StepError | None:
    """Gives the error that a user can mend, None if it is a bug."""
    if isinstance(error, StepError):
        return error
    if _ending.signal or isinstance(error, KeyboardInterrupt):  # whatever it was that it broke off
        name = _ending.signal or "SIGINT"
        return Interrupted(f"stopped by {name}; nothing half made is left, run it again")
    if lack(error):
        return ResourceError(f"{LACKS[lack(error)]}: {type(error).__name__}: {line(error)}")
    return None


def lack(error: BaseException) -> str:
    """Gives which of `LACKS` an error says there is not enough of, or nothing."""
    number = error.errno if isinstance(error, OSError) else None
    text = "" if isinstance(error, StepError) else str(error)
    if isinstance(error, MemoryError) or number in MEMORY or MEMORY_TEXT.search(text):
        return "memory"
    if number in DISK or DISK_TEXT.search(text):
        return "disk"
    return "accelerator" if ACCELERATOR_TEXT.search(text) else ""


def line(error: BaseException) -> str:
    """Gives the gist of an error in one line: those of C++ carry a stack, HDF5's a whole call."""
    text = str(error).strip()
    inner = re.search(r"error message = '([^']+)'", text)
    return inner[1] if inner else text.split("\n", 1)[0][:500] or "no further details"


def exit_code(work, *arguments) -> int:
    """Calls `work` and gives the promised code; only what no user can mend keeps its traceback."""
    _ending.at_once = False
    hooks = sys.excepthook, sys.unraisablehook
    # HDF5 files that cannot be closed on a full disk print tracebacks of their own.
    sys.excepthook = sys.unraisablehook = lambda *_: None
    try:
        try:
            work(*arguments)
        finally:
            _ending.at_once = True
    except (Exception, KeyboardInterrupt) as error:
        known = _explained(error)
        if known is None:
            sys.excepthook, sys.unraisablehook = hooks
            raise
        log.error("error: %s", known)
        return known.exit_code
    return 0
