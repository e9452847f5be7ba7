"""The workflow: what Snakemake adds, a run with nothing to do, one more k, the start of a step."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from bench import drawn, product
from bench.measure import Measured, Run, alternate, costs, seconds

REDUCED = """\
effort: 0.2
seeds: 1
datasets: {fashion_mnist: {unlabelled: 2000, labelled: 1000, test: 1000}}
"""
LIGHT = range(21, 33)  # 12 values of k
CHAIN = """\
rule all:
    input: "12"
rule first:
    output: "0"
    shell: "touch {output}"
rule next:
    input: lambda wildcards: str(int(wildcards.n) - 1)
    output: "{n,[1-9][0-9]?}"
    shell: "touch {output}"
"""


def call(command: list[str], folder: Path) -> None:
    """Runs a command to its end.

    Raises:
        RuntimeError: It failed; its last words are given.
    """
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr)[-800:]
        raise RuntimeError(f"{' '.join(command[:6])} ended with {done.returncode}: {said}")


def workflow(run: Run, *options: str, clusters: list[int], full: bool | None = None) -> None:
    """Runs the default run, reduced unless in full, with these values of k."""
    full = run.full if full is None else full
    overlay = run.scratch / "reduced.yaml"
    overlay.write_text(REDUCED)
    folder = run.folder("default-run" if full else "reduced-run")
    values = {"clusters": clusters}
    command = product.snakemake(
        folder, *options, cores=run.cores, overlay=None if full else overlay, **values
    )
    call(command, product.ROOT)


def finished(run: Run) -> float:
    """Makes the reduced (or full) run if no row has yet; gives its seconds."""
    note = run.scratch / ("default-run.json" if run.full else "reduced-run.json")
    if not note.exists():
        lasted = seconds(functools.partial(workflow, run, clusters=[100]))
        note.write_text(json.dumps(lasted))
    return json.loads(note.read_text())


def new_k_of_full(run: Run) -> Measured:
    """Compares the seconds of k = 50 after k = 100 with those of the run for k = 100."""
    whole = finished(run)
    more = seconds(functools.partial(workflow, run, clusters=[100, 50]))
    how = "the default run, in full" if run.full else "the reduced default run"
    return Measured([more / whole], how, [(more, whole)], {"reduced": not run.full})


def workflow_overhead(run: Run) -> Measured:
    """Compares 12 pseudo_labels jobs of the project's workflow with a bare chain of touch.

    "12 light jobs against a chain of touch" is taken at its word: the light jobs are real ones, of
    the project's lightest rule, with its configuration, profile, logs and benchmarks; the chain is
    the least that Snakemake itself costs for as many jobs. Starting Python 12 times counts; `also`
    holds the ratio to the same 12 commands one after the other plus Snakemake's bare start.
    """
    finished(run)
    root = run.folder("default-run" if run.full else "reduced-run")
    place = "results/{}/deep/block3/fashion_mnist{}"
    features = root / "results/features/deep/block3/fashion_mnist-train-unlabelled.h5"
    made = [place.format("clusters", f"/k{k}.h5") for k in LIGHT]
    name = "/k{}/fashion_mnist-train-unlabelled.h5"
    wanted = [place.format("pseudo_labels", name.format(k)) for k in LIGHT]
    workflow(run, *made, clusters=[100, *LIGHT])
    chain = run.folder("chain")
    (chain / "Snakefile").write_text(CHAIN)
    bare = [sys.executable, "-m", "snakemake", "--cores", str(run.cores)]

    def jobs() -> float:
        for path in wanted:
            (root / path).unlink(missing_ok=True)
        return seconds(functools.partial(workflow, run, *wanted, clusters=[100, *LIGHT]))

    def touches() -> float:
        for number in range(13):
            (chain / str(number)).unlink(missing_ok=True)
        return seconds(lambda: call(bare, chain))

    def by_hand() -> None:
        for clusters, output in zip(made, wanted, strict=True):
            call(product.assign_command(features, root / clusters, root / output), product.ROOT)
        call(bare, chain)

    pairs = alternate(jobs, touches, run.rounds)
    hand = costs(alternate(jobs, by_hand, 1, warm=False))[0]
    return Measured(
        costs(pairs),
        f"Snakemake {version('snakemake')}, chain of 12 touch",
        pairs,
        {"also": {"against the same commands by hand and a bare start": round(hand, 3)}},
    )


def noop_seconds(run: Run) -> Measured:
    """Times the same command once more, with everything there."""
    finished(run)
    workflow(run, clusters=[100])
    again = functools.partial(workflow, run, clusters=[100])
    return Measured([seconds(again) for _ in range(run.rounds)], "a clock")


def heavy_start_seconds(run: Run) -> Measured:
    """Times the heaviest step from the start of its process to the line that begins its work."""
    pack = product.write_pack(run.scratch / "start.h5", drawn.images(256, 28), drawn.keys(256))
    command = product.pretext_command(
        pack, run.scratch / "start.json", run.scratch / "started", run.cores
    )

    def start() -> float:
        begun, found = time.perf_counter(), None
        with subprocess.Popen(
            command, cwd=product.ROOT, stderr=subprocess.PIPE, text=True
        ) as process:  # fmt: skip
            for line in process.stderr:
                if found is None and product.FIRST_LINE_OF_WORK in line:
                    found = time.perf_counter() - begun
        if found is None or process.returncode:
            raise RuntimeError(f"no line with {product.FIRST_LINE_OF_WORK!r}, or a failure")
        return found

    start()
    return Measured([start() for _ in range(run.rounds)], "a clock")
