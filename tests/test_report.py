"""The report step, on a made-up run: files, numbers, page."""

import argparse
import csv
import json
import re
import shutil
import subprocess
from html import unescape

import made_up
import numpy as np
import pytest

from kt import report
from kt.core import figures, step
from kt.core.checking import plugin, plugins


@pytest.fixture(scope="module", name="run")
def finished_run(tmp_path_factory):
    arguments = made_up.write_run(tmp_path_factory.mktemp("run"))
    report.run(arguments)
    return arguments


@pytest.fixture(scope="module", name="unlabelled")
def finished_run_without_labels(tmp_path_factory):
    arguments = made_up.write_run(tmp_path_factory.mktemp("unlabelled"), labelled=False)
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
    return json.loads(json.dumps(list(made_up.draw_records())))


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
        "Layer by layer",
        "Accuracy against labels",
        "Which teacher, layer and k",
        "Training",
        "Learned puzzles",
        "Clusters of the chosen teacher",
        "Data",
        "Seconds per step",
        "Configuration",
        "How to read this",
    ]


def test_the_page_shows_every_layer_of_every_arm(run):
    section = re.search(r'<section id="layers">.*?</section>', html(run), re.S)[0]
    heads, *rows = re.findall(r"<tr.*?</tr>", section, re.S)
    assert re.findall(r">([^<]+)</th>", heads) == ["arm", "conv2", "conv3", "conv4"]
    assert len(rows) == len(made_up.TOP1) and all(row.count('class="best"') == 1 for row in rows)
    values = {}
    for record in draw_records_as_read():
        if (record["arm"], record["evaluation"], record["metric"]) == ("direct", "linear", "top1"):
            values.setdefault(record["layer"], []).append(record["value"])
    [direct] = [row for row in rows if "t-direct" in row]
    means = [f"{100 * np.mean(values[layer]):.1f}" for layer in ("conv2", "conv3", "conv4")]
    assert re.findall(r"<td[^>]*>\s*([\d.]+)", direct) == means


def test_the_page_shows_what_draws_of_few_labels_change_and_draws_their_curve(run, tmp_path):
    assert "draws ±" not in html(run)
    about = {"arm": "direct", "model": "direct", "target": "small", "seed": 0, "n": 90}
    about |= {"evaluation": "voc_classification", "dataset": "VOC2007", "metric": "map_11"}
    values = {1: [0.2, 0.3, 0.4], 4: [0.45, 0.55, 0.5]}
    found = [
        about | {"layer": "conv4", "labels_per_class": number, "draw": draw, "value": value}
        for number, own in values.items()
        for draw, value in enumerate(own)
    ]
    step.write_json(tmp_path / "voc_classification.json", {"records": found})
    more = [*run.evaluations, tmp_path / "voc_classification.json"]
    again = argparse.Namespace(**vars(run) | {"evaluations": more, "output": tmp_path / "new"})
    report.run(again)
    page = html(again)
    for mean, deviation in ((30, 10), (50, 5)):
        assert re.search(rf"{mean}\.0\s*<small>draws ± {deviation}\.0</small></td>", page)
    assert '"draws ±" is the standard deviation' in page
    assert "<b>VOC07 cls mAP by labels per class</b>" in page


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
    path = made_up.write_pseudo_labels(tmp_path, ["else.png"], np.array([0]))
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
    seconds = report.training_seconds(models, list(made_up.draw_records()), {})
    assert seconds["small/deep/block2/k100"] == 20 + 140
    assert seconds["direct"] == 60 and "random" not in seconds
    rounds = {"transfers": {"twice": {"kind": {"name": "iterated", "rounds": 2}}}}
    records = [record | {"transfer": "twice"} for record in made_up.draw_records()]
    seconds = report.training_seconds(models, records, rounds)
    assert seconds["small/deep/block2/k100"] == 2 * 20 + 140
    records = [r | {"teacher": "deep+deep"} for r in made_up.draw_records() if r.get("teacher")]
    seconds = report.training_seconds(models, records, {})  # two layers of one teacher
    assert seconds["small/deep/block2/k100"] == 20 + 140
    totals = dict(report.step_seconds(models, [], [{"seconds": 2.5}]))
    assert totals["ingest"] == 2.5 and totals["pretext: direct"] == 3 * 60
    (direct, *_) = [model for model in models if model["name"] == "direct"]
    direct["log"][-1]["seconds"] = 1000  # of all attempts; the last one took 60
    assert dict(report.step_seconds(models, [], []))["pretext: direct"] == 2 * 60 + 1000


def test_an_arm_of_two_targets_has_two_lines_with_names_inside_the_drawing(run):
    models = [report.read_model(folder) for folder in run.models]
    one = next(model for model in models if model["name"] == "direct")
    several = [{**one, "name": f"own{number}", "seed": 0} for number in range(25)]
    drawn = str(figures.pretext_curves(several))
    assert all(f"own{number}" in drawn for number in range(25))
    heights = [float(y) for y in re.findall(r'<text x="[\d.]+" y="([-\d.]+)"', drawn)]
    assert len(heights) > 25 and min(heights) > 0


@pytest.mark.parametrize("kind", plugins("transfers"))
def test_the_gallery_says_of_each_kind_of_transfer_what_the_target_learned(run, tmp_path, kind):
    records = [record | {"transfer": "mine"} for record in made_up.draw_records()]
    step.write_json(tmp_path / "knn.json", {"records": records})
    settings = {"verdict": ["knn"], "transfers": {"mine": {"kind": {"name": kind}}}}
    changes = {"evaluations": [tmp_path / "knn.json"], "settings": json.dumps(settings)}
    report.run(argparse.Namespace(**vars(run) | changes | {"output": tmp_path}))
    said = " ".join(unescape((tmp_path / "index.html").read_text()).split())
    labels = "these clusters are the labels that the target learns"
    learned = f"The target learned by the kind of transfer {kind}."
    about = plugin("transfers", kind).__doc__.partition("\n")[0]
    if kind == "hard":
        assert labels in said and learned not in said
    else:
        assert labels not in said and f"takes for alike. {learned} {about} Each row" in said


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--window-size=390,4000", "--virtual-time-budget=2000"),
)


def opened(page, profile):
    """Opens a page headless: its DOM and its console."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("which", ["run", "unlabelled"])
def test_a_browser_opens_the_page_without_a_complaint(which, request, tmp_path):
    page, console = opened(request.getfixturevalue(which).output / "index.html", tmp_path)
    assert not console
    for head in ("Verdict", "The arms of the comparison", "Learned puzzles", "How to read this"):
        assert f"<h2>{head}" in page


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_refuses_whatever_the_page_would_fetch(run, tmp_path):
    page = tmp_path / "index.html"
    page.write_text(html(run).replace("<h2>", '<img src="http://example.invalid/x.png"><h2>', 1))
    assert "violates" in " ".join(opened(page, tmp_path / "profile")[1])


def test_seconds_of_tables_are_counted_by_the_step_that_wrote_them(run):
    step_name, origin = report.read_origin(run.pseudo_labels[0])
    totals = dict(report.step_seconds([], [(step_name, origin), (step_name, {"seconds": 2.0})], []))
    assert totals == {"pseudo_labels": pytest.approx(origin["seconds"] + 2.0)}
