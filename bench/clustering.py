"""k-means against bare faiss, assignment against the plain matrix product."""

from __future__ import annotations

import functools
import itertools
import subprocess
from pathlib import Path

import numpy as np

from bench import drawn, product
from bench.measure import Measured, Run, alternate, costs, seconds, speeds

N, D, K, ITERATIONS = 100_000, 512, 2000, 20
HEIGHTS = (1024, 4096, 16384)  # rows of a block of the plain product


def features(run: Run, number: int = N, dimensions: int = D) -> Path:
    """Gives a table of drawn features, made once."""
    path = run.scratch / f"features-{number}-{dimensions}.h5"
    if not path.exists():
        product.write_features(path, drawn.features(number, dimensions), drawn.keys(number), 4096)
    return path


def kmeans_vs_faiss(run: Run) -> Measured:
    """Compares the step as a process, start-up included, with `faiss.Kmeans.train` alone.

    `also` has its share of the seconds of scikit-learn's Lloyd on the same rows in memory.
    """
    import faiss
    import sklearn
    from sklearn.cluster import KMeans

    path, rows = features(run), drawn.features(N, D)
    faiss.omp_set_num_threads(run.cores)
    command = product.cluster_command(path, K, ITERATIONS, run.scratch / "clusters.h5", run.cores)

    def ours():
        subprocess.run(command, check=True, cwd=product.ROOT, stderr=subprocess.DEVNULL)

    def peer():
        model = faiss.Kmeans(
            D, K, niter=ITERATIONS, seed=0, max_points_per_centroid=N, min_points_per_centroid=1
        )
        model.train(rows)

    pairs = alternate(ours, peer, run.rounds, warm=False)
    other = KMeans(K, init=rows[:K], n_init=1, max_iter=ITERATIONS, tol=0)
    share = float(np.median([ours for ours, _ in pairs])) / seconds(
        lambda: other.fit(rows) and None
    )
    more = {
        "also": {f"share of the seconds of scikit-learn {sklearn.__version__}": round(share, 2)}
    }
    return Measured(costs(pairs), f"faiss {faiss.__version__}, Kmeans.train in memory", pairs, more)


def assign_of_gemm(run: Run) -> Measured:
    """Compares `kt.pseudo_labels` in this process with the product of rows and centroids.

    The floor is the quickest of torch's and numpy's product in blocks of several heights.
    """
    import torch

    torch.set_num_threads(run.cores)
    path, rows = features(run), drawn.features(N, D)
    clusters = run.scratch / "assigned-to.h5"
    product.cluster(features(run, 10 * K), K, 1, clusters)
    floors = {
        f"{library} in blocks of {height} rows": functools.partial(gemm, library, rows, height)
        for library, height in itertools.product(("torch", "numpy"), HEIGHTS)
    }
    for floor in floors.values():
        floor()
    quickest = min(floors, key=lambda name: min(seconds(floors[name]) for _ in range(2)))

    def ours():
        product.assign(path, clusters, run.scratch / "labels.h5")

    pairs = alternate(ours, floors[quickest], run.rounds)
    return Measured(speeds(pairs), f"matrix product by {quickest}", pairs)


def gemm(library: str, rows: np.ndarray, height: int) -> None:
    """Multiplies rows (N, D) by K of them, block by block, and throws the products away."""
    import torch

    centroids, out = rows[:K].T.copy(), np.empty((height, K), np.float32)
    for first in range(0, len(rows), height):
        block = rows[first : first + height]
        if library == "numpy":
            np.dot(block, centroids, out=out[: len(block)])
        else:
            found = torch.from_numpy(out[: len(block)])
            torch.mm(torch.from_numpy(block), torch.from_numpy(centroids), out=found)
