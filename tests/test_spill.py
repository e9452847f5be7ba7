"""Columns in files: what numpy gives, without its memory."""

import tracemalloc

import numpy as np

from kt.core import spill

N = 300_000


def test_rows_are_sorted_by_all_keys_and_stay_in_order_among_equals_without_memory(tmp_path):
    random = np.random.default_rng(0)
    rows = np.sort(random.permutation(2 * N)[:N])
    first, second = random.integers(0, 40, 2 * N), random.integers(0, 2**32, 2 * N) >> 30 << 30
    tracemalloc.start()
    found = spill.arranged(tmp_path, rows, (lambda part: second[part], lambda part: first[part]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(found, rows[np.lexsort((second[rows], first[rows]))])
    assert peak < N, peak  # a column of theirs takes eight times as much


def test_values_are_looked_for_in_a_sorted_column(tmp_path):
    column = spill.stored(tmp_path, np.uint64, [[1, 3], [], [2**64 - 2]])
    values = np.array([0, 1, 2, 3, 2**64 - 2, 2**64 - 1], np.uint64)
    assert spill.contains(column, values).tolist() == [False, True, False, True, True, False]
    assert not spill.contains(spill.stored(tmp_path, np.uint64, []), values).any()
