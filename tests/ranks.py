"""Small trainings for torchrun, for tests: python -m torch.distributed.run ... tests/ranks.py."""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import crafted
import torch
from test_training import job

from kt.core import parallel, resume, training
from kt.core.transfer import Taught
from kt.pretext_train import build_task
from kt.transfers import regression

STEP = training._Run._step


def main(place: Path, kind: str, *faults: str) -> None:
    """Trains and writes weights, records and this rank's rows to the folder."""
    place.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    if kind == "pretext":
        pixels, task = crafted.scenes(136, 36), crafted.jigsaw(36, 136, dropout=0.3)
    elif kind == "regression":
        pixels = crafted.discs(136, 16)[0]
        rows = torch.from_numpy(pixels).float().mean((2, 3))  # what a teacher says of them
        learned = regression.build(None, [Taught(rows=rows)], 0)
        context = dataclasses.replace(crafted.context(16, 136), transfer=learned)
        task = build_task(crafted.plugin(crafted.LABELS, crop=0.6, flip=0.5, hidden=6), context)
    else:
        pixels, labels = crafted.discs(136, 16)
        task = crafted.labelling(16, labels, crop=0.6, flip=0.5, hidden=6)
    wanted = job(task, pixels, held_out=8, epochs=2, optimiser="sgd", lr=0.02)
    wanted = dataclasses.replace(wanted, state=place / "state", fingerprint={"lr": 1})
    if "idle" in faults:
        wanted.network.left_over = torch.nn.Linear(3, 2)
    if "unlike" in faults:
        training.precision = lambda *_: training.TYPES[parallel.rank()]
    if "compiled" in faults:  # without the code that the compiler would write
        wrap = parallel.wrap
        parallel.wrap = lambda *given: torch.compile(wrap(*given), backend="aot_eager")
    if "blind" in faults and parallel.rank() == 1:
        resume.newest = lambda *_: None
    rows = []
    resume.SAVE_SECONDS, resume.SAVE_SHARE = 0.0, float("inf")

    def spy(run, index, views, labels):
        if "die" in faults and parallel.rank() == 1 and len(rows) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        if "stop" in faults and parallel.rank() == parallel.size() - 1 and len(rows) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        rows.append(index.tolist())
        return STEP(run, index, views, labels)

    training._Run._step = spy
    try:
        records = training.train(wanted)
    finally:
        (place / f"rows-{parallel.rank()}.json").write_text(json.dumps(rows))
    if parallel.rank() == 0:
        torch.save(wanted.network.state_dict(), place / "weights.pt")
        (place / "records.json").write_text(json.dumps(records))


if __name__ == "__main__":
    parallel.connect()
    folder, kinds, *faults = sys.argv[1:]
    for kind in kinds.split(","):
        main(Path(folder, kind), kind, *faults)
