"""Models on disk: `model.safetensors` holds the weights, `model.json` rebuilds the backbone."""

from __future__ import annotations

from pathlib import Path

import safetensors
import safetensors.torch
import torch

from kt import config
from kt.core import step, table
from kt.core.backbone import Backbone, build
from kt.core.step import DataError

FORMAT = "kt-model"


def fresh(plugin: config.Plugin, seed: int) -> Backbone:
    """Builds a backbone with fresh weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(plugin.name, plugin.options())


def save(folder: Path, backbone: Backbone, plugin: config.Plugin, description: dict) -> None:
    """Writes both files; each appears whole or not at all, the JSON last.

    Args:
        folder: Where they go.
        backbone: Weights and input normalisation.
        plugin: The backbone's name and options.
        description: What else model.json says: origin, training, provenance.
    """
    weights = folder / "model.safetensors"
    state = {name: value.contiguous().cpu() for name, value in backbone.state_dict().items()}
    with step.replacing(weights) as temporary:
        # Not by safetensors' own writer, which leaves temporary files of its own when killed.
        # The network they belong to stands in them, too: then no change of model.json goes unseen.
        temporary.write_bytes(safetensors.torch.save(state, {"backbone": config.dumps(plugin)}))
    content = {
        "format": FORMAT,
        "version": 1,
        "backbone": plugin.model_dump(),
        "layers": backbone.layers,
        "parameters": sum(weight.numel() for weight in backbone.parameters()),
        "digest": table.digest(weights),
        **description,
    }
    step.write_json(folder / "model.json", content)


def describe(path: Path) -> dict:
    """Reads a model.json, given itself, the weights beside it or their folder.

    Raises:
        DataError: It is missing or not a model of this project.
    """
    content = step.read_json(_folder(path) / "model.json", checked=False)  # older ones lack it
    fields = content if isinstance(content, dict) else {}
    whole = {"backbone", "digest"} <= fields.keys()
    if (fields.get("format"), fields.get("version")) != (FORMAT, 1) or not whole:
        raise DataError(f"{path}: expected a model.json of format {FORMAT} version 1")
    return content


def weights_of(path: Path) -> Path:
    """Finds the file of weights, given itself, the model.json beside it or their folder.

    Raises:
        DataError: There is none.
    """
    weights = _folder(path) / "model.safetensors"
    if not weights.is_file():
        raise DataError(f"expected weights at {weights}, found no file")
    return weights


def load(path: Path, device="cpu") -> Backbone:
    """Loads a backbone, ready for use; see `kt.load_backbone`."""
    content, weights = describe(path), weights_of(path)
    if table.digest(weights) != content["digest"]:
        raise DataError(
            f"{weights} does not fit the model.json beside it: it was altered or cut short"
        )
    plugin = config.check(config.Plugin, content["backbone"])
    backbone = build(plugin.name, plugin.options())
    try:
        with safetensors.safe_open(weights, "pt") as file:
            written = (file.metadata() or {}).get("backbone")
            state = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise DataError(f"{weights} is not a safetensors file: {error}") from None
    wanted = backbone.state_dict()
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in wanted.items()}:
        differing = sorted(state.keys() ^ wanted.keys()) or "shapes"
        raise DataError(f"{weights}: weights do not fit backbone {plugin.name}: {differing}")
    if written not in (None, config.dumps(plugin)):
        raise DataError(f"{weights} are of {written}, model.json says {config.dumps(plugin)}")
    backbone.load_state_dict(state)
    return backbone.to(device).eval()


def _folder(path: Path) -> Path:
    path = Path(path)
    return path.parent if path.suffix in (".json", ".safetensors") else path
