"""PASCAL VOC's evaluations on drawn devkits: they learn, and they go on after an interruption."""

import argparse
import copy
import json
import signal
from pathlib import Path

import crafted
import drawn_voc
import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluations import write_data
from torch.utils._python_dispatch import TorchDispatchMode

from kt import config, evaluate, workflow
from kt.core import judge, model, resume, voc, voc_metrics, voc_training
from kt.core.backbone import Backbone, estimate_statistics
from kt.core.step import ConfigError, DataError, Interrupted
from kt.evaluations import voc_classification, voc_detection, voc_segmentation

SCHEDULE = {
    "epochs": 8, "batch": 6, "optimiser": "adamw", "lr": 0.004, "momentum": 0.9,
    "weight_decay": 0.01, "schedule": "cosine", "milestones": [], "warmup": 0.05,
    "precision": "float32", "deterministic": False,
}  # fmt: skip
CLASSIFICATION = {
    "size": 32, "layers": [], "map": 3, "penalties": [0.01, 0.1], "iterations": 50,
    "labels_per_class": [], "draws": 2, "finetune": None,
}  # fmt: skip
DETECTION = {
    "layer": None, "min_size": 48, "max_size": 64, "anchors": [12, 18, 26], "ratios": [1.0],
    "pooled": 4, "hidden": 64, "proposals": 40, "training": SCHEDULE,
}  # fmt: skip
SEGMENTATION = {
    "layer": None, "skips": ["conv2"], "train": "train", "masks": "SegmentationClass", "crop": 48,
    "scales": [0.8, 1.25], "training": SCHEDULE,
}  # fmt: skip
ALL = {
    "voc_classification": CLASSIFICATION, "voc_detection": DETECTION,
    "voc_segmentation": SEGMENTATION,
}  # fmt: skip
NETWORK = {"name": "plain", "widths": [16, 32, 32], "strides": [2, 2, 2]}


@pytest.fixture(scope="module")
def devkit(tmp_path_factory):
    return drawn_voc.write(tmp_path_factory.mktemp("voc") / "VOCdevkit", 30, 12, 15)


@pytest.fixture(scope="module")
def backbone(devkit):
    found = model.fresh(crafted.plugin(NETWORK), 0)
    names = [f"{row:06d}" for row in range(30)]
    estimate_statistics(found, [voc_classification.squeezed(devkit / "VOC2007", names, 48)])
    return found


def options(name, devkit, **changes):
    return config.options("evaluations", name, {**ALL[name], "path": str(devkit), **changes})


def judged(name, backbone, devkit, **changes):
    values = {**ALL[name], "path": str(devkit), **changes}
    records = evaluate.judge_one(name, values, backbone, crafted.data(), 0)
    assert {record["dataset"] for record in records} == {
        "VOC2012" if name == "voc_segmentation" else "VOC2007"
    }
    return {(record["metric"], record.get("layer")): record["value"] for record in records}


class Begun(Exception):
    """Ends an evaluation where its training would begin."""


def job_of(name, backbone, devkit, monkeypatch, **changes):
    """Gives the training that an evaluation begins."""
    jobs = []

    def train(job):
        jobs.append(job)
        raise Begun

    monkeypatch.setattr(voc_training, "train", train)
    with pytest.raises(Begun):
        judged(name, backbone, devkit, **changes)
    return jobs[0]


# ---------------------------------------------------------------------------- classification


@pytest.mark.parametrize("penalty", [0.01, 0.3])
def test_the_support_vector_machine_finds_scikit_learns_optimum(penalty):
    from sklearn.svm import LinearSVC

    random = np.random.default_rng(0)
    rows, signs = random.normal(size=(150, 6)), np.ones((150, 2))
    signs[:, 0] = np.where(rows[:, 0] + random.normal(size=150) > 0.5, 1, -1)
    signs[:, 1] = np.where(rows[:, 1] - rows[:, 2] > 0.8, 1, -1)
    signs[random.random((150, 2)) < 0.2] = 0
    weights = voc_classification.fit(
        torch.from_numpy(rows).float(), torch.from_numpy(signs).float(), torch.zeros(7, 2),
        torch.tensor([penalty, 2 * penalty]), 300,
    )  # fmt: skip
    for column, own in enumerate((penalty, 2 * penalty)):
        kept = signs[:, column] != 0
        # scikit-learn: C * sum of losses + half the squared weights, the bias's hardly among them.
        peer = LinearSVC(
            C=1 / (own * kept.sum()), dual=False, tol=1e-10, max_iter=10_000, intercept_scaling=300
        ).fit(rows[kept], signs[kept, column])
        assert np.allclose(weights[:-1, column], peer.coef_[0], atol=2e-3)
        assert float(weights[-1, column]) == pytest.approx(peer.intercept_[0], abs=5e-3)


def test_each_class_gets_the_penalty_that_ranks_held_out_pictures_best(monkeypatch, devkit):
    random = np.random.default_rng(2)
    rows = torch.from_numpy(random.normal(size=(80, 12))).float()
    noisy = rows[:, :2].numpy() + [0.5, 2] * random.normal(size=(80, 2))
    truth = np.where(noisy > 0.7, 1, -1).astype(np.int8)
    kept, out = np.arange(50), np.arange(50, 80)
    given = options("voc_classification", devkit, penalties=[0.001, 0.1, 30.0])
    fits, fit = [], voc_classification.fit

    def spy(rows, signs, start, penalty, iterations):
        fits.append((len(rows), penalty.tolist()))
        return fit(rows, signs, start, penalty, iterations)

    monkeypatch.setattr(voc_classification, "fit", spy)
    _, best = voc_classification.choose(rows, truth, [(kept, out)], given)
    areas = {}
    for penalty in given.penalties:
        weights = fit(
            rows[kept], torch.from_numpy(truth[kept]).float(), torch.zeros(13, 2),
            torch.full((2,), penalty), 200,
        )  # fmt: skip
        ranked = voc_classification.curves(
            voc_classification.decide(rows[out], weights), truth[out]
        )
        areas[penalty] = [voc_metrics.area(curve) for curve in ranked]
    largest = sorted(areas, reverse=True)  # of equals the largest
    wanted = [max(largest, key=lambda penalty: areas[penalty][label]) for label in range(2)]
    assert fits[-1] == (80, pytest.approx(wanted))
    assert best == pytest.approx(np.mean(np.max([*areas.values()], 0)), abs=0.02)
    assert len(set(wanted)) == 2


def test_frozen_features_tell_the_drawn_classes_in_every_layer(backbone, devkit):
    found = judged("voc_classification", backbone, devkit)
    assert set(found) == {
        (metric, layer)
        for metric in ("map_11", "map_area", "validation_map")
        for layer in backbone.layers
    }
    assert min(found.values()) > 0.9  # by chance about 0.45


def test_the_layers_that_are_named_are_judged_alone(backbone, devkit):
    found = judged("voc_classification", backbone, devkit, layers=["conv2"])
    assert {layer for _, layer in found} == {"conv2"}
    with pytest.raises(ConfigError, match="layer 'conv9' is not one of conv1, conv2, conv3"):
        judged("voc_classification", backbone, devkit, layers=["conv9"])


def drawn_truth(random, number, shares):
    """Draws which of so many classes pictures show, (N, C) int8; some are difficult."""
    shown = random.random((number, len(shares))) < shares
    hard = random.random(shown.shape) < 0.1
    return np.where(hard, 0, np.where(shown, 1, -1)).astype(np.int8)


def few(truth, names=None, seed=0, **changes):
    names = names or [f"{row:06d}" for row in range(len(truth))]
    given = voc_classification.Options(
        **{**CLASSIFICATION, "path": "nowhere", "labels_per_class": [1, 3], "draws": 4, **changes}
    )
    return voc_classification.few_labels(names, truth, given, seed)


@pytest.mark.parametrize("seed", range(5))
def test_each_class_draws_n_pictures_that_show_it_and_so_many_times_n_that_do_not(seed):
    truth = drawn_truth(np.random.default_rng(seed), 60, (0.2, 0.4, 0.5, 0.3))
    found = few(truth, seed=seed)
    assert [one[:2] for one in found] == [(n, draw) for n in (1, 3) for draw in range(4)]
    for number, _, chosen in found:
        assert chosen.shape == truth.shape and (chosen == truth)[chosen != 0].all()
        assert ((chosen == 1).sum(0) == number).all()
        assert ((chosen == -1).sum(0) == 3 * number).all()  # 19 with VOC's 20 classes
    drawn = {chosen.tobytes() for _, _, chosen in found}
    assert len(drawn) == 8 and not drawn & {c.tobytes() for _, _, c in few(truth, seed=seed + 1)}


def test_the_pictures_that_are_drawn_depend_on_their_names_alone():
    random = np.random.default_rng(0)
    truth, names = drawn_truth(random, 50, (0.3, 0.4, 0.5)), [f"p{row}" for row in range(50)]
    order = random.permutation(50)
    mixed = few(truth[order], [names[row] for row in order])
    for (_, _, one), (_, _, two) in zip(few(truth, names), mixed, strict=True):
        assert np.array_equal(one[order], two)


def test_every_picture_that_shows_a_class_is_drawn_about_as_often():
    truth = np.where(np.arange(40)[:, None] < (10, 20), 1, -1).astype(np.int8)
    found = few(truth, labels_per_class=[2], draws=2000)
    counts = sum(chosen != 0 for _, _, chosen in found)
    for column, positives in enumerate((10, 20)):
        own, others = counts[:positives, column], counts[positives:, column]
        for part, size in ((own, positives), (others, 40 - positives)):
            mean = 2000 * 2 / size
            assert np.abs(part - mean).max() < 4.5 * (mean * (1 - 2 / size)) ** 0.5
    both = sum((chosen[:10] == 1).all(1).sum() for _, _, chosen in found)
    assert both == pytest.approx(2000 * 10 * 0.2 * 0.1, abs=100)  # classes draw by themselves


def test_a_class_with_fewer_pictures_gives_all_and_a_number_that_none_has_is_left_out(caplog):
    truth = np.where(np.arange(20)[:, None] < (2, 6, 0), 1, -1).astype(np.int8)
    found = few(truth, labels_per_class=[4, 7], draws=1)
    assert [number for number, _, _ in found] == [4] and "7 labels a class" in caplog.text
    assert (found[0][2] == 1).sum(0).tolist() == [2, 4, 0]
    assert (found[0][2] == -1).sum(0).tolist() == [8, 8, 8]
    assert few(truth, labels_per_class=[]) == few(truth, labels_per_class=None) == []


@pytest.mark.parametrize("number, width", [(1, 40), (1, 4), (2, 4), (3, 4), (6, 40), (6, 5)])
def test_a_few_labels_penalty_is_cross_validated_on_the_pictures_that_were_drawn(number, width):
    random = np.random.default_rng(number)
    truth = drawn_truth(random, 90, (0.3, 0.5, 0.4))
    rows = random.normal(size=(90, width)) + 0.7 * (truth @ random.normal(size=(3, width)))
    rows = torch.from_numpy(rows).float()
    changes = {"penalties": [0.01, 3.0, 30.0], "iterations": 300}
    given = voc_classification.Options(**CLASSIFICATION | {"path": "nowhere", **changes})
    _, _, chosen = few(truth, labels_per_class=[number], draws=1)[0]
    found = voc_classification.fit_few(rows, chosen, given)
    for label in range(3):
        shown, not_shown = (np.flatnonzero(chosen[:, label] == sign) for sign in (1, -1))
        folds = min(4, number)

        def fitted(kept, penalty, label=label):
            signs = torch.from_numpy(chosen[kept, label, None]).float()
            return voc_classification.fit(
                rows[kept], signs, torch.zeros(width + 1, 1), torch.tensor([penalty]), 300
            )

        areas = {penalty: [] for penalty in (30.0, 3.0, 0.01)}
        for penalty, fold in [(p, f) for p in areas for f in range(folds) if folds > 1]:
            # The first of the pictures stands in fold 1, the last fold's first place is 0.
            parts = [shown[(fold - 1) % folds :: folds], not_shown[(fold - 1) % folds :: folds]]
            out = np.concatenate(parts)
            kept = np.setdiff1d(np.concatenate([shown, not_shown]), out)
            ranked = voc_classification.decide(rows[out], fitted(kept, penalty))[:, 0].numpy()
            areas[penalty].append(voc_metrics.area(voc_metrics.ranking(ranked, chosen[out, label])))
        penalty = max(areas, key=lambda one: sum(areas[one]))  # of equals the largest
        wanted = fitted(np.sort(np.concatenate([shown, not_shown])), penalty)
        assert torch.allclose(found[:, label], wanted[:, 0], atol=2e-3)


def test_a_few_labels_tell_the_drawn_classes_and_each_draw_is_a_record(backbone, devkit):
    values = CLASSIFICATION | {"path": str(devkit), "labels_per_class": [1, 4], "draws": 3}
    found = evaluate.judge_one("voc_classification", values, backbone, crafted.data(), 0)
    small = [one for one in found if "draw" in one]
    assert [(r["layer"], r["labels_per_class"], r["draw"], r["metric"]) for r in small] == [
        (layer, number, draw, metric)
        for layer in backbone.layers
        for number in (1, 4)
        for draw in range(3)
        for metric in ("map_11", "map_area")
    ]
    means = {
        number: np.mean([r["value"] for r in small if r["labels_per_class"] == number])
        for number in (1, 4)
    }
    assert means[4] > max(0.8, means[1]) and means[1] > 0.6  # by chance about 0.45
    assert {one["n"] for one in small} == {15}
    every = judged("voc_classification", backbone, devkit)
    assert {(r["metric"], r["layer"]): r["value"] for r in found if "draw" not in r} == every


def test_every_network_sees_the_same_few_labels(backbone, devkit, monkeypatch):
    seen, draw = [], voc_classification.few_labels

    def spy(*arguments):
        found = draw(*arguments)
        seen.append([chosen.tobytes() for _, _, chosen in found])
        return found

    monkeypatch.setattr(voc_classification, "few_labels", spy)
    values = {"layers": ["conv1"], "labels_per_class": [2]}
    for network in (backbone, model.fresh(crafted.plugin(NETWORK, widths=[4, 8, 8]), 3).eval()):
        judged("voc_classification", network, devkit, **values)
    assert seen[0] == seen[1] and len(seen[0]) == 2


def turn_test_labels(root):
    for name in drawn_voc.COLOURS:
        path = root / f"VOC2007/ImageSets/Main/{name}_test.txt"
        turned = {" 1": "-1", "-1": " 1", " 0": " 0"}
        lines = path.read_text().splitlines()
        path.write_text("".join(f"{line[:-2]}{turned[line[-2:]]}\n" for line in lines))


def test_test_labels_decide_nothing(backbone, tmp_path, monkeypatch):
    root, made = drawn_voc.write(tmp_path, 30, 12, 42), []  # as many in test as in trainval
    spied = {name: getattr(voc_classification, name) for name in ("few_labels", "fit", "curves")}

    def few_labels(*arguments):
        found = spied["few_labels"](*arguments)
        made.append([chosen.tobytes() for _, _, chosen in found])
        return found

    def fit(*arguments):
        found = spied["fit"](*arguments)
        made.append(found.numpy().tobytes())
        return found

    def curves(scores, truth):
        made.append(scores.numpy().tobytes())
        return spied["curves"](scores, truth)

    for spy in (few_labels, fit, curves):
        monkeypatch.setattr(voc_classification, spy.__name__, spy)
    outcomes = []
    for _ in range(2):
        found = judged("voc_classification", backbone, root, labels_per_class=[1, 2])
        values = [v for (metric, _), v in found.items() if metric == "validation_map"]
        outcomes.append((values, [*made]))
        made.clear()
        turn_test_labels(root)
    assert outcomes[0] == outcomes[1] and found["map_area", "conv3"] < 0.7
    # One draw of each number and a machine with each penalty and a last one, ...
    assert len(outcomes[0][1]) > 3 * 2 * 2 * len(drawn_voc.COLOURS)


def test_fine_tuning_ranks_what_an_untrained_head_does_not(backbone, devkit):
    layers = {"layers": ["conv3"]}
    made = {**SCHEDULE, "epochs": 15}
    found = judged("voc_classification", backbone, devkit, **layers, finetune=made)
    still = judged("voc_classification", backbone, devkit, **layers, finetune=made | {"lr": 1e-12})
    assert found["tuned_map_11", None] > max(0.9, still["tuned_map_11", None] + 0.2)


def test_fine_tuning_sums_over_the_classes_and_divides_by_the_pictures(
    backbone, devkit, monkeypatch
):
    """As for the learning rates that are usual for it; unknown classes of a picture count 0."""
    jobs = []
    monkeypatch.setattr(voc_training, "train", jobs.append)
    given = options("voc_classification", devkit, finetune=SCHEDULE)
    names = {"trainval": [f"{row:06d}" for row in range(30)], "test": []}
    truth = np.random.default_rng(0).integers(-1, 2, (30, 20)).astype(np.int8)
    with pytest.raises(ValueError, match="non-empty"):  # there is no picture of test to score
        voc_classification.tuned(
            backbone, devkit / "VOC2007", names, truth, crafted.data(), given, 0
        )
    (job,) = jobs
    rows = [3, 8, 21, 0]
    batch = [job.load(row, 0) for row in rows]
    pixels = torch.stack([pixels for pixels, _ in batch])
    scores = job.network(backbone.normalise(pixels)).double()
    each = torch.log1p(torch.exp(-torch.from_numpy(truth[rows]).double() * scores))
    each = each[torch.from_numpy(truth[rows]) != 0]
    found = float(job.loss(batch).detach())
    assert found == pytest.approx(float(each.sum().detach()) / 4, rel=1e-5)


def test_pictures_may_be_read_in_several_batches(backbone, devkit, monkeypatch):
    root, given = devkit / "VOC2007", options("voc_classification", devkit, finetune=SCHEDULE)
    names = {"trainval": ["000000"], "test": [f"{row:06d}" for row in range(7)]}
    monkeypatch.setattr(voc_training, "train", lambda job: job.network.eval())
    found = []
    for batch in (64, 3):
        monkeypatch.setattr(voc_classification, "BATCH", batch)
        rows = voc_classification.features(backbone, root, names["test"], ["conv2"], given)
        truth = np.ones((1, 20), np.int8)
        guess = voc_classification.tuned(backbone, root, names, truth, crafted.data(), given, 0)
        found.append((rows["conv2"], guess))
    for whole, parts in zip(*found, strict=True):
        assert len(whole) == 7 and torch.allclose(whole, parts, atol=1e-5)


# ---------------------------------------------------------------------------- detection


def test_a_trained_detector_finds_what_an_untrained_one_does_not(backbone, devkit):
    found = judged("voc_detection", backbone, devkit, training={**SCHEDULE, "epochs": 16})
    still = judged(
        "voc_detection", backbone, devkit, training={**SCHEDULE, "epochs": 1, "lr": 1e-9}
    )
    for metric in ("map_11", "map_area"):
        assert found[metric, "conv3"] > 0.5 > 0.1 > still[metric, "conv3"]


def test_a_mirrored_picture_has_its_boxes_where_its_objects_are(devkit):
    root = devkit / "VOC2007"
    for row in range(4):
        objects = voc.objects(root, f"{row:06d}")
        pixels = voc_detection.picture(root, f"{row:06d}", objects)
        for mirrored in (False, True):
            shown, target = voc_detection.shown(pixels, objects, mirrored)
            assert torch.equal(target["labels"], torch.from_numpy(objects.labels) + 1)
            for box, label in zip(target["boxes"].int().tolist(), objects.labels, strict=True):
                inner = shown[:, box[1] + 2 : box[3] - 2, box[0] + 2 : box[2] - 2]
                colour = np.array(drawn_voc.COLOURS[voc.CLASSES[label]]) / 255
                assert np.abs(inner.mean((1, 2)).numpy() - colour).max() < 0.05


def test_difficult_objects_are_not_taught(devkit):
    objects = voc.objects(devkit / "VOC2007", "000006")  # two difficult ones
    assert objects.difficult.all() and len(objects.boxes) == 2
    _, target = voc_detection.shown(torch.zeros(3, 48, 64), objects, True)
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)


def test_the_detector_sees_what_the_backbone_expects(backbone, devkit):
    network = voc_detection.build(backbone, options("voc_detection", devkit)).eval()
    pixels = torch.from_numpy(crafted.scenes(1, 64))
    given = network.transform([pixels[0].float() / 255])[0].tensors
    wanted = torch.nn.functional.interpolate(
        backbone.normalise(pixels), (48, 48), mode="bilinear", align_corners=False
    )
    assert torch.allclose(given[..., :48, :48], wanted, atol=1e-4)
    assert torch.allclose(network.backbone(given), backbone(given), atol=1e-5)


ALEXNET = {"name": "alexnet", "stride": 4, "norm": "batch"}
VGG = {"name": "torchvision", "model": "vgg11", "last": None}


def smooth(backbone):
    """Makes all weights positive and pools by means: gradients then show what a cell sees."""
    for part in list(backbone.modules()):
        if isinstance(part, torch.nn.Conv2d):
            torch.nn.init.constant_(part.weight, 1 / part.weight[0].numel())
            if part.bias is not None:
                torch.nn.init.zeros_(part.bias)
        for name, child in list(part.named_children()):
            if isinstance(child, torch.nn.MaxPool2d):
                shape = child.kernel_size, child.stride, child.padding, child.ceil_mode
                setattr(part, name, torch.nn.AvgPool2d(*shape, count_include_pad=False))
    return backbone.eval()


@pytest.mark.parametrize(
    "network, layers",
    [
        (NETWORK, ["conv1", "conv3"]),
        ({"name": "residual", "widths": [8, 8], "strides": [2, 2], "blocks": 1}, ["block2"]),
        (ALEXNET, ["conv1", "conv2", "conv5"]),
        ({"name": "torchvision", "model": "alexnet", "last": None}, ["conv5"]),
        (VGG, ["conv5_2"]),
    ],
)
def test_a_cell_lies_where_what_it_sees_has_its_middle(network, layers):
    backbone = smooth(model.fresh(crafted.plugin(network), 0))
    pictures = torch.ones(1, 3, 320, 320, requires_grad=True)
    for layer in layers:
        maps, cell = backbone(pictures, layer), None
        cell = maps.shape[2] // 2
        (seen,) = torch.autograd.grad(maps[0, :, cell, cell].sum(), pictures)
        rows = seen.abs().sum((0, 1, 3))
        middle = float((rows * torch.arange(320)).sum() / rows.sum())
        said = voc_training.first_centre(backbone, layer)
        said += cell * voc_training.stride(backbone, layer)
        assert said == pytest.approx(middle, abs=0.2), layer


@pytest.mark.parametrize("network, before", [(ALEXNET, 17), (VGG, 8), (NETWORK, 0)])
def test_regions_are_pooled_from_where_they_lie(network, before, devkit):
    """Region pooling and anchors take cell i to lie at i strides from the edge of the picture."""
    backbone = model.fresh(crafted.plugin(network), 0)
    built = voc_detection.build(backbone, options("voc_detection", devkit)).eval()
    assert built.backbone.before == before
    pictures = torch.randn(1, 3, 320, 384)
    with torch.no_grad():
        maps = built.backbone(pictures)
        shifted = torch.nn.functional.pad(pictures, (before, 0, before, 0))
        assert torch.equal(maps, backbone.eval()(shifted))
    sides = [side // cells for side, cells in zip((320, 384), maps.shape[2:], strict=True)]
    assert sides == 2 * [voc_training.stride(backbone, backbone.layers[-1])]


def test_as_many_regions_are_ranked_as_are_kept(backbone, devkit):
    for kept, ranked in ((50, (12_000, 6_000)), (13_000, (13_000, 13_000))):
        rpn = voc_detection.build(backbone, options("voc_detection", devkit, proposals=kept)).rpn
        assert (rpn._pre_nms_top_n["training"], rpn._pre_nms_top_n["testing"]) == ranked
        assert set(rpn._post_nms_top_n.values()) == {kept}


@pytest.mark.parametrize(
    "low, high, shape", [(48, 64, (48, 64)), (40, 64, (40, 60)), (64, 96, (66, 64))]
)
def test_regions_of_small_pictures_are_pooled_at_the_stride_of_the_map(
    backbone, devkit, low, high, shape
):
    """Pictures are filled up to 32 pixels, so edge and map alone do not tell the stride."""
    given = options("voc_detection", devkit, min_size=low, max_size=high)
    network = voc_detection.build(backbone, given).eval()
    with torch.no_grad():
        network([torch.rand(3, *shape)])
    assert network.roi_heads.box_roi_pool.scales == [1 / 8]


def test_sizes_anchors_and_suppression_are_those_that_are_given(backbone, devkit):
    given = options("voc_detection", devkit, anchors=[16, 32], ratios=[0.25, 4.0])
    network = voc_detection.build(backbone, given)
    for shape, seen in (((3, 30, 40), (48, 64)), ((3, 48, 200), (15, 64))):
        assert network.transform([torch.zeros(shape)])[0].image_sizes == [seen]
    (cells,) = network.rpn.anchor_generator.cell_anchors
    sides = (cells[:, 2:] - cells[:, :2]).tolist()
    assert sides == [[32, 8], [64, 16], [8, 32], [16, 64]]  # width, height
    assert network.roi_heads.nms_thresh == 0.3


def test_a_layer_whose_stride_is_no_power_of_two_is_refused(devkit):
    odd = model.fresh(crafted.plugin(NETWORK, strides=[2, 3, 1]), 0)
    with pytest.raises(ConfigError, match="layer: expected .*, found conv3 with 6.0; take another"):
        judged("voc_detection", odd, devkit)
    voc_detection.check_stride(odd, "conv1")
    coarse = model.fresh(crafted.plugin(NETWORK, strides=[4, 4, 4]), 0)  # 96 px make 2 cells of 64
    with pytest.raises(ConfigError, match="found conv3 with 64.0"):
        voc_detection.check_stride(coarse, None)
    alexnet = crafted.plugin({"name": "torchvision", "model": "alexnet", "last": None})
    voc_detection.check_stride(model.fresh(alexnet, 0), None)  # 16, though 224 px give 13 x 13


def test_an_annotation_of_another_picture_is_refused(backbone, tmp_path):
    root = drawn_voc.write(tmp_path)
    drawn_voc.write_picture(root / "VOC2007", "000003", [], (60, 48))
    with pytest.raises(DataError, match="000003 has 60 x 48 pixels, its annotation .* 64 x 48"):
        judged("voc_detection", backbone, root)


# ---------------------------------------------------------------------------- segmentation


def test_a_trained_network_segments_what_an_untrained_one_does_not(backbone, devkit):
    found = judged("voc_segmentation", backbone, devkit)
    still = judged("voc_segmentation", backbone, devkit, training={**SCHEDULE, "lr": 1e-9})
    assert found["miou", "conv3"] > 0.6 and still["miou", "conv3"] < 0.2


def test_additional_masks_are_trained_on_where_the_options_name_them(backbone, tmp_path):
    root = drawn_voc.write(tmp_path)
    year = root / "VOC2012"
    (year / "SegmentationClassAug").mkdir()
    lines = (year / "ImageSets/Segmentation/train.txt").read_text() + "000018\n"
    (year / "ImageSets/Segmentation/trainaug.txt").write_text(lines)
    for name in lines.split():  # in grey, as they are passed around; background alone
        Image.new("L", (64, 48)).save(year / f"SegmentationClassAug/{name}.png")
    more = {"train": "trainaug", "masks": "SegmentationClassAug"}
    found = judged("voc_segmentation", backbone, root, **more)
    assert found["miou", "conv3"] < 0.3  # it has never been shown an object


@pytest.mark.parametrize("crop", [40, 48, 90])
def test_a_square_of_a_picture_has_its_mask_in_the_same_place(devkit, crop):
    image, mask = voc_segmentation.pair(devkit / "VOC2012", "000001", "SegmentationClass")
    given = options("voc_segmentation", devkit, crop=crop, scales=[0.7, 1.4])
    ground, seen = np.array([10, 20, 30], np.uint8), set()
    for row in range(40):
        chance = np.random.default_rng(row).random(4).tolist()
        square, truth = voc_segmentation.view(image, mask, given, ground, chance)
        assert square.shape == (3, crop, crop) and truth.shape == (crop, crop)
        outside = (square == ground[:, None, None]).all(0)
        assert (truth[outside] == voc.VOID).all()
        coloured = (np.ptp(square.astype(int), axis=0) > 100) & ~outside
        known = ~outside & (truth != voc.VOID)
        assert (coloured == (truth > 0))[known].mean() > 0.98
        seen.add(square.tobytes())
    assert len(seen) > 30


def test_scales_that_fall_are_refused(devkit):
    with pytest.raises(ConfigError, match=r"scales: expected .lowest, highest., found .2.0, 1.0"):
        options("voc_segmentation", devkit, scales=[2, 1])
    options("voc_segmentation", devkit, scales=[1, 1])


def test_a_picture_keeps_its_sides_unless_it_is_mirrored(devkit):
    image, mask = voc_segmentation.pair(devkit / "VOC2012", "000001", "SegmentationClass")
    given = options("voc_segmentation", devkit, crop=64, scales=[1.0, 1.0])
    ground = np.zeros(3, np.uint8)
    one, truth = voc_segmentation.view(image, mask, given, ground, [0.3, 0.0, 0.0, 0.9])
    assert np.array_equal(one[:, :48], np.asarray(image).transpose(2, 0, 1))
    assert np.array_equal(truth[:48], mask) and (truth[48:] == voc.VOID).all()
    two, mirrored = voc_segmentation.view(image, mask, given, ground, [0.3, 0.0, 0.0, 0.1])
    assert np.array_equal(two, one[..., ::-1]) and np.array_equal(mirrored, truth[..., ::-1])


def test_a_square_of_void_alone_gives_no_loss_but_a_finite_one(backbone, tmp_path):
    root = drawn_voc.write(tmp_path)
    for path in (root / "VOC2012/SegmentationClass").glob("00000*.png"):
        drawn_voc.write_mask(path, np.full((48, 64), voc.VOID, np.uint8))
    found = judged("voc_segmentation", backbone, root, training=SCHEDULE | {"batch": 1})
    assert found["miou", "conv3"] > 0


def test_the_loss_is_the_mean_over_pixels_that_are_known_beside_the_mean_colour(
    backbone, devkit, monkeypatch
):
    backbone = copy.deepcopy(backbone)
    backbone.mean.copy_(torch.tensor([0.3, 0.5, 0.6]))
    job = job_of("voc_segmentation", backbone, devkit, monkeypatch, crop=90)
    batch = [job.load(row, 0) for row in range(3)]
    pixels, wanted = (torch.from_numpy(np.stack(part)) for part in zip(*batch, strict=True))
    given = backbone.normalise(pixels)
    outside = (wanted == voc.VOID).all(2)  # whole rows, below or above the picture
    assert outside.any() and given.permute(0, 2, 3, 1)[outside].abs().max() < 0.02
    each = torch.nn.functional.cross_entropy(
        job.network(given), wanted.long(), ignore_index=voc.VOID
    )
    assert float(job.loss(batch).detach()) == pytest.approx(float(each.detach()), rel=1e-5)


def test_a_layer_of_one_cell_is_refused():
    """Such as fully connected ones: all pixels of a picture would get one class."""
    parts = {"conv1": torch.nn.Conv2d(3, 4, 3, 2, 1), "fc": torch.nn.AdaptiveAvgPool2d(1)}
    network = Backbone(parts).eval()
    with pytest.raises(ConfigError, match="layer: expected .* that of fc does not.* of conv1"):
        voc_training.FCN(voc_training.Trunk(network, None, 48, schedule()), [], 5)
    voc_training.FCN(voc_training.Trunk(network, "conv1", 48, schedule()), [], 5)


def schedule(**changes):
    return config.Schedule(**{**SCHEDULE, **changes})


def test_scores_of_earlier_layers_are_added_on_the_way_up(backbone):
    trunk = voc_training.Trunk(backbone, None, 48, schedule())
    network = voc_training.FCN(trunk, ["conv1", "conv3", "conv2"], 5).eval()
    pictures = torch.randn(2, 3, 45, 50)

    def up(scores, size):  # cell i of each grid lies at twice the pixel of cell i of the finer one
        sides = zip(size, scores.shape[-2:], strict=True)
        grid = [torch.arange(n) / step / (side - 1) * 2 - 1 for n, side in sides]
        grid = torch.stack(torch.meshgrid(*grid, indexing="ij"), -1).flip(-1).expand(2, -1, -1, -1)
        return torch.nn.functional.grid_sample(
            scores, grid, align_corners=True, padding_mode="border"
        )

    step = 2
    with torch.no_grad():
        alone = voc_training.FCN(trunk, [], 5).eval()
        alone.heads["conv3"].load_state_dict(network.heads["conv3"].state_dict())
        steps = up(up(up(alone.heads["conv3"](trunk(pictures)), (12, 13)), (23, 25)), (45, 50))
        assert torch.allclose(network(pictures), steps, atol=1e-5)  # added ones begin as zeros
        step = 8
        whole = up(alone.heads["conv3"](trunk(pictures)), (45, 50))
        assert torch.allclose(alone(pictures), whole, atol=1e-5)
        step = 2
        for head in network.heads.values():
            torch.nn.init.normal_(head.weight)
            torch.nn.init.normal_(head.bias)
        scored = {
            layer: network.heads[layer](maps)
            for layer, maps in trunk.maps(pictures, backbone.layers).items()
        }
        expected = up(scored["conv3"], (12, 13)) + scored["conv2"]
        expected = up(up(expected, (23, 25)) + scored["conv1"], (45, 50))
        assert torch.allclose(network(pictures), expected, atol=1e-3)


# ---------------------------------------------------------------------------- training


def test_a_trunk_ends_at_its_layer_and_keeps_the_statistics_of_its_norms(backbone):
    trunk = voc_training.Trunk(backbone, "conv2", 48, schedule()).train()
    assert trunk.backbone.layers == ["conv1", "conv2"] and trunk.out_channels == 32
    pictures = torch.randn(2, 3, 48, 48)
    assert torch.equal(trunk(pictures), backbone(pictures, "conv2"))  # as in use
    before = {name: value.clone() for name, value in trunk.named_buffers()}
    trunk(pictures).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in trunk.named_buffers())
    assert all(weight.grad is not None for weight in trunk.parameters())


def test_a_half_precise_trunk_gives_float32_close_to_a_precise_one(backbone):
    pictures = torch.randn(2, 3, 48, 48)
    exact, half = (
        voc_training.Trunk(backbone, None, 48, schedule(precision=kind))(pictures)
        for kind in ("float32", "bfloat16")
    )
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().max() < 0.1 * exact.abs().max()


def toy(names, state=None, seed=0, loss=None, **changes):
    """Gives a job that fits one number, and notes which pictures it was shown."""
    network, shown = torch.nn.Linear(1, 1), []

    def load(row, epoch):
        return epoch, row

    def fit(batch):
        shown.append(batch)
        return network(torch.ones(1, 1)).square().mean()

    settings = schedule(**{"epochs": 3, "batch": 4, **changes})
    return voc_training.Job(
        network, names, load, loss or fit, settings, seed, "toy", state, {}
    ), shown


def test_each_epoch_shows_every_picture_once_in_an_order_of_its_own():
    job, shown = toy([f"p{row}" for row in range(12)])
    voc_training.train(job)
    seen = [one for batch in shown for one in batch]
    epochs = [[row for epoch, row in seen if epoch == number] for number in range(3)]
    assert all(sorted(order) == list(range(12)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 3
    again, other = toy(job.names), toy(job.names, seed=1)
    for one, _ in (again, other):
        voc_training.train(one)
    assert again[1] == shown and other[1] != shown


def test_pictures_that_fill_no_step_are_left_for_other_epochs():
    job, shown = toy([f"p{row}" for row in range(14)])
    voc_training.train(job)
    assert [len(batch) for batch in shown] == [4] * 9
    epochs = [{row for batch in shown[at : at + 3] for _, row in batch} for at in (0, 3, 6)]
    assert [len(rows) for rows in epochs] == [12] * 3 and len(set.union(*epochs)) == 14


@pytest.mark.parametrize("name", ALL)
def test_a_picture_is_mirrored_in_half_of_its_epochs(name, backbone, devkit, monkeypatch):
    changes = {
        "voc_classification": {"finetune": SCHEDULE, "layers": ["conv1"]}, "voc_detection": {},
        "voc_segmentation": {"crop": 64, "scales": [1.0, 1.0]},  # as wide as the picture
    }  # fmt: skip
    job = job_of(name, backbone, devkit, monkeypatch, **changes[name])
    views = [np.asarray(job.load(1, epoch)[0], np.float64).sum(1) for epoch in range(60)]
    kept, turned = (
        [np.allclose(view, one) for view in views] for one in (views[0], views[0][:, ::-1])
    )
    assert sum(kept) + sum(turned) == 60 and 15 < sum(kept) < 45


def test_a_step_reads_its_loss_once():
    class Reads(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.number += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **kwargs or {})

    job, _ = toy(["a", "b", "c", "d"], batch=2, epochs=3)
    with Reads() as reads:
        voc_training.train(job)
    assert reads.number == 6


def test_the_learning_rate_follows_the_schedule():
    changes = {"optimiser": "sgd", "momentum": 0.0, "weight_decay": 0.0, "lr": 0.1, "epochs": 2}
    changes |= {"schedule": "step", "milestones": [0.5], "warmup": 0.0, "batch": 2}
    job, _ = toy(["a", "b", "c", "d"], **changes)
    bias, seen = job.network.bias, []

    def loss(batch):  # its gradient is 1
        seen.append(float(bias.detach()))
        return bias.sum() + 0 * job.network.weight.sum()

    job.loss = loss
    voc_training.train(job)
    steps = -np.diff([*seen, float(bias.detach())])
    assert steps == pytest.approx([0.1, 0.1, 0.01, 0.01], abs=1e-5)


def test_a_training_that_was_killed_goes_on_from_a_state_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(resume.Writer, "due", lambda writer: True)
    names = [f"p{row}" for row in range(12)]
    whole, begun, again = toy(names), toy(names, tmp_path), toy(names, tmp_path)
    for job, _ in (begun, again):
        job.network.load_state_dict(whole[0].network.state_dict())
    learn = begun[0].loss

    def loss(batch):
        if len(begun[1]) == 5:
            raise Begun
        return learn(batch)

    begun[0].loss = loss
    voc_training.train(whole[0])
    with pytest.raises(Begun):
        voc_training.train(begun[0])
    voc_training.train(again[0])
    assert begun[1] == whole[1][:5] and again[1] == whole[1][5:]
    assert torch.equal(again[0].network.weight, whole[0].network.weight)


def test_what_a_network_draws_depends_on_seed_and_step_alone():
    drawn = []

    def loss(batch):
        drawn.append(float(torch.rand(())))
        return torch.zeros((), requires_grad=True)

    for state, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(state)
        voc_training.train(toy(["a", "b"], loss=loss, seed=seed)[0])
    assert drawn[:3] == drawn[3:6] and len({*drawn}) == 6


def test_a_loss_that_is_not_finite_names_step_and_pictures():
    job, _ = toy(["a", "b"], loss=lambda batch: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(DataError, match=r"toy: the loss is nan at step 1 .*'[ab]', '[ab]'"):
        voc_training.train(job)


@pytest.mark.parametrize("name", ALL)
def test_no_evaluation_changes_the_backbone_or_depends_on_the_one_before(name, backbone, devkit):
    changes = {"training": {**SCHEDULE, "epochs": 1}}
    if name == "voc_classification":
        changes = {"finetune": changes["training"]}
    before, found = judge.weights_digest(backbone), []
    for state in (1, 2):
        torch.manual_seed(state)
        found.append(judged(name, backbone, devkit, **changes))
    assert found[0] == found[1] and judge.weights_digest(backbone) == before


@pytest.mark.parametrize("name", ALL)
def test_an_interrupted_evaluation_goes_on_where_it_was(
    name, backbone, devkit, tmp_path, monkeypatch
):
    write_data(tmp_path / "data", crafted.data())
    model.save(tmp_path / "s0", backbone, crafted.plugin(NETWORK), {})
    part = "finetune" if name == "voc_classification" else "training"
    values = {**ALL[name], "path": str(devkit), part: {**SCHEDULE, "epochs": 2}}
    arguments = argparse.Namespace(
        model=[tmp_path / "s0"], seeds=[0], describe={"dataset": "discs"}, state=None,
        evaluations={name: values}, data=tmp_path / "data", output=tmp_path / "whole.json",
    )  # fmt: skip
    made, load, stop_at = [], voc_training._check_finite, None

    def spy(job, loss, number, rows):
        made.append((number, loss))
        if number == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return load(job, loss, number, rows)

    monkeypatch.setattr(voc_training, "_check_finite", spy)
    evaluate.run(arguments)
    whole = [*made]
    made.clear()
    stop_at = len(whole) // 2 + 1
    arguments.state, arguments.output = tmp_path / "state", tmp_path / "again.json"
    with pytest.raises(Interrupted, match=f"stopped at step {stop_at}"):
        evaluate.run(arguments)
    stop_at = None
    evaluate.run(arguments)
    assert made == whole  # no step twice, and the very same losses
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("whole.json", "again.json"))
    assert one["records"] == two["records"] and not arguments.state.exists()
    assert {record["dataset"][:3] for record in one["records"]} == {"VOC"}


@pytest.mark.parametrize(
    "name, taught, judging",
    [
        ("voc_classification", "Main/train", "Main/val"),
        ("voc_classification", "Main/trainval", "Main/test"),
        ("voc_detection", "Main/trainval", "Main/test"),
        ("voc_segmentation", "Segmentation/train", "Segmentation/val"),
    ],
)
def test_no_picture_that_judges_is_learned_from(name, taught, judging, backbone, tmp_path):
    root = drawn_voc.write(tmp_path, 4, 2, 3)
    lists = root / ("VOC2012" if name == "voc_segmentation" else "VOC2007") / "ImageSets"
    with open(lists / f"{taught}.txt", "a") as file:
        file.write((lists / f"{judging}.txt").read_text().splitlines()[0] + "\n")
    with pytest.raises(DataError, match=f"{taught}.txt: expected .* found 1 that .*{judging}.txt"):
        judged(name, backbone, root)


@pytest.mark.parametrize("name", ALL)
def test_a_devkit_that_is_not_there_is_named_when_the_evaluation_runs(name, backbone, tmp_path):
    with pytest.raises(ConfigError, match="path: expected a PASCAL VOC devkit with VOC20"):
        judged(name, backbone, tmp_path / "nothing")


def test_the_preset_gives_each_evaluation_a_job_whose_epochs_follow_effort():
    root = Path(__file__).parent.parent
    overlay = config.read(root / "presets" / "voc.yaml") | {"effort": 0.1}
    jobs = workflow.evaluation_jobs(config.resolve(root, overlay), False)
    assert {"voc_classification", "voc_detection", "voc_segmentation"} <= jobs.keys()
    assert jobs["voc_detection"]["voc_detection"]["training"]["epochs"] == 6
    assert jobs["voc_classification"]["voc_classification"]["finetune"]["epochs"] == 10
    few = [
        jobs["voc_classification"]["voc_classification"][k] for k in ("labels_per_class", "draws")
    ]
    assert few == [[1, 4, 16], 5]


# ---------------------------------------------------------------------------- machines


def test_classes_that_no_held_out_picture_shows_do_not_count(monkeypatch):
    truth = np.where(np.arange(40)[:, None] % (2, 40) == 0, 1, -1).astype(np.int8)  # one shows 1
    rows = torch.from_numpy(truth[:, :1].astype(np.float32)) * torch.ones(1, 3)
    given = voc_classification.Options(
        path="", size=32, layers=[], map=1, penalties=[0.1], iterations=50, labels_per_class=[],
        draws=1, finetune=None,
    )  # fmt: skip
    splits = [(np.arange(20), np.arange(20, 40))]
    assert voc_classification.choose(rows, truth, splits, given)[1] == pytest.approx(1)


def test_a_feature_that_never_changes_stays_finite():
    rows, _, std = voc_classification.standardised(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    assert torch.isfinite(rows).all() and std[1] > 0


def test_classification_chooses_on_val_and_shows_test_as_train_was(backbone, devkit, monkeypatch):
    chosen, shown = [], []

    def choose(rows, truth, splits, given):
        chosen.append((rows, splits))
        return torch.zeros(rows.shape[1] + 1, truth.shape[1]), 0.5

    def decide(rows, weights):
        shown.append(rows)
        return torch.zeros(len(rows), weights.shape[1])

    monkeypatch.setattr(voc_classification, "choose", choose)
    monkeypatch.setattr(voc_classification, "decide", decide)
    given = options("voc_classification", devkit, layers=["conv3"], labels_per_class=[])
    found = voc_classification.evaluate(backbone, crafted.data(), given, 0)
    root = devkit / "VOC2007"
    names = {
        split: voc.names(root, "Main", split) for split in ("train", "val", "trainval", "test")
    }
    ((rows, ((kept, out),)),) = chosen
    assert [names["trainval"][row] for row in kept] == names["train"]
    assert [names["trainval"][row] for row in out] == names["val"]
    assert [one["n"] for one in found if one["metric"] == "validation_map"] == [len(names["val"])]
    seen, unseen = (
        voc_classification.features(backbone, root, names[split], ["conv3"], given)["conv3"]
        for split in ("trainval", "test")
    )
    assert torch.allclose(rows * seen.std(0) + seen.mean(0), seen, atol=1e-4)
    assert torch.allclose(shown[0] * seen.std(0) + seen.mean(0), unseen, atol=1e-4)
