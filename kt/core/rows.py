"""The chosen pictures of all splits in key order, and what decoding found of each."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kt.core import copies, encoded, table
from kt.core.entries import POOL, SPLITS, TEST, TRAIN
from kt.core.listing import MOST_LISTED
from kt.core.shards import ARRAYS, MOST, Shards

BLOCK_BYTES = 8 << 20
FOUND = np.dtype(
    [("digest", "<u8"), ("start", "<i8"), ("length", "<i8"), ("width", "<i4"), ("height", "<i4")]
    + [("mode", "u1"), ("kept", "?"), ("bad", "?")]
)


class Rows:
    """M chosen pictures.

    Attributes:
        splits: (M,) int8, number of the split of each.
        found: (M,) structured, a file that is mapped: digest of the pixels, place in the data of
            its shard, own size, number of its mode, whether it is kept (decoded and not left out)
            or bad.
        modes: Names of the files' modes.
        faults: Place of each bad file to the reason.
    """

    def __init__(self, shards: Shards, splits: np.ndarray, place: Path):
        """Reads what all shards say; `place` is for the file of `found`."""
        self.shards, self.splits = shards, splits
        self.listing, self.chosen, self.size = shards.listing, shards.chosen, shards.dataset.size
        self.modes: list[str] = []
        self.faults: dict[int, str] = {}
        self.found = np.memmap(place, FOUND, "w+", shape=(len(splits),))
        for number in range(shards.count):
            self._read(number)

    def _read(self, number: int) -> None:
        first = number * self.shards.height
        with self._open(number) as file:
            found = self.found[first : first + self.shards.height]
            found["digest"], lengths = table.load(file, "digests"), table.load(file, "lengths")
            found["length"], found["start"] = lengths, np.cumsum(lengths) - lengths
            found["width"], found["height"] = table.load(file, "sizes").T
            modes, index = np.unique(table.load(file, "modes"), return_inverse=True)
            names = [mode.decode() for mode in modes]
            self.modes += [name for name in names if name not in self.modes]
            found["mode"] = np.array([self.modes.index(name) for name in names], np.uint8)[index]
            for row, fault in enumerate(table.strings(file, "faults")):
                if fault:
                    self.faults[first + row] = fault
                found[row]["bad"], found[row]["kept"] = bool(fault), not fault

    def _open(self, number: int):
        arrays = {f"*{name}": dimensions for name, dimensions in ARRAYS.items()}
        return table.read(self.shards.path(number), "shard", arrays)

    def of(self, split: str) -> np.ndarray:
        """Gives the kept pictures of a split in key order, (n,) int64."""
        places = self._in_key_order(SPLITS.index(split))
        return places[self.found["kept"][places]]

    @functools.cache  # noqa: B019 - as long as the rows
    def _in_key_order(self, split: int) -> np.ndarray:
        rows = self.listing.in_key_order(self.chosen[self.splits == split])
        return np.searchsorted(self.chosen, rows)

    def keys(self, places: np.ndarray) -> list[str]:
        """Gives the keys of pictures."""
        return self.listing.keys(self.chosen[places])

    def data(self, place: int) -> np.ndarray:
        """Gives the pixels, or the JPEG, of one picture as a part of its shard's file."""
        start, length = (int(self.found[name][place]) for name in ("start", "length"))
        return self._mapped(int(place) // self.shards.height)[start : start + length]

    @functools.cache  # noqa: B019 - as long as the rows
    def _mapped(self, number: int) -> np.ndarray:
        with self._open(number) as file:
            offset, shape = file["data"].id.get_offset(), file["data"].shape
        # A plain array: parts of a memmap take long to make.
        return np.memmap(self.shards.path(number), np.uint8, "r", offset, shape).view(np.ndarray)

    def pixels(self, place: int) -> np.ndarray:
        """Gives the packed pixels of one picture, (3, S, S) uint8."""
        data = self.data(place)
        if self.shards.dataset.storage == "jpeg":
            return encoded.decode(data, self.size)
        return data.reshape(3, self.size, self.size)

    def blocks(self, places: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Gives what follows one another in a pack, with its first row, a few MiB at a time."""
        height = max(1, min(MOST, BLOCK_BYTES // (3 * self.size**2)))
        for first in range(0, len(places), height):
            yield first, [self.data(place) for place in places[first : first + height]]

    def prints(self, places: np.ndarray) -> np.ndarray:
        """Gives the prints of pictures, (n, 64) uint8."""
        prints = np.zeros((len(places), copies.PRINT**2), np.uint8)
        number = places // self.shards.height
        for shard in np.unique(number):
            with self._open(shard) as file:
                inside = number == shard
                prints[inside] = table.load(file, "prints")[places[inside] % self.shards.height]
        return prints

    # ------------------------------------------------------------------------ copies

    def leave_out_copies(self, limit: float | None) -> dict[str, Any]:
        """Drops from pool and train what also stands in test.

        Args:
            limit: Most difference of a near copy, see `kt.core.copies`; None: equal pixels only.
        """
        digests = self.found["digest"]
        test = self.of(TEST)
        counts: dict[str, Any] = {}
        pairs: list[tuple[int, int, float]] = []
        for split, name in ((POOL, "pool"), (TRAIN, "train")):
            same = self.of(split)
            same = same[np.isin(digests[same], digests[test])]
            self.found["kept"][same] = False
            near = []
            if limit is not None:
                near = list(copies.find(self.of(split), test, self.prints, self.pixels, limit))
                self.found["kept"][[place for place, *_ in near]] = False
            counts[f"left_out_of_{name}"] = len(same) + len(near)
            counts[f"near_copies_in_{name}"] = len(near)
            pairs += near
        both = np.isin(digests[self.of(TRAIN)], digests[self.of(POOL)])
        return {**counts, "train_in_pool": int(both.sum()), "near_copies": self._named(pairs)}

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
        good = ~self.found["bad"]
        sizes = np.stack([self.found["width"][good], self.found["height"][good]], 1)
        extremes = (("min", np.min), ("median", np.median), ("max", np.max))
        numbers = np.bincount(self.found["mode"][good], minlength=len(self.modes)).tolist()
        modes = {name: number for name, number in zip(self.modes, numbers, strict=True) if number}
        return {
            "splits": {split: self._describe_split(split) for split in SPLITS},
            "modes": dict(sorted(modes.items())),
            "sizes": {name: function(sizes, 0).astype(int).tolist() for name, function in extremes},
            "rejected_total": self.listing.num_refused + len(self.faults),
            "rejected": [{"key": key, "reason": why} for key, why in rejected],
            "ignored": self.listing.ignored,
        }

    def _describe_split(self, split: str) -> dict[str, Any]:
        picked = self.of(split)
        labels = Counter(self.listing.columns["label"][self.chosen[picked]].tolist())
        names = sorted((self.listing.classes[label], label) for label in labels if label >= 0)
        shorter = np.minimum(self.found["width"][picked], self.found["height"][picked])
        here = self.splits == SPLITS.index(split)
        return {
            "images": len(picked),
            "classes": {name: labels[label] for name, label in names},
            "duplicates": len(picked) - len(np.unique(self.found["digest"][picked])),
            "rejected": int(self.found["bad"][here].sum()),
            "smaller": int((shorter < self.size).sum()),
        }
