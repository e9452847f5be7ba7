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
@pytest.mark.parametrize("overlays", dict.fromkeys(line[1] for line in LINES))
def test_the_runs_of_all_lines_are_planned(overlays, tmp_path):
    """Also where a later file names another plug-in, whose options Snakemake itself would mix."""
    files = ["presets/paper.yaml", *overlays.strip("`").split()]
    command = [*SNAKEMAKE, "-n", "--cores", 1, "--directory", tmp_path, "--configfile", *files]
    planned = jobs(run(*command))
    for line in LINES:
        model = line[2].strip("`")
        if line[1] == overlays and "/" in model:
            assert f"target_train {model.replace('/', ' ', 1)} s0" in planned
        elif line[1] == overlays:
            assert f"pretext_train {model} s0" in planned


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
