"""Hard clusters of more nearly equal size: Sinkhorn's balanced assignment to the same centroids.

Source: Cuturi, "Sinkhorn distances" (NeurIPS 2013), used for pseudo-labels by Asano et al., ICLR
2020, and SwAV, NeurIPS 2020. (Drawing clusters uniformly, as DeepCluster does, is the option
`balance` of the label task.)
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kt.config import Count, Settings
from kt.transfers.hard import clusters  # noqa: F401

NEEDS = "features"
TOGETHER = False
BY_K = True
BLOCK = 4096
CLOSE = 0.01  # of a cluster's share of the rows: then the scaling ends (ours)


class Options(Settings):
    """Options of the kind in the config."""

    temperature: Annotated[float, Field(gt=0, description="of squared distances; lower: harder")]
    iterations: Annotated[
        Count, Field(description="of the balancing, at most; a lower temperature needs more")
    ]


def build(options: Options, taught: list, seed: int):
    """Builds the kind from one teacher's rows and centroids."""
    from kt.core import step
    from kt.core.transfer import Labels

    (one,) = taught
    labels = balanced(one.rows, one.centroids, options.temperature, options.iterations)
    sizes = labels.bincount(minlength=len(one.centroids))
    step.log.info("balanced: %d clusters of %d to %d images", len(sizes), sizes.min(), sizes.max())
    return Labels([labels], [len(one.centroids)])


def balanced(rows, centroids, temperature: float, iterations: int):
    """Assigns rows to centroids so that all get about as many.

    Scales exp(-d^2 / temperature) in turn so that each row sums to 1 and each column to N / K; only
    the columns' factors are kept, so memory grows with neither N nor K alone. Each row then takes
    its largest share, so that sizes come near each other without being equal.

    Args:
        rows: (N, E) float32.
        centroids: (K, E) float32.
        temperature: Of the squared distances.
        iterations: Scalings of rows and columns at most; they end where columns hardly change.

    Returns:
        (N,) int64.
    """
    import torch

    def scores(part):  # logarithms throughout: the exponentials underflow
        return -torch.cdist(part, centroids).square().double() / temperature

    wanted = torch.tensor(len(rows) / len(centroids), dtype=torch.float64).log()
    column = torch.zeros(len(centroids), dtype=torch.float64)
    for _ in range(iterations):
        sums = torch.full_like(column, -torch.inf)
        for part in rows.split(BLOCK):
            shares = (scores(part) + column).log_softmax(1)
            sums = torch.logaddexp(sums, shares.logsumexp(0))
        column += wanted - sums
        if (wanted - sums).abs().max() < CLOSE:
            break
    return torch.cat([(scores(part) + column).argmax(1) for part in rows.split(BLOCK)])
