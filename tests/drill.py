"""The kill drill: a workflow killed at random moments must end as if nothing had happened.

    python tests/drill.py --minutes 10 --seed 0        (make drill MINUTES=10 SEED=0)

Once without a kill, for comparison; then again and again from an empty folder, in two ways side by
side until the time is used up: the workflow, its whole process group killed with SIGKILL and
started again until it is finished; and its steps one by one, each killed at random moments of its
usual duration before it may finish. Every artefact is then compared with those of the first run.
Prints one line; ends with 1 if anything differs, is missing or left over.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import drawing
import h5py
import numpy as np
from running import ROOT, command, environment, overlay

from kt.core import files, table

# Trainings long enough to be killed on their way, and a state after every few steps.
LONGER = {
    "teachers": {"deep": {"training": {"epochs": 40}}, "own": {"training": {"epochs": 20}}},
    "targets": {"small": {"training": {"epochs": 60}}},
}
TIMED = {"seconds", "validation_seconds", "images_per_second", "host", "time", "provenance"}
TIMED |= {files.CHECKSUM}  # which is of these, too
SOON = 3.0  # mean seconds until a group is killed; more where the machine is slow
STATES = {"KT_SAVE_SECONDS": "0.2"}  # between the resume states of a training


@dataclasses.dataclass
class Tally:
    """What a drill counted, and what it found to differ."""

    group_kills: int = 0
    step_kills: int = 0
    restarts: int = 0
    runs: int = 0
    compared: int = 0
    differences: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        """Gives the line that a drill ends with."""
        return (
            f"drill: {self.group_kills + self.step_kills} kills ({self.group_kills} of the whole "
            f"group, {self.step_kills} of a step), {self.restarts} restarts, {self.runs} runs, "
            f"{self.compared} artefacts compared, {len(self.differences)} differences"
        )


class Drill:
    """A drill in a folder of its own: the pictures, the run without kills, the killed ones."""

    def __init__(self, folder: Path, seed: int, files=(), pictures=(40, 20, 20)):
        """Draws the pictures; `files` are overlays on tests/tiny.yaml."""
        self.folder, self.seed, self.files, self.tally = folder, seed, files, Tally()
        self.lock, self.living = threading.Lock(), set()
        tree = drawing.tree(*pictures, draw=drawing.pattern)
        self.pictures = drawing.write_folder(tree, folder / "pictures")
        self.whole = folder / "whole"

    def prepare(self) -> None:
        """Runs everything once, without a kill, and learns the commands of the steps."""
        begun = time.monotonic()
        self.finish(self.whole)
        self.mean = max(SOON, (time.monotonic() - begun) / 14)
        shown = subprocess.run(
            command(self.folder / "plan", self.pictures, "-n", "-p", files=self.files),
            cwd=ROOT, env=environment(ROOT), capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        self.steps = re.findall(r"^Shell command: (python .*)$", shown, re.MULTILINE)
        assert self.steps, shown
        self.expected = contents(self.whole)

    def start(self, line: list[str], cwd: Path, log: Path, **more) -> subprocess.Popen:
        """Starts a command in a session of its own."""
        with open(log, "a") as file, self.lock:
            process = subprocess.Popen(
                line, cwd=cwd, env=environment(cwd) | STATES | more, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
            self.living.add(process.pid)
            return process

    def workflow(self, folder: Path) -> subprocess.Popen:
        """Starts the workflow."""
        line = command(folder, self.pictures, files=self.files)
        return self.start(line, ROOT, folder.with_suffix(".log"))

    def finish(self, folder: Path) -> None:
        """Runs the workflow to its end."""
        log = folder.with_suffix(".log")
        if self.workflow(folder).wait():
            raise SystemExit(f"the workflow failed by itself:\n{log.read_text()[-5000:]}")

    # ------------------------------------------------------------------------ the two ways

    def kill_groups(self, folder: Path, random, end: float) -> None:
        """Runs the workflow, killing its group again and again, until it is finished."""
        for turn in itertools.count():
            process = self.workflow(folder)
            self.tally_restart(turn)
            # Mostly soon, now and then late enough for some steps to end.
            moment = random.exponential(self.mean) if time.monotonic() < end else None
            if not self.killed(process, moment, folder.with_suffix(".log")):
                break
            self.count("group_kills")
        self.compare(folder)

    def kill_steps(self, folder: Path, random, end: float, kills: int = 6) -> None:
        """Runs the steps one by one, each killed a few times on its way, until all are finished."""
        folder.mkdir()
        log = folder.with_suffix(".log")
        for step in self.steps:
            line = ["bash", "-c", f"exec {step}"]
            usual = self.usual(step)
            turns = random.integers(0, kills + 1)
            for turn in range(turns):
                process = self.step(line, folder, log)
                self.tally_restart(turn)
                moment = random.uniform(0, usual) if time.monotonic() < end else None
                if not self.killed(process, moment, log):
                    break
                self.count("step_kills")
            else:
                process = self.step(line, folder, log)
                self.tally_restart(turns)
                self.killed(process, None, log)
        self.compare(folder)

    def step(self, line: list[str], folder: Path, log: Path) -> subprocess.Popen:
        return self.start(line, folder, log, KT_WORKFLOW="1", PYTHONPATH=str(ROOT))

    def usual(self, step: str) -> float:
        """Gives the seconds that a step took without kills, from its benchmark."""
        log = re.search(r"--log (\S+)", step)[1].strip("'")
        bench = self.whole / log.replace("/logs/", "/benchmarks/").replace(".log", ".tsv")
        return float(bench.read_text().splitlines()[1].split()[0])

    def killed(self, process: subprocess.Popen, moment: float | None, log: Path) -> bool:
        """Kills a process's whole session after so many seconds, unless it ends before.

        Returns:
            Whether it was killed; if not it has ended well.
        """
        try:
            code = process.wait(moment)
        except subprocess.TimeoutExpired:
            kill_session(process.pid)
            process.wait()
            self.living.discard(process.pid)
            return True
        if code:
            raise SystemExit(f"ended with {code} by itself:\n{log.read_text()[-5000:]}")
        if left := session(process.pid):
            raise SystemExit(f"processes are left over: {left}")
        return False

    def tally_restart(self, kills: int) -> None:
        """Counts a start that follows a kill."""
        if kills:
            self.count("restarts")

    def count(self, name: str) -> None:
        with self.lock:
            setattr(self.tally, name, getattr(self.tally, name) + 1)

    def compare(self, folder: Path) -> None:
        """Compares all artefacts of a finished run with those of the run without kills."""
        found, named = contents(folder), folder.name
        faults = [f"{named}: {path} is missing" for path in self.expected.keys() - found.keys()]
        faults += [f"{named}: {path} is left over" for path in found.keys() - self.expected.keys()]
        faults += [
            f"{named}: {path} differs"
            for path in self.expected.keys() & found.keys()
            if found[path] != self.expected[path]
        ]
        with self.lock:
            self.tally.runs += 1
            self.tally.compared += len(self.expected)
            self.tally.differences += sorted(faults)
            if not faults:
                shutil.rmtree(folder)
            print(f"{named}: {len(faults)} differences; so far {self.tally}", flush=True)

    def run(self, seconds: float) -> None:
        """Does both ways side by side until the time is used up."""
        end = time.monotonic() + seconds
        faults: list[BaseException] = []

        def chain(way, name: str, number: int) -> None:
            random = np.random.default_rng([self.seed, number])
            try:
                for index in range(10**6):
                    if time.monotonic() > end or faults:
                        return
                    way(self.folder / f"{name}-{index}", random, end)
            except BaseException as error:  # told by the main thread
                faults.append(error)

        chains = [
            threading.Thread(target=chain, args=(self.kill_groups, "workflow", 0)),
            threading.Thread(target=chain, args=(self.kill_steps, "steps", 1)),
        ]
        for thread in chains:
            thread.start()
        for thread in chains:
            thread.join()
        if faults:
            raise faults[0]

    def __enter__(self):
        """Begins a drill that leaves no process behind, however it ends."""
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        return self

    def __exit__(self, *exception) -> None:
        """Kills what still lives."""
        for leader in list(self.living):
            kill_session(leader)


# ---------------------------------------------------------------------------- processes


def session(leader: int) -> list[int]:
    """Lists the living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] not in "ZX":
            found.append(int(stat.parent.name))
    return found


def kill_session(leader: int) -> None:
    """Kills all processes of a session with SIGKILL, and makes sure that none is left."""
    for _ in range(500):
        left = session(leader)
        if not left:
            return
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.01)
    raise SystemExit(f"processes outlive SIGKILL: {session(leader)}")


# ---------------------------------------------------------------------------- artefacts


def contents(folder: Path) -> dict[str, object]:
    """Gives what stands in every file below `results`, but for times; logs are not compared."""
    root = folder / "results"
    return {
        str(path.relative_to(root)): content(path)
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.relative_to(root).parts[0] not in ("logs", "benchmarks")
    }


def content(path: Path):
    """Gives what an artefact says: digests of arrays and weights, values without times."""
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            assert file.attrs["complete"], path
            arrays = {name: values(file[name][...]) for name in sorted(file)}
            return arrays, table.text(file, "config")
    if path.suffix in (".json", ".jsonl"):
        return [untimed(json.loads(line)) for line in documents(path)]
    if path.name == "index.html":  # but for the column and the chart of seconds
        page = re.sub(r'<section id="costs">.*?</section>', "", path.read_text(), flags=re.S)
        return re.sub(r"(<td>\d+</td>)<td>[^<]*</td>", r"\1", page)
    if path.name == "summary.txt":  # but for the column of seconds, which stands last
        text = re.sub(r"(?m)^(\w+ .* \d+) +\d+$", r"\1", path.read_text())
        return re.sub(r"\s+", " ", text)
    return table.digest(path)


def values(array: np.ndarray) -> str:
    """Gives type, shape and a digest of the bytes of an array."""
    content = np.ascontiguousarray(array).tobytes()
    return f"{array.dtype} {array.shape} {hashlib.sha256(content).hexdigest()}"


def documents(path: Path) -> list[str]:
    """Gives the JSON texts of a file: one, or one a line."""
    text = path.read_text()
    return [text] if path.suffix == ".json" else text.splitlines()


def untimed(value):
    """Takes what depends on the clock and the machine out of a JSON value."""
    if isinstance(value, dict):
        return {key: untimed(inner) for key, inner in value.items() if key not in TIMED}
    return [untimed(inner) for inner in value] if isinstance(value, list) else value


def main() -> None:
    """Reads the options, drills, prints the line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=10, help="of kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="drill-") as place:
        folder = Path(place)
        drill = Drill(folder, arguments.seed, [overlay(folder / "x.yaml", LONGER)])
        with drill:
            drill.prepare()
            print(f"{len(drill.expected)} artefacts of {len(drill.steps)} steps", flush=True)
            drill.run(60 * arguments.minutes)
    for difference in drill.tally.differences:
        print(difference)
    print(drill.tally)
    sys.exit(bool(drill.tally.differences))


if __name__ == "__main__":
    main()
