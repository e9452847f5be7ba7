"""The arithmetic of the benchmark and what it writes, with made-up timings; nothing is timed."""

import importlib
import json
import math
import random
import re
import sys

import pytest

from bench import results, scale
from bench.goals import AT_LEAST, AT_MOST, BY_NAME, ROWS, meets
from bench.measure import Measured, alternate, costs, exponent, growth, speeds, worst

GOALS = {
    "puzzles_vs_lightly": (AT_LEAST, 8),
    "puzzles_of_floor": (AT_LEAST, 0.15),
    "delivery_vs_dataloader": (AT_LEAST, 3),
    "ingest_vs_pillow": (AT_LEAST, 2),
    "train_of_bare": (AT_LEAST, 0.95),
    "train_of_bare_cuda": (AT_LEAST, 0.95),
    "extract_of_bare": (AT_LEAST, 0.95),
    "kmeans_vs_faiss": (AT_MOST, 1.1),
    "assign_of_gemm": (AT_LEAST, 0.7),
    "memory_growth": (AT_MOST, 1.05),
    "hdf5_write_of_raw": (AT_LEAST, 0.25),
    "hdf5_sample_vs_fancy": (AT_LEAST, 6),
    "workflow_overhead": (AT_MOST, 1.2),
    "noop_seconds": (AT_MOST, 1.5),
    "heavy_start_seconds": (AT_MOST, 2.3),
    "new_k_of_full": (AT_MOST, 0.25),
    "growth_clustering_n": (AT_MOST, 1.05),
    "growth_clustering_d": (AT_MOST, 1.05),
    "growth_clustering_k": (AT_MOST, 1.05),
    "growth_puzzles_n": (AT_MOST, 1.05),
    "growth_extraction_n": (AT_MOST, 1.05),
}
MACHINE = {"cpu": "made up", "cores": 4, "threads": 2, "gpu": None}
PAIRS = [(2.0, 10.0), (1.0, 3.0), (4.0, 16.0)]


def recorded(name: str, value: float) -> dict:
    found = Measured([value * 0.9, value, value * 1.2], "a peer 1.2", [(1.0, value)] * 3)
    return results.record(BY_NAME[name], found, (81.26, 80.0), MACHINE)


# ---------------------------------------------------------------------------- rows


def test_the_rows_and_their_goals_are_the_agreed_ones():
    assert {row.name: (row.direction, row.goal) for row in ROWS} == GOALS
    assert len(BY_NAME) == len(ROWS)


@pytest.mark.parametrize("group", sorted({row.group for row in ROWS}))
def test_every_row_is_a_function_of_its_name_in_the_file_of_its_group(group):
    text = (results.ROOT / "bench" / f"{group}.py").read_text(encoding="utf-8")
    for row in ROWS:
        if row.group == group:
            assert f"def {row.name}(run: Run) -> Measured:" in text


def test_a_goal_is_met_from_the_right_side():
    faster, smaller = BY_NAME["puzzles_vs_lightly"], BY_NAME["noop_seconds"]
    assert meets(faster, 8.0) and not meets(faster, 7.99)
    assert meets(smaller, 1.5) and not meets(smaller, 1.51)


# ---------------------------------------------------------------------------- arithmetic


def test_the_value_is_the_median_of_the_ratios_and_not_the_ratio_of_the_medians():
    assert speeds(PAIRS) == [5.0, 3.0, 4.0]
    assert Measured(speeds(PAIRS), "").value == 4.0
    assert costs(PAIRS) == [1 / ratio for ratio in speeds(PAIRS)]


def test_product_and_peer_take_turns_after_one_untimed_pair():
    calls = []

    def told(name, value):
        return lambda: calls.append(name) or value

    assert alternate(told("product", 0.5), told("peer", 2.0), 3) == [(0.5, 2.0)] * 3
    assert calls == ["peer", "product"] + 3 * ["product", "peer"]


def test_the_worst_case_stands_for_its_row_and_all_are_kept():
    cases = {"a": Measured([3.0, 1.0, 2.0], "x"), "b": Measured([4.0], "y")}
    assert (worst(cases).value, worst(cases).against) == (2.0, "x")
    assert worst(cases, max).value == 4.0
    assert worst(cases).more == {"worst": "a", "cases": {"a": 2.0, "b": 4.0}}


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_found_under_noise(power):
    noise, sizes = random.Random(0), [1000, 2000, 4000, 8000, 16000]
    exact = [3e-6 * size**power for size in sizes]
    assert math.isclose(exponent(sizes, exact), power)
    shaken = [one * noise.uniform(0.95, 1.05) for one in exact]
    assert abs(exponent(sizes, shaken) - power) < 0.05


def test_growth_goes_through_all_sizes_in_turn_and_fits_every_round():
    calls = []
    work = {size: lambda size=size: calls.append(size) or 1e-3 * size for size in (1, 2, 4, 8)}
    found = growth(work, 3)
    assert calls == [1] + 3 * [1, 2, 4, 8]
    assert len(found.values) == 3 and math.isclose(found.value, 1.0)
    assert found.more["seconds_by_size"] == {1: 0.001, 2: 0.002, 4: 0.004, 8: 0.008}


# ---------------------------------------------------------------------------- what is written


def test_a_record_has_every_field_and_is_json():
    one = recorded("puzzles_vs_lightly", 9.0)
    assert set(one) == set(results.FIELDS)
    assert json.loads(json.dumps(one)) == one
    assert (one["value"], one["met"], one["n"], one["spread"]) == (9.0, True, 3, [8.1, 10.8])
    assert (one["probe_before"], one["machine"]) == (81.3, MACHINE)
    assert not recorded("puzzles_vs_lightly", 7.0)["met"]


def test_a_row_that_crashed_is_recorded_as_such_and_shown():
    one = results.record(BY_NAME["noop_seconds"], "ended with 1: Oops|", (1.0, 1.0), MACHINE)
    assert set(one) == set(results.FIELDS)
    assert (one["value"], one["met"], one["n"]) == (None, False, 0)
    assert "FAILED: ended with 1: Oops/" in results.table([one])
    assert "FAILED" in results.line(one)


def test_new_records_take_the_place_of_old_ones_in_the_order_of_the_rows():
    old = [recorded("puzzles_vs_lightly", 1.0), recorded("memory_growth", 1.0)]
    new = [recorded("memory_growth", 2.0), recorded("train_of_bare", 0.5)]
    kept = [(one["name"], one["value"]) for one in results.merged(old, new)]
    assert kept == [("puzzles_vs_lightly", 1.0), ("train_of_bare", 0.5), ("memory_growth", 2.0)]


def test_the_page_shows_goals_values_shortfalls_and_the_command_of_each_row(tmp_path):
    records = [recorded("puzzles_vs_lightly", 9.0), recorded("noop_seconds", 1.7)]
    records[1]["more"] = {"cases": {"one": 1.7, "two": 1.2}, "also": {"three": 1.0}}
    results.write(records, tmp_path / "results.json", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text()) == records
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    assert [row[2:] for row in rows[:2]] == [
        ["at least 8.00x", "9.00x", "met |"],
        ["at most 1.50 s", "1.70 s", "SHORTFALL |"],
    ]
    assert all(f'`make bench ARGS="--only {one["name"]}"`' in page for one in records)
    assert "- `noop_seconds`, the worst of: one 1.7, two 1.2" in page
    assert "- `noop_seconds`, also: three 1" in page
    assert "2 of 4 cores of made up" in page


def test_the_page_of_the_documents_is_the_one_that_the_records_give():
    page = results.PAGE.read_text(encoding="utf-8")
    assert page == results.HEAD + results.table(results.read())


# ---------------------------------------------------------------------------- measuring


def test_a_child_that_dies_or_hangs_is_told_and_takes_nothing_with_it(tmp_path, monkeypatch):
    main = importlib.import_module("bench.__main__")
    arguments = type("Arguments", (), {"rounds": 1, "full": False})
    row = BY_NAME["noop_seconds"]
    monkeypatch.setattr(main.sys, "executable", "/bin/false")
    assert main.in_a_process(row, arguments, [0], tmp_path).startswith("ended with 1")


def test_the_memory_of_a_process_and_its_children_is_seen():
    memory = importlib.import_module("bench.memory")
    child = "import time; held = bytearray(64 << 20); held[::4096] = b'x' * (16 << 10)"
    child += "; time.sleep(0.3)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert 64 << 20 < memory.peak([sys.executable, "-c", parent]) < 128 << 20


# ---------------------------------------------------------------------------- peers


def pins(name: str) -> dict[str, str]:
    text = (results.ROOT / name).read_text(encoding="utf-8")
    assert "://" not in text
    return {
        f"{package} {marker.strip()}": version
        for package, version, marker in re.findall(r"^([\w.-]+)==(\S+)( ;[^\\]*)?", text, re.M)
    }


def test_the_peers_are_pinned_and_change_no_pin_of_the_product():
    peers, own = pins("bench/requirements.txt"), pins("requirements.txt")
    assert any(name.split()[0] == "lightly" for name in peers)
    assert {name: peers[name] for name in peers.keys() & own} == {
        name: own[name] for name in peers.keys() & own
    }


def test_the_page_of_scale_is_made_of_what_is_kept_and_names_every_group():
    text = scale.PAGE.read_text(encoding="utf-8")
    assert scale.page(json.loads(scale.KEPT.read_text(encoding="utf-8"))) == text
    assert all(f"## {name.capitalize()}" in text for name in scale.GROUPS)


def test_each_group_of_scale_says_commit_and_date_also_when_it_is_measured(tmp_path, monkeypatch):
    text = scale.PAGE.read_text(encoding="utf-8")
    assert len(re.findall(r"commit [0-9a-f]{12}.*, 20\d\d-\d\d-\d\d\.$", text, re.M)) == len(
        scale.GROUPS
    )
    monkeypatch.setattr(scale, "KEPT", tmp_path / "scale.json")
    monkeypatch.setattr(scale, "PAGE", tmp_path / "scale.md")
    monkeypatch.setattr(scale, "GROUPS", {"rows": rows_of_two})
    monkeypatch.setattr(scale, "probe", lambda: 1.0)
    monkeypatch.setattr(scale.os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setattr(results, "commit", lambda: "abc+changes")
    monkeypatch.setattr(sys, "argv", ["scale"])
    scale.main()
    assert "; commit abc+changes, 20" in scale.PAGE.read_text(encoding="utf-8")


def rows_of_two(run, most):
    """Two rows."""
    yield {"rows": 1, "iteration_s": 1.0}
    yield {"rows": 2, "iteration_s": 2.0}
