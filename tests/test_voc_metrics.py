"""Scores of PASCAL VOC, against slow references by the rules of the devkit."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kt.core import voc, voc_metrics
from kt.core.step import DataError
from kt.core.voc_metrics import Boxes, Curve

# ---------------------------------------------------------------------------- average precision


def slow_ranking(scores, truth):
    """The devkit's loops (VOCevalcls), in fractions: 11-point average and area."""
    order = sorted(range(len(scores)), key=lambda row: -scores[row])
    ranked = [(scores[row], truth[row] > 0) for row in order if truth[row] != 0]
    return slow_average(ranked, sum(value > 0 for value in truth))


def slow_average(ranked, positives):
    """From scores with right or wrong, in rank order, to both averages, as fractions.

    As in the devkit, but that nothing is read off within a group of equal scores.
    """
    recall, precision, right = [], [], 0
    for rank, (score, flag) in enumerate(ranked, 1):
        right += flag
        if rank == len(ranked) or ranked[rank][0] != score:
            recall.append(Fraction(right, positives))
            precision.append(Fraction(right, rank))
    eleven = Fraction(0)
    for tenth in range(11):
        reached = [p for r, p in zip(recall, precision, strict=True) if r >= Fraction(tenth, 10)]
        eleven += max(reached, default=Fraction(0)) / 11
    r, p = [0, *recall, 1], [0, *precision, 0]
    for row in range(len(p) - 2, -1, -1):
        p[row] = max(p[row], p[row + 1])
    return eleven, sum((r[row] - r[row - 1]) * p[row] for row in range(1, len(r)))


@pytest.mark.parametrize("values", [12, 10**6])  # with ties, and without
@pytest.mark.parametrize("seed", range(30))
def test_rankings_agree_with_the_devkits_loops(seed, values):
    random = np.random.default_rng(seed)
    scores = random.integers(0, values, 40) / values
    truth = random.choice([-1, 0, 1], 40, p=[0.6, 0.15, 0.25])
    truth[0] = 1
    curve = voc_metrics.ranking(scores, truth)
    eleven, area = slow_ranking(scores.tolist(), truth.tolist())
    assert voc_metrics.eleven_points(curve) == pytest.approx(float(eleven), abs=1e-12)
    assert voc_metrics.area(curve) == pytest.approx(float(area), abs=1e-12)


def curve_of(found, positives):
    """Gives the curve of a ranking without ties."""
    return Curve(np.array(found, np.int64), np.arange(1, len(found) + 1), positives)


def test_every_tenth_of_recall_is_reached_exactly():
    for positives in range(1, 41):  # 3 of 10 is 0.3, which 3 * 0.1 is not
        for right in range(positives + 1):
            curve = curve_of(np.arange(1, right + 1), positives)
            expected = sum(10 * right >= tenth * positives for tenth in range(11)) * bool(right)
            assert voc_metrics.eleven_points(curve) == pytest.approx(expected / 11, abs=1e-12)


# Few scores make many ties; at least one picture shows the class.
SHOWN = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from([-1, 0, 1])), min_size=1, max_size=30
).filter(lambda rows: any(truth == 1 for _, truth in rows))


@settings(deadline=None)
@given(SHOWN, st.randoms())
def test_the_order_of_pictures_changes_no_score(rows, random):
    again = random.sample(rows, len(rows))
    curves = [voc_metrics.ranking(*map(np.array, zip(*one, strict=True))) for one in (rows, again)]
    assert voc_metrics.mean_precision(curves[:1]) == voc_metrics.mean_precision(curves[1:])


def test_equal_scores_are_one_threshold():
    curve = voc_metrics.ranking(np.array([2, 1, 1, 1]), np.array([-1, 1, -1, 1]))
    assert (curve.found.tolist(), curve.seen.tolist()) == ([0, 2], [1, 4])
    assert voc_metrics.area(curve) == voc_metrics.eleven_points(curve) == 0.5


def test_a_score_that_is_no_number_has_no_place():
    with pytest.raises(DataError, match="2 of 3 are none"):
        voc_metrics.ranking(np.array([1.0, np.nan, np.nan]), np.array([1, -1, 1]))


def test_a_perfect_ranking_is_one_and_none_is_nought():
    truth = np.array([1, 1, 0, -1, -1])
    perfect = voc_metrics.ranking(np.array([3.0, 2, 9, 1, 0]), truth)
    assert voc_metrics.eleven_points(perfect) == voc_metrics.area(perfect) == 1
    nothing = curve_of([], 4)
    assert voc_metrics.eleven_points(nothing) == voc_metrics.area(nothing) == 0


def test_classes_that_are_not_there_do_not_count():
    one, none = curve_of([1], 1), curve_of([0, 0], 0)
    assert voc_metrics.mean_precision([one, none]) == {"map_11": 1.0, "map_area": 1.0}
    with pytest.raises(DataError, match="all are difficult or missing"):
        voc_metrics.mean_precision([none])


# ---------------------------------------------------------------------------- detection


def slow_detection(found, truth, label):
    """The devkit's loops (VOCevaldet), with its pixels from 1 and ends inside."""
    rows = [
        (-score, number, place)
        for number, one in enumerate(found)
        for place, score in enumerate(one.scores.tolist())
        if one.labels[place] == label
    ]
    seen, ranked = set(), []
    for minus, number, place in sorted(rows, key=lambda row: row[0]):
        x0, y0, x1, y1 = found[number].boxes[place].tolist()
        mine, best, which = (x0 + 1, y0 + 1, x1, y1), -1.0, None
        for index, edges in enumerate(truth[number].boxes.tolist()):
            other = (edges[0] + 1, edges[1] + 1, edges[2], edges[3])
            wide = min(mine[2], other[2]) - max(mine[0], other[0]) + 1
            high = min(mine[3], other[3]) - max(mine[1], other[1]) + 1
            if truth[number].labels[index] != label or wide <= 0 or high <= 0:
                continue
            areas = [(b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (mine, other)]
            share = wide * high / (sum(areas) - wide * high)
            if share > best:
                best, which = share, index
        if best >= 0.5 and truth[number].difficult[which]:
            continue
        ranked.append((minus, best >= 0.5 and (number, which) not in seen))
        if best >= 0.5:
            seen.add((number, which))
    easy = sum(int(((o.labels == label) & ~o.difficult).sum()) for o in truth)
    return slow_average(ranked, easy)


def crowds(seed, pictures=8):
    """Draws overlapping objects and noisy detections of three classes."""
    random = np.random.default_rng(seed)
    found, truth = [], []
    for _ in range(pictures):
        number = int(random.integers(0, 6))
        corner = random.integers(0, 30, (number, 2))
        boxes = np.concatenate([corner, corner + random.integers(8, 20, (number, 2))], 1)
        difficult, cut = random.random(number) < 0.3, np.zeros(number, bool)
        labels = random.integers(0, 3, number)
        truth.append(voc.Objects(boxes.astype(np.float32), labels, difficult, cut, (60, 60)))
        again = random.integers(0, max(number, 1), 2 * number)
        guess = boxes[again] + random.integers(-4, 5, (2 * number, 4))
        guess[:, 2:] = np.maximum(guess[:, 2:], guess[:, :2] + 1)
        named = np.where(random.random(2 * number) < 0.8, labels[again], 1)
        scores = (random.integers(0, 20, 2 * number) / 20).astype(np.float32)
        found.append(Boxes(guess.astype(np.float32), named, scores))
    return found, truth


@pytest.mark.parametrize("seed", range(25))
def test_matching_agrees_with_the_devkits_loops(seed):
    found, truth = crowds(seed)
    for label in range(3):
        curve = voc_metrics.detection(found, truth, label)
        if curve.positives:
            eleven, area = slow_detection(found, truth, label)
            assert voc_metrics.eleven_points(curve) == pytest.approx(float(eleven), abs=1e-12)
            assert voc_metrics.area(curve) == pytest.approx(float(area), abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 5), st.randoms())
def test_the_order_of_pictures_and_boxes_changes_no_score(seed, values, random):
    found, truth = crowds(seed)
    found = [one._replace(scores=np.ceil(values * one.scores) / values) for one in found]
    pictures = random.sample(range(len(found)), len(found))
    mixed = []
    for one in (found[row] for row in pictures):
        rows = random.sample(range(len(one.scores)), len(one.scores))
        mixed.append(Boxes(one.boxes[rows], one.labels[rows], one.scores[rows]))
    for label in range(3):
        one = voc_metrics.detection(found, truth, label)
        two = voc_metrics.detection(mixed, [truth[row] for row in pictures], label)
        assert all(map(np.array_equal, one, two))


def one_picture(boxes, difficult):
    edges = np.array(boxes, np.float32).reshape(-1, 4)
    hard = np.array(difficult, bool)
    return voc.Objects(edges, np.zeros(len(edges), np.int64), hard, hard & False, (90, 90))


def guess(boxes):
    number = len(boxes)
    scores = np.linspace(1, 0.5, number).astype(np.float32)
    return Boxes(np.array(boxes, np.float32).reshape(-1, 4), np.zeros(number, np.int64), scores)


def flags_of(curve):
    return np.diff(curve.found, prepend=0).tolist()


def test_an_object_is_found_once_and_a_difficult_one_is_left_out():
    truth = [one_picture([[0, 0, 10, 10], [50, 50, 60, 60]], [False, True])]
    found = [guess([[0, 0, 10, 10], [50, 50, 60, 60], [0, 0, 10, 9], [51, 50, 60, 60], [30] * 4])]
    curve = voc_metrics.detection(found, truth, 0)
    assert flags_of(curve) == [1, 0, 0] and curve.positives == 1


def test_half_an_overlap_is_enough_and_less_is_not():
    truth = [one_picture([[0, 0, 10, 10]], [False])]
    for box, right in (([0, 0, 5, 10], 1), ([0, 0, 4.99, 10], 0), ([0, 0, 20, 10], 1)):
        assert flags_of(voc_metrics.detection([guess([box])], truth, 0)) == [right]


def test_perfect_boxes_score_one_and_no_boxes_nought():
    _, truth = crowds(3)
    perfect = [Boxes(one.boxes, one.labels, np.ones(len(one.labels))) for one in truth]
    curves = [voc_metrics.detection(perfect, truth, label) for label in range(20)]
    assert voc_metrics.mean_precision(curves) == {"map_11": 1.0, "map_area": 1.0}
    none = [guess([]) for _ in truth]
    curves = [voc_metrics.detection(none, truth, label) for label in range(20)]
    assert voc_metrics.mean_precision(curves) == {"map_11": 0.0, "map_area": 0.0}


# ---------------------------------------------------------------------------- segmentation


def slow_miou(truth, predicted, number):
    shares = []
    for label in range(number):
        pairs = [(t == label, p == label) for t, p in zip(truth, predicted, strict=True) if t < 255]
        union = sum(t or p for t, p in pairs)
        if union:
            shares.append(sum(t and p for t, p in pairs) / union)
    return sum(shares) / len(shares)


@pytest.mark.parametrize("seed", range(10))
def test_miou_agrees_with_a_count_pixel_by_pixel(seed):
    random = np.random.default_rng(seed)
    truth = random.choice([0, 1, 2, 4, voc.VOID], (2, 9, 7)).astype(np.uint8)
    predicted = np.where(random.random(truth.shape) < 0.5, truth % 5, random.integers(0, 5, (9, 7)))
    counts = sum(voc_metrics.confusion(*pair, 6) for pair in zip(truth, predicted, strict=True))
    assert counts.sum() == (truth != voc.VOID).sum()
    assert voc_metrics.miou(counts) == pytest.approx(
        slow_miou(truth.ravel().tolist(), predicted.ravel().tolist(), 6)
    )


def test_a_perfect_mask_scores_one_and_void_alone_is_refused():
    truth = np.array([[0, 3, voc.VOID]], np.uint8)
    assert voc_metrics.miou(voc_metrics.confusion(truth, np.array([[0, 3, 1]]), 21)) == 1
    with pytest.raises(DataError, match="all are void"):
        voc_metrics.miou(voc_metrics.confusion(truth[:, 2:], np.array([[4]]), 21))
