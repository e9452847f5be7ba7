"""The quick ways of `kt.core.decode` against Pillow's: the same pixels and the same verdicts."""

import numpy as np
import pytest
from drawing import encoded
from PIL import Image

from kt.core import decode, jpeg, resample

MOST = 100_000_000
SIZES = [(400, 533), (255, 255), (256, 300), (97, 61), (8, 40), (700, 130), (300, 301)]


@pytest.fixture(scope="module")
def quick():
    """Gives the quick decoder, which every test here switches on and off."""
    yield ways()
    decode._quick.jpeg = decode._quick.resample = None


def ways() -> tuple:
    """Gives what `both` needs."""
    decode.hurry()
    found = decode._quick.jpeg, decode._quick.resample
    assert None not in found, "torchvision's decoder is missing or gives other pixels"
    return found


def both(payload: bytes, size: int, quick, most: int = MOST) -> list:
    """Decodes on both ways; a rejected file gives the reason."""
    results = []
    for way in (quick, (None, None)):
        decode._quick.jpeg, decode._quick.resample = way
        try:
            results.append(decode.decode(payload, size, most))
        except decode.BadImage as error:
            results.append(str(error))
    decode._quick.jpeg, decode._quick.resample = quick
    return results


def same(results) -> bool:
    quick, slow = results
    if isinstance(quick, str) or isinstance(slow, str):
        return quick == slow
    return np.array_equal(quick.pixels, slow.pixels) and quick[1:] == slow[1:]


def drawn(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Draws waves, an edge of full contrast and noise, (H, W, 3) uint8."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / random.uniform(2, 20) + columns / random.uniform(2, 20)) for _ in "rgb"]
    pixels = 128 + 100 * np.stack(waves, -1) + random.normal(0, 15, (height, width, 3))
    pixels[height // 3 : height // 2] = (0, 255, 255)
    return pixels.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("height,width", SIZES)
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_jpegs_have_the_same_pixels_on_both_ways(height, width, progressive, subsampling, quick):
    options = {"progressive": progressive, "subsampling": subsampling}
    for quality, size in ((35, 64), (75, 255), (92, 96)):
        payload = encoded(drawn(height, width), "JPEG", quality=quality, **options)
        assert jpeg.frame(payload) == (width, height, 3)
        assert same(both(payload, size, quick)), (quality, size)


def test_grey_and_odd_jpegs_have_the_same_pixels_on_both_ways(quick):
    image = Image.fromarray(drawn(201, 303))
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = encoded(image.convert("L"), "JPEG")
    assert jpeg.frame(grey) == (303, 201, 1)
    payloads = [
        grey,
        encoded(image.convert("L"), "JPEG", progressive=True),
        encoded(image.convert("CMYK"), "JPEG"),
        encoded(image, "JPEG", exif=exif),
        encoded(image, "JPEG", restart_marker_blocks=3),
        encoded(image, "JPEG", optimize=True, qtables=[[1] * 64, [9] * 64]),
        encoded(image, "JPEG", keep_rgb=True),
        encoded(image, "JPEG", comment=b"a note", icc_profile=b"profile"),
        encoded(image, "JPEG") + b"\0" * 100,
        encoded(image, "PNG"),
        encoded(image, "WEBP"),
    ]
    for number, payload in enumerate(payloads):
        assert same(both(payload, 64, quick)), number
    odd = [payload for payload in payloads if jpeg.frame(payload) is None]
    assert len(odd) >= 5  # these are Pillow's


def test_a_cut_or_zeroed_jpeg_is_judged_alike_on_both_ways(quick):
    image = drawn(200, 240)
    for options in ({}, {"progressive": True}, {"subsampling": 0, "restart_marker_blocks": 5}):
        whole = encoded(image, "JPEG", quality=85, **options)
        for share in np.linspace(0.02, 0.995, 10):
            at = int(share * len(whole))
            cut, zeroed = whole[:at], whole[:at] + bytes(len(whole) - at)
            hole = whole[:at] + bytes(min(60, len(whole) - at - 2)) + whole[at + 60 :]
            for payload in (cut, zeroed, cut + b"\xff\xd9", hole):
                results = both(payload, 64, quick)
                assert same(results), (options, share)
            assert all(isinstance(result, str) for result in both(cut, 64, quick))


def test_a_jpeg_that_ends_anywhere_in_its_header_is_judged_alike_on_both_ways(quick):
    whole = encoded(drawn(16, 16), "JPEG", progressive=True)
    scan = next(at for marker, at in jpeg.markers(whole) if marker == jpeg.SCAN)
    for at in range(scan):
        assert jpeg.frame(whole[:at]) is None
        assert same(both(whole[:at], 16, quick)), at


def test_damaged_jpegs_are_judged_alike_on_both_ways(quick):
    random = np.random.default_rng(0)
    whole = encoded(drawn(64, 80), "JPEG")
    for _ in range(300):
        damaged = bytearray(whole)
        for place in random.integers(0, len(damaged), 3):
            damaged[place] = random.integers(256)
        assert same(both(bytes(damaged), 32, quick))


def test_the_compiled_resize_gives_pillows_pixels(quick):
    random = np.random.default_rng(0)
    for _ in range(120):
        edge, size = (int(n) for n in random.integers(8, 400, 2))
        square = random.integers(0, 256, (edge, edge, 3), np.uint8)
        if edge % 2:
            square = np.where(square > 127, 255, 0).astype(np.uint8)
        slow = Image.fromarray(square).resize((size, size), Image.Resampling.BICUBIC)
        found = resample.resize(square, size)
        assert edge == size or np.array_equal(found, np.asarray(slow).transpose(2, 0, 1))


def test_a_large_jpeg_is_decoded_at_a_fraction_on_both_ways(quick):
    payload = encoded(drawn(900, 1200), "JPEG")
    assert same(both(payload, 96, quick))


def test_a_header_that_says_too_much_is_refused_before_decoding(quick, monkeypatch):
    payload = bytearray(encoded(drawn(64, 64), "JPEG"))
    at = next(at for marker, at in jpeg.markers(bytes(payload)) if marker in jpeg.FRAMES)
    payload[at + 1 : at + 5] = b"\xff\xf0\xff\xf0"
    assert jpeg.frame(bytes(payload)).width == 0xFFF0

    def never(_):
        raise AssertionError("a bomb was decoded")

    monkeypatch.setattr(decode._quick, "jpeg", never)
    with pytest.raises(decode.BadImage, match="max_pixels|bomb"):
        decode.decode(bytes(payload), 64, MOST)


def test_another_decoder_with_other_pixels_is_not_used(monkeypatch):
    monkeypatch.setattr(jpeg, "by_pillow", lambda payload: np.zeros((61, 83, 3), np.uint8))
    assert jpeg.by_torchvision() is None
