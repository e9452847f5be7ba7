"""Reads and checks the configuration; what more than one rule needs."""

import contextlib
import fcntl
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

gc.freeze()  # Snakemake's modules stay; to look through them for garbage took 0.05 s

ROOT = Path(workflow.basedir)
sys.path.insert(0, str(ROOT))

from snakemake.settings.types import DeploymentMethod

from kt import config as schema
from kt import precheck
from kt import workflow as plan
from kt.core import layouts, lessons, lock
from kt.core.entries import FEWEST
from kt.core.step import DataError, StepError, read_json
from kt.sources.pictures import changed_since, count_pictures, has_labels, unread

# Jobs find kt also where it is not installed (conda environments, cluster nodes), and keep their
# terminal output to what a user of the workflow wants to see.
os.environ.update(
    PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    KT_WORKFLOW="1",
    KT_RUN_FILES="1",  # whoever names a file of code in the configuration wants it run
)

# Snakemake has gone to --directory by now, and a job on a cluster node starts there.
if workflow.overwrite_workdir is None:
    STARTED_IN = os.getcwd()
else:
    STARTED_IN = os.environ.get("KT_STARTED_IN") or os.environ.get("PWD") or os.getcwd()
os.environ.update(KT_STARTED_IN=STARTED_IN)


def read_config():
    """Gives the checked settings and whether the images have labels; ends with 2 if wrong."""
    try:
        settings = schema.resolve(ROOT, *overlays())
        judged_on = settings.datasets[settings.use.evaluate]
        for key, path in plan.given_files(settings).items():
            if not os.path.isfile(path):  # relative ones are meant from where results go
                raise schema.ConfigError(
                    f"{key}: expected a file, found none at {Path(path).absolute()}"
                )
        if settings.images:
            own, enough = settings.datasets["images"], max(FEWEST, *settings.numbers, 0)
            number, labelled = counted(own, enough)
            if number < FEWEST:
                raise DataError(
                    f"images: expected at least {FEWEST} pictures to learn from, found {number} in "
                    f"{settings.images}{unread(settings.images, own.labels)}"
                )
            largest = max(settings.numbers, default=0)
            clustered = settings.datasets[settings.use.cluster].path == settings.images
            if clustered and number < largest:
                raise schema.ConfigError(
                    f"clusters: k = {largest} is more than the {number} pictures of "
                    f"{settings.images} that are learned from without labels; choose a smaller k "
                    "or more pictures"
                )
        if not settings.images or judged_on.path != settings.images:  # each is listed once
            labelled = has_labels(judged_on)
        plan.check_judged(settings, labelled)
        lessons.describers(settings)  # which may refuse some
        return settings, labelled
    except StepError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(error.exit_code)  # Snakemake would turn it into a traceback and a 1


def counted(dataset, enough):
    """Gives what `count_pictures` does; the main process tells its jobs, to spare them the look."""
    told = json.loads(os.environ.get("KT_COUNTED", "[[],[]]"))
    asked = [dataset.model_dump(mode="json"), enough]
    if workflow.is_main_process or told[0] != asked:
        told = [asked, count_pictures(dataset, enough)]
        os.environ.update(KT_COUNTED=json.dumps(told))
    return told[1]


def overlays():
    """Gives what was laid over config.yaml, one mapping for each file and one for --config.

    Snakemake merges them key by key: a plug-in named in a later one would keep the options of the
    one before, and of a key that stands twice the last one counts. `schema` knows better.
    """
    given = workflow.config_settings
    found = [config]
    if given.configfiles:
        found = [*map(schema.read, given.configfiles), dict(given.config)]
    for overlay in found:
        for key in ("images", "labels"):
            value = overlay.get(key)
            named = "null" if value is None else str(value)
            if key == "labels" and named.lower() == layouts.FOLDERS:
                overlay[key] = layouts.FOLDERS
            elif named != "null":
                overlay[key] = _absolute(named)
                if not isinstance(value, str) and not os.path.exists(overlay[key]):
                    raise schema.ConfigError(
                        f"{key}: expected a path, found {value!r}, for which Snakemake took what "
                        "was given; should that be a name, write ./ before it"
                    )
    return [schema.with_nulls(overlay) for overlay in found]


def _absolute(path):
    """Makes a path absolute against the folder the user stands in, --directory or not.

    However it is spelled it becomes the same, or all would be made again.
    """
    whole = os.path.join(STARTED_IN, os.path.expanduser(path))
    plain = os.path.normpath(whole)
    with contextlib.suppress(OSError):
        if os.path.samefile(plain, whole):  # not so if .. follows a link
            return plain
    return whole


def lift_stale_lock():
    """Takes away the lock that a killed run left behind; a run that lives keeps its own.

    Snakemake's lock is a file and outlives its process. A shared lock of the kernel does not: where
    it can be had alone, no other run is alive, unless on another machine that locks do not reach,
    which shows signs of life. The file stays open, and locked, to the end.
    """
    path = Path(".snakemake/kt.lock")
    try:
        path.parent.mkdir(exist_ok=True)
        file = open(path, "a+b", buffering=0)
    except OSError as error:
        print(f"error: {path.absolute()} cannot be written: {error.strerror}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(4)
    stale = list(Path(".snakemake/locks").glob("*.lock"))
    with contextlib.suppress(OSError):  # another run is alive, or the file system has no locks
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        owner = lock.owner_of(file)
        if stale and lock.lives(path, owner, True):
            print(f"{owner.get('who')} is at work here", file=sys.stderr)  # Snakemake refuses
        else:
            for one in stale:
                print(f"taking away the lock of a run that was killed: {one}", file=sys.stderr)
                one.unlink(missing_ok=True)
            lock.write(file, lock.me())
            threading.Thread(target=lock.beat, args=(file, threading.Event()), daemon=True).start()
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_SH)
    return file


def tell_of_changes():
    """Says when pictures came or went after they were packed: no rule sees that, on purpose.

    A file that a camera or a system leaves there would make every network again.
    """
    for name in sorted(set(SETTINGS.use.model_dump().values())):
        path, packed = SETTINGS.datasets[name].path, Path(f"results/data/{name}/report.json")
        with contextlib.suppress(OSError, ValueError, KeyError):
            status, known = packed.stat(), json.loads(packed.read_text())["dataset"]["path"]
            when = max(status.st_mtime, status.st_ctime)  # it may be a copy
            if path and path == known and changed_since(path, when):
                print(
                    f"note: it seems that files came, went or were renamed in {path}, or that it "
                    "was replaced, after its pictures were packed; what stands is of the old ones. "
                    "`--forcerun ingest` takes the new ones, and makes all again that follows",
                    file=sys.stderr,
                )


SETTINGS, LABELLED = read_config()
ALIVE = lift_stale_lock() if workflow.is_main_process else None
LESSONS = lessons.all_lessons(SETTINGS)
DESCRIBERS = lessons.describers(SETTINGS)
if workflow.is_main_process:
    tell_of_changes()


def pack_of(role, split="train-unlabelled"):
    """Gives the packed images that serve a role of `use`."""
    return f"results/data/{getattr(SETTINGS.use, role)}/{split}.h5"


def data_report_of(role):
    """Gives the data report of the data set that serves a role."""
    return f"results/data/{getattr(SETTINGS.use, role)}/report.json"


def ingest_state(wildcards):
    """Gives the folder where a killed ingest goes on, and where its parts meet.

    Another one for another table of labels: this param makes all again when the table has changed.
    As an input it would be looked at by its time, and an older file may have taken its place.
    """
    settings = [SETTINGS.datasets[wildcards.dataset], SETTINGS.seed]
    if settings[0].labels not in (None, layouts.FOLDERS):
        settings.append(layouts.origin(settings[0].labels))
    return plan.state(f"ingest-{wildcards.dataset}", settings)


def data_reports():
    """Gives the data reports of all data sets in use, the target's first."""
    roles = ("target", "pretext", "cluster", "evaluate")
    return list(dict.fromkeys(map(data_report_of, roles)))


def dumps(value):
    """Gives settings as JSON for the command line."""
    return schema.dumps(value)


def teacher_of(wildcards):
    """Gives the settings of a teacher."""
    return SETTINGS.teachers[wildcards.teacher]


def urgency(wildcards):
    """Puts first what others wait for and what takes longest, so that no core idles at the end."""
    teacher = SETTINGS.teachers[wildcards.teacher]
    awaited = teacher.task and teacher.layers and wildcards.seed == "0"
    return 50 if awaited or teacher.budget else 10


def budget_packs(wildcards):
    """Gives the images of the trainings whose summed cost a teacher may spend."""
    return sorted({part["pack"] for part in plan.budget(SETTINGS, teacher_of(wildcards))})


def pretext_params(wildcards):
    """Gives everything a teacher is trained with, as JSON by option.

    No more than what counts: whatever stands here makes the teacher again when it changes.
    """
    teacher = teacher_of(wildcards)
    return {
        "backbone": dumps(plan.backbone(SETTINGS, teacher)),
        "task": dumps(teacher.task),
        "weights": dumps(teacher.weights),
        "training": dumps(teacher.training if teacher.task else None),
        "epochs": plan.epochs(SETTINGS, teacher.training) if teacher.task else 0,
        "few": plan.few_images(SETTINGS) if teacher.task else [],
        "budget": dumps(plan.budget(SETTINGS, teacher)),
        "seed": SETTINGS.seed + int(wildcards.seed),
    }


def given_features(wildcards):
    """Gives the teacher whose features were made elsewhere, or None."""
    teacher = SETTINGS.teachers.get(wildcards.teacher)
    return teacher if teacher and teacher.features else None


def network_of(wildcards):
    """Gives the files of the network that describes images."""
    folder = DESCRIBERS[wildcards.teacher].folder
    return {"weights": f"{folder}/model.safetensors", "model": f"{folder}/model.json"}


def choice_of(wildcards):
    """Gives the file that says what `auto` stands for, where the layer or k is `auto`."""
    named = wildcards.layer != schema.AUTO
    if named and not getattr(wildcards, "k", "").startswith(schema.AUTO):
        return []
    return f"results/choices/{wildcards.teacher}.json"


# What follows gives params, and so takes no `input`: Snakemake does not compare params of functions
# that do, and a changed option would not run anything again.


def choice_options(wildcards):
    """Gives the options that hand that file over."""
    found = choice_of(wildcards)
    return ["--choice", found] if found else []


def parts_of_features(wildcards):
    """Gives the parts that features are put together from; given ones are copied by one job."""
    if given_features(wildcards):
        return []
    place = "features/{teacher}/{layer}/{dataset}-{split}"
    return parts_of(
        wildcards, f"results/parts/{place}/{{part}}-of-{{parts}}.h5", f"results/{place}.h5"
    )


def features_input(wildcards):
    """Gives what features come from: a network, or files made elsewhere."""
    if teacher := given_features(wildcards):
        return {"given": teacher.features, "names": plan.keys_of(teacher)}
    return network_of(wildcards)


def features_source(wildcards):
    """Gives the options that say where features come from."""
    if teacher := given_features(wildcards):
        return ["--given", teacher.features, "--keys", plan.keys_of(teacher)]
    found = DESCRIBERS[wildcards.teacher]
    network = ["--model", found.folder, "--layer", wildcards.layer]
    network += ["--map", found.map, "--pool", found.pool, *["--mirror"][: found.mirror]]
    return network + choice_options(wildcards)


def pseudo_labels_of(teacher, layer, k):
    """Gives the pseudo-labels of the images that train the targets."""
    clustered, labelled = SETTINGS.use.cluster, SETTINGS.use.target
    folder = f"results/pseudo_labels/{teacher}/{layer}/{clustered}/k{k}"
    return f"{folder}/{labelled}-train-unlabelled.h5"


def described_labels(wildcards):
    """Gives what pseudo-labels say of themselves."""
    teacher, layer, k = wildcards.teacher, wildcards.layer, wildcards.k
    return dumps({"teacher": teacher, "layer": layer, "k": int(k) if k.isdigit() else k})


def supervised(wildcards):
    """Says whether a target's folder is that of the supervised bound."""
    return wildcards.origin == "supervised"


def target_input(wildcards):
    """Gives what a target learns from: pseudo-labels, or the true ones for the bound."""
    if supervised(wildcards):
        return {
            "pack": pack_of("evaluate", "train"),
            "labels": pack_of("evaluate", "train-labels"),
            "report": data_report_of("evaluate"),
            "budget": pack_of("target"),
        }
    return {
        "pack": pack_of("target"),
        "report": data_report_of("target"),
        **lessons.lesson_tables(SETTINGS, LESSONS[wildcards.origin]),
    }


def target_labels(wildcards):
    """Gives the options that say what is to be learned."""
    if supervised(wildcards):
        labels = pack_of("evaluate", "train-labels")
        return ["--labels", labels, "--budget-of", pack_of("target")]
    return lessons.transfer_options(SETTINGS, LESSONS[wildcards.origin])


def target_params(wildcards):
    """Gives everything a target is trained with, as JSON by option."""
    target = SETTINGS.targets[wildcards.target]
    return {
        "backbone": dumps(target.backbone),
        "task": dumps(target.task),
        "training": dumps(target.training),
        "epochs": plan.epochs(SETTINGS, target.training),
        "few": plan.few_images(SETTINGS),
        "seed": SETTINGS.seed + int(wildcards.seed),
    }


def drop_finished_states():
    """Takes away what jobs on a cluster left to go on from, of those that came to their end."""
    for mark in Path("results/state").glob("*/*/finished"):
        shutil.rmtree(mark.parent, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: others go on there
            mark.parent.parent.rmdir()


def drop_orphaned_parts():
    """Takes away parts that were made in another number than the stage was put together from."""
    for path in Path("results/parts").rglob("*-of-*"):
        if path.is_file() and path.stem.rpartition("-of-")[2] != str(SETTINGS.shards):
            path.unlink(missing_ok=True)


def check_before_jobs():
    """Ends with 2 where a mistake would show only when teachers have been trained.

    Not where jobs have an environment of their own, without which it could not be told.
    """
    theirs = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
    if precheck.is_needed(SETTINGS) and not theirs:
        command = [sys.executable, "-m", "kt.precheck", "--settings", schema.dumps(SETTINGS)]
        if code := subprocess.run(command).returncode:
            sys.exit(code)


def end_with_the_code_of_the_step(log):
    """Ends as the failed step did (docs/reference.md, exit codes); Snakemake would always say 1.

    What the step said comes last on the screen: above it stand pages of Snakemake's.
    """
    text = "".join(Path(path).read_text(errors="replace") for path in log)
    codes = set(map(int, re.findall(r"returned non-zero exit status (\d+)", text)))
    if codes and codes <= {2, 3, 4, 75}:
        print(f"the failed step ended with {min(codes)}; all messages: {log[0]}", file=sys.stderr)
        for path in dict.fromkeys(re.findall(r"^ +log: (.+) \(check log file", text, re.MULTILINE)):
            if said := last_error(Path(path)):
                print(f"{path}:\n{said}", file=sys.stderr)
        sys.exit(min(codes))


def last_error(path):
    """Gives the error that a step's log ends with, or nothing; runs stand there one by one."""
    with contextlib.suppress(OSError):
        runs = path.read_text(errors="replace")
        last = re.split(r"^.*, version .*, git .*$", runs, flags=re.M)[-1]
        found = re.search(r"^\S* ?(error: (?:.|\n)*)\Z", last, re.M)
        return found[1].rstrip() if found else ""
    return ""


wildcard_constraints:
    dataset=r"[^/]+",
    split=r"train-unlabelled|train|test",
    teacher=r"[^/]+",
    target=r"[^/]+",
    layer=r"[^/]+",
    k=r"\d+|auto(x[\d.]+)?",
    seed=r"\d+",
    job=r"[^/]+",
    part=r"\d+",
    parts=r"\d+",
