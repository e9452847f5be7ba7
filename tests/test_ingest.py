import json
import os
import signal
import subprocess
import sys
import time
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from drawing import CLASSES, encoded, label_of, picture, tree, write_folder, write_tar, write_zip
from PIL import Image

from kt import config, ingest
from kt.core import images, listing, shards, table
from kt.core.layouts import POOL, SPLITS, TEST, TRAIN
from kt.core.parts import WHOLE
from kt.core.step import DataError, ResourceError
from kt.sources import pictures as sources

DEFAULTS = {
    "source": "pictures",
    "size": 16,
    "unlabelled": None,
    "labelled": None,
    "test": None,
    "max_bad_fraction": 0.0,
    "max_pixels": 1_000_000,
    "near_copies": None,
    "storage": "pixels",
}


def dataset(path, **changes) -> config.Dataset:
    return config.Dataset(**(DEFAULTS | {"path": str(path)} | changes))


def pack(path, output, seed=0, state=None, **changes) -> dict:
    """Runs the step in this process and gives its report."""
    options = {
        "dataset": dataset(path, **changes),
        "seed": seed,
        "state": state,
        "part": WHOLE,
        "threads": 2,
    }
    ingest.run(SimpleNamespace(output=output, **options))
    return json.loads((output / "report.json").read_text())


def packs(output) -> dict[str, images.Pack]:
    return {split: images.read_pack(output / f"{split}.h5") for split in SPLITS}


def keys(output) -> dict[str, list[str]]:
    return {split: found.keys for split, found in packs(output).items()}


@pytest.fixture
def root(tmp_path):
    return write_folder(tree(6, 4, 3), tmp_path / "pictures")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "results" / "data" / "drawn"


# ---------------------------------------------------------------------------- what is written


def test_all_files_are_written_in_key_order(root, out):
    report = pack(root, out)
    names = [f"{split}{suffix}.h5" for split in SPLITS for suffix in ("", "-labels")]
    assert sorted(os.listdir(out)) == sorted([*names, "report.json"])
    assert os.listdir(out.parent) == [out.name]
    for split, found in packs(out).items():
        assert found.keys == sorted(found.keys)
        assert found.images.shape == (report["splits"][split]["images"], 3, 16, 16)


def test_each_label_belongs_to_its_picture(root, out):
    pack(root, out)
    for split, found in packs(out).items():
        truth = images.read_labels(out / f"{split}-labels.h5")
        assert truth.keys == found.keys
        assert truth.classes == list(CLASSES)
        assert truth.labels.tolist() == [label_of(image) for image in found.images]
        assert all(
            CLASSES[label] in key for label, key in zip(truth.labels, found.keys, strict=True)
        )


def test_pictures_hold_nothing_of_their_labels(root, out):
    pack(root, out)
    for split in SPLITS:
        with table.read(out / f"{split}.h5", "images", {"images": 4, "keys": 1}) as file:
            assert sorted(file) == ["images", "images_checks", "keys"]


def test_without_labelled_splits_they_have_no_rows(tmp_path, out):
    files = {f"{number}.png": encoded(picture(0, number)) for number in range(12)}
    report = pack(write_folder(files, tmp_path / "flat"), out)
    assert {split: len(found) for split, found in packs(out).items()} == {
        POOL: 12,
        TRAIN: 0,
        TEST: 0,
    }
    truth = images.read_labels(out / f"{POOL}-labels.h5")
    assert truth.labels.tolist() == [-1] * 12 and truth.classes == []
    assert report["splits"][POOL]["classes"] == {}


def test_pixels_that_are_more_than_the_memory_are_told(root, out, tmp_path, caplog, monkeypatch):
    pack(root, out)
    pool = len(packs(out)[POOL])
    monkeypatch.setattr(ingest, "memory", lambda: 3 * 16**2 * pool)
    pack(root, tmp_path / "fits")
    assert "storage: jpeg" not in caplog.text
    monkeypatch.setattr(ingest, "memory", lambda: 3 * 16**2 * pool - 1)
    pack(root, tmp_path / "jpegs", storage="jpeg")
    assert "storage: jpeg" not in caplog.text
    pack(root, tmp_path / "more")
    assert f"the pixels of {pool} images" in caplog.text and "storage: jpeg" in caplog.text
    assert "off the disk, image by image." in caplog.text
    monkeypatch.setattr(ingest, "LARGE", 3 * 16**2 * pool - 1)
    pack(root, tmp_path / "many more")
    assert "off the disk. With" in caplog.text


def test_the_memory_is_that_of_the_machine():
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    assert ingest.memory() == pytest.approx(1024 * int(lines["MemTotal"].split()[0]), rel=0.01)


def test_folder_zip_and_tar_give_the_same_pack(root, tmp_path):
    files = tree(6, 4, 3)
    shuffled = dict(sorted(files.items(), key=lambda item: hash(item[1])))
    places = [
        root,
        write_zip(shuffled, tmp_path / "a.zip"),
        write_tar(shuffled, tmp_path / "a.tar"),
        write_tar(files, tmp_path / "a.tar.gz", "w:gz"),
    ]
    digests = []
    for number, place in enumerate(places):
        output = tmp_path / f"out{number}"
        pack(place, output, labelled=5)
        digests.append([table.digest(output / f"{split}.h5") for split in SPLITS])
    assert digests == digests[:1] * 4


def test_a_second_run_gives_the_same_bytes(root, tmp_path):
    pack(root, tmp_path / "a")
    pack(root, tmp_path / "a")
    pack(root, tmp_path / "b")
    for name in (f"{split}{suffix}.h5" for split in SPLITS for suffix in ("", "-labels")):
        assert table.digest(tmp_path / "a" / name) == table.digest(tmp_path / "b" / name)


def test_the_report_describes_what_was_packed(tmp_path, out):
    files = tree(6, 4, 3)
    files["train-unlabelled/apple/grey.png"] = encoded(np.full((40, 20), 9, np.uint8))
    files["train-unlabelled/apple/tiny.png"] = encoded(picture(0, 50, 10))
    files["train/apple/again.png"] = files["train/apple/000.png"]
    files["train/notes.txt"] = b"notes"
    report = pack(write_folder(files, tmp_path / "pictures"), out)
    assert report["modes"] == {"L": 1, "RGB": len(files) - 2}
    assert report["sizes"]["min"] == [10, 10] and report["sizes"]["max"] == [32, 40]
    assert report["splits"][POOL]["smaller"] == 1 and report["splits"][TEST]["smaller"] == 0
    assert report["splits"][TRAIN]["duplicates"] == 1
    assert report["splits"][TRAIN]["classes"] == {"apple": 5, "bird": 4, "cloud": 4}
    assert report["ignored"] == 1 and report["rejected"] == []
    assert "16 x 16" in report["defaults"] and report["origin"] and report["seconds"] >= 0
    assert report["dataset"]["path"] == str(tmp_path / "pictures")


def test_the_report_counts_over_all_shards_and_by_split(tmp_path, out, monkeypatch):
    monkeypatch.setattr(shards, "MOST", 1)  # some hold a bad file alone
    files = tree(6, 4, 3)
    files["train-unlabelled/cloud/grey.png"] = encoded(np.full((20, 40), 9, np.uint8))
    files["train/cloud/wide.png"] = encoded(picture(2, 70, 60)[:12])
    files["train/cloud/even.png"] = encoded(picture(2, 71, 16))
    files |= {"test/apple/bad.png": b"bad", "train/cloud/zz.png": b"bad"}
    report = pack(write_folder(files, tmp_path / "pictures"), out, max_bad_fraction=0.1)
    assert report["modes"] == {"L": 1, "RGB": len(files) - 3}
    assert [one["key"] for one in report["rejected"]] == [
        "test/apple/bad.png",
        "train/cloud/zz.png",
    ]
    splits = report["splits"]
    assert [splits[split]["rejected"] for split in (POOL, TRAIN, TEST)] == [0, 1, 1]
    assert [splits[split]["smaller"] for split in (POOL, TRAIN, TEST)] == [0, 1, 0]
    assert report["sizes"]["min"] == [16, 12] and report["sizes"]["max"] == [60, 32]


def test_the_median_of_an_even_number_is_between_the_middle_two(tmp_path, out):
    files = {f"{n:02}.png": encoded(picture(0, n, 20 + 2 * n)) for n in range(12)}
    report = pack(write_folder(files, tmp_path / "pictures"), out)
    assert report["sizes"] == {"min": [20, 20], "median": [31, 31], "max": [42, 42]}


def test_the_normalisation_is_that_of_the_pool(root, out):
    report = pack(root, out)
    pool = packs(out)[POOL].images / 255
    assert np.allclose(report["mean"], pool.mean((0, 2, 3)), atol=1e-6)
    assert np.allclose(report["std"], pool.std((0, 2, 3)), atol=1e-6)


def test_odd_names_reach_the_report_and_the_keys(tmp_path, out):
    names = ["a;b", "$(touch x)", "new\nline", "<script>", "y" * 251, "quote'\"", "\u202eltr"]
    files = {f"{name}.png": encoded(picture(1, row)) for row, name in enumerate(names)}
    files |= {f"{row}.png": encoded(picture(0, row)) for row in range(10)}
    folder = write_folder(files, tmp_path / "odd")
    (folder / os.fsdecode(b"\xff\xfe.png")).write_bytes(encoded(picture(2, 1)))
    (folder / os.fsdecode(b"bad\xff.png")).write_bytes(b"bad")
    report = pack(folder, out, max_bad_fraction=0.1)
    assert set(files) < set(keys(out)[POOL]) and len(keys(out)[POOL]) == 18
    assert report["rejected"][0]["key"].isprintable()


# ---------------------------------------------------------------------------- subsets


def test_limits_hold_and_take_the_same_pictures_again(root, tmp_path):
    pack(root, tmp_path / "a", unlabelled=11, labelled=5, test=4)
    pack(root, tmp_path / "b", unlabelled=11, labelled=5, test=4)
    pack(root, tmp_path / "c", unlabelled=11, labelled=5, test=4, seed=1)
    found = keys(tmp_path / "a")
    assert {split: len(names) for split, names in found.items()} == {POOL: 11, TRAIN: 5, TEST: 4}
    assert found == keys(tmp_path / "b")
    assert found != keys(tmp_path / "c")


def test_a_larger_limit_only_adds(root, tmp_path):
    pack(root, tmp_path / "a", unlabelled=11)
    pack(root, tmp_path / "b", unlabelled=15)
    assert set(keys(tmp_path / "a")[POOL]) < set(keys(tmp_path / "b")[POOL])


@pytest.mark.parametrize(
    ("unlabelled", "labelled", "sizes"),
    [(None, None, (15, 15)), (12, None, (12, 18)), (None, 8, (22, 8)), (14, 9, (14, 9))],
)
def test_a_missing_pool_is_drawn_from_train(tmp_path, out, unlabelled, labelled, sizes):
    place = write_folder(tree(0, 10, 3), tmp_path / "labelled")
    pack(place, out, unlabelled=unlabelled, labelled=labelled)
    found = keys(out)
    assert (len(found[POOL]), len(found[TRAIN])) == sizes
    assert not set(found[POOL]) & set(found[TRAIN])
    truth = images.read_labels(out / f"{POOL}-labels.h5")
    assert truth.labels.tolist() == [label_of(image) for image in packs(out)[POOL].images]


@pytest.mark.parametrize("labelled", [None, 12])
def test_a_rare_class_keeps_a_label_where_the_pool_is_drawn_from_train(tmp_path, out, labelled):
    files = {name: payload for name, payload in tree(0, 12, 4).items()}
    files |= {
        f"{split}/rare/1.png": encoded(picture(0, n)) for split, n in ((TRAIN, 98), (TEST, 99))
    }
    write_folder(files, tmp_path / "pictures")
    for seed in range(6):
        pack(tmp_path / "pictures", out, seed, labelled=labelled)
        truth = images.read_labels(out / f"{TRAIN}-labels.h5")
        assert {truth.classes[label] for label in truth.labels} == {*CLASSES, "rare"}


def test_where_no_class_is_rare_pool_and_labels_are_the_first_of_the_draw(tmp_path, out):
    write_folder(tree(0, 12, 4), tmp_path / "pictures")
    pack(tmp_path / "pictures", out, labelled=12, unlabelled=20)
    found = sources.entries(dataset(tmp_path / "pictures"))
    listed = listing.create((entry for entry in found if entry.split == TRAIN), tmp_path, 0)
    drawn = [listed.key(row) for row in listed.in_drawn_order()]
    assert keys(out)[POOL] == sorted(drawn[:20]) and keys(out)[TRAIN] == sorted(drawn[20:32])


def test_a_pool_of_nearly_one_grey_is_warned_of(tmp_path, out, caplog):
    rows = np.random.default_rng(0).integers(0, 4000, (12, 16, 16)).astype(np.uint16)
    (tmp_path / "pictures").mkdir()
    for number, pixels in enumerate(rows):  # 12 of 16 bits
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{number}.tif")
    pack(tmp_path / "pictures", out)
    assert "nearly all of one grey" in caplog.text and "`levels`" in caplog.text
    caplog.clear()
    for number, pixels in enumerate(rows):
        Image.fromarray(16 * pixels).save(tmp_path / "pictures" / f"{number}.tif")
    pack(tmp_path / "pictures", out)
    assert "one grey" not in caplog.text


def test_a_pool_that_takes_all_of_train_is_halved(tmp_path, out):
    pack(write_folder(tree(0, 10, 3), tmp_path / "labelled"), out, unlabelled=30)
    assert [len(packs(out)[split]) for split in (POOL, TRAIN)] == [15, 15]


def test_folders_of_the_pool_are_no_classes_where_train_has_none(tmp_path, out):
    pack(write_folder(tree(12, 0, 0), tmp_path / "years"), out)
    found = images.read_labels(out / f"{POOL}-labels.h5")
    assert found.classes == [] and (found.labels == -1).all()


def test_only_chosen_files_are_read(root, out):
    (root / "test" / "apple" / "zzz.png").write_bytes(b"broken")
    seen = 0
    for seed in range(6):
        try:
            pack(root, out, seed=seed, test=5)
        except DataError:
            seen += 1
    assert 0 < seen < 6


def test_names_sort_as_their_characters_and_are_drawn_by_a_hash_of_seed_and_name(tmp_path):
    names = ["a.png", "a.png.png", "a0.png", "Z.png", "zebra.png", "\u00e9.png", "\uffee.png"]
    names += ["\U0001f600.png", *(f"{number}.png" for number in range(30))]
    place = write_folder(dict.fromkeys(names, encoded(picture(0, 0))), tmp_path / "pictures")
    listed = listing.create(sources.entries(dataset(place)), tmp_path / "listed", 7)
    rows = np.arange(len(names))[::-1].copy()
    assert listed.keys(listed.in_key_order(rows)) == sorted(names)
    # Another hash, or another part of it, would be another subset for every earlier run.
    drawn = sorted(names, key=lambda name: blake2b(f"7 {name}".encode(), digest_size=16).digest())
    assert listed.keys(listed.in_drawn_order()) == drawn


# ---------------------------------------------------------------------------- copies


def test_copies_of_test_pictures_are_left_out_of_pool_and_train(root, out):
    copies = [encoded(picture(label, 2000), "BMP") for label in range(3)]  # stand in test as PNG
    for row, payload in enumerate(copies):
        (root / "train-unlabelled" / f"copy{row}.bmp").write_bytes(payload)
    (root / "train" / "cloud" / "copy.bmp").write_bytes(copies[2])
    for name in ("pool", "again"):
        (root / "train" / "bird" / f"{name}.bmp").write_bytes(encoded(picture(1, 0), "BMP"))
    report = pack(root, out)
    assert (report["left_out_of_pool"], report["left_out_of_train"]) == (3, 1)
    assert report["train_in_pool"] == 2  # of train, not of the pool
    found = packs(out)
    assert {split: len(pack) for split, pack in found.items()} == {POOL: 18, TRAIN: 14, TEST: 9}
    test = {image.tobytes() for image in found[TEST].images}
    for split in (POOL, TRAIN):
        assert not any("copy" in key for key in found[split].keys)
        assert not any(image.tobytes() in test for image in found[split].images)


# ---------------------------------------------------------------------------- bad files


BAD = {
    "cut.jpg": encoded(picture(0, 1, 64), "JPEG")[:-300],
    "page.jpg": b"<!DOCTYPE html><html></html>",
    "empty.png": b"",
    "small.png": encoded(np.zeros((5, 50), np.uint8)),
    "huge.png": encoded(np.zeros((1200, 1200), np.uint8)),
}


def test_bad_files_up_to_the_fraction_are_listed_and_left_out(root, out):
    write_folder(BAD, root / "train-unlabelled")
    (root / "train-unlabelled" / "named.jpg").write_bytes(encoded(picture(0, 99)))  # a PNG, is fine
    report = pack(root, out, max_bad_fraction=5 / 45)
    reasons = {entry["key"].rsplit("/")[-1]: entry["reason"] for entry in report["rejected"]}
    assert reasons.keys() == BAD.keys() and all(reasons.values())
    assert report["rejected_total"] == report["splits"][POOL]["rejected"] == 5
    assert report["splits"][POOL]["images"] == 19
    assert "train-unlabelled/named.jpg" in keys(out)[POOL]
    assert packs(out)[POOL].images.max() > 0


def test_more_bad_files_stop_the_step_and_leave_what_stood_there(root, out):
    pack(root, out)
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}
    write_folder(BAD, root / "train-unlabelled")
    with pytest.raises(DataError, match=r"5 of 44 .*\n  'train-unlabelled/cut.jpg'"):
        pack(root, out, max_bad_fraction=0.1)
    assert {name: (out / name).read_bytes() for name in os.listdir(out)} == before
    assert os.listdir(out.parent) == [out.name]


def test_damaged_members_of_a_zip_are_listed(tmp_path, out):
    files = {f"{row}.png": encoded(picture(0, row)) for row in range(12)}
    path = write_zip(files, tmp_path / "a.zip")
    raw = bytearray(path.read_bytes())
    place = raw.find(files["5.png"]) + 60
    raw[place] ^= 255
    path.write_bytes(raw)
    report = pack(path, out, max_bad_fraction=0.1)
    assert [entry["key"] for entry in report["rejected"]] == ["5.png"]
    assert "CRC" in report["rejected"][0]["reason"]


def test_members_that_lead_out_are_listed_without_stopping(tmp_path, out):
    files = {f"{row}.png": encoded(picture(0, row)) for row in range(12)}
    files["../../evil.png"] = files["0.png"]
    report = pack(write_tar(files, tmp_path / "a.tar"), out)
    assert report["rejected"] == [
        {"key": "../../evil.png", "reason": "its name leads out of the archive"}
    ]
    assert report["splits"][POOL]["images"] == 12


@pytest.mark.parametrize("number", [0, 1, 9])
def test_too_few_pictures_are_an_error_before_any_work(tmp_path, out, number):
    files = {f"{row}.png": encoded(picture(0, row)) for row in range(number)} | {"a.txt": b"x"}
    with pytest.raises(DataError, match=f"at least 10 images .* found {number}; 1 other files"):
        pack(write_folder(files, tmp_path / "few"), out)
    assert not out.parent.exists()


def test_too_few_that_can_be_read_are_an_error_too(tmp_path, out):
    files = {f"{row}.png": encoded(picture(0, row)) for row in range(9)} | {"bad.png": b"bad"}
    with pytest.raises(DataError, match="at least 10 images"):
        pack(write_folder(files, tmp_path / "few"), out, max_bad_fraction=1)
    assert not out.exists()


def test_a_disk_that_is_too_small_is_told_before_any_work(root, out, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(ResourceError, match="bytes are needed"):
        pack(root, out)
    assert not out.exists()


def test_large_pictures_as_jpegs_are_not_taken_for_larger_than_they_are(root, out, monkeypatch):
    place, needed = out.parent, []
    monkeypatch.setattr(ingest.step, "check_space", lambda path, number: needed.append(number))
    for size in (64, 255):
        ingest._check_space(place, place, 1000, dataset(root, size=size, storage="jpeg"))
    assert 1.0 < needed[0] / (2 * 1000 * 64**2) < 1.5
    assert 0.5 < needed[1] / (2 * 1000 * 255**2) < 0.8


# ---------------------------------------------------------------------------- the command


def command(place, output, **changes) -> list[str]:
    dataset = json.dumps(DEFAULTS | {"path": str(place)} | changes)
    return [
        *(sys.executable, "-m", "kt.ingest", "--dataset", dataset),
        *("--output", str(output), "--seed", "0", "--threads", "1"),
    ]


@pytest.mark.parametrize(
    ("changes", "code"), [({}, 0), ({"path": "/no/such"}, 3), ({"size": "no"}, 2), ({"sice": 3}, 2)]
)
def test_the_command_ends_with_the_promised_code_and_no_traceback(root, out, changes, code):
    done = subprocess.run(command(root, out, **changes), capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert (out / "report.json").exists() == (code == 0)


def test_the_command_imports_no_torch(root, out):
    code = (
        "import sys, runpy\nsys.argv = sys.argv[1:]\n"
        "try: runpy.run_module('kt.ingest', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'sklearn', 'matplotlib'} & set(sys.modules)"
    )
    arguments = ["kt.ingest", *command(root, out)[3:]]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_killed_run_leaves_whole_tables_or_none(tmp_path, out):
    files = {f"{row}.png": encoded(picture(row % 3, row, 200)) for row in range(150)}
    place = write_folder(files, tmp_path / "many")
    for seconds in (0.3, 0.5, 0.7):
        process = subprocess.Popen(command(place, out, size=128), stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for path in out.glob("*.h5"):
            assert table.digest(path) != "none"
        if (out / "report.json").exists():
            assert len(packs(out)[POOL]) == 150
