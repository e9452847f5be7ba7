"""Folders of tar shards as a source: every layout, the index, parts, and what is refused."""

import argparse
import tarfile
from collections import Counter

import pytest
from drawing import encoded, picture, tree, write_folder, write_shards, write_tar
from test_sources import PNG, counted, dataset, refused

from kt import ingest
from kt.core import table
from kt.core.layouts import POOL, SPLITS
from kt.core.parts import Part
from kt.core.step import DataError
from kt.sources import folder, pictures, tars

FILES = tree(6, 4, 3)


def found(path, source=pictures) -> Counter:
    """Gives how often each split, class and content stands there; the pool's class is no matter."""
    listed = source.entries(dataset("pictures", path))
    usable = [(one.split, one.class_name, one.read()) for one in listed if one.usable]
    return Counter((split, split != POOL and kind, data) for split, kind, data in usable)


def split_folders(root):
    """Shards in the folders of splits, classes as folders inside them."""
    for split in SPLITS:
        (root / split).mkdir(parents=True)
        names = [name for name in FILES if name.startswith(split + "/")]
        write_tar({name.partition("/")[2]: FILES[name] for name in names}, root / split / "0.tar")
    return root


def inside(root):
    """A folder's tree cut into tars, wherever they end."""
    root.mkdir()
    names = sorted(FILES)
    for number in range(4):
        write_tar({name: FILES[name] for name in names[number::4]}, root / f"{number}.tar")
    return root


@pytest.mark.parametrize("layout", [lambda root: write_shards(FILES, root), split_folders, inside])
def test_every_layout_gives_the_splits_classes_and_bytes_of_the_folder(tmp_path, layout):
    wanted = found(write_folder(FILES, tmp_path / "folder"), folder)
    place = layout(tmp_path / "tars")
    assert found(place) == found(place, tars) == wanted and wanted.total() == len(FILES)
    pool = sum(name.startswith(POOL) for name in FILES)
    assert counted(place) == (pool, True)


def test_without_any_word_all_is_pool_and_samples_of_two_shards_are_two(tmp_path):
    (tmp_path / ".hidden").mkdir()
    for name in ("a", "b"):
        write_tar({"000.png": PNG, "000.cls": b"5", "000.json": b"{}"}, tmp_path / f"{name}.tar")
    listed = list(pictures.entries(dataset("pictures", tmp_path)))
    assert {one.key for one in listed if one.usable} == {f"{POOL}/{x}/000.png" for x in "ab"}
    assert {one.split for one in listed} == {POOL} and sum(one.ignored for one in listed) == 2


def test_train_without_a_pool_counts_half_and_labels_are_known_by_names(tmp_path):
    write_shards(tree(0, 8, 3), tmp_path)
    assert counted(tmp_path) == (12, True)


def test_a_tar_of_the_folder_of_its_split_has_the_classes_below(tmp_path):
    place = tmp_path / "tars"
    place.mkdir()
    for split in SPLITS:
        write_tar({n: FILES[n] for n in FILES if n.startswith(split + "/")}, place / f"{split}.tar")
    assert found(place) == found(write_folder(FILES, tmp_path / "folder"), folder)


def test_labels_are_known_where_one_tar_has_splits_inside(tmp_path):
    for name, wanted in (("photos", POOL), ("train", "train"), ("test", "test")):
        files = {n: FILES[n] for n in FILES if n.startswith(wanted + "/")}
        write_tar(files, tmp_path / f"{name}.tar")
    number, labelled = counted(tmp_path)
    assert labelled and number == sum(name.startswith(POOL) for name in FILES)


def test_a_link_to_no_tar_and_tars_beside_other_folders_are_told(tmp_path):
    (tmp_path / "val").mkdir()
    write_shards(FILES, tmp_path)
    assert "are not read" in tars.unread(tmp_path)
    (tmp_path / "val").rmdir()
    assert tars.unread(tmp_path) == ""
    (tmp_path / "zz.tar").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match="zz.tar: expected a tar, found a link to nothing"):
        found(tmp_path)


def test_counting_ends_where_there_are_enough(tmp_path, monkeypatch):
    place, read = write_shards(FILES, tmp_path), []
    listed = tars._listed
    monkeypatch.setattr(tars, "_listed", lambda shard: read.append(shard) or listed(shard))
    assert counted(place, 10) == (14, True)  # two shards of seven
    assert len(read) == 2


# ---------------------------------------------------------------------------- what is refused


def test_names_that_lead_out_and_links_are_refused_and_listed(tmp_path):
    path = write_tar({"ok.png": PNG, "../up.png": PNG, "/abs.png": PNG}, tmp_path / "a.tar")
    with tarfile.open(path, "a") as file:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    assert found(tmp_path).total() == 1
    reasons = refused(tmp_path)
    assert len(reasons) == 3 and sum("leads out" in reason for reason in reasons.values()) == 2


@pytest.mark.parametrize("label", [b"", b"../up", b".hidden", b"a\0b"])
def test_a_label_that_is_no_name_is_refused_and_a_sample_without_one(tmp_path, label):
    write_shards(tree(1, 2, 2), tmp_path)
    write_tar({"0.png": PNG, "0.cls": label, "1.png": PNG}, tmp_path / "more-train.tar")
    reasons = sorted(refused(tmp_path).values())
    assert len(reasons) == 2 and "its .cls is no name of a class" in reasons[0]
    assert "without the folder of a class" in reasons[1]


def test_a_broken_or_compressed_tar_and_two_test_sets_are_errors(tmp_path):
    whole = write_tar({"a.png": PNG, "b.png": PNG}, tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: 512 + 700])
    with pytest.raises(DataError, match=r"a.tar is broken or cut off"):
        found(tmp_path)
    (tmp_path / "a.tar").write_bytes(whole)
    write_tar({"a.png": PNG}, tmp_path / "b.tar.gz", "w:gz")
    with pytest.raises(DataError, match="plain tars"):
        found(tmp_path)
    (tmp_path / "b.tar.gz").unlink()
    for name in ("x-val-0.tar", "x-test-0.tar"):
        (tmp_path / name).write_bytes(whole)
    with pytest.raises(DataError, match="for test and for validation"):
        found(tmp_path)


def test_a_folder_of_pictures_with_a_stray_tar_stays_one(tmp_path):
    write_folder(FILES, tmp_path)
    write_tar({"a.png": PNG}, tmp_path / "train" / "backup.tar")
    write_tar({"a.png": PNG}, tmp_path / "backup.tar")
    assert not tars.are_at(tmp_path) and found(tmp_path).total() == len(FILES)
    (tmp_path / "loose").mkdir()
    write_tar({"a.png": PNG}, tmp_path / "loose" / "a.tar")
    (tmp_path / "loose" / "b.png").write_bytes(PNG)
    assert not tars.are_at(tmp_path / "loose")


def test_what_stands_aside_or_leads_nowhere_hides_no_shards(tmp_path):
    write_tar({"a.png": PNG}, tmp_path / "a.tar")
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "self").symlink_to("self")
    assert tars.are_at(tmp_path)


# ---------------------------------------------------------------------------- index and parts


def test_headers_are_read_once_and_again_where_a_tar_changed(tmp_path, monkeypatch):
    place, kept = write_shards(FILES, tmp_path / "tars"), tmp_path / "kept"
    kept.mkdir()
    read, listed = [], tars._listed
    monkeypatch.setattr(
        tars, "_listed", lambda shard: read.append(shard.path.name) or listed(shard)
    )
    wanted = dataset("tars", place)
    for part in (Part(2, 3), Part(1, 3)):
        source = tars.indexed(wanted, kept, part)
        assert found(place, source).total() == len(FILES)
    number = len(list(place.iterdir()))
    assert len(read) == number == len(list(kept.iterdir()))
    assert read[0] == sorted(read)[number // 3]  # a part begins with its own
    changed = place / "drawn-train-unlabelled-0000.tar"
    write_tar({"000000.png": encoded(picture(1, 77))}, changed)
    assert found(place, tars.indexed(wanted, kept)) != found(write_folder(FILES, tmp_path / "f"))
    assert read[number:] == [changed.name]


def test_a_damaged_index_is_made_anew(tmp_path):
    place = write_shards(FILES, tmp_path / "tars")
    wanted = found(place)
    for name in ("one", "two"):
        kept = tmp_path / name
        kept.mkdir()
        tars.indexed(dataset("tars", place), kept)
        for file in kept.iterdir():
            file.write_text("{" if name == "one" else "[]")
        assert found(place, tars.indexed(dataset("tars", place), kept)) == wanted


def packs(place, output, parts: int) -> dict[str, str]:
    """Runs ingest in so many parts; gives the digests of the packs."""
    values = {"dataset": dataset("pictures", place), "seed": 3, "threads": 2}
    for number in range(1, parts + 1) if parts > 1 else ():
        mark = output.parent / f"{number}.txt"
        values["state"] = output.parent / f"state-{parts}"
        ingest.run(argparse.Namespace(**values, part=Part(number, parts), output=mark))
    values["state"] = output.parent / f"state-{parts}"
    ingest.run(argparse.Namespace(**values, part=Part(), output=output))
    return {path.name: table.digest(path) for path in sorted(output.glob("*.h5"))}


def test_parts_give_the_packs_of_one_job_and_open_their_own_tars_alone(tmp_path, monkeypatch):
    place = write_shards(FILES, tmp_path / "tars")
    monkeypatch.setattr("kt.core.shards.MOST", 4)
    wanted = packs(place, tmp_path / "one", 1)
    seen, read = [], tars._Opened.read

    def spy(self, offset, size):
        seen.append((self.path.name, offset))
        return read(self, offset, size)

    monkeypatch.setattr(tars._Opened, "read", spy)
    assert packs(place, tmp_path / "three", 3) == wanted and len(wanted) == 6
    assert len(seen) == len(set(seen)) == len(FILES)  # by one part each, by the last step none
    assert [name for name, _ in seen] == sorted(name for name, _ in seen)
