"""A table that several jobs make, each some of its rows, and one puts together.

Parts end where blocks of the whole work end, so that each block is computed as it would be without
parts, and the table is the same bit for bit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from kt.core import table
from kt.core.step import DataError, log

MOST_BYTES = 16 << 20  # read at a time
ATTRIBUTES = {"num_labels"}  # of a table, beside its settings


class Part(NamedTuple):
    """The `number`th of `of` parts, from 1."""

    number: int = 1
    of: int = 1

    def span(self, rows: int, height: int) -> tuple[int, int]:
        """Gives first and last (exclusive) of its rows; all parts but the last are whole blocks.

        Args:
            rows: Of the whole table.
            height: Rows of a block.
        """
        count = -(-rows // height)
        first, last = ((number * count) // self.of for number in (self.number - 1, self.number))
        return first * height, min(last * height, rows)

    def mark(self, settings: dict) -> dict:
        """Adds the part to the settings of its table, unless it is the whole."""
        return settings if self.of == 1 else {**settings, "part": list(self)}


WHOLE = Part()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of a step that can be done in parts."""
    parser.add_argument("--part", type=parse, default=WHOLE, help="such as 2/4: this much of it")
    parser.add_argument(
        "--parts", type=Path, nargs="*", default=[], help="all parts: to be put together"
    )


def parse(text: str) -> Part:
    """Reads a part, such as 2/4, from the command line."""
    number, slash, of = text.partition("/")
    if not (slash and number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"expected a part such as 2/4, found {text!r}")
    return Part(int(number), int(of))


def gather(
    paths: Sequence[Path],
    output: Path,
    format: str,
    arrays: dict[str, int],
    keys: Path,
    parents: Sequence[Path],
) -> None:
    """Puts the parts of a table together, in their order.

    Args:
        paths: The parts.
        output: The table.
        format: Of the table, as of its parts.
        arrays: As for `table.read`.
        keys: The table whose `keys` (N,) the rows must have, in the same order.
        parents: What the parts were made from.

    Raises:
        DataError: A part is missing, made of something else, or its keys are not the next ones.
    """
    settings, attributes, number = _agreed(paths, format, arrays, parents)
    with table.opened(keys) as source, table.create(output, format, settings, parents) as file:
        wanted = source["keys"]
        if number != len(wanted):
            raise DataError(f"{paths[0]}: {number} rows in all parts, {keys} has {len(wanted)}")
        columns: dict[str, table.Column] = {}
        first = 0
        for path in paths:
            with table.read(path, format, arrays) as found:
                for name in set(arrays) - columns.keys():
                    shape = (number, *found[name].shape[1:])
                    columns[name] = table.Column(file, name, shape, found[name].dtype)
                for low, high in _bounds(found):
                    if not np.array_equal(
                        found["keys"][low:high], wanted[first + low : first + high]
                    ):
                        raise DataError(
                            f"{path}: rows {low} to {high - 1} are not those that follow in {keys}"
                        )
                    for name, column in columns.items():
                        column.append(found[name][low:high])
                first += len(found["keys"])
        file.attrs.update(attributes)
    log.info("%s: %d rows of %d parts", format.replace("_", "-"), number, len(paths))


def _bounds(file: h5py.File) -> Iterator[tuple[int, int]]:
    """Gives first and last (exclusive) of rows to be read at a time."""
    rows = len(file["keys"])
    height = max(1, MOST_BYTES * rows // max(1, *(file[name].nbytes for name in file)))
    return ((first, min(first + height, rows)) for first in range(0, rows, height))


def _agreed(paths, format: str, arrays: dict[str, int], parents) -> tuple[dict, dict, int]:
    """Gives settings, attributes and number of rows of all parts, which must be of one table."""
    made_of = [table.digest(parent) for parent in parents]
    agreed, total = None, 0
    for number, path in enumerate(paths, 1):
        with table.read(path, format, arrays) as file:
            settings = json.loads(table.text(file, "config"))
            mine = settings.pop("part", [1, 1])
            origin = json.loads(table.text(file, "provenance"))["parents"]
            found = settings, {name: file.attrs[name] for name in ATTRIBUTES & file.attrs.keys()}
            total += len(file["keys"])
        if mine != [number, len(paths)]:
            raise DataError(f"{path}: expected part {number} of {len(paths)}, found {mine}")
        if list(origin.values()) != made_of:
            names = ", ".join(map(str, parents))
            raise DataError(f"{path} was not made from {names} as they are; {table.REMOVE}")
        if found != (agreed or found):
            raise DataError(f"{path}: expected the settings {agreed}, found {found}")
        agreed = found
    return (*agreed, total)
