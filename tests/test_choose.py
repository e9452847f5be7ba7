"""`auto`: layer and k chosen without labels, and what the chosen ones reach."""

import argparse
import json
import math

import crafted
import drawing
import numpy as np
import pytest
import running
import torch
from sklearn.metrics import mutual_info_score
from test_features import teacher

from kt import choose, cluster, config
from kt import workflow as plan
from kt.core import auto, judge, lessons, records, step, views
from kt.core.step import ConfigError, DataError

# ---------------------------------------------------------------------------- the measure


@pytest.mark.parametrize(("one", "two"), [(3, 3), (2, 7), (40, 25)])
def test_mutual_information_is_that_of_scikit_learn(one, two):
    random = np.random.default_rng(one)
    a, b = random.integers(0, one, 300), random.integers(0, two, 300)
    assert judge.mutual_information(a, b) == pytest.approx(mutual_info_score(a, b), abs=1e-12)


def test_views_that_agree_tell_all_and_unrelated_ones_nothing_however_many_clusters():
    labels = np.arange(4000) % 20
    assert choose.information(labels, labels) == pytest.approx(math.log(20), abs=0.1)
    random = np.random.default_rng(0)
    for k in (2, 50, 400):
        one, two = random.integers(0, k, (2, 4000))
        assert abs(choose.information(one, two)) < 0.03, k  # 1.7 nats of chance at 400


@pytest.mark.parametrize("groups", [8, 16])
def test_of_planted_groups_their_number_tells_most(groups):
    """Two views of a row share its group and nothing else, so that more clusters split noise."""
    random = np.random.default_rng(groups)
    centres = random.normal(0, 4, (groups, 24))
    member = np.arange(1600) % groups
    one, two = ((centres[member] + random.normal(0, 1, (1600, 24))).astype("f") for _ in "12")
    told = {}
    for k in (groups // 4, groups // 2, groups, 4 * groups, 16 * groups):
        centroids, _ = cluster.kmeans(one, k, 30, 5, False, 0)
        told[k] = choose.information(*(cluster.assign(rows, centroids)[0] for rows in (one, two)))
    assert max(told, key=told.get) == groups, told


def rows(**layers):
    return [
        {"layer": layer, "k": k, "information": value}
        for layer, values in layers.items()
        for k, value in values.items()
    ]


@pytest.mark.parametrize(
    ("measured", "layer", "numbers"),
    [
        (rows(a={2: 0.9, 4: 0.5}, b={2: 0.4, 4: 0.5}), "b", {"a": 2, "b": 4}),  # half is enough
        (rows(a={2: 0.9, 4: 1.5}, b={2: 0.4, 4: 0.5}), "a", {"a": 4, "b": 2 + 2}),
        (rows(a={2: 0.9}, b={2: 0.2}, c={2: 0.6}, d={2: 0.1}), "c", dict.fromkeys("abcd", 2)),
        (rows(a={2: 0.3, 4: 0.3}), "a", {"a": 2}),  # of equal ones the fewest clusters
        (rows(a={2: -0.1}, b={2: -0.2}), "b", {"a": 2, "b": 2}),  # nothing tells anything
        (rows(a={2: -0.1}, dead={2: 0.0}, c={2: -0.2}), "c", dict.fromkeys(("a", "dead", "c"), 2)),
    ],
)
def test_the_deepest_layer_that_tells_enough_is_taken_each_with_its_best_k(
    measured, layer, numbers
):
    assert choose.best(measured) == (layer, numbers)


# ---------------------------------------------------------------------------- views


def test_views_of_a_task_without_augmentation_are_the_images(tmp_path):
    backbone = teacher(tmp_path / "teacher")
    pack = crafted.pack(crafted.noise(40, 16))
    index = views.chosen(pack, 25, 3)
    assert len(index) == 25 and torch.equal(index, index.unique())
    for mirror in (False, True):
        found = views.features(
            backbone, pack, index, crafted.plugin(crafted.LABELS), 0, 1, ["conv1", "conv2"],
            2, "max", mirror,
        )  # fmt: skip
        for layer in ("conv1", "conv2"):
            pixels = torch.from_numpy(pack.images[index.numpy()])
            sides = [pixels, pixels.flip(-1)] if mirror else [pixels]
            with torch.inference_mode():
                maps = [backbone(backbone.normalise(side), layer) for side in sides]
            pools = [torch.nn.functional.adaptive_max_pool2d(map, 2).flatten(1) for map in maps]
            expected = sum(pools) / len(pools)
            assert torch.allclose(found[layer], expected, atol=1e-5)


def test_the_images_looked_at_do_not_depend_on_their_order():
    pixels, keys = crafted.noise(30, 16), crafted.names(30)
    one, two = crafted.pack(pixels, keys), crafted.pack(pixels[::-1].copy(), keys[::-1])
    first = {one.keys[row] for row in views.chosen(one, 10, 0)}
    assert first == {two.keys[row] for row in views.chosen(two, 10, 0)}


def test_a_dead_layer_tells_nothing_and_ends_nothing(tmp_path, monkeypatch):
    shown = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    found = {"dead": torch.zeros(60, 8), "alive": shown}
    monkeypatch.setattr(views, "features", lambda *given: found)
    arguments = argparse.Namespace(
        pack=tmp_path, clustering=crafted.clustering(), map=1, pool="mean", mirror=False, seed=0,
        choice=config.Choice(images=60, clusters=[2, 4], task=crafted.plugin(crafted.LABELS)),
    )  # fmt: skip
    pack = crafted.pack(crafted.noise(60, 12))
    measured = choose.measure(None, pack, ["dead", "alive"], arguments)
    assert [row["information"] for row in measured[:2]] == [0, 0]
    assert choose.best(measured)[0] == "alive"


# ---------------------------------------------------------------------------- the step


def run(folder, number=60, clusters=(2, 4), layers=("auto",)):
    teacher(folder / "teacher")
    pixels, _ = crafted.discs(number, 16)
    pack = crafted.write_pack(folder / "pack.h5", pixels, crafted.names(number))
    task = crafted.plugin(crafted.LABELS, crop=0.6, flip=0.5)
    choice = config.Choice(images=50, clusters=list(clusters), task=task)
    arguments = argparse.Namespace(
        model=folder / "teacher", layers=list(layers), map=1, pool="mean", mirror=False,
        pack=pack, clustering=crafted.clustering(pca=4, l2=True), choice=choice, seed=0,
        output=folder / "choice.json",
    )  # fmt: skip
    choose.run(arguments)
    return step.read_json(arguments.output)


def test_the_step_measures_every_layer_at_every_k_and_keeps_it(tmp_path):
    found = run(tmp_path)
    assert [(row["layer"], row["k"]) for row in found["measured"]] == [
        ("conv1", 2), ("conv1", 4), ("conv2", 2), ("conv2", 4),
    ]  # fmt: skip
    assert (found["layer"], found["k"]) == choose.best(found["measured"])
    assert run(tmp_path) | {"provenance": 0} == found | {"provenance": 0}


def test_only_the_layers_that_were_asked_for_are_measured(tmp_path):
    assert set(run(tmp_path, layers=("conv1",))["k"]) == {"conv1"}


def test_more_clusters_than_images_can_fill_are_not_tried(tmp_path):
    assert {row["k"] for row in run(tmp_path, clusters=(4, 400, 10))["measured"]} == {4, 10}
    with pytest.raises(DataError, match="expected at least 100 images to choose k = 20 by"):
        run(tmp_path, clusters=(20, 40))


def test_auto_is_settled_by_the_choice(tmp_path):
    path = tmp_path / "choice.json"
    step.write_json(path, {"layer": "conv2", "k": {"conv1": 3, "conv2": 50}})
    assert auto.settled(path, "auto", "auto") == ("conv2", 50)
    assert auto.settled(path, "auto", "autox0.5") == ("conv2", 25)
    assert auto.settled(path, "conv1", "autox0.01") == ("conv1", 2)
    assert auto.settled(path, "auto", "7") == ("conv2", 7)
    assert auto.settled(None, "conv1", "7") == ("conv1", 7)
    with pytest.raises(ConfigError, match="needs --choice"):
        auto.settled(None, "auto", "7")
    with pytest.raises(DataError, match="expected a choice for layer 'conv9'"):
        auto.settled(path, "conv9", "auto")
    for wrong in ("many", "autoxmuch", "1.5"):
        with pytest.raises(ConfigError, match="expected a number, auto or autox0.5"):
            auto.settled(path, "conv1", wrong)


# ---------------------------------------------------------------------------- configuration


def resolve(*overlays):
    return config.resolve(running.ROOT, *overlays)


AUTO = {"clusters": "auto", "teachers": {"deep": {"layers": ["auto"]}}}


def test_auto_is_a_layer_and_a_k_of_its_own_in_paths():
    several = {"kind": {"name": "multi_k", "factors": [0.5, 1, 2]}, "of": ["deep"]}
    settings = resolve(AUTO, {"transfers": {"several": several}})
    found = lessons.lessons(settings)
    assert "deep/auto/kauto" in found and "several/deep/auto/kauto" in found
    tables = lessons.lesson_tables(settings, found["several/deep/auto/kauto"])["labels"]
    place = "results/pseudo_labels/deep/auto/fashion_mnist"
    names = [f"{place}/k{k}/fashion_mnist-train-unlabelled.h5" for k in ("autox0.5", "auto")]
    assert set(names) < set(tables) and len(tables) == 3
    assert lessons.choices(settings)["deep"] == ["auto"]
    assert lessons.choices(settings)["own"] == ["conv4"]  # its k is to be chosen
    assert lessons.choices(resolve({"clusters": [50]})) == {}
    models = {model.name: model.describe for model in plan.judged(settings)}
    assert models["small/deep/auto/kauto"]["k"] == "auto"


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ({"clusters": ["automatic"]}, "clusters"),
        ({"clusters": ["auto", "auto"]}, "each k once"),
        ({"teachers": {"deep": {"layers": ["auto", "block3"]}}}, "stands alone"),
        ({"clusters": ["auto"], "teachers": {"hog": {"features": "x.npy"}}}, "clusters: auto"),
        ({"teachers": {"hog": {"features": "x.npy", "layers": ["auto"]}}}, "hog.layers: auto"),
        ({"choice": {"task": {"crop": 3}}}, "choice.task"),
    ],
)
def test_what_cannot_be_chosen_is_refused_before_anything_runs(overlay, message):
    with pytest.raises(ConfigError, match=message):
        resolve(overlay)


# ---------------------------------------------------------------------------- the whole workflow


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_workflow_chooses_and_the_report_says_what(tmp_path):
    pictures = drawing.write_folder(drawing.tree(120, 20, 10), tmp_path / "pictures")
    overlay = {
        "clusters": ["auto"],
        "teachers": {"deep": {"layers": ["auto"], "mirror": True}}
        | dict.fromkeys(("own", "longer", "untrained", "random")),
        "targets": {"small": {"supervised": False}},
        "transfers": {
            "several": {"kind": {"name": "multi_teacher", "factors": [1, 2]}, "of": ["deep", "hog"]}
        },
        "evaluations": {"finetune": None},
    }
    files = [running.ROOT / "tests/tiny.yaml", running.overlay(tmp_path / "auto.yaml", overlay)]
    done = running.workflow(tmp_path / "run", pictures, files=files)
    assert done.returncode == 0, running.output(done)
    results = tmp_path / "run/results"
    choice = json.loads((results / "choices/deep.json").read_text())
    layer, k = choice["layer"], choice["k"][choice["layer"]]
    centroids, _, _ = cluster.read_clusters(results / "clusters/deep/auto/images/kautox2.h5")
    assert len(centroids) == 2 * k
    records = json.loads((results / "report/metrics.json").read_text())
    said = {record["model"]: record.get("chosen") for record in records}
    other = json.loads((results / "choices/hog.json").read_text())["k"]["hog"]
    assert said["small/deep/auto/kauto"] == f"{layer} k {k}"
    assert said["small/several/deep+hog/auto+hog/kauto"] == f"{layer} k {k}, hog k {other}"
    assert f"{layer} k {k}" in (results / "report/index.html").read_text()
    again = running.workflow(tmp_path / "run", pictures, files=files)
    assert "Nothing to be done" in running.output(again)


def test_what_has_no_k_names_its_layer_alone():
    record = {"teacher": "deep+hog", "teacher_layer": "auto+hog", "k": None}
    choice = {"layer": "block2", "k": {"block2": 50}}
    assert records.with_choice(record, {"deep": choice})["chosen"] == "block2"
    assert records.with_choice({**record, "k": "auto"}, {"deep": choice})["chosen"] == "block2 k 50"


def test_mirrored_features_are_the_same_for_an_image_and_its_mirror_image(tmp_path):
    from test_features import content
    from test_features import step as extract

    teacher(tmp_path / "teacher")
    pixels = crafted.noise(20, 16)
    both = []
    for place, drawn in (("one", pixels), ("two", pixels[..., ::-1])):
        (tmp_path / place).mkdir()
        pack = crafted.write_pack(tmp_path / place / "pack.h5", drawn, crafted.names(20))
        both += [
            content(
                extract(
                    tmp_path / place, pack, model=tmp_path / "teacher", layer="conv2", map=1,
                    mirror=mirror,
                )
            )[0]
            for mirror in (False, True)
        ]  # fmt: skip
    plain, mirrored, plain_of_mirror, mirrored_of_mirror = both
    assert np.allclose(mirrored, mirrored_of_mirror, atol=1e-5)
    assert np.allclose(mirrored, (plain + plain_of_mirror) / 2, atol=1e-5)
    assert not np.allclose(plain, plain_of_mirror, atol=1e-3)


# ---------------------------------------------------------------------------- one view


def test_one_view_alone_decides_what_features_are_transformed_by(tmp_path, monkeypatch):
    shown = torch.randn(2, 60, 8, generator=torch.Generator().manual_seed(0))
    parts = [{"dead": torch.full((60, 8), 0.3), "alive": one} for one in shown]
    monkeypatch.setattr(views, "features", lambda *given: parts[given[5]])
    seen, fit = [], cluster.fit_transform
    monkeypatch.setattr(
        cluster, "fit_transform", lambda rows, *a, **b: seen.append(rows) or fit(rows, *a, **b)
    )
    arguments = argparse.Namespace(
        pack=tmp_path, clustering=crafted.clustering(), map=1, pool="mean", mirror=False, seed=0,
        choice=config.Choice(images=60, clusters=[2], task=crafted.plugin(crafted.LABELS)),
    )  # fmt: skip
    dead, _ = choose.measure(
        None, crafted.pack(crafted.noise(60, 12)), ["dead", "alive"], arguments
    )
    assert dead["information"] == 0
    assert len(seen) == 1 and (seen[0] == shown[0].numpy()).all()
