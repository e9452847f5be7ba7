import dataclasses
import itertools
import json
import math

import crafted
import numpy as np
import pytest
import torch

from kt.core import model, resume, training
from kt.core.network import Network, multiply_adds, precision
from kt.core.optimiser import Optimiser
from kt.core.step import DataError

RESIDUAL = {"name": "residual", "widths": [8, 16], "strides": [1, 2], "blocks": 1}


def job(task, pixels, held_out=0, epochs=1, backbone=crafted.PLAIN, seed=0, **settings):
    """A training on the images but for the last `held_out`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        trunk = model.fresh(crafted.plugin(backbone), seed)
        network = Network(trunk, task)
    rows = torch.arange(len(pixels))
    train, held = rows[: len(rows) - held_out], rows[len(rows) - held_out :]
    return training.Job(
        network, task, crafted.pack(pixels), train, held, crafted.training(**settings), epochs,
        seed, "test",
    )  # fmt: skip


def labelled(pixels, labels, **more):
    task = crafted.labelling(pixels.shape[-1], labels, crop=0.6, flip=0.5, hidden=8)
    return job(task, pixels, **more)


# ---------------------------------------------------------------------------- learning


def test_no_process_leaves_before_all_have_the_sums_of_the_last_state(tmp_path, monkeypatch):
    called = []
    for name in ("total", "wait"):
        real = getattr(training.parallel, name)
        noted = lambda *given, n=name, f=real: called.append(n) or f(*given)  # noqa: E731
        monkeypatch.setattr(training.parallel, name, noted)
    monkeypatch.setenv(resume.KEEP, "1")
    one = job(crafted.jigsaw(36, 40), crafted.noise(40, 36), batch=8)
    training.train(dataclasses.replace(one, log=tmp_path / "log.jsonl", state=tmp_path / "state"))
    assert called[-2:] == ["total", "wait"]


def test_a_tiny_teacher_solves_unseen_puzzles_far_above_chance():
    pixels = crafted.scenes(512 + 128, 36)
    task = crafted.jigsaw(36, len(pixels), permutations=16, tile_features=32, hidden=128)
    records = training.train(job(task, pixels, 128, 4, RESIDUAL, lr=0.006))
    assert records[-1]["validation_top1"] > 0.8  # chance: .0625
    assert records[-1]["loss"] < records[0]["loss"]


def test_puzzles_of_noise_cannot_be_solved():
    # If they could, a label would leak through something else than the order of the tiles.
    pixels = crafted.noise(256 + 128, 36)
    task = crafted.jigsaw(36, len(pixels), permutations=16)
    records = training.train(job(task, pixels, 128, 4, RESIDUAL, batch=64))
    assert records[-1]["validation_top1"] < 0.25


def test_labels_of_drawn_pictures_are_learned():
    pixels, labels = crafted.discs(240, 16)
    records = training.train(labelled(pixels, labels, held_out=60, epochs=15))
    assert records[-1]["validation_top1"] > 0.9


def test_dropout_and_smoothing_and_sgd_train_too():
    pixels = crafted.scenes(64, 36)
    task = crafted.jigsaw(36, 64, dropout=0.5)
    settings = {"optimiser": "sgd", "label_smoothing": 0.1, "lr": 0.01, "schedule": "step"}
    records = training.train(job(task, pixels, epochs=2, milestones=[0.5], **settings))
    assert len(records) == 2 and math.isfinite(records[-1]["loss"])


def test_training_in_float16_learns():
    pixels, labels = crafted.discs(240, 16)
    half = labelled(pixels, labels, held_out=60, epochs=15, precision="float16")
    records = training.train(half)
    assert records[-1]["validation_top1"] > 0.9


# ---------------------------------------------------------------------------- faults


def test_a_loss_that_is_not_finite_stops_with_step_and_images():
    pixels, labels = crafted.discs(64, 16)
    poisoned = labelled(pixels, labels)
    poisoned.task.context = dataclasses.replace(
        poisoned.task.context, std=torch.tensor([1.0, math.nan, 1.0])
    )
    with pytest.raises(DataError, match=r"loss is nan at step 1 .*'image-000"):
        training.train(poisoned)


def test_the_step_of_a_late_failure_is_named():
    pixels, labels = crafted.discs(96, 16)
    poisoned = labelled(pixels, labels, epochs=2)
    fill, seen = poisoned.task.fill, []

    def spoil(images, plan):
        seen.append(plan["rows"][:, 0])
        return fill(images, plan) * (math.inf if len(seen) == 5 else 1)

    poisoned.task.fill = spoil
    with pytest.raises(DataError, match=r"at step 5 \(epoch 2") as caught:
        training.train(poisoned)
    assert all(poisoned.pack.keys[row] in str(caught.value) for row in seen[4].tolist())


# ---------------------------------------------------------------------------- order and steps


def batches_of(wanted) -> list[tuple[int, tuple]]:
    """Trains and gives epoch and rows of every batch."""
    epochs, seen = [], []
    plan, fill = wanted.task.plan, wanted.task.fill

    def spy_plan(index, epoch):
        epochs.append(epoch)
        return plan(index, epoch)

    def spy_fill(images, drawn):
        seen.append((epochs[-1], tuple(drawn["rows"][:, 0].tolist())))
        return fill(images, drawn)

    wanted.task.plan, wanted.task.fill = spy_plan, spy_fill
    training.train(wanted)
    return seen


def test_the_order_is_a_function_of_seed_and_epoch():
    pixels, labels = crafted.discs(100, 12)

    def order(seed):
        task = crafted.labelling(12, labels, seed)
        return batches_of(job(task, pixels, epochs=2, seed=seed))

    one = order(0)
    assert one == order(0) and one != order(1)
    assert [epoch for epoch, _ in one] == [0, 0, 0, 1, 1, 1]
    first = [row for epoch, rows in one if epoch == 0 for row in rows]
    second = [row for epoch, rows in one if epoch == 1 for row in rows]
    assert len(set(first)) == len(set(second)) == 96 and first != second


def test_fewer_images_than_a_batch_still_make_a_step():
    pixels, labels = crafted.discs(9, 12)
    assert [len(rows) for _, rows in batches_of(job(crafted.labelling(12, labels), pixels))] == [9]


def test_the_log_holds_one_line_per_epoch(tmp_path):
    pixels, labels = crafted.discs(70, 12)
    logged = dataclasses.replace(
        labelled(pixels, labels, held_out=6, epochs=3), log=tmp_path / "log.jsonl"
    )
    records = training.train(logged)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").open()] == records
    assert [(row["epoch"], row["step"]) for row in records] == [(1, 2), (2, 4), (3, 6)]
    assert all(0 <= row["validation_top1"] <= 1 for row in records)
    assert not logged.network.training


def test_validation_draws_never_change():
    pixels = crafted.scenes(80, 36)
    trained = job(crafted.jigsaw(36, 80), pixels, 40)
    first, second = (
        training.validate(trained.network, trained.task, trained.pack, trained.held_out, batch)
        for batch in (32, 500)
    )
    assert first["validation_top1"] == second["validation_top1"]
    assert first["validation_loss"] == pytest.approx(second["validation_loss"], rel=1e-5)


@pytest.mark.parametrize("number", [1, 2, 255, 256, 257, 513])
def test_held_out_images_come_in_parts_of_sizes_alike(number, monkeypatch):
    sizes, one = [], job(crafted.jigsaw(36, 4), crafted.scenes(4, 36), 2)
    monkeypatch.setattr(
        training, "load_batch", lambda *given: (sizes.append(len(given[2])) or given[2], given[2])
    )
    one.network.forward = lambda views: views
    one.task.loss = one.task.right = lambda logits, labels: torch.ones(())
    found = training.validate(one.network, one.task, one.pack, torch.arange(number), 8)
    assert sum(sizes) == number and max(sizes) <= 256 and max(sizes) - min(sizes) <= 1
    assert found == {"validation_loss": 1, "validation_top1": 1}


def test_processes_that_share_a_batch_validate_in_parts_of_their_own_size(monkeypatch):
    pixels = crafted.scenes(80, 36)
    one = job(crafted.jigsaw(36, 80), pixels, 70)
    given = one.network, one.task, one.pack, one.held_out, 32
    whole, sizes = training.validate(*given), []
    one.network.register_forward_pre_hook(lambda _, views: sizes.append(len(views[0])))
    monkeypatch.setattr(training.parallel, "size", lambda: 8)
    monkeypatch.setattr(type(one.pack), "at_once", 32)
    assert training.validate(*given) == pytest.approx(whole, rel=1e-5)
    assert max(sizes) == 4 and sum(sizes) == 70


def test_the_learning_rate_rises_and_falls_as_declared():
    cosine = crafted.training(warmup=0.1)
    found = [training.rate(step, 100, cosine) for step in range(100)]
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert found[10] == 1 and found[55] == pytest.approx(0.5)
    assert all(before >= after for before, after in itertools.pairwise(found[10:]))
    assert 0 < found[99] < 0.001
    steps = crafted.training(warmup=0.0, schedule="step", milestones=[0.5, 0.75])
    found = [training.rate(step, 8, steps) for step in range(8)]
    assert found == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_weight_decay_spares_biases_and_norms():
    pixels, labels = crafted.discs(6, 12)
    network = labelled(pixels, labels).network
    before = [weight.detach().clone() for weight in network.parameters()]
    for weight in network.parameters():
        weight.grad = torch.zeros_like(weight)
    Optimiser(network, crafted.training(weight_decay=0.3)).step(0.1)
    for old, new in zip(before, network.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old * (1 - 0.1 * 0.3) if old.ndim > 1 else old)


# ---------------------------------------------------------------------------- held-out rows


def test_held_out_rows_are_chosen_by_key_and_disjoint():
    keys = crafted.names(200)
    shuffled = [keys[row] for row in np.random.default_rng(0).permutation(200)]
    chosen = []
    for names in (keys, shuffled):
        pack = crafted.pack(np.zeros((200, 3, 2, 2), np.uint8), names)
        train, held = training.hold_out(pack, 0.1, 1000)
        assert sorted(torch.cat([train, held]).tolist()) == list(range(200))
        assert len(held) == 20
        chosen.append({names[row] for row in held})
    assert chosen[0] == chosen[1]
    assert len(training.hold_out(pack, 0.5, 7)[1]) == 7


@pytest.mark.parametrize("number, sizes", [(10, [4, 3, 3]), (9, [3, 3, 3]), (4, [4]), (0, [0])])
def test_batches_for_inference_are_equally_large_and_in_order(number, sizes):
    pack, index = crafted.pack(crafted.noise(20, 2)), torch.arange(number) * 2
    parts = list(training.pack_batches(pack, index, 4))
    assert [len(part) for part in parts] == sizes
    assert np.array_equal(torch.cat(parts), pack.images[index])


def test_multiply_adds_are_those_counted_by_hand():
    pixels, labels = crafted.discs(6, 12)
    one = job(crafted.labelling(12, labels), pixels)
    by_hand = 6 * 6 * 8 * 27 + 3 * 3 * 16 * 72 + 16 * 3
    assert multiply_adds(one.network, one.task) == by_hand


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_multiply_adds_are_those_of_torchs_own_counter(name):
    from torch.utils.flop_counter import FlopCounterMode

    backbone = crafted.plugin({"name": "torchvision", "model": name, "last": None})
    task = crafted.jigsaw(96, 4)
    network = Network(model.fresh(backbone, 0), task).eval()
    views = torch.zeros(1, task.num_views, 3, task.view_size, task.view_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(views)
    assert multiply_adds(network, task) == counter.get_total_flops() / 2


# ---------------------------------------------------------------------------- bfloat16 on a CPU


@pytest.mark.parametrize("size", [8, 12, 16, 20])
@pytest.mark.parametrize("strides", [[2, 2, 2, 2], [4, 2, 1, 2], [2, 3, 4, 1]])
def test_strides_past_their_maps_are_computed_in_float32(size, strides):
    backbone = {**crafted.PLAIN, "widths": [4] * 4, "strides": strides}
    task = crafted.labelling(size, np.arange(2), hidden=0)
    network = Network(model.fresh(crafted.plugin(backbone), 0), task)
    maps = [network.backbone.map_shape(size, name)[1] for name in network.backbone.layers]
    beyond = any(edge < stride for edge, stride in zip([size, *maps[:-1]], strides, strict=True))
    found = precision(network, task, "bfloat16", torch.device("cpu"))
    assert found == (torch.float32 if beyond else torch.bfloat16)
    assert precision(network, task, "float32", torch.device("cpu")) == torch.float32
    assert precision(network, task, "bfloat16", torch.device("cuda")) == torch.bfloat16
    assert network.training


def test_such_a_training_is_the_one_in_float32_bit_for_bit():
    pixels, labels = crafted.discs(60, 16)
    past = {**crafted.PLAIN, "widths": [4] * 5, "strides": [2] * 5}  # 16, 8, 4, 2, 1
    weights = []
    for type_ in ("float32", "bfloat16"):
        one = labelled(pixels, labels, backbone=past, epochs=2, precision=type_)
        training.train(one)
        weights.append(one.network.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_weights_that_the_last_step_spoils_are_not_kept():
    pixels, labels = crafted.discs(24, 16)
    one = labelled(pixels, labels, epochs=1, batch=24)  # one step, before which all is well
    first = next(one.network.backbone.parameters())
    first.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(DataError, match=r"weights are not finite after step 1, such as backbone"):
        training.train(one)
