"""The chosen pictures of all splits in key order, and what decoding found of each."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kt.core import copies, encoded, spill, table
from kt.core.layouts import POOL, SPLITS, TEST, TRAIN
from kt.core.listing import MOST_LISTED
from kt.core.shards import ARRAYS, Shards

BLOCK, BLOCK_BYTES = 512, 8 << 20  # most pictures, each perhaps of another shard, and bytes
OPEN = 64  # shards; a process may have 1024 files, and a block holds its own
FOUND = np.dtype(
    [("digest", "<u8"), ("start", "<i8"), ("length", "<i8"), ("width", "<i4"), ("height", "<i4")]
    + [("mode", "u1"), ("kept", "?"), ("bad", "?"), ("print", "u1", copies.PRINT**2)]
)


class Rows:
    """M chosen pictures.

    Attributes:
        splits: (M,) int8, number of the split of each.
        found: (M,) structured, a file that is mapped: digest of the pixels, place in the file of
            its shard, own size, number of its mode, whether it is kept (decoded and not left out)
            or bad, print.
        modes: Names of the files' modes.
        faults: Place of each bad file to the reason.
    """

    def __init__(self, shards: Shards, splits: np.ndarray, place: Path):
        """Reads what all shards say; `place` is for the file of `found`."""
        self.shards, self.splits = shards, splits
        self.listing, self.chosen, self.size = shards.listing, shards.chosen, shards.dataset.size
        self.modes: list[str] = []
        self.faults: dict[int, str] = {}
        self.found = np.memmap(place, FOUND, "w+", shape=(len(splits),)).view(np.ndarray)
        for number in range(shards.count):
            self._read(number)

    def _read(self, number: int) -> None:
        first = number * self.shards.height
        arrays = {f"*{name}": dimensions for name, dimensions in ARRAYS.items()}
        with table.read(self.shards.path(number), "shard", arrays) as file:
            found = self.found[first : first + self.shards.height]
            found["digest"], lengths = table.load(file, "digests"), table.load(file, "lengths")
            found["print"] = table.load(file, "prints")
            found["length"], found["start"] = lengths, np.cumsum(lengths) - lengths
            found["start"] += file["data"].id.get_offset() or 0  # none where all are bad
            found["width"], found["height"] = table.load(file, "sizes").T
            modes, index = np.unique(table.load(file, "modes"), return_inverse=True)
            names = [mode.decode() for mode in modes]
            self.modes += [name for name in names if name not in self.modes]
            found["mode"] = np.array([self.modes.index(name) for name in names], np.uint8)[index]
            for row, fault in enumerate(table.strings(file, "faults")):
                if fault:
                    self.faults[first + row] = fault
                found[row]["bad"], found[row]["kept"] = bool(fault), not fault

    def of(self, split: str) -> np.ndarray:
        """Gives the kept pictures of a split in key order, (n,) int64."""
        kept, parts = self.found["kept"], spill.parts(self.all_of(split))
        return self._stored(np.int64, (part[kept[part]] for part in parts))

    @functools.cache  # noqa: B019 - as long as the rows
    def all_of(self, split: str) -> np.ndarray:
        """Gives the chosen pictures of a split in key order, (n,) int64."""
        number = SPLITS.index(split)
        pairs = zip(spill.parts(self.chosen), spill.parts(self.splits), strict=True)
        rows = self._stored(np.int64, (part[splits == number] for part, splits in pairs))
        parts = spill.parts(self.listing.in_key_order(rows))
        return self._stored(np.int64, (np.searchsorted(self.chosen, part) for part in parts))

    def _stored(self, dtype, blocks: Iterable[np.ndarray]) -> np.ndarray:
        return spill.stored(self.listing.folder, dtype, blocks)

    def keys(self, places: np.ndarray) -> list[str]:
        """Gives the keys of pictures."""
        return self.listing.keys(self.chosen[places])

    def labels(self, places: np.ndarray) -> np.ndarray:
        """Gives the numbers of the classes of pictures, (n,) int32, -1 for none."""
        return self.listing.columns["label"][self.chosen[places]]

    def data(self, place: int) -> np.ndarray:
        """Gives the pixels, or the JPEG, of one picture as a part of its shard's file."""
        start, length = (int(self.found[name][place]) for name in ("start", "length"))
        return self._mapped(int(place) // self.shards.height)[start : start + length]

    @functools.lru_cache(OPEN)  # noqa: B019 - as long as the rows
    def _mapped(self, number: int) -> np.ndarray:
        return spill.mapped(self.shards.path(number), np.uint8)

    def pixels(self, place: int) -> np.ndarray:
        """Gives the packed pixels of one picture, (3, S, S) uint8."""
        data = self.data(place)
        if self.shards.dataset.storage == "jpeg":
            return encoded.decode(data, self.size)
        return data.reshape(3, self.size, self.size)

    def blocks(self, places: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Gives what follows one another in a pack, with its first row, a few MiB at a time."""
        height = max(1, min(BLOCK, BLOCK_BYTES // (3 * self.size**2)))
        for first in range(0, len(places), height):
            yield first, [self.data(place) for place in places[first : first + height]]

    def prints(self, places: np.ndarray) -> np.ndarray:
        """Gives the prints of pictures, (n, 64) uint8."""
        return self.found["print"][places]

    # ------------------------------------------------------------------------ copies

    def leave_out_copies(self, limit: float | None) -> dict[str, Any]:
        """Drops from pool and train what also stands in test.

        Args:
            limit: Most difference of a near copy, see `kt.core.copies`; None: equal pixels only.
        """
        test = self.of(TEST)
        counts: dict[str, Any] = {}
        pairs: list[tuple[int, int, float]] = []
        for split, name in ((POOL, "pool"), (TRAIN, "train")):
            same = self._also_in(TEST, split)
            self.found["kept"][same] = False
            near = []
            if limit is not None:
                near = list(copies.find(self.of(split), test, self.prints, self.pixels, limit))
                self.found["kept"][[place for place, *_ in near]] = False
            counts[f"left_out_of_{name}"] = len(same) + len(near)
            counts[f"near_copies_in_{name}"] = len(near)
            pairs += near
        both = len(self._also_in(POOL, TRAIN))
        return {**counts, "train_in_pool": both, "near_copies": self._named(pairs)}

    def _also_in(self, other: str, split: str) -> np.ndarray:
        """Gives the kept pictures of a split whose pixels also stand in another one."""
        digests, known = self.found["digest"], self._digests(other)
        parts = spill.parts(self.of(split))
        same = (part[spill.contains(known, digests[part])] for part in parts)
        return self._stored(np.int64, same)

    def _digests(self, split: str) -> np.ndarray:
        """Gives the digests of the kept pictures of a split, (n,) uint64, sorted."""
        parts = spill.parts(self.of(split))
        return self._sorted("digest", (self.found["digest"][part] for part in parts))

    def _good(self, name: str) -> Iterator[np.ndarray]:
        """Gives what was found of the pictures that are not bad, in blocks (n,)."""
        return (part[name][~part["bad"]] for part in spill.parts(self.found))

    def _sorted(self, name: str, blocks: Iterable[np.ndarray]) -> np.ndarray:
        values = self._stored(FOUND[name], blocks)
        values.sort()
        return values

    def _named(self, pairs: list[tuple[int, int, float]]) -> list[dict[str, Any]]:
        return [
            {
                "key": self.listing.key(self.chosen[place]),
                "of": self.listing.key(self.chosen[other]),
                "difference": round(difference, 4),
            }
            for place, other, difference in pairs[:MOST_LISTED]
        ]

    # ------------------------------------------------------------------------ the data report

    def describe(self) -> dict[str, Any]:
        """Gives the counts of the data report."""
        faults = [(self.listing.key(self.chosen[place]), why) for place, why in self.faults.items()]
        rejected = sorted(self.listing.refused + faults)[:MOST_LISTED]
        modes: Counter[str] = Counter()
        for mode in self._good("mode"):
            modes.update(self.modes[number] for number in mode.tolist())
        sizes = [self._sorted(name, self._good(name)) for name in ("width", "height")]
        half = len(sizes[0]) // 2
        middle = [(int(edge[half]) + int(edge[-1 - half])) // 2 for edge in sizes]
        return {
            "splits": {split: self._describe_split(split) for split in SPLITS},
            "modes": dict(sorted(modes.items())),
            "sizes": {
                "min": [int(edge[0]) for edge in sizes],
                "median": middle,
                "max": [int(edge[-1]) for edge in sizes],
            },
            "rejected_total": self.listing.num_refused + len(self.faults),
            "rejected": [{"key": key, "reason": why} for key, why in rejected],
            "ignored": self.listing.ignored,
        }

    def _describe_split(self, split: str) -> dict[str, Any]:
        picked, smaller = self.of(split), 0
        labels: Counter[int] = Counter()
        for part in spill.parts(picked):
            found = self.found[part]
            smaller += int((np.minimum(found["width"], found["height"]) < self.size).sum())
            labels.update(self.labels(part).tolist())
        names = sorted((self.listing.classes[label], label) for label in labels if label >= 0)
        digests = self._digests(split)
        here = self.splits == SPLITS.index(split)
        return {
            "images": len(picked),
            "classes": {name: labels[label] for name, label in names},
            "duplicates": int((digests[1:] == digests[:-1]).sum()),
            "rejected": int((self.found["bad"] & here).sum()),
            "smaller": smaller,
        }
