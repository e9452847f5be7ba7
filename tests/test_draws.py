import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kt.core import draws

IDS = torch.from_numpy(np.random.default_rng(0).integers(0, 2**63 - 1, 20_000))


def test_the_generator_gives_the_numbers_it_always_gave():
    # A change of these makes every earlier result unrepeatable.
    found = draws.bits(0, "golden", 0, torch.tensor([0, 1, 2**62]), 2)
    assert found.tolist() == [
        [7507738542832104941, 8813069587060353733],
        [961700132354562331, 7295697717182565197],
        [7341546207940176344, 372278034269877586],
    ]
    validation = draws.bits(7, "golden", -1, torch.tensor([5]), 2)
    assert validation.tolist() == [[6464188358571055362, 3052649134220558489]]


@given(st.permutations(range(12)), st.integers(1, 12), st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_an_image_draws_the_same_in_any_batch(order, batch, count):
    ids = IDS[:12]
    whole = draws.bits(3, "batch", 2, ids, count)
    parts = [draws.bits(3, "batch", 2, part, count) for part in ids[order].split(batch)]
    assert torch.equal(torch.cat(parts), whole[order])


def test_asking_for_more_draws_keeps_the_first_ones():
    assert torch.equal(draws.bits(0, "a", 0, IDS, 3), draws.bits(0, "a", 0, IDS, 9)[:, :3])


@pytest.mark.parametrize("other", [(1, "a", 0), (0, "b", 0), (0, "a", 1), (0, "a", -1)])
def test_seeds_purposes_and_epochs_are_independent(other):
    one = draws.uniform(0, "a", 0, IDS, 1)[:, 0].double()
    two = draws.uniform(*other, IDS, 1)[:, 0].double()
    # Twenty thousand pairs: the deviation of a correlation is .007.
    assert abs(torch.corrcoef(torch.stack([one, two]))[0, 1]) < 0.03
    assert (one == two).sum() < 3


def test_seed_and_epoch_do_not_run_into_each_other():
    assert not torch.equal(draws.bits(1, "a", 11, IDS, 1), draws.bits(11, "a", 1, IDS, 1))


def test_draws_of_neighbouring_ids_are_uniform_and_uncorrelated():
    found = draws.uniform(0, "moments", 0, torch.arange(100_000), 2).double()
    assert found.min() >= 0 and found.max() < 1
    assert found.mean(0).sub(0.5).abs().max() < 0.004
    assert found.var(0).sub(1 / 12).abs().max() < 0.002
    shares = torch.histc(found[:, 0], 16, 0, 1) / len(found)
    assert shares.sub(1 / 16).abs().max() < 0.004
    assert abs(torch.corrcoef(found.T)[0, 1]) < 0.015
    assert abs(torch.corrcoef(torch.stack([found[1:, 0], found[:-1, 0]]))[0, 1]) < 0.015


def test_bits_are_never_negative_and_every_bit_is_used():
    found = draws.bits(0, "bits", 0, IDS, 1)
    assert found.min() >= 0
    for place in range(63):
        assert abs(((found >> place) & 1).double().mean() - 0.5) < 0.02


def test_integers_are_equally_frequent_and_below_the_limit():
    counts = draws.integers(0, "die", 0, IDS, 3, 6).flatten().bincount()
    assert len(counts) == 6
    assert (counts / counts.sum() - 1 / 6).abs().max() < 0.01


def test_choices_are_distinct_and_in_every_order():
    found = draws.choices(0, "choice", 0, IDS, 3, 5)
    assert found.shape == (len(IDS), 3) and found.min() == 0 and found.max() == 4
    assert all(len(set(row)) == 3 for row in found[:500].tolist())
    orders = (found * torch.tensor([25, 5, 1])).sum(1).unique(return_counts=True)[1]
    assert len(orders) == 60
    assert (orders / orders.sum() - 1 / 60).abs().max() < 0.006


def test_an_order_is_decided_by_the_ids_and_not_by_where_they_stand():
    shuffle = torch.randperm(len(IDS), generator=torch.Generator().manual_seed(1))
    one = IDS[draws.permutation(0, "order", 4, IDS)]
    two = IDS[shuffle][draws.permutation(0, "order", 4, IDS[shuffle])]
    assert torch.equal(one, two)
    assert torch.equal(one.sort().values, IDS.sort().values)
    assert not torch.equal(one, IDS[draws.permutation(0, "order", 5, IDS)])
