"""Every pretext task as a teacher's: learned, written and told."""

import argparse
import json
from pathlib import Path

import crafted
import pytest
import torch

import kt
from kt import config, pretext_train
from kt.core import figures, images, pictures, step, training
from kt.core.network import Network

ROOT = Path(__file__).parent.parent
NUMBER = 640  # of which 32 are held out
SMALL = {"tile_features": 32, "hidden": 128}
CHANCE = {"jigsawpp": 1 / 16, "jigsaw": 1 / 16, "context": 1 / 8, "rotation": 1 / 4}
# Measured: .97 or more of the 32 held-out images, for each task.
EPOCHS = {"jigsawpp": 5, "jigsaw": 5, "context": 10, "rotation": 6}
BACKBONE = {"name": "residual", "widths": [8, 16], "strides": [1, 2], "blocks": 1}


def task_of(name: str, **changes) -> config.Plugin:
    """Gives a task as presets/pretext_tasks.yaml has it, but for what makes it small."""
    overlay = config.read(ROOT / "presets" / "pretext_tasks.yaml")
    teachers = config.resolve(ROOT, overlay).teachers.values()
    values = next(t.task.model_dump() for t in teachers if t.task and t.task.name == name)
    small = SMALL | {"permutations": 16}
    return config.Plugin(**{k: small.get(k, value) for k, value in values.items()} | changes)


def trained(name: str, folder: Path, size: int = 36) -> Path:
    """Runs the program on drawn images; gives its output folder."""
    pixels = crafted.landscapes(NUMBER, size)
    mean, std = pixels.mean((0, 2, 3)) / 255, pixels.std((0, 2, 3)) / 255
    step.write_json(folder / "report.json", {"mean": mean.tolist(), "std": std.tolist()})
    crafted.write_pack(folder / "pack.h5", pixels, crafted.names(NUMBER))
    pretext_train.run(
        argparse.Namespace(
            pack=folder / "pack.h5", data_report=folder / "report.json", output=folder / name,
            backbone=config.Plugin(**BACKBONE), task=task_of(name), epochs=EPOCHS[name], budget=[],
            few_images=None,
            weights=None, training=crafted.training(lr=0.006), seed=0, state=None,
            delivery_threads=0, describe={"name": name, "seed": 0},
        )
    )  # fmt: skip
    return folder / name


@pytest.mark.parametrize("name", CHANCE)
def test_a_teacher_learns_its_task_and_the_report_can_tell(name, tmp_path):
    folder = trained(name, tmp_path)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log[-1]["validation_top1"] > CHANCE[name] + 0.4
    described = step.read_json(folder / "model.json")
    assert figures.chance(described) == pytest.approx(CHANCE[name])
    told = figures.learned([described | {"log": log}])
    assert (told[0]["task"], told[0]["chance"]) == (name, figures.chance(described))
    puzzles = pictures.read_puzzles(folder / "examples.h5")
    assert (puzzles is not None) == name.startswith("jigsaw")
    if puzzles:
        assert any(puzzle.num_replaced for puzzle in puzzles.shown) == (name == "jigsawpp")
    features = kt.load_backbone(folder).features(crafted.scenes(8, 36))
    assert torch.isfinite(features).all() and features.std() > 0


@pytest.mark.parametrize("name", ["jigsaw", "context", "rotation"])
def test_images_of_noise_teach_nothing(name):
    # If they did, a label would leak through something else than what the images show.
    pixels, rows = crafted.noise(640, 36), torch.arange(640)
    task = pretext_train.build_task(task_of(name), crafted.context(36, 640))
    torch.manual_seed(0)
    network = Network(kt.core.model.fresh(config.Plugin(**BACKBONE), 0), task)
    job = training.Job(
        network,
        task,
        crafted.pack(pixels),
        rows[:384],
        rows[384:],
        crafted.training(),
        5,
        0,
        "noise",
    )
    assert training.train(job)[-1]["validation_top1"] < CHANCE[name] + 0.1


@pytest.mark.parametrize("name, anew", [("jigsaw", True), ("context", True), ("rotation", False)])
def test_statistics_of_whole_images_are_estimated_where_training_saw_none(
    name, anew, tmp_path, monkeypatch
):
    estimated = []
    monkeypatch.setitem(EPOCHS, name, 1)
    monkeypatch.setattr("kt.core.backbone.estimate_statistics", lambda *_: estimated.append(name))
    trained(name, tmp_path)
    assert bool(estimated) == anew


def test_statistics_look_at_no_more_images_at_once_than_anything_else(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setitem(EPOCHS, "jigsaw", 1)
    monkeypatch.setattr(images.Pack, "at_once", 50)
    take = "kt.core.backbone.estimate_statistics"
    monkeypatch.setattr(take, lambda _, batches: seen.extend(map(len, batches)))
    trained("jigsaw", tmp_path)
    assert max(seen) <= 50 < sum(seen)
