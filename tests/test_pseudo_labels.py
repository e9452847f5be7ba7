import argparse
import shutil

import crafted
import h5py
import numpy as np
import pytest
from test_cluster import blobs, gaussians, run

from kt import config, pseudo_labels, target_train
from kt.core import blocks, table
from kt.core.parts import WHOLE
from kt.core.step import DataError, ResourceError


def label(path, features, keys, clusters):
    """Runs the step; gives labels, keys and the number of labels."""
    written = crafted.write_features(path / "to-label.h5", features, keys)
    output = path / "pseudo_labels.h5"
    pseudo_labels.run(
        argparse.Namespace(
            features=written, clusters=clusters, describe={}, output=output, part=WHOLE, parts=[]
        )
    )
    return pseudo_labels.read_pseudo_labels(output)


@pytest.fixture
def clustered(tmp_path):
    """Three blobs, their keys and their clusters."""
    rows, _ = blobs(60, 3)
    keys = crafted.names(60)
    return rows, keys, run(tmp_path, rows, keys, redo=5)[3]


def joined(path, keys):
    pixels = crafted.noise(len(keys), 4)
    arguments = argparse.Namespace(
        labels=None, transfer=config.Plugin(name="hard"), pseudo_labels=[path], features=[],
        clusters=[], seed=0,
    )  # fmt: skip
    labels, number, _ = target_train.what_to_learn(arguments, crafted.pack(pixels, keys))
    return labels.tolist(), number


# ---------------------------------------------------------------------------- labelling


def test_images_of_a_blob_get_one_label(tmp_path, clustered):
    rows, keys, clusters = clustered
    labels, found, number = label(tmp_path, rows, keys, clusters)
    assert found == keys and number == 3 and labels.dtype == np.int64
    assert len({(row % 3, int(value)) for row, value in enumerate(labels)}) == 3
    assert sorted(set(labels.tolist())) == [0, 1, 2]


def test_an_image_gets_its_label_whatever_its_row_and_its_company(tmp_path, clustered):
    rows, keys, clusters = clustered
    labels, _, _ = label(tmp_path, rows, keys, clusters)
    shuffle = np.random.default_rng(2).permutation(60)[:41]
    part, found, _ = label(tmp_path, rows[shuffle], [keys[row] for row in shuffle], clusters)
    assert part.tolist() == labels[shuffle].tolist()
    assert found == [keys[row] for row in shuffle]


def test_labels_do_not_depend_on_how_many_rows_are_read_at_a_time(tmp_path, clustered, monkeypatch):
    rows, keys, clusters = clustered
    labels, _, _ = label(tmp_path, rows, keys, clusters)
    monkeypatch.setattr(blocks, "MOST_ROWS", 7)
    assert label(tmp_path, rows, keys, clusters)[0].tolist() == labels.tolist()


def test_labels_are_compact_where_clusters_are_empty():
    assert pseudo_labels.compact(np.array([3, 0, 1, 0, 0, 7])).tolist() == [0, -1, 1, -1, -1, 2]
    assert pseudo_labels.compact(np.array([2, 2])).tolist() == [0, 1]


def test_images_next_to_an_empty_cluster_are_left_out(tmp_path, clustered):
    rows, keys, clusters = clustered
    labels, _, _ = label(tmp_path, rows, keys, clusters)
    with_empty_cluster(clusters, 1)
    fewer, _, number = label(tmp_path, rows, keys, clusters)
    assert number == 2
    assert fewer.tolist() == [{0: 0, 1: -1, 2: 1}[value] for value in labels.tolist()]
    with h5py.File(tmp_path / "pseudo_labels.h5") as file:
        assert file["clusters"][...].tolist() == labels.tolist()


def with_empty_cluster(path, number):
    """Writes the clusters again, one of them empty."""
    with h5py.File(path) as file:
        arrays = {name: file[name][...] for name in file}
        l2 = file.attrs["l2"]
    arrays["sizes"][number] = 0
    with table.create(path, "clusters", {}) as file:
        for name, array in arrays.items():
            table.put(file, name, array)
        file.attrs["l2"] = l2


def test_clusters_changed_by_a_byte_are_refused(tmp_path, clustered):
    rows, keys, clusters = clustered
    with h5py.File(clusters, "r+") as file:
        file["centroids"][1, 2] += 1e-3
    with pytest.raises(DataError, match="'centroids' is not what was written"):
        label(tmp_path, rows, keys, clusters)


def test_pseudo_labels_changed_by_a_byte_are_refused(tmp_path):
    path = write_labels(tmp_path / "p.h5", [0, 1], ["a", "b"], 2)
    with h5py.File(path, "r+") as file:
        file["labels"][0] = 1
    with pytest.raises(DataError, match="'labels' is not what was written"):
        pseudo_labels.read_pseudo_labels(path)


def test_labels_that_do_not_fit_the_disk_are_refused_with_path_and_bytes(
    tmp_path, clustered, monkeypatch
):
    rows, keys, clusters = clustered
    monkeypatch.setattr(shutil, "disk_usage", lambda _: argparse.Namespace(free=1000))
    needed = 60 * (20 + len(keys[0]))
    with pytest.raises(ResourceError, match=f"pseudo_labels.h5: {needed} bytes .*, 1000 are free"):
        label(tmp_path, rows, keys, clusters)


def test_features_of_another_dimension_are_refused_with_both(tmp_path, clustered):
    with pytest.raises(DataError, match="has 7 dimensions, .* made from 5"):
        label(tmp_path, gaussians(9, 7), crafted.names(9), clustered[2])
    assert not (tmp_path / "pseudo_labels.h5").exists()


def test_features_that_are_not_finite_are_refused_by_key(tmp_path, clustered):
    rows, keys, clusters = clustered
    rows = rows.copy()
    rows[44, 0] = np.inf
    with pytest.raises(DataError, match="'image-00044'"):
        label(tmp_path, rows, keys, clusters)


# ---------------------------------------------------------------------------- joining


def write_labels(path, labels, keys, number):
    with table.create(path, "pseudo_labels", {}) as file:
        for name in ("labels", "clusters"):
            table.put(file, name, np.asarray(labels, np.int64))
        table.put(file, "distances", np.zeros(len(labels), np.float32))
        table.put_strings(file, "keys", keys)
        file.attrs["num_labels"] = number
    return path


def test_labels_meet_their_images_by_key_when_rows_are_shuffled(tmp_path):
    keys = crafted.names(30)
    shuffle = np.random.default_rng(0).permutation(30)
    path = write_labels(tmp_path / "p.h5", shuffle, [keys[row] for row in shuffle], 30)
    assert joined(path, keys) == (list(range(30)), 30)
    backwards = keys[::-1]
    assert joined(path, backwards) == (list(range(29, -1, -1)), 30)


def test_missing_keys_are_refused_with_an_example(tmp_path):
    path = write_labels(tmp_path / "p.h5", [0, 1], ["a", "b"], 2)
    with pytest.raises(DataError, match="1 of 3 keys are missing, for example 'c'"):
        joined(path, ["a", "b", "c"])


def test_extra_keys_are_refused_with_both_counts(tmp_path):
    path = write_labels(tmp_path / "p.h5", [0, 1, 0], ["a", "b", "c"], 2)
    with pytest.raises(DataError, match="3 rows for 2 images of in-memory"):
        joined(path, ["a", "b"])


def test_repeated_keys_are_refused(tmp_path):
    path = write_labels(tmp_path / "p.h5", [0, 1, 0], ["a", "b", "a"], 2)
    with pytest.raises(DataError, match="1 keys are repeated"):
        joined(path, ["a", "b"])
