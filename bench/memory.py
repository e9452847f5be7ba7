"""Peak memory of the real steps at N and at 4 N images: it should not grow with N."""

from __future__ import annotations

import statistics
import subprocess
import time
from pathlib import Path

from bench import drawn, product
from bench.clustering import features
from bench.measure import Measured, Run, worst

N = 50_000
EVERY = 0.005  # seconds between two looks
AGAIN = 5.0  # seconds: what is over sooner runs again; now and then, at any N, two of the pieces
# that a step works on meet in memory (seen: one of four runs of pseudo_labels, 37 or 42 MB, not 32)
SIZE, D, K, ITERATIONS = 16, 64, 50, 4


def memory_growth(run: Run) -> Measured:
    """Runs each step as a process at N and 4 N and compares the peaks of anonymous memory."""
    steps = {"ingest": ingest, "features": extraction, "cluster": cluster, "pseudo_labels": assign}
    cases = {}
    for name, command in steps.items():
        commands = [command(run, number) for number in (N, 4 * N)]
        peaks = [[usual(one) for one in commands] for _ in range(run.rounds)]
        cases[name] = Measured([large / small for small, large in peaks], "its own peak at N")
        cases[name].more = {"images": [N, 4 * N]}
        megabytes = {"small": peaks[0][0] / 1e6, "large": peaks[0][1] / 1e6}
        cases[name].more["megabytes"] = {key: round(one, 1) for key, one in megabytes.items()}
    found = worst(cases, max)
    found.more["megabytes"] = {name: case.more["megabytes"] for name, case in cases.items()}
    return found


def ingest(run: Run, number: int) -> list[str]:
    """Gives the command that packs so many pictures of 12 to 16 px from a tar."""
    archive = drawn.small_pictures(run.scratch / f"{number}.tar", number)
    return product.ingest_command(archive, SIZE, run.scratch / f"packed-{number}", run.cores)


def extraction(run: Run, number: int) -> list[str]:
    """Gives the command that extracts features of so many images by a tiny network."""
    pack = run.scratch / f"small-{number}.h5"
    product.write_pack(pack, drawn.images(number, SIZE), drawn.keys(number))
    plugin = product.tiny_backbone()
    model = product.write_model(run.folder("tiny"), plugin, SIZE)
    output = run.scratch / "tiny.h5"
    return product.features_command(model, "conv1", pack, output, run.cores)


def cluster(run: Run, number: int) -> list[str]:
    """Gives the command that clusters so many rows, as those that do not fit into memory."""
    output = run.scratch / f"clusters-{number}.h5"
    return product.cluster_command(features(run, number, D), K, ITERATIONS, output, run.cores, 1)


def assign(run: Run, number: int) -> list[str]:
    """Gives the command that labels so many rows; both sizes by the same clusters."""
    output = run.scratch / f"labels-{number}.h5"
    clusters = run.scratch / f"clusters-{N}.h5"
    return product.assign_command(features(run, number, D), clusters, output)


def usual(command: list[str]) -> float:
    """Gives the median peak of so many runs of a command as `AGAIN` has room for, at least one."""
    peaks, end = [peak(command)], time.monotonic() + AGAIN
    while time.monotonic() < end:
        peaks.append(peak(command))
    return statistics.median(peaks)


def peak(command: list[str]) -> int:
    """Runs a command and gives the largest sum of anonymous bytes of it and its children.

    Raises:
        RuntimeError: It failed; its last words are given.
    """
    with subprocess.Popen(
        command, cwd=product.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        most = 0
        while process.poll() is None:
            most = max(most, sum(anonymous(one) for one in family(process.pid)))
            time.sleep(EVERY)
        said = process.stderr.read()
    if process.returncode:
        raise RuntimeError(
            f"{' '.join(command[:4])} ended with {process.returncode}: {said[-500:]}"
        )
    return most


def anonymous(process: int) -> int:
    """Gives the anonymous bytes of a process, 0 if it is gone."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    lines = [line.split() for line in text.splitlines() if line.startswith("RssAnon:")]
    return 1024 * int(lines[0][1]) if lines else 0


def family(process: int) -> list[int]:
    """Gives a process and all below it."""
    try:
        text = Path(f"/proc/{process}/task/{process}/children").read_text()
    except OSError:
        return [process]
    return [process, *(one for child in text.split() for one in family(int(child)))]
