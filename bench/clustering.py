"""k-means against bare faiss, assignment against the plain matrix product."""

from __future__ import annotations

import subprocess
from pathlib import Path

from bench import drawn, product
from bench.measure import Measured, Run, alternate, costs, speeds

N, D, K, ITERATIONS = 100_000, 512, 2000, 20
ROWS = 16384  # of a block of the plain product


def features(run: Run, number: int = N, dimensions: int = D) -> Path:
    """Gives a table of drawn features, made once."""
    path = run.scratch / f"features-{number}-{dimensions}.h5"
    if not path.exists():
        product.write_features(path, drawn.features(number, dimensions), drawn.keys(number), 4096)
    return path


def kmeans_vs_faiss(run: Run) -> Measured:
    """Compares the step as a process, start-up included, with `faiss.Kmeans.train` alone."""
    import faiss

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
    return Measured(costs(pairs), f"faiss {faiss.__version__}, Kmeans.train in memory", pairs)


def assign_of_gemm(run: Run) -> Measured:
    """Compares `kt.pseudo_labels` in this process with the product of rows and centroids."""
    import torch

    torch.set_num_threads(run.cores)
    path, rows = features(run), torch.from_numpy(drawn.features(N, D))
    clusters = run.scratch / "assigned-to.h5"
    product.cluster(features(run, 10 * K), K, 1, clusters)
    centroids, out = rows[:K].T.contiguous(), torch.empty(ROWS, K)

    def ours():
        product.assign(path, clusters, run.scratch / "labels.h5")

    def floor():
        for block in rows.split(ROWS):
            torch.mm(block, centroids, out=out[: len(block)])

    pairs = alternate(ours, floor, run.rounds)
    return Measured(speeds(pairs), f"torch.mm {torch.__version__} in blocks of {ROWS} rows", pairs)
