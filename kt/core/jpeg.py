"""Ordinary JPEGs through torchvision's decoder: the same pixels as Pillow's, a little quicker.

Both are libjpeg-turbo; whether they agree is tried out when this is loaded. Everything out of the
ordinary is Pillow's: CMYK, 12 bit, Adobe's and EXIF marks, several pictures in one file, and
progressive ones where torchvision fills in what is missing in another way (0.26 does).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

PROGRESSIVE = 0xC2
FRAMES = (0xC0, 0xC1, PROGRESSIVE)  # baseline, extended, progressive: all Huffman
OTHER_FRAMES = frozenset(range(0xC3, 0xD0)) - {0xC4, 0xC8, 0xCC}
SCAN = 0xDA
PILLOWS = (0xE1, 0xE2, 0xEE)  # EXIF or XMP; MPF or a colour profile; Adobe's colours

QUALITY = 95  # of what is packed as JPEG, without subsampling of the colours

Decoder = Callable[[bytes], np.ndarray]


class Frame(NamedTuple):
    """What the header of an ordinary JPEG says; 1 channel is grey."""

    width: int
    height: int
    channels: int


def frame(payload: bytes) -> Frame | None:
    """Reads the header of an ordinary JPEG; None if it is anything else."""
    if payload[:2] != b"\xff\xd8":
        return None
    found = None
    for marker, at in markers(payload):
        if marker in PILLOWS or marker in OTHER_FRAMES:
            return None
        if marker == SCAN:
            return found
        if marker in FRAMES:
            bits, channels = payload[at : at + 1], payload[at + 5 : at + 6]
            if found or bits != b"\x08" or channels not in (b"\1", b"\3"):
                return None
            height, width = (int.from_bytes(payload[at + n : at + n + 2]) for n in (1, 3))
            found = Frame(width, height, channels[0])
    return None


def markers(payload: bytes):
    """Yields the markers of a JPEG up to its first scan, each with the place of its content."""
    at = 2
    while at + 4 <= len(payload) and payload[at] == 0xFF:
        marker = payload[at + 1]
        if marker == 0xFF:  # fill
            at += 1
            continue
        yield marker, at + 4
        if marker == SCAN:
            return
        at += 2 + int.from_bytes(payload[at + 2 : at + 4])


def by_pillow(payload: bytes) -> np.ndarray:
    """Decodes to RGB, (H, W, 3) uint8."""
    with Image.open(io.BytesIO(payload), formats=["JPEG"]) as image:
        return np.asarray(image.convert("RGB"))


def by_torchvision() -> Decoder | None:
    """Gives a decoder like `by_pillow`; None where there is none that gives the same pixels.

    It raises RuntimeError on a broken file and on one that is for Pillow to decode.
    """
    try:
        import torch
        import torchvision.io  # registers the operator

        operator, rgb = torch.ops.image.decode_jpeg, torchvision.io.ImageReadMode.RGB.value

        def decoder(payload: bytes) -> np.ndarray:
            # bytearray: torch warns of memory that cannot be written.
            content = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
            return operator(content, rgb, False).permute(1, 2, 0).numpy()

        def baseline(payload: bytes) -> np.ndarray:
            if any(marker == PROGRESSIVE for marker, _ in markers(payload)):
                raise RuntimeError("progressive")
            return decoder(payload)

        def same(sample: bytes) -> bool:
            return np.array_equal(decoder(sample), by_pillow(sample))

        samples = _samples()
        if not all(map(same, samples)):
            return None
        cut = samples[-2][: len(samples[-2]) // 3] + b"\xff\xd9"
        return decoder if same(cut) else baseline
    except (ImportError, AttributeError, RuntimeError, OSError):
        return None


def _samples() -> list[bytes]:
    """Draws JPEGs of odd sizes: all subsamplings; progressive in colour, then in grey."""
    rows, columns = np.mgrid[:61, :83]
    waves = [np.sin(rows / period + columns / 5) for period in (3, 7, 11)]
    pixels = (128 + 127 * np.stack(waves, -1)).astype(np.uint8)
    colour, grey = Image.fromarray(pixels), Image.fromarray(pixels[..., 0])
    return [
        *(encode(colour, 75, subsampling=kind) for kind in range(3)),
        *(encode(image, 90, progressive=True) for image in (colour, grey)),
    ]


def encode(image: Image.Image, quality: int, **options) -> bytes:
    """Encodes an image as JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, **options)
    return buffer.getvalue()
