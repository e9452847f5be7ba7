"""PASCAL VOC 2007 detection: Faster R-CNN on the network, trainval to test (mAP at overlap 0.5).

Differs from the paper (section 5): it trains Fast R-CNN on selective search's regions, with the
fully connected layers of AlexNet as the head, for 150,000 steps. Here torchvision's Faster R-CNN
finds its regions itself (Ren et al., NeurIPS 2015), pools them by RoI align from one map, and its
head has two new fully connected layers, since those of the targets are not kept. Pictures have one
scale, in training and test.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kt.config import Count, Name, Schedule, Settings

NEEDS_LABELS = False  # its labels are its own
FROZEN = False
CHOOSES = False
YEAR = "VOC2007"
SUPPRESSED = 0.3  # overlap from which the better box of a class stays (Girshick, ICCV 2015)
RANKED = (
    12_000,
    6_000,
)  # regions of a picture before overlapping ones go: training, test (Ren et al.)

Above0 = Annotated[float, Field(gt=0)]


class Options(Settings):
    """Options of the evaluation in the config."""

    path: Annotated[str, Field(description="folder VOCdevkit with VOC2007 in it, test included")]
    layer: Annotated[Name | None, Field(description="whose map is pooled; null: the last")]
    min_size: Annotated[Count, Field(description="shorter side is resized to this, pixels")]
    max_size: Annotated[Count, Field(description="the longer side at most, pixels")]
    anchors: Annotated[
        list[Above0], Field(min_length=1, description="edges of the anchor boxes, pixels")
    ]
    ratios: Annotated[list[Above0], Field(min_length=1, description="height / width of anchors")]
    pooled: Annotated[Count, Field(description="regions are pooled to pooled x pooled")]
    hidden: Annotated[Count, Field(description="units of both layers of the head")]
    proposals: Annotated[Count, Field(description="regions kept of a picture")]
    training: Annotated[Schedule, Field(description="of the whole network")]


def pictures(options: Options) -> tuple:
    """Gives the devkit's folder, names of pictures to learn from, and of those that judge.

    Raises:
        ConfigError, DataError: As `voc.folder` and `voc.apart`.
    """
    from kt.core import voc

    root = voc.folder(options.path, YEAR)
    return root, *voc.apart(root, "Main", "trainval", "test")


def evaluate(backbone, data, options: Options, seed: int) -> list[dict]:
    """Gives map_11 and map_area.

    Raises:
        ConfigError: The devkit or a layer is not there, or its stride is no power of 2 up to 32.
        DataError: Something in the devkit is not what it should be.
    """
    from kt.core import judge, voc, voc_metrics

    root, seen, unseen = pictures(options)
    taught, truth = ([voc.objects(root, name) for name in names] for names in (seen, unseen))
    network = trained(backbone, root, seen, taught, data.state, options, seed)
    found = [boxes_of(network, picture(root, *pair)) for pair in zip(unseen, truth, strict=True)]
    curves = [voc_metrics.detection(found, truth, label) for label in range(len(voc.CLASSES))]
    values = voc_metrics.mean_precision(curves)
    layer = backbone.check_layer(options.layer)
    return judge.records(values, len(unseen), layer=layer, dataset=YEAR)


def trained(backbone, root, names, truth, state, options: Options, seed: int):
    """Trains a detector on pictures and their objects; difficult ones are left out."""
    import torch

    from kt.core import voc_training

    torch.manual_seed(seed)  # the head's weights
    network = build(backbone, options).cpu()

    def load(row, epoch):
        mirrored = voc_training.chances([names[row]], seed, epoch, 1) < 0.5
        return shown(picture(root, names[row], truth[row]), truth[row], bool(mirrored))

    def loss(batch):
        where = network.backbone.backbone.mean.device
        pictures = [pixels.to(where) for pixels, _ in batch]
        targets = [{key: part.to(where) for key, part in target.items()} for _, target in batch]
        return sum(network(pictures, targets).values())

    job = voc_training.Job(
        network, names, load, loss, options.training, seed, "VOC2007 detection", state,
        voc_training.fingerprint(backbone, options, names, seed),
    )  # fmt: skip
    return voc_training.train(job)


def check_stride(backbone, layer: str | None) -> None:
    """Checks that a layer's stride is a power of 2 up to 32.

    Pictures are filled up to whole 32 pixels, and torchvision's anchors lie as far apart as these
    divided by the map's cells, rounded down.

    Raises:
        ConfigError: It is not.
    """
    from kt.core import voc_training
    from kt.core.step import ConfigError

    layer = backbone.check_layer(layer)
    stride = voc_training.stride(backbone, layer)
    if stride not in (1, 2, 4, 8, 16, 32):
        raise ConfigError(
            f"layer: expected one whose map has a stride of 1, 2, 4, ... 32 pixels, found "
            f"{layer} with {stride:.1f}; take another of {', '.join(backbone.layers)}"
        )


def build(backbone, options: Options):
    """Gives a Faster R-CNN on a copy of the backbone, with fresh heads for 20 classes."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.ops import MultiScaleRoIAlign
    from torchvision.ops.poolers import initLevelMapper

    from kt.core import voc
    from kt.core.voc_training import Trunk, first_centre, stride

    check_stride(backbone, options.layer)
    trunk = Trunk(backbone, options.layer, options.min_size, options.training)
    # Anchors and regions take cell i to lie at i strides from the picture's edge.
    trunk.before = int(first_centre(backbone, trunk.layers[-1]) + 0.5)
    pool = MultiScaleRoIAlign(["0"], options.pooled, sampling_ratio=2)
    # Not guessed from the first pictures, which are filled up to 32 pixels: small ones by half.
    pool.scales, pool.map_levels = [1 / stride(backbone, trunk.layers[-1])], initLevelMapper(0, 0)
    return FasterRCNN(
        trunk,
        min_size=options.min_size,
        max_size=options.max_size,
        image_mean=backbone.mean.tolist(),
        image_std=backbone.std.tolist(),
        rpn_anchor_generator=AnchorGenerator((tuple(options.anchors),), (tuple(options.ratios),)),
        rpn_pre_nms_top_n_train=max(RANKED[0], options.proposals),
        rpn_pre_nms_top_n_test=max(RANKED[1], options.proposals),
        rpn_post_nms_top_n_train=options.proposals,
        rpn_post_nms_top_n_test=options.proposals,
        box_roi_pool=pool,
        box_head=TwoMLPHead(trunk.out_channels * options.pooled**2, options.hidden),
        box_predictor=FastRCNNPredictor(options.hidden, len(voc.CLASSES) + 1),
        box_nms_thresh=SUPPRESSED,
    )


def picture(root, name: str, objects):
    """Reads a picture, (3, H, W) float32 0..1, and checks that the objects are its own."""
    import numpy as np
    import torch

    from kt.core import voc

    found = voc.image(root, name)
    voc.check_size(root, name, found.size, objects.size)
    return torch.from_numpy(np.array(found)).permute(2, 0, 1).float() / 255


def shown(pixels, objects, mirrored: bool):
    """Gives a picture and its target as torchvision wants them, mirrored or not."""
    import torch

    boxes = torch.from_numpy(objects.boxes[~objects.difficult])
    labels = torch.from_numpy(objects.labels[~objects.difficult]) + 1  # 0 is the background
    if mirrored:
        left, right = pixels.shape[-1] - boxes[:, 2], pixels.shape[-1] - boxes[:, 0]
        boxes = torch.stack([left, boxes[:, 1], right, boxes[:, 3]], 1)
        pixels = pixels.flip(-1)
    return pixels, {"boxes": boxes, "labels": labels}


def boxes_of(network, pixels):
    """Gives what a trained detector finds in a picture (3, H, W), as `voc_metrics.Boxes`."""
    import torch

    from kt.core.voc_metrics import Boxes

    with torch.inference_mode():
        found = network([pixels.to(network.backbone.backbone.mean.device)])[0]
    boxes, labels, scores = (found[key].cpu().numpy() for key in ("boxes", "labels", "scores"))
    return Boxes(boxes, labels - 1, scores)
