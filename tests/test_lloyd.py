import os
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cluster import blobs, gaussians

from kt.core import blocks, lloyd


def slow_kmeans(rows, k, iterations, spherical, seed):
    """Lloyd's algorithm row by row in float64; empty clusters halve the one that scatters most."""
    rows, objective = rows.astype(np.float64), []
    centroids = lloyd.first_rows(rows, k, seed)
    for _ in range(iterations):
        if spherical:
            centroids = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
        scores = np.array([[row @ c if spherical else -((row - c) ** 2).sum() for c in centroids]
                           for row in rows])  # fmt: skip
        labels, before = scores.argmax(1), centroids
        objective.append(abs(scores.max(1).sum()))
        sizes = np.bincount(labels, minlength=k)
        centroids = np.array([rows[labels == c].mean(0) if sizes[c] else before[c]
                              for c in range(k)])  # fmt: skip
        scatter = np.array([((rows[labels == c] - centroids[c]) ** 2).sum() for c in range(k)])
        for empty in np.flatnonzero(sizes == 0):
            wide = scatter.argmax()
            if scatter[wide] < 1e-9:
                break
            apart = np.where(np.arange(rows.shape[1]) % 2, 1 - 1 / 1024, 1 + 1 / 1024)
            centroids[empty] = centroids[wide] * apart
            centroids[wide] = centroids[wide] * (2 - apart)
            scatter[empty] = scatter[wide] = scatter[wide] / 2
    return centroids, np.array(objective)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "MOST_ROWS", 37)


def on_disk(folder, rows):
    copy = blocks.Scratch(folder, rows.shape)
    for first in range(0, len(rows), 50):
        copy[first : first + 50] = rows[first : first + 50]
    return copy


# ---------------------------------------------------------------------------- against references


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("seed", [0, 5])
def test_iterations_are_those_of_a_slow_plain_reference(small_blocks, tmp_path, spherical, seed):
    rows = gaussians(160, 5, seed)
    if spherical:
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    wanted, trace = slow_kmeans(rows, 6, 7, spherical, seed)
    found, objective = lloyd.kmeans(on_disk(tmp_path, rows), 6, 7, 1, spherical, seed)
    assert np.allclose(objective, trace[: len(objective)], rtol=1e-5)
    if spherical:
        wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    assert np.allclose(found, wanted, atol=1e-4)


def test_an_empty_cluster_takes_half_of_the_widest_as_in_the_slow_reference(small_blocks):
    rows = np.repeat(gaussians(5, 4), [40, 3, 3, 3, 3], 0)  # so first rows are often the same
    rows = rows[np.random.default_rng(0).permutation(52)]
    wanted, trace = slow_kmeans(rows, 5, 4, False, 3)
    found, objective = lloyd.kmeans(rows, 5, 4, 1, False, 3)
    assert len(np.unique(lloyd.first_rows(rows, 5, 3), axis=0)) < 5
    assert np.allclose(found, wanted, atol=1e-4)
    assert np.allclose(objective, trace[: len(objective)], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_row_that_is_repeated_very_often_leaves_no_cluster_empty(share, offset):
    """A blank picture, say: its cluster has the most rows, and no half of them can be taken."""
    rows = gaussians(3000, 16) + np.float32(offset)
    rows[: int(share * 3000)] = rows[0]
    centroids, _ = lloyd.kmeans(rows, 60, 20, 1, False, 1)
    labels, _ = lloyd.assign(rows, centroids)
    assert (np.bincount(labels, minlength=60) > 0).all()
    assert len(set(labels[: int(share * 3000)])) == 1


@pytest.mark.parametrize("width", [3, 64, 128])
def test_equal_rows_get_one_label_whatever_stands_twice(width):
    rows = np.repeat(gaussians(5, width), [900, 3, 40, 700, 1], 0)
    rows = rows[np.random.default_rng(0).permutation(len(rows))]
    centroids, objective = lloyd.kmeans(rows, 20, 30, 1, False, 0)
    labels, _ = lloyd.assign(rows, centroids)
    pairs = {(row.tobytes(), label) for row, label in zip(rows, labels, strict=True)}
    assert len(pairs) == len(set(labels)) == 5 and objective[-1] <= 1e-6 * objective[0] + 1e-6
    some = np.concatenate([centroids[:3], gaussians(17, width, 1)])
    some[[11, 19]] = some[3]
    again = np.repeat(some[3:4], 3001, 0)
    assert set(lloyd.assign(again, some)[0]) == {3}


@pytest.mark.parametrize("size", [1e3, 1e6])
def test_one_outlier_does_not_blur_the_labels_of_the_others(size):
    rows = np.random.default_rng(0).normal(size=(2000, 64)).astype(np.float32)
    rows[7] *= size
    centroids = np.concatenate([rows[100:119], rows[7:8]])
    labels, _ = lloyd.assign(rows, centroids)
    wide = rows.astype(np.float64)[:, None] - centroids.astype(np.float64)
    distances = (wide**2).sum(2)
    chosen = distances[np.arange(2000), labels]
    assert (chosen - distances.min(1) <= 1e-4 * distances.min(1) + 1e-4).all()


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("number, k, seed", [(500, 7, 0), (900, 30, 1234)])
def test_faiss_finds_the_same_from_the_same_first_rows(number, k, seed, spherical):
    import faiss

    rows = gaussians(number, 8)
    if spherical:
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    peer = faiss.Kmeans(
        8, k, niter=5, seed=seed, spherical=spherical,
        max_points_per_centroid=number, min_points_per_centroid=1,
    )  # fmt: skip
    peer.train(rows)
    found, objective = lloyd.kmeans(rows, k, 5, 1, spherical, seed)
    assert np.allclose(objective, peer.obj, rtol=1e-4)
    assert np.allclose(found, peer.centroids, atol=2e-3)


@given(st.integers(1, 200), st.integers(0, 2**31), st.data())
@settings(max_examples=30, deadline=None)
def test_first_rows_are_drawn_as_faiss_draws_them(number, seed, data):
    import faiss

    count = data.draw(st.integers(1, number))
    peer = np.empty(number, np.int32)
    faiss.rand_perm(faiss.swig_ptr(peer), number, seed)
    assert lloyd.permuted(number, count, seed).tolist() == peer[:count].tolist()


def test_it_ends_where_nothing_changes_any_more():
    rows, _ = blobs(90, 3)
    centroids, objective = lloyd.kmeans(rows, 3, 50, 1, False, 4)
    assert len(objective) < 50
    again, _ = lloyd.kmeans(rows, 3, 1, 1, False, 0, start=centroids)
    assert np.array_equal(again, centroids)


# ---------------------------------------------------------------------------- blocks and threads


def test_rows_in_a_file_give_the_same_bits_as_rows_in_memory(small_blocks, tmp_path):
    rows = gaussians(300, 6)
    one, other = (lloyd.kmeans(x, 9, 8, 2, False, 1) for x in (rows, on_disk(tmp_path, rows)))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert os.listdir(tmp_path) == []  # the file has no name


def test_taking_rows_equals_fancy_indexing(small_blocks, tmp_path):
    rows = gaussians(300, 6)
    for picked in (np.arange(300), np.array([0, 36, 37, 299]), np.arange(40, 60), np.arange(0)):
        assert np.array_equal(blocks.take(on_disk(tmp_path, rows), picked), rows[picked])


def test_any_number_of_threads_gives_the_same_bits(small_blocks, monkeypatch):
    rows, found = gaussians(300, 6), []
    for threads in ("1", "2", "5"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        found.append((*lloyd.kmeans(rows, 9, 8, 1, False, 1), *lloyd.assign(rows, rows[:9])))
    for other in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("height", [1, 64, 299, 4096])
def test_the_size_of_a_block_does_not_matter(monkeypatch, height):
    rows = gaussians(300, 6)
    centroids, objective = lloyd.kmeans(rows, 9, 8, 1, False, 1)
    monkeypatch.setattr(blocks, "MOST_ROWS", height)
    found, trace = lloyd.kmeans(rows, 9, 8, 1, False, 1)
    assert np.allclose(found, centroids, atol=1e-5) and np.allclose(trace, objective, rtol=1e-6)


def test_blocks_come_in_order_and_few_are_kept_at_a_time(small_blocks, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    alive, most, lock = set(), 0, threading.Lock()

    class Rows:
        shape = (1000, 3)

        def __getitem__(self, part):
            nonlocal most
            with lock:
                alive.add(part.start)
                most = max(most, len(alive))
            return np.zeros((part.stop - part.start, 3), np.float32)

    seen = []
    for first in blocks.each(lambda first, block: first, Rows()):
        with lock:
            alive.remove(first)
        seen.append(first)
    assert seen == list(range(0, 1000, 37)) and most <= 4


# ---------------------------------------------------------------------------- assignment


@pytest.mark.parametrize("mean", [0, 1000, -1e4])
@pytest.mark.parametrize("k", [1, 2, 70])
def test_assignment_equals_a_float64_reference_also_far_from_zero(small_blocks, mean, k):
    random = np.random.default_rng(k)
    rows = (random.normal(size=(400, 9)) + mean).astype(np.float32)
    centroids = (random.normal(size=(k, 9)) + mean).astype(np.float32)
    slow = ((rows.astype(np.float64)[:, None] - centroids) ** 2).sum(2)
    labels, distances = lloyd.assign(rows, centroids)
    assert np.array_equal(labels, slow.argmin(1))
    assert np.allclose(distances, slow.min(1), rtol=1e-5)
    assert labels.dtype == np.int64 and distances.dtype == np.float32


def test_a_row_that_is_a_centroid_has_no_distance():
    rows = gaussians(50, 7) * 100
    labels, distances = lloyd.assign(rows, rows)
    assert labels.tolist() == list(range(50)) and distances.max() == 0


def test_the_path_of_a_gpu_gives_the_same_on_torchs_cpu(small_blocks, monkeypatch):
    rows = gaussians(300, 6)
    wanted = lloyd.kmeans(rows, 9, 8, 1, False, 1), lloyd.assign(rows, rows[:9])
    monkeypatch.setattr(lloyd, "device", lambda: "cpu")
    found = lloyd.kmeans(rows, 9, 8, 1, False, 1), lloyd.assign(rows, rows[:9])
    assert np.allclose(found[0][0], wanted[0][0], atol=1e-5)
    assert np.array_equal(found[1][0], wanted[1][0])


def test_torch_is_not_imported_where_there_is_no_gpu():
    import running

    if os.path.exists("/dev/nvidiactl"):
        pytest.skip("there is a GPU")
    code = (
        "import sys, numpy\nfrom kt.core import lloyd\n"
        "lloyd.kmeans(numpy.eye(9, dtype='f4'), 2, 2, 1, False, 0)\n"
        "assert 'torch' not in sys.modules and 'faiss' not in sys.modules"
    )
    done = running.run(running.sys.executable, "-c", code)
    assert done.returncode == 0, running.output(done)
