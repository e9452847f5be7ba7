"""Says what a run will do and cost before anything runs, and afterwards what it did cost.

    make plan ARGS="--config images=PATH"       python -m kt.plan --cores 2 --config images=PATH
    make spent                                  python -m kt.plan --spent

The options are Snakemake's, and a dry run gives the jobs. A job that ran before in the folder costs
what its benchmark says. A training that did not costs its operations (`kt.compute`) at the rate of
the trainings that did, another job what the middle one of its rule did. Where there is none, a
probe tells: seconds of each network's training and extraction, of matrix products, of decoding and
of starting a job, here and now (`kt.core.probe`). What no probe tells is counted as unknown.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from kt import config, ingest
from kt.backbones.file import CONSENT
from kt.core import step
from kt.core.footprint import LIMITS, Footprint
from kt.core.layouts import POOL, TRAIN
from kt.core.step import ConfigError
from kt.core.work import TRAININGS, Job, Work
from kt.sources import pictures, tars

RULES = (
    "ingest_part ingest pretext_train choose features_part features cluster pseudo_labels_part"
    " pseudo_labels target_train evaluate report"
).split()
ON_GPU = ("pretext_train", "choose", "features_part", "features", "target_train", "evaluate")
KEPT = Path("results/plan.json")
REPORT = "report.json"  # of a data set that is packed
OWN = ("pictures", "folder", "archive")  # sources whose pictures are quickly counted


class Cost(NamedTuple):
    """What a job costs: seconds, processor seconds, and by what that is known."""

    seconds: float
    cpu: float
    by: str


def main() -> None:
    """Parses the command line and prints the table; ends with Snakemake's code if it fails."""
    parser = argparse.ArgumentParser(
        prog="python -m kt.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--spent", action="store_true", help="compare the last plan with the run")
    parser.add_argument("--directory", type=Path, default=Path(), help="where results/ is")
    known, options = parser.parse_known_args()
    work = _spent if known.spent else functools.partial(_print, options)
    sys.exit(step.exit_code(work, known.directory))


def _print(options: list[str], folder: Path) -> None:
    options = ["--directory", str(folder), *options]
    every, due = jobs([*options, "--forceall"]), jobs(options)
    os.environ[CONSENT] = "1"  # as in the workflow: the configuration names the files of code
    with contextlib.chdir(folder):  # where its jobs stand, and relative paths begin
        _table(every, due)


def _table(every: list[Job], due: list[Job]) -> None:
    """Prints what the jobs will cost that are due, and keeps it for `--spent`."""
    every, due = ([_counted(job) for job in some] for some in (every, due))
    costs = estimate(every, due, Path())
    sizes = Footprint((job.rule, job.options) for job in every)
    print(f"{'step':18} jobs  there  to do     time  CPU time      disk  known by")
    written: list[int | None] = []
    for rule in RULES:
        some = [job for job in due if job.rule == rule]
        total = sum(job.rule == rule for job in every)
        if total or some:
            found = [costs[job.name] for job in some]
            bytes_ = [sizes.of(job.rule, job.options) for job in some]
            written += bytes_
            print(
                f"{rule:18} {total:4}  {total - len(some):5}  {len(some):5}  {_sums(found, bytes_)}"
            )
    found = [costs[job.name] for job in due]
    print(
        f"{'all':18} {len(every):4}  {len(every) - len(due):5}  {len(due):5}"
        f"  {_sums(found, written)}"
    )
    print("time is that of one job after the other; disk that of limits, if there are more images")
    print(_device([costs[job.name] for job in due if job.rule in ON_GPU]))
    logs = {job.name: str(log) for job in due if (log := _log(job))}
    kept = {name: cost and cost._asdict() | {"log": logs.get(name)} for name, cost in costs.items()}
    step.write_json(KEPT, kept)


def _device(found: list[Cost | None]) -> str:
    """Says how much of the time is a GPU's, given the costs of all jobs that would use one."""
    import torch

    if not torch.cuda.is_available():
        return "no GPU here: what probes tell is time of this machine's processor"
    seconds = sum(cost.seconds for cost in found if cost)
    return f"{lasting(seconds)} of it are GPU time: trainings, choices, extraction, evaluations"


def _sums(found: list[Cost | None], written: list[int | None]) -> str:
    known = [cost for cost in found if cost]
    seconds, cpu = (sum(cost[field] for cost in known) for field in (0, 1))
    sources = [cost.by for cost in known] + ["nothing"] * (len(found) - len(known))
    by = ", ".join(f"{source} {sources.count(source)}" for source in dict.fromkeys(sources))
    size = f"{sum(one or 0 for one in written) / 1e6:.1f} MB" + "?" * (None in written)
    return f"{lasting(seconds):>7}  {lasting(cpu):>8}  {size:>8}  {by}"


def lasting(seconds: float) -> str:
    """Says how long something takes, such as 12 s, 3.4 min, 5.6 h."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def jobs(options: Iterable[str]) -> list[Job]:
    """Lists the jobs of a dry run.

    Raises:
        SystemExit: Snakemake refused the options; it has said why.
    """
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--printshellcmds", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
        raise SystemExit(done.returncode)
    lines = re.findall(r"(python -m kt\.\w+ .* --log .+)$", done.stdout, re.M)
    return [_job(shlex.split(line)) for line in lines]


def _job(words: list[str]) -> Job:
    options, key = {}, ""
    for word in words[3:]:
        if word.startswith("--") and len(word) > 2:
            key = word[2:]
            options[key] = ""
        else:
            options[key] = f"{options[key]} {word}".strip()
    log = Path(options["log"]).with_suffix("").relative_to("results/logs")
    return Job(str(log), options)


def _counted(job: Job) -> Job:
    """Lowers the limits of a set of own pictures to what is there, by the names of the files."""
    if job.rule.removesuffix("_part") != "ingest" or Path(job.options["output"], REPORT).exists():
        return job
    dataset = config.check(config.Dataset, json.loads(job.options["dataset"]))
    counts = {**_pictures(dataset.path, dataset.labels)} if dataset.source in OWN else {}
    if not counts:
        return job
    drawn = ingest.from_train(counts[POOL], counts[TRAIN], dataset)
    counts |= {POOL: counts[POOL] + drawn, TRAIN: counts[TRAIN] - drawn}
    limits = {limit: getattr(dataset, limit) for limit in LIMITS.values()}
    there = {limit: counts[split] for split, limit in LIMITS.items()}
    found = {name: n if limits[name] is None else min(n, limits[name]) for name, n in there.items()}
    text = json.dumps(json.loads(job.options["dataset"]) | found)
    return job._replace(options=job.options | {"dataset": text})


@functools.cache
def _pictures(path: str | None, labels: str | None) -> dict[str, int]:
    """Counts the pictures at a path by split; nothing of tar shards, which are slow to read."""
    if not path or not Path(path).exists() or tars.are_at(Path(path)):
        return {}
    return dict.fromkeys(LIMITS, 0) | pictures.by_split(path, labels)


def estimate(every: Iterable[Job], due: Iterable[Job], folder: Path) -> dict[str, Cost | None]:
    """Gives what each job that is due will cost, by name; None where nothing is known.

    Args:
        every: All jobs of the workflow, as they would be in an empty folder.
        due: Those that will run.
        folder: Where results/ is.
    """
    read = ((job.name, benchmark(folder, job.name, _log(job))) for job in every)
    measured = {name: found for name, found in read if found}
    work = Work(every, folder)
    done_before = [job for job in every if job.name in measured]
    rates = [(measured[job.name], work.operations(job)) for job in done_before]
    rates = [(cost.seconds / done, cost.cpu / done) for cost, done in rates if done]
    middle = {}
    for kind in {work.kind(job) for job in done_before}:
        some = [measured[job.name][:2] for job in done_before if work.kind(job) == kind]
        middle[kind] = Cost(*map(statistics.median, zip(*some, strict=True)), "likeness")
    found = {}
    for job in due:
        done = work.operations(job)
        if job.name in measured:
            found[job.name] = measured[job.name]._replace(by="an earlier run")
        elif done and rates:
            seconds, cpu = (statistics.median(rate[field] for rate in rates) for field in (0, 1))
            found[job.name] = Cost(seconds * done, cpu * done, "operations")
        elif work.kind(job) in middle and job.rule not in TRAININGS:
            found[job.name] = middle[work.kind(job)]
        else:
            probed = work.probed(job)
            found[job.name] = probed and Cost(*probed, "probe")
    return found


def benchmark(folder: Path, name: str, log: str | Path | None = None) -> Cost | None:
    """Reads what a job did cost; None if it did not run, or was over before it was measured.

    Args:
        folder: Where results/ is.
        name: Of the job.
        log: Of a training, in the folder. Snakemake measures the last attempt alone; the log has
            the seconds of all.
    """
    path = folder / f"results/benchmarks/{name}.tsv"
    if not path.exists():
        return None
    with open(path, newline="") as file:
        row = next(csv.DictReader(file, delimiter="\t"), {})
    try:
        seconds, cpu = float(row["s"]), float(row["cpu_time"])
    except (KeyError, TypeError, ValueError):  # NA
        return None
    return Cost(max(seconds, logged(folder / log) if log else 0.0), cpu, "")


def logged(log: Path) -> float:
    """Gives the seconds of a training's steps, all attempts together; 0 where there were none."""
    lines = log.read_text().splitlines() if log.exists() else []
    return json.loads(lines[-1]).get("seconds", 0.0) if lines else 0.0


def _log(job: Job) -> Path | None:
    """Gives the log of a training's epochs, in the folder of the run."""
    return Path(job.options["output"]) / "log.jsonl" if job.rule in TRAININGS else None


def _spent(folder: Path) -> None:
    """Compares the plan that was made last with what the benchmarks say now."""
    path = folder / KEPT
    if not path.exists():
        raise ConfigError(f"expected a plan at {path}, found none: make one before the run")
    planned = json.loads(path.read_text())
    print(f"{'step':18} jobs   ran  planned    spent  planned CPU  spent CPU")
    for rule in RULES:
        costs = {name: cost for name, cost in planned.items() if Job(name, {}).rule == rule}
        pairs = [
            (cost, benchmark(folder, name, cost and cost.get("log")))
            for name, cost in costs.items()
        ]
        both = [(cost, found) for cost, found in pairs if cost and found]
        ran = sum(found is not None for _, found in pairs)
        if costs:
            sums = [lasting(sum(cost[key] for cost, _ in both)) for key in ("seconds", "cpu")]
            spent = [lasting(sum(found[field] for _, found in both)) for field in (0, 1)]
            print(
                f"{rule:18} {len(costs):4}  {ran:4}  {sums[0]:>7}  {spent[0]:>7}"
                f"  {sums[1]:>11}  {spent[1]:>9}"
            )


if __name__ == "__main__":
    main()
