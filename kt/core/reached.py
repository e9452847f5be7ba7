"""How far k-means had come, kept beside its output: one that was killed goes on there.

Centroids after an iteration are all that the next one needs, so the result is the same bit for bit.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from kt.core.ending import lack
from kt.core.files import replacing

SAVE_SECONDS = float(os.environ.get("KT_SAVE_SECONDS", 60))  # between two states, at least


class Reached:
    """The runs of k-means of one step, one after the other, as far as they are done.

    Attributes:
        place: The file, or None where nothing is kept.
        writes: Whether this process does; others only read, before the first iteration.
    """

    def __init__(self, place: Path | None = None, made_of: str = "", writes: bool = True):
        """Reads what an earlier process left, if that was made of the same."""
        self.place, self.made_of, self.writes = place, made_of, writes
        self.runs: list[tuple[np.ndarray, list[float], bool]] = []
        self.now, self.saved = -1, time.monotonic()
        if place is not None and place.exists():
            try:
                self._read(place)
            except Exception as error:  # numpy raises anything on what it did not write
                if lack(error):
                    raise
                self.runs = []
        self.found = sum(len(objective) for _, objective, _ in self.runs)

    def _read(self, place: Path) -> None:
        with np.load(place) as file:
            if str(file["made_of"]) == self.made_of:
                for number, ended in enumerate(file["ended"].tolist()):
                    objective = file[f"objective{number}"].tolist()
                    self.runs.append((file[f"centroids{number}"], objective, ended))

    def forget(self) -> None:
        """Begins anew."""
        self.runs, self.found = [], 0

    def begin(self, centroids: np.ndarray) -> tuple[np.ndarray, list[float], bool]:
        """Begins the next run; gives its centroids, objectives so far, and whether it had ended."""
        self.now += 1
        if self.now == len(self.runs):
            self.runs.append((centroids, [], False))
        centroids, objective, ended = self.runs[self.now]
        return centroids, list(objective), ended

    def after(self, centroids: np.ndarray, objective: list[float], ended: bool) -> None:
        """Notes what an iteration gave; writes it down if the last time is long ago."""
        self.runs[self.now] = centroids, list(objective), ended
        due = time.monotonic() - self.saved >= SAVE_SECONDS
        if self.place is None or not self.writes or not due:
            return
        arrays = {"made_of": self.made_of, "ended": [ended for *_, ended in self.runs]}
        for number, (one, objectives, _) in enumerate(self.runs):
            arrays |= {f"centroids{number}": one, f"objective{number}": objectives}
        with replacing(self.place) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)
        self.saved = time.monotonic()

    def remove(self) -> None:
        """Takes the file away: the output stands."""
        if self.place is not None and self.writes:
            self.place.unlink(missing_ok=True)
