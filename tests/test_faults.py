"""Full disks and too little memory, for every step: exit code 4, one line, nothing lost."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import crafted
import drawing
import numpy as np
import pytest
import stages
from drawing import encoded
from PIL import Image
from running import install, jobs, missing, output, overlay, run, workflow

from kt.core import ending, model, step, table
from kt.core.step import ResourceError

pytestmark = pytest.mark.slow

FEW, MANY = 32 << 20, 80 << 20  # bytes that a step gets, and that its input needs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with all that every step made once."""
    return stages.make(tmp_path_factory.mktemp("made"))


@contextlib.contextmanager
def mounted(folder: Path, kind: str, *options):
    """Mounts a disk at a new folder; skips the test where that is not permitted."""
    folder.mkdir()
    done = subprocess.run(["mount", *options, folder], capture_output=True, text=True)
    if done.returncode:
        missing(f"NOT TESTED with a full {kind}, mounting is not permitted: {done.stderr}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def disk(folder: Path, num_bytes: int):
    """Mounts a disk of so many bytes."""
    return mounted(folder, "disk", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs")


@contextlib.contextmanager
def home(folder: Path):
    """Mounts a disk on which a folder, which is given, may have a quota: see `limit`."""
    if not shutil.which("mkfs.btrfs"):
        install("btrfs-progs")
    if not shutil.which("mkfs.btrfs"):
        missing("NOT TESTED with a full quota: mkfs.btrfs of btrfs-progs is missing")
    image = folder.with_suffix(".image")
    with image.open("wb") as file:
        file.truncate(512 << 20)
    subprocess.run(["mkfs.btrfs", "-q", image], check=True, capture_output=True)
    with mounted(folder, "quota", "-o", "loop,max_inline=0", image):
        subprocess.run(["btrfs", "-q", "subvolume", "create", folder / "home"], check=True)
        subprocess.run(["btrfs", "quota", "enable", folder], check=True)
        yield folder / "home"
    image.unlink()


def used(folder: Path) -> int:
    """Gives the bytes that count for the quota of a folder."""
    os.sync()
    command = ["btrfs", "qgroup", "show", "--raw", "--sync", "-f", folder]
    return int(subprocess.run(command, capture_output=True, text=True).stdout.split()[-2])


def limit(folder: Path, num_bytes: int | str) -> None:
    """Sets what may stand in a folder, or `none`."""
    subprocess.run(["btrfs", "qgroup", "limit", str(num_bytes), folder], check=True)


def fill(folder: Path, room: int) -> None:
    """Fills a disk but for so many bytes."""
    (folder / "ballast").write_bytes(bytes(max(0, shutil.disk_usage(folder).free - room)))


def put_old(name: str, made: Path, folder: Path) -> None:
    """Puts what a step made before in its place."""
    old, new = made / stages.place(name), folder / stages.place(name)
    (shutil.copytree if old.is_dir() else shutil.copy)(old, new)


def fails(name: str, made: Path, folder: Path, *before, options=None) -> str:
    """Runs a step that must end with 4 and leave all as it was; gives the line that says why."""
    inputs, old = stages.digests(made), stages.digests(folder)
    old = {path: digest for path, digest in old.items() if not path.endswith("log.jsonl")}
    code, text = stages.run(name, options or stages.options(name, made, folder), *before)
    assert code == ResourceError.exit_code, (code, text)
    assert "Traceback" not in text and "Exception ignored" not in text, text
    (line,) = [line for line in text.splitlines() if re.search("(^| )error: ", line)]
    assert stages.digests(made) == inputs
    found = stages.digests(folder)
    assert {path: found.get(path) for path in old} == old, "what stood there is lost"
    left = [path for path in found if "/." in f"/{path}" and ".ingest/" not in path]
    assert not left, "something half made is left"  # but for the state of an ingest
    return line


# ---------------------------------------------------------------------------- disk


@pytest.mark.parametrize("share", [0, 0.5], ids=["full", "half"])
@pytest.mark.parametrize("name", stages.STAGES)
def test_a_full_disk_ends_a_step_with_4_and_keeps_what_stood_there(made, tmp_path, name, share):
    with disk(tmp_path / "disk", 4 << 20) as small:
        put_old(name, made, small)
        place = made / stages.place(name)
        sizes = [path.stat().st_size for path in ([place] if place.is_file() else place.iterdir())]
        fill(small, int(share * max(sizes)) // 4096 * 4096)
        options = [*stages.options(name, made, small), "--log", str(small / "log.txt")]
        line = fails(name, made, small, options=options)
    assert str(small) in line and "bytes" in line


@pytest.mark.parametrize("room", [0, 16 << 10], ids=["full", "little"])
@pytest.mark.parametrize("name", stages.STAGES)
def test_a_full_quota_ends_a_step_with_4_and_keeps_what_stood_there(made, tmp_path, name, room):
    with home(tmp_path / "disk") as small:
        put_old(name, made, small)
        limit(small, used(small) + room)
        line = fails(name, made, small)
    assert str(small) in line and "quota exceeded" in line


def test_a_workflow_whose_quota_is_full_goes_on_when_there_is_room(tmp_path):
    pictures = drawing.write_folder(drawing.tree(), tmp_path / "pictures")
    wide = {"teachers": {"deep": {"backbone": {"widths": [64, 256]}}}}  # 4 MB
    wanted = "results/features/deep/block2/images-train-unlabelled.h5"
    weights = "results/teachers/deep/s0/model.safetensors"
    files = [overlay(tmp_path / "wide.yaml", wide)]
    done = workflow(tmp_path / "calm", pictures, wanted, files=files)
    assert done.returncode == 0, output(done)
    with home(tmp_path / "disk") as small:
        done = workflow(small, pictures, "results/data/images/report.json", files=files)
        assert done.returncode == 0, output(done)
        limit(small, used(small) + (1 << 20))  # less, and Snakemake itself does not start
        done = workflow(small, pictures, wanted, files=files)
        assert done.returncode == ResourceError.exit_code, output(done)
        assert "Traceback" not in output(done), output(done)
        found = re.search(r"error: .*results/teachers/deep/s0.*quota exceeded", output(done))
        assert found and not (small / weights).exists(), output(done)
        limit(small, "none")
        done = workflow(small, pictures, wanted, files=files)
        assert "ingest images" not in jobs(done)
        assert (small / weights).read_bytes() == (tmp_path / "calm" / weights).read_bytes()
        assert table.digest(small / wanted) == table.digest(tmp_path / "calm" / wanted)


@pytest.mark.parametrize("name", stages.STAGES)
def test_a_limit_on_the_size_of_files_ends_a_step_with_4_too(made, tmp_path, name):
    limit = functools.partial(stages.limit_files, 200)
    folder = tmp_path / "out"
    folder.mkdir()
    put_old(name, made, folder)
    line = fails(name, made, folder, limit)
    assert str(folder) in line and "file too large" in line.lower()


@pytest.mark.parametrize("name", stages.STAGES)
def test_a_disk_that_may_not_be_written_ends_a_step_with_4(made, tmp_path, name):
    with disk(tmp_path / "disk", 4 << 20) as small:
        put_old(name, made, small)
        subprocess.run(["mount", "-o", "remount,ro", small], check=True)
        assert str(small) in fails(name, made, small)


@pytest.mark.parametrize("name", stages.TRAININGS)
def test_a_resume_state_that_finds_no_room_ends_the_training_with_4(made, tmp_path, name):
    with disk(tmp_path / "disk", 1 << 20) as small:
        fill(small, 8192)
        options = [*stages.options(name, made, tmp_path / "out"), "--state", str(small / "state")]
        before = stages.save_always, stages.expect_room
        for functions, said in ((before, "No space left"), (before[:1], "bytes are needed")):
            code, text = stages.run(name, options, *functions)
            assert code == ResourceError.exit_code and "Traceback" not in text, text
            assert said in text and str(small) in text, text
        assert not list((small / "state").glob("*.state"))
    assert not (tmp_path / "out" / name / "model.json").exists()


def test_what_will_not_fit_is_told_with_both_numbers_before_the_work(tmp_path):
    path = tmp_path / "not yet" / "t.h5"
    with pytest.raises(ResourceError, match=r"t.h5: 10{16} bytes are needed, \d+ are free"):
        step.check_space(path, 10**16)
    step.check_space(path, 1000)


# ---------------------------------------------------------------------------- memory


def changed(options: list[str], flag: str, value) -> list[str]:
    """Gives options with another value for one of them."""
    index = options.index(flag) + 1
    value = json.dumps(value) if isinstance(value, dict) else str(value)
    return [*options[:index], value, *options[index + 1 :]]


def large_picture(made, folder):
    """A picture of 30 megapixels, packed small."""
    payload = encoded(Image.new("1", (6000, 5000)))
    for number in range(10):
        (folder / f"{number}.png").write_bytes(payload)
    return "--dataset", {**stages.IMAGES, "path": str(folder), "max_pixels": 10**8}


def large_network(made, folder):
    return "--backbone", {"name": "plain", "widths": [8, MANY // 288], "strides": [2, 2]}


def large_model(made, folder):
    values = {"name": "plain", "widths": [8, MANY // 288], "strides": [2, 2]}
    plugin = crafted.plugin(values)
    model.save(folder, model.fresh(plugin, 0), plugin, {})
    return "--model", folder


def large_features(made, folder):
    rows = np.random.default_rng(0).normal(size=(20, 30_000))
    return "--features", crafted.write_features(folder / "f.h5", rows, crafted.names(20))


def large_clusters(made, folder):
    with table.create(folder / "c.h5", "clusters", {}) as file:
        for name, shape in (("centroids", (4, 1)), ("mean", (MANY // 4,)), ("sizes", (4,)),
                            ("projection", (MANY // 4, 1)), ("objective", (1,))):  # fmt: skip
            table.put(file, name, np.zeros(shape, np.float32))
        file.attrs["l2"] = False
    return "--clusters", folder / "c.h5"


def large_labels(made, folder):
    with table.create(folder / "l.h5", "pseudo_labels", {}) as file:
        table.put(file, "labels", np.zeros(MANY // 8, np.int64))
    return "--pseudo-labels", folder / "l.h5"


LARGE = {
    "ingest": large_picture, "pretext_train": large_network, "choose": large_model,
    "features": large_model,
    "cluster": large_features, "pseudo_labels": large_clusters, "target_train": large_network,
    "evaluate": large_model, "report": large_labels,
}  # fmt: skip


@pytest.mark.parametrize("name", stages.STAGES)
def test_too_little_memory_ends_a_step_with_4(made, tmp_path, name):
    (tmp_path / "large").mkdir()
    flag, value = LARGE[name](made, tmp_path / "large")
    options = stages.options(name, made, tmp_path / "out")
    if flag not in options:
        options += [flag, ""]
    if name == "cluster":
        options = changed(options, "--settings", {**crafted.CLUSTERING, "pca": 4})
    options = changed(options, flag, value)
    (tmp_path / "out").mkdir()
    put_old(name, made, tmp_path / "out")
    limit = functools.partial(stages.limit_memory, FEW)
    line = fails(name, made, tmp_path / "out", limit, options=options)
    assert "memory" in line


@pytest.mark.parametrize("more", [1, 3, 6, 10, 16])
@pytest.mark.parametrize("name", stages.STAGES)
def test_whatever_memory_ends_a_step_what_stood_there_stays_whole(made, tmp_path, name, more):
    # So little that C libraries may crash by themselves: then the code is theirs.
    (tmp_path / "out").mkdir()
    inputs = stages.digests(made)
    limit = functools.partial(stages.limit_memory, more << 20)
    code, text = stages.run(name, stages.options(name, made, tmp_path / "out"),
                            limit)  # fmt: skip
    assert code in (0, ResourceError.exit_code, 1) or code < 0, text
    assert code != 1 or "Traceback" not in text, text
    assert stages.digests(made) == inputs
    for path in (tmp_path / "out").rglob("[!.]*.h5"):
        assert table.digest(path) == table.digest(made / path.relative_to(tmp_path / "out"))


def test_memory_that_libraries_lack_when_they_are_loaded_ends_with_4(made, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20))

    options = stages.options("features", made, tmp_path)
    done = run(sys.executable, "-m", "kt.features", *options, preexec_fn=limit)
    assert done.returncode == ResourceError.exit_code, output(done)
    assert "Traceback" not in done.stderr and "memory" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error, kind",
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 5 bytes"), "memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "memory"),
        (RuntimeError("std::bad_alloc"), "memory"),
        (ImportError("libtorch.so: failed to map segment from shared object"), "memory"),
        (MemoryError("Unable to allocate 3 GiB for an array"), "memory"),
        (OSError(27, "File too large"), "disk"),
        (OSError(122, "Disk quota exceeded"), "disk"),
        (OSError("Can't write data (error message = 'Disk quota exceeded')"), "disk"),
        (OSError("Can't write data (error message = 'No space left on device')"), "disk"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "memory"),
        (RuntimeError("Error creating shared memory segment: No space left on device"), "memory"),
        (OSError(2, "No such file or directory", "/dev/shm/a.jpg"), ""),
        (RuntimeError("CUDA error: no kernel image is available for execution"), "accelerator"),
        (RuntimeError("CUDA-capable device(s) is/are busy or unavailable"), "accelerator"),
        (RuntimeError("Duplicate GPU detected : rank 1 and rank 0 both on 0"), "accelerator"),
        (RuntimeError("CUDA error: device-side assert triggered"), ""),  # a bug of ours
        (OSError(2, "No such file or directory"), ""),
        (RuntimeError("size mismatch"), ""),
        (ValueError("mat1 and mat2 shapes cannot be multiplied"), ""),
    ],
)  # fmt: skip
def test_the_words_of_libraries_tell_what_ran_out(error, kind):
    assert ending.lack(error) == kind


def test_garbage_is_looked_for_again_after_imports_that_failed():
    with pytest.raises(ImportError), step.importing():
        assert not gc.isenabled()
        importlib.import_module("kt.not_there")
    assert gc.isenabled()
