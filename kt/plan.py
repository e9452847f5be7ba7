"""Says what a run will do and cost before anything runs, and afterwards what it did cost.

    make plan ARGS="--config images=PATH"       python -m kt.plan --cores 2 --config images=PATH
    make spent                                  python -m kt.plan --spent

The options are Snakemake's, and a dry run gives the jobs. A job that ran before in the folder costs
what its benchmark says. A training that did not costs its operations (`kt.compute`) at the rate of
the trainings that did, or, where none did, at that of a probe: some steps of each network, here and
now. Other jobs cost what the middle one of their rule did; without any they are counted as unknown.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from kt import compute, config
from kt.core import step
from kt.core.footprint import Footprint
from kt.core.step import ConfigError

PROBE = 4.0  # seconds for each network
RULES = (
    "ingest_part ingest pretext_train choose features_part features cluster pseudo_labels_part"
    " pseudo_labels target_train evaluate report"
).split()
KEPT = Path("results/plan.json")


class Job(NamedTuple):
    """A job of the workflow.

    Attributes:
        name: As in the paths of its log and benchmark, such as `pretext_train/deep-s0`.
        options: Of its command, by name; values as text.
    """

    name: str
    options: dict[str, str]

    @property
    def rule(self) -> str:
        """Its rule."""
        return self.name.partition("/")[0]

    @property
    def kind(self) -> str:
        """What jobs of like cost share: the rule, and which evaluations."""
        return f"{self.rule} {self.name.rpartition('-')[2] if self.rule == 'evaluate' else ''}"


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
    costs = estimate(every, due, folder)
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
    kept = {name: cost and cost._asdict() for name, cost in costs.items()}
    step.write_json(folder / KEPT, kept)


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


def estimate(every: Iterable[Job], due: Iterable[Job], folder: Path) -> dict[str, Cost | None]:
    """Gives what each job that is due will cost, by name; None where nothing is known.

    Args:
        every: All jobs of the workflow, as they would be in an empty folder.
        due: Those that will run.
        folder: Where results/ is.
    """
    measured = {job.name: found for job in every if (found := benchmark(folder, job.name))}
    images = {
        job.options["output"]: json.loads(job.options["dataset"])
        for job in every
        if job.rule == "ingest"
    }
    work = functools.partial(operations, images=images, folder=folder)
    done_before = [job for job in every if job.name in measured]
    rates = [(measured[job.name], work(job)) for job in done_before if job.rule in TRAININGS]
    rates = [(cost.seconds / done, cost.cpu / done) for cost, done in rates if done]
    middle = {}
    for kind in {job.kind for job in done_before}:
        some = [measured[job.name][:2] for job in done_before if job.kind == kind]
        middle[kind] = Cost(*map(statistics.median, zip(*some, strict=True)), "likeness")
    found = {}
    for job in due:
        if job.name in measured:
            found[job.name] = measured[job.name]._replace(by="an earlier run")
        elif job.rule in TRAININGS and (done := work(job)):
            if rates:
                seconds, cpu = (
                    statistics.median(rate[field] for rate in rates) for field in (0, 1)
                )
                by = "operations"
            else:
                seconds = probe(job.options["backbone"], job.options["task"], _batch(job))
                cpu, by = seconds, "probe"
            found[job.name] = Cost(seconds * done, cpu * done, by)
        else:
            found[job.name] = middle.get(job.kind)
    return found


TRAININGS = ("pretext_train", "target_train")


def benchmark(folder: Path, name: str) -> Cost | None:
    """Reads what Snakemake measured of a job, if it ran."""
    path = folder / f"results/benchmarks/{name}.tsv"
    if not path.exists():
        return None
    names, values = (line.split("\t") for line in path.read_text().splitlines()[:2])
    row = dict(zip(names, values, strict=True))
    return Cost(float(row["s"]), float(row["cpu_time"]), "")


def operations(job: Job, images: dict[str, dict[str, Any]], folder: Path) -> float | None:
    """Gives the operations of a training, None where the number of its images is not known.

    Args:
        job: The training.
        images: Settings of the data sets, by the folder they are packed in.
        folder: Where results/ is.
    """
    options = job.options
    if options["task"] == "null":
        return None
    if "budget" in options and (parts := json.loads(options["budget"])):
        done = [_operations(part, images, folder) for part in parts]
        return None if None in done else sum(done)
    values = {key: options.get(key, "null") for key in ("backbone", "task", "few-images")}
    values = {key.replace("-", "_"): json.loads(value) for key, value in values.items()}
    pack = options.get("budget-of", options["pack"])
    return _operations({**values, "epochs": int(options["epochs"]), "pack": pack}, images, folder)


def _operations(part: dict[str, Any], images, folder: Path) -> float | None:
    dataset = images[str(Path(part["pack"]).parent)]
    number, path = dataset["unlabelled"], folder / part["pack"]
    if path.exists():
        from kt.core.images import layout

        number = layout(path).shape[0]
    if number is None:
        return None
    few = part["few_images"]
    epochs = config.check(config.FewImages, few).epochs(part["epochs"], number) if few else (
        part["epochs"]
    )  # fmt: skip
    one = _forward(json.dumps(part["backbone"]), json.dumps(part["task"]), dataset["size"])
    return compute.OPERATIONS * one * epochs * number


@functools.cache
def _forward(backbone: str, task: str, size: int) -> float:
    plugins = (config.check(config.Plugin, json.loads(text)) for text in (backbone, task))
    return compute.multiply_adds(*plugins, size)


def _batch(job: Job) -> int:
    return int(json.loads(job.options["training"])["batch"])


@functools.cache
def probe(backbone: str, task: str, batch: int) -> float:
    """Gives the seconds of an operation: steps on drawn views, for some seconds, after a first one.

    Args:
        backbone: JSON.
        task: JSON.
        batch: Images of a step.
    """
    import torch

    from kt.core import hardware, model, network
    from kt.core.task import Context
    from kt.pretext_train import build_task

    print(f"probing {json.loads(backbone)['name']} for {PROBE:.0f} seconds", file=sys.stderr)
    where, ids = hardware.device(), torch.arange(2)
    context = Context(64, ids, torch.zeros(3), torch.ones(3), 0, ids * 0, 100)
    made = build_task(config.check(config.Plugin, json.loads(task)), context)
    net = network.Network(model.fresh(config.check(config.Plugin, json.loads(backbone)), 0), made)
    net.to(where).train()
    dtype = hardware.precision("auto", where)
    views = torch.randn(batch, made.num_views, 3, made.view_size, made.view_size, device=where)
    begun, steps = 0.0, -1
    while steps < 1 or time.perf_counter() - begun < PROBE:
        with torch.autocast(where.type, dtype, enabled=dtype != torch.float32):
            loss = net(views).float().logsumexp(1).mean()
        loss.backward()
        if where.type == "cuda":
            torch.cuda.synchronize()
        steps += 1
        if steps == 0:
            begun = time.perf_counter()
    one = network.multiply_adds(net, made)
    return (time.perf_counter() - begun) / (steps * batch * one * compute.OPERATIONS)


def _spent(folder: Path) -> None:
    """Compares the plan that was made last with what the benchmarks say now."""
    path = folder / KEPT
    if not path.exists():
        raise ConfigError(f"expected a plan at {path}, found none: make one before the run")
    planned = json.loads(path.read_text())
    print(f"{'step':18} jobs   ran  planned    spent  planned CPU  spent CPU")
    for rule in RULES:
        costs = {name: cost for name, cost in planned.items() if Job(name, {}).rule == rule}
        pairs = [(cost, benchmark(folder, name)) for name, cost in costs.items()]
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
