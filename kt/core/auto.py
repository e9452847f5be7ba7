"""What `auto` stands for, once `kt/choose.py` has chosen; light, since most steps ask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kt.core import step
from kt.core.step import ConfigError, DataError

AUTO = "auto"


def settled(path: Path | None, layer: str, k: str) -> tuple[str, int]:
    """Gives the layer and the number that `auto`, or `autox0.5` for half of it, stand for.

    Args:
        path: What `python -m kt.choose` wrote; None where nothing was to be chosen.
        layer: A name, or `auto`.
        k: A number, `auto` or `auto` times a factor.

    Raises:
        ConfigError: Something is to be chosen, and no choice is given; or k is none of these.
        DataError: The choice is of other layers.
    """
    if layer != AUTO and not k.startswith(AUTO):
        return layer, _number(int, k)
    if path is None:
        raise ConfigError(f"{AUTO}: needs --choice, a file that `python -m kt.choose` wrote")
    choice = step.read_json(path)
    layer = choice["layer"] if layer == AUTO else layer
    if layer not in choice["k"]:
        raise DataError(f"{path}: expected a choice for layer {layer!r}, found {list(choice['k'])}")
    if not k.startswith(AUTO):
        return layer, _number(int, k)
    factor = _number(float, k.removeprefix(f"{AUTO}x")) if k != AUTO else 1.0
    return layer, max(2, round(factor * choice["k"][layer]))


def _number(kind: Callable, text: str):
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"--k: expected a number, {AUTO} or {AUTO}x0.5, found {text!r}") from None
