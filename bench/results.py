"""What a benchmark writes: records in results.json, and the page docs/benchmarks.md."""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.goals import ROWS, Row, meets
from bench.measure import Measured

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "bench" / "results.json"
PAGE = ROOT / "docs" / "benchmarks.md"
FIELDS = (
    "name", "value", "goal", "direction", "met", "unit", "against", "n", "spread", "seconds",
    "probe_before", "probe_after", "machine", "commit", "date", "error", "more",
)  # fmt: skip

HEAD = """# Benchmarks

Made by `make bench`, which measures every row side by side on the machine at hand; do not edit.
Each row alternates between the product and its peer or floor. The value is the median of the ratios
of the pairs, and `spread` the smallest and the largest of them. The probe is the GFLOP/s of a fixed
matrix product before and after: where the two differ much, the machine was busy with something
else. All figures, with the seconds of each pair: [bench/results.json](../bench/results.json).

"""


def record(
    row: Row, found: Measured | str, probes: tuple[float, float], machine: dict[str, Any]
) -> dict[str, Any]:
    """Gives the record of one row.

    Args:
        row: Its name and goal.
        found: What was measured, or why nothing was.
        probes: GFLOP/s before and after.
        machine: From `machine`.
    """
    values: dict[str, Any] = dict.fromkeys(FIELDS)
    values |= {
        "name": row.name, "goal": row.goal, "direction": row.direction, "unit": row.unit,
        "met": False, "n": 0, "machine": machine, "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "probe_before": round(probes[0], 1), "probe_after": round(probes[1], 1),
    }  # fmt: skip
    if isinstance(found, str):
        return values | {"error": found}
    return values | {
        "value": rounded(found.value), "met": meets(row, found.value), "against": found.against,
        "n": len(found.values),
        "spread": [rounded(min(found.values)), rounded(max(found.values))],
        "seconds": [[rounded(one) for one in pair] for pair in found.pairs], "more": found.more,
    }  # fmt: skip


def rounded(value: float) -> float:
    """Keeps four digits."""
    return float(f"{value:.4g}")


def machine(cores: int) -> dict[str, Any]:
    """Says what machine this is."""
    return {"cpu": _cpu(), "cores": os.cpu_count(), "threads": cores, "gpu": _gpu(),
            "python": platform.python_version(), "system": platform.platform()}  # fmt: skip


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    found = {key.strip(): value.strip() for key, value in fields.items()}
    name = found.get("model name", "unknown")
    return f"{name}, family {found.get('cpu family', '?')}, model {found.get('model', '?')}"


def _gpu() -> str | None:
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


@functools.cache
def commit() -> str:
    """Gives the commit of the working tree, `+changes` if more is edited than the results."""
    made = [f":!{path.relative_to(ROOT)}" for path in (RECORDS, PAGE)]
    head = _git("rev-parse", "--short=12", "HEAD")
    return head + ("+changes" if _git("status", "--porcelain", "--", ".", *made) else "") or "none"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def merged(old: Sequence[dict], new: Sequence[dict]) -> list[dict]:
    """Puts new records in the place of older ones, in the order of the rows."""
    by_name = {one["name"]: one for one in [*old, *new]}
    return [by_name[row.name] for row in ROWS if row.name in by_name]


def read() -> list[dict]:
    """Gives the records of earlier runs."""
    return json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else []


def write(records: Sequence[dict], where: Path = RECORDS, page: Path = PAGE) -> None:
    """Writes the records and the page."""
    where.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    page.write_text(HEAD + table(records), encoding="utf-8")


def table(records: Sequence[dict]) -> str:
    """Gives the rows as Markdown, and below it where and how they were measured."""
    texts = {row.name: row.text for row in ROWS}
    lines = ["| name | what is compared | goal | value | |", "| --- | --- | --- | --- | --- |"]
    for one in records:
        name = one["name"]
        goal = f"{one['direction']} {number(one['goal'], one['unit'])}"
        value = "-" if one["value"] is None else number(one["value"], one["unit"])
        lines.append(f"| `{name}` | {texts[name]} | {goal} | {value} | {judged(one)} |")
    lines += ["", "| name | against | n | spread | probe | made by |",
              "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for one in records:
        spread = " .. ".join(f"{value:g}" for value in one["spread"] or [])
        probes = f"{one['probe_before']:g}, {one['probe_after']:g}"
        lines.append(
            f"| `{one['name']}` | {one['against'] or '-'} | {one['n']} | {spread or '-'} | "
            f'{probes} | `make bench ARGS="--only {one["name"]}"` |'
        )
    return "\n".join([*lines, "", *cases(records), "", *origins(records)]) + "\n"


def cases(records: Sequence[dict]) -> list[str]:
    """Gives the lines on rows that are the worst of several cases, or that tell more."""
    lines = []
    for key, text in (("cases", "the worst of"), ("also", "also")):
        for one in records:
            found = (one["more"] or {}).get(key)
            if found:
                shown = ", ".join(f"{case} {rounded(value):g}" for case, value in found.items())
                lines.append(f"- `{one['name']}`, {text}: {shown}")
    return ["Rows of several cases:", "", *lines] if lines else []


def origins(records: Sequence[dict]) -> list[str]:
    """Gives the lines that say on what machines and at what commits the rows were measured."""
    groups: dict[str, list[str]] = {}
    for one in records:
        found = one["machine"]
        gpu = f", {found['gpu']}" if found["gpu"] else ""
        place = f"{found['threads']} of {found['cores']} cores of {found['cpu']}{gpu}"
        groups.setdefault(f"{place}; commit {one['commit']}, {one['date']}", []).append(one["name"])
    if len(groups) == 1:
        return [f"Measured on {next(iter(groups))}."]
    return ["Measured on", "", *(f"- {key}: {', '.join(names)}" for key, names in groups.items())]


def judged(one: dict) -> str:
    """Gives the word for a record: met, SHORTFALL, or what went wrong."""
    if one["error"]:
        return "FAILED: " + one["error"].strip().splitlines()[-1].replace("|", "/")[:120]
    return "met" if one["met"] else "SHORTFALL"


def number(value: float, unit: str) -> str:
    """Gives a value with its unit for people."""
    text = f"{value:.2f}" if value < 10 else f"{value:.1f}"
    return {"x": f"{text}x", "s": f"{text} s"}.get(unit, text)


def line(one: dict) -> str:
    """Gives what is printed when a row is done."""
    value = "-" if one["value"] is None else number(one["value"], one["unit"])
    goal = f"{one['direction']} {number(one['goal'], one['unit'])}"
    low, high = one["spread"] or (float("nan"), float("nan"))
    return (
        f"{one['name']:24} {value:>8}  goal {goal:15} {judged(one):10} "
        f"n {one['n']}, {low:g} .. {high:g}; "
        f"probe {one['probe_before']:g}, {one['probe_after']:g} GFLOP/s"
    )
