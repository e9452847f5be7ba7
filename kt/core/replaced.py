"""Layers of teachers that follow a network which an overlay replaced by one value. Ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kt.core.checking import layers
from kt.core.ending import ConfigError
from kt.core.schema import AUTO, Config, Plugin

IDENTITY = ("model", "path", "function")  # options by which a backbone is another network


def follow(config: Config, before: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    """Gives teachers layers of the network they now have, where no overlay names any.

    A layer goes to the one at the same share of the depth, the last to the last; where only the
    built network knows its layers, one is chosen without labels (`auto`). Transfers that we ship
    and that name a layer go along.

    Args:
        config: Checked but for its plug-ins; changed in place.
        before: The values without the overlays.
        said: What the overlays say of teachers, by name.
    """
    moved: dict[str, dict[str, str]] = {}
    for name, teacher in list(config.teachers.items()):
        owner = _owner(name, "layers", said, before["teachers"])
        if owner is None or "layers" in (said.get(owner) or {}):
            continue
        if not teacher.layers or AUTO in teacher.layers or teacher.features:
            continue
        try:
            places = _places(teacher.layers, _old(owner, before), _new(teacher.backbone, config))
        except ConfigError:
            continue  # of the plug-in's options: told with their key when these are checked
        if places:
            found = list(dict.fromkeys(places.values()))
            config.teachers[name] = teacher.model_copy(update={"layers": found})
            moved[name] = places
    for name, transfer in config.transfers.items():
        ours = (before["transfers"].get(name) or {}).get("of", [])
        parts = [_moved(part, moved) if part in ours else part for part in transfer.of]
        update = {"of": list(dict.fromkeys(parts))}
        config.transfers[name] = transfer.model_copy(update=update)


def _owner(name: Any, key: str, *sources: Mapping[str, Any]) -> str | None:
    """Gives the entry from which one has a value: itself, or one that it is `like`."""
    while any(name in source for source in sources):
        own = [source.get(name) or {} for source in sources]
        if any(key in one for one in own):
            return name
        name = next((one["like"] for one in own if "like" in one), None)
    return None


def _old(teacher: str, before: Mapping[str, Any]) -> Plugin:
    """Gives the network that a teacher of ours has without the overlays."""
    teachers, targets = before["teachers"], before["targets"]
    backbone = teachers[_owner(teacher, "backbone", teachers)]["backbone"]
    if isinstance(backbone, str):
        backbone = targets[_owner(backbone, "backbone", targets)]["backbone"]
    return Plugin(**backbone)


def _new(backbone: Plugin | str, config: Config) -> Plugin | None:
    """Gives the network that a teacher has now; None where it names a target that is not there."""
    if isinstance(backbone, Plugin):
        return backbone
    return config.targets[backbone].backbone if backbone in config.targets else None


def _places(wanted: list[str], old: Plugin, new: Plugin | None) -> dict[str, str]:
    """Gives for each layer the one that takes its place; nothing where all can stay."""
    known = layers(new) if new else wanted
    if new is None or (_identity(old) == _identity(new) and set(wanted) <= set(known or wanted)):
        return {}
    if known is None:
        return dict.fromkeys(wanted, AUTO)
    before = layers(old) or []
    found = {}
    for layer in wanted:
        share = (before.index(layer) + 1) / len(before) if layer in before else 1
        found[layer] = known[max(1, int(share * len(known) + 0.5)) - 1]
    return found


def _identity(backbone: Plugin) -> tuple:
    options = backbone.options()
    return (backbone.name, *(options.get(key) for key in IDENTITY))


def _moved(part: str, moved: Mapping[str, Mapping[str, str]]) -> str:
    teacher, mark, layer = part.partition("/")
    return f"{teacher}{mark}{moved.get(teacher, {}).get(layer, layer)}"
