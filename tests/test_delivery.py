import subprocess
import sys
import threading
import time
from pathlib import Path

import crafted
import numpy as np
import pytest
import running
import torch
from running import ROOT

from kt.core import compiled, delivery
from kt.core.images import read_pack

CPU = torch.device("cpu")
NUMBER, BATCH = 90, 8


def setting():
    task = crafted.jigsaw(36, NUMBER)
    return task, crafted.pack(crafted.noise(NUMBER, 36)), task.order(torch.arange(NUMBER), 2)[:88]


def delivered(task, pack, order, threads):
    return list(delivery.batches(task, pack, order, BATCH, 2, CPU, threads))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(delivery, "PLANNED", 24)  # 88 images: three whole blocks and a part


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_batches_come_in_order_and_are_those_of_one_image_at_a_time(threads):
    task, pack, order = setting()
    found = delivered(task, pack, order, threads)
    assert torch.equal(torch.cat([index for index, _, _ in found]), order)
    assert {len(index) for index, _, _ in found} == {BATCH}
    for index, views, labels in found:
        for row, view, label in zip(index, views, labels, strict=True):
            alone = delivery.load_batch(task, pack, row[None], 2, CPU)
            assert torch.equal(view, alone[0][0]) and label == alone[1][0]


@pytest.mark.parametrize("threads", [0, 1])
def test_what_is_left_of_an_epoch_has_the_bits_it_would_have_had(threads, monkeypatch):
    monkeypatch.setattr(delivery, "PLANNED", 500)  # with 950 images a block and a part
    pixels, labels = crafted.discs(950, 12)
    task, pack = crafted.labelling(12, labels, crop=0.5, flip=0.5), crafted.pack(pixels)
    order = task.order(torch.arange(950), 0)
    whole = list(delivery.batches(task, pack, order, 50, 0, CPU, threads))
    for done in range(1, 19):
        left = list(delivery.batches(task, pack, order, 50, 0, CPU, threads, done))
        assert len(left) == 19 - done
        for found, expected in zip(left, whole[done:], strict=True):
            assert all(map(torch.equal, found, expected)), done


@pytest.mark.parametrize("threads", [1, 4])
def test_no_more_is_made_ahead_than_the_threads_need(threads):
    task, pack, order = setting()
    made, fill = [0], task.fill

    def spy(images, plan):
        made[0] += 1
        return fill(images, plan)

    task.fill = spy
    coming = delivery.batches(task, pack, order, BATCH, 0, CPU, threads)
    next(coming)
    until = time.monotonic() + 20  # where all cores are busy the threads come late
    while made[0] < 2 and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.3)
    assert 1 < made[0] <= 2 * threads + 1
    coming.close()


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_an_error_in_a_thread_reaches_the_training_and_ends_the_threads(threads):
    task, pack, order = setting()
    fill = task.fill

    def break_down(images, plan):
        if order[40] in plan["rows"][:, 0]:
            raise OSError(5, "Input/output error")
        return fill(images, plan)

    task.fill, before = break_down, threading.active_count()
    with pytest.raises(OSError, match="Input/output"):
        delivered(task, pack, order, threads)
    assert threading.active_count() == before


def test_a_training_that_stops_leaves_no_thread_behind():
    task, pack, order = setting()
    before = threading.active_count()
    coming = delivery.batches(task, pack, order, BATCH, 0, CPU, 4)
    next(coming)
    coming.close()
    assert threading.active_count() == before


def test_the_pages_of_a_pack_on_disk_serve_as_they_are(tmp_path):
    pixels = crafted.noise(NUMBER, 36)
    path = crafted.write_pack(tmp_path / "pack.h5", pixels, crafted.names(NUMBER))
    task, pack, order = setting()
    for one, two in zip(
        delivered(task, read_pack(path), order, 2), delivered(task, pack, order, 0), strict=True
    ):
        assert torch.equal(one[1], two[1])


def test_what_an_accelerator_gets_makes_the_same_views():
    task, pack, order = setting()
    plan = task.plan(order[:BATCH], 2)
    images, same = delivery._gathered(pack, plan, pin=False)
    assert images.dtype == torch.uint8 and images.shape == (BATCH, 2, 3, 36, 36)
    views, labels = delivery.load_batch(task, pack, order[:BATCH], 2, CPU)
    assert torch.allclose(task.views(images, same), views, atol=1e-4)
    assert torch.equal(same["labels"], labels)


def test_gathered_images_are_those_of_the_rows():
    pixels, rows = crafted.noise(20, 12), np.array([3, 3, 19, 0])
    found = np.zeros((4, 3, 12, 12), np.uint8)
    compiled.gather(pixels, rows, found)
    assert np.array_equal(found, pixels[rows])


COMPILING = """
import sys, time
from pathlib import Path
import numpy as np
from numba.core.caching import IndexDataCacheFile
from kt.core import compiled

folder, steps, here, before, after = Path(sys.argv[1]), sys.argv[2].split(","), *sys.argv[3:]
save = IndexDataCacheFile._save_index

def wait_for(mark):
    end = time.monotonic() + 5
    while mark and not (folder / mark).exists() and time.monotonic() < end:
        time.sleep(0.01)

def slowly(self, overloads):
    (folder / f"{here} names").touch()
    wait_for(before)
    save(self, overloads)
    (folder / f"{here} named").touch()
    wait_for(after)

IndexDataCacheFile._save_index = slowly
images, rows = np.arange(8 * 108, dtype=np.uint8).reshape(8, 3, 6, 6), np.array([3, 1, 2])
for step in map(int, steps):
    shown = images[..., ::step]
    found = np.empty((3, *shown.shape[1:]), np.uint8)
    compiled.gather(shown, rows, found)
    assert np.array_equal(found, shown[rows]), f"every {step}"
(folder / f"{here} done").touch()
"""


def test_compiled_code_has_a_place_where_neither_the_program_nor_the_home_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    assert compiled._place(tmp_path / "file/a", tmp_path / "b/c") == tmp_path / "b/c"
    code = (
        "import sys, pathlib; from kt.core import compiled; file = pathlib.Path(sys.argv[1]);"
        "place = compiled._place(file / 'a', file / 'b'); assert place.is_dir(); print(place)"
    )
    done = running.run(sys.executable, "-c", code, tmp_path / "file")
    assert done.returncode == 0 and not Path(done.stdout.strip()).exists(), running.output(done)


def test_all_compiled_code_is_kept_in_a_folder_of_its_machine():
    code = (
        "import platform; from kt.core import resample;"
        "assert platform.node() in resample._resize._cache.cache_path"
    )
    env = running.environment(ROOT)
    env.pop("NUMBA_CACHE_DIR", None)
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env).returncode == 0


@pytest.mark.slow
def test_two_processes_that_compile_at_once_leave_code_that_is_right(tmp_path):
    def start(*given):
        env = {**running.environment(ROOT), "NUMBA_CACHE_DIR": str(tmp_path / "kept")}
        command = [sys.executable, "-c", COMPILING, str(tmp_path), *given]
        return subprocess.Popen(command, cwd=ROOT, env=env)

    # The first one's code would come last, and under the name of the other's, were they let.
    both = [start("1", "one", "two names", "two done"), start("2", "two", "one named", "")]
    assert [one.wait(120) for one in both] == [0, 0]
    assert start("2,1", "last", "", "").wait(120) == 0
