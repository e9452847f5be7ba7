"""Each line of the tables of the paper has settings that fit, a model and evaluations."""

import re

import pytest
from running import ROOT

from kt import config
from kt import workflow as plan

PAGE = (ROOT / "docs" / "paper.md").read_text()
LINES = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("|") and "presets/" in line and "overlays" not in line
]


def resolved(overlays):
    values = config.read(ROOT / "presets" / "paper.yaml")
    for path in overlays:
        values = config.merge(values, config.read(ROOT / path))
    return config.resolve(ROOT, values)


def test_every_line_of_the_tables_is_there():
    names = " ".join(line[0] for line in LINES)
    for wanted in ("random", "Jigsaw", "CC + HOG", "VGG16", "AlexNet", "supervised", "Places"):
        assert wanted in names
    assert {500, 1000, 2000, 5000, 10000} == set(map(int, re.findall(r"k = (\d+)", names)))


@pytest.mark.parametrize("line", LINES, ids=[line[0] for line in LINES])
def test_a_line_names_a_model_and_evaluations_of_its_run(line):
    _, overlays, model, evaluations = line
    settings = resolved(overlays.strip("`").split())
    assert model.strip("`") in {found.name for found in plan.judged(settings)}
    assert set(re.findall(r"`(\w+)`", evaluations)) <= set(settings.evaluations)


def test_every_overlay_of_the_paper_is_used():
    used = " ".join(line[1] for line in LINES)
    for path in sorted((ROOT / "presets" / "paper").glob("*.yaml")):
        assert f"presets/paper/{path.name}" in used
