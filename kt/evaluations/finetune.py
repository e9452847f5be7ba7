"""Fine-tunes the whole network with few labels (paper, section 5; label draws by seed).

So many labels per class, or a share of the labels of train. For each number or share the same draw
serves every model of the same seed, so that differences between models can be taken pair by pair.
All layers are trained by the one training loop, under a fresh linear head; the number of steps is
fixed beforehand, so that no choice is made on test.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from kt.config import Count, Plugin, Settings, Training

NEEDS_LABELS = True
FROZEN = False
CHOOSES = False


def some_labels(options):
    """Gives the options back, or raises ValueError if they ask for no run at all."""
    if not (options.labels_per_class or options.fractions):
        raise ValueError("expected an entry in labels_per_class or fractions, found none in both")
    return options


class Options(Settings):
    """Options of the evaluation in the config."""

    labels_per_class: Annotated[list[Count], Field(description="one run each")]
    fractions: Annotated[
        list[Annotated[float, Field(gt=0, le=1)]],
        Field(description="one run each: share of each class of train, at least one image"),
    ]
    images: Annotated[
        Count,
        Field(
            description="images seen in a run, repeats counted; rounded to whole passes over its "
            "labels, at least one"
        ),
    ]
    task: Annotated[Plugin, Field(description="label task with its augmentation")]
    training: Annotated[Training, Field(description="its epochs are not used: `images` sets them")]
    _some = model_validator(mode="after")(some_labels)


def evaluate(backbone, data, options: Options, seed: int) -> list[dict]:
    """Gives records of top1 and mean_class_accuracy for each number and share of labels."""
    from kt.core import step

    largest = int(data.train.labels.bincount().max())
    found = []
    for number in options.labels_per_class:
        if number > largest:
            step.log.warning(
                "finetune: %d labels per class left out, the largest class has %d", number, largest
            )
            continue
        found += judged(backbone, data, options, seed, labels_per_class=number)
    for fraction in options.fractions:
        found += judged(backbone, data, options, seed, labels_per_class=None, fraction=fraction)
    return found


def judged(backbone, data, options: Options, seed: int, **labels) -> list[dict]:
    """Gives the records of one draw of labels, or those that an interrupted run left."""
    from kt.core import judge

    def make() -> list[dict]:
        rows = draw(data.train, labels.get("fraction") or labels["labels_per_class"], seed)
        predicted = run(backbone, data, rows, options, seed, place)
        return judge.judged(predicted, data.test.labels, **labels)

    name = "-".join(f"{key}-{value}" for key, value in labels.items() if value is not None)
    place = data.state and data.state / name
    return judge.once(place, make)


def draw(split, labels: int | float, seed: int):
    """Draws training rows of each class by seed and key alone.

    Args:
        split: Of the labels.
        labels: So many of each class (int), all of a smaller one, or that share of each class
            (float), rounded, at least one image.
        seed: Of the draw.

    Returns:
        (n,) int64, sorted.
    """
    import torch

    from kt.core import draws

    order = draws.permutation(seed, f"labels {labels}", 0, torch.from_numpy(split.pack.ids))
    rows = []
    for label in split.labels.unique():
        own = order[split.labels[order] == label]
        share = isinstance(labels, float)
        rows.append(own[: max(1, round(labels * len(own))) if share else labels])
    return torch.cat(rows).sort().values


def run(backbone, data, rows, options: Options, seed: int, place=None):
    """Fine-tunes a copy of the backbone on the rows; gives predictions (T,) int64 on test.

    Args:
        backbone: Left as it is.
        data: What is trained on and judged.
        rows: (n,) int64 rows of train.
        options: Of the evaluation.
        seed: Of head, order and augmentation.
        place: Folder of the resume states, or None.
    """
    import copy

    import torch

    from kt.core import judge, supervised
    from kt.core.network import Network

    task = supervised.label_task(options.task, backbone, data, seed)
    torch.manual_seed(seed)  # the head's weights
    network = Network(copy.deepcopy(backbone).cpu(), task)
    fingerprint = {"network": judge.weights_digest(backbone), "options": options, "seed": seed}
    return supervised.train(
        network, task, data, rows, options, seed=seed, state=place, fingerprint=fingerprint,
        name=f"fine-tune with {len(rows)} labels",
    )  # fmt: skip
