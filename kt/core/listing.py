"""What a source holds, listed once, as columns in a file: a million names need no memory.

Snippets of a row are found through `kt.core.listing.Listing`; the names stand one after the other
in a file of their own. Both files are mapped, so that the system may drop them from memory.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from kt.core import spill
from kt.core.entries import Entry
from kt.core.layouts import SPLITS

MOST_LISTED = 1000  # refused files in the report
WORD = 4  # bytes of a name that are compared at once
COLUMNS = np.dtype(
    [("start", "<i8"), ("length", "<i4"), ("split", "i1"), ("label", "<i4"), ("rank", ">u8")]
    + [("name", "<u8"), ("stamp", "<u8")]
)


@dataclasses.dataclass(frozen=True)
class Listing:
    """N usable entries of a source, in its order.

    Attributes:
        columns: (N,) structured: `start` and `length` of the name, number of the `split`, number
            of the class or -1 (`label`), `rank` in the draw of subsets, hashes of `name`, `stamp`.
        names: (bytes,) uint8, UTF-8.
        classes: Names of the classes in order of appearance.
        ignored: How many files are no pictures.
        refused: The first 1,000 refused files in name order, with the reason.
        num_refused: How many there are.
        folder: For files that are of use as long as the process.
    """

    columns: np.ndarray
    names: np.ndarray
    classes: list[str]
    ignored: int
    refused: list[tuple[str, str]]
    num_refused: int
    folder: Path

    def key(self, row: int) -> str:
        """Gives the key of one row."""
        start, length = int(self.columns["start"][row]), int(self.columns["length"][row])
        return self.names[start : start + length].tobytes().decode()

    def keys(self, rows: np.ndarray) -> list[str]:
        """Gives the keys of rows."""
        return [self.key(row) for row in rows]

    def in_key_order(self, rows: np.ndarray) -> np.ndarray:
        """Sorts rows by their keys, (n,) int64, without making strings of them.

        UTF-8 sorts as its characters do. From the last word of the names to the first.
        """
        longest = max((self.columns["length"][part].max() for part in spill.parts(rows)), default=0)
        words = reversed(range(-(-int(longest) // WORD)))
        keys = (functools.partial(self._word, word) for word in words)
        return spill.arranged(self.folder, rows, keys)

    def in_drawn_order(self) -> np.ndarray:
        """Sorts all rows by their rank, (N,) int64."""
        rank = self.columns["rank"]
        rows = spill.where(self.folder, np.ones(len(rank), bool))
        halves = (lambda part: rank[part] & spill.LOW, lambda part: rank[part] >> spill.HALF)
        return spill.arranged(self.folder, rows, halves)

    def _word(self, word: int, rows: np.ndarray) -> np.ndarray:
        """Gives 4 bytes of each name as a number, zeros behind its end; (n,) uint32."""
        start, length = self.columns["start"][rows], self.columns["length"][rows]
        place = np.arange(word * WORD, (word + 1) * WORD)
        inside = place < length[:, None]
        found = self.names[np.where(inside, start[:, None] + place, 0)]
        return np.where(inside, found, 0).astype(np.uint8).view(">u4")[:, 0]


def create(entries: Iterable[Entry], folder: Path, seed: int) -> Listing:
    """Lists the entries into two files of a folder.

    Args:
        entries: Of a source; nothing is read.
        folder: Takes the files `columns` and `names`.
        seed: Of the draw of subsets, whose order is that of a hash of seed and key, so that it
            depends on nothing else.
    """
    classes: dict[str, int] = {}
    refused: list[tuple[str, str]] = []
    counts = {"ignored": 0, "refused": 0, "bytes": 0}
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "columns", "wb") as columns, open(folder / "names", "wb") as names:
        for block in _blocks(_usable(entries, refused, counts)):
            rows = np.zeros(len(block), COLUMNS)
            for number, (key, class_name, split, stamp) in enumerate(block):
                name = key.encode()
                label = -1
                if class_name is not None:
                    label = classes.setdefault(class_name, len(classes))
                rank = _hash(f"{seed} {key}".encode(), 16)
                stamp = int.from_bytes(_hash(stamp.encode()), "little")
                split = SPLITS.index(split)
                rows[number] = (counts["bytes"], len(name), split, label, 0, hash_of(name), stamp)
                rows["rank"][number] = int.from_bytes(rank[:8], "big")
                counts["bytes"] += len(name)
                names.write(name)
            rows.tofile(columns)
    return Listing(
        spill.mapped(folder / "columns", COLUMNS),
        spill.mapped(folder / "names", np.uint8),
        list(classes),
        counts["ignored"],
        sorted(refused)[:MOST_LISTED],
        counts["refused"],
        folder,
    )


def hash_of(name: bytes) -> int:
    """Gives 64 bits of a name."""
    return int.from_bytes(_hash(name), "little")


def _hash(content: bytes, size: int = 8) -> bytes:
    return hashlib.blake2b(content, digest_size=size).digest()


def _usable(entries: Iterable[Entry], refused: list, counts: dict[str, int]) -> Iterator[Entry]:
    """Passes on what is a picture and counts the rest; of the refused the first ones are kept."""
    for entry in entries:
        if entry.usable:
            yield entry
        elif entry.ignored:
            counts["ignored"] += 1
        else:
            counts["refused"] += 1
            refused.append((entry.key, entry.refused))
            if len(refused) > 4 * MOST_LISTED:
                refused[:] = sorted(refused)[:MOST_LISTED]


def _blocks(entries: Iterator[Entry]) -> Iterator[list[tuple]]:
    """Gives key, class, split and stamp of some thousand entries at a time."""
    block = []
    for entry in entries:  # not kept themselves: what reads may hold a lot
        block.append((entry.key, entry.class_name, entry.split, entry.stamp))
        if len(block) == spill.BLOCK:
            yield block
            block = []
    if block:
        yield block
