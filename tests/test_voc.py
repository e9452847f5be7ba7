"""Readers of PASCAL VOC, on drawn devkits."""

import drawn_voc
import numpy as np
import pytest
from PIL import Image

from kt.core import voc
from kt.core.step import ConfigError, DataError

PLACE = "VOC2007"
CODED = '<?xml version="1.0" encoding="{}"?>'


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return drawn_voc.write(tmp_path_factory.mktemp("voc") / "VOCdevkit")


@pytest.fixture
def root(tmp_path):
    """One year that a test may damage."""
    return drawn_voc.write(tmp_path, 4, 2, 3) / PLACE


# ---------------------------------------------------------------------------- readers


def test_lists_are_read_in_their_order(whole):
    root = voc.folder(whole, PLACE)
    assert voc.names(root, "Main", "train") == [f"{row:06d}" for row in range(12)]
    assert voc.names(root, "Segmentation", "val") == [f"{row:06d}" for row in range(12, 18)]
    assert voc.names(root, "Main", "trainval") == [f"{row:06d}" for row in range(18)]


def test_a_list_to_learn_from_that_holds_pictures_of_the_one_that_judges_is_refused(whole, root):
    place = voc.folder(whole, PLACE)
    found = voc.apart(place, "Main", "trainval", "test")
    assert found == tuple(voc.names(place, "Main", split) for split in ("trainval", "test"))
    lists = root / "ImageSets/Segmentation"
    with pytest.raises(DataError) as caught:
        voc.apart(root, "Segmentation", "trainval", "val")
    for part in (f"{lists}/trainval.txt", f"{lists}/val.txt", "found 2 that", "such as 000004"):
        assert part in str(caught.value)
    assert "take these out" in str(caught.value)


def test_labels_are_those_of_the_objects_whatever_the_order_of_the_lists(whole, root):
    place = voc.folder(whole, PLACE)
    found, names = voc.labels(place, "test"), voc.names(place, "Main", "test")
    for row, name in enumerate(names):
        objects = voc.objects(place, name)
        for column in range(20):
            hard = objects.difficult[objects.labels == column]
            assert found[row, column] == (-1 if not len(hard) else 0 if hard.all() else 1)
    assert set(found.ravel().tolist()) == {-1, 0, 1}
    before = voc.labels(root, "train")
    for path in (root / "ImageSets/Main").glob("*_train.txt"):
        path.write_text("".join(reversed(path.read_text().splitlines(True))))
    assert np.array_equal(voc.labels(root, "train"), before)


def test_boxes_cover_what_is_drawn(whole):
    root = voc.folder(whole, PLACE)
    for name in voc.names(root, "Main", "trainval"):
        objects, pixels = voc.objects(root, name), np.asarray(voc.image(root, name)).astype(int)
        assert objects.size == (64, 48) and objects.boxes.dtype == np.float32
        inside = np.zeros((48, 64), bool)
        for left, top, right, bottom in objects.boxes.astype(int):
            inside[top:bottom, left:right] = True
        coloured = np.ptp(pixels, axis=2) > 60
        assert (coloured == inside).mean() > 0.97  # JPEG's borders are soft
        drawn = drawn_voc.scene(int(name))
        assert [voc.CLASSES[label] for label in objects.labels] == [one.name for one in drawn]
        assert objects.difficult.tolist() == [bool(one.difficult) for one in drawn]
        assert objects.truncated.tolist() == [False, True][: len(drawn)]


def test_a_mask_holds_classes_and_void(whole):
    root = voc.folder(whole, "VOC2012")
    drawn, mask = drawn_voc.scene(2)[0], voc.mask(root, "000002")
    left, top, right, bottom = drawn.box
    assert mask.shape == (48, 64) and mask.dtype == np.uint8
    assert mask[top, left] == voc.CLASSES.index(drawn.name) + 1
    assert mask[top - 1, left - 1] == voc.VOID and mask[0, 0] * mask[-1, -1] == 0
    outside = np.ones_like(mask, bool)
    outside[top - 1 : bottom, left - 1 : right] = False
    assert (mask[outside] == 0).all() and (mask[~outside] > 0).all()


def test_a_picture_is_squeezed_whole(whole):
    found = voc.squeezed(voc.folder(whole, PLACE), "000000", 32)
    assert found.shape == (3, 32, 32) and found.dtype == np.uint8
    full = np.asarray(voc.image(voc.folder(whole, PLACE), "000000")).mean((0, 1))
    assert np.abs(found.mean((1, 2)) - full).max() < 1.5


def test_a_folder_that_is_no_devkit_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="path: expected a PASCAL VOC devkit with VOC2007/Image"):
        voc.folder(tmp_path, PLACE)


def test_a_split_that_is_not_there_is_refused_and_others_are_named(root):
    with pytest.raises(DataError, match=r"holdout.txt: expected the list.*test, train, trainval"):
        voc.names(root, "Main", "holdout")
    (root / "ImageSets/Main/bird_train.txt").unlink()
    with pytest.raises(DataError, match=r"bird_train.txt: expected the labels of class bird"):
        voc.labels(root, "train")


@pytest.mark.parametrize("text", ["", "000000\n000000\n", "../../etc/passwd\n", "a b\n"])
def test_a_list_of_anything_but_pictures_is_refused(root, text):
    (root / "ImageSets/Main/train.txt").write_text(text)
    with pytest.raises(DataError, match="train.txt: expected the name of one picture on each line"):
        voc.names(root, "Main", "train")


@pytest.mark.parametrize(
    "text, said",
    [
        ("000000 1\n", "no label for 000001 and 2 others of train.txt"),
        ("000000 2\n", "expected a picture and -1, 0 or 1 on each line, found .'000000', '2'"),
        ("000000\n", "expected a picture and -1, 0 or 1"),
    ],
)
def test_labels_that_are_none_are_refused(root, text, said):
    (root / "ImageSets/Main/bird_train.txt").write_text(text)
    with pytest.raises(DataError, match=f"bird_train.txt: {said}"):
        voc.labels(root, "train")


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("</annotation>", "", "expected an annotation in XML"),
        ("<annotation>", "<!DOCTYPE a [<!ENTITY x 'y'>]><annotation>", "found a document type"),
        ("<name>aeroplane", "<name>zebra", "unknown class 'zebra'; known: aeroplane, bicycle"),
        ("<width>64", "<width>20", "expected a box inside the 20 x 48 pixels"),
        ("<width>64", "<width>many", "number of pixels at size/width, found 'many'"),
        ("<width>64", "<width>nan", "number of pixels at size/width, found 'nan'"),
        ("xmin>", "x>", "number of pixels at bndbox/xmin, found None"),
        ("<difficult>0", "<difficult>yes", "expected difficult to be 0 or 1, found 'yes'"),
        ("<annotation>", f"{CODED.format('gb2312')}<annotation>", "in XML, found none: multi-byte"),
        ("<annotation>", f"{CODED.format('mine')}<annotation>", "found none: unknown encoding: m"),
    ],
)
def test_an_annotation_that_is_wrong_is_refused(root, old, new, said):
    path = root / "Annotations/000000.xml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError, match=f"000000.xml: .*{said}"):
        voc.objects(root, "000000")


def test_an_entity_is_never_expanded_in_any_encoding(root):
    path = root / "Annotations/000000.xml"
    text = "<!DOCTYPE a [<!ENTITY n 'aeroplane'>]>" + path.read_text().replace("aeroplane", "&n;")
    path.write_bytes(f'<?xml version="1.0" encoding="utf-16"?>{text}'.encode("utf-16"))
    with pytest.raises(DataError, match="found a document type; none is read"):
        voc.objects(root, "000000")


def test_a_box_one_pixel_too_large_is_cut_and_a_larger_one_refused(root):
    path = root / "Annotations/000001.xml"
    text = drawn_voc.annotation("000001", [drawn_voc.Drawn("cat", (0, 0, 65, 49), 0)], (64, 48))
    path.write_text(text)
    assert voc.objects(root, "000001").boxes.tolist() == [[0, 0, 64, 48]]
    for right, wrong in (
        ("<xmax>65", "<xmax>66"), ("<xmax>65", "<xmax>-3"), ("<ymax>49", "<ymax>50"),
        ("<xmin>0", "<xmin>-1"), ("<ymin>0", "<ymin>-1"),
    ):  # fmt: skip
        path.write_text(text.replace(right, wrong))
        with pytest.raises(DataError, match="expected a box inside the 64 x 48 pixels"):
            voc.objects(root, "000001")


def test_edges_of_a_box_may_be_fractions(root):
    drawn = drawn_voc.Drawn("cat", (10.5, 2.25, 30.75, 40.0), 0)
    path = root / "Annotations/000001.xml"
    path.write_text(drawn_voc.annotation("000001", [drawn], (64, 48)))
    assert voc.objects(root, "000001").boxes.tolist() == [[9.5, 1.25, 30.75, 40]]


def test_a_grey_picture_is_read_in_three_equal_colours(root):
    Image.new("L", (64, 48), 90).save(root / "JPEGImages/000000.jpg")
    found = voc.squeezed(root, "000000", 32)
    assert found.shape == (3, 32, 32) and (found == 90).all()


def test_a_picture_without_objects_has_none(root):
    (root / "Annotations/000000.xml").write_text(drawn_voc.annotation("000000", [], (64, 48)))
    found = voc.objects(root, "000000")
    assert found.boxes.shape == (0, 4) and found.difficult.shape == (0,)


def test_pictures_and_masks_that_are_broken_are_refused(root):
    path = root / "JPEGImages/000000.jpg"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match="000000.jpg: expected a JPEG, found none"):
        voc.image(root, "000000")
    with pytest.raises(DataError, match="nothing.jpg: expected a JPEG, found none"):
        voc.image(root, "nothing")
    drawn_voc.write_mask(root / "SegmentationClass/000001.png", np.full((48, 64), 21, np.uint8))
    with pytest.raises(DataError, match="expected values 0 to 20 and 255, found 21"):
        voc.mask(root, "000001")
    Image.new("RGB", (64, 48)).save(root / "SegmentationClass/000001.png")
    with pytest.raises(DataError, match="found mode RGB"):
        voc.mask(root, "000001")


def test_sizes_that_differ_are_refused(root):
    with pytest.raises(DataError, match="x has 4 x 5 pixels, its annotation or mask says 5 x 4"):
        voc.check_size(root, "x", (4, 5), (5, 4))
