import pytest
import torch

from kt.core import draws, images
from kt.core.order import block_order, neighbour


def ids_of(number: int) -> torch.Tensor:
    return torch.from_numpy(images.key_ids([f"image-{row}" for row in range(number)]))


@pytest.mark.parametrize("number", [1, 7, 64, 1000, 1001])
@pytest.mark.parametrize(("block", "window"), [(1, 1), (16, 1), (16, 4), (10, 3), (2000, 2)])
def test_an_epoch_covers_each_row_once(number, block, window):
    order = block_order(ids_of(number), 0, 3, block, window)
    assert torch.equal(order.sort().values, torch.arange(number))


@pytest.mark.parametrize(("block", "window"), [(16, 1), (16, 4), (50, 3)])
def test_what_follows_one_another_comes_from_few_blocks(block, window):
    order = block_order(ids_of(1200), 0, 0, block, window)
    for run in (order // block).split(block * window):
        assert len(run.unique()) <= window


def test_a_short_last_block_only_shifts_the_limits():
    order = block_order(ids_of(1003), 5, 2, 20, 4) // 20
    start = 0
    while start < len(order):
        rows = [80, 63]  # with the block of 3 rows or without
        sizes = [size for size in rows if len(order[start : start + size].unique()) <= 4]
        assert sizes
        start += max(sizes)


def test_the_order_is_another_one_in_each_epoch_and_for_each_seed_and_mixes_blocks():
    orders = [block_order(ids_of(600), *given, 20, 5) for given in ((0, 0), (0, 1), (1, 0))]
    assert all(not torch.equal(a, b) for a, b in ((orders[0], orders[1]), (orders[0], orders[2])))
    assert torch.equal(orders[0], block_order(ids_of(600), 0, 0, 20, 5))
    assert len((orders[0][:20] // 20).unique()) > 3


def test_one_block_is_the_plain_order():
    ids = ids_of(300)
    plain = draws.permutation(7, "order", 1, ids)
    assert torch.equal(block_order(ids, 7, 1, 300, 1), plain)
    assert torch.equal(block_order(ids, 7, 1, 10, 30), plain)


@pytest.mark.parametrize("number, block", [(30, 10), (25, 10), (12, 5), (11, 5), (2, 1), (7, 100)])
def test_any_other_row_of_the_block_may_be_the_neighbour_each_as_often(number, block):
    for row in range(number):
        first = row // block * block
        others = [one for one in range(first, min(first + block, number)) if one != row]
        expected = others or [(row - 1) % number]  # the row before, where it stands alone
        draws_of = torch.arange(3 * len(expected))
        found = neighbour(torch.full_like(draws_of, row), draws_of, block, number)
        assert sorted(found.tolist()) == sorted(3 * expected)
