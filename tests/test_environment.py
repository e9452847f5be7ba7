"""The lists of dependencies agree: pyproject.toml, requirements.txt, envs/kt.yaml, the imports."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
import running
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import kt

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNTIME = [Requirement(line) for line in PROJECT["dependencies"]]
DEV = [Requirement(line) for line in PROJECT["optional-dependencies"]["dev"]]
CONDA_NAMES = {"torch": "pytorch"}
IMPORT_NAMES = {"faiss": "faiss-cpu", "PIL": "pillow", "skimage": "scikit-image", "yaml": "pyyaml"}
SUPPORTED = ["3.11", "3.12", "3.13"]


def lock_entries() -> list[tuple[Requirement, int]]:
    """Gives each pin of requirements.txt and how many sha256 hashes it carries."""
    text = (ROOT / "requirements.txt").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip()]
    pairs = [(line.split("--hash")[0], line) for line in lines]
    return [
        (Requirement(pin.strip()), len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", line)))
        for pin, line in pairs
    ]


def pins(name: str, python: str) -> list[str]:
    """Gives the versions to which the lock pins a package on Linux with the given Python."""
    place = {"python_full_version": f"{python}.0", "python_version": python}
    place |= {"sys_platform": "linux", "platform_machine": "x86_64"}
    return [
        next(iter(entry.specifier)).version
        for entry, _ in lock_entries()
        if canonicalize_name(entry.name) == canonicalize_name(name)
        and (entry.marker is None or entry.marker.evaluate(place))
    ]


def third_party_imports() -> set[str]:
    """Gives the top-level names that the files of kt import from outside."""
    names = set()
    for path in (ROOT / "kt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"kt"}


@pytest.mark.parametrize("python", SUPPORTED)
@pytest.mark.parametrize("wanted", [*RUNTIME, *DEV], ids=str)
def test_every_dependency_is_locked_once_within_its_bounds(wanted, python):
    found = pins(wanted.name, python)
    assert len(found) == 1
    assert wanted.specifier.contains(found[0])


def test_every_lock_entry_is_an_exact_pin_with_hashes():
    entries = lock_entries()
    assert len(entries) > len(RUNTIME) + len(DEV)
    for entry, hashes in entries:
        assert [bound.operator for bound in entry.specifier] == ["=="], entry
        assert hashes >= 1, entry


def test_the_lock_names_no_address_and_no_index():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert not [line for line in lines if "://" in line or line.startswith(("-", "#"))]


def test_the_conda_environment_has_the_runtime_dependencies_with_the_same_bounds():
    environment = yaml.safe_load((ROOT / "envs" / "kt.yaml").read_text())
    lines = (line.split(" ", 1) for line in environment["dependencies"])
    found = {name: SpecifierSet(bounds) for name, bounds in lines}
    python = found.pop("python")
    # Snakemake runs outside the jobs' environments.
    runtime = [wanted for wanted in RUNTIME if wanted.name != "snakemake"]
    assert found == {CONDA_NAMES.get(one.name, one.name): one.specifier for one in runtime}
    assert all(python.contains(version) for version in SUPPORTED)
    assert environment["channels"] == ["conda-forge", "nodefaults"]


def test_every_import_of_kt_is_a_dependency_and_those_of_extras_stand_in_their_plug_ins():
    declared = {wanted.name for wanted in RUNTIME}
    optional = set(PROJECT["optional-dependencies"]) - {
        "dev",
        "slurm",
        "cluster",
    }  # Snakemake's own
    imported = {IMPORT_NAMES.get(name, name) for name in third_party_imports()}
    assert imported - declared == optional
    for name in optional:
        line = re.compile(rf"^\s*(import|from) {name}\b", re.M)
        users = [path for path in (ROOT / "kt").rglob("*.py") if line.search(path.read_text())]
        assert users == [ROOT / "kt" / "backbones" / f"{name}.py"]


def test_in_ci_what_a_machine_lacks_fails_a_test_instead_of_skipping_it(monkeypatch):
    assert re.search(r"^export KT_CI=1\b", (ROOT / ".ci" / "run").read_text(), re.M)
    monkeypatch.delenv("KT_CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no disk"):
        running.missing("no disk")
    monkeypatch.setenv("KT_CI", "1")
    with pytest.raises(pytest.fail.Exception, match="no disk"):
        running.missing("no disk")


def test_python_bound_and_version_have_one_source():
    assert SpecifierSet(PROJECT["requires-python"]) == SpecifierSet(f">={SUPPORTED[0]}")
    assert PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", kt.__version__)
