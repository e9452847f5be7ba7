"""Scores of PASCAL VOC, against slow loops by the rules of the devkit and against libraries.

These are scikit-learn for rankings and masks, pycocotools for boxes.
"""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn.metrics import jaccard_score, precision_recall_curve

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


@settings(deadline=None, max_examples=200)
@given(SHOWN)
def test_both_averages_are_those_of_scikit_learns_curve(rows):
    scores, truth = map(np.array, zip(*rows, strict=True))
    kept = truth != 0
    precision, recall, _ = precision_recall_curve(truth[kept] == 1, scores[kept])
    precision, recall = precision[:-1], recall[:-1]  # the last point is made up: 1 at recall 0
    highest = [max(precision[recall >= tenth / 10], default=0) for tenth in range(11)]
    curve = voc_metrics.ranking(scores, truth)
    assert voc_metrics.eleven_points(curve) == pytest.approx(np.mean(highest), abs=1e-12)
    # Best score first; each step of recall at the highest precision there or above.
    steps = np.diff(recall[::-1], prepend=0)
    best = np.maximum.accumulate(precision)[::-1]
    assert voc_metrics.area(curve) == pytest.approx((steps * best).sum(), abs=1e-12)


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


def with_coco(found, truth, label, recalls):
    """Gives pycocotools' precision at each of the recalls, 0..1, from an overlap of 0.5."""
    pictures = [{"id": number, "height": 300, "width": 300} for number in range(len(truth))]
    objects, guesses = [], []
    for number, one in enumerate(truth):
        for box, own, difficult in zip(one.boxes, one.labels, one.difficult, strict=True):
            sides = [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]
            area = sides[2] * sides[3]
            objects.append(
                {"id": len(objects) + 1, "image_id": number, "category_id": int(own), "bbox": sides}
                | {"area": area, "iscrowd": int(difficult)}
            )
    for number, one in enumerate(found):
        for box, own, score in zip(one.boxes, one.labels, one.scores, strict=True):
            sides = [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]
            guesses.append({"image_id": number, "category_id": int(own), "bbox": sides})
            guesses[-1]["score"] = float(score)
    wanted = COCO()
    wanted.dataset = {"images": pictures, "annotations": objects, "info": {}}
    wanted.dataset["categories"] = [{"id": number, "name": str(number)} for number in range(3)]
    wanted.createIndex()
    judge = COCOeval(wanted, wanted.loadRes(guesses), "bbox")
    judge.params.iouThrs, judge.params.recThrs = np.array([0.5]), np.array(recalls)
    judge.params.maxDets, judge.params.catIds = [10_000], [label]
    judge.params.areaRng, judge.params.areaRngLbl = [[0, 1e10]], ["all"]
    judge.evaluate()
    judge.accumulate()
    return judge.eval["precision"].ravel()


def coco_scores(found, truth, label, positives):
    """Gives pycocotools' 11-point average and its area, both exact.

    The highest precision is one number between two steps of recall, so its values in the middle of
    each step give the area. 3 / 10 is what three of ten are; `linspace` has a little more.
    """
    middles = (np.arange(positives) + 0.5) / positives
    return tuple(with_coco(found, truth, label, r).mean() for r in (np.arange(11) / 10, middles))


def lattice(seed, pictures=5):
    """Draws objects far apart, boxes near them and beside them, and no two equal scores.

    Here pycocotools and the devkit agree. COCO gives a box to the best object that is still free,
    the devkit to the best one, free or not: so no box reaches two. And COCO compares the overlap
    with a crowd to the box's area, not to the union: so boxes reach a difficult object well or
    hardly.
    """
    random = np.random.default_rng(seed)
    found, truth = [], []
    for _ in range(pictures):
        places = 50 * np.argwhere(np.ones((4, 4)))[random.permutation(16)[: random.integers(1, 9)]]
        sides = random.integers(12, 22, (len(places), 2))
        boxes = np.concatenate([places + 14, places + 14 + sides], 1)
        difficult, labels = random.random(len(places)) < 0.3, random.integers(0, 3, len(places))
        truth.append(
            voc.Objects(boxes.astype(np.float32), labels, difficult, difficult & False, (300, 300))
        )
        again = random.integers(0, len(places), 3 * len(places))
        guess = boxes[again] + np.tile(random.integers(-5, 6, (len(again), 2)), 2)
        named = np.where(random.random(len(again)) < 0.9, labels[again], 1)
        common = (sides[again] - np.abs(guess - boxes[again])[:, :2]).clip(0).prod(1)
        share = common / sides[again].prod(1)  # of the box; of the union it is share / (2 - share)
        kept = ~difficult[again] | (share < 0.5) | (share >= 2 / 3)
        found.append(Boxes(guess[kept].astype(np.float32), named[kept], np.zeros(kept.sum())))
    order = iter(random.permutation(sum(len(one.boxes) for one in found)))
    ranked = [np.array([next(order) / 512 for _ in one.boxes], np.float32) for one in found]
    return [one._replace(scores=own) for one, own in zip(found, ranked, strict=True)], truth


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6))
def test_scores_of_boxes_are_those_of_pycocotools(seed):
    found, truth = lattice(seed)
    for label in range(3):
        curve = voc_metrics.detection(found, truth, label)
        if curve.positives and any((one.labels == label).any() for one in found):
            eleven, area = coco_scores(found, truth, label, curve.positives)
            assert voc_metrics.eleven_points(curve) == pytest.approx(eleven, abs=1e-9)
            assert voc_metrics.area(curve) == pytest.approx(area, abs=1e-9)


def test_the_drawn_boxes_are_right_wrong_again_and_left_out():
    # So that the comparison above is one: all that may happen to a box does.
    right, wrong, left_out = 0, 0, 0
    for found, truth in map(lattice, range(10)):
        for label in range(3):
            curve = voc_metrics.detection(found, truth, label)
            flags = flags_of(curve)
            right, wrong = right + sum(flags), wrong + len(flags) - sum(flags)
            left_out += sum((one.labels == label).sum() for one in found) - len(flags)
    assert min(right, wrong, left_out) > 50


def test_where_two_objects_overlap_the_devkit_calls_wrong_what_coco_gives_to_the_other():
    truth = [one_picture([[0, 0, 20, 20], [6, 0, 26, 20]], [False, False])]
    found = [guess([[0, 0, 20, 20], [1, 0, 21, 20]])]  # both overlap the first object most
    curve = voc_metrics.detection(found, truth, 0)
    assert flags_of(curve) == [1, 0] and voc_metrics.area(curve) == 0.5
    assert coco_scores(found, truth, 0, 2) == pytest.approx((1, 1))
    assert slow_detection(found, truth, 0)[1] == Fraction(1, 2)


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


@st.composite
def masks(draw):
    """Draws true and predicted masks of one to three pictures with few of the 21 classes."""
    classes = draw(st.lists(st.integers(0, 20), min_size=1, max_size=4, unique=True))
    found = []
    for _ in range(draw(st.integers(1, 3))):
        shape = draw(arrays.array_shapes(min_dims=2, max_dims=2, max_side=6))
        truth = arrays.arrays(np.uint8, shape, elements=st.sampled_from([*classes, voc.VOID]))
        predicted = arrays.arrays(np.int64, shape, elements=st.sampled_from([*classes, 20]))
        found.append((draw(truth), draw(predicted)))
    return found


@settings(deadline=None, max_examples=200)
@given(masks())
def test_miou_is_scikit_learns_over_the_classes_that_are_there_or_predicted(pairs):
    truth, predicted = (
        np.concatenate([m.ravel() for m in part]) for part in zip(*pairs, strict=True)
    )
    kept = truth != voc.VOID
    counts = sum(voc_metrics.confusion(*pair, 21) for pair in pairs)
    if not kept.any():
        with pytest.raises(DataError, match="all are void"):
            voc_metrics.miou(counts)
        return
    truth, predicted = truth[kept].astype(np.int64), predicted[kept]
    known = np.union1d(truth, predicted)
    each = jaccard_score(truth, predicted, labels=known, average=None)
    assert voc_metrics.miou(counts) == pytest.approx(each.mean(), abs=1e-12)


def test_a_perfect_mask_scores_one_and_void_alone_is_refused():
    truth = np.array([[0, 3, voc.VOID]], np.uint8)
    assert voc_metrics.miou(voc_metrics.confusion(truth, np.array([[0, 3, 1]]), 21)) == 1
    with pytest.raises(DataError, match="all are void"):
        voc_metrics.miou(voc_metrics.confusion(truth[:, 2:], np.array([[4]]), 21))
