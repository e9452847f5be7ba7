"""Rotation: by how many quarter turns was the image turned? (Gidaris et al., ICLR 2018).

Whole images, cropped, mirrored and recoloured as `kt/tasks/classification.py` does it, then turned
counter-clockwise by 0, 90, 180 or 270 degrees, the labels 0 to 3. Guessing is right in 1/4, with a
loss of ln 4 = 1.386.

Differs from the article, which shows all four turns of an image in one batch: here an image has one
turn an epoch and all four, in random order, in each four epochs. An epoch so costs one view an
image, as in the label task, and a batch holds as many different images as it has views; four of our
epochs are one of the article's.

Against shortcuts: quarter turns of square views move pixels and resample none, so that no border
and no blur tells the turn (article, section 2); crops are stretched as often in height as in width,
before the turn. Chromatic aberration and vignetting look alike from all four sides. What is not
covered: captions and time stamps that stand in the same place of many pictures, and pictures that
have no upright side, from which nothing can be learned.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kt.tasks.classification import Augmentation


class Options(Augmentation):
    """Options of the task in the config."""

    hidden: Annotated[int, Field(ge=0, description="units of a hidden layer in the head; 0: none")]


def check(options: Options, size: int) -> None:
    """Any options fit images of any size."""


def build(options: Options, context):
    """Builds the task."""
    from kt.core.turns import RotationTask

    return RotationTask(options, context)
