"""Several numbers of clusters at once, each with a head of its own.

Source: ours; the heads of several clusterings are those of "Self-labelling via simultaneous
clustering and representation learning" (Asano et al., ICLR 2020, section 3.3).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kt.config import Settings
from kt.transfers.hard import build  # noqa: F401 (a head for each list of labels)

NEEDS = "labels"
TOGETHER = False
BY_K = True


class Options(Settings):
    """Options of the kind in the config."""

    factors: Annotated[
        list[Annotated[float, Field(ge=0.001, le=1000)]],
        Field(min_length=1, description="the heads have k times these clusters"),
    ]


def clusters(options: Options, k: int) -> list[int]:
    """Gives the numbers of clusters that are needed at k."""
    return sorted({max(2, round(factor * k)) for factor in options.factors})
