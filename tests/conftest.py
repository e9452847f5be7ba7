"""What all tests share: one CPU thread, so that they are quick beside others and repeatable.

Under `make test` several workers share the files among them (`--dist loadfile`).
"""

import os
from pathlib import Path

import pytest

pytest.register_assert_rewrite("on_slurm")  # fixtures of several files

os.environ.setdefault("OMP_NUM_THREADS", "1")
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # Loops that a worker compiles would keep the others waiting.
    kept = Path(__file__).parent.parent / ".pytest_cache" / "numba" / worker
    os.environ.setdefault("NUMBA_CACHE_DIR", str(kept))

# The files that take longest, in this order: one that begins late keeps the others waiting.
LONGEST = (
    "test_slurm", "test_slurm_jobs", "test_own_pictures", "test_parallel", "test_workflow",
    "test_command_line", "test_transfer",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Lets workers begin with the longest files."""
    if worker:
        places = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))
