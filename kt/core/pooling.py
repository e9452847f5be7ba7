"""How the maps of a network's layers become the features of a probe; no torch at the top."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, model_validator

from kt.config import Count, Settings


def one_of_the_two(options):
    """Gives the options back, or raises ValueError unless one of map and dimensions is null."""
    if (options.map is None) == (options.dimensions is None):
        raise ValueError(
            f"expected one of map and dimensions, the other null; found map {options.map} and "
            f"dimensions {options.dimensions}"
        )
    return options


class Pooling(Settings):
    """Options of a probe that sees every layer."""

    map: Annotated[
        Count | None, Field(description="each layer's map is pooled to map x map; or null")
    ]
    dimensions: Annotated[
        Count | None,
        Field(description="or each layer's grid gives about so many (the paper: 9000); or null"),
    ]
    _one = model_validator(mode="after")(one_of_the_two)


def nearest_edge(channels: int, edge: int, dimensions: int) -> int:
    """Gives the edge of the grid whose channels x edge x edge is nearest to `dimensions`.

    AlexNet's five layers get 9,600, 9,216, 9,600, 9,600 and 9,216 for 9,000, as in the linear
    probes of DeepCluster's code (paper, section 5: about 9,000).

    Args:
        channels: M of the map.
        edge: Of the map; the grid has at most as many cells.
        dimensions: Wanted.
    """
    return min(range(1, edge + 1), key=lambda found: abs(channels * found**2 - dimensions))


def probes(backbone, data, options: Pooling) -> Iterator[tuple]:
    """Yields (layer, train, test) with features (N, D) and (T, D) float32, first layer first.

    Where the features of all layers would not fit into memory together, it is one pass for each.
    """
    from kt.core import judge

    pack = data.train.pack
    shapes = {layer: backbone.map_shape(pack.size, layer) for layer in backbone.layers}
    wanted = {
        layer: options.map or nearest_edge(channels, edge, options.dimensions)
        for layer, (channels, edge, _) in shapes.items()
    }
    numbers = (
        shapes[layer][0] * min(shapes[layer][1], edge) ** 2 for layer, edge in wanted.items()
    )
    together = 4 * len(pack) * sum(numbers) <= judge.MOST_BYTES
    for layer in backbone.layers:
        edges = wanted if together else {layer: wanted[layer]}
        train, test = (
            judge.features(backbone, split.pack, edges)[layer] for split in (data.train, data.test)
        )
        yield layer, train, test
