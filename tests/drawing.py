"""Small pictures drawn for the tests; what class they are of can be read from their pixels."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("apple", "bird", "cloud")
COLOURS = np.array([(220, 30, 30), (30, 200, 30), (30, 30, 220)])


def picture(label: int, number: int, size: int = 32) -> np.ndarray:
    """Draws a disc in the colour of its class on grey, placed by `number`: (S, S, 3) uint8."""
    random = np.random.default_rng([label, number])
    rows, columns = np.mgrid[:size, :size]
    centre = random.uniform(0.35, 0.65, 2) * size
    disc = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < (0.3 * size) ** 2
    ground = random.integers(90, 160, (size, size, 1)).repeat(3, 2)
    return np.where(disc[..., None], COLOURS[label], ground).astype(np.uint8)


def pattern(label: int, number: int, size: int = 32) -> np.ndarray:
    """Draws noisy stripes, rings or checks in any colour: (S, S, 3) uint8."""
    random = np.random.default_rng([label, number])
    rows, columns = np.mgrid[:size, :size]
    period = random.uniform(5, 9)
    top, left = random.uniform(0, size, 2)
    down, across = (
        (place + shift) * 2 * np.pi / period for place, shift in ((rows, top), (columns, left))
    )
    rings = np.hypot(rows - top, columns - left) * 2 * np.pi / period
    wave = (np.sin(across), np.sin(rings), np.sin(across) * np.sin(down))[label]
    colour, noise = random.uniform(60, 120, 3), random.normal(0, 12, (size, size, 3))
    return (128 + wave[..., None] * colour + noise).clip(0, 255).astype(np.uint8)


def label_of(image: np.ndarray) -> int:
    """Reads the class back from packed pixels (3, S, S)."""
    centre = image.shape[-1] // 2
    patch = image[:, centre - 2 : centre + 2, centre - 2 : centre + 2].mean((1, 2))
    return int(patch.argmax())


def encoded(pixels: np.ndarray, format: str = "PNG", **options) -> bytes:
    """Encodes pixels, or a Pillow image, as the bytes of a file."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def tree(unlabelled: int = 12, train: int = 4, test: int = 4, size: int = 32, draw=picture):
    """Draws a data set: names below the root to bytes of PNGs, so many images of each class."""
    counts = {"train-unlabelled": unlabelled, "train": train, "test": test}
    return {
        f"{split}/{name}/{number:03d}.png": encoded(draw(label, 1000 * place + number, size))
        for place, (split, count) in enumerate(counts.items())
        for label, name in enumerate(CLASSES)
        for number in range(count)
    }


def write_folder(files: dict[str, bytes], root: Path) -> Path:
    """Writes the files below `root`."""
    for name, payload in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(payload)
    return root


def write_zip(files: dict[str, bytes], path: Path) -> Path:
    """Writes the files to a zip."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, payload in files.items():
            archive.writestr(name, payload)
    return path


def write_tar(files: dict[str, bytes], path: Path, mode: str = "w") -> Path:
    """Writes the files to a tar; mode `w:gz` compresses it."""
    with tarfile.open(path, mode) as archive:
        for name, payload in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(payload)
            archive.addfile(member, io.BytesIO(payload))
    return path


def write_shards(files: dict[str, bytes], root: Path, each: int = 7) -> Path:
    """Writes the files of a `tree` as WebDataset does: tars of samples, split by split."""
    root.mkdir(parents=True, exist_ok=True)
    for split in dict.fromkeys(name.partition("/")[0] for name in files):
        names = [name for name in files if name.startswith(split + "/")]
        samples = [(*name.split("/")[1:], files[name]) for name in names]
        for first in range(0, len(samples), each):
            members = {}
            for number, (kind, name, data) in enumerate(samples[first : first + each], first):
                members |= {f"{number:06d}.{name.rpartition('.')[2]}": data}
                members |= {f"{number:06d}.cls": kind.encode(), f"{number:06d}.json": b"{}"}
            write_tar(members, root / f"drawn-{split}-{first // each:04d}.tar")
    return root
