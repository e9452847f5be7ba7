"""Choice, intervals, differences and the words made of them."""

import itertools
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kt import report
from kt.core import charts, figures, records, step, summary, verdict
from kt.core.choice import scores, settle_layers
from kt.core.intervals import T_95, Interval, interval, outcome
from kt.core.records import Column
from kt.core.step import DataError

KNN = Column("knn", "top1")


def record(arm, value, seed=0, evaluation="knn", metric="top1", **more):
    names = {"model": arm, "arm": arm, "dataset": "shapes", "n": 100}
    return {
        **names,
        "evaluation": evaluation,
        "metric": metric,
        "value": value,
        "seed": seed,
    } | more


def run_of(scores, **more):
    """Gives top-1 records of arms: {arm: values over seeds}."""
    return [record(arm, v, seed, **more) for arm, vs in scores.items() for seed, v in enumerate(vs)]


def test_the_quantiles_are_those_of_students_t():
    stats = pytest.importorskip("scipy.stats")
    expected = stats.t.ppf(0.975, np.arange(1, 31))
    assert np.abs(np.array(T_95) - expected).max() < 6e-4
    for number in (32, 40, 1000):  # beyond the table: the error of one among zeros
        values = np.eye(number)[0]
        half = stats.t.ppf(0.975, number - 1) * values.std(ddof=1) / number**0.5
        assert interval(values).half == pytest.approx(half, rel=3e-4)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=80))
def test_the_interval_is_that_of_a_t_test(values):
    stats = pytest.importorskip("scipy.stats")
    found = interval(values)
    error = np.std(values, ddof=1) / len(values) ** 0.5
    expected = stats.t.ppf(0.975, len(values) - 1) * error
    assert found.mean == pytest.approx(np.mean(values))
    assert found.half == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_one_seed_has_a_mean_but_no_interval_unless_test_images_are_known():
    assert interval([0.7]) == Interval(0.7, None, 1)
    images = np.array([1.0, 0, 1, 1])
    assert interval([0.75], images).half == pytest.approx(3.182 * 0.5 / 2)
    assert interval([0.75], images).images


def crossed(rng, seeds, images):
    """Draws what each test image gains by a seed's training: both matter, and both together."""
    gain = 0.4 * rng.normal(size=images) + 0.01 * rng.normal(size=(seeds, 1))
    return gain + 0.3 * rng.normal(size=(seeds, images))


@pytest.mark.parametrize(("seeds", "images"), [(1, 1000), (3, 200), (5, 1000), (5, 4000)])
def test_the_interval_holds_the_truth_as_often_as_it_says_and_without_images_does_not(
    seeds, images
):
    rng, inside, alone = np.random.default_rng(seeds + images), [], []
    for _ in range(400):
        gains = crossed(rng, seeds, images)
        found = interval(gains.mean(1), gains.mean(0))
        inside.append(abs(found.mean) <= found.half)
        alone.append(abs(found.mean) <= (interval(gains.mean(1)).half or 0.0))
    rate = np.mean(inside)
    # One seed says nothing of the noise of training, which is the smaller part here.
    assert rate >= (0.93 if seeds > 1 else 0.9)
    assert np.mean(alone) < rate - 0.02


def answers(value, n=100, **more):
    """Gives the fields of a record of n images of which the first ones were right."""
    right = np.arange(n) < round(value * n)
    return {"value": value, "n": n, "right": records.packed(right), **more}


def test_gaps_are_paired_by_test_image():
    ours = [record("transfer", 0, s) | answers(0.6) for s in range(3)]
    same = [record("direct", 0, s) | answers(0.5) for s in range(3)]
    others = [dict(r) for r in same]
    for r in others:  # as many right, but others
        r["right"] = records.packed(np.arange(100) >= 50)
    near, far = summary.paired(ours, same, KNN), summary.paired(ours, others, KNN)
    assert near.mean == far.mean == pytest.approx(0.1)
    gains = np.array([0.0] * 50 + [1.0] * 10 + [0.0] * 40)
    assert near.half == pytest.approx(1.984 * gains.std(ddof=1) / 10, rel=1e-3)
    assert far.half > 3 * near.half


def test_a_gap_without_the_answers_of_one_side_has_the_interval_over_seeds():
    ours = [record("transfer", 0, s) | answers(0.6) for s in range(3)]
    theirs = [record("direct", v, s) for s, v in enumerate([0.5, 0.4, 0.3])]
    assert summary.paired(ours, theirs, KNN) == interval([0.6 - 0.5, 0.6 - 0.4, 0.6 - 0.3])


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_answers_come_back_as_they_were(right):
    found = records.unpacked({"right": records.packed(np.array(right)), "n": len(right)})
    assert found.tolist() == [float(one) for one in right]


@pytest.mark.parametrize("right", ["", "!", "AAAAAAAAAAAAAAAAAA==", 7, None])
def test_answers_that_are_not_those_of_the_value_are_refused(tmp_path, right):
    path = tmp_path / "knn.json"
    found = record("transfer", 0) | answers(0.6)
    step.write_json(path, {"records": [found]})
    assert records.read_evaluation(path)[0] == [found]
    step.write_json(path, {"records": [found | {"right": right}]})
    with pytest.raises(DataError, match="expected `right` to hold 100 bits"):
        records.read_evaluation(path)


def test_one_seed_with_test_images_says_what_its_interval_covers():
    found = [record(arm, 0) | answers(v) for arm, v in (("transfer", 0.6), ("direct", 0.4))]
    comparison = summary.compare(found, ["knn"])
    assert "over the draw of the test images alone." in verdict.scope(comparison)
    main, said = verdict.sentences(comparison)
    assert "is not judged" in main and "transfer minus direct 20.0" in said and "±" in said


def test_the_report_says_which_intervals_are_over_seeds_alone():
    found = [
        record(arm, value, seed, evaluation=evaluation)
        | (answers(value) if evaluation == "knn" else {})
        for arm, value in (("transfer", 0.6), ("direct", 0.4))
        for seed in range(3)
        for evaluation in ("knn", "svm")
    ]
    said = verdict.scope(summary.compare(found, ["knn"]))
    assert "over seeds alone for linear-SVM top-1." in said and "training." not in said
    only = [r for r in found if r["evaluation"] == "knn"]
    assert "alone" not in verdict.scope(summary.compare(only, ["knn"]))


def test_nothing_is_no_less_than_nothing():
    assert [verdict.percent(v) for v in (-0.0004, 0.0004, -0.001)] == ["0.0", "0.0", "−0.1"]


def test_answers_for_different_images_are_not_compared():
    found = [record("transfer", 0) | answers(0.6), record("direct", 0) | answers(0.6, n=50)]
    with pytest.raises(DataError, match=r"shapes \(100 images\), shapes \(50 images\)"):
        records.sort_records(found)


def of_voc(arm, layer, seed=0, **values):
    """Gives records of VOC classification: {metric: value} of one layer."""
    more = {"evaluation": "voc_classification", "layer": layer}
    return [record(arm, v, seed, metric=metric, **more) for metric, v in values.items()]


def test_a_layer_is_chosen_by_held_out_pictures_of_voc_and_arms_are_compared_by_map():
    found = []
    for arm, gain in (("transfer", 0.1), ("direct", 0.0)):
        found += of_voc(arm, "conv1", validation_map=0.6, map_11=0.3 + gain, map_area=0.3)
        found += of_voc(arm, "conv2", validation_map=0.5, map_11=0.8, map_area=0.8)
    comparison = summary.compare(found, ["knn"])
    assert [verdict.title(column) for column in comparison.columns] == [
        "VOC07 cls mAP", "VOC07 cls mAP (area)",
    ]  # fmt: skip
    cell = next(row for row in comparison.arms if row.arm == "direct").cells[0]
    assert (cell.layer, cell.interval.mean) == ("conv1", 0.3)
    (column, gaps), *others = comparison.differences.items()
    assert (column.metric, gaps[0].control, others) == ("map_11", "direct", [])
    assert "Points of VOC07 cls mAP" in verdict.sentences(comparison)[1]
    assert comparison.rule == ""  # no model is chosen by it


def test_columns_of_voc_have_names_of_their_own_behind_the_others():
    pairs = [("detection", "map_11"), ("segmentation", "miou"), ("classification", "tuned_map_11")]
    found = [record("transfer", 0.5, evaluation=f"voc_{e}", metric=metric) for e, metric in pairs]
    found += [record("transfer", 0.5), record("transfer", 0.5, evaluation="clusters", metric="nmi")]
    columns = summary.compare(found, ["knn"]).columns
    assert [verdict.title(column) for column in columns] == [
        "k-NN", "NMI", "VOC07 cls tuned mAP", "VOC07 det mAP", "VOC12 seg mIoU",
    ]  # fmt: skip


def test_differences_are_paired_by_seed():
    values = [0.5, 0.6, 0.7]  # seeds differ much, the gap hardly
    scores = {"transfer": [v + 0.05 for v in values], "direct": values, "longer": [0.4]}
    gaps = summary.compare(run_of(scores), ["knn"]).differences[KNN]
    direct, longer = gaps
    assert direct.control == "direct" and direct.outcome == "beats"
    assert direct.interval.mean == pytest.approx(0.05) and direct.interval.half < 1e-9
    assert longer.interval.n == 1 and longer.interval.mean == pytest.approx(0.15)


def test_seeds_that_only_one_of_two_arms_has_do_not_count():
    found = [record("transfer", 0.9, 0), record("transfer", 0.5, 1), record("direct", 0.4, 1)]
    [gap] = summary.compare(found, ["knn"]).differences[KNN]
    assert gap.interval.mean == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("gap", "expected"),
    [
        (Interval(0.01, 0.005, 3), "tie"),
        (Interval(0.03, 0.005, 3), "beats"),
        (Interval(0.05, 0.06, 3), "tie"),
        (Interval(-0.05, 0.01, 3), "behind"),
        (Interval(0.019, None, 1), "unjudged"),
        (Interval(0.05, 0.01, 1, 4000), "unjudged"),
        (Interval(0.05, 0.01, 3, 49), "unjudged"),
        (Interval(0.05, 0.01, 3, 50), "beats"),
        (Interval(0.0, 0.0, 3), "tie"),
        *[(Interval(high - low, 0.0, 3), "tie") for high, low in ((0.62, 0.6), (0.42, 0.4))],
    ],
)
def test_a_gap_counts_only_beyond_its_interval_and_two_points(gap, expected):
    assert outcome(gap) == expected


def candidates(validation, test):
    for (name, right), top1 in zip(validation.items(), test, strict=True):
        more = {"model": name, "teacher": name, "k": 10}
        yield record("transfer", right, metric="validation_top1", **more)
        yield record("transfer", top1, **more)


def test_the_choice_follows_validation_and_never_test():
    for test in itertools.permutations([0.9, 0.5, 0.1]):
        found = list(candidates({"a": 0.5, "b": 0.7, "c": 0.6}, test))
        comparison = summary.compare(found, ["knn"])
        assert comparison.chosen == {"transfer": "b"}
        assert comparison.arms[0].cells[0].interval.mean == test[1]
        assert [row.chosen for row in comparison.candidates] == [False, True, False]


def test_several_networks_of_one_control_are_told_apart():
    found = list(candidates({"own": 0.5, "own_rotation": 0.7}, [0.1, 0.2]))
    found = [{**one, "arm": "direct", "teacher": None, "k": None} for one in found]
    comparison = summary.compare(found, ["knn"])
    assert [row.about for row in comparison.candidates] == ["own", "own_rotation"]
    assert [row.about for row in comparison.arms] == ["own_rotation"]
    one = summary.compare([one for one in found if one["model"] == "own"], ["knn"])
    assert [row.about for row in one.arms] == [""]


def test_validation_scores_of_evaluations_that_are_not_listed_do_not_choose():
    found = list(candidates({"a": 0.5, "b": 0.7}, [0.1, 0.1]))
    for name, value in (("a", 0.9), ("b", 0.1)):
        more = {"evaluation": "linear", "metric": "validation_top1", "layer": "conv1"}
        found.append(record("transfer", value, model=name, **more))
    assert summary.compare(found, ["knn"]).chosen["transfer"] == "b"
    assert summary.compare(found, ["knn", "linear"]).chosen["transfer"] == "a"


def test_a_candidate_without_all_listed_scores_is_not_chosen():
    found = list(candidates({"a": 0.9, "b": 0.5}, [0.1, 0.1]))
    more = {"evaluation": "linear", "metric": "validation_top1", "layer": "conv1"}
    found.append(record("transfer", 0.4, model="b", **more))
    assert summary.compare(found, ["knn", "linear"]).chosen["transfer"] == "b"


def test_without_labels_the_agreement_of_views_chooses():
    more = {"evaluation": "clusters", "metric": "view_nmi"}
    found = [record("transfer", v, model=m, **more) for m, v in (("a", 0.6), ("b", 0.8))]
    comparison = summary.compare(found, ["knn"])
    assert (comparison.rule, comparison.chosen) == ("view_nmi", {"transfer": "b"})
    said = " ".join(verdict.sentences(comparison))
    assert "The network to use is b." in said and "rule without labels" in said
    assert "train/CLASS" in said
    assert not any(cell.best for row in comparison.arms for cell in row.cells)


def test_without_labels_and_transfer_no_network_is_recommended():
    more = {"evaluation": "clusters", "metric": "view_nmi"}
    found = [record(arm, value, **more) for arm, value in (("random", 0.5), ("direct", 0.6))]
    said = " ".join(verdict.sentences(summary.compare(found, ["knn"])))
    assert "no network of the arm transfer" in said and "The network to use" not in said


def layered(test):
    for layer, validation, top1 in zip(("one", "two"), (0.8, 0.6), test, strict=True):
        more = {"evaluation": "linear", "layer": layer}
        yield record("transfer", validation, metric="validation_top1", **more)
        yield record("transfer", top1, **more)


def test_the_probed_layer_is_chosen_on_validation():
    for test in ([0.1, 0.9], [0.9, 0.1]):
        comparison = summary.compare(list(layered(test)), ["linear"])
        [row] = comparison.arms
        assert (row.cells[0].interval.mean, row.cells[0].layer) == (test[0], "one")


def test_settling_layers_leaves_other_records_alone():
    others = run_of({"direct": [0.1, 0.2]}) + [record("direct", 0.3, layer="only", metric="nmi")]
    kept = settle_layers([*layered([0.1, 0.9]), *others])
    assert [r for r in kept if r["arm"] == "direct"] == others
    assert {r["layer"] for r in kept if r["arm"] == "transfer"} == {"one"}


def test_another_targets_records_are_passed_over_and_shared_ones_kept():
    small, large = (record("transfer", v, model=t, target=t) for t, v in (("s", 0.5), ("l", 0.6)))
    found = [small, large, record("direct", 0.4)]
    assert summary.targets(found) == ["s", "l"]
    comparison = summary.compare(found, ["knn"], target="s")
    assert comparison.chosen == {"direct": "direct", "transfer": "s"}


def test_records_of_teachers_get_the_target_whose_architecture_they_have():
    settings = {"teachers": {"own": {"backbone": "small"}, "deep": {"backbone": {"name": "r"}}}}
    found = [record("direct", 0.5, teacher="own"), record("transfer", 0.5, teacher="deep")]
    named = records.with_targets(found, settings)
    assert [r.get("target") for r in named] == ["small", None]


def test_the_best_of_a_column_is_marked_but_never_the_bound():
    scores = {"direct": [0.5], "transfer": [0.6], "supervised": [0.9]}
    rows = summary.compare(run_of(scores), ["knn"]).arms
    assert {row.arm: row.cells[0].best for row in rows} == {
        "direct": False,
        "transfer": True,
        "supervised": False,
    }


def test_the_verdict_says_whom_transfer_beats_equals_and_falls_behind():
    wobble = [0.0, 0.001, -0.001]
    means = {"transfer": 0.795, "direct": 0.724, "random": 0.741, "hog": 0.795, "supervised": 0.865}
    scores = {arm: [m + (-1) ** i * w for w in wobble] for i, (arm, m) in enumerate(means.items())}
    comparison = summary.compare(run_of(scores), ["knn"])
    first, second = verdict.sentences(comparison)
    assert first.startswith(
        "On these images transfer beats direct by 7.1\u00a0±\u00a00.5 points of k-NN"
    )
    # A control that does as well stands in the first sentence, too.
    assert "and random by 5.4\u00a0±\u00a00.0; it makes no clear difference to hog (0.0" in first
    assert "falls behind supervised (all labels) by 7.0" in second
    assert verdict.ahead(comparison) == []


def test_a_control_that_is_better_stands_in_the_main_sentence_and_its_network_beside_ours(tmp_path):
    scores = {"transfer": 0.7, "direct": 0.6, "random": 0.5, "hog": 0.8, "supervised": 0.9}
    found = run_of({arm: [value, value + 0.001] for arm, value in scores.items()})
    comparison = summary.compare(found, ["knn"])
    first, second = verdict.sentences(comparison)
    assert "it falls behind hog by 10.0" in first and "hog" not in second
    assert verdict.ahead(comparison) == [("hog", "k-NN top-1")]  # and not the one with all labels
    models = [
        {"name": name, "seed": 0, "folder": tmp_path / arm}
        for arm, name in comparison.chosen.items()
    ]
    text = report.plain_summary([comparison], models, tmp_path / "index.html")
    assert f"backbone  {tmp_path / 'transfer/model.safetensors'}" in text
    assert f"better    {tmp_path / 'hog/model.safetensors'}  (hog, k-NN top-1)" in text


def test_a_look_and_uneven_classes_are_remarked_on():
    data = {"images": {"splits": {"test": {"classes": {"cat": 60, "dog": 12, "rare": 1}}}}}
    settings = {"effort": 0.05, "use": {"evaluate": "images"}}
    look, uneven = report.remarks(settings, data)
    assert "effort 0.05" in look and "right for 82.2 %" in uneven
    data["images"]["splits"]["test"]["classes"] = {"cat": 30, "dog": 25, "rare": 20}
    assert report.remarks(settings | {"effort": 1}, data) == []
    pool = {"images": {"splits": {"train-unlabelled": {"images": 300}}}}
    small = {"clusters": [5, "auto", 50], "use": {"cluster": "images"}}
    (few,) = report.remarks(small, pool)
    assert "k = 50 for 300 images: 6.0 a cluster" in few and "clusters=15" in few
    assert report.remarks(small | {"clusters": ["auto", 30]}, pool) == []
    kinds = {"transfers": {"finer": {"kind": {"name": "multi_k", "factors": [0.5, 4]}}}}
    (few,) = report.remarks(small | kinds | {"clusters": [20]}, pool)
    assert "k = 80 for 300 images: 3.8 a cluster" in few and "clusters=3." in few
    kinds = {"transfers": {"alike": {"kind": {"name": "similarity", "anchors": 9}}}}
    assert report.remarks(small | kinds, pool) == []  # no k, no small clusters
    assert report.remarks({}, {}) == report.remarks(settings | {"effort": 1}, {"images": {}}) == []


def test_a_single_seed_beside_others_is_not_judged():
    scores = {"transfer": [0.8, 0.81], "direct": [0.7, 0.7], "longer": [0.71]}
    comparison = summary.compare(run_of(scores), ["knn"])
    second = verdict.sentences(comparison)[1]
    assert second.endswith("is not judged against longer (9.0 points of k-NN top-1).")
    assert "nothing is judged" in verdict.scope(comparison)


def test_one_seed_alone_is_not_judged_and_says_what_to_do():
    comparison = summary.compare(run_of({"transfer": [0.8], "direct": [0.7]}), ["knn"])
    assert verdict.sentences(comparison) == [
        "On these images transfer is not judged against the other arms.",
        "Points of k-NN top-1, transfer minus direct 10.0.",
    ]
    said = verdict.scope(comparison)
    assert said.startswith("One seed") and said.endswith("Give seeds=3.")


def test_scores_that_no_image_is_right_for_are_not_judged_on_a_handful_either():
    found = [
        record(arm, value, seed) | {"n": 40}
        for arm, value in (("transfer", 0.8), ("direct", 0.4))
        for seed in range(3)
    ]
    (gap,) = summary.compare(found, ["knn"]).differences[KNN]
    assert gap.interval.images == 0 and gap.outcome == "unjudged"


def test_a_handful_of_test_images_is_not_judged():
    for number, expected in ((40, "unjudged"), (100, "beats")):
        found = [
            record(arm, 0, seed) | answers(value, number)
            for arm, value in (("transfer", 1.0), ("direct", 0.0))
            for seed in range(3)
        ]
        comparison = summary.compare(found, ["knn"])
        (gap,) = comparison.differences[KNN]
        assert gap.outcome == expected
        assert ("fewer than 50 test images" in verdict.scope(comparison)) == (number == 40)


def test_without_an_arm_to_compare_with_the_verdict_says_so():
    said = verdict.sentences(summary.compare(run_of({"transfer": [0.8]}), ["knn"]))
    assert said == ["There is nothing to compare: the results hold no arm to compare it with."]
    of_clusters = {"evaluation": "clusters", "metric": "nmi"}
    found = run_of({"transfer": [0.8], "direct": [0.7]}, **of_clusters)
    (said,) = verdict.sentences(summary.compare(found, ["knn"]))
    assert "no evaluation gives a score that arms are compared by (top-1, mAP or mIoU)" in said


def test_the_scope_speaks_of_what_the_run_has():
    """Of an mAP no image is known to be right: nothing on test images, nor on few labels."""
    scores = {"transfer": [0.8, 0.81, 0.8], "direct": [0.5], "random": [0.4, 0.41, 0.4]}
    found = run_of(scores, evaluation="voc_classification", metric="map_11")
    said = verdict.scope(summary.compare(found, []))
    assert "paired by seed (1 to 3 of them); ± is the 95 % interval over seeds alone: " in said
    assert "test image" not in said and "few labels" not in said
    assert "Of one seed there is none, and nothing is judged." in said
    few = verdict.scope(summary.compare([one | {"n": 40} for one in found], []))
    assert "With fewer than 50 test images nothing is judged." in few
    found = run_of(scores, evaluation="finetune", labels_per_class=10)
    assert "the draw of the few labels" in verdict.scope(summary.compare(found, []))


def test_a_table_says_what_its_intervals_are_over():
    def covered(*found, hidden=()):
        comparison = summary.compare([one for part in found for one in part], ["knn"])
        return verdict.covered(comparison.columns, comparison.arms, hidden)

    several = [record("transfer", 0.6, seed) | answers(0.6) for seed in range(3)]
    one = [record("transfer", 0.6) | answers(0.6)]
    nmi = run_of({"transfer": [0.4, 0.5, 0.4]}, evaluation="clusters", metric="nmi")
    assert covered(several) == "over seeds and test images"
    assert covered(several, nmi) == "over seeds and test images (NMI: seeds alone)"
    assert covered(several, nmi, hidden=["nmi"]) == "over seeds and test images"
    assert (covered(one), covered(nmi)) == ("over test images", "over seeds")
    assert covered(run_of({"transfer": [0.8]})) == ""


def test_where_nothing_chose_the_report_says_so():
    found = run_of({"transfer": [0.8, 0.7], "direct": [0.7, 0.6]})
    comparison = summary.compare(found, [])
    assert comparison.rule == "" and comparison.differences
    only = run_of({"transfer": [0.8]}, evaluation="clusters", metric="view_nmi")
    said = verdict.sentences(summary.compare(only, ["knn"])._replace(rule=""))
    assert "Nothing was measured to choose by: the first of each arm by name stands." in said[1]


@given(st.integers(1, 9), st.integers(1, 4))
def test_the_plain_table_is_never_wider_than_a_hundred_columns(num_labels, seeds):
    found = []
    for arm in summary.ARMS:
        found += run_of({arm: [0.5] * seeds})
        for labels in range(num_labels):
            more = {"evaluation": "finetune", "labels_per_class": 10**labels}
            found += run_of({arm: [0.123] * seeds}, **more)
    comparison = summary.compare(found, ["knn"])
    lines = verdict.plain_table(comparison.columns, comparison.arms).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith("transfer") for line in lines) >= 1 + (num_labels > 8)
    assert "\n".join(lines).count("12.3") == len(summary.ARMS) * num_labels


def test_the_plain_table_of_the_default_run_is_one_block():
    columns = [("knn", "top1", None), ("linear", "top1", None), ("finetune", "top1", 10)]
    columns += [("finetune", "top1", 100)]
    columns += [("clusters", metric, None) for metric in ("nmi", "purity", "hungarian", "view_nmi")]
    found = []
    for evaluation, metric, number in columns:
        more = {"evaluation": evaluation, "metric": metric, "labels_per_class": number}
        found += run_of({"supervised": [0.791, 0.795, 0.799]}, **more)
    comparison = summary.compare(found, ["knn"], {"supervised": 1234.0})
    text = verdict.plain_table(comparison.columns, comparison.arms)
    assert Column("clusters", "hungarian") in comparison.columns and "matched" not in text
    assert "\n\n" not in text and text.count("79.5±1.0") == len(columns) - 1


def test_sorting_does_not_depend_on_the_order_of_the_input():
    found = run_of({"direct": [0.1, 0.2], "hog": [0.3] * 12}) + list(layered([0.1, 0.2]))
    found += [record("hog", 0.5, evaluation="finetune", labels_per_class=n) for n in (100, 20, 3)]
    shuffled = [found[i] for i in np.random.default_rng(0).permutation(len(found))]
    assert records.sort_records(shuffled) == records.sort_records(found)
    numbers = [
        r["labels_per_class"] for r in records.sort_records(found) if "labels_per_class" in r
    ]
    assert numbers == [3, 20, 100]


def test_layers_stand_in_the_order_of_their_network():
    order = ["stem", "block2", "block10"]
    found = [record("direct", 0.1, layer=layer) for layer in order]
    told = records.sort_records(found[::-1], {"direct": order})
    assert [row["layer"] for row in told] == order
    assert [row["layer"] for row in records.sort_records(found)] == sorted(order)


def probed(arm, scores, evaluation="linear", **more):
    """Gives test records {layer: top-1 over seeds} and the validation scores, the same turned."""
    for layer, values in scores.items():
        for seed, value in enumerate(values):
            about = {"evaluation": evaluation, "layer": layer, "model": f"{arm}-a"} | more
            yield record(arm, value, seed, **about)
            yield record(arm, 1 - value, seed, metric="validation_top1", **about)


def test_every_layer_of_the_chosen_models_stands_in_a_table():
    found = list(probed("transfer", {"one": [0.4, 0.6], "two": [0.7, 0.7]}))
    found += probed("random", {"one": [0.2], "two": [0.1]})
    found += probed("transfer", {"one": [0.9], "two": [0.9]}, model="transfer-b")  # validates worse
    found += [record("random", 0.3, layer="two", model="random-a")]  # k-NN: one layer, no table
    found += [
        record("random", 0.5, model="random-a", evaluation="svm", layer=o, labels_per_class=2)
        for o in "ab"
    ]
    comparison = summary.compare(found, ["linear"])
    [table] = comparison.by_layer
    assert (table.column, table.layers) == (Column("linear", "top1"), ["one", "two"])
    (random, _, left), (transfer, _, right) = table.rows
    assert (random, transfer) == ("random", "transfer")
    assert [cell.interval.mean for cell in left] == [0.2, 0.1]
    assert right[0].interval == interval([0.4, 0.6]) and right[1].interval.mean == 0.7
    # Bold is what validation chose, here against the test scores.
    assert [[cell.best for cell in cells] for cells in (left, right)] == [
        [False, True],
        [True, False],
    ]


def test_a_layer_that_an_arm_was_not_probed_at_is_left_open():
    found = [*probed("random", {"one": [0.2]}), *probed("direct", {"one": [0.2], "two": [0.3]})]
    [table] = summary.compare(found, ["linear"]).by_layer
    assert [cell is None for cell in table.rows[0][2]] == [False, True]


def test_where_no_layer_was_held_out_for_the_last_one_stands_for_all():
    more = {"evaluation": "nonlinear"}
    found = [record("direct", v, layer=o, **more) for o, v in (("one", 0.6), ("two", 0.4))]
    comparison = summary.compare(found, ["knn"])
    assert [cell.best for cell in comparison.by_layer[0].rows[0][2]] == [False, True]
    assert comparison.arms[0].cells[0].interval.mean == 0.4


def test_images_of_several_labels_settle_their_layer_by_held_out_precision():
    more = {"evaluation": "svm"}
    found = [
        record("direct", v, metric="validation_map", layer=o, **more)
        for o, v in zip("ab", (0.8, 0.2), strict=True)
    ]
    found += [
        record("direct", v, metric="map_area", layer=o, **more)
        for o, v in zip("ab", (0.1, 0.9), strict=True)
    ]
    comparison = summary.compare(found, ["svm"])
    assert comparison.columns == [Column("svm", "map_area")]
    assert comparison.arms[0].cells[0].interval.mean == 0.1
    assert comparison.by_layer[0].column == Column("svm", "map_area")


def few(arm, number=None, fraction=None, value=0.5, evaluation="finetune"):
    more = {"labels_per_class": number} | ({"fraction": fraction} if fraction else {})
    return record(arm, value, evaluation=evaluation, **more)


def test_numbers_and_shares_of_labels_are_columns_of_their_own():
    found = [
        few("direct", None, 0.1, 0.7),
        few("direct", 100),
        few("direct", None, 0.01, 0.6),
        few("direct", 10),
    ]
    comparison = summary.compare(found, ["knn"])
    titles = [verdict.title(column) for column in comparison.columns]
    assert titles == [
        "fine-tune, 10 a class", "fine-tune, 100 a class", "fine-tune, 1 % of labels",
        "fine-tune, 10 % of labels",
    ]  # fmt: skip
    assert [cell.interval.mean for cell in comparison.arms[0].cells] == [0.5, 0.5, 0.6, 0.7]
    assert verdict.long_title(comparison.columns[2]) == "fine-tuned top-1 with 1 % of labels"
    head = verdict.plain_table(comparison.columns, comparison.arms).splitlines()[:2]
    assert head[0].split() == ["fine-tune"] * 4
    assert head[1].split() == [
        "arm",
        "10/class",
        "100/class",
        "1",
        "%",
        "10",
        "%",
        "seeds",
        "seconds",
    ]


def test_precision_of_different_evaluations_has_different_names():
    columns = [Column(name, "map_area", 4) for name in ("svm", "mine")]
    assert [verdict.title(column) for column in columns] == [
        "SVM mAP (area), 4 a class",
        "mine mAP (area), 4 a class",
    ]
    assert verdict.long_title(columns[0]) == "SVM mAP (area) with 4 labels a class"


def test_curves_over_numbers_and_shares_of_labels_are_charts_of_their_own():
    found = [few("direct", number) for number in (10, 100)]
    found += [few("direct", None, fraction) for fraction in (0.01, 0.1)]
    found += [few("direct", number, evaluation="svm") for number in (1, 4)]
    names = [name for name, _ in figures.label_curves(summary.compare(found, ["knn"]))]
    assert names == [
        "fine-tuned top-1 by labels per class", "fine-tuned top-1 by share of the labels",
        "linear-SVM top-1 by labels per class",
    ]  # fmt: skip
    assert figures.label_curves(summary.compare(found[1:3], ["knn"])) == []


def of_draws(arm, values, number=4, seed=0, metric="map_11"):
    """Gives a record for each draw of few labels on VOC07."""
    more = {"evaluation": "voc_classification", "layer": "conv1", "labels_per_class": number}
    for draw, value in enumerate(values):
        yield record(arm, value, seed, metric=metric, draw=draw, **more)


def test_draws_of_few_labels_are_one_number_with_their_spread_and_a_chart():
    found = [*of_draws("transfer", [0.2, 0.4]), *of_draws("transfer", [0.3, 0.4, 0.5], seed=1)]
    found += of_draws("transfer", [0.7, 0.7], number=16)
    found += of_draws("direct", [0.1])
    comparison = summary.compare(found, ["knn"])
    cells = {row.arm: row.cells for row in comparison.arms}
    four, sixteen = cells["transfer"]
    assert four.interval.mean == pytest.approx((0.3 + 0.4) / 2) and four.interval.n == 2
    assert four.draws == pytest.approx((0.02**0.5 + 0.1) / 2) and sixteen.draws == 0
    assert cells["direct"][0].draws is None  # one draw alone
    assert [name for name, _ in figures.label_curves(comparison)] == [
        "VOC07 cls mAP by labels per class"
    ]
    assert "transfer 35.0 % with 4, 70.0 % with 16" in figures.label_curves(comparison)[0][1]


def test_the_order_of_draws_does_not_depend_on_that_of_the_input():
    found = list(of_draws("direct", [0.1] * 12))
    told = records.sort_records(found[::-1])
    assert [one["draw"] for one in told] == list(range(12))


def test_arms_are_paired_draw_for_draw_by_seed():
    noise = {0: [0.0, 0.1, 0.2], 1: [0.3, 0.1, 0.05]}
    found = []
    for arm, gain in (("transfer", 0.05), ("direct", 0.0)):
        for seed, values in noise.items():
            found += of_draws(arm, [0.3 + gain + value for value in values], seed=seed)
    comparison = summary.compare(found, ["knn"])
    (gap,) = comparison.differences[Column("voc_classification", "map_11", 4)]
    assert gap.interval.mean == pytest.approx(0.05) and gap.interval.half < 1e-6


def test_scores_on_different_images_are_refused():
    with pytest.raises(DataError, match="a, b"):
        records.sort_records([record("direct", 0.1, dataset=name) for name in "ab"])


@pytest.mark.parametrize(
    "change", [{"value": 71.3}, {"value": "0.7"}, {"seed": None}, {"arm": None}]
)
def test_a_record_that_is_not_one_is_refused_with_its_file(tmp_path, change):
    path = tmp_path / "knn.json"
    step.write_json(path, {"records": [record("direct", 0.5) | change]})
    with pytest.raises(DataError, match="knn.json"):
        records.read_evaluation(path)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_few_and_inside(low, width):
    found = charts.ticks(low, low + width)
    slack = 1e-6 * max(width, abs(low))
    assert 1 <= len(found) <= 9
    assert all(low - slack <= tick <= low + width + slack for tick in found)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_names_at_the_ends_of_lines_do_not_overlap(ends):
    series = [
        charts.Series(f"n{i}", "one", [(1, y, None), (2, y, None)]) for i, y in enumerate(ends)
    ]
    drawn = charts.lines(series, "about", "epoch")
    places = [float(part.split('"')[1]) for part in drawn.split(" y=")[1:] if ">n" in part[:80]]
    assert len(places) == len(ends)
    assert all(b - a > 14.9 for a, b in itertools.pairwise(sorted(places)))


def test_charts_are_well_formed_and_escape_every_name():
    evil = '"><script>x</script>'
    for drawn in (
        charts.whiskers([charts.Whisker(evil, evil, 1.0, 0.5, evil)], 2.0, evil),
        charts.lines([charts.Series(evil, evil, [(1, 0.5, 0.1)])], evil, evil, level=(evil, 0.1)),
        charts.bars([(evil, 3.0, evil)], evil),
    ):
        root = ElementTree.fromstring(drawn)
        assert root.attrib["aria-label"] == evil
        assert "script" not in {element.tag for element in root.iter()}


# ---------------------------------------------------------------------------- what is said of what


def test_the_linear_probe_is_never_the_main_quantity_beside_another():
    scores = {
        "linear": {"transfer": 0.7, "direct": 0.6},
        "finetune": {"transfer": 0.5, "direct": 0.6},
    }
    found = [
        r
        for e, of in scores.items()
        for r in run_of({a: [v] * 3 for a, v in of.items()}, evaluation=e)
    ]
    comparison = summary.compare(found, [])
    assert [column.evaluation for column in comparison.differences] == ["linear", "finetune"]
    first, second = verdict.sentences(comparison)
    assert "falls behind direct by 10.0\u00a0±\u00a00.0 points of fine-tuned top-1" in first
    assert second == "Transfer beats direct by 10.0\u00a0±\u00a00.0 points of linear-probe top-1."
    assert verdict.ahead(comparison) == [("direct", "fine-tuned top-1")]


def test_controls_that_are_beaten_make_the_verdict_where_there_are_no_others():
    comparison = summary.compare(run_of({"transfer": [0.7] * 3, "hog": [0.6] * 3}), [])
    (said,) = verdict.sentences(comparison)
    assert said.startswith("On these images transfer beats hog by 10.0")


def test_without_labels_the_arms_that_agree_more_are_named_and_no_others():
    more = {"evaluation": "clusters", "metric": "view_nmi"}
    found = run_of({"random": [0.5], "direct": [0.7], "transfer": [0.6]}, **more)
    found[2] |= {"teacher": "deep", "teacher_layer": "auto", "k": "auto", "chosen": "block2 k 5"}
    network, unknown, ahead, _ = verdict.sentences(summary.compare(found, []))
    assert network == "The network to use is transfer (block2 k 5)."
    assert ahead.startswith("By that rule direct (70.0 %) would be ahead")
    assert "views of the same images agree best) (60.0 %)." in unknown


def test_the_fewest_test_images_of_all_quantities_are_told():
    for few, told in ((49, True), (50, False)):
        found = []
        for evaluation, n in (("knn", few), ("svm", 100)):
            for arm, v in (("transfer", 1.0), ("direct", 0.0)):
                found += [record(arm, 0, s, evaluation) | answers(v, n) for s in range(3)]
        said = verdict.scope(summary.compare(found, []))
        assert ("fewer than 50" in said) == told


def test_with_one_seed_quantities_without_an_interval_are_named():
    found = [record(arm, 0) | answers(v) for arm, v in (("transfer", 0.6), ("direct", 0.4))]
    found += run_of({"transfer": [0.6], "direct": [0.4]}, evaluation="svm")
    said = verdict.scope(summary.compare(found, []))
    assert "test images alone, none for linear-SVM top-1. Give" in said


def test_the_plain_table_marks_the_best_and_says_seeds_and_seconds():
    found = run_of({"direct": [0.5, 0.5], "transfer": [0.6, 0.6], "supervised": [0.9, 0.9]})
    found += run_of({"transfer": [0.3, 0.4]}, evaluation="clusters", metric="nmi")
    comparison = summary.compare(found, [], {"transfer": 1234.5})
    lines = [
        line.split()
        for line in verdict.plain_table(comparison.columns, comparison.arms).splitlines()
    ]
    assert lines[-3:] == [
        ["direct", "50.0±0.0", "–", "2", "–"],
        ["transfer", "60.0±0.0*", "35.0±63.5*", "2", "1,234"],
        ["supervised", "90.0±0.0", "–", "2", "–"],
    ]  # fmt: skip


def test_what_there_is_nothing_of_is_said():
    (said,) = verdict.sentences(summary.compare(run_of({"direct": [0.8], "random": [0.1]}), []))
    assert said == "There is nothing to compare: the results hold no transfer."


@pytest.mark.parametrize(
    ("mean", "expected"), [(0.0201, "beats"), (-0.0201, "behind"), (0.0199, "tie")]
)
def test_two_points_are_two_points(mean, expected):
    assert outcome(Interval(mean, 0.005, 3)) == expected


def test_accuracy_by_class_and_held_out_scores_are_no_columns():
    metrics = ("top1", "mean_class_accuracy", "validation_top1", "validation_map")
    found = [record("direct", 0.5, metric=metric) for metric in metrics]
    assert summary.compare(found, []).columns == [KNN]


def validated(model, evaluation, values, **more):
    """Gives validation scores {seed: value} of a candidate."""
    more |= {"evaluation": evaluation, "metric": "validation_top1", "model": model}
    return [record("transfer", value, seed, **more) for seed, value in values.items()]


def test_what_chooses_is_the_mean_of_the_evaluations_over_the_seeds_that_have_them_all():
    found = validated("a", "knn", {0: 0.9, 1: 0.5}) + validated("a", "svm", {0: 0.1, 1: 0.5})
    found += validated("b", "knn", {0: 0.9, 1: 0.6}) + validated("b", "svm", {1: 0.5})
    found += validated("c", "knn", {0: 0.8}) + validated("c", "svm", {1: 0.3})  # no seed has both
    rule, score = scores([*found, record("transfer", 0.9, metric="view_nmi")], ["knn", "svm"])
    assert rule == "validation_top1"
    assert {name: (one.n, one.mean) for name, one in score.items()} == {
        "a": (2, pytest.approx(0.5)), "b": (1, pytest.approx(0.55)), "c": (2, pytest.approx(0.55)),
    }  # fmt: skip


def test_a_layer_is_chosen_by_the_mean_over_seeds():
    layers = {"one": (0.9, 0.1), "two": (0.6, 0.6), "three": (0.5, 0.65)}
    found = [
        r
        for layer, (a, b) in layers.items()
        for r in validated("a", "linear", {0: a, 1: b}, layer=layer)
    ]
    found += [
        record("transfer", 0.5, evaluation="linear", model="a", layer=layer) for layer in layers
    ]
    assert summary.compare(found, ["linear"]).arms[0].cells[0].layer == "two"


def test_a_layer_is_named_only_where_there_was_a_choice():
    [row] = summary.compare([record("direct", 0.5, layer="conv4")], []).arms
    assert row.cells[0].layer is None


def test_a_value_below_zero_is_refused(tmp_path):
    path = tmp_path / "knn.json"
    step.write_json(path, {"records": [record("direct", -0.5)]})
    with pytest.raises(DataError, match="knn.json"):
        records.read_evaluation(path)


def test_one_answer_too_few_is_refused(tmp_path):
    path = tmp_path / "knn.json"
    step.write_json(
        path, {"records": [record("transfer", 0) | answers(0.6, 1000) | {"value": 0.601}]}
    )
    with pytest.raises(DataError, match="expected `right` to hold 1000 bits"):
        records.read_evaluation(path)


def test_a_target_that_is_named_stays():
    settings = {"teachers": {"own": {"backbone": "small"}}}
    [named] = records.with_targets(
        [record("transfer", 0.5, teacher="own", target="large")], settings
    )
    assert named["target"] == "large"


def test_answers_of_several_records_of_a_seed_are_averaged():
    found = [record("direct", 0) | answers(0.6), record("direct", 0) | answers(0.2)]
    [right] = records.right_by_seed(found, KNN).values()
    assert right.tolist() == [1.0] * 20 + [0.5] * 40 + [0.0] * 40


def test_answers_of_seeds_that_only_one_arm_has_do_not_count():
    ours = [record("transfer", 0, s) | answers(0.6) for s in range(3)]
    theirs = [record("direct", 0, s) | answers(0.5) for s in range(2)]
    gap = summary.paired(ours, theirs, KNN)
    assert gap == summary.paired(ours[:2], theirs, KNN)
    assert gap.half == pytest.approx(1.984 * np.std([1] * 10 + [0] * 90, ddof=1) / 10, rel=1e-3)


def test_answers_are_not_in_the_table():
    head, row = records.as_csv([record("direct", 0) | answers(0.6, draw=3)]).splitlines()
    assert head.endswith("chosen,draw") and row.endswith(",3")


def test_shares_are_sorted_whatever_the_order_of_the_input():
    found = [few("direct", None, fraction) for fraction in (0.1, 0.01)]
    assert records.sort_records(found) == records.sort_records(found[::-1]) == found[::-1]


def test_arms_are_compared_by_the_fewest_labels():
    found = [
        few(arm, number, value=v)
        for arm, v in (("transfer", 0.6), ("direct", 0.5))
        for number in (100, 10)
    ]
    assert list(summary.compare(found, []).differences) == [Column("finetune", "top1", 10)]


def test_the_fewest_images_of_all_seeds_count():
    found = run_of({"transfer": [0.8] * 2, "direct": [0.6] * 2})
    found[0]["n"] = 40
    (gap,) = summary.compare(found, []).differences[KNN]
    assert (gap.images, gap.outcome) == (40, "unjudged")


def test_a_model_is_told_by_what_taught_it():
    taught = {"teacher": "deep", "teacher_layer": "auto", "k": "auto", "chosen": "block2 k 5"}
    fixed = {"transfer": "hard", "teacher": "deep", "teacher_layer": "block2", "k": None}
    said = [
        summary.about(record(arm, 0.5, **more))
        for arm, more in (
            ("transfer", taught), ("hog", taught | {"transfer": "soft"}), ("direct", taught),
            ("untrained", fixed),
        )
    ]  # fmt: skip
    assert said == [
        "teacher deep, layer auto, k auto (block2 k 5)",
        "soft, teacher deep, layer auto, k auto (block2 k 5)",
        "block2 k 5", "teacher deep, layer block2",
    ]  # fmt: skip
