"""How time grows with images, dimensions and clusters."""

from __future__ import annotations

import functools

from bench import drawn, product
from bench.clustering import features
from bench.measure import Measured, Run, growth

N, D, K, ITERATIONS = 25_000, 128, 256, 30
SIZE = 28


def _clustering(run: Run, shapes: dict[int, tuple[int, int, int]]) -> Measured:
    """Times `kt.cluster` in this process for shapes (N, D, K) by their size."""
    import faiss

    faiss.omp_set_num_threads(run.cores)
    output = run.scratch / "grown.h5"
    return growth(
        {
            size: functools.partial(product.cluster, features(run, n, d), k, ITERATIONS, output)
            for size, (n, d, k) in shapes.items()
        },
        run.rounds,
    )


def growth_clustering_n(run: Run) -> Measured:
    """Eightfold images."""
    return _clustering(run, {n: (n, D, K) for n in (12_500, 25_000, 50_000, 100_000)})


def growth_clustering_d(run: Run) -> Measured:
    """Eightfold dimensions."""
    return _clustering(run, {d: (N, d, K) for d in (64, 128, 256, 512)})


def growth_clustering_k(run: Run) -> Measured:
    """Eightfold clusters."""
    return _clustering(run, {k: (N, D, k) for k in (128, 256, 512, 1024)})


def _packs(run: Run) -> dict[int, object]:
    found = {}
    for number in (4096, 8192, 16384, 32768):
        path = run.scratch / f"growth-{number}.h5"
        if not path.exists():
            product.write_pack(path, drawn.images(number, SIZE), drawn.keys(number))
        found[number] = product.read_pack(path)
    return found


def growth_puzzles_n(run: Run) -> Measured:
    """Eightfold images, all puzzles of an epoch."""
    import torch

    torch.set_num_threads(run.cores)
    packs = _packs(run)
    tasks = {number: product.jigsaw(pack) for number, pack in packs.items()}

    def epoch(number: int) -> None:
        for _ in product.deliver(tasks[number], packs[number], 128, 0):
            pass

    return growth({number: functools.partial(epoch, number) for number in packs}, run.rounds)


def growth_extraction_n(run: Run) -> Measured:
    """Eightfold images through a small network into a table."""
    import torch

    torch.set_num_threads(run.cores)
    packs = _packs(run)
    model = product.write_model(run.folder("grown"), product.tiny_backbone(), SIZE)
    output = run.scratch / "extracted.h5"
    work = {
        number: functools.partial(product.extract, model, "conv1", pack.path, output)
        for number, pack in packs.items()
    }
    return growth(work, run.rounds)
