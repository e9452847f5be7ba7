"""`make plan`: jobs, what stands, cost by earlier runs, operations or a probe."""

from __future__ import annotations

import json
import re
import sys

import drawing
import pytest
import running
from running import ROOT, TINY

from kt import plan
from kt.core import footprint, probe
from kt.core.footprint import Footprint
from kt.core.step import ConfigError
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


def measured(folder, name: str, seconds: float, cpu: float) -> None:
    path = folder / f"results/benchmarks/{name}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"s\th:m:s\tcpu_time\n{seconds}\t0:0:0\t{cpu}\n")


def test_a_job_costs_what_it_did_and_a_training_what_its_operations_do(jobs, tmp_path):
    named = {job.name: job for job in jobs}
    assert set(TARGETS) <= named.keys() and "report" in named
    measured(tmp_path, TARGETS[0], 10.0, 20.0)
    measured(tmp_path, "cluster/deep-block2-k4", 3.0, 4.0)
    found = plan.estimate(jobs, jobs, tmp_path)
    assert found[TARGETS[0]] == (10.0, 20.0, "an earlier run")
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
    assert found["cluster/hog-hog-k4"] == (3.0, 4.0, "likeness")
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
            "product": (1e-3, 2e-3), "decoding": (100.0, 100.0)}  # fmt: skip
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
    products = 120 * (width * (width + 16) + 6 * 16 * 4)
    assert found["cluster/hog-hog-k4"].seconds == pytest.approx(products * 1e-3)
    labelled = found["pseudo_labels/hog-hog-k4-images-train-unlabelled"].seconds
    assert labelled == pytest.approx(120 * 16 * (width + 4) * 1e-3)
    # Both look at 120 labelled images; one of them trains on 60, for 5 labels a class.
    assert found["evaluate/random-frozen"].seconds == pytest.approx(1200.0)
    assert found["evaluate/random-finetune"].seconds == pytest.approx(1200.0 + 60.0)


def test_what_parts_do_is_not_counted_again_where_they_are_gathered(options, tmp_path, even):
    some = plan.jobs(["--directory", str(tmp_path), *options, "shards=2"])
    found = plan.estimate(some, some, tmp_path)
    for rule, seconds in {"ingest": 12000.0, "features": 1200.0, "pseudo_labels": None}.items():
        parts = found_in_all(found, f"{rule}_part") / (1 if rule == "ingest" else 3)
        assert found_in_all(found, rule) == 0 < parts, rule
        assert seconds is None or parts == pytest.approx(seconds), rule


def found_in_all(found, rule: str) -> float:
    """Adds up the seconds of a rule's jobs."""
    return sum(cost.seconds for name, cost in found.items() if name.partition("/")[0] == rule)


def test_what_follows_from_an_unknown_number_of_images_is_unknown(jobs, tmp_path, even):
    (ingest,) = [job for job in jobs if job.rule == "ingest"]
    dataset = json.loads(ingest.options["dataset"]) | {"unlabelled": None}
    ingest = ingest._replace(options=ingest.options | {"dataset": json.dumps(dataset)})
    found = plan.estimate([ingest, *(job for job in jobs if job.rule != "ingest")], jobs, tmp_path)
    unknown = {name.partition("/")[0] for name, cost in found.items() if cost is None}
    known = {name.partition("/")[0] for name, cost in found.items() if cost}
    assert {"features", "cluster", "pseudo_labels", "target_train"} <= unknown
    assert {"evaluate", "report", "ingest"} <= known


def test_what_was_planned_is_compared_with_what_was_spent(tmp_path, capsys):
    with pytest.raises(ConfigError, match="expected a plan at"):
        plan._spent(tmp_path)
    path = tmp_path / plan.KEPT
    path.parent.mkdir(parents=True)
    cost = {"seconds": 60.0, "cpu": 7200.0, "by": "likeness"}
    path.write_text(json.dumps({TARGETS[0]: cost, TARGETS[1]: cost, "report": None}))
    measured(tmp_path, TARGETS[0], 90.0, 3600.0)
    plan._spent(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == "target_train 2 1 1.0 min 1.5 min 2.0 h 1.0 h".split()
    assert lines[2].split()[:3] == ["report", "1", "0"]


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
    assert re.search(r"^ingest +1 +0 +1 +\d+ s +\d+ s +0.6 MB +probe 1$", done.stdout, re.M)
    kept = json.loads((tmp_path / plan.KEPT).read_text())
    assert kept.keys() == {"ingest/images"} and kept["ingest/images"]["by"] == "probe"
    done = running.run(*command, *options, "clusters=none")
    assert done.returncode == 2 and "clusters" in done.stderr
