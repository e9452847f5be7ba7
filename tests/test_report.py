"""The report step, on a run whose results the test makes up: files, numbers, page."""

import argparse
import itertools
import json

import numpy as np
import pytest

from kt import report
from kt.core import step, table

TOP1 = {
    "random": 0.741,
    "direct": 0.724,
    "longer": 0.731,
    "untrained": 0.762,
    "hog": 0.797,
    "transfer": 0.795,
    "supervised": 0.865,
}
CLASSES = ["<b>shirt</b>", "ring", "cross", "bar", "disc"]
CANDIDATES = {  # arm -> (teacher, layer, k, offset to the arm's score)
    "transfer": [
        ("deep", "block2", 100, 0.0),
        ("deep", "block3", 100, -0.02),
        ("deep", "block2", 50, -0.01),
    ],
    "untrained": [("blind", "block2", 100, 0.0), ("blind", "block3", 100, -0.03)],
    "hog": [("hog", "cells", 100, 0.0)],
}


def networks(seeds=3):
    """Gives (arm, name, teacher, layer, k, offset, seed) of every network of the made-up run."""
    for arm in TOP1:
        choices = CANDIDATES.get(arm, [(arm, None, None, 0.0)])
        for (teacher, layer, k, offset), seed in itertools.product(choices, range(seeds)):
            if arm == "longer" and seed:
                continue
            name = f"small/{teacher}/{layer}/k{k}" if k else arm
            yield arm, name, teacher, layer, k, offset, seed


def draw_records(labelled=True):
    noise = np.random.default_rng(0)
    for arm, name, teacher, layer, k, offset, seed in networks():
        about = {
            "model": name,
            "arm": arm,
            "target": "small",
            "seed": seed,
            "dataset": "shapes",
            "n": 2000,
        }
        if k:
            about |= {"teacher": teacher, "teacher_layer": layer, "k": k}

        def record(evaluation, metric, value, about=about, **more):
            value = float(np.clip(value + noise.normal(0, 0.003), 0, 1))
            return {**about, "evaluation": evaluation, "metric": metric, "value": value, **more}

        base = TOP1[arm] + offset
        yield record("clusters", "view_nmi", base - 0.1, layer="conv4")
        if not labelled:
            continue
        yield record("knn", "top1", base, layer="conv4")
        yield record("knn", "mean_class_accuracy", base, layer="conv4")
        yield record("knn", "validation_top1", base + 0.01, layer="conv4")
        for depth, gain in (("conv2", 0.02), ("conv3", 0.05), ("conv4", 0.04)):
            yield record("linear", "top1", base + gain, layer=depth)
            yield record("linear", "validation_top1", base + gain, layer=depth)
        for labels, loss in ((10, 0.12), (50, 0.06), (100, 0.03), (500, -0.01)):
            yield record("finetune", "top1", base - loss, labels_per_class=labels)
        yield record("clusters", "nmi", base - 0.2, layer="conv4")
        yield record("clusters", "purity", base - 0.15, layer="conv4")


def write_evaluations(folder, labelled=True):
    groups = {}
    for record in draw_records(labelled):
        groups.setdefault((record["model"], record["evaluation"], record["seed"]), []).append(
            record
        )
    for number, (name, group) in enumerate(groups.items()):
        content = {"records": group, "provenance": {"seconds": 1.5 + len(group)}}
        step.write_json(folder / str(number) / f"{name[1]}.json", content)
    return sorted(folder.rglob("*.json"))


def write_models(folder):
    noise = np.random.default_rng(1)
    found = [(None, "deep", None, None, None, 0, 0), *networks()]
    for arm, name, teacher, layer, k, _, seed in found:
        if arm == "random":
            continue
        place = folder / name / f"s{seed}"
        model = {
            "name": name,
            "arm": arm,
            "teacher": teacher,
            "teacher_layer": layer,
            "k": k,
            "seed": seed,
        }
        model["task"] = {"name": "jigsawpp", "permutations": 100} if not k else {"name": "labels"}
        seconds = {"deep": 140.0, "direct": 60.0, "longer": 200.0}.get(name, 20.0)
        step.write_json(place / "model.json", model | {"provenance": {"seconds": seconds}})
        top = 0.62 if name == "deep" else 0.3
        epochs = range(1, 25 if name == "longer" else 11)
        lines = [
            {"epoch": e, "validation_top1": top * (1 - 0.7**e) + noise.normal(0, 0.004)}
            for e in epochs
        ]
        (place / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return sorted(path.parent for path in folder.rglob("model.json"))


def draw_shapes(number, size=28):
    """Draws shapes of five classes in random colours and places: (N, 3, S, S) uint8, (N,)."""
    noise = np.random.default_rng(2)
    y, x = np.mgrid[:size, :size] / size
    labels = noise.integers(0, len(CLASSES), number)
    images = np.empty((number, 3, size, size), np.uint8)
    for image, label in zip(images, labels, strict=True):
        cx, cy, r = *noise.uniform(0.35, 0.65, 2), noise.uniform(0.18, 0.33)
        dx, dy, d = abs(x - cx), abs(y - cy), np.hypot(x - cx, y - cy)
        masks = (
            (dx < r) & (dy < r * 1.2) & ~((dx < r / 3) & (y < cy)),
            (d < r) & (d > r * 0.6),
            ((dx < r / 3) | (dy < r / 3)) & (dx < r) & (dy < r),
            (dx < r) & (dy < r / 3),
            d < r,
        )
        shade = np.where(masks[label], noise.uniform(0.6, 1), noise.uniform(0, 0.3))
        colour = noise.uniform(0.6, 1, (3, 1, 1))
        image[...] = 255 * np.clip(shade * colour + noise.normal(0, 0.02, (3, size, size)), 0, 1)
    return images, labels


def write_pack(folder, number=600, known=True):
    images, labels = draw_shapes(number)
    keys = [f"{CLASSES[label]}/{i:04d}.png" for i, label in enumerate(labels)]
    pack, truth = folder / "train-unlabelled.h5", folder / "train-unlabelled-labels.h5"
    with table.create(pack, "images", {}) as file:
        table.add(file, "images", images.shape, np.uint8, contiguous=True)[...] = images
        table.put_strings(file, "keys", keys)
    with table.create(truth, "labels", {}) as file:
        table.put(file, "labels", labels if known else np.full(number, -1))
        table.put_strings(file, "keys", keys)
        table.put_strings(file, "classes", CLASSES if known else [])
    return pack, truth, keys, labels


def write_pseudo_labels(folder, keys, labels, layer="block2", k=100):
    """Clusters that know the class in three cases of four, rows shuffled against the pack."""
    noise = np.random.default_rng(3)
    num = 20
    clusters = np.where(noise.random(len(keys)) < 0.75, labels * 4, 0) + noise.integers(
        0, 4, len(keys)
    )
    order = noise.permutation(len(keys))
    path = folder / f"{layer}-{k}.h5"
    with table.create(path, "pseudo_labels", {"teacher": "deep", "layer": layer, "k": k}) as file:
        table.put(file, "labels", np.where(clusters < num, clusters, -1)[order])
        table.put(file, "clusters", clusters[order])
        table.put(file, "distances", noise.random(len(keys)).astype(np.float32)[order])
        table.put_strings(file, "keys", [keys[i] for i in order])
    return path


def write_puzzles(folder, number=12):
    noise = np.random.default_rng(4)
    images, _ = draw_shapes(number, 30)
    cells = (
        images.reshape(number, 3, 3, 10, 3, 10)
        .transpose(0, 2, 4, 1, 3, 5)
        .reshape(number, 9, 3, 10, 10)
    )
    permutations = np.array([noise.permutation(9) for _ in range(100)], np.uint8)
    labels = noise.integers(0, 100, number)
    predicted = np.where(np.arange(number) % 3 == 2, (labels + 1) % 100, labels)
    tiles = np.stack([cells[i, permutations[label]] for i, label in enumerate(labels)])
    replaced = np.zeros((number, 9), bool)
    replaced[1::4, 3] = True
    tiles[replaced] = 255 - tiles[replaced]
    path = folder / "puzzles.h5"
    with table.create(path, "puzzles", {"teacher": "deep"}) as file:
        for name, array in {"tiles": tiles, "permutations": permutations, "labels": labels}.items():
            table.put(file, name, array)
        table.put(file, "predicted", predicted)
        table.put(file, "replaced", replaced)
    return path, images


def write_data_report(folder):
    splits = {
        name: {"images": images, "classes": 5, "duplicates": 3, "rejected": 1, "smaller": 0}
        for name, images in (("train-unlabelled", 12000), ("train", 10000), ("test", 2000))
    }
    content = {
        "splits": splits,
        "modes": {"RGB": 23990, "L": 10},
        "rejected": [{"key": "train/<script>alert(1)</script>.jpg", "reason": "truncated"}],
        "left_out_of_pool": 4,
        "defaults": "Images are 28 pixels wide.",
        "seconds": 6.2,
    }
    step.write_json(folder / "report.json", content)
    return folder / "report.json"


def write_run(folder, labelled=True):
    """Writes everything the step reads and gives its arguments."""
    pack, truth, keys, labels = write_pack(folder / "data", known=labelled)
    pseudo = [write_pseudo_labels(folder / "pseudo", keys, labels, "block3")]
    pseudo += [write_pseudo_labels(folder / "pseudo", keys, labels)]
    settings = {"seeds": 3, "verdict": ["knn"], "note": "</pre><script>alert(2)</script>"}
    step.write_json(folder / "settings.json", settings)
    return argparse.Namespace(
        evaluations=write_evaluations(folder / "evaluations", labelled),
        models=write_models(folder / "models"),
        puzzles=[write_puzzles(folder)[0]],
        data_report=[write_data_report(folder / "data")],
        pack=[pack],
        labels=[truth],
        pseudo_labels=pseudo,
        settings=folder / "settings.json",
        output=folder / "report",
    )


@pytest.fixture(scope="module", name="run")
def finished_run(tmp_path_factory):
    arguments = write_run(tmp_path_factory.mktemp("run"))
    report.run(arguments)
    return arguments


@pytest.fixture(scope="module", name="unlabelled")
def finished_run_without_labels(tmp_path_factory):
    arguments = write_run(tmp_path_factory.mktemp("unlabelled"), labelled=False)
    report.run(arguments)
    return arguments


def html(arguments):
    return (arguments.output / "index.html").read_text(encoding="utf-8")


def test_all_records_stand_in_both_tables(run):
    found = json.loads((run.output / "metrics.json").read_text())
    assert sorted(map(str, found)) == sorted(map(str, draw_records_as_read()))
    rows = list(csv.DictReader((run.output / "metrics.csv").read_text().splitlines()))
    assert len(rows) == len(found)
    for row, record in zip(rows, found, strict=True):
        assert {k: v for k, v in row.items() if v} == {k: str(v) for k, v in record.items()}


def draw_records_as_read():
    return json.loads(json.dumps(list(draw_records())))


def test_the_same_inputs_in_another_order_give_the_same_numbers(run, tmp_path):
    again = argparse.Namespace(
        **vars(run) | {"output": tmp_path, "evaluations": run.evaluations[::-1]}
    )
    report.run(again)
    for name in ("metrics.json", "metrics.csv", "index.html"):
        assert (tmp_path / name).read_bytes() == (run.output / name).read_bytes()


def test_the_page_holds_the_means_of_the_records(run):
    found = draw_records_as_read()
    for arm in ("random", "direct", "longer", "supervised"):
        values = [
            r["value"]
            for r in found
            if (r["arm"], r["evaluation"], r["metric"]) == (arm, "knn", "top1")
        ]
        assert f"<td>{100 * np.mean(values):.1f}" in html(run)


def test_the_page_and_the_summary_give_the_verdict_and_the_backbone(run):
    text = (run.output / "summary.txt").read_text()
    for place in (text, html(run)):
        flat = " ".join(place.replace("\u00a0", " ").split())
        assert (
            "On these images transfer (teacher deep, layer block2, k 100) beats direct by 7."
            in flat
        )
        assert "small/deep/block2/k100/s0/model.safetensors" in flat
    assert str(run.output / "index.html") in text
    assert max(len(line) for line in text.splitlines() if "/" not in line) <= 100


def test_the_sections_stand_in_order(run):
    heads = re.findall(r"<h2>([^<]*[^< ])", html(run))
    assert heads == [
        "Verdict",
        "The arms of the comparison",
        "Accuracy against labels per class",
        "Which teacher, layer and k",
        "Training",
        "Learned puzzles",
        "Clusters of the chosen teacher",
        "Data",
        "Seconds per step",
        "Configuration",
        "How to read this",
    ]


def test_names_cannot_put_markup_into_the_page(run):
    assert "<script" not in html(run)
    assert "&lt;script&gt;alert(1)" in html(run) and "&lt;/pre&gt;" in html(run)
    assert "&lt;b&gt;shirt&lt;/b&gt;" in html(run) and "<b>shirt" not in html(run)


def test_the_page_needs_nothing_from_outside_and_is_small(run):
    page = html(run)
    assert not re.search(r"(src|href)=\"(?!data:|#)|url\(|@import|https?:", page)
    assert "default-src 'none'" in page
    assert len(page) < 3e6


def test_without_labels_the_page_recommends_a_backbone_and_compares_nothing(unlabelled):
    page = html(unlabelled)
    assert "The network to use is small/deep/block2/k100." in page
    assert "train/CLASS" in page and "deep solves" in page and "20 of 100 clusters" in page
    assert "beats" not in page.replace("whether transfer beats", "")
    assert "Tightest" in page and "Purest" not in page


def test_a_run_with_records_alone_gives_a_page(run, tmp_path):
    nothing = {name: [] for name, value in vars(run).items() if isinstance(value, list)}
    arguments = vars(run) | nothing | {"evaluations": run.evaluations, "output": tmp_path}
    report.run(argparse.Namespace(**arguments))
    page = (tmp_path / "index.html").read_text()
    assert "beats direct" in page and "Learned puzzles" not in page and "<img" not in page


def test_without_any_record_the_step_stops_and_says_so(run, tmp_path):
    arguments = argparse.Namespace(**vars(run) | {"evaluations": [], "output": tmp_path / "new"})
    with pytest.raises(step.DataError, match="found none"):
        report.run(arguments)
    assert not (tmp_path / "new").exists()


def test_pseudo_labels_of_other_images_are_refused(run, tmp_path):
    path = write_pseudo_labels(tmp_path, ["else.png"], np.array([0]))
    arguments = argparse.Namespace(
        **vars(run) | {"pseudo_labels": [path], "output": tmp_path / "new"}
    )
    with pytest.raises(step.DataError, match=r"else\.png"):
        report.run(arguments)


def test_settings_are_json_or_a_file_of_it(tmp_path):
    (tmp_path / "settings.json").write_text('{"seeds": 3}')
    for text in ('{"seeds": 3}', str(tmp_path / "settings.json")):
        assert report.read_settings(text) == {"seeds": 3}
    with pytest.raises(step.ConfigError):
        report.read_settings('{"seeds": ')


def test_the_seconds_of_an_arm_are_one_network_and_its_teacher(run):
    models = [report.read_model(folder) for folder in run.models]
    seconds = report.training_seconds(models, list(draw_records()))
    assert seconds["small/deep/block2/k100"] == 20 + 140
    assert seconds["direct"] == 60 and "random" not in seconds
    totals = dict(report.step_seconds(models, [], [{"seconds": 2.5}]))
    assert totals["ingest"] == 2.5 and totals["pretext: direct"] == 3 * 60


def test_the_true_permutation_puts_a_puzzle_back_together(tmp_path):
    path, images = write_puzzles(tmp_path)
    with table.read(path, "puzzles", {"tiles": 5}) as file:
        tiles, labels = file["tiles"][...], file["labels"][...]
        permutations, replaced = file["permutations"][...], file["replaced"][...]
    for tile, label, strange, image in zip(tiles, labels, replaced, images, strict=True):
        board = pictures.lay(tile, permutations[label], strange)
        inside = board.reshape(3, 34, 3, 34, 3)[:, 2:-2, :, 2:-2].reshape(90, 90, 3)[::3, ::3]
        same = (inside == image.transpose(1, 2, 0)).reshape(3, 10, 3, 10, 3).all((1, 3, 4))
        assert same.sum() == 9 - strange.sum()
        framed = (board.reshape(3, 34, 3, 34, 3)[:, 0, :, 0] == pictures.MARK).all(-1)
        assert np.array_equal(framed, ~same)


def test_puzzles_tell_right_from_wrong(tmp_path):
    found = pictures.read_puzzles(write_puzzles(tmp_path)[0])
    assert [puzzle.right for puzzle in found.shown] == [i % 3 != 2 for i in range(8)]
    assert found.solved == pytest.approx(8 / 12)
    assert found.shown[0].given != found.shown[0].solved


def test_an_empty_table_of_puzzles_is_left_out(tmp_path):
    path = tmp_path / "examples.h5"
    with table.create(path, "puzzles", {}) as file:
        table.put(file, "tiles", np.zeros((0, 9, 3, 1, 1), np.uint8))
    assert pictures.read_puzzles(path) is None


def test_a_gallery_shows_the_images_nearest_to_the_centroid(tmp_path):
    pack, truth, keys, labels = write_pack(tmp_path)
    path = write_pseudo_labels(tmp_path, keys, labels)
    groups = pictures.gallery(path, report.read_pack(pack), report.read_labels(truth))
    assert list(groups) == ["Largest", "Purest", "Most mixed"]
    shown = [cluster for group in groups.values() for cluster in group]
    assert len({cluster.number for cluster in shown}) == len(shown) == 12
    with table.read(path, "pseudo_labels", {"labels": 1}) as file:
        clusters, distances = file["clusters"][...], file["distances"][...]
        names = table.strings(file, "keys")
    images = dict(zip(keys, report.read_pack(pack).images, strict=True))
    for cluster in shown:
        inside = np.flatnonzero(clusters == cluster.number)
        nearest = inside[np.argsort(distances[inside])[:10]]
        tiles = [pictures.fit(images[names[i]].transpose(1, 2, 0), 32) for i in nearest]
        assert cluster.strip == pictures.png(np.concatenate(tiles, 1))
        assert cluster.size == len(inside)


def test_purity_counts_only_known_labels():
    clusters, truth = np.array([0, 0, 0, 0, 1, 3]), np.array([2, 2, 1, -1, -1, 0])
    shares, frequent = pictures.purities(clusters, truth)
    assert shares[0] == pytest.approx(2 / 3) and frequent[0] == 2
    assert np.isnan(shares[[1, 2]]).all() and shares[3] == 1


def test_groups_of_clusters_share_no_cluster_and_skip_empty_ones():
    noise = np.random.default_rng(0)
    for number in range(1, 30):
        sizes = noise.integers(0, 40, number)
        sizes[0] = 5
        groups = pictures.interesting(sizes, noise.random(number))
        picked = [n for group in groups for n in group]
        assert len(set(picked)) == len(picked) and all(sizes[picked] > 0)
        assert sizes[groups[0]].min() >= max(np.delete(sizes, picked), default=0)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--window-size=390,4000", "--virtual-time-budget=2000"),
)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("which", ["run", "unlabelled"])
def test_a_browser_opens_the_page_without_errors_or_requests(which, request, tmp_path):
    page = request.getfixturevalue(which).output / "index.html"
    net, profile = tmp_path / "net.json", tmp_path / "profile"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", f"--log-net-log={net}", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "CONSOLE" not in done.stderr
    for head in ("Verdict", "The arms of the comparison", "Learned puzzles", "How to read this"):
        assert f"<h2>{head}" in done.stdout
    requests = set(re.findall(r'"url":"([a-z]+):', net.read_text()))
    assert requests <= {"file", "data"}
