"""Sets of permutations of the nine tiles with a guaranteed minimal Hamming distance.

With up to s hidden tiles two puzzles of different labels can look alike only if their permutations
differ in at most s places, so a minimal distance of s + 1 suffices (paper, section 3: 701
permutations with distance 3 and up to 2 replaced tiles).
"""

from __future__ import annotations

import math

import numpy as np

from kt.core.step import ConfigError

NUM_TILES = 9
BLOCK = 2048  # candidates compared at once; bounds memory, does not change the set


def permutation_set(number: int, min_distance: int) -> np.ndarray:
    """Gives a fixed set of permutations: the same arguments always give the same set.

    Greedy: all 9! permutations but the identity stand in a fixed random order; the first that is
    left is taken and all that are too close to it are struck out. The prefix of a larger set is
    the smaller set.

    Args:
        number: How many.
        min_distance: Smallest number of places in which two of them differ, 2 to 9.

    Returns:
        (number, 9) uint8; row p says which cell stands in each slot.

    Raises:
        ConfigError: So many do not exist at that distance, or the greedy search finds fewer.
    """
    others = math.factorial(NUM_TILES) - 1
    shuffled = np.random.Generator(np.random.PCG64(701)).permutation(others) + 1
    chosen = np.empty((0, NUM_TILES), np.uint8)
    for first in range(0, len(shuffled), BLOCK):
        left = lexicographic(shuffled[first : first + BLOCK])
        left = left[((left[:, None] != chosen).sum(2) >= min_distance).all(1)]
        while len(left) and len(chosen) < number:
            chosen = np.concatenate([chosen, left[:1]])
            left = left[(left != left[0]).sum(1) >= min_distance]
        if len(chosen) == number:
            return chosen
    raise ConfigError(
        f"task.permutations: found {len(chosen)} permutations that differ in at least "
        f"{min_distance} places, expected {number}; lower permutations or min_distance"
    )


def lexicographic(ranks: np.ndarray) -> np.ndarray:
    """Gives the permutations (B, 9) uint8 of these ranks (B,) int64, 0 the identity."""
    found = np.empty((len(ranks), NUM_TILES), np.uint8)
    for slot in reversed(range(NUM_TILES)):  # its place among what the earlier slots leave
        later = NUM_TILES - 1 - slot
        found[:, slot] = ranks // math.factorial(later) % (later + 1)
        found[:, slot + 1 :] += found[:, slot + 1 :] >= found[:, slot, None]
    return found


def distances(permutations: np.ndarray) -> np.ndarray:
    """Gives the Hamming distance of each pair, (P, P) int64, of (P, 9) permutations."""
    return (permutations[:, None] != permutations[None]).sum(2)
