"""Odd names, many files and no network: what reaches a shell, a page or the outside."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from drawing import encoded, picture, write_folder, write_tar, write_zip
from test_ingest import DEFAULTS, keys, pack

from kt.core.images import read_pack
from kt.core.layouts import POOL

ODD = [
    "a;b.png", "$(touch x).png", "`touch x`.png", "new\nline.png", "tab\t.png", "<script>.png",
    "quote'\".png", "-rf.png", "%s{0}.png", "\u202eltr.png", "\U0001f600.png", "x" * 251 + ".png",
]  # fmt: skip


def names() -> dict[str, bytes]:
    files = {name: encoded(picture(1, row)) for row, name in enumerate(ODD)}
    return files | {f"{row}.png": encoded(picture(0, row)) for row in range(10)}


def command(place, output) -> list[str]:
    dataset = json.dumps(DEFAULTS | {"path": str(place)})
    options = ["--output", str(output), "--seed", "0", "--threads", "1"]
    return [sys.executable, "-m", "kt.ingest", "--dataset", dataset, *options]


@pytest.mark.parametrize("write", [write_folder, write_zip, write_tar])
def test_odd_names_become_keys_in_order_and_touch_nothing(tmp_path, write):
    files = names()
    place = write(files, tmp_path / "odd;$(touch y).tar")
    report = pack(place, tmp_path / "out")
    found = keys(tmp_path / "out")[POOL]
    assert found == sorted(files) and report["rejected"] == []
    assert sorted(os.listdir(tmp_path)) == sorted([place.name, "out"])


def test_names_that_are_no_utf_8_become_clean_keys(tmp_path):
    place = write_folder(names(), tmp_path / "odd")
    for odd in (b"\xff\xfe.png", b"caf\xe9.png"):
        (place / os.fsdecode(odd)).write_bytes(encoded(picture(2, 1)))
    pack(place, tmp_path / "out")
    assert {"\\xff\\xfe.png", "caf\\xe9.png"} < {
        key.replace("\\udc", "\\x") for key in keys(tmp_path / "out")[POOL]
    }


def test_names_sort_as_strings_do_whatever_their_length(tmp_path):
    stems = ["a", "ab", "a" * 8, "a" * 9, "b" * 240, "ä", "z", "\uffff", "\U00010000", "a b", "A"]
    files = {f"{stem}.png": encoded(picture(0, row)) for row, stem in enumerate(stems)}
    pack(write_tar(files, tmp_path / "a.tar"), tmp_path / "out")
    assert keys(tmp_path / "out")[POOL] == sorted(files)


@pytest.mark.slow
def test_a_hundred_thousand_files_in_a_folder_are_listed_in_seconds(tmp_path):
    place = tmp_path / "many"
    place.mkdir()
    payload = encoded(picture(0, 0, 12))
    (place / "0.png").write_bytes(payload)
    for number in range(1, 100_000):
        os.link(place / f"{number // 30000 * 30000}.png", place / f"{number}.png") if (
            number % 30000
        ) else (place / f"{number}.png").write_bytes(payload)
    begun = time.process_time()
    report = pack(place, tmp_path / "out", unlabelled=50, size=12)
    assert report["splits"][POOL]["images"] == 50
    assert time.process_time() - begun < 30
    shutil.rmtree(place)


def test_ingest_of_local_data_needs_no_network(tmp_path):
    alone = ["unshare", "-rn"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"]).returncode:
        pytest.skip("this machine does not permit a name space without network")
    place = write_folder(names(), tmp_path / "odd")
    subprocess.run([*alone, *command(place, tmp_path / "out")], check=True)
    assert len(read_pack(tmp_path / "out" / f"{POOL}.h5")) == len(names())
