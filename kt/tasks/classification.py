"""Classification of whole images: by pseudo-labels, or by true labels for the supervised bound.

Images are augmented as whole batches: a random crop, a flip and a change of colour become one
affine resampling and one 3x3 matrix per image (ours; the paper uses AlexNet's ImageNet settings:
crop and flip). The head is a global average and one linear layer, with a hidden layer if wanted;
like the paper's fully connected layers it is thrown away afterwards.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kt.config import Fraction, Settings

LABELS = True  # learns those it is given; a pretext task has its own


class Augmentation(Settings):
    """How whole images are changed; validation sees them as they are."""

    crop: Annotated[Fraction, Field(description="smallest share of the area a crop keeps; 1: off")]
    flip: Annotated[Fraction, Field(description="probability of a mirrored image")]
    brightness: Annotated[Fraction, Field(description="factor 1 - x .. 1 + x")]
    contrast: Annotated[Fraction, Field(description="factor 1 - x .. 1 + x")]
    saturation: Annotated[Fraction, Field(description="factor 1 - x .. 1 + x")]


class Options(Augmentation):
    """Options of the task in the config."""

    balance: Annotated[
        bool,
        Field(
            description="draw labels uniformly, then an image (DeepCluster), not images; kinds of "
            "transfer that learn from features have no labels"
        ),
    ]
    hidden: Annotated[int, Field(ge=0, description="units of a hidden layer in the head; 0: none")]


def check(options: Options, size: int) -> None:
    """Any options fit images of any size."""


def build(options: Options, context):
    """Builds the task from a context with labels."""
    from kt.core.augment import ClassificationTask

    return ClassificationTask(options, context)
