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


class Options(Settings):
    """Options of the kind in the config."""

    temperature: Annotated[float, Field(gt=0, description="of squared distances; lower: harder")]


def build(options: Options, taught: list, seed: int):
    """Builds the kind from one teacher's rows and centroids."""
    from kt.core.transfer import Distribution

    (one,) = taught
    return Distribution(one.rows, one.centroids, options.temperature)
