import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import crafted
import numpy as np
import pytest
import running
import stages
import torch
from test_training import job

from kt.core import ending, images, resume, step, training
from kt.core.step import ConfigError, DataError, Interrupted, ResourceError

EPOCHS, STEPS = 3, 12  # four steps an epoch


def built(state=None, kill_at=None, kind="pretext", delivery=0):
    """A training with dropout; a signal comes in the forward pass of step `kill_at`."""
    if kind == "pretext":
        pixels, task = crafted.scenes(136, 36), crafted.jigsaw(36, 136, dropout=0.3)
    else:
        pixels, labels = crafted.discs(136, 16)
        task = crafted.labelling(16, labels, crop=0.6, flip=0.5, brightness=0.3, balance=True)
    wanted = job(task, pixels, held_out=8, epochs=EPOCHS, label_smoothing=0.1)
    count = [0]

    def spy(network, views):
        count[0] += network.training
        if count[0] == kill_at:
            signal.raise_signal(signal.SIGTERM)

    wanted.network.register_forward_pre_hook(spy)
    return dataclasses.replace(wanted, state=state, fingerprint={"lr": 1}, delivery=delivery)


def batches_of(wanted):
    """Trains and gives the rows of every batch as the network got them."""
    seen, step = [], training._Run._step

    def spy(run, index, views, labels):
        seen.append(index.tolist())
        return step(run, index, views, labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._Run, "_step", spy)
        try:
            wanted.records = training.train(wanted)
        except Interrupted:
            pass
    return seen


def save_always(monkeypatch):
    monkeypatch.setattr(resume, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(resume, "SAVE_SHARE", math.inf)


@pytest.fixture(scope="module", autouse=True)
def kept_optimisers():
    """Keeps with each training what its optimiser holds at the end."""
    loop = training._Run.loop

    def spy(run, stop):
        loop(run, stop)
        run.job.optimiser = run.optimiser.state_dict()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._Run, "loop", spy)
        yield


def outcome(finished, records):
    weights = {name: value.clone() for name, value in finished.network.state_dict().items()}
    held = finished.optimiser
    assert len(held["first"]) == len(held["second"]) > 0 and held["steps"] == STEPS
    for moment in ("first", "second"):
        weights |= {f"{moment} {i}": value.clone() for i, value in enumerate(held[moment])}
    timed = ("seconds", "images_per_second", "validation_seconds")
    kept = [{key: row[key] for key in row if key not in timed} for row in records]
    return weights, kept


@pytest.fixture(scope="module")
def uninterrupted():
    whole = built()
    return outcome(whole, training.train(whole))


def assert_same(found, expected):
    assert found[0].keys() == expected[0].keys()
    assert all(torch.equal(found[0][name], expected[0][name]) for name in expected[0])
    assert found[1] == expected[1]


def stop(state, kill_at):
    with pytest.raises(Interrupted, match=f"stopped at step {kill_at}; run it again"):
        training.train(built(state, kill_at=kill_at))


# ---------------------------------------------------------------------------- bit for bit


@pytest.mark.parametrize("kill_at", [1, 4, 6, 8, 11, STEPS])
def test_a_stopped_training_goes_on_to_the_same_weights_and_log(tmp_path, uninterrupted, kill_at):
    stop(tmp_path, kill_at)
    again = built(tmp_path)
    assert_same(outcome(again, training.train(again)), uninterrupted)


@pytest.mark.parametrize("delivery", [0, 1, 4])
@pytest.mark.parametrize("kind", ["pretext", "labels"])
def test_batches_weights_and_log_are_the_same_for_any_number_of_threads(tmp_path, kind, delivery):
    whole = built(kind=kind)
    expected = batches_of(whole)
    first, again = built(tmp_path, 6, kind, delivery), built(tmp_path, None, kind, delivery)
    assert batches_of(first) + batches_of(again) == expected
    assert len(expected) == STEPS
    assert_same(outcome(again, again.records), outcome(whole, whole.records))


def test_a_training_stopped_again_and_again_ends_the_same(tmp_path, uninterrupted):
    stop(tmp_path, 3)
    with pytest.raises(Interrupted, match="step 5"):
        training.train(built(tmp_path, kill_at=2))
    with pytest.raises(Interrupted, match="step 10"):
        training.train(built(tmp_path, kill_at=5))
    again = built(tmp_path)
    assert_same(outcome(again, training.train(again)), uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("name", stages.TRAININGS)
def test_a_job_that_is_sent_twice_goes_on_from_the_end_of_the_first(tmp_path_factory, name):
    made = stages.made(tmp_path_factory)
    output, state = tmp_path_factory.mktemp("twice") / "model", tmp_path_factory.mktemp("state")
    command = [sys.executable, "-m", f"kt.{name}", *stages.options(name, made, output, epochs=3)]
    command += ["--state", state / "it"]
    found = []
    for keep, steps in (("1", None), ("1", r"goes on at step (\d+) of \1$"), ("", "goes on")):
        shutil.rmtree(output, ignore_errors=True)  # as a job's Snakemake does
        done = subprocess.run(
            list(map(str, command)), cwd=running.ROOT, capture_output=True, text=True,
            env={**os.environ, "KT_WORKFLOW": "1", "KT_KEEP_STATE": keep},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert bool(re.search(steps or "goes on", done.stderr, re.M)) == bool(steps), done.stderr
        found.append((output / name / "model.safetensors").read_bytes())
        assert bool([*state.glob("it/*/finished")]) == bool(keep)
    assert found[0] == found[1] == found[2]


def test_states_written_on_the_way_change_nothing(tmp_path, uninterrupted, monkeypatch):
    save_always(monkeypatch)
    whole = built(tmp_path)
    assert_same(outcome(whole, training.train(whole)), uninterrupted)
    kept = sorted(path.name for path in tmp_path.glob("*.state"))
    assert kept == ["step-000000011.state", "step-000000012.state"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "zero", "empty"])
def test_a_broken_state_falls_back_to_the_one_before(
    tmp_path, uninterrupted, monkeypatch, damage, caplog
):
    save_always(monkeypatch)
    stop(tmp_path, 7)
    newest = max(tmp_path.glob("*.state"))
    raw = bytearray(newest.read_bytes())
    raw[len(raw) // 2] ^= 1
    damaged = {"flip": raw, "truncate": raw[:-9], "zero": bytes(len(raw)), "empty": b""}
    newest.write_bytes(damaged[damage])
    again = built(tmp_path)
    with caplog.at_level("INFO", "kt"):
        assert_same(outcome(again, training.train(again)), uninterrupted)
    assert "step-000000007.state is broken, the state before it is used" in caplog.text
    assert "goes on at step 6 of 12" in caplog.text


def test_copying_a_state_costs_its_share_of_the_training_at_most(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(resume.time, "monotonic", lambda: clock[0])

    def slow(content):
        clock[0] += 3.0
        return content

    monkeypatch.setattr(resume, "_copied", slow)
    writer = resume.Writer(tmp_path, {}, torch.nn.Linear(2, 2))
    assert not writer.due()
    clock[0] = resume.SAVE_SECONDS + 1
    assert writer.due()
    writer.save(1, {"step": 1})
    clock[0] += 299
    assert not writer.due()
    clock[0] += 2
    assert writer.due()
    writer.close()


def test_before_the_first_state_its_cost_is_taken_from_its_size(tmp_path):
    network = torch.nn.Linear(1000, 1000)
    writer = resume.Writer(tmp_path, {}, network)
    writer.last -= resume.SAVE_SECONDS + 1
    assert writer.due()  # 12 MB
    network.state_dict = lambda: {"weights": torch.empty(10**9, device="meta")}
    writer = resume.Writer(tmp_path, {}, network)
    writer.last -= 2000
    assert not writer.due()  # 12 GB: 24 seconds, a hundredth of 40 minutes
    writer.last -= 500
    assert writer.due()


def test_the_processor_time_of_writing_counts_too(tmp_path, monkeypatch):
    took = iter([10.0, 14.0])
    monkeypatch.setattr(resume.time, "thread_time", lambda: next(took))
    writer = resume.Writer(tmp_path, {}, torch.nn.Linear(2, 2))
    writer.save(1, {"step": 1})
    writer.close()
    writer.last -= 390
    assert not writer.due()
    writer.last -= 20
    assert writer.due()  # 4 seconds are a hundredth of 400


def test_a_training_whose_states_will_not_fit_ends_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setattr("kt.core.files.free_bytes", lambda path: 1000)
    with pytest.raises(ResourceError, match="bytes are needed, 1000 are free"):
        training.train(built(tmp_path))
    assert not list(tmp_path.rglob("*.state"))


def test_a_state_is_that_of_its_step_though_the_training_goes_on(tmp_path):
    weight = torch.zeros(1_000_000)
    writer = resume.Writer(tmp_path, {}, torch.nn.Linear(2, 2))
    writer.save(1, {"weights": [weight], "step": 1})
    weight += 1
    writer.close()
    found = resume.newest(tmp_path, {}, torch.device("cpu"))
    assert found["weights"][0].abs().max() == 0


def test_a_state_that_cannot_be_written_ends_the_training_with_the_reason(tmp_path, monkeypatch):
    save_always(monkeypatch)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="state cannot be written: .*No space"):
        training.train(built(tmp_path))


def test_with_every_state_broken_the_training_starts_anew(tmp_path, uninterrupted):
    stop(tmp_path, 2)
    for path in tmp_path.glob("*.state"):
        path.write_bytes(b"no state at all")
    again = built(tmp_path)
    assert_same(outcome(again, training.train(again)), uninterrupted)


def test_a_training_that_another_process_is_at_is_refused(tmp_path):
    code = (
        "import pathlib, sys; from kt.core import lock; "
        "file = lock.claim(pathlib.Path(sys.argv[1])); print(1, flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "1\n"
    with pytest.raises(ResourceError, match=f"process {other.pid} on .* is at this work"):
        training.train(built(tmp_path))
    other.kill()
    other.communicate()
    assert len(training.train(built(tmp_path))) == EPOCHS


def test_under_the_workflow_other_files_have_other_states(tmp_path, monkeypatch):
    monkeypatch.delenv("KT_WORKFLOW", raising=False)
    assert resume.place(tmp_path, ["a", "b"]) == tmp_path and resume.place(None, ["a"]) is None
    monkeypatch.setenv("KT_WORKFLOW", "1")
    one, two = (resume.place(tmp_path, ["a", name]) for name in "bc")
    assert one.parent == two.parent == tmp_path and one != two


# ---------------------------------------------------------------------------- settings


def test_a_state_is_kept_whatever_stands_there_of_later_steps(tmp_path):
    for number in (100, 200):
        (tmp_path / f"step-{number:09d}.state").write_bytes(b"x")
    for number in (20, 50):
        resume.save(tmp_path, number, {"step": number}, {})
    assert resume.newest(tmp_path, {}, torch.device("cpu"))["step"] == 50
    assert len(list(tmp_path.glob("*.state"))) == 2


def test_states_that_stand_count_as_room_for_those_to_come(tmp_path, monkeypatch):
    network = torch.nn.Linear(1000, 250)  # 1 MB
    size = sum(value.nbytes for value in network.state_dict().values())
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=4 * size))
    with pytest.raises(ResourceError, match="bytes are needed"):
        resume.Writer(tmp_path, {}, network)
    for number in (1, 2):
        (tmp_path / f"step-{number:09d}.state").write_bytes(bytes(3 * size))
    resume.Writer(tmp_path, {}, network)


def test_other_settings_are_refused_with_the_keys_that_differ(tmp_path):
    content = {"step": 3}
    resume.save(tmp_path, 3, content, {"lr": 0.1, "seed": 0, "gone": 1})
    with pytest.raises(
        ConfigError, match=r"other settings or files \(gone, lr, new differ\).*remove"
    ):
        resume.newest(tmp_path, {"lr": 0.2, "seed": 0, "new": 1}, torch.device("cpu"))


def keep_states():
    """Has a step keep its last state when it is finished, as on a cluster."""
    os.environ[resume.KEEP] = "1"


@pytest.mark.slow
@pytest.mark.parametrize("name", stages.TRAININGS)
def test_a_step_refuses_the_state_of_other_settings_or_images(tmp_path_factory, tmp_path, name):
    made = stages.made(tmp_path_factory)
    given = [*stages.options(name, made, tmp_path), "--state", str(tmp_path / "state")]
    assert stages.run(name, given, keep_states)[0] == 0
    pack = images.read_pack(made / "data/train-unlabelled.h5")
    other = crafted.write_pack(tmp_path / "other.h5", pack.images ^ 1, pack.keys)
    changes = {
        "--training": (json.dumps({**crafted.TRAINING, "epochs": 1, "lr": 0.5}), "training.lr"),
        "--seed": ("7", "seed"), "--pack": (str(other), "digests?, pack"),
    }  # fmt: skip
    for option, (value, key) in changes.items():
        changed = list(given)
        changed[changed.index(option) + 1] = value
        code, said = stages.run(name, changed, keep_states)
        assert code == 2 and re.search(rf"other settings or files \({key} differ\)", said), said
        assert f"remove {tmp_path / 'state'} to start anew" in said
    code, said = stages.run(name, given, keep_states)
    assert code == 0 and "goes on at step" in said


def test_the_same_settings_give_the_state_back(tmp_path):
    tensor = torch.rand(3)
    settings = {
        "lr": 0.1,
        "path": crafted.pack(crafted.noise(1, 2)).path,
        "task": crafted.training(),
    }
    resume.save(tmp_path, 3, {"step": 3, "weights": tensor}, settings)
    found = resume.newest(tmp_path, dict(reversed(settings.items())), torch.device("cpu"))
    assert found["step"] == 3 and torch.equal(found["weights"], tensor)


def test_no_folder_and_an_empty_folder_hold_no_state(tmp_path):
    assert resume.newest(tmp_path, {}, torch.device("cpu")) is None
    assert resume.newest(tmp_path / "none", {}, torch.device("cpu")) is None


def test_a_state_cannot_smuggle_in_code(tmp_path, caplog):
    class Payload:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/harmed",))

    resume.save(tmp_path, 1, {"payload": Payload()}, {})
    assert resume.newest(tmp_path, {}, torch.device("cpu")) is None
    assert "is no state" in caplog.text
    assert not (tmp_path / "harmed").exists()


def test_a_failed_write_leaves_the_states_as_they_were(tmp_path, monkeypatch):
    resume.save(tmp_path, 1, {"step": 1}, {})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="state cannot be written: .*No space"):
        resume.save(tmp_path, 2, {"step": 2}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001.state"]


# ---------------------------------------------------------------------------- the whole step


def started_step(folder, processes: int, steps: int = 2000) -> subprocess.Popen:
    """Starts a training in a session of its own that keeps a state only when it is stopped."""
    crafted.write_pack(folder / "pack.h5", crafted.scenes(200, 27), crafted.names(200))
    report = {"mean": [0.5] * 3, "std": [0.2] * 3, "digests": {}}
    step.write_json(folder / "report.json", report)
    command = [
        sys.executable, "-m", "kt.pretext_train", "--pack", folder / "pack.h5",
        "--data-report", folder / "report.json", "--backbone", json.dumps(crafted.PLAIN),
        "--task", json.dumps(crafted.JIGSAW), "--training", json.dumps(crafted.TRAINING),
        "--seed", "0", "--state", folder / "state", "--output", folder / "model",
        "--epochs", str(steps), "--processes", str(processes), "--threads", "1",
        "--log", folder / "log",
    ]  # fmt: skip
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def family(pid: int) -> list[int]:
    """Lists a process and all that it started, in whatever session."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def every_process(pid: int, number: int) -> None:
    """Signals as a scheduler does that knows the processes of a job by their cgroup."""
    for one in family(pid):
        os.kill(one, number)


TWO = pytest.param(2, marks=pytest.mark.slow)


@pytest.mark.parametrize("to", [os.kill, os.killpg, every_process])
@pytest.mark.parametrize("processes", [1, TWO])
def test_sigterm_ends_the_step_with_75_and_a_state_and_no_model(tmp_path, processes, to):
    started = started_step(tmp_path, processes)
    assert any('"epoch"' in line for line in iter(started.stderr.readline, ""))
    to(started.pid, signal.SIGTERM)
    rest = started.communicate(timeout=100)[1]
    assert started.returncode == Interrupted.exit_code == 75, rest
    assert "run it again to go on" in rest
    assert processes > 1 or "Traceback" not in rest
    assert len(list((tmp_path / "state").glob("step-*.state"))) == 1
    assert not (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["launcher", "torchrun", "again"])
def test_processes_that_were_launched_do_not_outlive_their_launcher(tmp_path, lost):
    started = started_step(tmp_path, 2)
    assert any('"epoch"' in line for line in iter(started.stderr.readline, ""))
    launcher, torchrun, *workers = family(started.pid)
    assert len(workers) >= 2
    if lost == "torchrun":  # its processes are stopped as by a signal, and waited for
        os.kill(torchrun, signal.SIGKILL)
    elif lost == "launcher":
        os.kill(launcher, signal.SIGKILL)
    else:
        os.kill(launcher, signal.SIGUSR1)
        time.sleep(ending.ECHO + 0.1)
        with contextlib.suppress(ProcessLookupError):  # it was quick
            os.kill(launcher, signal.SIGUSR1)
    rest = started.communicate(timeout=60)[1]  # all have closed it
    assert started.returncode in (75, -9) and (started.returncode == -9) == (lost == "launcher"), (
        rest
    )
    states = list((tmp_path / "state").glob("step-*.state"))
    assert len(states) == 1 or lost != "torchrun"
    assert all(not Path(f"/proc/{pid}").exists() or state(pid) == "Z" for pid in workers)


def state(pid: int) -> str:
    """Gives the letter of a process's state."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_a_training_that_fails_keeps_its_last_state(tmp_path, monkeypatch):
    save_always(monkeypatch)
    poisoned = built(tmp_path)
    count = [0]

    def spoil(network, views):
        count[0] += network.training
        return views[0] * (np.nan if count[0] == 5 else 1)

    poisoned.network.register_forward_pre_hook(spoil)
    with pytest.raises(DataError, match="step 5"):
        training.train(poisoned)
    assert max(tmp_path.iterdir()).name == "step-000000004.state"
