"""Our thin optimiser against torch.optim, an independent implementation of the same article."""

import subprocess
import sys

import crafted
import pytest
import torch
from torch import nn

from kt.core.optimiser import Optimiser


def draw_network():
    torch.manual_seed(3)
    # No bias before the norm: its gradient is rounding noise, which AdamW would blow up.
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5)
    )


def losses_and_weights(network, update, steps=6):
    generator = torch.Generator().manual_seed(5)
    for number in range(steps):
        images = torch.randn(8, 3, 8, 8, generator=generator)
        network(images).square().mean().backward()
        update(0.05 / (number + 1))
    return [weight.detach().clone() for weight in network.parameters()]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_updates_equal_those_of_torch(name, momentum):
    settings = crafted.training(optimiser=name, momentum=momentum, weight_decay=0.1)
    ours, theirs = draw_network(), draw_network()
    groups = [
        {"params": [w for w in theirs.parameters() if w.ndim > 1], "weight_decay": 0.1},
        {"params": [w for w in theirs.parameters() if w.ndim <= 1], "weight_decay": 0.0},
    ]
    if name == "sgd":
        reference = torch.optim.SGD(groups, 1.0, momentum)
    else:
        reference = torch.optim.AdamW(groups, 1.0, (momentum, 0.999))

    def update_reference(lr):
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        reference.zero_grad()

    found = losses_and_weights(ours, Optimiser(ours, settings).step)
    expected = losses_and_weights(theirs, update_reference)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_restored_state_goes_on_bit_for_bit(name):
    settings = crafted.training(optimiser=name)
    whole = draw_network()
    optimiser = Optimiser(whole, settings)
    losses_and_weights(whole, optimiser.step, 3)
    again = draw_network()
    again.load_state_dict(whole.state_dict())
    restored = Optimiser(again, settings)
    restored.load_state_dict(optimiser.state_dict())
    one = losses_and_weights(whole, optimiser.step, 3)
    two = losses_and_weights(again, restored.step, 3)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("first, then", [(torch.float32, torch.float16), (torch.float16,) * 2])
def test_a_state_of_another_precision_goes_on_with_a_scale_of_its_own(first, then):
    settings = crafted.training()
    begun = Optimiser(draw_network(), settings, first)
    if begun.scale is not None:
        begun.scale.fill_(8.0)
    begun.steps.fill_(3.0)
    restored = Optimiser(draw_network(), settings, then)
    fresh = float(restored.scale)
    restored.load_state_dict(begun.state_dict())
    assert float(restored.scale) == (8.0 if first == then else fresh) and restored.steps == 3


def test_training_does_not_import_the_compiler():
    code = (
        "import sys, torch, crafted; from kt.core.optimiser import Optimiser;"
        "network = torch.nn.Linear(2, 2); network(torch.ones(1, 2)).sum().backward();"
        "Optimiser(network, crafted.training()).step(0.1);"
        "from kt.core import model, training; task = crafted.jigsaw(36, 4);"
        "from kt.core.network import Network, multiply_adds;"
        "plain = crafted.plugin({'name': 'plain', 'widths': [4], 'strides': [2]});"
        "multiply_adds(Network(model.fresh(plain, 0), task), task);"
        "from kt.core import hardware; hardware.set_up(torch.device('cuda'));"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    here = str(crafted.__file__).rsplit("/", 1)[0]
    assert subprocess.run([sys.executable, "-c", code], cwd=here).returncode == 0


def losses_with_an_overflow(network, backward, update, steps=6):
    generator = torch.Generator().manual_seed(5)
    for number in range(steps):
        images = torch.randn(8, 3, 8, 8, generator=generator)
        loss = network(images).square().mean() * (1e36 if number == 2 else 1.0)
        backward(loss)
        update(0.05)
    return [weight.detach().clone() for weight in network.parameters()]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_in_float16_an_overflow_is_left_out_as_torchs_scaler_does(name):
    settings = crafted.training(optimiser=name, weight_decay=0.0)
    ours, theirs = draw_network(), draw_network()
    found = Optimiser(ours, settings, torch.float16)
    kind = torch.optim.SGD if name == "sgd" else torch.optim.AdamW
    options = {"momentum": 0.9} if name == "sgd" else {"weight_decay": 0.0}
    reference = kind(theirs.parameters(), 0.05, **options)
    scaler = torch.amp.GradScaler("cpu")

    def update(lr):
        scaler.step(reference)
        scaler.update()
        reference.zero_grad()

    one = losses_with_an_overflow(ours, lambda x: found.scaled(x).backward(), found.step)
    two = losses_with_an_overflow(theirs, lambda x: scaler.scale(x).backward(), update)
    for mine, other in zip(one, two, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert float(found.scale) == scaler.get_scale() == 2.0**15 and int(found.steps) == 5
