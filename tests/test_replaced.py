"""A network is replaced by one value of the configuration, and the layers of teachers follow."""

import json

import pytest
from drawing import pattern, tree, write_folder
from running import ROOT, jobs, overlay, run, workflow

from kt import config
from kt.core.step import ConfigError

RESNET = {"name": "torchvision", "model": "resnet18"}
MOBILE = {"name": "torchvision", "model": "mobilenet_v3_small"}
OWN = {"name": "file", "path": "mine.py", "function": "stages"}
OTHERS = [
    (RESNET, "layer4"), ({"name": "torchvision", "model": "vgg11_bn"}, "conv5_2"),
    ({"name": "alexnet", "stride": 2, "norm": "batch"}, "conv5"), (MOBILE, "auto"),
    ({"name": "timm", "model": "convnext_atto"}, "auto"),
    ({"name": "timm", "model": "convnext_atto", "last": 3}, "stage3"), (OWN, "auto"),
]  # fmt: skip


def resolved(*overlays):
    return config.resolve(ROOT, *overlays)


def layers(*overlays) -> dict[str, list[str]]:
    return {name: teacher.layers for name, teacher in resolved(*overlays).teachers.items()}


BEFORE = layers({})


@pytest.mark.parametrize("backbone, last", OTHERS, ids=str)
def test_a_target_is_replaced_by_one_value(backbone, last):
    found = layers({"targets": {"small": {"backbone": backbone}}})
    assert found == BEFORE | {"own": [last], "random": [last]}
    assert BEFORE["own"] == BEFORE["random"] == ["conv4"] and BEFORE["longer"] == []


@pytest.mark.parametrize("backbone, last", OTHERS, ids=str)
def test_a_teacher_is_replaced_by_one_value(backbone, last):
    found = layers({"teachers": {"deep": {"backbone": backbone}}})
    assert found == BEFORE | {"deep": [last], "untrained": [last]}


def test_layers_go_to_the_same_share_of_the_depth_and_transfers_along():
    given = {"images": "x", "teachers": {"deep": {"backbone": RESNET}}}
    before, after = resolved({"images": "x"}), resolved(given)
    assert before.teachers["deep"].layers == ["block2", "block3"]  # of stem and three
    assert after.teachers["deep"].layers == ["layer3", "layer4"]  # of stem and four
    assert before.transfers["multi_similarity"].of == ["deep/block2", "hog"]
    assert after.transfers["multi_similarity"].of == ["deep/layer3", "hog"]
    unknown = resolved({"images": "x", "teachers": {"deep": {"backbone": MOBILE}}})
    assert unknown.teachers["deep"].layers == ["auto"]
    assert unknown.transfers["multi_similarity"].of == ["deep/auto", "hog"]


def test_what_an_overlay_says_of_layers_stays():
    deep = {"backbone": RESNET, "layers": ["layer2"]}
    found = layers({"teachers": {"deep": deep}})
    assert found["deep"] == found["untrained"] == ["layer2"]  # `untrained` is like it
    found = layers({"teachers": {"deep": {"layers": ["layer1"]}}}, {"teachers": {"deep": deep}})
    assert found["deep"] == ["layer2"]
    with pytest.raises(ConfigError, match=r"teachers.deep.layers: 'block2' is not a layer"):
        resolved({"teachers": {"deep": {**deep, "layers": ["block2"]}}})
    given = {"hard": {"kind": {"name": "hard"}, "of": ["deep/block3"]}}
    with pytest.raises(ConfigError, match=r"transfers.hard.of: 'block3' is not among"):
        resolved({"teachers": {"deep": {"backbone": RESNET}}, "transfers": given})


def test_a_teacher_that_is_like_one_of_ours_follows_too():
    found = layers(
        {"teachers": {"mine": {"like": "deep", "backbone": RESNET}, "x": {"like": "mine"}}}
    )
    assert found == BEFORE | {"mine": ["layer4"], "x": ["layer4"]}


def test_other_widths_of_the_same_network_leave_the_layers():
    small = {"widths": [8] * 6, "strides": [1] * 6}
    assert layers({"targets": {"small": {"backbone": small}}}) == BEFORE
    small = {"widths": [8] * 2, "strides": [1] * 2}  # there is no fourth convolution any more
    found = layers({"targets": {"small": {"backbone": small}}})
    assert found == BEFORE | {"own": ["conv2"], "random": ["conv2"]}


@pytest.mark.parametrize("backbone", [{"name": "torchvision"}, {"name": "nothing"}, "missing"])
def test_a_wrong_replacement_is_told_with_its_key(backbone):
    with pytest.raises(ConfigError, match=r"teachers\.deep\.backbone"):
        resolved({"teachers": {"deep": {"backbone": backbone}}})


@pytest.mark.slow
def test_the_default_run_is_planned_with_a_target_given_on_the_command_line(tmp_path):
    value = f"targets={json.dumps({'small': {'backbone': RESNET}})}"
    done = run("snakemake", "-n", "--directory", tmp_path, "--config", value)
    assert "target_train small own/layer4/k100 s0" in jobs(done)


@pytest.mark.slow
def test_a_whole_run_with_a_network_whose_layers_nobody_told(tmp_path):
    """One of torchvision's; tests/test_elsewhere.py has one of a file."""
    images = write_folder(tree(130, 10, 10, 28, pattern), tmp_path / "pictures")
    given = {
        "targets": {"small": {"backbone": MOBILE, "supervised": False}},
        "teachers": {"own": {"layers": ["auto"]}, "deep": {"layers": []}}
        | dict.fromkeys(("longer", "untrained", "random", "hog")),
        "evaluations": {"finetune": None, "linear": None, "clusters": None},
        "verdict": ["knn"],
    }
    done = workflow(tmp_path / "run", images, files=[overlay(tmp_path / "x.yaml", given)])
    assert done.returncode == 0, done.stderr
    chosen = json.loads((tmp_path / "run/results/choices/own.json").read_text())
    records = json.loads((tmp_path / "run/results/report/metrics.json").read_text())
    assert chosen["layer"] in [f"layer{number}" for number in range(13)]
    assert "small/own/auto/k4" in {record["model"] for record in records}
