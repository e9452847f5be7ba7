"""A network from a Python file of your own; its code runs wherever the network is built.

The file has a function that gives the stages in order: a dict from layer to `torch.nn.Module`, each
from the map before (the first from (B, 3, H, W)) to its own (B, M, h, w). It runs for `options`,
also when a model made with it is loaded; for that, the environment variable KT_RUN_FILES must be 1,
as the workflow sets it: a model that somebody else made must not run code unasked.
"""

from __future__ import annotations

import hashlib
import os
import sys
import traceback
import types
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from kt.config import Settings
from kt.core.step import ConfigError

CONSENT = "KT_RUN_FILES"


class Options(Settings):
    """Options of the backbone in the config."""

    path: Annotated[str, Field(min_length=1, description="of the Python file")]
    function: Annotated[str, Field(min_length=1, description="in it, that gives the stages")]
    options: Annotated[dict[str, Any], Field(description="the function's arguments, by name")] = {}
    digest: Annotated[
        str | None, Field(description="SHA-256 of the file; null: of the one that is there now")
    ] = None


def layers(options: Options) -> None:
    """The layers are known only when the code has run."""
    return None


def pin(values: dict) -> dict:
    """Puts the file's digest into the options, so that another file is another network."""
    path = Path(values["path"])
    if values.get("digest") is not None or not path.is_file():
        return values
    return values | {"digest": hashlib.sha256(path.read_bytes()).hexdigest()}


def stages(options: Options) -> dict:
    """Runs the file and its function.

    Raises:
        ConfigError: There is no consent, no such file or function, the file has changed, or it
            gives no stages.
    """
    from torch import nn

    code = _code(options)
    try:
        found = _function(options, code)(**options.options)
    except ConfigError:
        raise
    except Exception as error:  # whatever the user's code raises
        calls = traceback.extract_tb(error.__traceback__)
        line = [f" in line {call.lineno}" for call in calls if call.filename == options.path][-1:]
        raise ConfigError(
            f"backbone.path: the code of {options.path} failed{''.join(line)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    good = isinstance(found, dict) and found and all(isinstance(key, str) for key in found)
    if not good or not all(isinstance(stage, nn.Module) for stage in found.values()):
        raise ConfigError(
            f"backbone.function: {options.function} of {options.path} must give a dict of "
            f"torch.nn.Module by layer, gave {type(found).__name__}"
        )
    return found


def _code(options: Options) -> bytes:
    path = Path(options.path)
    if os.environ.get(CONSENT) != "1":
        raise ConfigError(
            f"backbone file: this network runs the code of {path}; set the environment variable "
            f"{CONSENT}=1 if you trust it"
        )
    try:
        code = path.read_bytes()
    except OSError as error:
        where = "" if path.is_absolute() else (
            f"; it is relative to the folder that the program is started in, here {Path.cwd()}: "
            "for a trained network start it in the folder that holds results/"
        )  # fmt: skip
        raise ConfigError(f"backbone.path: cannot read {path}: {error.strerror}{where}") from None
    digest = hashlib.sha256(code).hexdigest()
    if options.digest not in (None, digest):
        raise ConfigError(
            f"backbone.path: {path} has changed: the network was made with a file of SHA-256 "
            f"{options.digest}, it now has {digest}; put that file back, or train again"
        )
    return code


def _function(options: Options, code: bytes):
    module = types.ModuleType(f"kt_file_{hashlib.sha256(code).hexdigest()[:12]}")
    module.__file__ = options.path
    sys.modules[module.__name__] = module  # dataclasses look for the module of a class there
    exec(compile(code, options.path, "exec"), module.__dict__)
    if not callable(getattr(module, options.function, None)):
        raise ConfigError(f"backbone.function: {options.path} has no function {options.function!r}")
    return getattr(module, options.function)
