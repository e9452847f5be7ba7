"""Experiments: settings fit the workflow, claims name one model each, pages say what was found."""

import io
import itertools
import re
import shutil
from xml.etree import ElementTree

import crafted
import drawing
import numpy as np
import pytest
import yaml
from PIL import Image
from running import ROOT, TINY
from test_sources import dataset

from experiments import __main__ as experiments
from experiments import cifar10, simclr
from experiments.page import claims, difference, page, plot
from kt import config
from kt import workflow as plan
from kt.core import lessons, step
from kt.core.records import packed
from kt.sources import pictures

NAMES = sorted(path.parent.name for path in (ROOT / "experiments").glob("*/experiment.yaml"))
CLAIM = {"text": "A beats B", "of": {"model": "a"}, "against": {"model": "b"}, "evaluation": "knn"}


def about(name):
    return yaml.safe_load((ROOT / "experiments" / name / "experiment.yaml").read_text())


def records(gap=0.1, noise=0.001, seeds=3):
    """Two models of the arms transfer and direct, `a` ahead of `b` by the gap."""
    found = []
    for seed, (model, arm, base) in itertools.product(
        range(seeds), [("a", "transfer", 0.5 + gap), ("b", "direct", 0.5)]
    ):
        for metric in ("top1", "validation_top1"):
            value = base + noise * (seed - 1) * (1 if model == "a" else -1)
            found.append(
                {"model": model, "arm": arm, "evaluation": "knn", "dataset": "images",
                 "metric": metric, "value": value, "seed": seed, "n": 100, "target": "small"}
            )  # fmt: skip
    return found


def settings(name, budget=None):
    overlay = config.read(ROOT / "experiments" / name / "overlay.yaml")
    return config.resolve(ROOT, config.merge(overlay, budget or {}) | {"images": "pictures.zip"})


def variants(name, budget=None):
    """Every variant with its settings; the pictures of `other` are of any name."""
    given = {"datasets": {"other": {"path": "o.zip"}}} if about(name).get("other") else {}
    given = config.merge(given, budget or {})
    return {
        variant: settings(name, config.merge(given, more))
        for variant, more in about(name).get("variants", {"": {}}).items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_overlay_of_every_budget_is_a_valid_configuration(name):
    for budget in [*about(name).get("budgets", {}).values(), {}]:
        settings(name, budget)
    assert variants(name)
    assert set(about(name).get("other", about(name)["datasets"])) == set(about(name)["datasets"])


@pytest.mark.parametrize("name", NAMES)
def test_each_side_of_a_claim_is_one_model_or_an_arm_of_the_run(name):
    for budget, values in about(name).get("budgets", {"": {}}).items():
        models = list(
            {
                model["model"]: model
                for variant, given in variants(name, values).items()
                for model in (
                    experiments.of_variant(m.describe, variant) for m in plan.judged(given)
                )
            }.values()
        )
        arms = {model["arm"] for model in models} | {about(name).get("peer")}
        for claim in about(name)["claims"]:
            assert claim["evaluation"] in settings(name).evaluations
            if budget not in claim.get("budgets", [budget]):
                continue
            for side in {"of", "against", "half_way_to"} & claim.keys():
                if set(claim[side]) == {"arm"}:
                    assert claim[side]["arm"] in arms
                    continue
                fits = [m for m in models if all(m.get(k) == v for k, v in claim[side].items())]
                assert len(fits) == 1, (claim["text"], side, [m["model"] for m in fits])


def test_a_claim_that_came_after_results_says_so_where_they_had_been_seen():
    claim = {**CLAIM, "unplanned": ["half"]}
    late, planned = (
        claims([claim], records(), {budget, f"set-{budget}"})[0] for budget in ("half", "full")
    )
    assert late == f"{planned} Stated after results of this budget had been seen."
    claim["unplanned"] = ["set-half"]
    assert claims([claim], records(), {"half", "set-half"}) == [late]
    assert claims([claim], records(), {"half", "other-half"}) == [planned]
    for name in NAMES:
        for claim in about(name)["claims"]:
            budgets = claim.get("budgets", about(name).get("budgets", [""]))
            runs = {f"{one}-{budget}" for one in about(name)["datasets"] for budget in budgets}
            assert set(claim.get("unplanned", [])) <= {*budgets, *runs}, claim["text"]
    text = (ROOT / "docs/results/trends.md").read_text()
    said = ["Stated" in line for line in text.splitlines() if "more than the" in line]
    # Of the older recipe, which comes last, those of ten classes, which had been seen.
    assert said == [*[False] * 6, True, True, *[False] * 4]


def test_every_page_is_made_of_what_is_kept_beside_the_experiment(tmp_path, monkeypatch):
    made = tmp_path / "docs" / "results"
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    for name in NAMES:
        experiments.write_page(name, about(name))
    written = ROOT / "docs" / "results"
    assert {path.name for path in made.glob("*.md")} == {path.name for path in written.glob("*.md")}
    for path in made.glob("*.md"):
        assert path.read_text() == (written / path.name).read_text()


@pytest.mark.parametrize(
    "gap, noise, word",
    [
        (0.1, 0.001, "holds, over seeds alone"),
        (-0.1, 0.001, "does not hold, over seeds alone"),
        (0.03, 0.05, "not settled"),
        (0.015, 0.001, "not settled"),  # no images say that it is nothing
    ],
)
def test_a_claim_holds_or_not_by_the_paired_interval(gap, noise, word):
    (line,) = claims([CLAIM], records(gap, noise))
    assert line.startswith(f"- A beats B: **{word}** (")


@pytest.mark.parametrize("claim, word", [({}, "no difference"), ({"expect": "tie"}, "holds")])
def test_that_there_is_no_gap_takes_test_images(claim, word):
    found = [
        {**r, "value": 0.5, "n": 10**5, "right": packed(np.arange(10**5) < 5 * 10**4)}
        for r in records()
    ]
    (line,) = claims([{**CLAIM, **claim}], found)
    assert f"**{word}** (0.0" in line


def test_one_seed_proves_no_claim():
    (line,) = claims([CLAIM], [r for r in records(0.3) if r["seed"] == 0])
    assert line.startswith("- A beats B: **one seed alone** (29.8")


def test_which_images_were_right_is_kept_where_a_page_says_their_number():
    found = []
    for layer, metric, value in [
        ("one", "validation_top1", 0.5), ("one", "top1", 0.6),
        ("two", "validation_top1", 0.7), ("two", "top1", 0.6),
    ]:  # fmt: skip
        for evaluation in ("linear", "svm"):
            more = {"evaluation": evaluation, "layer": layer, "metric": metric, "value": value}
            found.append({**records()[0], **more})
            if metric == "top1":
                found[-1]["right"] = packed(np.arange(100) < 60)
    kept = experiments.lean(found, set())
    assert [(r["evaluation"], r["layer"]) for r in kept if "right" in r] == [("linear", "two")]
    claimed = experiments.lean(found, {"one"})
    assert [r["layer"] for r in claimed if "right" in r] == ["one", "two"]
    assert [{**r, "right": 0} for r in kept] == [{**r, "right": 0} for r in found]


def test_the_layers_of_all_claims_are_kept():
    claims = [{"text": "a"}, {"layer": "conv4", "than_layer": "conv3"}]
    assert experiments.named_layers({"claims": claims}) == {"conv3", "conv4"}


@pytest.mark.parametrize(
    "gap, noise, word",
    [
        (0.001, 0.001, "not settled"),
        (0.1, 0.001, "does not hold, it is ahead, over seeds alone"),
        (0.001, 0.05, "not settled"),
    ],
)
def test_a_claim_of_no_gap_needs_an_interval_within_two_points(gap, noise, word):
    (line,) = claims([{**CLAIM, "expect": "tie"}], records(gap, noise))
    assert f"**{word}**" in line


def test_an_arm_stands_for_its_chosen_model_and_half_way_is_the_middle():
    better = [
        {**r, "model": "c", "value": r["value"] - 0.2} for r in records() if r["model"] == "a"
    ]
    claim = {**CLAIM, "of": {"arm": "transfer"}, "against": {"arm": "direct"}}
    assert difference(claim, records() + better).mean == pytest.approx(0.1)  # `a`, not `c`
    bound = [{**r, "arm": "supervised", "model": "s", "value": 0.8} for r in records()[:2] * 3]
    bound = [{**r, "seed": seed} for seed, r in zip((0, 0, 1, 1, 2, 2), bound, strict=True)]
    bound[1::2] = [{**r, "metric": "validation_top1"} for r in bound[1::2]]
    half = difference({**claim, "half_way_to": {"arm": "supervised"}}, records() + bound)
    assert half.mean == pytest.approx(0.6 - (0.5 + 0.8) / 2, abs=1e-3)


def test_a_gap_may_be_compared_with_that_at_another_layer():
    found = [{**r, "layer": "late"} for r in records(0.1)] + [
        {**r, "layer": "early"} for r in records(0.03)
    ]
    claim = {**CLAIM, "evaluation": "knn", "layer": "late", "than_layer": "early"}
    assert difference(claim, found).mean == pytest.approx(0.07)


def test_what_was_not_measured_is_said_and_two_models_for_one_side_are_refused():
    (line,) = claims([{**CLAIM, "of": {"model": "c"}}], records())
    assert line == "- A beats B: not measured here."
    with pytest.raises(ValueError, match="fits more than one model"):
        difference({**CLAIM, "of": {"dataset": "images"}}, records())


def test_the_page_has_question_command_table_cost_and_machine():
    kept = {
        "records": records(),
        "cpu_seconds": 600,
        "machine": "2 cores",
        "commit": "abc",
        "date": "d",
    }
    described = {"title": "T", "question": "Q?", "datasets": ["photos", "scenes"]}
    text = page("kinds", {**described, "claims": [CLAIM]}, {("photos", ""): kept})
    assert "Not run so far: scenes." in text and "± is over seeds alone" in text
    for part in (
        "# T",
        "Q?",
        "python -m experiments kinds",
        "## photos",
        "10 minutes",
        "2 cores; commit abc",
    ):
        assert part in text
    assert "| **transfer** |" in text and "60.0" in text and "(kinds-photos.svg)" in text
    wide = [{**r, "model": f"wide/{r['model']}", "target": "wide", "value": 0.7} for r in records()]
    text = page("kinds", described, {("photos", ""): {**kept, "records": records() + wide}})
    assert re.findall(r"### Target `(\w+)`", text) == ["small", "wide"]
    assert text.count("| **transfer** |") == 2 and "70.0" in text.split("`wide`")[1]


def test_the_plot_shows_every_model_at_its_value_and_escapes_names():
    evil = [{**r, "model": "e", "teacher": "<b>&", "value": r["value"] - 0.2} for r in records()]
    drawn = ElementTree.fromstring(plot(records() + evil))
    space = "{http://www.w3.org/2000/svg}"
    texts = [text.text for text in drawn.iter(f"{space}text")]
    circles = [float(one.get("cx")) for one in drawn.iter(f"{space}circle")]
    assert "transfer, teacher <b>&" in texts
    assert sum(text.startswith("60.0") for text in texts) == 1
    assert len(circles) == 4 and len(set(circles)) == 4
    values = [float(text.split()[0]) for text in texts if "±" in text]
    order = sorted(range(4), key=values.__getitem__)
    assert order == sorted(range(4), key=circles.__getitem__)


def test_what_was_found_is_kept_as_it_is_with_a_record_a_line(tmp_path):
    found = {"records": [*records(), {"model": '"records": []'}], "commit": "abc", "cores": 2}
    experiments.keep(tmp_path / "x.json", found)
    assert experiments.step.read_json(tmp_path / "x.json", checked=False) == found
    assert len((tmp_path / "x.json").read_text().splitlines()) == len(records()) + 7


def test_unknown_experiments_are_refused_with_the_known_ones(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["experiments", "kind"])
    with pytest.raises(SystemExit) as ended:
        experiments.main()
    assert ended.value.code == 2 and "kinds" in capsys.readouterr().err


def test_simclr_is_given_what_a_target_cost_with_all_that_stands_behind_it(tmp_path):
    settings = config.resolve(ROOT, {"images": "x"})
    found, both = lessons.lessons(settings), "multi_similarity/deep+hog/block2+hog/k1"
    jobs = {
        "target_train/small-deep/block2/k100-s0": 1, f"target_train/small-{both}-s0": 2,
        "pseudo_labels/deep-block2-k100-images-train-unlabelled": 4,
        "cluster/deep-block2-k100": 8, "pretext_train/deep-s0": 16,
        "features/deep-block2-images-train-unlabelled": 32,
        "features/hog-hog-images-train-unlabelled": 64, "pretext_train/hog-s0": 128,
    }  # fmt: skip
    for name, spent in jobs.items():
        step.write_text(tmp_path / f"results/benchmarks/{name}.tsv", f"s\tcpu_time\n{spent}\t1\n")
    assert simclr.cost(tmp_path, settings, found["deep/block2/k100"]) == 1 + 4 + 8 + 16 + 32
    assert simclr.cost(tmp_path, settings, found[both]) == 2 + 16 + 32 + 64 + 128
    # The benchmark of an interrupted training is that of its last attempt, the log sums them up.
    log = tmp_path / "results/teachers/deep/s0/log.jsonl"
    step.write_text(log, '{"seconds": 3.0}\n{"seconds": 1000.0}\n')
    assert simclr.cost(tmp_path, settings, found[both]) == 2 + 1000 + 32 + 64 + 128


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_experiment_runs_keeps_what_it_found_and_writes_its_page(tmp_path, monkeypatch):
    place = tmp_path / "experiments" / "small"
    place.mkdir(parents=True)
    only = config.read(TINY) | {"evaluations": {"finetune": None, "clusters": None}}
    only["teachers"] |= dict.fromkeys(("own", "longer", "untrained", "random", "hog"))
    photos = config.read(ROOT / "presets" / "photos.yaml")
    only["datasets"]["other"] = photos["datasets"]["images"] | only["datasets"]["images"]
    (place / "overlay.yaml").write_text(yaml.safe_dump(only))
    claim = {**CLAIM, "of": {"arm": "transfer"}, "against": {"arm": "supervised"}}
    described = {
        "title": "T",
        "question": "Q?",
        "datasets": ["drawn", "foreign"],
        "claims": [claim],
    }
    described["other"] = {"drawn": "foreign"}
    described["variants"] = {"own": {}, "strange": {"use": {"target": "other"}}}
    (place / "experiment.yaml").write_text(yaml.safe_dump(described))
    for data in ("drawn", "foreign"):
        tree = drawing.tree(40, 20, 20, draw=drawing.pattern)
        drawing.write_folder(tree, tmp_path / "data" / data)
    monkeypatch.setattr(experiments, "PLACE", tmp_path / "experiments")
    (tmp_path / "docs").mkdir()
    options = ["small", "--data", tmp_path / "data", "--runs", tmp_path / "runs", "--only", "drawn"]
    monkeypatch.setattr("sys.argv", ["experiments", *map(str, options)])
    written = []
    monkeypatch.setattr(experiments, "write_page", lambda name, about: written.append(name))
    experiments.main()
    kept = experiments.step.read_json(place / "drawn.json", checked=False)
    assert written == ["small"] and kept["cpu_seconds"] > 1 and kept["machine"]
    models = {record["model"]: record["arm"] for record in kept["records"]}
    name = "small/deep/block2/k4"
    assert models == {
        f"{name} own": "transfer", f"{name} strange": "transfer", "small/supervised": "supervised"
    }  # fmt: skip
    assert len(kept["records"]) == len({str(record) for record in kept["records"]})
    assert "A beats B" in page("small", described, {("drawn", ""): kept})


def test_the_first_pictures_of_each_class_become_a_set_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "MOST", {"train": 3, "test": 2})
    drawn = crafted.noise(20, 32).transpose(0, 2, 3, 1)
    named = [(Image.fromarray(one), "ab"[number % 2]) for number, one in enumerate(drawn)]
    cifar10.write(tmp_path / "cifar10.zip", {"train": named, "test": named[1:]})
    given = dataset("pictures", tmp_path / "cifar10.zip")
    found = {entry.key: entry for entry in pictures.entries(given)}
    train = [f"train/{'ab'[number % 2]}/{number:05}.png" for number in range(6)]
    test = [f"test/{'ba'[number % 2]}/{number:05}.png" for number in range(4)]
    assert sorted(found) == sorted(train + test)
    pixels = {entry.key: entry.read() for entry in pictures.entries(given)}
    shown = np.asarray(Image.open(io.BytesIO(pixels["test/b/00002.png"])))
    assert np.array_equal(shown, drawn[3])
