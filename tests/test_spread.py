"""Clustering by several processes, by torchrun and gloo, against one process."""

import json
import os
import subprocess
import sys

import crafted
import h5py
import numpy as np
import pytest
import running

from kt.core import table
from kt.core.parts import Part
from kt.core.spread import Spread, spread

ALL = {"centre": True, "pca": 6, "whiten": True, "l2": True}


def cluster(folder, processes, rows, **changes):
    """Runs `kt.cluster`; gives how it ended, and the table."""
    folder.mkdir(exist_ok=True)
    features = crafted.write_features(folder / "features.h5", rows, crafted.names(len(rows)))
    settings = crafted.clustering(**{"iterations": 6, **changes}).model_dump_json()
    command = (sys.executable, "-m", "kt.cluster", "--features", features, "--k", 7, "--seed", 3)
    more = ("--settings", settings, "--processes", processes, "--threads", 1)
    output = folder / f"by-{processes}.h5"
    return running.run(*command, *more, "--output", output), output


def arrays(path) -> tuple[dict[str, np.ndarray], dict]:
    """Reads a table's arrays and its settings."""
    with h5py.File(path) as file:
        found = {name: file[name][...] for name in file}
        return found, json.loads(table.text(file, "config"))


def gaussians(number: int) -> np.ndarray:
    """Correlated rows (N, 9) float32 far from zero, no two clusters alike."""
    random = np.random.default_rng(5)
    return (random.normal(size=(number, 9)) @ random.normal(size=(9, 9)) + 20).astype(np.float32)


BLIND = """
import os, runpy, sys
from kt.core import reached
if os.environ["RANK"] == "1":
    reached.Reached._read = lambda *_: None
sys.argv[0] = "cluster.py"
runpy.run_module("kt.cluster", run_name="__main__")
"""


KILLED = """
import os, runpy, sys
from kt.core import reached
after, done = reached.Reached.after, []

def count(*given):
    after(*given)
    done.append(1)
    if len(done) == 3:
        os._exit(9)

reached.Reached.after = count
sys.argv[0] = "cluster.py"
runpy.run_module("kt.cluster", run_name="__main__")
"""


@pytest.mark.slow
def test_processes_of_which_one_sees_no_state_begin_anew_together(tmp_path):
    rows = gaussians(9_000)
    done, wanted = cluster(tmp_path, 1, rows)
    assert done.returncode == 0, running.output(done)
    (tmp_path / "blind.py").write_text(BLIND)
    here = {**os.environ, "PYTHONPATH": str(running.ROOT), "KT_SAVE_SECONDS": "0"}
    found = tmp_path / "found.h5"
    options = ("--features", tmp_path / "features.h5", "--k", 7, "--seed", 3, "--settings",
               crafted.clustering(iterations=6).model_dump_json(), "--output", found)  # fmt: skip
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    ends = []
    for program in (("-c", KILLED), (*launcher, tmp_path / "blind.py")):
        command = list(map(str, (sys.executable, *program, *options)))
        done = subprocess.run(command, env=here, capture_output=True, text=True, timeout=200)
        ends.append((done.returncode, len(list(tmp_path.glob(".found*.state")))))
    assert ends == [(9, 1), (0, 0)] and "goes on" not in running.output(done)
    one, other = arrays(wanted)[0], arrays(found)[0]
    assert np.allclose(one["centroids"], other["centroids"], atol=1e-5)


@pytest.mark.slow
def test_processes_of_a_machine_share_the_room_for_rows(tmp_path):
    done, _ = cluster(tmp_path, 4, gaussians(40_000), memory_mb=1)  # 1.4 MB, each a quarter
    assert done.returncode == 0 and "from a scratch file" in running.output(done)


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, number, changes",
    [
        (2, 22_000, {}),  # six blocks
        (4, 22_000, {**ALL, "sample": 500, "memory_mb": 1}),
        (2, 22_000, {**ALL, "spherical": True, "warm_start": 300, "redo": 2}),
        (4, 3_000, ALL),  # one block: all processes but one have no row
    ],
)
def test_processes_find_what_one_finds(tmp_path, processes, number, changes):
    rows = gaussians(number)
    done, one = cluster(tmp_path, 1, rows, **changes)
    assert done.returncode == 0, running.output(done)
    wanted, config = arrays(one)
    done, other = cluster(tmp_path, processes, rows, **changes)
    assert done.returncode == 0, running.output(done)
    found, made = arrays(other)
    assert made == config
    for name in ("centroids", "mean", "projection", "objective"):
        assert np.allclose(found[name], wanted[name], rtol=2e-4, atol=2e-4), name
    assert np.abs(found["sizes"] - wanted["sizes"]).max() <= number // 5000
    assert found["sizes"].sum() == number


@pytest.mark.slow
def test_what_is_wrong_with_another_processs_rows_is_said_with_its_code(tmp_path):
    rows = gaussians(9_000)
    rows[8_500, 2] = np.nan
    done, output = cluster(tmp_path, 2, rows)
    assert done.returncode == 3 and "image-08500" in running.output(done), running.output(done)
    assert not output.exists()


def test_rows_of_all_processes_are_taken_by_their_numbers():
    rows = np.arange(40, dtype=np.float32).reshape(20, 2)
    picked = np.array([0, 3, 7, 8, 9, 19])
    shares = [Spread(rows[low:high], low, 20) for low, high in ((0, 8), (8, 8), (8, 20))]
    taken = [one.take(picked) for one in shares]
    assert np.array_equal(np.concatenate([one[:] for one in taken]), rows[picked])
    assert [one.first for one in taken] == [0, 3, 3] and {one.number for one in taken} == {6}
    mixed = np.array([19, 0, 8, 3])  # as first centroids are drawn; the rest is zeros to be summed
    assert np.array_equal(sum(one.read(mixed) for one in shares), rows[mixed])
    assert np.array_equal(spread(rows).read(mixed), rows[mixed])
    assert spread(shares[0]) is shares[0] and shares[0].part == Part(1, 1)
