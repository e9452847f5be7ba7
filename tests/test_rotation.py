"""Rotation: the turns drawn and the pixels of turned views."""

import crafted
import numpy as np
import pytest
import torch

from kt import config
from kt.pretext_train import build_task

OFF = {"crop": 1.0, "flip": 0.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hidden": 0}
ON = {"crop": 0.4, "flip": 0.5, "brightness": 0.3, "contrast": 0.3, "saturation": 0.4, "hidden": 0}


def built(size=16, number=32, seed=0, **changes):
    plugin = config.Plugin(name="rotation", **(OFF | changes))
    return build_task(plugin, crafted.context(size, number, seed))


def slow_turn(image, turns):
    """Turns (3, S, S) counter-clockwise, pixel by pixel: the right column becomes the upper row."""
    size = image.shape[1]
    for _ in range(turns):
        found = np.empty_like(image)
        for row in range(size):
            for column in range(size):
                found[:, size - 1 - column, row] = image[:, row, column]
        image = found
    return image


def slow_view(image, theta, matrix, offset):
    """Samples (3, S, S) where the affine map points, bilinearly, pixel by pixel, then recolours."""
    size = image.shape[1]
    found = np.empty(image.shape)
    for row in range(size):
        for column in range(size):
            at = np.array([(2 * column + 1) / size - 1, (2 * row + 1) / size - 1, 1])
            x, y = (((theta @ at + 1) * size - 1) / 2).clip(0, size - 1)
            left, top = min(int(x), size - 2), min(int(y), size - 2)
            across, down = x - left, y - top
            corner = image[:, top : top + 2, left : left + 2].astype(np.float64)
            mixed = corner[:, 0] * (1 - down) + corner[:, 1] * down
            found[:, row, column] = mixed[:, 0] * (1 - across) + mixed[:, 1] * across
    return np.einsum("ij,jyx->iyx", matrix, found) + offset[:, None, None]


@pytest.mark.parametrize("epoch", [-1, 2])
def test_views_and_the_compiled_loops_agree_with_a_slow_reference(epoch):
    pixels, index = crafted.noise(24, 14), torch.arange(24).flip(0)
    task = built(14, 24, **ON)
    plan = task.plan(index, epoch)
    assert set(plan["labels"].tolist()) == {0, 1, 2, 3}
    theta = plan.get("theta", torch.eye(2, 3).expand(24, 2, 3)).double().numpy()
    matrix, offset = (plan[name].double().numpy() for name in ("matrix", "offset"))
    slow = [
        slow_turn(slow_view(pixels[row], theta[i], matrix[i], offset[i]), int(plan["labels"][i]))
        for i, row in enumerate(index.tolist())
    ]
    views = task.views(torch.from_numpy(pixels[plan["rows"]]), plan)
    assert views.shape == (24, 1, 3, 14, 14)
    for found in (views, task.fill(pixels, plan)):
        assert np.abs(found[:, 0].numpy() - np.array(slow)).max() < 2e-4


def test_validation_sees_whole_images_turned_and_nothing_else():
    pixels, index = crafted.noise(32, 12), torch.arange(32)
    task = built(12, **ON)
    plan = task.plan(index, -1)
    mean, std = (value.numpy()[:, None, None] for value in (task.context.mean, task.context.std))
    for view, image, turns in zip(task.fill(pixels, plan), pixels, plan["labels"], strict=True):
        assert np.abs(view[0].numpy() * std + mean - slow_turn(image, turns) / 255).max() < 1e-6


def test_the_augmentation_is_that_of_the_label_task_whatever_the_turn():
    index = torch.arange(32)
    options = {name: value for name, value in ON.items() if name != "hidden"}
    labels = crafted.labelling(16, index % 3, **options).plan(index, 1)
    plan = built(**ON).plan(index, 1)
    for name in ("theta", "matrix", "offset"):
        assert torch.equal(plan[name], labels[name])


def test_each_image_is_turned_all_four_ways_in_each_four_epochs_in_random_order():
    task, index = built(number=4000), torch.arange(4000)
    turns = torch.stack([task.plan(index, epoch)["labels"] for epoch in range(8)], 1)
    for four in turns.split(4, 1):
        assert torch.equal(four.sort(1).values, torch.arange(4).expand(4000, 4))
        assert all(
            (turn.bincount(minlength=4) / 4000 - 1 / 4).abs().max() < 0.03 for turn in four.T
        )
    assert ((turns[:, :4] == turns[:, 4:]).double().mean(0) - 1 / 4).abs().max() < 0.03


def test_validation_turns_never_change_and_are_not_those_of_an_epoch():
    task, index = built(number=2000), torch.arange(2000)
    held = task.plan(index, -1)["labels"]
    assert torch.equal(held, task.plan(index, -1)["labels"])
    assert all((held == task.plan(index, e)["labels"]).double().mean() < 0.3 for e in range(4))


def test_crops_are_as_often_wide_as_high_so_that_blur_does_not_tell_the_turn():
    number = 20_000
    theta = built(number=number, crop=0.3).plan(torch.arange(number), 0)["theta"]
    stretch = (theta[:, 0, 0] / theta[:, 1, 1]).log()
    assert stretch.std() > 0.1 and stretch.mean().abs() < 0.01
    assert abs((stretch > 0).double().mean() - 0.5) < 0.02
