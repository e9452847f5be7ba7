import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import crafted
import h5py
import numpy as np
import pytest
import running
from hypothesis import given, settings
from hypothesis import strategies as st

from kt import cluster, features
from kt.core import lloyd, reached, table, transform
from kt.core.spread import Spread
from kt.core.step import ConfigError, DataError, ResourceError


def gaussians(number: int, dimensions: int, seed: int = 0, spread: float = 1.0) -> np.ndarray:
    """Correlated features with a mean, (N, D) float32."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(dimensions, dimensions))
    rows = random.normal(size=(number, dimensions)) @ mixing * spread + random.normal(
        size=dimensions
    )
    return rows.astype(np.float32)


def blobs(number: int, centres: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Blobs far apart: (N, 5) float32 and the blob of each row."""
    random = np.random.default_rng(seed)
    places = random.normal(size=(centres, 5)) * 30
    labels = np.arange(number) % centres
    return (places[labels] + random.normal(0, 0.1, (number, 5))).astype(np.float32), labels


def fitted(rows, k, iterations=20, redo=1, spherical=False, seed=0):
    return cluster.kmeans(rows, k, iterations, redo, spherical, seed)


def same_partition(one, two) -> bool:
    pairs = set(zip(one.tolist(), two.tolist(), strict=True))
    return len(pairs) == len(set(one.tolist())) == len(set(two.tolist()))


def run(path, features, keys, k=3, seed=0, lower=False, **changes):
    """Runs the step; gives centroids, sizes, transform and the table's path."""
    path.mkdir(exist_ok=True)
    written = crafted.write_features(path / "features.h5", features, keys)
    output = path / "clusters.h5"
    cluster.run(
        argparse.Namespace(
            features=written,
            k=str(k),
            layer="",
            lower=lower,
            choice=None,
            seed=seed,
            output=output,
            settings=crafted.clustering(**changes),
            memory_mb=None,
        )
    )
    return *cluster.read_clusters(output), output


# ---------------------------------------------------------------------------- k-means


@given(st.integers(2, 12), st.integers(0, 100), st.sampled_from([1, 3]))
@settings(max_examples=15, deadline=None)
def test_the_objective_never_rises(k, seed, redo):
    _, objective = fitted(gaussians(150, 6, seed), k, redo=redo, seed=seed)
    assert 1 <= len(objective) <= 20  # fewer where nothing changes any more
    assert (np.diff(objective) <= 1e-5 * objective[0]).all()


def test_the_objective_is_the_sum_of_squared_distances_to_the_centroids():
    rows = gaussians(200, 4)
    centroids, objective = fitted(rows, 5, iterations=60)
    nearest, distances = cluster.assign(rows, centroids)
    slow = ((rows.astype(np.float64)[:, None] - centroids) ** 2).sum(2)
    assert np.array_equal(nearest, slow.argmin(1))
    assert np.allclose(distances, slow.min(1), rtol=1e-3, atol=1e-3)
    assert objective[-1] == pytest.approx(slow.min(1).sum(), rel=1e-3)
    means = np.stack([rows[nearest == label].mean(0) for label in range(5)])
    assert np.allclose(centroids, means, atol=1e-2)


def test_as_many_clusters_as_images_leave_no_distance():
    rows = gaussians(30, 4)
    centroids, _ = fitted(rows, 30)
    nearest, distances = cluster.assign(rows, centroids)
    assert len(set(nearest.tolist())) == 30
    assert distances.max() < 1e-3


def test_separated_blobs_are_found_as_scikit_learn_finds_them():
    from sklearn.cluster import KMeans

    rows, labels = blobs(240, 6)
    centroids, objective = fitted(rows, 6, redo=10)
    nearest, _ = cluster.assign(rows, centroids)
    peer = KMeans(6, n_init=10, random_state=0).fit(rows)
    assert same_partition(nearest, labels)
    assert same_partition(nearest, peer.labels_)
    assert objective[-1] == pytest.approx(peer.inertia_, rel=1e-2)


def test_spherical_centroids_have_unit_length_and_take_the_largest_cosine():
    rows = cluster.project(
        gaussians(200, 6), cluster.Transform(np.zeros(6, np.float32), None, True)
    )
    centroids, objective = fitted(rows, 7, spherical=True)
    assert np.allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    nearest, _ = cluster.assign(rows, centroids)
    assert np.array_equal(nearest, (rows @ centroids.T).argmax(1))
    assert (np.diff(objective) >= -1e-4 * abs(objective[0])).all()  # of inner products: it rises


def test_the_seed_decides_the_result():
    rows = gaussians(300, 6)
    one, again, other = (fitted(rows, 9, seed=seed)[0] for seed in (4, 4, 5))
    assert np.array_equal(one, again) and not np.array_equal(one, other)


# ---------------------------------------------------------------------------- transform


def test_whitened_components_have_unit_variance_and_no_correlation():
    rows = gaussians(500, 10, spread=30)
    settings_ = crafted.clustering(pca=6, whiten=True)
    found = cluster.project(rows, cluster.fit_transform(rows, settings_))
    assert found.shape == (500, 6) and found.dtype == np.float32
    assert np.abs(found.mean(0)).max() < 1e-3
    assert np.allclose(np.cov(found.T), np.eye(6), atol=1e-2)


def test_principal_components_are_those_of_scikit_learn():
    from sklearn.decomposition import PCA

    rows = gaussians(300, 8)
    peer = PCA(3).fit(rows)
    found = cluster.project(rows, cluster.fit_transform(rows, crafted.clustering(pca=3)))
    assert np.allclose(np.abs(found), np.abs(peer.transform(rows)), atol=1e-2)


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("pca, whiten", [(None, False), (4, False), (4, True)])
@pytest.mark.parametrize("l2", [True, False])
def test_projecting_equals_a_float64_reference(centre, pca, whiten, l2):
    rows = gaussians(120, 7)
    transform = cluster.fit_transform(
        rows, crafted.clustering(centre=centre, pca=pca, whiten=whiten, l2=l2)
    )
    slow = rows.astype(np.float64) - (rows.astype(np.float64).mean(0) if centre or pca else 0)
    if pca:
        slow = slow @ transform.projection.astype(np.float64)
        assert transform.projection.shape == (7, 4)
    if l2:
        slow = slow / np.linalg.norm(slow, axis=1, keepdims=True)
    assert np.allclose(cluster.project(rows, transform), slow, atol=1e-4)
    assert np.allclose(cluster.project(rows[2:3], transform), slow[2:3], atol=1e-4)


def test_components_without_variance_are_left_out(caplog):
    rows = np.concatenate([gaussians(60, 3), np.ones((60, 4), np.float32)], 1)
    with caplog.at_level("INFO", "kt"):
        transform = cluster.fit_transform(rows, crafted.clustering(pca=6, whiten=True))
    assert transform.projection.shape == (7, 3)
    assert "3 components kept, pca asked for 6" in caplog.text
    assert np.abs(cluster.project(rows, transform)).max() < 10


def test_a_row_at_the_mean_stays_finite_when_scaled_to_unit_length():
    rows = gaussians(20, 4)
    transform = cluster.fit_transform(rows, crafted.clustering(l2=True))
    found = cluster.project(transform.mean[None], transform)
    assert np.isfinite(found).all() and np.abs(found).max() == 0


# ---------------------------------------------------------------------------- the step


def test_the_order_of_the_rows_does_not_matter(tmp_path):
    rows, keys = gaussians(90, 5), crafted.names(90)
    shuffle = np.random.default_rng(1).permutation(90)
    one, two = tmp_path / "one", tmp_path / "two"
    first = run(one, rows, keys, k=7, pca=3, whiten=True, l2=True)
    second = run(
        two, rows[shuffle], [keys[row] for row in shuffle], k=7, pca=3, whiten=True, l2=True
    )
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    assert np.array_equal(first[2].projection, second[2].projection)


@pytest.mark.parametrize("changes", [{}, {"pca": 4, "whiten": True}, {"spherical": True}])
def test_one_cluster_brings_the_transform_of_any_k(tmp_path, changes):
    """Kinds of transfer that learn from features take it from there."""
    rows = gaussians(200, 6)
    keys = [f"{number:03d}.png" for number in range(200)]
    one, several = (run(tmp_path / str(k), rows, keys, k, **changes) for k in (1, 7))
    assert one[0].shape == (1, one[2].width) and np.isfinite(one[0]).all() and one[1] == [200]
    for name in ("mean", "projection", "l2"):
        assert np.array_equal(getattr(one[2], name), getattr(several[2], name)), name


def test_the_table_says_sizes_objective_and_settings(tmp_path):
    rows, labels = blobs(60, 3)
    centroids, sizes, transform, path = run(tmp_path, rows, crafted.names(60), redo=5)
    assert sizes.tolist() == [20, 20, 20] and centroids.shape == (3, 5)
    assert transform.projection is None and not transform.l2
    assert np.allclose(transform.mean, rows.mean(0), atol=1e-3)
    with h5py.File(path) as file:
        assert np.diff(file["objective"]).max(initial=0) <= 0
        found = json.loads(table.text(file, "config"))
    assert found["k"] == 3 and found["seed"] == 0 and found["rows"] == 60


def test_more_clusters_than_images_are_refused_with_both_numbers(tmp_path):
    with pytest.raises(ConfigError, match="k = 9 is more than the 8 images"):
        run(tmp_path, gaussians(8, 3), crafted.names(8), k=9)
    assert not (tmp_path / "clusters.h5").exists()


def test_a_k_that_was_derived_and_is_above_the_images_is_lowered_to_half_of_them(tmp_path):
    for k, found in ((3, 3), (8, 8), (9, 4)):
        centroids, *_ = run(tmp_path, gaussians(8, 3), crafted.names(8), k=k, lower=True)
        assert len(centroids) == found


def test_features_that_are_all_the_same_are_refused(tmp_path):
    with pytest.raises(DataError, match="all 8 rows of the features are the same"):
        run(tmp_path, np.ones((8, 3)), crafted.names(8))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_feature_that_is_not_finite_is_named_by_its_key(tmp_path, value):
    rows = gaussians(20, 3)
    rows[13, 1] = value
    shuffle = np.random.default_rng(0).permutation(20)
    keys = crafted.names(20)
    with pytest.raises(DataError, match="1 images are not finite, among them 'image-00013'"):
        run(tmp_path, rows[shuffle], [keys[row] for row in shuffle])


def test_fewer_distinct_rows_than_clusters_leave_empty_ones_and_say_so(tmp_path, caplog):
    rows = np.repeat(gaussians(3, 4), 10, 0)
    with caplog.at_level("INFO", "kt"):
        _, sizes, _, _ = run(tmp_path, rows, crafted.names(30), k=8)
    empty = int((sizes == 0).sum())
    assert sizes.sum() == 30 and empty >= 5
    assert f"{empty} of 8 clusters are empty and get no label" in caplog.text


@pytest.mark.parametrize("memory_mb", [1, 100])
def test_a_shuffled_table_gives_the_same_bits_in_memory_and_from_a_file(tmp_path, memory_mb):
    rows, keys = gaussians(30000, 12), crafted.names(30000)  # 1.4 MB
    shuffle = np.random.default_rng(1).permutation(30000)
    changes = {"k": 7, "iterations": 3, "memory_mb": memory_mb}
    first = run(tmp_path / "one", rows, keys, **(changes | {"memory_mb": 100}))
    mixed = rows[shuffle], [keys[row] for row in shuffle]
    second = run(tmp_path / "two", *mixed, **changes)
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "clusters.h5",
        "features.h5",
    ]


def test_a_sample_is_learnt_from_and_said_and_all_are_counted(tmp_path, caplog):
    rows, _ = blobs(600, 3)
    with caplog.at_level("INFO", "kt"):
        _, sizes, _, path = run(tmp_path, rows, crafted.names(600), sample=50, redo=5)
    assert "a sample (clustering.sample = 50) of 150 of 600 rows" in caplog.text
    assert sizes.tolist() == [200, 200, 200]
    with h5py.File(path) as file:
        found = json.loads(table.text(file, "config"))
    assert (found["sample"], found["rows"]) == (50, 150)


def test_rows_of_a_sample_are_projected_as_all_rows_are():
    rows = gaussians(5000, 6)
    changes = {"pca": 3, "whiten": True, "l2": True}
    transform = cluster.fit_transform(rows, crafted.clustering(**changes))
    settings_ = crafted.clustering(sample=40, **changes)
    taken = cluster.training_rows(rows, transform, settings_, 9, 5, Path("x"))
    picked = cluster.sample(5000, 40, 9, 5)
    assert len(picked) == 360 and (np.diff(picked) > 0).all()
    assert np.allclose(taken, cluster.project(rows[picked], transform), atol=1e-6)
    assert cluster.sample(5000, 556, 9, 5) is None  # more than there are


def test_a_warm_start_is_said_and_ends_near_the_full_run(tmp_path, caplog):
    rows, _ = blobs(3000, 12)
    centroids, _, _, path = run(tmp_path / "a", rows, crafted.names(3000), k=12)
    with caplog.at_level("INFO", "kt"):
        warm, _, _, other = run(tmp_path / "b", rows, crafted.names(3000), k=12, warm_start=40)
    assert "warm start (clustering.warm_start = 40), 15 iterations on 480 of 3000" in caplog.text
    with h5py.File(path) as one, h5py.File(other) as two:
        assert two["objective"][-1] < 3 * one["objective"][-1]
        assert len(two["objective"]) <= 5


def test_options_that_are_off_are_not_spoken_of_and_all_rows_are(tmp_path, caplog):
    with caplog.at_level("INFO", "kt"):
        run(tmp_path, gaussians(90, 3), crafted.names(90))
    assert "k-means learns from all 90 of 90 rows of 3 dimensions, in memory" in caplog.text
    assert "warm" not in caplog.text and "sample" not in caplog.text


@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_features_of_another_type_are_refused(tmp_path, dtype):
    with table.create(tmp_path / "f.h5", "features", {}) as file:
        table.put(file, "features", np.zeros((4, 2), dtype))
        table.put_strings(file, "keys", crafted.names(4))
    with pytest.raises(DataError, match="expected features float32"):
        with features.read(tmp_path / "f.h5"):
            pass


def test_a_scratch_file_that_does_not_fit_is_refused_before_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: argparse.Namespace(free=10**6))
    with pytest.raises(ResourceError, match="clusters.h5: 1440000 bytes are needed, 1000000 are"):
        run(tmp_path, gaussians(30000, 12), crafted.names(30000), memory_mb=1)
    assert not (tmp_path / "clusters.h5").exists()


@pytest.mark.parametrize("changes", [{}, {"pca": 6, "whiten": True}, {"redo": 2}])
def test_a_table_of_clusters_that_does_not_fit_is_refused_before_the_work(
    tmp_path, monkeypatch, changes
):
    rows, keys = gaussians(200, 12), crafted.names(200)
    run(tmp_path / "fits", rows, keys, k=7, **changes)
    with h5py.File(tmp_path / "fits/clusters.h5") as file:
        names = ("centroids", "mean", "projection", "sizes", "objective")
        needed = sum(file[name].nbytes for name in names)
    most = cluster.most_bytes(7, 12, crafted.clustering(**changes))
    assert needed <= most < 1.3 * needed
    monkeypatch.setattr(shutil, "disk_usage", lambda _: argparse.Namespace(free=most - 1))
    monkeypatch.setattr(cluster, "fit_transform", None)
    with pytest.raises(ResourceError, match=f"clusters.h5: {most} bytes are needed"):
        run(tmp_path / "not", rows, keys, k=7, **changes)


@pytest.mark.parametrize("changes", [{"redo": 3}, {"warm_start": 20}, {"spherical": True}])
@pytest.mark.parametrize("share", [1, 0.5, 0])  # of the state that is left
def test_a_killed_clustering_goes_on_where_it_was(tmp_path, monkeypatch, changes, share):
    rows, keys = gaussians(5000, 6), crafted.names(5000)
    changes = {"k": 40, "iterations": 12, **changes}
    sums, done, last = lloyd._sums, [], 99

    def counted(*given):
        if len(done) == last:
            raise KeyboardInterrupt
        done.append(1)
        return sums(*given)

    monkeypatch.setattr(lloyd, "_sums", counted)
    *_, wanted = run(tmp_path / "calm", rows, keys, **changes)
    total = len(done)
    assert not list((tmp_path / "calm").glob(".*.state"))
    monkeypatch.setattr(reached, "SAVE_SECONDS", 0)
    done, last = [], total - 2
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", rows, keys, **changes)
    (state,) = (tmp_path / "killed").glob(".*.state")
    os.truncate(state, int(share * state.stat().st_size))
    done, last = [], 99
    *_, found = run(tmp_path / "killed", rows, keys, **changes)
    assert len(done) == (2 if share == 1 else total) and not state.exists()
    assert table.digest(found) == table.digest(wanted)


def test_the_state_of_another_clustering_is_of_no_use(tmp_path, monkeypatch):
    monkeypatch.setattr(reached, "SAVE_SECONDS", 0)
    one = reached.Reached(tmp_path / "x", "one")
    one.begin(np.ones((2, 3), np.float32))
    one.after(np.zeros((2, 3), np.float32), [4.0], False)
    assert reached.Reached(tmp_path / "x", "one").found == 1
    assert reached.Reached(tmp_path / "x", "two").found == 0


def test_moments_are_right_far_from_zero():
    rows = gaussians(9000, 5) + np.float32(3000)
    number, mean, scatter = transform._moments(Spread(rows), True, None, "rows")
    wide = rows.astype(np.float64)
    assert number == 9000 and np.allclose(mean, wide.mean(0), rtol=1e-12)
    assert np.allclose(scatter / 8999, np.cov(wide.T), rtol=1e-9)


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path):
    """4 N rows need at most a fifth more than N: measured it is under 3 %."""
    from kt.core import step

    def peak(module, **arguments):
        values = json.dumps(arguments, default=step.plain)
        done = running.run(sys.executable, "-m", "tests.growth", module, values)
        assert done.returncode == 0, running.output(done)
        return int(done.stdout)

    found = []
    for number in (20000, 80000):
        rows = np.random.default_rng(0).normal(size=(number, 64)).astype(np.float32)
        path = crafted.write_features(tmp_path / f"{number}.h5", rows, crafted.names(number))
        clusters = tmp_path / f"{number}-clusters.h5"
        settings_ = crafted.clustering(memory_mb=1, iterations=2)
        more = {
            "k": "20",
            "layer": "",
            "lower": False,
            "memory_mb": None,
            "choice": None,
            "settings": settings_,
            "seed": 0,
        }
        one = peak("kt.cluster", features=path, output=clusters, **more)
        labels = tmp_path / "labels.h5"
        two = peak("kt.pseudo_labels", features=path, clusters=clusters, describe={}, output=labels)
        found.append((one, two))
    assert found[1][0] < 1.2 * found[0][0] and found[1][1] < 1.2 * found[0][1], found


def test_keys_that_repeat_are_refused(tmp_path):
    with pytest.raises(DataError, match="1 keys are repeated"):
        run(tmp_path, gaussians(4, 3), ["a", "b", "b", "c"], k=2)
