"""Classes by folders alone or by a table: who is drawn for testing, and what is refused."""

import os
import tarfile

import pytest
from drawing import encoded, pattern, picture, tree, write_folder, write_tar, write_zip
from running import output, run, workflow
from test_ingest import pack
from test_sources import dataset

from kt.core import layouts, table
from kt.core.layouts import POOL, TEST, TRAIN
from kt.core.step import ConfigError, DataError
from kt.sources import pictures

PNG = encoded(picture(0, 0))
FOLDERS = layouts.FOLDERS
# Of cat/000.png to dog/014.png, by hand with hashlib.
DRAWN = {"cat/000.png", "cat/005.png", "cat/011.png", "dog/005.png", "dog/006.png", "dog/007.png"}


def listed(path, labels) -> dict[str, tuple[str, str | None]]:
    found = list(pictures.entries(dataset("pictures", path, labels=str(labels))))
    return {entry.key: (entry.split, entry.class_name) for entry in found if entry.usable}


def count(found, split, name=None) -> int:
    return sum(one == split and name in (None, kind) for one, kind in found.values())


def by_class(numbers: dict[str, int], above: str = "") -> dict[str, bytes]:
    return {f"{above}{name}/{i:03}.png": PNG for name, n in numbers.items() for i in range(n)}


def text(path, *lines: str):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# ---------------------------------------------------------------------------- folders of classes


def test_a_fifth_of_each_folder_is_drawn_for_testing_and_at_least_one(tmp_path):
    files = by_class({"cat": 50, "dog": 10, "owl": 2}) | {"loose.png": PNG}
    found = listed(write_folder(files, tmp_path), FOLDERS)
    assert {name: count(found, TEST, name) for name in ("cat", "dog", "owl")} == {
        "cat": 10, "dog": 2, "owl": 1
    }  # fmt: skip
    assert {name: count(found, TRAIN, name) for name in ("cat", "dog", "owl")} == {
        "cat": 40, "dog": 8, "owl": 1
    }  # fmt: skip
    assert found["loose.png"] == (POOL, None)


def test_the_draw_is_of_names_alone_and_pictures_that_come_move_few(tmp_path):
    before = listed(write_folder(by_class({"cat": 100, "dog": 100}), tmp_path / "a"), FOLDERS)
    zipped = write_zip(by_class({"cat": 100, "dog": 100}), tmp_path / "a.zip")
    assert listed(zipped, FOLDERS) == before
    tar = write_tar(by_class({"dog": 100, "cat": 100}), tmp_path / "a.tar")
    assert listed(tar, FOLDERS) == before
    more = listed(write_folder(by_class({"cat": 105, "dog": 100}), tmp_path / "a"), FOLDERS)
    moved = {name for name in before if more[name] != before[name]}
    assert len(moved) <= 3 and all("cat" in name for name in moved)
    test_names = [name for name, (split, _) in before.items() if split == TEST]
    numbers = [int(name[-7:-4]) for name in test_names]
    assert 30 < sum(numbers) / len(numbers) < 70  # not the first ones, nor the last


def test_classes_may_stand_below_common_folders_and_in_train_with_a_test_that_has_none(tmp_path):
    found = listed(write_folder(by_class({"cat": 5, "dog": 5}, "all/v2/"), tmp_path / "a"), FOLDERS)
    assert {kind for _, kind in found.values()} == {"cat", "dog"}
    files = by_class({"cat": 5, "dog": 5}, "my/train/") | {"my/test/1.png": PNG, "my/x.png": PNG}
    found = listed(write_folder(files, tmp_path / "b"), FOLDERS)
    assert count(found, TEST) == 2 and count(found, TRAIN) == 8
    assert found["my/test/1.png"] == found["my/x.png"] == (POOL, None)


def test_a_pool_beside_the_classes_stays_one(tmp_path):
    files = by_class({"cat": 5, "dog": 5}) | by_class({"cat": 3, "owl": 3}, "unlabelled/")
    found = listed(write_folder(files, tmp_path), FOLDERS)
    assert count(found, POOL) == 6 and count(found, POOL, "cat") == 3
    assert count(found, TEST) == 2


@pytest.mark.parametrize(
    "files, said",
    [
        (tree(2, 2, 2), "test/ has folders of classes, and beside it stand train/"),
        (
            by_class({"cat": 5, "dog": 5}) | by_class({"cat": 5}, "test/"),
            "beside it stand cat/, dog/",
        ),
        (by_class({"cat": 5}) | by_class({"dog": 5, "cat": 5}, "train/"), "beside it stand cat/"),
        (by_class({"cat": 5}) | {"a.png": PNG}, "at least two classes, found 'cat'"),
        (by_class({"cat": 5, "dog": 1}), "1 have only one, such as 'dog'"),
        ({"a.png": PNG, "b.png": PNG}, "at least two classes, found none"),
    ],
)
def test_folders_that_are_no_classes_are_refused(tmp_path, files, said):
    with pytest.raises(DataError, match=said):
        listed(write_folder(files, tmp_path), FOLDERS)


def test_who_is_drawn_does_not_change(tmp_path):
    """Another test set would be another comparison: the hash, and what it is of, must stay."""
    files = by_class({"cat": 15, "dog": 15})
    root = write_folder(files, tmp_path / "all")
    drawn = {name for name, (split, _) in listed(root, FOLDERS).items() if split == TEST}
    assert drawn == DRAWN
    rows = [f"{name},{name[:3]}" for name in reversed(files)]
    labels = text(tmp_path / "a.csv", "file,class", *rows)
    assert {name for name, (split, _) in listed(root, labels).items() if split == TEST} == DRAWN


def test_a_test_folder_without_classes_and_odd_names_are_no_classes(tmp_path):
    files = by_class({"cat": 5, "dog": 5}) | {"test/1.png": PNG, "test/2.png": PNG}
    found = listed(write_folder(files, tmp_path / "a"), FOLDERS)
    assert found["test/1.png"] == (POOL, None) and count(found, TEST) == 2
    found = listed(write_folder(by_class({"train": 5, "plane": 5}), tmp_path / "b"), FOLDERS)
    assert count(found, TRAIN, "train") == count(found, TRAIN, "plane") == 4
    files = by_class({"cat": 5, "dog": 5}, "photos/") | {"loose.png": PNG}
    files |= by_class({"cat": 2}, "unlabelled/") | by_class({"owl": 2}, "photos/unlabelled/")
    found = listed(write_folder(files, tmp_path / "c"), FOLDERS)
    assert count(found, TEST) == 2 and found["loose.png"] == (POOL, None)
    assert count(found, POOL, "cat") == count(found, POOL, "owl") == 2
    files = by_class({"cat": 5, "dog": 5}, "train/") | by_class({"cat": 2}, "Unlabelled/")
    found = listed(write_folder(files, tmp_path / "d"), FOLDERS)
    assert count(found, POOL, "cat") == 2 and count(found, TRAIN) == 8


def test_a_name_that_comes_twice_in_an_archive_is_one_picture(tmp_path):
    files = by_class({"cat": 5, "dog": 2})
    path = write_tar(files, tmp_path / "a.tar")
    write_tar({"dog/000.png": PNG, "cat/001.png": PNG}, tmp_path / "b.tar")
    with tarfile.open(path, "a") as more, tarfile.open(tmp_path / "b.tar") as again:
        for member in again:
            more.addfile(member, again.extractfile(member))
    found = listed(path, FOLDERS)
    assert count(found, TEST, "dog") == count(found, TRAIN, "dog") == 1
    rows = [f"{name},{name[:3]}" for name in files]
    found = listed(path, text(tmp_path / "a.csv", "file,class", *rows))
    assert count(found, TEST, "dog") == count(found, TRAIN, "dog") == 1


def test_folders_that_may_be_classes_are_told(tmp_path, caplog):
    write_folder(by_class({"cat": 5, "dog": 5}), tmp_path)
    assert pictures.count_pictures(dataset("pictures", tmp_path)) == (10, False)
    assert "stand in 2 folders" in caplog.text and "labels=folders" in caplog.text
    caplog.clear()
    assert pictures.count_pictures(dataset("pictures", tmp_path, labels=FOLDERS)) == (4, True)
    write_folder({"loose.png": PNG}, tmp_path)
    pictures.count_pictures(dataset("pictures", tmp_path))
    assert not caplog.text


# ---------------------------------------------------------------------------- a table of classes


def test_what_the_table_names_has_its_class_and_all_else_has_none(tmp_path):
    root = write_folder({f"2020/{i:02}.png": PNG for i in range(40)}, tmp_path / "all")
    rows = [f"2020/{i:02}.png,{'cat' if i % 2 else 'dog'}" for i in range(20)]
    found = listed(root, text(tmp_path / "a.csv", "file,class", *rows))
    assert (count(found, POOL), count(found, TRAIN), count(found, TEST)) == (20, 16, 4)
    assert found["2020/30.png"] == (POOL, None)
    assert all(found[f"2020/{i:02}.png"][1] == ("cat" if i % 2 else "dog") for i in range(20))
    assert count(found, TEST, "cat") == count(found, TEST, "dog") == 2


@pytest.mark.parametrize(
    "head, row",
    [
        ("file,class", "2020/{name}.png,{kind}"),
        ("\ufeffFile Name;note;Label", "./2020/{name}.png;x;{kind}"),
        ("image_id\tclass", "{name}\t{kind}"),
        ("\ufeffsep=|\nfile|class", "{name}|{kind}"),
        ("class,path", '"{kind}","all\\2020\\{name}.png"'),
        ("id,breed,species", "2020/{name},z,{kind}"),
        ("file, class, note", '"2020/{name}.png", "{kind}", "a, b"'),
        ("file,class,class", "{name},{kind},other"),
    ],
)
def test_other_marks_columns_and_ways_to_name_a_file_mean_the_same(tmp_path, head, row):
    names = [f"{i:02}" for i in range(20)]
    root = write_folder({f"all/2020/{name}.png": PNG for name in names}, tmp_path / "place")
    rows = [row.format(name=name, kind="cat" if int(name) % 2 else "dog") for name in names]
    found = listed(root, text(tmp_path / "a.csv", head, *rows))
    assert count(found, POOL) == 0 and count(found, TEST, "cat") == 2
    assert all(
        kind == ("cat" if int(key[-6:-4]) % 2 else "dog") for key, (_, kind) in found.items()
    )


@pytest.mark.parametrize("beside", ["a.xml", "a.cr2", ".thumb/a.png", "a.txt"])
def test_other_files_beside_a_picture_do_not_take_its_label(tmp_path, beside):
    files = {f"img/{name}.png": PNG for name in "abcd"}
    others = {beside: PNG, f"img/{beside}": PNG}
    root = write_folder(files | others, tmp_path / "all")
    found = listed(root, text(tmp_path / "a.csv", "id,label", *"a,x b,x c,y d,y".split()))
    assert {name: kind for name, (_, kind) in found.items()} == dict(
        zip(files, "xxyy", strict=True)
    )


@pytest.mark.parametrize(
    "rows",
    [
        ["/kaggle/input/b/{}.png,{}", "C:\\data\\{}.png,{}", "all/2020/{}.png,{}"],
        ["{}.PNG,{}", "2020/{}.Png,{}", "{}.jpg,{}"],
    ],
)
def test_names_from_elsewhere_and_of_another_case_are_found(tmp_path, rows):
    root = write_folder({f"2020/caf\u00e9{i}.png": PNG for i in range(8)}, tmp_path / "all")
    for row in rows:
        lines = [row.format(f"Cafe\u0301{i}", "xy"[i % 2]) for i in range(8)]
        found = listed(root, text(tmp_path / "a.csv", "file,class", *lines))
        assert [kind for _, kind in found.values()] == list("xyxyxyxy"), row


def test_folders_that_all_rows_share_are_meant_where_a_file_is_in_them(tmp_path):
    names = [f"{year}/{name}.png" for year in (2020, 2021) for name in "abcd"]
    root = write_folder(dict.fromkeys(names, PNG), tmp_path / "all")
    rows = "2020/a.png,x 2020/b.png,x 2020/c.png,y 2020/d.png,y 2020/e.png,y".split()
    found = listed(root, text(tmp_path / "a.csv", "file,class", *rows))
    assert {name for name, (_, kind) in found.items() if kind} == set(names[:4])
    (root / "2020/d.png").rename(root / "2021/e.png")  # not the 2020/e.png of the table
    rows[3] = "2020/z.png,y"
    with pytest.raises(DataError, match="1 have only one, such as 'y'"):
        listed(root, text(tmp_path / "a.csv", "file,class", *rows))


def test_the_closest_name_counts(tmp_path):
    files = {"a.png": PNG, "sub/a.png": PNG, "b.png": PNG, "c.png": PNG, "d.png": PNG}
    root = write_folder(files, tmp_path / "all")
    found = listed(root, text(tmp_path / "a.csv", "file,class", *"a.png,x b.png,x c,y d,y".split()))
    assert found["sub/a.png"] == (POOL, None) and found["a.png"][1] == "x"
    files = {"x/a.png": PNG, "y/a.png": PNG, "b.png": PNG, "c.png": PNG}
    root = write_folder(files, tmp_path / "more")
    rows = "x/a.png,x a.png,y b,x c,y".split()
    found = listed(root, text(tmp_path / "a.csv", "file,class", *rows))
    assert found["x/a.png"][1] == "x" and found["y/a.png"][1] == "y"


def test_a_file_that_two_rows_come_as_close_to_is_of_none(tmp_path):
    root = write_folder({f"{name}.webp": PNG for name in "abcde"}, tmp_path / "all")
    rows = "a.jpg,x b.jpg,x c.jpg,y d.jpg,y e.jpg,x e.png,y".split()
    found = listed(root, text(tmp_path / "a.csv", "file,class", *rows))
    assert {name for name, (_, kind) in found.items() if not kind} == {"e.webp"}


def test_the_split_may_be_given(tmp_path):
    root = write_folder({f"{name}.png": PNG for name in "abcdefgh"}, tmp_path / "all")
    rows = "a,x,train b,x,Val c,y,TRAIN d,y,val e,y,unlabelled".split()
    found = listed(root, text(tmp_path / "a.csv", "file,class,split", *rows))
    assert found["b.png"] == (TEST, "x") and found["c.png"] == (TRAIN, "y")
    assert found["e.png"] == (POOL, "y") and found["f.png"] == (POOL, None)
    rows = "a,x,train b,x,test c,y,train d,y,test e,y,val f,,unlabelled a,x,train".split()
    found = listed(root, text(tmp_path / "a.csv", "file,class,split", *rows))
    assert found["e.png"] == (POOL, "y") and found["f.png"] == (POOL, None)
    assert count(found, TEST) == count(found, TRAIN) == 2


def test_rows_without_a_file_are_told_and_files_that_are_no_pictures(tmp_path, caplog):
    root = write_folder(
        {f"{name}.png": PNG for name in "abcd"} | {"e.heic": b"-"}, tmp_path / "all"
    )
    rows = "a,x b,x c,y d,y e,y far/away.png,y".split()
    found = listed(root, text(tmp_path / "a.csv", "file,class", *rows))
    assert count(found, TRAIN) == count(found, TEST) == 2
    assert "1 of its 6 files are not in" in caplog.text and "'far/away.png'" in caplog.text
    assert "1 of its 6 files are no pictures" in caplog.text


@pytest.mark.parametrize(
    "lines, said",
    [
        (["a.png,x", "b.png,y"], "the columns file and class, found 'a.png', 'x'"),
        (["file,class", "a.png,x", "b.png"], "line 3: expected a class, found none"),
        (["file,class", "a.png,x", ",x"], "line 3: expected a file, found none"),
        (["file,class", "a.png,x", "./a.png,y"], "line 3: 'a.png' came before"),
        (["sep=;", "file;class", "a.png;x", "b.png"], "line 4: expected a class, found none"),
        (["file,class"], "a row for each labelled picture, found none"),
        (["file,class", "z.png,x", "/far/q.png,y"], "none of its 2 files is in"),
        (["file,class", "e.png,x", "a.png,x"], "1 rows mean several files"),
        (["file,class", "a,x", "b,x", "c,x"], "at least two classes, found 'x'"),
        (["file,class", "a,x", "b,x", "c,y"], "1 have only one, such as 'y'"),
        (["file,class,split", "a,x,train", "b,y,tset"], "line 3: expected as split .*'tset'"),
        (["file,class,split", "a,x,train", "b,y,"], "in each row or in none"),
        (["file,class,split", "a,x,train", "b,y,train"], "must stand in train and in test"),
        (["file,class,split", *"a,x,train b,y,train c,y,val d,x,test".split()], "and in test"),
        (["file,class", "a,x", "a.png,y", "b,x", "c,y"], "1 rows mean a file that another row"),
        (["file,class", "a,x,y", "b,y"], "line 2: expected 2 values, found 3"),
        (['file,class', 'a,"x', "b,y"], "expected a CSV"),
    ],
)  # fmt: skip
def test_tables_that_do_not_fit_are_refused_with_the_line(tmp_path, lines, said):
    files = {f"{name}.png": PNG for name in "abcd"} | {"1/e.png": PNG, "2/e.png": PNG}
    root = write_folder(files, tmp_path / "all")
    with pytest.raises(DataError, match=said):
        listed(root, text(tmp_path / "a.csv", *lines))


def test_no_table_a_binary_one_tars_and_published_sets_are_refused(tmp_path):
    root = write_folder(by_class({"cat": 5, "dog": 5}), tmp_path / "all")
    with pytest.raises(ConfigError, match="found none at"):
        listed(root, tmp_path / "none.csv")
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\0f")
    with pytest.raises(DataError, match="expected a CSV in UTF-8"):
        listed(root, tmp_path / "a.csv")
    (tmp_path / "tars").mkdir()
    write_tar(by_class({"cat": 5}), tmp_path / "tars" / "train-1.tar")
    with pytest.raises(ConfigError, match="tar shards say themselves"):
        listed(tmp_path / "tars", FOLDERS)
    done = run("snakemake", "-n", "--directory", tmp_path / "run", "--config",
               'datasets={"fashion_mnist": {"labels": "folders"}}')  # fmt: skip
    assert done.returncode == 2 and "has labels of its own" in done.stderr, output(done)
    done = run("snakemake", "-n", "--directory", tmp_path / "run", "--config", "labels=folders")
    assert done.returncode == 2 and "labels: are those of `images`" in done.stderr, output(done)


# ---------------------------------------------------------------------------- in the workflow


def test_a_packed_table_gives_the_labels_it_names(tmp_path):
    files = {f"{i:03}.png": encoded(picture(i % 3, i)) for i in range(90)}
    root = write_folder(files, tmp_path / "all")
    rows = [f"{i:03}.png,kind {i % 3}" for i in range(45)]
    labels = str(text(tmp_path / "a.csv", "file,class", *rows))
    assert pack(root, tmp_path / "packed", labels=labels)["origin"]["classes"] == labels
    for split, number in ((TRAIN, 36), (TEST, 9)):
        path = tmp_path / "packed" / f"{split}-labels.h5"
        with table.read(path, "labels", {"labels": 1}) as file:
            keys, labels = table.strings(file, "keys"), table.load(file, "labels")
        assert len(keys) == number
        assert [int(key[:3]) % 3 for key in keys] == labels.tolist()


def test_a_few_pictures_without_a_label_are_not_all_that_is_learned_from(tmp_path):
    files = {f"{kind}/{i:03}.png": encoded(pattern(k, i)) for i in range(40)
             for k, kind in enumerate(("dog", "cat"))}  # fmt: skip
    root = write_folder(files | {"loose.png": encoded(pattern(2, 0))}, tmp_path / "all")
    report = pack(root, tmp_path / "packed", labels=FOLDERS, unlabelled=100, labelled=50)
    found = {split: report["splits"][split]["images"] for split in (POOL, TRAIN, TEST)}
    assert found == {POOL: 32, TRAIN: 33, TEST: 16}  # 81 in all
    assert pictures.count_pictures(dataset("pictures", root, labels=FOLDERS)) == (32, True)
    assert pictures.has_labels(dataset("pictures", root, labels=FOLDERS))
    assert not pictures.has_labels(dataset("pictures", root))
    kept = pack(root, tmp_path / "more", labels=FOLDERS, unlabelled=20, labelled=50)
    assert kept["splits"][POOL]["images"] == 20 and kept["splits"][TRAIN]["images"] == 45


def test_a_class_that_copies_leave_without_images_is_told(tmp_path, caplog):
    files = {f"{kind}/{i:03}.png": encoded(pattern(k, i)) for i in range(20)
             for k, kind in enumerate(("dog", "cat"))}  # fmt: skip
    files |= {f"owl/{i}.png": PNG for i in range(4)}
    pack(write_folder(files, tmp_path / "all"), tmp_path / "packed", labels=FOLDERS)
    assert "1 classes have images in test and none is left in train, such as 'owl'" in caplog.text


def test_one_label_a_class_is_refused_before_anything_is_trained_on_the_images(tmp_path):
    files = {f"train-unlabelled/{i}.png": encoded(pattern(0, i)) for i in range(20)}
    files |= {f"{split}/{kind}/{i}.png": encoded(pattern(k, 20 + i)) for k, kind in enumerate("ab")
              for split, i in (("train", 0), ("test", 1))}  # fmt: skip
    root = write_folder(files, tmp_path / "all")
    with pytest.raises(DataError, match="found one image in each of 2 classes"):
        pack(root, tmp_path / "packed")
    (root / "train/b/more.png").write_bytes(encoded(pattern(1, 30)))
    assert pack(root, tmp_path / "packed")["splits"][TRAIN]["images"] == 3


def test_rare_classes_keep_a_label_where_there_is_a_pool_too(tmp_path):
    files = {f"{i:03}.png": encoded(pattern(i % 3, i)) for i in range(150)}
    root = write_folder(files, tmp_path / "all")
    rows = [f"{i:03},kind {i // 2 if i < 40 else 99}" for i in range(100)]
    labels = str(text(tmp_path / "a.csv", "file,class", *rows))
    report = pack(root, tmp_path / "packed", labels=labels, labelled=30)
    assert len(report["splits"][TRAIN]["classes"]) == 21 and report["splits"][TRAIN]["images"] == 30


def test_settings_without_the_later_keys_are_as_before():
    given = dataset("pictures", "a").model_dump()
    assert "labels" not in given and "levels" not in given
    given = dataset("pictures", "a", labels=FOLDERS, levels=[0, 10]).model_dump()
    assert given["labels"] == FOLDERS and given["levels"] == (0, 10)


def test_an_archive_is_listed_anew_for_other_labels(tmp_path):
    path = write_zip(by_class({"cat": 5, "dog": 5}), tmp_path / "a.zip")
    assert count(listed(path, FOLDERS), TEST) == 2
    rows = [f"{kind}/{i:03}.png,{kind}" for kind in ("cat", "dog") for i in range(2)]
    assert count(listed(path, text(tmp_path / "a.csv", "file,class", *rows)), POOL) == 6


def test_the_workflow_takes_both_and_a_changed_table_packs_anew(tmp_path):
    files = {f"{kind}/{i:03}.png": encoded(pattern(k, i)) for i in range(30)
             for k, kind in enumerate(("dog", "cat"))}  # fmt: skip
    root = write_folder(files, tmp_path / "all")
    done = workflow(tmp_path / "a", root, "-n", config=[f"labels={FOLDERS}"])
    assert done.returncode == 0 and "small/supervised" in done.stdout, output(done)
    rows = [f"{'cat' if i % 2 else 'dog'}/{i:03}.png,{i % 2}" for i in range(30)]
    labels = text(tmp_path / "my labels.csv", "file,class", *rows)
    wanted = "results/data/images/report.json"
    done = workflow(tmp_path / "b", root, wanted, config=["labels=my labels.csv"], cwd=tmp_path)
    assert done.returncode == 0, output(done)
    again = workflow(tmp_path / "b", root, wanted, config=["labels=my labels.csv"], cwd=tmp_path)
    assert "Nothing to be done" in output(again)
    text(labels, "file,class", *rows[2:])
    again = workflow(tmp_path / "b", root, wanted, config=["labels=my labels.csv"], cwd=tmp_path)
    assert "ingest images" in output(again)
    text(labels, "file,class", *rows[4:])
    os.utime(labels, (1.6e9, 1.6e9))  # a file of before took its place
    again = workflow(tmp_path / "b", root, wanted, config=["labels=my labels.csv"], cwd=tmp_path)
    assert "ingest images" in output(again)
    os.utime(labels)  # touched alone
    again = workflow(tmp_path / "b", root, wanted, config=["labels=my labels.csv"], cwd=tmp_path)
    assert "Nothing to be done" in output(again)
    odd = text(tmp_path / "odd {x}.csv", "file,class", *rows)
    done = workflow(tmp_path / "c", root, wanted, config=[f"labels={odd.name}"], cwd=tmp_path)
    assert done.returncode == 0, output(done)
    text(labels, "file,class", rows[0], rows[0] + "s")
    done = workflow(tmp_path / "c", root, "-n", config=["labels=my labels.csv"], cwd=tmp_path)
    assert done.returncode == 3 and "came before" in done.stderr, output(done)
    named = 'datasets={"images": {"labels": "far.csv"}}'
    done = workflow(tmp_path / "c", root, "-n", config=[named], cwd=tmp_path)
    assert done.returncode == 2 and str(tmp_path / "c" / "far.csv") in done.stderr, output(done)
