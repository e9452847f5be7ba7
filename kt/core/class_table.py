"""Classes of pictures that a table gives: a CSV with a row for each picture that has a label."""

from __future__ import annotations

import csv
import functools
import os
import re
import unicodedata
from collections.abc import Iterator

import numpy as np

from kt.core.ending import ConfigError, DataError
from kt.core.layouts import (
    FOLDERS,
    POOL,
    SPLITS,
    TEST,
    TRAIN,
    USUAL,
    check_classes,
    check_numbers,
    clean,
    for_test,
    plain,
    rank_of,
    tell,
)  # fmt: skip

COLUMNS = {  # usual names, with small letters; the first that is there counts
    "file": ("file", "filename", "file_name", "path", "image", "image_id", "id", "name"),
    "class": ("class", "label", "class_name", "category", "target", "species"),
    "split": ("split",),
}
LOOSE = 1000  # what a match by another way of writing is further off than any exact one
SHORT = 2000  # and one without the folders that all rows share
UNREAD = 1_000_000  # and one of a file that is no picture to read
NEVER = np.iinfo(np.int32).max


class ClassTable:
    """The layout of a table: columns `file` and `class`, and `split` where it is given.

    Without `split` a fifth of each class, by a hash of the names, is for testing. All pictures
    that it does not name have no label. A name may leave out folders above, or have more of them
    than there are if all rows do, leave out the ending, or be written with letters of another case.
    The row that comes closest to a file's name means it.
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
        self._read()
        self.names = list(self.rows)
        self.best = np.full(len(self.names), NEVER, np.int32)  # how far off the closest file is
        self.files = np.zeros(len(self.names), np.int64)  # a hash of its name
        self.several = np.zeros(len(self.names), bool)  # files that are as close
        self.other = np.zeros(len(self.names), bool)  # a file that another row is closer to

    def see(self, parts, usable, ignored=False) -> None:
        """Takes note of a file."""
        fitting = self._fitting(parts)
        off, row = next(fitting, (NEVER, -1))
        if row < 0:
            return
        if usable and off < LOOSE:
            for further, other in fitting:
                if further >= LOOSE:
                    break
                self.other[other] = True
        off, file = off if usable else off + UNREAD, hash(parts)
        if off < self.best[row]:
            self.best[row], self.files[row], self.several[row] = off, file, False
        elif off == self.best[row] and file != self.files[row]:
            self.several[row] = True

    def settle(self, where, refused) -> None:
        """Decides; raises DataError, see `Layout`."""
        self._check_files(where)
        readable, drawn = np.flatnonzero(self.best < UNREAD), {}
        for row in readable.tolist():
            if self.splits[row] is None:
                drawn.setdefault(self.classes[row], []).append(row)
        check_numbers({name: len(rows) for name, rows in drawn.items()}, self.path)
        for rows in drawn.values():
            rows.sort(key=lambda row: rank_of(self.names[row]))
            number = for_test(len(rows))
            for place, row in enumerate(rows):
                self.splits[row] = TEST if place < number else TRAIN
        found: dict[str, set[str]] = {split: set() for split in SPLITS}
        for row in readable.tolist():
            found[self.splits[row]].add(self.classes[row])
        check_classes(found[TRAIN], found[TEST], self.path + refused)

    def place(self, parts) -> tuple[str, str | None, str]:
        """Gives split, class and fault of a file."""
        off, row = next(self._fitting(parts), (NEVER, 0))
        if off < NEVER and off == self.best[row]:
            return self.splits[row], self.classes[row] or None, ""
        return POOL, None, ""

    # ------------------------------------------------------------------------ names

    def _fitting(self, parts: tuple[str, ...]) -> Iterator[tuple[int, int]]:
        """Gives the rows that may mean a file, the closest first, with how far off each is."""
        names = [clean("/".join(parts[left_out:])) for left_out in range(len(parts))]
        both = [(name, os.path.splitext(name)[0]) for name in names]
        for left_out, forms in enumerate(both):
            for ending, name in enumerate(forms):
                if (row := self.rows.get(name, -1)) >= 0:
                    yield 2 * left_out + ending, row
        both = [tuple(map(loosely, forms)) for forms in both]
        for further, known in self._loose.items():
            for left_out, forms in enumerate(both):
                for ending, name in enumerate(forms):
                    if (row := known.get(name, -1)) >= 0:
                        yield further + 2 * left_out + ending, row

    @functools.cached_property
    def _loose(self) -> dict[int, dict[str, int]]:
        """The rows by other ways to write their files, also without the folders all rows share."""
        shared = len(os.path.commonprefix([name.split("/")[:-1] for name in self.names]))
        short = {SHORT: self._loosely(shared)} if shared else {}
        return {LOOSE: self._loosely(0)} | short

    def _loosely(self, left_out: int) -> dict[str, int]:
        """Gives the rows by such ways; those of several rows are -1."""
        found: dict[str, int] = {}
        for row, name in enumerate(self.names):
            short = "/".join(name.split("/")[left_out:])
            for one in {loosely(short), loosely(os.path.splitext(short)[0])}:
                found[one] = -1 if one in found else row
        return found

    def _check_files(self, where: str) -> None:
        """Refuses rows that mean several files or the same, and a table without any file."""
        names = self.names
        if (self.best < SHORT).any():  # then folders that all rows have are meant
            self.best[(self.best % UNREAD >= SHORT) & (self.best < NEVER)] = NEVER
        if len(rows := np.flatnonzero(self.several & (self.best < UNREAD))):
            raise DataError(
                f"{self.path}: {len(rows)} rows mean several files in {where}, such as "
                f"{names[rows[0]]!r}; write their folders and endings, too, or point `images` at "
                "the folder that is meant"
            )
        missing = self.best == NEVER
        if len(rows := np.flatnonzero(missing & self.other)):
            raise DataError(
                f"{self.path}: {len(rows)} rows mean a file that another row names better, such as "
                f"{names[rows[0]]!r}; a picture has one class, remove one of them"
            )
        rows = np.flatnonzero(missing)
        shown = ", ".join(repr(names[row]) for row in rows[:3])
        if len(rows) == len(names):
            raise DataError(
                f"{self.path}: none of its {len(names)} files is in {where}, such as {shown}; "
                "names are relative to it"
            )
        if len(rows):
            tell(
                f"{self.path}: {len(rows)} of its {len(names)} files are not in {where}, such as "
                f"{shown}"
            )
        if unread := int(((self.best >= UNREAD) & ~missing).sum()):
            tell(f"{self.path}: {unread} of its {len(names)} files are no pictures to read")

    # ------------------------------------------------------------------------ reading

    def _read(self) -> None:
        try:
            with open(self.path, encoding="utf-8-sig", newline="") as file:
                head = file.readline()
                told = re.match('"?sep=(.)', head)  # a line that Excel reads and does not show
                if told:
                    head = file.readline()
                file.seek(0)
                if told:
                    file.readline()
                mark = told[1] if told else max(",;\t", key=head.count)
                lines = csv.reader(file, delimiter=mark, strict=True, skipinitialspace=True)
                columns = _columns(head_line := next(lines, []), self.path)
                for line in lines:
                    if any(map(str.strip, line)):
                        where = f"{self.path}, line {lines.line_num + bool(told)}"
                        self._take(line, len(head_line), columns, where)
        except OSError as error:
            raise ConfigError(
                f"labels: expected null, {FOLDERS} or a table, found none at {self.path!r}: "
                f"{error.strerror}"
            ) from None
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{self.path}: expected a CSV in UTF-8: {error}") from None
        if not self.rows:
            raise DataError(f"{self.path}: expected a row for each labelled picture, found none")
        self.splits = self._splits()

    def _take(self, line: list[str], width: int, columns: dict[str, int], where: str) -> None:
        """Takes up one row; its split as it stands there."""
        if any(map(str.strip, line[width:])):
            raise DataError(
                f"{where}: expected {width} values, found {len(line)}; put values with separators "
                "into double quotes"
            )
        value = {
            name: line[place].strip() if place < len(line) else ""
            for name, place in columns.items()
        }
        split = value.get("split")
        if split and not split_of(split):
            usual = ", ".join(name for names in USUAL.values() for name in names)
            raise DataError(f"{where}: expected as split one of {usual}; found {split!r}")
        for name in ("file", "class"):
            if not value[name] and not (name == "class" and plain(split or "") in USUAL[POOL]):
                raise DataError(f"{where}: expected a {name}, found none; mend or remove the row")
        parts = value["file"].replace("\\", "/").split("/")
        file = clean("/".join(part for part in parts if part not in ("", ".")))
        kind = clean(value["class"])
        if (before := self.rows.get(file)) is not None:
            if (self.classes[before], self.splits[before]) != (kind, split):
                raise DataError(f"{where}: {file!r} came before; a picture has one class")
            return
        self.rows[file] = len(self.classes)
        self.classes.append(kind)
        self.splits.append(split)

    def _splits(self) -> list[str | None]:
        """Gives the splits of all rows.

        Of test and validation, where both are there, test counts; the rows of validation are then
        learned from without their labels, as of an unlabelled set.
        """
        known = {word: split_of(word) for word in self.splits if word}
        if known and not all(self.splits):
            raise DataError(
                f"{self.path}: expected a split in each row or in none, found rows without; fill "
                "them in, or leave out the column"
            )
        tests = [word for word, split in known.items() if split == TEST]
        aside = [word for word in tests if not plain(word).startswith("test")]
        if 0 < len(aside) < len(tests):
            known |= dict.fromkeys(aside, POOL)
            tell(
                f"{self.path}: rows of {', '.join(map(repr, aside))} are learned from without "
                "their labels, since others are for test"
            )
        return [known[word] if word else None for word in self.splits]


def split_of(word: str) -> str | None:
    """Gives the split that a word means, None for none."""
    return next((split for split, usual in USUAL.items() if plain(word) in usual), None)


def loosely(name: str) -> str:
    """Gives a form in which ways to write the same name are alike."""
    return unicodedata.normalize("NFC", name).casefold()


def _columns(head: list[str], path: str) -> dict[str, int]:
    """Gives the places of the columns, by our names of them."""
    heads = [name.strip().lower().replace(" ", "_") for name in head]
    places = {name: place for place, name in reversed([*enumerate(heads)])}
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
