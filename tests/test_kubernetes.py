"""profiles/kubernetes: a dry run, and a chain whose kubectl is a stand-in, tests/kubectl.py."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import drawing
import pytest
import yaml
from running import ROOT, SNAKEMAKE, TINY, environment, output, run
from test_slurm import MODEL, said, slowly, stopped, went_on

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


def test_jobs_run_as_pods_and_an_evicted_one_goes_on_with_more_memory(folder, tmp_path):
    pods, programs = tmp_path / "pods", tmp_path / "bin"
    pods.mkdir()
    programs.mkdir()
    (programs / "kubectl").symlink_to(ROOT / "tests" / "kubectl.py")
    env = environment(ROOT)
    env |= {"KUBECTL_FOLDER": str(pods), "KT_SAVE_SECONDS": "0.5"}
    env["PATH"] = f"{programs}:{env['PATH']}"
    wanted = command(folder, MODEL, files=[slowly(folder, 30, 0.15)])
    log = tmp_path / "driver.log"
    with open(log, "w") as file:
        driver = subprocess.Popen(wanted, cwd=ROOT, env=env, stdout=file, stderr=file)
    try:
        until = time.monotonic() + 200
        while not list(folder.glob("results/state/deep-s0-*/**/*.state")):
            assert driver.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        (first,) = pods.glob("kt-pretext-train-*.pid")
        os.kill(int(first.read_text()), signal.SIGTERM)  # as kubelet does: the first process alone
        until = time.monotonic() + 30
        while not stopped(folder):
            assert time.monotonic() < until, f"killed untold: {said(folder)}"
            time.sleep(0.1)
        assert driver.wait(200) == 0, log.read_text()
    finally:
        for process in [driver.pid, *(int(path.read_text()) for path in pods.glob("*.pid"))]:
            if process != driver.pid or driver.poll() is None:
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    pass
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
