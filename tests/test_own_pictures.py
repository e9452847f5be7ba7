"""Own pictures without labels: hostile names, archives, a new k, and runs that are killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time

import drawing
import h5py
import pytest
from running import ROOT, command, environment, jobs, output, overlay, run, workflow

import kt
from kt.core import table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NAME = 'my {0} {pictures}\' "$(touch pwned)" `touch pwned`; touch pwned &'
EPOCHS = 100  # of three steps each: long enough to be killed in the middle
# One teacher and what follows from it.
BRIEF = {
    "teachers": {name: None for name in ("own", "longer", "untrained", "random", "hog")}
    | {"deep": {"training": {"epochs": EPOCHS}}},
    "targets": {"small": {"supervised": False, "training": {"epochs": EPOCHS}}},
    "evaluations": {"finetune": None},
}
POOL = "results/data/images/train-unlabelled.h5"
TEACHER = "results/teachers/deep/s0/model.safetensors"
TARGET = "results/targets/small/deep/block2/k4/s0"


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with pictures of no known class, in a folder of a hostile name, and the overlay."""
    folder = tmp_path_factory.mktemp("own")
    files = drawing.tree(40, 0, 0, draw=drawing.pattern).values()
    files = {f"day {number % 3}/{number}.png": payload for number, payload in enumerate(files)}
    drawing.write_folder(files, folder / NAME)
    overlay(folder / "brief.yaml", BRIEF)
    return folder


@pytest.fixture(scope="session")
def done(place):
    """The finished run, by a relative path from where the pictures are."""
    finished = workflow(place / "run", f"./{NAME}", files=["brief.yaml"], cwd=place)
    assert finished.returncode == 0, output(finished)
    return place / "run"


def again(place, folder, *options, **more):
    return workflow(folder, place / NAME, *options, files=[place / "brief.yaml"], **more)


def metrics(folder):
    return json.loads((folder / "results/report/metrics.json").read_text())


def test_pictures_without_labels_end_with_a_backbone_and_no_claim_about_accuracy(done):
    import torch

    backbone = kt.load_backbone(done / TARGET / "model.safetensors")
    assert backbone.features(torch.zeros(2, 3, 28, 28, dtype=torch.uint8)).shape == (2, 16)
    assert {record["metric"] for record in metrics(done)} == {"view_nmi"}
    for name in ("index.html", "summary.txt"):
        text = (done / "results/report" / name).read_text()
        assert "accuracy cannot be known" in " ".join(text.split()), name
        assert not re.search(r"top-1|[0-9] points|transfer beats (direct|random)", text), name


def test_a_hostile_folder_name_does_nothing_but_name_the_folder(place, done):
    assert not list(place.rglob("pwned"))
    assert not (ROOT / "pwned").exists()
    report = json.loads((done / "results/data/images/report.json").read_text())
    assert report["splits"]["train-unlabelled"]["images"] == 120
    assert report["origin"]["folder"] == str(place / NAME)


def test_a_zip_gives_the_same_images_as_the_folder(place, done, tmp_path):
    files = {str(path.relative_to(place / NAME)): path.read_bytes()
             for path in sorted((place / NAME).rglob("*.png"))}  # fmt: skip
    archive = drawing.write_zip(files, tmp_path / "my pictures.zip")
    packed = workflow(tmp_path / "run", archive, POOL)
    assert packed.returncode == 0, output(packed)
    assert table.digest(tmp_path / "run" / POOL) == table.digest(done / POOL)


def test_a_new_k_runs_only_what_it_needs_and_leaves_the_rest_untouched(place, done, tmp_path):
    copy = shutil.copytree(done, tmp_path / "copy")
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("k4*/**/*")}
    finished = again(place, copy, config=["clusters=[4,5]"])
    assert jobs(finished) == [
        "cluster deep block2 k=5",
        "evaluate small/deep/block2/k5 frozen",
        "pseudo_labels deep block2 k=5 for images train-unlabelled",
        "report",
        "target_train small deep/block2/k5 s0",
    ]
    assert {record["k"] for record in metrics(copy)} == {4, 5}
    assert before and before == {path: path.stat().st_mtime_ns for path in before}


# ---------------------------------------------------------------------------- killed


def start(arguments, cwd, log):
    """Starts a command in a process group of its own, both streams into a file."""
    return subprocess.Popen(
        [str(part) for part in arguments], cwd=cwd, env=environment(cwd), start_new_session=True,
        stdout=open(log, "w"), stderr=subprocess.STDOUT,
    )  # fmt: skip


def wait_for(pattern, log, process):
    """Waits until a file holds a pattern."""
    for _ in range(3000):
        if re.search(pattern, log.read_text()):
            return
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    raise AssertionError(f"{pattern} not in {log.read_text()}")


def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(place, done, tmp_path):
    folder, log = tmp_path / "killed", tmp_path / "log"
    process = start(command(folder, place / NAME, files=[place / "brief.yaml"]), ROOT, log)
    wait_for(f"deep s0: 114 images, {EPOCHS} epochs", log, process)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / TEACHER).exists()
    for path in (folder / "results").rglob("[!.]*.h5"):
        with h5py.File(path) as file:
            assert file.attrs["complete"], path
    finished = again(place, folder)
    assert finished.returncode == 0, output(finished)
    assert "ingest images" not in jobs(finished)
    assert metrics(folder) == metrics(done)


def test_a_living_run_keeps_its_lock(place, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    process = start(command(folder, place / NAME, files=[place / "brief.yaml"]), ROOT, log)
    try:
        wait_for(r"Job \d+: pretext_train", log, process)
        second = again(place, folder)
        assert second.returncode == 1 and "locked" in output(second), output(second)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_stopped_training_keeps_its_state_and_goes_on_to_the_same_weights(place, done, tmp_path):
    shown = output(again(place, done, "-n", "-p", "--force", f"{TARGET}/model.json"))
    (by_hand,) = re.findall(r"^Shell command: (.*)$", shown, re.MULTILINE)
    options = f"--output {tmp_path}/model --state {tmp_path}/state --log {tmp_path}/log.txt"
    line = f"exec {by_hand} {options}"
    log = tmp_path / "printed"
    process = start(["bash", "-c", line], done, log)
    wait_for(f"{EPOCHS} epochs", log, process)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75, log.read_text()
    assert "run it again to go on" in log.read_text()
    assert list((tmp_path / "state").glob("*.state"))
    assert not (tmp_path / "model/model.json").exists()
    finished = run("bash", "-c", line, cwd=done)
    assert finished.returncode == 0 and "goes on at step" in output(finished), output(finished)
    assert not (tmp_path / "state").exists()
    mine, whole = (
        json.loads((at / "model.json").read_text()) for at in (tmp_path / "model", done / TARGET)
    )
    assert mine["digest"] == whole["digest"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_and_the_same_command_again_go_on_in_the_middle_of_an_epoch(
    place, done, tmp_path, number
):
    folder, log = tmp_path / "stopped", tmp_path / "log"
    asked = command(folder, place / NAME, TEACHER, files=[place / "brief.yaml"])
    process = start(asked, ROOT, log)
    wait_for(f"deep s0: 114 images, {EPOCHS} epochs", log, process)
    time.sleep(0.2)
    os.killpg(process.pid, number)  # as the terminal does for Ctrl-C, and a scheduler at its limit
    code = process.wait(60)
    stopped = re.search(r"stopped at step (\d+); run it again to go on", log.read_text())
    assert stopped and "Traceback" not in log.read_text(), log.read_text()
    assert code == 75 if number == signal.SIGTERM else code, log.read_text()
    finished = run(*asked)
    assert finished.returncode == 0, output(finished)
    assert f"deep s0: goes on at step {stopped[1]} of {3 * EPOCHS}" in output(finished)
    assert (folder / TEACHER).read_bytes() == (done / TEACHER).read_bytes()
