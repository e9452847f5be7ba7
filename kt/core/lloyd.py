"""k-means by Lloyd's iterations and the nearest centroid, both exact and block by block.

Memory does not grow with the number of rows, and the result depends neither on where the rows stand
(an array or a file) nor on the number of threads; on that of the processes by rounding alone. One
iteration is one matrix product a block.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator

import numpy as np

from kt.core import blocks
from kt.core.reached import Reached
from kt.core.spread import Spread, spread

RESTART = 15486557  # between the seeds of two restarts, as faiss has it
SPLIT = 1 / 1024  # how far the halves of a split cluster are set apart, as in faiss
SCORES = 8 << 20  # bytes of one matrix product
NEVER = -1e37  # of a float32 score: below all others


def kmeans(
    rows,
    k: int,
    iterations: int,
    redo: int,
    spherical: bool,
    seed: int,
    start=None,
    reached: Reached | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Runs Lloyd's iterations on all rows, from the rows that faiss would start with.

    Args:
        rows: (N, E) float32, see `kt.core.blocks`, or a `Spread` of them over processes, all of
            which call this.
        k: Number of centroids, at most N.
        iterations: How many at most; it ends where nothing changes any more.
        redo: Restarts; the best objective wins.
        spherical: Centroids of unit length.
        seed: Of the first centroids.
        start: (k, E) float32 centroids to go on from; one run, whatever `redo` says.
        reached: Where it keeps how far it is, and finds how far it was.

    Returns:
        (k, E) float32 centroids and the objective before each update of the best run, float64: the
        sum of squared distances, or of inner products if spherical.
    """
    rows, reached = spread(rows), reached or Reached()
    if start is not None:
        return _run(rows, start, iterations, spherical, reached)
    seeds = [(seed + number * RESTART) % 2**31 for number in range(redo)]
    runs = (_run(rows, first_rows(rows, k, one), iterations, spherical, reached) for one in seeds)
    return (max if spherical else min)(runs, key=lambda run: run[1][-1])


def first_rows(rows, k: int, seed: int) -> np.ndarray:
    """Gives the k rows that faiss takes as first centroids, (k, E) float32."""
    rows = spread(rows)
    return rows.read(permuted(rows.number, k, seed + 1))


def permuted(number: int, count: int, seed: int) -> np.ndarray:
    """Gives the first `count` of faiss's random permutation of 0..number-1, (count,) int64.

    Source: faiss, `rand_perm` in utils/random.cpp. Keeps only what has moved.
    """
    draws = np.random.RandomState(seed % 2**32).randint(0, 2**32, count, np.uint32).tolist()
    moved: dict[int, int] = {}
    found = np.empty(count, np.int64)
    for place, draw in enumerate(draws):
        other = place + draw % (number - place)
        found[place] = moved.get(other, other)
        moved[other] = moved.pop(place, place)
    return found


def _run(
    rows: Spread, centroids, iterations: int, spherical: bool, reached: Reached
) -> tuple[np.ndarray, np.ndarray]:
    """Iterates from given centroids; gives the last ones and the objectives."""
    centroids = _normalised(centroids) if spherical else centroids
    centroids, objective, ended = reached.begin(centroids)
    squares = 0.0
    if not (spherical or ended):
        squares = float(rows.total(sum(blocks.each(_squares, rows), 0.0)))
    while len(objective) < iterations and not ended:
        before, (sums, sizes) = centroids, _sums(rows, centroids)
        objective.append(_objective(centroids, sums, sizes, squares, spherical))
        centroids = _means(centroids, sums, sizes)
        if not sizes.all():
            centroids = _split(centroids, sizes, _scatter(rows, before, centroids, sizes))
        if spherical:
            centroids = _normalised(centroids)
        ended = np.array_equal(before, centroids) or len(objective) == iterations
        reached.after(centroids, objective, ended)
    return centroids, np.array(objective)


def _sums(rows: Spread, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gives the sum of each cluster's rows, (K, E) float64, and their number, (K,) int64."""
    from scipy import sparse

    labels_of = labeller(centroids)

    def part(first: int, block: np.ndarray):
        labels, number = labels_of(block, False)[0], len(block)
        # Sums as a product with a sparse matrix: the fastest of those tried, and in float64.
        one_hot = sparse.csc_array(
            (np.ones(number), labels, np.arange(number + 1)), (len(centroids), number)
        )
        return one_hot @ block, np.bincount(labels, minlength=len(centroids))

    sums, sizes = np.zeros(centroids.shape), np.zeros(len(centroids), np.int64)
    for found, number in blocks.each(part, rows):
        sums += found
        sizes += number
    return rows.total(sums), rows.total(sizes)


def _squares(first: int, block: np.ndarray) -> float:
    """Gives the sum of all squares in float64."""
    flat = block.astype(np.float64).ravel()
    return float(flat @ flat)


def _objective(centroids, sums, sizes, squares: float, spherical: bool) -> float:
    """Gives the objective from the sums alone: no distance of a row needs to be taken."""
    wide = centroids.astype(np.float64)
    inner = float((wide * sums).sum())
    if spherical:
        return inner
    return max(0.0, squares - 2 * inner + float(sizes @ (wide * wide).sum(1)))


def _means(centroids: np.ndarray, sums: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Gives the means; an empty cluster keeps its centroid."""
    filled = sizes > 0
    means = centroids.copy()
    means[filled] = sums[filled] / sizes[filled, None]
    return means


def _scatter(rows: Spread, before: np.ndarray, means: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Gives each cluster's sum of squared distances to its mean, (K,) float64; 0 if all rows agree.

    A pass of its own, which only iterations with empty clusters take.
    """
    labels_of = labeller(before)

    def part(first: int, block: np.ndarray) -> np.ndarray:
        labels, distances = labels_of(block, True)
        return np.bincount(labels, distances, len(before))

    around = rows.total(sum(blocks.each(part, rows), np.zeros(len(before))))
    moved = sizes * ((means.astype(np.float64) - before) ** 2).sum(1)
    # What rounding alone leaves of equal rows: of the difference, and of float32 coordinates.
    rounding = np.maximum(1e-6 * around, 1e-13 * sizes * (means.astype(np.float64) ** 2).sum(1))
    return np.where(around - moved > rounding, around - moved, 0.0)


def _split(means: np.ndarray, sizes: np.ndarray, scatter: np.ndarray) -> np.ndarray:
    """Lets each empty cluster take half of the one that scatters most by then.

    Both halves get its mean, set apart a little, as in faiss; there the one to split is drawn by
    its number of rows. By their number alone it would ever again be a picture that many images
    repeat, of which no half can be taken (ours). Where all rows of all clusters agree, a cluster
    stays empty.
    """
    means, scatter = means.copy(), scatter.copy()
    apart = np.where(np.arange(means.shape[1]) % 2, 1 - SPLIT, 1 + SPLIT).astype(np.float32)
    for empty in np.flatnonzero(sizes == 0):
        wide = scatter.argmax()
        if scatter[wide] == 0:
            break
        means[empty], means[wide] = means[wide] * apart, means[wide] * (2 - apart)
        scatter[empty] = scatter[wide] = scatter[wide] / 2
    return means


def _normalised(centroids: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(centroids, axis=1, keepdims=True)
    return centroids / np.maximum(length, 1e-12, dtype=np.float32)


# ---------------------------------------------------------------------------- assignment


def assign(rows, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gives each row's nearest centroid (N,) int64 and the squared distance (N,) float32.

    For spherical centroids on unit rows the nearest is also the one of the largest cosine.
    """
    found = list(nearest(rows, centroids))
    return np.concatenate([part[0] for part in found]), np.concatenate([part[1] for part in found])


def nearest(
    rows, centroids: np.ndarray, prepare: Callable = lambda first, block: block
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Does what `assign` does block by block.

    Args:
        rows: (N, D), see `kt.core.blocks`.
        centroids: (K, E) float32.
        prepare: Turns the number of a block's first row and the block, (n, D), into (n, E).
    """
    labels_of = labeller(centroids)
    return blocks.each(lambda first, block: labels_of(prepare(first, block), True), rows)


def labeller(centroids: np.ndarray) -> Callable[[np.ndarray, bool], tuple]:
    """Gives a function from rows (n, E) float32 to nearest centroids (n,) int64 and distances.

    The nearest centroid has the largest x c - c^2 / 2: one matrix product, with a column of ones in
    the rows for the second term. Both are taken from the centroids' median, or little would be left
    of differences far from zero; a mean would follow one centroid that is an outlier. Of equal
    centroids the first is the nearest, or rounding would tell equal rows apart. Squared distances
    (n,) float32 are then taken row by row, or not at all (None) where the second argument says so.
    """
    middle = len(centroids) // 2
    centre = np.partition(centroids, middle, 0)[middle]
    moved = centroids - centre
    lengths = (moved.astype(np.float64) ** 2).sum(1)
    matrix = np.concatenate([moved.T, -0.5 * lengths[None]]).astype(np.float32)
    first: dict[bytes, int] = {}
    for number, one in enumerate(centroids + 0.0):  # no -0.0
        if first.setdefault(one.tobytes(), number) != number:
            matrix[-1, number] = NEVER
    best = _best_column(matrix)
    most = max(64, min(1024, SCORES // (4 * len(centroids))))

    def labels_of(rows: np.ndarray, measure: bool) -> tuple[np.ndarray, np.ndarray | None]:
        labels = np.empty(len(rows), np.int64)
        distances = np.empty(len(rows), np.float32) if measure else None
        # One set of buffers, small enough for the cache: fresh memory would cost up to a third.
        height = min(most, len(rows))
        padded = np.ones((height, len(matrix)), np.float32)
        scores = np.empty((height, len(centroids)), np.float32)
        apart = np.empty((height, rows.shape[1]), np.float32)
        for first in range(0, len(rows), most):
            some = rows[first : first + most]
            part = slice(first, first + len(some)), slice(len(some))
            np.subtract(some, centre, out=padded[part[1], :-1])
            labels[part[0]] = best(padded[part[1]], scores[part[1]])
            if distances is not None:
                near = apart[part[1]]
                np.take(centroids, labels[part[0]], 0, out=near, mode="clip")  # unbuffered
                np.subtract(some, near, out=near)
                np.einsum("ne,ne->n", near, near, out=distances[part[0]])
        return labels, distances

    return labels_of


def _best_column(matrix: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Gives a function from rows, and room for scores, to the column with the largest product.

    On CUDA where there is a device, in plain float32; that path was run with torch on the CPU only,
    never on a GPU. The CPU's result is the reference.
    """
    where = device()
    if where is None:
        return lambda rows, scores: np.matmul(rows, matrix, out=scores).argmax(1)
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    there = torch.from_numpy(matrix).to(where)
    return lambda rows, _: (torch.from_numpy(rows).to(where) @ there).argmax(1).cpu().numpy()


@functools.cache
def device() -> str | None:
    """Gives this process's device or None; torch is only imported where there could be one."""
    if not os.path.exists("/dev/nvidiactl"):
        return None
    from kt.core import hardware

    where = hardware.device()
    return str(where) if where.type == "cuda" else None
