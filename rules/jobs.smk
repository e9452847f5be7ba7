"""What jobs ask for, the parts that several jobs share, and the signals that they hand on."""

import contextlib
import functools
import json
import os
import signal
import threading
from pathlib import Path

import psutil
from snakemake.io import IOFile


def hand_on_signals():
    """Lets a job's step hear the signals that the job's Snakemake gets, which keeps them to itself.

    Slurm tells only the first process of a job, which is Snakemake's, where it finds processes by
    control groups: a training would know nothing of a time limit until it is killed.
    """
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.signal(signal.SIGUSR1, lambda *_: None)  # else it ends Snakemake at once
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)  # stays when Snakemake sets its handlers

    def listen():
        while number := os.read(heard, 1):
            if number[0] in (signal.SIGTERM, signal.SIGUSR1):
                for step in steps_below(psutil.Process()):
                    with contextlib.suppress(psutil.Error):
                        step.terminate()

    threading.Thread(target=listen, daemon=True).start()


def steps_below(process):
    """Lists the programs of kt that a process started, not those that they started themselves.

    The shells between are left alone: they would end, and the job with them, before the step has.
    """
    with contextlib.suppress(psutil.Error):
        flag, name = [*process.cmdline(), "", ""][1:3]
        if flag == "-m" and name.startswith("kt."):
            return [process]
        return [step for child in process.children() for step in steps_below(child)]
    return []


def training_threads():
    """Gives the threads of a training: half of the cores, so that two run side by side.

    A cluster has no number of cores of its own; its jobs take over what the main process said.
    """
    cores = workflow.resource_settings.cores  # workflow.cores raises where there is none
    if workflow.is_main_process:
        os.environ.update(KT_TRAINING_THREADS=str(max(1, (cores or 8) // 2)))
    return int(os.environ.get("KT_TRAINING_THREADS", cores or 1))


def memory(base, mapped=False):
    """Gives a rule's memory in MB: a base, and its input where that is mapped, up to 16 GB.

    Mapped packs are read again and again in another order, and are quicker where they stay in
    memory; all other steps stream their input. Measured with the photographs' preset, 6,000 images
    of 96 px: trainings 1.2 GB, evaluations 1.4 (and up to `judge.MOST_BYTES` of features, twice),
    extraction 0.9, ingest 0.3, clustering 0.3, pseudo-labels 0.1, report 0.1; the rest is for
    larger images, and for a GPU's libraries. Schedulers end a job that takes more than it asked for;
    one that is sent again gets more.
    """
    return lambda wildcards, input, attempt: attempt * (
        base + (min(int(input.size_mb), 16000) if mapped else 0)
    )


def minutes(base, per_gb=0):
    """Gives a rule's time limit: by the last plan four times what the job takes, and half an hour.

    What the plan (`make plan`) does not know well enough gets a base, and some twenty times what a
    gigabyte of its input took. Measured with the photographs' preset, 6,000 images of 96 px, two
    jobs side by side on 2 cores, in minutes a gigabyte: extraction 7.5, clustering 1.7 (a million
    rows of 512 for k = 1,000: 1), pseudo-labels 0.3. Jobs that share an input take their part.
    Ingest and evaluations (at most 3 minutes, measured as above) read pictures that Snakemake does
    not see; like trainings, they go on where they were.

    Schedulers let short jobs in first, and end one that takes longer than it said; one that is sent
    again gets more. Never more than a day: many sites allow no more, and let such a job wait for
    ever.

    Args:
        base: Minutes without a plan; a number, or a function of the wildcards.
        per_gb: Minutes for each gigabyte of the input.
    """

    def asked(wildcards, input, attempt, rulename):
        log = Path(workflow.get_rule(rulename).log[0].apply_wildcards(wildcards))
        if seconds := planned().get(str(log.relative_to("results/logs").with_suffix(""))):
            first = 30 + 4 * seconds / 60
        else:
            gigabytes = input.size_mb / 1000 / int(wildcards.get("parts", 1)) if per_gb else 0
            first = (base(wildcards) if callable(base) else base) + per_gb * gigabytes
        return min(attempt * int(first), 1440)

    return asked


@functools.cache
def planned():
    """Gives the seconds of jobs by the last plan, by the job's name; none without a plan.

    Of those that ran before, and of trainings: what a probe says leaves out parts of the others, and
    may be of another machine, from which trainings recover.
    """
    with contextlib.suppress(DataError, AttributeError, KeyError, TypeError):
        return {
            name: cost["seconds"]
            for name, cost in read_json(Path("results/plan.json")).items()
            if cost and (cost["by"] == "an earlier run" or "_train/" in name)
        }
    return {}


def parts_of(wildcards, part, whole):
    """Lists the parts that a file is put together from, or none.

    What stands keeps the number it was made in, since the result is the same: another number in the
    configuration makes nothing again.

    Args:
        wildcards: Of the job.
        part: Path of a part, with wildcards, `part` and `parts` among them.
        whole: Path of the file, with wildcards.
    """
    number = number_of_parts(whole.format(**wildcards))
    every = range(1, number + 1) if number > 1 else []
    return [part.format(**wildcards, part=one, parts=number) for one in every]


def number_of_parts(path):
    """Gives the parts that a file was made in, or is to be; the main process tells its jobs."""
    told = json.loads(os.environ.get("KT_PARTS", "{}"))
    if workflow.is_main_process and Path(path).exists():
        made_of = workflow.persistence.input(IOFile(path))
        number = sum(name.startswith("results/parts/") for name in made_of or []) or 1
        if made_of is not None and number != SETTINGS.shards:
            told[path] = number
            os.environ.update(KT_PARTS=json.dumps(told))
    return told.get(path, SETTINGS.shards)


TRAINING_THREADS = training_threads()

if not workflow.is_main_process:
    hand_on_signals()
    os.environ.update(KT_KEEP_STATE="1")  # another job may make the same, see `resume.finish`
    # Of a signal to the whole group the step shall hear, which minds it, and not the shell around
    # it, which older versions of bash leave there: it would end, and the job with it.
    shell.prefix("trap '' TERM USR1; ")
