"""The plain jigsaw puzzle, without tiles of other images (Noroozi and Favaro, ECCV 2016).

As `kt/tasks/jigsawpp.py`, with which it shares its code, but every tile is the image's own, tiles
are larger in their cells and may touch: 64 px in cells of 75 px of a 225 px image, gaps of 0 to
22 px (article, section 4). At 64 px a cell has 21, a tile 18 px. To measure what replaced tiles do
by themselves take `jigsawpp` with `occlusions: 0`, which keeps its smaller tiles.

Guessing among P permutations is right in 1/P of the puzzles, with a loss of ln P.

Against shortcuts (article, section 4.2): tiles are normalised one by one, so that shading does not
tell neighbours; they are placed at random in their cells, so that edges do not continue; colour
channels are shifted and a part of the puzzles is grey, so that chromatic aberration does not tell
the place.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kt.config import Count, Fraction, Settings
from kt.tasks import jigsawpp

PUBLISHED = (75, 64, 2)  # px of cell, tile, channel shift (article, section 4)


class Options(Settings):
    """Options of the task in the config."""

    permutations: Annotated[int, Field(ge=2, description="number of labels; article: 1000")]
    min_distance: Annotated[
        int, Field(ge=2, le=9, description="places two permutations differ in, at least")
    ]
    grey: Annotated[Fraction, Field(description="share turned grey; article: 0.3")]
    projection: Annotated[
        Fraction, Field(description="share with a colour direction removed; article: 0")
    ]
    tile_features: Annotated[Count, Field(description="fc6: features a tile; article: 512")]
    hidden: Annotated[Count, Field(description="fc7: hidden units over all tiles; article: 4096")]
    map: Annotated[Count, Field(description="maps of a tile are pooled to at most map x map")]
    dropout: Annotated[Fraction, Field(description="behind fc6 and fc7; article: 0.5")]


def check(options: Options, size: int) -> None:
    """Checks that images of `size` pixels have room for nine tiles, and the colours.

    Raises:
        ConfigError: They have not, or more than all puzzles change their colours.
    """
    jigsawpp.geometry(size, PUBLISHED, 0)
    jigsawpp.check_colours(options)


def build(options: Options, context):
    """Builds the task; `check` says what can be wrong."""
    from kt.core.tiles import JigsawTask

    sizes = jigsawpp.geometry(context.size, PUBLISHED, 0)
    return JigsawTask(options, context, sizes, jigsawpp.permutation_set_of(options), 0)
