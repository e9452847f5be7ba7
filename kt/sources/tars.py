"""Pictures in tar shards, as WebDataset lays them out: a folder of `*.tar`, read in place.

`path` is the folder; the tars stand in it or in its folders `train-unlabelled/`, `train/`, `test/`.
A shard's split is that folder, else a word of its own name (`imagenet-train-0001.tar`), else the
first folder of the member; else it is `train-unlabelled`. The class is what the `.cls` of the same
sample says, else the member's first folder. A member is read where it stands in its tar; what is
refused in an archive is refused here, too.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from kt.config import Dataset
from kt.core import entries as tree
from kt.core import layouts, step
from kt.core.layouts import POOL, SPLITS, TRAIN
from kt.core.parts import WHOLE, Part
from kt.core.step import ConfigError, DataError
from kt.sources import archive

# Of the usual names those that are one word.
WORDS = {word: split for split, words in layouts.USUAL.items() for word in words if word.isalpha()}
LABEL = ".cls"
MOST_LABEL = 100  # bytes of the name of a class
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class Shard(NamedTuple):
    """One tar: its path, its name in keys, its split or None."""

    path: Path
    name: str
    split: str | None

    @property
    def stamp(self) -> str:
        """Changes with its content."""
        status = self.path.stat()
        return f"{status.st_size} {status.st_mtime_ns}"


class Tars:
    """The source, with what stands in each tar kept in a folder, since headers are slow to read."""

    def __init__(self, kept: Path | None = None):
        """Reads all headers again and again where there is no folder."""
        self.kept = kept

    def entries(self, dataset: Dataset) -> Iterator[tree.Entry]:
        """Gives the members of all tars, in the order of the tars' names, as they stand there.

        Raises:
            DataError: There is no such folder, a tar is broken, or a split or class is missing.
        """
        check_labels(dataset.labels)
        found = shards(_root(dataset))
        stamp = tuple(shard.stamp for shard in found)
        return tree.entries(
            lambda: self._files(found), dataset.max_pixels, str(dataset.path), stamp
        )

    def origin(self, dataset: Dataset) -> dict[str, Any]:
        """Says where the pictures came from."""
        found = shards(_root(dataset))
        size = sum(shard.path.stat().st_size for shard in found)
        return {"folder": str(dataset.path), "tars": len(found), "bytes": size}

    def _files(self, found: list[Shard]) -> Iterator[tree.File]:
        for shard in found:
            stamp = shard.stamp
            with contextlib.closing(_Opened(shard.path)) as opened:
                for name, offset, size, refused in self._members(shard):
                    read = functools.partial(opened.read, offset, size)
                    yield tree.File(name, size, read, refused, f"{offset} {stamp}")

    def _members(self, shard: Shard) -> list[list]:
        """Gives [name, offset, bytes, why refused] of a tar's members, as kept or read anew."""
        if self.kept is None:
            return _listed(shard)
        stamp = [str(shard.path), shard.stamp, shard.split]
        digest = hashlib.sha256(os.fsencode(shard.path)).hexdigest()
        path = self.kept / f"tar-{digest[:24]}.json"
        if path.exists():
            with contextlib.suppress(DataError):
                kept = step.read_json(path)
                if isinstance(kept, dict) and kept.get("stamp") == stamp:
                    return kept["members"]
        members = _listed(shard)
        step.write_json(path, {"stamp": stamp, "members": members})
        return members

    def index(self, dataset: Dataset, part: Part, threads: int) -> None:
        """Lists all tars, some at a time, those of a part first: others may be at theirs."""
        found = shards(_root(dataset))
        first = (part.number - 1) * len(found) // part.of
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(self._members, found[first:] + found[:first]):
                pass


entries, origin = Tars().entries, Tars().origin


def indexed(dataset: Dataset, folder: Path, part: Part = WHOLE, threads: int = 1) -> Tars:
    """Gives the source with an index of all tars in a folder, which is made where it is missing."""
    source = Tars(folder)
    source.index(dataset, part, threads)
    return source


def check_labels(labels: str | None) -> None:
    """Refuses labels that stand elsewhere, with ConfigError."""
    if labels is not None:
        raise ConfigError(
            f"labels: tar shards say themselves what their classes are, by folders or {LABEL} "
            f"members; expected null, found {labels!r}"
        )


def are_at(root: Path) -> bool:
    """Says whether a folder holds tar shards: tars, and neither pictures nor folders of classes.

    So a folder of pictures with a stray tar stays a folder of pictures.
    """
    found = False
    for folder in (root, *(root / split for split in SPLITS)):
        if folder.is_dir():
            for item in os.scandir(folder):
                if tree.stands_aside(item.name):
                    continue
                if _is_folder(item) and not (folder == root and item.name in SPLITS):
                    return False
                if os.path.splitext(item.name)[1].lower() in tree.SUFFIXES:
                    return False
                found = found or item.name.endswith(".tar")
    return found


def _is_folder(item: os.DirEntry) -> bool:
    with contextlib.suppress(OSError):  # a link to itself, or to what may not be seen
        return item.is_dir()
    return False


def count(root: Path, enough: float, dataset: Dataset) -> tuple[int, bool]:
    """Counts the pictures to learn from without labels, up to `enough`: headers are slow to read.

    Returns:
        Their number, with those of train that will be taken, and whether there are labelled ones.
    """

    def number() -> int:
        return counts[POOL] + layouts.from_train(counts[POOL], counts[TRAIN], dataset)

    found = shards(root)
    counts = dict.fromkeys(SPLITS, 0)
    told = {shard.split or POOL for shard in found}
    wanted: set[str | None] = {None, POOL if POOL in told else TRAIN}
    if any(shard.split is None and _has_splits(shard) for shard in found):
        wanted, enough = {None, *SPLITS}, math.inf  # only all names together tell
    for shard in found:
        if number() >= enough:
            break
        for name, _, _, refused in _listed(shard) if shard.split in wanted else ():
            if not refused and os.path.splitext(name)[1].lower() in tree.SUFFIXES:
                counts[name.partition("/")[0]] += 1
    return number(), TRAIN in told or counts[TRAIN] > 0


def unread(root: Path) -> str:
    """Says, for a message, that tars are not read where other things stand beside them."""
    if not root.is_dir() or are_at(root) or next(root.rglob("*.tar"), None) is None:
        return ""
    return (
        "; the tars in it are not read, as something else is there: they may stand in the folder "
        f"itself and in its {', '.join(f'{split}/' for split in SPLITS)}, and nothing beside them"
    )


def _has_splits(shard: Shard) -> bool:
    """Says whether the first file of a tar stands in the folder of a split."""
    with _reading(shard) as file:
        for member in archive.members(file):
            if not member.isdir():
                parts = [part for part in member.name.split("/") if part != "."]
                return len(parts) > 1 and parts[0] in SPLITS
    return False


def shards(root: Path) -> list[Shard]:
    """Lists the tars of a folder in name order, with their splits.

    Raises:
        DataError: There are none, compressed ones, or both test and validation sets.
    """
    found: list[Shard] = []
    words: set[str] = set()
    for folder in (root, *(root / split for split in sorted(SPLITS))):
        for path in sorted(folder.glob("*")) if folder.is_dir() else ():
            if path.name.endswith(COMPRESSED):
                raise DataError(
                    f"{path}: expected plain tars, whose members can be read where they stand, "
                    "found a compressed one; unpack it to a .tar"
                )
            if path.suffix != ".tar" or path.name.startswith("."):
                continue
            if not path.exists():
                raise DataError(
                    f"{path}: expected a tar, found a link to nothing; mend or remove it"
                )
            split = folder.name if folder != root else None
            if split is None:
                known = set(re.split(r"[^a-z]+", path.stem.lower())) & WORDS.keys()
                # "train-unlabelled" is both; the order is that of SPLITS.
                split = min((WORDS[word] for word in known), key=SPLITS.index, default=None)
                words |= known
            name = layouts.clean(os.fsencode(path.stem).decode("utf-8", "surrogateescape"))
            found.append(Shard(path, name, split))
    if not found:
        raise DataError(f"{root}: expected tar shards (*.tar), found none")
    if words & {"test", "testing"} and words & {"val", "valid", "validation"}:
        raise DataError(
            f"{root}: found tars for test and for validation, either would be the test images; "
            "take those of one elsewhere"
        )
    return found


class _Opened:
    """A tar that is opened when its first member is read."""

    def __init__(self, path: Path):
        self.path, self.file = path, None

    def read(self, offset: int, size: int) -> bytes:
        """Gives the bytes of a member."""
        if self.file is None:
            self.file = open(self.path, "rb")
        content = os.pread(self.file.fileno(), size, offset)
        if len(content) != size:
            raise OSError(f"{self.path} was cut off meanwhile")
        return content

    def close(self) -> None:
        """Closes it, if it was opened."""
        if self.file is not None:
            self.file.close()


def _root(dataset: Dataset) -> Path:
    if not dataset.path or not Path(dataset.path).is_dir():
        raise DataError(f"expected a folder of tar shards at {dataset.path!r}, found none there")
    return Path(dataset.path)


def _listed(shard: Shard) -> list[list]:
    """Reads the headers of a tar; gives [name, offset, bytes, why refused] of its members."""
    members, labels = [], {}
    with _reading(shard) as file:
        for member in archive.members(file):
            if member.isreg() and member.name.endswith(LABEL) and member.size <= MOST_LABEL:
                labels[_sample(member.name)] = file.extractfile(member).read()
            elif not member.isdir():
                plain = member.isreg() and not member.issparse()
                refused = "" if plain else "a link, device or sparse file"
                members.append([member.name, member.offset_data, member.size, refused])
    for one in members:
        _place(one, shard, labels.get(_sample(one[0])))
    return members


@contextlib.contextmanager
def _reading(shard: Shard) -> Iterator[tarfile.TarFile]:
    """Opens a tar.

    Raises:
        DataError: It is broken or cut off.
    """
    try:
        with tarfile.open(shard.path, "r:") as file:
            yield file
    except archive.BROKEN as error:
        raise DataError(f"{shard.path} is broken or cut off: {error}; fetch it again") from None


def _sample(name: str) -> str:
    """Gives what the files of a sample share: all up to the first dot of the last part."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _place(member: list, shard: Shard, label: bytes | None) -> None:
    """Gives a member the name that it would have in a folder of splits and classes."""
    name = member[0]
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if len(parts) > 2 and parts[0] == shard.split:  # train.tar, made of the folder train/
        parts = parts[1:]
    if name.startswith("/") or tree.DRIVE.match(name) or ".." in parts:
        member[3] = member[3] or "its name leads out of the archive"
    split = shard.split
    if split is None and len(parts) > 1 and parts[0] in SPLITS:
        split = parts.pop(0)
    if split in (None, POOL):
        member[0] = "/".join([POOL, shard.name, *parts])
        return
    kind = parts.pop(0) if len(parts) > 1 else None
    if label is not None:
        parts, kind = ([kind] if kind else []) + parts, label.decode("utf-8", "replace").strip()
        if not kind or kind.startswith(".") or "/" in kind or not kind.isprintable():
            member[3] = member[3] or f"its {LABEL} is no name of a class: {kind[:40]!r}"
            kind = "unnamed"
    if kind is None:  # refused for want of a class
        member[0] = f"{split}/{shard.name}:{':'.join(parts)}"
    else:
        member[0] = "/".join([split, kind, shard.name, *parts])
