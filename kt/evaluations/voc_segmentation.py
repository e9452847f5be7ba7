"""PASCAL VOC 2012 segmentation: a fully convolutional network, train to val (mIoU).

A 1x1 convolution scores each place of the last map, bilinear enlargement takes the scores to the
picture's pixels; `skips` adds scores of earlier layers (Long et al., CVPR 2015).

Differs from the paper (section 5), whose numbers are of an FCN with the fully connected layers of
AlexNet as convolutions: those of the targets are not kept, and enlargement is not learned. The
additional annotations of Hariharan et al. (ICCV 2011) are used if `train` and `masks` name them.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from kt.config import Name, Schedule, Settings

NEEDS_LABELS = False  # its labels are its own
FROZEN = False
CHOOSES = False
YEAR = "VOC2012"


def rising(options):
    """Gives the options back, or raises ValueError if the scales are not in order."""
    if options.scales[0] > options.scales[1]:
        raise ValueError(f"scales: expected [lowest, highest], found {options.scales}")
    return options


class Options(Settings):
    """Options of the evaluation in the config."""

    path: Annotated[str, Field(description="folder VOCdevkit with VOC2012 in it")]
    layer: Annotated[Name | None, Field(description="whose map is scored; null: the last")]
    skips: Annotated[
        list[Name], Field(description="earlier layers whose scores are added; [] none")
    ]
    train: Annotated[
        Name,
        Field(
            description="list in ImageSets/Segmentation to train on, such as train; none of val, "
            "which judges, may stand in it"
        ),
    ]
    masks: Annotated[
        Name, Field(description="folder of its masks: SegmentationClass, SegmentationClassAug")
    ]
    crop: Annotated[int, Field(ge=12, description="edge of the training squares, pixels")]
    scales: Annotated[
        list[Annotated[float, Field(gt=0)]],
        Field(min_length=2, max_length=2, description="lowest and highest scale of a picture"),
    ]
    training: Annotated[Schedule, Field(description="of the whole network")]
    _order = model_validator(mode="after")(rising)


def pictures(options: Options) -> tuple:
    """Gives the devkit's folder, names of pictures to learn from, and of those that judge.

    Raises:
        ConfigError: The devkit or the folder of masks is not there.
        DataError: As `voc.apart`.
    """
    from kt.core import voc
    from kt.core.step import ConfigError

    root = voc.folder(options.path, YEAR)
    if not (root / options.masks).is_dir():
        raise ConfigError(
            f"masks: expected a folder of masks, found no {root / options.masks}; the organisers' "
            "is SegmentationClass"
        )
    return root, *voc.apart(root, "Segmentation", options.train, "val")


def evaluate(backbone, data, options: Options, seed: int) -> list[dict]:
    """Gives miou, over background and 20 classes; void pixels are left out.

    Raises:
        ConfigError: The devkit, its masks or a layer is not there, or the layer's map is one cell.
        DataError: Something in the devkit is not what it should be, or `train` names pictures of
            val.
    """
    from kt.core import judge, voc_metrics

    root, seen, unseen = pictures(options)
    network = trained(backbone, root, seen, data.state, options, seed)
    counts = 0
    for name in unseen:
        image, mask = pair(root, name, "SegmentationClass")
        counts = counts + voc_metrics.confusion(mask, classes(network, image), network.num_classes)
    values = {"miou": voc_metrics.miou(counts)}
    layer = backbone.check_layer(options.layer)
    return judge.records(values, len(unseen), layer=layer, dataset=YEAR)


def trained(backbone, root, names, state, options: Options, seed: int):
    """Trains a segmenting network on pictures and their masks."""
    import numpy as np
    import torch
    from torch.nn import functional

    from kt.core import voc, voc_training

    torch.manual_seed(seed)  # the heads' weights
    network = build(backbone, options).cpu()
    trunk = network.trunk.backbone
    ground = (255 * trunk.mean).round().byte().numpy()

    def load(row, epoch):
        (chances,) = voc_training.chances([names[row]], seed, epoch, 4).tolist()
        return view(*pair(root, names[row], options.masks), options, ground, chances)

    def loss(batch):
        where = trunk.mean.device
        parts = (torch.from_numpy(np.stack(part)) for part in zip(*batch, strict=True))
        pixels, wanted = (part.to(where) for part in parts)
        scores = network(trunk.normalise(pixels))
        each = (
            functional.cross_entropy(  # summed here, since its own sum is not deterministic on CUDA
                scores, wanted.long(), ignore_index=voc.VOID, reduction="none"
            )
        )
        return each.sum() / (wanted != voc.VOID).sum().clamp(min=1)  # a square may be void all over

    job = voc_training.Job(
        network, names, load, loss, options.training, seed, "VOC2012 segmentation", state,
        voc_training.fingerprint(backbone, options, names, seed),
    )  # fmt: skip
    return voc_training.train(job)


def build(backbone, options: Options):
    """Gives a fully convolutional network on a copy of the backbone, with fresh heads."""
    from kt.core import voc
    from kt.core.voc_training import FCN, Trunk

    trunk = Trunk(backbone, options.layer, options.crop, options.training)
    return FCN(trunk, options.skips, len(voc.CLASSES) + 1)


def pair(root, name: str, masks: str):
    """Reads a picture and its mask (H, W) uint8 of the same size."""
    from kt.core import voc

    image, mask = voc.image(root, name), voc.mask(root, name, masks)
    voc.check_size(root / masks, name, image.size, mask.shape[::-1])
    return image, mask


def view(image, mask, options: Options, ground, chance):
    """Cuts one training square of a scaled, perhaps mirrored picture.

    Args:
        image: The picture.
        mask: (H, W) uint8.
        options: `crop` and `scales`.
        ground: (3,) uint8, where the picture does not reach; void in the mask.
        chance: Four numbers in [0, 1): scale, place down and across, mirrored.

    Returns:
        (3, crop, crop) uint8 and (crop, crop) uint8.
    """
    import numpy as np
    from PIL import Image

    from kt.core import voc

    low, high = options.scales
    size = [max(1, round(side * (low + chance[0] * (high - low)))) for side in image.size]
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    wanted = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    square = np.empty((options.crop, options.crop, 3), np.uint8)
    square[:] = ground
    truth = np.full((options.crop, options.crop), voc.VOID, np.uint8)
    sides = (
        _places(side, options.crop, share)
        for side, share in zip(wanted.shape, chance[1:3], strict=True)
    )
    (down, to_down), (across, to_across) = sides
    square[to_down, to_across] = pixels[down, across]
    truth[to_down, to_across] = wanted[down, across]
    if chance[3] < 0.5:
        square, truth = square[:, ::-1], truth[:, ::-1]
    return np.ascontiguousarray(square.transpose(2, 0, 1)), np.ascontiguousarray(truth)


def _places(side: int, crop: int, share: float) -> tuple[slice, slice]:
    """Gives the stretch taken of a side of a picture, and where it goes on a side of the square."""
    first, length = int(share * (abs(side - crop) + 1)), min(side, crop)
    inner, whole = slice(first, first + length), slice(0, length)
    return (inner, whole) if side >= crop else (whole, inner)


def classes(network, image):
    """Gives the likeliest class of each pixel of a picture, (H, W) int64."""
    import numpy as np
    import torch

    trunk = network.trunk.backbone
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        return network(trunk.normalise(pixels.to(trunk.mean.device))).argmax(1)[0].cpu().numpy()
