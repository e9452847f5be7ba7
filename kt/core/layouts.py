"""What the names of pictures say: of which split they are, and of which class.

Three layouts: folders of splits and classes, folders of classes alone, and a table of classes.
"""

from __future__ import annotations

import array
import csv
import functools
import hashlib
import os
import re
from typing import Protocol

import numpy as np

from kt.core.ending import ConfigError, DataError, log

SPLITS = POOL, TRAIN, TEST = ("train-unlabelled", "train", "test")
# Other usual names of the splits, with small letters and hyphens; the first that is there counts.
USUAL = {
    POOL: ("train-unlabelled", "train-unlabeled", "unlabelled", "unlabeled"),
    TRAIN: ("train", "training"),
    TEST: ("test", "testing", "val", "valid", "validation"),
}
FOLDERS = "folders"  # as `labels`
TEST_SHARE = 0.2  # of each class, where nothing says which pictures are for testing
MOST_FOLDERS = 1000  # that may be meant as classes
COLUMNS = {  # usual names, with small letters; the first that is there counts
    "file": ("file", "filename", "file_name", "path", "image", "image_id", "id", "name"),
    "class": ("class", "label", "class_name", "category", "target", "species"),
    "split": ("split", "set", "subset"),
}


class Layout(Protocol):
    """Reads the meaning of names; sees all of them first."""

    def see(self, parts: tuple[str, ...], usable: bool) -> None:
        """Takes note of a file, by the parts of its name; `usable`: it is a picture to read."""

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
    return ClassFolders() if labels == FOLDERS else Table(labels)


def origin(labels: str | None) -> dict[str, str]:
    """Says where classes come from, for the data report; nothing where folders of splits tell."""
    if labels in (None, FOLDERS):
        return {"classes": "names of folders; a fifth of each was drawn for test"} if labels else {}
    with open(labels, "rb") as file:
        return {"classes": labels, "sha256 of it": hashlib.file_digest(file, "sha256").hexdigest()}


def clean(name: str) -> str:
    """Makes any file name a key of clean UTF-8: odd bytes and NUL are escaped with backslashes."""
    return name.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def rank_of(name: str) -> int:
    """Gives a name's place in the draw of test images, 64 bits; of the name alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())


@functools.cache
def _tell(warning: str) -> None:
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
        self.depth = 0  # of the folders of the splits
        self.splits: dict[str, str] = {}  # by the folder's name; none: all is pool

    def see(self, parts, usable) -> None:
        """Takes note of a file."""
        if usable:
            self.folders.add(parts[:-1])

    def settle(self, where, refused) -> None:
        """Decides; raises DataError, see `Layout`."""
        pictures = [(*folder, "picture") for folder in sorted(self.folders)]
        self.depth = _common_depth(pictures)
        tops = {parts[self.depth] for parts in pictures if len(parts) > self.depth + 1}
        self.splits = _splits(tops)
        if self.splits:
            inner = (parts[self.depth :] for parts in pictures)
            found = [(self.splits.get(top, ""), *rest) for top, *rest in inner]
            _check_folders(found, where + refused)
            return
        deeper = {name for folder in self.folders for name in folder}
        if {TRAIN, TEST} <= {*_splits(deeper).values()}:
            _tell(
                f"{where}: there are folders train and test further down, which are not taken for "
                "splits: other pictures stand beside or above them"
            )
        elif 2 <= len(tops) <= MOST_FOLDERS and all(len(p) > self.depth + 1 for p in pictures):
            _tell(
                f"{where}: all pictures stand in {len(tops)} folders; should those be their "
                "classes, add labels=folders, else they are learned from without labels"
            )

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
            return split, clean(inner[0]), ""
        fault = "" if split == POOL else f"stands in {top}/ without the folder of a class"
        return split, None, fault


def _splits(folders: set[str]) -> dict[str, str]:
    """Says which split each of some folders is, by its name; others are left out."""
    exact = {name: name for name in SPLITS if name in folders}
    named: dict[str, list[str]] = {}
    for name in sorted(folders):
        named.setdefault(_plain(name), []).append(name)
    found = {}
    for split, words in USUAL.items():
        if split in exact:
            found[split] = split
        elif names := [name for word in words for name in named.get(word, [])]:
            found[names[0]] = split
    return found if {TRAIN, TEST} <= {*found.values()} else exact


def _plain(name: str) -> str:
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
        split: {clean(parts[1]) for parts in pictures if parts[0] == split and len(parts) > 2}
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
    _check_classes(found[TRAIN], found[TEST], where)


def _check_classes(train: set[str], test: set[str], where: str) -> None:
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

    A fifth of each class, by a hash of the names, is for testing.
    """

    def __init__(self) -> None:
        """Has seen nothing."""
        self.ranks: dict[tuple[str, ...], array.array] = {}
        self.depth = 0  # of the folders of the classes
        self.above: tuple[str, ...] = ()  # the folders above them
        self.last: dict[str, int] = {}  # rank of the last test image, by class

    def see(self, parts, usable) -> None:
        """Takes note of a file."""
        if usable:
            ranks = self.ranks.setdefault(parts[:-1], array.array("Q"))
            ranks.append(rank_of(clean("/".join(parts))))

    def settle(self, where, refused) -> None:
        """Decides; raises DataError, see `Layout`."""
        pictures = [(*folder, "picture") for folder in sorted(self.ranks)]
        depth = _common_depth(pictures)
        tops = {parts[depth] for parts in pictures if len(parts) > depth + 1}
        named = {_plain(name): name for name in sorted(tops, reverse=True)}
        train = next((named[word] for word in USUAL[TRAIN] if word in named), None)
        tests = [named[word] for word in USUAL[TEST] if word in named]
        if train and any(p[depth] in tests and len(p) > depth + 2 for p in pictures):
            raise DataError(
                f"{where}: {train}/ and {tests[0]}/ have folders of classes, so nothing is to be "
                "drawn; leave out labels=folders"
            )
        self.above = pictures[0][:depth] if pictures else ()
        if train:
            self.above += (train,)
        self.depth = len(self.above)
        classes: dict[str, list[array.array]] = {}
        for folder, ranks in self.ranks.items():
            if (name := self._class_of((*folder, "picture"))) is not None:
                classes.setdefault(name, []).append(ranks)
        self.ranks = {}
        _check_numbers({name: sum(map(len, found)) for name, found in classes.items()}, where)
        _check_classes({*classes}, {*classes}, where + refused)
        for name, found in classes.items():
            ordered = np.sort(np.concatenate([np.frombuffer(one, np.uint64) for one in found]))
            self.last[name] = int(ordered[for_test(len(ordered)) - 1])

    def place(self, parts) -> tuple[str, str | None, str]:
        """Gives split, class and fault of a file."""
        name = self._class_of(parts)
        if name is None:
            inner = parts[self.depth :]
            known = len(inner) > 2 and _plain(inner[0]) in USUAL[POOL]
            return POOL, clean(inner[1]) if known else None, ""
        drawn = rank_of(clean("/".join(parts))) <= self.last[name]
        return (TEST if drawn else TRAIN), name, ""

    def _class_of(self, parts: tuple[str, ...]) -> str | None:
        inner = parts[self.depth :]
        if parts[: self.depth] != self.above or len(inner) < 2:
            return None
        return None if _plain(inner[0]) in USUAL[POOL] else clean(inner[0])


def for_test(number: int) -> int:
    """Says how many of a class's pictures are for testing: a fifth, one at least, and not all."""
    return max(1, min(number - 1, round(TEST_SHARE * number)))


def _check_numbers(classes: dict[str, int], where: str) -> None:
    """Refuses classes of which there would be none to learn from."""
    if few := sorted(name for name, number in classes.items() if number < 2):
        raise DataError(
            f"{where}: of every class at least two pictures are needed, one of them for testing; "
            f"{len(few)} have only one, such as {', '.join(map(repr, few[:5]))}; add pictures, or "
            "take their labels away"
        )


# ---------------------------------------------------------------------------- a table of classes


class Table:
    """A CSV with a row for each picture that has a label; all other pictures have none.

    Columns `file` and `class`, and `split` where it is given; otherwise a fifth of each class, by a
    hash of the names, is for testing. `file` may leave out folders above and the ending.
    """

    def __init__(self, path: str) -> None:
        """Reads the table.

        Raises:
            ConfigError: There is none.
            DataError: A column or a value is missing, a file comes twice, a split has no such name.
        """
        self.path = path
        self.rows: dict[str, int] = {}  # by file
        self.classes: list[str] = []  # by row, as are all others
        self.splits: list[str | None] = []
        self.tests: set[bool] = set()  # whether splits that mean test are called so
        self._read()
        self.best = np.full(len(self.classes), np.iinfo(np.int32).max, np.int32)
        self.matches = np.zeros(len(self.classes), np.int32)  # files that fit as well as the best
        self.readable = np.zeros(len(self.classes), bool)

    def see(self, parts, usable) -> None:
        """Takes note of a file."""
        for fit, row in self._fitting(parts):
            if fit < self.best[row]:
                self.best[row], self.matches[row], self.readable[row] = fit, 0, False
            if fit == self.best[row]:
                self.matches[row] += 1
                self.readable[row] |= usable

    def settle(self, where, refused) -> None:
        """Decides; raises DataError, see `Layout`."""
        names = list(self.rows)
        self._check_files(names, where)
        picked: dict[str, list[int]] = {}
        for row in np.flatnonzero(self.readable):
            if self.splits[row] is None:
                picked.setdefault(self.classes[row], []).append(int(row))
        _check_numbers({name: len(rows) for name, rows in picked.items()}, self.path)
        for rows in picked.values():
            rows.sort(key=lambda row: rank_of(names[row]))
            drawn = for_test(len(rows))
            for place, row in enumerate(rows):
                self.splits[row] = TEST if place < drawn else TRAIN
        found: dict[str, set[str]] = {split: set() for split in SPLITS}
        for row in np.flatnonzero(self.readable):
            found[self.splits[row]].add(self.classes[row])
        _check_classes(found[TRAIN], found[TEST], self.path + refused)

    def place(self, parts) -> tuple[str, str | None, str]:
        """Gives split, class and fault of a file."""
        for fit, row in self._fitting(parts):
            if fit == self.best[row]:
                return self.splits[row], self.classes[row], ""
        return POOL, None, ""

    def _fitting(self, parts: tuple[str, ...]):
        """Gives the rows that may mean a file, the closest first, with how much they leave out."""
        for left_out in range(len(parts)):
            name = clean("/".join(parts[left_out:]))
            for fit, one in enumerate((name, os.path.splitext(name)[0])):
                if (row := self.rows.get(one)) is not None:
                    yield 2 * left_out + fit, row

    def _read(self) -> None:
        try:
            with open(self.path, encoding="utf-8-sig", newline="") as file:
                head = file.readline()
                file.seek(0)
                mark = max(",;\t", key=head.count)
                lines = csv.reader(file, delimiter=mark, strict=True)
                columns = _columns(next(lines, []), self.path)
                for line in lines:
                    if any(map(str.strip, line)):
                        self._take(line, columns, lines.line_num)
        except OSError as error:
            raise ConfigError(
                f"labels: expected null, {FOLDERS} or a table, found none at {self.path!r}: "
                f"{error.strerror}"
            ) from None
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{self.path}: expected a CSV in UTF-8: {error}") from None
        if not self.rows:
            raise DataError(f"{self.path}: expected a row for each labelled picture, found none")
        given = {split for split in self.splits if split}
        if given and {split for split in self.splits if not split}:
            raise DataError(
                f"{self.path}: expected a split in each row or in none, found rows without; fill "
                "them in, or leave out the column"
            )

    def _take(self, line: list[str], columns: dict[str, int], number: int) -> None:
        """Takes up one row."""
        value = {
            name: line[place].strip() if place < len(line) else ""
            for name, place in columns.items()
        }
        where = f"{self.path}, line {number}"
        for name in ("file", "class"):
            if not value[name]:
                raise DataError(f"{where}: expected a {name}, found none; mend or remove the row")
        parts = value["file"].replace("\\", "/").split("/")
        file = clean("/".join(part for part in parts if part not in ("", ".")))
        if file in self.rows:
            raise DataError(f"{where}: {file!r} came before; a picture has one class")
        split = None
        if word := value.get("split"):
            split = next((one for one, words in USUAL.items() if _plain(word) in words), None)
            if split is None:
                known = ", ".join(word for words in USUAL.values() for word in words)
                raise DataError(f"{where}: expected a split, one of {known}; found {word!r}")
            if split == TEST:
                self.tests.add(_plain(word).startswith("test"))
            if len(self.tests) > 1:
                raise DataError(
                    f"{where}: found rows for test and for validation, either would be the test "
                    "images; take those of one away"
                )
        self.rows[file] = len(self.classes)
        self.classes.append(clean(value["class"]))
        self.splits.append(split)

    def _check_files(self, names: list[str], where: str) -> None:
        """Refuses rows that mean several files, and a table of which no file is there."""
        if len(several := np.flatnonzero(self.matches > 1)):
            raise DataError(
                f"{self.path}: {len(several)} rows mean several files in {where}, such as "
                f"{names[several[0]]!r}; write their folders and endings, too"
            )
        missing = np.flatnonzero(self.matches == 0)
        shown = ", ".join(repr(names[row]) for row in missing[:3])
        if len(missing) == len(names):
            raise DataError(
                f"{self.path}: none of its {len(names)} files is in {where}, such as {shown}; "
                "names are relative to it"
            )
        if len(missing):
            _tell(
                f"{self.path}: {len(missing)} of its {len(names)} files are not in {where}, such "
                f"as {shown}"
            )
        if unread := int(((self.matches == 1) & ~self.readable).sum()):
            _tell(f"{self.path}: {unread} of its {len(names)} files are no pictures to read")


def _columns(head: list[str], path: str) -> dict[str, int]:
    """Gives the places of the columns, by our names of them."""
    places = {name: place for place, name in reversed([*enumerate(map(_header, head))])}
    found = {}
    for column, words in COLUMNS.items():
        known = [places[word] for word in words if word in places]
        if known:
            found[column] = known[0]
        elif column != "split":
            raise DataError(
                f"{path}: expected a first line with the columns file and class, found "
                f"{', '.join(map(repr, head[:6])) or 'nothing'}; other names of {column!r} are "
                f"{', '.join(words[1:])}"
            )
    return found


def _header(name: str) -> str:
    return name.strip().lower().replace(" ", "_")
