"""Reads a PASCAL VOC devkit: lists of pictures, labels, boxes and masks.

The folder is `VOCdevkit`, with VOC2007 and VOC2012 in it as the organisers pack them (Everingham et
al., "The Pascal Visual Object Classes challenge", IJCV 2010; the devkit's documentation tells the
formats). Nothing is trusted: XML with a document type is refused, so no entity is ever expanded.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np
from PIL import Image

from kt.core.decode import FAULTS
from kt.core.step import ConfigError, DataError

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
VOID = 255  # of masks: borders and what is hard to tell
NAME = re.compile(r"[\w.-]+")  # of a picture; it becomes part of a path


class Objects(NamedTuple):
    """The objects of one picture.

    Attributes:
        boxes: (n, 4) float32: left, top, right, bottom in pixels from the upper left corner, so
            that widths are differences (the files count pixels from 1, both ends inside).
        labels: (n,) int64 indices into `CLASSES`.
        difficult: (n,) bool, left out of training and of scores.
        truncated: (n,) bool, reaching out of the picture.
        size: Width and height of the picture, pixels.
    """

    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray
    truncated: np.ndarray
    size: tuple[int, int]


def folder(devkit: str, year: str) -> Path:
    """Gives the folder of one year of the devkit.

    Raises:
        ConfigError: It is not there.
    """
    found = Path(devkit) / year
    if not (found / "ImageSets").is_dir():
        raise ConfigError(
            f"path: expected a PASCAL VOC devkit with {year}/ImageSets, {year}/JPEGImages and so "
            f"on in it, found no {found / 'ImageSets'}; unpack the organisers' archives of {year} "
            "there, or give the folder VOCdevkit that holds it"
        )
    return found


def names(root: Path, kind: str, split: str) -> list[str]:
    """Gives the pictures of a split in the list's order.

    Args:
        root: As `folder` gives it.
        kind: Folder of the list in ImageSets: Main or Segmentation.
        split: Name of the list: train, val, trainval, test or one of yours.

    Raises:
        DataError: There is no such list, it is empty, or names a picture twice.
    """
    path = root / "ImageSets" / kind / f"{split}.txt"
    found = [line.strip() for line in _lines(path, f"the list of the split {split!r}")]
    wrong = [name for name in found if not NAME.fullmatch(name)]
    if wrong or not found or len(set(found)) < len(found):
        raise DataError(
            f"{path}: expected the name of one picture on each line, each once; found "
            + (f"{wrong[0]!r}" if wrong else "one twice" if found else "none")
        )
    return found


def apart(root: Path, kind: str, taught: str, judged: str) -> tuple[list[str], list[str]]:
    """Gives the pictures of a split to learn from and of one to judge on, as `names` does.

    Raises:
        DataError: As `names`, or a picture stands in both.
    """
    learned, unseen = names(root, kind, taught), names(root, kind, judged)
    shared = sorted(set(learned) & set(unseen))
    if shared:
        place = root / "ImageSets" / kind
        raise DataError(
            f"{place / taught}.txt: expected pictures to learn from that do not judge, found "
            f"{len(shared)} that stand in {place / judged}.txt, too, such as {shared[0]}; take "
            "these out of the first list, or name another one"
        )
    return learned, unseen


def labels(root: Path, split: str) -> np.ndarray:
    """Gives which classes each picture of a split of Main shows.

    Returns:
        (N, 20) int8 in the order of `names`: 1 shown, -1 not shown, 0 only as difficult objects.

    Raises:
        DataError: A list is missing, lacks a picture, or holds another value.
    """
    wanted = names(root, "Main", split)
    found = np.zeros((len(wanted), len(CLASSES)), np.int8)
    for column, name in enumerate(CLASSES):
        path = root / "ImageSets" / "Main" / f"{name}_{split}.txt"
        rows = [line.split() for line in _lines(path, f"the labels of class {name}")]
        wrong = [row for row in rows if len(row) != 2 or row[1] not in ("-1", "0", "1")]
        if wrong:
            raise DataError(
                f"{path}: expected a picture and -1, 0 or 1 on each line, found {wrong[0]}"
            )
        given = {key: int(value) for key, value in rows}
        lacking = [key for key in wanted if key not in given]
        if lacking:
            raise DataError(
                f"{path}: no label for {lacking[0]} and {len(lacking) - 1} others of {split}.txt"
            )
        found[:, column] = [given[key] for key in wanted]
    return found


def objects(root: Path, name: str) -> Objects:
    """Reads the objects of one picture from its annotation.

    Raises:
        DataError: The file is missing or broken, a class or flag unknown, or a box lies outside.
    """
    path = root / "Annotations" / f"{name}.xml"
    tree = _tree(path)
    size = tuple(int(_number(tree, f"size/{side}", path)) for side in ("width", "height"))
    boxes, found, flags = [], [], []
    for node in tree.findall("object"):
        label = (node.findtext("name") or "").strip()
        if label not in CLASSES:
            raise DataError(f"{path}: unknown class {label!r}; known: {', '.join(CLASSES)}")
        boxes.append(_box(node, size, path))
        found.append(CLASSES.index(label))
        flags.append([(node.findtext(key) or "0").strip() for key in ("difficult", "truncated")])
        if flags[-1][0] not in ("0", "1"):  # it decides what counts
            raise DataError(f"{path}: expected difficult to be 0 or 1, found {flags[-1][0]!r}")
    marked = np.array(flags, dtype="U8").reshape(-1, 2) == "1"
    return Objects(
        np.array(boxes, np.float32).reshape(-1, 4), np.array(found, np.int64),
        marked[:, 0], marked[:, 1], size,
    )  # fmt: skip


def image(root: Path, name: str) -> Image.Image:
    """Reads one picture as RGB, as it lies in its file: boxes and masks refer to that.

    Raises:
        DataError: It is missing or broken.
    """
    return _picture(root / "JPEGImages" / f"{name}.jpg", "JPEG").convert("RGB")


def squeezed(root: Path, name: str, size: int) -> np.ndarray:
    """Reads one picture, all of it squeezed into a square: (3, size, size) uint8."""
    found = image(root, name).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(found).transpose(2, 0, 1)


def mask(root: Path, name: str, place: str = "SegmentationClass") -> np.ndarray:
    """Reads the class of each pixel.

    Args:
        root: As `folder` gives it.
        name: Of the picture.
        place: Folder of the masks; PNGs with a palette or in grey, whose values are the classes.

    Returns:
        (H, W) uint8: 0 background, 1..20 classes, 255 void.

    Raises:
        DataError: It is missing, broken, or holds other values.
    """
    path = root / place / f"{name}.png"
    found = _picture(path, "PNG")
    if found.mode not in ("P", "L"):
        raise DataError(
            f"{path}: expected a PNG with a palette or in grey, whose values are classes, found "
            f"mode {found.mode}"
        )
    pixels = np.asarray(found)
    wrong = pixels[(pixels > len(CLASSES)) & (pixels != VOID)]
    if len(wrong):
        raise DataError(f"{path}: expected values 0 to {len(CLASSES)} and {VOID}, found {wrong[0]}")
    return pixels


def check_size(path: Path, name: str, size: tuple[int, int], told: tuple[int, int]) -> None:
    """Checks that a picture has the size that its annotation or mask tells.

    Raises:
        DataError: They differ.
    """
    if size != told:
        raise DataError(
            f"{path}: picture {name} has {size[0]} x {size[1]} pixels, its annotation or mask "
            f"says {told[0]} x {told[1]}; they do not belong together, unpack the devkit anew"
        )


def _lines(path: Path, what: str) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        near = sorted(other.stem for other in path.parent.glob("*.txt") if "_" not in other.stem)
        raise DataError(
            f"{path}: expected {what}, found none ({error}); lists there: {', '.join(near[:20])}"
        ) from None
    return [line for line in text.splitlines() if line.strip()]


def _tree(path: Path) -> ElementTree.Element:
    def refuse(*_):
        raise DataError(f"{path}: expected plain XML, found a document type; none is read")

    builder, parser = ElementTree.TreeBuilder(), expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(path.read_bytes(), True)
    except (OSError, expat.ExpatError, ValueError, LookupError) as error:  # odd encodings, too
        raise DataError(f"{path}: expected an annotation in XML, found none: {error}") from None
    return builder.close()


def _number(node: ElementTree.Element, place: str, path: Path) -> float:
    text = node.findtext(place)
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = float("nan")
    if not abs(value) < 1e6:  # nor NaN
        raise DataError(f"{path}: expected a number of pixels at {place}, found {text!r}")
    return value


def _box(node: ElementTree.Element, size: tuple[int, int], path: Path) -> list[float]:
    """Gives left, top, right, bottom; a box may be one pixel too large and is cut."""
    edges = [_number(node, f"bndbox/{key}", path) for key in ("xmin", "ymin", "xmax", "ymax")]
    left, top, right, bottom = edges[0] - 1, edges[1] - 1, edges[2], edges[3]
    inside = left >= -1 and top >= -1 and right <= size[0] + 1 and bottom <= size[1] + 1
    cut = [max(left, 0), max(top, 0), min(right, size[0]), min(bottom, size[1])]
    if not inside or cut[0] >= cut[2] or cut[1] >= cut[3]:
        raise DataError(
            f"{path}: expected a box inside the {size[0]} x {size[1]} pixels, xmin <= xmax and "
            f"ymin <= ymax; found xmin, ymin, xmax, ymax = {edges}"
        )
    return cut


def _picture(path: Path, format: str) -> Image.Image:
    try:
        with Image.open(path, formats=[format]) as found:
            found.load()
            return found
    except FAULTS as error:
        raise DataError(f"{path}: expected a {format}, found none: {error}") from None
