"""Runs one experiment on one or more sets of pictures and writes its page, docs/results/NAME.md.

    python -m experiments --list
    python -m experiments kinds --data FOLDER --cores 2     # FOLDER/imagenette96.zip and so on
    python -m experiments kinds                             # the page again, from what is kept

An experiment is a folder here: `experiment.yaml` says question, data sets and claims,
`overlay.yaml` lies over config.yaml and presets/photos.yaml, and over it that of a budget. What a
run found is kept beside them, a file for each data set and budget: its metric records, what it
cost, on what machine and at which commit.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from experiments.page import SHOWN, drawn_as, page, plot, runs_of
from kt import config
from kt.core import step, summary
from kt.core.records import RIGHT, with_targets

ROOT = Path(__file__).parent.parent
PLACE = ROOT / "experiments"


def main() -> None:
    """Parses the command line; ends with 2 where there is no such experiment or picture."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", help="experiments; none: all")
    parser.add_argument("--list", action="store_true", help="list them")
    parser.add_argument("--data", type=Path, help="folder of the pictures; without it no run")
    parser.add_argument("--only", nargs="+", help="of the data sets")
    parser.add_argument("--budgets", nargs="+", help="of the budgets")
    parser.add_argument(
        "--runs", type=Path, default=Path("experiments-runs"), help="results/ go here"
    )
    parser.add_argument("--no-peer", action="store_true", help="leave out other packages' methods")
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    known = sorted(path.parent.name for path in PLACE.glob("*/experiment.yaml"))
    wrong = set(arguments.names) - set(known)
    if wrong:
        parser.error(f"no experiment {', '.join(sorted(wrong))}; known: {', '.join(known)}")
    for name in arguments.names or known:
        about = yaml.safe_load((PLACE / name / "experiment.yaml").read_text())
        if arguments.list:
            print(f"{name}: {about['question']}")
            continue
        for dataset, budget in runs_of(about) if arguments.data else []:
            chosen = (arguments.only or [dataset], arguments.budgets or [budget])
            if dataset in chosen[0] and budget in chosen[1]:
                found = run(name, about, dataset, budget, arguments)
                keep(PLACE / name / kept_as(dataset, budget), found)
        write_page(name, about)


def kept_as(dataset: str, budget: str) -> str:
    """Names the file with what a run found."""
    return f"{dataset}-{budget}.json" if budget else f"{dataset}.json"


def run(
    name: str, about: dict[str, Any], dataset: str, budget: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Runs the workflow on one data set with one budget; gives records, cost, machine and commit.

    Experiments with the same data set and budget share a folder, and so what they have in common.

    Raises:
        SystemExit: Pictures are missing, or the workflow failed; with its exit code.
    """
    images = pictures(arguments.data, dataset)
    folder = (arguments.runs / Path(kept_as(dataset, budget)).stem).absolute()
    given = config.merge(
        config.read(PLACE / name / "overlay.yaml"), about.get("budgets", {}).get(budget) or {}
    )
    if other := about.get("other", {}).get(dataset):
        path = str(pictures(arguments.data, other))
        given = config.merge(given, {"datasets": {"other": {"path": path}}})
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    records: list[dict] = []
    for variant, more in about.get("variants", {"": {}}).items():
        found, settings = workflow(name, config.merge(given, more), images, folder, arguments.cores)
        known = {record["model"] for record in records}
        records += [
            record
            for record in (of_variant(record, variant) for record in found)
            if record["model"] not in known  # controls that are the same in all variants
        ]
    if about.get("peer") and not arguments.no_peer:
        peer = importlib.import_module(f"experiments.{about['peer']}")
        records += peer.records(ROOT, folder, settings, arguments.cores)
    return {
        "records": lean(records, named_layers(about)),
        "cpu_seconds": round(cpu_seconds(folder)),
        "wall_seconds": round(time.monotonic() - begun),  # of this call: the last of several
        "cores": arguments.cores,
        "commit": step.git_state(),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
    }


def named_layers(about: dict[str, Any]) -> set[str]:
    """Gives the layers that the claims of an experiment compare."""
    claims = about.get("claims", [])
    found = {claim.get(key) for claim in claims for key in ("layer", "than_layer")}
    return found - {None}


def lean(records: list[dict], layers: set[str]) -> list[dict]:
    """Leaves out which images were right where no page says a number of it: most of the bytes.

    Args:
        records: Of all layers.
        layers: That claims name, beside the one that stands for each probe.
    """
    settled = {id(record) for record in summary.settle_layers(records)}
    wanted = (
        one["evaluation"] in SHOWN and (id(one) in settled or one.get("layer") in layers)
        for one in records
    )
    return [
        one if keep else {key: value for key, value in one.items() if key != RIGHT}
        for one, keep in zip(records, wanted, strict=True)
    ]


def keep(path: Path, found: dict[str, Any]) -> None:
    """Writes what a run found as JSON, each record on a line of its own."""
    lines = ",\n".join(map(json.dumps, found["records"]))
    rest = json.dumps({**found, "records": []}, indent=1)
    step.write_text(path, rest.replace('"records": []', f'"records": [\n{lines}\n]', 1) + "\n")


def pictures(data: Path, dataset: str) -> Path:
    """Finds the pictures of a data set, in whatever archive or folder of its name they are.

    Raises:
        SystemExit: There are none.
    """
    images = next(data.glob(f"{dataset}.*"), data / dataset).absolute()
    if not images.exists():
        sys.exit(f"error: expected pictures at {images}(.zip, .tar), found nothing")
    return images


def workflow(
    name: str, given: dict[str, Any], images: Path, folder: Path, cores: int
) -> tuple[list[dict], config.Config]:
    """Runs the workflow; gives its metric records and its settings.

    Raises:
        SystemExit: It failed; with its exit code.
    """
    step.write_text(folder / f"{name}.yaml", yaml.safe_dump(given))
    command = [sys.executable, "-m", "snakemake", "--cores", cores, "--directory", folder]
    command += ["--configfile", folder / f"{name}.yaml", "--config", f"images={images}"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)
    settings = config.resolve(ROOT, {**given, "images": str(images)})
    records = step.read_json(folder / "results/report/metrics.json", checked=False)
    return with_targets(records, settings.model_dump()), settings


def of_variant(record: dict[str, Any], variant: str) -> dict[str, Any]:
    """Says the variant in model and teacher of what was transferred; the rest is as in all."""
    if not variant or record["arm"] != "transfer":
        return record
    said = {"model": f"{record['model']} {variant}", "teacher": f"{record['teacher']}, {variant}"}
    return record | said


def cpu_seconds(folder: Path) -> float:
    """Sums the processor time of all jobs from Snakemake's benchmark files."""
    total = 0.0
    for path in (folder / "results/benchmarks").rglob("*.tsv"):
        with open(path, newline="") as file:
            total += sum(float(row["cpu_time"]) for row in csv.DictReader(file, delimiter="\t"))
    return total


def machine() -> str:
    """Names the processor and its cores, and the GPU if there is one."""
    import torch

    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next(
        (line.split(":")[1].strip() for line in text.splitlines() if "model name" in line), ""
    )
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} cores {model}{gpu}".strip()


def write_page(name: str, about: dict[str, Any]) -> None:
    """Writes docs/results/NAME.md and its plots from what is kept; nothing where no run is."""
    found = {
        (dataset, budget): json.loads(path.read_text())
        for dataset, budget in runs_of(about)
        if (path := PLACE / name / kept_as(dataset, budget)).exists()
    }
    if found:
        folder = ROOT / "docs/results"
        folder.mkdir(parents=True, exist_ok=True)
        for place, kept in found.items():
            step.write_text(folder / drawn_as(name, *place), plot(kept["records"]))
        step.write_text(folder / f"{name}.md", page(name, about, found))


if __name__ == "__main__":
    main()
