"""Gathers all records and writes the report: one page that works offline, and the numbers in it.

Reads evaluations, models, puzzles, data reports, tables and pseudo-labels; writes `metrics.json`,
`metrics.csv`, `index.html` and `summary.txt`. Whatever is not given is left out of the page, so by
hand use the command with all files of a run, which this prints:

    snakemake -n -p --force results/report/index.html
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kt.core import figures, pictures, step, summary, table, verdict
from kt.core.auto import AUTO
from kt.core.checking import plugin, plugins
from kt.core.images import read_labels, read_pack
from kt.core.records import (
    as_csv,
    read_evaluation,
    settled,
    sort_records,
    with_choice,
    with_targets,
)
from kt.core.step import ConfigError, DataError, log

FEW = 10  # images a cluster, on average, below which a remark is made
UNEVEN = 1.5  # times its even share that the largest class may have without a remark
REPORT = dict.fromkeys(  # what a data report may say
    ("splits", "modes", "sizes", "rejected", "rejected_total", "ignored", "left_out_of_pool")
    + ("left_out_of_train", "defaults", "origin")
)


def add_arguments(parser) -> None:
    """Adds the options of this step."""
    paths = {"type": Path, "nargs": "*", "default": [], "metavar": "PATH"}
    parser.add_argument("--evaluations", **paths, help="JSON files with records")
    parser.add_argument("--models", **paths, help="folders with model.json and log.jsonl")
    parser.add_argument("--puzzles", **paths, help="tables of unseen puzzles and predictions")
    parser.add_argument("--data-report", **paths, help="JSON files of the ingest step")
    parser.add_argument("--pack", **paths, help="the packed images that were clustered")
    parser.add_argument("--labels", **paths, help="their true labels")
    parser.add_argument("--pseudo-labels", **paths, help="tables; the chosen one is shown")
    parser.add_argument("--choices", **paths, help="JSON files of the choose step")
    parser.add_argument("--tables", **paths, help="features and clusters, for what they cost")
    parser.add_argument(
        "--settings", required=True, help="resolved configuration: JSON or its file"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the report")


def run(arguments) -> None:
    """Writes the four files."""
    settings = read_settings(str(arguments.settings))
    evaluations = [read_evaluation(path) for path in arguments.evaluations]
    models = [read_model(folder) for folder in arguments.models]
    layers = {model["name"]: model.get("layers", ()) for model in models}
    choices = {path.stem: step.read_json(path) for path in arguments.choices}
    found = [with_choice(record, choices) for records, _ in evaluations for record in records]
    records = sort_records(found, layers)
    if not records:
        raise DataError("--evaluations: expected at least one record, found none; evaluate a model")
    seconds = training_seconds(models, records, settings)
    judged = with_targets(records, settings)
    comparisons = [
        summary.compare(judged, settings.get("verdict", []), seconds, target)
        for target in summary.targets(judged)
    ]
    facts = {
        "models": models,
        "puzzles": read_puzzles(arguments.puzzles, models),
        "gallery": read_gallery(arguments, records, comparisons[0], settings, choices),
        "clusters": [
            named(pictures.describe_clusters(path), choices) for path in arguments.pseudo_labels
        ],
        "data": [REPORT | step.read_json(path) for path in arguments.data_report],
        "settings": settings,
    }
    origins = [("evaluate: " + origin["evaluation"], origin) for _, origin in evaluations]
    origins += [read_origin(path) for path in [*arguments.tables, *arguments.pseudo_labels]]
    origins += [("choose", found.get("provenance", {})) for found in choices.values()]
    facts["costs"] = step_seconds(models, origins, facts["data"])
    page = arguments.output / "index.html"
    reports = {
        path.parent.name: report
        for path, report in zip(arguments.data_report, facts["data"], strict=True)
    }
    facts["remarks"] = remarks(settings, reports)
    text = plain_summary(comparisons, models, page, facts["remarks"])
    step.write_json(arguments.output / "metrics.json", records)
    step.write_text(arguments.output / "metrics.csv", as_csv(records))
    step.write_text(page, render(records, comparisons, facts))
    step.write_text(arguments.output / "summary.txt", text)
    log.info("\n%s", text.rstrip())


# ---------------------------------------------------------------------------- reading


def read_settings(text: str) -> dict[str, Any]:
    """Reads the configuration: JSON itself, or the path of a file that holds it.

    Raises:
        ConfigError: It is not a JSON object.
    """
    try:
        given = text.lstrip().startswith("{")
        found = json.loads(text) if given else step.read_json(Path(text), checked=False)
    except ValueError as error:
        raise ConfigError(f"--settings: expected JSON, found a fault: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"--settings: expected a JSON object, found {type(found).__name__}")
    return found


def read_origin(path: Path) -> tuple[str, dict[str, Any]]:
    """Gives the step that wrote a table, and where the table comes from."""
    with table.opened(path) as file:
        return table.text(file, "format"), json.loads(table.text(file, "provenance"))


def read_model(folder: Path) -> dict[str, Any]:
    """Reads `model.json` and, if it is there, `log.jsonl`; the lines stand under `log`."""
    model = step.read_json(folder / "model.json", checked=False)
    path = folder / "log.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        model["log"] = [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise DataError(
            f"{path}: expected one JSON object a line ({error}); train again"
        ) from error
    model["folder"] = folder
    name, seed = str(model.get("name") or folder.name), model.get("seed")
    model["name"] = name.removesuffix(f"/s{seed}")
    return model


def read_puzzles(paths: Sequence[Path], models) -> list[pictures.Puzzles]:
    """Reads solved puzzles, empty tables left out; the teacher is the model in the same folder."""
    teachers = {model["folder"]: model["name"] for model in models}
    found = ((path, pictures.read_puzzles(path)) for path in paths)
    return [
        puzzles._replace(teacher=puzzles.teacher or teachers.get(path.parent, ""))
        for path, puzzles in found
        if puzzles
    ]


def named(found: dict[str, Any], choices) -> dict[str, Any]:
    """Puts what was chosen in the place of `auto` into what a table of pseudo-labels says."""
    choice = choices.get(found["teacher"])
    if choice is None:
        return found
    layer, k = settled(choice, found["layer"], found["k"])
    return {**found, "layer": layer, "k": k}


def read_gallery(arguments, records, comparison, settings, choices) -> dict[str, Any] | None:
    """Draws clusters of the teacher of the chosen transfer model, where they are given."""
    model = comparison.chosen.get("transfer")
    if model is None or not arguments.pack:
        return None
    record = next(record for record in records if record["model"] == model)
    # Of several teachers the first.
    teacher, layer = (str(record.get(name)).split("+")[0] for name in ("teacher", "teacher_layer"))
    wanted = {"teacher": teacher, "layer": layer}
    if record.get("k") is not None:  # else any k shows what the teacher sees
        wanted["k"] = record["k"]
    for path in arguments.pseudo_labels:
        config = pictures.describe_clusters(path)
        if all(str(config.get(name)) == str(value) for name, value in wanted.items()):
            labels = read_labels(arguments.labels[0]) if arguments.labels else None
            groups = pictures.gallery(path, read_pack(arguments.pack[0]), labels)
            kind = kind_of_transfer(record, settings)
            return {"groups": groups, **named(config, choices), **kind}
    return None


def kind_of_transfer(record, settings) -> dict[str, str]:
    """Gives `kind`, that of a target's transfer, and `about`, its first words; "" if unknown."""
    name = record.get("transfer") or ""
    kind = settings.get("transfers", {}).get(name, {}).get("kind", {}).get("name", "")
    known = kind in plugins("transfers")
    about = (plugin("transfers", kind).__doc__ or "") if known else ""
    return {"kind": kind, "about": about.strip().partition("\n")[0]}


# ---------------------------------------------------------------------------- seconds


def training_seconds(models, records, settings) -> dict[str, float]:
    """Gives model -> seconds to train one network of it: mean over seeds, its teachers included.

    Rounds before the last one count like it: they have the same budget.
    """
    kinds = settings.get("transfers", {})
    rounds = {name: kind.get("kind", {}).get("rounds", 1) for name, kind in kinds.items()}
    own: dict[str, list[float]] = {}
    for model in models:
        trained = model["log"][-1].get("seconds") if model.get("log") else None
        seconds = trained or model.get("provenance", {}).get("seconds")
        if seconds is not None:
            own.setdefault(model["name"], []).append(seconds)
    mean = {name: math.fsum(values) / len(values) for name, values in own.items()}
    found = {}
    for record in records:
        name = record["model"]
        named = set((record.get("teacher") or "").split("+"))  # one in two layers counts once
        teachers = (mean.get(one, 0.0) for one in sorted(named - {name}))
        if name in mean and name not in found:
            found[name] = rounds.get(record.get("transfer"), 1) * mean[name] + sum(teachers)
    return found


def step_seconds(models, origins, data) -> list[tuple[str, float]]:
    """Gives (step, seconds summed over all its jobs), the longest first."""
    total = {"ingest": math.fsum(report.get("seconds") or 0.0 for report in data)}
    for model in models:
        kind = "target" if figures.is_target(model) else "pretext"
        name = f"{kind}: {model.get('arm') or model['name']}"
        last, log = model.get("provenance", {}).get("seconds", 0.0), model.get("log")
        every = log[-1].get("seconds", 0.0) if log else 0.0  # of an interrupted one all attempts
        total[name] = total.get(name, 0.0) + max(last, every)
    for name, origin in origins:
        total[name] = total.get(name, 0.0) + origin.get("seconds", 0.0)
    return sorted(((n, s) for n, s in total.items() if s > 0), key=lambda row: (-row[1], row[0]))


# ---------------------------------------------------------------------------- writing


def backbone_file(comparison, models, arm: str = "transfer") -> Path | None:
    """Gives the file of the network to use: the chosen model of an arm, of the first seed."""
    name = comparison.chosen.get(arm)
    found = [model for model in models if model["name"] == name]
    found.sort(key=lambda model: model.get("seed") or 0)
    return found[0]["folder"] / "model.safetensors" if found else None


def better_files(comparison, models) -> list[tuple[str, str, Path]]:
    """Lists the arms that transfer falls behind, in what, and the file of the network of each."""
    found = (
        (arm, quantity, backbone_file(comparison, models, arm))
        for arm, quantity in verdict.ahead(comparison)
    )
    return [(arm, quantity, path) for arm, quantity, path in found if path]


def remarks(settings: dict[str, Any], data: dict[str, dict[str, Any]]) -> list[str]:
    """Says what is to be known beside the verdict: a short run, small clusters, uneven classes.

    Args:
        settings: The configuration.
        data: Reports of the data sets, by name.
    """
    found = []
    if (effort := settings.get("effort") or 1) < 1:
        found.append(f"A look: effort {effort:g} trains for that share of the epochs.")
    use = settings.get("use") or {}
    pool = (data.get(use.get("cluster"), {}).get("splits") or {}).get("train-unlabelled") or {}
    factor = finest(settings)
    largest = factor * max((k for k in settings.get("clusters", []) if k != AUTO), default=0)
    if (images := pool.get("images", 0)) and images < FEW * largest:
        found.append(
            f"k = {largest:g} for {verdict.whole(images)} images: {images / largest:.1f} a cluster "
            "on average, of which little can be learned; fewer clusters may do better, such as "
            f"clusters={max(2, int(images / (2 * FEW * factor)))}."
        )
    judged_on = data.get(use.get("evaluate"), {})
    classes = ((judged_on.get("splits") or {}).get("test") or {}).get("classes")
    numbers = list(classes.values()) if isinstance(classes, dict) else []
    if len(numbers) > 1 and max(numbers) > UNEVEN * sum(numbers) / len(numbers):
        share = verdict.percent(max(numbers) / sum(numbers))
        found.append(
            f"The classes are uneven: who calls every test image the largest one is right for "
            f"{share} %. metrics.json has `mean_class_accuracy`, where each class counts alike."
        )
    return found


def finest(settings: dict[str, Any]) -> float:
    """Gives what kinds of transfer multiply k by at most; 0 where all of them learn from features.

    Without any in the settings there is the paper's kind.
    """
    kinds = [entry.get("kind") or {} for entry in settings.get("transfers", {}).values()]
    named = [(kind, plugin("transfers", kind["name"])) for kind in kinds if kind.get("name")]
    found = [max(kind.get("factors", [1])) for kind, module in named if module.BY_K]
    return max(found, default=0 if named else 1)


def plain_summary(comparisons, models, page: Path, remarks: Sequence[str] = ()) -> str:
    """Gives verdict, table and the places of backbone and report as text."""
    parts = []
    for comparison in comparisons:
        if len(comparisons) > 1:
            parts.append(f"Target {comparison.target}")
        over = verdict.covered(comparison.columns, comparison.arms, verdict.PAGE_ALONE)
        notes = ["per cent", over and f"± 95 % {over}"]
        notes.append("* best without all labels" if verdict.is_labelled(comparison) else "")
        parts += verdict.wrapped([", ".join(filter(None, notes)) + "; seconds to train one"])
        parts.append(verdict.plain_table(comparison.columns, comparison.arms))
        parts += verdict.wrapped(
            [*verdict.sentences(comparison), verdict.scope(comparison), *remarks]
        )
        remarks = ()  # once
        if file := backbone_file(comparison, models):
            parts.append(f"backbone  {file}")
        parts += [
            f"better    {path}  ({arm}, {quantity})"
            for arm, quantity, path in better_files(comparison, models)
        ]
    return "\n\n".join([*parts, f"report    {page}"]) + "\n"


def render(records, comparisons, facts: dict[str, Any]) -> str:
    """Gives the page."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": verdict.percent,
        "spread": verdict.spread,
        "whole": verdict.whole,
    }
    views = [_view(comparison, facts["models"]) for comparison in comparisons]
    return environment.get_template("report.html.j2").render(
        views=views,
        remarks=facts["remarks"],
        records=records,
        arms=verdict.ARMS,
        learned=figures.learned(facts["models"]),
        pretext=figures.pretext_curves(facts["models"]),
        costs=figures.costs(facts["costs"]),
        config=json.dumps(facts["settings"], indent=1, default=step.plain),
        colours={**{name: name for name in verdict.ARMS}, **figures.COLOURS},
        dataset=", ".join(sorted({record["dataset"] for record in records})),
        labelled=any(verdict.is_labelled(comparison) for comparison in comparisons),
        unchosen=verdict.UNCHOSEN,
        drawn=any(record.get("draw") is not None for record in records),
        split_fields=_split_fields(facts["data"]),
        version=step.provenance()["version"],
        **{name: facts[name] for name in ("puzzles", "gallery", "clusters", "data")},
    )


def _view(comparison, models) -> dict[str, Any]:
    """Gives what the page shows of one target."""
    return {
        "comparison": comparison,
        "sentences": verdict.sentences(comparison),
        "scope": verdict.scope(comparison),
        "score_name": verdict.SCORES[comparison.rule],
        "rule": verdict.RULES.get(comparison.rule),
        "covered": verdict.covered(comparison.columns, comparison.arms),
        "heads": [verdict.title(column) for column in comparison.columns],
        "backbone": backbone_file(comparison, models),
        "better": better_files(comparison, models),
        "differences": figures.differences(comparison),
        "layers": [(verdict.long_title(one.column), one) for one in comparison.by_layer],
        "labels": figures.label_curves(comparison),
        "training": figures.target_curves(models, comparison),
    }


def _split_fields(reports: Sequence[dict[str, Any]]) -> list[str]:
    """Lists what any split of any data report counts, in the order of appearance."""
    splits = [split for report in reports for split in (report["splits"] or {}).values()]
    return list(dict.fromkeys(name for split in splits for name in split))


if __name__ == "__main__":
    step.main(__doc__, add_arguments, run)
