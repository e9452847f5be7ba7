"""Several processes at one training, by torchrun and gloo, against one process."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import crafted
import pytest
import running
import stages
import torch
from safetensors.torch import load_file
from torch import nn

from kt.core import launch, parallel, training
from kt.core.step import ConfigError

HERE = Path(__file__).parent
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
TWO = (*LAUNCH, "2")
LAUNCHERS = {1: (), 2: TWO}
KINDS = ("pretext", "labels", "regression")


def start(folder, kinds, *faults, launcher=()):
    """Runs tests/ranks.py to its end, in a folder for each kind; goes on where states stand."""
    command = [sys.executable, *launcher, HERE / "ranks.py", folder, kinds, *faults]
    here = {"PYTHONPATH": f"{HERE.parent}:{HERE}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        list(map(str, command)), env={**os.environ, **here}, capture_output=True, text=True,
        timeout=200,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one process makes of each kind, undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    finish(folder, ",".join(KINDS))
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Trainings that one and two processes left at step 5: the signal reaches one of them alone."""
    folders = {}
    for number, launcher in LAUNCHERS.items():
        folders[number] = tmp_path_factory.mktemp("stopped")
        done = start(folders[number], "pretext", "stop", launcher=launcher)
        assert done.returncode != 0 and "stopped at step 5" in done.stderr, done.stderr
    return folders


def finish(folder, kinds="pretext", *faults, launcher=()):
    done = start(folder, kinds, *faults, launcher=launcher)
    assert done.returncode == 0, done.stderr


def outcome(folder):
    weights = torch.load(folder / "weights.pt", weights_only=True)
    records = json.loads((folder / "records.json").read_text())
    return weights, [row["loss"] for row in records], [row["top1"] for row in records]


def rows(folder, *ranks):
    found = [json.loads((folder / f"rows-{rank}.json").read_text()) for rank in ranks]
    return [sorted(sum(parts, [])) for parts in zip(*found, strict=True)]


def assert_alike(found, expected):
    for name, value in expected[0].items():
        assert torch.allclose(found[0][name].float(), value.float(), atol=2e-5), name
    assert found[1] == pytest.approx(expected[1], abs=1e-5)
    assert found[2] == pytest.approx(expected[2], abs=0.01)


@pytest.mark.slow
def test_four_processes_make_the_same_steps_as_one(whole, tmp_path):
    finish(tmp_path, ",".join(KINDS), launcher=(*LAUNCH, 4))
    for kind in KINDS:
        assert rows(tmp_path / kind, *range(4)) == rows(whole / kind, 0)
        assert_alike(outcome(tmp_path / kind), outcome(whole / kind))


@pytest.mark.slow
@pytest.mark.parametrize("name", stages.TRAININGS)
def test_a_whole_step_by_two_processes_makes_what_one_makes(tmp_path_factory, name):
    made = stages.made(tmp_path_factory)
    done = running.run(
        sys.executable, "-m", f"kt.{name}", *stages.options(name, made, made / "two"),
        "--processes", 2, "--log", made / "log.txt",
    )  # fmt: skip
    assert done.returncode == 0, running.output(done)
    assert "2 processes" in (made / "log.txt").read_text()
    one, two = (load_file(place / name / "model.safetensors") for place in (made, made / "two"))
    assert one.keys() == two.keys() and any("running_var" in key for key in one)
    for key, expected in one.items():
        assert torch.allclose(two[key].float(), expected.float(), rtol=1e-3, atol=1e-4), key


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_where_one_was_stopped(
    whole, stopped, tmp_path, first, then
):
    place = shutil.copytree(stopped[first], tmp_path / "run") / "pretext"
    before = rows(place, *range(first))
    finish(tmp_path / "run", launcher=LAUNCHERS[then])
    assert_alike(outcome(place), outcome(whole / "pretext"))
    after = rows(place, *range(then))
    assert len(before) == 5 and before + after == rows(whole / "pretext", 0)


@pytest.mark.slow
def test_processes_that_find_several_states_stop_and_touch_none(stopped, tmp_path):
    place = shutil.copytree(stopped[2], tmp_path / "run") / "pretext/state"
    states = {path.name: path.read_bytes() for path in place.glob("*.state")}
    done = start(tmp_path / "run", "pretext", "blind", launcher=TWO)
    assert done.returncode and "find the same state, found several" in done.stderr
    assert states and states == {path.name: path.read_bytes() for path in place.glob("*.state")}


@pytest.mark.slow
def test_processes_of_several_precisions_or_with_idle_weights_find_what_one_finds(tmp_path):
    finish(tmp_path / "one", "pretext", "idle")
    finish(tmp_path / "two", "pretext", "idle", "unlike", launcher=TWO)
    assert_alike(*(outcome(tmp_path / name / "pretext") for name in ("two", "one")))


@pytest.mark.slow
def test_the_compiler_follows_several_processes_too(whole, tmp_path):
    finish(tmp_path, "pretext", "compiled", launcher=TWO)
    assert_alike(outcome(tmp_path / "pretext"), outcome(whole / "pretext"))


def test_steps_on_several_nodes_of_one_job_do_not_meet_each_other(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    one, other = (dict(part.split("=", 1) for part in launch._meeting(2)) for _ in range(2))
    assert one["--nnodes"] == "2" and one["--rdzv-id"] != other["--rdzv-id"]
    host, _, port = one["--rdzv-endpoint"].partition(":")
    assert host == os.uname().nodename and 1024 <= int(port) < 65536


@pytest.mark.slow
def test_a_lost_process_ends_the_others_and_is_named(tmp_path):
    begun = time.monotonic()
    done = start(tmp_path, "pretext", "die", launcher=TWO)
    assert done.returncode != 0 and time.monotonic() - begun < 120
    assert "Signal 9" in done.stderr and "rank" in done.stderr
    assert not (tmp_path / "pretext" / "weights.pt").exists()
    assert list((tmp_path / "pretext" / "state").glob("*.state"))


def test_a_batch_that_cannot_be_dealt_out_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="32 images cannot be dealt out to 3 processes"):
        training.global_batch(crafted.training(batch=32), 1000)


def test_processes_get_disjoint_shares_of_every_batch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    order, parts = torch.randperm(24), []
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(parallel.deal(order, 8).view(3, 2))
    dealt = torch.cat(parts, 1).sort(1).values
    assert torch.equal(dealt, order.view(3, 8).sort(1).values)


@pytest.mark.parametrize("norm, shape", [(nn.BatchNorm1d, (8, 5)), (nn.BatchNorm2d, (8, 5, 3, 2))])
def test_synchronised_norms_of_one_process_are_torchs(monkeypatch, norm, shape):
    torch.manual_seed(0)
    one, two = norm(5), norm(5)
    monkeypatch.setattr(parallel, "total", lambda value: value)
    two.__class__ = parallel._synchronised[norm]
    maps = [torch.randn(shape, requires_grad=True) for _ in range(2)]
    maps[1].data.copy_(maps[0].data)
    for each, given in ((one, maps[0]), (two, maps[1])):
        nn.init.uniform_(each.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(1))
        (each(given) ** 3).sum().backward()
    assert torch.allclose(maps[0].grad, maps[1].grad, atol=1e-4)
    for key, value in one.state_dict().items():
        assert torch.allclose(two.state_dict()[key].float(), value.float(), atol=1e-6), key
    assert torch.allclose(one.weight.grad, two.weight.grad, atol=1e-4)
    assert torch.allclose(one.eval()(maps[0]), two.eval()(maps[1]), atol=1e-5)


SHAPES = [(6, 5), (12, 5), (6, 4, 3, 3)]  # rows of images, of pairs of views, and maps


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_process_drops_what_one_process_would(monkeypatch, shape, last):
    values = torch.rand(shape)
    if last and len(shape) == 4:
        values = values.contiguous(memory_format=torch.channels_last)
    torch.manual_seed(3)
    expected = nn.Dropout(0.3)(values).unflatten(0, (6, -1))
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        network = nn.Sequential(nn.Dropout(0.3))
        parallel.synchronise(network, 2)
        mine = parallel.deal(torch.arange(6), 6)
        share = values.unflatten(0, (6, -1))[mine].flatten(0, 1)
        if last and len(shape) == 4:
            share = share.contiguous(memory_format=torch.channels_last)
        torch.manual_seed(3)
        assert torch.equal(network(share), expected[mine].flatten(0, 1))
        parallel.separate(network)
        assert type(network[0]) is nn.Dropout


@pytest.mark.parametrize(
    "norm",
    [
        type("Other", (nn.BatchNorm2d,), {})(3),
        nn.BatchNorm2d(3, affine=False),
        nn.BatchNorm2d(3, track_running_stats=False),
    ],
)
def test_a_norm_that_cannot_see_all_processes_is_refused_by_name(monkeypatch, norm):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=f"0 is a {type(norm).__name__}"):
        parallel.synchronise(nn.Sequential(norm), 4)


def test_a_node_that_ended_well_does_not_hide_the_code_of_one_that_failed(tmp_path, monkeypatch):
    monkeypatch.setenv(launch.CODES, str(tmp_path))
    for number, code, ends in (("0", 4, 4), ("1", 0, 0), ("2", 75, 0)):
        monkeypatch.setenv("SLURM_NODEID", number)
        monkeypatch.setattr(launch, "launch", lambda arguments, code=code: code)
        with pytest.raises(SystemExit) as ended:
            launch.launch_here(None)
        assert ended.value.code == ends
    assert sorted(path.read_text() for path in tmp_path.glob("*.code")) == ["4", "75"]


@pytest.mark.parametrize(
    "told, on_a_node, said, torchrun, expected",
    [
        (True, False, {0: 75, 1: 75}, 1, 75),
        (True, False, {}, 1, 75),
        (False, False, {0: 75, 1: None}, 1, 1),  # one was killed, torchrun stopped the other
        (False, False, {0: 75, 1: 75}, 1, 75),  # a signal reached one, and that told the other
        (False, False, {0: 75, 1: 3}, 1, 3),
        (False, False, {0: 75, 1: 75}, -9, 75),  # torchrun was killed, and they were told then
        (False, False, {}, 0, 0),
        (False, True, {0: 75, 1: 75}, 1, 75),  # stopped since another node failed
        (False, True, {0: 75, 1: None}, 1, 1),
    ],
)
def test_only_a_step_that_was_stopped_says_that_it_was(
    monkeypatch, told, on_a_node, said, torchrun, expected
):
    class Processes:
        def __init__(self, command, folder, more):
            self.told = told
            for rank, code in said.items():
                (folder / f"{rank}.pid").write_text("1")
                if code is not None:
                    (folder / f"{rank}.code").write_text(str(code))

        def wait(self):
            return torchrun

    monkeypatch.setattr(launch, "_Processes", Processes)
    if on_a_node:
        monkeypatch.setenv(launch.NODE, "--nnodes=2")
    asked = argparse.Namespace(nodes=2 if on_a_node else 1, processes=2, threads=1)
    assert launch.launch(asked) == expected


ABORTS = """
import atexit, os, sys
from kt.core import step
from kt.core.step import DataError
atexit.register(os.abort)  # what threads that still run do to a process now and then

def run(arguments):
    print("done")
    step.log.error("said")
    if arguments.fails:
        raise DataError("not so")

step.main("", lambda parser: parser.add_argument("--fails", action="store_true"), run)
"""


@pytest.mark.parametrize("options, code", [([], 0), (["--fails"], 3)])
def test_a_process_of_several_ends_with_its_code_whatever_still_runs(tmp_path, options, code):
    log, said = tmp_path / "log", tmp_path / "codes"
    said.mkdir()
    (said / "1.pid").write_text("1")  # as a launched process leaves it when it begins
    here = {"RANK": "1", launch.CODES: str(said), "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", ABORTS, "--log", log, *options], capture_output=True, text=True,
        env={**os.environ, **here},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (code, "done\n"), done.stderr
    left = {path.name: path.read_text() for path in said.iterdir()}
    assert left == ({"1.pid": "1", "1.code": "3"} if code else {})  # else its number is free again
    assert "said" in done.stderr and "said" in log.read_text()
