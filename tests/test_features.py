import argparse
import json
import shutil

import crafted
import numpy as np
import pytest
import torch

from kt import features
from kt.core import blocks, hardware, images, model, table
from kt.core.step import DataError, ResourceError


def teacher(folder, seed=0):
    plugin = crafted.plugin(crafted.PLAIN)
    backbone = model.fresh(plugin, seed).eval()
    model.save(folder, backbone, plugin, {})
    return backbone


def run(folder, pack, layer="conv2", edge=2):
    """Runs the step; gives the table's path."""
    output = folder / "features.h5"
    features.run(
        argparse.Namespace(
            model=folder / "teacher", layer=layer, map=edge, pack=pack, output=output
        )
    )
    return output


def content(path):
    with features.read(path) as found:
        return found.rows[...], [key.decode() for key in found.keys[...]]


@pytest.mark.parametrize("number", [1, 256, 700])
def test_features_are_those_of_the_network_on_each_image(tmp_path, number):
    backbone = teacher(tmp_path / "teacher")
    pixels, keys = crafted.noise(number, 16), crafted.names(number)
    path = run(tmp_path, crafted.write_pack(tmp_path / "pack.h5", pixels, keys))
    found, names = content(path)
    slow = np.concatenate([backbone.features(pixels[i : i + 1], "conv2", 2) for i in range(number)])
    assert np.allclose(found, slow, atol=1e-5) and found.dtype == np.float32
    assert names == keys
    with table.read(path, "features", {"features": 2}) as file:
        assert np.array_equal(table.load(file, "features"), found)  # the digest fits
        assert json.loads(table.text(file, "config"))["layer"] == "conv2"


def test_mixed_precision_changes_features_by_its_rounding_only(tmp_path, monkeypatch):
    teacher(tmp_path / "teacher")
    pack = crafted.write_pack(tmp_path / "pack.h5", crafted.noise(300, 16), crafted.names(300))
    exact = content(run(tmp_path, pack))[0]
    half = torch.autocast("cpu", torch.bfloat16)
    monkeypatch.setattr(hardware, "mixed", lambda where: half)
    found = content(run(tmp_path, pack))[0]
    assert found.dtype == np.float32
    assert 0 < np.abs(found - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_feature_that_is_not_finite_ends_it_with_key_and_layer(tmp_path, monkeypatch, value):
    teacher(tmp_path / "teacher")
    keys = crafted.names(600)
    pack = crafted.write_pack(tmp_path / "pack.h5", crafted.noise(600, 16), keys)
    right = images.stream

    def poisoned(path, batch):
        for names, pixels in right(path, batch):
            pixels = pixels.astype(np.float32)
            pixels[names == b"image-00444", 0, 0, 0] = value
            yield names, pixels

    monkeypatch.setattr(images, "stream", poisoned)
    with pytest.raises(DataError, match="layer conv2: features of 1 images .* 'image-00444'"):
        run(tmp_path, pack)
    assert not (tmp_path / "features.h5").exists()


def test_a_damaged_pack_ends_it(tmp_path):
    teacher(tmp_path / "teacher")
    pack = crafted.write_pack(tmp_path / "pack.h5", crafted.noise(30, 16), crafted.names(30))
    raw = bytearray(pack.read_bytes())
    raw[images.layout(pack).offset + 999] ^= 8
    pack.write_bytes(raw)
    with pytest.raises(DataError, match=f"{pack} is damaged"):
        run(tmp_path, pack)


def test_what_does_not_fit_the_disk_is_refused_with_path_and_bytes(tmp_path, monkeypatch):
    teacher(tmp_path / "teacher")
    pack = crafted.write_pack(tmp_path / "pack.h5", crafted.noise(30, 16), crafted.names(30))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: argparse.Namespace(free=1000))
    needed = 30 * (4 * 16 * 4 + 11)
    with pytest.raises(ResourceError, match=f"features.h5: {needed} bytes are needed, 1000 are"):
        run(tmp_path, pack)


def test_gradients_stay_on_for_who_reads_the_batches(tmp_path):
    backbone = teacher(tmp_path / "teacher")
    pack = crafted.write_pack(tmp_path / "pack.h5", crafted.noise(9, 16), crafted.names(9))
    for _ in features.describe(backbone, "conv2", 1, pack):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


# ---------------------------------------------------------------------------- reading in order


def test_an_ordered_table_is_read_as_it_stands_and_another_one_copied(tmp_path, monkeypatch):
    rows = np.arange(60, dtype=np.float32).reshape(20, 3)
    keys = ["ä", "Z", *crafted.names(18)]
    path = crafted.write_features(tmp_path / "f.h5", rows, keys)
    order = sorted(range(20), key=keys.__getitem__)
    monkeypatch.setattr(blocks, "MOST_ROWS", 7)
    with features.read(path, tmp_path) as found:
        assert isinstance(found.rows, blocks.Scratch)
        assert np.array_equal(found.rows[0:20], rows[order])
        assert [key.decode() for key in found.keys] == sorted(keys)
    path = crafted.write_features(tmp_path / "g.h5", rows[order], sorted(keys))
    with features.read(path, tmp_path) as found:
        assert not isinstance(found.rows, blocks.Scratch)
        assert np.array_equal(found.rows[0:20], rows[order])


@pytest.mark.parametrize("place", [3, 1 << 16, (1 << 16) + 1])
def test_keys_out_of_order_or_repeated_are_seen_in_every_part(place):
    keys = np.array(crafted.names((1 << 16) + 2), "S")
    assert features._ascending(keys)
    keys[place] = keys[place - 1]
    assert not features._ascending(keys)
