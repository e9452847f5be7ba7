"""Regression on the teacher's features, both sides with unit variance.

Source: the baseline `regression with BN` of CompRess (Abbasi Koohpayegani et al., NeurIPS 2020),
which was well ahead of hard clusters there. The teacher's side is standardised over the whole pack,
the target's over the batch, without learned factors.
"""

from __future__ import annotations

from kt.transfers.hard import Options, clusters  # noqa: F401

NEEDS = "features"
TOGETHER = False
BY_K = False


def build(options: Options, taught: list, seed: int):
    """Builds the kind from one teacher's rows."""
    import torch
    from torch.nn import functional

    from kt.core.parallel import standardised
    from kt.core.transfer import Transfer

    (one,) = taught

    class Regression(Transfer):
        """Squared differences of standardised features."""

        def __init__(self):
            deviation, mean = torch.std_mean(one.rows, 0, correction=0)
            self.rows = (one.rows - mean) / deviation.clamp(min=1e-6)
            self.outputs = one.rows.shape[1]
            self.usable = torch.ones(len(one.rows), dtype=torch.bool)

        def values(self, index):
            """Gives the teacher's standardised rows (B, E) float32."""
            return self.rows[index]

        def loss(self, outputs, values, smoothing):
            """Gives the mean squared difference; 2 for unrelated outputs, 0 for equal ones."""
            return functional.mse_loss(standardised(outputs), values)

        def right(self, outputs, values):
            """Gives the share of variance that is explained, at least 0."""
            return (1 - functional.mse_loss(standardised(outputs), values)).clamp(min=0)

    return Regression()
