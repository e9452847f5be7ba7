"""Context prediction: which of its 8 neighbours is the second patch? (Doersch et al., ICCV 2015).

Two patches of an image, the centre first; the label is the direction of the other, row by row from
the upper left (0) to the lower right (7). Guessing is right in 1/8 of the pairs, with a loss of
ln 8 = 2.079.

Sizes are shares of the image: published are patches of 96 px, gaps of half a patch and a jitter of
up to 7 px each way (article, section 3.1), in images of some 400 x 600 px. Ours have 28 to 255 px:
with `patch: 0.2` a 64 px image has patches of 13, gaps of 6 and a jitter of 1 px.

Against shortcuts (article, section 3.1): the gap, so that lines and textures do not go on from one
patch into the other; jitter, so that a straight line is no clue; and for chromatic aberration,
which tells a patch's place in the image, a projection off green-magenta or one channel alone.

Differs from the article:
- The channel that is kept is shown three times, where the article puts noise of a hundredth of its
  deviation beside it: no aberration either way, and patches look like grey images.
- The centre patch stands wherever all 8 neighbours fit, so that by itself it tells nothing.
- Patches are normalised one by one, as in Jigsaw++, and none is made coarser and enlarged again:
  those of small images are coarse.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from kt.config import Count, Fraction, Settings
from kt.core.step import ConfigError


class Options(Settings):
    """Options of the task in the config."""

    patch: Annotated[Fraction, Field(description="edge of a patch as a share of the image's")]
    gap: Annotated[Fraction, Field(description="between patches, in patches; article: 0.5")]
    jitter: Annotated[Fraction, Field(description="each way, in patches; article: 7/96 = 0.073")]
    projection: Annotated[
        Fraction, Field(description="share of pairs without the direction green-magenta")
    ]
    dropping: Annotated[Fraction, Field(description="share of pairs of which one channel is kept")]
    tile_features: Annotated[Count, Field(description="fc6: features a patch; article: 4096")]
    hidden: Annotated[Count, Field(description="fc7: hidden units over both; article: 4096")]
    map: Annotated[Count, Field(description="maps of a patch are pooled to at most map x map")]
    dropout: Annotated[Fraction, Field(description="behind fc6 and fc7")]


def geometry(options: Options, size: int) -> tuple[int, int, int, int]:
    """Gives patch, step from patch to patch, jitter and the centre patch's room in pixels.

    Patches never touch, and all eight neighbours lie in the image:
    2 * jitter < step - patch and 2 * (jitter + step) + patch + room = size.

    Raises:
        ConfigError: They do not; or the patches are too small.
    """
    patch = round(options.patch * size)
    step = patch + round(options.gap * patch)
    jitter = math.ceil(options.jitter * patch)
    room = size - patch - 2 * (step + jitter)
    if patch < 5:
        raise ConfigError(
            f"patch: {options.patch} of {size} px makes patches of {patch} px; expected 5 px or "
            "more; choose a larger share or larger images"
        )
    if room < 0:
        raise ConfigError(
            f"patch: three patches of {patch} px in a row with gaps of {step - patch} px and "
            f"jitter of {jitter} px take {size - room} px; expected at most the image's {size} px; "
            "choose a smaller patch, gap or jitter"
        )
    if 2 * jitter >= step - patch:
        raise ConfigError(
            f"jitter: patches that move {jitter} px each way touch across a gap of {step - patch} "
            f"px; expected a gap of at least {2 * jitter + 1} px; choose a larger gap or less "
            "jitter"
        )
    return patch, step, jitter, room


def check(options: Options, size: int) -> None:
    """Checks the options for images of `size` pixels, before anything expensive starts.

    Raises:
        ConfigError: Patches do not fit, or more than all pairs change their colours.
    """
    geometry(options, size)
    if options.projection + options.dropping > 1:
        raise ConfigError(
            f"dropping: expected shares `projection` and `dropping` of at most 1 together, found "
            f"{options.projection} and {options.dropping}"
        )


def build(options: Options, context):
    """Builds the task; `check` says what can be wrong."""
    from kt.core.pairs import PairTask

    check(options, context.size)
    return PairTask(options, context, geometry(options, context.size))
