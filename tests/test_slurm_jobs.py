"""What befalls jobs on a real Slurm: sent again, each makes what an undisturbed one makes."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest
import slurm
from on_slurm import (
    MODEL,
    QUICK,
    STOPPED,
    begin,
    copied,
    has_said,
    held,
    said,
    same,
    slowly,
    under_way,
    went_on,
)

pytest_plugins = ["on_slurm"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", autouse=True)
def limited(site, ready, pictures, tmp_path_factory):
    """A training that needs more time than its job has: a minute, Slurm's least; runs beside."""
    folder = copied(ready[0], tmp_path_factory.mktemp("limited") / "run")
    files = [slowly(folder, 30, 1.1)]
    options = [*QUICK, "--set-resources", "pretext_train:runtime=1"]
    return folder, begin(site, folder, pictures, MODEL, files=files, options=options)


@pytest.mark.parametrize(
    "options, state", [([], "CANCELLED"), (["--signal=USR1"], "FAILED")], ids=["TERM", "USR1"]
)
def test_a_cancelled_job_is_sent_again_with_more_memory_and_goes_on(
    site, running, ready, options, state
):
    folder, driver, job, _ = running
    site.call("scancel", *options, job["id"])
    site.wait(lambda: has_said(folder, STOPPED), 30)
    driver.done()
    first, second = driver.jobs()
    assert (first["state"], second["state"]) == (state, "COMPLETED")
    assert slurm.megabytes(second["memory"]) > slurm.megabytes(first["memory"])
    assert min(went_on(folder)) > 0 and same(folder, ready[1])


def test_after_ctrl_c_the_same_command_goes_on(site, running, ready):
    folder, driver, job, start = running
    os.killpg(driver.process.pid, signal.SIGINT)
    assert driver.end() != 0
    assert site.ended(job["id"]) == "CANCELLED"
    if slurm.tracker() == "cgroup":
        site.wait(lambda: not site.processes(str(folder)))
    start().done()
    assert min(went_on(folder)) > 0 and same(folder, ready[1])


def test_a_job_that_outlived_its_driver_is_waited_for_not_done_twice(site, running, ready):
    folder, driver, job, start = running
    with held(site, job, folder):
        os.killpg(driver.process.pid, signal.SIGKILL)
        driver.end()
        again = start()
    again.done()
    assert site.ended(job["id"]) == "COMPLETED"
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
    with contextlib.nullcontext() if dies else held(site, job, folder):
        site.call("scontrol", "update", f"NodeName={job['node']}", "State=DOWN", "Reason=lost")
        site.wait(lambda: driver.jobs()[0]["state"] == "PENDING")
        site.call("scontrol", "update", f"JobId={job['id']}", "StartTime=now")
    driver.done()
    site.start(job["node"])
    (last,) = driver.jobs()[-1:]
    assert last["state"] == "COMPLETED" and last["node"] != job["node"]
    assert same(folder, ready[1])
    # That what lives is waited for was seen by `held`: the log may be of a third attempt already,
    # for the lost job's own Snakemake may hear of the node late, and take away what was made.
    assert not dies or (min(went_on(folder)) > 0 and "waiting for process" not in said(folder))


def test_a_job_at_its_time_limit_is_sent_again_and_goes_on(limited, ready):
    folder, driver = limited
    driver.done()
    states = [job["state"] for job in driver.jobs()]
    assert states[0] == "TIMEOUT" and states[-1] == "COMPLETED"
    assert min(went_on(folder)) > 0 and same(folder, ready[1])


def test_a_job_that_is_pre_empted_is_sent_again_and_goes_on(site, ready, pictures, tmp_path):
    folder = copied(ready[0], tmp_path / "run")
    options = [*QUICK, "--set-resources", "pretext_train:slurm_partition='spare'"]
    files = [slowly(folder, 30, 0.15)]
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


def test_by_three_commands_too_a_cancelled_job_goes_on(site, ready, pictures, tmp_path):
    folder = copied(ready[0], tmp_path / "run")
    files = [slowly(folder, 30, 0.15)]
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
    site.wait(lambda: has_said(folder, STOPPED), 30)
    driver.done()
    assert min(went_on(folder)) > 0 and same(folder, ready[1])
