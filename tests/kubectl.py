#!/usr/bin/env python
"""Stands in for kubectl: jobs are processes of this host, and a folder keeps what is known of them.

A pod's first process hears SIGTERM alone, and when it ends all others are killed; so it is here.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

KEPT = Path(os.environ["KUBECTL_FOLDER"])


def create() -> None:
    manifest = json.load(sys.stdin)
    name = manifest["metadata"]["name"]
    (KEPT / f"{name}.json").write_text(json.dumps(manifest))
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    given = {one["name"]: one["value"] for one in container["env"]}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KT_")}
    with open(KEPT / f"{name}.log", "w") as log:
        pod = subprocess.Popen(
            [sys.executable, __file__, "pod", str(KEPT / name), *container["command"]],
            cwd=container["workingDir"], env=kept | given, stdout=log, stderr=log,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    (KEPT / f"{name}.host").write_text(str(pod.pid))
    print(f"job.batch/{name}")


def pod(place: str, *command: str) -> None:
    """Runs a job's first process, in a session of its own, and keeps how it ended."""
    first = subprocess.Popen(command, start_new_session=True)
    Path(f"{place}.pid").write_text(str(first.pid))
    code = first.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(first.pid, signal.SIGKILL)
    Path(f"{place}.code").write_text(str(code))


def get(name: str) -> None:
    if name == "pods":  # of one job, as of the last option
        (job,) = (one.split("job-name=")[1] for one in sys.argv if "job-name=" in one)
        place = KEPT / f"{job}.waiting"
        return print(place.read_text() if place.exists() else "", end="")
    place = KEPT / f"{name}.code"
    if not (KEPT / f"{name}.json").exists():
        sys.exit(0 if "--ignore-not-found" in sys.argv else "Error from server (NotFound)")
    code = place.read_text() if place.exists() else ""
    print("1//Complete" if code == "0" else "/1/FailureTarget Failed" if code else "//", end="")


def delete(name: str) -> None:
    os.kill(int((KEPT / f"{name}.pid").read_text()), signal.SIGTERM)
    (KEPT / f"{name}.json").rename(KEPT / f"{name}.deleted")


if __name__ == "__main__":
    verb, *rest = [one for one in sys.argv[1:] if not one.startswith("--wait")]
    if verb == "create":
        assert rest == ["--filename", "-", "--output", "name"], rest
        create()
    elif verb == "pod":
        pod(*rest)
    else:
        for one in rest[:1] if verb == "get" else rest:
            {"get": get, "delete": delete}[verb](one.removeprefix("job.batch/"))
