import itertools
from pathlib import Path
from types import SimpleNamespace

import crafted
import numpy as np
import pytest
import torch

from kt import config
from kt.core import draws, permutations, tiles
from kt.core.delivery import load_batch
from kt.core.step import ConfigError
from kt.pretext_train import _cost, build_task
from kt.tasks import jigsaw, jigsawpp

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def batch(task, pixels, index, epoch=0):
    return load_batch(task, crafted.pack(pixels), torch.as_tensor(index), epoch, CPU)


# ---------------------------------------------------------------------------- permutations


@pytest.mark.parametrize("number, distance", [(701, 3), (100, 6), (9, 9)])
def test_permutations_keep_their_distance(number, distance):
    found = permutations.permutation_set(number, distance)
    assert found.shape == (number, 9) and found.dtype == np.uint8
    assert (np.sort(found, 1) == np.arange(9)).all()
    between = permutations.distances(found)[~np.eye(number, dtype=bool)]
    assert between.min() >= distance
    # Two random permutations differ in eight places on average.
    assert distance == 9 or abs(between.mean() - 8) < 0.1


def test_permutations_are_always_the_same_and_a_larger_set_begins_with_the_smaller():
    large = permutations.permutation_set(40, 5)
    assert np.array_equal(large, permutations.permutation_set(40, 5))
    assert np.array_equal(large[:12], permutations.permutation_set(12, 5))
    assert large[0].tolist() == [5, 0, 7, 2, 6, 8, 4, 3, 1]  # another set gives other labels


def test_the_solved_puzzle_is_no_label(monkeypatch):
    monkeypatch.setattr(permutations, "NUM_TILES", 4)
    every = permutations.permutation_set(23, 2)
    assert [0, 1, 2, 3] not in every.tolist() and len(np.unique(every, axis=0)) == 23
    with pytest.raises(ConfigError, match="found 23"):
        permutations.permutation_set(24, 2)


def test_a_set_that_cannot_exist_is_refused_with_what_was_found():
    with pytest.raises(ConfigError, match=r"found 9 .* at least 9 places, expected 10"):
        permutations.permutation_set(10, 9)


# ---------------------------------------------------------------------------- geometry


def test_the_published_sizes_come_out_at_255_pixels():
    assert jigsawpp.geometry(255) == (85, 64, 18, 2)


def test_tiles_stay_in_their_cells_and_never_touch():
    for size in range(28, 256):
        cell, tile, offset, shift = jigsawpp.geometry(size)
        assert 3 * cell <= size and offset >= 1 and shift >= 0 and tile >= 5
        assert offset + shift + tile < cell
        assert abs(tile / cell - 64 / 85) < 0.08


def test_plain_tiles_have_their_own_published_sizes_and_may_touch():
    assert jigsawpp.geometry(225, jigsaw.PUBLISHED, 0) == (75, 64, 9, 2)
    for size in range(28, 256):
        cell, tile, offset, shift = jigsawpp.geometry(size, jigsaw.PUBLISHED, 0)
        assert 3 * cell <= size and offset >= 1 and shift >= 0
        assert offset + shift + tile == cell


def test_images_too_small_for_a_puzzle_are_refused():
    with pytest.raises(ConfigError, match="20 px image has 6 px cells"):
        jigsawpp.geometry(20)


@pytest.mark.parametrize("occlusions, distance", [(2, 2), (3, 3), (4, 2)])
def test_more_replaced_tiles_than_the_distance_bears_are_refused(occlusions, distance):
    with pytest.raises(ConfigError, match=f"at least {occlusions + 1}, found {distance}"):
        crafted.jigsaw(occlusions=occlusions, min_distance=distance)


# ---------------------------------------------------------------------------- what a slot shows


def test_windows_lie_in_the_cell_of_their_tile_and_use_all_of_it():
    task = crafted.jigsaw(size=64, number=4000)
    layout = task.plan(torch.arange(4000), 0)
    for edge, place in (("top", layout["cell"] // 3), ("left", layout["cell"] % 3)):
        corner = layout[edge] - place[..., None] * task.cell
        assert corner.min() == 0
        assert corner.max() == task.offset + task.shift
        assert corner.max() + task.tile < task.cell
        spread = corner.max(2).values - corner.min(2).values
        assert spread.unique().tolist() == list(range(task.shift + 1))


def test_labels_are_equally_frequent():
    task = crafted.jigsaw(number=20_000)
    counts = task.plan(torch.arange(20_000), 0)["labels"].bincount(minlength=20)
    assert (counts / 20_000 - 1 / 20).abs().max() < 0.008


@pytest.mark.parametrize("occlusions", [0, 2, 4])
def test_every_number_of_replaced_tiles_is_equally_frequent_at_any_slot(occlusions):
    task = crafted.jigsaw(number=20_000, occlusions=occlusions)
    source = task.plan(torch.arange(20_000), 0)["source"]
    counts = source.sum(1).bincount()
    assert len(counts) == occlusions + 1
    assert (counts / 20_000 - 1 / (occlusions + 1)).abs().max() < 0.015
    assert (source.float().mean(0) - occlusions / 18).abs().max() < 0.012


def test_cells_are_distinct_within_each_image_and_own_tiles_follow_the_permutation():
    task = crafted.jigsaw(number=2000)
    layout = task.plan(torch.arange(2000), 0)
    own = task.permutations[layout["labels"]]
    assert torch.equal(layout["cell"][layout["source"] == 0], own[layout["source"] == 0])
    by_chance = (layout["cell"] == own)[layout["source"] == 1].double().mean()
    assert abs(by_chance - 1 / 9) < 0.03
    foreign = layout["cell"][layout["source"] == 1].bincount(minlength=9).double()
    assert (foreign / foreign.sum() - 1 / 9).abs().max() < 0.02
    for cells, source in zip(layout["cell"], layout["source"], strict=True):
        replaced = cells[source == 1].tolist()
        assert len(set(replaced)) == len(replaced)


def test_the_other_image_is_another_one_and_any_other():
    task = crafted.jigsaw(number=50)
    pairs = torch.cat([task.rows(torch.arange(50), epoch) for epoch in range(60)])
    assert torch.equal(pairs[:50, 0], torch.arange(50))
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert len(pairs[:, 1].unique()) == 50
    assert ((pairs[:, 1] - pairs[:, 0]) % 50).bincount(minlength=50)[1:].min() > 20


def test_colours_are_mixed_in_the_declared_shares():
    task = crafted.jigsaw(number=10_000)
    colour = task.plan(torch.arange(10_000), 0)["colour"]
    grey = (colour - 1 / 3).abs().amax((1, 2)) < 1e-6
    same = (colour - torch.eye(3)).abs().amax((1, 2)) < 1e-6
    assert abs(grey.double().mean() - 0.5) < 0.02 and abs(same.double().mean() - 0.25) < 0.02
    direction = torch.tensor([-1.0, 2.0, -1.0])
    assert (colour[~grey & ~same] @ direction).abs().max() < 1e-5


def test_puzzles_are_redrawn_every_epoch_but_not_for_validation():
    task = crafted.jigsaw(number=200)
    index = torch.arange(200)
    first, second, held = (task.plan(index, epoch)["labels"] for epoch in (0, 1, -1))
    assert (first == second).double().mean() < 0.2 and (first == held).double().mean() < 0.2
    assert torch.equal(held, task.plan(index, -1)["labels"])


# ---------------------------------------------------------------------------- ambiguity


def looks(cells: torch.Tensor, source: torch.Tensor) -> list[tuple]:
    """What a puzzle shows, slot by slot: own cells 0..8, cells of the other image 9..17."""
    return [tuple(row) for row in (cells + 9 * source).tolist()]


@pytest.mark.parametrize("number, distance", [(701, 3), (100, 6)])
def test_no_two_labels_look_alike_behind_any_two_hidden_slots(number, distance):
    labels = permutations.permutation_set(number, distance)
    for hidden in itertools.combinations(range(9), 2):
        seen = np.delete(labels, hidden, 1)
        assert len(np.unique(seen, axis=0)) == number


def test_hiding_as_many_slots_as_the_distance_does_make_labels_alike():
    labels = permutations.permutation_set(701, 3)
    alike = [
        len(np.unique(np.delete(labels, hidden, 1), axis=0)) < 701
        for hidden in itertools.combinations(range(9), 3)
    ]
    assert any(alike)


def test_drawn_puzzles_that_look_alike_have_the_same_label():
    task = crafted.jigsaw(number=40_000, min_distance=3, permutations=60)
    labels = {}
    for epoch in range(2):
        layout = task.plan(torch.arange(40_000), epoch)
        shown = looks(layout["cell"], layout["source"])
        for look, label in zip(shown, layout["labels"].tolist(), strict=True):
            assert labels.setdefault(look, label) == label


# ---------------------------------------------------------------------------- pixels


def slow_tile(image, top, left, tile, kind):
    """One tile with its window per channel, mixed, then standardised in two passes of float64."""
    image = image.astype(np.float64)
    if kind == "grey":
        image = np.stack([image.sum(0) / 3] * 3)
    elif kind == "projection":
        along = (2 * image[1] - image[0] - image[2]) / 6
        image = np.stack([image[0] + along, image[1] - 2 * along, image[2] + along])
    cut = np.empty((3, tile, tile))
    for channel in range(3):
        for row in range(tile):
            for column in range(tile):
                cut[channel, row, column] = image[
                    channel, top[channel] + row, left[channel] + column
                ]
    mean = sum(value / cut.size for value in cut.ravel())
    variance = sum((value - mean) ** 2 / cut.size for value in cut.ravel())
    return (cut - mean) / max(variance**0.5, 1.0)


def slow_batch(task, pixels, index, epoch):
    """Puzzle by puzzle and tile by tile, from the uint8 images."""
    layout = task.plan(index, epoch)
    rows = task.rows(index, epoch).tolist()
    mixed = draws.uniform(task.context.seed, "grey", epoch, task.context.ids[index], 1)[:, 0]
    found = np.empty((len(index), 9, 3, task.tile, task.tile))
    for puzzle in range(len(index)):
        kind = "grey" if mixed[puzzle] < 0.5 else "projection" if mixed[puzzle] < 0.75 else "same"
        for slot in range(9):
            image = pixels[rows[puzzle][layout["source"][puzzle, slot]]]
            corner = (layout[edge][puzzle, slot].tolist() for edge in ("top", "left"))
            found[puzzle, slot] = slow_tile(image, *corner, task.tile, kind)
    return found


@pytest.mark.parametrize("size", [28, 64])
def test_batches_agree_with_a_slow_reference_made_tile_by_tile(size):
    pixels = crafted.noise(16, size)
    pixels[3] = 77  # flat
    pixels[5] = 200 + (pixels[5] > 127)  # under one grey level of variance
    pixels[7] = 255 * (pixels[7] > 127)
    task, index = crafted.jigsaw(size=size, number=16), torch.arange(16)
    views, labels = batch(task, pixels, index)
    assert torch.equal(labels, task.plan(index, 0)["labels"])
    slow = slow_batch(task, pixels, index, 0)
    assert views.dtype == torch.float32 and views.shape == slow.shape
    assert np.abs(views.numpy() - slow).max() < 2e-4


def test_tiles_have_zero_mean_and_unit_variance_and_flat_ones_stay_small():
    views, _ = batch(crafted.jigsaw(), crafted.noise(64, 45), torch.arange(64))
    assert views.mean((2, 3, 4)).abs().max() < 1e-5
    assert views.square().mean((2, 3, 4)).sub(1).abs().max() < 1e-4
    flat, _ = batch(crafted.jigsaw(), np.full((64, 3, 45, 45), 251, np.uint8), torch.arange(64))
    assert flat.abs().max() < 1e-3  # rounding of the grey mix, not blown up to unit variance


def unjittered(size, number, occlusions=0):
    """A task whose tiles are whole cells in true colours."""
    options = SimpleNamespace(grey=0.0, projection=0.0)
    geometry = (size // 3, size // 3, 0, 0)
    labels = permutations.permutation_set(20, 6)
    return tiles.JigsawTask(options, crafted.context(size, number), geometry, labels, occlusions)


def cells_of(image):
    """The nine cells of an image, (9, 3, S / 3, S / 3)."""
    return np.stack([cell for row in np.split(image, 3, 1) for cell in np.split(row, 3, 2)])


def test_a_puzzle_put_back_together_gives_the_image():
    pixels, task, index = crafted.noise(32, 36), unjittered(36, 32), torch.arange(32)
    images = torch.from_numpy(pixels[task.rows(index, 0)])
    layout = task.plan(index, 0)
    found = task.tiles(images, layout)
    for row, label in enumerate(layout["labels"]):
        back = np.empty_like(found[row].numpy())
        back[task.permutations[label]] = found[row].numpy()
        assert np.array_equal(back, cells_of(pixels[row]))


def test_replaced_tiles_come_from_the_other_image_at_the_declared_cell():
    pixels, task, index = crafted.noise(64, 36), unjittered(36, 64, 2), torch.arange(64)
    rows = task.rows(index, 0)
    layout = task.plan(index, 0)
    found = task.tiles(torch.from_numpy(pixels[rows]), layout)
    replaced = layout["source"].nonzero().tolist()
    assert len(replaced) > 30
    for puzzle, slot in replaced:
        cell = layout["cell"][puzzle, slot]
        assert np.array_equal(found[puzzle, slot], cells_of(pixels[rows[puzzle, 1]])[cell])
        label = layout["labels"][puzzle]
        own = cells_of(pixels[puzzle])[task.permutations[label, slot]]
        assert not np.array_equal(found[puzzle, slot], own)


# ---------------------------------------------------------------------------- plain


def plain(size=64, number=64, **changes):
    """A plain puzzle, as in the preset."""
    preset = config.read(ROOT / "presets" / "pretext_tasks.yaml")
    values = preset["teachers"]["jigsaw"]["task"] | {"permutations": 20} | changes
    return build_task(config.Plugin(**values), crafted.context(size, number))


def test_a_plain_puzzle_shows_every_tile_of_its_own_image_and_reads_no_other():
    task, index = plain(number=2000), torch.arange(2000)
    layout = task.plan(index, 0)
    assert torch.equal(layout["rows"], index[:, None]) and not layout["source"].any()
    assert torch.equal(layout["cell"], task.permutations[layout["labels"]])
    grey = ((layout["colour"] - 1 / 3).abs().amax((1, 2)) < 1e-6).double().mean()
    assert abs(grey - 0.3) < 0.04


@pytest.mark.parametrize("size", [28, 64])
def test_plain_puzzles_agree_with_a_slow_reference_made_tile_by_tile(size):
    pixels, index = crafted.noise(16, size), torch.arange(16)
    task = plain(size, 16, grey=0.5, projection=0.25)
    slow = slow_batch(task, pixels, index, 0)
    plan = task.plan(index, 0)
    for found in (task.fill(pixels, plan), task.views(torch.from_numpy(pixels)[:, None], plan)):
        assert found.shape == slow.shape
        assert np.abs(found.numpy() - slow).max() < 2e-4


def test_a_puzzle_without_replaced_tiles_is_the_same_under_either_name():
    index = torch.arange(64)
    one, two = (task.plan(index, 0) for task in (plain(45), crafted.jigsaw(occlusions=0)))
    assert torch.equal(one["cell"], two["cell"]) and torch.equal(one["rows"], two["rows"])


# ---------------------------------------------------------------------------- independence


def test_puzzles_do_not_depend_on_batch_size_order_or_threads():
    pixels, task = crafted.noise(64, 45), crafted.jigsaw()
    views, labels = batch(task, pixels, torch.arange(64), 3)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    for threads, size in ((1, 64), (2, 7), (4, 1)):
        torch.set_num_threads(threads)
        parts = [batch(task, pixels, part, 3) for part in order.split(size)]
        torch.set_num_threads(before)
        assert torch.equal(torch.cat([part[1] for part in parts]), labels[order])
        assert torch.allclose(torch.cat([part[0] for part in parts]), views[order], atol=1e-5)


def test_a_budget_counts_each_training_with_its_own_images(tmp_path):
    keys = crafted.names(40)
    small = crafted.write_pack(tmp_path / "small.h5", crafted.noise(20, 16), keys[:20])
    large = crafted.write_pack(tmp_path / "large.h5", crafted.noise(40, 32), keys)
    part = {
        "backbone": {"name": "plain", "widths": [4], "strides": [2]},
        "task": crafted.LABELS,
        "epochs": 3,
        "num_classes": 10,
        "few_images": {"as_if": 0, "most": 1},
    }
    costs = [_cost(part | {"pack": str(path)}) for path in (small, large)]
    more = {"few_images": {"as_if": 30, "most": 3}}  # 20 images are seen 4.5 times, so 4; 40 thrice
    raised = [_cost(part | more | {"pack": str(path)}) for path in (small, large)]
    assert raised == [4 / 3 * costs[0], costs[1]]
    convolution, head = 3 * 9 * 4 * 8 * 8, 4 * 10  # multiply-adds at 16 px
    assert costs == [3 * 19 * (convolution + head), 3 * 38 * (4 * convolution + head)]


def test_another_seed_gives_other_puzzles():
    index = torch.arange(64)
    one, two = (crafted.jigsaw(seed=seed).plan(index, 0)["labels"] for seed in (0, 1))
    assert (one == two).double().mean() < 0.3
