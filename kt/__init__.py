"""From unlabelled images to a small network: self-supervision boosted by knowledge transfer.

Three lines use what the pipeline made::

    import kt
    backbone = kt.load_backbone("results/targets/small/deep/block2/k100/s0/model.safetensors")
    features = backbone.features(images)  # (N, 3, S, S) uint8 -> (N, M) float32
"""

from kt.core import ending  # noqa: F401  a program of kt heeds signals from here on

__version__ = "0.1.0"


def load_backbone(path, device="cpu"):
    """Gives back the backbone stored in a `model.safetensors` and the `model.json` beside it.

    Args:
        path: The `model.safetensors`, the `model.json`, or the folder that holds both.
        device: Where the weights are put.

    Returns:
        A `kt.core.backbone.Backbone` in eval mode. `backbone(images)` takes normalised
        (N, 3, H, W) float32 and gives the map of the last layer; `backbone.features(images)` takes
        uint8 images and gives pooled features (N, D) float32.

    Raises:
        kt.core.step.DataError: The files are missing, incomplete, or do not fit each other.
    """
    from kt.core.model import load

    return load(path, device)
