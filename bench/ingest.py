"""JPEGs to packed images: the product's decoder against Pillow, on one core."""

from __future__ import annotations

import io

import numpy as np
import PIL
from PIL import Image

from bench import drawn, product
from bench.measure import Measured, Run, alternate, speeds

SIZE, NUMBER = 255, 100


def ingest_vs_pillow(run: Run) -> Measured:
    """Compares one call for each file, from its bytes in memory to pixels (3, S, S).

    As ingest decodes some thousand photographs or more; for fewer it is not worth the imports.
    """
    product.hurry()
    files = drawn.jpegs(NUMBER, 400, 533)
    differences = [
        np.abs(product.decode(file, SIZE).astype(int) - by_pillow(file)).mean() for file in files
    ]

    def ours():
        for file in files:
            product.decode(file, SIZE)

    def peer():
        for file in files:
            by_pillow(file)

    pairs = alternate(ours, peer, run.rounds)
    more = {"files": NUMBER, "bytes": len(b"".join(files)) // NUMBER}
    more["mean_difference_in_grey_levels"] = round(float(np.mean(differences)), 3)
    return Measured(speeds(pairs), f"Pillow {PIL.__version__}, bicubic", pairs, more)


def by_pillow(file: bytes) -> np.ndarray:
    """Decodes, cuts the centre square and resizes it, (3, S, S) uint8."""
    image = Image.open(io.BytesIO(file)).convert("RGB")
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    box = (left, top, left + edge, top + edge)
    image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
