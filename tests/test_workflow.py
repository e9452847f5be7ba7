"""The whole workflow on drawn pictures: what it makes, and what a second run makes again."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import shutil

import drawing
import pytest
from running import ROOT, jobs, output, overlay, run, workflow

import kt
from kt.core import table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ARMS = {"random", "direct", "transfer", "untrained", "hog", "supervised", "longer"}
METRICS = {
    "knn": {"top1", "mean_class_accuracy"},
    "linear": {"top1", "mean_class_accuracy"},
    "finetune": {"top1", "mean_class_accuracy"},
    "clusters": {"nmi", "purity", "hungarian"},
}
FIELDS = ("model", "arm", "evaluation", "dataset", "metric", "value", "seed", "n")
LAYERS = ("deep/block2", "hog/hog", "untrained/block2")


@pytest.fixture(scope="session")
def full(tmp_path_factory):
    """A finished run with every arm: pictures/ and results/ below one folder."""
    folder = tmp_path_factory.mktemp("full")
    drawing.write_folder(drawing.tree(40, 20, 20, draw=drawing.pattern), folder / "pictures")
    done = workflow(folder, folder / "pictures")
    assert done.returncode == 0, output(done)
    return folder


def again(folder, *options, **more):
    """Runs the workflow of `full` once more, or plans it with -n."""
    return workflow(folder, folder / "pictures", *options, **more)


# ---------------------------------------------------------------------------- what a run makes


def test_the_run_ends_with_report_numbers_and_summary(full):
    report = full / "results" / "report"
    records = json.loads((report / "metrics.json").read_text())
    with open(report / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(records)
    assert [float(row["value"]) for row in rows] == [record["value"] for record in records]
    assert "<html" in (report / "index.html").read_text()
    assert "report" in (report / "summary.txt").read_text()


def test_every_arm_is_judged_by_every_evaluation(full):
    records = json.loads((full / "results/report/metrics.json").read_text())
    assert {record["arm"] for record in records} == ARMS
    for arm in ARMS:
        for evaluation, metrics in METRICS.items():
            about = (arm, evaluation)
            found = {r["metric"] for r in records if (r["arm"], r["evaluation"]) == about}
            assert metrics <= found, about


def test_every_record_has_the_agreed_fields_and_a_fraction(full):
    for record in json.loads((full / "results/report/metrics.json").read_text()):
        assert set(FIELDS) <= set(record)
        assert math.isfinite(record["value"]) and 0 <= record["value"] <= 1, record
        assert record["n"] > 0 and record["seed"] == 0
        if record["arm"] in ("transfer", "untrained", "hog"):
            assert record["k"] == 4 and record["target"] == "small" and record["teacher"]
        if record["evaluation"] == "finetune":
            assert record["labels_per_class"] == 5


def test_a_target_loads_with_one_call_and_gives_features(full):
    import torch

    folder = full / "results/targets/small/deep/block2/k4/s0"
    backbone = kt.load_backbone(folder / "model.safetensors")
    images = torch.randint(0, 256, (5, 3, 28, 28), dtype=torch.uint8)
    features = backbone.features(images)
    assert features.shape == (5, 16) and features.isfinite().all()
    assert not torch.equal(features[0], features[1])


def test_model_json_says_what_the_network_is_and_where_it_comes_from(full):
    folder = full / "results/targets/small/deep/block2/k4/s0"
    content = json.loads((folder / "model.json").read_text())
    assert content["backbone"] == {"name": "plain", "strides": [2, 2], "widths": [8, 16]}
    assert content["layers"] == ["conv1", "conv2"] and content["size"] == 28
    assert content["arm"] == "transfer" and content["k"] == 4 and content["teacher"] == "deep"
    assert content["training"]["epochs"] == 1 and content["task"]["name"] == "classification"
    weights = (folder / "model.safetensors").read_bytes()
    assert content["digest"] == hashlib.sha256(weights).hexdigest()
    assert {"version", "git", "parents", "seconds"} <= set(content["provenance"])


def test_every_table_is_complete_and_nothing_half_written_is_left(full):
    check_whole(full)


def check_whole(folder):
    import h5py

    found = list((folder / "results").rglob("*.h5"))
    assert found
    for path in found:
        with h5py.File(path) as file:
            assert file.attrs["complete"], path
    assert not list((folder / "results").rglob(".*"))
    assert not list((folder / "results").glob("state/*"))


# ---------------------------------------------------------------------------- what a rerun makes


def test_a_second_run_finds_nothing_to_do(full):
    done = again(full)
    assert "Nothing to be done" in output(done)
    assert jobs(done) == []


def below(layer, k):
    """Gives the jobs between the features of a layer and the report, for one k."""
    teacher, name = layer.split("/")
    return [
        f"cluster {teacher} {name} k={k}",
        f"pseudo_labels {teacher} {name} k={k} for images train-unlabelled",
        f"target_train small {layer}/k{k} s0",
        f"evaluate small/{layer}/k{k} frozen",
        f"evaluate small/{layer}/k{k} finetune",
    ]


def test_a_new_k_runs_what_lies_between_features_and_report_for_it_alone(full):
    planned = jobs(again(full, "-n", config=["clusters=[4,5]"]))
    assert planned == sorted([job for layer in LAYERS for job in below(layer, 5)] + ["report"])


def test_a_changed_clustering_keeps_the_features(full, tmp_path):
    changed = overlay(tmp_path / "x.yaml", {"clustering": {"iterations": 6}})
    planned = jobs(again(full, "-n", files=[changed]))
    assert planned == sorted([job for layer in LAYERS for job in below(layer, 4)] + ["report"])


def test_other_features_of_a_teacher_are_made_anew(full, tmp_path):
    for value in ({"map": 1}, {"pool": "max"}, {"mirror": True}):
        changed = overlay(tmp_path / "x.yaml", {"teachers": {"hog": value}})
        planned = jobs(again(full, "-n", files=[changed]))
        layer = next(layer for layer in LAYERS if layer.startswith("hog"))
        made = [job for job in planned if job.startswith("features")]
        assert made and all(job.startswith("features hog") for job in made), value
        assert set(below(layer, 4)) <= set(planned), value


def test_no_param_is_out_of_snakemakes_sight():
    """Snakemake compares no param whose function takes input, output, threads or resources."""
    hidden = re.compile(
        r"(\w+)=lambda \w+, (?!output: os\.path\.dirname)|def (\w+)\(wildcards, \w+\)"
    )
    for path in [ROOT / "Snakefile", *(ROOT / "rules").glob("*.smk")]:
        assert not hidden.findall(path.read_text()), path


def test_a_changed_evaluation_runs_only_evaluate_and_report(full, tmp_path):
    changed = overlay(tmp_path / "x.yaml", {"evaluations": {"knn": {"neighbours": 6}}})
    models = ["longer", "own", "random", "small/supervised", *(f"small/{x}/k4" for x in LAYERS)]
    planned = jobs(again(full, "-n", files=[changed]))
    assert planned == sorted([f"evaluate {model} frozen" for model in models] + ["report"])


def test_a_changed_target_training_keeps_teachers_and_clusters(full, tmp_path):
    changed = overlay(tmp_path / "x.yaml", {"targets": {"small": {"training": {"lr": 0.001}}}})
    origins = ["supervised", *(f"{layer}/k4" for layer in LAYERS)]
    planned = jobs(again(full, "-n", files=[changed]))
    expected = [f"target_train small {origin} s0" for origin in origins]
    for job in ("frozen", "finetune"):
        expected += [f"evaluate small/{origin} {job}" for origin in origins]
    assert planned == sorted([*expected, "report"])


def test_a_changed_teacher_training_keeps_teachers_that_are_not_trained(full, tmp_path):
    values = {"teachers": {"deep": {"training": {"lr": 0.001}}}, "few_images": {"as_if": 121}}
    values["few_images"]["most"] = 2
    changed = overlay(tmp_path / "x.yaml", values)
    made = [job for job in jobs(again(full, "-n", files=[changed])) if job.startswith("pretext")]
    assert made == [f"pretext_train {name} s0" for name in ("deep", "longer", "own")]


def test_other_memory_of_clustering_makes_but_the_report_again(full, tmp_path):
    changed = overlay(tmp_path / "x.yaml", {"clustering": {"memory_mb": 1}})
    assert jobs(again(full, "-n", files=[changed])) == ["report"]


def test_other_crops_of_targets_do_not_train_what_has_their_budget(full, tmp_path):
    values = {"targets": {"small": {"task": {"crop": 0.5, "balance": True}}}}
    planned = jobs(again(full, "-n", files=[overlay(tmp_path / "x.yaml", values)]))
    assert planned and not [job for job in planned if job.startswith("pretext_train")]


def test_more_seeds_add_jobs_and_repeat_only_the_judging(full):
    planned = jobs(again(full, "-n", config=["seeds=2"]))
    trained = [job for job in planned if "train " in job]
    assert trained and all(job.endswith(" s1") for job in trained)
    assert not [job for job in planned if job.startswith(("ingest", "features", "cluster"))]


@pytest.mark.parametrize(
    "place",
    [
        "results/clusters/deep/block2/images/k4.h5",
        "results/pseudo_labels/deep/block2/images/k4/images-train-unlabelled.h5",
    ],
)
def test_a_printed_command_runs_by_hand_and_gives_the_same_table(full, tmp_path, place):
    shown = output(again(full, "-n", "-p", "--force", place))
    (line,) = re.findall(r"^Shell command: (.*)$", shown, re.MULTILINE)
    shutil.copytree(full / "results", tmp_path / "results")
    (tmp_path / place).unlink()
    done = run("bash", "-c", line, cwd=tmp_path)
    assert done.returncode == 0, output(done)
    assert table.digest(tmp_path / place) == table.digest(full / place)
