"""Writes pictures of CIFAR-10 as the experiments want them: FOLDER/cifar10.zip.

    python -m experiments.cifar10 FOLDER

Fetches the set (Krizhevsky, "Learning multiple layers of features from tiny images", 2009) by
torchvision into the folder. The first 1,200 of each class of its train, and the first 400 of its
test, become PNGs in train/CLASS and test/CLASS, named by their number there.
"""

from __future__ import annotations

import io
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

MOST = {"train": 1200, "test": 400}  # of each class


def write(path: Path, splits: dict[str, Iterable[tuple[Image.Image, str]]]) -> None:
    """Writes the first pictures of each class to a zip.

    Args:
        path: Of the zip.
        splits: Pictures and their classes, of `train` and `test`, in the order of the set.
    """
    with zipfile.ZipFile(path, "w") as archive:
        for split, pictures in splits.items():
            counts: Counter[str] = Counter()
            for number, (picture, name) in enumerate(pictures):
                counts[name] += 1
                if counts[name] <= MOST[split]:
                    content = io.BytesIO()
                    picture.save(content, "PNG")
                    archive.writestr(f"{split}/{name}/{number:05}.png", content.getvalue())


def main() -> None:
    """Fetches and writes."""
    from torchvision.datasets import CIFAR10

    folder = Path(sys.argv[1])
    sets = {split: CIFAR10(folder, split == "train", download=True) for split in MOST}
    named = {
        split: ((picture, found.classes[label]) for picture, label in found)
        for split, found in sets.items()
    }
    write(folder / "cifar10.zip", named)


if __name__ == "__main__":
    main()
