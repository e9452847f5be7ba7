"""Rows that several processes have together, each some of them, and sums over the processes.

    torchrun --standalone --nproc-per-node 2 -m kt.cluster ...

One process alone has all rows, and torch is not even imported.
"""

from __future__ import annotations

import datetime
import os

import numpy as np

from kt.core import blocks
from kt.core.parts import WHOLE, Part

TIMEOUT = datetime.timedelta(hours=1)  # others may take so much longer for their rows


def own_part() -> Part:
    """Gives the part of all rows that this process takes."""
    return Part(int(os.environ.get("RANK", 0)) + 1, int(os.environ.get("WORLD_SIZE", 1)))


class Spread:
    """Rows (n, D) of this process, see `kt.core.blocks`, and where they stand among all (N, D).

    Attributes:
        shape: (n, D).
        first: Number of the first of them.
        number: N.
        part: Of the processes; `WHOLE` where this one has all rows, whatever others do.
    """

    def __init__(self, rows, first: int = 0, number: int | None = None, part: Part = WHOLE):
        """Takes the rows of this process."""
        self.rows, self.shape, self.part = rows, rows.shape, part
        self.first, self.number = first, len(rows) if number is None else number

    def __len__(self) -> int:
        """Number of rows of this process."""
        return self.shape[0]

    def __getitem__(self, place):
        """Gives rows of this process, counted from its first one."""
        return self.rows[place]

    def own(self, picked: np.ndarray) -> slice:
        """Says which of some numbers of rows, ascending, (m,), are rows of this process."""
        return slice(*np.searchsorted(picked, (self.first, self.first + len(self))))

    def take(self, picked: np.ndarray) -> Spread:
        """Gives the rows of ascending numbers (m,) int64, spread as these are."""
        own = self.own(picked)
        rows = blocks.take(self.rows, picked[own] - self.first)
        return Spread(rows, own.start, len(picked), self.part)

    def read(self, picked: np.ndarray) -> np.ndarray:
        """Gives all rows of some numbers, (m, D) float32, in each process."""
        found = np.zeros((len(picked), self.shape[1]), np.float32)
        for place, row in enumerate((picked - self.first).tolist()):
            if 0 <= row < len(self):
                found[place] = self.rows[row : row + 1][0]
        return self.total(found)

    def total(self, values: np.ndarray) -> np.ndarray:
        """Gives the sum over the processes, the same bits in each."""
        if self.part.of == 1:
            return values
        import torch
        from torch import distributed

        if not distributed.is_initialized():
            distributed.init_process_group("gloo", timeout=TIMEOUT)
        summed = torch.from_numpy(np.array(values))  # a copy
        distributed.all_reduce(summed)
        return summed.numpy()

    def every(self, values: np.ndarray) -> np.ndarray:
        """Gives what all processes have, (processes, ...), in each."""
        found = np.zeros((self.part.of, *np.shape(values)))
        found[self.part.number - 1] = values
        return self.total(found)


def spread(rows) -> Spread:
    """Gives rows that may be spread as such."""
    return rows if isinstance(rows, Spread) else Spread(rows)
