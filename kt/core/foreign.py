"""Weights that were trained elsewhere: read without running code, fitted to a backbone by name."""

from __future__ import annotations

import pickle
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from kt import config
from kt.core import step, table
from kt.core.backbone import Backbone
from kt.core.ending import lack, line
from kt.core.step import ConfigError, DataError, StepError

# What wrappers put before the names of weights: DataParallel, torch.compile, MoCo, SimCLR, lightly
# and ourselves.
PREFIXES = ("module.", ".orig.mod.", "backbone.", "encoder.q.", "encoder.", "model.", "stages.")
NESTED = ("state_dict", "model", "model_state_dict")  # where a training's checkpoint keeps weights
OURS = ("mean", "std")  # of the input, in a model of this project
SHOWN = 8  # names in a message
# What torch and pickle raise on files that are not what they seem, beside their own errors.
CRASHES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, EOFError)


def _why(error: Exception) -> str:
    if "weights_only" in str(error):  # torch's advice is to run the code
        return "; where you trust it, load it yourself and save network.state_dict()"
    return f" ({line(error)[:200]})"


def load(backbone: Backbone, plugin: config.Plugin, weights: config.Weights) -> dict:
    """Puts weights into a backbone, in place, and sets its input normalisation where it is known.

    Args:
        backbone: Built from `plugin`.
        plugin: Its name and options.
        weights: Where they come from.

    Returns:
        What model.json says of them: the settings, `origin`, and `digest` of a file.

    Raises:
        ConfigError: There is nothing to load, or nobody publishes such weights.
        DataError: The file is none of weights, or a weight is missing or has another shape.
    """
    if weights.path == config.PRETRAINED:
        state, mean, std, origin = _published(plugin)
        about = {"origin": origin}
    else:
        state, about = read(Path(weights.path)), {"digest": table.digest(Path(weights.path))}
        mean, std = (state[name].tolist() if _is_ours(state) else None for name in OURS)
    fitted, unused = fit(backbone, plugin, state, weights.path)
    backbone.load_state_dict(fitted, strict=False)  # what may be missing is seen to in `fit`
    for name, given, known in (("mean", weights.mean, mean), ("std", weights.std, std)):
        if given or known:
            getattr(backbone, name).copy_(torch.tensor(given or known))
    step.log.info("%s: %d weights taken, %d not needed: %s", weights.path, len(fitted),
                  len(unused), _some(unused))  # fmt: skip
    return {**weights.model_dump(), **about}


def _is_ours(state: dict[str, Tensor]) -> bool:
    return all(name in state and state[name].shape == (3,) for name in OURS)


def _published(plugin: config.Plugin) -> tuple:
    module = config.plugin("backbones", plugin.name)
    try:
        return module.published(config.options("backbones", plugin.name, plugin.options()))
    except StepError:
        raise
    except Exception as error:  # the network, the server, or whatever their library makes of it
        raise DataError(
            f"weights.path: the published weights cannot be fetched ({line(error)}); fetch them "
            "elsewhere and name their file"
        ) from error


def read(path: Path) -> dict[str, Tensor]:
    """Reads the weights of a file: safetensors by its name, all else as torch.save writes it.

    Raises:
        DataError: It is missing, damaged, or a pickle of more than weights: none is ever run.
    """
    if not path.is_file():
        raise DataError(f"expected weights at {path}, found no file")
    try:
        if path.suffix == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, *CRASHES) as error:
        if lack(error):
            raise
        raise DataError(
            f"{path}: expected weights alone, as safetensors or torch.save(network.state_dict()) "
            f"writes them; other pickles are refused, they can run code{_why(error)}"
        ) from error
    for _ in NESTED:  # not until there is none: one may hold itself
        inner = [content.get(name) for name in NESTED] if isinstance(content, dict) else []
        content = next((one for one in inner if isinstance(one, dict)), content)
    named = content.items() if isinstance(content, dict) else ()
    state = {name: value for name, value in named if isinstance(value, Tensor)}
    if not state:
        raise DataError(f"{path}: expected tensors by name, found {type(content).__name__}")
    return {str(name): value for name, value in state.items()}


def fit(
    backbone: Backbone, plugin: config.Plugin, state: dict[str, Tensor], where: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Finds a backbone's weights among those of a checkpoint, prefixes of wrappers left aside.

    Args:
        backbone: Whose weights are wanted.
        plugin: Its name and options; its file may know by which names others call them.
        state: Of the checkpoint.
        where: For messages.

    Returns:
        The backbone's weights by its own names, and the checkpoint's names that were not needed.

    Raises:
        ConfigError: The backbone has no weights.
        DataError: Weights are missing, have another shape, are not finite, or two have one name.
    """
    wanted = {name: v for name, v in backbone.state_dict().items() if name not in OURS}
    if not wanted:
        raise ConfigError(f"weights: backbone {plugin.name} has no weights to load")
    called = _names(plugin, list(wanted))
    found: dict[str, list[str]] = {}
    for name in state:
        found.setdefault(name if name in wanted else _plain(name), []).append(name)
    fitted, missing, twice = {}, [], []
    for name, own in wanted.items():
        # A model of this project has its own names.
        there = found.pop(name, []) + found.pop(_plain(called[name]), [])
        if len(there) > 1:
            twice += there
        elif there and state[there[0]].shape == own.shape:
            fitted[name] = state[there[0]]
        elif there or not name.endswith("num_batches_tracked"):  # older checkpoints have none
            instead = f" (found {tuple(state[there[0]].shape)})" if there else ""
            missing.append(f"{called[name]} {tuple(own.shape)}{instead}")
    unused = sorted(name for names in found.values() for name in names)
    if missing:
        raise DataError(
            f"{where}: {len(missing)} of {len(wanted)} weights of backbone {plugin.name} are "
            f"missing or have another shape: {_some(missing)}; the file also has "
            f"{len(unused)} that are not needed: {_some(unused)}"
        )
    if twice:
        raise DataError(
            f"{where}: several weights could be meant: {_some(twice)}; keep one of each"
        )
    bad = [name for name, value in fitted.items() if not torch.isfinite(value).all()]
    if bad:
        raise DataError(f"{where}: weights that are not finite: {_some(bad)}")
    return fitted, unused


def _names(plugin: config.Plugin, own: list[str]) -> dict[str, str]:
    module = config.plugin("backbones", plugin.name)
    if not hasattr(module, "names"):
        return {name: name for name in own}
    return module.names(config.options("backbones", plugin.name, plugin.options()), own)


def _plain(name: str) -> str:
    """Takes the prefixes of wrappers off a name; timm writes dots as underscores in its trunks."""
    name = name.replace("_", ".")
    while prefix := next((one for one in PREFIXES if name.startswith(one)), None):
        name = name.removeprefix(prefix)
    return name


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "none") + more
