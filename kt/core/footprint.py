"""Bytes that the jobs of a plan will write, for `kt.plan`: images, features, labels, networks.

Tables of a few rows, logs and pages are left out, as are the states of trainings under way (three
times a network, while it is trained) and what else is gone at the end of the run, but for parts.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kt import config
from kt.core.layouts import POOL, TEST, TRAIN

LIMITS = {POOL: "unlabelled", TRAIN: "labelled", TEST: "test"}
LABEL_BYTES = 8 + 8 + 4  # of an image: label, cluster, distance; its name comes beside them
NAME_BYTES = 40
JPEG = 3  # times fewer bytes than pixels at 64 px, more at more


class Footprint:
    """Knows the sizes of all artefacts of a run."""

    def __init__(self, every: Iterable[tuple[str, Mapping[str, str]]]):
        """Takes rule and options of all jobs of the workflow, also of those that are done."""
        self.images: dict[str, dict[str, Any]] = {}
        self.backbones: dict[str, str] = {}
        for rule, options in every:
            if rule == "ingest":
                self.images[options["output"]] = json.loads(options["dataset"])
            elif rule in ("pretext_train", "target_train"):
                self.backbones[options["output"]] = options["backbone"]

    def of(self, rule: str, options: Mapping[str, str]) -> int | None:
        """Gives what a job will write, in bytes; None where that is not known.

        That is so where a data set has no limit, and for features that were made elsewhere.
        """
        if rule == "ingest":
            dataset = json.loads(options["dataset"])
            numbers = [dataset[limit] for limit in LIMITS.values()]
            pixels = 3 * dataset["size"] ** 2
            each = pixels // JPEG if dataset["storage"] == "jpeg" else pixels
            return None if None in numbers else sum(numbers) * each
        if rule in ("pretext_train", "target_train"):
            return _parameter_bytes(options["backbone"])
        if rule == "features":
            if "model" not in options:
                return None
            number, dataset = self._rows(options["pack"])
            backbone, layer = self.backbones[options["model"]], options["layer"]
            found = width(backbone, layer, int(options["map"]), dataset["size"])
            return number and number * (4 * found + NAME_BYTES)
        if rule == "pseudo_labels":
            name = Path(options["output"]).stem  # a data set and a split, either with hyphens
            split = next(one for one in LIMITS if name.endswith(f"-{one}"))
            number, _ = self._rows(f"results/data/{name.removesuffix(f'-{split}')}/{split}.h5")
            return number and number * (LABEL_BYTES + NAME_BYTES)
        return 0

    def of_part(self, rule: str, options: Mapping[str, str]) -> int | None:
        """Gives the bytes of a part, which stand until all are merged; None as above."""
        # Parts stand in a folder that is named as what is made of them.
        merged = {**options, "output": f"{Path(options['output']).parent}.h5"}
        whole = self.of(rule.removesuffix("_part"), merged)
        return whole and whole // int(options["part"].partition("/")[2])

    def _rows(self, pack: str) -> tuple[int | None, dict[str, Any]]:
        """Gives the number of images of a pack, at most, and its data set's settings."""
        path = Path(pack)
        dataset = self.images[str(path.parent)]
        return dataset[LIMITS[path.stem]], dataset


@functools.cache
def _backbone(backbone: str):
    from kt.core import model

    return model.fresh(config.check(config.Plugin, json.loads(backbone)), 0)


@functools.cache
def _parameter_bytes(backbone: str) -> int:
    return sum(4 * one.numel() for one in _backbone(backbone).state_dict().values())


@functools.cache
def width(backbone: str, layer: str, edge: int, size: int) -> int:
    """Gives the number of features of an image.

    Args:
        backbone: JSON.
        layer: Of its layers; `auto` counts as the last.
        edge: Its map is pooled to at most edge x edge.
        size: Of the images in pixels.
    """
    network = _backbone(backbone)
    chosen = network.layers[-1] if layer == "auto" else layer
    channels, *sides = network.map_shape(size, chosen)
    return channels * math.prod(min(side, edge) for side in sides)
