"""From records to what the report says: choice, means, intervals, differences and tables.

Pure functions. A record is a dict with `model, arm, evaluation, dataset, metric, value, seed, n`
and, where they apply, `layer, labels_per_class, k, teacher, teacher_layer, target`. Layers, teachers
and k are chosen by scores that no test image has touched: `validation_top1`, measured on a held-out
part of train, or, where there are no labels, `view_nmi`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

ARMS = ("random", "direct", "longer", "untrained", "hog", "transfer", "supervised")
CONTROLS = ("direct", "random", "untrained", "hog", "longer", "supervised")
RULES = ("validation_top1", "view_nmi")
TIE = 0.02  # gaps below two points were within the noise of one pre-training seed
EVALUATIONS = ("knn", "linear", "finetune", "clusters")  # order of the columns
METRICS = ("top1", "nmi", "purity", "view_nmi")

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
# Source: NIST/SEMATECH e-Handbook of Statistical Methods, section 1.3.6.7.2, column 0.975.
T_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

Record = dict[str, Any]


class Interval(NamedTuple):
    """A mean over seeds and the half-width of its 95 % interval, None for one seed."""

    mean: float
    half: float | None
    n: int


class Column(NamedTuple):
    """One measured quantity."""

    evaluation: str
    metric: str
    labels_per_class: int | None = None


class Difference(NamedTuple):
    """Transfer minus one control, paired by seed; `outcome` is `beats`, `tie` or `behind`."""

    control: str
    interval: Interval
    outcome: str


class Cell(NamedTuple):
    """One entry of a table; `best` marks the highest of its column, `layer` what was probed."""

    interval: Interval
    layer: str | None
    best: bool


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
    """

    target: str
    rule: str
    chosen: dict[str, str]
    columns: list[Column]
    arms: list[Row]
    candidates: list[Row]
    differences: dict[Column, list[Difference]]


def interval(values: Iterable[float]) -> Interval:
    """Gives the mean of one value per seed and its 95 % Student-t interval.

    More than 31 values use the quantile of 30 degrees of freedom, which is a little too wide.
    """
    values = list(values)
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None, len(values))
    quantile = T_95[min(len(values) - 1, len(T_95)) - 1]
    return Interval(mean, quantile * statistics.stdev(values) / len(values) ** 0.5, len(values))


def by_seed(records: Iterable[Record], column: Column) -> dict[int, float]:
    """Gives seed -> value of one quantity; several records of one seed are averaged."""
    found = _group(
        (record for record in records if _column(record) == column), lambda record: record["seed"]
    )
    return {seed: statistics.fmean(r["value"] for r in found[seed]) for seed in sorted(found)}


# ---------------------------------------------------------------------------- choice


def settle_layers(records: Sequence[Record]) -> list[Record]:
    """Keeps of each model and evaluation the records of the layer with the best rule score.

    An evaluation without any such score keeps its last layer; test scores are never looked at.
    """
    groups = _group(records, lambda record: (record["model"], record["evaluation"]))
    kept = []
    for group in groups.values():
        layers = dict.fromkeys(record["layer"] for record in group if record.get("layer"))
        best = _best_layer(group, list(layers)) if layers else None
        kept += [record for record in group if record.get("layer") in (None, best)]
    return kept


def _best_layer(records: list[Record], layers: list[str]) -> str:
    for rule in RULES:
        scored = _group((r for r in records if r["metric"] == rule), lambda r: r.get("layer"))
        scored.pop(None, None)
        if scored:
            return max(scored, key=lambda layer: statistics.fmean(r["value"] for r in scored[layer]))
    return layers[-1]


def scores(records: Sequence[Record], evaluations: Sequence[str]) -> tuple[str, dict[str, Interval]]:
    """Gives the rule and each model's score by it: never a number of the test split.

    Args:
        records: With layers settled.
        evaluations: Whose `validation_top1` are averaged; those that measured none do not count.

    Returns:
        The rule, one of `RULES` or "", and model -> score over seeds. A model that lacks one of
        the evaluations has no score.
    """
    for rule in RULES:
        found = [record for record in records if record["metric"] == rule]
        if rule == "validation_top1":
            found = [record for record in found if record["evaluation"] in evaluations]
        if found:
            wanted = {record["evaluation"] for record in found}
            models = _group(found, lambda record: record["model"])
            return rule, {
                model: _score(group)
                for model, group in models.items()
                if {record["evaluation"] for record in group} == wanted
            }
    return "", {}


def _score(records: list[Record]) -> Interval:
    """Averages the evaluations within each seed that has them all, then the seeds."""
    columns = {_column(record) for record in records}
    values = [by_seed(records, column) for column in columns]
    common = set.intersection(*map(set, values)) or set.union(*map(set, values))
    return interval(
        statistics.fmean(value[seed] for value in values if seed in value) for seed in sorted(common)
    )


def choose(records: Sequence[Record], score: Mapping[str, Interval]) -> dict[str, str]:
    """Gives arm -> its model with the best score; an arm without scores gets its first model."""
    arms = _group(records, lambda record: record["arm"])
    chosen = {}
    for arm in sorted(arms, key=lambda arm: _place(arm, ARMS)):
        models = list(dict.fromkeys(record["model"] for record in arms[arm]))
        chosen[arm] = max(models, key=lambda model: score[model].mean if model in score else -1.0)
    return chosen


# ---------------------------------------------------------------------------- comparison


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
    records = settle_layers(records)
    rule, score = scores(records, evaluations)
    chosen = choose(records, score)
    columns = _columns(records)
    rows = _rows(records, columns, score, chosen, seconds or {})
    arms = mark_best([row for row in rows if row.chosen])
    several = {row.arm for row in rows if not row.chosen}
    candidates = [row for row in rows if row.arm in several]
    differences = _differences(records, columns, chosen)
    return Comparison(target, rule, chosen, columns, arms, candidates, differences)


def _columns(records: Sequence[Record]) -> list[Column]:
    hidden = ("validation_top1", "mean_class_accuracy")
    found = {_column(record) for record in records if record["metric"] not in hidden}

    def place(column: Column):
        evaluation, metric, labels = column
        known = _place(evaluation, EVALUATIONS), evaluation, _place(metric, METRICS), metric
        return *known, labels or 0

    return sorted(found, key=place)


def _rows(records, columns, score, chosen, seconds) -> list[Row]:
    rows = []
    for (arm, name), group in _group(records, lambda r: (r["arm"], r["model"])).items():
        rows.append(
            Row(
                arm=arm,
                model=name,
                about=about(group[0]),
                chosen=chosen[arm] == name,
                score=score.get(name),
                cells=[_cell(group, column) for column in columns],
                seeds=len({record["seed"] for record in group}),
                seconds=seconds.get(name),
            )
        )
    return sorted(rows, key=lambda row: (_place(row.arm, ARMS), row.model))


def _cell(records: list[Record], column: Column) -> Cell | None:
    values = by_seed(records, column)
    if not values:
        return None
    layers = [r.get("layer") for r in records if _column(r) == column and r.get("layer")]
    return Cell(interval(values.values()), layers[0] if layers else None, False)


def mark_best(rows: list[Row]) -> list[Row]:
    """Marks the highest mean of each column; `supervised` is the bound and takes no part."""
    best: dict[int, float] = {}
    for row in rows:
        for index, cell in enumerate(row.cells):
            if cell and row.arm != "supervised":
                best[index] = max(best.get(index, -1.0), cell.interval.mean)
    return [
        row._replace(
            cells=[
                cell and cell._replace(best=row.arm != "supervised" and cell.interval.mean == best[i])
                for i, cell in enumerate(row.cells)
            ]
        )
        for row in rows
    ]


def _differences(records, columns, chosen) -> dict[Column, list[Difference]]:
    """Pairs transfer with each control, seed by seed, in k-NN, linear and few-label top-1."""
    main: dict[str, Column] = {}
    for column in columns:
        if column.metric == "top1":
            main.setdefault(column.evaluation, column)  # fewest labels stand first
    of_model = _group(records, lambda record: (record["arm"], record["model"]))
    arms = {arm: of_model[arm, model] for arm, model in chosen.items()}
    found = {}
    for column in main.values() if "transfer" in arms else ():
        pairs = ((arm, paired(arms["transfer"], arms[arm], column)) for arm in CONTROLS if arm in arms)
        found[column] = [Difference(arm, gap, outcome(gap)) for arm, gap in pairs if gap]
    return {column: gaps for column, gaps in found.items() if gaps}


def paired(ours: Sequence[Record], theirs: Sequence[Record], column: Column) -> Interval | None:
    """Gives the difference of one quantity over the seeds that both have; None if there is none."""
    a, b = by_seed(ours, column), by_seed(theirs, column)
    common = sorted(a.keys() & b.keys())
    return interval(a[seed] - b[seed] for seed in common) if common else None


def outcome(gap: Interval) -> str:
    """Says `beats`, `tie` or `behind`: by the interval, or by two points where one seed has none."""
    if abs(gap.mean) <= (TIE if gap.half is None else gap.half):
        return "tie"
    return "beats" if gap.mean > 0 else "behind"


def about(record: Record) -> str:
    """Says what a model was taught by, such as `teacher deep, layer block2, k 100`."""
    parts = {"teacher": "teacher", "layer": "teacher_layer", "k": "k"}
    if record["arm"] not in ("transfer", "untrained", "hog"):
        return ""
    return ", ".join(f"{word} {record[key]}" for word, key in parts.items() if record.get(key))


def _column(record: Record) -> Column:
    return Column(record["evaluation"], record["metric"], record.get("labels_per_class"))


def _group(records: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def _place(name: str, order: Sequence[str]) -> int:
    return order.index(name) if name in order else len(order)
