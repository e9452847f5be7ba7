"""What the names of pictures say: of which split they are, and of which class.

Three layouts: folders of splits and classes, folders of classes alone, and a table of classes
(`kt.core.class_table`).
"""

from __future__ import annotations

import array
import functools
import hashlib
import re
import unicodedata
from typing import Protocol

import numpy as np

from kt.core.ending import DataError, log
from kt.core.schema import Dataset

SPLITS = POOL, TRAIN, TEST = ("train-unlabelled", "train", "test")
# Other usual names of the splits, with small letters and hyphens; the first that is there counts.
USUAL = {
    POOL: ("train-unlabelled", "train-unlabeled", "unlabelled", "unlabeled"),
    TRAIN: ("train", "training"),
    TEST: ("test", "testing", "val", "valid", "validation"),
}
SPLIT_WORDS = {*USUAL[TRAIN], *USUAL[TEST]}
FOLDERS = "folders"  # as `labels`
TEST_SHARE = 0.2  # of each class, where nothing says which pictures are for testing
MOST_FOLDERS = 1000  # that may be meant as classes
MOST_OF_TRAIN = 0.9  # that the pool may take where there is no train-unlabelled


def from_train(pool: int, train: int, dataset: Dataset) -> int:
    """Says how many of train are learned from without labels.

    As many as would be if there were no pool, where there is none; less those that are there,
    where `labels` leaves over what has none, by chance a few. A folder of the pool stays as it is.
    """
    wanted = share(train, dataset)
    return max(0, wanted - pool) if dataset.labels else 0 if pool else wanted


def share(train: int, dataset: Dataset) -> int:
    """Says how many of train are the pool where there is no other.

    Half where nothing is said, where `labelled` would take all, or where too few would keep their
    labels.
    """
    number = dataset.unlabelled
    if number is None:
        labelled = dataset.labelled
        number = train // 2 if labelled is None or labelled >= train else train - labelled
    if number > MOST_OF_TRAIN * train:  # `unlabelled` is a limit, the labels are needed, too
        number = train // 2
    return number


class Layout(Protocol):
    """Reads the meaning of names; sees all of them first."""

    def see(self, parts: tuple[str, ...], usable: bool, ignored: bool = False) -> None:
        """Takes note of a file.

        Args:
            parts: Of its name.
            usable: It is a picture to read.
            ignored: It is no picture at all; else, if not usable, one that must not be read.
        """

    def settle(self, where: str, refused: str) -> None:
        """Decides, when all were seen.

        Args:
            where: The root, for errors.
            refused: What was not read and why, for errors.

        Raises:
            DataError: A split or a class is missing, or what was seen does not fit.
        """

    def place(self, parts: tuple[str, ...]) -> tuple[str, str | None, str]:
        """Gives a usable file's split, its class or None, and why it must not be read, or ''."""


def layout(labels: str | None) -> Layout:
    """Gives the layout for a value of `labels`: null, `folders`, or the path of a table."""
    if labels is None:
        return SplitFolders()
    if labels == FOLDERS:
        return ClassFolders()
    from kt.core.class_table import ClassTable

    return ClassTable(labels)


def origin(labels: str | None) -> dict[str, str]:
    """Says where classes come from, for the data report; nothing where folders of splits tell."""
    if labels in (None, FOLDERS):
        return {"classes": "names of folders; a fifth of each was drawn for test"} if labels else {}
    with open(labels, "rb") as file:
        return {"classes": labels, "sha256 of it": hashlib.file_digest(file, "sha256").hexdigest()}


def clean(name: str) -> str:
    """Makes any file name a key of clean UTF-8: odd bytes and NUL are escaped with backslashes."""
    return name.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def class_name(folder: str) -> str:
    """Gives the class that a folder's name means; ways to write the same letters are one."""
    return unicodedata.normalize("NFC", clean(folder))


def rank_of(name: str) -> int:
    """Gives a name's place in the draw of test images, 64 bits; of the name alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())


@functools.cache
def tell(warning: str) -> None:
    """Warns once: a folder may be listed more than once."""
    log.warning("%s", warning)


# ---------------------------------------------------------------------------- folders of splits


class SplitFolders:
    """The folders `train-unlabelled/`, `train/CLASS/` and `test/CLASS/`.

    They may stand below common folders, and have other usual names (`USUAL`) where both train and
    test are there; without any of them all pictures are `train-unlabelled`.
    """

    def __init__(self) -> None:
        """Has seen nothing."""
        self.folders: set[tuple[str, ...]] = set()
        self.lost: set[tuple[str, ...]] = set()  # folders with what must not be read
        self.depth = 0  # of the folders of the splits
        self.splits: dict[str, str] = {}  # by the folder's name; none: all is pool

    def see(self, parts, usable, ignored=False) -> None:
        """Takes note of a file."""
        if usable:
            self.folders.add(parts[:-1])
        elif not ignored:
            self.lost.add(parts[:-1])

    def settle(self, where, refused) -> None:
        """Decides; raises DataError, see `Layout`."""
        pictures = [(*folder, "picture") for folder in sorted(self.folders)]
        self.depth = _common_depth(pictures)
        tops = {parts[self.depth] for parts in pictures if len(parts) > self.depth + 1}
        self.splits = _splits(tops)
        common = pictures[0][: self.depth] if pictures else ()
        self._check_lost(common, where + refused)
        if self.splits:
            inner = (parts[self.depth :] for parts in pictures)
            found = [(self.splits.get(top, ""), *rest) for top, *rest in inner]
            _check_folders(found, where + refused)
            return
        deeper = {name for folder in self.folders for name in folder}
        if {TRAIN, TEST} <= {*_splits(deeper).values()}:
            tell(
                f"{where}: there are folders train and test further down, which are not taken for "
                "splits: other pictures stand beside or above them"
            )
        elif 2 <= len(tops) <= MOST_FOLDERS and all(len(p) > self.depth + 1 for p in pictures):
            tell(
                f"{where}: all pictures stand in {len(tops)} folders; should those be their "
                "classes, add labels=folders, else they are learned from without labels"
            )

    def _check_lost(self, common: tuple[str, ...], where: str) -> None:
        """Refuses splits of which nothing can be read; warns of such classes.

        Args:
            common: The folders above all pictures that can be read.
            where: The root, for the message.
        """
        for depth in range(len(common) + 1):
            read, other = (
                {
                    one[depth]
                    for one in folders
                    if len(one) > depth and one[:depth] == common[:depth]
                }
                for folders in (self.folders, self.lost)
            )
            meant, known = _splits(read | other), {POOL, *self.splits.values()}
            if lost := sorted(name for name in {*meant} - read if meant[name] not in known):
                raise DataError(
                    f"{where}: expected labelled pictures in {'/ and '.join(map(clean, lost))}/, "
                    "found none that can be read; mend or remove what is there"
                )
        inner = self.depth + 1
        kept, lost = (
            {(one[self.depth], class_name(one[inner])) for one in folders if len(one) > inner}
            for folders in (self.folders, {x for x in self.lost if x[: self.depth] == common})
        )
        lost = {one for one in lost - kept if self.splits.get(one[0], POOL) != POOL}
        _warn_of_lost({clean("/".join(one)) for one in lost}, where)

    def place(self, parts) -> tuple[str, str | None, str]:
        """Gives split, class and fault of a file."""
        if not self.splits:
            return POOL, None, ""
        top, *inner = parts[self.depth :]
        split = self.splits.get(top) if inner else None
        if split is None:
            named = ", ".join(f"{name}/" for name in self.splits)
            return POOL, None, f"stands outside {named}"
        if len(inner) > 1:
            return split, class_name(inner[0]), ""
        fault = "" if split == POOL else f"stands in {top}/ without the folder of a class"
        return split, None, fault


def _warn_of_lost(folders: set[str], where: str) -> None:
    if folders:
        shown = ", ".join(f"{name}/" for name in sorted(folders)[:5])
        tell(f"{where}: no picture can be read in {len(folders)} folders of classes: {shown}")


def _splits(folders: set[str]) -> dict[str, str]:
    """Says which split each of some folders is, by its name; others are left out."""
    exact = {name: name for name in SPLITS if name in folders}
    named: dict[str, list[str]] = {}
    for name in sorted(folders):
        named.setdefault(plain(name), []).append(name)
    found = {}
    for split, words in USUAL.items():
        if split in exact:
            found[split] = split
        elif names := [name for word in words for name in named.get(word, [])]:
            found[names[0]] = split
    return found if {TRAIN, TEST} <= {*found.values()} else exact


def plain(name: str) -> str:
    """Makes a name comparable with the usual ones."""
    return re.sub(r"[\s_]+", "-", name.strip().lower())


def _common_depth(pictures: list[tuple[str, ...]]) -> int:
    """Counts the folders that stand above everything and are no split themselves."""
    depth = 0
    while pictures and pictures[0][depth] not in SPLITS:  # one alone with another name is common
        first = pictures[0][depth]
        if any(len(parts) <= depth + 1 or parts[depth] != first for parts in pictures):
            break
        depth += 1
    return depth


def _check_folders(pictures: list[tuple[str, ...]], where: str) -> None:
    """Refuses labelled splits that do not go together."""
    found = {
        split: {class_name(parts[1]) for parts in pictures if parts[0] == split and len(parts) > 2}
        for split in (TRAIN, TEST)
    }
    tops = {parts[0] for parts in pictures}
    if not tops & {TRAIN, TEST}:
        return
    for split in (TRAIN, TEST):
        if not found[split]:
            drawn = ", or let a fifth of train be drawn for it (labels=folders)"
            raise DataError(
                f"{where}: expected labelled pictures in train/CLASS/ and test/CLASS/, found none "
                f"in {split}/CLASS/; add them{drawn if split == TEST else ''}, or leave out both "
                "folders to work without labels"
            )
    check_classes(found[TRAIN], found[TEST], where)


def check_classes(train: set[str], test: set[str], where: str) -> None:
    """Refuses classes of one split alone, and a single class."""
    if alone := sorted(train ^ test):
        raise DataError(
            f"{where}: every class must stand in train and in test, {len(alone)} stand in only one "
            f"of them: {', '.join(map(repr, alone[:5]))}"
        )
    if len(train) < 2:
        raise DataError(
            f"{where}: expected at least two classes, found {', '.join(map(repr, train)) or 'none'}"
            "; add classes, or work without labels"
        )


# ---------------------------------------------------------------------------- folders of classes


class ClassFolders:
    """Folders of classes alone, also those of `train/`; all other pictures have no label.

    The classes are the folders of the topmost level with more than one, where folders named like a
    pool, and folders named like a test set that hold none themselves, do not count. A fifth of each
    class, by a hash of the names, is for testing.
    """

    def __init__(self) -> None:
        """Has seen nothing."""
        self.ranks: dict[tuple[str, ...], array.array] = {}
        self.lost: set[tuple[str, ...]] = set()  # folders with what must not be read
        self.above: tuple[str, ...] = ()  # the folders above those of the classes
        self.deep: set[str] = set()  # those beside them that hold folders
        self.last: dict[str, int] = {}  # rank of the last test image, by class

    def see(self, parts, usable, ignored=False) -> None:
        """Takes note of a file."""
        if usable:
            ranks = self.ranks.setdefault(parts[:-1], array.array("Q"))
            ranks.append(rank_of(clean("/".join(parts))))
        elif not ignored:
            self.lost.add(parts[:-1])

    def settle(self, where, refused) -> None:
        """Decides; raises DataError, see `Layout`."""
        self.above = self._above(where)
        classes: dict[str, list[array.array]] = {}
        for folder, ranks in self.ranks.items():
            if (name := self._class_of((*folder, ""))) is not None:
                classes.setdefault(name, []).append(ranks)
        lost = {self._class_of((*folder, "")) for folder in self.lost} - {None, *classes}
        _warn_of_lost(lost, where + refused)
        self.ranks = {}
        for name, found in classes.items():  # a name that comes twice in an archive is one picture
            ordered = np.unique(np.concatenate([np.frombuffer(one, np.uint64) for one in found]))
            classes[name] = ordered
        check_numbers({name: len(found) for name, found in classes.items()}, where)
        check_classes({*classes}, {*classes}, where + refused)
        for name, ordered in classes.items():
            self.last[name] = int(ordered[for_test(len(ordered)) - 1])

    def place(self, parts) -> tuple[str, str | None, str]:
        """Gives split, class and fault of a file."""
        name = self._class_of(parts)
        if name is not None:
            drawn = rank_of(clean("/".join(parts))) <= self.last[name]
            return (TEST if drawn else TRAIN), name, ""
        for place, part in enumerate(parts[:-2]):
            if plain(part) in USUAL[POOL]:
                return POOL, class_name(parts[place + 1]), ""
        return POOL, None, ""

    def _above(self, where: str) -> tuple[str, ...]:
        """Finds the folders above those of the classes."""
        above: tuple[str, ...] = ()
        while True:
            inner = [folder[len(above) :] for folder in self.ranks if folder[: len(above)] == above]
            self.deep = {folder[0] for folder in inner if len(folder) > 1}
            tops = {folder[0] for folder in inner if folder and not self._aside(folder[0])}
            split = [name for name in sorted(tops & self.deep) if plain(name) in SPLIT_WORDS]
            if split and len(tops) > 1:
                others = ", ".join(f"{clean(name)}/" for name in sorted(tops - {split[0]})[:3])
                raise DataError(
                    f"{where}: {clean(split[0])}/ has folders of classes, and beside it stand "
                    f"{others}; leave out labels=folders where train and test are split already, "
                    "or take away what is no folder of a class"
                )
            if len(tops) != 1 or not tops <= self.deep:
                return above
            above += (*tops,)

    def _aside(self, name: str) -> bool:
        """Says whether a folder beside those of the classes is none, by its name."""
        return plain(name) in USUAL[POOL] or (plain(name) in USUAL[TEST] and name not in self.deep)

    def _class_of(self, parts: tuple[str, ...]) -> str | None:
        inner = parts[len(self.above) :]
        if parts[: len(self.above)] != self.above or len(inner) < 2 or self._aside(inner[0]):
            return None
        return class_name(inner[0])


def for_test(number: int) -> int:
    """Says how many of a class's pictures are for testing: a fifth, one at least, and not all."""
    return max(1, min(number - 1, round(TEST_SHARE * number)))


def check_numbers(classes: dict[str, int], where: str) -> None:
    """Refuses classes of which there would be none to learn from."""
    if few := sorted(name for name, number in classes.items() if number < 2):
        raise DataError(
            f"{where}: of every class at least two pictures are needed, one of them for testing; "
            f"{len(few)} have only one, such as {', '.join(map(repr, few[:5]))}; add pictures, or "
            "take their labels away"
        )
