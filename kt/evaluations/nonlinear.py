"""Freezes the network up to a layer and trains all above it from scratch, for every layer.

The paper's second table (section 5): the earlier layers are kept, weights and batch-norm statistics
alike, the later ones and the head start anew and learn all labels of train. Differs from the paper:
the head is that of `task` (a global average and a linear layer, with `hidden` one more layer)
instead of AlexNet's fc6 to fc8, so the table ends with the last convolution. The number of steps is
fixed and no layer is chosen; where one number is shown, it is that of the last layer.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kt.config import Count, Plugin, Settings, Training

NEEDS_LABELS = True
FROZEN = False
CHOOSES = False


class Options(Settings):
    """Options of the evaluation in the config."""

    images: Annotated[
        Count,
        Field(
            description="images seen for each layer, repeats counted; rounded to whole passes over "
            "the labels, at least one"
        ),
    ]
    task: Annotated[Plugin, Field(description="label task with its augmentation and head")]
    training: Annotated[Training, Field(description="its epochs are not used: `images` sets them")]


def evaluate(backbone, data, options: Options, seed: int) -> list[dict]:
    """Gives for each layer records of top1 and mean_class_accuracy."""
    import functools

    from kt.core import judge

    found = []
    for layer in backbone.layers:
        place = data.state and data.state / layer
        work = functools.partial(judged, backbone, data, layer, options, seed, place)
        found += judge.once(place, work)
    return found


def judged(backbone, data, layer: str, options: Options, seed: int, place=None) -> list[dict]:
    """Gives the records of one layer; arguments as in `run`."""
    from kt.core import judge

    predicted = run(backbone, data, layer, options, seed, place)
    return judge.judged(predicted, data.test.labels, layer=layer)


def run(backbone, data, layer: str, options: Options, seed: int, place=None):
    """Trains what is above a layer, on all of train; gives predictions (T,) int64 on test.

    Args:
        backbone: Left as it is.
        data: What is trained on and judged.
        layer: The last frozen one.
        options: Of the evaluation.
        seed: Of the fresh weights, order and augmentation.
        place: Folder of the resume states, or None.
    """
    import torch

    from kt.core import draws, frozen, judge, supervised
    from kt.core.network import Network

    task = supervised.label_task(options.task, backbone, data, seed)
    # Not the seed itself: these would be the weights that the network's own training began with.
    new = draws.bits(seed, f"weights above {layer}", 0, torch.zeros(1, dtype=torch.int64), 1)
    torch.manual_seed(int(new))
    network = Network(frozen.fresh_above(backbone, layer), task)
    fingerprint = {"network": judge.weights_digest(backbone), "options": options, "seed": seed}
    return supervised.train(
        network, task, data, torch.arange(len(data.train.labels)), options, seed=seed, state=place,
        fingerprint=fingerprint, name=f"retrain above {layer}",
    )  # fmt: skip
