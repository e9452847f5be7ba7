"""Steps that run side by side take different GPUs; shown with GPUs in name only."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import types

import pytest
import running
import torch

CODE = """
import os, sys, types
exists = os.path.exists
os.path.exists = lambda path: "DRIVER" in os.environ if "nvidia" in path else exists(path)
from kt.core import lloyd
assert lloyd.device() is None and "torch" not in sys.modules
lloyd.device.cache_clear()
os.environ["DRIVER"] = "is there"
import tempfile, torch
tempfile.tempdir = os.environ.get("PLACE")
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: int(os.environ.get("GPUS", 2))
torch.cuda.get_device_properties = lambda number: types.SimpleNamespace(uuid=f"drawn-{number}")
torch.cuda.set_device = torch.cuda.init = lambda *_: None
torch.cuda.get_arch_list = lambda: ["sm_75", "sm_90a", "sm_120", "compute_120"]
old = os.environ.get("OLD", "").split()
torch.cuda.get_device_capability = lambda number: (7, 0) if str(number) in old else (7, 5)
torch.cuda.get_device_name = lambda number: "V100"
from kt.core import hardware
device = lloyd.device if "KMEANS" in os.environ else hardware.device
try:
    print(device(), device(), flush=True)
except hardware.ResourceError as error:
    print(error, flush=True)
input()
"""


@pytest.fixture
def step(tmp_path):
    """Starts a process that asks for a device and keeps it; gives what it got."""
    started = []

    def start(**more):
        environment = {"TMPDIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path), **more}
        process = subprocess.Popen(
            [sys.executable, "-c", CODE], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return types.SimpleNamespace(got=process.stdout.readline().split(), process=process)

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_each_step_claims_a_gpu_of_its_own_and_a_killed_one_gives_it_back(step):
    first, second = step(), step()
    assert (first.got, second.got) == (["cuda:0"] * 2, ["cuda:1"] * 2)
    assert step().got[0] in ("cuda:0", "cuda:1")  # all are taken: one is shared
    first.process.kill()
    first.process.wait()
    assert step().got == ["cuda:0"] * 2


def test_processes_of_one_training_take_different_gpus_and_free_ones_first(step):
    alone = step()
    ranks = [step(LOCAL_RANK=rank, TORCHELASTIC_RUN_ID="one", GPUS="3") for rank in "01"]
    assert alone.got == ["cuda:0"] * 2
    assert [one.got[0] for one in ranks] == ["cuda:1", "cuda:2"]


def test_processes_of_one_training_share_gpus_with_others_but_not_with_each_other(step):
    step()
    ranks = [step(LOCAL_RANK=rank, TORCHELASTIC_RUN_ID="one") for rank in "01"]
    assert [one.got[0] for one in ranks] == ["cuda:1", "cuda:0"]  # the free one first
    others = [step(LOCAL_RANK=rank, TORCHELASTIC_RUN_ID="two") for rank in "01"]
    assert [one.got[0] for one in others] == ["cuda:0", "cuda:1"]
    third = step(LOCAL_RANK="2", TORCHELASTIC_RUN_ID="one")  # one more than there are GPUs
    assert third.got[0] in ("cuda:0", "cuda:1")


def test_where_no_lock_can_be_had_the_rank_decides(step, tmp_path):
    nowhere = str(tmp_path / "file")
    (tmp_path / "file").touch()
    assert step(LOCAL_RANK="1", PLACE=nowhere).got == ["cuda:1"] * 2


def test_k_means_claims_as_other_steps_do_and_imports_torch_only_where_there_is_a_gpu(step):
    first, second = step(), step(KMEANS="1")
    assert (first.got, second.got) == (["cuda:0"] * 2, ["cuda:1"] * 2)


def test_gpus_that_torch_was_not_built_for_are_left_out(step):
    assert step(OLD="0").got == ["cuda:1"] * 2
    said = " ".join(step(OLD="0 1").got)
    assert "was not built for V100" in said and "sm_75" in said and "KT_DEVICE=cpu" in said


MISSED = "from kt.core import hardware; print(hardware.device())"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS"])
def test_a_gpu_that_was_given_and_cannot_be_used_is_not_passed_over_in_silence(name, monkeypatch):
    monkeypatch.setenv(name, "0")
    done = running.run(sys.executable, "-c", MISSED)
    refused = name == "SLURM_JOB_GPUS"  # a variable of the user's may be left over
    assert ("ResourceError" in done.stderr) == refused and "driver" in done.stderr
    for wish in ({"CUDA_VISIBLE_DEVICES": ""}, {"KT_DEVICE": "cpu"}):
        done = subprocess.run(
            [sys.executable, "-c", MISSED], cwd=running.ROOT, env={**os.environ, **wish},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.stdout.split() == ["cpu"] and not done.stderr


HEAP = """
import kt.core.hardware  # as each step that computes, before any thread
import resource, torch
from collections import deque
from concurrent.futures import ThreadPoolExecutor
def epoch(pool):
    waiting = deque()
    for _ in range(6):  # batches of 28 MB, as of puzzles of 255 px
        waiting.append(pool.submit(torch.ones, 7_000_000))
        if len(waiting) > 2:
            batch = waiting.popleft().result()
    while waiting:
        batch = waiting.popleft().result()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
found = []
for _ in range(12):
    with ThreadPoolExecutor(1) as pool:
        found.append(epoch(pool))
print(sorted(later - before for before, later in zip(found[-7:], found[-6:]))[3])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's heap")
def test_a_thread_that_fills_batches_gets_the_memory_of_the_last_ones_back():
    done = running.run(sys.executable, "-c", HEAP)
    assert done.returncode == 0, done.stderr
    # Not every page anew; of the usual epoch, since now and then threads take other turns.
    assert int(done.stdout) < 6 * 28e6 / 4096 / 20
