"""Mistakes that only a built network or the disk shows are found before the first job."""

import drawn_voc
import pytest
from drawing import pattern, tree, write_folder
from running import ROOT, output, overlay, workflow

from kt import config, precheck
from kt.backbones.file import CONSENT
from kt.core.step import ConfigError, DataError

MINE = {
    "name": "file",
    "path": str(ROOT / "tests/network_of_mine.py"),
    "function": "tiny",
    "options": {"widths": [4, 8]},
}
MISSPELLED = {"name": "torchvision", "model": "mobilnet_v3_small"}
DEEP = {"deep": {"backbone": MINE, "layers": ["two"]}}
SEGMENTATION = {
    **{"path": "nowhere", "layer": None, "skips": [], "train": "train", "crop": 32},
    **{"masks": "SegmentationClass", "scales": [1.0, 1.0]},
    "training": {"epochs": 1, "batch": 2, "warmup": 0.0, "deterministic": False}
    | {"optimiser": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "schedule": "cosine"}
    | {"milestones": [], "precision": "auto"},
}
ALEXNET = {"name": "torchvision", "model": "alexnet"}
ROUNDS = {"name": "iterated", "factors": [1], "rounds": 2, "keep": False, "target": "small"}
ROUNDS |= {"map": 1}


OF_ITS_OWN = {"own": None, "longer": None, "random": None}


def settings(**given):
    return config.resolve(ROOT, given)


@pytest.fixture(autouse=True)
def consent(monkeypatch):
    monkeypatch.setenv(CONSENT, "1")


def test_what_is_right_passes_and_what_the_configuration_tells_is_not_built():
    assert not precheck.is_needed(settings())
    right = settings(teachers=DEEP)
    assert precheck.is_needed(right)
    precheck.check(right)
    # Of a network without a task images alone are seen, and no further than to its layers.
    early = {"backbone": ALEXNET, "layers": ["conv1"]}
    precheck.check(settings(teachers={"untrained": early}))


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"teachers": {"deep": {"backbone": MINE, "layers": ["tow"]}}},
            r"teachers\.deep\.layers: 'tow' is not a layer; did you mean 'two'\? known: one, two",
        ),
        (
            {"targets": {"small": {"backbone": MISSPELLED}}},
            r"targets\.small\.backbone\.model: 'mobilnet_v3_small' is not one of",
        ),
        (
            {"teachers": {"deep": {"backbone": MISSPELLED | {"model": "resnet43"}}}},
            r"teachers\.deep\.backbone\.model: 'resnet43' is not one of",
        ),
        (
            {"teachers": {"deep": {"backbone": MINE | {"function": "huge"}, "layers": ["two"]}}},
            r"teachers\.deep\.backbone\.function: .* has no function 'huge'",
        ),
        (
            {
                "targets": {"small": {"backbone": MINE}},
                "transfers": {"again": {"kind": ROUNDS | {"layer": "three"}, "of": ["deep"]}},
            },
            r"transfers\.again\.kind\.layer: 'three' is not a layer of targets\.small",
        ),
        (
            {"evaluations": {"voc_segmentation": SEGMENTATION}},
            r"evaluations\.voc_segmentation\.path: expected a PASCAL VOC devkit with VOC2012",
        ),
        (
            {"targets": {"small": {"backbone": ALEXNET}}, "teachers": OF_ITS_OWN},
            r"targets\.small\.backbone: images or tiles of 28 px do not fit this backbone: .*; "
            r"these are images of the set 'fashion_mnist': choose another network or another size",
        ),
        (
            {"teachers": {"deep": {"backbone": ALEXNET, "layers": ["conv1"]}}},
            r"teachers\.deep\.backbone: .* 7 px do not fit .*; these are jigsawpp's views of",
        ),
        (
            {"teachers": {"untrained": {"backbone": ALEXNET, "layers": ["conv5"]}}},
            r"teachers\.untrained\.backbone: .* 28 px do not fit .*; these are images of the",
        ),
    ],
    ids=["layer", "target", "teacher", "function", "round", "voc", "size", "tile", "features"],
)
def test_what_only_a_built_network_or_the_disk_shows_is_told_with_its_key(given, message):
    found = settings(**given)  # the configuration alone does not show it
    assert precheck.is_needed(found)
    with pytest.raises(ConfigError, match=message):
        precheck.check(found)


def test_layers_of_evaluations_are_checked_where_the_configuration_tells_them():
    for key, value in {"layer": "conv9", "skips": ["conv9"]}.items():
        with pytest.raises(
            ConfigError, match=rf"segmentation\.{key}: 'conv9' is not a layer of targets\.small"
        ):
            settings(evaluations={"voc_segmentation": SEGMENTATION | {key: value}})
    settings(evaluations={"voc_segmentation": SEGMENTATION | {"layer": "conv2"}})


def test_what_a_devkit_lacks_is_told_before_the_first_job(tmp_path):
    root = drawn_voc.write(tmp_path, 4, 2, 3)
    place = {"path": str(root)}
    of_2012 = SEGMENTATION | place
    precheck.check(settings(evaluations={"voc_segmentation": of_2012}))
    for change, error, message in (
        ({"train": "trainaug"}, DataError, "trainaug.txt: expected the list of the split"),
        ({"train": "trainval"}, DataError, "found 2 that stand in .*val.txt"),
        ({"masks": "SegmentationClassAug"}, ConfigError, r"voc_segmentation\.masks: expected"),
    ):
        with pytest.raises(error, match=message):
            precheck.check(settings(evaluations={"voc_segmentation": of_2012 | change}))
    of_2007 = config.read(ROOT / "presets/voc.yaml")["evaluations"]
    names = ("voc_classification", "voc_detection")
    precheck.check(settings(evaluations={name: of_2007[name] | place for name in names}))
    large = {"targets": {"small": {"backbone": ALEXNET}}, "teachers": OF_ITS_OWN}
    large |= {"datasets": {"fashion_mnist": {"size": 64}}}
    for name, change, message in (
        ("voc_segmentation", {"layer": "conv1", "skips": ["conv2"]}, "layer 'conv2' is not one"),
        ("voc_detection", {"min_size": 12}, "images or tiles of 12 px do not fit"),
        ("voc_classification", {"size": 12}, "images or tiles of 12 px do not fit"),
        ("voc_classification", {"size": 12, "finetune": None}, "images or tiles of 12 px do not"),
    ):
        given = (of_2012 if name == "voc_segmentation" else of_2007[name] | place) | change
        with pytest.raises(ConfigError, match=f"^evaluations.{name} of targets.small: {message}"):
            more = large if "12 px" in message else {}
            precheck.check(settings(evaluations={name: given}, **more))
    odd = {"small": {"backbone": {"name": "plain", "widths": [8, 8], "strides": [3, 2]}}}
    detection = {"voc_detection": of_2007["voc_detection"] | place}
    with pytest.raises(ConfigError, match="of targets.small: layer: expected one whose map has"):
        precheck.check(settings(evaluations=detection, targets=odd))
    (root / "VOC2007/ImageSets/Main/test.txt").unlink()  # an archive of its own
    for name in names:
        with pytest.raises(DataError, match="test.txt: expected the list of the split 'test'"):
            precheck.check(settings(evaluations={name: of_2007[name] | place}))


@pytest.mark.slow
def test_a_run_ends_with_2_before_its_first_job_and_goes_on_when_mended(tmp_path):
    images = write_folder(tree(40, 0, 0, 28, pattern), tmp_path / "pictures")
    right = overlay(tmp_path / "right.yaml", {"teachers": DEEP | {"untrained": None}})
    wrong = {"teachers": {"deep": {"layers": ["tow"]}}}
    done = workflow(
        tmp_path / "run", images, files=[right, overlay(tmp_path / "wrong.yaml", wrong)]
    )
    assert done.returncode == 2, output(done)
    assert "error: teachers.deep.layers: 'tow' is not a layer" in done.stderr
    assert "Traceback" not in output(done) and not (tmp_path / "run/results/data").exists()
    done = workflow(tmp_path / "run", images, "results/teachers/deep/s0/model.json", files=[right])
    assert done.returncode == 0, output(done)  # no lock was left behind
