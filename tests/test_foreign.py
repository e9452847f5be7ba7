import argparse
import json
import os
import pickle
import re
from pathlib import Path

import crafted
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torchvision import models

from kt import config, pretext_train
from kt.core import foreign, model, step, table
from kt.core.step import ConfigError, DataError

RESNET = crafted.plugin({"name": "torchvision", "model": "resnet18", "last": "layer2"})
PLAIN = crafted.plugin(crafted.PLAIN)
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def weights(path, mean=None, std=None) -> config.Weights:
    return config.Weights(path=str(path), mean=mean, std=std)


@pytest.fixture(scope="module")
def whole():
    """A trained resnet18: its batch norms have seen images."""
    torch.manual_seed(1)
    network = models.resnet18()
    for _ in range(3):
        network(torch.rand(8, 3, 32, 32))
    return network.eval()


def write(path: Path, state: dict) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return path


def loaded(path, plugin=RESNET, **more):
    backbone = model.fresh(plugin, 0)
    about = foreign.load(backbone, plugin, weights(path, **more))
    return backbone.eval(), about


def trunk(whole, images):
    """Gives the maps behind layer2 by the whole model's own parts."""
    with torch.inference_mode():
        maps = whole.maxpool(whole.relu(whole.bn1(whole.conv1(images))))
        return whole.layer2(whole.layer1(maps))


WRAPPED = {
    "plain": lambda state: state,
    "parallel": lambda state: {f"module.{name}": value for name, value in state.items()},
    "a training's checkpoint": lambda state: {"epoch": 3, "state_dict": state},
    "compiled": lambda state: {f"module._orig_mod.{name}": v for name, v in state.items()},
    "a checkpoint of another name": lambda state: {
        "model_state_dict": {f"encoder.{name}": value for name, value in state.items()}
    },
    "moco": lambda state: {
        "state_dict": {
            **{f"module.encoder_q.{name}": value for name, value in state.items()},
            **{f"module.encoder_k.{name}": value + 1 for name, value in state.items()},
        }
    },
    "nested": lambda state: {
        "model": {f"backbone.model.{name}": value for name, value in state.items()}
    },
}


# ---------------------------------------------------------------------------- what is loaded


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_weights_of_a_whole_network_make_the_same_maps(tmp_path, whole, wrapping):
    path = write(tmp_path / "w.pth", WRAPPED[wrapping](whole.state_dict()))
    backbone, about = loaded(path)
    images = torch.rand(4, 3, 48, 48)
    with torch.inference_mode():
        assert torch.equal(backbone(images), trunk(whole, images))
    assert about["digest"] == table.digest(path) and about["path"] == str(path)


def test_safetensors_and_half_precision_are_read_and_old_checkpoints_without_counters(
    tmp_path, whole
):
    state = {
        name: value.half()
        for name, value in whole.state_dict().items()
        if "num_batches" not in name
    }
    backbone, _ = loaded(write(tmp_path / "w.safetensors", state))
    images = torch.rand(4, 3, 48, 48)
    with torch.inference_mode():
        found, right = backbone(images), trunk(whole, images)
    assert found.dtype == torch.float32
    assert (found - right).abs().max() < 0.01 * right.abs().max()


@pytest.mark.parametrize("prefix", ["", "stages.", "module.stages."])
def test_weights_of_a_network_of_this_project_are_named_by_layer(tmp_path, prefix):
    other = model.fresh(PLAIN, 5)
    stages = {f"{prefix}{key}": value for key, value in other.stages.state_dict().items()}
    backbone, _ = loaded(write(tmp_path / "w.safetensors", stages), PLAIN)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(backbone(images), other.eval()(images))


@pytest.mark.parametrize(
    "values",
    [
        {"name": "torchvision", "model": "resnet18", "last": "layer1"},
        {"name": "torchvision", "model": "vgg11_bn", "last": "conv2_1"},
        {"name": "timm", "model": "resnet10t", "last": 2},
    ],
)
def test_a_model_of_this_project_with_networks_of_others_is_read_back(tmp_path, values):
    if values["name"] == "timm":
        pytest.importorskip("timm", reason="timm is optional and not installed")
    plugin = crafted.plugin(values)
    other = model.fresh(plugin, 5)
    model.save(tmp_path, other, plugin, {})
    found, _ = loaded(tmp_path / "model.safetensors", plugin)
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(found.eval()(images), other.eval()(images))


def test_the_input_normalisation_is_the_given_one_or_that_of_a_model_of_this_project(tmp_path):
    other = model.fresh(PLAIN, 5)
    other.mean, other.std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5, 0.6])
    model.save(tmp_path, other, PLAIN, {})
    path = tmp_path / "model.safetensors"
    assert torch.equal(loaded(path, PLAIN)[0].mean, other.mean)
    assert torch.equal(loaded(path, PLAIN)[0].std, other.std)
    found = loaded(path, PLAIN, **IMAGENET)[0]
    assert torch.equal(found.mean, torch.tensor(IMAGENET["mean"]))
    assert torch.equal(found.std, torch.tensor(IMAGENET["std"]))
    alone = write(tmp_path / "w.pth", other.stages.state_dict())
    assert loaded(alone, PLAIN)[0].mean.tolist() == [0, 0, 0]  # left as it was


def test_published_weights_are_fetched_with_their_normalisation(tmp_path, whole, monkeypatch):
    asked = []

    def fetch(url, **more):
        asked.append((url, more))
        return whole.state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    backbone, about = loaded(config.PRETRAINED)
    images = torch.rand(4, 3, 48, 48)
    with torch.inference_mode():
        assert torch.equal(backbone(images), trunk(whole, images))
    assert np.allclose(backbone.mean, IMAGENET["mean"]) and np.allclose(
        backbone.std, IMAGENET["std"]
    )
    assert "resnet18" in asked[0][0] and asked[0][1]["check_hash"]
    assert about["origin"] == "torchvision ResNet18_Weights.IMAGENET1K_V1"


def test_inception_gets_what_its_own_turning_of_the_input_amounts_to(monkeypatch):
    from torchvision.models import Inception_V3_Weights

    monkeypatch.setattr(
        Inception_V3_Weights.DEFAULT.__class__, "get_state_dict", lambda *_, **__: {}
    )
    module = config.plugin("backbones", "torchvision")
    _, mean, std, _ = module.published(module.Options(model="inception_v3", last=None))
    pixel = torch.rand(1, 3, 1, 1)
    seen = [torch.tensor(IMAGENET[name])[:, None, None] for name in ("mean", "std")]
    network = models.inception_v3(transform_input=True, init_weights=False)
    turned = network._transform_input((pixel - seen[0]) / seen[1])
    own = [torch.tensor(part)[:, None, None] for part in (mean, std)]
    assert torch.allclose((pixel - own[0]) / own[1], turned, atol=1e-5)


def test_a_server_that_is_not_reached_is_told_with_what_to_do(monkeypatch):
    def fetch(url, **_):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    with pytest.raises(DataError, match="no route to host.*; fetch them elsewhere and name their"):
        loaded(config.PRETRAINED)


def test_timms_published_weights_come_with_their_normalisation(monkeypatch):
    timm = pytest.importorskip("timm", reason="timm is optional and not installed")
    right, asked = timm.create_model, []

    def create(name, pretrained, **more):
        asked.append(pretrained)
        torch.manual_seed(7)
        return right(name, pretrained=False, **more)

    monkeypatch.setattr(timm, "create_model", create)
    plugin = config.Plugin(name="timm", model="resnet18", last=2)
    backbone, about = loaded(config.PRETRAINED, plugin)
    assert asked[-1] and about["origin"] == "timm resnet18.a1_in1k"
    assert np.allclose(backbone.mean, IMAGENET["mean"])
    wanted = create("resnet18", True, features_only=True).state_dict()["conv1.weight"]
    assert torch.equal(backbone.state_dict()["stages.timm.model.conv1.weight"], wanted)


def test_timms_weights_are_found_in_its_checkpoints(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is optional and not installed")
    for name in ("resnet18", "convnext_atto", "mobilenetv3_small_050", "densenet121"):
        torch.manual_seed(3)
        other = timm.create_model(name).eval()
        plugin = config.Plugin(name="timm", model=name, last=3)
        backbone, _ = loaded(write(tmp_path / "w.pth", other.state_dict()), plugin)
        images = torch.rand(2, 3, 64, 64)
        with torch.inference_mode():
            right = []
            layer = other.get_submodule(other.feature_info[2]["module"])
            layer.register_forward_hook(lambda *call, right=right: right.append(call[-1]))
            other(images)
            assert torch.allclose(backbone(images, "stage3"), right[0], atol=1e-5), name


# ---------------------------------------------------------------------------- what is refused


def test_what_is_missing_and_what_is_extra_are_listed(tmp_path, whole):
    state = dict(whole.state_dict())
    state["other.weight"] = state.pop("layer1.0.conv1.weight")
    state["layer2.0.conv1.weight"] = torch.zeros(128, 64, 5, 5)
    with pytest.raises(DataError) as fault:
        loaded(write(tmp_path / "w.pth", state))
    text = str(fault.value)
    assert "w.pth: 2 of 60 weights of backbone torchvision are missing or have another" in text
    assert "layer1.0.conv1.weight (64, 64, 3, 3)," in text
    assert "layer2.0.conv1.weight (128, 64, 3, 3) (found (128, 64, 5, 5))" in text
    assert "fc.bias" in text and re.search(r"the file also has \d+ that are not needed", text)


def test_weights_that_could_be_meant_twice_or_are_not_finite_are_refused(tmp_path):
    state = dict(model.fresh(PLAIN, 0).stages.state_dict())
    twice = {**state, "module.conv1.0.weight": state["conv1.0.weight"]}
    with pytest.raises(
        DataError, match="several weights could be meant: conv1.0.weight, module.conv1.0."
    ):
        loaded(write(tmp_path / "w.pth", twice), PLAIN)
    state["conv2.1.running_var"] = state["conv2.1.running_var"] / 0
    with pytest.raises(DataError, match="not finite: stages.conv2.1.running_var"):
        loaded(write(tmp_path / "w.pth", state), PLAIN)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["torch", "pickle", "network"])
def test_a_pickle_of_more_than_weights_is_refused_and_never_run(tmp_path, whole, kind):
    path, ran = tmp_path / "w.pth", tmp_path / "ran"
    if kind == "torch":
        torch.save({"state_dict": whole.state_dict(), "more": Hostile(ran)}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Hostile(ran)))
    else:
        torch.save(whole, path)  # a network itself
    with pytest.raises(
        DataError, match="w.pth: expected weights alone, .* other pickles are refused"
    ):
        loaded(path)
    assert not ran.exists()


def test_of_a_refused_pickle_our_advice_is_told_and_not_to_run_its_code(tmp_path, whole):
    torch.save(whole, tmp_path / "w.pth")
    with pytest.raises(DataError) as caught:
        loaded(tmp_path / "w.pth")
    assert str(caught.value).endswith("load it yourself and save network.state_dict()")
    assert "\x1b" not in str(caught.value) and "weights_only" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("damage", ["empty", "text", "cut", "no tensors"])
def test_damaged_files_are_refused(tmp_path, whole, suffix, damage):
    path = write(tmp_path / f"w{suffix}", {"a": torch.zeros(2)})
    content = {"empty": b"", "text": b"<html>not found</html>", "cut": path.read_bytes()[:-40]}
    if damage in content:
        path.write_bytes(content[damage])
    elif suffix == ".safetensors":
        safetensors.torch.save_file({}, path)
    else:
        torch.save([1, 2], path)
    with pytest.raises(DataError, match=re.escape(f"w{suffix}: expected ")):
        loaded(path)


@pytest.mark.timeout(60)
def test_a_checkpoint_that_holds_itself_is_read_to_an_end(tmp_path):
    state = {"a": torch.zeros(2)}
    state["model"] = state
    assert foreign.read(write(tmp_path / "w.pth", state)).keys() == {"a"}


def test_a_missing_file_and_a_backbone_without_weights_are_refused(tmp_path):
    with pytest.raises(DataError, match="expected weights at .*none.pth, found no file"):
        loaded(tmp_path / "none.pth")
    path = write(tmp_path / "w.pth", {"a": torch.zeros(2)})
    with pytest.raises(ConfigError, match="backbone pixels has no weights to load"):
        loaded(path, config.Plugin(name="pixels", edge=4))


# ---------------------------------------------------------------------------- the step


@pytest.fixture
def images(tmp_path):
    """A pack and its data report, as options of the step."""
    path = crafted.write_pack(tmp_path / "p.h5", crafted.noise(40, 32), crafted.names(40))
    step.write_json(tmp_path / "report.json", {"mean": [0.5] * 3, "std": [0.25] * 3})
    return {"pack": path, "data_report": tmp_path / "report.json"}


def train(folder, images, given, task=None, plugin=PLAIN, **more):
    values = {
        "backbone": plugin, "task": task, "weights": given, "training": crafted.training(batch=16),
        "epochs": 1, "budget": [], "few_images": None,
        "seed": 0, "describe": {}, "state": None, "processes": 1,
        "delivery_threads": None, "output": folder, **images, **more,
    }  # fmt: skip
    pretext_train.run(argparse.Namespace(**values))
    return model.load(folder), json.loads((folder / "model.json").read_text())


def test_a_teacher_without_a_task_stays_as_it_came_statistics_too(tmp_path, images):
    other = model.fresh(PLAIN, 5)
    other.train()(torch.rand(8, 3, 16, 16))
    path = write(tmp_path / "w.pth", other.stages.state_dict())
    backbone, content = train(tmp_path / "teacher", images, weights(path, **IMAGENET))
    for name, value in other.stages.state_dict().items():
        assert torch.equal(backbone.stages.state_dict()[name], value), name
    assert np.allclose(backbone.mean, IMAGENET["mean"])
    assert content["provenance"]["parents"][str(path)] == table.digest(path)
    assert content["weights"]["digest"] == table.digest(path) and "task" not in content
    random, content = train(tmp_path / "random", images, None)
    assert torch.allclose(random.mean, torch.tensor(0.5)) and "weights" not in content
    norm = next(part for part in random.modules() if isinstance(part, nn.BatchNorm2d))
    assert norm.num_batches_tracked == 1  # estimated on the images: it has none of its own


def test_with_a_task_training_starts_from_the_weights(tmp_path, images):
    path = write(tmp_path / "w.pth", model.fresh(PLAIN, 5).stages.state_dict())
    still = crafted.plugin(crafted.JIGSAW)
    first = train(tmp_path / "a", images, weights(path), still)[0]
    wanted = model.fresh(PLAIN, 5).stages.state_dict()["conv1.0.weight"]
    other = model.fresh(PLAIN, 0).stages.state_dict()["conv1.0.weight"]
    found = first.stages.state_dict()["conv1.0.weight"]
    assert 0 < (found - wanted).abs().mean() < 0.2 * (found - other).abs().mean()


def test_under_the_workflow_other_weights_have_other_states(tmp_path, images, monkeypatch):
    seen = []

    def stop(job):
        seen.append((job.state, job.fingerprint["weights"]["digest"]))
        raise InterruptedError

    monkeypatch.setattr("kt.core.training.train", stop)
    monkeypatch.setenv("KT_WORKFLOW", "1")
    task, path = crafted.plugin(crafted.JIGSAW), tmp_path / "w.pth"
    for seed in (5, 5, 6):
        write(path, model.fresh(PLAIN, seed).stages.state_dict())
        with pytest.raises(InterruptedError):
            train(tmp_path / "a", images, weights(path), task, state=tmp_path / "state")
    assert seen[0] == seen[1] and seen[0][0] != seen[2][0] and seen[0][1] != seen[2][1]
