"""A killed ingest goes on with the next shard and gives the same files."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from drawing import encoded, pattern, picture, tree, write_folder, write_tar

from kt import config, ingest
from kt.core import rows, shards, step, table
from kt.core.images import read_pack
from kt.core.layouts import POOL, SPLITS
from kt.core.parts import WHOLE, Part
from kt.core.step import ConfigError, DataError, ResourceError
from kt.sources import folder

DATASET = {
    "source": "pictures", "size": 16, "unlabelled": None, "labelled": None, "test": None,
    "max_bad_fraction": 0.1, "max_pixels": 1_000_000, "near_copies": 0.2, "storage": "pixels",
}  # fmt: skip
# The step with small shards, as a process of its own that says which shard is done.
PROGRAM = """
import sys
from kt.core import shards
shards.MOST = 20
stop = int(sys.argv[1])
write = shards.Shards._write
def told(self, number, results):
    write(self, number, results)
    print(number, flush=True)
    if number == stop: input()
shards.Shards._write = told
sys.argv = ["ingest", *sys.argv[2:]]
from kt import ingest
from kt.core import ending, step
from kt.core.parts import WHOLE, Part
ending.catch_signals()  # as `python -m kt.ingest` does
step.main("", ingest.add_arguments, ingest.run)
"""


@pytest.fixture
def place(tmp_path):
    files = tree(40, 12, 12, 24, pattern)
    files["train-unlabelled/bad.png"] = b"bad"
    return write_tar(files, tmp_path / "drawn.tar")


def digests(output) -> dict[str, str]:
    names = [f"{split}{suffix}.h5" for split in SPLITS for suffix in ("", "-labels")]
    found = {name: table.digest(output / name) for name in names}
    report = step.read_json(output / "report.json")
    return found | {"report": json.dumps(report | {"seconds": 0})}


def pack(path, output, state, part=WHOLE, **changes) -> None:
    dataset = config.Dataset(**(DATASET | {"path": str(path)} | changes))
    options = {"dataset": dataset, "seed": 0, "state": state, "part": part, "threads": 1}
    ingest.run(SimpleNamespace(output=output, **options))


def start(path, output, state, stop_after: int, **changes) -> subprocess.Popen:
    dataset = json.dumps(DATASET | {"path": str(path)} | changes)
    options = ["--dataset", dataset, "--output", output, "--seed", "0", "--threads", "1"]
    options += ["--state", state] if state else []
    command = [sys.executable, "-c", PROGRAM, str(stop_after), *map(str, options)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def kill(path, output, state, stop_after: int, number=signal.SIGKILL) -> int:
    """Ends a run with a signal after a shard; gives its code."""
    process = start(path, output, state, stop_after)
    for line in process.stdout:
        if int(line) == stop_after:
            break
    time.sleep(0.05)
    process.send_signal(number)
    process.communicate()
    return process.returncode


def left(folder) -> list[str]:
    """Lists a folder, but for the lock of a killed step, which `pack` is none to take away."""
    return sorted(set(os.listdir(folder)) - {".out.lock"})


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "MOST", 20)


@pytest.fixture
def made(monkeypatch):
    """Lists the numbers of the shards that are made."""
    numbers, write = [], shards.Shards._write
    monkeypatch.setattr(
        shards.Shards,
        "_write",
        lambda self, number, results: (numbers.append(number), write(self, number, results)),
    )
    return numbers


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_goes_on_and_gives_the_same_files(place, tmp_path, small_shards, made, number):
    pack(place, tmp_path / "whole", None)
    every = made.copy()
    made.clear()
    stop = int(np.random.default_rng().integers(0, len(every) - 1))
    code = kill(place, tmp_path / "out", tmp_path / "state", stop, number)
    assert code == (-9 if number == signal.SIGKILL else 75)
    assert not (tmp_path / "out").exists()
    pack(place, tmp_path / "out", tmp_path / "state")
    assert made == every[stop + 1 :]
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert left(tmp_path) == ["drawn.tar", "out", "whole"]


def test_several_jobs_decode_and_the_one_that_packs_only_packs(place, tmp_path, small_shards, made):
    pack(place, tmp_path / "whole", None)
    every = made.copy()
    for number in (2, 3, 1):
        pack(place, tmp_path / f"{number}", tmp_path / "state", Part(number, 3))
    assert sorted(made[len(every) :]) == sorted(every) and len(every) > 3
    made.clear()
    pack(place, tmp_path / "out", tmp_path / "state")
    assert made == [] and digests(tmp_path / "out") == digests(tmp_path / "whole")
    with pytest.raises(ConfigError, match="needs --state"):
        pack(place, tmp_path / "2", None, Part(2, 3))


def test_by_hand_a_killed_run_leaves_what_the_next_one_uses_and_takes_away(
    place, tmp_path, small_shards, made
):
    kill(place, tmp_path / "out", None, 2)
    assert ".out.ingest" in os.listdir(tmp_path)
    pack(place, tmp_path / "out", None)
    assert made[0] == 3 and left(tmp_path) == ["drawn.tar", "out"]


def test_shards_of_other_settings_or_pictures_are_made_anew(place, tmp_path, small_shards, made):
    for changes in (
        {"size": 20}, {"max_pixels": 5000}, {"storage": "jpeg"}, {"levels": [0, 99]},
        {"near_copies": None},
    ):  # fmt: skip
        made.clear()
        kill(place, tmp_path / "out", tmp_path / "state", 3)
        pack(place, tmp_path / "out", tmp_path / "state", **changes)
        assert made[0] == 0, changes
    kill(place, tmp_path / "out", tmp_path / "state", 3)
    os.utime(place)  # the archive was written anew
    made.clear()
    pack(place, tmp_path / "out", tmp_path / "state")
    assert made[0] == 0


def test_a_changed_file_costs_its_own_shard_only(tmp_path, small_shards, made):
    place = write_folder(tree(30, 5, 5), tmp_path / "drawn")
    kill(place, tmp_path / "out", tmp_path / "state", 4)
    changed = place / "train-unlabelled" / "apple" / "001.png"
    changed.write_bytes(encoded(picture(2, 77)))
    pack(place, tmp_path / "out", tmp_path / "state")
    before, made[:] = made.copy(), []
    pack(place, tmp_path / "whole", None)
    assert len(before) < len(made) and digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert len(set(before) & set(range(5))) == 1


def test_a_broken_shard_is_made_anew(place, tmp_path, small_shards, made, caplog):
    pack(place, tmp_path / "whole", None)
    for number, damage in enumerate((b"", b"x" * 100, None)):
        made.clear()
        kill(place, tmp_path / "out", tmp_path / "state", 3)
        path = tmp_path / "state" / "shard-000001.h5"
        raw = bytearray(path.read_bytes())
        raw[-200] ^= 255  # within the pixels, which have no checksum of HDF5
        path.write_bytes(raw if damage is None else damage)
        pack(place, tmp_path / "out", tmp_path / "state")
        assert made[0] == 1, number
        assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_two_runs_at_the_same_data_set_exclude_each_other(place, tmp_path):
    process = start(place, tmp_path / "out", tmp_path / "state", 0)
    process.stdout.readline()
    with pytest.raises(ResourceError, match=f"process {process.pid} on .* is at this work"):
        pack(place, tmp_path / "out", tmp_path / "other")
    process.kill()
    process.communicate()


def test_files_that_vanish_between_listing_and_reading_are_rejected(tmp_path, monkeypatch):
    place = write_folder(tree(12, 3, 3), tmp_path / "drawn")
    decode = shards.Shards.decode

    def late(self, source, threads, part):
        (place / "train-unlabelled" / "apple" / "003.png").unlink()
        decode(self, source, threads, part)

    monkeypatch.setattr(shards.Shards, "decode", late)
    pack(place, tmp_path / "out", None)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["rejected"] == [{"key": "train-unlabelled/apple/003.png", "reason": shards.GONE}]
    assert len(read_pack(tmp_path / "out" / f"{POOL}.h5")) == 35


def test_a_shard_of_other_settings_is_not_taken_for_pictures_that_vanished(
    tmp_path, monkeypatch, small_shards
):
    place, state = write_folder(tree(12, 3, 3), tmp_path / "drawn"), tmp_path / "state"
    pack(place, tmp_path / "1", state, Part(1, 2), size=20)
    pack(place, tmp_path / "2", state, Part(2, 2), size=20)
    decode = shards.Shards.decode

    def late(self, source, threads, part):
        assert self.path(0).exists()
        for key in self.listing.keys(self.chosen[: self.height]):
            (place / key).unlink()
        decode(self, source, threads, part)

    monkeypatch.setattr(shards.Shards, "decode", late)
    pack(place, tmp_path / "out", state, max_bad_fraction=0.9)
    report = step.read_json(tmp_path / "out" / "report.json")
    assert report["rejected_total"] == 20
    assert {one["reason"] for one in report["rejected"]} == {shards.GONE}


def test_the_progress_of_a_part_and_of_a_run_that_goes_on_counts_their_own_pictures(
    place, tmp_path, small_shards, monkeypatch
):
    seen, progress = [], step.Progress
    monkeypatch.setattr(
        step, "Progress", lambda *given: seen.append(made := progress(*given)) or made
    )
    pack(place, tmp_path / "2", tmp_path / "state", Part(2, 2))
    (first,) = seen
    assert first.first == 0 and first.done == first.total < 20 * -(-first.total // 20)
    pack(place, tmp_path / "out", tmp_path / "state")
    assert seen[1].first == first.total and seen[1].done == seen[1].total


def test_pictures_that_cannot_be_read_for_the_moment_are_read_again(tmp_path, monkeypatch):
    place, state = write_folder(tree(12, 3, 3), tmp_path / "drawn"), tmp_path / "state"
    read = folder._content

    def fails(path):
        if str(path).endswith("003.png"):
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    with monkeypatch.context() as patched:
        patched.setattr(folder, "_content", fails)
        with pytest.raises(DataError, match="cannot be read: Input/output error"):
            pack(place, tmp_path / "out", state, max_bad_fraction=0.0)
    assert list(state.glob("shard-*.h5"))
    pack(place, tmp_path / "out", state, max_bad_fraction=0.0)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["rejected"] == []


def test_more_shards_than_a_process_may_have_files(tmp_path, monkeypatch):
    place = write_tar(tree(45, 2, 1, 12), tmp_path / "drawn.tar")
    monkeypatch.setattr(shards, "MOST", 1)
    monkeypatch.setattr(rows, "BLOCK", 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 110, hard))
    try:
        pack(place, tmp_path / "out", None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(read_pack(tmp_path / "out" / f"{POOL}.h5")) == 135
