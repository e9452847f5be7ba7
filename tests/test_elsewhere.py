"""The whole workflow with teachers that were trained elsewhere and a network in a file."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import crafted
import drawing
import numpy as np
import pytest
import torch
from running import ROOT, TINY, command, jobs, output, overlay, run, workflow

from kt import config
from kt.core import model, table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PLAIN = crafted.plugin(crafted.PLAIN)
CODE = {"name": "file", "path": "net.py", "function": "tiny", "options": {"widths": [8, 16]},
        "digest": None}  # fmt: skip
PATHS = {"small/foreign/conv2/k4", "small/taken/any/k4", "small/pixels/pixels/k4"}
SETTINGS = {
    "teachers": {
        "deep": {"layers": []},
        "untrained": {"layers": []},
        "hog": {"layers": []},
        "longer": None,
        "foreign": {
            "like": "untrained", "backbone": crafted.PLAIN, "layers": ["conv2"],
            "weights": {"path": "w.pth", "mean": [0.5] * 3, "std": [0.2] * 3},
            "transfer_as": "transfer",
        },
        "taken": {"like": "untrained", "features": "given.npy", "layers": ["any"]},
        "pixels": {"like": "hog", "backbone": {"name": "pixels", "edge": 4}, "layers": ["pixels"]},
    },
    "targets": {"small": {"backbone": CODE, "supervised": False}},
    "evaluations": {"finetune": None},
}  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run; its files from elsewhere stand beside its results."""
    folder = tmp_path_factory.mktemp("elsewhere")
    drawing.write_folder(drawing.tree(40, 20, 20, draw=drawing.pattern), folder / "pictures")
    torch.save(model.fresh(PLAIN, 5).stages.state_dict(), folder / "w.pth")
    shutil.copy(ROOT / "tests/network_of_mine.py", folder / "net.py")
    ingested = workflow(folder, folder / "pictures", "--until", "ingest")
    assert ingested.returncode == 0, output(ingested)
    howto = (ROOT / "docs/howto.md").read_text(encoding="utf-8")
    (code,) = re.findall(
        r"^```python\n(from pathlib import Path\n.*?read_pack.*?)^```$", howto, re.M | re.S
    )
    before = os.getcwd()
    try:
        os.chdir(folder)
        exec(code, {"describe": lambda images: images.reshape(len(images), -1)[:, ::31] / 255.0})
    finally:
        os.chdir(before)
    finished = again(folder)
    assert finished.returncode == 0, output(finished)
    return folder


def again(folder: Path, *options):
    """Runs the workflow once more, with the settings of this file laid over the tiny ones."""
    merged = config.merge(config.read(TINY), SETTINGS)
    parts = command(folder, folder / "pictures", *options)
    parts[parts.index(str(TINY))] = str(overlay(folder / "mine.yaml", merged))
    return run(*parts)


def test_every_teacher_from_elsewhere_teaches_and_the_report_is_made(done):
    assert (done / "results/report/index.html").is_file()
    found = json.loads((done / "results/report/metrics.json").read_text())
    assert {record["model"] for record in found if record.get("k")} == PATHS
    teachers = {path.name for path in (done / "results/teachers").iterdir()}
    assert teachers == {"foreign", "pixels", "own", "random"}  # the others are not needed


def test_the_foreign_network_stays_as_it_came(done):
    backbone = model.load(done / "results/teachers/foreign/s0")
    state = torch.load(done / "w.pth", weights_only=True)
    assert all(torch.equal(backbone.stages.state_dict()[name], state[name]) for name in state)
    assert torch.allclose(backbone.std, torch.tensor(0.2))


def test_given_features_are_those_of_the_images(done):
    with table.read(
        done / "results/data/images/train-unlabelled.h5", "images", {"images": 4}
    ) as pack:
        wanted = pack["images"][...].reshape(120, -1)[:, ::31] / 255.0
    with table.read(
        done / "results/features/taken/any/images-train-unlabelled.h5", "features", {"features": 2}
    ) as found:
        assert np.allclose(found["features"][...], wanted)


def test_a_target_of_a_file_is_loaded_again(done, monkeypatch):
    monkeypatch.chdir(done)
    monkeypatch.setenv("KT_RUN_FILES", "1")
    backbone = model.load(done / "results/targets/small/foreign/conv2/k4/s0")
    assert backbone.layers == ["one", "two"]


def test_a_changed_file_runs_again_what_depends_on_it(done):
    assert "Nothing to be done" in output(again(done, "-n"))
    before = (done / "w.pth").read_bytes()
    torch.save(model.fresh(PLAIN, 6).stages.state_dict(), done / "w.pth")
    planned = jobs(again(done, "-n"))
    assert "pretext_train foreign s0" in planned and "features foreign conv2 on images" in str(
        planned
    )
    assert not [job for job in planned if "pixels" in job or "taken" in job]
    (done / "w.pth").write_bytes(before)
    code = (done / "net.py").read_text()
    (done / "net.py").write_text(code.replace("nn.ReLU", "nn.Tanh"))
    planned = jobs(again(done, "-n"))
    assert "target_train small taken/any/k4 s0" in planned and "pretext_train own s0" in planned
    (done / "net.py").write_text(code)


@pytest.mark.parametrize("name", ["w.pth", "given.keys.txt", "net.py"])
def test_a_file_that_is_not_there_ends_the_run_at_once(done, name):
    (done / name).rename(done / "away")
    ended = again(done, "-n")
    (done / "away").rename(done / name)
    assert ended.returncode == 2, output(ended)
    assert re.search(rf"expected a file, found none at .*{name}", output(ended))
