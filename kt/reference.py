"""Prints the reference of all configuration keys as Markdown, from the schema: `docs/config.md`."""

from __future__ import annotations

from kt import config

LIKE = "another one: its values are taken where this one gives none"


def reference() -> str:
    """Gives the reference of all keys as Markdown, from the schema and the plug-ins' options."""
    lines = ["## config.yaml", "", *_table(config.Config)]
    for kind in ("backbones", "tasks", "transfers", "evaluations"):
        for name in config.plugins(kind):
            lines += ["", f"## {kind}: `{name}`", "", *_table(config.plugin(kind, name).Options)]
    return "\n".join(lines) + "\n"


def _table(model: type[config.Settings]) -> list[str]:
    schema = model.model_json_schema()
    rows = _rows(schema, schema.get("$defs", {}), "")
    return ["| key | type | meaning |", "| --- | --- | --- |", *rows]


def _rows(schema: dict, definitions: dict, prefix: str) -> list[str]:
    """Gives one row per key of a JSON schema, nested mappings below their own key."""
    rows = []
    for key, field in schema.get("properties", {}).items():
        shown = _type(field)
        rows.append(f"| `{prefix}{key}` | {shown} | {field.get('description', '')} |")
        named = next(iter(field.get("patternProperties", {}).values()), {})
        inner = (named or field).get("$ref") or _optional(field)
        if inner in ("#/$defs/Teacher", "#/$defs/Target"):
            rows.append(f"| `{prefix}{key}.NAME.like` | string | {LIKE} |")
        if inner:
            below = f"{prefix}{key}.NAME." if named else f"{prefix}{key}."
            rows += _rows(definitions[inner.rsplit("/", 1)[1]], definitions, below)
    return rows


def _optional(field: dict) -> str | None:
    """Gives the settings that may stand at a key beside null; those of plug-ins stand below."""
    parts = (part.get("$ref", "/Plugin") for part in field.get("anyOf", field.get("oneOf", [])))
    return next((part for part in parts if not part.endswith("/Plugin")), None)


def _type(field: dict) -> str:
    """Gives a JSON schema's type and limits in a few words."""
    if choice := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(_type(part) for part in choice)
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "$ref" in field:
        plugin = field["$ref"].endswith("/Plugin")
        return "mapping of `name` and its options (below)" if plugin else "mapping"
    kind = {"array": "list", "object": "mapping"}.get(
        field.get("type", ""), field.get("type", "any")
    )
    if "items" in field:
        kind += f" of {_type(field['items'])}"
    limits = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    return " ".join(
        [kind, *(f"{sign} {field[name]}" for name, sign in limits.items() if name in field)]
    )


if __name__ == "__main__":
    print(reference(), end="")
