"""Any convolutional classification model of torchvision, by name, without its classifier.

Layers: `conv1`..`conv5` of AlexNet and `conv1_1`..`conv5_3` of the VGGs (behind the ReLU, as in the
paper), `stem` and `layer1`..`layer4` of the ResNets, otherwise the names of the model's own parts.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kt.config import Settings
from kt.core.step import ConfigError

HEADS = ("avgpool", "classifier", "fc", "head", "heads", "dropout", "flatten")
AUXILIARY = ("googlenet", "inception_v3")  # models with more than one classifier


class Options(Settings):
    """Options of the backbone in the config."""

    model: Annotated[str, Field(description="name in torchvision.models, such as resnet18")]
    last: Annotated[
        str | None, Field(description="last layer kept, under the head; null: the whole trunk")
    ] = None


VGG = {"11": (1, 1, 2, 2, 2), "13": (2,) * 5, "16": (2, 2, 3, 3, 3), "19": (2, 2, 4, 4, 4)}


def layers(options: Options) -> list[str] | None:
    """Names the layers of the common families without importing torchvision; None: not known.

    Raises:
        ConfigError: `last` is none of them.
    """
    found = _known(options.model)
    return found if found is None else _up_to(options.last, found)


def _up_to(last: str | None, names: list[str]) -> list[str]:
    if last is None:
        return names
    if last not in names:
        raise ConfigError(f"backbone.last: {last!r} is not one of {', '.join(names)}")
    return names[: names.index(last) + 1]


def _known(name: str) -> list[str] | None:
    if name == "alexnet":
        return [f"conv{number}" for number in range(1, 6)]
    if name.removesuffix("_bn").removeprefix("vgg") in VGG:
        counts = VGG[name.removesuffix("_bn").removeprefix("vgg")]
        return [f"conv{block}_{i}" for block, n in enumerate(counts, 1) for i in range(1, n + 1)]
    if name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"):
        return ["stem", *(f"layer{number}" for number in range(1, 5))]
    return None


def stages(options: Options) -> dict:
    """Gives the trunk's stages in order.

    Raises:
        ConfigError: torchvision has no such classification model, or it has no trunk of maps.
    """
    import torch

    found = _split(_whole(options.model), options.last)
    _check_maps(options.model, found, torch.zeros(1, 3, 224, 224))
    return found


def names(options: Options, own: list[str]) -> dict[str, str]:
    """Gives for each name of a weight in our backbone the one in torchvision's whole model."""
    from kt.core.backbone import Backbone

    model = _whole(options.model)
    trunk = Backbone(_split(model, options.last)).state_dict(keep_vars=True)
    theirs = {id(value): name for name, value in model.state_dict(keep_vars=True).items()}
    return {name: theirs[id(trunk[name])] for name in own}  # they share their tensors


def published(options: Options) -> tuple[dict, list[float], list[float], str]:
    """Fetches the weights that torchvision publishes: by name, mean, deviation, their origin.

    Raises:
        ConfigError: There are none of this model.
    """
    from torchvision import models

    known = models.get_model_weights(_checked(options.model))
    if not list(known):
        raise ConfigError(f"weights.path: torchvision publishes none of {options.model}")
    weights = known.DEFAULT
    seen = weights.transforms()
    mean, std = seen.mean, seen.std
    if options.model in AUXILIARY:  # the whole model turns ImageNet's normalisation into this one
        mean = std = [0.5, 0.5, 0.5]
    return weights.get_state_dict(check_hash=True), mean, std, f"torchvision {weights}"


def _whole(name: str):
    """Builds the model of torchvision with its classifier."""
    from torchvision import models

    settings = {"aux_logits": False} if name in AUXILIARY else {}
    return models.get_model(_checked(name), weights=None, **settings)


def _checked(name: str) -> str:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ConfigError(f"backbone.model: {name!r} is not one of {', '.join(known)}")
    return name


def _split(model, last: str | None) -> dict:
    found = _by_convolution(model) if _is_plain(model) else _by_part(model)
    return {name: found[name] for name in _up_to(last, list(found))}


def _is_plain(model) -> bool:
    from torch import nn

    parts = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d)
    features = getattr(model, "features", None)
    return isinstance(features, nn.Sequential) and all(isinstance(part, parts) for part in features)


def _by_convolution(model) -> dict:
    """Splits a row of convolutions behind each ReLU; a pooling opens the next stage."""
    from torch import nn

    blocks: list[list[list]] = [[[]]]
    for part in model.features:
        if isinstance(part, nn.MaxPool2d):
            blocks.append([[]])
        blocks[-1][-1].append(part)
        if isinstance(part, nn.ReLU):
            blocks[-1].append([])
    stages = [
        [stage for stage in block if any(isinstance(p, nn.Conv2d) for p in stage)]
        for block in blocks
    ]
    if max(map(len, stages)) > 1 and type(model).__name__ == "VGG":
        named = {
            f"conv{number}_{inner}": stage
            for number, block in enumerate(stages, 1)
            for inner, stage in enumerate(block, 1)
        }
    else:
        flat = [stage for block in stages for stage in block]
        named = {f"conv{number}": stage for number, stage in enumerate(flat, 1)}
    return {name: nn.Sequential(*stage) for name, stage in named.items()}


def _by_part(model) -> dict:
    """Takes the model's own parts up to its classifier; loose parts in front become the stem."""
    from torch import nn

    trunk = model
    for name in ("features", "layers"):
        trunk = getattr(model, name, trunk)
    found: dict[str, nn.Module] = {}
    stem: list[nn.Module] = []
    for name, part in trunk.named_children():
        if name in HEADS:
            break
        if not found and not _is_stage(part):
            stem.append(part)
            continue
        if stem:
            found["stem"], stem = nn.Sequential(*stem), []
        found[f"layer{name}" if name.isdigit() else name] = part
    return found or {"stem": nn.Sequential(*stem)}


def _is_stage(part) -> bool:
    """Says whether a part is more than a single convolution, norm, activation or pooling."""
    return any(True for _ in part.children())


def _check_maps(name: str, found: dict, images) -> None:
    import torch

    with torch.inference_mode():
        for layer, stage in found.items():
            try:
                images = stage.eval()(images)
            except (RuntimeError, TypeError, AttributeError, AssertionError) as error:
                raise ConfigError(
                    f"backbone.model: {name} has no plain trunk ({layer}: {error})"
                ) from None
            stage.train()
            if getattr(images, "ndim", 0) != 4 or images.shape[2] != images.shape[3]:
                raise ConfigError(
                    f"backbone.model: layer {layer} of {name} does not give maps (B, M, h, w); "
                    "only convolutional models can be backbones"
                )
