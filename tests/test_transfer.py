"""One contract for every kind of transfer, and each against a slow reference of its own."""

import argparse
import dataclasses
import json
from pathlib import Path

import crafted
import drawing
import numpy as np
import pytest
import running
import torch

from kt import cluster, config, pseudo_labels, target_train
from kt import workflow as plan
from kt.core import lessons, step, table
from kt.core.parts import WHOLE
from kt.core.step import ConfigError, DataError
from kt.core.transfer import Taught

ROOT = Path(__file__).parent.parent
OPTIONS = {
    "hard": {},
    "iterated": {
        "factors": [0.5, 1.0],
        "rounds": 2,
        "keep": False,
        "target": "small",
        "layer": "conv2",
        "map": 1,
    },
    "multi_k": {"factors": [0.5, 1.0]},
    "multi_teacher": {"factors": [1.0]},
    "soft": {"temperature": 0.5},
    "balanced": {"temperature": 0.5, "iterations": 50},
    "regression": {},
    "similarity": {"anchors": 20, "temperature": 0.1},
    "multi_similarity": {"anchors": 20, "temperature": 0.1},
}
SEVERAL = ("multi_k", "multi_teacher", "multi_similarity", "iterated")
NUMBER, WIDTH, K = 60, 5, 4


def taught(seed: int = 0) -> Taught:
    """Rows around K centroids, of which some have many more rows than others."""
    random = np.random.default_rng(seed)
    centroids = random.normal(0, 2, (K, WIDTH)).astype(np.float32)
    labels = np.minimum(random.integers(0, 2 * K, NUMBER), K - 1)
    rows = (centroids[labels] + random.normal(0, 0.7, (NUMBER, WIDTH))).astype(np.float32)
    return Taught(torch.from_numpy(labels), K, torch.from_numpy(rows), torch.from_numpy(centroids))


def build(name: str, **changes):
    module = config.plugin("transfers", name)
    options = config.options("transfers", name, OPTIONS[name] | changes)
    several = 2 if name in SEVERAL else 1
    return module.build(options, [taught(seed) for seed in range(several)], 0)


def test_every_kind_has_its_options_here():
    assert sorted(OPTIONS) == config.plugins("transfers")


# ---------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("name", OPTIONS)
def test_a_kind_needs_known_tables_and_names_its_source(name):
    module = config.plugin("transfers", name)
    options = config.options("transfers", name, OPTIONS[name])
    assert module.NEEDS in ("labels", "features") and module.TOGETHER in (True, False)
    assert module.BY_K in (True, False)
    assert all(number >= 2 for number in module.clusters(options, 10))
    assert "Source:" in module.__doc__ or "paper" in module.__doc__


@pytest.mark.parametrize("name", OPTIONS)
def test_values_belong_to_their_image_and_losses_can_be_learned(name):
    kind = build(name)
    everything = torch.arange(NUMBER)
    values, backwards = kind.values(everything), kind.values(everything.flip(0))
    assert len(values) == NUMBER and torch.equal(values.flip(0), backwards)
    assert kind.usable.shape == (NUMBER,) and kind.usable.all()
    torch.manual_seed(0)
    outputs = torch.randn(NUMBER, kind.outputs, requires_grad=True)
    before = kind.loss(outputs, values, 0.0)
    right = kind.right(outputs.detach(), values)
    assert before.shape == right.shape == () and 0 <= right <= 1
    optimiser = torch.optim.Adam([outputs], 0.2)
    for _ in range(200):
        optimiser.zero_grad()
        loss = kind.loss(outputs, values, 0.0)
        loss.backward()
        optimiser.step()
    assert loss < 0.9 * before
    assert kind.right(outputs.detach(), values) > max(0.9, right)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_kind_that_says_so_teaches_the_same_at_every_k(name):
    module = config.plugin("transfers", name)
    options = config.options("transfers", name, OPTIONS[name])
    several = range(2 if name in SEVERAL else 1)
    halved = []
    for seed in several:
        full = taught(seed)
        other = {"labels": full.labels // 2, "num_labels": K // 2, "centroids": full.centroids[:2]}
        halved.append(dataclasses.replace(full, **other))
    index, kinds = torch.arange(NUMBER), (build(name), module.build(options, halved, 0))
    values = [kind.values(index) for kind in kinds]
    same = kinds[0].outputs == kinds[1].outputs and torch.equal(*values)
    assert same != module.BY_K


@pytest.mark.parametrize("clusters", [[100, 50], [50], ["auto", 7], ["auto"]])
def test_a_lesson_that_does_not_differ_by_k_is_one_training_at_any_k(clusters):
    settings = config.resolve(
        ROOT,
        {
            "clusters": clusters,
            "transfers": {
                "alike": {"kind": {"name": "similarity", **OPTIONS["similarity"]}, "of": ["hog"]},
                "hard": {"of": ["deep"]},
            },
        },
    )
    models = plan.transfers(settings)
    assert [model.describe["k"] for model in models] == [*clusters, None]
    assert models[-1].name == "small/alike/hog/hog/k1"
    lesson = lessons.lessons(settings)["alike/hog/hog/k1"]
    assert all("auto" not in str(one) for one in lessons.lesson_tables(settings, lesson).values())
    shown = [k for teacher, _, k in lessons.shown(settings) if teacher == "hog"]
    assert shown == [k for k in clusters if k != "auto"][:1]
    assert "hog" not in lessons.choices(settings)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_target_learns_by_every_kind_whatever_the_order_of_the_tables(tmp_path, name):
    arguments = prepared(tmp_path, name)
    target_train.run(arguments)
    described = json.loads((arguments.output / "model.json").read_text())
    assert described["transfer"]["name"] == name and described["num_labels"] >= 2
    first = table.digest(arguments.output / "model.safetensors")
    shuffled = prepared(tmp_path, name, np.random.default_rng(1).permutation(NUMBER))
    target_train.run(shuffled)
    # Sums over rows are taken in another order by what looks at all of them.
    same = table.digest(shuffled.output / "model.safetensors") == first
    assert same or name in ("regression", "similarity", "multi_similarity")


def prepared(folder, name: str, order=None) -> argparse.Namespace:
    """Writes the tables that a kind needs, rows in an order, and gives the step's arguments."""
    order = np.arange(NUMBER) if order is None else order
    keys = crafted.names(NUMBER)
    place = folder / f"at-{order[0]}"
    place.mkdir()
    pack = crafted.write_pack(place / "pack.h5", crafted.noise(NUMBER, 16), keys)
    report = place / "report.json"
    step.write_json(report, {"mean": [0.5] * 3, "std": [0.3] * 3})
    module = config.plugin("transfers", name)
    several = range(2 if name in SEVERAL else 1)
    features = [
        crafted.write_features(
            place / f"features-{seed}.h5", taught(seed).rows[order], [keys[row] for row in order]
        )
        for seed in several
    ]
    fitted = [
        crafted.write_features(folder / f"fit-{seed}.h5", taught(seed).rows, keys)
        for seed in several
    ]
    clusters = [place / f"clusters-{seed}.h5" for seed in several]
    labels = [place / f"labels-{seed}.h5" for seed in several]
    for one, fit, made, label in zip(features, fitted, clusters, labels, strict=True):
        settings = {
            "k": str(K),
            "lower": False,
            "layer": "",
            "choice": None,
            "settings": crafted.clustering(),
            "memory_mb": None,
            "seed": 0,
        }
        cluster.run(argparse.Namespace(features=fit, output=made, **settings))
        pseudo_labels.run(
            argparse.Namespace(
                features=one, clusters=made, describe={}, output=label, part=WHOLE, parts=[]
            )
        )
    tables = {"pseudo_labels": [], "features": features, "clusters": clusters}
    if module.NEEDS == "labels":
        tables = {"pseudo_labels": labels, "features": [], "clusters": []}
    return argparse.Namespace(
        pack=pack, labels=None, transfer=config.Plugin(name=name, **OPTIONS[name]), **tables,
        data_report=report, backbone=crafted.plugin(crafted.PLAIN),
        task=crafted.plugin(crafted.LABELS), training=crafted.training(), epochs=1, seed=0,
        few_images=None, budget_of=None, describe={}, state=None, processes=1, delivery_threads=0,
        output=place / "model",
    )  # fmt: skip


def test_few_images_get_more_epochs(tmp_path):
    arguments = prepared(tmp_path, "hard")
    for few, epochs in ((None, 2), ((120, 3), 4), ((6000, 2.5), 5), ((30, 3), 2)):
        arguments.few_images = few and config.FewImages(as_if=few[0], most=few[1])
        arguments.epochs = 2  # on 60 images
        target_train.run(arguments)
        described = json.loads((arguments.output / "model.json").read_text())
        assert described["training"]["epochs"] == epochs
        assert len((arguments.output / "log.jsonl").read_text().splitlines()) == epochs


# ---------------------------------------------------------------------------- references


def softmax(values):
    values = np.exp(values - values.max(-1, keepdims=True))
    return values / values.sum(-1, keepdims=True)


def test_hard_is_the_cross_entropy_of_the_labels():
    kind, one = build("hard"), taught()
    outputs = torch.randn(NUMBER, K)
    likely = softmax(outputs.double().numpy())[np.arange(NUMBER), one.labels.numpy()]
    found = kind.loss(outputs, kind.values(torch.arange(NUMBER)), 0.0)
    assert float(found) == pytest.approx(-np.log(likely).mean(), rel=1e-5)


@pytest.mark.parametrize("name", ["multi_k", "multi_teacher", "iterated"])
def test_several_heads_are_averaged_each_with_its_labels(name):
    kind = build(name)
    outputs = torch.randn(NUMBER, 2 * K)
    total = 0.0
    for head in range(2):
        likely = softmax(outputs[:, head * K : head * K + K].double().numpy())
        total -= np.log(likely[np.arange(NUMBER), taught(head).labels.numpy()]).mean()
    found = kind.loss(outputs, kind.values(torch.arange(NUMBER)), 0.0)
    assert float(found) == pytest.approx(total / 2, rel=1e-5)


def test_images_without_a_label_in_any_head_are_left_out():
    one, other = taught(0), taught(1)
    one.labels[3] = other.labels[7] = -1
    module = config.plugin("transfers", "multi_teacher")
    kind = module.build(
        config.options("transfers", "multi_teacher", {"factors": [1]}), [one, other], 0
    )
    assert (~kind.usable).nonzero()[:, 0].tolist() == [3, 7]


def test_soft_is_a_softmax_over_squared_distances():
    one, kind = taught(), build("soft")
    distances = ((one.rows[:, None] - one.centroids).double().numpy() ** 2).sum(2)
    found = kind.likely(kind.values(torch.arange(NUMBER)))
    assert np.allclose(found, softmax(-distances / 0.5), atol=1e-4)
    sharp = build("soft", temperature=1e-3).likely(one.rows)
    assert (sharp.argmax(1).numpy() == distances.argmin(1)).all() and sharp.max(
        1
    ).values.min() > 0.9


def test_soft_clusters_keep_their_digits_far_from_the_origin():
    one, options = taught(), config.options("transfers", "soft", OPTIONS["soft"])
    far = dataclasses.replace(one, rows=one.rows + 4096, centroids=one.centroids + 4096)
    near, moved = (
        config.plugin("transfers", "soft").build(options, [some], 0) for some in (one, far)
    )
    assert torch.allclose(moved.likely(far.rows), near.likely(one.rows), atol=0.01)


def test_balanced_clusters_are_equally_large_and_agree_with_plain_sinkhorn():
    one, kind = taught(), build("balanced")
    labels = kind.values(torch.arange(NUMBER))[:, 0].numpy()
    distances = ((one.rows[:, None] - one.centroids).double().numpy() ** 2).sum(2)
    plan = np.exp(-distances / 0.5)
    for _ in range(50):
        plan /= plan.sum(1, keepdims=True)
        plan /= plan.sum(0) / (NUMBER / K)
    assert (labels == plan.argmax(1)).all()
    uneven = np.bincount(one.labels.numpy(), minlength=K)
    assert np.ptp(np.bincount(labels, minlength=K)) < 0.5 * np.ptp(uneven)


def test_balancing_ends_when_every_cluster_has_its_share_and_not_before():
    rows = torch.nn.functional.normalize(torch.randn(600, 8, generator=torch.manual_seed(0)))
    centroids, module = rows[:12] * 0.7, config.plugin("transfers", "balanced")
    most = {it: module.balanced(rows, centroids, 0.02, it).bincount() for it in (1, 5, 500)}
    spread = {number: int(sizes.max() - sizes.min()) for number, sizes in most.items()}
    assert spread[500] < spread[5] <= spread[1]
    found = module.balanced(rows, centroids, 0.02, 5000)
    plan = torch.exp(-(torch.cdist(rows, centroids).double() ** 2) / 0.02)
    for _ in range(5000):
        plan /= plan.sum(1, keepdim=True)
        plan /= plan.sum(0) / 50
    assert (found == plan.argmax(1)).float().mean() > 0.98


def test_balancing_goes_on_as_long_as_any_one_cluster_lacks_its_share(monkeypatch):
    rows = torch.randn(300, 2, generator=torch.manual_seed(3))
    centroids, module = rows[:30].clone(), config.plugin("transfers", "balanced")
    centroids[-1] += 3  # far from all, so its share is the last to be right
    found = module.balanced(rows, centroids, 0.1, 5000)
    monkeypatch.setattr(module, "CLOSE", 1e-4)
    assert (module.balanced(rows, centroids, 0.1, 5000) != found).sum() < 3


def test_a_head_has_an_output_for_each_label_also_for_those_no_image_has():
    few = Taught(torch.tensor([0, 2, 0, -1]), 5)
    for name in ("hard", "multi_teacher"):
        kind = config.plugin("transfers", name).build(None, [few, few][: 1 + (name != "hard")], 0)
        assert kind.outputs == 5 * (1 + (name != "hard"))


def test_a_teacher_that_is_named_twice_teaches_once():
    kind = {"kind": {"name": "multi_teacher", "factors": [1]}}
    settings = config.resolve(
        ROOT,
        {
            "teachers": {"deep": {"layers": ["block3"]}},
            "transfers": {"both": {**kind, "of": ["deep", "deep/block3", "hog"]}},
        },
    )
    assert "both/deep+hog/block3+hog/k100" in lessons.lessons(settings)


def test_balanced_does_not_depend_on_how_many_rows_are_taken_at_a_time(monkeypatch):
    one, module = taught(), config.plugin("transfers", "balanced")
    whole = module.balanced(one.rows, one.centroids, 0.5, 20)
    monkeypatch.setattr(module, "BLOCK", 7)
    assert torch.equal(module.balanced(one.rows, one.centroids, 0.5, 20), whole)


def test_regression_compares_features_of_unit_variance():
    one, kind = taught(), build("regression")
    rows = one.rows.double().numpy()
    wanted = (rows - rows.mean(0)) / rows.std(0)
    outputs = torch.randn(NUMBER, WIDTH)
    given = outputs.double().numpy()
    given = (given - given.mean(0)) / np.sqrt(given.var(0) + 1e-5)
    values = kind.values(torch.arange(NUMBER))
    assert float(kind.loss(outputs, values, 0.0)) == pytest.approx(
        ((given - wanted) ** 2).mean(), rel=1e-4
    )
    assert float(kind.loss(3 * one.rows + 5, values, 0.0)) < 1e-3
    one_row = float(kind.loss(outputs[:1], values[:1], 0.0))  # has no variance: as if all were 0
    assert one_row == pytest.approx((wanted[:1] ** 2).mean(), rel=1e-4)


def test_similarity_is_the_divergence_of_two_distributions_over_anchors():
    one, kind = taught(), build("similarity")
    rows, outputs = one.rows.double().numpy(), torch.randn(NUMBER, WIDTH)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    anchors = kind.anchors[0].double().numpy()
    assert len(anchors) == 20
    assert all((np.abs(unit - anchor).max(1) < 1e-6).any() for anchor in anchors)  # images' rows
    given = outputs.double().numpy()
    given /= np.linalg.norm(given, axis=1, keepdims=True)
    p, q = softmax(unit @ anchors.T / 0.1), softmax(given @ anchors.T / 0.1)
    values = kind.values(torch.arange(NUMBER))
    wanted = (p * np.log(p / q)).sum(1).mean()
    assert float(kind.loss(outputs, values, 0.0)) == pytest.approx(wanted, rel=1e-4)
    assert float(kind.loss(one.rows, values, 0.0)) < 1e-6


def test_similarity_of_two_teachers_is_the_mean_of_theirs_each_with_its_own_outputs():
    both, options = build("multi_similarity"), OPTIONS["similarity"]
    module = config.plugin("transfers", "similarity")
    alone = [
        module.build(config.options("transfers", "similarity", options), [taught(seed)], 0)
        for seed in range(2)
    ]
    everything, outputs = torch.arange(NUMBER), torch.randn(NUMBER, 2 * WIDTH)
    parts = zip(alone, outputs.split(WIDTH, 1), strict=True)
    losses = [float(one.loss(part, one.values(everything), 0.0)) for one, part in parts]
    found = float(both.loss(outputs, both.values(everything), 0.0))
    assert found == pytest.approx(sum(losses) / 2, rel=1e-5) and losses[0] != losses[1]


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", ["hard", "soft"])
def test_a_kind_without_its_tables_says_which_it_needs(tmp_path, name):
    arguments = prepared(tmp_path, name)
    arguments.pseudo_labels = arguments.features = arguments.clusters = []
    with pytest.raises(ConfigError, match="--pseudo-labels" if name == "hard" else "--features"):
        target_train.run(arguments)
    assert not arguments.output.exists()


def test_features_of_other_images_are_refused(tmp_path):
    arguments = prepared(tmp_path, "soft")
    rows = taught().rows[:10]
    crafted.write_features(arguments.features[0], rows, crafted.names(10, "other"))
    with pytest.raises(DataError, match="60 of 60 keys are missing"):
        target_train.run(arguments)


# ---------------------------------------------------------------------------- in the workflow


ROUNDS = {
    "name": "iterated", "factors": [1], "rounds": 2, "keep": False, "target": "small",
    "layer": "conv4", "map": 1,
}  # fmt: skip


def settings(**transfers):
    kinds = {name: None if kind is None else {"of": [], **kind} for name, kind in transfers.items()}
    return config.resolve(ROOT, {"transfers": kinds})


def test_hard_has_the_paths_without_a_name_and_the_others_one_with_it():
    found = lessons.lessons(
        settings(soft={"kind": {"name": "soft", "temperature": 1}, "of": ["deep"]})
    )
    assert "deep/block3/k100" in found and "soft/deep/block3/k100" in found
    assert len(found) == 6


def test_several_teachers_make_one_lesson_of_the_arm_transfer():
    both = {"kind": {"name": "multi_teacher", "factors": [1, 2]}, "of": ["deep", "hog/hog"]}
    chosen = settings(hard=None, both=both)
    (model,) = plan.transfers(chosen)
    assert (
        model.describe["arm"] == "transfer" and model.name == "small/both/deep+hog/block3+hog/k100"
    )
    (lesson,) = lessons.lessons(chosen).values()
    place = "results/pseudo_labels/{}/fashion_mnist/k{}/fashion_mnist-train-unlabelled.h5"
    assert lessons.lesson_tables(chosen, lesson) == {
        "labels": [place.format(*one) for one in (
            ("deep/block3", 100), ("deep/block3", 200), ("hog/hog", 100), ("hog/hog", 200)
        )]
    }  # fmt: skip


def test_controls_together_stay_a_control():
    kind = {"name": "multi_teacher", "factors": [1]}
    for names, arm in ((["deep", "untrained"], "transfer"), (["untrained", "hog"], "untrained")):
        (model,) = plan.transfers(settings(hard=None, both={"kind": kind, "of": names}))
        assert model.describe["arm"] == arm


def test_each_round_is_taught_by_the_target_of_the_one_before():
    kind = ROUNDS | {"rounds": 3, "map": 2, "factors": [1, 2]}
    chosen = settings(hard=None, again={"kind": kind, "of": ["hog"]})
    (lesson,) = lessons.lessons(chosen).values()
    first, second = lessons.rounds(chosen, lesson)
    assert (first.origin, second.origin) == ("again~1/hog/hog/k100", "again~2/hog/hog/k100")
    assert lesson.origin == "again/hog/hog/k100"
    places = "results/pseudo_labels/{}/fashion_mnist/k{}/fashion_mnist-train-unlabelled.h5"
    for one, taught_by in (
        (first, "hog/hog"),
        (second, "small~again~1~hog~hog~k100/conv4"),
        (lesson, "small~again~2~hog~hog~k100/conv4"),
    ):
        wanted = [places.format(taught_by, k) for k in (100, 200)]
        assert lessons.lesson_tables(chosen, one) == {"labels": wanted}
    teacher = lessons.describers(chosen)["small~again~1~hog~hog~k100"]
    assert (teacher.folder, teacher.map) == ("results/targets/small/again~1/hog/hog/k100/s0", 2)
    assert set(lessons.all_lessons(chosen)) == {first.origin, second.origin, lesson.origin}
    assert plan.describe_target(chosen, "small", second.origin, 0)["arm"] == "hog"
    assert [model.name for model in plan.transfers(chosen)] == ["small/again/hog/hog/k100"]
    kept = settings(hard=None, again={"kind": kind | {"keep": True}, "of": ["hog"]})
    places_of = lessons.lesson_tables(kept, lessons.rounds(kept, lesson)[1])["labels"]
    assert len(places_of) == 4 and "/hog/hog/" in places_of[0] and "small~again~1" in places_of[2]


def test_a_first_round_that_is_another_lesson_is_trained_once():
    kind = ROUNDS | {"rounds": 3, "factors": [1, 2], "keep": True}
    several = {"kind": {"name": "multi_k", "factors": [1, 2]}, "of": ["hog"]}

    def first_of(**transfers):
        chosen = settings(hard=None, again={"kind": kind, "of": ["hog"]}, **transfers)
        lesson = next(one for one in lessons.lessons(chosen).values() if one.transfer == "again")
        first, second = lessons.rounds(chosen, lesson)
        name = "~".join(["small", *first.origin.split("/")])
        assert (name, "conv4") in lessons.sources(chosen, second)
        folder = f"results/targets/small/{first.origin}/s0"
        assert lessons.describers(chosen)[name].folder == folder
        assert set(lessons.all_lessons(chosen)) >= {first.origin, second.origin, lesson.origin}
        return first

    assert first_of(several=several).origin == "several/hog/hog/k100"
    for other in (
        several | {"kind": {"name": "multi_k", "factors": [1, 4]}},  # other numbers of clusters
        several | {"of": ["deep"]},  # another teacher
        several | {"kind": {"name": "regression"}},  # another loss
        {"kind": kind, "of": ["hog"]},  # itself in rounds
    ):
        assert first_of(several=other).origin == "again~1/hog/hog/k100"


def test_a_target_that_two_transfers_have_teach_does_so_in_one_way():
    one, other = ({"kind": ROUNDS | {"map": size}, "of": ["hog"]} for size in (1, 2))
    assert len(lessons.describers(settings(one=one, two=one))) == 7
    with pytest.raises(ConfigError, match=r"transfers.two.kind.map: expected 1, .* found 2"):
        lessons.describers(settings(one=one, two=other))


@pytest.mark.parametrize(
    "kind, message",
    [
        (ROUNDS | {"target": "smal"}, "target: 'smal' is none of small"),
        (ROUNDS | {"layer": "conv9"}, "kind.layer: 'conv9' is not a layer of targets.small"),
        (ROUNDS | {"rounds": 1}, "rounds"),
        ({"name": "sofd", "temperature": 1}, "did you mean 'soft'"),
        ({"name": "soft"}, "temperature"),
    ],
)
def test_a_wrong_kind_is_refused_before_anything_runs(kind, message):
    with pytest.raises(ConfigError, match=message):
        settings(one={"kind": kind})
    with pytest.raises(ConfigError, match="the name `hard` is for the kind hard"):
        settings(hard={"kind": {"name": "regression"}})
    with pytest.raises(ConfigError, match="'dep' is not defined"):
        settings(one={"kind": {"name": "regression"}, "of": ["dep"]})
    with pytest.raises(ConfigError, match="'block9' is not among"):
        settings(one={"kind": {"name": "regression"}, "of": ["deep/block9"]})


def test_transfers_of_ours_follow_what_overlays_do_to_their_teachers():
    def of(**teachers):
        settings = config.resolve(ROOT, {"images": "p.zip", "teachers": teachers})
        return {name: one.of for name, one in settings.transfers.items()}

    usual = of()
    assert usual["multi_similarity"] == ["deep/block2", "hog"] and usual["hard"] == []
    assert set(of(hog=None)) == {"hard"}
    assert set(of(untrained=None)) == set(usual) - {"multi_similarity_untrained"}
    assert of(deep={"layers": ["block3"]})["multi_similarity"] == ["deep/block3", "hog"]
    assert of(deep={"layers": ["auto"]})["multi_similarity"] == ["deep/auto", "hog"]
    assert "multi_similarity" not in of(deep={"layers": []})
    assert of(deep={"training": {"epochs": 3}}) == usual
    with pytest.raises(ConfigError, match="transfers.hard.of: 'hogg' is not defined"):
        config.resolve(ROOT, {"transfers": {"hard": {"of": ["hogg"]}}})
    wrong = {"teachers": {"hog": None}, "transfers": {"hard": {"of": ["hog"]}}}
    with pytest.raises(ConfigError, match="transfers.hard.of: 'hog' is not defined"):
        config.resolve(ROOT, wrong)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_workflow_makes_every_kind_and_shows_them_as_candidates_of_transfer(tmp_path):
    drawing.write_folder(drawing.tree(40, 20, 20, draw=drawing.pattern), tmp_path / "pictures")
    kinds = config.read(ROOT / "presets" / "transfers.yaml")["transfers"]
    kinds["iterated"]["kind"]["layer"] = "conv2"  # the tiny target has two
    for name in ("similar", "multi_similar"):
        kinds[name]["kind"]["anchors"] = 30
    only = {"teachers": dict.fromkeys(("own", "longer", "untrained", "random")), "transfers": kinds}
    only["targets"] = {"small": {"supervised": False}}
    only["evaluations"] = dict.fromkeys(("finetune", "clusters"))
    files = [running.overlay(tmp_path / "kinds.yaml", only)]
    done = running.workflow(tmp_path, tmp_path / "pictures", files=files)
    assert done.returncode == 0, running.output(done)
    records = json.loads((tmp_path / "results/report/metrics.json").read_text())
    found = {record.get("transfer") for record in records if record["arm"] == "transfer"}
    assert found == set(kinds)
    page = (tmp_path / "results/report/index.html").read_text()
    assert all(f"{name}, teacher deep" in page for name in set(kinds) - {"hard"})
    again = running.workflow(tmp_path, tmp_path / "pictures", "-n", files=files)
    assert running.jobs(again) == []
    for kind, option, value in (
        ("soft", "temperature", 0.07),
        ("similar", "anchors", 20),
        ("balanced", "iterations", 3),
    ):
        other = {"transfers": {kind: {"kind": {option: value}}}}
        changed = [*files, running.overlay(tmp_path / "other.yaml", other)]
        planned = running.jobs(
            running.workflow(tmp_path, tmp_path / "pictures", "-n", files=changed)
        )
        trained = [job for job in planned if job.startswith("target_train")]
        assert trained and all(f" {kind}/" in job for job in trained), (kind, planned)
    # k = 8 stands already, as twice 4 of multi_k: nothing that was made of it is made again; nor
    # are kinds that learn from features, whether 8 stands beside 4 or in its place.
    for clusters in ("[4,8]", "[8]"):
        more = running.workflow(
            tmp_path, tmp_path / "pictures", "-n", files=files, config=[f"clusters={clusters}"]
        )
        planned = running.jobs(more)
        trained = [job for job in planned if job.startswith("target_train")]
        assert trained and all("k8" in job for job in trained), trained
        assert "cluster deep block2 k=8" not in planned and "cluster deep block2 k=32" in planned


# ---------------------------------------------------------------------------- losses


@pytest.mark.parametrize("name", ["hard", "soft"])
def test_smoothing_mixes_the_labels_with_all_of_them(name):
    kind, outputs = build(name), torch.randn(NUMBER, K)
    values = kind.values(torch.arange(NUMBER))
    given = (
        torch.nn.functional.one_hot(taught().labels, K) if name == "hard" else kind.likely(values)
    )
    wanted = -((0.9 * given + 0.1 / K) * outputs.log_softmax(1)).sum(1).mean()
    assert float(kind.loss(outputs, values, 0.1)) == pytest.approx(float(wanted), rel=1e-5)


def test_a_feature_of_a_teacher_that_never_changes_is_regressed_on_as_none():
    one = taught()
    one.rows[:, 2] = 0.7
    values = (
        config.plugin("transfers", "regression").build(None, [one], 0).values(torch.arange(NUMBER))
    )
    assert torch.isfinite(values).all() and values[:, 2].abs().max() < 0.2


def test_there_are_two_clusters_at_least_and_each_number_once():
    module = config.plugin("transfers", "multi_k")
    assert module.clusters(module.Options(factors=[1, 0.5, 0.3, 0.1]), 6) == [2, 3, 6]


@pytest.mark.parametrize("seed, same", [(0, True), (1, False)])
def test_anchors_are_drawn_by_seed(seed, same):
    module = config.plugin("transfers", "similarity")
    options = config.options("transfers", "similarity", OPTIONS["similarity"])
    (one,), (two,) = (module.build(options, [taught()], s).anchors for s in (0, seed))
    assert torch.equal(one, two) == same


def test_rounds_are_taught_by_the_last_layer_where_none_is_named():
    again = {"kind": ROUNDS | {"layer": None}, "of": ["hog"]}
    chosen = settings(hard=None, again=again)
    (lesson,) = lessons.lessons(chosen).values()
    assert lessons.sources(chosen, lesson) == (("small~again~1~hog~hog~k100", "conv4"),)
    mobile = {"small": {"backbone": {"name": "torchvision", "model": "mobilenet_v3_small"}}}
    with pytest.raises(
        ConfigError, match="transfers.again.kind.layer: name one, backbone torchvision"
    ):
        config.resolve(ROOT, {"targets": mobile, "transfers": {"again": again}})
