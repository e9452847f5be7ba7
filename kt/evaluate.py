"""Judges all seeds of one model by one or more evaluations; the same for every model.

Reads backbones, packs and labels; writes a JSON file with records as in docs/reference.md. The
backbone is proved unchanged by a probe. By hand:

    python -m kt.evaluate --model results/teachers/random/s0 --seeds 0 \
      --describe '{"arm": "random"}' \
      --evaluations '{"knn": {"neighbours": 20, "temperature": 0.07, "map": 1}}' \
      --data results/data/fashion_mnist --output knn.json
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from pathlib import Path

from kt import config, workflow
from kt.core import step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="folders, one a seed")
    parser.add_argument("--seeds", type=int, nargs="+", required=True, help="seed of each model")
    parser.add_argument(
        "--describe", type=config.json_object, default={}, help="fields for each record"
    )
    parser.add_argument(
        "--evaluations", type=config.json_object, required=True, help="options of each, by name"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the packed data set")
    parser.add_argument("--state", type=Path, help="folder for what an interrupted run has done")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")


def run(arguments: argparse.Namespace) -> None:
    """Evaluates each seed's model and gathers the records."""
    with step.importing():
        from kt.core import hardware, judge, model, resume, table

    if len(arguments.model) != len(arguments.seeds):
        raise step.ConfigError("--model and --seeds: expected as many seeds as models")
    digests = [table.digest(model.weights_of(path)) for path in arguments.model]
    data, found = read_data(arguments.data), []
    packs = [table.digest(path) for path in sorted(arguments.data.glob("*.h5"))]
    state = resume.place(arguments.state, [*digests, *packs])
    for folder, digest, seed in zip(arguments.model, digests, arguments.seeds, strict=True):
        backbone = model.load(folder, hardware.device())
        for name, values in arguments.evaluations.items():
            fields = {**arguments.describe, "evaluation": name, "seed": seed}
            place = state and state / f"{name}-{workflow.fingerprint(digest, packs, values, seed)}"
            judged = dataclasses.replace(data, state=place)
            work = functools.partial(judge_one, name, values, backbone, judged, seed)
            records = judge.once(place, work)
            found += [{**fields, **record} for record in records]
    parents = dict(zip(map(str, arguments.model), digests, strict=True))
    step.write_json(arguments.output, {"records": found, "provenance": step.provenance(parents)})
    resume.finish(arguments.state, state)


def judge_one(name: str, values: dict, backbone, data, seed: int) -> list[dict]:
    """Runs one evaluation and proves that it left the backbone as it was."""
    from kt.core import judge

    module = config.plugin("evaluations", name, "--evaluations")
    options = config.options("evaluations", name, values, f"evaluations.{name}")
    if module.NEEDS_LABELS and data.train is None:
        step.log.info("%s needs labels, there are none", name)
        return []
    before = judge.weights_digest(backbone)
    records = module.evaluate(backbone, data, options, seed)
    if judge.weights_digest(backbone) != before:
        raise AssertionError(f"{name} changed the backbone it judged")
    return records


def read_data(folder: Path):
    """Reads the packs and labels of a data set; every image of train and test has a label."""
    from kt.core import images, judge

    pool = images.read_pack(folder / "train-unlabelled.h5")
    splits = []
    classes: list[str] = []
    for name in ("train", "test"):
        pack = images.read_pack(folder / f"{name}.h5")
        true = images.read_labels(folder / f"{name}-labels.h5")
        classes = true.classes
        splits.append(_labelled(pack, true, str(folder / name)))
    if not (len(splits[0].pack) and len(splits[1].pack)):
        return judge.Data(pool, None, None, 0)
    return judge.Data(pool, *splits, len(classes))


def _labelled(pack, true, where: str):
    import torch

    from kt.core import images, judge

    labels = torch.from_numpy(true.labels[images.rows_of(true.keys, pack.keys, where)])
    if (labels < 0).any():
        raise step.DataError(f"{where}: {int((labels < 0).sum())} images have no label")
    return judge.Split(pack, labels)


if __name__ == "__main__":
    step.main(__doc__, add_arguments, run)
