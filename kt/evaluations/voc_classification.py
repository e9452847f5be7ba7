"""PASCAL VOC 2007 classification: which of 20 classes a picture shows, several at once (mAP).

On frozen features of each layer: a linear support vector machine for each class against the rest,
as in VISSL (Goyal et al., ICCV 2019). Its penalty is chosen on the challenge's own split of
trainval into train and val, then all of trainval is fitted and test is judged. With `finetune` the
whole network is trained, too (paper, section 5).

With few labels, `labels_per_class`, the same machines see what VISSL's low-shot protocol draws
(Goyal et al., "Scaling and benchmarking self-supervised visual representation learning", ICCV
2019): for each class by itself n pictures of trainval that show it and 19 n that do not, one record
for each of `draws` draws. Each class's penalty is chosen by cross-validation on its 20 n pictures
alone; of n = 1, which leaves nothing to hold out, the largest is taken. Differs from VISSL, whose
code takes the cost that is best on test, scales features to unit length and lets positives weigh
double: features are standardised over all of trainval, which takes no labels.

Differs from the paper: a picture is squeezed into a square and seen once, where its code cuts
random squares in training and averages over ten in the test; so numbers are lower.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kt.config import Count, Name, Schedule, Settings

NEEDS_LABELS = False  # its labels are its own
FROZEN = False
CHOOSES = False
BATCH = 64
FOLDS = 4  # of the cross-validation with few labels, at most (ours)
YEAR = "VOC2007"


class Options(Settings):
    """Options of the evaluation in the config."""

    path: Annotated[str, Field(description="folder VOCdevkit with VOC2007 in it, test included")]
    size: Annotated[int, Field(ge=12, description="pictures are squeezed to size x size, pixels")]
    layers: Annotated[list[Name], Field(description="layers judged; []: every one")]
    map: Annotated[Count, Field(description="each layer's map is pooled to map x map")]
    penalties: Annotated[
        list[Annotated[float, Field(gt=0)]],
        Field(
            min_length=1,
            description="tried for each class: penalty / 2 x sum of squared weights, beside the "
            "mean squared hinge loss",
        ),
    ]
    iterations: Annotated[Count, Field(description="of L-BFGS, at most")]
    labels_per_class: Annotated[
        list[Count] | None,
        Field(
            description="also fit each class to so many pictures that show it and 19 times as many "
            "that do not; [] or null: do not"
        ),
    ]
    draws: Annotated[Count, Field(description="of these pictures, a record each")]
    finetune: Annotated[
        Schedule | None,
        Field(
            description="also train the whole network under a linear layer, keys as under "
            "`training` of voc_detection; null: do not"
        ),
    ]


def pictures(options: Options) -> tuple:
    """Gives the devkit's folder, and the names of the pictures of each split.

    Raises:
        ConfigError, DataError: As `voc.folder` and `voc.apart`.
    """
    from kt.core import voc

    root, names = voc.folder(options.path, YEAR), {}
    for pair in (("train", "val"), ("trainval", "test")):
        names |= zip(pair, voc.apart(root, "Main", *pair), strict=True)
    return root, names


def evaluate(backbone, data, options: Options, seed: int) -> list[dict]:
    """Gives map_11, map_area and validation_map for each layer, and tuned_map_11, tuned_map_area.

    With few labels also map_11 and map_area for each layer, number of labels and draw.

    Raises:
        ConfigError: The devkit or a layer is not there.
        DataError: Something in the devkit is not what it should be.
    """
    from kt.core import images, judge, voc

    root, names = pictures(options)
    truth = {split: voc.labels(root, split) for split in ("trainval", "test")}
    kept, out = (
        images.rows_of(names["trainval"], names[split], f"{root}: trainval, {split}")
        for split in ("train", "val")
    )
    layers = [backbone.check_layer(layer) for layer in options.layers] or backbone.layers
    seen, unseen = (
        features(backbone, root, names[split], layers, options) for split in ("trainval", "test")
    )
    few, found = few_labels(names["trainval"], truth["trainval"], options, seed), []
    for layer in layers:
        rows, mean, std = standardised(seen[layer])
        queries, known = (unseen[layer] - mean) / std, {"layer": layer, "dataset": YEAR}
        weights, best = choose(rows, truth["trainval"], [(kept, out)], options)
        found += judge.records({"validation_map": best}, len(out), **known)
        found += scored(decide(queries, weights), truth["test"], **known)
        for number, draw, chosen in few:
            guess = decide(queries, fit_few(rows, chosen, options))
            found += scored(guess, truth["test"], **known, labels_per_class=number, draw=draw)
    if options.finetune:
        guess = tuned(backbone, root, names, truth["trainval"], data, options, seed)
        found += scored(guess, truth["test"], "tuned_", dataset=YEAR)
    return found


def features(backbone, root, names, layers, options: Options) -> dict:
    """Gives pooled features of squeezed pictures, (N, D) float32 for each layer, on the CPU."""
    import torch

    from kt.core.backbone import pool

    found = {layer: [] for layer in layers}
    with torch.inference_mode():
        for first in range(0, len(names), BATCH):
            pixels = squeezed(root, names[first : first + BATCH], options.size)
            pictures = backbone.normalise(pixels.to(backbone.mean.device))
            for layer, maps in backbone.maps(pictures, layers).items():
                found[layer].append(pool(maps, options.map).cpu())
        return {layer: torch.cat(parts) for layer, parts in found.items()}


def squeezed(root, names, size: int):
    """Reads pictures as squares, (B, 3, size, size) uint8."""
    import numpy as np
    import torch

    from kt.core import voc

    return torch.from_numpy(np.stack([voc.squeezed(root, name, size) for name in names]))


def standardised(rows):
    """Gives rows (N, D) with mean 0 and deviation 1 of each column, and both, (D,) float32."""
    mean, std = rows.mean(0), rows.std(0).clamp(min=1e-6)
    return (rows - mean) / std, mean, std


def few_labels(names, truth, options: Options, seed: int) -> list[tuple]:
    """Draws for each class n pictures that show it and (C - 1) n that do not.

    Each class draws by itself, by seed and names alone, so the same pictures for every network. A
    class that has fewer gives all, and an n that no class has is left out.

    Args:
        names: Of the N pictures.
        truth: (N, C) int8: 1, -1, or 0 left out.
        options: `labels_per_class` and `draws`.
        seed: Of the draws.

    Returns:
        n, number of the draw and what it shows, (N, C) int8: 1, -1, or 0 not drawn.
    """
    import torch

    from kt.core import draws, images, step

    ids, known, found = torch.from_numpy(images.key_ids(names)), torch.from_numpy(truth), []
    largest, others = int((truth == 1).sum(0).max()), truth.shape[1] - 1
    for number in options.labels_per_class or []:
        if number > largest:
            step.log.warning("VOC2007: %d labels a class left out, no class has them", number)
            continue
        for draw in range(options.draws):
            order = draws.bits(seed, f"voc few {number}", draw, ids, truth.shape[1])
            chosen = torch.zeros_like(known)
            for sign, most in ((1, number), (-1, others * number)):
                own = known == sign
                first = order.where(own, torch.iinfo(order.dtype).max).argsort(0)[:most]
                drawn = torch.zeros_like(own).scatter(0, first, True) & own
                chosen[drawn] = sign
            found.append((number, draw, chosen.numpy()))
    return found


def fit_few(rows, chosen, options: Options):
    """Fits each class to the pictures that were drawn for it, its penalty cross-validated on these.

    Each fold holds out an equal share of those that show the class and of those that do not. All is
    done in the space that the pictures span, where the best weights lie.

    Args:
        rows: (N, D) float32, standardised.
        chosen: (N, C) int8 as of `few_labels`.
        options: `penalties` and `iterations`.

    Returns:
        (D + 1, C) float32; zeros where no picture shows the class.
    """
    import numpy as np
    import torch

    weights = torch.zeros(rows.shape[1] + 1, chosen.shape[1])
    for column, signs in enumerate(chosen.T):
        drawn = np.flatnonzero(signs)
        shown = signs[drawn] == 1
        if not shown.any():
            continue
        basis, inside = torch.linalg.qr(rows[drawn].T)  # rows.T = basis @ inside
        folds = min(FOLDS, int(shown.sum()))
        fold = np.where(shown, shown.cumsum(), (~shown).cumsum()) % folds
        parts = [(fold != one, fold == one) for one in range(folds)] if folds > 1 else []
        splits = [tuple(map(np.flatnonzero, part)) for part in parts]
        own, _ = choose(inside.T, signs[drawn, None], splits, options)
        weights[:, column] = torch.cat([basis @ own[:-1], own[-1:]])[:, 0]
    return weights


def choose(rows, truth, splits, options: Options):
    """Fits each class with the penalty that ranks held-out pictures best, of equals the largest.

    Args:
        rows: (N, D) float32, standardised.
        truth: (N, C) int8: 1, -1, or 0 left out.
        splits: Rows to fit the candidates on and held-out rows to choose by, of each split; without
            any the largest penalty is taken.
        options: `penalties` and `iterations`.

    Returns:
        (D + 1, C) float32 weights fitted on all rows, and the mean over classes of the best areas,
        themselves means over the splits.
    """
    import numpy as np
    import torch

    from kt.core import voc_metrics

    number, signs = truth.shape[1], torch.from_numpy(truth).float()
    best, penalty = np.full(number, -1.0), torch.ones(number)
    starts = [torch.zeros(rows.shape[1] + 1, number)] * max(1, len(splits))
    known = np.zeros(number, bool)
    for candidate in sorted(options.penalties, reverse=True):  # each starts from the one before
        tried, areas = torch.full((number,), candidate), np.zeros(number)
        for place, (kept, out) in enumerate(splits):
            start = fit(rows[kept], signs[kept], starts[place], tried, options.iterations)
            ranked, starts[place] = curves(decide(rows[out], start), truth[out]), start
            areas += [voc_metrics.area(c) / len(splits) if c.positives else 0.0 for c in ranked]
            known |= [c.positives > 0 for c in ranked]
        penalty[torch.from_numpy(areas > best)] = candidate
        best = np.maximum(best, areas)
    weights = fit(rows, signs, starts[0], penalty, options.iterations)
    return weights, float(best[known].mean()) if known.any() else 0.0


def fit(rows, signs, start, penalty, iterations: int):
    """Fits linear support vector machines, one for each class, with the squared hinge loss.

    Each minimises mean(max(0, 1 - sign * score)^2) + penalty / 2 * squared weights over the
    pictures whose sign is not 0.

    Args:
        rows: (N, D) float32, standardised.
        signs: (N, C) float32: 1, -1, or 0 left out.
        start: (D + 1, C) float32 weights to start from.
        penalty: (C,) float32; acts on the weights, not on the biases.
        iterations: Of SciPy's L-BFGS, at most.

    Returns:
        (D + 1, C) float32; the last row holds the biases.
    """
    import torch

    from kt.core.convex import minimise

    counted = signs.abs().sum(0).clamp(min=1)

    def loss_and_gradient(weights):
        short = (signs.abs() - signs * decide(rows, weights)).clamp(min=0) / counted.sqrt()
        loss = short.square().sum() + (penalty / 2 * weights[:-1].square()).sum()
        error = -2 * signs * short / counted.sqrt()
        gradient = torch.cat([rows.T @ error + penalty * weights[:-1], error.sum(0)[None]])
        return loss, gradient

    return minimise(loss_and_gradient, start, iterations)


def decide(rows, weights):
    """Gives the score of each class, (N, C) float32, for rows (N, D)."""
    return rows @ weights[:-1] + weights[-1]


def curves(scores, truth) -> list:
    """Ranks the pictures for each class by scores (N, C) against truth (N, C)."""
    from kt.core import voc_metrics

    pairs = zip(scores.numpy().T, truth.T, strict=True)
    return [voc_metrics.ranking(column, given) for column, given in pairs]


def scored(scores, truth, prefix: str = "", **more) -> list[dict]:
    """Gives records of map_11 and map_area of scores (N, C) against truth (N, C)."""
    from kt.core import judge, voc_metrics

    values = voc_metrics.mean_precision(curves(scores, truth))
    values = {f"{prefix}{name}": value for name, value in values.items()}
    return judge.records(values, len(scores), **more)


def build(backbone, options: Options):
    """Gives the network to be trained as a whole, a fresh layer on a copy; None where none is.

    Raises:
        ConfigError: The pictures are too small; also where features alone are judged.
    """
    from kt.core import voc
    from kt.core.voc_training import Classifier, Trunk

    if not options.finetune:
        backbone.map_shapes(options.size, backbone.layers)
        return None
    trunk = Trunk(backbone, None, options.size, options.finetune)
    return Classifier(trunk, options.map, options.size, len(voc.CLASSES))


def tuned(backbone, root, names, truth, data, options: Options, seed: int):
    """Trains a copy of the network on trainval; gives scores (N, C) float32 of test."""
    import torch
    from torch.nn import functional

    from kt.core import voc_training

    torch.manual_seed(seed)  # the head's weights
    network = build(backbone, options).cpu()
    trunk = network.trunk.backbone
    signs = torch.from_numpy(truth).float()

    def load(row, epoch):
        given = names["trainval"][row : row + 1]
        pixels = squeezed(root, given, options.size)[0]
        mirrored = voc_training.chances(given, seed, epoch, 1) < 0.5
        return pixels.flip(-1) if mirrored else pixels, signs[row]

    def loss(batch):
        where = trunk.mean.device
        pixels, wanted = (torch.stack(part).to(where) for part in zip(*batch, strict=True))
        scores = network(trunk.normalise(pixels))
        each = functional.binary_cross_entropy_with_logits(
            scores, wanted.clamp(min=0), wanted.abs(), reduction="sum"
        )
        return each / len(wanted)  # not the mean over the classes, for which no usual lr is made

    job = voc_training.Job(
        network, names["trainval"], load, loss, options.finetune, seed, "VOC2007 fine-tuning",
        data.state, voc_training.fingerprint(backbone, options, names["trainval"], seed),
    )  # fmt: skip
    voc_training.train(job)
    with torch.inference_mode():
        parts = [
            network(trunk.normalise(pixels.to(trunk.mean.device))).cpu()
            for first in range(0, len(names["test"]), BATCH)
            for pixels in [squeezed(root, names["test"][first : first + BATCH], options.size)]
        ]
    return torch.cat(parts)
