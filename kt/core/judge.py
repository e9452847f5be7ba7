"""What evaluations share: the data they see, features of all layers, held-out labels, scores."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kt.core import draws, hardware, step, training
from kt.core.backbone import Backbone, pool
from kt.core.blocks import Scratch
from kt.core.images import Pack
from kt.core.records import RIGHT, packed
from kt.core.step import DataError

DONE = "records.json"
MOST_BYTES = 1 << 30  # of features in memory
HELD_OUT = 0.2  # share of the labelled training images that choices are made on


@dataclasses.dataclass(frozen=True)
class Split:
    """Labelled images: the pack, and labels (N,) int64 in its order, all >= 0.

    For `svm` also several labels an image, (N, C) int8: 1 present, -1 absent, 0 not counted.
    """

    pack: Pack
    labels: Tensor


@dataclasses.dataclass(frozen=True)
class Data:
    """What an evaluation may look at.

    Attributes:
        pool: Unlabelled images.
        train: Labelled training images, or None.
        test: Labelled test images, or None.
        num_classes: C, 0 without labels.
        state: Folder for work that a signal may interrupt, of this model, data, options and seed
            alone, or None.
    """

    pool: Pack
    train: Split | None
    test: Split | None
    num_classes: int
    state: Path | None = None


def features(
    backbone: Backbone, pack: Pack, edge: int | dict[str, int]
) -> dict[str, Tensor | Scratch]:
    """Gives pooled features of layers in one pass; the last two results are kept.

    Args:
        backbone: In eval mode, on its device.
        pack: N images.
        edge: Each layer's map is averaged to at most edge x edge; a mapping says it for each
            layer and leaves out the others.

    Returns:
        (N, D) float32 per layer, on the CPU; not to be changed in place. In files are those that
        would make more than `MOST_BYTES` together.
    """
    edges = dict.fromkeys(backbone.layers, edge) if isinstance(edge, int) else edge
    return _features(backbone, weights_digest(backbone), pack, tuple(edges.items()))


@functools.lru_cache(maxsize=2)  # train and test: one evaluation after the other asks for both
@torch.inference_mode()
def _features(
    backbone: Backbone, digest: str, pack: Pack, edges: tuple[tuple[str, int], ...]
) -> dict[str, Tensor | Scratch]:
    edge_of, first, left = dict(edges), 0, MOST_BYTES
    found: dict[str, Tensor | Scratch] = {}
    where = backbone.mean.device

    def begun() -> Iterator[dict[str, Callable[[], Tensor]]]:
        for batch in training.pack_batches(pack, torch.arange(len(pack)), pack.at_once):
            maps = backbone.maps(backbone.normalise(hardware.sent(batch, where)), edge_of)
            given = {name: hardware.fetched(pool(maps[name], edge_of[name])) for name in maps}
            del maps  # or those of two batches would fill a GPU
            yield given

    for described in hardware.one_behind(begun(), where):
        for layer, fetch in described.items():
            rows = fetch()
            if layer not in found:
                found[layer], left = _room(pack, rows.shape[1], left)
            found[layer][first : first + len(rows)] = rows
        first += len(rows)
    return found


def _room(pack: Pack, width: int, left: int) -> tuple[Tensor | Scratch, int]:
    """Gives room for a layer's features, memory or a file beside the pack, and what is left."""
    shape = (len(pack), width)
    number = 4 * len(pack) * width
    if number <= left:
        return torch.empty(shape), left - number
    step.check_space(pack.path, number)
    return Scratch(pack.path.parent, shape), left


def whole(rows: Tensor | Scratch) -> Tensor:
    """Gives features (N, D) as a tensor, wherever they stand."""
    return torch.as_tensor(rows[:])


def weights_digest(backbone: Backbone) -> str:
    """Gives the SHA-256 of all weights and statistics."""
    total = hashlib.sha256()
    for name, value in sorted(backbone.state_dict().items()):
        total.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def held_out(split: Split) -> tuple[Tensor, Tensor]:
    """Splits labelled rows into fitting and held-out ones, class by class, by a hash of the keys.

    Images of several labels are split as a whole.

    Returns:
        (n,) and (m,) int64 rows; every class with two images or more stands in both.

    Raises:
        DataError: Every class has one image only.
    """
    order = draws.permutation(0, "validation", 0, torch.from_numpy(split.pack.ids))
    kept, out = [], []
    several = split.labels.ndim == 2
    for label in [0] if several else split.labels.unique():
        rows = order if several else order[split.labels[order] == label]
        number = max(1, round(HELD_OUT * len(rows))) if len(rows) > 1 else 0
        out.append(rows[:number])
        kept.append(rows[number:])
    if not sum(map(len, out)):
        raise DataError(
            f"{split.pack.path}: expected two or more training images of some class, so that "
            f"layers and penalties can be chosen on held-out ones; found {len(order)} images, "
            "one a class"
        )
    return torch.cat(kept).sort().values, torch.cat(out).sort().values


def scores(predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """Gives top1 and mean_class_accuracy (the mean over classes of each class's top-1)."""
    right = (predicted == labels).double()
    per_class = [right[labels == label].mean() for label in labels.unique()]
    return {
        "top1": float(right.mean()),
        "mean_class_accuracy": float(torch.stack(per_class).mean()),
    }


def once(place: Path | None, make: Callable[[], list[dict]]) -> list[dict]:
    """Gives the records that `make` gives, or those that an interrupted run left.

    Args:
        place: Folder that stands for everything the records depend on; None keeps nothing.
        make: Called where there are none.
    """
    if place is None:
        return make()
    if not (place / DONE).exists():
        step.write_json(place / DONE, {"records": make()})
    return step.read_json(place / DONE)["records"]


def records(values: dict[str, float], n: int, **more) -> list[dict]:
    """Turns scores into records: one per metric, with the number of images judged."""
    return [{"metric": name, "value": value, "n": n, **more} for name, value in values.items()]


def judged(
    predicted: Tensor, labels: Tensor, values: dict[str, float] | None = None, **more
) -> list[dict]:
    """Gives records of predictions (T,) of labels (T,); that of top1 says which ones are right.

    Args:
        predicted: (T,) int64.
        labels: (T,) int64.
        values: Scores, `top1` among them; None for those of `scores`.
        more: Further fields of each record.
    """
    values = scores(predicted, labels) if values is None else values
    right = {RIGHT: packed((predicted == labels).numpy())}
    found = records(values, len(predicted), **more)
    return [one | right if one["metric"] == "top1" else one for one in found]


def contingency(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Counts how often each value of `one` meets each of `two`: (A, B) int64."""
    table = np.zeros((one.max() + 1, two.max() + 1), np.int64)
    np.add.at(table, (one, two), 1)
    return table


def entropy(p: np.ndarray) -> float:
    """Gives the entropy of probabilities of any shape, in nats."""
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def mutual_information(one: np.ndarray, two: np.ndarray) -> float:
    """Gives the mutual information of two labellings (N,), in nats."""
    joint = contingency(one, two) / len(one)
    return entropy(joint.sum(1)) + entropy(joint.sum(0)) - entropy(joint)


def nmi(one: np.ndarray, two: np.ndarray) -> float:
    """Gives the normalised mutual information of two labellings (N,), arithmetic mean, 0..1."""
    joint = contingency(one, two) / len(one)
    first, second = entropy(joint.sum(1)), entropy(joint.sum(0))
    if first + second == 0:
        return 1.0
    return max(0.0, 2 * (first + second - entropy(joint)) / (first + second))


def purity(clusters: np.ndarray, labels: np.ndarray) -> float:
    """Gives the share of images that carry the commonest label of their cluster, 0..1."""
    return float(contingency(clusters, labels).max(1).sum() / len(labels))


def hungarian(clusters: np.ndarray, labels: np.ndarray) -> float:
    """Gives the share of images whose cluster is matched to their label, 0..1.

    Each cluster is matched to one label at most and each label to one cluster at most, as suits the
    most images (Kuhn, "The Hungarian method for the assignment problem", 1955).
    """
    from scipy.optimize import linear_sum_assignment

    table = contingency(clusters, labels)
    return float(table[linear_sum_assignment(table, maximize=True)].sum() / len(labels))
