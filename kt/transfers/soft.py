"""Soft clusters: the target learns how near each image is to every centroid.

Source: Hinton et al., "Distilling the knowledge in a neural network" (2015): a softmax with a
temperature instead of the hard label, here over squared distances to the centroids.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kt.config import Settings
from kt.transfers.hard import clusters  # noqa: F401

NEEDS = "features"
TOGETHER = False
BY_K = True


class Options(Settings):
    """Options of the kind in the config."""

    temperature: Annotated[float, Field(gt=0, description="of squared distances; lower: harder")]


def build(options: Options, taught: list, seed: int):
    """Builds the kind from one teacher's rows and centroids."""
    import torch
    from torch.nn import functional

    from kt.core.transfer import Transfer

    (one,) = taught

    class Soft(Transfer):
        """Learns the softmax over the centroids."""

        def __init__(self):
            # Distances are the same from any origin; about the mean they keep more of their digits,
            # since `cdist` multiplies matrices, and a GPU in TF32, which has three decimal ones.
            self.centre = one.centroids.mean(0)
            self.rows, self.centroids = one.rows, one.centroids - self.centre
            self.outputs = len(one.centroids)
            self.usable = torch.ones(len(one.rows), dtype=torch.bool)

        def values(self, index):
            """Gives the teacher's rows (B, E) float32."""
            return self.rows[index]

        def likely(self, rows):
            """Gives the probabilities (B, K): a softmax over squared distances.

            Here and not in `values`, so that each step computes a batch of the same size: the last
            bit depends on it, and a training that was stopped must go on with the same bits.
            """
            self.centre, self.centroids = (
                part.to(rows.device) for part in (self.centre, self.centroids)
            )
            squares = torch.cdist(rows - self.centre, self.centroids).square()
            return (-squares / options.temperature).softmax(1)

        def loss(self, outputs, values, smoothing):
            """Gives the cross-entropy with the probabilities."""
            return functional.cross_entropy(outputs, self.likely(values), label_smoothing=smoothing)

        def right(self, outputs, values):
            """Gives the share whose likeliest cluster is the nearest one."""
            return (outputs.argmax(1) == self.likely(values).argmax(1)).float().mean()

    return Soft()
