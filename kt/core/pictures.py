"""Pictures for the report: learned puzzles and a gallery of clusters, as PNG data URIs."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kt.core import table
from kt.core.images import Labels, Pack, rows_of
from kt.core.step import DataError

EDGE = 64  # largest edge of one image or tile in the report, pixels
MARK = (230, 120, 0)  # frame of replaced tiles; tells from grey for all kinds of colour vision
PER_CLUSTER = 10
PER_GROUP = 4


class Puzzle(NamedTuple):
    """One puzzle as given and as the teacher puts it back together."""

    given: str
    solved: str
    right: bool
    num_replaced: int


class Puzzles(NamedTuple):
    """Unseen puzzles: the first few as pictures, the share solved of all that were stored."""

    teacher: str
    shown: list[Puzzle]
    solved: float
    number: int
    num_permutations: int


class Cluster(NamedTuple):
    """One cluster: its images nearest to the centroid side by side, and what is known of it.

    Attributes:
        number: Of the cluster.
        strip: The images, as a PNG data URI.
        size: Images in it.
        shown: Images in the strip.
        distance: Mean squared distance to the centroid.
        purity: Share of the most frequent class of the `known` images; None where none is known.
        name: Of that class.
        known: Images whose label is known.
    """

    number: int
    strip: str
    size: int
    shown: int
    distance: float
    purity: float | None
    name: str
    known: int


def png(image: np.ndarray) -> str:
    """Gives an (H, W, 3) uint8 image as a PNG data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def fit(image: np.ndarray, smallest: int = 1, largest: int = EDGE) -> np.ndarray:
    """Resizes a square (S, S, 3) image: repeated pixels if too small, area means if too large."""
    from PIL import Image

    edge = image.shape[0]
    if edge > largest:
        return np.asarray(Image.fromarray(image).resize((largest, largest), Image.Resampling.BOX))
    factor = -(-smallest // edge)
    return image.repeat(factor, 0).repeat(factor, 1)


# ---------------------------------------------------------------------------- puzzles


def read_puzzles(path: Path, number: int = 8) -> Puzzles | None:
    """Reads stored puzzles and draws the first ones; None if the table holds none.

    Raises:
        DataError: It is not a table of puzzles, or a label names no permutation.
    """
    with table.read(path, "puzzles", {"tiles": 5}) as file:
        if len(file["tiles"]) == 0:
            return None
    arrays = {"tiles": 5, "labels": 1, "predicted": 1, "replaced": 2, "*permutations": 2}
    with table.read(path, "puzzles", arrays) as file:
        labels, predicted = table.load(file, "labels"), table.load(file, "predicted")
        permutations = table.load(file, "permutations").astype(np.int64)
        tiles, replaced = file["tiles"][:number], file["replaced"][:number]
        config = json.loads(table.text(file, "config"))
    known = range(len(permutations))
    if not set(labels.tolist()) | set(predicted.tolist()) <= set(known):
        raise DataError(f"{path}: expected labels 0..{len(known) - 1}, found others; run it again")
    shown = [
        Puzzle(
            png(lay(tiles[i], range(tiles.shape[1]), replaced[i])),
            png(lay(tiles[i], permutations[predicted[i]], replaced[i])),
            bool(labels[i] == predicted[i]),
            int(replaced[i].sum()),
        )
        for i in range(len(tiles))
    ]
    solved = float(np.mean(labels == predicted))
    return Puzzles(config.get("teacher", ""), shown, solved, len(labels), len(known))


def lay(tiles: np.ndarray, cells: Sequence[int], replaced: np.ndarray) -> np.ndarray:
    """Lays tiles out on their square grid, a gap between them, replaced ones framed.

    Args:
        tiles: (n, 3, t, t) uint8, in slot order.
        cells: (n,) where the tile of each slot is laid.
        replaced: (n,) bool, by slot.

    Returns:
        (H, W, 3) uint8.
    """
    side = round(len(tiles) ** 0.5)
    drawn = [fit(tile.transpose(1, 2, 0), 24, 40) for tile in tiles]
    edge = drawn[0].shape[0]
    pitch = edge + 4
    board = np.full((side * pitch, side * pitch, 3), 127, np.uint8)
    for tile, cell, strange in zip(drawn, cells, replaced, strict=True):
        top, left = (int(cell) // side) * pitch, (int(cell) % side) * pitch
        if strange:
            board[top : top + pitch, left : left + pitch] = MARK
        board[top + 2 : top + 2 + edge, left + 2 : left + 2 + edge] = tile
    return board


# ---------------------------------------------------------------------------- clusters


def describe_clusters(path: Path) -> dict[str, Any]:
    """Says which teacher, layer and k a table of pseudo-labels comes from, and how many it holds.

    Returns:
        `teacher, layer, k`, and the numbers `images`, `left_out` and `found`, of clusters in use.
    """
    with table.read(path, "pseudo_labels", {"labels": 1}) as file:
        labels, config = table.load(file, "labels"), json.loads(table.text(file, "config"))
    return {
        **{name: config.get(name) for name in ("teacher", "layer", "k")},
        "found": len(np.unique(labels[labels >= 0])),
        "images": len(labels),
        "left_out": int((labels < 0).sum()),
    }


def gallery(path: Path, pack: Pack, labels: Labels | None) -> dict[str, list[Cluster]]:
    """Gives the largest, purest (tightest without labels) and most mixed (loosest) clusters.

    Args:
        path: A table of pseudo-labels; its keys must stand in the pack.
        pack: The images.
        labels: True labels of the same images, if there are any.

    Raises:
        DataError: Keys do not fit.
    """
    clusters, distances, keys = _assigned(path)
    if not keys:
        return {}
    rows = rows_of(pack.keys, keys, str(pack.path))
    truth = np.full(len(keys), -1)
    if labels is not None:
        truth = labels.labels[rows_of(labels.keys, keys, "labels")]
    names = labels.classes if labels is not None else []
    purity, frequent = purities(clusters, truth)
    sizes = np.bincount(clusters)
    distance = np.bincount(clusters, distances) / np.maximum(sizes, 1)
    known = np.bincount(clusters[truth >= 0], minlength=len(sizes))
    enough = (known >= np.minimum(sizes, PER_CLUSTER)) & (sizes > 0)  # to speak of purity
    pure = 2 * enough.sum() >= (sizes > 0).sum()
    heads = ("Largest", "Purest", "Most mixed") if pure else ("Largest", "Tightest", "Loosest")

    def describe(number: int) -> Cluster:
        inside = np.flatnonzero(clusters == number)
        nearest = inside[np.argsort(distances[inside], kind="stable")[:PER_CLUSTER]]
        share = None if np.isnan(purity[number]) else float(purity[number])
        name = names[frequent[number]] if share is not None else ""
        images = pack.images[rows[nearest]].transpose(0, 2, 3, 1)
        strip = png(np.concatenate([fit(image, 32) for image in images], axis=1))
        size = len(inside)
        mean, few = float(distance[number]), int(known[number])
        return Cluster(number, strip, size, len(nearest), mean, share, name, few)

    groups = interesting(sizes, np.where(enough, purity, np.nan) if pure else -distance)
    return {
        head: list(map(describe, group)) for head, group in zip(heads, groups, strict=True) if group
    }


def _assigned(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Reads clusters (N,), distances (N,) and keys of the images that were not left out."""
    arrays = {"clusters": 1, "distances": 1, "labels": 1, "keys": 1}
    with table.read(path, "pseudo_labels", arrays) as file:
        kept = table.load(file, "labels") >= 0
        keys = [key for key, keep in zip(table.strings(file, "keys"), kept, strict=True) if keep]
        return table.load(file, "clusters")[kept], table.load(file, "distances")[kept], keys


def interesting(sizes: np.ndarray, quality: np.ndarray) -> tuple[list[int], list[int], list[int]]:
    """Picks the largest clusters, then the best and the worst of the others, each one once.

    Args:
        sizes: (K,) images in each cluster; empty ones are never picked.
        quality: (K,) higher is better; NaN where it is not known, which is neither.
    """
    order = [int(n) for n in np.argsort(-sizes, kind="stable") if sizes[n]]
    each = max(1, min(PER_GROUP, len(order) // 3))
    rest = order[each:]
    rest = [n for n in rest if not np.isnan(quality[n])]
    filled = [n for n in rest if sizes[n] >= PER_CLUSTER]
    rest = sorted(filled if len(filled) >= 2 * each else rest, key=lambda n: -quality[n])
    return order[:each], rest[:each], rest[each:][-each:][::-1]


def purities(clusters: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gives each cluster's share of its most frequent true label, and that label.

    Args:
        clusters: (N,) int64.
        truth: (N,) int64, -1 where unknown; such images do not count.

    Returns:
        (K,) float64, NaN where no label is known, and (K,) int64.
    """
    num_clusters, num_classes = int(clusters.max()) + 1, int(truth.max(initial=0)) + 1
    known = truth >= 0
    cells = clusters[known] * num_classes + truth[known]
    counts = np.bincount(cells, minlength=num_clusters * num_classes)
    counts = counts.reshape(num_clusters, num_classes)
    totals = counts.sum(1)
    shares = np.where(totals, counts.max(1) / np.maximum(totals, 1), np.nan)
    return shares, counts.argmax(1)
