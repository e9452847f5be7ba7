"""SimCLR of lightly on the target network, for as long as a transfer model took with its teachers.

Source: "A simple framework for contrastive learning of visual representations" (Chen et al., ICML
2020), by lightly's own transform, projection head and loss (`pip install lightly`). Ours are the
loop, the optimiser (that of the targets) and the cosine schedule, which runs over the time that is
left. Each training has as many threads as a training of the workflow, and two run side by side.
"""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
import time
from pathlib import Path

from kt import config
from kt import workflow as plan
from kt.core import lessons, step
from kt.plan import logged

BATCH = 128
WARMUP = 0.05


def records(root: Path, folder: Path, settings: config.Config, cores: int) -> list[dict]:
    """Trains one network a seed and judges them as the workflow does; gives the metric records.

    Args:
        root: Of the project.
        folder: In which the workflow ran.
        settings: Of that run.
        cores: That the workflow had.

    Raises:
        SystemExit: There is a GPU, which the workflow uses and this does not; or it failed.
    """
    import torch

    if torch.cuda.is_available():
        sys.exit("error: SimCLR is compared on CPUs alone; hide the GPU (CUDA_VISIBLE_DEVICES=)")
    costs = (cost(folder, settings, lesson) for lesson in lessons.lessons(settings).values())
    allowed, threads = f"{max(costs):.0f}", max(1, cores // 2)
    name = f"simclr-{plan.fingerprint(settings, allowed, threads)}"
    results = folder / "results"
    models = [results / "peers" / name / f"s{seed}" for seed in range(settings.seeds)]
    commands = [
        [sys.executable, "-m", "experiments.simclr", str(folder), str(seed), allowed, str(threads),
         config.dumps(settings), str(model)]
        for seed, model in enumerate(models)
        if not (model / "model.json").exists()
    ]  # fmt: skip
    abreast = min(cores, 2)
    for first in range(0, len(commands), abreast):
        running = [subprocess.Popen(one, cwd=root) for one in commands[first : first + abreast]]
        if any([one.wait() for one in running]):
            sys.exit("error: SimCLR failed")
    about = {
        "model": "simclr", "arm": "simclr", "dataset": settings.use.evaluate, "target": "small",
    }  # fmt: skip
    found: list[dict] = []
    for job, evaluations in plan.evaluation_jobs(settings, True).items():
        output = results / "peers" / name / f"{job}-{plan.EVALUATE_VERSION}.json"
        if not output.exists():
            command = [sys.executable, "-m", "kt.evaluate", "--model", *map(str, models)]
            command += ["--seeds", *(str(settings.seed + seed) for seed in range(settings.seeds))]
            command += ["--describe", json.dumps(about), "--evaluations", config.dumps(evaluations)]
            command += ["--data", str(results / "data" / settings.use.evaluate)]
            subprocess.run([*command, "--output", str(output)], cwd=root, check=True)
        found += step.read_json(output)["records"]
    epochs = step.read_json(models[0] / "model.json")["training"]["epochs"]
    return [record | {"chosen": f"{allowed} s, {epochs:.1f} epochs"} for record in found]


def cost(folder: Path, settings: config.Config, lesson: lessons.Lesson) -> float:
    """Gives the seconds of all jobs behind one target of a lesson, teachers and rounds included."""
    jobs = {}
    describers = lessons.describers(settings)
    for one in [*lessons.rounds(settings, lesson), lesson]:
        log = folder / f"results/targets/small/{one.origin}/s0/log.jsonl"
        jobs["target_train", f"small-{one.origin}-s0"] = log
        for paths in lessons.lesson_tables(settings, one).values():
            for path in paths:
                parts = Path(path).with_suffix("").parts[1:]
                if parts[0] == "pseudo_labels":
                    _, teacher, layer, _, k, split = parts
                    jobs["pseudo_labels", f"{teacher}-{layer}-{k}-{split}"] = None
                    jobs["cluster", f"{teacher}-{layer}-{k}"] = None
        for teacher, layer in lessons.sources(settings, one):
            split = f"{settings.use.cluster}-train-unlabelled"
            jobs["features", f"{teacher}-{layer}-{split}"] = None
            if (place := describers[teacher].folder).startswith("results/teachers"):
                jobs["pretext_train", f"{teacher}-s0"] = folder / place / "log.jsonl"
    return sum(seconds(folder, *job, log) for job, log in jobs.items())


def seconds(folder: Path, rule: str, name: str, log: Path | None = None) -> float:
    """Gives the wall-clock of a job; it has run, since the report stands.

    The benchmark of an interrupted training tells of the last attempt alone, its log of all.
    """
    with open(folder / "results/benchmarks" / rule / f"{name}.tsv", newline="") as file:
        found = sum(float(row["s"]) for row in csv.DictReader(file, delimiter="\t"))
    return max(found, logged(log)) if log else found


def train(pack, backbone, settings: config.Target, seed: int, allowed: float) -> dict:
    """Trains the backbone in place for so many seconds; gives what was done.

    Args:
        pack: Unlabelled images.
        backbone: With fresh weights and input normalisation.
        settings: Of the target; optimiser and learning rate are used.
        seed: Of views and order.
        allowed: Seconds, the making of views included.
    """
    import torch
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform
    from PIL import Image

    from kt.core import hardware

    torch.manual_seed(seed)
    normalise = {"mean": backbone.mean.tolist(), "std": backbone.std.tolist()}
    # No blur: lightly's own advice for small images.
    transform = SimCLRTransform(input_size=pack.size, gaussian_blur=0.0, normalize=normalise)

    class Views(torch.utils.data.Dataset):
        def __len__(self):
            return len(pack)

        def __getitem__(self, row):
            return transform(Image.fromarray(pack.images[row].transpose(1, 2, 0)))

    loader = torch.utils.data.DataLoader(Views(), min(BATCH, len(pack)), True, drop_last=True)
    width = backbone.map_shape(pack.size)[0]
    head = SimCLRProjectionHead(width, width, 128)
    criterion, given = NTXentLoss(), settings.training
    parameters = [*backbone.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(parameters, given.lr, weight_decay=given.weight_decay)
    backbone.train().to(memory_format=torch.channels_last)
    dtype = hardware.precision(given.precision, torch.device("cpu"))
    mixed = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    begun, steps, last = time.monotonic(), 0, float("nan")
    while time.monotonic() - begun < allowed:
        for one, two in loader:
            share = (time.monotonic() - begun) / allowed
            if share >= 1:
                break
            for group in optimiser.param_groups:
                rise = min(1.0, (share + 1e-3) / WARMUP)
                group["lr"] = given.lr * rise * (1 + math.cos(math.pi * share)) / 2
            with mixed:
                views = torch.cat([one, two]).to(memory_format=torch.channels_last)
                outputs = head(backbone(views).float().mean((2, 3)))
            loss = criterion(*outputs.float().chunk(2))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            steps, last = steps + 1, float(loss.detach())
    backbone.eval()
    epochs = steps * loader.batch_size / len(pack)
    return {"seconds": allowed, "steps": steps, "epochs": epochs, "loss": last}


def main() -> None:
    """Trains the network of one seed: FOLDER SEED SECONDS THREADS SETTINGS OUTPUT."""
    import torch

    from kt.core import images, model
    from kt.pretext_train import pool_context

    folder, seed, allowed, threads, text, output = sys.argv[1:]
    torch.set_num_threads(int(threads))
    settings = config.check(config.Config, json.loads(text))
    data = Path(folder) / "results/data" / settings.use.target
    pack = images.read_pack(data / "train-unlabelled.h5")
    target = settings.targets["small"]
    backbone = model.fresh(target.backbone, settings.seed + int(seed))
    context = pool_context(pack, data / "report.json", int(seed))
    backbone.mean, backbone.std = context.mean.clone(), context.std.clone()
    done = train(pack, backbone, target, settings.seed + int(seed), float(allowed))
    print(f"simclr s{seed}: {done}", file=sys.stderr)
    model.save(Path(output), backbone, target.backbone, {"name": "simclr", "training": done})


if __name__ == "__main__":
    main()
