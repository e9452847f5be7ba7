"""Fuzzing: damaged files and odd configurations must be refused or read, never crash or hang.

    python tests/fuzz.py --minutes 5 --seed 0          (make fuzz MINUTES=5 SEED=0)

Each input is a function of seed, kind and number. They are read in a process of its own, which is
started again where a C library brings it down. Prints the failures, then one line; ends with 1 if
there is any. One input again: python tests/fuzz.py --seed 0 --only table:17
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np

SECONDS = 10.0  # that one input may take
PLANNING = 6  # times as long: Snakemake is started
SELDOM = 20  # of so many rounds one has a plan, too, which takes as long as a hundred others
MEMORY = 2 << 30  # bytes that reading may add
KINDS = ("picture", "table", "model", "state", "archive", "yaml", "config", "classes")
KINDS += ("json", "clustering", "weights", "plan")
FORKS = multiprocessing.get_context("forkserver")


def mutant(samples: list, kind: str, seed: int, number: int):
    """Gives a whole file and the damaged one that a number stands for."""
    import mutants

    random = np.random.default_rng([seed, KINDS.index(kind), number])
    whole, other = (samples[random.integers(len(samples))] for _ in range(2))
    if kind in ("config", "plan"):
        return whole, random.bytes(8)
    return whole, mutants.damage(content(whole), content(other), random)


def content(sample) -> bytes:
    """Gives the bytes of a sample: itself, or with its name, or one of several files by name."""
    if isinstance(sample, bytes):
        return sample
    name, inner = sample
    return inner if isinstance(inner, bytes) else inner[name]


def serve(place: str, seed: int, link) -> None:
    """Reads the inputs that it is asked for, each time saying `refused`, `accepted` or a fault."""
    import mutants

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff and others are talkative
    os.environ.pop("KT_WORKFLOW", None)
    folder = Path(place)
    os.chdir(folder)
    samples = mutants.corpus(folder)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    link.send("ready")
    while True:
        kind, number = link.recv()
        try:
            whole, damaged = mutant(samples[kind], kind, seed, number)
            said = mutants.CHECKS[kind](whole, damaged, folder)
        except BaseException:
            said = traceback.format_exc()
        link.send(said)


class Fuzzer:
    """Counts outcomes by kind; holds the process that reads."""

    def __init__(self, seed: int):
        """Starts nothing yet."""
        self.seed, self.process = seed, None
        self.counts: Counter = Counter()
        self.failures: list[str] = []

    def ask(self, kind: str, number: int) -> None:
        """Has one input read."""
        if self.process is None:
            self.start()
        self.link.send((kind, number))
        said, begun = "", time.monotonic()
        try:
            seconds = SECONDS * (PLANNING if kind == "plan" else 1)
            said = self.link.recv() if self.link.poll(seconds) else "it hangs"
        except EOFError:
            self.process.join()
            said = f"the process ended with {self.process.exitcode}"
        known = said in ("refused", "accepted")
        self.counts[kind, said if known else "failed"] += 1
        if not known:
            spent = time.monotonic() - begun
            self.failures.append(f"{kind}:{number} (seed {self.seed}, {spent:.1f} s): {said}")
            self.stop()

    def start(self) -> None:
        """Starts the process that reads."""
        FORKS.set_forkserver_preload(["pytest", "mutants"])
        folder = str(Path(__file__).parent)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(folder).parent), folder])
        self.place = tempfile.TemporaryDirectory(prefix="fuzz-")
        self.link, theirs = FORKS.Pipe()
        self.process = FORKS.Process(target=serve, args=(self.place.name, self.seed, theirs))
        self.process.start()
        theirs.close()
        assert self.link.poll(120) and self.link.recv() == "ready"

    def stop(self) -> None:
        """Ends it."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.place.cleanup()
            self.process = None

    def __str__(self) -> str:
        """Gives the line that a round ends with."""
        parts = []
        for kind in KINDS:
            refused, accepted, failed = (
                self.counts[kind, said] for said in ("refused", "accepted", "failed")
            )
            parts.append(f"{kind} {refused + accepted + failed} ({refused} refused)")
        total = sum(self.counts.values())
        return f"fuzz: {total} inputs, {len(self.failures)} failures; {', '.join(parts)}"


def main() -> None:
    """Reads the options, fuzzes, prints the failures and the line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=5, help="of all kinds in turn")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    parser.add_argument("--only", help="KIND or KIND:NUMBER")
    arguments = parser.parse_args()
    fuzzer, end, number = Fuzzer(arguments.seed), time.monotonic() + 60 * arguments.minutes, 0
    only, _, single = (arguments.only or "").partition(":")
    try:
        while time.monotonic() < end:
            for kind in [only] if only else KINDS:
                if only or kind != "plan" or number % SELDOM == 0:
                    fuzzer.ask(kind, int(single or number))
            number += 1
            if single:
                break
    finally:
        fuzzer.stop()
    for failure in fuzzer.failures:
        print(failure)
    print(fuzzer)
    sys.exit(bool(fuzzer.failures))


if __name__ == "__main__":
    main()
