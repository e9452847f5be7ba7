"""Says what the trainings of a configuration will cost, before anything runs.

    python -m kt.compute presets/paper.yaml --images imagenet=1281167

Counts the multiply-adds of each network's forward pass on one image with all its views; training
takes three times as many, and a multiply-add is two operations. Hours are those of a device that
really reaches `--rate` operations a second; what yours reaches, a short run tells (its log has
images a second). Left out is what is small beside it: reading, extraction, clustering, probes of
frozen features, the test pictures of PASCAL VOC.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from kt import config, workflow
from kt.core import lessons, step
from kt.core.step import ConfigError

OPERATIONS = 6  # of a training step for each multiply-add of a forward pass
TRAINVAL, SEGMENTED = 5011, 1464  # pictures of VOC2007's trainval, of VOC2012's train with masks
REGIONS = 512  # of a picture that torchvision's detector learns from
_COUNTED: dict[tuple, float] = {}  # by network, task, size: drawing a large network's weights lasts


@dataclasses.dataclass(frozen=True)
class Cost:
    """One network's training, `number` times with different seeds.

    Attributes:
        name: As in its path.
        number: Of seeds, or of models.
        multiply_adds: Of one image with all its views.
        images: Seen in one training, over all epochs.
    """

    name: str
    number: int
    multiply_adds: float
    images: float

    @property
    def operations(self) -> float:
        """Of all `number` trainings."""
        return OPERATIONS * self.number * self.multiply_adds * self.images


def main() -> None:
    """Parses the command line and prints the table; ends with 2 if something is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m kt.compute",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overlays", nargs="*", type=Path, help="laid over config.yaml, in order")
    parser.add_argument(
        "--images", nargs="*", action="extend", default=[], metavar="DATASET=N",
        help="number of unlabelled images, where the config says null (all)",
    )  # fmt: skip
    parser.add_argument("--rate", type=_rate, default=1e14, help="operations a second; 1e14")
    arguments = parser.parse_args()
    sys.exit(step.exit_code(_print, arguments))


def _print(arguments: argparse.Namespace) -> None:
    root = Path(__file__).parent.parent
    settings = config.resolve(root, *map(config.read, arguments.overlays))
    found = costs(settings, _pairs(arguments.images))
    width = max(len(cost.name) for cost in found)
    print(f"{'network':{width}}  seeds  M multiply-adds  M images  hours")
    for cost in found:
        hours = cost.operations / arguments.rate / 3600
        print(
            f"{cost.name:{width}}  {cost.number:5}  {cost.multiply_adds / 1e6:15,.1f}"
            f"  {cost.images / 1e6:8,.2f}  {hours:.3g}"
        )
    hours = sum(cost.operations for cost in found) / arguments.rate / 3600
    print(f"{hours:.3g} hours in all at {arguments.rate:.3g} operations a second")


def _pairs(given: list[str]) -> dict[str, int]:
    pairs = [text.partition("=") for text in given]
    for name, _, number in pairs:
        if not number.isdigit():
            raise ConfigError(f"expected DATASET=N, found {name!r} = {number!r}")
    return {name: int(number) for name, _, number in pairs}


def _rate(text: str) -> float:
    found = float(text)
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"expected operations a second, more than 0, found {text}")
    return found


def costs(settings: config.Config, known: dict[str, int]) -> list[Cost]:
    """Lists what is trained: teachers, targets, the bound, and networks that are fine-tuned.

    Args:
        settings: The configuration.
        known: Data set -> number of unlabelled images, where the configuration leaves it open.

    Raises:
        ConfigError: A number is known from neither.
    """

    def number(role: str) -> int:
        name = getattr(settings.use, role)
        found = known.get(name) or settings.datasets[name].unlabelled
        if found is None:
            raise ConfigError(
                f"datasets.{name}.unlabelled is null: say how many there are, --images {name}=N"
            )
        return found

    def seen(role: str, training) -> int:
        images = number(role)
        return images * settings.few_images.epochs(workflow.epochs(settings, training), images)

    size = {role: settings.datasets[name].size for role, name in settings.use}
    found = []
    for name in workflow.at_work(settings):
        teacher = settings.teachers[name]
        if not workflow.trains(teacher):
            continue
        one = multiply_adds(workflow.backbone(settings, teacher), teacher.task, size["pretext"])
        images = seen("pretext", teacher.training)
        if teacher.budget:
            images = sum(_spent(settings, part, seen, size) for part in teacher.budget) / one
        found.append(Cost(name, workflow.teacher_seeds(settings, name), one, images))
    judged = {lesson.origin for lesson in lessons.lessons(settings).values()}
    teaching = {one.folder for one in lessons.describers(settings).values()}
    for name, target in settings.targets.items():
        one = multiply_adds(target.backbone, target.task, size["target"])
        images = seen("target", target.training)
        for origin in lessons.all_lessons(settings):
            if origin not in judged and f"results/targets/{name}/{origin}/s0" not in teaching:
                continue
            seeds = settings.seeds if origin in judged else 1
            found.append(Cost(f"{name}/{origin}", seeds, one, images))
        if target.supervised:
            found.append(Cost(f"{name}/supervised", settings.seeds, one, images))
    return found + _tuned(settings, size["evaluate"]) + _on_voc(settings)


def _tuned(settings: config.Config, size: int) -> list[Cost]:
    """Gives the evaluations that train networks, of all models together.

    The non-linear probe counts as if nothing were frozen, which is more than it takes.
    """
    networks = sum(len(model.seeds) for model in workflow.judged(settings))
    backbone = next(iter(settings.targets.values())).backbone
    found = []
    for job, values in workflow.evaluation_jobs(settings, True).items():
        if job not in ("finetune", "nonlinear"):
            continue
        options = config.options("evaluations", job, values[job])
        if job == "finetune":
            times = len(options.labels_per_class) + len(options.fractions)
        else:
            times = len(config.layers(backbone) or [None])
        one = multiply_adds(backbone, options.task, size)
        found.append(Cost(f"evaluation {job}", times * networks, one, options.images))
    return found


def _on_voc(settings: config.Config) -> list[Cost]:
    """Gives the trainings on PASCAL VOC, of all models together.

    Pictures for detection count as 4 by 3, those of another list for segmentation as VOC2012's.
    """
    networks = sum(len(model.seeds) for model in workflow.judged(settings))
    backbone = next(iter(settings.targets.values())).backbone
    found = []
    for job, values in workflow.evaluation_jobs(settings, True).items():
        if not job.startswith("voc_"):
            continue
        options = config.options("evaluations", job, values[job])
        training = options.finetune if job == "voc_classification" else options.training
        if training:
            seen = training.epochs * (SEGMENTED if job == "voc_segmentation" else TRAINVAL)
            found.append(Cost(f"evaluation {job}", networks, _of_voc(job, backbone, options), seen))
    return found


def _of_voc(job: str, plugin: config.Plugin, options) -> float:
    """Gives the multiply-adds of a forward pass of one picture in a training on PASCAL VOC."""
    from kt.core import model, network, voc, voc_training
    from kt.evaluations import voc_detection

    backbone, number = model.fresh(plugin, 0), len(voc.CLASSES)
    if job == "voc_detection":
        detector = voc_detection.build(backbone, options)
        picture = backbone.mean.new_zeros(1, 3, options.min_size, 4 * options.min_size // 3)
        pooled = backbone.mean.new_zeros(
            REGIONS, detector.backbone.out_channels, options.pooled, options.pooled
        )

        def detect():
            detector.rpn.head([detector.backbone(picture)])
            heads = detector.roi_heads
            heads.box_predictor(heads.box_head(pooled))

        return network.counted(detector.eval(), detect)
    if job == "voc_segmentation":
        size = options.crop
        trunk = voc_training.Trunk(backbone, options.layer, size, options.training)
        made = voc_training.FCN(trunk, options.skips, number + 1)
    else:
        size = options.size
        trunk = voc_training.Trunk(backbone, None, size, options.finetune)
        made = voc_training.Classifier(trunk, options.map, size, number)
    made.eval()
    return network.counted(made, lambda: made(backbone.mean.new_zeros(1, 3, size, size)))


def _spent(settings, name: str, seen, size) -> float:
    """Gives the multiply-adds of one training that a budget names."""
    if name in settings.teachers:
        other = settings.teachers[name]
        if not workflow.trains(other):
            return 0.0
        one = multiply_adds(workflow.backbone(settings, other), other.task, size["pretext"])
        return one * seen("pretext", other.training)
    other = settings.targets[name]
    one = multiply_adds(other.backbone, other.task, size["target"])
    return one * seen("target", other.training)


def multiply_adds(backbone: config.Plugin, task: config.Plugin, size: int) -> float:
    """Gives the multiply-adds of a forward pass of one image with all its views."""
    from kt.core import model, network

    asked = (str(backbone), str(task), size)
    if asked not in _COUNTED:
        made = task_of(task, size)
        whole = network.Network(model.fresh(backbone, 0), made)
        _COUNTED[asked] = network.multiply_adds(whole, made)
    return _COUNTED[asked]


def task_of(plugin: config.Plugin, size: int):
    """Builds a task as on images of `size` pixels; there are none."""
    import torch

    from kt.core.task import Context
    from kt.pretext_train import build_task

    ids = torch.arange(2)
    context = Context(size, ids, torch.zeros(3), torch.ones(3), 0, ids * 0, workflow.BUDGET_CLASSES)
    return build_task(plugin, context)


if __name__ == "__main__":
    main()
