"""The documents are true: links, commands, names and files exist, and the examples run."""

import argparse
import ast
import importlib
import itertools
import re
import subprocess
import sys
from pathlib import Path

import crafted
import numpy as np
import pytest
import torch
import yaml
from drawing import encoded, picture

import kt
from kt import config, evaluate, ingest, reference, workflow
from kt.core import backbone, judge, model, step, table, training
from kt.core.network import Network
from kt.core.parts import WHOLE
from kt.pretext_train import build_task

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
HOWTO = (ROOT / "docs" / "howto.md").read_text(encoding="utf-8")
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
EVERYTHING = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
# Fences of the how-to say what each example's file is called.
BLOCKS = {
    name: body
    for name, body in re.findall(r"^```(?:python|yaml) (\S+)\n(.*?)^```$", HOWTO, re.M | re.S)
}
PLUGINS = [name for name in BLOCKS if name.endswith(".py")]
OVERLAYS = [name for name in BLOCKS if name.endswith(".yaml")]


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """Adds the how-to's plug-ins to the packages, as if their files stood there."""
    for name in PLUGINS:
        package = importlib.import_module(".".join(Path(name).parts[:-1]))
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(BLOCKS[name], encoding="utf-8")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(path.parent)])
    importlib.invalidate_caches()
    yield
    for name in PLUGINS:
        sys.modules.pop(".".join(Path(name).with_suffix("").parts), None)


@pytest.mark.parametrize(
    "name, row", [("explanation", "| `supervised` | the target"), ("reference", "/supervised/s")]
)
def test_documents_say_how_many_of_the_labels_the_bound_learns_from(name, row):
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").partition(row)[2]
    assert f"{100 * (1 - training.HELD_OUT):g} % of them" in text.splitlines()[0]
    assert f"{training.MOST_HELD_OUT:,}" in text[:500]
    pack = crafted.pack(crafted.noise(60, 12))
    assert len(training.hold_out(pack)[1]) == 60 * training.HELD_OUT


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def anchors(path: Path) -> set[str]:
    """Gives the anchors that GitHub makes of a document's headings."""
    heads = re.findall(r"^#+ (.+)$", without_code(path.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


# ---------------------------------------------------------------------------- names


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_leads_to_a_file_and_a_heading(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        wanted = path.parent / name if name else path
        assert wanted.is_file(), link
        assert not anchor or anchor in anchors(wanted), link


def test_the_reference_of_the_configuration_is_the_generated_one():
    written = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert written == reference.reference(), "run `make docs`"
    assert re.search(r"^docs:.*?\n(\t.*\n)*\t.*\bdocs/config\.md$", makefile(), re.M)


def test_every_program_and_every_make_target_that_is_named_exists():
    programs = set(re.findall(r"python -m kt\.([a-z_]+)", EVERYTHING))
    steps = {path.stem for path in (ROOT / "kt").glob("*.py") if "main" in path.read_text()}
    assert programs == steps
    targets = set(re.findall(r"^([a-z]+):.*## ", makefile(), re.M))
    assert set(re.findall(r"(?:`|^)make ([a-z]+)", EVERYTHING, re.M)) == targets


def makefile() -> str:
    return (ROOT / "Makefile").read_text(encoding="utf-8")


def test_every_preset_and_profile_that_is_named_exists():
    named = set(re.findall(r"\b((?:presets|profiles)/[\w/-]+(?:\.yaml|\.sh)?)", EVERYTHING))
    presets = {str(path.relative_to(ROOT)) for path in (ROOT / "presets").rglob("*.yaml")}
    assert presets <= named
    assert all((ROOT / name).exists() for name in named), named


def test_the_map_of_the_code_holds_every_module_once_and_no_other():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    mapped = re.findall(r"^\| `(kt/[\w/]+\.py)`", text, re.M)
    modules = [path for path in (ROOT / "kt").rglob("*.py") if path.name != "__init__.py"]
    assert sorted(mapped) == sorted(path.relative_to(ROOT).as_posix() for path in modules)


def test_every_fault_names_tests_that_exist():
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = [row for row in re.findall(r"^\| (.*) \|$", text, re.M) if row[:3] not in ("---", "fau")]
    assert len(rows) > 30
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row.rsplit(" | ", 1)[1])
        assert named, row
        for file, test in named:
            assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(), re.M), test


def test_the_exit_codes_are_the_promised_ones():
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.M)}
    errors = step.StepError.__subclasses__()
    assert codes == {0, *(error.exit_code for error in errors)}


def test_the_tutorial_explains_every_section_of_the_report():
    page = (ROOT / "kt" / "report.html.j2").read_text(encoding="utf-8")
    sections = re.findall(r"<h2>([\w ,]+)", page)
    told = re.findall(r"^### (.+)$", TUTORIAL, re.M)
    assert told == [name.strip() for name in sections if name.strip() != "How to read this"]


def test_the_tutorial_names_the_size_that_own_pictures_get():
    size = config.read(ROOT / "presets" / "photos.yaml")["datasets"]["images"]["size"]
    assert f"{size} x {size} pixels" in TUTORIAL and f", {size}, 10**8)" in TUTORIAL


def test_the_howto_says_how_many_targets_another_k_costs():
    one, two = (
        len(workflow.judged(config.resolve(ROOT, {"images": "a.zip", "clusters": clusters})))
        for clusters in ([100], [100, 200])
    )
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
    assert f"with `images=` each k costs {words[two - one]}." in HOWTO


# ---------------------------------------------------------------------------- examples


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_overlay_of_the_howto_is_a_valid_configuration(plugins, name):
    config.resolve(ROOT, yaml.safe_load(BLOCKS[name]))


@pytest.mark.parametrize("name", PLUGINS)
def test_no_example_imports_torch_when_the_configuration_is_read(name):
    top = ast.parse(BLOCKS[name]).body
    found = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in top if isinstance(node, ast.ImportFrom)}
    assert not [one for one in found if one.split(".")[0] in ("torch", "torchvision", "skimage")]


def test_the_examples_keep_the_style_of_the_code(plugins, tmp_path):
    settings = ["--config", str(ROOT / "pyproject.toml"), str(tmp_path)]
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(["ruff", *command, *settings], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_the_backbone_of_the_howto_gives_maps_of_all_its_layers(plugins):
    values = {"widths": [4, 6, 8]}
    network = backbone.build("separable", values).eval()
    checked = config.options("backbones", "separable", values)
    assert network.layers == config.plugin("backbones", "separable").layers(checked)
    assert [network.map_shape(32, layer) for layer in network.layers] == [
        (4, 16, 16), (6, 8, 8), (8, 4, 4),
    ]  # fmt: skip
    assert network.features(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), map=2).shape == (2, 32)


def test_the_task_of_the_howto_orders_the_channels_of_each_image_by_its_label(plugins):
    pixels = torch.from_numpy(crafted.noise(64, 12))
    context = crafted.context(12, 64)
    task = build_task(config.Plugin(name="channels", orders=6), context)
    views, labels = task.batch(pixels[:, None], torch.arange(64), 0)
    assert set(labels.tolist()) == set(range(6))
    for view, image, label in zip(views[:, 0], pixels, labels.tolist(), strict=True):
        order = sorted(itertools.permutations(range(3)))[label]
        for found, channel, mean, std in zip(view, order, context.mean, context.std, strict=True):
            assert torch.allclose(found * std + mean, image[channel] / 255, atol=1e-6)
    part = torch.tensor([7, 3])
    again, _ = task.batch(pixels[part][:, None], part, 0)
    assert torch.equal(again, views[part])


def test_the_task_of_the_howto_is_learned_by_the_backbone_of_the_howto(plugins):
    pixels = crafted.noise(64, 16)
    pixels[:, 0] //= 4  # darker than the others: the order can be seen
    pixels[:, 1] //= 2
    rows = torch.arange(64)
    task = build_task(config.Plugin(name="channels", orders=6), crafted.context(16, 64))
    torch.manual_seed(0)
    network = Network(backbone.build("separable", {"widths": [8, 16]}), task)
    settings = crafted.training(lr=0.01, batch=16)
    job = training.Job(
        network, task, crafted.pack(pixels), rows, rows[:0], settings, 12, 0, "channels"
    )
    assert training.train(job)[-1]["top1"] > 0.9


def test_the_source_of_the_howto_is_packed_with_its_labels(plugins, tmp_path):
    pixels, labels = crafted.discs(36, 32)
    rows = {"train": pixels.transpose(0, 2, 3, 1), "train_labels": labels.numpy()}
    np.savez(tmp_path / "mine.npz", **rows, test=rows["train"][:6] // 2, test_labels=labels[:6])
    values = yaml.safe_load(BLOCKS["arrays.yaml"])["datasets"]["mine"]
    dataset = config.Dataset(**(values | {"path": str(tmp_path / "mine.npz")}))
    folder = tmp_path / "packed"
    options = {"dataset": dataset, "seed": 0, "state": None, "part": WHOLE, "threads": 1}
    ingest.run(argparse.Namespace(output=folder, **options))
    data = evaluate.read_data(folder)
    assert (len(data.pool), len(data.train.pack), len(data.test.pack)) == (18, 18, 6)
    kept = [int(key.rsplit("/", 1)[1]) for key in data.train.pack.keys]
    assert data.train.labels.tolist() == labels[kept].tolist()


def test_the_evaluation_of_the_howto_tells_colours_apart(plugins):
    network = backbone.Backbone({"colour": torch.nn.Identity()}).eval()
    found = evaluate.judge_one("nearest_mean", {"map": 1}, network, crafted.data(), 0)
    values = {record["metric"]: record["value"] for record in found}
    assert set(values) == {"top1", "mean_class_accuracy"} and values["top1"] > 0.9


def test_the_code_of_the_tutorial_runs_on_the_files_that_it_names(tmp_path, monkeypatch):
    folder = re.search(r'load_backbone\("(results/[^"]+)/model', TUTORIAL)[1]
    monkeypatch.chdir(tmp_path)
    plugin = crafted.plugin(crafted.PLAIN)
    model.save(Path(folder), model.fresh(plugin, 0), plugin, {})
    write_packed(Path("results/data/images"), 64)
    write_photos(Path("new photos"))
    scope = {"images": np.zeros((2, 3, 64, 64), np.uint8)}
    use, photos, tune = re.findall(r"^```python\n(.*?)^```$", TUTORIAL, re.M | re.S)
    exec(use, scope)
    assert scope["features"].shape == (2, 16)
    exec(photos, scope)
    assert scope["features"].shape == (3, 16)
    before = judge.weights_digest(scope["backbone"])
    exec(tune, scope)
    assert scope["loss"].item() < 0.9 < np.log(3)  # that of guessing
    assert judge.weights_digest(scope["backbone"]) != before
    assert isinstance(scope["backbone"], type(kt.load_backbone(folder)))


def write_packed(folder: Path, size: int) -> None:
    pixels, labels = crafted.discs(60, size)
    keys = crafted.names(60)
    crafted.write_pack(folder / "train.h5", pixels, keys)
    with table.create(folder / "train-labels.h5", "labels", {}) as file:
        table.put(file, "labels", labels.numpy())
        table.put_strings(file, "keys", keys)
        table.put_strings(file, "classes", ["apple", "bird", "cloud"])


def write_photos(folder: Path) -> None:
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(encoded(picture(number, 0, 80), "JPEG"))


def test_readme_and_tutorial_name_layers_that_the_presets_have():
    for text in EVERYTHING, kt.__doc__:
        for target, teacher, layer, k in re.findall(
            r'load_backbone\("results/targets/(\w+)/(\w+)/(\w+)/k(\d+)/s0', text
        ):
            settings = config.resolve(ROOT, {"images": "photos"})
            assert layer in settings.teachers[teacher].layers
            assert target in settings.targets and int(k) in settings.clusters
