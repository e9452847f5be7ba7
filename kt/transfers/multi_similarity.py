"""Similarity to anchor images by several teachers at once, each with a head of its own.

Source: ours, from `similarity` as `multi_teacher` is from hard clusters.
"""

from __future__ import annotations

from kt.transfers.similarity import Options, build, clusters  # noqa: F401

NEEDS = "features"
TOGETHER = True
BY_K = False
