"""Resume states: written whole, digest-checked, the two newest kept, bound to their settings.

The training only copies its state; a thread writes it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch

from kt.core import parallel, step
from kt.core.ending import lack, line
from kt.core.reached import SAVE_SECONDS
from kt.core.step import ConfigError, log

DIGEST_BYTES = 32
KEPT = 2
STATE_OF_WEIGHTS = 3  # weights and two moments of the optimiser, at most
KEEP, FINISHED = "KT_KEEP_STATE", "finished"  # see `finish`
SAVE_SHARE = 0.01  # of the time that copying and writing them may cost, at most
WRITTEN_PER_SECOND = 500e6  # bytes, on a processor of today; until it is measured


def place(folder: Path | None, digests: list[str]) -> Path | None:
    """Gives the folder of the states of a training on certain files.

    Under the workflow each content of the files has its own, so that after a change upstream the
    training starts anew; by hand there is one, and `newest` refuses states of other files.
    """
    if folder is None or not os.environ.get("KT_WORKFLOW"):
        return folder
    return folder / hashlib.sha256(" ".join(digests).encode()).hexdigest()[:12]


def finish(folder: Path | None, place: Path | None) -> None:
    """Takes away what a job has kept to go on from; on a cluster it is only marked as finished.

    There a job is sent twice when the workflow was killed and started again. Where the second one
    starts after the first has ended, its Snakemake takes away what that one made; it then goes on
    from the last state, which is the end. The workflow takes marked ones away when all is done.

    Args:
        folder: That the job was given.
        place: In it, of its files, see `place`.
    """
    if folder is None:
        return
    if os.environ.get(KEEP):
        place.mkdir(parents=True, exist_ok=True)
        (place / FINISHED).touch()
    else:
        shutil.rmtree(folder, ignore_errors=True)


class Writer:
    """Writes the states of one training beside it; of several processes the first one does."""

    def __init__(self, folder: Path | None, fingerprint: dict, network: torch.nn.Module):
        """Takes the place of the states (None: nothing is written), their settings, the network.

        Raises:
            ResourceError: There is no room for the states of its size that stand there at a time.
        """
        self.folder = folder if parallel.rank() == 0 else None
        self.fingerprint = fingerprint
        self.last, self.copying, self.writing_took = time.monotonic(), 0.0, 0.0  # seconds
        if self.folder is not None:
            weights = sum(value.nbytes for value in network.state_dict().values())
            there = sum(path.stat().st_size for path in self.folder.glob("step-*.state"))
            step.check_space(self.folder, (KEPT + 1) * STATE_OF_WEIGHTS * weights - there)
            self.writing_took = STATE_OF_WEIGHTS * weights / WRITTEN_PER_SECOND
        self.thread: ThreadPoolExecutor | None = None
        self.writing: Future | None = None

    def due(self) -> bool:
        """Says whether it is time for a state: one costs at most `SAVE_SHARE`, written or not."""
        pause = max(SAVE_SECONDS, (self.copying + self.writing_took) / SAVE_SHARE)
        return self.folder is not None and time.monotonic() - self.last > pause

    def save(self, number: int, content: dict) -> None:
        """Copies a state and has it written; waits for the one before.

        Raises:
            ResourceError: The state before this one could not be written.
        """
        if self.folder is None:
            return
        start = time.monotonic()
        copied = _copied(content)
        self.last = time.monotonic()
        self.copying = self.last - start
        self.close()
        self.thread = ThreadPoolExecutor(1, "resume")
        self.writing = self.thread.submit(self._write, number, copied)

    def _write(self, number: int, copied: dict) -> None:
        """Writes a state, in a thread of its own; takes note of the processor time."""
        start = time.thread_time()
        save(self.folder, number, copied, self.fingerprint)
        self.writing_took = time.thread_time() - start

    def close(self) -> None:
        """Waits until the last state is written.

        Raises:
            ResourceError: It could not be.
        """
        if self.thread is not None:
            writing, thread, self.thread = self.writing, self.thread, None
            thread.shutdown()
            writing.result()


def _copied(value):
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def save(folder: Path, number: int, content: dict, fingerprint: dict) -> None:
    """Writes the state of a training at a step.

    Args:
        folder: Where the states stand.
        number: The step.
        content: Tensors, numbers and strings.
        fingerprint: The settings that whoever goes on must share.
    """
    path = folder / f"step-{number:09d}.state"
    with step.replacing(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(bytes(DIGEST_BYTES))
            payload = _Hashed(file)
            torch.save({**content, "fingerprint": _plain(fingerprint)}, payload)
            file.seek(0)
            file.write(payload.hash.digest())
    # Those of later steps are broken, or the training would have gone on there.
    states = sorted(folder.glob("step-*.state"))
    before, after = [old for old in states if old < path], [old for old in states if old > path]
    for old in before[: 1 - KEPT] + after:
        old.unlink(missing_ok=True)


class _Hashed(io.RawIOBase):
    """A file that is written from its place on, and hashed on the way: no copy in memory."""

    def __init__(self, file: BinaryIO):
        self.file, self.hash = file, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.hash.update(data)
        return self.file.write(data)


def _differing(one: dict, two: dict) -> list[str]:
    """Names the keys whose values differ, `training.lr` where both values have keys themselves."""
    found = []
    for key in sorted(one | two):
        both = one.get(key), two.get(key)
        if all(isinstance(value, dict) for value in both):
            found += [f"{key}.{inner}" for inner in _differing(*both)]
        elif both[0] != both[1]:
            found.append(key)
    return found


def newest(folder: Path, fingerprint: dict, device: torch.device) -> dict | None:
    """Reads the newest state that is whole; a broken one is said aloud and passed over.

    Raises:
        ConfigError: It was made with other settings; the differing keys are named.
    """
    for path in sorted(folder.glob("step-*.state"), reverse=True):
        raw = path.read_bytes()
        payload = raw[DIGEST_BYTES:]
        if hashlib.sha256(payload).digest() != raw[:DIGEST_BYTES]:
            log.warning("%s is broken, the state before it is used", path)
            continue
        try:
            content = torch.load(io.BytesIO(payload), device, weights_only=True)
            found, mine = json.loads(content.pop("fingerprint")), json.loads(_plain(fingerprint))
        except Exception as error:  # torch raises anything on what is no state of ours
            if lack(error):
                raise
            log.warning("%s is no state (%s), the one before it is used", path, line(error))
            continue
        if differing := _differing(mine, found):
            raise ConfigError(
                f"{path} was made with other settings or files ({', '.join(differing)} differ); "
                f"remove {folder} to start anew"
            )
        return content
    return None


def _plain(fingerprint: dict) -> str:
    return json.dumps(fingerprint, sort_keys=True, default=step.plain)
