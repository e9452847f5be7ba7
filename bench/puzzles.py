"""Puzzles of 255 px images against lightly's jigsaw, and against the bare conversion of tiles."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
import torch

from bench import drawn, product
from bench.measure import Measured, Run, alternate, speeds, worst

SIZE, TILE, BATCH = 255, 64, 128


def prepared(run: Run):
    """Gives a jigsaw task, its pack of 255 px images, memory-mapped, and their rows."""
    torch.set_num_threads(run.cores)
    path = run.scratch / f"{SIZE}.h5"
    if not path.exists():
        product.write_pack(path, drawn.images(BATCH, SIZE), drawn.keys(BATCH))
    pack = product.read_pack(path)
    return product.jigsaw(pack), pack, torch.arange(BATCH)


def puzzles_vs_lightly(run: Run) -> Measured:
    """Compares with `lightly.transforms.jigsaw.Jigsaw`, called image by image as in a data set.

    Its transform is that of lightly's own PIRLTransform less the flips and the colour jitter, which
    our puzzles do not have: random grey, ToTensor, Normalize. The images are arrays, which it takes
    more quickly than Pillow's. `more` holds the ratio with its default transform, ToTensor alone.
    """
    from lightly.transforms.jigsaw import Jigsaw
    from lightly.transforms.utils import IMAGENET_NORMALIZE
    from torchvision import transforms

    task, pack, index = prepared(run)
    pictures = [np.ascontiguousarray(image.transpose(1, 2, 0)) for image in pack.images]
    steps = [transforms.RandomGrayscale(0.5), transforms.ToTensor()]
    steps.append(transforms.Normalize(**IMAGENET_NORMALIZE))

    def peer(jigsaw):
        return lambda: torch.stack([jigsaw(picture) for picture in pictures]) is None

    def ours():
        product.puzzles(task, pack, index, 0)

    same = alternate(ours, peer(Jigsaw(3, SIZE, TILE, transforms.Compose(steps))), run.rounds)
    plain = alternate(ours, peer(Jigsaw(3, SIZE, TILE)), run.rounds)
    return Measured(
        speeds(same),
        f"lightly {version('lightly')}, Jigsaw with grey, ToTensor and Normalize",
        same,
        {
            "puzzles": BATCH,
            "also": {"default transform": round(float(np.median(speeds(plain))), 2)},
        },
    )


def puzzles_of_floor(run: Run) -> Measured:
    """Compares with the bare conversion, into memory of its own and into memory that is there.

    The first has the system hand out and clear pages, as each batch of the product does; the second
    is the conversion alone.
    """
    task, pack, index = prepared(run)
    tiles = torch.randint(0, 256, (BATCH, 9, 3, TILE, TILE), dtype=torch.uint8)
    ready = torch.empty(tiles.shape)
    floors = {
        "into fresh memory": lambda: tiles.to(torch.float32) is None,
        "into ready memory": lambda: ready.copy_(tiles) is None,
    }

    def ours():
        views, _ = product.puzzles(task, pack, index, 0)
        assert views.shape == tiles.shape, views.shape

    cases = {}
    for name, floor in floors.items():
        pairs = alternate(ours, floor, run.rounds)
        cases[name] = Measured(speeds(pairs), f"torch {torch.__version__}, conversion", pairs)
    return worst(cases)
