"""What a kind of transfer is: it turns what teachers say of the images into what a target learns.

The paper transfers cluster membership alone (`kt/transfers/hard.py`); what came after it stands
beside it, one file each in `kt/transfers`, and every kind trains the same target by the same loop.

A file has `Options`, `clusters(options, k)`, the numbers of clusters that it needs at k,
`build(options, taught, seed)`, which gives a `Transfer`, and three constants: NEEDS, "labels" or
"features" of the images; TOGETHER, whether all teachers that `of` names teach at once; BY_K,
whether what is taught differs by k. If not, there is one training at any k, with a clustering into
one cluster, `k1` in paths, that only brings the transform of the features.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional


@dataclasses.dataclass(frozen=True)
class Taught:
    """What one layer of one teacher says of the N images of a pack, in its order.

    Attributes:
        labels: (N,) int64 pseudo-labels 0..C-1, -1 for images left out; or None.
        num_labels: C.
        rows: (N, E) float32, features after the transform that belongs to the centroids; or None.
        centroids: (K, E) float32, those that are not empty; or None.
    """

    labels: Tensor | None = None
    num_labels: int = 0
    rows: Tensor | None = None
    centroids: Tensor | None = None


class Transfer:
    """Base of the kinds.

    Attributes:
        outputs: O, the number of the head's outputs.
        usable: (N,) bool, images that can be learned from.
        labels: (N, H) int64, those of H heads, where it is classification; else None.
    """

    labels: Tensor | None = None
    outputs: int
    usable: Tensor

    def values(self, index: Tensor) -> Tensor:
        """Gives what images (B,) int64 are taught: (B, ...), handed on to `loss` and `right`."""
        raise RuntimeError(f"{type(self).__name__} must define values")

    def loss(self, outputs: Tensor, values: Tensor, smoothing: float) -> Tensor:
        """Gives the mean loss, (), of outputs (B, O) float32.

        Args:
            outputs: Of the head.
            values: As `values` gave them, on the same device.
            smoothing: Of labels, where there are any.
        """
        raise RuntimeError(f"{type(self).__name__} must define loss")

    def right(self, outputs: Tensor, values: Tensor) -> Tensor:
        """Gives a share of 0..1, (), of what was taught that the outputs have right."""
        raise RuntimeError(f"{type(self).__name__} must define right")


class Labels(Transfer):
    """Classification by H columns of labels at once, a head of outputs for each."""

    def __init__(self, labels: list[Tensor], numbers: list[int]):
        """Takes H times (N,) int64, -1 for images left out, and their numbers of labels."""
        self.labels = torch.stack(labels, 1)
        self.numbers, self.outputs = numbers, sum(numbers)
        self.usable = (self.labels >= 0).all(1)

    def values(self, index: Tensor) -> Tensor:
        """Gives the labels (B, H) int64."""
        return self.labels[index]

    def loss(self, outputs: Tensor, values: Tensor, smoothing: float) -> Tensor:
        """Gives the cross-entropy, averaged over the heads."""
        parts = zip(outputs.split(self.numbers, 1), values.unbind(1), strict=True)
        found = [functional.cross_entropy(part, label, label_smoothing=smoothing)
                 for part, label in parts]  # fmt: skip
        return sum(found) / len(found)

    def right(self, outputs: Tensor, values: Tensor) -> Tensor:
        """Gives the share of right labels over all heads."""
        best = [part.argmax(1) for part in outputs.split(self.numbers, 1)]
        return (torch.stack(best, 1) == values).float().mean()
