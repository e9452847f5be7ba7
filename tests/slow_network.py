"""A network that takes its time without the processor; for tests of what befalls long trainings."""

import time

from torch import nn


class _Slow(nn.Module):
    def __init__(self, seconds: float):
        super().__init__()
        self.seconds = seconds

    def forward(self, maps):
        if self.training:
            time.sleep(self.seconds)
        return maps


def slow(seconds: float) -> dict[str, nn.Module]:
    """Gives one stage, `one`, whose forward pass in a training lasts so long at least."""
    return {"one": nn.Sequential(_Slow(seconds), nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())}
