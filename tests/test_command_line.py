"""The command line: help, what `--config` may say, and faults, each with its exit code."""

from __future__ import annotations

import re
import subprocess
import sys

import drawing
import pytest
import yaml
from running import ROOT, TINY, environment, jobs, output, overlay, run, workflow

from kt.core.step import Progress  # noqa: F401  (kt must be importable without torch, see below)

STEPS = ("ingest", "pretext_train", "features", "cluster", "pseudo_labels", "target_train",
         "evaluate", "report")  # fmt: skip
CONFIG, DATA = 2, 3
