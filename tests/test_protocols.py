"""The paper's probes of every layer and VISSL's SVMs: pooling, frozen layers, few labels."""

import dataclasses

import crafted
import numpy as np
import pytest
import torch

from kt import config
from kt.core import frozen, judge, model, pooling, supervised, svm, training
from kt.core.step import ConfigError
from kt.evaluations import linear, nonlinear
from kt.evaluations import svm as machines

LINEAR = {"map": None, "dimensions": 70, "penalties": [0.03], "iterations": 20}
SVM = {
    "map": None, "dimensions": 40, "costs": [1, 100], "positive_weight": 2, "iterations": 100,
    "labels_per_class": [2, 4], "draws": 3,
}  # fmt: skip
NONLINEAR = {
    "images": 600, "task": crafted.LABELS | {"flip": 0.5},
    "training": crafted.TRAINING | {"batch": 10, "lr": 0.03},
}  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return crafted.data()


@pytest.fixture
def backbone():
    return model.fresh(crafted.plugin(crafted.PLAIN), 0).eval()


def value(records, metric, **fields):
    found = [r["value"] for r in records if r["metric"] == metric and fields.items() <= r.items()]
    assert len(found) == 1
    return found[0]


# ---------------------------------------------------------------------------- pooling


def test_alexnets_layers_get_the_grids_of_deepclusters_probes():
    maps = {96: 55, 256: 27, 384: 13}
    edges = {channels: pooling.nearest_edge(channels, maps[channels], 9000) for channels in maps}
    assert {channels: channels * edge**2 for channels, edge in edges.items()} == {
        96: 9600, 256: 9216, 384: 9600,
    }  # fmt: skip


@pytest.mark.parametrize("channels, edge, wanted, found", [
    (8, 4, 9000, 4), (512, 7, 1, 1), (10, 9, 40, 2), (10, 9, 66, 3), (10, 9, 64, 2),
])  # fmt: skip
def test_the_grid_is_the_nearest_that_the_map_can_give(channels, edge, wanted, found):
    assert pooling.nearest_edge(channels, edge, wanted) == found


@pytest.mark.parametrize("name, values", [("linear", LINEAR), ("svm", SVM)])
@pytest.mark.parametrize("both", [{"map": None, "dimensions": None}, {"map": 1, "dimensions": 9}])
def test_a_map_or_dimensions_are_given_not_both(name, values, both):
    with pytest.raises(ConfigError, match=f"evaluations.{name}: .*one of map and dimensions"):
        config.options("evaluations", name, values | both, f"evaluations.{name}")


def test_each_layer_is_pooled_to_about_so_many_dimensions(backbone, data):
    # conv1 gives 8 x 8 x 8, conv2 16 x 4 x 4: 8 * 9 = 72 and 16 * 4 = 64 are nearest to 70.
    found = list(pooling.probes(backbone, data, linear.Options(**LINEAR)))
    assert [layer for layer, _, _ in found] == backbone.layers
    for (layer, train, test), edge in zip(found, (3, 2), strict=True):
        for rows, split in ((train, data.train), (test, data.test)):
            alone = backbone.features(split.pack.images, layer, edge)
            assert torch.allclose(rows, alone, atol=1e-5)


def test_the_linear_probe_judges_every_layer_at_its_dimensions(backbone, data):
    found = linear.evaluate(backbone, data, linear.Options(**LINEAR), 0)
    for layer in backbone.layers:
        assert value(found, "top1", layer=layer) > 0.9


# ---------------------------------------------------------------------------- frozen layers


def trained(backbone, data, layer, seed=0):
    """Trains what is above a layer as `nonlinear.run` does, and gives the network."""
    made = []

    def spy(job):
        made.append(job.network)
        return train(job)

    train = training.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervised.training, "train", spy)
        nonlinear.run(backbone, data, layer, nonlinear.Options(**NONLINEAR), seed)
    return made[0].backbone


def test_layers_up_to_the_frozen_one_stay_and_all_above_starts_anew(backbone, data):
    with torch.no_grad():  # statistics that training would change
        for name, buffer in backbone.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.3)
    found = trained(backbone, data, "conv1")
    first, second = (backbone.stages[name].state_dict() for name in backbone.layers)
    for name, kept in first.items():
        assert torch.equal(found.stages["conv1"].stage.state_dict()[name], kept)
    assert all(w.grad is None for w in found.stages["conv1"].parameters())
    for name, before in second.items():
        assert not torch.equal(found.stages["conv2"].state_dict()[name], before)


def test_frozen_layers_give_the_same_maps_in_the_midst_of_training(backbone):
    network = frozen.fresh_above(backbone, "conv1").train()
    images = network.normalise(torch.from_numpy(crafted.noise(6, 16)))
    with torch.no_grad():
        assert torch.equal(network(images, "conv1"), backbone(images, "conv1"))
    assert network.stages["conv2"].training and not network.stages["conv1"].stage[1].training
    network(images).sum().backward()
    assert [weight.grad is None for weight in network.parameters()] == [True] * 3 + [False] * 3


def test_weights_above_depend_on_the_seed_and_are_not_those_the_network_began_with(
    backbone, data, monkeypatch
):
    other, starts = model.fresh(crafted.plugin(crafted.PLAIN), 7).eval(), []
    monkeypatch.setattr(
        supervised, "train",
        lambda network, *_, **__: starts.append(network.backbone.stages["conv2"][0].weight),
    )  # fmt: skip
    for seed, network in ((0, backbone), (0, other), (1, other)):
        nonlinear.run(network, data, "conv1", nonlinear.Options(**NONLINEAR), seed)
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[1], starts[2])
    assert not torch.equal(starts[0], backbone.stages["conv2"][0].weight)  # of seed 0, too


def test_the_nonlinear_protocol_tells_every_layer_and_learns_easy_classes(backbone, data):
    found = nonlinear.evaluate(backbone, data, nonlinear.Options(**NONLINEAR), 0)
    for layer in backbone.layers:
        assert value(found, "top1", layer=layer) > 0.6  # chance: .33


# ---------------------------------------------------------------------------- SVMs


def overlapping(number=150, dimensions=6):
    random = np.random.default_rng(0)
    labels = np.arange(number) % 3
    rows = random.normal(size=(number, dimensions)) + np.eye(dimensions)[labels]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), labels


@pytest.mark.parametrize("dimensions", [6, 200])  # 200: more than the 150 rows
@pytest.mark.parametrize("cost, positive", [(0.01, 1), (1, 2), (30, 0.5)])
def test_the_svms_are_scikit_learns(cost, positive, dimensions):
    from sklearn.svm import LinearSVC

    rows, labels = overlapping(dimensions=dimensions)
    signs = svm.signs(torch.from_numpy(labels), 3)
    start, given = torch.zeros(dimensions + 1, 3), torch.from_numpy(rows).float()
    weights = svm.fit(given, signs, start, cost, positive, 500)
    for number in range(3):
        peer = LinearSVC(
            C=cost, dual=False, tol=1e-9, max_iter=10000, class_weight={True: positive}
        ).fit(rows, labels == number)
        expected = np.append(peer.coef_[0], peer.intercept_)
        assert np.abs(weights[:, number].numpy() - expected).max() < 5e-3 * np.abs(expected).max()
        decisions = svm.decide(given, weights)[:, number].numpy()
        assert np.allclose(decisions, peer.decision_function(rows), atol=2e-2)


def test_images_that_do_not_count_for_a_class_leave_it_as_without_them():
    rows, labels = (torch.from_numpy(array) for array in overlapping())
    rows, signs = rows.float(), svm.signs(labels, 3)
    partly = signs.clone()
    partly[:60, 1] = 0
    # The loss is a sum, so the cost means the same for fewer rows.
    found, whole = (svm.fit(rows, s, torch.zeros(7, 3), 1.0, 1.0, 500) for s in (partly, signs))
    without = svm.fit(rows[60:], signs[60:, 1:2], torch.zeros(7, 1), 1.0, 1.0, 500)
    assert torch.allclose(found[:, 1:2], without, atol=3e-3)
    assert torch.allclose(found[:, [0, 2]], whole[:, [0, 2]], atol=3e-3)
    assert not torch.allclose(found[:, 1], whole[:, 1], atol=3e-2)


def test_svms_tell_all_layers_with_all_labels_and_with_few(backbone, data):
    found = machines.evaluate(backbone, data, machines.Options(**SVM), 0)
    for layer in backbone.layers:
        for metric in ("top1", "mean_class_accuracy", "map_11", "map_area"):
            every = [r for r in found if "labels_per_class" not in r]
            assert value(every, metric, layer=layer) > 0.8
        assert value(found, "validation_top1", layer=layer) > 0.5
        for number in (2, 4):
            assert value(found, "top1", layer=layer, labels_per_class=number) > 0.4


def test_few_labels_are_drawn_from_what_is_kept_and_by_key(data):
    kept, _ = judge.held_out(data.train)
    signs, options = svm.signs(data.train.labels, 3), machines.Options(**SVM)
    found = machines.few_labels(signs, kept, data.train.pack.ids, options, 0)
    assert {number: len(draws) for number, draws in found.items()} == {2: 3, 4: 3}
    for number, draws in found.items():
        for rows in draws:
            assert data.train.labels[rows].bincount().tolist() == [number] * 3
            assert set(rows.tolist()) <= set(kept.tolist())
        assert len({tuple(rows.tolist()) for rows in draws}) == 3
    turned = machines.few_labels(
        signs.flip(0), (29 - kept).flip(0), data.train.pack.ids[::-1].copy(), options, 0
    )
    assert torch.equal((29 - turned[4][1]).sort().values, found[4][1])
    other = machines.few_labels(signs, kept, data.train.pack.ids, options, 1)
    assert not torch.equal(other[4][0], found[4][0])


def test_more_labels_than_any_class_has_are_left_out_and_said(data, caplog):
    kept, _ = judge.held_out(data.train)
    options = machines.Options(**SVM | {"labels_per_class": [8, 9]})
    signs = svm.signs(data.train.labels, 3)
    with caplog.at_level("INFO", "kt"):
        found = machines.few_labels(signs, kept, data.train.pack.ids, options, 0)
    assert (
        list(found) == [8] and "9 labels per class left out, the largest class has 8" in caplog.text
    )


def test_costs_are_chosen_without_test_labels(backbone, data, monkeypatch):
    chosen, fit = [], svm.fit

    def spy(rows, signs, start, cost, positive, iterations):
        chosen.append((len(rows), cost))
        return fit(rows, signs, start, cost, positive, iterations)

    monkeypatch.setattr(svm, "fit", spy)
    outcomes = []
    for test_labels in (data.test.labels, (data.test.labels + 1) % 3):
        chosen.clear()
        changed = dataclasses.replace(data, test=judge.Split(data.test.pack, test_labels))
        records = machines.evaluate(backbone, changed, machines.Options(**SVM), 0)
        outcomes.append((list(chosen), [r for r in records if r["metric"] == "validation_top1"]))
    assert outcomes[0] == outcomes[1]
    # Two costs on the kept part, then all of train, then three draws of two numbers; two layers.
    sizes = [24, 24, 30] + [6] * 6 + [12] * 6
    assert [number for number, _ in outcomes[0][0]] == sizes * 2


def test_the_cost_is_the_best_on_held_out_rows(monkeypatch):
    def score(made, *_):
        rows, weight = made  # 5 is best on the held-out rows, 9 on any others
        return {"top1": 1 - abs(weight - (5 if torch.equal(rows, out) else 9))}

    monkeypatch.setattr(machines, "by_cost", lambda *_: [(cost, cost) for cost in (1, 5, 9)])
    monkeypatch.setattr(svm, "decide", lambda rows, weights: (rows, weights))
    monkeypatch.setattr(machines, "scores", score)
    options = machines.Options(**SVM | {"costs": [9, 1, 5]})
    rows, out = torch.arange(4), torch.tensor([2, 3])
    draws = [torch.tensor([0]), torch.tensor([1])]
    assert machines.choose(rows, rows, draws, out, options, "top1") == (5, [5, 5], 1)


def test_images_of_several_labels_are_ranked_class_by_class(backbone, data):
    def several(split):
        # Colours: 0 and 1 are `warm`, too; class 2 of every other image does not count.
        one = torch.nn.functional.one_hot(split.labels, 3)
        warm = (split.labels < 2).long()[:, None]
        signs = (2 * torch.cat([one, warm], 1) - 1).to(torch.int8)
        signs[::2, 2] = 0
        return judge.Split(split.pack, signs)

    many = dataclasses.replace(
        data, train=several(data.train), test=several(data.test), num_classes=4
    )
    options = machines.Options(**SVM | {"labels_per_class": [3]})
    found = machines.evaluate(backbone, many, options, 0)
    assert {r["metric"] for r in found} == {"validation_map", "map_11", "map_area"}
    for layer in backbone.layers:
        every = [r for r in found if "labels_per_class" not in r]
        assert value(every, "map_area", layer=layer) > 0.9
        assert value(found, "map_area", layer=layer, labels_per_class=3) > 0.6
