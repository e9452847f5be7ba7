"""A made-up run: every file that the report reads, with results and images the tests draw."""

import argparse
import itertools
import json

import numpy as np

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
        if not k:
            model["num_labels"] = 100
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
        choices=[],
        tables=pseudo[:1],
        settings=folder / "settings.json",
        output=folder / "report",
    )
