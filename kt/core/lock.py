"""Locks: a folder for one process, an artefact for one writer of all machines. Imports no torch."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from kt.core.ending import ResourceError

log = logging.getLogger("kt")
BEAT = 5.0  # seconds between two signs of life of a writer
SILENT = 6  # beats that are missed when a writer on another machine has ended
GONE = 600.0  # seconds without one, after which a lock is one of a machine that is lost


def claim(folder: Path):
    """Locks a folder for this process; the lock goes with it, however it ends.

    Returns:
        The open lock file, to be kept.

    Raises:
        ResourceError: Another process is at the same work (a killed run can leave one behind).
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ResourceError(
            f"{folder}: process {file.read().strip() or 'unknown'} is at this work already; "
            "wait until it has ended, or end it, and run again"
        ) from None
    except OSError:
        log.warning("%s: this file system has no locks; start each step only once", folder)
        return file
    file.truncate(0)
    file.write(_who().removeprefix("process "))
    file.flush()
    return file


@contextlib.contextmanager
def sole_writer(output: Path, work: list[str]) -> Iterator[bool]:
    """Lets one process make an artefact at a time; others wait until it has ended.

    A scheduler may start a job again while the first one still runs: after the workflow was killed
    and started again, or after a node was lost that did not know it. The kernel's lock excludes all
    processes of a machine, and of several where the file system's locks span them. Where they do
    not, the owner shows signs of life, and is waited for as long as they come.

    Args:
        output: The file or folder that is made; the lock stands beside it, and goes at the end.
        work: What is done, such as the options; compared with what another one did.

    Yields:
        Whether to do it; false if this process waited and the other one did exactly this.

    Raises:
        ResourceError: A process of another machine holds the lock, and shows no sign of life.
    """
    path = output.with_name(f".{output.name}.lock")
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file, done = _wait(path, output, work)
    except OSError:  # the step will say better what cannot be written
        yield True
        return
    over = threading.Event()
    try:
        if not done:
            threading.Thread(target=beat, args=(file, over), daemon=True).start()
        yield not done
        if not done:  # for those who wait for this file, which is gone then
            write(file, {**me(), "done": work})
    finally:
        over.set()
        if not done:
            with contextlib.suppress(OSError):
                path.unlink()
        file.close()
        with contextlib.suppress(OSError):  # not empty: something was made
            for folder in missing:
                folder.rmdir()


def _wait(path: Path, output: Path, work: list[str]):
    """Gives the lock file, open and ours, and whether the one that was waited for did the work."""
    waited, last = False, (0, time.monotonic())
    # Without a buffer: what a full disk did not take would be tried again when the file is closed.
    file = open(path, "a+b", buffering=0)
    while True:
        locked = _lock(file)
        owner = owner_of(file)
        if locked is False or lives(path, owner, bool(locked)):
            if not waited:
                who = owner.get("who", "another process")
                log.info("%s: waiting for %s, who is at it already", output, who)
            waited = True
            if (stamp := _stamp(path)) != last[0]:
                last = stamp, time.monotonic()
            elif time.monotonic() - last[1] > GONE and owner.get("host") != platform.node():
                raise ResourceError(
                    f"{path}: {owner.get('who', 'another process')} holds this lock and has shown "
                    f"no sign of life for {GONE / 60:.0f} minutes; if its machine is lost, remove "
                    "the file and run again"
                )
            time.sleep(BEAT / 20)
            continue
        if waited and owner.get("done") == work and output.exists():
            return file, True
        if _is(path, file):
            write(file, me())
            if owner and not locked:  # others may have waited for the same one
                time.sleep(BEAT)
            if locked or owner_of(file) == me():
                return file, False
        else:  # its owner took it away
            file.close()
            file = open(path, "a+b", buffering=0)


def _lock(file) -> bool | None:
    """Takes the kernel's lock; false if another one has it, None where there is none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def lives(path: Path, owner: dict, locked: bool) -> bool:
    """Says whether the owner that a file names lives, although its lock may be had.

    On this machine it cannot. Of others signs count only when seen to change: clocks differ.
    """
    if not owner or "done" in owner or (locked and owner.get("host") == platform.node()):
        return False
    last = _stamp(path)
    for _ in range(SILENT):
        time.sleep(BEAT)
        if _stamp(path) != last:
            return True
    return False


def _stamp(path: Path) -> int:
    with contextlib.suppress(OSError), open(path) as file:  # NFS looks anew when a file is opened
        return os.fstat(file.fileno()).st_mtime_ns
    return 0


def _is(path: Path, file) -> bool:
    """Says whether the open file still is the one that stands at the path."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    return False


def owner_of(file) -> dict:
    """Reads who has a lock file, as `me` says it; nothing where nobody was known to."""
    with contextlib.suppress(OSError, ValueError):
        file.seek(0)
        found = json.loads(file.read())
        return found if isinstance(found, dict) else {}
    return {}


def write(file, content: dict) -> None:
    """Writes who has a lock file."""
    with contextlib.suppress(OSError):  # a full disk; the kernel's lock holds
        file.truncate(0)
        file.write(json.dumps(content).encode())


def beat(file, over: threading.Event) -> None:
    """Shows signs of life at a lock file until it is over."""
    while not over.wait(BEAT):
        with contextlib.suppress(OSError, ValueError):
            os.utime(file.fileno())


def me() -> dict:
    """Says who this process is, and where."""
    return {"who": _who(), "host": platform.node()}


def _who() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"process {os.getpid()} on {platform.node()}" + (f" (Slurm job {job})" if job else "")
