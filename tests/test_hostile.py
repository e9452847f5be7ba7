"""Hostile input: pickles, names and values meant for a shell, and a machine without a network."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys

import drawing
import pytest
import stages
import torch
from running import ROOT, environment, missing, output, overlay, run, workflow

import kt
from kt.core import model, table
from kt.core.decode import BadImage, decode
from kt.core.step import ConfigError, DataError, StepError
from kt.sources import torchvision

NASTY = 'x\'; touch harmed; "$(touch harmed)`touch harmed`" end'
# What a command may hold without quotes: numbers that the configuration has checked.
NUMBERS = {"{threads}", "{params.epochs}", "{params.seed}", "{params.seeds}", "{params.map}",
           "{wildcards.k}", "{wildcards.part}", "{wildcards.parts}",
           "{resources.processes}", "{resources.nodes}", "{resources.lower}",
           "{resources.rows_mb}"}  # fmt: skip


class Payload:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch harmed",)


def payloads() -> dict[str, bytes]:
    """Gives the same payload as a bare pickle and in the two formats that hide one."""
    import io

    import numpy as np

    array, checkpoint = io.BytesIO(), io.BytesIO()
    np.save(array, np.array([Payload()], dtype=object), allow_pickle=True)
    torch.save({"weights": Payload()}, checkpoint)
    return {"pkl": pickle.dumps(Payload()), "npy": array.getvalue(), "pth": checkpoint.getvalue()}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to stand in, that nothing may appear in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield tmp_path
    assert not list(tmp_path.rglob("harmed")), "a payload was run"


# ---------------------------------------------------------------------------- pickles


def test_the_payload_is_a_true_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(payloads()["pkl"])
    assert (tmp_path / "harmed").exists()


@pytest.mark.parametrize("kind", ["pkl", "npy", "pth"])
def test_a_pickle_is_no_model_no_table_no_picture_and_no_settings(here, kind):
    payload = payloads()[kind]
    path = here / f"payload.{kind}"
    path.write_bytes(payload)
    folder = here / "model"
    folder.mkdir()
    for name in ("model.safetensors", "model.json"):
        (folder / name).write_bytes(payload)
    with pytest.raises(DataError):
        kt.load_backbone(folder)
    with pytest.raises(DataError):
        with table.read(path, "features", {"features": 2}):
            pass
    with pytest.raises(BadImage):
        decode(payload, 24, 10**6)
    with pytest.raises(ConfigError):
        kt.config.read(path)


@pytest.mark.parametrize("kind", ["pkl", "npy", "pth"])
def test_a_pickle_with_the_right_digest_is_still_no_model(here, kind):
    path = here / "model.safetensors"
    path.write_bytes(payloads()[kind])
    content = {"format": model.FORMAT, "version": 1, "digest": table.digest(path)}
    backbone = {"name": "plain", "widths": [2], "strides": [2]}
    kt.core.step.write_json(here / "model.json", {**content, "backbone": backbone})
    with pytest.raises(DataError, match="not a safetensors file"):
        kt.load_backbone(path)


def test_pickles_in_the_place_of_a_published_data_set_are_not_read(here, monkeypatch):
    # torchvision unpickles CIFAR's files, but only those whose digest is the published one.
    folder = here / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(payloads()["pkl"])

    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    dataset = kt.config.Dataset(**{**stages.IMAGES, "source": "torchvision",
                                   "path": f"CIFAR10:{here / 'data'}"})  # fmt: skip
    with pytest.raises(DataError, match="could not download"):
        list(torchvision.entries(dataset))


# ---------------------------------------------------------------------------- the shell


def test_every_value_of_a_command_is_quoted_or_a_checked_number():
    found = 0
    for path in (ROOT / "rules").glob("*.smk"):
        for block in re.findall(r"    shell:\n((?:        .*\n?)+)", path.read_text()):
            fields = re.findall(r"\{[^}]*\}", block)
            found += len(fields)
            assert {field for field in fields if not field.endswith(":q}")} <= NUMBERS, path
    assert found > 60


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_values_of_the_configuration_reach_no_shell(here):
    drawing.write_folder(drawing.tree(20, 0, 0), here / NASTY)
    wrong = overlay(
        here / "x.yaml",
        {"datasets": {"images": {"source": "torchvision", "path": f"CIFAR10:{NASTY}/no"}}},
    )
    planned = workflow(here / "run", here / NASTY, "-n", "-p", files=[wrong])
    assert planned.returncode == 0 and "touch harmed" in output(planned), output(planned)
    done = workflow(here / "run", here / NASTY, "results/data/images/report.json")
    assert done.returncode == 0, output(done)


@pytest.mark.parametrize("name", [NASTY, "../x", "a b", "", "-x", "x\n", "naïve", "x" * 300])
def test_names_are_letters_digits_dots_and_dashes(name):
    with pytest.raises(StepError):
        kt.config.resolve(ROOT, {"teachers": {name: {"like": "deep"}}})


# ---------------------------------------------------------------------------- the network


@pytest.mark.slow
def test_no_step_needs_a_network(tmp_path):
    if subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode:
        missing("NOT TESTED without a network, `unshare -n` is not permitted")
    code = "import pathlib, sys, stages; stages.make(pathlib.Path(sys.argv[1]))"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        ["unshare", "-n", sys.executable, "-c", code, tmp_path],
        cwd=ROOT, env=environment(ROOT) | {"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report" / "index.html").exists()
    reached = run("unshare", "-n", sys.executable, "-c",
                  "import socket; socket.create_connection(('1.1.1.1', 53), 2)")  # fmt: skip
    assert reached.returncode, "there was a network after all"
