"""Says what a run will do and cost before anything runs, and afterwards what it did cost.

    make plan ARGS="--config images=PATH"       python -m kt.plan --cores 2 --config images=PATH
    make spent                                  python -m kt.plan --spent

The options are Snakemake's, and a dry run gives the jobs. A job that ran before in the folder costs
what its benchmark says. A training that did not costs its operations (`kt.compute`) at the rate of
the trainings that did, another job what the middle one of its rule did. Where there is none, a
probe tells: seconds of each network's training and extraction, of matrix products, of decoding and
of starting a job, here and now (`kt.core.probe`). What no probe tells is counted as unknown. The
logs of jobs say which of them held a GPU.
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
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from kt import config
from kt.backbones.file import CONSENT
from kt.core import layouts, step
from kt.core.footprint import LIMITS, Footprint
from kt.core.layouts import POOL, TRAIN
from kt.core.step import ConfigError
from kt.core.work import TRAININGS, Job, Work
from kt.sources import pictures, tars

RULES = (
    "ingest_part ingest pretext_train choose features_part features cluster pseudo_labels_part"
    " pseudo_labels target_train evaluate report"
).split()
NO_GPU = ("ingest_part", "ingest", "report")
KEPT, PACKS = Path("results/plan.json"), Path("results/data")
REPORT = "report.json"  # of a data set that is packed
OWN = ("pictures", "folder", "archive")  # sources whose pictures are quickly counted


class Cost(NamedTuple):
    """What a job costs.

    Attributes:
        seconds: By the clock.
        cpu: Processor seconds.
        gpu: GPU seconds: `seconds` on each GPU that the job holds; None where not known.
        by: What it is known by.
    """

    seconds: float
    cpu: float
    gpu: float | None
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
    anew = {job.name for job in due}
    every, due = ([_counted(job, anew) for job in some] for some in (every, due))
    costs = estimate(every, due, Path())
    sizes = Footprint((job.rule, job.options) for job in every)
    disk = {job.name: sizes.of(job.rule, job.options) for job in due}
    gpu = _has_gpu() or any(cost and cost.gpu for cost in costs.values())
    head = "  GPU time" if gpu else ""
    print(f"{'step':18} jobs  there  to do     time  CPU time{head}      disk  known by")
    for rule in (*RULES, "all"):
        some = [job.name for job in due if rule in (job.rule, "all")]
        total = sum(rule in (job.rule, "all") for job in every)
        if total or some:
            sums = _sums([costs[name] for name in some], [disk[name] for name in some], gpu)
            print(f"{rule:18} {total:4}  {total - len(some):5}  {len(some):5}  {sums}")
    print("time is that of one job after the other; disk that of limits, if there are more images")
    if parts := [sizes.of_part(job.rule, job.options) for job in due if "part" in job.options]:
        print(f"and up to {_in_all(parts)} more stand on disk until parts are merged")
    if not _has_gpu():
        print("no GPU here: what probes tell is time of this machine's processor")
    else:
        print("GPU time is all the time of jobs that hold a GPU, as all do here that can use one")
    kept = {job.name: _kept(job, costs[job.name], disk[job.name]) for job in due}
    step.write_json(KEPT, kept)


def _kept(job: Job, cost: Cost | None, disk: int | None) -> dict | None:
    """Gives what `--spent` needs to know of a job; None where its cost is not known."""
    log = _log(job)
    more = {"log": log and str(log), "output": job.options["output"], "disk": disk}
    return cost and cost._asdict() | more


def _has_gpu() -> bool:
    """Says whether jobs would compute on a GPU here."""
    import torch

    return os.environ.get("KT_DEVICE") != "cpu" and torch.cuda.is_available()


def _sums(found: list[Cost | None], disk: list[int | None], gpu: bool) -> str:
    known = [cost for cost in found if cost]
    seconds, cpu, on_gpu = (sum(cost[field] for cost in known) for field in range(3))
    sources = [cost.by for cost in known] + ["nothing"] * (len(found) - len(known))
    by = ", ".join(f"{source} {sources.count(source)}" for source in dict.fromkeys(sources))
    more = f"  {lasting(on_gpu):>8}" if gpu else ""
    return f"{lasting(seconds):>7}  {lasting(cpu):>8}{more}  {_in_all(disk):>8}  {by}"


def _in_all(sizes: list[int | None]) -> str:
    """Says how many bytes those are together, with a `?` where some are not known."""
    return megabytes(sum(size or 0 for size in sizes)) + "?" * (None in sizes)


def megabytes(size: float) -> str:
    """Says how much so many bytes are."""
    return f"{size / 1e6:.1f} MB"


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


def _counted(job: Job, due: Collection[str] = ()) -> Job:
    """Lowers the limits of a data set to what is packed, unless its ingest is `due` (names).

    Of a set of own pictures that is not packed yet, to what is there by the names of the files.
    """
    if job.rule.removesuffix("_part") != "ingest":
        return job
    output = Path(job.options["output"])  # that of a part stands in a folder named as the set
    folder = output if job.rule == "ingest" else PACKS / output.parent.name
    dataset = config.check(config.Dataset, json.loads(job.options["dataset"]))
    if f"ingest/{folder.name}" not in due and (folder / REPORT).exists():
        splits = step.read_json(folder / REPORT)["splits"]
        counts = {split: splits[split]["images"] for split in LIMITS}
    elif counts := {**_pictures(dataset.path, dataset.labels)} if dataset.source in OWN else {}:
        drawn = layouts.from_train(counts[POOL], counts[TRAIN], dataset)
        counts |= {POOL: counts[POOL] + drawn, TRAIN: counts[TRAIN] - drawn}
    else:
        return job
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
    read = ((job, benchmark(folder, job.name, _log(job))) for job in every)
    measured = {job.name: _with_gpu(job, found) for job, found in read if found}
    did, work = Work(every, folder), Work(every, folder, {job.name for job in due})
    done_before = [job for job in every if job.name in measured]
    rates = [(measured[job.name], did.operations(job)) for job in done_before]
    rates = [[amount / done for amount in cost[:3]] for cost, done in rates if done]
    middle = {}
    for kind in {work.kind(job) for job in done_before}:
        some = [measured[job.name][:3] for job in done_before if work.kind(job) == kind]
        middle[kind] = Cost(*map(statistics.median, zip(*some, strict=True)), "likeness")
    found = {}
    for job in due:
        done = work.operations(job)
        if job.name in measured:
            found[job.name] = measured[job.name]._replace(by="an earlier run")
        elif done and rates:
            middle_rate = map(statistics.median, zip(*rates, strict=True))
            found[job.name] = Cost(*(rate * done for rate in middle_rate), "operations")
        elif work.kind(job) in middle and job.rule not in TRAININGS:
            found[job.name] = middle[work.kind(job)]
        else:
            probed = work.probed(job)
            found[job.name] = probed and _with_gpu(job, Cost(*probed, None, "probe"))
    return found


def _with_gpu(job: Job, cost: Cost) -> Cost:
    """Fills in the GPU time, where it is not known, by what a job would do here."""
    if cost.gpu is not None:
        return cost
    options = job.options
    computes = not (options.get("parts") or options.get("task") == "null" or "given" in options)
    on_gpu = computes and job.rule not in NO_GPU and _has_gpu()
    return cost._replace(gpu=cost.seconds if on_gpu else 0.0)


def benchmark(
    folder: Path, name: str, log: str | Path | None = None, since: float = 0.0
) -> Cost | None:
    """Reads what a job did cost; None if it did not run, or was over before it was measured.

    Args:
        folder: Where results/ is.
        name: Of the job.
        log: Of a training, in the folder. Snakemake measures the last attempt alone; the log has
            the seconds of all.
        since: Seconds; what was measured before does not count.
    """
    path = folder / f"results/benchmarks/{name}.tsv"
    if not path.exists() or path.stat().st_mtime < since:
        return None
    with open(path, newline="") as file:
        row = next(csv.DictReader(file, delimiter="\t"), {})
    try:
        seconds, cpu = float(row["s"]), float(row["cpu_time"])
    except (KeyError, TypeError, ValueError):  # NA
        return None
    seconds = max(seconds, logged(folder / log) if log else 0.0)
    held = gpus(folder / f"results/logs/{name}.log")
    return Cost(seconds, cpu, None if held is None else held * seconds, "")


def gpus(log: Path) -> int | None:
    """Gives the GPUs that a job held when it ran last, by its log; None where that says nothing."""
    text = log.read_text(errors="replace") if log.exists() else ""
    found = re.findall(rf"^\S+ {step.GPUS}: (\d+)$", text, re.M)
    return int(found[-1]) if found else None


def written(output: Path) -> int | None:
    """Gives the bytes of a job's file, or of the files in its folder; None where none is left."""
    files = [output] if output.is_file() else [one for one in output.glob("*") if one.is_file()]
    return sum(file.stat().st_size for file in files) if files else None


def logged(log: Path) -> float:
    """Gives the seconds of a training's steps, all attempts together; 0 where there were none."""
    lines = log.read_text().splitlines() if log.exists() else []
    return json.loads(lines[-1]).get("seconds", 0.0) if lines else 0.0


def _log(job: Job) -> Path | None:
    """Gives the log of a training's epochs, in the folder of the run."""
    return Path(job.options["output"]) / "log.jsonl" if job.rule in TRAININGS else None


COLUMNS = {
    "seconds": ("", lasting),
    "cpu": (" CPU", lasting),
    "gpu": (" GPU", lasting),
    "disk": (" disk", megabytes),
}
ALWAYS = ("seconds", "cpu")  # the others where there is something to compare


def _spent(folder: Path) -> None:
    """Compares the plan that was made last with what benchmarks, logs and files say now."""
    path = folder / KEPT
    if not path.exists():
        raise ConfigError(f"expected a plan at {path}, found none: make one before the run")
    planned = {name: cost or {} for name, cost in step.read_json(path).items()}
    since = path.stat().st_mtime
    found = {name: _found(folder, name, cost, since) for name, cost in planned.items()}
    pairs = {column: _pairs(planned, found, column) for column in COLUMNS}
    shown = [one for one in COLUMNS if one in ALWAYS or any(map(any, pairs[one].values()))]
    heads = [f"{side}{COLUMNS[one][0]}" for one in shown for side in ("planned", "spent")]
    widths = [max(8, len(head)) for head in heads]
    print(f"{'step':18} jobs   ran{_row(heads, widths)}")
    for rule in (*RULES, "all"):
        names = [name for name in planned if rule in (Job(name, {}).rule, "all")]
        ran = sum(found[name] is not None for name in names)
        if names:
            cells = [
                COLUMNS[one][1](sum(pairs[one].get(name, (0, 0))[side] for name in names))
                for one in shown
                for side in (0, 1)
            ]
            print(f"{rule:18} {len(names):4}  {ran:4}{_row(cells, widths)}")


def _row(cells: list[str], widths: list[int]) -> str:
    return "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _found(folder: Path, name: str, planned: dict, since: float) -> dict | None:
    """Gives what a job did cost, by the keys of a plan; None if it did not run since then."""
    cost = benchmark(folder, name, planned.get("log"), since)
    output = planned.get("output")
    return cost and cost._asdict() | {"disk": written(folder / output) if output else None}


def _pairs(planned: dict, found: dict, key: str) -> dict[str, tuple[float, float]]:
    """Gives what was planned and what was spent of all jobs of which both are known, by name."""
    both = {name: (planned[name].get(key), cost[key]) for name, cost in found.items() if cost}
    return {name: pair for name, pair in both.items() if None not in pair}


if __name__ == "__main__":
    main()
