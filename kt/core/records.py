"""Metric records: reading, order, groups.

A record is a dict with `model, arm, evaluation, dataset, metric, value` (a fraction), `seed, n`
and, where they apply, `layer, labels_per_class, draw, fraction, k, teacher, teacher_layer, target,
transfer`, `chosen`, what `auto` stood for, and `right`, which of the n images were right.
"""

from __future__ import annotations

import base64
import csv
import io
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from kt.core import step
from kt.core.auto import AUTO
from kt.core.step import DataError

Record = dict[str, Any]
ARMS = ("random", "direct", "longer", "untrained", "hog", "transfer", "supervised")
FIELDS = (
    *("arm", "model", "evaluation", "dataset", "metric", "value", "seed", "n"),
    *("layer", "labels_per_class", "fraction", "k", "teacher", "teacher_layer", "target"),
    *("transfer", "chosen"),
)
NEEDED = FIELDS[:8]
RIGHT = "right"  # bits of the images in the order of their pack, the same for all models


class Column(NamedTuple):
    """One measured quantity; with few labels, how many of each class or which share of all."""

    evaluation: str
    metric: str
    labels_per_class: int | None = None
    fraction: float | None = None


def read_evaluation(path: Path) -> tuple[list[Record], dict[str, Any]]:
    """Reads the records of one evaluation and where they come from.

    Raises:
        DataError: A record lacks a field, its value is not a fraction, or not that of its `right`.
    """
    content = step.read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("records"), list):
        raise DataError(f'{path}: expected {{"records": [...]}}; remove it and run again')
    for record in content["records"]:
        missing = [name for name in NEEDED if record.get(name) is None]
        if missing:
            raise DataError(f"{path}: a record lacks {', '.join(missing)}: {record}")
        value = record["value"]
        if not isinstance(value, int | float) or not -1e-6 <= value <= 1 + 1e-6:
            raise DataError(f"{path}: expected a value from 0 to 1, found {value!r} in {record}")
        if RIGHT in record and not _is_share(record):
            about = {name: record[name] for name in record if name != RIGHT}
            raise DataError(
                f"{path}: expected `{RIGHT}` to hold {record['n']} bits, a share of {value} of "
                f"them set, found others in {about}; remove the file and run again"
            )
    return content["records"], {"evaluation": path.stem, **content.get("provenance", {})}


def packed(right: np.ndarray) -> str:
    """Gives (N,) bool as text for a record: bits, eight to a byte, in base 64."""
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def unpacked(record: Record) -> np.ndarray:
    """Gives which of a record's images were right, (N,) float64 of 0 and 1.

    Raises:
        ValueError: It is no base 64, or of another length.
    """
    bits = np.frombuffer(base64.b64decode(record[RIGHT], validate=True), np.uint8)
    if len(bits) != -(-record["n"] // 8):
        raise ValueError(f"expected {record['n']} bits, found {8 * len(bits)}")
    return np.unpackbits(bits, count=record["n"]).astype(float)


def _is_share(record: Record) -> bool:
    try:
        return abs(float(unpacked(record).mean()) - record["value"]) < 1e-6
    except (ValueError, TypeError):  # of base64 or of a length
        return False


def with_targets(records: Sequence[Record], settings: dict[str, Any]) -> list[Record]:
    """Names the target in records of teachers that have a target's architecture (`direct`, ...)."""
    teachers = settings.get("teachers", {})

    def target(record):
        backbone = teachers.get(record.get("teacher"), {}).get("backbone")
        return record.get("target") or (backbone if isinstance(backbone, str) else None)

    return [record | ({"target": found} if (found := target(record)) else {}) for record in records]


def with_choice(record: Record, choices: Mapping[str, Mapping[str, Any]]) -> Record:
    """Says in the field `chosen` which layers and k `auto` stood for.

    Args:
        record: Of any model.
        choices: teacher -> what `kt/choose.py` wrote.
    """
    if AUTO not in (record.get("k"), *str(record.get("teacher_layer")).split("+")):
        return record
    found = []
    for teacher, layer in zip(
        record["teacher"].split("+"), record["teacher_layer"].split("+"), strict=True
    ):
        if choice := choices.get(teacher):
            named, k = settled(choice, layer, record["k"])
            found.append(named if k is None else f"{named} k {k}")
    return record | ({"chosen": ", ".join(found)} if found else {})


def settled(choice: Mapping[str, Any], layer: str, k: int | str | None) -> tuple[str, Any]:
    """Gives the layer and k that a teacher's choice puts in the place of `auto`."""
    named = choice["layer"] if layer == AUTO else layer
    return named, choice["k"].get(named) if k == AUTO else k


def sort_records(
    records: Sequence[Record], layers: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> list[Record]:
    """Orders records by what they are about; numbers as numbers, absent fields first.

    Args:
        records: In any order.
        layers: model -> its layers, first to last, where known; others stand in alphabetical order.

    Raises:
        DataError: One quantity was measured on more than one data set, or image by image on
            different numbers of images.
    """
    judged_on: dict[tuple, set[str]] = {}
    for record in records:
        number = f" ({record['n']} images)" if RIGHT in record else ""
        found = judged_on.setdefault((record["evaluation"], record["metric"], bool(number)), set())
        found.add(record["dataset"] + number)
    for (evaluation, metric, _), names in judged_on.items():
        if len(names) > 1:
            raise DataError(
                f"{evaluation} {metric} was measured on {', '.join(sorted(names))}; scores on "
                "different images cannot be compared, evaluate all models on one data set"
            )
    order = ("arm", "model", "evaluation", "layer", "labels_per_class", "fraction", "metric")

    def key(record):
        known = list(layers.get(record["model"], ()))
        depth = rank(record["layer"], known) if record.get("layer") else None
        values = [record.get(name) for name in (*order, "seed", "draw")]
        values.insert(order.index("layer"), depth)
        return [
            (v is not None, 0 if isinstance(v, str) else v or 0, v if isinstance(v, str) else "")
            for v in values
        ]

    return sorted(records, key=key)


def as_csv(records: Sequence[Record]) -> str:
    """Gives the records as a table, one row each, empty where a field does not apply.

    Without `right`, which no eye can read.
    """
    more = sorted({name for record in records for name in record} - {*FIELDS, RIGHT})
    out = io.StringIO()
    writer = csv.DictWriter(out, [*FIELDS, *more], lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def by_seed(records: Iterable[Record], column: Column) -> dict[int, float]:
    """Gives seed -> value of one quantity; several records of one seed are averaged."""
    found = grouped(
        (record for record in records if column_of(record) == column), lambda record: record["seed"]
    )
    return {seed: statistics.fmean(r["value"] for r in found[seed]) for seed in sorted(found)}


def over_draws(records: Iterable[Record], column: Column) -> float | None:
    """Gives the standard deviation over the draws of few labels, its mean over seeds.

    None where no seed has several records that name their draw.
    """
    drawn = (r for r in records if column_of(r) == column and r.get("draw") is not None)
    found = grouped(drawn, lambda record: record["seed"]).values()
    spreads = [statistics.stdev(r["value"] for r in group) for group in found if len(group) > 1]
    return statistics.fmean(spreads) if spreads else None


def right_by_seed(records: Iterable[Record], column: Column) -> dict[int, np.ndarray] | None:
    """Gives seed -> (N,) float64, how far each image was right; None where a record does not say.

    Several records of one seed are averaged, as in `by_seed`.
    """
    found = grouped(
        (record for record in records if column_of(record) == column), lambda record: record["seed"]
    )
    if not all(RIGHT in record for group in found.values() for record in group):
        return None
    return {seed: np.mean([unpacked(r) for r in group], axis=0) for seed, group in found.items()}


def column_of(record: Record) -> Column:
    """Gives which quantity a record measures."""
    few = record.get("labels_per_class"), record.get("fraction")
    return Column(record["evaluation"], record["metric"], *few)


def grouped(records: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    """Groups records by `key`, in the order of appearance."""
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def rank(name: str, order: Sequence[str]) -> int:
    """Gives the place of a name in an order; unknown names stand last."""
    return order.index(name) if name in order else len(order)
