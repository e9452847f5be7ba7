"""From records to what the report says: tables of arms and candidates, paired differences.

Pure functions; test scores never choose anything, see `kt.core.choice`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kt.core.choice import choose, layers_of, scores, settle_layers
from kt.core.intervals import Interval, interval, outcome
from kt.core.records import (
    ARMS,
    Column,
    Record,
    by_seed,
    column_of,
    grouped,
    over_draws,
    rank,
    right_by_seed,
)

CONTROLS = ("direct", "random", "untrained", "hog", "longer", "supervised")
VOC = ("voc_classification", "voc_detection", "voc_segmentation")
EVALUATIONS = ("knn", "linear", "nonlinear", "svm", "finetune", "clusters", *VOC)  # order shown
MAIN = ("top1", "map_11", "miou")  # what arms are compared by
AGREEMENT = ("nmi", "purity", "hungarian", "view_nmi")
METRICS = (*MAIN, *AGREEMENT, "map_area", "tuned_map_11", "tuned_map_area")
HIDDEN = ("validation_top1", "validation_map", "mean_class_accuracy")  # not among the columns


class Difference(NamedTuple):
    """Transfer minus one control, paired by seed.

    Attributes:
        control: Name of the arm.
        interval: Of the gap.
        outcome: As `intervals.outcome` says.
        images: Of the test, 0 where it is not known.
    """

    control: str
    interval: Interval
    outcome: str
    images: int


class Cell(NamedTuple):
    """One entry of a table.

    Attributes:
        interval: Mean over seeds.
        layer: The layer chosen, where several were probed.
        best: Whether it is the highest of its column.
        draws: Standard deviation over draws of few labels, where each has a record.
    """

    interval: Interval
    layer: str | None
    best: bool
    draws: float | None = None


class Row(NamedTuple):
    """One model of a table, all seeds together."""

    arm: str
    model: str
    about: str
    chosen: bool
    score: Interval | None
    cells: list[Cell | None]
    seeds: int
    seconds: float | None


class LayerTable(NamedTuple):
    """Scores of every layer of one evaluation: a cell for each layer and arm's chosen model.

    A cell is `best` where validation chose the layer, not where the score is highest.
    """

    column: Column
    layers: list[str]
    rows: list[tuple[str, str, list[Cell | None]]]  # arm, about, cells


class Comparison(NamedTuple):
    """What can be said about one target network.

    Attributes:
        target: Its name, "" if the records name none.
        rule: The metric that chose, one of `RULES`, or "" where nothing was measured to choose by.
        chosen: arm -> name of the chosen model.
        columns: What was measured.
        arms: One row for each arm, its chosen model.
        candidates: One row for each model of the arms that had a choice.
        differences: Transfer against each control, for each of the main quantities.
        by_layer: Of each evaluation that probed more than one layer.
    """

    target: str
    rule: str
    chosen: dict[str, str]
    columns: list[Column]
    arms: list[Row]
    candidates: list[Row]
    differences: dict[Column, list[Difference]]
    by_layer: list[LayerTable]


def targets(records: Sequence[Record]) -> list[str]:
    """Lists the target networks that the records name, [""] if none."""
    return list(dict.fromkeys(r["target"] for r in records if r.get("target"))) or [""]


def compare(
    records: Sequence[Record],
    evaluations: Sequence[str],
    seconds: Mapping[str, float] | None = None,
    target: str = "",
) -> Comparison:
    """Gives everything the report says about one target.

    Args:
        records: All records; those that name another target are passed over.
        evaluations: Whose validation scores choose teacher, layer and k.
        seconds: model -> seconds of training, where known.
        target: Name of the target, "" for all.
    """
    records = [r for r in records if not target or r.get("target") in (None, target)]
    several = {place for place, layers in layers_of(records).items() if len(layers) > 1}
    every, records = records, settle_layers(records)
    rule, score = scores(records, evaluations)
    chosen = choose(records, score)
    columns = _columns(records)
    rows = _rows(records, columns, score, chosen, seconds or {}, several)
    judged = [column.metric != "view_nmi" for column in columns]
    arms = mark_best([row for row in rows if row.chosen], judged)
    with_choice = {row.arm for row in rows if not row.chosen}
    candidates = [row for row in rows if row.arm in with_choice]
    differences = _differences(records, columns, chosen)
    by_layer = layer_tables(every, records, chosen)
    return Comparison(target, rule, chosen, columns, arms, candidates, differences, by_layer)


def layer_tables(
    every: Sequence[Record], settled: Sequence[Record], chosen: Mapping[str, str]
) -> list[LayerTable]:
    """Lays out the scores of every layer, for evaluations that probed more than one.

    Args:
        every: Records of all layers.
        settled: Those of the layer that was chosen.
        chosen: arm -> name of its model.
    """
    ranked = {r["evaluation"] for r in every if r["metric"] == "top1"}
    shown = [
        r
        for r in every
        if r.get("layer")
        and chosen[r["arm"]] == r["model"]
        and r["metric"] == ("top1" if r["evaluation"] in ranked else "map_area")
        and r.get("labels_per_class") is None
    ]
    settled_on = {(r["model"], r["evaluation"], r.get("layer")) for r in settled}
    tables = []
    for column, group in grouped(shown, column_of).items():
        layers, of_arm = grouped(group, lambda r: r["layer"]), grouped(group, lambda r: r["arm"])
        if len(layers) < 2:
            continue
        rows = []
        for arm in sorted(of_arm, key=lambda arm: rank(arm, ARMS)):
            of_layer, model = grouped(of_arm[arm], lambda r: r["layer"]), chosen[arm]
            cells = [
                Cell(
                    measured(of_layer[layer], column),
                    layer,
                    (model, column.evaluation, layer) in settled_on,
                )
                if layer in of_layer
                else None
                for layer in layers
            ]
            rows.append((arm, about(of_arm[arm][0]), cells))
        tables.append(LayerTable(column, list(layers), rows))
    known = {column: place for place, column in enumerate(_columns(settled))}
    return sorted(tables, key=lambda table: known[table.column])


def _columns(records: Sequence[Record]) -> list[Column]:
    found = {column_of(record) for record in records if record["metric"] not in HIDDEN}

    def key(column: Column):
        evaluation, metric, labels, fraction = column
        known = rank(evaluation, EVALUATIONS), evaluation, rank(metric, METRICS), metric
        return *known, fraction or 0, labels or 0

    return sorted(found, key=key)


def _rows(records, columns, score, chosen, seconds, several) -> list[Row]:
    rows, groups = [], grouped(records, lambda r: (r["arm"], r["model"]))
    numbers = Counter(arm for arm, _ in groups)
    for (arm, name), group in groups.items():
        rows.append(
            Row(
                arm=arm,
                model=name,
                about=about(group[0]) or (name if numbers[arm] > 1 else ""),
                chosen=chosen[arm] == name,
                score=score.get(name),
                cells=[_cell(group, column, several) for column in columns],
                seeds=len({record["seed"] for record in group}),
                seconds=seconds.get(name),
            )
        )
    return sorted(rows, key=lambda row: (rank(row.arm, ARMS), row.model))


def _cell(records: list[Record], column: Column, several: set) -> Cell | None:
    found = [record for record in records if column_of(record) == column]
    if not found:
        return None
    named = (found[0]["model"], column.evaluation) in several
    layer = found[0].get("layer") if named else None
    return Cell(measured(found, column), layer, False, over_draws(found, column))


def mark_best(rows: list[Row], judged: Sequence[bool]) -> list[Row]:
    """Marks the highest mean of each column that `judged` names; `supervised` takes no part.

    It is the bound; and view agreement is no quality by itself.
    """
    best: dict[int, float] = {}
    taking_part = [row for row in rows if row.arm != "supervised"]
    for row in taking_part:
        for index, cell in enumerate(row.cells):
            if cell and judged[index]:
                best[index] = max(best.get(index, -1.0), cell.interval.mean)

    def mark(row: Row) -> Row:
        cells = [
            cell and cell._replace(best=cell.interval.mean == best.get(index))
            for index, cell in enumerate(row.cells)
        ]
        return row._replace(cells=cells) if row in taking_part else row

    return [mark(row) for row in rows]


def _differences(records, columns, chosen) -> dict[Column, list[Difference]]:
    """Pairs transfer with each control, seed by seed, in the main metric of each evaluation."""
    main: dict[str, Column] = {}
    for column in columns:
        if column.metric in MAIN:
            main.setdefault(column.evaluation, column)  # fewest labels stand first
    of_model = grouped(records, lambda record: (record["arm"], record["model"]))
    arms = {arm: of_model[arm, model] for arm, model in chosen.items()}
    found = {}
    for column in main.values() if "transfer" in arms else ():
        pairs = (
            (arm, paired(arms["transfer"], arms[arm], column)) for arm in CONTROLS if arm in arms
        )
        images = min(
            (r.get("n") or 0 for r in arms["transfer"] if column_of(r) == column), default=0
        )
        found[column] = [
            Difference(arm, gap, outcome(gap, images), gap.images or images)
            for arm, gap in pairs
            if gap
        ]
    return {column: gaps for column, gaps in found.items() if gaps}


def paired(ours: Sequence[Record], theirs: Sequence[Record], column: Column) -> Interval | None:
    """Gives the difference of one quantity over the seeds that both have; None if there is none."""
    return combined([(1, ours), (-1, theirs)], column)


def measured(records: Sequence[Record], column: Column) -> Interval | None:
    """Gives one quantity of one model over its seeds and test images."""
    return combined([(1, records)], column)


def combined(parts: Sequence[tuple[float, Sequence[Record]]], column: Column) -> Interval | None:
    """Gives a weighted sum of one quantity of several models, seed by seed and image by image.

    Args:
        parts: Weight and records of each model.
        column: The quantity.

    Returns:
        The interval over the seeds that all have, and over the test images where all records say
        which were right; None if no seed is common to all.
    """
    weights = [weight for weight, _ in parts]
    values = [by_seed(records, column) for _, records in parts]
    right = [right_by_seed(records, column) for _, records in parts]
    common = sorted(set.intersection(*map(set, values)))
    if not common:
        return None
    images = None
    if None not in right:
        images = sum(w * sum(one[s] for s in common) for w, one in zip(weights, right, strict=True))
        images = images / len(common)
    sums = (sum(w * one[s] for w, one in zip(weights, values, strict=True)) for s in common)
    return interval(sums, images)


def about(record: Record) -> str:
    """Says what a model was taught by, such as `soft, teacher deep, layer block2, k 100`."""
    kind = record.get("transfer") or "hard"
    parts = {"teacher": "teacher", "layer": "teacher_layer", "k": "k"}
    if record["arm"] not in ("transfer", "untrained", "hog"):
        return record.get("chosen", "")
    found = [f"{word} {record[key]}" for word, key in parts.items() if record.get(key)]
    said = ", ".join([kind, *found] if kind != "hard" else found)
    return f"{said} ({record['chosen']})" if record.get("chosen") else said
