"""Measures what a cluster is for: many images, many rows, parts of the work, several processes.

    python -m bench.scale                       all; on 2 cores about 15 minutes
    python -m bench.scale images --most 10000000
    python -m bench.scale --list

Each is measured at growing sizes, and the growth is said: the exponent of a fit for images and
rows, for parts and processes the processor time against that of one. Writes bench/scale.json and
docs/scale.md, with commit and date of each; what is not measured keeps its figures. No goals: the
tables are for sizing.
"""

from __future__ import annotations

import argparse
import datetime
import io
import itertools
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from bench import drawn, memory, product, results
from bench.clustering import features
from bench.measure import Run, exponent, probe

KEPT, PAGE = product.ROOT / "bench" / "scale.json", product.ROOT / "docs" / "scale.md"
A_TAR = 10_000  # pictures
ROWS, WIDTH, CLUSTERS, ITERATIONS = 1_000_000, 512, 1000, 3
PARTS = (1, 2, 4, 8)


class Cost(NamedTuple):
    """What some commands took together: the longest's seconds, processor seconds, peak in MB."""

    seconds: float
    cpu: float
    megabytes: float


def cost(*commands: list[str]) -> Cost:
    """Runs commands one after the other, as nodes of their own would."""
    longest, peak, before = 0.0, 0, _cpu()
    for command in commands:
        start = time.monotonic()
        peak = max(peak, memory.peak(command))
        longest = max(longest, time.monotonic() - start)
    return Cost(round(longest, 1), round(_cpu() - before, 1), round(peak / 1e6))


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# ---------------------------------------------------------------------------- what is measured


def images(run: Run, most: int) -> Iterator[dict]:
    """Tar shards: all are listed, one part of the pictures is decoded; and the plan for all.

    The tars are one tar under many names, in memory after the first, so that headers are parsed but
    no disk is waited for; seconds are of the processor.
    """
    one = run.scratch / "one.tar"
    with tarfile.open(one, "w") as archive:
        for number, payload in enumerate(itertools.islice(_small(), A_TAR)):
            for suffix, content in ((".png", payload), (".cls", b"%d" % (number % 10))):
                member = tarfile.TarInfo(f"{number:06d}{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    for number in (10**power for power in range(5, 9)):
        if number > most:
            return
        folder, state = run.folder(f"tars-{number}"), run.scratch / f"state-{number}"
        for tar in range(number // A_TAR):
            os.link(one, folder / f"drawn-{'train' if tar % 10 else 'test'}-{tar:06d}.tar")
        shards = -(-number // 2048)
        part = product.ingest_command(folder, 16, run.scratch / "mark.txt", run.cores)
        part += ["--state", str(state), "--part", f"1/{shards}"]
        first, second = cost(part), cost(part)
        yield {
            "images": number, "tars": number // A_TAR, "index_cpu_s": first.cpu,
            "again_cpu_s": second.cpu, "peak_mb": max(first.megabytes, second.megabytes),
            "index_files": len(list(state.glob("tar-*"))), "state_files": shards,
            **_plan(run, folder),
        }  # fmt: skip


def _small() -> Iterator[bytes]:
    """Gives PNGs of 16 px, 64 different ones again and again."""
    from PIL import Image

    found = []
    for pixels in drawn.images(64, 16):
        buffer = io.BytesIO()
        Image.fromarray(pixels.transpose(1, 2, 0)).save(buffer, "PNG")
        found.append(buffer.getvalue())
    while True:
        yield from found


def _plan(run: Run, folder: Path) -> dict:
    """Gives what Snakemake's plan of the whole chain in 64 parts costs: seconds, memory, jobs."""
    options = {"cores": run.cores, "overlay": None, "images": folder, "shards": 64}
    command = product.snakemake(run.folder("plan"), "--dry-run", **options)
    done = subprocess.run(command, cwd=product.ROOT, capture_output=True, text=True, check=True)
    jobs = max(int(line.split()[1]) for line in done.stdout.splitlines() if line[:6] == "total ")
    found = cost(command)
    return {"plan_cpu_s": found.cpu, "plan_mb": found.megabytes, "jobs": jobs}


def rows(run: Run, most: int) -> Iterator[dict]:
    """k-means on rows of 512 dimensions that stay in a file (`memory_mb: 1`), exact, on all."""
    for number in (ROWS // 8, ROWS // 4, ROWS // 2, ROWS):
        path, output = features(run, number, WIDTH), run.scratch / "clusters.h5"
        found = [
            cost(product.cluster_command(path, CLUSTERS, times, output, run.cores, 1))
            for times in (1, 1 + ITERATIONS)
        ]
        each = (found[1].seconds - found[0].seconds) / ITERATIONS
        rest = round(found[0].seconds - each, 1)
        yield {
            "rows": number, "iteration_s": round(each, 2), "rest_s": rest,
            "peak_mb": found[1].megabytes,
        }  # fmt: skip
        path.unlink()


def parts(run: Run, most: int) -> Iterator[dict]:
    """Labels of 1,600,000 rows of 128 dimensions in parts, put together again."""
    path, clusters = features(run, 1_600_000, 128), run.scratch / "parts-clusters.h5"
    sample = product.cluster_command(features(run, 20_000, 128), CLUSTERS, 2, clusters, run.cores)
    cost(sample)
    alone = None
    for number in PARTS:
        made = [run.scratch / f"{one}-of-{number}.h5" for one in range(1, number + 1)]
        commands = [
            [*product.assign_command(path, clusters, one), "--part", f"{place}/{number}"]
            for place, one in enumerate(made, 1)
        ]
        output = run.scratch / "labels.h5"
        gather = [*product.assign_command(path, clusters, output), "--parts", *map(str, made)]
        work, joined = cost(*commands), cost(*([gather] if number > 1 else []))
        total = work.cpu + joined.cpu
        alone = alone or total
        yield {
            "parts": number, "longest_s": work.seconds, "gather_s": joined.seconds,
            "cpu_of_one": round(total / alone, 2),
        }  # fmt: skip


def processes(run: Run, most: int) -> Iterator[dict]:
    """k-means and the default teacher's training, processes of one thread on one machine.

    Start-up is in it, of torchrun and of torch in each process: some 5 s. Both are small: what is
    measured is what spreading costs, not what it gives to work that needs it.
    """
    pack = product.write_pack(run.scratch / "pack.h5", drawn.images(8192, 28), drawn.keys(8192))
    path = features(run, 200_000, 128)
    clusters = product.cluster_command(path, CLUSTERS, 10, run.scratch / "c.h5", 1)
    training = product.pretext_command(pack, run.scratch / "report.json", run.scratch / "net", 1)
    alone: dict[str, Cost] = {}
    for number in (1, 2, 4):
        found = {"processes": number}
        for name, command in (("clustering", clusters), ("training", training)):
            spent = cost([*command, "--processes", str(number)])
            alone.setdefault(name, spent)
            found[f"{name}_s"] = spent.seconds
            found[f"{name}_cpu_of_one"] = round(spent.cpu / alone[name].cpu, 2)
        yield found


GROUPS: dict[str, Callable] = {one.__name__: one for one in (images, rows, parts, processes)}
FITTED = {"images": ("images", "again_cpu_s"), "rows": ("rows", "iteration_s")}


# ---------------------------------------------------------------------------- the page


def main() -> None:
    """Measures the chosen groups and writes what came out after each."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.scale", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--most", type=int, default=10**6, help="images (1000000)")
    parser.add_argument("--cores", type=int, default=2, help="cores to use (2)")
    parser.add_argument("--list", action="store_true", help="list the groups and end")
    arguments = parser.parse_args()
    if unknown := set(arguments.groups) - GROUPS.keys():
        parser.error(f"expected groups of {', '.join(GROUPS)}, found {', '.join(sorted(unknown))}")
    if arguments.list:
        print("\n".join(f"{name:10} {one.__doc__.splitlines()[0]}" for name, one in GROUPS.items()))
        return
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    commit = results.commit()  # before the first figures are written
    for name in arguments.groups or GROUPS:
        with tempfile.TemporaryDirectory(prefix="kt-scale-") as scratch:
            before, found = probe(), []
            for row in GROUPS[name](Run(1, arguments.cores, Path(scratch)), arguments.most):
                print(name, json.dumps(row), flush=True)
                found.append(row)
        kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
        kept[name] = {
            "rows": found, "probe": [round(before), round(probe())],
            "machine": results.machine(arguments.cores),
            "commit": commit, "date": datetime.date.today().isoformat(),
        }  # fmt: skip
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")
        PAGE.write_text(page(kept))


def page(kept: dict) -> str:
    """Gives the tables of all groups as Markdown."""
    text = (
        "# Scale\n\nMade by `python -m bench.scale`, which measures on the machine at hand; do not "
        'edit. What it means for a run of yours: [how-to](howto.md), "Size a cluster".\n'
    )
    for name, group in GROUPS.items():
        if name not in kept:
            continue
        found, machine = kept[name]["rows"], kept[name]["machine"]
        columns = list(found[0])
        lines = [
            columns,
            ["---"] * len(columns),
            *([f"{x:,}" for x in row.values()] for row in found),
        ]
        text += f"\n## {name.capitalize()}\n\n" + " ".join(group.__doc__.split()) + "\n\n"
        text += "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
        if name in FITTED and len(found) > 1:
            size, value = ([row[key] for row in found] for key in FITTED[name])
            text += f"\n`{FITTED[name][1]}` grows with the power {exponent(size, value):.2f}.\n"
        probes = " and ".join(map(str, kept[name]["probe"]))
        text += f"\n{machine['threads']} threads of {machine['cpu']}; probe {probes} GFLOP/s; "
        text += f"{origin(kept[name])}.\n"
    return text


def origin(group: dict) -> str:
    """Says commit and date of a group; of early ones only what commit brought them is known."""
    if "commit" in group:
        return f"commit {group['commit']}, {group['date']}"
    return f"came with commit {group['came_with']}, {group['date']}"


if __name__ == "__main__":
    sys.exit(main())
