import io
import struct
import zlib

import numpy as np
import pytest
from drawing import encoded, picture
from PIL import Image

from kt.core.decode import BadImage, decode

MOST = 1_000_000
GREY = np.tile(np.arange(16, dtype=np.uint8) * 16, (16, 1))


def pixels(payload, size=16) -> np.ndarray:
    return decode(payload, size, MOST).pixels


def test_a_picture_of_the_right_size_is_kept_pixel_by_pixel():
    drawn = picture(1, 0, 24)
    assert np.array_equal(pixels(encoded(drawn), 24), drawn.transpose(2, 0, 1))
    assert np.array_equal(pixels(drawn, 24), drawn.transpose(2, 0, 1))


def test_grey_gives_three_equal_channels():
    for payload in (encoded(GREY), GREY):
        assert np.array_equal(pixels(payload), np.stack([GREY] * 3))


def test_black_and_white_gives_0_and_255():
    mask = GREY > 100
    assert np.array_equal(pixels(encoded(Image.fromarray(mask)))[0], mask * 255)


@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_16_bit_grey_covers_the_full_range(kind):
    format = "PNG" if kind is np.uint16 else "TIFF"
    payload = encoded(Image.fromarray(GREY.astype(kind) * 257), format)
    assert np.array_equal(pixels(payload)[2], GREY)


def test_float_is_stretched_from_lowest_to_highest():
    payload = encoded(Image.fromarray(GREY.astype(np.float32) / 1000 - 3), "TIFF")
    found = pixels(payload)[0]
    assert np.abs(found - np.rint(GREY * (255 / 240))).max() <= 1
    assert (found.min(), found.max()) == (0, 255)
    assert pixels(encoded(Image.new("F", (16, 16), 7.0), "TIFF")).max() == 0


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_levels_say_what_becomes_black_and_white(kind):
    payload = encoded(Image.fromarray((GREY.astype(kind) * 10 + 500).astype(kind)), "TIFF")
    found = decode(payload, 16, MOST, (1000, 2000)).pixels[0]
    wanted = np.rint((GREY.astype(float) * 10 - 500).clip(0, 1000) * 0.255)
    assert np.abs(found - wanted).max() == 0 and found.min() == 0 and found.max() == 255
    eight = encoded(Image.fromarray(GREY))
    assert np.array_equal(decode(eight, 16, MOST, (1000, 2000)).pixels[0], GREY)


def test_float_that_is_not_finite_is_refused():
    values = GREY.astype(np.float32)
    values[3, 3] = np.nan
    with pytest.raises(BadImage, match="not finite"):
        pixels(encoded(Image.fromarray(values), "TIFF"))


def test_cmyk_is_converted():
    payload = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "TIFF")
    assert pixels(payload)[:, 5, 5].tolist() == [255, 0, 0]


def _with_palette(transparent: bool) -> bytes:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 10, 20, 30, 40, 50, 60])
    image.paste(2, (0, 0, 8, 16))
    return encoded(image, "PNG", **({"transparency": 1} if transparent else {}))


def test_a_palette_gives_its_colours_and_white_where_transparent():
    for transparent, colour in ((False, [10, 20, 30]), (True, [255, 255, 255])):
        found = pixels(_with_palette(transparent))
        assert found[:, 5, 2].tolist() == [40, 50, 60]
        assert found[:, 5, 12].tolist() == colour


def test_a_transparent_colour_is_laid_on_white():
    for mode, colour, other in (("L", 50, 90), ("RGB", (50, 50, 50), (90, 90, 90))):
        image = Image.new(mode, (16, 16), colour)
        image.paste(other, (0, 0, 8, 16))
        found = pixels(encoded(image, "PNG", transparency=colour))
        assert found[:, 5, 2].tolist() == [90] * 3
        assert found[:, 5, 12].tolist() == [255] * 3


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (200, 100, 0, 0), [255, 255, 255]),
        ("RGBA", (200, 100, 0, 255), [200, 100, 0]),
        ("RGBA", (0, 0, 0, 51), [204, 204, 204]),
        ("LA", (50, 0), [255, 255, 255]),
        ("LA", (50, 255), [50, 50, 50]),
    ],
)
def test_alpha_is_laid_on_white(mode, colour, expected):
    assert pixels(encoded(Image.new(mode, (16, 16), colour)))[:, 3, 3].tolist() == expected


def test_of_an_animation_the_first_frame_counts():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    payload = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(payload)[:, 3, 3].tolist() == [255, 0, 0]


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_all_eight_exif_orientations_give_the_upright_picture(format):
    upright = Image.fromarray(np.kron(np.array([[0, 80], [160, 240]]), np.ones((12, 12))) * 1.0)
    upright = upright.convert("L").convert("RGB").resize((24, 24))
    undo = Image.Transpose
    stored = {
        1: None,
        2: undo.FLIP_LEFT_RIGHT,
        3: undo.ROTATE_180,
        4: undo.FLIP_TOP_BOTTOM,
        5: undo.TRANSPOSE,
        6: undo.ROTATE_90,
        7: undo.TRANSVERSE,
        8: undo.ROTATE_270,
    }
    expected = np.asarray(upright).transpose(2, 0, 1).astype(int)
    for orientation, turn in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = upright.transpose(turn) if turn is not None else upright
        found = pixels(encoded(turned, format, exif=exif), 24).astype(int)
        assert np.abs(found - expected).max() <= 8, orientation


def test_a_wide_picture_gives_its_centre_square():
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    assert pixels(encoded(wide), 20).min() == 255
    for turned in (wide, wide.transpose(1, 0, 2)):
        # Nothing from outside of the square comes in at its border.
        assert pixels(encoded(turned), 10).min() == 255


def test_shrinking_averages_and_does_not_skip_pixels():
    stripes = np.zeros((256, 256), np.uint8)
    stripes[:, ::2] = 254
    assert np.abs(pixels(stripes, 16)[:, 1:-1, 1:-1].astype(int) - 127).max() <= 4


def test_a_large_jpeg_looks_like_the_same_picture_as_png():
    drawn = np.asarray(Image.fromarray(picture(0, 3, 32)).resize((640, 400)))
    found = [pixels(encoded(drawn, format), 32).astype(int) for format in ("JPEG", "PNG")]
    assert np.abs(found[0] - found[1]).mean() < 3


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_picture_cut_anywhere_is_refused(format):
    whole = encoded(picture(0, 1, 64), format)
    for share in np.linspace(0, 0.98, 12):
        with pytest.raises(BadImage):
            pixels(whole[: int(share * len(whole))])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_jpeg_whose_end_is_overwritten_with_zeros_is_refused(share):
    whole = encoded(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8), "JPEG")
    kept = int(share * len(whole))
    zeroed = whole[:kept] + bytes(len(whole) - kept)
    with Image.open(io.BytesIO(zeroed + bytes(len(whole)))) as image:
        image.load()  # Pillow alone is content, and fills the rest with grey
    for payload in (zeroed, zeroed + bytes(len(whole))):
        with pytest.raises(BadImage, match="truncated"):
            pixels(payload)


def test_a_jpeg_with_a_thumbnail_and_a_trailer_is_whole():
    exif = Image.Exif()
    exif[0x010E] = "\xff\xd9 in a note"
    whole = encoded(picture(0, 1, 32), "JPEG", exif=exif)
    assert pixels(whole + b"\0" * 50).shape == (3, 16, 16)


def test_the_content_and_not_the_name_decides():
    with pytest.raises(BadImage, match="not an image file.*<html>"):
        pixels(b"<html><body>404</body></html>")
    with pytest.raises(BadImage, match="not an image file"):
        pixels(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n")
    with pytest.raises(BadImage, match="empty"):
        pixels(b"")


def _bomb(edge: int) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", edge, edge, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((edge // 8 + 1) * edge), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("edge", [2000, 10000, 20000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_from_its_header(edge, monkeypatch):
    payload = _bomb(edge)
    assert len(payload) < 60_000

    def never(*_):
        raise AssertionError("a bomb was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    with pytest.raises(BadImage, match="max_pixels|decompression bomb"):
        decode(payload, 16, MOST)


def test_the_pixel_limit_itself_is_allowed():
    payload = encoded(np.zeros((20, 30), np.uint8))
    assert decode(payload, 16, 600).pixels.shape == (3, 16, 16)
    with pytest.raises(BadImage, match="30 x 20 pixels, more than max_pixels = 599"):
        decode(payload, 16, 599)


def test_the_limit_of_the_settings_counts_and_not_pillows(monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    payload = encoded(np.zeros((20, 30), np.uint8))
    assert decode(payload, 16, 600).pixels.shape == (3, 16, 16)


def test_a_shorter_side_below_8_is_refused_and_8_is_enlarged():
    assert pixels(np.zeros((8, 90), np.uint8)).shape == (3, 16, 16)
    with pytest.raises(BadImage, match="90 x 7"):
        pixels(np.zeros((7, 90), np.uint8))


def test_what_it_was_in_its_file_is_reported():
    decoded = decode(encoded(Image.new("CMYK", (40, 20)), "JPEG"), 16, MOST)
    assert (decoded.mode, decoded.width, decoded.height) == ("CMYK", 40, 20)


def test_random_damage_gives_a_picture_or_a_reason_and_nothing_else():
    random = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"):
        whole = encoded(picture(2, 5, 32), format)
        for _ in range(60):
            damaged = bytearray(whole)
            for place in random.integers(0, len(damaged), 3):
                damaged[place] = random.integers(256)
            try:
                assert pixels(bytes(damaged)).shape == (3, 16, 16)
            except BadImage as error:
                assert str(error) and " at 0x" not in str(error)


def test_orientation_that_is_nonsense_does_no_harm():
    exif = Image.Exif()
    exif[0x0112] = 77
    buffer = io.BytesIO()
    Image.fromarray(picture(0, 0)).save(buffer, "JPEG", exif=exif)
    assert pixels(buffer.getvalue()).shape == (3, 16, 16)
