"""Several jobs and one that puts together give what one job gives, bit for bit."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import crafted
import drawing
import numpy as np
import pytest
import running
from test_cluster import run as run_cluster
from test_features import teacher

from kt.core import parts, table
from kt.core.parts import Part, parse

NUMBER = 1500  # images of 28 px: several blocks of a checksum


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with pack, teacher, features and clusters."""
    folder = tmp_path_factory.mktemp("made")
    crafted.write_pack(folder / "pack.h5", crafted.noise(NUMBER, 28), crafted.names(NUMBER))
    teacher(folder / "teacher")
    step("features", folder, folder / "features.h5")
    with table.read(folder / "features.h5", "features", {"features": 2, "keys": 1}) as file:
        rows, keys = file["features"][...], table.strings(file, "keys")
    (folder / "cluster").mkdir()
    run_cluster(folder / "cluster", rows, keys, k=7)
    return folder


def step(name: str, made: Path, output: Path, *options, fails: str = "", **changed) -> None:
    """Runs features or pseudo_labels on what was made; `fails` is a part of its last words."""
    given = {
        "features": {"model": "teacher", "layer": "conv2", "map": "2", "pack": "pack.h5"},
        "pseudo_labels": {"features": "features.h5", "clusters": "cluster/clusters.h5"},
    }[name] | changed
    places = {key: made / value if "." in value or value == "teacher" else value
              for key, value in given.items()}  # fmt: skip
    command = [sys.executable, "-m", f"kt.{name}", "--output", output, *options]
    command += [text for key, value in places.items() for text in (f"--{key}", value)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == (3 if fails else 0), done.stderr
    assert fails in done.stderr


def in_parts(name: str, made: Path, folder: Path, number: int) -> list[Path]:
    paths = [folder / f"{one}-of-{number}.h5" for one in range(1, number + 1)]
    for one, path in enumerate(paths, 1):
        step(name, made, path, "--part", f"{one}/{number}")
    return paths


# ---------------------------------------------------------------------------- spans


@pytest.mark.parametrize("rows", [0, 1, 445, 446, 1500, 4450])
@pytest.mark.parametrize("of", [1, 2, 3, 7, 20])
def test_parts_follow_each_other_are_whole_blocks_and_about_as_large(rows, of):
    spans = [Part(number, of).span(rows, 445) for number in range(1, of + 1)]
    assert spans[0][0] == 0 and spans[-1][1] == rows
    assert all(one[1] == other[0] for one, other in itertools.pairwise(spans))
    assert all(last % 445 == 0 or last == rows for _, last in spans)
    blocks = [-(-(last - first) // 445) for first, last in spans]
    assert max(blocks) - min(blocks) <= 1


@pytest.mark.parametrize("text", ["2", "0/3", "4/3", "a/b", "1/", "-1/2"])
def test_what_is_no_part_is_refused(text):
    with pytest.raises(Exception, match="expected a part such as 2/4"):
        parse(text)


# ---------------------------------------------------------------------------- tables


@pytest.mark.parametrize("number", [2, 3, 6])  # 6: more than there are blocks
def test_features_in_parts_are_those_of_one_job(made, tmp_path, number):
    parts = in_parts("features", made, tmp_path, number)
    step("features", made, tmp_path / "all.h5", "--parts", *parts)
    same(tmp_path / "all.h5", made / "features.h5", "features")


def test_pseudo_labels_in_parts_are_those_of_one_job(made, tmp_path):
    step("pseudo_labels", made, tmp_path / "one.h5")
    parts = in_parts("pseudo_labels", made, tmp_path, 2)
    step("pseudo_labels", made, tmp_path / "all.h5", "--parts", *parts)
    same(tmp_path / "all.h5", tmp_path / "one.h5", "pseudo_labels")


def same(one: Path, other: Path, format: str) -> None:
    assert table.digest(one) == table.digest(other)
    with table.read(one, format, {}) as a, table.read(other, format, {}) as b:
        assert table.text(a, "config") == table.text(b, "config")
        assert a.attrs.get("num_labels") == b.attrs.get("num_labels")
        assert all(np.array_equal(a[name], b[name]) for name in b)


def test_parts_that_do_not_belong_together_are_refused(made, tmp_path):
    one, two = in_parts("features", made, tmp_path, 2)
    output = tmp_path / "all.h5"

    def refused(message: str, *parts, **changed):
        step("features", made, output, "--parts", *parts, fails=message, **changed)
        assert not output.exists()

    refused("expected part 1 of 2, found [2, 2]", two, one)
    refused("expected part 1 of 1, found [1, 2]", one)
    refused("expected part 2 of 2, found [1, 2]", one, one)
    refused("found no file", one, tmp_path / "3.h5")
    other = tmp_path / "other.h5"
    step("features", made, other, "--part", "2/2", layer="conv1")
    refused("expected the settings", one, other)
    names = crafted.names(NUMBER, "other")
    crafted.write_pack(made / "new.h5", crafted.noise(NUMBER, 28), names)
    refused("was not made from", one, two, pack="new.h5")


def test_parts_are_put_together_a_few_rows_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "MOST_BYTES", 40)
    rows, names = np.arange(22, dtype=np.float32).reshape(11, 2), crafted.names(11)
    pack, paths = tmp_path / "pack.h5", [tmp_path / "1.h5", tmp_path / "2.h5"]
    with table.create(pack, "images", {}) as file:
        table.put_strings(file, "keys", names)
    for number, own in enumerate((slice(0, 6), slice(6, 11))):
        settings = Part(number + 1, 2).mark({"layer": "conv1"})
        with table.create(paths[number], "features", settings, [pack]) as file:
            table.put(file, "features", rows[own])
            table.put_strings(file, "keys", names[own])
    arrays = {"features": 2, "keys": 1}
    parts.gather(paths, tmp_path / "all.h5", "features", arrays, pack, [pack])
    with table.read(tmp_path / "all.h5", "features", arrays) as file:
        assert np.array_equal(file["features"], rows) and table.strings(file, "keys") == names
        assert table.text(file, "config") == '{"layer": "conv1"}'


def test_every_key_must_stand_once_and_in_its_place(made, tmp_path):
    one, two = in_parts("features", made, tmp_path, 2)
    with table.read(two, "features", {}) as file:
        rows = len(file["keys"])
    output, changed = tmp_path / "all.h5", tmp_path / "changed.h5"

    def refused(message: str, picked: list[int]):
        rewrite(two, changed, picked, made)
        step("features", made, output, "--parts", one, changed, fails=message)
        assert not output.exists()

    refused(f"{NUMBER - 1} rows in all parts", list(range(rows - 1)))
    refused(f"{NUMBER + 1} rows in all parts", [*range(rows), 0])
    refused("are not those that follow", [*range(rows - 1), 0])
    refused("are not those that follow", [1, 0, *range(2, rows)])
    rewrite(two, changed, list(range(rows)), made)
    step("features", made, output, "--parts", one, changed)


def rewrite(part: Path, output: Path, picked: list[int], made: Path) -> None:
    """Writes a part of the features anew, with other rows of its own."""
    with table.read(part, "features", {}) as file:
        settings = json.loads(table.text(file, "config"))
        arrays = {name: file[name][...][picked] for name in file}
    parents = [made / "pack.h5", made / "teacher" / "model.safetensors"]
    with table.create(output, "features", settings, parents) as file:
        for name, array in arrays.items():
            table.put(file, name, array)


# ---------------------------------------------------------------------------- the workflow


@pytest.mark.slow
def test_a_run_in_shards_gives_the_same_and_another_number_makes_nothing_again(tmp_path):
    tree = drawing.tree(40, 20, 20, draw=drawing.pattern)
    place = drawing.write_folder(tree, tmp_path / "pictures")
    last = "results/pseudo_labels/deep/block2/images/k4/images-train-unlabelled.h5"
    found = []
    for name, shards in (("one", 1), ("three", 3)):
        folder = tmp_path / name
        (folder / "results/parts/features/best-of-breed").mkdir(parents=True)  # another teacher's
        more = ["--set-threads", "pretext_train=1", "features=1", "features_part=1"]
        done = running.workflow(folder, place, last, *more, config=[f"shards={shards}"])
        assert done.returncode == 0, running.output(done)
        tables = sorted(folder.glob("results/*/**/*.h5"))
        found.append(
            {str(path.relative_to(folder)): table.digest(path) for path in tables
             if path.name != "examples.h5"}
        )  # fmt: skip
        jobs = running.jobs(done)
        assert sum("part" in job for job in jobs) == (3 * shards if shards > 1 else 0)
        for other in (1, 2) if shards > 1 else (5,):
            again = running.workflow(folder, place, "-n", last, *more, config=[f"shards={other}"])
            assert running.jobs(again) == []
    assert found[0] == found[1] and len(found[0]) > 6
