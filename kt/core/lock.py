"""Locks a folder for one process. Imports no torch."""

from __future__ import annotations

import fcntl
import os
import platform
from pathlib import Path

from kt.core.step import ResourceError, log


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
    file.write(f"{os.getpid()} on {platform.node()}")
    file.flush()
    return file
