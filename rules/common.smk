"""Reads and checks the configuration; what more than one rule needs."""

import contextlib
import fcntl
import os
import sys
from pathlib import Path

ROOT = Path(workflow.basedir)
sys.path.insert(0, str(ROOT))

from kt import config as schema
from kt import workflow as plan
from kt.core.step import DataError, StepError
from kt.ingest import FEWEST
from kt.sources.pictures import count_pictures

# Jobs find kt also where it is not installed (conda environments, cluster nodes), and keep their
# terminal output to what a user of the workflow wants to see.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)
os.environ["KT_WORKFLOW"] = "1"

# Snakemake has gone to --directory by now; cluster jobs get the value of the run that sent them.
if workflow.overwrite_workdir is None:
    os.environ["KT_STARTED_IN"] = os.getcwd()
os.environ.setdefault("KT_STARTED_IN", os.environ.get("PWD", os.getcwd()))


def read_config():
    """Gives the checked settings and whether the images have labels; ends with 2 if wrong."""
    try:
        if config.get("images"):
            config["images"] = str(_absolute(str(config["images"])))
        settings = schema.resolve(ROOT, config)
        labelled = True
        if settings.images:
            number, labelled = count_pictures(settings.images)
            if number < FEWEST:
                raise DataError(
                    f"images: expected at least {FEWEST} pictures to learn from, found {number} in "
                    f"{settings.images}"
                )
            if number < max(settings.clusters):
                raise schema.ConfigError(
                    f"clusters: k = {max(settings.clusters)} is more than the {number} pictures "
                    f"in {settings.images}; choose a smaller k or more pictures"
                )
        return settings, labelled
    except StepError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(error.exit_code)  # Snakemake would turn it into a traceback and a 1


def _absolute(path):
    """Makes a path absolute against the folder the user stands in, --directory or not."""
    return Path(os.environ["KT_STARTED_IN"]) / Path(path).expanduser()


def lift_stale_lock():
    """Takes away the lock that a killed run left behind; a run that lives keeps its own.

    Snakemake's lock is a file and outlives its process. A shared lock of the kernel does not: where
    it can be had alone, no other run is alive. The file stays open, and locked, to the end.
    """
    folder = Path(".snakemake")
    folder.mkdir(exist_ok=True)
    file = open(folder / "kt.lock", "w")
    with contextlib.suppress(OSError):  # another run is alive, or the file system has no locks
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for stale in (folder / "locks").glob("*.lock"):
            print(f"taking away the lock of a run that was killed: {stale}", file=sys.stderr)
            stale.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_SH)
    return file


SETTINGS, LABELLED = read_config()
ALIVE = lift_stale_lock() if workflow.is_main_process else None
TRAINING_THREADS = max(1, (workflow.cores or 8) // 2)  # two trainings run side by side


def pack_of(role, split="train-unlabelled"):
    """Gives the packed images that serve a role of `use`."""
    return f"results/data/{getattr(SETTINGS.use, role)}/{split}.h5"


def data_report_of(role):
    """Gives the data report of the data set that serves a role."""
    return f"results/data/{getattr(SETTINGS.use, role)}/report.json"


def dumps(value):
    """Gives settings as JSON for the command line."""
    return schema.dumps(value)


wildcard_constraints:
    dataset=r"[^/]+",
    split=r"train-unlabelled|train|test",
    teacher=r"[^/]+",
    target=r"[^/]+",
    layer=r"[^/]+",
    k=r"\d+",
    seed=r"\d+",
    job=r"[^/]+",
