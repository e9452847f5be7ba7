"""Runs one step and prints its peak anonymous memory in bytes; for tests of memory."""

import argparse
import json
import sys
import threading
from pathlib import Path


def anonymous() -> int:
    """Gives this process's anonymous memory in bytes; the page cache does not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in /proc/self/status")


def main() -> None:
    """Takes the step's module and its arguments as JSON."""
    import importlib

    from kt.core.parts import WHOLE

    module = importlib.import_module(sys.argv[1])
    values = json.loads(sys.argv[2])
    if "settings" in values:
        from kt import config

        values["settings"] = config.Clustering(**values["settings"])
    paths = ("features", "clusters", "output", "model", "pack")
    values = {key: Path(value) if key in paths else value for key, value in values.items()}
    values |= {"part": WHOLE, "parts": []}
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    module.run(argparse.Namespace(**values))
    done.set()
    watcher.join()
    print(peak[0])


if __name__ == "__main__":
    main()
