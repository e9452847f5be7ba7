"""Which layer, teacher and k: chosen by scores that no test image has touched.

These are `validation_top1`, measured on a held-out part of train, or, where there are no labels,
`view_nmi`, the agreement of the clusters of two augmented views of the same images.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from kt.core.intervals import Interval, interval
from kt.core.records import ARMS, Record, by_seed, column_of, grouped, rank

RULES = ("validation_top1", "view_nmi")
LAYER_RULES = ("validation_top1", "validation_map", "view_nmi")  # of several labels: no top-1


def settle_layers(records: Sequence[Record]) -> list[Record]:
    """Keeps of each model and evaluation the records of the layer with the best rule score.

    An evaluation without any such score keeps its last layer; test scores are never looked at.
    """
    layers = layers_of(records)
    groups = grouped(records, _probe)
    kept = []
    for probe, group in groups.items():
        best = _best_layer(group, layers[probe]) if layers[probe] else None
        kept += [record for record in group if record.get("layer") in (None, best)]
    return kept


def _probe(record: Record) -> tuple[str, str]:
    return record["model"], record["evaluation"]


def layers_of(records: Sequence[Record]) -> dict[tuple[str, str], list[str]]:
    """Lists the layers that were probed, by model and evaluation."""
    return {
        probe: list(dict.fromkeys(record["layer"] for record in group if record.get("layer")))
        for probe, group in grouped(records, _probe).items()
    }


def _best_layer(records: list[Record], layers: list[str]) -> str:
    for rule in LAYER_RULES:
        scored = grouped((r for r in records if r["metric"] == rule), lambda r: r.get("layer"))
        scored.pop(None, None)
        if scored:
            return max(
                scored, key=lambda layer: statistics.fmean(r["value"] for r in scored[layer])
            )
    return layers[-1]


def scores(
    records: Sequence[Record], evaluations: Sequence[str]
) -> tuple[str, dict[str, Interval]]:
    """Gives the rule and each model's score by it: never a number of the test split.

    Args:
        records: With layers settled.
        evaluations: Whose `validation_top1` are averaged; those that measured none do not count.

    Returns:
        The rule, one of `RULES` or "", and model -> score over seeds. A model that lacks one of
        the evaluations has no score.
    """
    for rule in RULES:
        found = [record for record in records if record["metric"] == rule]
        if rule == "validation_top1":
            found = [record for record in found if record["evaluation"] in evaluations]
        if found:
            wanted = {record["evaluation"] for record in found}
            models = grouped(found, lambda record: record["model"])
            return rule, {
                model: _score(group)
                for model, group in models.items()
                if {record["evaluation"] for record in group} == wanted
            }
    return "", {}


def _score(records: list[Record]) -> Interval:
    """Averages the evaluations within each seed that has them all, then the seeds."""
    columns = {column_of(record) for record in records}
    values = [by_seed(records, column) for column in columns]
    common = set.intersection(*map(set, values)) or set.union(*map(set, values))
    return interval(
        statistics.fmean(value[seed] for value in values if seed in value)
        for seed in sorted(common)
    )


def choose(records: Sequence[Record], score: Mapping[str, Interval]) -> dict[str, str]:
    """Gives arm -> its model with the best score; an arm without scores gets its first model."""
    arms = grouped(records, lambda record: record["arm"])
    chosen = {}
    for arm in sorted(arms, key=lambda arm: rank(arm, ARMS)):
        models = list(dict.fromkeys(record["model"] for record in arms[arm]))
        chosen[arm] = max(models, key=lambda model: score[model].mean if model in score else -1.0)
    return chosen
