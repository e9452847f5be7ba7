"""Steps that run side by side take different GPUs; shown with GPUs in name only."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

CODE = """
import sys, types, torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 2
torch.cuda.get_device_properties = lambda number: types.SimpleNamespace(uuid=f"drawn-{number}")
torch.cuda.set_device = lambda number: None
from kt.core import hardware
print(hardware.device(), hardware.device(), flush=True)
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


def test_under_torchrun_the_rank_decides(step):
    assert step(LOCAL_RANK="1").got == ["cuda:1"] * 2
