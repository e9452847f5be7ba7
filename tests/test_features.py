import argparse
import json
import shutil

import crafted
import h5py
import numpy as np
import pytest
import torch

from kt import features
from kt.core import blocks, hardware, images, model, table
from kt.core.parts import WHOLE, Part
from kt.core.step import ConfigError, DataError, ResourceError


def teacher(folder, seed=0):
    plugin = crafted.plugin(crafted.PLAIN)
    backbone = model.fresh(plugin, seed).eval()
    model.save(folder, backbone, plugin, {})
    return backbone


def run(folder, pack, layer="conv2", edge=2, pool="mean"):
    """Runs the step; gives the table's path."""
    return step(folder, pack, model=folder / "teacher", layer=layer, map=edge, pool=pool)


def step(folder, pack, **options):
    """Runs the step with some of its options; gives the table's path."""
    output = folder / "features.h5"
    values = dict.fromkeys(("model", "layer", "map", "given", "keys", "choice"))
    values |= {"pool": "mean", "mirror": False, "part": WHOLE, "parts": []} | options
    features.run(argparse.Namespace(pack=pack, output=output, **values))
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
    monkeypatch.setattr(hardware, "extracted_in", lambda where: torch.bfloat16)
    found = content(run(tmp_path, pack))[0]
    assert found.dtype == np.float32
    assert 0 < np.abs(found - exact).max() < 0.05 * np.abs(exact).max()


def test_parts_that_were_computed_in_several_types_are_refused(tmp_path, monkeypatch):
    options = {"model": tmp_path / "teacher", "layer": "conv2", "map": 2}
    teacher(options["model"])
    pack = crafted.write_pack(tmp_path / "pack.h5", crafted.noise(9, 16), crafted.names(9))

    def part(number: int):
        path = step(tmp_path, pack, part=Part(number, 2), **options)
        return path.rename(tmp_path / f"{number}-{hardware.extracted_in(torch.device('cpu'))}.h5")

    one, two = part(1), part(2)
    assert len(content(step(tmp_path, pack, parts=[one, two], **options))[1]) == 9
    monkeypatch.setattr(hardware, "extracted_in", lambda where: torch.bfloat16)
    other = part(2)
    with pytest.raises(DataError, match="expected the settings .* found .*bfloat16"):
        step(tmp_path, pack, parts=[one, other], **options)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_feature_that_is_not_finite_ends_it_with_key_and_layer(tmp_path, monkeypatch, value):
    teacher(tmp_path / "teacher")
    keys = crafted.names(600)
    pack = crafted.write_pack(tmp_path / "pack.h5", crafted.noise(600, 16), keys)
    right = images.stream

    def poisoned(path, batch, part):
        for names, pixels in right(path, batch, part):
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


# ---------------------------------------------------------------------------- pooling


def test_maxima_are_taken_where_they_are_asked_for(tmp_path):
    backbone = teacher(tmp_path / "teacher")
    pixels, keys = crafted.noise(20, 16), crafted.names(20)
    path = run(tmp_path, crafted.write_pack(tmp_path / "p.h5", pixels, keys), pool="max")
    with torch.inference_mode():
        maps = backbone(backbone.normalise(torch.from_numpy(pixels)), "conv2")
    slow = maps.unflatten(3, (2, 2)).unflatten(2, (2, 2)).amax((3, 5)).flatten(1)
    assert np.allclose(content(path)[0], slow, atol=1e-5)


# ---------------------------------------------------------------------------- given features


def write_given(folder, rows, keys):
    """Writes features made elsewhere; gives the options that name them."""
    np.save(folder / "given.npy", rows)
    (folder / "given.keys.txt").write_text("\n".join(keys) + "\n", encoding="utf-8")
    return {"given": folder / "given.npy", "keys": folder / "given.keys.txt"}


@pytest.fixture
def pack(tmp_path):
    keys = ["ä b.png", *crafted.names(599)]
    return crafted.write_pack(tmp_path / "pack.h5", crafted.noise(600, 12), sorted(keys))


def given_rows(number=603, dimensions=5):
    keys = ["ä b.png", *crafted.names(599), "left", "right", "middle"]
    order = np.random.default_rng(1).permutation(603)[:number]
    rows = np.random.default_rng(2).normal(size=(603, dimensions)).astype(np.float32)
    return rows[order], [keys[row] for row in order]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_given_features_are_joined_by_key_and_those_of_other_images_left_aside(
    tmp_path, pack, dtype
):
    rows, keys = given_rows()
    found, names = content(step(tmp_path, pack, **write_given(tmp_path, rows.astype(dtype), keys)))
    known = dict(zip(keys, rows.astype(dtype).astype(np.float32), strict=True))
    assert names == sorted(set(keys) - {"left", "right", "middle"}) and found.dtype == np.float32
    assert all(np.array_equal(row, known[name]) for row, name in zip(found, names, strict=True))
    with table.read(tmp_path / "features.h5", "features", {"features": 2}) as file:
        parents = json.loads(table.text(file, "provenance"))["parents"]
    assert parents[str(tmp_path / "given.npy")] == table.digest(tmp_path / "given.npy")


@pytest.mark.parametrize("text", [str, bytes])
def test_features_and_keys_in_one_hdf5_file_are_those_of_npy_and_text(tmp_path, pack, text):
    rows, keys = given_rows()
    expected = content(step(tmp_path, pack, **write_given(tmp_path, rows, keys)))
    path = tmp_path / "given.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=rows, compression="gzip", chunks=(7, 5))
        file["keys"] = keys if text is str else np.array([key.encode() for key in keys])
    found = content(step(tmp_path, pack, given=path, keys=path))
    assert np.array_equal(found[0], expected[0]) and found[1] == expected[1]


def test_keys_that_another_system_wrote_are_read(tmp_path, pack):
    rows, keys = given_rows()
    options = write_given(tmp_path, rows, keys)
    expected = content(step(tmp_path, pack, **options))
    options["keys"].write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*keys, ""]).encode())
    found = content(step(tmp_path, pack, **options))
    assert np.array_equal(found[0], expected[0]) and found[1] == expected[1]


def test_an_hdf5_file_without_them_or_with_links_is_refused(tmp_path, pack):
    rows, keys = given_rows()
    path, other = tmp_path / "given.h5", tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["features"], file["keys"] = rows, keys

    def refused(write, message):
        with h5py.File(path, "w") as file:
            write(file)
        with pytest.raises(DataError, match=message):
            step(tmp_path, pack, given=path, keys=path)

    def linked(file):
        file["features"], file["keys"] = h5py.ExternalLink(str(other), "/features"), keys

    def short(file):
        file["features"], file["keys"] = rows[:-1], keys

    def numbers(file):
        file["features"], file["keys"] = rows, np.arange(len(rows))

    def flat(file):
        file["features"], file["keys"] = rows[:, 0], keys

    refused(linked, "must be an array of this file")
    refused(lambda file: None, "'features' must be an array of this file")
    refused(short, "expected a key for each of the 602 rows")
    refused(numbers, "keys .* of UTF-8 strings")
    refused(flat, r"expected an array \(N, D\) of floats")
    path.write_bytes(b"no HDF5")
    with pytest.raises(DataError, match="expected HDF5 with features"):
        step(tmp_path, pack, given=path, keys=path)
    path.unlink()
    with pytest.raises(DataError, match="found no file"):
        step(tmp_path, pack, given=path, keys=path)


def spoilt(change):
    rows, keys = given_rows()
    if change == "missing":
        gone = keys.index("image-00007")
        return np.delete(rows, gone, 0), keys[:gone] + keys[gone + 1 :]
    if change == "repeated":
        keys[3] = keys[4]
    if change == "fewer keys":
        keys = keys[:-1]
    if change in ("nan", "too large"):
        rows = rows.astype(np.float64)
        rows[keys.index("image-00009"), 2] = np.nan if change == "nan" else 1e300
    shapes = {"flat": rows[:, 0], "integers": np.ones((603, 5), int), "empty": rows[:, :0]}
    return shapes.get(change, rows), keys


@pytest.mark.parametrize(
    "change, fault",
    [
        ("missing", "1 of 600 keys are missing, for example 'image-00007'; every image of .*needs"),
        ("repeated", "given.keys.txt: 1 keys are repeated"),
        ("fewer keys", r"a key for each of the 603 rows of .*given.npy, found 602"),
        ("nan", "given.npy: features of 1 images are not finite, among them 'image-00009'"),
        ("too large", "given.npy: features of 1 images are not finite, among them 'image-00009'"),
        ("flat", r"expected an array \(N, D\) of floats, found \(603,\) float32"),
        ("integers", r"expected an array \(N, D\) of floats, found \(603, 5\) int64"),
        ("empty", r"expected an array \(N, D\) of floats, found \(603, 0\)"),
    ],
)
def test_given_features_that_do_not_fit_the_images_are_refused(tmp_path, pack, change, fault):
    options = write_given(tmp_path, *spoilt(change))
    with pytest.raises(DataError, match=fault):
        step(tmp_path, pack, **options)
    assert not (tmp_path / "features.h5").exists()


def test_a_given_file_that_is_no_array_or_is_not_there_is_refused(tmp_path, pack):
    options = write_given(tmp_path, *given_rows())
    np.save(tmp_path / "given.npy", np.array([print]), allow_pickle=True)  # would run code
    for text in (None, b"", b"\x93NUMPY cut", b"some text", b"PK\x03\x04"):
        if text is not None:
            (tmp_path / "given.npy").write_bytes(text)
        with pytest.raises(DataError, match="given.npy is no .npy file of numbers"):
            step(tmp_path, pack, **options)
    (tmp_path / "given.npy").unlink()
    with pytest.raises(DataError, match=r"expected features at .*given.npy, found no file"):
        step(tmp_path, pack, **options)
    options = write_given(tmp_path, *given_rows())
    (tmp_path / "given.keys.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="given.keys.txt: expected keys in UTF-8"):
        step(tmp_path, pack, **options)
    (tmp_path / "given.keys.txt").unlink()
    with pytest.raises(DataError, match="keys of the features at .*given.keys.txt"):
        step(tmp_path, pack, **options)


@pytest.mark.parametrize(
    "names", [["model", "layer"], ["given"], ["model", "layer", "map", "keys"]]
)
def test_options_of_two_kinds_or_of_none_are_refused(tmp_path, pack, names):
    with pytest.raises(ConfigError, match="--model --layer --map, or --given --keys"):
        step(tmp_path, pack, **dict.fromkeys(names, 1))
