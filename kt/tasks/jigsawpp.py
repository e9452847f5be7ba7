"""Jigsaw++: a 3x3 puzzle in which up to two tiles come from another image (paper, section 3).

Cells of size // 3 pixels, one tile per cell at a random place, each colour channel shifted a little
further, tiles shuffled by one of the permutations, then 0 to 2 of them replaced at random slots by
random cells of one other image. The label is the permutation alone. Every tile is normalised by its
own mean and standard deviation over its three channels (authors' code).

Sizes scale with the image: the published 85 px cell, 64 px tile, 0..18 px offset and 0..2 px
channel shift of a 255 px image become 21, 16, 0..3 and 0..1 px at 64 px, and 9, 7, 0..1 and 0 px
at 28 px.

Differs from the paper: both images of a puzzle share one draw of the grey mix, so that a replaced
tile does not give itself away by its colours (ours).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kt.config import Count, Fraction, Settings
from kt.core.permutations import NUM_TILES, permutation_set
from kt.core.step import ConfigError

PUBLISHED = (85, 64, 2)  # px of cell, tile, channel shift (paper, section 4; authors' code)
GAP = 1  # px between tiles, at least


class Options(Settings):
    """Options of the task in the config."""

    permutations: Annotated[int, Field(ge=2, description="number of labels; 701 in the paper")]
    min_distance: Annotated[
        int, Field(ge=2, le=9, description="places two permutations differ in, at least; paper: 3")
    ]
    occlusions: Annotated[
        int, Field(ge=0, le=8, description="most tiles replaced, 0..n equally likely; paper: 2")
    ]
    grey: Annotated[Fraction, Field(description="share turned grey; authors' code: 0.5")]
    projection: Annotated[
        Fraction, Field(description="share with a colour direction removed; authors' code: 0.25")
    ]
    tile_features: Annotated[Count, Field(description="fc6: features a tile; paper: 1024")]
    hidden: Annotated[Count, Field(description="fc7: hidden units over all tiles; paper: 4096")]
    map: Annotated[Count, Field(description="maps of a tile are pooled to at most map x map")]
    dropout: Annotated[Fraction, Field(description="behind fc6 and fc7; paper: 0.5")]


def geometry(size: int, published=PUBLISHED, gap: int = GAP) -> tuple[int, int, int, int]:
    """Gives cell, tile, largest offset and largest channel shift in pixels for an image edge.

    The published proportions, rounded so that tiles never leave their cell and keep their gap:
    offset + shift + tile + gap = cell.

    Args:
        size: Edge of the image in pixels.
        published: Cell, tile and channel shift of an article, in pixels.
        gap: Least pixels between neighbouring tiles.

    Raises:
        ConfigError: The cells are too small for a tile that can move.
    """
    cell = size // 3
    tile = round(cell * published[1] / published[0])
    shift = round(cell * published[2] / published[0])
    if cell - tile >= 4:
        shift = max(shift, 1)
    offset = cell - tile - shift - gap
    if tile < 5 or offset < 1:
        raise ConfigError(
            f"datasets.*.size: a {size} px image has {cell} px cells, too small for a jigsaw; "
            "expected 21 px or more"
        )
    return cell, tile, offset, shift


def check(options: Options, size: int) -> None:
    """Checks the options for images of `size` pixels, before anything expensive starts.

    Raises:
        ConfigError: The distance is too small for the occlusions, the images are too small, or more
            than all puzzles change their colours.
    """
    geometry(size)
    check_colours(options)
    if options.min_distance <= options.occlusions:
        raise ConfigError(
            f"task.min_distance: with {options.occlusions} replaced tiles puzzles of different "
            f"labels may look alike; expected at least {options.occlusions + 1}, found "
            f"{options.min_distance}"
        )


def check_colours(options) -> None:
    """Checks the shares of puzzles in grey and with a colour taken out.

    Raises:
        ConfigError: They are more than all.
    """
    if options.grey + options.projection > 1:
        raise ConfigError(
            f"grey: expected shares `grey` and `projection` of at most 1 together, found "
            f"{options.grey} and {options.projection}"
        )


def build(options: Options, context):
    """Builds the task; `check` says what can be wrong."""
    from kt.core.tiles import JigsawTask

    check(options, context.size)
    sizes, labels = geometry(context.size), permutation_set_of(options)
    return JigsawTask(options, context, sizes, labels, options.occlusions)


def permutation_set_of(options: Options):
    """Gives the (P, 9) uint8 permutations that the labels stand for."""
    return permutation_set(options.permutations, options.min_distance)


__all__ = ["NUM_TILES", "Options", "build", "geometry", "permutation_set_of"]
