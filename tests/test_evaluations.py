import argparse
import copy
import dataclasses
import itertools
import json
import math
import signal

import crafted
import numpy as np
import pytest
import torch

from kt import cluster, config, evaluate
from kt.core import (
    blocks,
    images,
    judge,
    model,
    pooling,
    records,
    standardised,
    supervised,
    svm,
    table,
    training,
    views,
)  # fmt: skip
from kt.core.step import ConfigError, DataError, Interrupted
from kt.evaluations import clusters, finetune, knn, linear, nonlinear
from kt.evaluations import svm as machines

KNN = {"neighbours": 5, "temperature": 0.07, "map": 1}
LINEAR = {"map": 2, "dimensions": None, "penalties": [0.01, 0.1], "iterations": 30}
FINETUNE = {
    "labels_per_class": [3], "fractions": [], "images": 240, "task": crafted.LABELS | {"flip": 0.5},
    "training": crafted.TRAINING | {"batch": 9, "lr": 0.003},
}  # fmt: skip
CLUSTERS = {
    "iterations": 10, "view_clusters": 4, "view_images": 30,
    "task": crafted.LABELS | {"crop": 0.6, "flip": 0.5},
}  # fmt: skip
NONLINEAR = {name: FINETUNE[name] for name in ("images", "task", "training")}
TWICE = FINETUNE | {"labels_per_class": [3, 2]}
SVM = {
    "map": 1, "dimensions": None, "costs": [1, 100], "positive_weight": 2, "iterations": 50,
    "labels_per_class": [2], "draws": 2,
}  # fmt: skip
ALL = {
    "knn": KNN, "linear": LINEAR, "nonlinear": NONLINEAR, "finetune": FINETUNE, "svm": SVM,
    "clusters": CLUSTERS,
}  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return crafted.data()


@pytest.fixture
def backbone():
    return model.fresh(crafted.plugin(crafted.PLAIN), 0).eval()


def value(records, metric, **fields):
    found = [
        record["value"]
        for record in records
        if record["metric"] == metric and fields.items() <= record.items()
    ]
    assert len(found) == 1
    return found[0]


def unit(number, dimensions, seed):
    rows = torch.from_numpy(np.random.default_rng(seed).normal(size=(number, dimensions)))
    return torch.nn.functional.normalize(rows.float())


# ---------------------------------------------------------------------------- k-NN


def slow_vote(query, train, labels, k, temperature):
    """One query at a time, in float64."""
    cosines = [float(np.dot(query, row)) for row in train]
    nearest = sorted(range(len(train)), key=lambda row: -cosines[row])[:k]
    votes = {}
    for row in nearest:
        votes[labels[row]] = votes.get(labels[row], 0) + math.exp(cosines[row] / temperature)
    return max(votes, key=votes.get)


@pytest.mark.parametrize("neighbours, temperature", [(1, 0.07), (7, 0.07), (20, 0.5), (500, 0.1)])
def test_knn_agrees_with_a_slow_reference_and_scikit_learn(neighbours, temperature):
    from sklearn.neighbors import KNeighborsClassifier

    train, queries = unit(90, 6, 0), unit(60, 6, 1)
    labels = torch.arange(90) % 4
    options = knn.Options(neighbours=neighbours, temperature=temperature, map=1)
    found = knn.vote(queries, train, labels, 4, options).tolist()
    doubles = train.double().numpy(), labels.tolist()
    slow = [slow_vote(q, *doubles, neighbours, temperature) for q in queries.double().numpy()]
    assert found == slow
    peer = KNeighborsClassifier(
        min(neighbours, 90), metric="cosine", weights=lambda d: np.exp((1 - d) / temperature)
    ).fit(train, labels)
    assert found == peer.predict(queries).tolist()


def test_a_tiny_temperature_is_the_nearest_neighbour_and_stays_finite():
    train, queries, labels = unit(50, 4, 0), unit(30, 4, 1), torch.arange(50) % 5
    options = knn.Options(neighbours=50, temperature=1e-4, map=1)
    nearest = labels[(queries @ train.T).argmax(1)]
    assert torch.equal(knn.vote(queries, train, labels, 5, options), nearest)


def test_features_are_kept_until_the_weights_change(backbone, data):
    changed = copy.deepcopy(backbone)
    first = judge.features(changed, data.train.pack, 1)
    assert judge.features(changed, data.train.pack, 1) is first
    with torch.no_grad():
        next(changed.parameters()).mul_(-1)
    again, layer = judge.features(changed, data.train.pack, 1), changed.layers[-1]
    assert not torch.equal(again[layer], first[layer])
    assert len(judge.features(changed, data.test.pack, 1)[layer]) == len(data.test.pack)


# ---------------------------------------------------------------------------- linear probe


@pytest.mark.parametrize("penalty", [0.003, 0.3])
def test_the_linear_probe_finds_scikit_learns_optimum(penalty):
    from sklearn.linear_model import LogisticRegression

    random = np.random.default_rng(0)
    labels = np.arange(120) % 3
    rows = random.normal(size=(120, 5)) + 0.7 * np.eye(5)[labels]
    # scikit-learn: C * sum of losses + half the squared weights.
    peer = LogisticRegression(C=1 / (penalty * 120), tol=1e-8, max_iter=5000).fit(rows, labels)
    weights = linear.fit(
        torch.from_numpy(rows).float(), torch.from_numpy(labels), torch.zeros(6, 3), penalty, 200
    )
    assert np.allclose(weights[:-1].T, peer.coef_, atol=5e-3)
    bias = weights[-1] - weights[-1].mean()
    assert np.allclose(bias, peer.intercept_ - peer.intercept_.mean(), atol=5e-3)
    found = linear.predict(torch.from_numpy(rows).float(), weights)
    assert (found.numpy() == peer.predict(rows)).mean() > 0.99


def test_the_linear_probe_tells_all_layers_and_learns_easy_classes(backbone, data):
    found = linear.evaluate(backbone, data, linear.Options(**LINEAR), 0)
    for layer in backbone.layers:
        assert value(found, "top1", layer=layer) > 0.9
        assert 0 <= value(found, "validation_top1", layer=layer) <= 1


def test_features_too_large_for_memory_are_streamed_to_the_same_end(backbone, data, monkeypatch):
    options = linear.Options(**(LINEAR | {"map": 2}))
    wanted = linear.evaluate(backbone, data, options, 0)
    knn_options = knn.Options(neighbours=5, temperature=0.07, map=2)
    nearest = knn.evaluate(backbone, data, knn_options, 0)
    judge._features.cache_clear()
    monkeypatch.setattr(judge, "MOST_BYTES", 100)
    monkeypatch.setattr(knn, "COSINES", 100)
    monkeypatch.setattr(standardised, "BLOCK", 7)
    (layer, rows, _), *_ = pooling.probes(backbone, data, options)
    assert isinstance(rows, blocks.Scratch) and layer == backbone.layers[0]
    found = linear.evaluate(backbone, data, options, 0)
    for one, two in zip(wanted, found, strict=True):
        assert one["metric"] == two["metric"] and abs(one["value"] - two["value"]) < 0.02
    assert knn.evaluate(backbone, data, knn_options, 0) == nearest


def test_streamed_rows_are_the_standardised_ones_and_give_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(standardised, "BLOCK", 16)
    random = np.random.default_rng(0)
    train, test = (random.normal(3, 2, (number, 5)).astype(np.float32) for number in (50, 33))
    labels = torch.arange(50) % 3
    cpu = torch.device("cpu")
    rows, queries = standardised.standardised(torch.from_numpy(train), torch.from_numpy(test), cpu)
    scratch = blocks.Scratch(tmp_path, train.shape)
    scratch[0:50] = train
    streamed, others = standardised.standardised(scratch, torch.from_numpy(test), cpu)
    for whole, parts in ((rows, streamed), (queries, others)):
        found = torch.full_like(whole, np.nan)
        for part, block in parts.blocks():
            found[part] = block
        assert torch.allclose(found, whole, atol=1e-5) and len(parts) == len(whole)
    picked = torch.tensor([0, 3, 4, 15, 16, 17, 33, 48, 49])
    start = torch.zeros(6, 3)
    weights = linear.fit(rows[picked], labels[picked], start, 0.1, 100)
    again = linear.fit(streamed[picked], labels[picked], start, 0.1, 100)
    assert torch.allclose(weights, again, atol=1e-4) and weights.abs().max() > 0.1
    assert torch.equal(linear.predict(queries, weights), linear.predict(others, again))


def test_the_penalty_is_chosen_without_test_labels(backbone, data, monkeypatch):
    chosen, fit = [], linear.fit

    def spy(rows, labels, start, penalty, iterations):
        chosen.append((len(rows), penalty))
        return fit(rows, labels, start, penalty, iterations)

    monkeypatch.setattr(linear, "fit", spy)
    outcomes = []
    for test_labels in (data.test.labels, (data.test.labels + 1) % 3):
        chosen.clear()
        changed = dataclasses.replace(data, test=judge.Split(data.test.pack, test_labels))
        records = linear.evaluate(backbone, changed, linear.Options(**LINEAR), 0)
        validation = [row for row in records if row["metric"] == "validation_top1"]
        outcomes.append((list(chosen), validation))
    assert outcomes[0] == outcomes[1]
    # Two candidates on the kept part, then all of train, for each of two layers.
    assert [number for number, _ in outcomes[0][0]] == [24, 24, 30] * 2


# ---------------------------------------------------------------------------- scores


def labellings(seed, number=200):
    random = np.random.default_rng(seed)
    one = random.integers(0, 7, number)
    return one, np.where(random.random(number) < 0.5, one % 4, random.integers(0, 4, number))


@pytest.mark.parametrize("seed", range(5))
def test_hungarian_accuracy_is_the_best_over_all_matchings(seed):
    random = np.random.default_rng(seed)
    one, two = random.integers(0, 4, 60), random.integers(0, 5, 60)
    for found, labels in ((one, two), (two, one), (one, one[::-1])):
        numbers = range(max(found.max(), labels.max()) + 1)
        best = max(
            np.mean(np.array(matched)[found] == labels)
            for matched in itertools.permutations(numbers)
        )
        assert judge.hungarian(found, labels) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(5))
def test_nmi_and_purity_agree_with_scikit_learn(seed):
    from sklearn import metrics

    one, two = labellings(seed)
    expected = metrics.normalized_mutual_info_score(two, one)
    assert judge.nmi(one, two) == pytest.approx(expected, abs=1e-9)
    matrix = metrics.cluster.contingency_matrix(two, one)
    assert judge.purity(one, two) == pytest.approx(matrix.max(0).sum() / len(one))
    assert judge.nmi(one, two) == pytest.approx(judge.nmi(two, one))


def test_nmi_knows_its_extremes():
    one = np.arange(60) % 6
    assert judge.nmi(one, (one + 2) % 6) == pytest.approx(1)
    assert judge.nmi(one, np.zeros(60, np.int64)) == pytest.approx(0, abs=1e-12)
    assert judge.nmi(np.zeros(60, np.int64), np.zeros(60, np.int64)) == 1
    assert judge.hungarian(one, (one + 2) % 6) == 1 and judge.hungarian(one % 1, one) == 1 / 6
    assert judge.purity(one, one % 2) == 1 and judge.purity(one % 1, one) == pytest.approx(1 / 6)


def test_mean_class_accuracy_weighs_every_class_alike():
    labels = torch.tensor([0] * 8 + [1] * 2)
    found = judge.scores(torch.zeros(10, dtype=torch.int64), labels)
    assert found == {"top1": pytest.approx(0.8), "mean_class_accuracy": pytest.approx(0.5)}


def test_held_out_labels_are_stratified_disjoint_and_chosen_by_key():
    keys = crafted.names(61)
    labels = torch.tensor([0] * 40 + [1] * 18 + [2] * 2 + [3])
    shuffle = torch.randperm(61, generator=torch.Generator().manual_seed(0))
    chosen = []
    for order in (torch.arange(61), shuffle):
        names = [keys[row] for row in order.tolist()]
        split = judge.Split(crafted.pack(np.zeros((61, 3, 2, 2), np.uint8), names), labels[order])
        kept, out = judge.held_out(split)
        assert sorted(torch.cat([kept, out]).tolist()) == list(range(61))
        assert split.labels[out].bincount(minlength=4).tolist() == [8, 4, 1, 0]
        chosen.append({names[row] for row in out.tolist()})
    assert chosen[0] == chosen[1]


def test_features_of_all_layers_are_those_of_one_layer_at_a_time(backbone, data, monkeypatch):
    monkeypatch.setattr(images.Pack, "at_once", 7)
    found = judge.features(backbone, data.test.pack, 2)
    for layer in backbone.layers:
        alone = backbone.features(data.test.pack.images, layer, 2)
        assert torch.allclose(found[layer], alone, atol=1e-5)


# ---------------------------------------------------------------------------- fine-tuning


def test_a_draw_holds_so_many_of_each_class_the_same_for_every_model(data):
    rows = finetune.draw(data.train, 4, 0)
    assert data.train.labels[rows].bincount().tolist() == [4, 4, 4]
    assert torch.equal(rows, finetune.draw(data.train, 4, 0))
    assert not torch.equal(rows, finetune.draw(data.train, 4, 1))
    assert len(set(rows.tolist())) == 12


def test_a_draw_follows_the_keys_not_the_rows(data):
    shuffle = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    pack = data.train.pack
    names = [pack.keys[row] for row in shuffle.tolist()]
    shuffled = judge.Split(
        crafted.pack(pack.images[shuffle.numpy()], names), data.train.labels[shuffle]
    )
    one = {pack.keys[row] for row in finetune.draw(data.train, 4, 3).tolist()}
    assert one == {names[row] for row in finetune.draw(shuffled, 4, 3).tolist()}


def test_fine_tuning_on_few_labels_beats_chance_on_easy_pictures(backbone, data):
    options = finetune.Options(**FINETUNE | {"images": 600})
    found = finetune.evaluate(backbone, data, options, 0)
    assert value(found, "top1", labels_per_class=3) > 0.6  # chance: .33


@pytest.mark.parametrize("batch, seen", [(8, 600), (9, 603), (5, 600), (50, 603)])
def test_fine_tuning_sees_as_many_images_as_it_is_to(backbone, data, monkeypatch, batch, seen):
    shown, step = [], training._Run._step

    def spy(run, index, views, labels):
        shown.extend(index.tolist())
        return step(run, index, views, labels)

    monkeypatch.setattr(training._Run, "_step", spy)
    settings = FINETUNE["training"] | {"batch": batch}
    options = finetune.Options(**FINETUNE | {"images": 600, "training": settings})
    finetune.run(backbone, data, finetune.draw(data.train, 3, 0), options, 0)
    assert len(shown) == seen and len(set(shown)) == 9


def test_fine_tuning_sees_the_drawn_labels_alone(backbone, data):
    rows = finetune.draw(data.train, 3, 0)
    spoiled = torch.full_like(data.train.labels, 10_000)
    spoiled[rows] = data.train.labels[rows]
    changed = dataclasses.replace(
        data,
        train=judge.Split(data.train.pack, spoiled),
        test=judge.Split(data.test.pack, torch.full_like(data.test.labels, -7)),
    )
    options = finetune.Options(**FINETUNE)
    one, two = (finetune.run(backbone, given, rows, options, 0) for given in (data, changed))
    assert torch.equal(one, two)


def test_the_head_and_its_training_depend_on_the_seed_alone(backbone, data):
    guess = judge.Split(crafted.pack(crafted.noise(200, 16)), torch.arange(200) % 3)
    hard, options = dataclasses.replace(data, test=guess), finetune.Options(**FINETUNE)
    found = []
    for state, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(state)
        found.append(finetune.run(backbone, hard, torch.arange(9), options, seed))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_too_few_labels_leave_a_run_out_and_say_so(backbone, data, caplog):
    options = finetune.Options(**FINETUNE | {"labels_per_class": [11]})
    with caplog.at_level("INFO", "kt"):
        assert finetune.evaluate(backbone, data, options, 0) == []
    assert "11 labels per class left out, the largest class has 10" in caplog.text


def test_a_smaller_class_gives_all_it_has(data):
    rare = data.train.labels.clone()
    rare[(rare == 0).nonzero()[3:, 0]] = 1
    rows = finetune.draw(judge.Split(data.train.pack, rare), 5, 0)
    assert rare[rows].bincount().tolist()[:2] == [3, 5]


def test_a_share_of_the_labels_is_drawn_from_each_class_and_leaves_none_out(data):
    rare = torch.tensor([0] * 20 + [1] * 9 + [2])
    split = judge.Split(data.train.pack, rare)
    assert rare[finetune.draw(split, 0.1, 0)].bincount().tolist() == [2, 1, 1]
    assert rare[finetune.draw(split, 0.5, 0)].bincount().tolist() == [10, 4, 1]
    assert torch.equal(finetune.draw(split, 1.0, 0), torch.arange(30))


def test_shares_and_numbers_of_labels_are_told_apart_though_as_many_images(
    backbone, data, tmp_path
):
    options = finetune.Options(**FINETUNE | {"fractions": [0.3]})  # 3 of 10 of each class, too
    resumable = dataclasses.replace(data, state=tmp_path)
    found = finetune.evaluate(backbone, resumable, options, 0)
    assert [(row["labels_per_class"], row.get("fraction")) for row in found] == [
        (3, None), (3, None), (None, 0.3), (None, 0.3),
    ]  # fmt: skip
    assert found == finetune.evaluate(backbone, data, options, 0)
    assert not torch.equal(finetune.draw(data.train, 3, 0), finetune.draw(data.train, 0.3, 0))


def test_fine_tuning_without_any_number_of_labels_is_refused():
    with pytest.raises(ConfigError, match="labels_per_class or fractions, found none"):
        config.options("evaluations", "finetune", FINETUNE | {"labels_per_class": []}, "here")


# ---------------------------------------------------------------------------- clusters


def test_clusters_of_easy_pictures_agree_with_their_labels(data):
    class Colours(torch.nn.Module):
        layers, mean, std = ["colour"], torch.zeros(3), torch.ones(3)

        def normalise(self, images):
            return images.float() / 255

        def maps(self, images, layers):
            return {"colour": images - images.mean((1, 2, 3), keepdim=True)}

    found = clusters.label_agreement(Colours(), data, clusters.Options(**CLUSTERS), 0)
    assert found["nmi"] > 0.99 and found["purity"] > 0.99


def test_views_without_augmentation_agree_wholly(backbone, data):
    options = clusters.Options(**CLUSTERS | {"task": crafted.LABELS})
    assert clusters.view_agreement(backbone, data.pool, options, 0) == pytest.approx(1)
    options = clusters.Options(**CLUSTERS)
    assert clusters.view_agreement(backbone, data.pool, options, 0) < 1


@pytest.mark.parametrize("constant", [0.0, 0.37])
def test_views_agree_in_nothing_where_the_last_layer_is_dead(backbone, data, constant):
    norm = backbone.stages["conv2"][1]
    torch.nn.init.zeros_(norm.weight)
    torch.nn.init.constant_(norm.bias, constant)
    assert clusters.view_agreement(backbone, data.pool, clusters.Options(**CLUSTERS), 0) == 0
    alike = judge.Split(data.test.pack, torch.zeros_like(data.test.labels))
    one_class = dataclasses.replace(data, test=alike)
    found = clusters.label_agreement(backbone, one_class, clusters.Options(**CLUSTERS), 0)
    assert found["nmi"] == 0


@pytest.mark.parametrize("alike, expected", [(True, 1.0), (False, 0.0)])
def test_a_nearly_dead_layer_counts_by_the_few_images_that_excite_it(
    backbone, data, monkeypatch, alike, expected
):
    def features(backbone, pool, index, task, seed, number, layers):
        rows = torch.zeros(len(index), 8)
        rows[0 if alike else number, 3] = 1  # one image: two clusters, whatever k
        return {layers[0]: rows}

    monkeypatch.setattr(views, "features", features)
    found = clusters.view_agreement(backbone, data.pool, clusters.Options(**CLUSTERS), 0)
    assert found == pytest.approx(expected, abs=0.01)


def test_without_labels_only_the_agreement_of_views_is_told(backbone, data):
    unlabelled = dataclasses.replace(data, train=None, test=None, num_classes=0)
    found = {
        name: evaluate.judge_one(name, values, backbone, unlabelled, 0)
        for name, values in ALL.items()
    }
    assert [record["metric"] for record in found.pop("clusters")] == ["view_nmi"]
    assert set(map(tuple, found.values())) == {()}


# ---------------------------------------------------------------------------- the step


@pytest.mark.parametrize("name", ALL)
def test_no_evaluation_changes_the_backbone_or_depends_on_the_one_before(name, backbone, data):
    before = judge.weights_digest(backbone)
    one = evaluate.judge_one(name, ALL[name], backbone, data, 0)
    torch.manual_seed(99)
    two = evaluate.judge_one(name, ALL[name], backbone, data, 0)
    assert judge.weights_digest(backbone) == before and not backbone.training
    assert one == two


@pytest.mark.parametrize("change", ["weight", "statistics"])
def test_an_evaluation_that_changes_the_backbone_is_found_out(backbone, data, monkeypatch, change):
    def meddle(backbone, data, options, seed):
        if change == "weight":
            with torch.no_grad():
                next(backbone.parameters()).view(-1)[0] += 1e-3
        else:
            backbone.train()(torch.rand(4, 3, 16, 16))
        return []

    monkeypatch.setattr(knn, "evaluate", meddle)
    with pytest.raises(AssertionError, match="knn changed the backbone"):
        evaluate.judge_one("knn", KNN, backbone, data, 0)


def test_an_unknown_evaluation_or_option_is_refused(backbone, data):
    with pytest.raises(ConfigError, match="kt/evaluations/kn.py; did you mean 'knn'"):
        evaluate.judge_one("kn", KNN, backbone, data, 0)
    with pytest.raises(ConfigError, match="evaluations.knn.neighbors: .*'neighbours'"):
        evaluate.judge_one("knn", KNN | {"neighbors": 3}, backbone, data, 0)


def write_data(folder, data, train_labels=None):
    crafted.write_pack(folder / "train-unlabelled.h5", data.pool.images, data.pool.keys)
    for name, split in (("train", data.train), ("test", data.test)):
        crafted.write_pack(folder / f"{name}.h5", split.pack.images, split.pack.keys)
        labels = split.labels if train_labels is None or name == "test" else train_labels
        order = np.random.default_rng(0).permutation(len(labels))
        with table.create(folder / f"{name}-labels.h5", "labels", {}) as file:
            table.put(file, "labels", labels.numpy()[order])
            table.put_strings(file, "keys", [split.pack.keys[row] for row in order])
            table.put_strings(file, "classes", ["apple", "bird", "cloud"])
    return folder


def test_labels_are_read_by_key(tmp_path, data):
    found = evaluate.read_data(write_data(tmp_path, data))
    assert torch.equal(found.train.labels, data.train.labels)
    assert torch.equal(found.test.labels, data.test.labels) and found.num_classes == 3


def test_an_image_without_a_label_is_refused(tmp_path, data):
    labels = data.train.labels.clone()
    labels[5] = -1
    with pytest.raises(DataError, match="1 images have no label"):
        evaluate.read_data(write_data(tmp_path, data, labels))


def test_the_step_writes_a_record_per_seed_with_its_fields(tmp_path, data):
    write_data(tmp_path / "data", data)
    plugin, folders = crafted.plugin(crafted.PLAIN), []
    for seed in (0, 1):
        folders.append(tmp_path / f"s{seed}")
        model.save(folders[-1], model.fresh(plugin, seed), plugin, {})
    arguments = argparse.Namespace(
        model=folders, seeds=[0, 1], describe={"arm": "random"}, evaluations={"knn": KNN},
        data=tmp_path / "data", state=None, output=tmp_path / "knn.json",
    )  # fmt: skip
    evaluate.run(arguments)
    records = json.loads((tmp_path / "knn.json").read_text())["records"]
    assert {(row["seed"], row["metric"]) for row in records} == {
        (seed, metric)
        for seed in (0, 1)
        for metric in ("top1", "mean_class_accuracy", "validation_top1")
    }
    assert all(row["arm"] == "random" and row["evaluation"] == "knn" for row in records)
    assert {row["n"] for row in records} == {30, 6}
    arguments.seeds = [0]
    with pytest.raises(config.ConfigError, match="as many seeds as models"):
        evaluate.run(arguments)


def test_an_interrupted_evaluation_goes_on_in_the_middle_of_a_training(tmp_path, data, monkeypatch):
    write_data(tmp_path / "data", data)
    plugin = crafted.plugin(crafted.PLAIN)
    for seed in (0, 1):
        model.save(tmp_path / f"s{seed}", model.fresh(plugin, seed), plugin, {})
    arguments = argparse.Namespace(
        model=[tmp_path / "s0", tmp_path / "s1"], seeds=[0, 1], describe={}, state=None,
        evaluations={"knn": KNN, "finetune": TWICE, "nonlinear": NONLINEAR}, data=tmp_path / "data",
        output=tmp_path / "whole.json",
    )  # fmt: skip
    made, step_ = [], training._Run._step

    def spy(run, *batch):
        made.append(run.step)
        if len(made) == stop["at"]:
            signal.raise_signal(signal.SIGTERM)
        return step_(run, *batch)

    monkeypatch.setattr(training._Run, "_step", spy)
    stop = {"at": None}
    evaluate.run(arguments)
    number = len(made)
    made.clear()
    arguments.state, arguments.output = tmp_path / "state", tmp_path / "again.json"
    # A model makes 27 and 40 steps with 3 and 2 labels a class, then 27 above each of two layers.
    assert number == 2 * 121
    stops = (121 + 27 + 5, "fine-tune with 6 labels"), (121 + 67 + 27 + 5, "retrain above conv2")
    for stop["at"], name in stops:
        with pytest.raises(Interrupted, match=name):
            evaluate.run(arguments)
    stop["at"] = None
    evaluate.run(arguments)
    assert len(made) == number  # no step was made twice
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("whole.json", "again.json"))
    assert one["records"] == two["records"] and not arguments.state.exists()


# ---------------------------------------------------------------------------- on which rows


def test_knn_chooses_on_rows_it_does_not_know_and_judges_by_all_of_train(
    backbone, data, monkeypatch
):
    seen, vote = [], knn.vote

    def spy(*given):
        seen.append(given[:3])
        return vote(*given)

    monkeypatch.setattr(knn, "vote", spy)
    knn.evaluate(backbone, data, knn.Options(**KNN | {"map": 2}), 0)
    kept, out = judge.held_out(data.train)
    train, test = (
        torch.nn.functional.normalize(backbone.features(split.pack.images, "conv2", 2))
        for split in (data.train, data.test)
    )
    labels = data.train.labels
    wanted = (train[out], train[kept], labels[kept]), (test, train, labels)
    for one, other in zip(seen, wanted, strict=True):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, other, strict=True))


def test_all_of_train_is_fitted_with_the_best_penalty_of_equals_the_largest(
    backbone, data, monkeypatch
):
    right, fits = {0.3: 0.5, 0.1: 0.9, 0.03: 0.9, 0.01: 0.2}, []

    def fit(rows, labels, start, penalty, iterations):
        fits.append((len(rows), penalty))
        return penalty

    monkeypatch.setattr(linear, "fit", fit)
    monkeypatch.setattr(linear, "predict", lambda rows, weights: weights)
    monkeypatch.setattr(judge, "scores", lambda penalty, labels: {"top1": right[penalty]})
    monkeypatch.setattr(judge, "judged", lambda penalty, labels, layer: [{"judged": penalty}])
    options = linear.Options(**LINEAR | {"penalties": [0.01, 0.3, 0.03, 0.1]})
    found = linear.evaluate(backbone, data, options, 0)
    assert fits == [*((24, penalty) for penalty in right), (30, 0.1)] * 2
    assert [one.get("judged") or one["value"] for one in found] == [0.9, 0.1] * 2


def test_svms_see_rows_of_unit_length_and_all_of_train_with_the_chosen_cost(
    backbone, data, monkeypatch
):
    fits = []

    def spy(rows, signs, start, cost, positive, iterations):
        assert torch.allclose(rows.norm(dim=1), torch.ones(len(rows)), atol=1e-5)
        fits.append((len(rows), cost, positive))
        return start

    def choose(rows, signs, draws, *_):
        start = torch.zeros(rows.shape[1] + 1, 3)
        return 7.0, [start + number for number, _ in enumerate(draws)], 0.5

    monkeypatch.setattr(svm, "fit", spy)
    monkeypatch.setattr(machines, "choose", choose)
    monkeypatch.setattr(svm, "decide", lambda rows, weights: weights)
    monkeypatch.setattr(machines, "scores", lambda made, *_: {"top1": float(made[0, 0])})
    monkeypatch.setattr(judge, "judged", lambda *_, **__: [])
    found = machines.evaluate(backbone, data, machines.Options(**SVM | {"draws": 3}), 0)
    assert fits == [(30, 7.0, 2)] * 2
    assert [one["value"] for one in found] == [0.5, 1.0] * 2  # the mean of the draws' 0, 1, 2
    assert [
        cost
        for cost, _ in machines.by_cost(torch.eye(4), torch.ones(4, 3), machines.Options(**SVM))
    ] == [1, 100]
    assert fits[2:] == [(4, 1, 2), (4, 100, 2)]


def test_features_that_never_change_are_no_numbers_to_fear(tmp_path):
    rows = torch.randn(40, 3)
    rows[:, 1] = 0.5
    cpu, scratch = torch.device("cpu"), blocks.Scratch(tmp_path, (40, 3))
    scratch[0:40] = rows.numpy()
    whole, _ = standardised.standardised(rows, rows, cpu)
    streamed, _ = standardised.standardised(scratch, rows, cpu)
    for found in (whole, *(block for _, block in streamed.blocks())):
        assert torch.isfinite(found).all() and (found[:, 1].abs() < 0.1).all()


def test_what_memory_does_not_hold_together_is_in_files(backbone, data, monkeypatch):
    sizes = [4 * len(data.train.pack) * width for width in (8, 16)]  # of both layers
    for most, held in (
        (sum(sizes), [True, True]),
        (sum(sizes) - 1, [True, False]),
        (sizes[0] - 1, [False, False]),
    ):
        judge._features.cache_clear()
        monkeypatch.setattr(judge, "MOST_BYTES", most)
        found = judge.features(backbone, data.train.pack, 1)
        assert [isinstance(rows, torch.Tensor) for rows in found.values()] == held


def test_one_image_of_each_class_leaves_none_to_choose_on():
    split = judge.Split(crafted.pack(crafted.noise(3, 4)), torch.arange(3))
    with pytest.raises(judge.DataError, match="found 3 images, one a class"):
        judge.held_out(split)


def test_clusters_are_fitted_on_unit_features_of_train_and_judged_on_test(
    backbone, data, monkeypatch
):
    seen, kmeans, assign = [], cluster.kmeans, cluster.assign

    def spy(made):
        def call(rows, *given):
            seen.append((rows, *given[:1]))
            return made(rows, *given)

        return call

    monkeypatch.setattr(cluster, "kmeans", spy(kmeans))
    monkeypatch.setattr(cluster, "assign", spy(assign))
    fewer = dataclasses.replace(data, test=crafted.data(test=12).test)
    options = clusters.Options(**CLUSTERS | {"view_images": 99, "view_clusters": 50})
    found = clusters.evaluate(backbone, fewer, options, 0)
    assert [(one["metric"], one["n"]) for one in found] == [
        ("view_nmi", 40), ("nmi", 12), ("purity", 12), ("hungarian", 12),
    ]  # fmt: skip
    (_, of_views), *_, (train, k), (test, _) = seen
    assert (of_views, k) == (20, 3)  # two images of a view for each cluster at least
    for rows, split in ((train, fewer.train), (test, fewer.test)):
        wanted = backbone.features(split.pack.images, "conv2", 1)
        assert np.allclose(rows, torch.nn.functional.normalize(wanted), atol=1e-5)


def test_numbers_of_labels_are_left_out_that_no_class_has(backbone, data, monkeypatch):
    labels = torch.tensor([0] * 20 + [1] * 6 + [2] * 4)
    uneven = dataclasses.replace(data, train=judge.Split(data.train.pack, labels))
    monkeypatch.setattr(finetune, "judged", lambda *_, labels_per_class: [labels_per_class])
    options = finetune.Options(**FINETUNE | {"labels_per_class": [4, 5, 20, 21]})
    assert finetune.evaluate(backbone, uneven, options, 0) == [4, 5, 20]


def test_the_nonlinear_protocol_learns_all_of_train(backbone, data, monkeypatch):
    seen = []
    monkeypatch.setattr(
        supervised, "train", lambda network, task, data, rows, *_, **__: seen.append(rows)
    )
    nonlinear.run(backbone, data, "conv1", nonlinear.Options(**NONLINEAR), 0)
    assert torch.equal(seen[0], torch.arange(30))


def test_a_cost_is_chosen_by_the_mean_over_draws(monkeypatch):
    right = {(0, 1): 0.9, (1, 1): 0.1, (0, 100): 0.6, (1, 100): 0.6}
    monkeypatch.setattr(
        machines, "by_cost", lambda rows, *_: [(c, (int(rows[0]), c)) for c in (1, 100)]
    )
    monkeypatch.setattr(svm, "decide", lambda rows, weights: weights)
    monkeypatch.setattr(machines, "scores", lambda made, *_: {"top1": right[made]})
    rows, draws = torch.arange(4), [torch.tensor([0]), torch.tensor([1])]
    found = machines.choose(rows, rows, draws, rows, machines.Options(**SVM), "top1")
    assert found == (100, [(0, 100), (1, 100)], 0.6)


def test_records_say_which_images_were_right():
    predicted, labels = torch.tensor([1, 0, 2, 2]), torch.tensor([1, 1, 2, 0])
    top, other = judge.judged(predicted, labels, layer="conv1")
    assert records.unpacked(top).tolist() == [1, 0, 1, 0] and top["value"] == 0.5
    assert (other["metric"], other["layer"]) == ("mean_class_accuracy", "conv1")
    assert records.RIGHT not in other


def test_images_of_several_labels_are_held_out_as_a_whole():
    labels = torch.tensor([[1, -1, 0], [-1, 1, 1]]).repeat(10, 1)
    kept, out = judge.held_out(judge.Split(crafted.pack(crafted.noise(20, 4)), labels))
    assert len(out) == 4 and sorted([*kept.tolist(), *out.tolist()]) == list(range(20))
