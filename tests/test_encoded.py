"""Packs of JPEGs are read as packs of pixels are."""

import dataclasses
from pathlib import Path

import crafted
import h5py
import numpy as np
import pytest
import torch
from drawing import encoded as encode
from drawing import pattern, tree, write_folder
from test_ingest import pack

from kt.core import delivery, encoded, images, jpeg, order, training
from kt.core.layouts import POOL, SPLITS, TEST
from kt.core.order import BLOCK, block_of, block_order
from kt.core.step import DataError, ResourceError
from kt.pretext_train import build_task, pool_context


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoded")
    files = tree(24, 6, 6, 40, pattern)
    files["test/apple/packed.jpg"] = encode(pattern(0, 77, 32), "JPEG", quality=70)
    place = write_folder(files, root / "drawn")
    for storage in ("pixels", "jpeg"):
        pack(place, root / storage, size=32, storage=storage)
    return root


def pools(folders, split=POOL):
    return [images.read_pack(folders / name / f"{split}.h5") for name in ("pixels", "jpeg")]


def test_what_the_quick_decoder_does_not_take_is_decoded_by_pillow(folders, monkeypatch):
    def baseline(content):
        raise RuntimeError("progressive" if not full else "can't allocate memory: you tried")

    monkeypatch.setattr(encoded, "_decoder", lambda: jpeg.by_pillow)
    packed, full = pools(folders)[1].images, False
    expected = packed[:12]
    monkeypatch.setattr(encoded, "_decoder", lambda: baseline)
    assert np.array_equal(packed[:12], expected)
    full = True
    with pytest.raises(ResourceError, match="no memory to decode"):
        packed[0]


def test_extraction_looks_at_every_byte_of_a_pack_once(folders, monkeypatch):
    seen, verify = [], images.table.verify
    monkeypatch.setattr(images.table, "verify", lambda *given: seen.append(given) or verify(*given))
    path = folders / "jpeg" / f"{POOL}.h5"
    assert images.layout(path).shape == images.read_pack(path).images.shape and len(seen) == 1
    images.span(path, 8, images.WHOLE)
    assert sum(len(keys) for keys, _ in images.stream(path, 8)) == 72 and len(seen) == 2


def test_rows_are_those_of_the_pixels_but_for_the_encoding(folders):
    for split in SPLITS:
        plain, packed = pools(folders, split)
        assert packed.keys == plain.keys and np.array_equal(packed.ids, plain.ids)
        assert packed.images.shape == plain.images.shape and packed.images.dtype == np.uint8
        assert len(packed) == len(packed.images) and packed.size == 32
        found = packed.images[:]
        assert np.abs(found.astype(int) - plain.images[:]).mean() < 5
        assert (folders / "jpeg" / f"{split}.h5").stat().st_size < 2 * plain.images.nbytes


def test_any_way_to_ask_for_rows_gives_the_same_rows(folders):
    packed = pools(folders)[1].images
    every = np.stack([packed[row] for row in range(len(packed))])
    rows = np.random.default_rng(0).integers(0, len(packed), 50)
    assert np.array_equal(packed[rows], every[rows])
    assert np.array_equal(packed[5:40:3], every[5:40:3])
    assert np.array_equal(packed[-1], every[-1])
    assert packed[np.empty(0, np.int64)].shape == (0, 3, 32, 32)
    with pytest.raises(IndexError):
        packed[len(packed)]


def test_both_decoders_give_the_same_pixels(folders, monkeypatch):
    packed = pools(folders)[1].images
    found = packed[:20]
    monkeypatch.setattr(encoded, "_decoder", lambda: jpeg.by_pillow)
    assert np.array_equal(packed[:20], found)


def test_a_jpeg_of_the_packed_size_is_kept_as_it_is(folders):
    packed = pools(folders, TEST)[1]
    row = packed.keys.index("test/apple/packed.jpg")
    data, offsets = packed.images.data, packed.images.offsets
    file = folders / "drawn" / "test" / "apple" / "packed.jpg"
    assert data[offsets[row] : offsets[row + 1]].tobytes() == file.read_bytes()


def test_batches_for_inference_come_from_encoded_packs(folders):
    packed = pools(folders)[1]
    batches = list(training.pack_batches(packed, torch.arange(len(packed)), 16))
    assert torch.equal(torch.cat(batches), torch.from_numpy(packed.images[:]))


class Counted(np.ndarray):
    """Bytes that note which stretches were read."""

    def __getitem__(self, index):
        if isinstance(index, slice):
            self.read.append(index.start)
        return super().__getitem__(index)


def test_in_block_order_an_encoded_pack_is_read_in_few_stretches(folders):
    pool = pools(folders)[1]
    packed = pool.images
    data = packed.data.view(Counted)
    data.read = []
    spied = encoded.Encoded(data, packed.offsets, 32, packed.where)
    block, window = 6, 3
    rows_of_epoch = block_order(torch.from_numpy(pool.ids), 0, 0, block, window).numpy()
    for first in range(0, len(rows_of_epoch), block * window):
        data.read.clear()
        spied[rows_of_epoch[first : first + block * window]]
        rows = np.searchsorted(packed.offsets, sorted(data.read))
        assert len(set(rows // block)) <= window
        assert (np.diff(rows) > 1).sum() < window


def test_blocks_are_read_where_images_are_encoded_or_too_many_for_the_memory(folders, monkeypatch):
    plain, packed = pools(folders)
    assert (block_of(plain.images), block_of(packed.images)) == (0, BLOCK)
    largest = np.broadcast_to(np.uint8(0), (images.LARGE // (3 * 64**2), 3, 64, 64))
    more = np.broadcast_to(np.uint8(0), (1 + images.LARGE // (3 * 64**2), 3, 64, 64))
    assert (block_of(largest), block_of(more)) == (0, BLOCK)
    report = folders / "pixels/report.json"
    assert pool_context(plain, report, 0).block == 0
    monkeypatch.setattr(order, "LARGE", plain.images.nbytes - 1)
    assert pool_context(plain, report, 0).block == BLOCK  # what tasks draw by, see `Task.order`


def altered(folders, tmp_path, change):
    path = tmp_path / "altered.h5"
    path.write_bytes((folders / "jpeg" / f"{POOL}.h5").read_bytes())
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def _replace(file, name, values):
    del file[name]
    file[name] = values


@pytest.mark.parametrize(
    "change",
    [
        lambda file: _replace(file, "offsets", file["offsets"][...][::-1]),
        lambda file: _replace(file, "offsets", file["offsets"][:-1]),
        lambda file: _replace(file, "offsets", file["offsets"][...].astype(float)),
        lambda file: _replace(file, "keys", ["a"] * len(file["keys"])),
        lambda file: file.attrs.__delitem__("size"),
        lambda file: file.attrs.__setitem__("complete", False),
        lambda file: file.move("data", "elsewhere"),
        lambda file: _replace(file, "data", h5py.ExternalLink("other.h5", "data")),
    ],
)
def test_an_encoded_pack_that_does_not_fit_together_is_refused(folders, tmp_path, change):
    with pytest.raises(DataError):
        images.read_pack(altered(folders, tmp_path, change))


def test_a_broken_image_is_named(folders):
    whole = pools(folders)[1].images
    data = np.array(whole.data)
    data[slice(*whole.offsets[3:5])] = 0
    broken = encoded.Encoded(data, whole.offsets, 32, Path("altered.h5"))
    assert broken[2].shape == (3, 32, 32)
    with pytest.raises(DataError, match="altered.h5: image of row 3 is broken"):
        broken[:]


def test_a_changed_byte_is_found_before_any_image_is_shown(folders, tmp_path):
    def change(file):
        file["data"][100] ^= 1

    with pytest.raises(DataError, match="'data' is not what was written"):
        images.read_pack(altered(folders, tmp_path, change))


@pytest.mark.parametrize("kind", ["jigsawpp", "classification"])
def test_batches_of_an_encoded_pack_are_those_of_its_decoded_pixels(folders, kind):
    packed = pools(folders)[1]
    plain = dataclasses.replace(packed, images=packed.images[:])
    labels, number = torch.arange(len(packed)) % 3, len(packed)
    context = crafted.context(32, number, 0, labels, 3)
    values = crafted.JIGSAW if kind == "jigsawpp" else crafted.LABELS | {"crop": 0.5, "flip": 0.5}
    task = build_task(crafted.plugin(values), dataclasses.replace(context, block=8))
    order = task.order(torch.arange(number), 1)[: number // 8 * 8]
    one, two = (
        list(delivery.batches(task, pack, order, 8, 1, torch.device("cpu"), 2))
        for pack in (packed, plain)
    )
    for (rows, views, known), (same, expected, true) in zip(one, two, strict=True):
        assert torch.equal(rows, same) and torch.equal(known, true)
        assert torch.equal(views, expected)


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_encoded_packs_stream_as_packs_of_pixels_do(folders, batch):
    path = folders / "jpeg" / f"{POOL}.h5"
    keys, found = zip(*images.stream(path, batch), strict=True)
    whole = images.read_pack(path)
    assert [key.decode() for part in keys for key in part.tolist()] == whole.keys
    assert np.array_equal(np.concatenate(found), whole.images[:])
    assert images.layout(path).shape == whole.images.shape
