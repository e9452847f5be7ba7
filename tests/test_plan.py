"""`make plan`: jobs, what stands, cost by earlier runs, operations or a probe."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys

import drawing
import h5py
import pytest
import running
import torch
from running import ROOT, TINY
from test_ingest import dataset

from kt import plan
from kt.core import amounts, footprint, hardware, probe, step
from kt.core.footprint import Footprint
from kt.core.step import GPUS, ConfigError, DataError, Interrupted
from kt.core.work import TRAININGS, Work

TARGETS = [f"target_train/small-{taught}-s0" for taught in
           ("deep/block2/k4", "hog/hog/k4", "untrained/block2/k4", "supervised")]  # fmt: skip


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Options of the tiny run on drawn pictures."""
    place = drawing.write_folder(drawing.tree(), tmp_path_factory.mktemp("drawn") / "pictures")
    files = ["--snakefile", ROOT / "Snakefile", "--cores", 2, "--configfile", TINY]
    return [*map(str, files), "--config", f"images={place}"]


@pytest.fixture(scope="module")
def jobs(options, tmp_path_factory):
    """All jobs of that run."""
    return plan.jobs(["--directory", str(tmp_path_factory.mktemp("run")), *options])


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """The same on any machine."""
    monkeypatch.setenv("KT_DEVICE", "cpu")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is there in name only."""
    monkeypatch.delenv("KT_DEVICE")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)


def measured(folder, name: str, seconds: float, cpu: float, gpus: int | None = None) -> None:
    """Writes what a job leaves that ran on some GPUs; no word of them by None."""
    path = folder / f"results/benchmarks/{name}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"s\th:m:s\tcpu_time\n{seconds}\t0:0:0\t{cpu}\n")
    if gpus is not None:
        log = folder / f"results/logs/{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"09:59:59 {GPUS}: 7\n10:00:00 of an earlier run\n10:00:01 {GPUS}: {gpus}\n")


def test_a_job_costs_what_it_did_and_a_training_what_its_operations_do(jobs, tmp_path):
    named = {job.name: job for job in jobs}
    assert set(TARGETS) <= named.keys() and "report" in named
    measured(tmp_path, TARGETS[0], 10.0, 20.0)
    measured(tmp_path, "cluster/deep-block2-k4", 3.0, 4.0)
    found = plan.estimate(jobs, jobs, tmp_path)
    assert found[TARGETS[0]] == (10.0, 20.0, 0.0, "an earlier run")
    # The same network and as many images and epochs: as long.
    assert found[TARGETS[1]][:2] == pytest.approx((10.0, 20.0))
    assert found[TARGETS[1]].by == "operations"
    work = Work(jobs, tmp_path)
    done = {
        name: work.operations(named[name])
        for name in (TARGETS[0], "pretext_train/deep-s0", "pretext_train/longer-s0")
    }
    parts = done["pretext_train/deep-s0"] + done[TARGETS[0]]
    assert done["pretext_train/longer-s0"] == pytest.approx(parts)
    ratio = done["pretext_train/deep-s0"] / done[TARGETS[0]]
    assert found["pretext_train/deep-s0"].seconds == pytest.approx(10.0 * ratio)
    assert found["cluster/hog-hog-k4"] == (3.0, 4.0, 0.0, "likeness")
    assert found["pretext_train/untrained-s0"].by == found["report"].by == "probe"


def test_without_any_run_probes_tell_what_every_job_costs(jobs, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "SECONDS", 0.05)
    found = plan.estimate(jobs, jobs, tmp_path)
    assert {cost.by for cost in found.values()} == {"probe"}
    assert all(0 < cost.seconds < 600 and 0 < cost.cpu < 1200 for cost in found.values())
    start = tuple(probe.start(probe.HEAVY))  # which is measured once
    assert found["pretext_train/untrained-s0"][:2] == pytest.approx(start)
    for name in ("pretext_train/deep-s0", "features/deep-block2-images-train-unlabelled"):
        assert found[name].seconds > start[0], name


@pytest.fixture
def even(monkeypatch):
    """Probes that say what can be reckoned by hand."""
    said = {"start": (0.0, 0.0), "training": (1.0, 2.0), "extraction": (10.0, 20.0),
            "product": (1e-3, 2e-3), "decoding": (100.0, 100.0),
            "unpacking": (4.0, 4.0)}  # fmt: skip
    for name, rate in said.items():
        monkeypatch.setattr(probe, name, lambda *given, rate=rate: probe.Rate(*rate))


def test_a_job_costs_what_it_does_as_often_as_it_does_it(jobs, tmp_path, even):
    found, named = plan.estimate(jobs, jobs, tmp_path), {job.name: job for job in jobs}
    seen = {"pretext_train/deep-s0": 120, "pretext_train/untrained-s0": 0, TARGETS[0]: 120}
    for name, images in seen.items():  # one epoch
        assert found[name][:2] == pytest.approx((images * 1.0, images * 2.0)), name
    assert found["ingest/images"][:2] == pytest.approx((240 * 50.0, 240 * 100.0))  # two threads
    assert found["features/deep-block2-images-train-unlabelled"].seconds == pytest.approx(1200.0)
    # HOG: 4x4 cells of 9 directions, of which a map of 3x3 is kept; 16 components; 5 rounds and
    # the last assignment; k = 4.
    width = 9 * footprint.width(named["pretext_train/hog-s0"].options["backbone"], "hog", 1, 28)
    # The rows are projected to learn from them, and again to give each one its cluster.
    products = 120 * (width * width + 2 * width * 16 + 6 * 16 * 4)
    assert found["cluster/hog-hog-k4"].seconds == pytest.approx(products * 1e-3)
    labelled = found["pseudo_labels/hog-hog-k4-images-train-unlabelled"].seconds
    assert labelled == pytest.approx(120 * 16 * (width + 4) * 1e-3)
    # Features of 60 training and 60 test images serve three evaluations; 60 of the pool are seen in
    # two views. Fine-tuning with 5 labels a class sees 60 images, and then those of test.
    assert found["evaluate/random-frozen"].seconds == pytest.approx((120 + 2 * 60) * 10.0)
    assert found["evaluate/random-finetune"].seconds == pytest.approx(60 * 1.0 + 60 * 10.0)


def altered(jobs, rule: str, **more):
    """Gives the jobs with other options of a rule's jobs; mappings are laid over JSON."""
    found = []
    for job in jobs:
        options = dict(job.options)
        for key, value in more.items() if job.rule == rule else ():
            key = key.replace("_", "-")
            options[key] = json.dumps(json.loads(options[key]) | value) if options.get(key) else ""
        found.append(job._replace(options=options))
    return found


def test_mirror_images_and_packs_of_jpegs_cost_more(jobs, tmp_path, even):
    features = "features/deep-block2-images-train-unlabelled"
    seen = plan.estimate(jobs, altered(jobs, "features", mirror={}), tmp_path)[features]
    assert seen.seconds == pytest.approx(2 * 1200.0)
    packed = altered(jobs, "ingest", dataset={"storage": "jpeg"})
    found = plan.estimate(packed, packed, tmp_path)
    threads = int(next(job for job in jobs if job.name == features).options["threads"])
    assert found[features].seconds == pytest.approx(120 * (10.0 + 4.0 / threads))
    # A puzzle has tiles of another image.
    puzzles = found["pretext_train/deep-s0"]
    assert puzzles[:2] == pytest.approx((120 * (1.0 + 8.0 / threads), 120 * (2.0 + 8.0)))


def test_arrays_are_not_decoded_and_files_are(jobs, tmp_path, even, monkeypatch):
    asked = []
    monkeypatch.setattr(
        probe, "decoding", lambda size, encoded: asked.append(encoded) or probe.Rate(1, 1)
    )
    for path in ("CIFAR10:data", "STL10:data", "Imagenette:data"):
        some = altered(jobs, "ingest", dataset={"source": "torchvision", "path": path})
        plan.estimate(some, [job for job in some if job.rule == "ingest"], tmp_path)
    assert asked == [False, False, True]


def test_the_bound_makes_the_steps_of_one_pack_on_images_of_the_other(jobs, tmp_path, even):
    (ingest,) = [job for job in jobs if job.rule == "ingest"]
    larger = altered([ingest], "ingest", dataset={"size": 56, "unlabelled": 7, "labelled": 30})[0]
    larger = larger._replace(options=larger.options | {"output": "results/data/other"})
    bound = next(job for job in jobs if job.name == TARGETS[-1])
    moved = bound.options | {"pack": "results/data/other/train.h5"}
    moved = bound._replace(options=moved)
    found = plan.estimate([*jobs, larger], [moved], tmp_path)[bound.name]
    assert found.seconds == pytest.approx(120.0)
    same, more = (Work([*jobs, larger], tmp_path).operations(one) for one in (bound, moved))
    assert 3 * same < more < 5 * same  # four times the pixels


def test_packs_that_stand_are_counted_by_their_keys_alone(jobs, tmp_path, even):
    pack = tmp_path / "results/data/images/train-unlabelled.h5"
    pack.parent.mkdir(parents=True)
    with h5py.File(pack, "w") as file:  # no images that could be looked at
        file["keys"] = [b"one", b"two", b"three"]
    left = [job for job in jobs if job.rule != "ingest"]
    found = plan.estimate(jobs, left, tmp_path)
    features, deep = "features/deep-block2-images-train-unlabelled", "pretext_train/deep-s0"
    assert found[features].seconds == pytest.approx(30.0)
    assert found[deep].seconds == pytest.approx(3.0)
    anew = plan.estimate(jobs, jobs, tmp_path)  # packed again, up to the limits
    assert anew[features].seconds > 100 and anew[deep].seconds > 10
    # What was measured was of the pack as it is.
    measured(tmp_path, deep, 9.0, 9.0)
    assert plan.estimate(jobs, jobs, tmp_path)[TARGETS[0]].seconds > 50


def test_clustering_costs_what_its_settings_ask_for(jobs, tmp_path, even):
    name = "cluster/hog-hog-k4"
    width = 9 * footprint.width('{"name": "hog", "cells": 4}', "hog", 1, 28)

    def products(**settings) -> float:
        some = altered(jobs, "cluster", settings=settings)
        found = plan.estimate(some, [job for job in some if job.name == name], tmp_path)
        return found[name].seconds / 1e-3

    assert products(pca=None) == pytest.approx(120 * width * 4 * 6)
    assert products(pca=None, sample=10) == pytest.approx((40 * 5 + 120) * width * 4)
    # Of five iterations three are made on 20 rows, each of two times; the last two on all.
    warm = products(pca=None, warm_start=5, redo=2)
    assert warm == pytest.approx((20 * 3 * 2 + 120 * 2 + 120) * width * 4)
    # A single iteration has no part to be warm.
    once = products(pca=None, warm_start=5, redo=2, iterations=1)
    assert once == pytest.approx((120 * 2 + 120) * width * 4)
    # No more components than a quarter of the rows.
    most = products(pca=64)
    assert most == pytest.approx(120 * (width * width + 2 * width * 30 + 6 * 30 * 4))


def test_a_choice_sees_two_views_of_as_many_images_as_there_are(jobs, tmp_path, monkeypatch, even):
    asked = []
    monkeypatch.setattr(
        probe, "extraction", lambda *given: asked.append(given[-1]) or probe.Rate(10.0, 20.0)
    )
    teacher = next(job for job in jobs if job.name == "pretext_train/deep-s0").options["output"]
    given = {
        "model": teacher, "layers": "block1", "pack": "results/data/images/train-unlabelled.h5",
        "choice": json.dumps({"images": 50}), "threads": "1", "output": "choice.json",
    }  # fmt: skip

    def seconds(**more) -> float:
        job = plan.Job("choose/deep", given | more)
        return plan.estimate([*jobs, job], [job], tmp_path)[job.name].seconds

    assert seconds() == pytest.approx(2 * 50 * 10.0)
    assert seconds(mirror="", layers="block2 block1") == pytest.approx(4 * 50 * 10.0)
    assert seconds(choice='{"images": 500}', layers="auto") == pytest.approx(2 * 120 * 10.0)
    assert asked == ["block1", None, None]  # None: up to the last layer


def test_every_run_of_what_trains_anew_is_counted_for_every_seed(jobs, tmp_path, even):
    name = "evaluate/random-finetune"
    options = next(job for job in jobs if job.name == name).options
    (values,) = json.loads(options["evaluations"]).values()

    def seconds(evaluations: dict) -> float:
        models = f"{options['model']} {options['model']}"
        more = {"evaluations": json.dumps(evaluations), "model": models}
        job = plan.Job(name, options | more)
        return plan.estimate(jobs, [job], tmp_path)[name].seconds

    # Half of 60 labels are 30 images, seen twice.
    found = seconds({"finetune": values | {"labels_per_class": [5, 9], "fractions": [0.5]}})
    assert found == pytest.approx(2 * 3 * (60 * 1.0 + 60 * 10.0))
    above = {name: values[name] for name in ("images", "task", "training")}
    assert seconds({"nonlinear": above}) == pytest.approx(2 * 2 * (60 * 1.0 + 60 * 10.0))


def test_a_training_on_few_images_has_more_epochs(jobs, tmp_path):
    job, work = next(job for job in jobs if job.name == TARGETS[0]), Work(jobs, tmp_path)
    few = {"few-images": json.dumps({"as_if": 300, "most": 2})}
    more = job._replace(options=job.options | few | {"epochs": "3"})
    assert work.operations(more) == pytest.approx(6 * work.operations(job))


def test_the_bytes_of_jpegs_and_the_widths_of_layers():
    given = dataset("a", unlabelled=2, labelled=1, test=1, storage="jpeg").model_dump()
    sizes = Footprint([])
    assert sizes.of("ingest", {"output": "a", "dataset": json.dumps(given)}) == 4 * 16 * 16
    hog = '{"name": "hog", "cells": 4}'
    # Its map is no larger than 3x3.
    assert [footprint.width(hog, "hog", edge, 28) for edge in (1, 3, 100)] == [36, 324, 324]
    plain = '{"name": "plain", "widths": [8, 16], "strides": [2, 2]}'
    found = [footprint.width(plain, layer, 1, 28) for layer in ("conv1", "conv2", "auto")]
    assert found == [8, 16, 16]


def test_evaluations_look_at_the_images_as_often_as_they_do():
    same = {"knn": {"map": 1}, "linear": {"map": 1, "dimensions": None}, "clusters": {}}
    assert amounts.passes(same) == 1
    each = {"knn": {"map": 1}, "linear": {"map": None, "dimensions": 9}, "svm": {"map": 2}}
    assert amounts.passes(each) == 3


@pytest.mark.parametrize(
    "rows, batch, seen, epochs",
    [
        (3000, 50, 3000, 1),
        (99, 50, 50, 80),
        (70, 50, 50, 80),
        (30, 50, 30, 133),
        (149, 50, 100, 40),
    ],
)
def test_an_epoch_sees_whole_batches_and_a_training_as_many_images_as_it_is_to(
    rows, batch, seen, epochs
):
    assert amounts.seen(rows, batch) == seen
    assert amounts.epochs_for(4000, rows, batch) == epochs


def test_a_probe_that_fails_leaves_its_jobs_unknown_and_a_signal_ends_the_plan(
    jobs, tmp_path, even, monkeypatch
):
    def failing(error: Exception) -> None:
        def fail(*given):
            raise error

        monkeypatch.setattr(probe, "training", fail)

    for error in (DataError("the loss is nan"), RuntimeError("out of memory")):
        failing(error)
        found = plan.estimate(jobs, jobs, tmp_path)
        assert found[TARGETS[0]] is None and found["ingest/images"]
    failing(Interrupted("stopped"))
    with pytest.raises(Interrupted):
        plan.estimate(jobs, jobs, tmp_path)


def test_a_probe_stops_at_the_first_run_that_fills_its_time(monkeypatch):
    now, runs = [0.0], []
    monkeypatch.setattr(probe.time, "perf_counter", lambda: now[0])

    def work(number: int) -> int:
        runs.append(number)
        now[0] += number * 0.1
        return number

    assert probe._growing(work, 512, 2.0).seconds == pytest.approx(0.1)
    assert runs == [2, 2, 8, 32]
    runs.clear()
    assert probe._growing(work, 12, 2.0).seconds == pytest.approx(0.1)
    assert runs == [2, 2, 8, 12, 12, 12, 12]


def test_a_probe_on_a_gpu_times_no_first_run_of_a_size_and_does_not_look_at_the_cpus_memory(
    monkeypatch,
):
    now, seen = [0.0], set()
    monkeypatch.setattr(probe.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(probe, "_peak", lambda: probe.MEMORY + 1 + int(10 * now[0]))
    monkeypatch.setattr(hardware, "device", lambda: torch.device("cuda", 0))

    def work(number: int) -> int:
        now[0] += number * 0.1 + (0 if number in seen else 3)
        seen.add(number)
        return number

    assert probe._growing(work, 512, 2.0).seconds == pytest.approx(0.1)
    assert max(seen) == 32


def test_what_parts_do_is_not_counted_again_where_they_are_gathered(options, tmp_path, even):
    some = plan.jobs(["--directory", str(tmp_path), *options, "shards=2"])
    found = plan.estimate(some, some, tmp_path)
    for rule, seconds in {"ingest": 12000.0, "features": 1200.0, "pseudo_labels": None}.items():
        parts = found_in_all(found, f"{rule}_part") / (1 if rule == "ingest" else 3)
        assert found_in_all(found, rule) == 0 < parts, rule
        assert seconds is None or parts == pytest.approx(seconds), rule


def test_jobs_that_gather_are_not_like_those_that_work(options, tmp_path, even):
    some = plan.jobs(["--directory", str(tmp_path), *options, "shards=2"])
    gathering = "features/deep-block2-images-train-unlabelled"
    measured(tmp_path, gathering, 1.0, 1.0)
    measured(tmp_path, "ingest_part/images-1-of-2", 500.0, 500.0)
    whole = "features/untrained-block2-images-train-unlabelled"  # as if made in one job before
    some = [
        job._replace(options=job.options | {"parts": ""}) if job.name == whole else job
        for job in some
    ]
    found = plan.estimate(some, some, tmp_path)
    assert found["features/hog-hog-images-train-unlabelled"] == (1.0, 1.0, 0.0, "likeness")
    assert found[whole][1:] == (2400.0, 0.0, "probe")
    assert found["features_part/hog-hog-images-train-unlabelled-1-of-2"].by == "probe"
    assert found["ingest_part/images-2-of-2"] == (500.0, 500.0, 0.0, "likeness")
    assert found["ingest/images"].by == "probe"


def found_in_all(found, rule: str) -> float:
    """Adds up the seconds of a rule's jobs."""
    return sum(cost.seconds for name, cost in found.items() if name.partition("/")[0] == rule)


def test_what_follows_from_an_unknown_number_of_images_is_unknown(
    jobs, tmp_path, even, monkeypatch
):
    def training(backbone, task, settings, size, threads):
        assert json.loads(settings)["batch"] == 15, "only fine-tuning sees a known number"
        return probe.Rate(1.0, 2.0)

    monkeypatch.setattr(probe, "training", training)
    some = altered(jobs, "ingest", dataset={"unlabelled": None})
    found = plan.estimate(some, some, tmp_path)
    unknown = {name.partition("/")[0] for name, cost in found.items() if cost is None}
    known = {name.partition("/")[0] for name, cost in found.items() if cost}
    follows = {"ingest", "features", "cluster", "pseudo_labels", "target_train"}
    assert unknown == follows | {"pretext_train"}
    assert known == {"evaluate", "report", "pretext_train"}  # some teachers are not trained
    assert found["pretext_train/untrained-s0"] and not found["pretext_train/deep-s0"]


def test_what_snakemake_measured_of_the_last_attempt_alone_is_mended_by_the_log(tmp_path):
    measured(tmp_path, "pretext_train/deep-s0", 10.0, 20.0)
    log = tmp_path / "results/teachers/deep/s0/log.jsonl"
    log.parent.mkdir(parents=True)
    for seconds, told in ((95.5, 95.5), (3.0, 10.0)):
        log.write_text('{"seconds": 1.0}\n' + json.dumps({"seconds": seconds}) + "\n")
        found = plan.benchmark(tmp_path, "pretext_train/deep-s0", log.relative_to(tmp_path))
        assert found[:2] == (told, 20.0)
    log.unlink()
    found = plan.benchmark(tmp_path, "pretext_train/deep-s0", log.relative_to(tmp_path))
    assert found[:2] == (10.0, 20.0)
    measured(tmp_path, "report", 0.4, "NA")
    assert plan.benchmark(tmp_path, "report") is None


def test_what_was_planned_is_compared_with_what_was_spent(tmp_path, capsys):
    with pytest.raises(ConfigError, match="expected a plan at"):
        plan._spent(tmp_path)
    path = tmp_path / plan.KEPT
    path.parent.mkdir(parents=True)
    cost = {"seconds": 60.0, "cpu": 7200.0, "by": "likeness"}
    step.write_json(path, {TARGETS[0]: cost, TARGETS[1]: cost, "report": None})
    measured(tmp_path, TARGETS[0], 90.0, 3600.0)
    plan._spent(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    # So it is with a plan that knows nothing of GPUs and disk.
    assert lines[0].split() == "step jobs ran planned spent planned CPU spent CPU".split()
    assert lines[1].split() == "target_train 2 1 1.0 min 1.5 min 2.0 h 1.0 h".split()
    assert lines[2].split()[:3] == ["report", "1", "0"]
    assert lines[3].split() == "all 3 1 1.0 min 1.5 min 2.0 h 1.0 h".split()
    later = path.stat().st_mtime + 10
    os.utime(path, (later, later))  # a plan made after it: what ran before is not of it
    plan._spent(tmp_path)
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["target_train", "2", "0"]


def test_gpu_time_and_disk_are_compared_where_both_sides_are_known(tmp_path, capsys):
    cost = {"seconds": 60.0, "cpu": 60.0, "gpu": 60.0, "by": "probe", "disk": 4_000_000}
    costs = {
        name: cost | {"output": f"results/{number}"} for number, name in enumerate(TARGETS)
    } | {"report": cost | {"gpu": 0.0, "disk": None, "output": "results/page"}}
    step.write_json(tmp_path / plan.KEPT, costs)
    measured(tmp_path, TARGETS[0], 90.0, 90.0, gpus=2)
    measured(tmp_path, TARGETS[1], 30.0, 30.0, gpus=0)
    measured(tmp_path, TARGETS[2], 30.0, 30.0)  # by a version that did not say
    measured(tmp_path, "report", 1.0, 1.0, gpus=0)
    for folder, sizes in {"0": (3_000_000, 2_500_000), "1": (100_000,), "3": (9_000_000,)}.items():
        for number, size in enumerate(sizes):
            step.write_text(tmp_path / "results" / folder / f"file{number}", "x" * size)
    step.write_text(tmp_path / "results/page", "x" * 1_000_000)
    plan._spent(tmp_path)
    head, targets, report, whole = capsys.readouterr().out.splitlines()
    assert head.split()[-8:] == "planned GPU spent GPU planned disk spent disk".split()
    # The third is left out of the GPUs, what it wrote is gone; the fourth has not run.
    assert targets.split()[-8:] == "2.0 min 3.0 min 8.0 MB 5.6 MB".split()
    assert report.split()[-8:] == "0 s 0 s 0.0 MB 0.0 MB".split()
    assert whole.split()[-8:] == targets.split()[-8:]


def test_without_any_gpu_there_is_no_column_of_it(tmp_path, capsys):
    cost = {"seconds": 60.0, "cpu": 60.0, "gpu": 0.0, "by": "probe", "disk": 0, "output": "no"}
    step.write_json(tmp_path / plan.KEPT, {"report": cost})
    for gpus in (None, 0):
        measured(tmp_path, "report", 1.0, 1.0, gpus)
        plan._spent(tmp_path)
        assert not re.search("GPU|disk", capsys.readouterr().out)
    measured(tmp_path, "report", 1.0, 1.0, gpus=1)  # planned elsewhere
    plan._spent(tmp_path)
    assert capsys.readouterr().out.splitlines()[-1].split()[-4:] == "0 s 1 s".split()


def test_gpu_time_is_that_of_jobs_that_held_one_or_would_here(
    jobs, tmp_path, even, gpu, monkeypatch
):
    monkeypatch.setattr(probe, "start", lambda *given: probe.Rate(1.0, 1.0))
    found = plan.estimate(jobs, jobs, tmp_path)
    on_gpu = {name for name, cost in found.items() if cost.gpu}
    assert all(found[name].gpu == found[name].seconds for name in on_gpu)
    rules = {name.partition("/")[0] for name in on_gpu}
    assert rules == {job.rule for job in jobs} - {"ingest", "report"}
    assert found["pretext_train/untrained-s0"][:3] == (1.0, 1.0, 0.0)  # it is not trained
    gathering = [
        job._replace(options=job.options | {"parts": "some"})
        for job in jobs
        if job.rule in ("features", "pseudo_labels")
    ]
    costs = plan.estimate(jobs, gathering, tmp_path).values()
    assert {cost[:3] for cost in costs} == {(1.0, 1.0, 0.0)}
    # What did run there tells more: of its own GPUs, and of those of trainings and of its like.
    measured(tmp_path, TARGETS[0], 10.0, 20.0, gpus=4)
    measured(tmp_path, "cluster/deep-block2-k4", 3.0, 4.0, gpus=0)
    measured(tmp_path, "evaluate/random-frozen", 5.0, 5.0)
    found = plan.estimate(jobs, jobs, tmp_path)
    assert found[TARGETS[0]].gpu == 40.0 and found[TARGETS[1]].gpu == pytest.approx(40.0)
    assert found["cluster/hog-hog-k4"].gpu == 0.0
    assert found["evaluate/random-frozen"].gpu == 5.0


HOLDING = """
import functools, sys, torch
from kt.core import step
def run(arguments):
    from kt.core import hardware
    torch.cuda.is_available = lambda: True
    hardware._claimed = functools.cache(lambda: 0)
    if arguments.held:
        hardware.device()
def add_arguments(parser):
    parser.add_argument("--output")
    parser.add_argument("--held", action="store_true")
step.main("", add_arguments, run)
"""


def test_a_step_says_in_its_log_how_many_gpus_it_held(tmp_path, monkeypatch, gpu):
    log = tmp_path / "job.log"
    assert plan.gpus(log) is None
    command = [sys.executable, "-c", HOLDING, "--output", tmp_path / "out", "--log", log]
    for options, processes, held in (([], 1, 0), (["--held"], 1, 1), (["--held"], 4, 4)):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        done = running.run(*command, *options)
        assert done.returncode == 0, running.output(done)
        assert plan.gpus(log) == held  # what it said last


def test_the_plan_has_a_column_of_gpu_time_where_one_takes_part(
    jobs, tmp_path, even, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "_counted", lambda job, due: job)
    some = [job for job in jobs if job.rule in ("ingest", "pretext_train")]

    def printed() -> list[str]:
        plan._table(some, some)
        return capsys.readouterr().out.splitlines()

    head, *_, last = printed()
    assert "GPU" not in head and last.startswith("no GPU here")
    measured(tmp_path, "pretext_train/deep-s0", 7200.0, 7200.0, gpus=1)
    head, ingest, pretext, *_, last = printed()
    assert "CPU time  GPU time      disk" in head and last.startswith("no GPU here")
    assert " 0 s  " in ingest and pretext.index("h  ") < head.index("disk")
    kept = json.loads(plan.KEPT.read_text())
    assert kept["pretext_train/deep-s0"]["gpu"] == 7200.0
    assert kept["ingest/images"]["output"] == "results/data/images"
    assert kept["ingest/images"]["disk"] == 240 * 3 * 28 * 28


def test_parts_stand_on_disk_until_they_are_merged(options, tmp_path, even, monkeypatch, capsys):
    some = plan.jobs(["--directory", str(tmp_path), *options, "shards=2"])
    sizes, every = Footprint((job.rule, job.options) for job in some), 0
    for rule in ("ingest", "features", "pseudo_labels"):
        whole = sum(sizes.of(job.rule, job.options) for job in some if job.rule == rule)
        parts = [job for job in some if job.rule == f"{rule}_part"]
        made = sum(sizes.of_part(job.rule, job.options) for job in parts)
        assert made == pytest.approx(whole) != 0, rule
        every += made
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "_counted", lambda job, due: job)
    plan._table(some, some)
    said = capsys.readouterr().out
    assert f"and up to {every / 1e6:.1f} MB more stand on disk until parts are merged\n" in said
    without = [job for job in some if "part" not in job.options]
    plan._table(without, without)
    assert "merged" not in capsys.readouterr().out


@pytest.mark.slow
def test_what_will_be_written_is_what_is_written(jobs, tmp_path):
    tree = drawing.tree(40, 20, 20, draw=drawing.pattern)  # as many as the limits allow
    place = drawing.write_folder(tree, tmp_path / "pictures")
    last = "results/targets/small/deep/block2/k4/s0/model.safetensors"
    done = running.workflow(tmp_path / "run", place, last)
    assert done.returncode == 0, running.output(done)
    sizes, found = Footprint((job.rule, job.options) for job in jobs), 0
    for job in jobs:
        output = tmp_path / "run" / job.options["output"]
        if job.rule in ("ingest", "features", "pseudo_labels") and output.exists():
            files = [output] if output.is_file() else output.glob("t*[!s].h5")
            written = sum(path.stat().st_size for path in files)
        elif job.rule in TRAININGS and output.exists():
            written = (output / "model.safetensors").stat().st_size
        else:
            continue
        planned = sizes.of(job.rule, job.options)
        # Tables and networks have some kB that are not rows.
        assert 0.9 * planned <= written < 1.1 * planned + 20_000, (job.name, planned, written)
        found += 1
    assert found >= 5


def test_times_are_said_in_the_unit_that_fits():
    said = [plan.lasting(seconds) for seconds in (0, 59, 90, 7200)]
    assert said == ["0 s", "59 s", "1.5 min", "2.0 h"]


def test_the_table_counts_jobs_and_bytes_and_wrong_options_are_told(options, tmp_path):
    command = [sys.executable, "-m", "kt.plan", "--directory", tmp_path]
    done = running.run(*command, "results/data/images/report.json", *options)
    assert done.returncode == 0, running.output(done)
    assert re.search(r"^ingest +1 +0 +1 +\d+ s +\d+ s +0.1 MB +probe 1$", done.stdout, re.M)
    kept = step.read_json(tmp_path / plan.KEPT)
    assert kept.keys() == {"ingest/images"} and kept["ingest/images"]["by"] == "probe"
    done = running.run(*command, *options, "clusters=none")
    assert done.returncode == 2 and "clusters" in done.stderr


def test_own_pictures_count_as_many_as_there_are(jobs, tmp_path):
    (job,) = (job for job in jobs if job.rule == "ingest")
    settings = json.loads(job.options["dataset"]) | {"unlabelled": 10000, "labelled": None}
    place = drawing.write_folder(drawing.tree(30, 20, 10), tmp_path / "all")
    without = drawing.write_folder(drawing.tree(0, 20, 10), tmp_path / "no pool")
    classes = len(drawing.CLASSES)
    for path, unlabelled, numbers in (
        (place, 10000, (30, 20, 10)), (place, 25, (25 / classes, 20, 10)),
        (without, None, (10, 10, 10)),
    ):  # fmt: skip
        given = settings | {"path": str(path), "unlabelled": unlabelled, "test": None}
        counted = plan._counted(job._replace(options=job.options | {"dataset": json.dumps(given)}))
        found = json.loads(counted.options["dataset"])
        assert [found[name] for name in ("unlabelled", "labelled", "test")] == [
            round(classes * number) for number in numbers
        ]


def test_packed_images_are_counted_as_they_are_unless_they_are_packed_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = drawing.write_folder(drawing.tree(4, 3, 2), tmp_path / "all")
    given = json.dumps(dataset(place).model_dump())  # without limits
    whole = plan.Job("ingest/mine", {"output": "results/data/mine", "dataset": given})
    part = {"output": "results/parts/ingest/mine/1-of-2.txt", "dataset": given, "part": "1/2"}
    part = plan.Job("ingest_part/mine-1-of-2", part)
    splits = {"train-unlabelled": {"images": 7}, "train": {"images": 5}, "test": {"images": 3}}
    step.write_json(plan.PACKS / "mine" / plan.REPORT, {"splits": splits})
    for due, numbers in (((), [7, 5, 3]), ({"ingest/mine"}, [12, 9, 6])):
        counted = [plan._counted(job, due).options for job in (whole, part)]
        for options in counted:
            found = json.loads(options["dataset"])
            assert [found[limit] for limit in footprint.LIMITS.values()] == numbers
        sizes = Footprint([("ingest", counted[0])])
        assert sizes.of("ingest", counted[0]) == sum(numbers) * 3 * 16 * 16


def test_a_plan_runs_the_files_of_code_that_the_configuration_names(
    options, tmp_path, even, monkeypatch, capsys
):
    monkeypatch.setenv("KT_RUN_FILES", "0")  # the plan sets it
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(ROOT / "tests/network_of_mine.py", folder / "net.py")
    file = {"name": "file", "path": "net.py", "function": "tiny", "options": {"widths": [4, 8]}}
    deep = {"backbone": file | {"digest": None}, "layers": ["two"]}
    values = {"teachers": {"deep": deep, "untrained": {"layers": ["two"]}}}
    mine = running.overlay(tmp_path / "mine.yaml", values)
    place = options.index("--config")
    plan._print([*options[:place], str(mine), *options[place:]], folder)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step") and "nothing" not in "".join(lines)
    assert "GPU" in lines[-1]
    kept = json.loads((folder / plan.KEPT).read_text())
    assert kept["pretext_train/deep-s0"]["seconds"] == pytest.approx(36.0)  # as many pictures
    assert kept["pretext_train/deep-s0"]["log"] == "results/teachers/deep/s0/log.jsonl"


def test_features_that_are_given_have_no_size_that_is_known(jobs):
    sizes = Footprint((job.rule, job.options) for job in jobs)
    (pack,) = {job.options["pack"] for job in jobs if job.rule == "features"}
    assert sizes.of("features", {"given": "f.npy", "keys": "f.keys.txt", "pack": pack}) is None


PRESETS = sorted(path.name for path in (ROOT / "presets").glob("*.yaml"))
OWN = {"name": "file", "path": str(ROOT / "tests/network_of_mine.py"), "function": "tiny",
       "options": {"widths": [4, 8]}, "digest": None}  # fmt: skip
CASES = {
    "clusters that are chosen": {"clusters": ["auto"], "teachers": {"deep": {"layers": ["auto"]}}},
    "four shards": {"shards": 4},
    "packs of JPEGs": {"datasets": {"fashion_mnist": {"storage": "jpeg"}}},
    "mirror images": {"teachers": {"deep": {"mirror": True}}},
    "no components": {"clustering": {"pca": None, "whiten": False, "sample": 20, "warm_start": 5}},
    "a file of code": {
        "targets": {"small": {"backbone": OWN}},
        "teachers": {"own": {"layers": ["two"]}, "random": {"layers": []}},
    },
    "no limits": {"datasets": {"fashion_mnist": {"unlabelled": None, "labelled": None}}},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", [*PRESETS, *CASES])
def test_every_job_of_every_preset_has_a_cost_or_none(case, tmp_path, even, monkeypatch):
    monkeypatch.setenv("KT_RUN_FILES", "1")
    file = ROOT / "presets" / case
    if case in CASES:
        file = running.overlay(tmp_path / "case.yaml", CASES[case])
    command = ["--snakefile", ROOT / "Snakefile", "--cores", 2, "--directory", tmp_path]
    every = plan.jobs(map(str, [*command, "--configfile", file, "--forceall"]))
    found = plan.estimate(every, every, tmp_path)
    assert found.keys() == {job.name for job in every} and len(found) > 20
    assert all(cost is None or 0 <= cost.seconds <= cost.cpu for cost in found.values())
    known = {name.partition("/")[0] for name, cost in found.items() if cost}
    assert {"report", "pretext_train"} <= known
    sizes = Footprint((job.rule, job.options) for job in every)
    assert any([sizes.of(job.rule, job.options) for job in every])
