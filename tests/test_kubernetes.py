"""profiles/kubernetes: a dry run, and a chain whose kubectl is a stand-in, tests/kubectl.py."""

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import drawing
import pytest
import yaml
from on_slurm import MODEL, STOPPED, has_said, slowly, went_on
from running import ROOT, SNAKEMAKE, TINY, environment, output, run

PROFILE = ROOT / "profiles" / "kubernetes"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def command(folder: Path, *wanted, files=()) -> list[str]:
    parts = [*SNAKEMAKE, "--snakefile", ROOT / "Snakefile", "--directory", folder, *wanted]
    parts += ["--workflow-profile", PROFILE, "--latency-wait", "5"]
    parts += ["--set-threads", "pretext_train=1", "--set-resources", "pretext_train:gpu=1"]
    parts += ["--configfile", TINY, *files, "--config", f"images={folder.parent / 'pictures'}"]
    return list(map(str, parts))


@pytest.fixture
def folder(tmp_path):
    drawing.write_folder(drawing.tree(40, 20, 20, draw=drawing.pattern), tmp_path / "pictures")
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_the_profile_plans_the_whole_chain(folder):
    done = run(*command(folder), "--dry-run")
    assert done.returncode == 0 and "report" in done.stdout, output(done)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder of what the stand-in for kubectl knows; its jobs are killed at the end."""
    pods, programs = tmp_path / "pods", tmp_path / "bin"
    pods.mkdir()
    programs.mkdir()
    (programs / "kubectl").symlink_to(ROOT / "tests" / "kubectl.py")
    monkeypatch.setenv("KUBECTL_FOLDER", str(pods))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    yield pods
    for path in pods.glob("*.pid"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(path.read_text()), signal.SIGKILL)


@contextlib.contextmanager
def training(folder: Path):
    """Runs the workflow up to a slow training; gives it and its log when a state is there."""
    log, env = folder.parent / "driver.log", environment(ROOT) | {"KT_SAVE_SECONDS": "0.5"}
    with open(log, "w") as file:
        wanted = command(folder, MODEL, files=[slowly(folder, 30, 0.15)])
        driver = subprocess.Popen(
            wanted, cwd=ROOT, env=env, stdout=file, stderr=file,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # not so in `&`
        )  # fmt: skip
    try:
        wait(lambda: list(folder.glob("results/state/deep-s0-*/**/*.state")), 200, log)
        yield driver, log
    finally:
        if driver.poll() is None:
            driver.kill()


def wait(until, seconds: float, log: Path) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


def test_ctrl_c_takes_the_pods_away_and_the_same_command_goes_on(folder, cluster):
    with training(folder) as (driver, log):
        driver.send_signal(signal.SIGINT)
        assert driver.wait(60) != 0
        assert "Traceback" not in log.read_text()
        wait(lambda: has_said(folder, STOPPED), 30, log)
        wait(lambda: list(cluster.glob("kt-pretext-train-*.deleted")), 30, log)
    done = run(*command(folder, MODEL, files=[folder / "slow.yaml"]))
    assert done.returncode == 0 and min(went_on(folder)) > 0, output(done)


def test_a_job_whose_image_cannot_be_had_has_failed(cluster):
    (cluster / "kt-one.json").write_text("{}")
    (cluster / "kt-one.pid").write_text(str(subprocess.Popen(["sleep", "100"]).pid))
    for waits, told in (
        ("", "running"),
        ("ContainerCreating", "running"),
        ("ImagePullBackOff", "failed"),
    ):
        (cluster / "kt-one.waiting").write_text(waits)
        done = run(PROFILE / "status.sh", "job.batch/kt-one")
        assert done.stdout.strip() == told
    assert "ImagePullBackOff" in done.stderr and (cluster / "kt-one.deleted").exists()
    assert run(PROFILE / "status.sh", "job.batch/kt-one").stdout.strip() == "failed"  # it is gone


def test_jobs_run_as_pods_and_an_evicted_one_goes_on_with_more_memory(folder, cluster):
    pods = cluster
    with training(folder) as (driver, log):
        (first,) = pods.glob("kt-pretext-train-*.pid")
        os.kill(int(first.read_text()), signal.SIGTERM)  # as kubelet does: the first process alone
        wait(lambda: has_said(folder, STOPPED), 30, log)
        assert driver.wait(200) == 0, log.read_text()
    assert min(went_on(folder)) > 0 and (folder / MODEL).exists()
    ended = [path.read_text() for path in sorted(pods.glob("*.code"))]
    assert sorted(ended)[:2] == ["0", "0"] and len(ended) == 3
    site = yaml.safe_load((PROFILE / "job.yaml").read_text())["spec"]["template"]["spec"]
    asked = []
    for path in sorted(pods.glob("kt-pretext-train-*.json"), key=lambda one: one.stat().st_mtime):
        manifest = json.loads(path.read_text())
        pod = manifest["spec"]["template"]["spec"]
        (job,) = pod["containers"]
        assert manifest["spec"]["template"]["spec"]["activeDeadlineSeconds"] == 1440 * 60
        assert pod["volumes"] == site["volumes"] and job["image"] == site["containers"][0]["image"]
        assert job["workingDir"] == str(folder)
        assert job["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert job["resources"]["requests"]["cpu"] == "1"
        asked.append(int(job["resources"]["requests"]["memory"].removesuffix("M")))
    assert len(asked) == 2 and asked[1] == 2 * asked[0]
