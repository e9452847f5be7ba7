"""The jobs of a plan, how much work each of them is, and what it would cost here, for `kt.plan`."""

from __future__ import annotations

import functools
import json
import shlex
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from kt import compute, config, workflow
from kt.core import amounts, probe
from kt.core.ending import Interrupted, StepError, line
from kt.core.footprint import LIMITS, width
from kt.core.layouts import POOL, TEST, TRAIN
from kt.sources import torchvision

TRAININGS = ("pretext_train", "target_train")
RETRAINING = {"finetune", "nonlinear"}
LIGHT = ("ingest_part", "ingest", "cluster", "pseudo_labels_part", "pseudo_labels", "report")


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


class _Unknown(Exception):
    """Something that the cost follows from is not known yet."""


class Work:
    """Knows how much work each job of a run is, and asks probes what it costs."""

    def __init__(self, every: Iterable[Job], folder: Path, due: Collection[str] = ()):
        """Takes all jobs, the folder where results/ is, and the names of those that will run.

        Without these it tells what the jobs did, by the packs as they are.
        """
        self.folder, self.due = folder, due
        self.makers = {job.options["output"]: job for job in every}

    def kind(self, job: Job) -> tuple:
        """Gives what jobs of like cost share: rule, evaluations, parts, and if they only gather."""
        judged = job.name.rpartition("-")[2] if job.rule == "evaluate" else ""
        return job.rule, judged, _parts(job), self._gathers(job)

    def _gathers(self, job: Job) -> bool:
        """Says whether the work is done by other jobs, in parts."""
        if job.rule != "ingest":
            return bool(job.options.get("parts"))
        parts = (other for other in self.makers.values() if other.rule == "ingest_part")
        return any(part.options["dataset"] == job.options["dataset"] for part in parts)

    # ------------------------------------------------------------------------ images

    def dataset(self, folder: str | Path) -> dict[str, Any]:
        """Gives the settings of the data set that is packed in a folder."""
        return json.loads(self.makers[str(folder)].options["dataset"])

    def _rows(self, pack: str | Path) -> int:
        """Gives the number of images of a pack: as they are, or their limit where it is due."""
        place = Path(pack)
        if f"ingest/{place.parent.name}" not in self.due and (self.folder / place).exists():
            return _packed((self.folder / place).absolute())
        return _known(self.dataset(place.parent)[LIMITS[place.stem]])

    def _at_most(self, number: int, pack: str | Path) -> int:
        """Gives so many images, or all of a pack where they are known to be fewer."""
        try:
            return min(number, self._rows(pack))
        except _Unknown:
            return number

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
        # The bound makes as many steps as on the one pack, with the images of the other.
        values["pack"] = options.get("budget-of", options["pack"])
        values["size"] = self._size(options["pack"])
        try:
            return sum(map(self._operations, json.loads(options.get("budget", "[]")) or [values]))
        except _Unknown:
            return None

    def _operations(self, part: dict[str, Any]) -> float:
        """Gives the operations of one training, from its backbone, task, epochs, pack and size."""
        number, few, epochs = self._rows(part["pack"]), part["few_images"], part["epochs"]
        if few:
            epochs = config.check(config.FewImages, few).epochs(epochs, number)
        plugins = (json.dumps(part[name]) for name in ("backbone", "task"))
        return epochs * number * _operations(*plugins, part.get("size") or self._size(part["pack"]))

    # ------------------------------------------------------------------------ probes

    def probed(self, job: Job) -> probe.Rate | None:
        """Gives what a job will cost by probes; None where they do not tell, or fail."""
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
        except Interrupted:
            raise
        except _Unknown:
            return None
        except (StepError, RuntimeError, MemoryError) as error:
            print(f"no probe tells of {job.name}: {line(error)}", file=sys.stderr)
            return None
        found = [rate.times(1 / _parts(job)) for rate in found]
        found.append(probe.start(probe.LIGHT if job.rule in LIGHT else probe.HEAVY))
        return probe.Rate(*map(sum, zip(*found, strict=True)))

    def _decoding(self, job: Job) -> list[probe.Rate]:
        dataset, threads = json.loads(job.options["dataset"]), int(job.options["threads"])
        number = sum(_known(dataset[limit]) for limit in LIMITS.values())
        one = probe.decoding(dataset["size"], _is_encoded(dataset))
        return [probe.Rate(one.seconds / threads, one.cpu).times(number)]

    def _unpacking(self, pack: str, options: dict[str, str], number: float) -> list[probe.Rate]:
        """Gives what it costs to read so many images of a pack, which is nothing but for JPEGs."""
        dataset, threads = self.dataset(Path(pack).parent), int(options["threads"])
        if dataset["storage"] != "jpeg":
            return []
        one = probe.unpacking(dataset["size"])
        return [probe.Rate(one.seconds / threads, one.cpu).times(number)]

    def _training(self, job: Job) -> list[probe.Rate]:
        options = job.options
        if options["task"] == "null":
            return []
        if (done := self.operations(job)) is None:
            raise _Unknown
        plugins = options["backbone"], options["task"]
        number = done / _operations(*plugins, self._size(options["pack"]))
        return self._trained(*plugins, options["training"], options["pack"], options, number)

    def _trained(
        self, backbone: str, task: str, training: str, pack: str, options: dict[str, str], number
    ) -> list[probe.Rate]:
        """Gives what it costs that a training sees so many images; its settings are JSON."""
        one = probe.training(backbone, task, training, self._size(pack), int(options["threads"]))
        rows = 2 if json.loads(task).get("occlusions") else 1  # tiles of another image
        return [one.times(number), *self._unpacking(pack, options, rows * number)]

    def _seen(
        self, model: str, pack: str, options: dict[str, str], number: int, layer: str | None = None
    ) -> list[probe.Rate]:
        """Gives what it costs that a network looks at images, up to a layer; `auto`: the last."""
        backbone, threads = self.makers[model].options["backbone"], int(options["threads"])
        layer = None if layer in (config.AUTO, _layers(backbone)[-1]) else layer
        one = probe.extraction(backbone, self._size(pack), threads, layer)
        return [one.times(number), *self._unpacking(pack, options, number)]

    def _choosing(self, job: Job) -> list[probe.Rate]:
        options = job.options
        model, pack, wanted = options["model"], options["pack"], options["layers"].split()
        named = [one for one in _layers(self.makers[model].options["backbone"]) if one in wanted]
        images = self._at_most(json.loads(options["choice"])["images"], pack)
        layer = config.AUTO if config.AUTO in wanted else named[-1]
        return self._seen(model, pack, options, 2 * images * _mirrored(options), layer)

    def _extraction(self, job: Job) -> list[probe.Rate]:
        options = job.options
        if "model" not in options:
            return []
        pack, layer = options["pack"], options["layer"]
        number = self._rows(pack) * _mirrored(options)
        return self._seen(options["model"], pack, options, number, layer)

    def _table(self, options: dict[str, str], pca: int | None) -> tuple[int, int, int]:
        """Gives the rows of a table of features, their dimensions, and those that are kept."""
        made = self.makers[options["features"]].options
        if "model" not in made:
            raise _Unknown
        backbone, size = self.makers[made["model"]].options["backbone"], self._size(made["pack"])
        found = width(backbone, made["layer"], int(made["map"]), size)
        number = self._rows(made["pack"])
        return number, found, min(pca, found, max(1, number // 4)) if pca else found

    def _clustering(self, job: Job) -> list[probe.Rate]:
        options, settings = job.options, json.loads(job.options["settings"])
        number, dimensions, kept = self._table(options, settings["pca"])
        k = _clusters(options)
        learned = amounts.sampled(number, settings["sample"], k)
        done = amounts.rows_assigned(learned, settings, k) * kept * k + number * kept * k
        if settings["pca"]:  # covariance of all rows; projected are those learned from, then all
            done += number * dimensions**2 + (learned + number) * dimensions * kept
        return [probe.product(int(options["threads"])).times(done)]

    def _labelling(self, job: Job) -> list[probe.Rate]:
        options = job.options
        made = self.makers[options["clusters"]].options
        pca = json.loads(made["settings"])["pca"]
        number, dimensions, kept = self._table(options, pca)
        done = kept * (_clusters(made) + (dimensions if pca else 0))
        return [probe.product(int(options["threads"])).times(number * done)]

    def _judging(self, job: Job) -> list[probe.Rate]:
        """Counts what looks at images and what trains; no fits of frozen features."""
        options, found = job.options, []
        evaluations = json.loads(options["evaluations"])
        frozen = {name: values for name, values in evaluations.items() if amounts.is_frozen(name)}
        if not evaluations.keys() - frozen.keys() <= RETRAINING:
            raise _Unknown
        models = shlex.split(options["model"])
        pool, *packs = (f"{options['data']}/{split}.h5" for split in (POOL, TRAIN, TEST))
        train, test = map(self._rows, packs)
        if train and test:
            number = amounts.passes(frozen) * (train + test)
            found += self._seen(models[0], packs[0], options, number)
            for values in (values for name, values in evaluations.items() if name not in frozen):
                found += self._retraining(models[0], values, packs, options, train, test)
        for views in (
            values["view_images"] for values in frozen.values() if "view_images" in values
        ):
            found += self._seen(models[0], pool, options, 2 * self._at_most(views, pool))
        return [rate.times(len(models)) for rate in found]

    def _retraining(
        self, model: str, values: dict, packs: list[str], options: dict[str, str], train, test
    ) -> list[probe.Rate]:
        """Counts the runs of `finetune` or `nonlinear`: each one trains, and looks at test once."""
        backbone = self.makers[model].options["backbone"]
        runs = [0] * len(values.get("labels_per_class", [])) + values.get("fractions", [])
        runs = runs or [1] * len(_layers(backbone))
        # Whole passes over the labels; how many so many of each class are is not known.
        images, batch = values["images"], values["training"]["batch"]
        number = sum(
            amounts.epochs_for(images, share * train, batch) * amounts.seen(share * train, batch)
            if share
            else images
            for share in runs
        )
        settings = (json.dumps(values[name]) for name in ("task", "training"))
        trained = self._trained(backbone, *settings, packs[0], options, number)
        return trained + self._seen(model, packs[1], options, len(runs) * test)


def _known(number: int | None) -> int:
    if number is None:
        raise _Unknown
    return number


def _parts(job: Job) -> int:
    """Gives how many jobs share the work."""
    return int(job.options.get("part", "1/1").partition("/")[2])


def _mirrored(options: dict[str, str]) -> int:
    """Gives how often each image is looked at: its mirror image, too, where options say so."""
    return 2 if "mirror" in options else 1


def _is_encoded(dataset: dict[str, Any]) -> bool:
    """Says whether a source hands over files of pictures, and not small arrays of pixels."""
    if dataset["source"] == "torchvision":
        return (dataset["path"] or "").partition(":")[0] in torchvision.OF_FILES
    return dataset["source"] != "fashion_mnist"


@functools.cache
def _packed(pack: Path) -> int:
    """Gives the number of images of a pack; looks at none of them."""
    from kt.core import table

    with table.opened(pack) as file:
        return len(file["keys"])


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
