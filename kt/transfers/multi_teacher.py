"""Clusters of several teachers at once, each with a head of its own, also with several k.

Source: ours. The paper finds Jigsaw++ and HOG both strong teachers (table 5); what they see
differs.
"""

from __future__ import annotations

from kt.transfers.multi_k import Options, build, clusters  # noqa: F401 (a head for each of all)

NEEDS = "labels"
TOGETHER = True
BY_K = True
