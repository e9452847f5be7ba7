"""Stateless randomness: each draw is a pure function of (seed, purpose, epoch, id).

The id is that of an image (or a position), so the same numbers come out for any batch size, order,
worker count or point of resumption. A counter-based generator: the finaliser of SplitMix64
(Steele et al., "Fast splittable pseudorandom number generators", OOPSLA 2014) over whole tensors,
in int64, which wraps alike on CPU and CUDA.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def bits(seed: int, purpose: str, epoch: int, ids: Tensor, count: int) -> Tensor:
    """Gives 63 random bits per draw.

    Args:
        seed: Of the run.
        purpose: What the draws are for; different purposes are independent.
        epoch: Which pass; -1 and below serve validation.
        ids: (B,) int64.
        count: Draws per id.

    Returns:
        (B, count) int64, uniform in 0 .. 2**63 - 1, on the device of `ids`.
    """
    name = f"{seed}/{purpose}/{epoch}".encode()
    stream = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big", signed=True)
    counters = torch.arange(1, count + 1, device=ids.device) * _GOLDEN
    return _shift(_mix(_mix(ids ^ stream)[:, None] + counters), 1)


def uniform(seed: int, purpose: str, epoch: int, ids: Tensor, count: int) -> Tensor:
    """Gives (B, count) float32 in [0, 1), exact multiples of 2**-24; arguments as in `bits`."""
    return (bits(seed, purpose, epoch, ids, count) >> 39).to(torch.float32) * 2.0**-24


def integers(seed: int, purpose: str, epoch: int, ids: Tensor, count: int, below: int) -> Tensor:
    """Gives (B, count) int64 in 0 .. below - 1; arguments as in `bits`."""
    return bits(seed, purpose, epoch, ids, count) % below


def choices(seed: int, purpose: str, epoch: int, ids: Tensor, count: int, below: int) -> Tensor:
    """Gives (B, count) int64, distinct numbers of 0 .. below - 1 in random order."""
    return bits(seed, purpose, epoch, ids, below).argsort(1)[:, :count]


def permutation(seed: int, purpose: str, epoch: int, ids: Tensor) -> Tensor:
    """Gives a random order of the rows of `ids`, (B,) int64, that each row's id decides."""
    return bits(seed, purpose, epoch, ids, 1)[:, 0].argsort(stable=True)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    """Shifts right logically; int64's own shift copies the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)
