"""Histograms of oriented gradients as a hand-crafted teacher (Dalal and Triggs, CVPR 2005).

The paper shows that clusters of such features are a strong, cheap teacher (table 5, CC + HOG). One
layer, `hog`: the blocks of scikit-image's `hog`, 2x2 cells and 9 orientations each, as a map.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kt.config import Settings

ANY_SIZE = True  # no image is too small


class Options(Settings):
    """Options of the backbone in the config."""

    cells: Annotated[
        int,
        Field(
            ge=2,
            description="cells along an edge, each of size // cells pixels (more fit where pixels "
            "are left over); the map is a cell less wide",
        ),
    ]


def layers(options: Options) -> list[str]:
    """Names the only layer."""
    return ["hog"]


def stages(options: Options) -> dict:
    """Gives the one stage."""
    from skimage.feature import hog

    from kt.core.backbone import Descriptor

    def describe(image):
        cell = max(image.shape[0] // options.cells, 2)
        blocks = hog(image, 9, (cell, cell), (2, 2), feature_vector=False, channel_axis=-1)
        return blocks.reshape(*blocks.shape[:2], -1)

    return {"hog": Descriptor(describe)}
