"""Measures the product against peers and floors, and writes what came out.

    python -m bench                                all rows; on 2 cores at most 15 minutes
    python -m bench --only puzzles_vs_lightly      some rows; the others keep their records
    python -m bench --list                         what there is

Each row runs in a process of its own, on as many cores as it may use, so that a crash takes nothing
with it and no row inherits another's threads. Rows go one after the other; a probe before and after
each tells whether the machine was busy with something else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import results
from bench.goals import BY_NAME, ROWS, Row

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", default=[], choices=[*BY_NAME], help="these rows"
    )
    parser.add_argument("--list", action="store_true", help="list the rows and end")
    parser.add_argument("--rounds", type=int, help="pairs of each row instead of its own number")
    parser.add_argument("--cores", type=int, default=2, help="cores to use (2)")
    parser.add_argument(
        "--full", action="store_true", help="new_k_of_full on the whole default run"
    )
    parser.add_argument(
        "--no-write", action="store_true", help="print only; keep files as they are"
    )
    return parser.parse_args()


def main() -> None:
    """Measures the chosen rows; ends with 0 also where a goal is missed, which it prints."""
    arguments = parse()
    if arguments.list:
        print("\n".join(f"{row.name:24} {row.direction} {row.goal:g}: {row.text}" for row in ROWS))
        return
    cpus = sorted(os.sched_getaffinity(0))[: arguments.cores]
    os.sched_setaffinity(0, cpus)
    os.environ.update(dict.fromkeys(THREADS, str(len(cpus))))  # of the probe
    chosen = [row for row in ROWS if row.name in arguments.only or not arguments.only]
    machine, started, found = results.machine(len(cpus)), time.monotonic(), []
    chosen = [row for row in chosen if machine["gpu"] or not row.cuda]
    with tempfile.TemporaryDirectory(prefix="kt-bench-") as scratch:
        for row in chosen:
            one = one_row(row, arguments, cpus, Path(scratch), machine)
            found.append(one)
            print(results.line(one), flush=True)
            if not arguments.no_write:
                results.write(results.merged(results.read(), [one]))
    missed = [one["name"] for one in found if not one["met"]]
    print(
        f"{len(found)} rows in {time.monotonic() - started:.0f} s, {len(missed)} below their goal"
    )
    if missed:
        print(f"SHORTFALL: {', '.join(missed)}")


def one_row(row: Row, arguments, cpus: list[int], scratch: Path, machine: dict) -> dict:
    """Gives the record of one row, measured between two probes."""
    from bench.measure import probe

    before, start = probe(), time.monotonic()
    found = in_a_process(row, arguments, cpus[: row.cores], scratch)
    lasted = time.monotonic() - start
    one = results.record(row, found, (before, probe()), machine)
    return one | {"more": {**(one["more"] or {}), "seconds_in_all": round(lasted, 1)}}


def in_a_process(row: Row, arguments, cpus: list[int], scratch: Path):
    """Lets `bench.child` measure a row; gives what was measured, or the reason why not."""
    from bench.measure import Measured

    output = scratch / f"{row.name}.json"
    command = [sys.executable, "-m", "bench.child", row.name, "--scratch", str(scratch)]
    command += ["--rounds", str(arguments.rounds or row.rounds), "--cores", str(len(cpus))]
    command += ["--output", str(output), *(["--full"] if arguments.full else [])]
    environment = {**os.environ, **dict.fromkeys(THREADS, str(len(cpus)))}
    environment["PYTHONPATH"] = str(results.ROOT)
    if not row.cuda:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    limit = row.limit * (10 if arguments.full else 1)
    started = subprocess.Popen(
        command, cwd=results.ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        preexec_fn=lambda: os.sched_setaffinity(0, cpus),
    )  # fmt: skip
    try:
        _, said = started.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return f"given up after {limit} s"
    finally:
        with contextlib.suppress(ProcessLookupError):  # and whatever it has started
            os.killpg(started.pid, signal.SIGKILL)
    if started.returncode or not output.exists():
        print(said[-3000:], file=sys.stderr)
        last = (said.strip().splitlines() or ["no message"])[-1]
        return f"ended with {started.returncode}: {last}"
    return Measured(**json.loads(output.read_text()))


if __name__ == "__main__":
    main()
