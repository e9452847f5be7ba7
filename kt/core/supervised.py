"""Training on labelled images and predictions on test: fine-tuning and retrained upper layers."""

from __future__ import annotations

import torch
from torch import Tensor

from kt.core import task as tasks
from kt.core import training
from kt.core.amounts import epochs_for
from kt.core.backbone import Backbone
from kt.core.judge import Data
from kt.core.network import Network
from kt.core.order import block_of
from kt.core.task import Task


def label_task(plugin, backbone: Backbone, data: Data, seed: int) -> Task:
    """Builds the task of the true labels of train."""
    from kt.pretext_train import build_task

    pack = data.train.pack
    context = tasks.Context(
        pack.size, torch.from_numpy(pack.ids), backbone.mean.cpu(), backbone.std.cpu(), seed,
        data.train.labels, data.num_classes, block_of(pack.images),
    )  # fmt: skip
    return build_task(plugin, context)


def train(network: Network, task: Task, data: Data, rows: Tensor, options, **more) -> Tensor:
    """Trains a network on rows of train for a fixed number of images, and judges test.

    Args:
        network: On the CPU, trained in place.
        task: Of the labels.
        data: Train and test.
        rows: (n,) int64 rows of train.
        options: With `images` (seen, repeats counted) and `training`.
        more: Further fields of the `training.Job`: seed, name, state, fingerprint.

    Returns:
        (T,) int64 predicted labels of test.
    """
    epochs = epochs_for(options.images, len(rows), options.training.batch)
    job = training.Job(
        network, task, data.train.pack, rows, rows[:0], options.training, epochs, **more
    )
    training.train(job)
    return predict(network.eval(), data.test.pack)


@torch.inference_mode()
def predict(network: Network, pack) -> Tensor:
    """Gives the likeliest labels (N,) int64 of all images of a pack."""
    where = network.backbone.mean.device
    return torch.cat(
        [
            network(network.backbone.normalise(batch.to(where))[:, None]).argmax(1).cpu()
            for batch in training.pack_batches(pack, torch.arange(len(pack)), pack.at_once)
        ]
    )
