"""One writer for an artefact, whatever started two: the other one waits and takes what was made."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from kt.core import lock
from kt.core.ending import ResourceError

WRITER = """
import pathlib, sys, time
from kt.core import lock
lock.BEAT = float(sys.argv[4])
if sys.argv[5] == "no locks":
    lock.fcntl.flock = lambda *_: (_ for _ in ()).throw(OSError())
output, work = pathlib.Path(sys.argv[1]), [sys.argv[2]]
with lock.sole_writer(output, work) as mine:
    print("mine" if mine else "made", flush=True)
    if mine:
        input()
        output.write_text(sys.argv[3])
"""


def writer(output, work: str, text: str, beat: float = 5.0, locks: str = "locks"):
    """Starts a process that makes a file when it is told to."""
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, output, work, text, str(beat), locks],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def let_go(process) -> None:
    process.communicate("\n", timeout=60)
    assert process.returncode == 0


def is_silent(process) -> bool:
    time.sleep(1)
    return process.poll() is None


@pytest.mark.parametrize(("work", "said", "text"), [("a", "made", "one"), ("b", "mine", "two")])
def test_a_second_writer_waits_and_does_not_make_the_same_again(tmp_path, work, said, text):
    output = tmp_path / "new" / "file"
    first = writer(output, "a", "one")
    assert first.stdout.readline() == "mine\n"
    second = writer(output, work, "two")
    assert is_silent(second)
    let_go(first)
    assert second.stdout.readline() == f"{said}\n"
    let_go(second)
    assert output.read_text() == text and os.listdir(output.parent) == ["file"]


def test_a_killed_writer_is_followed_at_once(tmp_path):
    first = writer(tmp_path / "file", "a", "one")
    assert first.stdout.readline() == "mine\n"
    second = writer(tmp_path / "file", "a", "two")
    assert is_silent(second)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert second.stdout.readline() == "mine\n"
    let_go(second)
    assert (tmp_path / "file").read_text() == "two" and os.listdir(tmp_path) == ["file"]


def test_without_locks_signs_of_life_tell_a_writer_from_a_dead_one(tmp_path):
    first = writer(tmp_path / "file", "a", "one", 0.2, "no locks")
    assert first.stdout.readline() == "mine\n"
    second = writer(tmp_path / "file", "b", "two", 0.2, "no locks")
    time.sleep(lock.SILENT * 0.2)  # it would be dead by now
    assert is_silent(second)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert second.stdout.readline() == "mine\n"
    let_go(second)
    assert (tmp_path / "file").read_text() == "two"


def test_a_writer_on_another_machine_is_waited_for_as_long_as_it_shows_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.1)
    place = tmp_path / ".file.lock"
    place.write_text(json.dumps({"who": "process 1 on elsewhere", "host": "elsewhere"}))
    over = threading.Event()

    def live():
        while not over.wait(0.1):
            os.utime(place)

    other = threading.Thread(target=live)
    other.start()
    threading.Timer(2.0, over.set).start()
    begun = time.monotonic()
    with lock.sole_writer(tmp_path / "file", []) as mine:
        assert mine and over.is_set() and time.monotonic() - begun > 2.0 + lock.SILENT * 0.1 / 2
    other.join()
    assert os.listdir(tmp_path) == []


def test_a_lock_of_a_machine_that_is_lost_is_not_waited_for_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "GONE", 0.5)
    path = tmp_path / ".made.lock"
    path.write_text(json.dumps({"who": "process 7 on node9", "host": "node9"}))
    with open(path) as held:  # as the server of a file system goes on to hold it
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ResourceError, match="process 7 on node9 holds this lock"):
            with lock.sole_writer(tmp_path / "made", ["work"]):
                pass


def test_what_failed_leaves_no_lock_and_no_folder(tmp_path):
    with pytest.raises(ValueError), lock.sole_writer(tmp_path / "new" / "er" / "file", []):
        raise ValueError
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_is_left_to_the_step(tmp_path):
    (tmp_path / "file").write_text("")
    with lock.sole_writer(tmp_path / "file" / "output", []) as mine:
        assert mine
