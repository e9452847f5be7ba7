"""Images and features drawn for the benchmark: structured, quick to make, always the same."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np

DISTINCT = 64  # pictures that are drawn; more are these again, turned over and recoloured


def images(number: int, size: int, seed: int = 0) -> np.ndarray:
    """Draws smooth shapes with edges and grain, (N, 3, S, S) uint8."""
    random = np.random.default_rng(seed)
    found = np.empty((number, 3, size, size), np.uint8)
    base = np.stack([picture(size, size, random) for _ in range(min(number, DISTINCT))])
    for first in range(0, number, len(base)):
        block = base[: number - first]
        block = block[:, :, :, ::-1] if first // len(base) % 2 else block
        found[first : first + len(block)] = block + np.uint8(first // len(base) % 32)
    return found


def picture(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """Draws one picture, (3, H, W) uint8: a sky of waves, a dozen discs, grain."""
    row, column = np.mgrid[:height, :width].astype(np.float32) / max(height, width)
    waves = random.uniform(2, 12, (3, 2))
    sky = [np.sin(6 * one * row + two * column) for one, two in waves]
    pixels = 120 + 50 * np.stack(sky)
    for _ in range(12):
        y, x, radius = *random.uniform(0, 1, 2), random.uniform(0.02, 0.2)
        disc = (row - y) ** 2 + (column - x) ** 2 < radius**2
        pixels[:, disc] = random.uniform(0, 255, (3, 1))
    return (pixels + random.normal(0, 5, pixels.shape)).clip(0, 255).astype(np.uint8)


def jpegs(number: int, width: int, height: int) -> list[bytes]:
    """Draws JPEGs of quality 90, some tens of kB each at 400 x 533."""
    from PIL import Image

    random, found = np.random.default_rng(1), []
    for _ in range(number):
        buffer = io.BytesIO()
        pixels = picture(height, width, random).transpose(1, 2, 0)
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


def small_pictures(path: Path, number: int) -> Path:
    """Writes a tar of PPM pictures of 12 to 16 px, each another one."""
    random = np.random.default_rng(2)
    with tarfile.open(path, "w") as archive:
        for row in range(number):
            edge = 12 + row % 5
            payload = b"P6 %d %d 255\n" % (edge, edge) + random.bytes(3 * edge * edge)
            member = tarfile.TarInfo(f"{row:07d}.ppm")
            member.size = len(payload)
            archive.addfile(member, io.BytesIO(payload))
    return path


def keys(number: int) -> list[str]:
    """Gives so many names, in order."""
    return [f"{row:07d}" for row in range(number)]


def features(number: int, dimensions: int, seed: int = 3) -> np.ndarray:
    """Draws a cloud of 16 directions and noise, (N, D) float32.

    It has no clusters of its own, on which k-means would come to rest after a few iterations: every
    run then takes all of its iterations.
    """
    random = np.random.default_rng(seed)
    directions = random.standard_normal((16, dimensions), np.float32)
    found = random.standard_normal((number, 16), np.float32) @ directions
    found += random.standard_normal((number, dimensions), np.float32)
    return found
