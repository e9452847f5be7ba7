"""The command line: help, what `--config` changes, and faults, each with its exit code."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import threading
import time

import drawing
import pytest
import yaml
from running import ROOT, SNAKEMAKE, TINY, jobs, output, overlay, run, workflow

from kt import config
from kt.core import lock, step
from kt.core.step import ConfigError
from kt.plan import KEPT

pytestmark = pytest.mark.timeout(600)

STEPS = ("ingest", "pretext_train", "features", "cluster", "pseudo_labels", "target_train",
         "evaluate", "report")  # fmt: skip
CONFIGURATION, DATA = 2, 3
PROFILES = sorted(path.name for path in (ROOT / "profiles").iterdir())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `pictures/`, labelled in all splits."""
    folder = tmp_path_factory.mktemp("line")
    drawing.write_folder(drawing.tree(20, 4, 4), folder / "pictures")
    return folder


def plan(place, *options, images="pictures", **more):
    """Plans a run on pictures in `place`, standing there, with results elsewhere."""
    return workflow(place / "run", images, "-n", *options, cwd=place, **more)


# ---------------------------------------------------------------------------- steps by hand


@pytest.mark.parametrize("name", STEPS)
def test_each_step_explains_itself_and_each_of_its_options(name):
    done = run(sys.executable, "-m", f"kt.{name}", "--help")
    assert done.returncode == 0 and not done.stderr
    assert f"python -m kt.{name} " in done.stdout, "a command to run by hand"
    described = re.findall(r"^  (-.*?)(?=^  -|\Z)", done.stdout, re.MULTILINE | re.DOTALL)
    assert len(described) > 3
    for option in described:
        words = re.sub(r"-?-[\w-]+|\b[A-Z_]+\b|[\[\],.{}|]", " ", option).split()
        assert words, f"{name}: no words on {option.strip()}"


@pytest.mark.parametrize("name", STEPS)
def test_a_wrong_option_ends_with_2_and_without_a_traceback(name):
    for options in ([], ["--colour", "red"], ["--threads", "many"]):
        done = run(sys.executable, "-m", f"kt.{name}", *options)
        assert done.returncode == CONFIGURATION, output(done)
        assert "error:" in done.stderr and "Traceback" not in done.stderr


def test_a_step_whose_input_is_missing_ends_with_3_and_names_it(tmp_path):
    done = run(
        *(sys.executable, "-m", "kt.features", "--model", tmp_path / "nothing", "--layer", "x"),
        *("--map", 1, "--pack", tmp_path / "no.h5", "--output", tmp_path / "out.h5"),
    )
    assert done.returncode == DATA, output(done)
    assert f"{tmp_path}/no.h5" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "model, evaluations, code, said",
    [
        ("nothing", "{}", DATA, "expected weights at nothing/model.safetensors, found no file"),
        ("a/model.json", "{}", DATA, "expected weights at a/model.safetensors, found no file"),
        ("nothing", '["knn"]', CONFIGURATION, "--evaluations: expected a JSON object, found"),
        ("nothing", "{", CONFIGURATION, "--evaluations: expected a JSON object: "),
    ],
)
def test_what_an_evaluation_by_hand_lacks_is_told(tmp_path, model, evaluations, code, said):
    done = run(
        *(sys.executable, "-m", "kt.evaluate", "--model", model, "--seeds", 0, "--data", tmp_path),
        *("--evaluations", evaluations, "--output", tmp_path / "found.json"),
    )
    assert done.returncode == code and "Traceback" not in done.stderr, output(done)
    assert said in done.stderr


# ---------------------------------------------------------------------------- what --config changes


@pytest.mark.parametrize(
    "given, expected",
    [("clusters=5", {"k5"}), ("clusters=[4,5]", {"k4", "k5"}), ("clusters=4", {"k4"})],
)
def test_clusters_may_be_a_number_or_a_list(place, given, expected):
    planned = jobs(plan(place, config=[given]))
    trained = [job for job in planned if job.startswith("target_train small deep/")]
    assert {job.split("/")[2].split()[0] for job in trained} == expected


def test_a_plugin_of_another_name_replaces_that_of_the_one_file_whole(place, tmp_path):
    """As among files: Snakemake's own merging would keep the options of the one before."""
    soft = {"x": {"kind": {"name": "soft", "temperature": 0.1}, "of": ["deep"]}}
    files = [overlay(tmp_path / "x.yaml", {"transfers": soft})]
    given = 'transfers={"x": {"kind": {"name": "balanced", "iterations": 3}}}'
    for some in (files, [*files, overlay(tmp_path / "y.yaml", {"seeds": 2})]):
        done = plan(place, files=some, config=[given])
        assert done.returncode == 2 and "transfers.x.kind.temperature: missing" in done.stderr


def test_seeds_and_effort_reach_the_commands(place, tmp_path):
    longer = overlay(tmp_path / "x.yaml", {"targets": {"small": {"training": {"epochs": 30}}}})
    done = plan(place, "-p", files=[longer], config=["seeds=2", "effort=0.1"])
    trained = [job for job in jobs(done) if job.startswith("target_train small deep/block2/k4")]
    assert [job.split()[-1] for job in trained] == ["s0", "s1"]
    commands = re.findall(r"python -m kt\.target_train .*", output(done))
    assert commands and all(" --epochs 3 " in line for line in commands)
    commands = re.findall(r"python -m kt\.pretext_train .* --task '{.*", output(done))
    assert commands and all(" --epochs 1 " in line for line in commands), "at least one epoch"


@pytest.mark.parametrize("preset", sorted(path.name for path in (ROOT / "presets").glob("*.yaml")))
def test_every_preset_plans_a_run_without_importing_torch(place, preset):
    path = ROOT / "presets" / preset
    given = ["--config", f"images={place / 'pictures'}"] if preset == "photos.yaml" else []
    given += ["clusters=4"] if given else []
    done = run(
        *(sys.executable, "-X", "importtime", "-m", "snakemake", "-n", "--cores", 2),
        *("--directory", place / "presets", "--configfile", path, *given),
    )
    assert "report" in jobs(done)
    loaded = set(re.findall(r"\| +(\S+)$", done.stderr, re.MULTILINE))
    assert "kt.config" in loaded
    assert not loaded & {"torch", "torchvision", "faiss", "sklearn", "skimage", "matplotlib"}


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_plans_a_run(place, profile):
    done = run(
        *(*SNAKEMAKE, "-n", "--workflow-profile", ROOT / "profiles" / profile),
        *("--directory", place / "profiles", "--configfile", TINY),
        *("--config", f"images={place / 'pictures'}"),
    )
    assert "report" in jobs(done)


MADE = [
    "train-unlabelled",
    "train-unlabelled-labels",
    "train",
    "train-labels",
    "test",
    "test-labels",
]
MADE = [*(f"data/images/{name}.h5" for name in MADE), "data/images/report.json"]
FEATURES = "results/features/untrained/block2/images-train-unlabelled.h5"
TRAINED = "results/teachers/deep/s0/model.safetensors"


def test_jobs_ask_for_memory_and_time_by_their_input_and_for_more_when_sent_again(place):
    folder = place / "asked"
    model = ("model.safetensors", "model.json", "log.jsonl", "examples.h5")
    for name in (*MADE, *(f"teachers/untrained/s0/{one}" for one in model)):
        (folder / "results" / name).parent.mkdir(parents=True, exist_ok=True)
        with open(folder / "results" / name, "wb") as file:
            file.truncate((3 << 30) * (name == MADE[0]))
    memory, time = 4000 + 3072, 60 + 150 * 3072 // 1000  # the pack is mapped, or streamed
    wanted = [["features", str(attempt * 4000), str(attempt * time)] for attempt in (1, 2)]
    wanted += [["pretext_train", str(attempt * memory), "1440"] for attempt in (1, 2)]
    assert asked(folder, place) == sorted(wanted)
    # With a plan, whose names of jobs are in test_plan.py, by what it says.
    features, train = "features/untrained-block2-images-train-unlabelled", "pretext_train/deep-s0"
    probed = {"seconds": 60.0, "cpu": 0.0, "by": "probe"}  # which leaves out a part
    planned = {features: probed, train: {"seconds": 14400.0, "cpu": 0.0, "by": "probe"}}
    step.write_json(folder / KEPT, planned)
    assert times(asked(folder, place)) == [time, 2 * time, 1440, 990]
    planned[features] = {"seconds": 60.0, "cpu": 0.0, "by": "an earlier run"}
    step.write_json(folder / KEPT, planned)
    assert times(asked(folder, place)) == [34, 68, 1440, 990]


def times(found):
    return [int(time) for _, _, time in found]


def asked(folder, place):
    """Lists rule, memory and time that jobs ask for, at both attempts."""
    submit = "sh -c 'echo {rule} {resources.mem_mb} {resources.runtime} >> asked; exit 1' --"
    run(
        *(*SNAKEMAKE, "--workflow-profile", ROOT / "profiles" / "cluster-generic", "--retries", 1),
        *("--cluster-generic-submit-cmd", submit, "--rerun-triggers", "mtime"),
        *("--directory", folder, FEATURES, TRAINED, "--configfile", TINY),
        *("--config", f"images={place / 'pictures'}"),
    )
    lines = (folder / "asked").read_text().splitlines()
    (folder / "asked").unlink()
    return sorted(line.split() for line in lines)


def test_pictures_that_came_after_they_were_packed_are_told(place):
    folder, path = place / "changed", place / "pictures"
    report = folder / "results/data/images/report.json"
    report.parent.mkdir(parents=True)
    report.write_text(json.dumps({"dataset": {"path": str(path)}}))
    assert "--forcerun ingest" not in output(workflow(folder, path, "-n"))
    times, later = path.stat(), time.time() + 10
    os.utime(path, (later, later))
    assert f"renamed in {path}, or that it was replaced" in output(workflow(folder, path, "-n"))
    os.utime(path, (times.st_atime, times.st_mtime))


def test_the_lock_of_a_run_on_another_machine_stands_while_it_shows_life(place):
    folder = place / "elsewhere"
    (folder / ".snakemake/locks").mkdir(parents=True)
    (folder / ".snakemake/locks/0.input.lock").touch()
    path = folder / ".snakemake/kt.lock"
    path.write_text(json.dumps({"who": "process 7 on node9", "host": "node9"}))
    over = threading.Event()
    with open(path) as file:  # whose lock does not reach here
        beat = threading.Thread(target=lock.beat, args=(file, over))
        beat.start()
        done = workflow(folder, place / "pictures", "--lint")
    over.set()
    beat.join()
    assert "process 7 on node9 is at work here" in output(done)
    assert (folder / ".snakemake/locks/0.input.lock").exists()


def test_a_folder_that_cannot_be_written_is_said(place):
    (place / "locked").mkdir()
    (place / "locked" / ".snakemake").touch()  # root may write anywhere
    refused(workflow(place / "locked", place / "pictures", "-n"), 4, "cannot be written")


LATE = """
rule all:
    output: "made.txt"
    shell: "(sleep 2; touch made.txt) > /dev/null 2>&1 &"
"""


def test_on_a_cluster_a_file_that_appears_late_is_waited_for(tmp_path):
    for profile in {*PROFILES} - {"default", "workstation"}:
        values = yaml.safe_load((ROOT / "profiles" / profile / "config.yaml").read_text())
        assert values["latency-wait"] >= 60
    (tmp_path / "Snakefile").write_text(LATE)
    options = ["--workflow-profile", ROOT / "profiles" / "slurm", "--executor", "local"]
    done = run(*SNAKEMAKE, *options, "--cores", 1, cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "made.txt").exists(), output(done)
    assert "missing locally" in output(done)  # and then it came


def test_snakemake_finds_nothing_to_complain_of_in_the_rules():
    done = run(sys.executable, "-m", "snakemake", "--lint")
    assert done.returncode == 0, output(done)


# ---------------------------------------------------------------------------- faults


def refused(done, code, *words):
    """Checks a refusal: the code, the words, and no more than a few lines."""
    assert done.returncode == code, output(done)
    said = output(done)
    assert "error:" in said and "Traceback" not in said
    for word in words:
        assert word in said, said
    assert "Job stats" not in said


@pytest.mark.parametrize(
    "given, words",
    [
        ("seedz=3", ["seedz", "did you mean 'seed"]),
        ("seeds=many", ["seeds", "integer", "'many'"]),
        ("seeds=0", ["seeds", "greater than or equal to 1", "0"]),
        ("effort=-1", ["effort", "greater than 0"]),
        ("clusters=[4,x]", ["clusters.1", "'x'"]),
        ("clusters=61", ["k = 61", "60"]),
    ],
)
def test_a_wrong_value_is_refused_with_its_key_and_what_is_allowed(place, given, words):
    refused(plan(place, config=[given]), CONFIGURATION, *words)


@pytest.mark.parametrize(
    "values, words",
    [
        ("targets: {small: {training: {lrr: 1}}}", ["small.training.lrr", "did you mean 'lr'"]),
        ("targets: {small: {training: {epochs: x}}}", ["targets.small.training.epochs", "'x'"]),
        (
            "targets: {small: {task: {hidden: 8}, training: {batch: 1}}}",
            ["targets.small.training.batch: expected 2 or more"],
        ),
        (
            "evaluations: {finetune: {task: {hidden: 8}, training: {batch: 1}}}",
            ["evaluations.finetune.training.batch: expected 2 or more"],
        ),
        ("targets: {small: {backbone: {strides: [2]}}}", ["targets.small.backbone", "2 widths"]),
        ("targets: {small: {backbone: {name: plian}}}", ["did you mean 'plain'"]),
        ("teachers: {deep: {layers: [block9]}}", ["teachers.deep.layers", "block9", "block2"]),
        ("teachers: {deep: {like: dep}}", ["teachers.deep.like", "'dep'"]),
        ("teachers: {deep: {task: {min_distance: 2}}}", ["min_distance", "at least 3"]),
        ("datasets: {images: {size: 20}}", ["size", "20", "21"]),
        ("use: {target: imagse}", ["use.target", "did you mean 'images'"]),
        ("evaluations: {knnn: {}}", ["evaluations.knnn", "did you mean 'knn'"]),
    ],
)
def test_a_wrong_overlay_is_refused_before_the_first_job(place, tmp_path, values, words):
    given = {"images": str(place / "pictures")}
    with pytest.raises(ConfigError) as refusal:
        config.resolve(ROOT, config.read(TINY), yaml.safe_load(values), given)
    assert all(word in str(refusal.value) for word in words), refusal.value
    if "epochs" in values:  # all take the same way through Snakemake
        path = tmp_path / "x.yaml"
        path.write_text(values)
        refused(plan(place, files=[path]), CONFIGURATION, *words)


@pytest.mark.parametrize("text", ["{a: [", "\t- x: y\n z", "just words"])
def test_an_overlay_that_is_no_yaml_runs_nothing(place, tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    done = plan(place, files=[path])
    assert done.returncode and "Job stats" not in output(done)


def pictures_without(place, tmp_path, *gone):
    """Copies the pictures but for what lies below `gone`."""
    copy = shutil.copytree(place / "pictures", tmp_path / "copy")
    for name in gone:
        shutil.rmtree(copy / name)
    return copy


def test_an_evaluation_that_can_judge_is_asked_for_before_anything_runs(place, tmp_path):
    images = pictures_without(place, tmp_path, "train", "test")
    path = tmp_path / "x.yaml"
    path.write_text("evaluations: {clusters: null}")
    refused(
        plan(place, images=images, files=[path]), CONFIGURATION, "evaluations", "without labels"
    )


def test_a_network_to_judge_is_asked_for_before_anything_runs(place, tmp_path):
    images = pictures_without(place, tmp_path, "train", "test")  # no labels: no bound either
    idle = {"layers": [], "evaluate_as": None}
    names = ("deep", "own", "longer", "untrained", "random", "hog")
    path = overlay(tmp_path / "x.yaml", {"teachers": dict.fromkeys(names, idle)})
    words = ["teachers: expected a network to judge", "without labels", "evaluate_as"]
    refused(plan(place, images=images, files=[path]), CONFIGURATION, *words)


def test_a_missing_path_is_refused(place):
    done = plan(place, images="nothing here")
    refused(done, CONFIGURATION, f"found nothing at '{place}/nothing here'")


def test_an_empty_folder_is_refused(place, tmp_path):
    refused(plan(place, images=tmp_path), DATA, "at least 10 pictures", "found 0", str(tmp_path))


def test_one_picture_is_refused(place, tmp_path):
    (tmp_path / "a.png").write_bytes(drawing.encoded(drawing.picture(0, 0)))
    refused(plan(place, images=tmp_path), DATA, "at least 10 pictures", "found 1")


def test_another_file_than_an_archive_is_refused(place):
    refused(plan(place, images=TINY), DATA, "a folder, a zip or a tar", "another file")


def test_a_class_in_only_one_split_is_refused(place, tmp_path):
    copy = pictures_without(place, tmp_path, "test/bird")
    refused(plan(place, images=copy), DATA, "'bird'", "in train and in test")


def test_labels_in_only_one_split_are_refused(place, tmp_path):
    copy = pictures_without(place, tmp_path, "test")
    refused(plan(place, images=copy), DATA, "none in test/CLASS/")


def test_too_many_broken_files_end_the_run_and_are_named_in_the_log(place, tmp_path):
    copy = pictures_without(place, tmp_path, "train", "test")
    for path in sorted((copy / "train-unlabelled/bird").iterdir()):
        path.write_bytes(b"<html>not found</html>")
    done = workflow(tmp_path / "run", copy)
    assert done.returncode == DATA
    assert "Traceback" not in output(done)
    log = (tmp_path / "run/results/logs/ingest/images.log").read_text()
    assert "20 of 60 chosen files are bad" in log and "bird/000.png" in log
    last = done.stderr.split("the failed step ended with 3")[1]  # nothing of Snakemake's after it
    assert last.rstrip().endswith("and 15 more, see the log") and "error: 20 of 60" in last
    assert "pretext_train" not in output(done).split("Job stats")[1].split("Select jobs", 1)[1]
    made = (tmp_path / "run/results").rglob("*.h5")
    assert not [path for path in made if "state" not in path.parts]  # shards serve the next try


def test_a_relative_path_is_meant_from_where_the_user_stands(place, tmp_path):
    elsewhere = plan(place, "-p", images="./pictures")
    assert f'"path": "{place}/pictures"' in output(elsewhere)
    here = run(
        *("env", f"PWD={tmp_path}", sys.executable, "-m", "snakemake", "-n", "-p", "--cores", 1),
        *("--snakefile", ROOT / "Snakefile", "--config", "images=pictures", "clusters=4"),
        cwd=place,
    )
    assert f'"path": "{place}/pictures"' in output(here)
