"""Measures one row in a process of its own; `python -m bench` starts it."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
from pathlib import Path

from bench.goals import BY_NAME
from bench.measure import Run


def main() -> None:
    """Runs the function of the row's name and writes what it gives."""
    parser = argparse.ArgumentParser(prog="python -m bench.child", description=__doc__)
    parser.add_argument("name", choices=BY_NAME)
    parser.add_argument("--rounds", type=int, required=True, help="how often")
    parser.add_argument("--cores", type=int, required=True, help="threads it may use")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for its files")
    parser.add_argument("--full", action="store_true", help="the whole default run")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    arguments = parser.parse_args()
    row = BY_NAME[arguments.name]
    group = importlib.import_module(f"bench.{row.group}")
    run = Run(arguments.rounds, arguments.cores, arguments.scratch, arguments.full)
    found = getattr(group, row.name)(run)
    arguments.output.write_text(json.dumps(dataclasses.asdict(found)))


if __name__ == "__main__":
    main()
