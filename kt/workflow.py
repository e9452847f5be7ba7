"""What the rules need to know: names, seeds, epochs and options of every network of a run.

Pure functions of the checked configuration; the rules only turn them into paths and commands.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

from kt import config
from kt.config import Clustering, Config, Plugin, Teacher
from kt.core.ending import ConfigError
from kt.core.layouts import FOLDERS
from kt.core.lessons import ONE, Lesson, all_lessons, lessons

BUDGET_CLASSES = 100
# Of evaluations: what was judged under another version is not taken over.
EVALUATE_VERSION = 8
MEMORY_MB = 2000
AS_THEY_ARE = {"crop": 1.0, "flip": 0.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0}
AS_THEY_ARE |= {"balance": False}  # images, every one as often


@dataclasses.dataclass(frozen=True)
class Judged:
    """One row of the comparison: a network, trained with several seeds.

    Attributes:
        name: Its path in `results/evaluations`.
        folder: Pattern of its folders under `results`, with `{seed}`.
        seeds: 0, 1, ...
        describe: Fields of all its metric records.
    """

    name: str
    folder: str
    seeds: range
    describe: dict[str, Any]

    def folders(self) -> list[str]:
        """Gives its folders, one a seed."""
        return [self.folder.format(seed=seed) for seed in self.seeds]


def judged(settings: Config, labelled: bool = True) -> list[Judged]:
    """Lists every model of the comparison.

    Args:
        settings: The configuration.
        labelled: Whether the images have labels; without, there is no supervised bound.
    """
    found = [
        _judged(settings, name, f"results/teachers/{name}/s{{seed}}", teacher.evaluate_as,
                teacher_seeds(settings, name), teacher=name)
        for name, teacher in settings.teachers.items()
        if teacher.evaluate_as
    ]  # fmt: skip
    for name, target in settings.targets.items():
        if target.supervised and labelled:
            folder = f"results/targets/{name}/supervised/s{{seed}}"
            found.append(
                _judged(
                    settings,
                    f"{name}/supervised",
                    folder,
                    "supervised",
                    settings.seeds,
                    target=name,
                )
            )
    return found + transfers(settings)


def transfers(settings: Config) -> list[Judged]:
    """Lists the targets trained on what teachers say: target x lesson."""
    return [
        _taught(settings, target, lesson)
        for target in settings.targets
        for lesson in lessons(settings).values()
    ]


def _taught(settings: Config, target: str, lesson: Lesson) -> Judged:
    # Of several teachers the one that learned most counts: controls together stay a control.
    arms = {settings.teachers[name].transfer_as for name, _ in lesson.sources}
    arm = next((one for one in ("transfer", "untrained", "hog") if one in arms), min(arms))
    folder = f"results/targets/{target}/{lesson.origin}/s{{seed}}"
    return _judged(
        settings, f"{target}/{lesson.origin}", folder, arm, settings.seeds, target=target,
        teacher=lesson.teacher, teacher_layer=lesson.layer, k=None if lesson.k == ONE else lesson.k,
        transfer=lesson.transfer,
    )  # fmt: skip


def _judged(settings: Config, name: str, folder: str, arm: str, seeds: int, **more) -> Judged:
    describe = {"model": name, "arm": arm, "dataset": settings.use.evaluate, **more}
    return Judged(name, folder, range(seeds), describe)


def describe_teacher(settings: Config, name: str, seed: int) -> dict[str, Any]:
    """Gives the fields of a teacher's model.json."""
    teacher = settings.teachers[name]
    arm = {"arm": teacher.evaluate_as} if teacher.evaluate_as else {}
    return {"name": name, "teacher": name, "seed": settings.seed + seed, **arm}


def describe_target(settings: Config, target: str, origin: str, seed: int) -> dict[str, Any]:
    """Gives the fields of a target's model.json: the same as its metric records carry."""
    described = _described(settings, target, origin)
    fields = {key: value for key, value in described.items() if key not in ("model", "dataset")}
    return {"name": f"{target}/{origin}", "seed": settings.seed + seed, **fields}


def _described(settings: Config, target: str, origin: str) -> dict[str, Any]:
    lesson = all_lessons(settings).get(origin)
    if lesson:
        return _taught(settings, target, lesson).describe
    return {model.name: model.describe for model in judged(settings)}[f"{target}/{origin}"]


def teacher_seeds(settings: Config, name: str) -> int:
    """Gives how many networks of a teacher are trained; seed 0 is the one that teaches."""
    return settings.teachers[name].seeds or settings.seeds


def first_of_each_task(settings: Config) -> list[str]:
    """Lists the teachers whose puzzles the report shows: the first of each pretext task."""
    names = at_work(settings)
    tasks = [task and task.name for task in (settings.teachers[name].task for name in names)]
    return [
        name
        for place, name in enumerate(names)
        if tasks[place] and tasks[place] not in tasks[:place]
    ]


def backbone(settings: Config, teacher: Teacher) -> Plugin:
    """Gives a teacher's backbone, looking up a target's where it names one."""
    if isinstance(teacher.backbone, str):
        return settings.targets[teacher.backbone].backbone
    return teacher.backbone


def trains(teacher: Teacher) -> bool:
    """Says whether a teacher is trained here; others have weights or features as they came."""
    return teacher.task is not None and teacher.features is None


def at_work(settings: Config) -> list[str]:
    """Lists the teachers whose networks are needed: they teach or are judged."""
    teach = {name for lesson in lessons(settings).values() for name, _ in lesson.sources}
    return [
        name
        for name, teacher in settings.teachers.items()
        if teacher.evaluate_as or (name in teach and not teacher.features)
    ]


def given_files(settings: Config) -> dict[str, str]:
    """Lists the files that were made elsewhere, by dotted key."""
    found = {}
    for name, dataset in settings.datasets.items():
        if dataset.labels not in (None, FOLDERS):
            found[f"datasets.{name}.labels"] = dataset.labels
    for name, teacher in settings.teachers.items():
        key = f"teachers.{name}"
        if teacher.features:
            found |= {
                f"{key}.features": teacher.features,
                f"{key}.features (keys)": keys_of(teacher),
            }
        if weights_file(teacher):
            found[f"{key}.weights.path"] = weights_file(teacher)
        if isinstance(teacher.backbone, Plugin):
            found |= _code(f"{key}.backbone.path", teacher.backbone)
    for name, target in settings.targets.items():
        found |= _code(f"targets.{name}.backbone.path", target.backbone)
    return found


def _code(key: str, plugin: Plugin) -> dict[str, str]:
    return {key: plugin.options()["path"]} if plugin.name == "file" else {}


def keys_of(teacher: Teacher) -> str:
    """Gives the file with the keys of given features; HDF5 holds both."""
    if not teacher.features.endswith(".npy"):
        return teacher.features
    return f"{teacher.features.removesuffix('.npy')}.keys.txt"


def weights_file(teacher: Teacher) -> str | None:
    """Gives the file of a teacher's weights; None where there is none."""
    if teacher.weights is None or teacher.weights.path == config.PRETRAINED:
        return None
    return teacher.weights.path


def epochs(settings: Config, training) -> int:
    """Gives the passes of a training with `effort` multiplied in, at least one."""
    return max(1, round(training.epochs * settings.effort))


def few_images(settings: Config) -> list[str]:
    """Gives the option that has small sets learned in more epochs; none where it is off."""
    if settings.few_images.as_if == 0 or settings.few_images.most == 1:
        return []
    return ["--few-images", config.dumps(settings.few_images)]


def _plain(task: Plugin) -> Plugin:
    known = {key: value for key, value in AS_THEY_ARE.items() if key in task.options()}
    return task.model_copy(update=known)


def clustering(settings: Config) -> Clustering:
    """Gives the settings of k-means with one `memory_mb` for all: no result depends on it."""
    return settings.clustering.model_copy(update={"memory_mb": MEMORY_MB})


def budget(settings: Config, teacher: Teacher) -> list[dict]:
    """Gives the trainings whose summed cost a teacher may spend: those that happen here.

    Of a target's task no augmentation, which costs nothing: a change must not retrain this one.
    """
    parts = []
    for name in teacher.budget:
        other = settings.teachers.get(name) or settings.targets[name]
        teaches = name in settings.teachers
        if teaches and not trains(other):
            continue
        dataset = settings.use.pretext if teaches else settings.use.target
        parts.append(
            {
                "pack": f"results/data/{dataset}/train-unlabelled.h5",
                "backbone": backbone(settings, other) if teaches else other.backbone,
                "task": other.task if teaches else _plain(other.task),
                "epochs": epochs(settings, other.training),
                "few_images": settings.few_images,
                # Not the k of the run: a new k must not retrain this one; the head costs little.
                "num_classes": BUDGET_CLASSES,
            }
        )
    return parts


def evaluation_jobs(settings: Config, labelled: bool) -> dict[str, dict[str, dict]]:
    """Gives the options of the evaluations, by job and name.

    All that looks at frozen features is one job, since starting it costs more than the work; what
    trains (fine-tuning) has a job of its own. The images that fine-tuning sees follow `effort`, and
    so do epochs.
    """
    jobs: dict[str, dict[str, dict]] = {}
    for name, given in settings.evaluations.items():
        module = config.plugin("evaluations", name)
        if labelled or not module.NEEDS_LABELS:
            values = dict(given)
            if "images" in values:
                values["images"] = max(1, round(int(values["images"]) * settings.effort))
            for key, inner in values.items():
                if isinstance(inner, dict) and "epochs" in inner:
                    epochs = max(1, round(int(inner["epochs"]) * settings.effort))
                    values[key] = {**inner, "epochs": epochs}
            jobs.setdefault("frozen" if module.FROZEN else name, {})[name] = values
    return jobs


def check_judged(settings: Config, labelled: bool) -> None:
    """Checks that the report will have something to tell: evaluations, and networks to judge.

    Raises:
        ConfigError: There are none, or an evaluation does not fit a target.
    """
    given = "" if labelled else " without labels"
    if not evaluation_jobs(settings, labelled):
        raise ConfigError(
            f"evaluations: expected one or more, found none that can judge images{given} "
            "(`clusters` and those of PASCAL VOC need no labels)"
        )
    if "nonlinear" in evaluation_jobs(settings, labelled):
        for name, target in settings.targets.items():
            if getattr(config.plugin("backbones", target.backbone.name), "JOINT", False):
                raise ConfigError(
                    f"evaluations.nonlinear: targets.{name}.backbone gives the maps of its layers "
                    f"all at once, as all of {target.backbone.name} do: none can be frozen alone; "
                    "expected null"
                )
    if not judged(settings, labelled):
        raise ConfigError(
            f"teachers: expected a network to judge, found none on images{given}; name layers to "
            "transfer from under a teacher's `layers`, or a teacher's own arm under `evaluate_as`"
        )


def fingerprint(*values) -> str:
    """Gives a short name for settings: the folder of their resume states."""
    return hashlib.sha256(config.dumps(values).encode()).hexdigest()[:16]


def state(name: str, settings: Any) -> str:
    """Gives the folder for what an interrupted job has done; other settings have another one."""
    whole = name.replace("/", "+")  # which no name has: `a-b/c` is not `a/b-c`
    return f"results/state/{whole}-{fingerprint(settings)}"
