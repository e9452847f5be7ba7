"""Starts a step's processes by torchrun, stops and ends them with it. Imports no torch.

torchrun itself ends with 1 whatever happened, takes a second signal for leave to end before its
processes have saved, and leaves them behind when it is killed. So they are told of signals
directly, are waited for, and watch the process that launched them. Of a step on several nodes there
is one such process on each, started by srun, which kills what it started when it gets SIGTERM
itself, and hands SIGUSR1 on.
"""

from __future__ import annotations

import contextlib
import os
import platform
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from pathlib import Path

from kt.core import ending
from kt.core.ending import ConfigError

CODES, LAUNCHER, NODE = "KT_EXIT_CODES", "KT_LAUNCHER", "KT_NODE"
PATIENCE = 60.0  # seconds in which processes that lost their torchrun may save


def launch(arguments) -> int:
    """Runs this command in several processes; gives the exit code of the step.

    The lowest code is that of the process that failed first, the others were interrupted: by
    torchrun, where one that failed could not say so and nobody stopped this one.

    Raises:
        ConfigError: Several nodes are wanted, and there is no Slurm job around this process.
    """
    program, shared = [f"kt.{Path(sys.argv[0]).stem}", *sys.argv[1:]], None
    spread = arguments.nodes > 1 and NODE not in os.environ
    if spread:  # this program on each, by Slurm
        command = [*_srun(arguments.nodes, arguments.threads), sys.executable, "-m", *program]
        shared = arguments.output.parent  # all nodes must see it
    else:
        meeting = ["--standalone"] if arguments.nodes == 1 else os.environ[NODE].split()
        command = [sys.executable, "-m", "torch.distributed.run", *meeting]
        command += ["--nproc-per-node", str(arguments.processes)]
        # The dashes: torchrun would take our --log for a short form of its own options.
        command += ["-m", "--", *program]
    with tempfile.TemporaryDirectory(prefix=".codes-", dir=shared) as folder:
        more = (
            {NODE: " ".join(_meeting(arguments.nodes))} if spread else {LAUNCHER: str(os.getpid())}
        )
        found = _Processes(command, Path(folder), more)
        code = found.wait()
        codes = [int(path.read_text()) for path in Path(folder).glob("*.code")]
    stopped = ending.Interrupted.exit_code
    failed = len(codes) < arguments.processes and code > 0  # one could not say so
    if {*codes} == {stopped} and failed and not (found.told or spread):
        return code
    return min(codes, default=stopped if found.told else code)


def launch_here(arguments) -> None:
    """Runs this node's share of a step on several nodes; ends with its exit code.

    One that was interrupted says so in its file alone, since srun would kill the others, which may
    still be writing their state.
    """
    code = launch(arguments)
    if code:
        report_out(code)
    sys.exit(0 if code == ending.Interrupted.exit_code else code)


class _Processes:
    """torchrun, or srun, and the processes that it started."""

    def __init__(self, command: list[str], folder: Path, more: dict[str, str]):
        self.folder, self.spread, self.told = folder, NODE in more, False
        self.torchrun: subprocess.Popen | None = None
        for number in ending.SIGNALS:  # before the start, so that none is lost
            signal.signal(number, self._on_signal)
        environment = {**os.environ, CODES: str(folder), **more}
        # A session of its own: what a group is sent would come twice, from here and directly.
        self.torchrun = subprocess.Popen(command, env=environment, start_new_session=True)
        if self.told:
            self._tell()

    def wait(self) -> int:
        """Waits for all to end; gives torchrun's exit code."""
        code = self.torchrun.wait()
        for number, wait in ((signal.SIGTERM, PATIENCE), (signal.SIGKILL, 1.0)):
            for pid in self._pids():
                _end(pid, number, wait)
        return code

    def _on_signal(self, number, frame) -> None:
        if ending.is_echo():
            return
        if self.told:  # a second one
            self._send(signal.SIGKILL)
            self.torchrun.kill()
            os._exit(ending.Interrupted.exit_code)
        self.told = True
        if self.torchrun:
            self._tell()

    def _tell(self) -> None:
        if self.spread:
            self.torchrun.send_signal(signal.SIGUSR1)
        elif not self._send(signal.SIGTERM):
            self.torchrun.terminate()

    def _send(self, number: int) -> int:
        pids = self._pids()
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, number)
        return len(pids)

    def _pids(self) -> list[int]:
        """Lists the processes that have begun and not said how they ended."""
        found = []
        for one in self.folder.glob("*.pid"):
            with contextlib.suppress(FileNotFoundError):  # it has just ended well
                if not one.with_suffix(".code").exists():
                    found.append(int(one.read_text()))
        return found


def _end(pid: int, number: int, wait: float) -> None:
    with contextlib.suppress(OSError):
        process = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(process, number)
            select.select([process], [], [], wait)
        finally:
            os.close(process)


def report_in() -> None:
    """Lets a process that was launched tell its number, and end at once with its launcher."""
    if LAUNCHER not in os.environ:
        return
    ending.heed_launcher()
    path = Path(os.environ[CODES], f"{os.environ['RANK']}.pid")
    path.with_suffix(".tmp").write_text(str(os.getpid()))
    path.with_suffix(".tmp").replace(path)
    threading.Thread(target=_watch, args=(int(os.environ[LAUNCHER]),), daemon=True).start()


def _watch(launcher: int) -> None:
    try:
        process = os.pidfd_open(launcher)
    except ProcessLookupError:
        pass
    except OSError:  # an old kernel
        return
    else:
        select.select([process], [], [])
    os.kill(os.getpid(), signal.SIGKILL)


def report_out(code: int) -> None:
    """Leaves the exit code of a process that was launched where its launcher looks.

    Of one that ends well nothing is left: its number may soon be another process's.
    """
    if CODES in os.environ:
        with contextlib.suppress(OSError):  # the launcher is gone
            name = os.environ.get("RANK") or os.environ.get("SLURM_NODEID", "0")
            if code:
                Path(os.environ[CODES], f"{name}.code").write_text(str(code))
            else:
                Path(os.environ[CODES], f"{name}.pid").unlink(missing_ok=True)


def _srun(nodes: int, threads: int | None) -> list[str]:
    """Gives the command that starts a program on each node of this Slurm job."""
    if not shutil.which("srun") or "SLURM_JOB_ID" not in os.environ:
        raise ConfigError(f"--nodes: {nodes} need a Slurm job, found none around this process")
    spread = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--cpu-bind=none"]
    # Whatever the site's defaults: the environment goes along, and one node may end long before.
    ends = ["--export=ALL", "--wait=0", "--kill-on-bad-exit=1"]
    return ["srun", *spread, f"--cpus-per-task={threads or 1}", *ends]


def _meeting(nodes: int) -> list[str]:
    """Gives the options by which the torchruns of all nodes find each other: on this one."""
    with socket.socket() as free:  # not one by the job's number: it may have several such steps
        free.bind(("", 0))
        port = free.getsockname()[1]
    where = ["--rdzv-backend=c10d", f"--rdzv-endpoint={platform.node()}:{port}"]
    patience = "--rdzv-conf=read_timeout=600"  # seconds in which this node's torchrun may begin
    return [f"--nnodes={nodes}", f"--rdzv-id={uuid.uuid4().hex}", *where, patience]
