"""The workflow on a real Slurm, two nodes on this host; test_slurm_jobs.py: what befalls jobs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import drawing
import numpy as np
import pytest
import slurm
from on_slurm import (
    MODEL,
    QUICK,
    STOPPED,
    begin,
    copied,
    has_said,
    said,
    same,
    slowly,
    under_way,
    went_on,
)
from running import ROOT, SNAKEMAKE, TINY, overlay
from safetensors.numpy import load_file

from kt.cluster import read_clusters
from kt.core import table

pytest_plugins = ["on_slurm"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CLUSTERS = "results/clusters/deep/one/images/k4.h5"


def settings(path: Path) -> dict:
    """Gives what a table was made with."""
    with table.opened(path) as file:
        return json.loads(table.text(file, "config"))


def by_hand(step: str, output: Path, **options) -> None:
    """Runs a step without Snakemake and Slurm."""
    command = [sys.executable, "-m", f"kt.{step}", "--output", output]
    command += [part for name, value in options.items() for part in (f"--{name}", value)]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True)


# ---------------------------------------------------------------------------- the whole chain


def test_the_whole_chain_runs_in_shards_gives_the_same_and_then_has_nothing_to_do(site, tmp_path):
    # Images for two blocks, or one of two shards would be empty.
    tree = drawing.tree(200, 20, 20, draw=drawing.pattern)
    pictures = drawing.write_folder(tree, tmp_path / "pictures")
    # A teacher and a target: every rule has jobs, and more arms would add seconds of Slurm alone.
    fewer = {"datasets": {"images": {"unlabelled": 600}}, "evaluations": {"finetune": None}}
    fewer["teachers"] = dict.fromkeys(["own", "longer", "untrained", "random", "hog"])
    fewer["targets"] = {"small": {"supervised": False}}
    files = [overlay(tmp_path / "more.yaml", fewer)]
    given = {"files": files, "config": ["shards=2"], "options": [*QUICK, "features_part=1"]}
    folder = tmp_path / "run"
    driver = begin(site, folder, pictures, **given)
    number = int(re.search(r"^total +(\d+)", driver.done(), re.M)[1]) - 1  # `all` is no job
    assert [job["state"] for job in driver.jobs()] == ["COMPLETED"] * number
    assert (folder / "results/report/index.html").exists()
    assert not [*folder.glob("results/state/*")]  # all is done: nothing to go on from
    for one, other in unsharded(folder, tmp_path):
        assert table.digest(one) == table.digest(other), one
    assert "Nothing to be done" in begin(site, folder, pictures, **given).done()


def unsharded(folder: Path, output: Path):
    """Makes what several jobs made by one process each; gives the places of both."""
    made, deep = folder / "results", "deep/block2"
    pack, features = made / "data/images", made / f"features/{deep}/images-train-unlabelled.h5"
    clusters = made / f"clusters/{deep}/images/k4.h5"
    labels = made / f"pseudo_labels/{deep}/images/k4/images-train-unlabelled.h5"
    options = settings(pack / "train-unlabelled.h5")
    by_hand("ingest", output / "pack", dataset=json.dumps(options["dataset"]), seed=options["seed"])
    options = settings(features)
    assert not options.pop("mirror")
    options["model"] = folder / options["model"]
    by_hand("features", output / "f.h5", pack=pack / "train-unlabelled.h5", threads=1, **options)
    by_hand("pseudo_labels", output / "l.h5", features=features, clusters=clusters)
    yield from ((path, output / "pack" / path.name) for path in sorted(pack.glob("*.h5")))
    yield from ((features, output / "f.h5"), (labels, output / "l.h5"))


def test_any_scheduler_will_do_that_has_three_commands(site, pictures, tmp_path):
    wanted = "results/data/images/report.json"
    before = {job["id"] for job in site.jobs()}
    begin(site, tmp_path / "run", pictures, wanted, profile="cluster-generic", options=[]).done()
    (job,) = [job for job in site.jobs() if job["id"] not in before and job["name"] == "ingest"]
    assert job["state"] == "COMPLETED"


def test_the_workflow_as_a_job_stops_in_time_and_sends_itself_again(
    site, ready, pictures, tmp_path
):
    folder = copied(ready[0], tmp_path / "run")
    before = {job["id"] for job in site.jobs()}
    options = ["--snakefile", ROOT / "Snakefile", "--directory", folder, MODEL, *QUICK]
    options += ["--configfile", TINY, slowly(folder, 30, 0.15), "--config", f"images={pictures}"]
    variables = {"KT_SAVE_SECONDS": "0.5", "KT_DEVICE": "cpu"}
    variables |= {"PATH": f"{Path(SNAKEMAKE[0]).parent}:{site.environment['PATH']}"}
    variables |= {"SBATCH_OUTPUT": f"{tmp_path}/driver-%j.log"}
    exported = ",".join(f"{name}={value}" for name, value in variables.items())
    site.call(
        "sbatch", f"--export=ALL,{exported}", f"--output={tmp_path}/driver-%j.log",
        f"--chdir={ROOT}", ROOT / "profiles/slurm/driver.sh", *options,
    )  # fmt: skip

    def drivers():
        found = [job for job in site.jobs() if job["id"] not in before and job["name"] == "kt"]
        return sorted(found, key=lambda job: int(job["id"]))

    try:
        site.wait(lambda: [*folder.glob("results/state/deep-s0-*/**/*.state")], 100)
        site.call("scancel", "--batch", "--signal=USR1", drivers()[0]["id"])  # as before its limit
        site.wait(lambda: has_said(folder, STOPPED), 30)
        site.wait(lambda: (folder / MODEL).exists(), 200)
        site.wait(lambda: [job["state"] for job in drivers()] == ["COMPLETED"] * 2, 60)
    finally:
        site.call("scancel", "--name=kt")
    assert min(went_on(folder)) > 0 and same(folder, ready[1])


def test_what_a_site_fills_in_reaches_its_jobs(site, pictures, tmp_path):
    text = (ROOT / "profiles" / "slurm" / "config.yaml").read_text()
    text = re.sub(r"^( *)# ( *[\w-]+:( .*)?)$", r"\1\2", text, flags=re.M)  # examples, not prose
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "config.yaml").write_text(
        text.replace("pretext_train: 8", "pretext_train: 2")
    )
    options = ["--slurm-init-seconds-before-status-checks", "3", "--latency-wait", "20"]
    files = [slowly(tmp_path, 1, 0.05)]
    run, profile = tmp_path / "run", tmp_path / "site"
    driver = begin(site, run, pictures, MODEL, files=files, profile=profile, options=options)
    driver.done()
    ingest, training = driver.jobs()
    wanted = ("account", "partition", "gpus", "cores")
    assert [ingest[name] for name in wanted] == [slurm.ACCOUNT, "main", "N/A", "2"]
    found = [training[name].replace("/", ":") for name in wanted]  # as newer ones print it
    assert found == [slurm.ACCOUNT, "gpu", "gres:gpu:1", "2"]


# ---------------------------------------------------------------------------- several nodes


def test_two_nodes_share_training_and_clustering_and_give_what_one_process_gives(
    site, ready, pictures, tmp_path
):
    folder = copied(ready[0], tmp_path / "run")
    asked = ["nodes=2", "tasks=2", "tasks_per_gpu=0", "mpi='srun'", "gres='gpu:1'"]
    spread = [f"{rule}:{one}" for rule in ("pretext_train", "cluster") for one in asked]
    options = [*QUICK, "--set-resources", *spread]
    files = [slowly(folder, 30, 0.05)]
    driver = begin(site, folder, pictures, CLUSTERS, files=files, options=options)
    driver.done()
    both = f"{site.nodes[0][:-1]}[1-2]"
    assert [job["node"] for job in driver.jobs()].count(both) == 2 and "2 processes" in said(folder)
    found = load_file(folder / MODEL)
    for name, expected in ready[1].items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-5)
    one, two = alone(folder / CLUSTERS, tmp_path / "one.h5"), read_clusters(folder / CLUSTERS)
    np.testing.assert_allclose(two[0], one[0], rtol=1e-4, atol=1e-5)
    assert two[1].tolist() == one[1].tolist()


def test_a_job_on_two_nodes_that_is_cancelled_saves_its_state_and_goes_on(
    site, ready, pictures, tmp_path
):
    folder = copied(ready[0], tmp_path / "run")
    asked = ["nodes=2", "tasks=2", "tasks_per_gpu=0", "mpi='srun'"]
    options = [*QUICK, "--set-resources", *(f"pretext_train:{one}" for one in asked)]
    files = [slowly(folder, 30, 0.15)]
    driver = begin(site, folder, pictures, MODEL, files=files, options=options)
    job = under_way(driver, folder)
    site.call("scancel", job["id"])
    site.wait(lambda: has_said(folder, STOPPED), 30)
    driver.done()
    assert [one["state"] for one in driver.jobs()] == ["CANCELLED", "COMPLETED"]
    assert min(went_on(folder)) > 0
    found = load_file(folder / MODEL)
    for name, expected in ready[1].items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-5)


def alone(clusters: Path, output: Path):
    """Clusters the same features in one process; gives centroids, sizes and the transform."""
    made = settings(clusters)
    k, seed = made.pop("k"), made.pop("seed")
    made.pop("rows")
    (features,) = clusters.parents[5].glob("results/features/deep/one/*-train-unlabelled.h5")
    by_hand("cluster", output, features=features, k=k, seed=seed, settings=json.dumps(made))
    return read_clusters(output)


# ---------------------------------------------------------------------------- what Slurm refuses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--default-resources", "slurm_partition=nowhere"],
            "invalid partition specified",
        ),
        (
            ["--set-resources", "ingest:mem_mb=99000000"],
            "Memory specification can not",
        ),
    ],
    ids=["partition", "memory"],
)
def test_what_slurm_refuses_is_told(site, pictures, tmp_path, options, message):
    wanted = "results/data/images/report.json"
    options = [*QUICK, "--retries", "0", *options]
    driver = begin(site, tmp_path / "run", pictures, wanted, options=options)
    assert driver.end() != 0 and message in driver.log.read_text()
