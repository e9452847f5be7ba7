"""A short round of fuzzing and of the kill drill (`make fuzz` and `make drill` take longer)."""

from __future__ import annotations

import drill
import fuzz
import pytest
import yaml
from mutants import BOMB, YAML_TRICKS
from running import ROOT, overlay
from test_own_pictures import BRIEF

from kt import config
from kt.core.step import ConfigError

INPUTS = {"picture": 600, "table": 120, "model": 60, "state": 120, "archive": 120, "yaml": 40,
          "config": 30, "classes": 600, "json": 300, "clustering": 200, "weights": 200,
          "plan": 12}  # fmt: skip


@pytest.fixture(scope="module")
def fuzzer():
    """A fuzzer of one seed, its process shared by the kinds."""
    started = fuzz.Fuzzer(seed=0)
    yield started
    started.stop()


@pytest.mark.slow
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_damaged_input_is_refused_or_read_and_never_crashes_or_hangs(fuzzer, kind):
    before = len(fuzzer.failures)
    for number in range(INPUTS[kind]):
        fuzzer.ask(kind, number)
    assert fuzzer.failures[before:] == []
    assert fuzzer.counts[kind, "refused"] > 0


def test_inputs_are_a_function_of_seed_kind_and_number():
    samples = [bytes(range(256)), b"abc" * 100]
    found = [fuzz.mutant(samples, "picture", 0, number)[1] for number in range(50)]
    assert found == [fuzz.mutant(samples, "picture", 0, number)[1] for number in range(50)]
    assert len(set(found)) > 45 and found[0] != fuzz.mutant(samples, "picture", 1, 0)[1]


@pytest.mark.parametrize("kind, fault", [("exit", "ended with 3"), ("hang", "hangs"), ("lie", "x")])
def test_the_fuzzer_notices_crashes_hangs_and_tracebacks(kind, fault, monkeypatch):
    # The process that reads cannot be replaced from here: a stand-in for it speaks its part.
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    fuzzer = fuzz.Fuzzer(0)
    fuzzer.link, theirs = fuzz.FORKS.Pipe()
    fuzzer.process = fuzz.FORKS.Process(target=_stand_in, args=(kind, theirs))
    fuzzer.process.start()
    theirs.close()
    fuzzer.place = fuzz.tempfile.TemporaryDirectory()
    assert fuzzer.link.poll(60) and fuzzer.link.recv() == "ready"
    fuzzer.ask("picture", 7)
    assert len(fuzzer.failures) == 1 and fault in fuzzer.failures[0]
    assert fuzzer.failures[0].startswith("picture:7 (seed 0")


def _stand_in(kind: str, link) -> None:
    link.send("ready")
    link.recv()
    if kind == "exit":
        raise SystemExit(3)
    if kind == "lie":
        link.send("x")
    link.recv()


# ---------------------------------------------------------------------------- YAML


@pytest.mark.parametrize("text", YAML_TRICKS, ids=range(len(YAML_TRICKS)))
def test_tricks_of_yaml_are_refused_or_read(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    try:
        config.resolve(ROOT, config.read(tmp_path / "x.yaml"))
    except ConfigError as error:
        assert len(str(error)) < 5000
    assert not (tmp_path / "harmed").exists()


def test_aliases_that_multiply_are_told_in_a_few_words():
    bomb = yaml.safe_load(BOMB)["i"]
    with pytest.raises(ConfigError, match="neighbours.*found"):
        config.resolve(ROOT, {"evaluations": {"knn": {"neighbours": bomb}}})


# ---------------------------------------------------------------------------- drill


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_short_drill_finds_no_difference(tmp_path):
    files = [overlay(tmp_path / "x.yaml", BRIEF)]
    with drill.Drill(tmp_path, 0, files, pictures=(40, 0, 0)) as short:
        short.prepare()
        short.run(15)
    tally = short.tally
    assert tally.differences == []
    assert tally.group_kills and tally.step_kills and tally.runs >= 2
    assert tally.compared == tally.runs * len(short.expected)


def test_the_drill_sees_what_differs_is_missing_or_left_over(tmp_path):
    found = drill.Drill(tmp_path, 0, pictures=(1, 0, 0))
    results = tmp_path / "run" / "results"
    results.mkdir(parents=True)
    (results / "a.json").write_text('{"value": 1, "seconds": 3}')
    (results / "b.safetensors").write_bytes(b"b")
    found.expected = drill.contents(tmp_path / "run")
    (results / "a.json").write_text('{"value": 1, "seconds": 4}')
    found.compare(tmp_path / "run")
    assert found.tally.differences == [] and not results.exists()
    results.mkdir(parents=True)
    (results / "a.json").write_text('{"value": 2}')
    (results / ".b.safetensors.1.tmp").write_bytes(b"b")
    found.compare(tmp_path / "run")
    assert found.tally.differences == [
        "run: .b.safetensors.1.tmp is left over",
        "run: a.json differs",
        "run: b.safetensors is missing",
    ]


def test_a_killed_session_leaves_no_process(tmp_path):
    found = drill.Drill(tmp_path, 0, pictures=(1, 0, 0))
    line = ["bash", "-c", "sleep 100 & (sleep 100; true) & sleep 100"]
    process = found.start(line, tmp_path, tmp_path / "log")
    while len(drill.session(process.pid)) < 4:
        assert process.poll() is None
    assert found.killed(process, 0.0, tmp_path / "log")
    assert drill.session(process.pid) == []
    assert not found.living
