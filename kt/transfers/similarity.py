"""Similarity to anchor images: the target's own map of distances shall be the teacher's.

Source: CompRess (Abbasi Koohpayegani et al., NeurIPS 2020), in the form with one memory: the
target's output is led into the teacher's space and compared with the teacher's rows of the anchors.
The anchors are a fixed draw of images, not a queue (ours): teachers do not change here.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kt.config import Count, Settings
from kt.transfers.hard import clusters  # noqa: F401

NEEDS = "features"
TOGETHER = False


class Options(Settings):
    """Options of the kind in the config."""

    anchors: Annotated[Count, Field(description="images that are compared with")]
    temperature: Annotated[float, Field(gt=0, description="of cosines; lower: harder")]


def build(options: Options, taught: list, seed: int):
    """Builds the kind from one teacher's rows."""
    import torch
    from torch.nn import functional

    from kt.core.transfer import Transfer

    (one,) = taught

    class Similarity(Transfer):
        """Compares distributions over the anchors."""

        def __init__(self):
            self.rows = functional.normalize(one.rows)
            generator = torch.Generator().manual_seed(seed)
            picked = torch.randperm(len(one.rows), generator=generator)[: options.anchors]
            self.anchors = self.rows[picked.sort().values]
            self.outputs = one.rows.shape[1]
            self.usable = torch.ones(len(one.rows), dtype=torch.bool)

        def values(self, index):
            """Gives the teacher's rows (B, E) float32 of unit length."""
            return self.rows[index]

        def logits(self, rows):
            """Gives similarities to the anchors (B, A), by temperature."""
            self.anchors = self.anchors.to(rows.device)
            return functional.normalize(rows) @ self.anchors.T / options.temperature

        def loss(self, outputs, values, smoothing):
            """Gives the cross-entropy of the two distributions, less the teacher's entropy."""
            wanted = self.logits(values)
            divergence = wanted.softmax(1) * (
                wanted.log_softmax(1) - self.logits(outputs).log_softmax(1)
            )
            return divergence.sum(1).mean()

        def right(self, outputs, values):
            """Gives the share of images whose nearest anchor is the teacher's."""
            return (self.logits(outputs).argmax(1) == self.logits(values).argmax(1)).float().mean()

    return Similarity()
