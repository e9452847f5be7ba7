"""What the rules need to know: names, seeds, epochs and options of every network of a run.

Pure functions of the checked configuration; the rules only turn them into paths and commands.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

from kt import config
from kt.config import Config, Plugin, Teacher

BUDGET_CLASSES = 100


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


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What targets are trained on: a kind of transfer, its teachers' layers, and k.

    Attributes:
        transfer: Name of the kind's settings in the config.
        sources: Teacher and layer, more than one where a kind takes several together.
        k: Number of clusters.
    """

    transfer: str
    sources: tuple[tuple[str, str], ...]
    k: int

    @property
    def origin(self) -> str:
        """Its place in paths; `hard`, the paper's kind, needs no name."""
        kind = "" if self.transfer == "hard" else f"{self.transfer}/"
        return f"{kind}{self.teacher}/{self.layer}/k{self.k}"

    @property
    def teacher(self) -> str:
        """Names the teachers."""
        return "+".join(name for name, _ in self.sources)

    @property
    def layer(self) -> str:
        """Names their layers."""
        return "+".join(layer for _, layer in self.sources)


def lessons(settings: Config) -> dict[str, Lesson]:
    """Lists what each target is trained on, by origin: kind of transfer x teacher x layer x k."""
    found = []
    for name, transfer in settings.transfers.items():
        wanted = transfer.of or list(settings.teachers)
        sources = []
        for teacher, _, layer in (part.partition("/") for part in wanted):
            layers = [layer] if layer else settings.teachers[teacher].layers
            sources += [(teacher, one) for one in layers]
        together = config.plugin("transfers", transfer.kind.name).TOGETHER
        groups = [tuple(sources)] if together else [(source,) for source in sources]
        found += [Lesson(name, group, k) for group in groups if group for k in settings.clusters]
    return {lesson.origin: lesson for lesson in found}


def transfers(settings: Config) -> list[Judged]:
    """Lists the targets trained on what teachers say: target x lesson."""
    return [
        _judged(
            settings, f"{target}/{origin}", f"results/targets/{target}/{origin}/s{{seed}}",
            _arm(settings, lesson), settings.seeds, target=target, teacher=lesson.teacher,
            teacher_layer=lesson.layer, k=lesson.k, transfer=lesson.transfer,
        )
        for target in settings.targets
        for origin, lesson in lessons(settings).items()
    ]  # fmt: skip


def _arm(settings: Config, lesson: Lesson) -> str:
    """Gives the arm of a lesson: that of its teacher, `transfer` where there are several."""
    arms = {settings.teachers[name].transfer_as for name, _ in lesson.sources}
    return arms.pop() if len(arms) == 1 else "transfer"


def lesson_tables(settings: Config, lesson: Lesson) -> dict[str, list[str]]:
    """Gives the files that a lesson is made of: pseudo-labels, or features and clusters."""
    kind = settings.transfers[lesson.transfer].kind
    module = config.plugin("transfers", kind.name)
    options = config.options("transfers", kind.name, kind.options())
    numbers = module.clusters(options, lesson.k)
    clustered, labelled = settings.use.cluster, settings.use.target
    places = [
        (f"{teacher}/{layer}", f"{teacher}/{layer}/{clustered}/k{k}")
        for teacher, layer in lesson.sources
        for k in numbers
    ]
    split = f"{labelled}-train-unlabelled.h5"
    if module.NEEDS == "labels":
        return {"labels": [f"results/pseudo_labels/{place}/{split}" for _, place in places]}
    return {
        "features": [f"results/features/{source}/{split}" for source, _ in places],
        "clusters": [f"results/clusters/{place}.h5" for _, place in places],
    }


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
    described = {model.name: model.describe for model in judged(settings)}[f"{target}/{origin}"]
    fields = {key: value for key, value in described.items() if key not in ("model", "dataset")}
    return {"name": f"{target}/{origin}", "seed": settings.seed + seed, **fields}


def teacher_seeds(settings: Config, name: str) -> int:
    """Gives how many networks of a teacher are trained; seed 0 is the one that teaches."""
    return settings.teachers[name].seeds or settings.seeds


def backbone(settings: Config, teacher: Teacher) -> Plugin:
    """Gives a teacher's backbone, looking up a target's where it names one."""
    if isinstance(teacher.backbone, str):
        return settings.targets[teacher.backbone].backbone
    return teacher.backbone


def epochs(settings: Config, training) -> int:
    """Gives the passes of a training with `effort` multiplied in, at least one."""
    return max(1, round(training.epochs * settings.effort))


def budget(settings: Config, teacher: Teacher) -> list[dict]:
    """Gives the trainings whose summed cost a teacher may spend."""
    parts = []
    for name in teacher.budget:
        other = settings.teachers.get(name) or settings.targets[name]
        teaches = name in settings.teachers
        dataset = settings.use.pretext if teaches else settings.use.target
        parts.append(
            {
                "pack": f"results/data/{dataset}/train-unlabelled.h5",
                "backbone": backbone(settings, other) if teaches else other.backbone,
                "task": other.task,
                "epochs": epochs(settings, other.training),
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


def fingerprint(*values) -> str:
    """Gives a short name for settings: the folder of their resume states."""
    return hashlib.sha256(config.dumps(values).encode()).hexdigest()[:16]


def state(name: str, settings: Any) -> str:
    """Gives the folder for what an interrupted job has done; other settings have another one."""
    return f"results/state/{name.replace('/', '-')}-{fingerprint(settings)}"
