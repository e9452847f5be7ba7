"""Hard clusters: the target classifies the index of each image's nearest centroid.

Source: the paper, section 3; only cluster membership is transferred, which is what decouples the
two architectures.
"""

from __future__ import annotations

from kt.config import Settings

NEEDS = "labels"
TOGETHER = False
BY_K = True


class Options(Settings):
    """No options."""


def clusters(options: Options, k: int) -> list[int]:
    """Gives the numbers of clusters that are needed at k."""
    return [k]


def build(options: Options, taught: list, seed: int):
    """Builds the kind from one teacher's labels."""
    from kt.core.transfer import Labels

    return Labels([one.labels for one in taught], [one.num_labels for one in taught])
