"""Each line of the tables of the paper has settings that fit, a model and evaluations."""

import re

import pytest
from running import ROOT, SNAKEMAKE, jobs, run

from kt import config
from kt import workflow as plan
from kt.core import model

PAGE = (ROOT / "docs" / "paper.md").read_text()
LINES = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("|") and "presets/" in line and "overlays" not in line
]


def resolved(overlays):
    return config.resolve(ROOT, *(config.read(ROOT / path) for path in overlays))


def test_every_line_of_the_tables_is_there():
    names = " ".join(line[0] for line in LINES)
    for wanted in ("random", "Jigsaw", "CC + HOG", "VGG16", "AlexNet", "supervised", "Places"):
        assert wanted in names
    assert {500, 1000, 2000, 5000, 10000} == set(map(int, re.findall(r"k = (\d+)", names)))


@pytest.mark.parametrize("line", LINES, ids=[line[0] for line in LINES])
def test_a_line_names_a_model_and_evaluations_of_its_run(line):
    _, overlays, model, evaluations = line
    settings = resolved(["presets/paper.yaml", *overlays.strip("`").split()])
    assert model.strip("`") in {found.name for found in plan.judged(settings)}
    assert set(re.findall(r"`(\w+)`", evaluations)) <= set(settings.evaluations)


def test_every_overlay_of_the_paper_is_used():
    used = " ".join(line[1] for line in LINES)
    for path in sorted((ROOT / "presets" / "paper").glob("*.yaml")):
        assert f"presets/paper/{path.name}" in used


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES[5:6], ids=["same network"])
def test_a_later_file_may_name_another_plug_in(line, tmp_path):
    """Snakemake itself would leave the options of the plug-in before in place."""
    files = ["presets/paper.yaml", *line[1].strip("`").split()]
    command = [*SNAKEMAKE, "-n", "--cores", 1, "--directory", tmp_path, "--configfile", *files]
    done = run(*command)
    assert "target_train small deep/conv4/k2000 s0" in jobs(done)


@pytest.mark.parametrize(
    "name, task, source", [("", "deep", "paper"), ("jigsaw", "own", "article")]
)
def test_a_puzzle_has_the_numbers_that_its_options_cite(name, task, source):
    overlay = [f"presets/paper/{name}.yaml"] if name else []
    task = resolved(["presets/paper.yaml", *overlay]).teachers[task].task
    fields = config.plugin("tasks", task.name).Options.model_fields
    cited = {
        key: float(found[1])
        for key, field in fields.items()
        if (found := re.search(rf"{source}: ([\d.]+)", field.description))
    }
    assert len(cited) >= 5
    assert {key: task.options()[key] for key in cited} == cited


@pytest.mark.parametrize("name", ["", "paper", "cifar10", "imagenette", "photos"])
def test_the_cells_of_hog_fill_the_image_and_no_block_is_blurred(name):
    given = {"images": "a.zip"} if name == "photos" else {}
    overlays = [config.read(ROOT / f"presets/{name}.yaml")] if name and not given else []
    settings = config.resolve(ROOT, *overlays, given)
    size = settings.datasets[settings.use.cluster].size
    hog = settings.teachers["hog"]
    cells = hog.backbone.options()["cells"]
    assert model.fresh(hog.backbone, 0).map_shape(size) == (36, cells - 1, cells - 1)
    assert (hog.map, hog.pool) == (cells - 1, "mean")
