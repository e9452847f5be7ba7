"""Near copies of test images are found, and different images are not taken for copies."""

import io
import math

import crafted
import numpy as np
import pytest
from drawing import encoded, pattern, tree, write_folder
from PIL import Image
from test_ingest import keys, pack

from kt.core import copies
from kt.core.layouts import POOL, TRAIN

SIZE = 48


def scene(number: int, size: int = 64) -> np.ndarray:
    """Draws some overlapping rectangles with a little noise, (S, S, 3) uint8."""
    random = np.random.default_rng(number)
    pixels = np.full((size, size, 3), random.uniform(40, 215, 3))
    for _ in range(8):
        top, left = random.integers(0, size - 4, 2)
        height, width = random.integers(4, size, 2)
        pixels[top : top + height, left : left + width] = random.uniform(0, 255, 3)
    return (pixels + random.normal(0, 4, pixels.shape)).clip(0, 255).astype(np.uint8)


def changed(pixels: np.ndarray, share: float, format: str, **options) -> bytes:
    """Resizes and encodes anew."""
    edge = round(share * len(pixels))
    image = Image.fromarray(pixels).resize((edge, edge), Image.Resampling.LANCZOS)
    return encoded(image, format, **options)


def files() -> dict[str, bytes]:
    drawn = tree(20, 8, 8, 64, lambda label, number, size: scene(9 * number + label, size))
    return dict(drawn)


CHANGES = [
    (0.5, "JPEG", {"quality": 90}), (2, "JPEG", {"quality": 50}), (1, "WEBP", {"quality": 60}),
    (0.7, "PNG", {}), (1.3, "JPEG", {"quality": 90}), (1, "JPEG", {"quality": 40}),
]  # fmt: skip


def test_planted_copies_are_left_out_of_pool_and_train_and_nothing_else(tmp_path):
    drawn = files()
    before = set(drawn)
    for number, (share, format, options) in enumerate(CHANGES):
        for split, place in (("train-unlabelled", number), ("train/bird", number + 1)):
            original = Image.open(io.BytesIO(drawn[f"test/bird/{place:03d}.png"]))
            name = f"{split}/copy{number}.{format.lower()}"
            drawn[name] = changed(np.asarray(original), share, format, **options)
    drawn["train-unlabelled/exact.bmp"] = encoded(
        Image.open(io.BytesIO(drawn["test/apple/000.png"])), "BMP"
    )
    root = write_folder(drawn, tmp_path / "drawn")
    report = pack(root, tmp_path / "out", size=SIZE, near_copies=0.25)
    assert set().union(*keys(tmp_path / "out").values()) == before
    assert (report["left_out_of_pool"], report["left_out_of_train"]) == (7, 6)
    assert (report["near_copies_in_pool"], report["near_copies_in_train"]) == (6, 6)
    pairs = {pair["key"]: pair["of"] for pair in report["near_copies"]}
    assert pairs["train-unlabelled/copy3.png"] == "test/bird/003.png"
    assert all(0 < pair["difference"] <= 0.25 for pair in report["near_copies"])
    off = pack(root, tmp_path / "off", size=SIZE, near_copies=None)
    assert (off["left_out_of_pool"], off["left_out_of_train"]) == (1, 0)
    assert off["near_copies"] == []


def test_pictures_of_one_kind_are_no_copies(tmp_path):
    root = write_folder(tree(30, 10, 10, 48, pattern), tmp_path / "drawn")
    report = pack(root, tmp_path / "out", size=SIZE, near_copies=0.25)
    assert report["near_copies"] == []
    assert {split: len(keys(tmp_path / "out")[split]) for split in (POOL, TRAIN)} == {
        POOL: 90,
        TRAIN: 30,
    }


@pytest.mark.parametrize("size", [12, 17, 28, 64])
def test_a_print_is_the_mean_of_blocks(size):
    pixels = scene(3, size).transpose(2, 0, 1)
    grey = pixels.astype(float).mean(0)
    edges = [at * size // 8 for at in range(9)]
    expected = [
        grey[edges[i] : edges[i + 1], edges[j] : edges[j + 1]].mean()
        for i in range(8)
        for j in range(8)
    ]
    assert np.abs(copies.print_of(pixels) - np.array(expected)).max() <= 1


def test_means_of_blocks_are_rounded():
    pixels = np.array([[0, 9, 9], [1, 0, 1], [1, 1, 1]], np.uint8)
    assert copies.block_means(pixels, 1).tolist() == [[3]]  # 23 ninths
    assert copies.block_means(pixels, 2).tolist() == [[0, 9], [1, 1]]
    assert copies.block_means(pixels[1:, :2], 1).tolist() == [[1]]  # three quarters


def test_the_search_finds_what_comparing_each_with_each_finds(monkeypatch):
    random = np.random.default_rng(0)
    test = random.integers(0, 256, (40, 64), np.uint8)
    noise = random.normal(0, random.uniform(2, 14, (300, 1)), (300, 64))
    prints = (test[random.integers(0, 40, 300)] + noise).clip(0, 255).astype(np.uint8)
    distances = ((prints[:, None].astype(float) - test) ** 2).mean(2)
    expected = {(int(i), int(j)) for i, j in np.argwhere(distances < copies.NEAR**2)}
    monkeypatch.setattr(copies, "BLOCK", 40 * 7)
    found = {(row, int(at)) for row, others in copies.near(prints, test) for at in others}
    assert found == expected and 50 < len(found) < 300
    assert list(copies.near(prints, test[:0])) == []


def test_of_several_test_pictures_the_closest_is_named_by_its_row(monkeypatch):
    monkeypatch.setattr(copies, "ROWS", 1)
    pictures = np.stack([scene(number, 32).transpose(2, 0, 1) for number in range(6)])
    pictures[4] = pictures[1] // 2 + 60
    pictures[1] = pictures[4] + np.uint8(4)
    pictures[5] = pictures[4]
    pictures[5, :, :4, :4] ^= 2
    found = copies.find(
        np.array([2, 5]),
        np.array([1, 3, 4]),
        lambda places: np.stack([copies.print_of(pictures[place]) for place in places]),
        pictures.__getitem__,
        0.25,
    )
    assert [(row, other) for row, other, _ in found] == [(5, 4)]


def difference(image, *others):
    """What the search finds for one picture, against the definition picture by picture."""
    found = copies.Compared(len(others), others.__getitem__)
    values = found.differences(image, np.arange(len(others))).tolist()
    assert found.differences(image, np.arange(len(others))).tolist() == values
    for value, other in zip(values, others, strict=True):
        blocks = min(copies.FINE, image.shape[-1])
        mine, its = (copies.block_means(one, blocks).astype(float) for one in (image, other))
        distance, contrast = np.sqrt(((mine - its) ** 2).mean()), its.std(axis=(1, 2)).mean()
        assert value == (0.0 if distance == 0 else distance / contrast if contrast else math.inf)
    return values


@pytest.mark.parametrize("size", [12, 16, 40])
def test_pictures_are_compared_as_one_by_one(size, monkeypatch):
    monkeypatch.setattr(copies, "ROWS", 3)
    drawn = crafted.noise(8, size)
    assert difference(drawn[0], *drawn)[0] == 0


def test_a_flat_picture_is_like_its_equal_only():
    flat = np.full((3, 16, 16), 90, np.uint8)
    assert difference(flat, flat) == [0]
    assert difference(flat + np.uint8(1), flat) == [math.inf]
    one, two = (scene(number, 16).transpose(2, 0, 1) for number in (1, 2))
    assert difference(one, two, flat)[0] > 0.5
