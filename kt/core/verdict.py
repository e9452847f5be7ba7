"""The words of the report: verdict, names of columns and the table as plain text.

Takes a `kt.core.summary.Comparison`; fractions become per cent here and nowhere before.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from kt.core.intervals import FEWEST_IMAGES, TIE, Interval
from kt.core.records import Column
from kt.core.summary import CONTROLS, Cell, Comparison, Difference, Row

PM = "\u00a0±\u00a0"  # never broken at the end of a line
NAMES = {
    "knn": "k-NN", "linear": "linear", "nonlinear": "non-linear", "svm": "SVM",
    "finetune": "fine-tune", "voc_classification": "VOC07 cls", "voc_detection": "VOC07 det",
    "voc_segmentation": "VOC12 seg",
}  # fmt: skip
METRICS = {
    "nmi": "NMI", "purity": "purity", "hungarian": "matched", "view_nmi": "view agreement",
}  # fmt: skip
BEHIND = {  # the evaluation's name
    "map_11": "mAP", "map_area": "mAP (area)", "tuned_map_11": "tuned mAP",
    "tuned_map_area": "tuned mAP (area)", "miou": "mIoU",
}  # fmt: skip
LONG = {
    "knn": "k-NN top-1", "linear": "linear-probe top-1", "nonlinear": "non-linear-probe top-1",
    "svm": "linear-SVM top-1", "finetune": "fine-tuned top-1",
}  # fmt: skip
SCORES = {"validation_top1": "validation top-1", "view_nmi": "view agreement", "": "score"}
RULES = {
    "validation_top1": "highest top-1 on a held-out part of train",
    "view_nmi": "the rule without labels (clusters of two augmented views of the same images agree "
    "best)",
}
UNCHOSEN = "nothing was measured to choose by: the first of each arm by name stands"
PAGE_ALONE = ("hungarian",)  # the default run's other columns fill the width of the plain table
MAIN = ("direct", "random")  # what people did before, and nothing at all
VERBS = {
    "beats": "beats",
    "tie": "makes no clear difference to",
    "behind": "falls behind",
    "unjudged": "is not judged against",
}
EXPLAINED = {"supervised": "supervised (all labels)"}


ARMS = {
    "random": "the target network untrained: what architecture and evaluation give by themselves",
    "direct": "the target network trained on the pretext task itself, without any transfer",
    "longer": "direct, trained with the summed budget of teacher and targets",
    "untrained": "transfer from a teacher's architecture with random weights: what augmentation "
    "and architecture give without a pretext task",
    "hog": "transfer from hand-crafted features alone (oriented gradients)",
    "transfer": "the target network taught by a trained teacher: its clusters as pseudo-labels "
    "or, by another kind of transfer, what its features say",
    "supervised": "the target network trained on the true labels of train, with as many steps",
}


def percent(value: float) -> str:
    """Writes a fraction as per cent with one decimal."""
    rounded = round(100 * value, 1) + 0.0  # never -0.0
    return f"{rounded:.1f}".replace("-", "−")


def spread(value: Interval) -> str:
    """Writes `79.5 ± 1.1`, in per cent, or `79.5` where there is no interval."""
    return percent(value.mean) + ("" if value.half is None else f"{PM}{percent(value.half)}")


def title(column: Column) -> str:
    """Names a quantity briefly, for the head of a column."""
    few = amount(column)
    return f"{_name(column)}, {few}" if few else _name(column)


def _name(column: Column) -> str:
    evaluation = NAMES.get(column.evaluation, column.evaluation)
    if column.metric == "top1":
        return evaluation
    if column.metric in BEHIND:
        return f"{evaluation} {BEHIND[column.metric]}"
    return METRICS.get(column.metric, f"{column.evaluation} {column.metric}")


def amount(column: Column) -> str:
    """Says with how many labels: `10 a class`, `1 % of labels`, or "" with all of them."""
    if column.labels_per_class is not None:
        return f"{column.labels_per_class} a class"
    return "" if column.fraction is None else f"{100 * column.fraction:g} % of labels"


def long_title(column: Column) -> str:
    """Names a quantity in full, for sentences."""
    name = LONG.get(column.evaluation, _name(column)) if column.metric == "top1" else _name(column)
    if column.labels_per_class is not None:
        return f"{name} with {column.labels_per_class} labels a class"
    return name if column.fraction is None else f"{name} with {amount(column)}"


def sentences(comparison: Comparison) -> list[str]:
    """Gives the verdict; the first sentence is the main one.

    k-NN and fine-tuning with the fewest labels come first, other quantities after them. A control
    that does as well, or better, is named in the main sentence: it decides what is worth its cost.
    """
    if not is_labelled(comparison):
        return _without_labels(comparison)
    if not comparison.differences:
        return [f"There is nothing to compare: {_lacking(comparison)}."]
    ours = next(row for row in comparison.arms if row.arm == "transfer")
    subject = f"transfer ({ours.about})" if ours.about else "transfer"
    order = sorted(comparison.differences, key=lambda column: column.evaluation == "linear")
    gaps = comparison.differences[order[0]]
    if {gap.outcome for gaps in comparison.differences.values() for gap in gaps} == {"unjudged"}:
        said = [_gaps(column, comparison.differences[column]) for column in order]
        return [f"On these images {subject} is not judged against the other arms.", *said]
    main = [gap for gap in gaps if gap.control in MAIN or gap in rivals(gaps)] or gaps
    rest = [gap for gap in gaps if gap not in main]
    return [
        _sentence(f"On these images {subject}", order[0], main),
        *([_sentence("Against the other arms it", order[0], rest)] if rest else []),
        *(_sentence("Transfer", c, comparison.differences[c]) for c in order[1:]),
    ]


def _lacking(comparison: Comparison) -> str:
    if "transfer" not in comparison.chosen:
        return "the results hold no transfer"
    if not set(CONTROLS) & set(comparison.chosen):
        return "the results hold no arm to compare it with"
    return "no evaluation gives a score that arms are compared by (top-1, mAP or mIoU)"


def _gaps(column: Column, gaps: Sequence[Difference]) -> str:
    """Says how far transfer is from each control, without a judgement."""
    parts = [f"{EXPLAINED.get(gap.control, gap.control)} {spread(gap.interval)}" for gap in gaps]
    return f"Points of {long_title(column)}, transfer minus {_enumerate(parts)}."


def rivals(gaps: Sequence[Difference]) -> list[Difference]:
    """Lists the controls without labels that do as well as transfer, or better."""
    return [gap for gap in gaps if gap.outcome in ("tie", "behind") and gap.control != "supervised"]


def ahead(comparison: Comparison) -> list[tuple[str, str]]:
    """Lists the controls without labels that transfer falls behind, each with the main quantity."""
    order = sorted(comparison.differences, key=lambda column: column.evaluation == "linear")
    gaps = comparison.differences[order[0]] if order else []
    return [(gap.control, long_title(order[0])) for gap in rivals(gaps) if gap.outcome == "behind"]


def _sentence(subject: str, column: Column, gaps: Sequence[Difference]) -> str:
    """Says in one sentence whom transfer beats, equals and falls behind, and by how much."""
    unit, parts = f" points of {long_title(column)}", []
    for outcome, verb in VERBS.items():
        amounts = []
        for gap in gaps:
            if gap.outcome == outcome:
                amounts.append(_amount(gap, unit))
                unit = ""  # said once, at the first number
        if amounts:
            parts.append(f"{verb} {_enumerate(amounts)}")
    return f"{subject} {'; it '.join(parts)}."


def _amount(gap: Difference, unit: str) -> str:
    name, value = EXPLAINED.get(gap.control, gap.control), gap.interval
    if gap.outcome in ("tie", "unjudged"):
        return f"{name} ({spread(value)}{unit})"
    return f"{name} by {spread(value._replace(mean=abs(value.mean)))}{unit}"


def _enumerate(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def is_labelled(comparison: Comparison) -> bool:
    """Says whether anything was measured against true labels."""
    return any(column.metric != "view_nmi" for column in comparison.columns)


def _without_labels(comparison: Comparison) -> list[str]:
    row = next((row for row in comparison.arms if row.arm == "transfer"), None)
    if row is None:
        return [
            "There is no network of the arm transfer to recommend.",
            "A comparison needs labelled images in train/CLASS and test/CLASS.",
        ]
    score = f" ({spread(row.score)} %)" if row.score else ""
    rule = f"It was chosen within its arm by {RULES.get(comparison.rule)}{score}"
    auto = row.about.partition(" (")[2]  # what it stood for
    return [
        f"The network to use is {row.model}{auto and f' ({auto}'}.",
        "Without labels its accuracy cannot be known, nor whether transfer beats the other arms. "
        f"{rule if comparison.rule else UNCHOSEN.capitalize()}.",
        *_agreeing_more(comparison, row),
        "A comparison needs labelled images in train/CLASS and test/CLASS.",
    ]


def _agreeing_more(comparison: Comparison, chosen: Row) -> list[str]:
    """Names the arms whose score is higher than that of the network to use."""
    scored = [row for row in comparison.arms if row.score and chosen.score and row is not chosen]
    more = [f"{r.arm} ({spread(r.score)} %)" for r in scored if r.score.mean > chosen.score.mean]
    if not more:
        return []
    return [f"By that rule {_enumerate(more)} would be ahead, which is no measure of quality."]


def scope(comparison: Comparison) -> str:
    """Says what the intervals cover, and what they do not."""
    every = [gap for gaps in comparison.differences.values() for gap in gaps]
    if not every:
        return ""
    found = [gap.interval for gap in every]
    seeds = sorted({one.n for one in found})
    ties = f"aps below {100 * TIE:.0f} points are ties"
    blind = [
        long_title(column)
        for column, gaps in comparison.differences.items()
        if not all(gap.interval.images for gap in gaps)
    ]
    few = min((gap.images for gap in every if gap.images), default=FEWEST_IMAGES)
    if seeds == [1]:
        why = "One seed: how much another training would change is not known, so nothing is judged"
        if not any(one.images for one in found):
            return f"{why}, and there is no interval. Give seeds=3."
        none = f", none for {_enumerate(blind)}" if blind else ""
        return f"{why}; ± is over the draw of the test images alone{none}. Give seeds=3."
    number = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
    seen = any(one.images for one in found)
    drawn = ["the training of the target"]
    drawn += ["the draw of the few labels"] if any(map(amount, comparison.differences)) else []
    drawn += ["the draw of the test images"] if seen else []
    parts = [
        f"Differences are paired by seed ({number} of them){' and test image' if seen else ''}; "
        f"± is the 95 % interval over {'both' if seen else 'seeds alone'}: {_enumerate(drawn)}."
    ]
    if blind and seen:
        parts.append(f"It is over seeds alone for {_enumerate(blind)}.")
    if seeds[0] == 1:
        lone = any(one.images for one in found if one.n == 1)
        over = "it is over the test images alone" if lone else "there is none"
        parts.append(f"Of one seed {over}, and nothing is judged.")
    if few < FEWEST_IMAGES:
        parts.append(f"With fewer than {FEWEST_IMAGES} test images nothing is judged.")
    parts.append("Each gap is judged by itself: of twenty that are none, one may seem to be one.")
    return " ".join([*parts, f"Training the teacher again is not in it: g{ties}, too."])


def covered(columns: Sequence[Column], rows: Sequence[Row], hidden: Sequence[str] = ()) -> str:
    """Says what the intervals of a table are over, "" where no number has one.

    Args:
        columns: Of the table.
        rows: Of the table.
        hidden: Metrics that are not shown.
    """
    found = [
        (title(column), cell.interval)
        for row in rows
        for column, cell in zip(columns, row.cells, strict=True)
        if cell and cell.interval.half is not None and column.metric not in hidden
    ]
    seen = {name for name, one in found if one.images}
    over = ["seeds"] if any(one.n > 1 for _, one in found) else []
    over += ["test images"] if seen else []
    blind = [] if over != ["seeds", "test images"] else [n for n, _ in found if n not in seen]
    alone = f" ({_enumerate(list(dict.fromkeys(blind)))}: seeds alone)" if blind else ""
    return f"over {' and '.join(over)}{alone}" if over else ""


def wrapped(paragraphs: Sequence[str], width: int = 100) -> list[str]:
    """Breaks paragraphs into lines of at most `width` columns; empty ones are left out."""
    return [textwrap.fill(text, width).replace("\u00a0", " ") for text in paragraphs if text]


def plain_table(columns: Sequence[Column], rows: Sequence[Row], width: int = 100) -> str:
    """Gives the table of arms as text of at most `width` columns, in blocks where it is wider.

    The best of each column carries a `*`. Columns of the page alone are left out.
    """
    shown = [index for index, column in enumerate(columns) if column.metric not in PAGE_ALONE]
    heads = [_plain_head(columns[index]) for index in shown]
    heads = [["", "arm"], *heads, ["", "seeds"], ["", "seconds"]]
    lines = [list(line) for line in zip(*heads, strict=True)]
    for row in rows:
        cells = [_plain_cell(row.cells[index]) for index in shown]
        lines.append([row.arm, *cells, f"{row.seeds} ", whole(row.seconds)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    blocks: list[list[int]] = [[0]]
    for index in range(1, len(heads)):
        if sum(widths[i] + 1 for i in blocks[-1]) + widths[index] > width:
            blocks.append([0])
        blocks[-1].append(index)
    return "\n\n".join(
        "\n".join(_plain_line(line, widths, block) for line in lines).strip("\n")
        for block in blocks
    )


def whole(number: float | None) -> str:
    """Writes a whole number with thin groups of thousands, a dash for None."""
    return "–" if number is None else f"{number:,.0f}"


def _plain_head(column: Column) -> list[str]:
    """Gives two lines that are as narrow as the numbers below them."""
    first, second = _name(column), amount(column).replace(" a ", "/").replace(" of labels", "")
    if not second:
        first, _, second = first.rpartition(" ")
    return [first and f"{first} ", f"{second} "]


def _plain_cell(cell: Cell | None) -> str:
    if cell is None:
        return "– "
    return spread(cell.interval).replace("\u00a0", "") + ("*" if cell.best else " ")


def _plain_line(line: Sequence[str], widths: Sequence[int], block: Sequence[int]) -> str:
    cells = [line[i].rjust(widths[i]) if i else line[i].ljust(widths[i]) for i in block]
    return " ".join(cells).rstrip()
