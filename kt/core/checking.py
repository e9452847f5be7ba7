"""Plug-ins by file name, and checks whose messages name every wrong key."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
import reprlib
import typing
from typing import Any

from pydantic import ValidationError

from kt.core.ending import ConfigError
from kt.core.schema import Plugin, Settings

SHORT = reprlib.Repr()  # aliases of YAML can make a value of a few bytes endless in print
SHORT.maxlevel, SHORT.maxstring, SHORT.maxother = 2, 200, 200


def plugins(kind: str) -> list[str]:
    """Lists the plug-ins of a folder of kt (`tasks`, `backbones`, ...): their file names."""
    package = importlib.import_module(f"kt.{kind}")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def plugin(kind: str, name: str, key: str = ""):
    """Imports one plug-in's module; none of them imports torch before it is used.

    Raises:
        ConfigError: There is no such file; the nearest is named.
    """
    if name not in plugins(kind):
        raise ConfigError(
            f"{key or kind}: no file kt/{kind}/{name}.py{nearest(name, plugins(kind))}"
        )
    return importlib.import_module(f"kt.{kind}.{name}")


def options(kind: str, name: str, values: dict[str, Any], key: str = "") -> Settings:
    """Checks the options of one plug-in against the `Options` in its file."""
    return check(plugin(kind, name, key).Options, values, key)


def layers(backbone: Plugin) -> list[str] | None:
    """Lists the layers of a backbone by its options; None where only the built one knows them."""
    module = plugin("backbones", backbone.name)
    return module.layers(options("backbones", backbone.name, backbone.options()))


# ---------------------------------------------------------------------------- checking


def check(model: type[Settings], values, key: str = ""):
    """Validates `values`; a failure names every wrong key with value and what is allowed.

    Raises:
        ConfigError: With one line for each fault.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_explain(model, fault, key) for fault in error.errors(include_url=False)]
        raise ConfigError(
            "\n  ".join(["the configuration is not valid:", *dict.fromkeys(lines)])
        ) from None


OURS = re.compile(r"(Plugin|Settings)$|constrained-|function-")  # of a place, no keys of the user's


def _explain(model, fault, key: str) -> str:
    place = list(map(str, fault["loc"]))
    unknown = place[-1:] if fault["type"] == "extra_forbidden" else []  # whatever its name
    place = [part for part in place[: len(place) - len(unknown)] if not OURS.match(part)] + unknown
    dotted = ".".join(([key] if key else []) + place)
    if fault["type"] == "extra_forbidden":
        return f"{dotted}: unknown key{nearest(place[-1], _keys(model, place[:-1]))}"
    if fault["type"] == "missing":
        return f"{dotted}: missing; every value must be given (see docs/config.md)"
    if fault["type"] == "value_error":  # one of ours, which says what was found
        return f"{dotted}: {fault['ctx']['error']}"
    if fault["type"] == "too_short" and not fault["input"]:
        wanted = fault["ctx"]["min_length"]
        wanted = "one" if wanted == 1 else wanted
        return f"{dotted}: expected {wanted} or more, found {fault['input']}"
    found = SHORT.repr(fault["input"])
    if fault["type"] == "model_type":
        named = fault["ctx"]["class_name"] == "Plugin"
        wanted = "{name: NAME, and its options}" if named else "keys and values"
        return f"{dotted}: expected {wanted}, found {found}"
    listed = "; a list is written [1, 2]" if re.fullmatch(r"'[\d ]+(,[\d ]+)+'", found) else ""
    return f"{dotted}: {fault['msg']}, found {found}{listed}"


def _keys(model, place: list[str]) -> list[str]:
    """Lists the keys allowed at a dotted place of a model."""
    for part in place:
        field = model.model_fields.get(part)
        if field is not None:
            inner = _inner_models(field.annotation)
            if not inner:
                return []
            model = inner[0]
    return list(model.model_fields)


def _inner_models(annotation) -> list[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [found for part in typing.get_args(annotation) for found in _inner_models(part)]


def nearest(name: str, known) -> str:
    """Gives `; did you mean ...? known: ...` for a name that is none of the known ones."""
    close = difflib.get_close_matches(name, list(known), 1, 0.5)
    hint = f"; did you mean {close[0]!r}?" if close else "; "
    return f"{hint} known: {', '.join(known)}" if known else ""


def pinned(backbone: Plugin) -> Plugin:
    """Adds what a backbone depends on beside its options, the digest of a file of code."""
    pin = getattr(plugin("backbones", backbone.name), "pin", dict)
    return Plugin(name=backbone.name, **pin(backbone.options()))
