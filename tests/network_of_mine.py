"""A network in a file of its own, as `kt/backbones/file.py` takes it; for the tests."""

import itertools

from torch import nn


def tiny(widths: list[int]) -> dict[str, nn.Module]:
    """Gives stages `one`, `two`, ... that halve the map."""
    names = ("one", "two", "three")[: len(widths)]
    convolutions = [nn.Conv2d(a, b, 3, 2, 1) for a, b in itertools.pairwise([3, *widths])]
    return {
        name: nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU())
        for name, conv in zip(names, convolutions, strict=True)
    }
