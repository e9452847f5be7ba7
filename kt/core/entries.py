"""What a source hands over: entries, one for each picture, and the meaning of folder names.

Every file of `kt/sources` offers `entries(dataset)`, an iterator of `Entry`, and `origin(dataset)`,
a mapping for the data report that says where the pictures came from.
"""

from __future__ import annotations

import array
import dataclasses
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from kt.core.ending import DataError, log

SPLITS = POOL, TRAIN, TEST = ("train-unlabelled", "train", "test")
FEWEST = 10  # images to learn from without labels
# Other usual names of the splits, with small letters and hyphens; the first that is there counts.
USUAL = {
    POOL: ("train-unlabelled", "train-unlabeled", "unlabelled", "unlabeled"),
    TRAIN: ("train", "training"),
    TEST: ("test", "testing", "val", "valid", "validation"),
}
# What a name may end with to count as a picture. The content, not the name, decides how it is read.
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm".split()
)
DRIVE = re.compile(r"[A-Za-z]:[\\/]")


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One file of a source.

    Attributes:
        split: One of `SPLITS`.
        key: Unique name, clean UTF-8.
        class_name: None where unknown.
        read: Gives the bytes of an image file, or pixels (H, W) or (H, W, 3) uint8; valid only
            until the iterator moves on; raises OSError where it cannot.
        stamp: Changes with the file's content, such as its size and time; empty where the content
            has its own digest.
        refused: Why the file is not read, for the data report; empty for pictures.
        ignored: It is no picture at all (hidden, another suffix) and is only counted.
    """

    split: str
    key: str
    class_name: str | None
    read: Callable[[], bytes | np.ndarray]
    refused: str = ""
    ignored: bool = False
    stamp: str = ""

    @property
    def usable(self) -> bool:
        """Whether it is a picture to read."""
        return not (self.refused or self.ignored)


@dataclasses.dataclass(frozen=True, slots=True)
class File:
    """One file of a folder or an archive, before its name is given a meaning.

    Attributes:
        name: Path inside the root, as it stands there.
        size: Bytes.
        read: Gives its bytes.
        refused: Why it must not be read, such as a link; else empty.
        stamp: Changes with its content.
    """

    name: str
    size: int
    read: Callable[[], bytes]
    refused: str = ""
    stamp: str = ""


class Plan(NamedTuple):
    """What the names of all files say together.

    Attributes:
        depth: Of the folders of the splits; None: all is pool.
        splits: Which split the folders there are, by name.
        twice: Hashes of the names that come twice.
    """

    depth: int | None
    splits: dict[str, str]
    twice: frozenset[int]


def entries(
    files: Callable[[], Iterable[File]], max_pixels: int, where: str, stamp: object = None
) -> Iterator[Entry]:
    """Gives a folder's or an archive's files as entries, by the names of its folders.

    With the folders `train-unlabelled/`, `train/CLASS/` and `test/CLASS/` (below common folders, if
    any) the splits are those, also by other usual names (`USUAL`) where both train and test are
    there; without any of them all pictures are `train-unlabelled`.

    Args:
        files: Lists the files; called twice, so that only a number for each is held.
        max_pixels: Files with more than 8 bytes for each of so many pixels are refused.
        where: The root, for errors.
        stamp: Where it says that the files are those of the call before, they are listed once only.

    Raises:
        DataError: A split or a class is missing.
    """
    key = (where, max_pixels, stamp)
    if stamp is None or key not in _plans:
        _plans.clear()
        _plans[key] = _plan(files(), max_pixels, where)
    depth, splits, twice = _plans[key]
    seen: set[str] = set()
    for file in files():
        entry = _entry(file, max_pixels, depth, splits)
        if entry.usable and hash(entry.key) in twice:
            if entry.key in seen:
                entry = dataclasses.replace(entry, refused="another file of this name came before")
            seen.add(entry.key)
        yield entry


_plans: dict[tuple, Plan] = {}  # the last one: listing a compressed archive takes long


def _plan(files: Iterable[File], max_pixels: int, where: str) -> Plan:
    folders, hashes, refused = set(), array.array("q"), Counter()
    for file in files:
        parts = _parts(file.name)
        found = _judge(file, parts, max_pixels)
        if found == (False, ""):
            folders.add(parts[:-1])
            hashes.append(hash(clean("/".join(parts))))
        refused[kind_of(found[1])] += bool(found[1])
    pictures = [(*folder, "picture") for folder in sorted(folders)]
    depth = _common_depth(pictures)
    splits = _splits({parts[depth] for parts in pictures if len(parts) > depth + 1})
    if splits:
        found = [(splits.get(top, ""), *rest) for top, *rest in (one[depth:] for one in pictures)]
        _check_classes(found, where + refusals(refused))
    elif {TRAIN, TEST} <= {*_splits({name for folder in folders for name in folder}).values()}:
        log.warning(
            "%s: there are folders train and test further down, which are not taken for splits: "
            "other pictures stand beside or above them", where
        )  # fmt: skip
    return Plan(depth if splits else None, splits, frozenset(_repeated(hashes)))


def _splits(folders: set[str]) -> dict[str, str]:
    """Says which split each of some folders is, by its name; others are left out."""
    exact = {name: name for name in SPLITS if name in folders}
    named: dict[str, list[str]] = {}
    for name in sorted(folders):
        named.setdefault(re.sub(r"[\s_]+", "-", name.strip().lower()), []).append(name)
    found = {}
    for split, words in USUAL.items():
        if split in exact:
            found[split] = split
        elif names := [name for word in words for name in named.get(word, [])]:
            found[names[0]] = split
    return found if {TRAIN, TEST} <= {*found.values()} else exact


def kind_of(reason: str) -> str:
    """Gives a reason without what differs from file to file: there may be millions."""
    return "too large" if " bytes, more than " in reason else reason.partition(": '")[0]


def refusals(reasons: Counter) -> str:
    """Says how many files were refused and why, for errors; nothing where none were."""
    said = "; ".join(f"{number}: {why}" for why, number in reasons.most_common(3) if number)
    return f" (not read: {said})" if said else ""


def _repeated(hashes: array.array) -> set[int]:
    """Gives the numbers that stand there more than once; sorts them."""
    ordered = np.frombuffer(hashes, np.int64) if hashes else np.empty(0, np.int64)
    ordered.sort()  # in place: there are many
    return set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())


def clean(name: str) -> str:
    """Makes any file name a key of clean UTF-8: odd bytes and NUL are escaped with backslashes."""
    return name.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def _entry(file: File, max_pixels: int, depth: int | None, splits: dict[str, str]) -> Entry:
    """Reads the meaning of a name; `depth` is that of the split folders, None: all is pool."""
    parts = _parts(file.name)
    key = clean("/".join(parts))
    ignored, refused = _judge(file, parts, max_pixels)
    if ignored or refused:
        return Entry(POOL, clean(file.name), None, file.read, refused, ignored)
    if depth is None:
        return Entry(POOL, key, None, file.read, stamp=file.stamp)
    top, *inner = parts[depth:]
    split = splits.get(top) if inner else None
    if split is None:
        fault = f"stands outside {', '.join(f'{name}/' for name in splits)}"
        return Entry(POOL, key, None, file.read, fault)
    if len(inner) > 1:
        return Entry(split, key, clean(inner[0]), file.read, stamp=file.stamp)
    fault = "" if split == POOL else f"stands in {top}/ without the folder of a class"
    return Entry(split, key, None, file.read, fault, stamp=file.stamp)


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split("/") if part not in ("", "."))


def _judge(file: File, parts: tuple[str, ...], max_pixels: int) -> tuple[bool, str]:
    """Gives whether a file is to be ignored, and else why it must not be read, or nothing."""
    if not parts or any(part == "__MACOSX" or part[0] == "." and part != ".." for part in parts):
        return True, ""
    if ".." in parts or file.name.startswith("/") or DRIVE.match(file.name):
        return False, "its name leads out of the archive"
    if file.refused:
        return False, file.refused
    if os.path.splitext(parts[-1])[1].lower() not in SUFFIXES:
        return True, ""
    most = 8 * max_pixels + (1 << 16)
    fault = f"{file.size} bytes, more than {most} for max_pixels = {max_pixels}"
    return False, fault if file.size > most else ""


def _common_depth(pictures: list[tuple[str, ...]]) -> int:
    """Counts the folders that stand above everything and are no split themselves."""
    depth = 0
    while pictures and pictures[0][depth] not in SPLITS:  # one alone with another name is common
        first = pictures[0][depth]
        if any(len(parts) <= depth + 1 or parts[depth] != first for parts in pictures):
            break
        depth += 1
    return depth


def _check_classes(pictures: list[tuple[str, ...]], where: str) -> None:
    """Refuses labelled splits that do not go together."""
    found = {
        split: {parts[1] for parts in pictures if parts[0] == split and len(parts) > 2}
        for split in (TRAIN, TEST)
    }
    tops = {parts[0] for parts in pictures}
    if not tops & {TRAIN, TEST}:
        return
    for split in (TRAIN, TEST):
        if not found[split]:
            raise DataError(
                f"{where}: expected labelled pictures in train/CLASS/ and test/CLASS/, found none "
                f"in {split}/CLASS/; add them, or leave out both folders to work without labels"
            )
    alone = sorted(map(clean, found[TRAIN] ^ found[TEST]))
    if alone:
        raise DataError(
            f"{where}: every class must stand in train/ and in test/, "
            f"{len(alone)} stand in only one of them: {', '.join(map(repr, alone[:5]))}"
        )
    if len(found[TRAIN]) < 2:
        raise DataError(
            f"{where}: expected at least two classes in train/CLASS/, found only "
            f"{clean(*found[TRAIN])!r}; add classes, or leave out train/ and test/"
        )
