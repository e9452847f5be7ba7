"""Any model of timm that gives maps, by name (`pip install 'kt[timm]'`).

Layers `stage1`, `stage2`, ...: what timm's `features_only` gives, one for each halving of the map.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kt.config import Count, Settings
from kt.core.step import ConfigError

JOINT = True  # its layers cannot be told apart as stages


class Options(Settings):
    """Options of the backbone in the config."""

    model: Annotated[str, Field(description="name in timm.list_models(), such as convnext_atto")]
    last: Annotated[Count | None, Field(description="stages kept, from the first; null: all")] = (
        None
    )


def layers(options: Options) -> list[str] | None:
    """Names the layers without importing timm; None: not known."""
    return None if options.last is None else _names(options.last)


def _names(number: int) -> list[str]:
    return [f"stage{place}" for place in range(1, number + 1)]


def stages(options: Options) -> dict:
    """Gives the model as one part with several layers.

    Raises:
        ConfigError: timm is not installed, or has no such model, or no maps of it.
    """
    from kt.core.backbone import Joint

    model = _built(options, False)
    channels_last = str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC")
    return {"timm": Joint(model, _names(len(model.feature_info.channels())), channels_last)}


def published(options: Options) -> tuple[dict, list[float], list[float], str]:
    """Fetches the weights that timm publishes: by name, with mean and deviation, and their origin.

    Raises:
        ConfigError: As `stages`, or there are none.
    """
    model = _built(options, True)
    about = model.pretrained_cfg
    origin = f"timm {about['architecture']}.{about['tag']}"
    return dict(model.state_dict()), list(about["mean"]), list(about["std"]), origin


def names(options: Options, own: list[str]) -> dict[str, str]:
    """Gives for each name of a weight in our backbone the one in timm's model."""
    return {name: name.removeprefix("stages.timm.model.") for name in own}


def _built(options: Options, pretrained: bool):
    try:
        import timm
    except ImportError:
        raise ConfigError(
            "backbone timm: the package timm is not installed; `pip install timm` in the "
            "environment of this project"
        ) from None
    found = {} if options.last is None else {"out_indices": range(options.last)}
    try:
        return timm.create_model(options.model, pretrained=pretrained, features_only=True, **found)
    except (RuntimeError, ValueError, LookupError, AssertionError, AttributeError) as error:
        known = timm.is_model(options.model.split(".")[0])
        close = [] if known else timm.list_models(f"*{options.model}*")[:5]
        hint = f"; there are {', '.join(close)}" if close else ""
        raise ConfigError(
            f"backbone.model: timm gives no maps of {options.model!r}: {error}{hint}"
        ) from None
