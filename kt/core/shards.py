"""Decodes chosen pictures in shards, each kept whole on disk: a killed ingest goes on behind them.

A shard is a table (`kt.core.table`) of the next pictures in the order of the source: their pixels
or JPEGs, and what became of each. It belongs to the pictures whose names and stamps it was made
of, and to the settings; any other is made anew.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from kt.config import Dataset
from kt.core import copies, decode, jpeg, spill, step, table
from kt.core.listing import Listing, hash_of
from kt.core.parts import WHOLE, Part
from kt.core.step import DataError, lack, log

MOST = 2048  # pictures in a shard
MOST_BYTES = 32 << 20
PROBE = 64  # pictures by which the work is judged
GONE = "was gone when it should be read"
UNREAD = "cannot be read"  # as may be for the moment only: such a shard is not kept
MADE = 1  # raised when shards of an earlier version are of no use
ARRAYS = {"prints": 2, "digests": 1, "modes": 1, "sizes": 2, "faults": 1, "lengths": 1, "data": 1}


class Result(NamedTuple):
    """What became of one picture.

    Attributes:
        data: Its packed pixels, or their JPEG, (bytes,) uint8.
        digest: 64 bits of the pixels.
        print: (64,) uint8, see `kt.core.copies`.
        mode: The file's own.
        size: Its own width and height.
        fault: Why it was rejected, or nothing.
    """

    data: np.ndarray = np.empty(0, np.uint8)
    digest: int = 0
    print: np.ndarray | int = 0
    mode: str = ""
    size: tuple[int, int] = (0, 0)
    fault: str = GONE


class Shards:
    """M chosen pictures in the order of their source, in shards of `height`, in one folder."""

    def __init__(self, folder: Path, listing: Listing, chosen: np.ndarray, dataset: Dataset):
        """Takes the chosen rows of the listing, (M,) int64 in rising order."""
        self.folder, self.listing, self.chosen, self.dataset = folder, listing, chosen, dataset
        row_bytes = 3 * dataset.size * dataset.size
        self.height = max(1, min(MOST, MOST_BYTES // row_bytes))
        self.count = -(-len(chosen) // self.height)

    def path(self, number: int) -> Path:
        """Gives the place of a shard."""
        return self.folder / f"shard-{number:06d}.h5"

    def decode(self, source, threads: int, part: Part = WHOLE) -> None:
        """Makes all shards of a part that are not there."""
        mine = range(*part.span(self.count, 1))  # a run: tar shards of others stay closed
        left = {number for number in mine if not self._is_whole(number)}
        for number in left:  # nor taken for whole if none of its pictures is there any more
            self.path(number).unlink(missing_ok=True)
        if len(left) < len(mine):
            log.info("going on: %d of %d shards are there", len(mine) - len(left), len(mine))
        total, rows = (sum(map(self._length, some)) for some in (mine, left))
        progress = step.Progress("ingest", total, "img", total - rows)
        whole = [number not in left for number in range(self.count)]
        pending: list[tuple[int, Result]] = []
        with warnings.catch_warnings():
            # `kt.core.decode` has its own limit.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            for place, result in self._results(source, threads, whole):
                if pending and place // self.height != pending[0][0] // self.height:
                    self._write(pending[0][0] // self.height, pending)
                    pending = []
                pending.append((place, result))
                progress.add(1)
        if pending:
            self._write(pending[0][0] // self.height, pending)
        for number in range(self.count):
            if not whole[number] and not self.path(number).exists():
                self._write(number, [])
        progress.close()

    def _length(self, number: int) -> int:
        """Gives the pictures of a shard: the last one may have fewer."""
        return min(self.height, len(self.chosen) - number * self.height)

    def _results(self, source, threads: int, whole: list[bool]) -> Iterator[tuple[int, Result]]:
        """Reads the source once and decodes some pictures at a time; places rise."""
        place_of = self._places()
        waiting: deque = deque()
        probe = _Probe(len(self.chosen))
        last = -1
        pool = ThreadPoolExecutor(threads)
        try:
            for entry in source.entries(self.dataset):
                place = place_of(entry.key) if entry.usable else None
                if place is None or whole[place // self.height] or place <= last:
                    continue
                last = place
                try:
                    payload = entry.read()
                except OSError as error:
                    if lack(error) == "memory":  # or open files
                        raise
                    fault = f"{UNREAD}: {error.strerror or error}"
                    waiting.append((place, pool.submit(Result, fault=fault)))
                else:
                    waiting.append((place, pool.submit(_packed, payload, self.dataset)))
                if len(waiting) > 4 * threads:
                    place, future = waiting.popleft()
                    yield place, probe.seen(future.result())
            for place, future in waiting:
                yield place, future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _places(self) -> Callable[[str], int | None]:
        """Gives the function that finds the place of a key, None where it was not chosen."""
        names = self.listing.columns["name"]
        upper = (names[part] >> spill.HALF for part in spill.parts(self.chosen))
        order = spill.placed(self.listing.folder, upper)

        def place_of(key: str) -> int | None:
            name = np.uint64(hash_of(key.encode()))
            for at in range(int(np.searchsorted(order, name & ~spill.LOW)), len(order)):
                place = int(order[at] & spill.LOW)
                if order[at] >> spill.HALF != name >> spill.HALF:
                    break
                if names[self.chosen[place]] == name:
                    return place
            return None

        return place_of

    def _settings(self, number: int) -> dict:
        """Gives what a shard belongs to."""
        rows = self.chosen[number * self.height : (number + 1) * self.height]
        columns = self.listing.columns[rows]
        names = np.ascontiguousarray(columns[["name", "stamp"]]).tobytes()
        settings = {name: getattr(self.dataset, name) for name in ("size", "max_pixels", "storage")}
        settings["prints"] = self.dataset.near_copies is not None
        if self.dataset.levels:  # shards of before know nothing of them
            settings["levels"] = [*self.dataset.levels]
        path = Path(self.dataset.path or "")
        if path.is_file():  # a source may give its pictures no stamps
            settings["file"] = [path.stat().st_size, path.stat().st_mtime_ns]
        return {"pictures": hashlib.sha256(names).hexdigest(), "made": MADE, **settings}

    def _is_whole(self, number: int) -> bool:
        path = self.path(number)
        if not path.exists():
            return False
        try:
            with table.read(path, "shard", {f"*{name}": n for name, n in ARRAYS.items()}) as file:
                if table.text(file, "config") != json.dumps(self._settings(number), sort_keys=True):
                    return False
                for name in set(ARRAYS) - {"data"}:
                    table.load(file, name)
                table.verify(file, "data")
                faults = table.strings(file, "faults")
                return not any(one == GONE or one.startswith(UNREAD) for one in faults)
        except DataError as error:
            log.warning("%s; it is made anew", error)
        return False

    def _write(self, number: int, results: list[tuple[int, Result]]) -> None:
        first = number * self.height
        rows = [Result()] * self._length(number)
        for place, result in results:
            rows[place - first] = result
        prints = np.zeros((len(rows), copies.PRINT**2), np.uint8)
        for row, result in enumerate(rows):
            prints[row] = result.print
        lengths = np.array([len(row.data) for row in rows], np.int64)
        with table.create(self.path(number), "shard", self._settings(number)) as file:
            table.put(file, "prints", prints)
            table.put(file, "digests", np.array([row.digest for row in rows], np.uint64))
            table.put(file, "modes", np.array([row.mode for row in rows], "S8"))
            table.put(file, "sizes", np.array([row.size for row in rows], np.int32))
            table.put(file, "lengths", lengths)
            table.put_strings(file, "faults", [row.fault for row in rows])
            data = table.add(file, "data", (int(lengths.sum()),), np.uint8, contiguous=True)
            data[...] = np.concatenate([row.data for row in rows])


class _Probe:
    """Judges by the first pictures whether loading what is quicker will pay."""

    def __init__(self, total: int):
        self.total, self.count, self.pixels = total, 0, 0

    def seen(self, result: Result) -> Result:
        """Counts a picture."""
        if self.count < PROBE:
            self.count += 1
            self.pixels += result.size[0] * result.size[1]
            if self.count == PROBE and self.pixels / PROBE * self.total > decode.WORTH:
                decode.hurry()
        return result


def _packed(payload: bytes | np.ndarray, dataset: Dataset) -> Result:
    try:
        found = decode.decode(payload, dataset.size, dataset.max_pixels, dataset.levels)
    except decode.BadImage as error:
        return Result(fault=str(error))
    digest = int.from_bytes(hashlib.sha256(found.pixels.data).digest()[:8], "little")
    print_of = copies.print_of(found.pixels) if dataset.near_copies is not None else 0
    data = found.pixels.reshape(-1)
    if dataset.storage == "jpeg":
        data = _as_jpeg(payload, found)
    return Result(data, digest, print_of, found.mode, (found.width, found.height), "")


def _as_jpeg(payload: bytes | np.ndarray, found: decode.Decoded) -> np.ndarray:
    """Gives the file's own bytes where they are an ordinary JPEG of the packed size already."""
    size = found.pixels.shape[-1]
    header = jpeg.frame(payload) if isinstance(payload, bytes) else None
    if header is None or (header.width, header.height) != (size, size):
        image = Image.fromarray(found.pixels.transpose(1, 2, 0))
        payload = jpeg.encode(image, jpeg.QUALITY, subsampling=0)
    return np.frombuffer(payload, np.uint8)
