"""A small PASCAL VOC devkit, drawn: coloured rectangles of three classes on grey."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from kt.core.voc import CLASSES

COLOURS = {"aeroplane": (220, 30, 30), "bird": (30, 200, 30), "sofa": (30, 30, 220)}
VOID = 255


class Drawn(NamedTuple):
    """One object: class, xmin, ymin, xmax, ymax (from 1, ends inside) and whether difficult."""

    name: str
    box: tuple[int, int, int, int]
    difficult: int


def scene(number: int, width: int = 64, height: int = 48) -> list[Drawn]:
    """Places one object, or two side by side, by `number`; some are difficult."""
    random = np.random.default_rng(number)
    halves = [(0, width)] if number % 3 else [(0, width // 2), (width // 2, width)]
    found = []
    for place, (first, last) in enumerate(halves):
        edges = random.integers(14, 22, 2).clip(max=last - first - 2)
        left = int(random.integers(first, last - edges[0]))
        top = int(random.integers(0, height - edges[1]))
        box = (left + 1, top + 1, left + int(edges[0]), top + int(edges[1]))
        found.append(Drawn([*COLOURS][(number + place) % 3], box, int(number % 7 == 6)))
    return found


def write(root: Path, train: int = 12, val: int = 6, test: int = 9, size=(64, 48)) -> Path:
    """Writes VOC2007 and VOC2012 below `root`, with so many pictures in each split."""
    splits, first = {}, 0
    for split, number in (("train", train), ("val", val), ("test", test)):
        splits[split] = [f"{row:06d}" for row in range(first, first + number)]
        first += number
    splits["trainval"] = splits["train"] + splits["val"]
    for year in ("VOC2007", "VOC2012"):
        write_year(root / year, splits, size)
    return root


def write_year(folder: Path, splits: dict[str, list[str]], size: tuple[int, int]) -> None:
    """Writes one year: pictures, annotations, masks and lists."""
    for name in (
        "JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Main", "ImageSets/Segmentation"
    ):  # fmt: skip
        (folder / name).mkdir(parents=True)
    scenes = {name: scene(int(name), *size) for names in splits.values() for name in names}
    for name, drawn in scenes.items():
        write_picture(folder, name, drawn, size)
        (folder / "Annotations" / f"{name}.xml").write_text(annotation(name, drawn, size))
    for split, names in splits.items():
        listed = "".join(f"{name}\n" for name in names)
        (folder / "ImageSets/Segmentation" / f"{split}.txt").write_text(listed)
        (folder / "ImageSets/Main" / f"{split}.txt").write_text(listed)
        for label in CLASSES:
            lines = [f"{name} {sign(scenes[name], label):2d}\n" for name in names]
            (folder / "ImageSets/Main" / f"{label}_{split}.txt").write_text("".join(lines))


def write_picture(folder: Path, name: str, drawn: list[Drawn], size: tuple[int, int]) -> None:
    """Writes the picture and its mask, whose objects have a border of void."""
    pixels = np.full((size[1], size[0], 3), 128, np.uint8)
    mask = np.zeros((size[1], size[0]), np.uint8)
    for one in drawn:
        left, top, right, bottom = one.box
        pixels[top - 1 : bottom, left - 1 : right] = COLOURS[one.name]
        mask[top - 1 : bottom, left - 1 : right] = VOID
        mask[top : bottom - 1, left : right - 1] = CLASSES.index(one.name) + 1
    Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
    write_mask(folder / "SegmentationClass" / f"{name}.png", mask)


def write_mask(path: Path, mask: np.ndarray) -> None:
    """Writes a mask with a palette, as the organisers' are."""
    image = Image.fromarray(mask)
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    image.save(path)


def sign(drawn: list[Drawn], label: str) -> int:
    """Gives 1 if the class is shown, 0 if only as difficult objects, else -1."""
    easy = [not one.difficult for one in drawn if one.name == label]
    return 1 if any(easy) else 0 if easy else -1


def annotation(name: str, drawn: list[Drawn], size: tuple[int, int]) -> str:
    """Gives the XML of one picture, with the part of an object that no reader should mistake."""
    told = "".join(
        f"<object><name>{one.name}</name><pose>Left</pose><truncated>{number % 2}</truncated>"
        f"<difficult>{one.difficult}</difficult>"
        "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax>"
        "</bndbox></part>"
        "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
        "</object>".format(*one.box)
        for number, one in enumerate(drawn)
    )
    return (
        f"<annotation><folder>VOC2007</folder><filename>{name}.jpg</filename><size>"
        f"<width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>{told}"
        "</annotation>"
    )
