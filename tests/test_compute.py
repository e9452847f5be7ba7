"""`python -m kt.compute`: what trainings will cost, against the networks and the presets."""

import re
import sys

import pytest
import running
import torch
from torch.utils.flop_counter import FlopCounterMode

from kt import compute, config
from kt import workflow as names
from kt.core import model
from kt.core.network import Network
from kt.core.step import ConfigError
from kt.core.task import Context
from kt.pretext_train import build_task

NUMBERS = {"imagenet": 1281167, "places": 2448873, "cifar10": 45000, "imagenette": 7000}
UNDER = {"fully_connected": ["paper/protocols.yaml"]}  # what an overlay lies over, too
PAPER = [
    ["paper.yaml", *UNDER.get(path.stem, []), f"paper/{path.name}"]
    for path in sorted((running.ROOT / "presets/paper").glob("*.yaml"))
]
PRESETS = [[f"{name}.yaml"] for name in ("cifar10", "imagenette", "photos", "paper", "transfers")]
PRESETS += [[f"{name}.yaml"] for name in ("teachers", "pretext_tasks", "protocols")]
PRESETS += [["paper.yaml", "voc.yaml"], *PAPER]


def of_default(**changes):
    settings = config.resolve(running.ROOT, changes)
    return settings, {cost.name: cost for cost in compute.costs(settings, NUMBERS)}


def test_every_network_of_the_run_is_listed_once_with_its_seeds():
    settings, found = of_default()
    expected = {model.name: len(model.seeds) for model in names.judged(settings)}
    del expected["random"]  # is not trained
    expected["deep"] = 1
    assert {n: c.number for n, c in found.items() if "evaluation" not in n} == expected
    assert found["evaluation finetune"].number == 2 * sum(
        len(model.seeds) for model in names.judged(settings)
    )


def test_multiply_adds_are_those_that_torch_counts():
    settings, found = of_default()
    teacher = settings.teachers["deep"]
    ids = torch.arange(2)
    context = Context(28, ids, torch.zeros(3), torch.ones(3), 0, ids * 0, 0)
    task = build_task(teacher.task, context)
    network = Network(model.fresh(teacher.backbone, 0), task).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, task.num_views, 3, task.view_size, task.view_size))
    assert found["deep"].multiply_adds == counter.get_total_flops() / 2
    assert found["deep"].images == 5 * 8000
    assert found["deep"].operations == 3 * counter.get_total_flops() * 5 * 8000


def test_a_budget_buys_the_sum_of_its_parts():
    _, found = of_default()
    parts = [found["deep"], found["small/deep/block3/k100"]]
    spent = sum(part.multiply_adds * part.images for part in parts)
    assert found["longer"].multiply_adds * found["longer"].images == pytest.approx(spent)
    assert found["longer"].multiply_adds == found["own"].multiply_adds


def test_effort_and_seeds_scale_it():
    _, once = of_default()
    _, more = of_default(few_images={"as_if": 12000, "most": 3})  # 8,000 images
    assert more["deep"].operations == pytest.approx(once["deep"].operations * 8 / 5)  # 7.5 epochs
    _, found = of_default(effort=2.0, seeds=6)
    assert found["own"].operations == 4 * once["own"].operations
    assert found["deep"].operations == 2 * once["deep"].operations


@pytest.mark.parametrize("files", PRESETS, ids=lambda files: files[-1])
def test_a_preset_says_the_hours_it_is_expected_to_take(files):
    overlays = [config.read(running.ROOT / "presets" / file) for file in files]
    settings = config.resolve(running.ROOT, *overlays)
    hours = sum(cost.operations for cost in compute.costs(settings, NUMBERS)) / 1e14 / 3600
    assert float(f"{hours:.2g}") == float(said(files[-1]))


@pytest.mark.parametrize("files", PAPER, ids=lambda files: files[-1])
def test_targets_take_the_same_steps_in_all_ablations_of_the_paper(files):
    def steps(files):
        overlays = [config.read(running.ROOT / "presets" / file) for file in files]
        settings = config.resolve(running.ROOT, *overlays)
        images = NUMBERS[settings.use.target]
        training = settings.targets["small"].training
        return images / training.batch * training.epochs

    assert steps(files) == pytest.approx(steps(files[:1]), rel=0.02)


def test_the_page_of_the_paper_says_the_hours_of_the_presets():
    text = " ".join((running.ROOT / "docs/paper.md").read_text().split())
    told = text.partition("**What a run would cost**")[2]
    assert f"{said('paper.yaml')} hours" in told
    for path in sorted((running.ROOT / "presets/paper").glob("*.yaml")):
        assert re.search(rf"`{path.stem}` {said(f'paper/{path.name}')}\b", told), path.stem


def test_the_trainings_on_voc_cost_what_preset_and_page_say():
    files = ("paper.yaml", "voc.yaml")
    settings = config.resolve(
        running.ROOT, *(config.read(running.ROOT / "presets" / file) for file in files)
    )
    found = {c.name: c for c in compute.costs(settings, NUMBERS) if "voc_" in c.name}
    hours = f"{sum(cost.operations for cost in found.values()) / 1e14 / 3600:.2g}"
    assert f"on VOC are {hours}." in (running.ROOT / "presets/voc.yaml").read_text()
    told = " ".join((running.ROOT / "docs/paper.md").read_text().split())
    assert f"`presets/voc.yaml` add {hours} to any" in told
    trunk = model.fresh(settings.targets["small"].backbone, 0)
    assert {name: cost.multiply_adds for name, cost in found.items()} == {
        "evaluation voc_classification": flops(trunk, 224, 224) + 256 * 6**2 * 20,
        "evaluation voc_detection": flops(trunk, 617, 817)  # 17 above and left of a picture
        + places(trunk, 617, 817) * (256 * 256 * 9 + 256 * (9 + 36))  # torchvision's RPN, 9 anchors
        + 512 * (256 * 36 * 1024 + 1024**2 + 1024 * (21 + 84)),
        "evaluation voc_segmentation": flops(trunk, 384, 384) + places(trunk, 384, 384) * 256 * 21,
    }


def flops(trunk, *size):
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        trunk(torch.zeros(1, 3, *size))
    return counter.get_total_flops() / 2


def places(trunk, *size):
    with torch.no_grad():
        return trunk(torch.zeros(1, 3, *size))[0, 0].numel()


def said(file):
    text = (running.ROOT / "presets" / file).read_text()
    (hours,) = re.findall(r"^# Expected: ([\d.]+) GPU-hours at 100 TFLOP/s", text, re.M)
    return hours


def test_a_round_before_the_last_is_trained_once_and_by_its_own_target_alone():
    kind = {"name": "iterated", "factors": [1, 2], "rounds": 2, "keep": True, "layer": "conv4"}
    rounds = {"kind": kind | {"target": "small", "map": 1}, "of": ["hog"]}
    wide = {"wide": {"like": "small"}}
    _, found = of_default(transfers={"again": rounds}, targets=wide)
    numbers = {n: cost.number for n, cost in found.items() if "again" in n}
    place = "hog/hog/k100"
    assert numbers == {
        f"small/again~1/{place}": 1,
        f"small/again/{place}": 3,
        f"wide/again/{place}": 3,
    }


def test_a_number_that_is_not_known_is_asked_for():
    settings = config.resolve(running.ROOT, config.read(running.ROOT / "presets/paper.yaml"))
    with pytest.raises(ConfigError, match="unlabelled is null: .* --images imagenet=N"):
        compute.costs(settings, {})


def test_the_command_prints_a_table_and_refuses_nonsense_with_2():
    done = running.run(sys.executable, "-m", "kt.compute", "--rate", "1e9")
    assert done.returncode == 0 and "small/deep/block3/k100" in done.stdout
    assert re.search(r"hours in all at 1e\+09 operations a second", done.stdout)
    done = running.run(sys.executable, "-m", "kt.compute", "--images", "imagenet=many")
    assert done.returncode == 2 and "expected DATASET=N" in done.stderr
