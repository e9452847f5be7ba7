import hashlib
import json
import os
import signal
import subprocess
import sys

import crafted
import h5py
import numpy as np
import pytest

from kt.core import images, step, table
from kt.core.step import DataError

ARRAYS = {"features": 2, "keys": 1}


def write(path, number=8, **more):
    with table.create(path, "features", {"layer": "conv1"}, **more) as file:
        table.put(file, "features", np.arange(number * 3, dtype=np.float32).reshape(number, 3))
        table.put_strings(file, "keys", crafted.names(number))
    return path


def read(path, arrays=ARRAYS):
    with table.read(path, "features", arrays) as file:
        return file["features"][...], table.strings(file, "keys")


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "features.h5")


def test_what_is_written_is_read_back(path):
    features, keys = read(path)
    assert (
        features.tolist() == np.arange(24).reshape(8, 3).tolist() and features.dtype == np.float32
    )
    assert keys == crafted.names(8)


def test_a_table_says_its_settings_and_the_digests_of_its_parents(tmp_path, path):
    child = write(tmp_path / "child.h5", parents=[path])
    with h5py.File(child) as file:
        assert json.loads(file.attrs["config"]) == {"layer": "conv1"}
        provenance = json.loads(file.attrs["provenance"])
    assert provenance["parents"] == {str(path): table.digest(path)}
    assert provenance["version"] and provenance["host"] is not None


def test_strings_of_any_script_and_empty_tables_survive(tmp_path):
    keys = ["naïve/画像.png", "a b;$(c)", "<script>", "x" * 255]
    with table.create(tmp_path / "t.h5", "features", {}) as file:
        table.put(file, "features", np.zeros((4, 0), np.float32))
        table.put_strings(file, "keys", keys)
    assert read(tmp_path / "t.h5")[1] == keys
    assert read(write(tmp_path / "empty.h5", 0))[1] == []


# ---------------------------------------------------------------------------- refusals


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="expected a features table at .*no.h5, found no file"):
        read(tmp_path / "no.h5")


@pytest.mark.parametrize("content", [b"", b"<html>not here</html>", None])
def test_a_file_that_is_not_hdf5_is_refused(path, content):
    path.write_bytes(path.read_bytes()[:1000] if content is None else content)
    with pytest.raises(DataError, match="not a readable HDF5 file"):
        read(path)


@pytest.mark.parametrize("complete", [None, False])
def test_an_incomplete_table_is_refused(path, complete):
    with h5py.File(path, "r+") as file:
        del file.attrs["complete"]
        if complete is not None:
            file.attrs["complete"] = complete
    with pytest.raises(DataError, match="is not complete"):
        read(path)


@pytest.mark.parametrize("attribute, value", [("format", "images"), ("version", 99)])
def test_another_format_or_version_is_refused(path, attribute, value):
    with h5py.File(path, "r+") as file:
        file.attrs[attribute] = np.bytes_(value) if attribute == "format" else value
    with pytest.raises(DataError, match=f"expected format 'features' version 2, found .*{value}"):
        read(path)


def test_arrays_of_unequal_length_are_refused_unless_marked(path):
    with table.create(path, "features", {}) as file:
        table.put(file, "features", np.zeros((8, 3), np.float32))
        table.put_strings(file, "keys", ["only one"])
    with pytest.raises(DataError, match="equally long, found {'features': 8, 'keys': 1}"):
        read(path)
    read(path, {"features": 2, "*keys": 1})


def test_a_missing_array_and_another_number_of_dimensions_are_refused(path):
    with pytest.raises(DataError, match=r"expected an array 'sizes', found \['features', 'keys'\]"):
        read(path, ARRAYS | {"sizes": 1})
    with pytest.raises(DataError, match="'features' must have 1 dimensions"):
        read(path, {"features": 1})


def _external_link(file, other):
    file["features"] = h5py.ExternalLink(str(other), "features")


def _soft_link(file, other):
    file["elsewhere"] = np.zeros((8, 3), np.float32)
    file["features"] = h5py.SoftLink("/elsewhere")


def _external_storage(file, other):
    file.create_dataset("features", (8, 3), "f4", external=[(str(other), 0, 96)])


def _virtual(file, other):
    layout = h5py.VirtualLayout((8, 3), "f4")
    layout[...] = h5py.VirtualSource(str(other), "features", (8, 3))
    file.create_virtual_dataset("features", layout)


def _group(file, other):
    file.create_group("features")


@pytest.mark.parametrize("plant", [_external_link, _soft_link, _external_storage, _virtual, _group])
def test_arrays_that_point_elsewhere_are_refused(tmp_path, path, plant):
    other = write(tmp_path / "secret.h5")
    with h5py.File(path, "r+") as file:
        del file["features"]
        plant(file, other)
    with pytest.raises(DataError, match="must be an array of this file|points outside"):
        read(path)


def test_an_array_that_was_never_written_is_refused(path):
    with h5py.File(path, "r+") as file:
        del file["features"]
        table.add(file, "features", (10**9, 10**6), np.float32)
    with pytest.raises(DataError, match="is not all there"):
        read(path)


def test_objects_and_single_values_are_refused(path):
    for value in (np.array(["text"], object), np.float32(1)):
        with h5py.File(path, "r+") as file:
            file.create_dataset(
                "odd", data=value, dtype=h5py.string_dtype() if np.ndim(value) else None
            )
        with pytest.raises(DataError, match="'odd' holds"):
            read(path)
        with h5py.File(path, "r+") as file:
            del file["odd"]


@pytest.mark.parametrize("digest", ["kept", "made to fit"])
def test_a_value_changed_through_hdf5_is_found(path, digest):
    with h5py.File(path, "r+") as file:
        changed = file["features"][...]
        changed[3, 1] += 1
        file["features"][...] = changed
        if digest != "kept":
            table.put_text(file["features"], "digest", hashlib.sha256(changed.data).hexdigest())
    with pytest.raises(DataError, match="is not what was written|does not fit its digest"):
        with table.read(path, "features", ARRAYS) as file:
            table.load(file, "features")


def test_no_flipped_byte_goes_unnoticed(path):
    """All places of a table, one at a time: refused, or nothing that is read has changed."""
    whole, right = path.read_bytes(), everything(path)
    places = np.random.default_rng(0).choice(len(whole), 400, replace=False)
    refused = 0
    for place in places.tolist():
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            assert everything(path) == right, f"byte {place} of {len(whole)}"
        except DataError:
            refused += 1
    assert refused > 50  # the rest are gaps between the arrays


def everything(path):
    with table.read(path, "features", ARRAYS) as file:
        settings = table.text(file, "config"), table.text(file, "provenance")
        return table.load(file, "features").tolist(), table.strings(file, "keys"), settings


# ---------------------------------------------------------------------------- writing


def test_a_failing_writer_leaves_the_old_table_and_nothing_else(path):
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError):
        with table.create(path, "features", {}) as file:
            table.put(file, "features", np.zeros((3, 3)))
            raise ZeroDivisionError
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_killed_writer_leaves_the_old_table(path):
    before = path.read_bytes()
    code = (
        "import os, signal, sys, numpy\n"
        "from kt.core import table\n"
        "with table.create(sys.argv[1], 'features', {}) as file:\n"
        "    table.put(file, 'features', numpy.zeros((99, 99)))\n"
        "    file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(path)])
    assert ended.returncode == -signal.SIGKILL
    assert path.read_bytes() == before
    assert len(read(path)[1]) == 8


def test_the_digest_changes_with_one_byte_and_with_nothing_else(tmp_path):
    def digest(name, value=1.0, array="features", key="b", dtype=np.float32):
        with table.create(tmp_path / name, "features", {"name": name}) as file:
            table.put(file, array, np.array([[0, value]], dtype))
            table.put_strings(file, "keys", ["a" + key])
        return table.digest(tmp_path / name)

    one = digest("one.h5")
    assert one == digest("two.h5")  # another path, other settings
    changed = [
        digest("3.h5", np.nextafter(np.float32(1), np.float32(2))),
        digest("4.h5", array="feature"),
        digest("5.h5", key="c"),
        digest("6.h5", dtype=np.int32),
    ]
    assert len({one, *changed}) == 5


def test_the_digest_of_another_file_is_its_sha256(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"abc")
    assert table.digest(tmp_path / "w.safetensors").startswith("ba7816bf8f01cfea")


def test_a_column_is_the_same_table_as_an_array_written_at_once(tmp_path):
    values = np.random.default_rng(0).normal(size=(1000, 7)).astype(np.float32)
    with table.create(tmp_path / "whole.h5", "features", {}) as file:
        table.put(file, "features", values)
    with table.create(tmp_path / "parts.h5", "features", {}) as file:
        column = table.Column(file, "features", values.shape, np.float32)
        for part in np.split(values, [3, 400, 400, 999]):
            column.append(part)
    assert table.digest(tmp_path / "whole.h5") == table.digest(tmp_path / "parts.h5")
    with table.read(tmp_path / "parts.h5", "features", {"features": 2}) as file:
        assert np.array_equal(table.load(file, "features"), values)


def test_a_column_that_was_not_filled_is_found(tmp_path):
    with table.create(tmp_path / "t.h5", "features", {}) as file:
        table.Column(file, "features", (40000, 3), np.float32).append(np.zeros((9, 3)))
    with pytest.raises(DataError, match="is not all there"):
        with table.read(tmp_path / "t.h5", "features", {"features": 2}):
            pass


def test_chunks_hold_whole_rows_of_about_a_mebibyte(tmp_path):
    with table.create(tmp_path / "t.h5", "features", {}) as file:
        dataset = table.add(file, "features", (5000, 1000), np.float32)
        assert dataset.chunks == (262, 1000) and dataset.fletcher32
        assert table.add(file, "wide", (3, 1 << 20), np.float32).chunks == (1, 1 << 20)
        assert table.add(file, "flat", (10, 10), np.uint8, contiguous=True).chunks is None


# ---------------------------------------------------------------------------- packs


def test_a_pack_is_mapped_and_read_back(tmp_path):
    pixels, keys = crafted.noise(6, 5), crafted.names(6)
    pack = images.read_pack(crafted.write_pack(tmp_path / "pack.h5", pixels, keys))
    assert isinstance(pack.images, np.memmap) and np.array_equal(pack.images, pixels)
    assert pack.keys == keys and len(pack) == 6 and pack.size == 5
    assert pack.ids.dtype == np.int64 and pack.ids.min() >= 0
    with pytest.raises(ValueError, match="read-only"):
        pack.images[0] = 0


@pytest.mark.parametrize(
    "pixels, fault",
    [
        (np.zeros((3, 1, 4, 4), np.uint8), r"expected images \(N, 3, S, S\)"),
        (np.zeros((3, 3, 4, 5), np.uint8), r"expected images \(N, 3, S, S\)"),
    ],
)
def test_a_pack_of_other_shapes_is_refused(tmp_path, pixels, fault):
    with pytest.raises(DataError, match=fault):
        images.read_pack(crafted.write_pack(tmp_path / "pack.h5", pixels, crafted.names(3)))


def test_a_pack_whose_keys_repeat_is_refused(tmp_path):
    path = crafted.write_pack(tmp_path / "pack.h5", crafted.noise(3, 4), ["a", "b", "a"])
    with pytest.raises(DataError, match="1 repeated"):
        images.read_pack(path)


def test_a_flipped_byte_of_an_image_is_found_by_every_reader(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "CHUNK_BYTES", 3000)  # so that there are several checksums
    path = crafted.write_pack(tmp_path / "pack.h5", crafted.noise(90, 10), crafted.names(90))
    found = images.layout(path)
    assert len(found.sums) == 9 and found.rows == 10
    raw = bytearray(path.read_bytes())
    raw[found.offset + 47 * 300 + 5] ^= 1
    path.write_bytes(raw)
    for reader in (images.read_pack, lambda path: list(images.stream(path, 7))):
        with pytest.raises(DataError, match=f"{path} is damaged: among images 40 to 49 a byte"):
            reader(path)


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_a_stream_gives_every_image_once_with_its_key(tmp_path, monkeypatch, batch):
    monkeypatch.setattr(table, "CHUNK_BYTES", 3000)
    pixels = crafted.noise(95, 10)
    path = crafted.write_pack(tmp_path / "pack.h5", pixels, crafted.names(95))
    keys, found = zip(*images.stream(path, batch), strict=True)
    assert np.array_equal(np.concatenate(found), pixels) and max(map(len, found)) <= batch
    assert [key.decode() for key in np.concatenate(keys)] == crafted.names(95)


def test_a_pack_without_checksums_is_refused(tmp_path):
    path = crafted.write_pack(tmp_path / "pack.h5", crafted.noise(3, 4), crafted.names(3))
    with h5py.File(path, "r+") as file:
        del file["images_checks"]
        table.put_text(file, "digest", table._combined(file))
    with pytest.raises(DataError, match="contiguously, with checksums"):
        images.read_pack(path)


def test_the_ids_of_keys_never_change():
    # A change of these changes every draw of every image.
    assert images.key_ids(["a", "naïve/画像.png"]).tolist() == GOLDEN_IDS


GOLDEN_IDS = [1702698405120146464, 4618712383498060010]


# ---------------------------------------------------------------------------- JSON


def test_json_is_read_as_it_was_written_whatever_its_layout(tmp_path):
    path, content = tmp_path / "choice.json", {"k": {"1": 2}, "mean": [0.1, 1e-300], "name": "dög"}
    step.write_json(path, content)
    assert step.read_json(path) == content
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert step.read_json(path) == content


@pytest.mark.parametrize("change", [{"k": 3}, {"more": 1}, {"checksum": "0"}, {"checksum": None}])
def test_altered_json_is_refused(tmp_path, change):
    path = tmp_path / "choice.json"
    step.write_json(path, {"k": 2})
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=f"{path} is not as it was written.*remove it and run"):
        step.read_json(path)


def test_json_without_a_checksum_is_read_only_where_none_is_asked_for(tmp_path):
    path = tmp_path / "model.json"
    for text, expected in (('{"k": 2}', "is not as it was written"), ("[2]", "found .2.")):
        path.write_text(text)
        assert step.read_json(path, checked=False) == json.loads(text)
        with pytest.raises(DataError, match=expected):
            step.read_json(path)
