#!/usr/bin/env python
"""Submits a job's script, the only argument, to Kubernetes; prints the job's name.

The script says in a comment what the job asks for; all else stands in job.yaml.
"""

import json
import os
import re
import subprocess
import sys
import uuid
from pathlib import Path

import yaml

PROPERTIES = "# properties = "
# The first process of a pod hears the signal alone, and when it ends the others are killed. So it
# tells them, each time, and waits for them; the shell below ignores it, or it would not wait.
COMMAND = """\
tell() { trap '' TERM; kill -TERM 0; trap tell TERM; }
trap tell TERM
(trap '' TERM; exec sh "$0") & job=$!
wait $job; code=$?
while [ $code -gt 128 ] && kill -0 $job 2>/dev/null; do wait $job; code=$?; done
exit $code
"""


def main(script: Path) -> None:
    """Fills in job.yaml and hands it to kubectl."""
    lines = script.read_text().splitlines()
    (found,) = (line for line in lines if line.startswith(PROPERTIES))
    job = json.loads(found.removeprefix(PROPERTIES))
    rule = re.sub(r"[^a-z0-9]+", "-", job.get("rule", "group").lower()).strip("-")
    manifest = yaml.safe_load(Path(__file__).with_name("job.yaml").read_text())
    manifest["metadata"]["name"] = f"kt-{rule}-{uuid.uuid4().hex[:8]}"
    asked = job["resources"]
    pod = manifest["spec"]["template"]["spec"]
    pod["activeDeadlineSeconds"] = 60 * int(asked["runtime"])  # of the pod: waiting does not count
    container = pod["containers"][0]
    container["command"] = ["sh", "-c", COMMAND, str(script.resolve())]
    container["workingDir"] = os.getcwd()
    given = {name: value for name, value in os.environ.items() if name.startswith("KT_")}
    # What the site's manifest has of both stays.
    container.setdefault("env", []).extend(
        {"name": name, "value": value} for name, value in sorted(given.items())
    )
    memory = f"{asked['mem_mb']}M"
    limits = {"memory": memory}
    if asked.get("gpu"):
        limits["nvidia.com/gpu"] = str(asked["gpu"])
    requests = {"cpu": str(job["threads"]), "memory": memory}
    resources = container.setdefault("resources", {})
    for name, values in (("requests", requests), ("limits", limits)):
        resources[name] = {**resources.get(name, {}), **values}
    kubectl = ["kubectl", "create", "--filename", "-", "--output", "name"]
    sys.exit(subprocess.run(kubectl, input=json.dumps(manifest), text=True).returncode)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
