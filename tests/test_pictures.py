"""Pictures of the report: puzzles put back together, clusters and their groups."""

import dataclasses

import made_up
import numpy as np
import pytest

from kt.core import pictures, table
from kt.core.images import read_labels, read_pack


def test_the_true_permutation_puts_a_puzzle_back_together(tmp_path):
    path, images = made_up.write_puzzles(tmp_path)
    with table.read(path, "puzzles", {"tiles": 5}) as file:
        tiles, labels = file["tiles"][...], file["labels"][...]
        permutations, replaced = file["permutations"][...], file["replaced"][...]
    for tile, label, strange, image in zip(tiles, labels, replaced, images, strict=True):
        board = pictures.lay(tile, permutations[label], strange)
        inside = board.reshape(3, 34, 3, 34, 3)[:, 2:-2, :, 2:-2].reshape(90, 90, 3)[::3, ::3]
        same = (inside == image.transpose(1, 2, 0)).reshape(3, 10, 3, 10, 3).all((1, 3, 4))
        assert same.sum() == 9 - strange.sum()
        framed = (board.reshape(3, 34, 3, 34, 3)[:, 0, :, 0] == pictures.MARK).all(-1)
        assert np.array_equal(framed, ~same)


def test_puzzles_tell_right_from_wrong(tmp_path):
    found = pictures.read_puzzles(made_up.write_puzzles(tmp_path)[0])
    assert [puzzle.right for puzzle in found.shown] == [i % 3 != 2 for i in range(8)]
    assert found.solved == pytest.approx(8 / 12)
    assert found.shown[0].given != found.shown[0].solved


def test_an_empty_table_of_puzzles_is_left_out(tmp_path):
    path = tmp_path / "examples.h5"
    with table.create(path, "puzzles", {}) as file:
        table.put(file, "tiles", np.zeros((0, 9, 3, 1, 1), np.uint8))
    assert pictures.read_puzzles(path) is None


def test_a_gallery_shows_the_images_nearest_to_the_centroid(tmp_path):
    pack, truth, keys, labels = made_up.write_pack(tmp_path)
    path = made_up.write_pseudo_labels(tmp_path, keys, labels)
    groups = pictures.gallery(path, read_pack(pack), read_labels(truth))
    assert list(groups) == ["Largest", "Purest", "Most mixed"]
    shown = [cluster for group in groups.values() for cluster in group]
    assert len({cluster.number for cluster in shown}) == len(shown) == 12
    with table.read(path, "pseudo_labels", {"labels": 1}) as file:
        clusters, distances = file["clusters"][...], file["distances"][...]
        names = table.strings(file, "keys")
    images = dict(zip(keys, read_pack(pack).images, strict=True))
    for cluster in shown:
        inside = np.flatnonzero(clusters == cluster.number)
        nearest = inside[np.argsort(distances[inside])[:10]]
        tiles = [pictures.fit(images[names[i]].transpose(1, 2, 0), 32) for i in nearest]
        assert cluster.strip == pictures.png(np.concatenate(tiles, 1))
        assert cluster.size == len(inside)


def test_purity_counts_only_known_labels():
    clusters, truth = np.array([0, 0, 0, 0, 1, 3]), np.array([2, 2, 1, -1, -1, 0])
    shares, frequent = pictures.purities(clusters, truth)
    assert shares[0] == pytest.approx(2 / 3) and frequent[0] == 2
    assert np.isnan(shares[[1, 2]]).all() and shares[3] == 1


def test_a_few_known_labels_speak_for_no_cluster(tmp_path):
    pack, truth, keys, labels = made_up.write_pack(tmp_path)
    path = made_up.write_pseudo_labels(tmp_path, keys, labels)
    whole, rng = read_labels(truth), np.random.default_rng(0)

    def shown(number):
        """The gallery if so many labels are known."""
        known = np.isin(np.arange(len(keys)), rng.permutation(len(keys))[:number])
        some = dataclasses.replace(whole, labels=np.where(known, whole.labels, -1))
        return pictures.gallery(path, read_pack(pack), some), known

    groups, _ = shown(12)
    assert list(groups) == ["Largest", "Tightest", "Loosest"]
    groups, known = shown(450)
    assert list(groups) == ["Largest", "Purest", "Most mixed"]
    with table.read(path, "pseudo_labels", {"labels": 1}) as file:
        of_key = dict(zip(table.strings(file, "keys"), file["clusters"][...], strict=True))
    for cluster in [*groups["Purest"], *groups["Most mixed"]]:
        inside = [of_key[key] == cluster.number for key in keys]
        assert cluster.known == (known & inside).sum() >= min(10, cluster.size)


def test_groups_of_clusters_share_no_cluster_and_skip_empty_ones():
    noise = np.random.default_rng(0)
    for number in range(1, 30):
        sizes = noise.integers(0, 40, number)
        sizes[0] = 5
        groups = pictures.interesting(sizes, noise.random(number))
        picked = [n for group in groups for n in group]
        assert len(set(picked)) == len(picked) and all(sizes[picked] > 0)
        assert sizes[groups[0]].min() >= max(np.delete(sizes, picked), default=0)
