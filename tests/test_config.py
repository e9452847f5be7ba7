import copy
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kt import config, reference, workflow
from kt.core import lessons
from kt.core.step import ConfigError

ROOT = Path(__file__).parent.parent
PRESETS = sorted((ROOT / "presets").glob("*.yaml"))
BASE = config.read(ROOT / "config.yaml")
FOREIGN = {"path": "w.pth", "mean": None, "std": None}
FEW = BASE["datasets"]["fashion_mnist"]["unlabelled"]


def resolve(**overlay) -> config.Config:
    return config.resolve(ROOT, overlay)


def refusal(**overlay) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(**overlay)
    return str(caught.value)


# ---------------------------------------------------------------------------- what is shipped


def test_the_default_configuration_is_valid():
    found = resolve()
    assert found.clusters == BASE["clusters"] and set(found.teachers) >= {"deep", "own", "hog"}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_is_valid(path):
    overlay = config.read(path)
    found = config.resolve(ROOT, overlay)
    for name in found.use.model_dump().values():
        assert name in found.datasets
    assert (
        "fashion_mnist" not in found.datasets or "fashion_mnist" in found.use.model_dump().values()
    )


@pytest.mark.parametrize(
    "path", [None, *PRESETS], ids=lambda path: path.stem if path else "default"
)
def test_every_arm_that_an_honest_report_needs_is_in_every_preset(path):
    found = config.resolve(ROOT, config.read(path) if path else {})
    assert set(config.ARMS) == {model.describe["arm"] for model in workflow.judged(found)}


def test_own_pictures_need_nothing_but_their_path():
    found = resolve(images="my pictures.zip")
    assert found.datasets["images"].path == "my pictures.zip"
    assert set(found.use.model_dump().values()) == {"images"}


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "overlay, key, hint",
    [
        ({"cluster": 5}, "cluster", "clusters"),
        ({"clustering": {"whitten": True}}, "clustering.whitten", "whiten"),
        ({"teachers": {"deep": {"trainig": {}}}}, "teachers.deep.trainig", "training"),
        (
            {"teachers": {"deep": {"training": {"epoch": 3}}}},
            "teachers.deep.training.epoch",
            "epochs",
        ),
        (
            {"teachers": {"deep": {"task": {"permutation": 3}}}},
            "teachers.deep.task.permutation",
            "permutations",
        ),
        (
            {"targets": {"small": {"backbone": {"width": [3]}}}},
            "targets.small.backbone.width",
            "widths",
        ),
        ({"evaluations": {"knn": {"neighbors": 3}}}, "evaluations.knn.neighbors", "neighbours"),
        ({"datasets": {"fashion_mnist": {"sise": 3}}}, "datasets.fashion_mnist.sise", "size"),
        (
            {"evaluations": {"finetune": {"training": {"lrr": 3}}}},
            "evaluations.finetune.training.lrr",
            "lr",
        ),
        (
            {"evaluations": {"finetune": {"task": {"flipp": 3}}}},
            "evaluations.finetune.task.flipp",
            "flip",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_valid_one(overlay, key, hint):
    found = refusal(**overlay)
    assert f"{key}: unknown key; did you mean {hint!r}?" in found


@pytest.mark.parametrize(
    "overlay, parts",
    [
        ({"seeds": "many"}, ["seeds:", "integer", "'many'"]),
        ({"seeds": 0}, ["seeds:", "greater than or equal to 1", "0"]),
        ({"effort": 0}, ["effort:", "greater than 0"]),
        ({"effort": ".nan"}, ["effort:", "'.nan'"]),
        ({"clusters": [1]}, ["clusters.0:", "greater than or equal to 2", "1"]),
        ({"clusters": []}, ["clusters: expected one or more, found []"]),
        ({"transfers": {"hard": None}}, ["transfers: expected one or more, found {}"]),
        ({"evaluations": {"linear": {"dimensions": 9}}}, ["linear: expected one of map and dimen"]),
        ({"clusters": "[50,"}, ["clusters:", "expected a list such as [50, 100]", "'[50,'"]),
        ({"clusters": [50, 50]}, ["clusters: each k once", "[50, 50]"]),
        ({"clusters": 99999}, ["clusters: k = 99999", f"{FEW} images", "fashion_mnist"]),
        ({"datasets": {"fashion_mnist": {"size": 5}}}, ["datasets.fashion_mnist.size:", "12", "5"]),
        ({"datasets": []}, ["datasets:", "[]"]),
        ({"use": {"pretext": "minst"}}, ["use.pretext: 'minst' is not defined"]),
        ({"verdict": ["kn"]}, ["verdict: 'kn'", "did you mean 'knn'"]),
        ({"verdict": ["finetune"]}, ["verdict: expected", "knn, linear, svm; found finetune"]),
        ({"verdict": ["knn", "clusters"]}, ["verdict: expected", "svm; found clusters, by which"]),
        ({"clustering": {"pca": None, "whiten": True}}, ["whiten: needs clustering.pca"]),
        ({"teachers": {"deep": {"backbone": "smal"}}}, ["teachers.deep.backbone", "'small'"]),
        ({"teachers": {"deep": {"backbone": {"name": "resnet"}}}}, ["kt/backbones/resnet.py"]),
        ({"teachers": {"deep": {"layers": ["blok2"]}}}, ["teachers.deep.layers", "'block2'"]),
        ({"teachers": {"deep": {"transfer_as": "best"}}}, ["teachers.deep.transfer_as", "'best'"]),
        ({"teachers": {"deep": {"task": {"grey": 1.5}}}}, ["teachers.deep.task.grey", "1.5"]),
        ({"teachers": {"deep": {"task": {"min_distance": 2}}}}, ["min_distance", "at least 3"]),
        ({"teachers": {"longer": {"budget": ["deep", "tiny"]}}}, ["longer.budget", "'tiny'"]),
        ({"teachers": {"longer": {"budget": ["longer"]}}}, ["longer.budget", "'longer'"]),
        ({"teachers": {"small": {"like": "deep"}}}, ["different names", "small"]),
        ({"teachers": {"a/b": {"like": "deep"}}}, ["teachers.a/b", "pattern"]),
        ({"targets": {"../up": BASE["targets"]["small"]}}, ["targets.../up", "pattern"]),
        ({"datasets": {"fashion_mnist": {"source": "folders"}}}, ["kt/sources/folders.py"]),
        ({"evaluations": {"finetune": {"training": {"lr": -1}}}}, ["finetune.training.lr", "-1"]),
        ({"evaluations": {"clusters": {"task": {"crop": 2}}}}, ["evaluations.clusters.task", "2"]),
        ({"images": 5}, ["images:", "string", "5"]),
        ({"teachers": {"deep": {"weights": {"path": "w.pth", "mean": [0.5], "std": None}}}},
         ["teachers.deep.weights.mean", "at least 3 items", "[0.5]"]),
        ({"teachers": {"deep": {"weights": {"mean": None, "std": None}}}},
         ["teachers.deep.weights.path: missing"]),
        ({"teachers": {"deep": {"weights": {"path": "pretrained", "mean": None, "std": None}}}},
         ["teachers.deep.weights.path: nobody publishes weights of backbone residual"]),
        ({"teachers": {"deep": {"features": "f.npy", "weights": FOREIGN}}},
         ["teachers.deep.features: there is no network", "teachers.deep.weights must be null"]),
        ({"teachers": {"own": {"features": "f.npy"}}}, ["teachers.own.evaluate_as must be null"]),
        ({"teachers": {"deep": {"features": "f.csv"}}}, ["a .npy or .h5 file, found 'f.csv'"]),
        ({"teachers": {"deep": {"pool": "sum"}}}, ["teachers.deep.pool", "'mean' or 'max'"]),
        ({"images": "p", "datasets": {"images": None}}, ["datasets: expected one or more, found"]),
        ({"images": "p", "datasets": {"images": None, "other": BASE["datasets"]["fashion_mnist"]}},
         ["images: is set, but datasets.images is missing"]),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_its_key_what_was_found_and_what_is_allowed(overlay, parts):
    found = refusal(**overlay)
    assert all(part in found for part in parts), found


def test_an_unknown_key_is_named_whatever_its_name():
    assert "Plugin: unknown key" in refusal(Plugin=None)
    assert "teachers.deep.Settings: unknown key" in refusal(teachers={"deep": {"Settings": 1}})


def test_every_fault_is_named_at_once():
    found = refusal(seeds=0, effort=-1, clustering={"pca": "x"})
    assert all(key in found for key in ("seeds:", "effort:", "clustering.pca:"))


def test_a_missing_value_is_named():
    values = copy.deepcopy(BASE["teachers"])
    del values["deep"]["training"]["lr"]
    with pytest.raises(ConfigError, match=r"teachers.deep.training.lr: missing; every value"):
        config.check(config.Config, BASE | {"teachers": {"deep": values["deep"]}})


@pytest.mark.parametrize(
    "text, fault",
    [("a: [1", "not valid YAML"), ("- 1\n- 2", "found list"), ("", "found NoneType"),
     ("!!python/object/apply:os.system ['true']", "not valid YAML"),
     ("a: {b: 1}\nc: 2\na: {d: 3}", "'a' stands twice, in lines 1 and 3"),
     ("a:\n  b: 1\n  b: 1", "'b' stands twice, in lines 2 and 3"),
     ("a: {b: 1, b: 2}", "'b' stands twice, in lines 1 and 1")],
)  # fmt: skip
def test_a_file_that_is_no_plain_mapping_is_refused(tmp_path, text, fault):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"my.yaml.*{fault}"):
        config.read(path)


def test_a_key_beside_a_merged_mapping_that_has_it_is_no_repetition(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: &a {b: 1, c: 2}\nd: &d {<<: *a, b: 3}\ne: {<<: *d, b: 4}\n")
    assert config.read(path)["e"] == {"b": 4, "c": 2}


def test_a_task_is_one_of_labels_where_labels_are_learned_and_has_its_own_elsewhere():
    task = {name: config.resolve(ROOT).teachers["deep"].task for name in ["jigsawpp"]}["jigsawpp"]
    rotation = config.read(ROOT / "presets/pretext_tasks.yaml")["teachers"]["rotation"]["task"]
    labels = BASE["targets"]["small"]["task"]
    for said in (
        refusal(targets={"small": {"task": rotation}}),
        refusal(choice={"task": rotation}),
        refusal(evaluations={"finetune": {"task": task.model_dump()}}),
    ):
        assert "expected a task that learns the labels it is given" in said
        assert said.endswith("there is classification")
    said = refusal(teachers={"deep": {"task": labels}})
    assert "teachers.deep.task: expected a task that has labels of its own, found" in said


@pytest.mark.parametrize("name", ["jigsaw", "jigsawpp"])
def test_shares_of_colours_above_one_are_refused(name):
    tasks = config.read(ROOT / "presets/pretext_tasks.yaml")["teachers"]
    given = next((t["task"] for t in tasks.values() if t and t.get("task", {}).get("name") == name),
                 BASE["teachers"]["deep"]["task"])  # fmt: skip
    assert given["name"] == name
    said = refusal(teachers={"deep": {"task": {**given, "grey": 0.9, "projection": 0.8}}})
    assert "shares `grey` and `projection` of at most 1 together, found 0.9 and 0.8" in said


@pytest.mark.parametrize(
    "overlay, said",
    [
        ({"choice": {"task": 7}}, "choice.task: expected {name: NAME, and its options}, found 7"),
        ({"clusters": ["100,200"]}, "found '100,200'; a list is written [1, 2]"),
        (
            {"transfers": {"x": {"kind": {"name": "soft"}, "of": []}}},
            "temperature: missing; every value must be given (see docs/config.md)",
        ),
    ],
)
def test_what_is_wrong_is_said_in_the_users_words(overlay, said):
    assert said in refusal(**overlay)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read .*no.yaml: No such file"):
        config.read(tmp_path / "no.yaml")


# ---------------------------------------------------------------------------- coercion


@pytest.mark.parametrize(
    "given, expected",
    [(50, [50]), ("50", [50]), ([50, 100], [50, 100]), ("[50,100]", [50, 100]), (["50"], [50])],
)
def test_clusters_are_one_value_or_many_however_written(given, expected):
    assert resolve(clusters=given).clusters == expected


def test_numbers_that_arrive_as_strings_are_coerced():
    overlay = {"training": {"lr": "1e-3", "epochs": "7"}, "seeds": "2", "task": {"grey": "0.25"}}
    found = resolve(effort="1e-1", seeds="5", teachers={"deep": overlay})
    teacher = found.teachers["deep"]
    assert (teacher.training.lr, teacher.training.epochs, teacher.seeds) == (0.001, 7, 2)
    assert (found.effort, found.seeds) == (0.1, 5)
    task = config.options("tasks", "jigsawpp", teacher.task.options())
    assert task.grey == 0.25


def test_numbers_as_text_make_the_same_configuration_as_in_a_file():
    """Wherever they stand, or a run would make everything anew, and a plan could not count."""
    numbers = {
        "teachers": {"deep": {"task": {"grey": 0.25}, "backbone": {"blocks": 2}}},
        "targets": {"small": {"backbone": {"widths": [8, 16], "strides": [2, 2]}}},
        "transfers": {"soft": {"kind": {"name": "soft", "temperature": 0.5}, "of": ["deep"]}},
        "evaluations": {
            "clusters": {"view_images": 500, "task": {"crop": 0.5}},
            "finetune": {"fractions": [0.1], "training": {"batch": 30}},
        },
    }

    def text(value):
        if isinstance(value, dict):
            return {key: text(one) for key, one in value.items()}
        return [text(one) for one in value] if isinstance(value, list) else str(value)

    assert config.dumps(resolve(**text(numbers))) == config.dumps(resolve(**numbers))


# ---------------------------------------------------------------------------- merging


def test_mappings_are_merged_and_everything_else_replaced():
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 4}
    assert config.merge(base, {"a": {"c": [3]}}) == {"a": {"b": 1, "c": [3]}, "d": 4}
    assert config.merge(base, {"d": {"e": 1}})["d"] == {"e": 1}
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": 4}


def test_another_plug_in_replaces_the_options_of_the_one_before():
    base = {"backbone": {"name": "plain", "widths": [1], "strides": [1]}}
    other = {"backbone": {"name": "hog", "cells": 4}}
    assert config.merge(base, other) == other
    same = {"backbone": {"name": "plain", "widths": [2]}}
    assert config.merge(base, same)["backbone"] == base["backbone"] | {"widths": [2]}
    assert config.merge(base, {"backbone": {"widths": [3]}})["backbone"]["strides"] == [1]


def test_an_entry_that_is_called_name_stands_beside_the_others():
    base = {"teachers": {"a": {"x": 1}}}
    both = {"a": {"x": 1}, "name": {"like": "a"}}
    assert config.merge(base, {"teachers": {"name": {"like": "a"}}})["teachers"] == both


def test_null_as_last_word_on_images_leaves_the_default_run():
    found = config.resolve(ROOT, {"images": "photos"}, {"images": None})
    assert config.dumps(found) == config.dumps(resolve())
    assert config.resolve(ROOT, {"images": None}, {"images": "photos"}).use.target == "images"


def test_null_removes_an_entry_but_not_a_plain_value_or_a_task():
    base = {"teachers": {"a": {"x": 1}, "b": {"x": 2}}, "path": "here", "task": {"name": "t"}}
    assert config.merge(base, {"teachers": {"a": None}})["teachers"] == {"b": {"x": 2}}
    assert config.merge(base, {"path": None})["path"] is None
    assert config.merge(base, {"task": None})["task"] is None


def test_merging_nothing_changes_nothing():
    assert config.merge(BASE, {}) == BASE
    assert config.merge(BASE, copy.deepcopy(BASE)) == BASE


def test_layers_that_come_as_one_cannot_be_frozen_one_by_one():
    timm = {"name": "timm", "model": "resnet18", "last": 2}
    found = resolve(
        teachers={"own": None, "longer": None, "random": None},
        targets={"small": {"backbone": timm}},
        evaluations={
            "nonlinear": config.read(ROOT / "presets/protocols.yaml")["evaluations"]["nonlinear"]
        },
    )
    with pytest.raises(ConfigError, match="evaluations.nonlinear: targets.small.backbone gives"):
        workflow.check_judged(found, True)


def test_like_copies_what_is_not_given():
    found = resolve(teachers={"twin": {"like": "own", "map": 3, "training": {"epochs": 2}}})
    twin, own, deep = (found.teachers[name] for name in ("twin", "own", "deep"))
    assert twin.map == 3 and twin.backbone == own.backbone == "small"
    assert twin.training == deep.training.model_copy(update={"epochs": 2})
    assert twin.task == deep.task
    assert found.teachers["untrained"].task is None


def test_a_target_is_like_another_one_too():
    wide = {"name": "plain", "widths": [64, 64], "strides": [2, 2]}
    network = {"name": "torchvision", "model": "resnet18", "last": None}
    found = resolve(
        targets={
            "wide": {"like": "small", "backbone": wide, "training": {"epochs": 2}},
            "deeper": {"like": "wide", "backbone": network, "supervised": False},
        }
    ).targets
    small = found["small"]
    assert found["wide"].backbone.model_dump() == wide
    assert found["deeper"].backbone.model_dump() == network  # no widths left
    assert found["wide"].task == found["deeper"].task == small.task
    assert found["deeper"].training == small.training.model_copy(update={"epochs": 2})
    assert found["wide"].supervised and not found["deeper"].supervised


@pytest.mark.parametrize("arm", config.ARMS)
def test_no_teacher_is_judged_under_an_arm_whose_networks_are_targets(arm):
    models = workflow.judged(config.resolve(ROOT, {"teachers": {"own": {"evaluate_as": None}}}))
    overlay = {"teachers": {"own": {"evaluate_as": arm}}}
    if arm in {model.describe["arm"] for model in models if model.describe.get("target")}:
        found = refusal(**overlay)
        assert "teachers.own.evaluate_as: " in found and "'random', 'direct' or 'longer'" in found
    else:
        if arm == "random":
            overlay = {"teachers": {"own": {"evaluate_as": arm, "task": None}, "longer": None}}
        assert resolve(**overlay).teachers["own"].evaluate_as == arm
        found = refusal(teachers={"deep": {"evaluate_as": arm}})
        assert "teachers.deep.evaluate_as: expected null or the name of a target" in found
        assert "found the backbone residual" in found


@pytest.mark.parametrize("kind", ["teachers", "targets"])
@pytest.mark.parametrize("other", ["deeep", "twin", ["deep"], {"a": 1}, 5, None])
def test_like_must_name_another_one(kind, other):
    assert f"{kind}.twin.like: expected another of the {kind}" in refusal(
        **{kind: {"twin": {"like": other}}}
    )


def test_a_teacher_that_a_later_overlay_brings_back_teaches_again():
    usual = config.resolve(ROOT, {"images": "p.zip"})
    hog = usual.teachers["hog"].model_dump()
    again = config.resolve(
        ROOT, {"images": "p.zip", "teachers": {"hog": None}}, {"teachers": {"hog": hog}}
    )
    assert again.transfers == usual.transfers
    gone = config.resolve(
        ROOT, {"images": "p.zip", "teachers": {"hog": hog}}, {"teachers": {"hog": None}}
    )
    assert set(gone.transfers) == {"hard"}


def test_null_of_fine_tuning_within_an_evaluation_stays_null():
    voc = config.read(ROOT / "presets" / "voc.yaml")
    found = config.resolve(ROOT, voc, {"evaluations": {"voc_classification": {"finetune": None}}})
    assert found.evaluations["voc_classification"]["finetune"] is None
    assert "finetune" not in config.resolve(ROOT, {"evaluations": {"finetune": None}}).evaluations


def test_likes_must_not_run_in_a_circle():
    circle = {"a": {"like": "b"}, "b": {"like": "c"}, "c": {"like": "a"}}
    assert "like: expected another of the teachers" in refusal(teachers=circle)


# ---------------------------------------------------------------------------- effort, names


@pytest.mark.parametrize("effort, expected", [(1, 10), (0.1, 1), (0.001, 1), (2.5, 25), (0.26, 3)])
def test_effort_multiplies_epochs_and_leaves_at_least_one(effort, expected):
    found = resolve(effort=effort)
    training = found.teachers["deep"].training.model_copy(update={"epochs": 10})
    assert workflow.epochs(found, training) == expected


def test_effort_reaches_the_images_of_fine_tuning():
    jobs = workflow.evaluation_jobs(resolve(effort=0.5), True)
    assert jobs["finetune"]["finetune"]["images"] == BASE["evaluations"]["finetune"]["images"] / 2


def test_a_new_k_adds_networks_and_keeps_the_names_of_the_others():
    few, more = (
        {model.name: model.folders() for model in workflow.judged(resolve(clusters=clusters))}
        for clusters in ([100], [100, 50])
    )
    assert few.items() <= more.items()
    assert len(more) - len(few) == sum(name.endswith("/k100") for name in few)


def test_names_with_hyphens_share_no_state():
    assert workflow.state("small-wide/deep/knn", 1) != workflow.state("small/wide-deep/knn", 1)


def test_without_labels_there_is_no_supervised_bound_and_no_probe():
    found = resolve()
    assert all("supervised" not in model.name for model in workflow.judged(found, labelled=False))
    jobs = workflow.evaluation_jobs(found, labelled=False)
    assert {name for job in jobs.values() for name in job} == {"clusters"}


@pytest.mark.parametrize("labelled", [True, False])
def test_without_an_evaluation_or_a_network_to_judge_there_is_no_run(labelled):
    workflow.check_judged(resolve(), labelled)
    found = resolve(evaluations=dict.fromkeys(BASE["evaluations"]), verdict=[])
    with pytest.raises(ConfigError, match="evaluations: expected one or more, found none"):
        workflow.check_judged(found, labelled)
    idle = {name: {"layers": [], "evaluate_as": None} for name in BASE["teachers"]}
    bound = {"small": {"supervised": not labelled}}  # without labels there is none
    with pytest.raises(ConfigError, match="teachers: expected a network to judge, .* `layers`"):
        workflow.check_judged(resolve(teachers=idle, targets=bound), labelled)


def test_fingerprints_are_those_of_the_values():
    one, two = resolve(), resolve()
    assert workflow.fingerprint(one) == workflow.fingerprint(two)
    assert workflow.fingerprint(one) != workflow.fingerprint(resolve(seeds=4))


def test_the_report_shows_puzzles_of_the_first_teacher_of_each_pretext_task():
    assert workflow.first_of_each_task(resolve()) == ["deep"]
    found = config.resolve(ROOT, config.read(ROOT / "presets" / "pretext_tasks.yaml"))
    assert workflow.first_of_each_task(found) == ["deep", "jigsaw", "context", "rotation"]


def test_controls_take_nothing_from_a_teacher_that_was_trained_elsewhere():
    found = config.resolve(ROOT, {"teachers": {"deep": {"weights": FOREIGN}}}).teachers
    assert found["deep"].weights.path == "w.pth"
    assert {name for name in found if found[name].weights} == {"deep"}
    found = config.resolve(ROOT, {"teachers": {"deep": {"features": "f.npy"}}})
    assert {name for name, one in found.teachers.items() if one.features} == {"deep"}
    found = config.resolve(ROOT, {"teachers": {"own": {"weights": FOREIGN}}}).teachers
    assert found["own"].weights.path == "w.pth" and not found["random"].weights
    overlay = {"teachers": {"b": {"like": "a", "weights": None}, "a": {"like": "deep"}}}
    overlay["teachers"]["a"]["weights"] = FOREIGN
    assert config.resolve(ROOT, overlay).teachers["b"].weights is None


@pytest.mark.parametrize(
    "teachers, refused",
    [
        ({"deep": {"task": None}}, "own.evaluate_as"),
        ({"longer": {"task": None}}, "longer.evaluate_as"),
        ({"random": {"weights": FOREIGN}}, "random.weights"),
        ({"own": {"evaluate_as": "random"}}, "own.task"),
    ],
)
def test_no_arm_is_another_network_than_its_name_says(teachers, refused):
    assert f"teachers.{refused}" in refusal(teachers=teachers)


def test_a_kind_of_several_teachers_loses_none_without_a_word():
    kind = {"kind": {"name": "multi_similarity", "anchors": 9, "temperature": 0.1}}
    both, silent = kind | {"of": ["own", "hog"]}, {"own": {"layers": []}}
    assert "both.of: 'own' teaches nothing" in refusal(teachers=silent, transfers={"both": both})
    assert resolve(transfers={"both": both}).transfers["both"].of == ["own", "hog"]
    resolve(teachers=silent, transfers={"hard": {"of": ["own", "hog"]}})


def test_only_networks_that_teach_or_are_judged_are_trained():
    everything = set(BASE["teachers"])
    assert set(workflow.at_work(config.resolve(ROOT, {}))) == everything
    idle = config.resolve(ROOT, {"teachers": {"deep": {"layers": []}}})
    assert set(workflow.at_work(idle)) == everything - {"deep", "untrained"}  # it is like deep
    taken = config.resolve(ROOT, {"teachers": {"deep": {"features": "a/f.npy"}}})
    assert set(workflow.at_work(taken)) == everything - {"deep"}
    assert workflow.keys_of(taken.teachers["deep"]) == "a/f.keys.txt"
    whole = config.resolve(ROOT, {"teachers": {"deep": {"features": "a/f.h5"}}})
    assert workflow.keys_of(whole.teachers["deep"]) == "a/f.h5"
    budget = workflow.budget(taken, taken.teachers["longer"])
    assert [part["task"].name for part in budget] == ["classification"]  # deep costs nothing here


def test_every_file_from_elsewhere_is_known_before_the_work():
    mine = {"name": "file", "path": "net.py", "function": "f", "options": {}, "digest": None}
    found = config.resolve(ROOT, {
        "teachers": {
            "one": {"like": "untrained", "weights": FOREIGN},
            "two": {"like": "untrained", "features": "f.npy"},
        },
        "targets": {"small": {"backbone": mine}},
    })  # fmt: skip
    assert workflow.given_files(found) == {
        "teachers.one.weights.path": "w.pth",
        "teachers.two.features": "f.npy",
        "teachers.two.features (keys)": "f.keys.txt",
        "targets.small.backbone.path": "net.py",
    }


def test_another_file_of_code_is_another_configuration(tmp_path):
    mine = {"name": "file", "path": str(tmp_path / "net.py"), "function": "f", "options": {}}
    overlay = {"targets": {"small": {"backbone": mine | {"digest": None}}}}
    found = []
    for text in ("one", "two"):
        (tmp_path / "net.py").write_text(text)
        found.append(config.resolve(ROOT, overlay).targets["small"].backbone.options()["digest"])
    assert found == [hashlib.sha256(text).hexdigest() for text in (b"one", b"two")]
    (tmp_path / "net.py").unlink()
    assert config.resolve(ROOT, overlay).targets["small"].backbone.options()["digest"] is None


def test_the_reference_names_every_key_of_the_default_configuration():
    text = reference.reference()
    for key in (
        "seeds",
        "teachers.NAME.training.lr",
        "teachers.NAME.weights.mean",
        "targets.NAME.supervised",
        "clustering.pca",
    ):
        assert f"| `{key}` |" in text
    for kind in ("backbones", "tasks", "evaluations"):
        assert all(f"## {kind}: `{name}`" in text for name in config.plugins(kind))
    assert "|  |" not in text  # every key has a type and a meaning


# ---------------------------------------------------------------------------- imports


def test_reading_the_configuration_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from kt import config, workflow\n"
        f"settings = config.resolve(Path({str(ROOT)!r}), {{'images': 'p'}})\n"
        "workflow.judged(settings), workflow.evaluation_jobs(settings, True)\n"
        "heavy = {'torch', 'torchvision', 'sklearn', 'skimage', 'matplotlib', 'faiss', 'scipy'}\n"
        "print(*sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# ---------------------------------------------------------------------------- any input

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 10**6), st.floats(), st.text(max_size=6),
    st.sampled_from(["1e-3", "[1,2]", "[", "deep", "small", "knn", "plain", "../x", "{}"]),
)  # fmt: skip
KEYS = st.one_of(
    st.text(max_size=5), st.sampled_from(["name", "like", "task", "size", "layers", "backbone"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


def paths(values, prefix=()):
    """Lists the dotted places of a mapping."""
    for key, value in values.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from paths(value, (*prefix, key))


def nested(path, value):
    for key in reversed(path):
        value = {key: value}
    return value


def answer(overlay):
    """Gives the configuration, or nothing where it is refused; any other error is a bug."""
    try:
        return config.resolve(ROOT, overlay)
    except ConfigError as error:
        assert str(error)
        return None


FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@given(st.sampled_from(list(paths(BASE))), VALUES)
@FUZZ
def test_any_value_at_any_place_is_accepted_or_refused_but_never_crashes(path, value):
    found = answer(nested(path, value))
    assert found is None or isinstance(found, config.Config)


@given(st.dictionaries(st.sampled_from(list(BASE)) | st.text(max_size=8), VALUES, max_size=3))
@FUZZ
def test_any_overlay_is_accepted_or_refused_but_never_crashes(overlay):
    found = answer(overlay)
    assert found is None or isinstance(found, config.Config)


@given(st.sampled_from(["teachers", "targets", "datasets", "evaluations"]), KEYS, VALUES)
@FUZZ
def test_any_new_entry_is_accepted_or_refused_but_never_crashes(section, name, value):
    answer({section: {name: value}})


@pytest.mark.parametrize("key", [5, 1.5, True, None, (1, 2)])
@pytest.mark.parametrize("section", ["teachers", "datasets", "evaluations", "clustering", None])
def test_keys_that_are_no_strings_are_refused(section, key):
    overlay = {section: {key: {"like": "nobody"}}} if section else {key: 1}
    assert answer(overlay) is None


def test_a_resolved_configuration_can_be_written_and_read_again():
    found = resolve()
    text = yaml.safe_dump(found.model_dump(mode="json"))
    assert config.check(config.Config, yaml.safe_load(text)) == found
    assert config.dumps(found) == config.dumps(config.check(config.Config, yaml.safe_load(text)))


def test_null_on_the_command_line_is_null():
    said = {"teachers": {"longer": "null"}, "numbers": ["null", 1], "name": "nullable"}
    null = {"teachers": {"longer": None}, "numbers": [None, 1], "name": "nullable"}
    assert config.with_nulls(said) == null


# ---------------------------------------------------------------------------- what reaches whom


SET = BASE["datasets"]["fashion_mnist"]


SIMILAR = {"name": "similarity", "anchors": 9, "temperature": 0.1}


def test_no_part_of_a_budget_has_a_budget_itself():
    said = refusal(teachers={"more": {"like": "longer", "budget": ["longer"]}})
    assert "teachers.more.budget: 'longer' has no budget of its own to add" in said


def test_there_are_at_most_as_many_clusters_as_images_of_their_own_data_set():
    resolve(clusters=FEW)
    few = {"few": SET | {"unlabelled": 50}}
    resolve(datasets=few, use={"evaluate": "few"})
    said = refusal(datasets=few, use={"cluster": "few"})
    assert "k = 100 is more than the 50 images of datasets.few.unlabelled" in said


def test_layers_whose_scores_are_added_are_checked():
    values = config.read(ROOT / "presets/voc.yaml")["evaluations"]["voc_segmentation"]
    said = refusal(evaluations={"voc_segmentation": values | {"skips": ["conv9"]}})
    assert "evaluations.voc_segmentation.skips: 'conv9' is not a layer of targets.small" in said


def test_layers_of_given_features_have_any_name():
    resolve(teachers={"hog": {"features": "x.npy", "layers": ["mine"]}})


@pytest.mark.parametrize("role, fails", [("pretext", True), ("evaluate", False)])
def test_a_pretext_task_must_fit_the_images_it_learns_from(role, fails):
    given = {"datasets": {"tiny": SET | {"size": 12}}, "use": {role: "tiny"}}
    assert "teachers.deep.task: " in refusal(**given) if fails else resolve(**given)


def test_two_layers_that_come_to_the_same_one_are_one():
    plain = {"name": "plain", "widths": [8, 8], "strides": [2, 2]}
    found = resolve(images="x", teachers={"deep": {"backbone": plain}})
    assert found.teachers["deep"].layers == ["conv2"]


def test_features_of_a_teacher_are_made_as_it_says():
    found = lessons.describers(
        resolve(teachers={"deep": {"pool": "max", "mirror": True, "map": 2}})
    )
    assert found["deep"] == lessons.Describer("results/teachers/deep/s0", 2, "max", True)


def test_clusters_of_the_first_k_are_shown_where_features_teach():
    alike = {"kind": SIMILAR, "of": ["deep"]}
    found = resolve(clusters=["auto", 7, 50], transfers={"hard": {"of": ["hog"]}, "alike": alike})
    assert lessons.shown(found) == [
        ("deep", "block3", 7), ("hog", "hog", "auto"), ("hog", "hog", 50), ("hog", "hog", 7),
    ]  # fmt: skip


def test_targets_learn_of_their_own_images_from_clusters_of_others():
    found = resolve(
        datasets={"other": SET}, use={"target": "other"}, transfers={"hard": {"of": ["hog"]}}
    )
    assert lessons.all_tables(found) == {
        "results/pseudo_labels/hog/hog/fashion_mnist/k100/other-train-unlabelled.h5",
        "results/clusters/hog/hog/fashion_mnist/k100.h5",
        "results/features/hog/hog/fashion_mnist-train-unlabelled.h5",
    }
    pretext, target = workflow.budget(found, found.teachers["longer"])
    packs = [f"results/data/{name}/train-unlabelled.h5" for name in ("fashion_mnist", "other")]
    assert [pretext["pack"], target["pack"]] == packs
    assert target["task"].options()["crop"] == 1 != found.targets["small"].task.options()["crop"]


def test_seeds_and_effort_reach_every_network():
    found = resolve(
        seed=5, seeds=4, effort=1e-9, teachers={"deep": {"seeds": 1}, "hog": {"seeds": None}}
    )
    assert [workflow.teacher_seeds(found, name) for name in ("deep", "hog")] == [1, 4]
    assert workflow.describe_teacher(found, "deep", 2)["seed"] == 7
    assert workflow.describe_target(found, "small", "supervised", 2)["seed"] == 7
    assert {part["epochs"] for part in workflow.budget(found, found.teachers["longer"])} == {1}
    assert workflow.evaluation_jobs(found, True)["finetune"]["finetune"]["images"] == 1


@pytest.mark.parametrize("as_if, most, off", [(0, 3, True), (9, 1, True), (9, 3, False)])
def test_small_sets_are_learned_longer_unless_it_is_off(as_if, most, off):
    assert (workflow.few_images(resolve(few_images={"as_if": as_if, "most": most})) == []) == off
