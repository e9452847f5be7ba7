"""Every step on the smallest inputs, run in forked children: quick to start, to limit and to kill.

A child shares the imports of the test's process, so that it begins its work at once; what only a
fresh interpreter shows (signals during imports, memory for libraries) is run as a program.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import resource
import sys
import time
import traceback
from pathlib import Path

import crafted
import drawing
import torch
from running import ROOT

from kt import config
from kt.core import ending, resume, step

IMAGES = config.resolve(ROOT, {"images": "x"}).datasets["images"].model_dump() | {
    "source": "folder", "size": 28, "unlabelled": None, "labelled": None, "test": None,
}  # fmt: skip
EVALUATIONS = {"knn": {"neighbours": 3, "temperature": 0.07, "map": 1}}
CHOICE = {"images": 20, "clusters": [2, 3], "task": crafted.LABELS | {"crop": 0.6}}
FORKS = multiprocessing.get_context("forkserver")
# So that a child begins at once.
PRELOADED = ["pytest", "stages",
             "faiss", "jinja2", "kt.report", "kt.pretext_train", "kt.core.judge",
             "kt.tasks.jigsawpp", "kt.backbones.plain", "kt.evaluations.knn"]  # fmt: skip
STAGES = ("ingest", "pretext_train", "choose", "features", "cluster", "pseudo_labels",
          "target_train", "evaluate", "report")  # fmt: skip
TRAININGS = ("pretext_train", "target_train")


def options(name: str, made: Path, output: Path, epochs: int = 1) -> list[str]:
    """Gives the options of a step that reads from `made` and writes below `output`."""
    data, training = made / "data", {**crafted.TRAINING, "epochs": epochs}
    pool, report = ("--pack", data / "train-unlabelled.h5"), ("--data-report", data / "report.json")
    network = ("--backbone", crafted.PLAIN, "--training", training, "--epochs", epochs)
    given = {
        "ingest": ("--dataset", {**IMAGES, "path": str(made / "pictures")}, "--seed", 0),
        "pretext_train": (*pool, *report, *network, "--task", crafted.JIGSAW, "--seed", 0),
        "choose": (*pool, "--model", made / "pretext_train", "--layers", "conv1", "--map", 1,
                   "--clustering", crafted.CLUSTERING, "--choice", CHOICE, "--seed", 0),
        "features": (*pool, "--model", made / "pretext_train", "--layer", "conv2", "--map", 2),
        "cluster": ("--features", made / "features.h5", "--k", 4, "--seed", 0,
                    "--settings", crafted.CLUSTERING),
        "pseudo_labels": ("--features", made / "features.h5", "--clusters", made / "cluster.h5"),
        "target_train": (*pool, *report, *network, "--task", crafted.LABELS, "--seed", 0,
                         "--pseudo-labels", made / "pseudo_labels.h5"),
        "evaluate": ("--model", made / "target_train", "--seeds", 0, "--data", data,
                     "--evaluations", EVALUATIONS, "--describe", {"model": "m", "arm": "transfer",
                                                                  "dataset": "images"}),
        "report": ("--evaluations", made / "evaluate.json", "--settings", {"seeds": 1}),
    }[name]  # fmt: skip
    given += ("--output", output / place(name), "--threads", 1)
    if name == "report":
        given = given[:-2]
    return [json.dumps(value) if isinstance(value, dict) else str(value) for value in given]


def place(name: str) -> str:
    """Gives where a step's output stands below its folder."""
    suffix = {
        "features": ".h5",
        "cluster": ".h5",
        "pseudo_labels": ".h5",
        "evaluate": ".json",
        "choose": ".json",
    }
    return {"ingest": "data"}.get(name, name) + suffix.get(name, "")


def made(tmp_path_factory) -> Path:
    """Gives the folder of what every step made, once for the tests of a process."""
    folder = tmp_path_factory.getbasetemp() / "stages"
    if not (folder / "whole").exists():
        folder.mkdir(exist_ok=True)
        make(folder)
        (folder / "whole").touch()
    return folder


def make(folder: Path) -> Path:
    """Draws pictures and runs every step once; gives the folder with all that they made."""
    drawing.write_folder(drawing.tree(14, 4, 4), folder / "pictures")
    for name in STAGES:
        code, said = run(name, options(name, folder, folder))
        assert code == 0, said
    return folder


def start(name: str, given: list[str], said, *before) -> multiprocessing.Process:
    """Starts a step with options in a child.

    Args:
        name: Of the step.
        given: Its options.
        said: Where both streams go: a file's path, or the end of a pipe.
        *before: Functions to be called in the child first, such as `limit_memory`.
    """
    return call(_step, name, given, said, before)


def call(function, *arguments) -> multiprocessing.Process:
    """Starts a function of a module in a child."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    FORKS.set_forkserver_preload(PRELOADED)
    child = FORKS.Process(target=function, args=arguments)
    child.start()
    return child


def _step(name: str, given: list[str], said, before) -> None:
    code = 1
    try:
        file = open(said, "w") if isinstance(said, Path) else said
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        sys.stderr = open(2, "w", closefd=False)
        os.environ.pop("KT_WORKFLOW", None)
        torch.set_num_threads(1)
        ending.catch_signals()
        module = importlib.import_module(f"kt.{name}")
        sys.argv = [f"{name}.py", *given]
        for function in before:
            function()
        step.main(module.__doc__, module.add_arguments, module.run)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def run(name: str, given: list[str], *before) -> tuple[int, str]:
    """Runs a step in a child to its end; gives exit code (negative: the signal) and its words."""
    receiver, sender = FORKS.Pipe(duplex=False)
    child = start(name, given, sender, *before)
    sender.close()
    said = b"".join(iter(lambda: os.read(receiver.fileno(), 1 << 16), b""))
    child.join()
    return child.exitcode, said.decode(errors="replace")


def limit_memory(more: int) -> None:
    """Lets the address space of this process grow by so many bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def limit_files(most: int) -> None:
    """Lets no file of this process grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def dawdle() -> None:
    """Makes every file take long to be synced, and says so."""

    def slow(descriptor):
        os.write(2, b"syncing\n")
        time.sleep(1)

    os.fsync = slow


def save_always() -> None:
    """Makes trainings write a resume state after every step."""
    resume.SAVE_SECONDS, resume.SAVE_SHARE = 0.0, 1e9


def expect_room() -> None:
    """Lets trainings begin without a look at the room for their states, as if it went later."""
    resume.STATE_OF_WEIGHTS = 0


def digests(folder: Path) -> dict[str, str]:
    """Gives the SHA-256 of every file below a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
