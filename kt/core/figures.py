"""The report's figures: picks what each chart of `kt.core.charts` shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from kt.core import charts, verdict
from kt.core.intervals import TIE
from kt.core.records import Column
from kt.core.summary import Comparison, Row

COLOURS = {"one": "transfer", "two": "hog", "three": "untrained", "four": "longer"}  # of no arm
MOST_COSTS = 16
LABELS = {"labels_per_class": "labels per class", "fraction": "share of the labels"}
FEW = (
    ("finetune", "top1", "labels_per_class"),
    ("finetune", "top1", "fraction"),
    ("svm", "top1", "labels_per_class"),
    ("voc_classification", "map_11", "labels_per_class"),
)

Model = dict[str, Any]


def differences(comparison: Comparison) -> list[tuple[str, Markup]]:
    """Draws transfer against each control: (name of the quantity, chart)."""
    found = []
    for column, gaps in comparison.differences.items():
        name = verdict.long_title(column)
        rows = []
        for gap in gaps:
            mean, half = 100 * gap.interval.mean, gap.interval.half
            text = ("+" if mean > 0 else "") + verdict.spread(gap.interval)
            rows.append(charts.Whisker(gap.control, gap.control, mean, half and 100 * half, text))
        said = "; ".join(f"{row.name} {row.text}" for row in rows)
        about = f"Transfer minus each control in points of {name}: {said}"
        found.append((name, charts.whiskers(rows, 100 * TIE, about)))
    return found


def label_curves(comparison: Comparison) -> list[tuple[str, Markup]]:
    """Draws scores against few labels: (name, chart) of what was measured with two or more."""
    found = []
    for evaluation, metric, field in FEW:
        places = [
            (index, getattr(column, field))
            for index, column in enumerate(comparison.columns)
            if (column.evaluation, column.metric) == (evaluation, metric) and getattr(column, field)
        ]
        if len(places) > 1:
            name = f"{verdict.long_title(Column(evaluation, metric))} by {LABELS[field]}"
            if any(row.cells[index] for row in comparison.arms for index, _ in places):
                found.append((name, _label_curve(comparison.arms, places, name, LABELS[field])))
    return found


def _label_curve(arms: Sequence[Row], places, name: str, x_name: str) -> Markup:
    series = []
    for row in arms:
        points = [
            (x, row.cells[index].interval.mean, row.cells[index].interval.half)
            for index, x in places
            if row.cells[index]
        ]
        if points:
            series.append(charts.Series(row.arm, row.arm, points))
    said = "; ".join(
        f"{one.name} " + ", ".join(f"{verdict.percent(y)} % with {x}" for x, y, _ in one.points)
        for one in series
    )
    return charts.lines(series, f"Test {name}: {said}", x_name, logarithmic=True)


def is_target(model: Model) -> bool:
    """Says whether a model learned labels or pseudo-labels; else it learned a pretext task."""
    return bool(model.get("transfer")) or model.get("arm") == "supervised"


def pretext_curves(models: Sequence[Model]) -> Markup | None:
    """Draws accuracy of the pretext task on unseen images by epoch, a line for each network."""
    shown = [m for m in _first_seeds([m for m in models if not is_target(m)]) if curve(m)]
    chances = {found for m in shown if (found := chance(m))}
    level = ("chance", min(chances)) if len(chances) == 1 else None
    free = iter([*COLOURS] * len(shown))
    arms = [m.get("arm") for m in shown]  # two targets have an arm each
    once = [arm if arms.count(arm) == 1 else None for arm in arms]
    colours = [arm or next(free) for arm in once]
    named = [{**m, "name": arm or m["name"]} for m, arm in zip(shown, once, strict=True)]
    return _curves(named, colours, "pretext labels of unseen images predicted", level)


def target_curves(models: Sequence[Model], comparison: Comparison) -> Markup | None:
    """Draws what was taught, right on held-out images, by epoch: the chosen model of each arm."""
    arms = {name: arm for arm, name in comparison.chosen.items()}
    shown = _first_seeds([m for m in models if is_target(m) and m["name"] in arms])
    named = [{**m, "name": arms[m["name"]]} for m in shown]
    what = "what was taught, right on held-out images"
    return _curves(named, [m["name"] for m in named], what, None)


def _curves(models, colours, what: str, level) -> Markup | None:
    series = []
    for model, colour in zip(models, colours, strict=True):
        if points := curve(model):
            series.append(charts.Series(model["name"], colour, points))
    if not series:
        return None
    last = "; ".join(
        f"{one.name} {verdict.percent(one.points[-1][1])} % at the end" for one in series
    )
    return charts.lines(series, f"Share of {what}, by epoch: {last}", "epoch", level=level)


def curve(model: Model) -> list[tuple[float, float, None]]:
    """Gives (epoch, accuracy, None) from a model's log, the last line of each epoch."""
    points = {}
    for line in model["log"]:
        if line.get("epoch") is not None and line.get("validation_top1") is not None:
            points[line["epoch"]] = line["validation_top1"]
    return [(epoch, points[epoch], None) for epoch in sorted(points)]


def chance(model: Model) -> float | None:
    """Gives the accuracy of guessing among the labels of a task, None where it has none."""
    labels = model.get("num_labels")
    return 1 / labels if isinstance(labels, int) and labels > 0 else None


def learned(models: Sequence[Model]) -> list[dict[str, Any]]:
    """Lists pretext networks with task, its accuracy on unseen images and that of guessing."""
    shown = _first_seeds([m for m in models if not is_target(m)])
    return [
        {
            "name": m["name"],
            "task": m["task"]["name"],
            "accuracy": points[-1][1],
            "chance": chance(m),
        }
        for m in shown
        if (points := curve(m))
    ]


def _first_seeds(models: Sequence[Model]) -> list[Model]:
    first: dict[str, Model] = {}
    for model in sorted(models, key=lambda m: m.get("seed") or 0):
        first.setdefault(model["name"], model)
    return list(first.values())


def costs(seconds: Sequence[tuple[str, float]]) -> Markup | None:
    """Draws seconds per step; the smallest are summed where there are too many."""
    rows = list(seconds[:MOST_COSTS])
    if len(seconds) > MOST_COSTS:
        rows.append(
            (f"{len(seconds) - MOST_COSTS} others", sum(s for _, s in seconds[MOST_COSTS:]))
        )
    if not rows:
        return None
    shown = [(name, value, _duration(value)) for name, value in rows]
    said = "; ".join(f"{name} {text}" for name, _, text in shown)
    return charts.bars(shown, f"Seconds per step, all jobs of a kind summed: {said}")


def _duration(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 36000 else f"{seconds / 3600:.1f} h"
