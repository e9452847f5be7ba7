"""How often steps go through their rows and images: no torch, no files."""

from __future__ import annotations

from typing import Any

from kt import config


def sampled(number: int, per_centroid: int | None, k: int) -> int:
    """Gives how many of the rows are drawn where so many are wanted for each centroid."""
    return min(number, per_centroid * k) if per_centroid else number


def rows_assigned(rows: int, settings: dict[str, Any], k: int) -> int:
    """Gives how many rows the iterations of k-means assign, as `kt.cluster.fit` does them."""
    from kt.cluster import WARM_SHARE

    iterations, redo = settings["iterations"], settings["redo"]
    warm = sampled(rows, settings["warm_start"], k)
    if warm == rows or iterations == 1:
        return iterations * redo * rows
    early = min(iterations - 1, max(1, int(WARM_SHARE * iterations)))
    return early * redo * warm + (iterations - early) * rows


def is_frozen(name: str) -> bool:
    """Says whether an evaluation looks at frozen features only."""
    return config.plugin("evaluations", name).FROZEN


def passes(frozen: dict[str, dict]) -> int:
    """Gives how often evaluations of frozen features look at train and test.

    One pass gives all layers, and the next evaluation takes it over if it pools alike. (Where they
    do not fit into memory together, each one has a pass: that is not known here.)
    """
    wanted = [(values.get("map", 1), values.get("dimensions")) for values in frozen.values()]
    return sum(wanted[place - 1 : place] != [one] for place, one in enumerate(wanted))


def seen(rows: float, batch: int) -> float:
    """Gives the images that one epoch of so many rows sees: what fills no batch is left out."""
    batch = min(batch, rows)
    return rows // batch * batch


def epochs_for(images: int, rows: float, batch: int) -> int:
    """Gives the epochs of a training on so many rows that is to see so many images."""
    return max(1, round(images / seen(rows, batch)))
