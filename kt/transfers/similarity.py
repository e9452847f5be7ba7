"""Similarity to anchor images: what the target says of them shall be what the teacher says.

Source: CompRess (Abbasi Koohpayegani et al., NeurIPS 2020), in the form with one memory: the
target's output is led into the teacher's space and compared with the teacher's rows of the anchors.
The anchors are a fixed draw of images, not a queue (ours): teachers do not change here. So an image
may be its own anchor, and at a low temperature it then is nearly all of the distribution: what the
target learns is to tell each image from all others in the teacher's space, as in instance
discrimination (docs/explanation.md has figures).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kt.config import Count, Settings
from kt.transfers.hard import clusters  # noqa: F401

NEEDS = "features"
TOGETHER = False
BY_K = False


class Options(Settings):
    """Options of the kind in the config."""

    anchors: Annotated[Count, Field(description="images that are compared with")]
    temperature: Annotated[float, Field(gt=0, description="of cosines; lower: harder")]


def build(options: Options, taught: list, seed: int):
    """Builds the kind from the rows of one or more teachers, each with a head of its own."""
    import torch
    from torch.nn import functional

    from kt.core.transfer import Transfer

    class Similarity(Transfer):
        """Compares distributions over the anchors, teacher by teacher."""

        def __init__(self):
            rows = [functional.normalize(one.rows) for one in taught]
            generator = torch.Generator().manual_seed(seed)
            picked = torch.randperm(len(rows[0]), generator=generator)[: options.anchors]
            picked = picked.sort().values
            self.widths = [one.shape[1] for one in rows]
            self.anchors = [one[picked] for one in rows]
            self.rows = torch.cat(rows, 1)
            self.outputs = sum(self.widths)
            self.usable = torch.ones(len(self.rows), dtype=torch.bool)

        def values(self, index):
            """Gives the teachers' rows side by side, (B, E) float32, each of unit length."""
            return self.rows[index]

        def logits(self, rows):
            """Gives for each teacher the similarities to its anchors (B, A), by temperature."""
            self.anchors = [one.to(rows.device) for one in self.anchors]
            parts = zip(rows.split(self.widths, 1), self.anchors, strict=True)
            return [functional.normalize(x) @ one.T / options.temperature for x, one in parts]

        def loss(self, outputs, values, smoothing):
            """Gives the cross-entropy of the distributions less the teachers' entropy, averaged."""
            pairs = zip(self.logits(outputs), self.logits(values), strict=True)
            found = [
                functional.kl_div(
                    mine.log_softmax(1), one.log_softmax(1), reduction="batchmean", log_target=True
                )
                for mine, one in pairs
            ]
            return sum(found) / len(found)

        def right(self, outputs, values):
            """Gives the share of images whose nearest anchor is the teacher's."""
            pairs = zip(self.logits(outputs), self.logits(values), strict=True)
            return (
                torch.stack([mine.argmax(1) == one.argmax(1) for mine, one in pairs]).float().mean()
            )

    return Similarity()
