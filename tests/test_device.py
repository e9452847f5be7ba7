"""The code for accelerators, run on tensors that have a device, a shape and a type, but no data.

PyTorch's fake tensors refuse what CUDA refuses, operands on two devices, and every look at a value,
for which a training would wait for the device; copies that wait are refused here. What a GPU
computes they cannot tell; and the backward pass, which is PyTorch's own, wants a driver: here it
only leaves gradients behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import unittest.mock

import crafted
import pytest
import test_plugins
import test_transfer
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kt import config
from kt.core import delivery, hardware, model, training, voc_training
from kt.core.network import Network

WHERE = torch.device("cuda", 0)
SIZE, NUMBER, BATCH = 64, 60, 24
TASKS = [
    *((name, None) for name in config.plugins("tasks")),
    *(("classification", name) for name in config.plugins("transfers")),
]
CONVOLUTIONAL = [name for name in config.plugins("backbones") if name not in ("hog", "pixels")]


@pytest.fixture(scope="module")
def examples():
    return test_plugins.options_in_use()


@pytest.fixture
def accelerator(monkeypatch):
    """Gives a function that makes all believe in a GPU, whose tensors have no data, from then."""
    stack = contextlib.ExitStack()

    def begin():
        monkeypatch.setattr(hardware, "device", lambda: WHERE)
        monkeypatch.setattr(hardware, "generator", lambda where: torch.Generator())
        monkeypatch.setattr(hardware, "set_up", lambda *_: None)
        monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        monkeypatch.setattr(nn.Module, "to", moved)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))

    with stack:
        yield begin


def moved(module: nn.Module, where=None, memory_format=torch.preserve_format) -> nn.Module:
    """Does what `Module.to` does, which cannot exchange the data of tensors that have none."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                kept = memory_format if weight.ndim == 4 else torch.preserve_format
                there = weight.detach().to(where or weight.device, memory_format=kept)
                part._parameters[name] = nn.Parameter(there, weight.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(where or buffer.device)
    return module


class NoWaiting(TorchDispatchMode):
    """Refuses copies between devices that do not say that they need not be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        place = {torch.ops.aten._to_copy.default: 0, torch.ops.aten.copy_.default: 1}.get(func)
        if place is not None and args[place].device != found.device:
            waits = not (kwargs.get("non_blocking") or args[place + 1 :] == (True,))
            assert not waits, f"a copy from {args[place].device} to {found.device} that waits"
        return found


class Fake:
    """A training, and the images and the plan of a batch as a thread hands them over."""

    def __init__(self, monkeypatch, task, **settings):
        pack, rows = crafted.pack(crafted.noise(NUMBER, SIZE)), torch.arange(NUMBER)
        network = Network(model.fresh(crafted.plugin(crafted.PLAIN), 0), task)
        training_settings = crafted.training(batch=BATCH, **settings)
        self.job = training.Job(
            network, task, pack, rows, rows[:0], training_settings, 50, 0, "test"
        )  # fmt: skip
        self.batch = delivery._gathered(pack, task.plan(rows[:BATCH], 0), pin=False)
        monkeypatch.setattr(torch.Tensor, "backward", lambda loss: self.backward(loss))

    def backward(self, loss):
        assert loss.device == WHERE and loss.dtype == torch.float32
        for weight in self.job.network.parameters():
            weight.grad = torch.zeros_like(weight)

    def steps(self, number: int):
        """Makes so many steps, as `training.train` does; yields what each gives."""
        run = training._Run(self.job)
        for run.step in range(number):
            # What a kind of transfer takes along goes to the device in the first step.
            with NoWaiting() if run.step else contextlib.nullcontext():
                views, labels = delivery._ready(self.job.task, *self.batch, WHERE)
                given = run._step(torch.arange(BATCH), views, labels)
            yield given


def task_of(name: str, kind: str | None, examples):
    values = test_plugins.values_of(examples, "tasks", name)
    context = crafted.context(SIZE, NUMBER, 0, torch.arange(NUMBER) % 3, 3)
    if kind:
        context = dataclasses.replace(context, transfer=test_transfer.build(kind))
    return config.plugin("tasks", name).build(config.options("tasks", name, values), context)


@pytest.mark.parametrize("name, kind", TASKS)
def test_steps_of_every_task_and_kind_stay_on_the_device_and_wait_for_nothing(
    name, kind, examples, accelerator, monkeypatch
):
    fake = Fake(monkeypatch, task_of(name, kind, examples))
    accelerator()
    assert list(fake.steps(training.LOOK - 1)) == [None] * (training.LOOK - 1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_no_precision_waits_but_the_loss_is_looked_at_every_so_often(
    precision, examples, accelerator, monkeypatch
):
    # With AdamW alone: torch has no fake form of the fused SGD.
    fake = Fake(monkeypatch, task_of("jigsawpp", None, examples), precision=precision)
    types = []
    fake.job.network.backbone.register_forward_hook(lambda *call: types.append(call[-1].dtype))
    accelerator()
    steps = fake.steps(training.LOOK)
    assert [next(steps) for _ in range(training.LOOK - 1)] == [None] * (training.LOOK - 1)
    with pytest.raises(DataDependentOutputException):  # the look
        next(steps)
    assert {*types} == {getattr(torch, precision)}


@pytest.mark.parametrize("wanted", [True, False])
def test_the_network_is_compiled_where_that_is_wanted(wanted, examples, accelerator, monkeypatch):
    fake = Fake(monkeypatch, task_of("jigsawpp", None, examples), compile=wanted)
    names, called = list(fake.job.network.state_dict()), []

    class Compiled(nn.Module):
        """Stands for what torch's compiler makes of a network: another module around it."""

        def __init__(self, network):
            super().__init__()
            self.inner = network

        def forward(self, views):
            called.append(views.shape)
            return self.inner(views)

    monkeypatch.setattr(torch, "compile", Compiled)
    accelerator()
    list(fake.steps(2))
    assert len(called) == 2 * wanted
    assert list(fake.job.network.state_dict()) == names  # what models and states are written from


@pytest.mark.parametrize("name", config.plugins("tasks"))
def test_the_compiler_follows_every_task_and_gives_the_same_gradients(name, examples):
    kind = "hard" if name == "classification" else None
    task = task_of(name, kind, examples)
    network = Network(model.fresh(crafted.plugin(crafted.PLAIN), 0), task).eval()
    rows = torch.arange(BATCH)
    pack = crafted.pack(crafted.noise(NUMBER, SIZE))
    views, labels = delivery.load_batch(task, pack, rows, 0, torch.device("cpu"))
    # Without the code it would write: what is traced is the same for every device.
    compiled, gradients = torch.compile(network, backend="aot_eager", fullgraph=True), []
    for one in (compiled, network):
        network.zero_grad()
        task.loss(one(views).float(), labels, 0.1).backward()
        gradients.append([weight.grad.clone() for weight in network.parameters()])
    torch.testing.assert_close(*gradients)


# What PyTorch says of `use_deterministic_algorithms`: on CUDA these raise, forwards or backwards.
RAISES = re.compile(
    r"adaptive_(avg|max)_pool|avg_pool3d|max_pool3d|fractional_max|max_unpool|reflection_pad"
    r"|replication_pad|nll_loss2d|upsample_(linear|bicubic|trilinear)|embedding_bag|histc|bincount"
    r"|kthvalue|median|cumsum"
)


class Deterministic(TorchDispatchMode):
    """Refuses what has no deterministic form on CUDA, where a gradient is taken."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raises = RAISES.search(str(func))
        assert not raises or not any(getattr(one, "requires_grad", False) for one in args), func
        return func(*args, **(kwargs or {}))


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", config.plugins("tasks"))
def test_every_task_has_a_deterministic_form(
    name, examples, accelerator, monkeypatch, deterministic
):
    kind = "hard" if name == "classification" else None
    task = task_of(name, kind, examples)
    fake = Fake(monkeypatch, task)
    accelerator()
    run = training._Run(fake.job)
    views, labels = delivery._ready(task, *fake.batch, WHERE)
    with Deterministic(), NoWaiting():
        run._step(torch.arange(BATCH), views, labels)


def test_the_papers_network_has_a_deterministic_form(accelerator, deterministic):
    network = model.fresh(config.Plugin(name="alexnet", stride=4, norm="lrn"), 0)
    pixels = torch.zeros(2, 3, 95, 95, requires_grad=True)
    with Deterministic():
        network(pixels)
    with Deterministic(), pytest.raises(AssertionError, match="avg_pool3d"):
        nn.LocalResponseNorm(5)(pixels)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_every_network_gives_its_maps_in_mixed_precision(name, examples, accelerator, monkeypatch):
    monkeypatch.setenv("KT_RUN_FILES", "1")
    if name == "timm":
        pytest.importorskip("timm", reason="timm is optional and not installed")
    values = test_plugins.values_of(examples, "backbones", name)
    backbone = model.fresh(config.Plugin(name=name, **values), 0)
    accelerator()
    backbone.to(WHERE, memory_format=torch.channels_last).eval()
    with torch.inference_mode(), hardware.mixed(WHERE):
        pixels = torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8)
        ready = backbone.normalise(pixels.to(WHERE))
        maps = [backbone(ready, layer) for layer in backbone.layers]
    assert {one.device for one in maps} == {WHERE}
    assert maps[-1].dtype == torch.bfloat16


def test_copies_to_and_fro_wait_only_when_what_they_give_is_asked_for(accelerator, monkeypatch):
    waited = []

    class Stream:
        """Stands for CUDA's, which wants a driver."""

        def record_event(self):
            event = unittest.mock.Mock()
            event.synchronize = lambda: waited.append(event)
            return event

    monkeypatch.setattr(torch.cuda, "current_stream", lambda where: Stream())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda values: values)
    accelerator()
    with NoWaiting():
        there = hardware.sent(torch.ones(3), WHERE)
        fetch = hardware.fetched(there)
    assert there.device == WHERE and not waited
    assert fetch().device.type == "cpu" and len(waited) == 1


def test_maps_are_enlarged_without_a_wait(accelerator):
    accelerator()
    with NoWaiting():
        scores = torch.ones(2, 3, 4, 5, device=WHERE)
        assert voc_training.enlarged(scores, (3.5, 8.0), (32, 40), (0.0, 1.0)).device == WHERE


@pytest.mark.parametrize("kind, order", [("cpu", "a A b B c C"), ("cuda", "a b A c B C")])
def test_an_accelerator_has_its_next_work_before_the_cpu_waits_for_the_last(kind, order):
    done = []

    def begun():
        for name in "abc":
            done.append(name)
            yield name

    for name in hardware.one_behind(begun(), torch.device(kind)):
        done.append(name.upper())
    assert " ".join(done) == order


def test_what_is_left_on_the_cpu_or_looked_at_is_found(accelerator):
    accelerator()
    there, here = torch.ones(3, device=WHERE), torch.ones(3)
    with pytest.raises(RuntimeError, match="two (different )?devices"):
        there + here
    with pytest.raises(DataDependentOutputException):
        bool(there.sum() > 0)
