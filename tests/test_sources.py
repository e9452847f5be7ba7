import errno
import gzip
import hashlib
import io
import math
import os
import struct
import tarfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from drawing import (
    CLASSES,
    encoded,
    picture,
    tree,
    write_folder,
    write_shards,
    write_tar,
    write_zip,
)

from kt import config, ingest
from kt.core import listing
from kt.core.layouts import POOL, TEST, TRAIN
from kt.core.step import ConfigError, DataError
from kt.sources import archive, fashion_mnist, folder, pictures
from kt.sources import torchvision as torchvision_source

PNG = encoded(picture(0, 0))
FEW = {"1.png": PNG}


def dataset(source: str, path, **changes) -> config.Dataset:
    values = {"source": source, "path": path and str(path), "size": 16, "unlabelled": None}
    values |= {"labelled": None, "test": None, "max_bad_fraction": 0.0, "max_pixels": 10_000}
    values |= {"near_copies": None, "storage": "pixels"}
    return config.Dataset(**(values | changes))


def counted(path, enough=math.inf, **changes) -> tuple[int, bool]:
    return pictures.count_pictures(dataset("pictures", path, **changes), enough)


def listed(path, source=pictures) -> dict[str, tuple[str, str | None]]:
    found = list(source.entries(dataset("pictures", path)))
    return {entry.key: (entry.split, entry.class_name) for entry in found if entry.usable}


def refused(path, source=pictures) -> dict[str, str]:
    found = source.entries(dataset("pictures", path))
    return {entry.key: entry.refused for entry in found if entry.refused}


def ignored(path) -> set[str]:
    found = pictures.entries(dataset("pictures", path))
    return {entry.key for entry in found if entry.ignored}


# ---------------------------------------------------------------------------- folder names


def test_folder_names_give_splits_and_classes(tmp_path):
    files = tree(2, 1, 1) | {"train-unlabelled/loose.png": PNG}
    found = listed(write_folder(files, tmp_path))
    assert found.keys() == files.keys()
    assert found["train/bird/000.png"] == (TRAIN, "bird")
    assert found["test/cloud/000.png"] == (TEST, "cloud")
    assert found["train-unlabelled/apple/001.png"] == (POOL, "apple")
    assert found["train-unlabelled/loose.png"] == (POOL, None)


def test_the_splits_may_stand_below_common_folders(tmp_path):
    files = {f"my data/v2/{name}": payload for name, payload in tree(1, 1, 1).items()}
    found = listed(write_folder(files, tmp_path))
    assert found["my data/v2/train/bird/000.png"] == (TRAIN, "bird")


def test_without_split_names_everything_is_unlabelled(tmp_path):
    files = {"a.png": PNG, "2019/holiday/b.JPG": PNG, "2020/c.jpeg": PNG}
    found = listed(write_folder(files, tmp_path))
    assert found == dict.fromkeys(files, (POOL, None))


def test_a_disks_own_folders_may_be_closed_and_others_not(tmp_path, monkeypatch):
    write_folder({"a/one.png": PNG, "lost+found/x.png": PNG, ".Trashes/x.png": PNG}, tmp_path)
    real, closed = os.listdir, {"lost+found", ".Trashes"}

    def listdir(path):
        if Path(path).name in closed:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)
    assert set(listed(tmp_path)) == {"a/one.png"}
    closed.add("a")
    with pytest.raises(DataError, match="cannot list the folder 'a': Permission denied"):
        listed(tmp_path)


def test_hidden_files_and_other_suffixes_are_only_counted(tmp_path):
    others = {".hidden/a.png", "._a.png", "__MACOSX/a.png", "b.txt", "Thumbs.db", "noname"}
    write_folder(dict.fromkeys(others, PNG) | {"a.png": PNG}, tmp_path)
    assert ignored(tmp_path) == others
    assert set(listed(tmp_path)) == {"a.png"}


def test_pictures_beside_the_splits_are_refused_by_name(tmp_path):
    write_folder(tree(1, 1, 1) | {"cover.png": PNG, "val/bird/1.png": PNG}, tmp_path)
    found = refused(tmp_path)
    assert found.keys() == {"cover.png", "val/bird/1.png"}
    assert "stands outside train-unlabelled/, train/, test/" in found["val/bird/1.png"]


@pytest.mark.parametrize(
    "pool, train, test",
    [
        ("unlabeled", "train", "test"),
        ("train_unlabeled", "Train", "val"),
        ("Unlabelled", "training", "Test"),
    ],
)
def test_other_usual_names_of_the_splits_will_do(tmp_path, pool, train, test):
    names = {"train-unlabelled": pool, "train": train, "test": test}
    files = {}
    for name, payload in tree(2, 2, 2).items():
        top, _, rest = name.partition("/")
        files[f"{names[top]}/{rest}"] = payload
    found = listed(write_folder(files, tmp_path))
    splits = {key.partition("/")[0]: split for key, (split, _) in found.items()}
    assert splits == {pool: POOL, train: TRAIN, test: TEST}


def test_other_names_count_only_for_a_train_and_a_test_together(tmp_path):
    write_folder({"val/bird/1.png": PNG, "extra/1.png": PNG}, tmp_path)
    assert {split for split, _ in listed(tmp_path).values()} == {POOL}


def test_splits_that_other_pictures_stand_beside_are_told(tmp_path, caplog):
    files = {f"v1/{name.capitalize()}": payload for name, payload in tree(1, 1, 1).items()}
    found = listed(write_folder(files | {"preview.jpg": PNG}, tmp_path))
    assert {split for split, _ in found.values()} == {POOL}
    assert "folders train and test further down" in caplog.text


def test_what_is_not_read_is_said_with_its_endings_and_reasons(tmp_path):
    for name in ("1.heic", "2.HEIC", "3"):
        (tmp_path / name).touch()
    (tmp_path / "4.png").symlink_to("/etc/hostname")
    said = pictures.unread(str(tmp_path))
    assert "2: no pictures that are known, .heic" in said and "without an ending" in said
    assert "1: a link that leads out of the folder" in said


def test_folders_and_archives_that_changed_are_known(tmp_path):
    write_folder({"a/1.png": PNG, "b/2.png": PNG}, tmp_path / "all")
    late = time.time() + 10
    assert not pictures.changed_since(str(tmp_path / "all"), late)
    os.utime(tmp_path / "all" / "b", (late + 1, late + 1))  # as when a file comes or goes
    assert pictures.changed_since(str(tmp_path / "all"), late)
    (tmp_path / "all.zip").write_bytes(b"")
    assert not pictures.changed_since(str(tmp_path / "all.zip"), late)
    os.utime(tmp_path / "all.zip", (late + 1, late + 1))
    assert pictures.changed_since(str(tmp_path / "all.zip"), late)


@pytest.mark.parametrize("name", ["all", "all.zip"])
def test_an_older_folder_or_archive_that_took_the_place_is_known(tmp_path, name):
    (tmp_path / "old").mkdir()
    for place in (tmp_path / "old" / name, tmp_path / name):
        write_folder({"1.png": PNG}, place) if name == "all" else write_zip(FEW, place)
        os.utime(place, (1e9, 1e9))
    packed = time.time() + 0.05
    time.sleep(0.1)
    assert not pictures.changed_since(str(tmp_path / name), packed)
    (tmp_path / name).rename(tmp_path / "away")
    (tmp_path / "old" / name).rename(tmp_path / name)
    assert pictures.changed_since(str(tmp_path / name), packed)


@pytest.mark.parametrize("missing", ["train", "test"])
def test_one_labelled_split_without_the_other_is_an_error(tmp_path, missing):
    files = {
        name: data for name, data in tree(1, 1, 1).items() if not name.startswith(missing + "/")
    }
    with pytest.raises(DataError, match=f"found none in {missing}/CLASS/"):
        listed(write_folder(files, tmp_path))


def test_a_class_in_only_one_split_is_named(tmp_path):
    write_folder(tree(1, 1, 1) | {"test/yak/1.png": PNG}, tmp_path)
    with pytest.raises(DataError, match="1 stand in only one of them: 'yak'"):
        listed(tmp_path)


def test_one_class_alone_is_an_error(tmp_path):
    write_folder({"train/yak/1.png": PNG, "test/yak/1.png": PNG}, tmp_path)
    with pytest.raises(DataError, match="at least two classes"):
        listed(tmp_path)


def test_a_labelled_picture_without_class_folder_is_refused(tmp_path):
    write_folder(tree(1, 1, 1) | {"train/loose.png": PNG}, tmp_path)
    assert "folder of a class" in refused(tmp_path)["train/loose.png"]


def test_a_file_larger_than_any_allowed_picture_is_not_read(tmp_path):
    (tmp_path / "big.bmp").touch()
    os.truncate(tmp_path / "big.bmp", 1 << 40)  # sparse
    assert "bytes, more than" in refused(tmp_path)["big.bmp"]


# ---------------------------------------------------------------------------- folder


def test_links_are_followed_only_to_files_inside(tmp_path):
    root = write_folder({"a/real.png": PNG}, tmp_path / "root")
    write_folder({"secret.png": PNG}, tmp_path / "outside")
    (root / "inside.png").symlink_to(root / "a" / "real.png")
    (root / "outside.png").symlink_to(tmp_path / "outside" / "secret.png")
    (root / "broken.png").symlink_to("nowhere.png")
    (root / "a" / "loop").symlink_to(root)
    (root / "other").symlink_to(tmp_path / "outside")
    assert set(listed(root)) == {"a/real.png", "inside.png"}
    assert refused(root).keys() == {"outside.png", "broken.png", "a/loop", "other"}


def test_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert refused(tmp_path) == {"pipe.png": "no regular file"}


def test_odd_names_become_clean_unique_keys(tmp_path):
    names = [
        "a;b.png",
        "$(touch x).png",
        "new\nline.png",
        "<script>.png",
        "x" * 251 + ".png",
        "ü.png",
    ]
    write_folder(dict.fromkeys(names, PNG), tmp_path)
    for odd in (b"\xff.png", b"\xfe.png"):
        (tmp_path / os.fsdecode(odd)).write_bytes(PNG)
    found = listed(tmp_path)
    assert len(found) == 8 and set(names) < set(found)
    assert all(key.encode("utf-8") and "\0" not in key for key in found)


def test_each_file_is_read_with_its_own_bytes(tmp_path):
    files = tree(3, 2, 2)
    places = [
        write_folder(files, tmp_path / "folder"),
        write_zip(files, tmp_path / "a.zip"),
        write_tar(files, tmp_path / "a.tar"),
        write_tar(files, tmp_path / "a.tgz", "w:gz"),
    ]
    for place in places:
        found = pictures.entries(dataset("pictures", place))
        assert {entry.key: entry.read() for entry in found} == files
        assert pictures.origin(dataset("pictures", place))


# ---------------------------------------------------------------------------- archive


def _evil_tar(path):
    write_tar({"ok.png": PNG, "../../up.png": PNG, "/etc/abs.png": PNG, "a/../b.png": PNG}, path)
    with tarfile.open(path, "a") as file:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo(f"odd{kind.decode()}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            file.addfile(member)
    return path


def test_a_tars_links_devices_and_leading_out_names_are_refused_and_listed(tmp_path):
    path = _evil_tar(tmp_path / "evil.tar")
    assert set(listed(path)) == {"ok.png"}
    found = refused(path)
    assert {"../../up.png", "/etc/abs.png", "a/../b.png"} < found.keys()
    assert len(found) == 7
    assert sorted(os.listdir(tmp_path)) == ["evil.tar"]


def test_a_zips_links_and_leading_out_names_are_refused_and_listed(tmp_path):
    path = write_zip(
        {"ok.png": PNG, "../up.png": PNG, "/abs.png": PNG, "C:\\x.png": PNG}, tmp_path / "z"
    )
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(link, "/etc/passwd")
    assert set(listed(path)) == {"ok.png"}
    assert refused(path).keys() == {"../up.png", "/abs.png", "C:\\x.png", "link.png"}


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_two_members_with_one_name_the_first_counts(tmp_path):
    path = write_zip({"a.png": PNG}, tmp_path / "twice.zip")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("a.png", b"other")
        file.writestr("./a.png", b"other")
    found = [entry for entry in pictures.entries(dataset("pictures", path)) if entry.usable]
    assert len(found) == 1
    assert len(refused(path)) == 1


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_a_tar_cut_anywhere_is_an_error(tmp_path, mode):
    files = {f"{number}.png": encoded(picture(0, number)) for number in range(12)}
    whole = write_tar(files, tmp_path / "whole", mode).read_bytes()
    # A tar ends with 10 KiB of padding, whose loss costs nothing.
    end = 12 * (512 + (len(PNG) // 512) * 512) if mode == "w" else len(whole)
    for share in np.linspace(0.02, 0.98, 25):
        cut = tmp_path / "cut"
        cut.write_bytes(whole[: int(share * end)])
        with pytest.raises(DataError, match="broken|neither"):
            listed(cut)


def test_a_zip_cut_off_and_a_file_that_is_no_archive_are_errors(tmp_path):
    whole = write_zip({"a.png": PNG}, tmp_path / "whole.zip").read_bytes()
    for payload in (whole[:-30], whole[:40], b"", PNG, b"<html>"):
        (tmp_path / "cut.zip").write_bytes(payload)
        with pytest.raises(DataError, match="broken|neither"):
            listed(tmp_path / "cut.zip", archive)


# ---------------------------------------------------------------------------- pictures


def test_counting_gives_the_pool_and_whether_there_are_labels(tmp_path):
    full, pool, none = tree(5, 2, 3), tree(4, 0, 0), tree(0, 4, 2)
    assert counted(write_folder(full, tmp_path / "a")) == (15, True)
    assert counted(write_zip(full, tmp_path / "a.zip")) == (15, True)
    assert counted(write_tar(pool, tmp_path / "a.tar")) == (12, False)
    assert counted(write_folder(none, tmp_path / "b")) == (6, True)


@pytest.mark.parametrize(
    "limits, number",
    [
        ({}, 6), ({"unlabelled": 8}, 8), ({"unlabelled": 12}, 6), ({"labelled": 10}, 2),
        ({"labelled": 12}, 6), ({"labelled": 50}, 6), ({"labelled": 11}, 1),
        ({"unlabelled": 3, "labels": "folders"}, 3),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_what_is_taken_of_train_counts_as_ingest_takes_it(tmp_path, kind, limits, number):
    files = tree(0, 4, 2)  # twelve and six
    if "labels" in limits:
        files = {name.replace("test/", "train/more-"): files[name] for name in files}
    place = (write_folder if kind == "folder" else write_shards)(files, tmp_path / "all")
    if kind == "tars" and "labels" in limits:
        with pytest.raises(ConfigError, match="labels: tar shards"):
            counted(place, **limits)
        return
    given = dataset("pictures", place, **limits)
    assert counted(place, **limits) == (number, True)
    listed_ = listing.create(pictures.entries(given), tmp_path, 0)
    assert (ingest.choose(listed_, given) == 0).sum() == number


LINK = "mend or remove what is there"


@pytest.mark.parametrize("labels", [None, "folders"])
def test_labelled_folders_of_which_nothing_can_be_read_are_not_passed_over(
    tmp_path, labels, caplog
):
    write_folder(tree(4, 3, 3), tmp_path / "there")
    root, there = write_folder(tree(4, 0, 0), tmp_path / "all"), tmp_path / "there"
    if labels is None:
        for split in (TRAIN, TEST):
            (root / split).symlink_to(there / split)
        with pytest.raises(DataError, match=f"pictures in test/ and train/, found none .*{LINK}"):
            listed(root)
        (root / "README").symlink_to(there)  # what is no split changes nothing
        with pytest.raises(DataError, match="pictures in test/ and train/, found none"):
            listed(root)
        (root / TRAIN).unlink()
        with pytest.raises(DataError, match="pictures in train/, found none that can"):
            (root / TEST).unlink()
            write_folder(tree(0, 0, 3), root)
            for name in CLASSES:
                (root / TRAIN / name).mkdir(parents=True)
                (root / TRAIN / name / "1.png").symlink_to(there / TRAIN / name / "000.png")
            listed(root)
        assert not caplog.text
    for name in CLASSES:  # a class that is a link, beside those that are there
        split = "" if labels else f"{TRAIN}/"
        write_folder({f"{split}{name}/{i}.png": PNG for i in range(4)}, tmp_path / "more")
    if labels is None:
        write_folder(tree(0, 0, 3), tmp_path / "more")
        (tmp_path / "more" / TEST / "owl").symlink_to(there / TEST / CLASSES[0])
    (tmp_path / "more" / split / "owl").symlink_to(there / TRAIN / CLASSES[0])
    list(pictures.entries(dataset("pictures", tmp_path / "more", labels=labels)))
    assert "no picture can be read in" in caplog.text and "owl/" in caplog.text


def test_of_splits_with_other_names_the_one_that_cannot_be_read_is_named(tmp_path, caplog):
    files = {name.replace("train/", "Training/"): data for name, data in tree(0, 3, 0).items()}
    root = write_folder(files, tmp_path / "all" / "data")
    (root / "validation").symlink_to(tmp_path)
    (root / "Training" / "notes.txt").symlink_to(root / "Training" / "gone.txt")
    with pytest.raises(DataError, match="labelled pictures in validation/, found none that can"):
        listed(tmp_path / "all")
    (root / "validation").unlink()
    write_folder({f"validation/{name}/1.png": PNG for name in CLASSES}, root)
    listed(tmp_path / "all")
    assert not caplog.text
    (root / "Training" / "v1.0").symlink_to(root / "Training" / CLASSES[0])
    listed(tmp_path / "all")
    assert "1 folders of classes: Training/v1.0/" in caplog.text


def test_second_links_in_a_tar_are_told_and_labels_are_not_lost_with_them(tmp_path):
    root = write_folder(tree(4, 3, 3), tmp_path / "all")
    pool, train = (sorted((root / split).rglob("*.png")) for split in (POOL, TRAIN))
    for path, first in zip(train, pool[: len(train)], strict=True):
        path.unlink()
        os.link(first, path)
    with tarfile.open(tmp_path / "all.tar", "w") as file:
        for name in (POOL, TRAIN, TEST):
            file.add(root / name, name)
    with pytest.raises(DataError, match="9: a second link to a file, .*in train/, found none"):
        listed(tmp_path / "all.tar")


def test_zips_of_other_systems_keep_folders_and_letters(tmp_path):
    files = tree(4, 3, 3)
    wanted = listed(write_zip(files, tmp_path / "a.zip"))
    windows = {name.replace("/", "\\"): files[name] for name in files}
    assert listed(write_zip(windows, tmp_path / "b.zip")) == wanted
    letters = {name.replace("apple", "\u00e4pfel"): files[name] for name in files}
    write_zip(letters, tmp_path / "c.zip")
    content = bytearray((tmp_path / "c.zip").read_bytes())
    assert content.count("\u00e4pfel".encode()) == 20  # locally and in the index
    for mark, place in ((b"PK\x03\x04", 7), (b"PK\x01\x02", 9)):  # as if it were another code
        at = content.find(mark)
        while at >= 0:
            content[at + place] &= ~8
            at = content.find(mark, at + 1)
    (tmp_path / "c.zip").write_bytes(content)
    assert "\u00e4pfel" in {name for _, name in listed(tmp_path / "c.zip").values()}


def test_folders_that_systems_make_are_passed_over_and_letters_may_be_written_in_two_ways(tmp_path):
    files = tree(4, 3, 3) | {f"{TRAIN}/apple/@eaDir/1.png": PNG, "$RECYCLE.BIN/x/2.png": PNG}
    one, two = "cafe\u0301", "caf\u00e9"
    files |= {f"{TRAIN}/{one}/1.png": PNG, f"{TEST}/{two}/1.png": PNG}
    found = listed(write_folder(files, tmp_path))
    assert len(found) == len(files) - 2
    assert {name for split, name in found.values() if split != POOL} == {*CLASSES, two}


def test_labels_are_told_by_names_and_published_sets_have_them(tmp_path):
    full, pool = (write_folder(tree(5, n, n), tmp_path / str(n)) for n in (2, 0))

    def told(source: str, path) -> bool:
        return pictures.has_labels(dataset(source, path))

    assert told("pictures", str(full)) and not told("folder", str(pool))
    assert told("fashion_mnist", None) and told("folder", str(tmp_path / "none"))


@pytest.mark.parametrize("labelled", [True, False])
def test_a_source_of_yours_may_say_whether_it_has_labels(monkeypatch, labelled):
    source = SimpleNamespace(has_labels=lambda dataset: dataset.path == "with")
    monkeypatch.setattr(pictures, "plugin", lambda kind, name: source)
    path = "with" if labelled else "without"
    assert pictures.has_labels(SimpleNamespace(source="mine", path=path)) is labelled


def test_a_missing_path_is_an_error_of_the_configuration(tmp_path):
    with pytest.raises(ConfigError, match="no such place"):
        counted(tmp_path / "no such place")
    (tmp_path / "a.png").write_bytes(PNG)
    with pytest.raises(DataError, match="expected a folder, a zip or a tar"):
        counted(tmp_path / "a.png")


@pytest.mark.parametrize("source", [folder, archive, pictures])
@pytest.mark.parametrize("path", [None, "/no/such/place"])
def test_a_source_without_its_path_is_an_error_of_the_data(source, path):
    with pytest.raises(DataError, match="expected a"):
        list(source.entries(dataset("pictures", path)))


# ---------------------------------------------------------------------------- Fashion-MNIST


@pytest.fixture
def small_fashion(tmp_path, monkeypatch):
    """Writes a small set in Fashion-MNIST's format and makes it the true one."""
    place, random = tmp_path / "fashion", np.random.default_rng(0)
    place.mkdir()
    digests = {}
    for stem, number in (("train", 30), ("t10k", 20)):
        labels = np.arange(number, dtype=np.uint8) % 10
        images = np.full((number, 28, 28), labels[:, None, None] * 20, np.uint8)
        images[:, :4] = random.integers(0, 256, (number, 4, 28))
        contents = {
            f"{stem}-images-idx3-ubyte": struct.pack(">4I", 2051, number, 28, 28)
            + images.tobytes(),
            f"{stem}-labels-idx1-ubyte": struct.pack(">2I", 2049, number) + labels.tobytes(),
        }
        for name, content in contents.items():
            (place / f"{name}.gz").write_bytes(gzip.compress(content))
            digests[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(fashion_mnist, "DIGESTS", digests)
    monkeypatch.setattr(fashion_mnist, "INSTALLED", tmp_path / "not installed")
    monkeypatch.setenv("KT_DATA", str(tmp_path / "cache"))
    fashion_mnist._load.cache_clear()
    yield place
    fashion_mnist._load.cache_clear()


def _offline(*_, **__):
    raise OSError("no network in tests")


def test_fashion_mnist_pairs_pictures_with_class_names(small_fashion):
    found = list(fashion_mnist.entries(dataset("fashion_mnist", small_fashion)))
    assert [entry.split for entry in found].count(TRAIN) == 30 and len(found) == 50
    assert found[3].key == "train/00003" and found[3].class_name == "Dress"
    for entry in found:
        image = entry.read()
        assert image.shape == (28, 28) and image.dtype == np.uint8
        assert fashion_mnist.CLASSES[image[20, 20] // 20] == entry.class_name


def test_fashion_mnist_with_other_content_is_refused(small_fashion):
    name = "train-labels-idx1-ubyte.gz"
    (small_fashion / name).write_bytes(gzip.compress(b"not the labels"))
    with pytest.raises(DataError, match=f"{name} is not the true file: expected SHA-256"):
        list(fashion_mnist.entries(dataset("fashion_mnist", small_fashion)))


def test_fashion_mnist_with_a_file_missing_or_cut_is_refused(small_fashion):
    path = small_fashion / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a whole .gz"):
        list(fashion_mnist.entries(dataset("fashion_mnist", small_fashion)))
    path.unlink()
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte.gz is missing"):
        list(fashion_mnist.entries(dataset("fashion_mnist", small_fashion)))


def test_fashion_mnist_from_the_mirror_is_kept_in_the_cache(small_fashion, monkeypatch):
    def answer(url, timeout):
        assert 0 < timeout <= 10
        return io.BytesIO((small_fashion / url.rsplit("/", 1)[1]).read_bytes())

    monkeypatch.setattr("urllib.request.urlopen", answer)
    assert len(list(fashion_mnist.entries(dataset("fashion_mnist", None)))) == 50
    fashion_mnist._load.cache_clear()
    monkeypatch.setattr("urllib.request.urlopen", _offline)
    monkeypatch.setattr("subprocess.run", _offline)
    assert len(list(fashion_mnist.entries(dataset("fashion_mnist", None)))) == 50
    assert "cache" in fashion_mnist.origin(dataset("fashion_mnist", None))["place"]


def test_fashion_mnist_from_nowhere_lists_each_place_and_what_to_do(small_fashion, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", _offline)
    monkeypatch.setattr("subprocess.run", _offline)
    with pytest.raises(DataError) as caught:
        list(fashion_mnist.entries(dataset("fashion_mnist", None)))
    for part in ("the cache", "installed", "mirror", "Debian", "no network", "`path`"):
        assert part in str(caught.value)


# ---------------------------------------------------------------------------- torchvision


class _FakeCifar:
    """Stands for torchvision's CIFAR10: there only after a download."""

    classes = list(CLASSES)
    there = False

    def __init__(self, folder, train, download=False):
        type(self).there |= download
        if not self.there:
            raise RuntimeError("Dataset not found")
        self.targets = [0, 1, 2] * (4 if train else 2)
        self.data = np.stack([picture(label, 0) for label in self.targets])


def test_torchvision_sets_are_downloaded_when_missing_and_read(monkeypatch):
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", _FakeCifar)
    found = list(torchvision_source.entries(dataset("torchvision", "CIFAR10:somewhere")))
    assert [entry.split for entry in found] == [TRAIN] * 12 + [TEST] * 6
    assert len({entry.key for entry in found}) == 18
    for entry in found:
        expected = picture(CLASSES.index(entry.class_name), 0)
        assert np.array_equal(entry.read(), expected)


def test_torchvision_stl10_keeps_its_unlabelled_split_and_channel_order(monkeypatch):
    torchvision = pytest.importorskip("torchvision")

    class Stl10:
        classes = list(CLASSES)

        def __init__(self, folder, split, download):
            self.labels = np.array([-1] if split == "unlabeled" else [2])
            self.data = picture(2, 0).transpose(2, 0, 1)[None]

    monkeypatch.setattr(torchvision.datasets, "STL10", Stl10)
    found = list(torchvision_source.entries(dataset("torchvision", "STL10:somewhere")))
    assert [(entry.split, entry.class_name) for entry in found] == [
        (POOL, None),
        (TRAIN, "cloud"),
        (TEST, "cloud"),
    ]
    assert np.array_equal(found[0].read(), picture(2, 0))


def test_torchvision_imagenette_is_read_from_its_files(tmp_path):
    pytest.importorskip("torchvision")
    names = ("n01440764", "n02102040")
    files = {f"{split}/{name}/1.JPEG": PNG for split in ("train", "val") for name in names}
    write_folder(files, tmp_path / "imagenette2-160")
    found = list(torchvision_source.entries(dataset("torchvision", f"Imagenette:{tmp_path}")))
    assert [entry.class_name for entry in found] == ["tench", "English springer"] * 2
    assert [entry.split for entry in found] == [TRAIN, TRAIN, TEST, TEST]
    assert found[0].read() == PNG


@pytest.mark.parametrize("path", [None, "CIFAR10", "MNIST:data", ":data"])
def test_an_unknown_torchvision_set_is_an_error_that_lists_the_known(path):
    with pytest.raises(DataError, match="CIFAR10, CIFAR100, STL10, Imagenette"):
        list(torchvision_source.entries(dataset("torchvision", path)))
