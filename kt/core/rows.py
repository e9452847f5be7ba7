"""The chosen pictures of all splits as rows of a scratch file, and what decoding found."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kt.config import Dataset
from kt.core import step
from kt.core.decode import BadImage, Decoded, decode
from kt.core.entries import POOL, SPLITS, TEST, TRAIN, Entry

MOST_LISTED = 1000  # rejected files in the report
BLOCK_BYTES = 8 << 20


class Rows:
    """R chosen entries in order of split and key.

    Attributes:
        entries: (R,) what was chosen.
        splits: (R,) str.
        faults: (R,) why the file was rejected, or nothing.
        digests: (R,) SHA-256 of the packed pixels.
        modes: (R,) the file's own mode.
        sizes: (R, 2) int64, its own width and height.
        kept: (R,) bool, decoded and not left out.
    """

    def __init__(self, entries: list[Entry]):
        """Starts with nothing read."""
        self.entries = entries
        self.splits = np.array([entry.split for entry in entries], dtype=object)
        self.faults = ["was gone when it should be read"] * len(entries)
        self.digests = [b""] * len(entries)
        self.modes = [""] * len(entries)
        self.sizes = np.zeros((len(entries), 2), np.int64)
        self.kept = np.zeros(len(entries), bool)

    def of(self, split: str) -> np.ndarray:
        """Gives the kept rows of a split, in key order, int64."""
        return np.flatnonzero(self.kept & (self.splits == split))

    def decode(self, source, dataset: Dataset, scratch: Path, threads: int) -> None:
        """Decodes the entries, in the order of their source, to the rows of a scratch file."""
        progress = step.Progress("ingest", len(self.entries), "img")
        row_bytes = 3 * dataset.size * dataset.size
        with (
            open(scratch, "wb") as file,
            ThreadPoolExecutor(threads) as pool,
            warnings.catch_warnings(),
        ):
            # `kt.core.decode` has its own limit.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            for row, result in _results(source, dataset, self.entries, pool, 4 * threads):
                progress.add(1)
                if isinstance(result, BadImage):
                    self.faults[row] = str(result)
                    continue
                decoded, self.digests[row] = result
                file.seek(row * row_bytes)
                file.write(decoded.pixels.data)
                self.faults[row], self.kept[row] = "", True
                self.modes[row] = decoded.mode
                self.sizes[row] = decoded.width, decoded.height
        progress.close()

    def leave_out_copies(self) -> dict[str, int]:
        """Drops from pool and train what also stands in test, by the packed pixels."""
        test = {self.digests[row] for row in self.of(TEST)}
        counts = {}
        for split, name in ((POOL, "left_out_of_pool"), (TRAIN, "left_out_of_train")):
            copies = [row for row in self.of(split) if self.digests[row] in test]
            self.kept[copies] = False
            counts[name] = len(copies)
        pool = {self.digests[row] for row in self.of(POOL)}
        return {**counts, "train_in_pool": sum(self.digests[row] in pool for row in self.of(TRAIN))}

    def blocks(
        self, scratch: Path, picked: np.ndarray, size: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Reads picked rows of the scratch file: offsets and (n, 3, S, S) uint8 of a few MiB."""
        row_bytes = 3 * size * size
        height = max(1, BLOCK_BYTES // row_bytes)
        for first in range(0, len(picked), height):
            packed = np.memmap(scratch, np.uint8, "r")
            packed = packed[: len(packed) // row_bytes * row_bytes].reshape(-1, 3, size, size)
            yield first, packed[picked[first : first + height]]

    def describe(self, others: list[Entry], size: int) -> dict[str, Any]:
        """Gives the counts of the data report; `others` are the entries that were not usable."""
        rejected = [(entry.key, entry.refused) for entry in others if not entry.ignored]
        faults = zip(self.entries, self.faults, strict=True)
        rejected = sorted(rejected + [(entry.key, fault) for entry, fault in faults if fault])
        sizes = self.sizes[[not fault for fault in self.faults]]
        extremes = (("min", np.min), ("median", np.median), ("max", np.max))
        return {
            "splits": {split: self._describe_split(split, size) for split in SPLITS},
            "modes": dict(sorted(Counter(filter(None, self.modes)).items())),
            "sizes": {name: function(sizes, 0).astype(int).tolist() for name, function in extremes},
            "rejected_total": len(rejected),
            "rejected": [{"key": key, "reason": why} for key, why in rejected[:MOST_LISTED]],
            "ignored": sum(entry.ignored for entry in others),
        }

    def _describe_split(self, split: str, size: int) -> dict[str, Any]:
        picked = self.of(split)
        classes = Counter(self.entries[row].class_name for row in picked)
        return {
            "images": len(picked),
            "classes": {name: classes[name] for name in sorted(classes.keys() - {None})},
            "duplicates": len(picked) - len({self.digests[row] for row in picked}),
            "rejected": sum(bool(self.faults[row]) for row in np.flatnonzero(self.splits == split)),
            "smaller": int((self.sizes[picked].min(1, initial=size) < size).sum()),
        }


def _results(
    source, dataset: Dataset, chosen: list[Entry], pool: ThreadPoolExecutor, ahead: int
) -> Iterator[tuple[int, tuple[Decoded, bytes] | BadImage]]:
    """Reads one chosen entry after the other and decodes up to `ahead` at a time."""
    row_of = {entry.key: row for row, entry in enumerate(chosen)}
    waiting: deque = deque()
    for entry in source.entries(dataset):
        row = row_of.get(entry.key) if entry.usable else None
        if row is None:
            continue
        try:
            payload = entry.read()
        except OSError as error:
            yield row, BadImage(f"cannot be read: {error.strerror or error}")
            continue
        waiting.append((row, pool.submit(_packed, payload, dataset)))
        if len(waiting) > ahead:
            row, future = waiting.popleft()
            yield row, future.result()
    for row, future in waiting:
        yield row, future.result()


def _packed(payload: bytes | np.ndarray, dataset: Dataset) -> tuple[Decoded, bytes] | BadImage:
    try:
        decoded = decode(payload, dataset.size, dataset.max_pixels)
    except BadImage as error:
        return error
    return decoded, hashlib.sha256(decoded.pixels.data).digest()
