import crafted
import numpy as np
import pytest
import torch
from torch import nn

from kt import config
from kt.core import backbone as backbones
from kt.core import model
from kt.core.step import ConfigError

RESIDUAL = {"name": "residual", "widths": [4, 8], "strides": [1, 2], "blocks": 2}
HOG = {"name": "hog", "cells": 4}


def built(values: dict, **changes) -> backbones.Backbone:
    return model.fresh(crafted.plugin(values, **changes), 0).eval()


def torchvision(name: str) -> backbones.Backbone:
    return built({"name": "torchvision", "model": name, "last": None})


def shapes(backbone, size: int) -> dict[str, tuple]:
    with torch.inference_mode():
        maps = backbone.maps(torch.zeros(1, 3, size, size), backbone.layers)
    return {layer: tuple(found.shape[1:]) for layer, found in maps.items()}


# ---------------------------------------------------------------------------- small networks


def test_plain_layers_are_named_in_order_and_stride_the_map():
    assert shapes(built(crafted.PLAIN), 28) == {"conv1": (8, 14, 14), "conv2": (16, 7, 7)}


def test_residual_layers_are_named_in_order_and_stride_the_map():
    expected = {"stem": (4, 28, 28), "block1": (4, 28, 28), "block2": (8, 14, 14)}
    assert shapes(built(RESIDUAL), 28) == expected


def test_a_residual_block_adds_its_input():
    block = built(RESIDUAL).stages["block1"][0]
    for weight in block.body.parameters():
        nn.init.zeros_(weight)
    maps = torch.rand(2, 4, 5, 5)
    assert torch.allclose(block(maps), maps)


def test_fresh_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, two = (model.fresh(crafted.plugin(RESIDUAL), 3).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(before, torch.random.get_rng_state())
    other = model.fresh(crafted.plugin(RESIDUAL), 4).state_dict()
    assert not torch.equal(one["stages.stem.0.0.weight"], other["stages.stem.0.0.weight"])


@pytest.mark.parametrize("name", ["plain", "residual"])
def test_lists_of_unequal_length_are_refused(name):
    values = {"name": name, "widths": [4, 8], "strides": [2]}
    if name == "residual":
        values["blocks"] = 1
    with pytest.raises(ConfigError, match="each of the 2 widths, found 1"):
        built(values)


@pytest.mark.parametrize("values", [crafted.PLAIN, RESIDUAL, HOG])
def test_maps_of_all_layers_equal_those_of_one_layer_at_a_time(values):
    backbone = built(values)
    images = torch.rand(2, 3, 20, 20)
    maps = backbone.maps(images, backbone.layers)
    assert list(maps) == backbone.layers
    for layer in backbone.layers:
        assert torch.equal(maps[layer], backbone(images, layer))
    assert torch.equal(backbone(images), maps[backbone.layers[-1]])


def test_an_unknown_layer_is_refused_with_the_known_ones():
    backbone = built(crafted.PLAIN)
    for ask in (
        backbone.check_layer,
        backbone.features,
        lambda layer: backbone.maps(None, [layer]),
    ):
        arguments = (torch.zeros(1, 3, 8, 8), "conv9") if ask == backbone.features else ("conv9",)
        with pytest.raises(ConfigError, match="'conv9' is not one of conv1, conv2"):
            ask(*arguments)


def test_images_too_small_for_the_network_are_refused():
    with pytest.raises(ConfigError, match="16 px do not fit"):
        torchvision("alexnet").map_shape(16)


def test_asking_for_a_map_shape_keeps_mode_and_statistics():
    backbone = built(crafted.PLAIN).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert backbone.map_shape(21, "conv2") == (16, 6, 6)
    assert backbone.training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_pooling_averages_to_at_most_the_asked_edge():
    maps = torch.rand(3, 2, 4, 6)
    assert torch.allclose(backbones.pool(maps, 1), maps.mean((2, 3)))
    assert torch.equal(backbones.pool(maps, 9), maps.flatten(1))
    halves = maps.view(3, 2, 2, 2, 2, 3).mean((3, 5))
    assert torch.allclose(backbones.pool(maps, 2), halves.flatten(1))


@pytest.mark.parametrize("shape", [(40, 3, 24, 24), (1, 3, 7, 5)])
def test_images_are_normalised_by_mean_and_deviation_channel_by_channel(shape):
    backbone = built(crafted.PLAIN)
    backbone.mean, backbone.std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    found = backbone.normalise(pixels)
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    for channel, (mean, std) in enumerate(zip((0.4, 0.5, 0.6), (0.2, 0.3, 0.1), strict=True)):
        wanted = (pixels[:, channel].double() / 255 - mean) / std
        assert (found[:, channel] - wanted).abs().max() < 1e-5


def test_features_are_the_pooled_maps_of_normalised_images():
    backbone = built(crafted.PLAIN)
    backbone.mean, backbone.std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])
    pixels = torch.from_numpy(crafted.noise(3, 16))
    scaled = (pixels / 255 - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / torch.tensor(
        [0.2, 0.3, 0.1]
    )[:, None, None]
    found = backbone.features(pixels, "conv1", 2)
    assert found.shape == (3, 8 * 4)
    with torch.inference_mode():
        assert torch.allclose(found, backbones.pool(backbone(scaled, "conv1"), 2), atol=1e-4)


@pytest.mark.parametrize("name", ["plain", "residual"])
def test_folded_norms_change_features_by_rounding_only(name):
    options = {"widths": [8, 16], "strides": [2, 1]} | ({"blocks": 1} if name == "residual" else {})
    backbone, folded = (built({"name": name, **options}) for _ in range(2))
    torch.manual_seed(1)
    for part in backbone.modules():
        if isinstance(part, nn.BatchNorm2d):
            for value in (part.running_mean, part.running_var, part.weight.data, part.bias.data):
                value.uniform_(0.5, 2)
    folded.load_state_dict(backbone.state_dict())
    backbone.eval(), folded.eval()
    backbones.fold_norms(folded)
    assert not [part for part in folded.modules() if isinstance(part, nn.BatchNorm2d)]
    pixels = torch.from_numpy(crafted.noise(6, 16))
    for layer in backbone.layers:
        right, found = (net.features(pixels, layer, 4) for net in (backbone, folded))
        assert torch.allclose(found, right, rtol=1e-4, atol=1e-4 * float(right.abs().max()))


# ---------------------------------------------------------------------------- torchvision


@pytest.mark.parametrize(
    "name, channels, edge",
    [("resnet18", 512, 2), ("resnet34", 512, 2), ("resnet50", 2048, 2), ("alexnet", 256, 3)],
)
def test_torchvision_trunks_give_maps_at_small_sizes(name, channels, edge):
    backbone = torchvision(name)
    found = shapes(backbone, 64)
    layers = [f"conv{n}" for n in range(1, 6)]
    if name.startswith("resnet"):
        layers = ["stem", *(f"layer{n}" for n in range(1, 5))]
    assert backbone.layers == layers
    assert found[layers[-1]] == (channels, edge, edge)
    assert not [part for part in backbone.modules() if isinstance(part, nn.Linear)]


def test_vgg_layers_carry_the_names_of_the_paper():
    backbone = torchvision("vgg16_bn")
    counts = {1: 2, 2: 2, 3: 3, 4: 3, 5: 3}
    assert backbone.layers == [f"conv{b}_{n}" for b in counts for n in range(1, counts[b] + 1)]
    found = shapes(backbone, 64)
    assert found["conv4_3"] == (512, 8, 8) and found["conv5_3"] == (512, 4, 4)
    convolutions = [part for part in backbone.modules() if isinstance(part, nn.Conv2d)]
    assert len(convolutions) == 13


def test_a_trunk_can_end_at_a_layer():
    cut = built({"name": "torchvision", "model": "vgg16_bn", "last": "conv4_3"})
    assert cut.layers[-1] == "conv4_3" and cut.map_shape(64) == (512, 8, 8)
    options = config.options("backbones", "torchvision", {"model": "vgg16_bn", "last": "conv4_3"})
    assert config.plugin("backbones", "torchvision").layers(options) == cut.layers
    with pytest.raises(ConfigError, match=r"backbone.last: 'conv9' is not one of conv1_1, "):
        built({"name": "torchvision", "model": "vgg16_bn", "last": "conv9"})


def test_a_trunk_is_torchvisions_own_up_to_the_classifier():
    from torchvision import models

    backbone = torchvision("resnet18")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = models.resnet18().eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        ours = whole.fc(backbone(images).mean((2, 3)))
        assert torch.allclose(ours, whole(images), atol=1e-4)


@pytest.mark.parametrize("name", ["resnet19", "vit_b_16"])
def test_a_model_that_is_unknown_or_has_no_maps_is_refused(name):
    with pytest.raises(ConfigError, match=f"backbone.model: .*{name}"):
        torchvision(name)


# ---------------------------------------------------------------------------- hog


def test_hog_equals_that_of_scikit_image():
    from skimage.feature import hog

    pixels = crafted.discs(3, 28)[0]
    found = built(HOG).features(torch.from_numpy(pixels), "hog", 3).numpy()
    for row, image in enumerate(pixels):
        slow = hog(image.transpose(1, 2, 0) / 255, 9, (7, 7), (2, 2), channel_axis=-1)
        blocks = slow.reshape(9, 36).T.ravel()  # ours has the map's edge last
        assert np.abs(found[row] - blocks).max() < 1e-5


def test_hog_describes_the_smallest_images_that_a_data_set_may_have():
    assert built(HOG, cells=50).map_shape(12, "hog") == (36, 5, 5)


# ---------------------------------------------------------------------------- statistics


def test_statistics_become_those_of_the_images():
    backbone = built(crafted.PLAIN)
    pixels = torch.from_numpy(crafted.scenes(24, 16))
    backbones.estimate_statistics(backbone, pixels.split(8))
    norm = backbone.stages["conv1"][1]
    with torch.no_grad():
        maps = backbone.stages["conv1"][0](backbone.normalise(pixels)).double()
    assert torch.allclose(norm.running_mean.double(), maps.mean((0, 2, 3)), atol=1e-4)
    variance = torch.stack([part.var((0, 2, 3)) for part in maps.split(8)]).mean(0)
    assert torch.allclose(norm.running_var.double(), variance, rtol=1e-3)


def test_later_layers_are_estimated_on_what_the_layers_before_give_while_estimating():
    backbone = built(crafted.PLAIN)
    pixels = torch.from_numpy(crafted.scenes(24, 16))
    backbones.estimate_statistics(backbone, [pixels])
    with torch.no_grad():
        first = backbone.stages["conv1"]
        maps = first[0](backbone.normalise(pixels))
        maps = nn.functional.relu(nn.functional.batch_norm(maps, None, None, training=True))
        maps = backbone.stages["conv2"][0](maps).double()
    norm = backbone.stages["conv2"][1]
    assert torch.allclose(norm.running_mean.double(), maps.mean((0, 2, 3)), atol=1e-4)


def test_estimating_leaves_eval_mode_weights_and_momenta():
    backbone = built(RESIDUAL).train()
    weights = {name: weight.clone() for name, weight in backbone.named_parameters()}
    backbones.estimate_statistics(backbone, [torch.from_numpy(crafted.noise(8, 16))])
    norms = [part for part in backbone.modules() if isinstance(part, nn.BatchNorm2d)]
    assert not any(part.training for part in backbone.modules())
    assert all(norm.momentum == 0.1 for norm in norms)
    assert all(norm.num_batches_tracked == 1 for norm in norms)
    assert all(torch.equal(weight, weights[name]) for name, weight in backbone.named_parameters())


def test_estimating_forgets_the_statistics_of_tiles():
    one, two = built(crafted.PLAIN), built(crafted.PLAIN)
    for _ in range(3):
        two.train()(100 * torch.rand(2, 3, 8, 8))
    images = [torch.from_numpy(crafted.noise(8, 16))]
    for backbone in (one, two):
        backbones.estimate_statistics(backbone, images)
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))
