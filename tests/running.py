"""Runs Snakemake and single steps as a user does, and reads what they print."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest
import yaml

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny.yaml"
SNAKEMAKE = (sys.executable, "-m", "snakemake")


def environment(cwd: Path) -> dict[str, str]:
    """Gives the environment of a user who activated this interpreter and stands in `cwd`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("KT_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    return {**kept, "PATH": path, "PWD": str(cwd)}


def run(*command, cwd: Path = ROOT, **more) -> subprocess.CompletedProcess:
    """Runs a command to its end; both streams are kept as text."""
    command = [str(part) for part in command]
    return subprocess.run(
        command, cwd=cwd, env=environment(cwd), capture_output=True, text=True, timeout=800, **more
    )


def workflow(folder: Path, images, *options, files=(), config=(), cwd: Path = ROOT):
    """Runs the workflow on `images` with results below `folder`.

    Args:
        folder: For `--directory`.
        images: For `--config images=`; None leaves it out.
        *options: More of Snakemake's options.
        files: Overlays on tests/tiny.yaml.
        config: More of `--config`, such as `clusters=5`.
        cwd: Where the user stands.
    """
    return run(*command(folder, images, *options, files=files, config=config), cwd=cwd)


def command(folder: Path, images, *options, files=(), config=()) -> list[str]:
    """Gives the command line that `workflow` runs."""
    given = [*([f"images={images}"] if images is not None else []), *config]
    parts = [*SNAKEMAKE, "--snakefile", ROOT / "Snakefile", "--cores", 2, "--directory", folder]
    # Lists last: an option with a list would take targets in `options` for more of its own.
    parts += [*options, "--configfile", TINY, *files, *(["--config", *given] if given else [])]
    return [str(part) for part in parts]


def jobs(done: subprocess.CompletedProcess) -> list[str]:
    """Lists the jobs that a run or a dry run names, in alphabetical order."""
    assert done.returncode == 0, output(done)
    found = re.findall(r"^Job \d+: (.*)$", output(done), re.MULTILINE)
    return sorted(name for name in found if name != "all is done")


def install(*packages: str) -> None:
    """Installs packages of Debian's, if it may; one worker at a time."""
    if os.geteuid() or not shutil.which("apt-get"):
        return
    with open(Path(tempfile.gettempdir()) / "kt-apt.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        subprocess.run(["apt-get", "-qq", "update"], capture_output=True)
        command = ["apt-get", "-qq", "install", "-y", "--no-install-recommends", *packages]
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(command, capture_output=True, env=quiet)


def missing(reason: str) -> NoReturn:
    """Skips a test that this machine cannot run; under `.ci/run`, where it must, lets it fail."""
    (pytest.fail if "KT_CI" in os.environ else pytest.skip)(reason)


def output(done: subprocess.CompletedProcess) -> str:
    """Gives all that a command printed."""
    return done.stdout + done.stderr


def overlay(path: Path, values: dict) -> Path:
    """Writes an overlay on the configuration."""
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path
