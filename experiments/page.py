"""The page of an experiment: for each data set a table and a plot of all models, and its claims."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from kt.core import charts, summary, verdict
from kt.core.intervals import ROUNDING, TIE, Interval, outcome
from kt.core.records import ARMS, RIGHT, Column, Record, grouped

WORDS = {
    "beats": "holds",
    "behind": "does not hold",
    "tie": "not settled",
    "unjudged": "too few images",
}
VERBS = {"beats": "ahead", "behind": "behind"}
LATE = "Stated after results of this budget had been seen."
SHOWN = ("knn", "linear", "finetune")
VERDICT = ("knn", "linear")  # choose a model of each arm, on held-out images
DRAWN = "knn"  # by the plots
LETTER = 6.5  # width of one in a plot, about
# The report's colours; light ones come first in its style sheet.
SHEET = (Path(charts.__file__).parents[1] / "report.css").read_text()
COLOURS = dict(reversed(re.findall(r"--(\w+): (#\w+)", SHEET)))
STYLE = (
    "<style>svg { background: #fff; font: 12.5px sans-serif; } .tick { fill: #5b6470; } "
    "line { stroke: #dfdcd5; } .bar { stroke: #888; stroke-width: 2.2; } circle { fill: #888; }"
    + "".join(
        f" circle.c-{arm} {{ fill: {colour}; }} line.c-{arm} {{ stroke: {colour}; }}"
        for arm, colour in ((arm, COLOURS[arm]) for arm in ARMS)
    )
    + "</style>"
)


def page(
    name: str, about: Mapping[str, Any], found: Mapping[tuple[str, str], Mapping[str, Any]]
) -> str:
    """Gives the page as Markdown.

    Args:
        name: Of the experiment.
        about: Its `question`, `title`, `datasets`, `budgets`, `claims`.
        found: What was kept, by data set and budget ("" where there is but one).
    """
    parts = [
        f"# {about['title']}",
        about["question"].strip(),
        f"Made by `python -m experiments {name} --data FOLDER`; settings: "
        f"[overlay.yaml](../../experiments/{name}/overlay.yaml) over `config.yaml` and "
        "`presets/photos.yaml`. Per cent of test images, ± 95 % over seeds and, where a section "
        "does not say otherwise, test images; gaps are paired by both. What was chosen was chosen "
        "on a held-out part of train. A claim of a gap **holds** if the gap is above its interval "
        "and two points; there is **no difference** if all of the interval, test images in it, "
        "lies within two points, and then a claim of equality **holds**; else it is **not "
        "settled**. Each claim is judged by itself: of twenty gaps that are none, one may seem to "
        "be one, and intervals over seeds alone miss more often ([why]"
        "(../explanation.md#what-the-intervals-cover)).",
    ]
    missing = [place for place in runs_of(about) if place not in found]
    if missing:
        parts.append(f"Not run so far: {'; '.join(map(_named, missing))}.")
    for (dataset, budget), run in found.items():
        records = run["records"]
        claimed = [c for c in about.get("claims", []) if budget in c.get("budgets", [budget])]
        parts.append(f"## {_named((dataset, budget))}")
        if not any(RIGHT in record for record in records):
            parts.append("Which images were right was not kept here: ± is over seeds alone.")
        targets = summary.targets(records)
        for target in targets:
            parts += [f"### Target `{target}`"] if len(targets) > 1 else []
            parts.append(table(summary.compare(records, VERDICT, target=target)))
        parts.append(f"![k-NN of all models]({drawn_as(name, dataset, budget)})")
        parts += claims(claimed, records, {budget, f"{dataset}-{budget}"})
        parts.append(
            f"{run['cpu_seconds'] / 60:.0f} minutes of processor time in its folder, which "
            f"experiments on the same data and budget share; {run['machine']}; "
            f"commit {run['commit']}, {run['date']}."
        )
    return "\n\n".join(parts) + "\n"


def runs_of(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Lists data sets and budgets, budget by budget; an experiment with one does not name it."""
    budgets = about.get("budgets", {"": {}})
    return [(dataset, budget) for budget in budgets for dataset in about["datasets"]]


def _named(place: tuple[str, str]) -> str:
    return ", ".join(filter(None, place))


def drawn_as(name: str, dataset: str, budget: str) -> str:
    """Names the plot of a data set and budget."""
    return "-".join(filter(None, (name, dataset, budget))) + ".svg"


def plot(records: Sequence[Record]) -> str:
    """Draws the test k-NN accuracy of all models with their intervals, as SVG of its own."""
    rows = []
    targets = summary.targets(records)
    for target in targets:
        comparison = summary.compare(records, VERDICT, target=target)
        place = [column.evaluation for column in comparison.columns].index(DRAWN)
        for row in ordered(comparison):
            if cell := row.cells[place]:
                parts = [row.arm, row.about, f"target {target}" if len(targets) > 1 else ""]
                mean, half = 100 * cell.interval.mean, cell.interval.half
                text = verdict.spread(cell.interval)
                name = ", ".join(filter(None, parts))
                rows.append(charts.Whisker(name, row.arm, mean, half and 100 * half, text))
    left = LETTER * max(len(row.name) for row in rows)
    drawn = str(charts.dots(rows, "k-NN top-1 of all models, per cent", left))
    # Alone in a file, unlike in the report, it needs a name space and a style sheet of its own.
    tag, rest = drawn.removeprefix("<svg ").split(">", 1)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {tag}>{STYLE}{rest}\n'


def ordered(comparison: summary.Comparison) -> list[summary.Row]:
    """Lists the rows of all models, by arm."""
    rows = comparison.arms + [row for row in comparison.candidates if not row.chosen]
    return sorted(rows, key=lambda row: (summary.rank(row.arm, summary.ARMS), row.about))


def table(comparison: summary.Comparison) -> str:
    """Gives one row for each model, the layers of probes chosen on held-out images."""
    places = [i for i, column in enumerate(comparison.columns) if column.evaluation in SHOWN]
    heads = [verdict.title(comparison.columns[place]) for place in places]
    lines = ["| " + " | ".join(["arm", "taught by", "seeds", *heads]) + " |"]
    lines.append("|" + " --- |" * (3 + len(heads)))
    for row in ordered(comparison):
        cells = [row.cells[place] for place in places]
        values = [verdict.spread(cell.interval) if cell else "–" for cell in cells]
        name = f"**{row.arm}**" if row.chosen else row.arm
        lines.append("| " + " | ".join([name, row.about, str(row.seeds), *values]) + " |")
    return "\n".join(lines)


def claims(
    given: Sequence[Mapping[str, Any]], records: Sequence[Record], run: Collection[str] = ()
) -> list[str]:
    """Gives a list with one line for each claim: the gap with its interval, and what it says.

    A claim names two sets of fields (`of`, `against`) that each single out one model, or an arm,
    whose chosen model is meant; an `evaluation`, perhaps `labels_per_class` and `layer`; `budgets`
    if it is about some alone (the page's matter). `expect: tie` claims that there is no gap. With
    `half_way_to` the gap is that to the middle between `against` and that model; with `than_layer`
    it is what the gap at `layer` is more than the gap at that one. `unplanned` lists the budgets,
    or DATASET-BUDGET, of which results had been seen when the claim was stated; `run` holds both of
    this run.
    """
    lines, images = [], any(RIGHT in record for record in records)
    for claim in given:
        gap = difference(claim, records)
        if gap is None:
            lines.append(f"- {claim['text']}: not measured here.")
            continue
        word = said(gap, claim.get("expect") == "tie", images)
        late = f" {LATE}" if set(run) & {*claim.get("unplanned", [])} else ""
        lines.append(f"- {claim['text']}: **{word}** ({verdict.spread(gap)} points).{late}")
    return ["\n".join(lines)] if lines else []


def said(gap: Interval, equal: bool, images: bool) -> str:
    """Says whether a claim holds: that there is a gap or, with `equal`, that there is none.

    Where others of the section have `images` in their interval, one without says so always.
    """
    if gap.n == 1:
        return "one seed alone"
    found = outcome(gap)
    if found != "unjudged" and gap.images and abs(gap.mean) + gap.half <= TIE + ROUNDING:
        return WORDS["beats"] if equal else "no difference"
    clear = found in ("beats", "behind")
    word = f"does not hold, it is {VERBS[found]}" if equal and clear else WORDS[found]
    alone = not gap.images and (clear or images and found != "unjudged")
    return f"{word}, over seeds alone" if alone else word


def difference(claim: Mapping[str, Any], records: Sequence[Record]) -> Interval | None:
    """Gives the paired difference that a claim is about, None where a side was not measured.

    Raises:
        ValueError: The fields of a side fit more than one model.
    """
    chosen = summary.compare(records, VERDICT).chosen
    column = Column(claim["evaluation"], claim.get("metric", "top1"), claim.get("labels_per_class"))
    layers = [claim.get(key) for key in ("layer", "than_layer") if key in claim] or [None]
    sides = []
    for side in ("of", "against", "half_way_to"):
        if side not in claim:
            continue
        wanted = claim[side]
        if set(wanted) == {"arm"}:
            wanted = {"model": chosen.get(wanted["arm"])}
        fits = [r for r in records if all(r.get(key) == value for key, value in wanted.items())]
        if len(grouped(fits, lambda record: record["model"])) > 1:
            raise ValueError(f"{claim['text']}: {side} {wanted} fits more than one model")
        sides += [[r for r in fits if layer in (None, r.get("layer"))] for layer in layers]
    if layers == [None]:
        sides = [summary.settle_layers(side) for side in sides]
    weights = {2: (1, -1), 3: (1, -0.5, -0.5), 4: (1, -1, -1, 1)}[len(sides)]
    return summary.combined(list(zip(weights, sides, strict=True)), column)
