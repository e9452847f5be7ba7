"""From the bytes of a file to packed pixels, by fixed rules.

The picture is turned upright (EXIF), made RGB, cut to its centre square, and the square is resized
with antialiasing (bicubic, Pillow's). A JPEG whose sides are both at least 4 times the packed size
is decoded at 1/2, 1/4 or 1/8 first (libjpeg's scaling), to no less than twice the packed size.

After `hurry` two steps go quicker ways to the same pixels: `kt.core.jpeg`, `kt.core.resample`.

Rules by mode: grey gives three equal channels; 16-bit (also as 32-bit integers) is divided by
257; float is stretched from its lowest to its highest value; or both between two levels that are
given; palette and transparency are laid on white; of an animation the first frame counts; all else
as Pillow converts it.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from kt.core import jpeg

WORTH = 1e9  # pixels; loading torch, torchvision and numba costs some 4 s, an ordinary photograph
# of 0.2 million pixels wins 1.5 ms
MIN_EDGE = 8  # pixels; a shorter side below this shows nothing
# Only formats that Pillow decodes itself: none that starts another program, such as EPS.
Image.init()
FORMATS = [
    name
    for name in ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM")
    if name in Image.OPEN
]
# What Pillow raises on files that are not what they say.
FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    EOFError,
    ArithmeticError,
    RuntimeError,
    AssertionError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class Decoded(NamedTuple):
    """One picture: packed pixels (3, S, S) uint8, and the mode and size it had in its file."""

    pixels: np.ndarray
    mode: str
    width: int
    height: int


class BadImage(Exception):
    """A file that is no usable picture; the text is the reason for the data report."""


Levels = tuple[float, float] | None


def decode(
    payload: bytes | np.ndarray, size: int, max_pixels: int, levels: Levels = None
) -> Decoded:
    """Decodes one picture completely and packs it.

    Args:
        payload: The bytes of an image file, or pixels (H, W) or (H, W, 3) uint8.
        size: Edge of the result, pixels.
        max_pixels: Pictures with more are refused before they are decoded.
        levels: Values that become black and white in pictures of 16 bits or floats.

    Raises:
        BadImage: It is truncated, no picture, too large or too small.
    """
    try:
        found = _ordinary(payload, size, max_pixels) if _quick.jpeg else None
        return found or _decode(payload, size, max_pixels, levels)
    except FAULTS as error:
        raise BadImage(f"{type(error).__name__}: {_without_address(error)}") from error


class _Quick:
    """What `hurry` loads: a decoder of JPEGs, and the module that resizes."""

    jpeg: jpeg.Decoder | None = None
    resample = None


_quick = _Quick()


def hurry() -> None:
    """Loads what gives the same pixels quicker; pays from about `WORTH` pixels."""
    if _quick.resample is None:
        from kt.core import resample

        _quick.resample, _quick.jpeg = resample, jpeg.by_torchvision()


def _decode(payload: bytes | np.ndarray, size: int, max_pixels: int, levels: Levels) -> Decoded:
    image = _open(payload, max_pixels)
    mode, (width, height) = image.mode, image.size
    _check_size(width, height, max_pixels)
    image.draft(None, (2 * size, 2 * size))  # large JPEGs: decode at 1/2, 1/4 or 1/8
    upright = _rgb(ImageOps.exif_transpose(image), levels)
    return Decoded(_pack(upright, size), mode, width, height)


def _ordinary(payload: bytes | np.ndarray, size: int, max_pixels: int) -> Decoded | None:
    """Decodes a JPEG on the quick way; None if it is for Pillow to decode or to judge."""
    header = jpeg.frame(payload) if isinstance(payload, bytes) else None
    if header is None or not _has_end(payload):
        return None
    width, height, channels = header
    most = min(max_pixels, Image.MAX_IMAGE_PIXELS or max_pixels)
    if width * height > most or min(width, height) < MIN_EDGE or min(width, height) >= 4 * size:
        return None
    try:
        pixels = _quick.jpeg(payload)
    except RuntimeError:
        return None
    edge = min(width, height)
    top, left = (height - edge) // 2, (width - edge) // 2
    square = pixels[top : top + edge, left : left + edge]
    return Decoded(_shrink(square, size), "RGB" if channels == 3 else "L", width, height)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImage(f"{width} x {height} pixels, more than max_pixels = {max_pixels}")
    if min(width, height) < MIN_EDGE:
        raise BadImage(f"{width} x {height} pixels, the shorter side must have {MIN_EDGE}")


def _open(payload: bytes | np.ndarray, max_pixels: int) -> Image.Image:
    if isinstance(payload, np.ndarray):
        return Image.fromarray(payload)
    if not payload:
        raise BadImage("the file is empty")
    if Image.MAX_IMAGE_PIXELS < max_pixels:  # or Pillow would refuse what the settings allow
        Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        image = Image.open(io.BytesIO(payload), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise BadImage(f"not an image file, it begins with {payload[:16]!r}") from None
    if image.format in ("JPEG", "MPO") and not _has_end(payload):
        raise BadImage("truncated: the JPEG has no end marker")
    return image


def _has_end(payload: bytes) -> bool:
    """Looks for the end marker after a JPEG's first scan begins.

    Pillow notices missing bytes, but fills with grey what was overwritten with zeros.
    """
    for marker, at in jpeg.markers(payload):
        if marker == jpeg.SCAN:
            return payload.rfind(b"\xff\xd9", at) >= 0  # from the end, where it should be
    return True  # an unusual header: Pillow shall judge


def _rgb(image: Image.Image, levels: Levels) -> Image.Image:
    if image.mode.startswith("I"):
        image = Image.fromarray(_stretched(np.asarray(image, np.float64), levels or (0, 65535)))
    elif image.mode == "F":
        image = Image.fromarray(_stretched(np.asarray(image, np.float64), levels))
    elif image.mode in ("P", "PA", "LA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _stretched(values: np.ndarray, levels: Levels) -> np.ndarray:
    """Makes uint8 of values between two levels, those of the picture itself if none are given."""
    if not np.isfinite(values).all():
        raise BadImage("holds values that are not finite")
    low, high = levels or (values.min(), values.max())
    scale = 255 / (high - low) if high > low else 0.0
    return np.rint((values.clip(low, high) - low) * scale).astype(np.uint8)


def _pack(image: Image.Image, size: int) -> np.ndarray:
    """Resizes the centre square of an RGB image, (3, size, size) uint8; the same size is kept."""
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    square = image.crop((left, top, left + edge, top + edge))
    if edge == size or _quick.resample is not None:
        pixels = np.frombuffer(square.tobytes(), np.uint8).reshape(edge, edge, 3)
        return _shrink(pixels, size)
    resized = square.resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def _shrink(square: np.ndarray, size: int) -> np.ndarray:
    """Resizes (E, E, 3) uint8 to (3, size, size), after `hurry`; the same size is kept."""
    if len(square) == size:
        return np.ascontiguousarray(square.transpose(2, 0, 1))
    return _quick.resample.resize(square, size)


def _without_address(error: BaseException) -> str:
    """Gives an error's text without `<... object at 0x...>`, so that reports are repeatable."""
    return str(error).split(" <", 1)[0].split(" object at 0x", 1)[0] or "no further details"
