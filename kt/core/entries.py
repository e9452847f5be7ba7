"""What a source hands over: entries, one for each picture.

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

import numpy as np

from kt.core import layouts
from kt.core.layouts import POOL, SPLITS, TEST, TRAIN, clean

# Sources take all of these from here.
__all__ = ["Entry", "FEWEST", "File", "POOL", "SPLITS", "SUFFIXES", "TEST", "TRAIN", "entries"]

FEWEST = 10  # images to learn from without labels
# What a name may end with to count as a picture. The content, not the name, decides how it is read.
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm".split()
)
# Folders that systems make by themselves, with copies and what was thrown away.
ASIDE = frozenset(("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"))
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


def entries(
    files: Callable[[], Iterable[File]],
    max_pixels: int,
    where: str,
    stamp: object = None,
    labels: str | None = None,
) -> Iterator[Entry]:
    """Gives a folder's or an archive's files as entries, by what their names mean (`layouts`).

    Args:
        files: Lists the files; called twice, so that only a number for each is held.
        max_pixels: Files with more than 8 bytes for each of so many pixels are refused.
        where: The root, for errors.
        stamp: Where it says that the files are those of the call before, they are listed once only.
        labels: Where classes stand: null, `folders`, or the path of a table.

    Raises:
        DataError: A split or a class is missing, or the table does not fit.
    """
    key = (where, max_pixels, labels, stamp)
    if stamp is None or key not in _plans:
        _plans.clear()
        _plans[key] = _plan(files(), max_pixels, where, layouts.layout(labels))
    layout, twice = _plans[key]
    seen: set[str] = set()
    for file in files():
        entry = _entry(file, max_pixels, layout)
        if entry.usable and hash(entry.key) in twice:
            if entry.key in seen:
                entry = dataclasses.replace(entry, refused="another file of this name came before")
            seen.add(entry.key)
        yield entry


# The layout and the hashes of the names that come twice, of the last one: listing a compressed
# archive takes long.
_plans: dict[tuple, tuple[layouts.Layout, frozenset[int]]] = {}


def _plan(
    files: Iterable[File], max_pixels: int, where: str, layout: layouts.Layout
) -> tuple[layouts.Layout, frozenset[int]]:
    hashes, refused = array.array("q"), Counter()
    for file in files:
        parts = _parts(file.name)
        ignored, reason = _judge(file, parts, max_pixels)
        if not (ignored or reason):
            hashes.append(hash(clean("/".join(parts))))
        if reason and not _is_named_as_picture(parts):  # a link may be one to a folder
            ignored = "link" not in reason
            parts = (*parts, "")
        layout.see(parts, not (ignored or reason), ignored)
        refused[kind_of(reason)] += bool(reason)
    layout.settle(where, refusals(refused))
    return layout, frozenset(_repeated(hashes))


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


def _entry(file: File, max_pixels: int, layout: layouts.Layout) -> Entry:
    """Reads the meaning of a name."""
    parts = _parts(file.name)
    ignored, refused = _judge(file, parts, max_pixels)
    if ignored or refused:
        return Entry(POOL, clean(file.name), None, file.read, refused, ignored)
    split, class_name, fault = layout.place(parts)
    return Entry(split, clean("/".join(parts)), class_name, file.read, fault, stamp=file.stamp)


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split("/") if part not in ("", "."))


def stands_aside(part: str) -> bool:
    """Says whether a file or folder of this name is no part of the pictures."""
    return part in ASIDE or (part.startswith(".") and part != "..")


def _is_named_as_picture(parts: tuple[str, ...]) -> bool:
    return os.path.splitext(parts[-1])[1].lower() in SUFFIXES


def _judge(file: File, parts: tuple[str, ...], max_pixels: int) -> tuple[bool, str]:
    """Gives whether a file is to be ignored, and else why it must not be read, or nothing."""
    if not parts or any(map(stands_aside, parts)):
        return True, ""
    if ".." in parts or file.name.startswith("/") or DRIVE.match(file.name):
        return False, "its name leads out of the archive"
    if file.refused:
        return False, file.refused
    if not _is_named_as_picture(parts):
        return True, ""
    most = 8 * max_pixels + (1 << 16)
    fault = f"{file.size} bytes, more than {most} for max_pixels = {max_pixels}"
    return False, fault if file.size > most else ""
