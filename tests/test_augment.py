import dataclasses

import crafted
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kt.core import augment, draws
from kt.core.delivery import load_batch
from kt.core.transfer import Labels, Transfer

LABELS = torch.arange(24) % 3


def views(task, pixels, index=None, epoch=0):
    index = torch.arange(len(pixels)) if index is None else index
    found, labels = load_batch(task, crafted.pack(pixels), index, epoch, torch.device("cpu"))
    return found[:, 0], labels


def pixels_of(found):
    """Turns normalised images back to 0..1, (N, 3, H, W) float64."""
    where = crafted.context(1, 1)
    back = found.double() * where.std[:, None, None].double()
    return (back + where.mean[:, None, None].double()).numpy()


def test_with_every_option_off_views_are_the_normalised_images():
    pixels = crafted.noise(24, 16)
    found, labels = views(crafted.labelling(16, LABELS), pixels)
    assert torch.equal(labels, LABELS)
    assert np.abs(pixels_of(found) - pixels / 255).max() < 1e-6


def test_validation_sees_plain_images_under_any_option():
    task = crafted.labelling(16, LABELS, crop=0.3, flip=0.5, brightness=0.5, contrast=0.5)
    pixels = crafted.noise(24, 16)
    assert np.abs(pixels_of(views(task, pixels, epoch=-1)[0]) - pixels / 255).max() < 1e-6
    assert np.abs(pixels_of(views(task, pixels, epoch=0)[0]) - pixels / 255).max() > 0.1


def test_a_flip_mirrors_the_columns_of_its_share_of_images():
    pixels = crafted.noise(24, 16)
    always, _ = views(crafted.labelling(16, LABELS, flip=1.0), pixels)
    assert np.abs(pixels_of(always) - pixels[..., ::-1] / 255).max() < 1e-4
    labels = torch.arange(2000) % 3
    few = crafted.noise(2000, 4)
    some, _ = views(crafted.labelling(4, labels, flip=0.3), few)
    found = pixels_of(some)
    plain = np.abs(found - few / 255).max((1, 2, 3)) < 1e-4
    mirrored = np.abs(found - few[..., ::-1] / 255).max((1, 2, 3)) < 1e-4
    assert (plain | mirrored).all()
    assert abs(mirrored.mean() - 0.3) < 0.05


@given(st.floats(0.05, 1), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_crops_stay_inside_the_image_and_keep_their_share(crop, seed):
    class Options:
        flip = 0.0

    Options.crop = crop
    draw = draws.uniform(seed, "test", 0, torch.arange(400), 5)
    theta = augment._crops(draw, Options)
    reach = theta[:, :, :2].abs().sum(2) + theta[:, :, 2].abs()
    assert reach.max() <= 1 + 1e-5
    area = theta[:, 0, 0] * theta[:, 1, 1]
    assert area.max() <= 1 + 1e-5 and area.min() >= crop - 1e-5
    aspect = theta[:, 0, 0] / theta[:, 1, 1]
    assert aspect.max() <= augment.ASPECT + 1e-4 and aspect.min() >= 1 / augment.ASPECT - 1e-4


def test_a_crop_takes_its_pixels_where_torchs_affine_grid_does():
    class Options:
        crop, flip = 0.3, 0.5

    theta = augment._crops(draws.uniform(0, "test", 0, torch.arange(20), 5), Options)
    wanted = torch.nn.functional.affine_grid(theta, (20, 3, 12, 17), align_corners=False)
    assert torch.allclose(augment._grid(theta, 12, 17), wanted, atol=1e-6)


def test_crops_show_a_stretch_of_the_image_without_reflections():
    ramp = np.broadcast_to(np.linspace(40, 200, 32), (24, 3, 32, 32)).astype(np.uint8)
    found = pixels_of(views(crafted.labelling(32, LABELS, crop=0.3), ramp)[0])[:, 0, 8]
    inner = np.diff(found, axis=1)[:, 1:-1]
    assert inner.min() > 0  # a reflection would turn the slope
    assert len(np.unique(found[:, 16].round(3))) > 12
    assert (found[:, -1] - found[:, 0]).max() <= 160.5 / 255


def slow_recolour(image, bright, contrast, saturation):
    """Saturation, then contrast about the data's mean grey, then brightness, on pixels 0..1."""
    grey = image.mean(0, keepdims=True)
    image = grey + saturation * (image - grey)
    middle = crafted.context(1, 1).mean.double().mean().item()
    return bright * (contrast * (image - middle) + middle)


def test_colours_agree_with_a_slow_reference_in_pixel_space():
    pixels = crafted.noise(24, 12)
    task = crafted.labelling(12, LABELS, brightness=0.4, contrast=0.3, saturation=0.8)
    found = pixels_of(views(task, pixels, epoch=2)[0])
    draw = draws.uniform(0, "augment", 2, task.context.ids, 8)[:, 5:].double().numpy()
    factors = 1 + np.array([0.4, 0.3, 0.8]) * (2 * draw - 1)
    slow = [slow_recolour(image / 255, *row) for image, row in zip(pixels, factors, strict=True)]
    assert np.abs(found - np.stack(slow)).max() < 1e-5
    assert factors.min() < 0.7 and factors.max() > 1.3


@pytest.mark.parametrize("option", ["brightness", "contrast", "saturation"])
def test_each_colour_option_changes_its_own_quantity_alone(option):
    pixels = crafted.noise(24, 12)
    found = pixels_of(views(crafted.labelling(12, LABELS, **{option: 0.5}), pixels)[0])
    before = pixels / 255
    assert np.abs(found - before).max() > 0.05
    if option == "saturation":
        assert np.abs(found.mean(1) - before.mean(1)).max() < 1e-5
    if option == "brightness":
        ratio = found.mean((1, 2, 3)) / before.mean((1, 2, 3))
        assert np.abs(found - before * ratio[:, None, None, None]).max() < 1e-5


def test_views_do_not_depend_on_the_batch_and_change_with_the_epoch():
    pixels = crafted.noise(24, 16)
    task = crafted.labelling(16, LABELS, crop=0.4, flip=0.5, brightness=0.3, saturation=0.3)
    whole, _ = views(task, pixels)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    parts = torch.cat([views(task, pixels, part)[0] for part in order.split(5)])
    assert torch.allclose(parts, whole[order], atol=1e-5)
    assert (views(task, pixels, epoch=1)[0] - whole).abs().amax((1, 2, 3)).min() > 0.05


def test_balanced_order_draws_labels_uniformly_and_images_uniformly_within():
    labels = torch.tensor([0] * 90 + [1] * 9 + [3] * 1).repeat(40)
    index = torch.arange(len(labels))
    drawn = augment.balanced(labels, index, 0, 0)
    assert len(drawn) == len(index)
    shares = labels[drawn].bincount(minlength=4) / len(drawn)
    assert shares[2] == 0 and (shares[[0, 1, 3]] - 1 / 3).abs().max() < 0.03
    assert drawn[labels[drawn] == 3].bincount(minlength=4000)[99::100].min() > 10
    assert torch.equal(drawn, augment.balanced(labels, index, 0, 0))
    assert not torch.equal(drawn, augment.balanced(labels, index, 0, 1))


def test_balanced_order_keeps_to_the_rows_at_hand():
    labels = torch.arange(60) % 3
    task = crafted.labelling(8, labels, balance=True)
    at_hand = torch.arange(0, 60, 2)
    assert set(task.order(at_hand, 0).tolist()) <= set(at_hand.tolist())


def test_a_kind_of_transfer_is_balanced_over_its_own_labels_or_not_at_all():
    nothing = torch.full((60,), -1)
    task = crafted.labelling(8, torch.arange(60) % 3, balance=True)
    task.context = dataclasses.replace(task.context, labels=nothing)
    task.taught = Labels([torch.tensor([0] * 59 + [1]), torch.arange(60) % 5], [2, 5])
    assert (task.order(torch.arange(60), 0) == 59).float().mean() > 0.3
    task.taught = Transfer()
    assert sorted(task.order(torch.arange(60), 0).tolist()) == list(range(60))


def test_the_plain_order_takes_every_row_once():
    task = crafted.labelling(8, torch.arange(60) % 3)
    at_hand = torch.arange(0, 60, 2)
    assert sorted(task.order(at_hand, 0).tolist()) == at_hand.tolist()
    assert not torch.equal(task.order(at_hand, 0), task.order(at_hand, 1))


@pytest.mark.parametrize("hidden", [0, 7])
def test_the_head_averages_maps_and_views(hidden):
    head = crafted.labelling(8, LABELS, hidden=hidden).head((5, 2, 3)).eval()
    maps = torch.randn(4, 2, 5, 2, 3)
    assert head(maps).shape == (4, 3)
    assert torch.allclose(head(maps), head(maps.flip(1).flip(3)), atol=1e-5)
