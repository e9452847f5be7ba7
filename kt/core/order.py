"""The order of an epoch for packs larger than the memory: shuffled in blocks of consecutive rows.

Rows that are trained one after the other come from few blocks, so that a disk reads stretches and
not single images.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kt.core import draws
from kt.core.encoded import Encoded
from kt.core.images import LARGE

BLOCK = 256  # rows: 4 MB of JPEGs at 255 px
WINDOW = 16  # blocks whose rows are mixed


def block_of(images: np.ndarray | Encoded) -> int:
    """Gives the consecutive rows of a pack that are read together, 0 where any row is as quick.

    By the pack alone and not by a machine's memory: an epoch has the same order everywhere.
    """
    return 0 if isinstance(images, np.ndarray) and images.nbytes <= LARGE else BLOCK


def block_order(ids: Tensor, seed: int, epoch: int, block: int, window: int) -> Tensor:
    """Gives the rows of one epoch in training order, each once.

    Blocks are shuffled, and then the rows of each `window` blocks that follow one another. With
    one block it is the order of `draws.permutation` for the purpose `order`.

    Args:
        ids: (N,) int64, one per row.
        seed: Of the draws.
        epoch: Which pass.
        block: Consecutive rows in a block.
        window: Blocks whose rows are mixed.

    Returns:
        (N,) int64. Of its positions each run of block * window, counted from 0, touches at most
        `window` blocks, but for the run that the short last block lies in and those after it,
        whose limits lie that much earlier.
    """
    number = -(-len(ids) // block)
    shuffled = draws.permutation(seed, "blocks", epoch, torch.arange(number))
    turn = torch.empty_like(shuffled)
    turn[shuffled] = torch.arange(number)
    group = (turn // window).repeat_interleave(block)[: len(ids)]
    order = draws.permutation(seed, "order", epoch, ids)
    return order[group[order].argsort(stable=True)]


def neighbour(index: Tensor, draw: Tensor, block: int, number: int) -> Tensor:
    """Gives another row of the same block for each row, (B,) int64.

    A block of one row has none: it takes the row before.

    Args:
        index: (B,) int64 rows.
        draw: (B,) int64, 0 or more.
        block: Consecutive rows in a block.
        number: N, rows of the pack, 2 or more.
    """
    first = index // block * block
    length = (number - first).clamp(max=block)
    step = 1 + draw % (length - 1).clamp(min=1)
    other = first + (index - first + step) % length
    return torch.where(length > 1, other, (index + number - 1) % number)
