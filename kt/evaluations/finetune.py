"""Fine-tunes the whole network with few labels per class (paper, section 5; label draws by seed).

For each number of labels the same draw serves every model of the same seed, so that differences
between models can be taken pair by pair. All layers are trained by the one training loop, under a
fresh linear head; the number of steps is fixed, so that no choice is made on test.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kt.config import Count, Plugin, Settings, Training

NEEDS_LABELS = True
FROZEN = False


class Options(Settings):
    """Options of the evaluation in the config."""

    labels_per_class: Annotated[list[Count], Field(min_length=1, description="one run each")]
    images: Annotated[Count, Field(description="images seen in a run, repeats counted")]
    task: Annotated[Plugin, Field(description="label task with its augmentation")]
    training: Annotated[Training, Field(description="its epochs are not used: `images` sets them")]


def evaluate(backbone, data, options: Options, seed: int) -> list[dict]:
    """Gives records of top1 and mean_class_accuracy for each number of labels per class."""
    from kt.core import judge, step

    largest = int(data.train.labels.bincount().max())
    found = []
    for number in options.labels_per_class:
        if number > largest:
            step.log.warning(
                "finetune: %d labels per class left out, the largest class has %d", number, largest
            )
            continue
        predicted = run(backbone, data, draw(data.train, number, seed), options, seed)
        values = judge.scores(predicted, data.test.labels)
        found += judge.records(values, len(predicted), labels_per_class=number)
    return found


def draw(split, number: int, seed: int):
    """Draws `number` training rows of each class, all of a smaller one, by seed and key alone.

    Returns:
        (at most C * number,) int64, sorted.
    """
    import torch

    from kt.core import draws

    order = draws.permutation(seed, f"labels {number}", 0, torch.from_numpy(split.pack.ids))
    rows = [order[split.labels[order] == label][:number] for label in split.labels.unique()]
    return torch.cat(rows).sort().values


def run(backbone, data, rows, options: Options, seed: int):
    """Fine-tunes a copy of the backbone on the rows; gives predictions (T,) int64 on test."""
    import copy

    import torch

    from kt.core import judge, training
    from kt.core import task as tasks
    from kt.core.network import Network
    from kt.pretext_train import build_task

    pack = data.train.pack
    context = tasks.Context(
        pack.size, torch.from_numpy(pack.ids), backbone.mean.cpu(), backbone.std.cpu(), seed,
        data.train.labels, data.num_classes,
    )  # fmt: skip
    task = build_task(options.task, context)
    torch.manual_seed(seed)  # the head's weights
    network = Network(copy.deepcopy(backbone).cpu(), task)
    epochs = max(1, round(options.images / len(rows)))
    state = data.state and data.state / f"{len(rows)}-labels"
    fingerprint = {"network": judge.weights_digest(backbone), "options": options, "seed": seed}
    job = training.Job(
        network, task, pack, rows, rows[:0], options.training, epochs, seed,
        f"fine-tune with {len(rows)} labels", state=state, fingerprint=fingerprint,
    )  # fmt: skip
    training.train(job)
    return predict(network.eval(), data.test.pack)


def predict(network, pack):
    """Gives the likeliest labels (N,) int64 of all images of a pack."""
    import torch

    from kt.core import judge, training

    where = network.backbone.mean.device
    with torch.inference_mode():
        return torch.cat(
            [
                network(network.backbone.normalise(batch.to(where))[:, None]).argmax(1).cpu()
                for batch in training.pack_batches(pack, torch.arange(len(pack)), judge.BATCH)
            ]
        )
