"""Puzzles ready for the step: the training's own delivery against torch's DataLoader."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bench import drawn, product
from bench.measure import Measured, Run, alternate, speeds, worst

WORKERS = 2
CASES = {28: (8192, 128), 64: (4096, 128), 255: (384, 64)}  # size: images of an epoch, batch


class Puzzles(Dataset):
    """The same puzzle made image by image, as one writes it for a DataLoader."""

    def __init__(self, task, pixels: np.ndarray):
        """Keeps the sizes of the product's task and the images (N, 3, S, S) uint8."""
        self.cell, self.tile = task.cell, task.tile
        self.offset, self.shift = task.offset, task.shift
        self.permutations = task.permutations.tolist()
        self.random = None
        self.options, self.pixels = task.options, pixels

    def __len__(self) -> int:
        """Number of images."""
        return len(self.pixels)

    def __getitem__(self, row: int):
        """Gives nine normalised tiles (9, 3, t, t) float32 and the label."""
        if self.random is None:  # one for each worker, as torch seeds them
            self.random = np.random.default_rng(torch.initial_seed())
        random = self.random
        label = int(random.integers(len(self.permutations)))
        slots = [(self.pixels[row], cell) for cell in self.permutations[label]]
        other = self.pixels[random.integers(len(self.pixels))]
        for slot in random.permutation(9)[: random.integers(self.options.occlusions + 1)]:
            slots[slot] = other, int(random.integers(9))
        tiles = np.empty((9, 3, self.tile, self.tile), np.float32)
        offsets = random.integers(0, self.offset + 1, (9, 1, 2))
        corners = (offsets + random.integers(0, self.shift + 1, (9, 3, 2))).tolist()
        for slot, (image, cell) in enumerate(slots):
            for channel, (top, left) in enumerate(corners[slot]):
                y, x = top + cell // 3 * self.cell, left + cell % 3 * self.cell
                tiles[slot, channel] = image[channel, y : y + self.tile, x : x + self.tile]
        tiles = self.recoloured(tiles, random.random()).reshape(9, -1)
        tiles -= tiles.mean(1, keepdims=True)
        deviation = np.sqrt(np.einsum("nd,nd->n", tiles, tiles) / tiles.shape[1])
        tiles /= np.maximum(deviation, 1.0)[:, None]
        return torch.from_numpy(tiles).view(9, 3, self.tile, self.tile), label

    def recoloured(self, tiles: np.ndarray, draw: float) -> np.ndarray:
        """Makes tiles grey, takes a colour direction out of them, or leaves them."""
        if draw < self.options.grey:
            tiles[:] = tiles.mean(1, keepdims=True)
        elif draw < self.options.grey + self.options.projection:
            part = (2 * tiles[:, 1] - tiles[:, 0] - tiles[:, 2]) / 6
            tiles += part[:, None] * np.array([1, -2, 1], np.float32)[:, None, None]
        return tiles


def delivery_vs_dataloader(run: Run) -> Measured:
    """Takes an epoch of batches from each; workers are started before and kept."""
    return worst({f"{size} px": _case(run, size, *CASES[size]) for size in CASES})


def _case(run: Run, size: int, number: int, batch: int) -> Measured:
    path = product.write_pack(
        run.scratch / f"delivery-{size}.h5", drawn.images(number, size), drawn.keys(number)
    )
    pack = product.read_pack(path)
    task = product.jigsaw(pack)
    data = Puzzles(task, pack.images)
    loader = DataLoader(
        data, batch, shuffle=True, num_workers=WORKERS, drop_last=True, persistent_workers=True
    )
    shapes = {views.shape for views, _ in loader}  # and the workers are there, before any thread
    torch.set_num_threads(run.cores)

    def ours():
        found = {views.shape for views, _ in product.deliver(task, pack, batch, 0)}
        assert found == shapes, (found, shapes)

    pairs = alternate(ours, lambda: sum(1 for _ in loader) is None, run.rounds)
    return Measured(speeds(pairs), f"torch {torch.__version__}, DataLoader with 2 workers", pairs)
