import hashlib
import sys
from pathlib import Path
from types import SimpleNamespace

import crafted
import numpy as np
import pytest
import torch
from torch import nn

from kt import config
from kt.core import backbone as backbones
from kt.core import frozen, model, voc_training
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
        arguments = (
            (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "conv9")
            if ask == backbone.features
            else ("conv9",)
        )
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


def test_a_stage_that_works_in_place_leaves_the_map_before_it_alone():
    first = [nn.Identity(), nn.Sequential(), nn.ReLU(inplace=True)]
    conv, relu = nn.Conv2d(3, 4, 3), nn.Sequential(*first, nn.Conv2d(4, 4, 1))
    backbone = backbones.Backbone({"one": conv, "two": relu}).eval()
    images = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        assert torch.equal(backbone.maps(images, ["one", "two"])["one"], conv(images))


def test_norms_without_statistics_are_not_folded():
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    backbone = backbones.Backbone({"one": nn.Sequential(nn.Conv2d(3, 4, 3), norm)})
    backbones.fold_norms(backbone)
    assert backbone.stages["one"][1] is norm


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


def test_a_network_without_batch_norm_looks_at_no_image():
    backbone = built({"name": "hog", "cells": 4}).train()
    backbones.estimate_statistics(backbone, iter(lambda: pytest.fail("looked"), None))
    assert not backbone.training


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


# ---------------------------------------------------------------------------- alexnet

ALEXNET = {"name": "alexnet", "stride": 4, "norm": "lrn"}


def test_alexnet_gives_the_maps_of_the_paper():
    whole, tiles = built(ALEXNET), built(ALEXNET, stride=2)
    edges = {"conv1": 55, "conv2": 27, "conv3": 13, "conv4": 13, "conv5": 13}
    channels = {"conv1": 96, "conv2": 256, "conv3": 384, "conv4": 384, "conv5": 256}
    assert shapes(whole, 227) == {layer: (channels[layer], e, e) for layer, e in edges.items()}
    found = shapes(tiles, 64)  # a tile of the paper
    assert [found[layer][1] for layer in edges] == [27, 13, 6, 6, 6]


def test_alexnet_has_the_published_number_of_weights():
    convolutions = (
        (96, 3 * 11**2),
        (256, 48 * 5**2),
        (384, 256 * 9),
        (384, 192 * 9),
        (256, 192 * 9),
    )
    wanted = sum(channels * (inputs + 1) for channels, inputs in convolutions)
    assert wanted == 2_334_080
    assert sum(weight.numel() for weight in built(ALEXNET).parameters()) == wanted
    assert sum(weight.numel() for weight in built(ALEXNET, stride=2).parameters()) == wanted


def test_alexnets_fully_connected_layers_are_those_of_torchvisions():
    """The same numbers as pooling, a flat vector and two linear layers give."""
    backbone = built(ALEXNET, units=4096)
    assert backbone.layers[-3:] == ["conv5", "fc6", "fc7"]
    assert sum(weight.numel() for weight in backbone.parameters()) == 2_334_080 + 54_534_144
    torch.manual_seed(0)
    for size, places in ((227, 6), (255, 7), (131, 3)):
        with torch.inference_mode():
            maps = backbone.maps(torch.randn(2, 3, size, size), backbone.layers)
            pooled = nn.functional.max_pool2d(maps["conv5"], 3, 2, ceil_mode=True)
            assert pooled.shape[-1] == places
            vectors = nn.functional.adaptive_avg_pool2d(pooled, 6).flatten(1)
            for layer in ("fc6", "fc7"):
                conv = next(part for part in backbone.stages[layer] if isinstance(part, nn.Conv2d))
                vectors = (vectors @ conv.weight.flatten(1).T + conv.bias).relu()
                assert torch.allclose(maps[layer][:, :, 0, 0], vectors, rtol=1e-3, atol=1e-3)
    parts = [part for layer in ("fc6", "fc7") for part in backbone.stages[layer]]
    assert [part.p for part in parts if isinstance(part, nn.Dropout)] == [0.5, 0.5]


def response_normalised(maps: np.ndarray) -> np.ndarray:
    """Divides each channel by (1 + 1e-4 / 5 * sum of squares of 5 channels) ** 0.75, by a loop."""
    found = np.empty_like(maps)
    for channel in range(maps.shape[1]):
        near = maps[:, max(channel - 2, 0) : channel + 3].astype(np.float64)
        found[:, channel] = maps[:, channel] / (1 + 1e-4 / 5 * (near**2).sum(1)) ** 0.75
    return found


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 3, 64, 64), torch.zeros(2, 64, 64, 3, dtype=torch.uint8),
               torch.zeros(3, 64, 64, dtype=torch.uint8)],
)  # fmt: skip
def test_images_of_another_kind_are_refused(images):
    with pytest.raises(ConfigError, match=r"expected images \(B, 3, H, W\) uint8, found \("):
        built(ALEXNET).features(images)


def test_response_normalisation_learns_as_torchs_own_does():
    torch.manual_seed(0)
    maps = (60 * torch.randn(2, 8, 5, 6)).requires_grad_()
    ours, theirs = built(ALEXNET).stages["conv2"][1], nn.LocalResponseNorm(5, 1e-4, 0.75, 1.0)
    weights = torch.randn(2, 8, 5, 6)
    found = [torch.autograd.grad((one(maps) * weights).sum(), maps)[0] for one in (ours, theirs)]
    assert torch.allclose(ours(maps), theirs(maps), rtol=1e-5)
    assert torch.allclose(*found, rtol=1e-4, atol=1e-5)
    assert ours(torch.full((1, 8, 1, 1), 1000.0).half()).min() > 0  # squares leave float16


@pytest.mark.parametrize("shape, cells", [((7, 7), (2, 2)), ((9, 5), (4, 4)), ((3, 3), (3, 1))])
def test_averages_whose_gradients_are_deterministic_are_those_of_torch(shape, cells):
    maps = torch.randn(2, 3, *shape, requires_grad=True)
    expected = nn.functional.adaptive_avg_pool2d(maps, cells)
    weights = torch.randn_like(expected)
    torch.use_deterministic_algorithms(True)
    try:
        found = backbones.average(maps, cells)
        assert "pool" not in type(found.grad_fn).__name__.lower()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.allclose(found, expected, atol=1e-6)
    grads = [torch.autograd.grad((one * weights).sum(), maps)[0] for one in (found, expected)]
    assert torch.allclose(*grads, atol=1e-6)


@pytest.mark.parametrize("norm", ["lrn", "batch", "none"])
def test_alexnets_second_layer_is_pooling_norm_and_a_convolution_in_two_groups(norm):
    backbone = built(ALEXNET, norm=norm)
    torch.manual_seed(0)
    images = 60 * torch.randn(2, 3, 95, 95)  # large, so that the response normalisation shows
    with torch.inference_mode():
        maps = backbone.maps(images, ["conv1", "conv2"])
    pooled = nn.functional.max_pool2d(maps["conv1"], 3, 2, ceil_mode=True)
    if norm == "lrn":
        slow = torch.from_numpy(response_normalised(pooled.numpy()))
        assert (slow - pooled).abs().max() > 0.01 * pooled.abs().max()
        pooled = slow
    conv = backbone.stages["conv2"][2 if norm == "lrn" else 1]
    with torch.inference_mode():
        halves = [
            nn.functional.conv2d(part, weight, padding=2)
            for part, weight in zip(pooled.chunk(2, 1), conv.weight.chunk(2), strict=True)
        ]
        found = torch.cat(halves, 1)
        if norm == "batch":
            assert conv.bias is None
            found = found / np.sqrt(1 + 1e-5)  # fresh statistics
    assert torch.allclose(found.relu(), maps["conv2"], rtol=1e-4, atol=1e-3)


def test_alexnets_activations_neither_vanish_nor_explode():
    backbone = built(ALEXNET, norm="none")
    torch.manual_seed(0)
    with torch.inference_mode():
        maps = backbone.maps(torch.randn(4, 3, 127, 127), backbone.layers)
    sizes = [float(found.square().mean().sqrt()) for found in maps.values()]
    assert all(0.5 < size < 3 for size in sizes), (
        sizes
    )  # He: the mean square is kept, borders aside


def test_the_vgg16_of_the_paper_gives_its_8192_dimensions():
    values = {"name": "torchvision", "model": "vgg16", "last": "conv4_3"}
    for model_name in ("vgg16", "vgg16_bn"):
        backbone = built(values, model=model_name)
        with torch.inference_mode():
            maps = backbone(torch.randn(1, 3, 64, 64))  # a tile: 8x8
        assert maps.shape == (1, 512, 8, 8)
        pooled = backbones.pool(maps, 4, "max")
        assert pooled.shape == (1, 8192)
        assert torch.equal(pooled, nn.functional.max_pool2d(maps, 2).flatten(1))


# ---------------------------------------------------------------------------- pixels


def test_raw_pixels_are_means_of_blocks_normalised_by_channel():
    backbone = built({"name": "pixels", "edge": 4})
    backbone.mean, backbone.std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])
    pixels = crafted.noise(3, 20)
    blocks = pixels.reshape(3, 3, 4, 5, 4, 5).mean((3, 5)) / 255
    slow = (blocks - backbone.mean.numpy()[:, None, None]) / backbone.std.numpy()[:, None, None]
    found = backbone.features(torch.from_numpy(pixels), "pixels", 4)
    assert np.allclose(found, slow.reshape(3, -1), atol=1e-5)


# ---------------------------------------------------------------------------- timm


def test_without_timm_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    with pytest.raises(ConfigError, match="timm is not installed; `pip install timm`"):
        built({"name": "timm", "model": "resnet18", "last": None})


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm", reason="timm is optional and not installed")


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "mobilenetv3_small_050"])
def test_timms_stages_are_the_layers(timm, name):
    backbone = built({"name": "timm", "model": name, "last": 3})
    assert backbone.layers == ["stage1", "stage2", "stage3"]
    images = torch.randn(2, 3, 64, 64)
    trunk = timm.create_model(name, features_only=True).eval()
    wanted = trunk.state_dict()
    own = {key.removeprefix("stages.timm.model."): key for key in backbone.state_dict()}
    backbone.load_state_dict({own[key]: wanted[key] for key in own if key in wanted}, strict=False)
    with torch.inference_mode():
        maps, whole = backbone.maps(images, backbone.layers), trunk(images)
    for found, right in zip(maps.values(), whole[: len(maps)], strict=True):
        assert torch.equal(found, right)


def test_timms_maps_with_channels_last_are_turned(timm):
    backbone = built({"name": "timm", "model": "swin_tiny_patch4_window7_224", "last": 2})
    assert shapes(backbone, 224) == {"stage1": (96, 56, 56), "stage2": (192, 28, 28)}
    with pytest.raises(ConfigError, match="64 px do not fit"):
        backbone.map_shape(64)


def test_a_part_of_timms_layers_may_be_taken_but_not_frozen(timm):
    backbone = built({"name": "timm", "model": "resnet18", "last": 3})
    assert [*backbone.up_to("stage2")] == ["timm"]
    schedule = SimpleNamespace(precision="float32")
    trunk = voc_training.Trunk(backbone, "stage2", 64, schedule).eval()
    pictures = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(trunk(pictures), backbone(pictures, "stage2"))
    assert list(trunk.channels) == ["stage1", "stage2"] and trunk.out_channels == 64
    with pytest.raises(ConfigError, match="nonlinear: .* none can be frozen alone"):
        frozen.fresh_above(backbone, "stage1")


def test_an_unknown_model_of_timm_is_refused_with_what_there_is(timm):
    with pytest.raises(ConfigError, match=r"timm gives no maps of 'vgg1': .*vgg11"):
        built({"name": "timm", "model": "vgg1", "last": None})


# ---------------------------------------------------------------------------- a file

MINE = Path(__file__).parent / "network_of_mine.py"
FILE = {"name": "file", "path": str(MINE), "function": "tiny", "options": {"widths": [4, 8]},
        "digest": None}  # fmt: skip


@pytest.fixture
def trusted(monkeypatch):
    monkeypatch.setenv("KT_RUN_FILES", "1")


def test_a_file_gives_its_layers(trusted):
    assert shapes(built(FILE), 16) == {"one": (4, 8, 8), "two": (8, 4, 4)}


def test_a_file_never_runs_without_consent(monkeypatch, tmp_path):
    monkeypatch.delenv("KT_RUN_FILES", raising=False)
    code = tmp_path / "net.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"runs the code of .*net.py; .*KT_RUN_FILES=1"):
            built(FILE, path=str(code))
        assert not (tmp_path / "ran").exists()
    monkeypatch.setenv("KT_RUN_FILES", "1")
    with pytest.raises(ConfigError, match="net.py has no function 'tiny'"):
        built(FILE, path=str(code))
    assert (tmp_path / "ran").exists()


def test_a_saved_model_of_a_file_is_rebuilt_until_the_file_changes(trusted, tmp_path):
    code = tmp_path / "net.py"
    code.write_bytes(MINE.read_bytes())
    plugin = config.pinned(crafted.plugin(FILE, path=str(code)))
    assert plugin.options()["digest"] == hashlib.sha256(MINE.read_bytes()).hexdigest()
    assert config.pinned(plugin) == plugin
    backbone, pixels = model.fresh(plugin, 0).eval(), torch.from_numpy(crafted.noise(2, 16))
    model.save(tmp_path / "model", backbone, plugin, {})
    assert torch.equal(model.load(tmp_path / "model").features(pixels), backbone.features(pixels))
    code.write_text(MINE.read_text().replace("nn.ReLU", "nn.Tanh"))  # the same shapes of weights
    with pytest.raises(ConfigError, match=r"net.py has changed: .* put that file back"):
        model.load(tmp_path / "model")
    assert config.pinned(crafted.plugin(FILE, path=str(code))) != plugin  # what is to run again
    code.unlink()
    with pytest.raises(ConfigError, match=r"cannot read .*net.py: No such file"):
        model.load(tmp_path / "model")


@pytest.mark.parametrize("gives", ["None", "{}", "[nn.ReLU()]", "{'one': 3}", "{1: nn.ReLU()}"])
def test_a_function_that_gives_no_stages_is_refused(trusted, tmp_path, gives):
    (tmp_path / "net.py").write_text(f"from torch import nn\ndef tiny(**_):\n    return {gives}\n")
    with pytest.raises(ConfigError, match="must give a dict of torch.nn.Module by layer, gave"):
        built(FILE, path=str(tmp_path / "net.py"))


@pytest.mark.parametrize(
    "body, fault",
    [
        ("def tiny(**_):\n    return 1 / 0\n", "failed in line 2: ZeroDivisionError: division"),
        ("import nonesuch\n", "failed in line 1: ModuleNotFoundError: No module named 'nonesuch'"),
        ("def tiny(:\n", "failed: SyntaxError: "),
        ("def tiny(depth):\n    pass\n", r"failed: TypeError: .* argument 'widths'"),
    ],
)
def test_code_that_fails_is_told_with_its_line(trusted, tmp_path, body, fault):
    (tmp_path / "net.py").write_text(body)
    with pytest.raises(ConfigError, match=f"the code of .*net.py {fault}"):
        built(FILE, path=str(tmp_path / "net.py"))


def test_a_file_may_hold_data_classes(trusted, tmp_path):
    head = "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\n"
    text = f"{head}class Size:\n    width: int\nfrom torch import nn\ndef tiny(widths):\n"
    (tmp_path / "net.py").write_text(text + "    return {'one': nn.Conv2d(3, Size(4).width, 3)}\n")
    assert shapes(built(FILE, path=str(tmp_path / "net.py")), 8) == {"one": (4, 6, 6)}
