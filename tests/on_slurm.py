"""Runs of the workflow on the Slurm of tests/slurm.py, and fixtures of the files that test them.

A file names this one in `pytest_plugins`, and then has a site of its own: files run side by side.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import ClassVar

import drawing
import numpy as np
import pytest
import slurm
from running import ROOT, SNAKEMAKE, TINY, environment, missing, overlay
from safetensors.numpy import load_file

MODEL = "results/teachers/deep/s0/model.safetensors"
STOPPED = "run it again to go on"  # what a training says that a signal ended, with 75
# So that a test need not wait for what a cluster with many jobs spares its controller.
QUICK = ["--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "3"]
QUICK += ["--slurm-no-account", "--latency-wait", "20", "--set-threads", "pretext_train=1"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if lacking := slurm.install():
        missing(f"NO SLURM ON THIS HOST, nothing of it was tested: {lacking}")
    # Short: the path of a socket has at most 107 bytes.
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"kt-slurm-{os.getpid()}"
    with slurm.cluster(folder) as found:
        try:
            yield found
        finally:
            for process in Driver.started:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    tree = drawing.tree(40, 20, 20, draw=drawing.pattern)
    return drawing.write_folder(tree, tmp_path_factory.mktemp("drawn") / "pictures")


@pytest.fixture(scope="module")
def ready(site, pictures, tmp_path_factory):
    """A folder whose images are packed, and the model trained there without any disturbance."""
    folder = tmp_path_factory.mktemp("ready")
    begin(site, folder, pictures, "results/data/images/report.json").done()
    calm = copied(folder, tmp_path_factory.mktemp("calm") / "run")
    begin(site, calm, pictures, MODEL, files=[slowly(calm, 30, 0.05)]).done()
    return folder, load_file(calm / MODEL)


class Driver:
    """A workflow that runs on the site; none outlives the tests."""

    started: ClassVar[list[subprocess.Popen]] = []

    def __init__(self, site, command: list[str], env: dict[str, str], log: Path):
        self.site, self.log = site, log
        with open(log, "a") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # not so in `&`
            )  # fmt: skip
        self.started.append(self.process)

    def end(self, seconds: float = 700) -> int:
        """Waits for the end; gives the exit code."""
        return self.process.wait(seconds)

    def jobs(self) -> list[dict[str, str]]:
        """Gives its jobs, which have the run's id as name, in the order of their ids."""
        (run,) = re.findall(r"^SLURM run ID: (\S+)", self.log.read_text(), re.M)[-1:] or [None]
        return sorted((j for j in self.site.jobs() if j["name"] == run), key=lambda j: int(j["id"]))

    def done(self) -> str:
        """Waits for the end, which must be good; gives all that was printed."""
        code, text = self.end(), self.log.read_text()
        assert code == 0, text[-5000:]
        return text


def begin(
    site, folder: Path, pictures, *wanted, files=(), config=(), profile="slurm", options=QUICK
):
    """Starts the workflow with a profile of the project, for some files or everything."""
    user = environment(ROOT)
    path = os.pathsep.join([site.environment["PATH"], user["PATH"]])
    python = str(Path(SNAKEMAKE[0]).parent)
    more = {"PATH": python + os.pathsep + path, "SLURM_CONF": site.environment["SLURM_CONF"]}
    more |= {"KT_SAVE_SECONDS": "0.5", "KT_DEVICE": "cpu"}  # its GPUs are there in name only
    command = [*SNAKEMAKE, "--snakefile", ROOT / "Snakefile", "--directory", folder, *wanted]
    command += ["--workflow-profile", ROOT / "profiles" / profile, *options]
    command += ["--configfile", TINY, *files, "--config", f"images={pictures}", *config]
    folder.mkdir(exist_ok=True)
    (folder / "printed.log").unlink(missing_ok=True)
    return Driver(site, list(map(str, command)), {**user, **more}, folder / "printed.log")


def slowly(folder: Path, epochs: int, seconds: float) -> Path:
    """Gives an overlay under which the teacher `deep` takes its time."""
    network = {"name": "file", "path": str(ROOT / "tests" / "slow_network.py"), "function": "slow"}
    network |= {"options": {"seconds": seconds}, "digest": None}
    # Steps that rounding does not blow up, since two processes round otherwise than one.
    training = {"epochs": epochs, "batch": 32, "precision": "float32"}
    training |= {"optimiser": "sgd", "lr": 0.02}
    deep = {"backbone": network, "training": training, "layers": ["one"]}
    # `untrained` is like it, but for its layers, which tests/tiny.yaml names.
    return overlay(folder / "slow.yaml", {"teachers": {"deep": deep, "untrained": None}})


def copied(source: Path, target: Path) -> Path:
    subprocess.run(["cp", "-a", source, target], check=True)
    return target


def said(folder: Path) -> str:
    return (folder / "results/logs/pretext_train/deep-s0.log").read_text()


def under_way(driver: Driver, folder: Path) -> dict[str, str]:
    """Waits until the training has left a state; gives its job."""
    states = folder / "results/state"
    driver.site.wait(lambda: [*states.glob("deep-s0-*/**/*.state")])
    (job,) = driver.jobs()
    assert job["state"] == "RUNNING" and "pretext_train" in job["comment"]
    return job


@contextlib.contextmanager
def held(site, job: dict[str, str], folder: Path):
    """Holds the training of a job until another attempt waits for it, however late that starts."""
    found = site.processes(f"SLURM_JOB_ID={job['id']}").items()
    training = [process for process, line in found if " -m kt.pretext_train " in line]
    assert training, found
    waits = rf"waiting for process \d+ on .* \(Slurm job {job['id']}\)"
    for process in training:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
        site.wait(lambda: has_said(folder, waits))
    finally:
        for process in training:
            os.kill(process, signal.SIGCONT)


def went_on(folder: Path) -> list[int]:
    """Gives the steps at which the training went on."""
    return list(map(int, re.findall(r"goes on at step (\d+) of", said(folder))))


def has_said(folder: Path, pattern: str) -> bool:
    """Says whether the training has said this yet; the next attempt takes its log away."""
    with contextlib.suppress(FileNotFoundError):
        return re.search(pattern, said(folder)) is not None
    return False


def same(folder: Path, expected) -> bool:
    """Says whether the weights are those of the training without any disturbance."""
    found = load_file(folder / MODEL)
    return found.keys() == expected.keys() and all(
        np.array_equal(found[name], expected[name]) for name in expected
    )


@pytest.fixture
def running(site, ready, pictures, tmp_path):
    """A training under way: its folder, driver, job, and how to start the driver again."""
    folder = copied(ready[0], tmp_path / "run")
    files = [slowly(folder, 30, 0.15)]  # 30 x 3 steps: 14 s

    def start():
        return begin(site, folder, pictures, MODEL, files=files)

    driver = start()
    return folder, driver, under_way(driver, folder), start
