"""Overlays on tests/tiny.yaml that each say a few odd things at once, for the plan of a run."""

from __future__ import annotations

from typing import Any

import crafted
import numpy as np

from kt import config

RESIDUAL = {"name": "residual", "widths": [8, 8], "strides": [2, 1], "blocks": 1}
TORCHVISION = {"name": "torchvision", "model": "squeezenet1_1", "last": None}
TIMM = {"name": "timm", "model": "resnet18", "last": 2}
TASK = {"name": "rotation", "crop": 0.7, "flip": 0.5, "brightness": 0.0, "contrast": 0.0,
        "saturation": 0.0, "hidden": 0}  # fmt: skip
ROUNDS = {"name": "iterated", "factors": [1], "rounds": 3, "keep": True, "target": "small",
          "layer": None, "map": 1}  # fmt: skip
LAYERS = ([], ["auto"], ["block1"], ["block1", "block2"], ["conv1"], ["features.2"], ["stage1"])
VALUES: dict[str, tuple] = {
    "seeds": (1, 2), "shards": (1, 3), "effort": (0.1, 2), "seed": (7,),
    "clusters": ([2, 7], ["auto"], [4, "auto"], ["auto", 30], 500),
    "few_images": ({"as_if": 1000, "most": 3},),
    "datasets.images.unlabelled": (5, None), "datasets.images.labelled": (7, None),
    "datasets.images.test": (1, None), "datasets.images.size": (12, 21, 64),
    "datasets.images.storage": ("jpeg",), "datasets.images.near_copies": (None, 0.1),
    "use.evaluate": ("fashion_mnist",), "use.target": ("fashion_mnist",),
    "teachers.deep.layers": LAYERS, "teachers.deep.seeds": (2,), "teachers.deep.map": (3,),
    "teachers.deep.backbone": (RESIDUAL, TORCHVISION, TIMM, "small"),
    "teachers.deep.task": (None, TASK), "teachers.deep.mirror": (True,),
    "teachers.deep.transfer_as": ("longer", "random"), "teachers.deep.pool": ("max",),
    "teachers.own.layers": LAYERS, "teachers.own.evaluate_as": (None, "longer"),
    "teachers.longer": (None, {"budget": ["own"]}), "teachers.longer.layers": LAYERS,
    "teachers.untrained": (None,), "teachers.untrained.layers": LAYERS,
    "teachers.random": (None,), "teachers.random.transfer_as": ("transfer",),
    "teachers.hog": (None, {"backbone": {"name": "pixels", "edge": 2}, "layers": ["pixels"]}),
    "teachers.hog.layers": ([], ["auto"]), "teachers.more": ({"like": "hog"}, {"like": "deep"}),
    "transfers.hard": (None, {"of": ["deep"]}, {"of": ["hog/hog", "more"]}),
    "transfers.odd": tuple(
        {"kind": kind, "of": of}
        for of in ([], ["deep"], ["deep", "hog"], ["untrained/block1"])
        for kind in (
            ROUNDS, {"name": "regression"}, {"name": "soft", "temperature": 1.0},
            {"name": "multi_k", "factors": [0.5, 4]}, {"name": "multi_teacher", "factors": [1]},
            {"name": "similarity", "anchors": 10, "temperature": 0.1},
        )
    ),
    "transfers.multi_similarity": (
        {"kind": {"name": "multi_similarity", "anchors": 9, "temperature": 1.0}, "of": ["deep"]},
    ),
    "targets.small.backbone": (RESIDUAL, TORCHVISION, TIMM), "targets.small.supervised": (False,),
    "targets.small.task": (crafted.LABELS | {"balance": True},),
    "targets.other": ({"like": "small"}, {"like": "small", "backbone": RESIDUAL}),
    "evaluations.knn": (None,), "evaluations.linear": (None, {"map": None, "dimensions": 99}),
    "evaluations.finetune": (None, {"labels_per_class": [], "fractions": [0.5]}),
    "evaluations.clusters": (None,), "verdict": (["knn"], ["linear"], ["finetune"]),
    "clustering.pca": (None, 2), "clustering.whiten": (False,), "clustering.sample": (9,),
    "choice.clusters": ([3], [4, 50]),
}  # fmt: skip


def drawn(random: np.random.Generator) -> dict[str, Any]:
    """Draws some keys and a value for each."""
    found: dict[str, Any] = {}
    for key in random.choice(sorted(VALUES), random.integers(1, 9), replace=False):
        value: Any = VALUES[key][random.integers(len(VALUES[key]))]
        for part in reversed(key.split(".")):
            value = {part: value}
        found = config.merge(found, value)
    return found
