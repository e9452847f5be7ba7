"""The workflow on a real Slurm, two nodes on this host, and what happens to jobs there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import drawing
import numpy as np
import pytest
import slurm
from running import ROOT, SNAKEMAKE, TINY, environment, missing, overlay
from safetensors.numpy import load_file

from kt.cluster import read_clusters
from kt.core import table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
MODEL = "results/teachers/deep/s0/model.safetensors"
CLUSTERS = "results/clusters/deep/one/images/k4.h5"
STOPPED = "run it again to go on"  # what a training says that a signal ended, with 75
# So that a test need not wait for what a cluster with many jobs spares its controller.
QUICK = ["--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "3"]
QUICK += ["--slurm-no-account", "--latency-wait", "20", "--set-threads", "pretext_train=1"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if lacking := slurm.install():
        missing(f"NO SLURM ON THIS HOST, nothing of it was tested: {lacking}")
    # Short: the path of a socket has at most 107 bytes.
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"kt-slurm-{os.getpid()}"
    with slurm.cluster(folder) as found:
        try:
            yield found
        finally:
            for process in Driver.started:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    tree = drawing.tree(40, 20, 20, draw=drawing.pattern)
    return drawing.write_folder(tree, tmp_path_factory.mktemp("drawn") / "pictures")


@pytest.fixture(scope="module")
def ready(site, pictures, tmp_path_factory):
    """A folder whose images are packed, and the model trained there without any disturbance."""
    folder = tmp_path_factory.mktemp("ready")
    begin(site, folder, pictures, "results/data/images/report.json").done()
    calm = copied(folder, tmp_path_factory.mktemp("calm") / "run")
    begin(site, calm, pictures, MODEL, files=[slowly(calm, 30, 0.05)]).done()
    return folder, load_file(calm / MODEL)


class Driver:
    """A workflow that runs on the site; none outlives the tests."""

    started: ClassVar[list[subprocess.Popen]] = []

    def __init__(self, site, command: list[str], env: dict[str, str], log: Path):
        self.site, self.log = site, log
        with open(log, "a") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # not so in `&`
            )  # fmt: skip
        self.started.append(self.process)

    def end(self, seconds: float = 700) -> int:
        """Waits for the end; gives the exit code."""
        return self.process.wait(seconds)

    def jobs(self) -> list[dict[str, str]]:
        """Gives its jobs, which have the run's id as name, in the order of their ids."""
        (run,) = re.findall(r"^SLURM run ID: (\S+)", self.log.read_text(), re.M)[-1:] or [None]
        return sorted((j for j in self.site.jobs() if j["name"] == run), key=lambda j: int(j["id"]))

    def done(self) -> str:
        """Waits for the end, which must be good; gives all that was printed."""
        code, text = self.end(), self.log.read_text()
        assert code == 0, text[-5000:]
        return text


def begin(
    site, folder: Path, pictures, *wanted, files=(), config=(), profile="slurm", options=QUICK
):
    """Starts the workflow with a profile of the project, for some files or everything."""
    user = environment(ROOT)
    path = os.pathsep.join([site.environment["PATH"], user["PATH"]])
    python = str(Path(SNAKEMAKE[0]).parent)
    more = {"PATH": python + os.pathsep + path, "SLURM_CONF": site.environment["SLURM_CONF"]}
    more |= {"KT_SAVE_SECONDS": "0.5", "KT_DEVICE": "cpu"}  # its GPUs are there in name only
    command = [*SNAKEMAKE, "--snakefile", ROOT / "Snakefile", "--directory", folder, *wanted]
    command += ["--workflow-profile", ROOT / "profiles" / profile, *options]
    command += ["--configfile", TINY, *files, "--config", f"images={pictures}", *config]
    folder.mkdir(exist_ok=True)
    (folder / "printed.log").unlink(missing_ok=True)
    return Driver(site, list(map(str, command)), {**user, **more}, folder / "printed.log")


def settings(path: Path) -> dict:
    """Gives what a table was made with."""
    with table.opened(path) as file:
        return json.loads(table.text(file, "config"))


def by_hand(step: str, output: Path, **options) -> None:
    """Runs a step without Snakemake and Slurm."""
    command = [sys.executable, "-m", f"kt.{step}", "--output", output]
    command += [part for name, value in options.items() for part in (f"--{name}", value)]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True)


def slowly(folder: Path, epochs: int, seconds: float) -> Path:
    """Gives an overlay under which the teacher `deep` takes its time."""
    network = {"name": "file", "path": str(ROOT / "tests" / "slow_network.py"), "function": "slow"}
    network |= {"options": {"seconds": seconds}, "digest": None}
    # Steps that rounding does not blow up, since two processes round otherwise than one.
    training = {"epochs": epochs, "batch": 32, "precision": "float32"}
    training |= {"optimiser": "sgd", "lr": 0.02}
    deep = {"backbone": network, "training": training, "layers": ["one"]}
    # `untrained` is like it, but for its layers, which tests/tiny.yaml names.
    return overlay(folder / "slow.yaml", {"teachers": {"deep": deep, "untrained": None}})


def copied(source: Path, target: Path) -> Path:
    subprocess.run(["cp", "-a", source, target], check=True)
    return target


def said(folder: Path) -> str:
    return (folder / "results/logs/pretext_train/deep-s0.log").read_text()


def under_way(driver: Driver, folder: Path) -> dict[str, str]:
    """Waits until the training has left a state; gives its job."""
    states = folder / "results/state"
    driver.site.wait(lambda: [*states.glob("deep-s0-*/**/*.state")])
    (job,) = driver.jobs()
    assert job["state"] == "RUNNING" and "pretext_train" in job["comment"]
    return job


def went_on(folder: Path) -> list[int]:
    """Gives the steps at which the training went on."""
    return list(map(int, re.findall(r"goes on at step (\d+) of", said(folder))))


def stopped(folder: Path) -> bool:
    """Says whether the training has said that it stopped; the next attempt takes its log away."""
    with contextlib.suppress(FileNotFoundError):
        return STOPPED in said(folder)
    return False


def same(folder: Path, expected) -> bool:
    """Says whether the weights are those of the training without any disturbance."""
    found = load_file(folder / MODEL)
    return found.keys() == expected.keys() and all(
        np.array_equal(found[name], expected[name]) for name in expected
    )


@pytest.fixture
def running(site, ready, pictures, tmp_path):
    """A training under way: its folder, driver, job, and how to start the driver again."""
    folder = copied(ready[0], tmp_path / "run")
    files = [slowly(folder, 30, 0.25)]  # 30 x 3 steps: 22 s

    def start():
        return begin(site, folder, pictures, MODEL, files=files)

    driver = start()
    return folder, driver, under_way(driver, folder), start


@pytest.fixture(scope="module", autouse=True)
def limited(site, ready, pictures, tmp_path_factory):
    """A training that needs more time than its job has: a minute, Slurm's least; runs beside."""
    folder = copied(ready[0], tmp_path_factory.mktemp("limited") / "run")
    files = [slowly(folder, 30, 1.1)]
    options = [*QUICK, "--set-resources", "pretext_train:runtime=1"]
    return folder, begin(site, folder, pictures, MODEL, files=files, options=options)


# ---------------------------------------------------------------------------- the whole chain


def test_the_whole_chain_runs_in_shards_gives_the_same_and_then_has_nothing_to_do(site, tmp_path):
    # Images for two blocks, or one of two shards would be empty.
    tree = drawing.tree(200, 20, 20, draw=drawing.pattern)
    pictures = drawing.write_folder(tree, tmp_path / "pictures")
    # A teacher, the target on its own task and the controls with labels and random weights: every
    # rule has jobs, and more arms would add seconds of Slurm alone.
    fewer = {"datasets": {"images": {"unlabelled": 600}}}
    fewer["teachers"] = dict.fromkeys(["longer", "untrained", "hog"])
    files = [overlay(tmp_path / "more.yaml", fewer)]
    given = {"files": files, "config": ["shards=2"], "options": [*QUICK, "features_part=1"]}
    folder = tmp_path / "run"
    driver = begin(site, folder, pictures, **given)
    number = int(re.search(r"^total +(\d+)", driver.done(), re.M)[1]) - 1  # `all` is no job
    assert [job["state"] for job in driver.jobs()] == ["COMPLETED"] * number
    assert {job["node"] for job in driver.jobs()} == set(slurm.NODES)
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
        site.wait(lambda: stopped(folder), 30)
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


# ---------------------------------------------------------------------------- what befalls jobs


@pytest.mark.parametrize(
    "options, state", [([], "CANCELLED"), (["--signal=USR1"], "FAILED")], ids=["TERM", "USR1"]
)
def test_a_cancelled_job_is_sent_again_with_more_memory_and_goes_on(
    site, running, ready, options, state
):
    folder, driver, job, _ = running
    site.call("scancel", *options, job["id"])
    site.wait(lambda: stopped(folder), 30)
    driver.done()
    first, second = driver.jobs()
    assert (first["state"], second["state"]) == (state, "COMPLETED")
    assert slurm.megabytes(second["memory"]) > slurm.megabytes(first["memory"])
    assert min(went_on(folder)) > 0 and same(folder, ready[1])


def test_after_ctrl_c_the_same_command_goes_on(site, running, ready):
    folder, driver, job, start = running
    os.killpg(driver.process.pid, signal.SIGINT)
    assert driver.end() != 0
    assert driver.jobs()[0]["state"] == "CANCELLED"
    if slurm.tracker() == "cgroup":
        site.wait(lambda: not site.processes(str(folder)))
    start().done()
    assert min(went_on(folder)) > 0 and same(folder, ready[1])


def test_a_job_that_outlived_its_driver_is_waited_for_not_done_twice(site, running, ready):
    folder, driver, job, start = running
    os.killpg(driver.process.pid, signal.SIGKILL)
    driver.end()
    again = start()
    again.done()
    assert [one["state"] for one in site.jobs() if one["id"] == job["id"]] == ["COMPLETED"]
    assert re.search(rf"waiting for process \d+ on .* \(Slurm job {job['id']}\)", said(folder))
    assert "made meanwhile" in said(folder) and not went_on(folder)
    assert same(folder, ready[1])


@pytest.mark.parametrize("dies", [False, True], ids=["lives on", "dies"])
def test_a_lost_node_s_job_moves_on_and_never_writes_beside_what_lives_there(
    site, running, ready, dies
):
    folder, driver, job, _ = running
    site.daemons[job["node"]].kill()  # its jobs live on, as on a node that only lost its network
    site.daemons[job["node"]].wait()
    if dies:
        for named in (f"slurmstepd: [{job['id']}.", f"SLURM_JOB_ID={job['id']}"):
            for process in site.processes(named):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
    # Slurm finds out by itself after minutes, and takes two more to start the job again.
    site.call("scontrol", "update", f"NodeName={job['node']}", "State=DOWN", "Reason=lost")
    site.wait(lambda: driver.jobs()[0]["state"] == "PENDING")
    site.call("scontrol", "update", f"JobId={job['id']}", "StartTime=now")
    driver.done()
    site.start(job["node"])
    (last,) = driver.jobs()[-1:]
    assert last["state"] == "COMPLETED" and last["node"] != job["node"]
    assert ("waiting for process" in said(folder)) is not dies and same(folder, ready[1])
    assert not dies or min(went_on(folder)) > 0


def test_a_job_at_its_time_limit_is_sent_again_and_goes_on(limited, ready):
    folder, driver = limited
    driver.done()
    states = [job["state"] for job in driver.jobs()]
    assert states[0] == "TIMEOUT" and states[-1] == "COMPLETED"
    assert min(went_on(folder)) > 0 and same(folder, ready[1])


def test_a_job_that_is_pre_empted_is_sent_again_and_goes_on(site, ready, pictures, tmp_path):
    folder = copied(ready[0], tmp_path / "run")
    options = [*QUICK, "--set-resources", "pretext_train:slurm_partition='spare'"]
    files = [slowly(folder, 30, 0.25)]
    driver = begin(site, folder, pictures, MODEL, files=files, options=options)
    job = under_way(driver, folder)
    busy = site.call("squeue", "-h", f"--nodelist={job['node']}", "-t", "running", "-o", "%C")
    asked = f"--cpus-per-task={slurm.CORES + 1 - sum(map(int, busy.split()))}"  # one too many
    more = (f"--nodelist={job['node']}", "--mem=100", "--output=/dev/null", "--wrap=sleep 2")
    site.call("sbatch", "--partition=main", asked, *more)
    driver.done()
    first, second = driver.jobs()
    # FAILED: it ended by itself in the time that it was given.
    assert first["state"] in ("PREEMPTED", "FAILED") and second["state"] == "COMPLETED"
    (log,) = folder.glob(f".snakemake/slurm_logs/*/*/{first['id']}.log")
    text = log.read_text()
    assert STOPPED in text and "non-zero exit status 75" in text, text
    assert min(went_on(folder)) > 0 and same(folder, ready[1])


def test_a_job_out_of_memory_is_sent_again_with_more(site, ready, pictures, tmp_path):
    folder = copied(ready[0], tmp_path / "run")
    options = [*QUICK, "--set-resources", "pretext_train:mem_mb=attempt**2*350"]
    files = [slowly(folder, 30, 0.05)]
    driver = begin(site, folder, pictures, MODEL, files=files, options=options)
    driver.done()
    *others, last = driver.jobs()
    assert others and {job["state"] for job in others} <= {"CANCELLED", "OUT_OF_MEMORY", "FAILED"}
    assert last["state"] == "COMPLETED" and slurm.megabytes(others[0]["memory"]) == 350
    assert same(folder, ready[1])


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
    nodes = [job["node"] for job in driver.jobs()]
    assert nodes.count("n[1-2]") == 2 and "2 processes" in said(folder)
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
    site.wait(lambda: stopped(folder), 30)
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


def test_by_three_commands_too_a_cancelled_job_goes_on(site, ready, pictures, tmp_path):
    folder = copied(ready[0], tmp_path / "run")
    files = [slowly(folder, 30, 0.25)]
    options = ["--set-threads", "pretext_train=1"]
    before = {job["id"] for job in site.jobs()}
    driver = begin(
        site, folder, pictures, MODEL, files=files, profile="cluster-generic", options=options
    )
    site.wait(lambda: [*(folder / "results/state").glob("deep-s0-*/**/*.state")])
    (job,) = [
        job for job in site.jobs() if job["id"] not in before and job["name"] == "pretext_train"
    ]
    site.call("scancel", job["id"])
    site.wait(lambda: stopped(folder), 30)
    driver.done()
    assert min(went_on(folder)) > 0 and same(folder, ready[1])


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
