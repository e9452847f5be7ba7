"""Features standardised by those of train, in memory or block by block from a file."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from kt.core.blocks import Scratch

BLOCK = 8192  # rows that are read at once
LEAST = 1e-6  # deviation that is divided by


def standardised(
    train: Tensor | Scratch, test: Tensor | Scratch, where: torch.device
) -> tuple[Tensor, Tensor] | tuple[Streamed, Streamed]:
    """Gives rows of train and test with the mean 0 and the deviation 1 of train.

    Args:
        train: (N, D) float32.
        test: (T, D) float32.
        where: Takes them, of what is streamed the blocks.
    """
    if isinstance(train, Tensor) and isinstance(test, Tensor):
        train, test = train.to(where), test.to(where)
        mean, std = train.mean(0), train.std(0).clamp(min=LEAST)
        return (train - mean) / std, (test - mean) / std
    mean = sum(block.double().sum(0) for block in _read(train)) / len(train)
    squares = sum((block.double() - mean).square().sum(0) for block in _read(train))
    std = (squares / (len(train) - 1)).sqrt().clamp(min=LEAST)
    both = mean.float().to(where), std.float().to(where)
    return Streamed(train, *both), Streamed(test, *both)


def _read(rows: Tensor | Scratch) -> Iterator[Tensor]:
    for first in range(0, len(rows), BLOCK):
        yield torch.as_tensor(rows[first : first + BLOCK])


class Streamed:
    """Some of the rows (N, D) float32 of a file, standardised when they are read."""

    def __init__(self, rows: Tensor | Scratch, mean: Tensor, std: Tensor, picked=None):
        """Takes all rows, or those whose numbers, (n,) int64 ascending, are picked."""
        self.rows, self.mean, self.std = rows, mean, std
        self.picked = torch.arange(len(rows)) if picked is None else picked
        self.shape = (len(self.picked), rows.shape[1])

    def __len__(self) -> int:
        """Number of rows."""
        return self.shape[0]

    def __getitem__(self, picked: Tensor) -> Streamed:
        """Gives some of them, by ascending numbers."""
        return Streamed(self.rows, self.mean, self.std, self.picked[picked])

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Gives their places among these rows and the standardised rows, on the device."""
        edges = torch.arange(0, len(self.rows) + BLOCK, BLOCK)
        places = torch.searchsorted(self.picked, edges).tolist()
        between = itertools.pairwise(places)
        for first, (low, high) in zip(edges[:-1].tolist(), between, strict=True):
            if low < high:
                read = torch.as_tensor(self.rows[first : first + BLOCK])
                some = read[self.picked[low:high] - first].to(self.mean.device)
                yield slice(low, high), (some - self.mean) / self.std
