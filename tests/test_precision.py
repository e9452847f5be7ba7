"""Average precision against scikit-learn, and against the definition image by image."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from kt.core import precision
from kt.core.step import DataError

# Whole scores make ties; at least one positive.
RANKINGS = (
    st.lists(st.tuples(st.integers(-3, 6), st.booleans()), min_size=1, max_size=40)
    .filter(lambda rows: any(positive for _, positive in rows))
    .map(lambda rows: tuple(map(np.array, zip(*rows, strict=True))))
)


def slow_points(scores, positive):
    """VOC2007's definition; whoever has a score stands with all of the same score."""
    total, precisions = int(positive.sum()), []
    for tenths in range(11):
        reached = [0.0]
        for least in set(scores.tolist()):
            taken = [
                p for s, p in zip(scores.tolist(), positive.tolist(), strict=True) if s >= least
            ]
            if sum(taken) * 10 >= tenths * total:
                reached.append(sum(taken) / len(taken))
        precisions.append(max(reached))
    return sum(precisions) / 11


@settings(deadline=None)
@given(RANKINGS)
def test_the_area_is_that_of_scikit_learn(ranking):
    scores, positive = ranking
    assert precision.by_area(scores, positive) == pytest.approx(
        average_precision_score(positive, scores)
    )


@settings(deadline=None)
@given(RANKINGS)
def test_the_eleven_points_are_those_of_the_definition(ranking):
    assert precision.by_points(*ranking) == pytest.approx(slow_points(*ranking))


def test_eleven_points_by_hand():
    # Ranks 1, 3 and 6 are positive: precision 1 up to recall 1/3, 2/3 up to 2/3, then 1/2.
    scores, positive = -np.arange(6.0), np.array([1, 0, 1, 0, 0, 1], bool)
    assert precision.by_points(scores, positive) == pytest.approx((4 + 3 * 2 / 3 + 4 / 2) / 11)
    assert precision.by_area(scores, positive) == pytest.approx((1 + 2 / 3 + 1 / 2) / 3)


def test_recall_is_compared_without_rounding():
    # 3 of 10 are found first: recall 0.3 counts as reached, though 3 / 10 < 0.1 * 3 in floats.
    positive = np.array([1] * 3 + [0] * 90 + [1] * 7, bool)
    assert precision.by_points(-np.arange(100.0), positive) == pytest.approx(
        (4 + 7 * 10 / 100) / 11
    )


@settings(deadline=None)
@given(RANKINGS, st.randoms())
def test_equal_scores_have_no_order(ranking, random):
    scores, positive = ranking
    order = list(range(len(scores)))
    random.shuffle(order)
    for measure in (precision.by_area, precision.by_points):
        assert measure(scores[order], positive[order]) == measure(scores, positive)


def test_the_mean_leaves_out_classes_without_a_positive_and_images_that_do_not_count():
    signs = np.array([[1, -1, 0], [-1, -1, 1], [0, -1, -1]])
    scores = np.array([[0.5, 0.9, 0.9], [0.1, 0.8, 0.5], [0.9, 0.7, 0.1]])
    assert precision.over_classes(scores, signs) == {"map_11": 1.0, "map_area": 1.0}
    counted = np.where(signs == 0, -1, signs)
    assert precision.over_classes(scores, counted)["map_area"] == pytest.approx(0.5)
    with pytest.raises(DataError, match="found none"):
        precision.over_classes(scores, -np.abs(signs))
