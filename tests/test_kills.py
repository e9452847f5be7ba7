"""Kills and signals at any moment: the old file or the new one, and exit code 75."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import crafted
import drawing
import numpy as np
import pytest
import stages
import torch
from running import ROOT, command, environment, overlay

import kt
from kt.core import ending, model, resume, step, table
from kt.core.step import DataError, Interrupted

KILLS = 25  # of each kind of artefact
CODE = Interrupted.exit_code
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with all that every step made once."""
    return stages.make(tmp_path_factory.mktemp("made"))


# ---------------------------------------------------------------------------- atomic artefacts


def write_table(folder: Path, number: int) -> None:
    with table.create(folder / "t.h5", "features", {"number": number}) as file:
        table.put(file, "features", np.full((5_000, 4), number, np.float32))
        table.put_strings(file, "keys", crafted.names(5_000))


def read_table(folder: Path) -> int:
    with table.read(folder / "t.h5", "features", {"features": 2, "keys": 1}) as file:
        numbers = np.unique(file["features"][...])
    assert len(numbers) == 1
    return int(numbers[0])


def write_text(folder: Path, number: int) -> None:
    step.write_json(folder / "t.json", {"rows": [number] * 50_000})


def read_text(folder: Path) -> int:
    (number,) = set(step.read_json(folder / "t.json")["rows"])
    return number


PLUGIN = crafted.plugin(crafted.PLAIN, widths=[64, 256])


def write_model(folder: Path, number: int) -> None:
    backbone = model.fresh(PLUGIN, 0)
    with torch.no_grad():
        for weight in backbone.parameters():
            weight.fill_(number)
    model.save(folder, backbone, PLUGIN, {"number": number})


def read_model(folder: Path) -> int:
    backbone = kt.load_backbone(folder)
    numbers = torch.cat([weight.flatten() for weight in backbone.parameters()]).unique()
    assert len(numbers) == 1 and model.describe(folder)["number"] == numbers
    return int(numbers)


def write_state(folder: Path, number: int) -> None:
    resume.save(folder, number, {"step": number, "weights": torch.full((100_000,), number)}, {})


def read_state(folder: Path) -> int:
    content = resume.newest(folder, {}, torch.device("cpu"))
    assert (content["weights"] == content["step"]).all()
    return content["step"]


ARTEFACTS = {
    "table": (write_table, read_table), "text": (write_text, read_text),
    "model": (write_model, read_model), "state": (write_state, read_state),
}  # fmt: skip


def write_on(kind: str, folder: Path, first: int, said) -> None:
    """Writes an artefact again and again, and says the number before and after each."""
    for number in range(first, first + 10**6):
        said.send(number)
        ARTEFACTS[kind][0](folder, number)
        said.send(-number)


@pytest.mark.parametrize("kind", ARTEFACTS)
def test_after_a_kill_the_old_or_the_new_artefact_stands_and_is_whole(tmp_path, kind):
    random, number = np.random.default_rng(0), 1
    ARTEFACTS[kind][0](tmp_path, number)
    refused = 0
    for _ in range(KILLS):
        receiver, sender = stages.FORKS.Pipe(duplex=False)
        child = stages.call(write_on, kind, tmp_path, number + 1, sender)
        sender.close()
        assert receiver.poll(30)
        time.sleep(random.uniform(0, 0.04))
        child.kill()
        child.join()
        begun = whole = number
        try:
            while True:
                told = receiver.recv()
                begun, whole = max(begun, told), max(whole, -told)
        except EOFError:
            pass
        try:
            number = ARTEFACTS[kind][1](tmp_path)
            assert whole <= number <= begun
        except DataError as error:  # of a model's two files one is new: no reader takes the pair
            assert kind == "model" and "altered or cut short" in str(error)
            refused, number = refused + 1, begun
            ARTEFACTS[kind][0](tmp_path, number)
    assert refused < KILLS / 2
    ARTEFACTS[kind][0](tmp_path, number + 1)
    assert kind == "state" or not list(tmp_path.glob(".*")), "what was killed is swept away"


@pytest.mark.parametrize("name", stages.STAGES)
def test_a_killed_step_leaves_whole_outputs_or_none(made, tmp_path, name):
    random = np.random.default_rng(0)
    for number in range(5):
        folder = tmp_path / str(number)
        child = stages.start(name, stages.options(name, made, folder), tmp_path / "said")
        time.sleep(random.uniform(0, 0.25))
        child.kill()
        child.join()
        for path in folder.rglob("[!.]*"):
            if ".data.ingest" in path.parts:  # its state, which the next run checks
                continue
            where = made / path.relative_to(folder)
            if path.suffix == ".h5":
                assert table.digest(path) == table.digest(where)
            elif path.suffix in (".json", ".jsonl"):
                [json.loads(line) for line in path.read_text().split("\n\n")]
            elif path.suffix == ".safetensors":
                assert path.read_bytes() == where.read_bytes()


# ---------------------------------------------------------------------------- signals


def wait_for(words: str, said: Path, child) -> None:
    """Waits until a step has said some words."""
    for _ in range(3000):
        if said.exists() and words in said.read_text():
            return
        assert child.is_alive(), said.read_text()
        time.sleep(0.01)
    raise AssertionError(said.read_text())


def check_stopped(child, said: Path, folder: Path) -> str:
    """Checks that a step ended with 75 and left nothing half made; gives what it said."""
    child.join(20)
    text = said.read_text()
    assert child.exitcode == CODE, text
    assert "Traceback" not in text and "Exception ignored" not in text, text
    assert not [path for path in stages.digests(folder) if path.endswith(".tmp")]
    return text


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("name", stages.STAGES)
def test_a_signal_during_a_save_ends_a_step_with_75_and_nothing_half_made(
    made, tmp_path, name, number
):
    said, folder = tmp_path / "said", tmp_path / "out"
    child = stages.start(name, stages.options(name, made, folder), said, stages.dawdle)
    # A training that has made its last step finishes; so wait for what comes after its log.
    wait_for("syncing\n" * (1 + (name in stages.TRAININGS)), said, child)
    os.kill(child.pid, getattr(signal, number))
    assert number in check_stopped(child, said, folder)
    assert not [path for path in stages.digests(folder) if path.endswith((".h5", "json"))]


@pytest.mark.parametrize("name", stages.STAGES)
def test_a_signal_at_any_moment_leaves_no_traceback_and_nothing_half_made(made, tmp_path, name):
    random = np.random.default_rng(stages.STAGES.index(name))
    for attempt in range(4):
        folder, said = tmp_path / str(attempt), tmp_path / f"said {attempt}"
        child = stages.start(name, stages.options(name, made, folder, epochs=50), said)
        wait_for("settings", said, child)
        time.sleep(random.uniform(0, 0.06))
        child.terminate()
        child.join(20)
        if child.exitcode:  # else it was quicker
            check_stopped(child, said, folder)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("name", stages.TRAININGS)
def test_a_signal_in_a_training_writes_its_state(made, tmp_path, name, number):
    said, folder = tmp_path / "said", tmp_path / "out"
    options = [*stages.options(name, made, folder, epochs=5000), "--state", f"{tmp_path}/state"]
    child = stages.start(name, options, said)
    wait_for('"epoch"', said, child)
    os.kill(child.pid, getattr(signal, number))
    assert "run it again to go on" in check_stopped(child, said, folder)
    assert len(list((tmp_path / "state").glob("*.state"))) == 1


def save_slowly() -> None:
    def save(*_):
        step.log.info("saving")
        time.sleep(8)

    resume.save = save


@pytest.mark.parametrize("at_once", [True, False])
def test_a_second_signal_ends_a_training_while_it_saves_but_an_echo_of_the_first_does_not(
    made, tmp_path, at_once
):
    said = tmp_path / "said"
    options = stages.options("pretext_train", made, tmp_path / "out", epochs=5000)
    options += ["--state", str(tmp_path / "state")]
    child = stages.start("pretext_train", options, said, save_slowly)
    wait_for('"epoch"', said, child)
    child.terminate()
    time.sleep(0.1)
    os.kill(child.pid, signal.SIGUSR1)  # schedulers and launchers say it twice
    wait_for("saving", said, child)
    begun = time.monotonic()
    if at_once:
        time.sleep(ending.ECHO + 0.2)
        child.terminate()
    child.join(20)
    assert child.exitcode == CODE, said.read_text()
    assert (time.monotonic() - begun < 5) == at_once
    assert ("run it again to go on" in said.read_text()) != at_once


def test_a_signal_that_came_too_late_is_left_to_the_next_training():
    with ending.Flag() as event:
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Interrupted), ending.Flag() as event:
        assert event.is_set()
        raise Interrupted("stopped")
    with ending.Flag() as event:
        assert not event.is_set()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_libraries_are_loaded_ends_a_program_with_75(made, tmp_path, number):
    command = [sys.executable, "-X", "importtime", "-m", "kt.features"]
    command += stages.options("features", made, tmp_path / "out")
    started = subprocess.Popen(
        command, cwd=ROOT, env=environment(ROOT), stderr=subprocess.PIPE, text=True
    )
    loaded = iter(started.stderr.readline, "")
    assert any("torch." in line for line in loaded), "nothing was loaded"
    started.send_signal(getattr(signal, number))
    said = started.communicate(timeout=30)[1]
    assert started.returncode == CODE, said
    assert "Traceback" not in said and "error: stopped by" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1"])
def test_a_job_hands_on_the_signal_that_its_snakemake_alone_gets(tmp_path, number):
    pictures = drawing.write_folder(drawing.tree(40, 4, 4), tmp_path / "pictures")
    wanted, folder = "results/teachers/deep/s0/model.safetensors", tmp_path / "run"
    long = overlay(tmp_path / "long.yaml", {"teachers": {"deep": {"training": {"epochs": 10000}}}})
    words = command(folder, pictures, "--mode", "remote", wanted, files=[long])  # as in a job
    env = {**environment(ROOT), "KT_SAVE_SECONDS": "0.1"}
    job = subprocess.Popen(
        words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        until = time.monotonic() + 100
        while not list(folder.glob("results/state/deep-s0-*/**/*.state")):
            assert job.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        job.send_signal(getattr(signal, number))
        printed, _ = job.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    assert "run it again to go on" in printed and f"exit status {CODE}" in printed, printed


STEP = """
import os, signal, sys, time
told = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: told.append(time.monotonic()))
open("begun", "w").close()
while not told or time.monotonic() < told[0] + 2:  # it saves its state
    time.sleep(0.05)
open("saved", "w").close()
sys.exit(75)
"""
KUBERNETES = runpy.run_path(str(ROOT / "profiles" / "kubernetes" / "submit.py"))["COMMAND"]
GENERIC = (ROOT / "profiles" / "cluster-generic" / "job.sh").read_text()


@pytest.mark.parametrize("profile", ["cluster-generic", "kubernetes"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_shell_that_comes_first_hands_signals_on_and_waits(tmp_path, profile, times):
    (tmp_path / "step.py").write_text(STEP)
    begin = f"cd {tmp_path} && sh -c 'exec {sys.executable} step.py'"
    text = GENERIC if profile == "cluster-generic" else "{exec_job}"
    (tmp_path / "job").write_text(text.format(properties="{}", exec_job=begin))
    first = ["sh", "-c", KUBERNETES] if profile == "kubernetes" else ["sh"]
    job = subprocess.Popen([*first, tmp_path / "job"], start_new_session=True)
    try:
        until = time.monotonic() + 30
        while not (tmp_path / "begun").exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        for _ in range(times):
            job.send_signal(signal.SIGTERM)
            time.sleep(0.5)
        assert job.wait(30) == CODE and (tmp_path / "saved").exists()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
