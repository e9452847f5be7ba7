import os

import crafted
import pytest
import torch

import kt
from kt.core import model, step
from kt.core.step import ConfigError, DataError, ResourceError

RESIDUAL = {"name": "residual", "widths": [4, 8], "strides": [1, 2], "blocks": 1}


@pytest.fixture
def saved(tmp_path):
    """A backbone with statistics of its own, and the folder it was saved to."""
    backbone = model.fresh(crafted.plugin(RESIDUAL), 7)
    backbone.mean, backbone.std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5, 0.6])
    backbone.train()(torch.rand(8, 3, 12, 12))
    backbone.eval()
    model.save(tmp_path / "m", backbone, crafted.plugin(RESIDUAL), {"arm": "direct", "size": 12})
    return backbone, tmp_path / "m"


def alter(folder, change):
    path = folder / "model.json"
    content = step.read_json(path)
    change(content)
    step.write_json(path, content)  # with a checksum that fits


def test_a_loaded_backbone_gives_the_same_maps_bit_for_bit(saved):
    backbone, folder = saved
    pixels = torch.from_numpy(crafted.noise(4, 12))
    for path in (folder, folder / "model.safetensors", str(folder / "model.json")):
        loaded = kt.load_backbone(path)
        assert not loaded.training and loaded.layers == backbone.layers
        for layer in backbone.layers:
            assert torch.equal(
                loaded.features(pixels, layer, 2), backbone.features(pixels, layer, 2)
            )


def test_the_description_says_what_the_weights_are(saved):
    backbone, folder = saved
    found = model.describe(folder)
    assert found["backbone"] == RESIDUAL and found["layers"] == ["stem", "block1", "block2"]
    assert found["arm"] == "direct" and found["size"] == 12
    assert found["parameters"] == sum(weight.numel() for weight in backbone.parameters())


@pytest.mark.parametrize("change", ["flip", "truncate", "swap"])
def test_altered_weights_are_refused(saved, tmp_path, change):
    _, folder = saved
    weights = folder / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-3] ^= 1
    if change == "truncate":
        raw = raw[:-8]
    elif change == "swap":
        other = model.fresh(crafted.plugin(RESIDUAL), 8)
        model.save(tmp_path / "other", other, crafted.plugin(RESIDUAL), {})
        raw = (tmp_path / "other" / "model.safetensors").read_bytes()
    weights.write_bytes(raw)
    with pytest.raises(DataError, match="altered or cut short"):
        kt.load_backbone(folder)


def test_a_description_of_another_network_is_refused(saved):
    _, folder = saved
    alter(folder, lambda content: content["backbone"].update(widths=[4, 6]))
    with pytest.raises(DataError, match="do not fit backbone residual: shapes"):
        kt.load_backbone(folder)
    alter(folder, lambda content: content["backbone"].update(widths=[4, 8], blocks=2))
    with pytest.raises(DataError, match="do not fit backbone residual: .*block1.1"):
        kt.load_backbone(folder)


def test_a_description_whose_network_has_weights_of_the_same_shapes_is_refused(saved):
    _, folder = saved
    alter(folder, lambda content: content["backbone"].update(strides=[1, 1]))
    with pytest.raises(DataError, match=r'are of .*"strides": \[1, 2\].*says.*\[1, 1\]'):
        kt.load_backbone(folder)


def test_a_description_that_names_no_known_backbone_is_refused(saved):
    _, folder = saved
    alter(folder, lambda content: content["backbone"].update(name="residul"))
    with pytest.raises(
        ConfigError, match="no file kt/backbones/residul.py; did you mean 'residual'"
    ):
        kt.load_backbone(folder)


@pytest.mark.parametrize("key", ["format", "version", "digest", "backbone"])
def test_a_description_without_its_keys_is_refused(saved, key):
    _, folder = saved
    alter(folder, lambda content: content.pop(key))
    with pytest.raises(DataError, match="expected a model.json"):
        kt.load_backbone(folder)


def test_missing_files_are_refused_by_name(saved, tmp_path):
    _, folder = saved
    with pytest.raises(DataError, match="model.json"):
        kt.load_backbone(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match="expected weights at .*model.safetensors"):
        kt.load_backbone(folder)


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", "null"])
def test_a_description_that_is_no_mapping_is_refused(saved, text):
    _, folder = saved
    (folder / "model.json").write_text(text)
    with pytest.raises(DataError, match="model.json"):
        kt.load_backbone(folder)


def test_weights_are_no_pickle(saved):
    _, folder = saved
    weights = folder / "model.safetensors"
    torch.save({"weights": torch.zeros(3)}, weights)
    alter(folder, lambda content: content.update(digest=model.table.digest(weights)))
    with pytest.raises(DataError, match="not a safetensors file"):
        kt.load_backbone(folder)


def test_a_failed_save_leaves_the_model_as_it_was(saved, monkeypatch):
    backbone, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="model.safetensors cannot be written: .*No space"):
        model.save(folder, backbone, crafted.plugin(RESIDUAL), {})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
