"""Context prediction: places, colours and pixels of the two patches."""

from pathlib import Path

import crafted
import numpy as np
import pytest
import torch

from kt import config
from kt.core.step import ConfigError
from kt.pretext_train import build_task
from kt.tasks import context

OPTIONS = {
    "patch": 0.2, "gap": 0.5, "jitter": 0.07, "projection": 0.25, "dropping": 0.5,
    "tile_features": 16, "hidden": 32, "map": 2, "dropout": 0.0,
}  # fmt: skip
# Row and column of the second patch on a 3x3 grid whose middle is the first, read as a page.
PLACES = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2)]


def built(size=64, number=64, seed=0, **changes):
    plugin = config.Plugin(name="context", **(OPTIONS | changes))
    return build_task(plugin, crafted.context(size, number, seed))


def sizes(size=64, **changes):
    return context.geometry(context.Options(**(OPTIONS | changes)), size)


# ---------------------------------------------------------------------------- geometry


def test_sizes_follow_the_published_proportions():
    patch, step, jitter, room = sizes(480)
    assert (patch, step - patch, jitter) == (96, 48, 7)
    assert room == 480 - 3 * 96 - 2 * 48 - 2 * 7
    assert sizes(64) == (13, 19, 1, 64 - 13 - 2 * 20)


def test_both_patches_lie_in_the_image_never_touch_and_use_all_their_room():
    for size in range(28, 256, 3):
        task, index = built(size, 3000), torch.arange(3000)
        plan = task.plan(index, 0)
        corners = torch.stack([plan["top"], plan["left"]], -1)[:, :, 0]  # (B, patch, axis)
        assert corners.min() == 0 and corners.max() == size - task.patch
        apart = (corners[:, 0] - corners[:, 1]).abs().amax(1)
        assert apart.min() > task.patch
        assert torch.equal(plan["top"], plan["top"][..., :1].expand(-1, -1, 3))


def test_the_label_is_the_direction_of_the_second_patch():
    task = built(number=4000)
    plan = task.plan(torch.arange(4000), 0)
    for label, (row, column) in enumerate(PLACES):
        at = plan["labels"] == label
        down, across = (plan[edge][at, 1, 0] - plan[edge][at, 0, 0] for edge in ("top", "left"))
        for moved, place in ((down, row - 1), (across, column - 1)):
            assert (moved - place * task.step).abs().max() == 2 * task.jitter


def test_place_direction_and_colour_are_drawn_anew_in_each_epoch():
    task, index = built(number=4000), torch.arange(4000)
    one, two = (task.plan(index, epoch) for epoch in (0, 1))
    alike = (one["labels"] == two["labels"]).double().mean()
    assert abs(alike - 1 / 8) < 0.03
    alike = (one["colour"] == two["colour"]).flatten(1).all(1).double().mean()
    assert abs(alike - (2 / 16 + 3 / 36)) < 0.03  # the same of five, none fixed with another
    alike = (one["top"][:, 0] == two["top"][:, 0]).all(1).double().mean()
    assert alike < 0.2  # of twelve rows and a jitter of three


def test_labels_are_equally_frequent_and_the_centre_patch_tells_nothing_of_them():
    number = 40_000
    task = built(number=number)
    plan = task.plan(torch.arange(number), 0)
    assert (plan["labels"].bincount(minlength=8) / number - 1 / 8).abs().max() < 0.01
    for edge in ("top", "left"):
        first = plan[edge][:, 0, 0].double()
        means = torch.stack([first[plan["labels"] == label].mean() for label in range(8)])
        assert (means - first.mean()).abs().max() < 0.02 * 64


@pytest.mark.parametrize(
    "changes, size, said",
    [
        ({"patch": 0.3}, 64, "three patches of 19 px .* take 81 px; expected at most the .* 64 px"),
        ({"patch": 0.1}, 28, "patches of 3 px; expected 5 px"),
        ({"gap": 0.1}, 64, "across a gap of 1 px; expected a gap of at least 3 px"),
        ({"gap": 0.0, "jitter": 0.0}, 64, "gap of 0 px; expected a gap of at least 1 px"),
        ({"projection": 0.6}, 64, "at most 1 together, found 0.6 and 0.5"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_the_numbers(changes, size, said):
    with pytest.raises(ConfigError, match=said):
        built(size, **changes)


def test_the_configuration_names_the_key_of_patches_that_do_not_fit():
    root = Path(__file__).parent.parent
    overlay = config.read(root / "presets" / "pretext_tasks.yaml")
    overlay["teachers"]["context"]["task"]["patch"] = 0.4
    with pytest.raises(ConfigError, match=r"teachers\.context\.task: patch: three patches"):
        config.resolve(root, overlay)


# ---------------------------------------------------------------------------- pixels


def slow_patch(image, top, left, edge, colour):
    """One patch from uint8 (3, H, W), recoloured, then standardised in two passes of float64."""
    cut = image[:, top : top + edge, left : left + edge].astype(np.float64)
    red, green, blue = cut
    if colour == "projection":  # what of each pixel points along (-1, 2, -1) is taken off it
        along = (2 * green - red - blue) / 6
        cut = np.stack([red + along, green - 2 * along, blue + along])
    elif colour != "same":
        cut = np.stack([cut[colour]] * 3)
    cut -= cut.mean()
    return cut / max(np.sqrt((cut**2).mean()), 1.0)


def kind(matrix):
    """Tells from its effect on four pixels what a matrix (3, 3) does to colours."""
    found = matrix.double().numpy() @ np.array([[9.0, 0, 0, -1], [0, 9, 0, 2], [0, 0, 9, -1]])
    if np.allclose(found[:, :3], 9 * np.eye(3)):
        return "same"
    if np.allclose(found[:, 3], 0, atol=1e-5):
        return "projection"
    return int(found[0, :3].argmax())


@pytest.mark.parametrize("size", [28, 64])
@pytest.mark.parametrize("epoch", [-1, 2])
def test_views_and_the_compiled_loop_agree_with_a_slow_reference(size, epoch):
    pixels, index = crafted.noise(40, size), torch.arange(40).flip(0)
    pixels[3] = 77  # flat
    pixels[5] = 200 + (pixels[5] > 127)  # under one grey level of variance
    task = built(size, 40)
    plan = task.plan(index, epoch)
    kinds = [kind(matrix) for matrix in plan["colour"]]
    assert set(kinds) == {"same", "projection", 0, 1, 2}
    slow = [
        [
            slow_patch(pixels[row], plan["top"][i, j, 0], plan["left"][i, j, 0], task.patch, how)
            for j in range(2)
        ]
        for i, (row, how) in enumerate(zip(index.tolist(), kinds, strict=True))
    ]
    views = task.views(torch.from_numpy(pixels[plan["rows"]]), plan)
    assert views.shape == (40, 2, 3, task.patch, task.patch)
    for found in (views, task.fill(pixels, plan)):
        assert np.abs(found.numpy() - np.array(slow)).max() < 2e-4


def test_colours_change_in_the_declared_shares_each_channel_alike():
    task = built(number=8000)
    kinds = [kind(matrix) for matrix in task.plan(torch.arange(8000), 0)["colour"]]
    shares = {name: kinds.count(name) / 8000 for name in ("same", "projection", 0, 1, 2)}
    wanted = {"same": 0.25, "projection": 0.25, 0: 1 / 6, 1: 1 / 6, 2: 1 / 6}
    assert max(abs(shares[name] - wanted[name]) for name in wanted) < 0.02


def test_the_head_tells_the_centre_patch_from_the_other():
    torch.manual_seed(0)
    head, maps = built().head((6, 3, 3)).eval(), torch.randn(5, 2, 6, 3, 3)
    assert head(maps).shape == (5, 8)
    assert not torch.allclose(head(maps), head(maps.flip(1)), atol=1e-3)
