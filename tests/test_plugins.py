"""One contract for every plug-in found by file name; a new file is tested without a new test.

Options come from config.yaml and the presets, which must use every plug-in somewhere.
"""

import importlib
import subprocess
import sys
from pathlib import Path

import crafted
import drawing
import drawn_voc
import pytest
import torch
from torch import nn

from kt import config, evaluate
from kt.core import model, step
from kt.core.layouts import POOL, SPLITS, TEST, TRAIN
from kt.core.network import Network

ROOT = Path(__file__).parent.parent
KINDS = ("tasks", "backbones", "sources", "evaluations")
ALL = [(kind, name) for kind in KINDS for name in config.plugins(kind)]
SIZE, NUMBER = 64, 24
QUICK = {
    "finetune": {"labels_per_class": [2], "fractions": [0.2], "images": 24},
    "nonlinear": {"images": 24},
    "svm": {"labels_per_class": [1], "draws": 2, "iterations": 20},
    "clusters": {"view_clusters": 4, "view_images": 30},
    "torchvision": {"model": "resnet18", "last": None},
    "voc_classification": {
        "size": 48,
        "map": 2,
        "iterations": 10,
        "labels_per_class": [1],
        "draws": 1,
        "finetune": None,
    },
    "voc_detection": {"min_size": 48, "max_size": 64, "anchors": [16], "hidden": 16},
    "voc_segmentation": {"crop": 48},
}
# What no preset can name: a file of the user's, and a package that may not be there.
ELSEWHERE = {
    "file": {
        "path": str(Path(__file__).parent / "network_of_mine.py"),
        "function": "tiny",
        "options": {"widths": [4, 8]},
        "digest": None,
    },
    "timm": {"model": "resnet10t", "last": 4},
}
# Sources that need a network or a large download have tests of their own.
DRAWN = {
    "folder": lambda root: drawing.write_folder(drawing.tree(), root / "pictures"),
    "pictures": lambda root: drawing.write_folder(drawing.tree(), root / "pictures"),
    "archive": lambda root: drawing.write_zip(drawing.tree(), root / "pictures.zip"),
    "tars": lambda root: drawing.write_shards(drawing.tree(), root / "pictures"),
}


def options_in_use() -> dict[tuple[str, str], dict]:
    """Gives the options of every plug-in that config.yaml or a preset names."""
    found = {("backbones", name): values for name, values in ELSEWHERE.items()}
    overlays = [{}, *(config.read(path) for path in sorted((ROOT / "presets").glob("*.yaml")))]
    for overlay in overlays:
        settings = config.resolve(ROOT, overlay)
        used = [("backbones", target.backbone) for target in settings.targets.values()]
        used += [("tasks", target.task) for target in settings.targets.values()]
        for teacher in settings.teachers.values():
            used += [("tasks", teacher.task)] * bool(teacher.task)
            used += [("backbones", teacher.backbone)] * isinstance(teacher.backbone, config.Plugin)
        for kind, plugin in used:
            found.setdefault((kind, plugin.name), plugin.options())
        for name, values in settings.evaluations.items():
            found.setdefault(("evaluations", name), values)
    return found


@pytest.fixture(scope="module")
def examples():
    return options_in_use()


def values_of(examples, kind, name) -> dict:
    assert (kind, name) in examples, f"config.yaml and presets/ use kt/{kind}/{name}.py nowhere"
    return examples[kind, name] | QUICK.get(name, {})


@pytest.fixture(scope="module")
def devkit(tmp_path_factory):
    return drawn_voc.write(tmp_path_factory.mktemp("voc"), 4, 2, 3)


def of(kind):
    return pytest.mark.parametrize("name", config.plugins(kind))


# ---------------------------------------------------------------------------- every plug-in


@pytest.mark.parametrize("kind, name", ALL)
def test_a_plug_in_says_what_it_is(kind, name):
    module = importlib.import_module(f"kt.{kind}.{name}")
    assert module.__doc__ and module.__doc__.strip()


@pytest.mark.parametrize("kind, name", [pair for pair in ALL if pair[0] != "sources"])
def test_every_option_is_typed_described_and_without_a_default(kind, name):
    options = config.plugin(kind, name).Options
    assert issubclass(options, config.Settings)
    for key, field in options.model_fields.items():
        assert field.description, f"{name}.{key} has no description"
        # But of a backbone, so that one value replaces a network, what leaves it as it is.
        nothing = kind == "backbones" and field.default in (None, {})
        assert field.is_required() or nothing, f"{name}.{key} has a default; see config.yaml"


@pytest.mark.parametrize("kind, name", [pair for pair in ALL if pair[0] != "sources"])
def test_options_in_use_are_accepted_and_a_misspelt_one_is_refused(kind, name, examples):
    values = values_of(examples, kind, name)
    key = next(iter(config.plugin(kind, name).Options.model_fields))
    config.options(kind, name, values)
    with pytest.raises(config.ConfigError, match=f"here.{key}x: unknown key; did you mean '{key}'"):
        config.options(kind, name, values | {f"{key}x": 1}, "here")


def test_importing_every_plug_in_imports_nothing_heavy():
    code = (
        "import sys, importlib\n"
        f"for kind, name in {ALL!r}:\n"
        "    importlib.import_module(f'kt.{kind}.{name}')\n"
        "heavy = {'torch', 'torchvision', 'sklearn', 'skimage', 'matplotlib', 'faiss', 'scipy'}\n"
        "print(*sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# ---------------------------------------------------------------------------- tasks


def built_task(name, examples):
    labels = torch.arange(NUMBER) % 3
    plugin = config.Plugin(name=name, **values_of(examples, "tasks", name))
    context = crafted.context(SIZE, NUMBER, 0, labels, 3)
    return config.plugin("tasks", name).build(
        config.options("tasks", name, plugin.options()), context
    )


def batch_of(task, index, epoch=0):
    pixels = torch.from_numpy(crafted.scenes(NUMBER, SIZE))
    return task.batch(pixels[task.plan(index, epoch)["rows"]], index, epoch)


@of("tasks")
def test_a_task_gives_views_and_labels_of_the_declared_shape(name, examples):
    task, index = built_task(name, examples), torch.arange(NUMBER)
    views, labels = batch_of(task, index)
    assert views.shape == (NUMBER, task.num_views, 3, task.view_size, task.view_size)
    assert views.dtype == torch.float32 and torch.isfinite(views).all()
    assert labels.shape == (NUMBER,) and labels.dtype == torch.int64
    assert labels.min() >= 0 and labels.max() < task.num_classes
    assert torch.equal(task.plan(index, 0)["rows"][:, 0], index)


@of("tasks")
@pytest.mark.parametrize("epoch", [-1, 3])
def test_a_tasks_compiled_loop_agrees_with_its_tensor_operations(name, examples, epoch):
    task, index = built_task(name, examples), torch.arange(NUMBER).flip(0)[3:]
    pixels, plan = crafted.noise(NUMBER, SIZE), task.plan(index, epoch)
    pixels[2] = 90  # flat
    pixels[4] = 120 + (pixels[4] > 127)  # under one grey level of variance
    views = task.views(torch.from_numpy(pixels[plan["rows"].numpy()]), plan)
    filled = task.fill(pixels, plan)
    assert filled.dtype == torch.float32 and filled.shape == views.shape
    assert (filled - views).abs().max() < 2e-4


@of("tasks")
def test_a_tasks_views_are_made_on_the_device_of_the_images(name, examples):
    task, index = built_task(name, examples), torch.arange(NUMBER)
    plan = {key: value.to("meta") for key, value in task.plan(index, 0).items()}
    images = torch.empty(*plan["rows"].shape, 3, SIZE, SIZE, dtype=torch.uint8, device="meta")
    assert task.views(images, plan).device.type == "meta"  # refuses tensors of another device


@of("tasks")
@pytest.mark.parametrize("epoch", [-1, 3])
def test_a_task_draws_the_same_for_any_batch(name, examples, epoch):
    task, index = built_task(name, examples), torch.arange(NUMBER)
    views, labels = batch_of(task, index, epoch)
    parts = [batch_of(task, part, epoch) for part in index.flip(0).split(5)]
    assert torch.equal(torch.cat([part[1] for part in parts]), labels.flip(0))
    assert torch.allclose(torch.cat([part[0] for part in parts]), views.flip(0), atol=1e-4)


@of("tasks")
def test_a_task_orders_the_rows_at_hand_by_epoch(name, examples):
    task, index = built_task(name, examples), torch.arange(0, NUMBER, 2)
    order = task.order(index, 0)
    assert len(order) == len(index) and set(order.tolist()) <= set(index.tolist())
    assert torch.equal(order, task.order(index, 0))
    assert not torch.equal(order, task.order(index, 1))


@of("tasks")
def test_a_tasks_head_turns_maps_into_logits_that_train_the_backbone(name, examples):
    task = built_task(name, examples)
    network = Network(model.fresh(crafted.plugin(crafted.PLAIN), 0), task)
    views, labels = batch_of(task, torch.arange(8))
    logits = network(views)
    assert logits.shape == (8, task.num_classes)
    nn.functional.cross_entropy(logits, labels).backward()
    assert all(weight.grad is not None for weight in network.parameters())


@of("tasks")
def test_a_task_says_before_the_work_whether_the_images_suit_it(name, examples):
    module, values = config.plugin("tasks", name), values_of(examples, "tasks", name)
    module.check(config.options("tasks", name, values), SIZE)


# ---------------------------------------------------------------------------- backbones


@pytest.fixture(autouse=True)
def files_may_run(monkeypatch):
    monkeypatch.setenv("KT_RUN_FILES", "1")


def built_backbone(name, examples):
    if name == "timm":
        pytest.importorskip("timm", reason="timm is optional and not installed")
    return model.fresh(config.Plugin(name=name, **values_of(examples, "backbones", name)), 0).eval()


@of("backbones")
def test_a_backbone_gives_a_finite_map_for_every_layer(name, examples):
    backbone = built_backbone(name, examples)
    pixels = torch.from_numpy(crafted.scenes(3, SIZE))
    with torch.inference_mode():
        maps = backbone.maps(backbone.normalise(pixels), backbone.layers)
    assert list(maps) == backbone.layers and len(backbone.layers) >= 1
    for layer, found in maps.items():
        assert tuple(found.shape) == (3, *backbone.map_shape(SIZE, layer))
        assert torch.isfinite(found).all() and found.std() > 0
        assert backbone.features(pixels, layer, 1).shape == (3, found.shape[1])


@of("backbones")
def test_a_backbone_tells_its_layers_before_it_is_built(name, examples):
    checked = config.options("backbones", name, values_of(examples, "backbones", name))
    built, told = built_backbone(name, examples), config.plugin("backbones", name).layers(checked)
    assert told is None or list(told) == built.layers


@of("backbones")
def test_a_backbone_takes_images_of_several_sizes_one_by_one_or_together(name, examples):
    backbone = built_backbone(name, examples)
    for size in (SIZE, SIZE + 9):
        pixels = torch.from_numpy(crafted.scenes(3, size))
        together = backbone.features(pixels)
        alone = torch.cat([backbone.features(pixels[row : row + 1]) for row in range(3)])
        assert torch.allclose(together, alone, atol=1e-4)


@of("backbones")
def test_a_backbone_survives_the_disk(name, examples, tmp_path):
    backbone = built_backbone(name, examples)
    plugin = config.Plugin(name=name, **values_of(examples, "backbones", name))
    model.save(tmp_path, backbone, plugin, {})
    pixels = torch.from_numpy(crafted.scenes(2, SIZE))
    assert torch.equal(model.load(tmp_path).features(pixels), backbone.features(pixels))


# ---------------------------------------------------------------------------- sources


@of("sources")
def test_a_source_offers_entries_and_their_origin(name):
    module = config.plugin("sources", name)
    assert callable(module.entries) and callable(module.origin)


def dataset(name, path) -> config.Dataset:
    values = {"source": name, "path": str(path), "size": 16, "max_bad_fraction": 0.0}
    counts = dict.fromkeys(("unlabelled", "labelled", "test"))
    return config.Dataset(**values, **counts, max_pixels=10_000, near_copies=None, storage="pixels")


@of("sources")
def test_a_source_without_its_files_says_so(name, tmp_path):
    if name == "torchvision":
        pytest.skip("asks its servers for what is missing")
    with pytest.raises(step.StepError):
        list(config.plugin("sources", name).entries(dataset(name, tmp_path / "nothing")))


@of("sources")
def test_a_source_gives_every_picture_once_with_split_and_class(name, tmp_path):
    if name not in DRAWN:
        pytest.skip("reads a published data set; tested with one made up in test_sources.py")
    module, wanted = config.plugin("sources", name), dataset(name, DRAWN[name](tmp_path))
    found = [entry for entry in module.entries(wanted) if entry.usable]
    counts = {split: sum(entry.split == split for entry in found) for split in SPLITS}
    assert counts == {POOL: 36, TRAIN: 12, TEST: 12}
    assert len({entry.key for entry in found}) == 60
    assert {entry.class_name for entry in found if entry.split == TRAIN} == set(drawing.CLASSES)
    assert isinstance(module.origin(wanted), dict)


# ---------------------------------------------------------------------------- evaluations


@of("evaluations")
def test_an_evaluation_gives_fractions_with_what_they_were_counted_over(name, examples, devkit):
    module, values = config.plugin("evaluations", name), values_of(examples, "evaluations", name)
    if "path" in values:
        values["path"] = str(devkit)
    if "training" in values:
        values["training"] = {**values["training"], "epochs": 1}
    assert isinstance(module.NEEDS_LABELS, bool) and isinstance(module.FROZEN, bool)
    backbone = model.fresh(crafted.plugin(crafted.PLAIN), 0).eval()
    records = evaluate.judge_one(name, values, backbone, crafted.data(), 0)
    assert records
    for record in records:
        assert isinstance(record["metric"], str) and isinstance(record["n"], int)
        assert type(record["value"]) is float and 0 <= record["value"] <= 1
    assert module.CHOOSES is ("validation_top1" in {record["metric"] for record in records})
    described = [tuple(sorted({**record, "value": 0}.items())) for record in records]
    assert len(set(described)) == len(described)  # no two records say the same thing
