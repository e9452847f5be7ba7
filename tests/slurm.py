"""A real Slurm on this host for the tests: a controller, two nodes, two GPUs in name on each.

    with slurm.cluster(folder) as site:
        subprocess.run(["sinfo"], env=site.environment)

Needs Debian's slurmctld, slurmd, slurm-client and slurm-wlm-basic-plugins, and root, as slurmd
does. Nothing listens beyond loopback; all of it ends with the block. There is no accounting
database, as on many a small site: states come from the queue, which keeps ended jobs for an hour;
who has which account, a stand-in for sacctmgr says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import socket
import subprocess
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import running

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "squeue")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins")
CORES = 4  # of each
ACCOUNT = "project"  # that everybody has, as in the profile's example
FREEZER = Path("/sys/fs/cgroup/freezer")  # of control groups, version 1

CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
SlurmdTimeout=10
AuthType=auth/none
CredType=cred/none
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
MpiDefault=none
ProctrackType=proctrack/{tracker}
TaskPlugin=task/none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=0,defer_batch
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=3600
KillWait={kill_wait}
InactiveLimit=0
GresTypes=gpu
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverTimeLimit=0 PriorityTier=2 \
PreemptMode=OFF
PartitionName=gpu Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
PartitionName=spare Nodes=ALL MaxTime=INFINITE State=UP OverTimeLimit=0 PriorityTier=1 GraceTime=20
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cores} "
    "RealMemory=16000 Gres=gpu:2 State=UNKNOWN"
)


def install() -> str:
    """Installs what a cluster needs, if it may; gives what is missing then, or nothing."""
    if _lacking():
        running.install(*PACKAGES)
    if os.geteuid():
        return "slurmd needs root"
    return f"programs {', '.join(_lacking())}" if _lacking() else ""


def megabytes(text: str) -> float:
    """Reads a size as Slurm prints it, such as 3000M or 2.50G."""
    return float(text[:-1]) * {"M": 1, "G": 1024}[text[-1]]


def _lacking() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


@dataclasses.dataclass
class Site:
    """A running cluster.

    Attributes:
        folder: Of its files and logs.
        environment: For programs that talk to it.
        nodes: Their names: no other cluster's on this host, where groups of processes have them.
        daemons: The controller, `slurmctld`, and the nodes, by name.
    """

    folder: Path
    environment: dict[str, str]
    nodes: tuple[str, ...]
    daemons: dict[str, subprocess.Popen] = dataclasses.field(default_factory=dict)

    def start(self, name: str) -> None:
        """Starts the controller or a node."""
        command = ["slurmctld", "-D", "-c"] if name == "slurmctld" else ["slurmd", "-D", "-N", name]
        with open(self.folder / f"{name}.out", "a") as out:
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL
            )

    def call(self, *command: str) -> str:
        """Gives what a program of Slurm's prints."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=30
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def jobs(self) -> list[dict[str, str]]:
        """Gives every job of the last hour."""
        form = "%i|%j|%T|%N|%k|%r|%m|%a|%P|%b|%C"
        keys = "id name state node comment reason memory account partition gpus cores".split()
        lines = self.call("squeue", "--all", "--noheader", "--states=all", "-o", form)
        return [dict(zip(keys, line.split("|"), strict=True)) for line in lines.splitlines()]

    def wait(self, test, seconds: float = 60):
        """Waits until `test()` gives something true; gives it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := test():
                return found
            time.sleep(0.2)
        raise TimeoutError(f"after {seconds} s: {self.jobs()}\n{self.logs()}")

    def ended(self, job: str) -> str:
        """Waits until a job has ended and its node is rid of it; gives its state."""

        def found():
            (state,) = [one["state"] for one in self.jobs() if one["id"] == job]
            return state not in ("RUNNING", "COMPLETING") and state

        return self.wait(found)

    def processes(self, named: str = "") -> dict[int, str]:
        """Gives ids and command lines of all that runs on it, daemons among them, or some.

        Args:
            named: Part of the command line, or a variable of the environment as NAME=VALUE.
        """
        found, mark = {}, f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                variables = (process / "environ").read_bytes().split(b"\0")
                if mark in variables and (named in line or named.encode() in variables):
                    found[int(process.name)] = line
        return found

    def logs(self) -> str:
        """Gives the last lines of all daemons."""
        return "".join(path.read_text()[-2000:] for path in self.folder.glob("slurm*.log"))


@contextlib.contextmanager
def cluster(folder: Path, kill_wait: int = 2) -> Iterator[Site]:
    """Starts a cluster in an empty folder; ends it, and whatever still runs on it, at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state").mkdir()
    host = socket.gethostname().split(".")[0]
    names = tuple(f"{folder.name}-{number}" for number in (1, 2))
    ports = _free_ports(1 + len(names))
    nodes = "\n".join(
        NODE.format(name=name, host=host, port=port, cores=CORES)
        for name, port in zip(names, ports[1:], strict=True)
    )
    text = CONFIG.format(
        host=host,
        controller=ports[0],
        folder=folder,
        nodes=nodes,
        kill_wait=kill_wait,
        tracker=tracker(),
    )
    (folder / "slurm.conf").write_text(text)
    if tracker() == "cgroup":
        text = f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={FREEZER.parent}\n"
        (folder / "cgroup.conf").write_text(text)
    else:
        warnings.warn("no control groups: what jobs leave behind is not checked", stacklevel=2)
    (folder / "gres.conf").write_text("Name=gpu File=/dev/tty[1-2]\n")
    # Snakemake's plugin takes SLURM_CONF from srun's environment; this one brings it back.
    (folder / "bin").mkdir()
    srun = folder / "bin" / "srun"
    srun.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which("srun")} "$@"\n')
    srun.chmod(0o755)
    (folder / "bin" / "sacctmgr").write_text(f"#!/bin/sh\necho {ACCOUNT}\n")
    (folder / "bin" / "sacctmgr").chmod(0o755)
    path = os.pathsep.join([str(folder / "bin"), _path()])
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}
    site = Site(folder, environment, names)
    try:
        for name in ("slurmctld", *names):
            site.start(name)
        site.wait(lambda: _idle(site) == len(names))
        yield site
    finally:
        left = _end(site)
    if left and tracker() == "cgroup":
        raise RuntimeError(f"jobs left processes, which were killed now: {left}")


def tracker() -> str:
    """Gives what finds the processes of a job when it is to end.

    With control groups, as on a real cluster, none is missed. Without, one whose parent ended is,
    such as a job step of Snakemake's after SIGTERM, which ends its shell at once.
    """
    return "cgroup" if os.access(FREEZER / "tasks", os.W_OK) else "linuxproc"


def _idle(site: Site) -> int:
    with contextlib.suppress(RuntimeError):
        options = ("--noheader", "--partition=main", "--Node", "-o", "%T")
        return site.call("sinfo", *options).split().count("idle")
    return 0


def _end(site: Site) -> dict[int, str]:
    """Ends all jobs and daemons; gives the processes that were still there."""
    with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
        site.call("scancel", "--user=root")
        site.wait(lambda: {job["state"] for job in site.jobs()}.isdisjoint(
            {"RUNNING", "PENDING", "COMPLETING"}), 20)  # fmt: skip
    for daemon in reversed(site.daemons.values()):
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
    left = site.processes()
    for process in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    for name in site.nodes:
        with contextlib.suppress(OSError):
            (FREEZER / f"slurm_{name}").rmdir()
    return left


def _free_ports(number: int) -> list[int]:
    """Finds free ports below 32768: higher ones the system gives to whoever asks for any."""
    found: list[int] = []
    for port in random.sample(range(20000, 32768), 100):
        with contextlib.suppress(OSError), socket.socket() as tried:
            tried.bind(("127.0.0.1", port))
            found.append(port)
    return found[:number]


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
