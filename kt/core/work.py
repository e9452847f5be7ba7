"""The jobs of a plan, how much work each of them is, and what it would cost here, for `kt.plan`."""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from kt import compute, config, workflow
from kt.core import probe
from kt.core.entries import TEST, TRAIN
from kt.core.footprint import LIMITS, width

TRAININGS = ("pretext_train", "target_train")
LIGHT = ("ingest_part", "ingest", "cluster", "pseudo_labels_part", "pseudo_labels", "report")
PIXELS = ("fashion_mnist",)  # sources of small pictures that are not encoded


class Job(NamedTuple):
    """A job of the workflow.

    Attributes:
        name: As in the paths of its log and benchmark, such as `pretext_train/deep-s0`.
        options: Of its command, by name; values as text.
    """

    name: str
    options: dict[str, str]

    @property
    def rule(self) -> str:
        """Its rule."""
        return self.name.partition("/")[0]

    @property
    def kind(self) -> str:
        """What jobs of like cost share: the rule, and which evaluations."""
        return f"{self.rule} {self.name.rpartition('-')[2] if self.rule == 'evaluate' else ''}"


class _Unknown(Exception):
    """Something that the cost follows from is not known yet."""


class Work:
    """Knows how much work each job of a run is, and asks probes what it costs."""

    def __init__(self, every: Iterable[Job], folder: Path):
        """Takes all jobs, also those that are done, and the folder where results/ is."""
        self.folder = folder
        self.makers = {job.options["output"]: job for job in every}

    # ------------------------------------------------------------------------ images

    def dataset(self, folder: str | Path) -> dict[str, Any]:
        """Gives the settings of the data set that is packed in a folder."""
        return json.loads(self.makers[str(folder)].options["dataset"])

    def _rows(self, pack: str | Path) -> int:
        """Gives the number of images of a pack: as they are, or their limit."""
        place = Path(pack)
        if (self.folder / place).exists():
            from kt.core.images import layout

            return layout(self.folder / place).shape[0]
        return _known(self.dataset(place.parent)[LIMITS[place.stem]])

    def _size(self, pack: str | Path) -> int:
        return self.dataset(Path(pack).parent)["size"]

    # ------------------------------------------------------------------------ trainings

    def operations(self, job: Job) -> float | None:
        """Gives the operations of a training; None for other jobs and where images are unknown."""
        options = job.options
        if job.rule not in TRAININGS or options["task"] == "null":
            return None
        keys = ("backbone", "task", "few-images", "epochs")
        values = {key.replace("-", "_"): json.loads(options.get(key, "null")) for key in keys}
        values["pack"] = options.get("budget-of", options["pack"])
        try:
            return sum(map(self._operations, json.loads(options.get("budget", "[]")) or [values]))
        except _Unknown:
            return None

    def _operations(self, part: dict[str, Any]) -> float:
        """Gives the operations of one training, from its backbone, task, epochs and pack."""
        number, few, epochs = self._rows(part["pack"]), part["few_images"], part["epochs"]
        if few:
            epochs = config.check(config.FewImages, few).epochs(epochs, number)
        plugins = (json.dumps(part[name]) for name in ("backbone", "task"))
        return epochs * number * _operations(*plugins, self._size(part["pack"]))

    # ------------------------------------------------------------------------ probes

    def probed(self, job: Job) -> probe.Rate | None:
        """Gives what a job will cost by probes; None where they do not tell."""
        work = {
            "ingest": self._decoding,
            "pretext_train": self._training,
            "choose": self._choosing,
            "features": self._extraction,
            "cluster": self._clustering,
            "pseudo_labels": self._labelling,
            "target_train": self._training,
            "evaluate": self._judging,
            "report": lambda job: [],
        }[job.rule.removesuffix("_part")]
        try:
            found = [] if self._gathers(job) else work(job)
        except _Unknown:
            return None
        share = int(job.options.get("part", "1/1").partition("/")[2])
        found = [rate.times(1 / share) for rate in found]
        found.append(probe.start(probe.LIGHT if job.rule in LIGHT else probe.HEAVY))
        return probe.Rate(*map(sum, zip(*found, strict=True)))

    def _gathers(self, job: Job) -> bool:
        """Says whether the work is done by other jobs, in parts."""
        if job.rule == "ingest":
            return any(maker.rule == "ingest_part" for maker in self.makers.values())
        return bool(job.options.get("parts"))

    def _decoding(self, job: Job) -> list[probe.Rate]:
        dataset, threads = json.loads(job.options["dataset"]), int(job.options["threads"])
        number = sum(_known(dataset[limit]) for limit in LIMITS.values())
        one = probe.decoding(dataset["size"], dataset["source"] not in PIXELS)
        return [probe.Rate(one.seconds / threads, one.cpu).times(number)]

    def _training(self, job: Job) -> list[probe.Rate]:
        options = job.options
        if options["task"] == "null":
            return []
        size = self._size(options["pack"])
        plugins = options["backbone"], options["task"]
        one = probe.training(*plugins, options["training"], size, int(options["threads"]))
        if (done := self.operations(job)) is None:
            raise _Unknown
        return [one.times(done / _operations(*plugins, size))]

    def _seen(self, model: str, pack: str, options: dict[str, str], number: int) -> probe.Rate:
        """Gives what it costs that a network looks at so many images."""
        backbone = self.makers[model].options["backbone"]
        return probe.extraction(backbone, self._size(pack), int(options["threads"])).times(number)

    def _choosing(self, job: Job) -> list[probe.Rate]:
        options = job.options
        images = min(json.loads(options["choice"])["images"], self._rows(options["pack"]))
        return [self._seen(options["model"], options["pack"], options, 2 * images)]

    def _extraction(self, job: Job) -> list[probe.Rate]:
        options = job.options
        if "model" not in options:
            return []
        pack = options["pack"]
        return [self._seen(options["model"], pack, options, self._rows(pack))]

    def _table(self, options: dict[str, str], settings: str) -> tuple[int, int, int]:
        """Gives the rows of a table of features, their dimensions, and those that are kept."""
        made = self.makers[options["features"]].options
        if "model" not in made:
            raise _Unknown
        backbone, size = self.makers[made["model"]].options["backbone"], self._size(made["pack"])
        found = width(backbone, made["layer"], int(made["map"]), size)
        return self._rows(made["pack"]), found, min(json.loads(settings)["pca"] or found, found)

    def _clustering(self, job: Job) -> list[probe.Rate]:
        options = job.options
        number, dimensions, kept = self._table(options, options["settings"])
        settings = json.loads(options["settings"])
        rounds = settings["iterations"] * settings["redo"] + 1
        done = dimensions * (dimensions + kept) + rounds * kept * _clusters(options)
        return [probe.product(int(options["threads"])).times(number * done)]

    def _labelling(self, job: Job) -> list[probe.Rate]:
        options = job.options
        made = self.makers[options["clusters"]].options
        number, dimensions, kept = self._table(options, made["settings"])
        done = kept * (dimensions + _clusters(made))
        return [probe.product(int(options["threads"])).times(number * done)]

    def _judging(self, job: Job) -> list[probe.Rate]:
        """Counts what looks at images, once for all evaluations, and what trains; no other fits."""
        options = job.options
        models, packs = shlex.split(options["model"]), [f"{options['data']}/{TRAIN}.h5"]
        packs.append(f"{options['data']}/{TEST}.h5")
        images, backbone = sum(map(self._rows, packs)), self.makers[models[0]].options["backbone"]
        found = [self._seen(models[0], packs[0], options, images)]
        for name, values in json.loads(options["evaluations"]).items():
            if name.startswith("voc"):
                raise _Unknown
            if "training" in values:
                runs = values.get("labels_per_class", []) + values.get("fractions", [])
                number = len(runs) or len(_layers(backbone))
                given = (json.dumps(values[part]) for part in ("task", "training"))
                size, threads = self._size(packs[0]), int(options["threads"])
                one = probe.training(backbone, *given, size, threads)
                found.append(one.times(values["images"] * number))
        return [rate.times(len(models)) for rate in found]


def _known(number: int | None) -> int:
    if number is None:
        raise _Unknown
    return number


def _clusters(options: dict[str, str]) -> int:
    return int(options["k"]) if options["k"].isdigit() else workflow.BUDGET_CLASSES


@functools.cache
def _operations(backbone: str, task: str, size: int) -> float:
    """Gives the operations of a training for each image that it sees."""
    plugins = (config.check(config.Plugin, json.loads(text)) for text in (backbone, task))
    return compute.OPERATIONS * compute.multiply_adds(*plugins, size)


@functools.cache
def _layers(backbone: str) -> list[str]:
    from kt.core import model

    return model.fresh(config.check(config.Plugin, json.loads(backbone)), 0).layers
