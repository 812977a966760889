"""Boxes as data, the detector's parts against plain loops, mean average precision by hand, and the short experiment."""

import dataclasses
import io
import zipfile
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from experiments import _results, distill_detection
from experiments._average_precision import Detections, average_precision, mean_average_precision, overlaps
from experiments._detector import (
    CROP,
    STRIDE,
    Detector,
    Outputs,
    anchors,
    assigned,
    cropped,
    decoded,
    detected,
    encoded,
    kept,
    proposed,
    shared,
)
from experiments.data import DataNotFoundError
from experiments.data._scenes import MOST, annotated, load_scenes
from experiments.distill_detection import SHORT, SceneRoom, detection_loss, head_loss, mirrored


def cell(name: str, box: tuple[int, ...]) -> str:
    edges = "".join(f"<{e}>{x}</{e}>" for e, x in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name><bndbox>{edges}</bndbox></object>"


def test_bccd_is_read_from_its_archive(tmp_path):
    image = np.zeros((48, 64, 3), np.uint8)
    image[:24] = 200
    things = [("WBC", (8, 4, 40, 20)), ("RBC", (50, 33, 50, 33)), ("Platelets", (0, 0, 4, 8))]
    xml = f"<annotation>{''.join(cell(*thing) for thing in things)}</annotation>"
    with zipfile.ZipFile(tmp_path / "bccd.zip", "w") as archive:
        for name, part in (("a", "train"), ("b", "val"), ("c", "test")):
            archive.writestr(f"BCCD/ImageSets/Main/{part}.txt", f"{name}\n")
            archive.writestr(f"BCCD/Annotations/{name}.xml", xml)
            with io.BytesIO() as file:
                Image.fromarray(image).save(file, "jpeg", quality=95)
                archive.writestr(f"BCCD/JPEGImages/{name}.jpg", file.getvalue())
    data = load_scenes("bccd", tmp_path, width=16)
    assert data.train.images.shape == (1, 12, 16, 3) and data.train.boxes.shape == (1, MOST, 5)
    assert abs(data.train.inputs()[0, 1].mean() - 200 / 255) < 0.02 and data.train.inputs()[0, -2].mean() < 0.02
    np.testing.assert_array_equal(data.train.boxes[0, :3], [[2, 1, 10, 5, 2], [0, 0, 1, 2, 3], [0] * 5])
    assert annotated(xml.encode())[0] == [8, 4, 40, 20, 2]
    for name, message in (("bccd", "no BCCD: there is no .*--data-dir"), ("coco", "no data set of scenes 'coco'")):
        with pytest.raises((DataNotFoundError, ValueError), match=message):
            load_scenes(name, tmp_path / "empty")


def test_scattered_digits_are_where_their_boxes_say():
    data = load_scenes("scattered")
    split = data.train
    for image, boxes, count in zip(split.images, split.boxes, split.labels, strict=True):
        left, top, right, bottom = boxes[:count, :4].astype(int).T
        assert (right - left == 8).all() and (bottom - top == 8).all() and (boxes[count:] == 0).all()
        outside = image[..., 0].copy()
        for x, y in zip(left, top, strict=True):
            assert image[y : y + 8, x : x + 8].max() > 12
            outside[y : y + 8, x : x + 8] = 0
        assert outside.max() <= 2  # noise alone
    other = dataclasses.replace(split, boxes=split.boxes + 1)
    assert other.sha256 != split.sha256 != data.validation.sha256


def test_mirrored_boxes_stand_around_the_same_pixels():
    rng = np.random.default_rng(0)
    images, boxes = rng.random((2, 6, 8, 1)).astype(np.float32), np.zeros((2, 3, 5), np.float32)
    boxes[:, 0] = [1, 2, 4, 3, 2]
    found, moved = (np.asarray(x) for x in mirrored(images, boxes))
    assert found.shape == (8, 6, 8, 1) and moved.shape == (8, 3, 5)
    for image, things in zip(found, moved, strict=True):
        left, top, right, bottom = things[0, :4].astype(int)
        content = np.sort(image[top:bottom, left:right].ravel())
        assert any(np.array_equal(content, np.sort(x[2:3, 1:4].ravel())) for x in images)
        assert (things[1:] == 0).all() and things[0, 4] == 2


def test_average_precision_by_hand():
    """Right, wrong, right of three objects: 1/3 at precision 1, 1/3 at 2/3, and one that is never found."""
    assert average_precision(np.array([True, False, True]), 3) == pytest.approx((1 + 2 / 3) / 3)
    assert average_precision(np.array([False, True]), 1) == 0.5
    assert average_precision(np.array([False, True, True]), 2) == pytest.approx(2 / 3)  # the hull, not 1/2 first
    assert average_precision(np.zeros(0, bool), 4) == 0


def test_mean_average_precision_by_hand():
    """Two images and two classes, with a second detection of one object, one of the wrong class and one too small."""
    true = np.zeros((2, 3, 5), np.float32)
    true[0, :2] = [[0, 0, 10, 10, 1], [20, 0, 30, 10, 2]]
    true[1, :1] = [[0, 0, 10, 10, 1]]
    first = Detections(
        np.array([[0, 0, 10, 10], [1, 0, 10, 10], [20, 0, 30, 10], [20, 0, 30, 4]], float),
        np.array([0.9, 0.8, 0.7, 0.6]),
        np.array([1, 1, 1, 2]),
    )
    second = Detections(np.array([[0, 0, 10, 6.0]]), np.array([0.85]), np.array([1]))
    whole, each = mean_average_precision([first, second], true, classes=3)
    # class 1 by score: right (0.9), right with an overlap of 0.6 (0.85), twice (0.8), of class 2 (0.7)
    assert each[:2] == pytest.approx([1.0, 0.0]) and np.isnan(each[2]) and whole == pytest.approx(0.5)
    assert mean_average_precision([first, second], true, classes=1, overlap=0.7)[0] == pytest.approx(0.5)
    none = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))
    assert mean_average_precision([none, none], true, classes=2)[0] == 0
    assert overlaps(np.array([[0, 0, 2, 2.0]]), np.array([[1, 1, 3, 3.0], [5, 5, 5, 5]])).tolist() == [[1 / 7, 0]]


BOX = st.tuples(*(st.floats(0, 40),) * 2, *(st.floats(1, 30),) * 2)


@jax.jit
def there_and_back(box: jax.Array, base: jax.Array) -> tuple[jax.Array, jax.Array]:
    offsets = encoded(box, base)
    return offsets, decoded(offsets, base, 100, 100)


@settings(max_examples=60, deadline=None)
@given(BOX, BOX)
def test_offsets_lead_back_to_the_box(a, b):
    """But for sides that would grow or shrink by more than 8."""
    box, base = (np.array([[x, y, x + w, y + h]], np.float32) for x, y, w, h in (a, b))
    offsets, back = there_and_back(box, base)
    if np.abs(offsets[0, 2:] * 0.2).max() <= np.log(8):
        np.testing.assert_allclose(back, box, rtol=1e-3, atol=1e-2)


def test_anchors_stand_in_the_order_of_the_proposals():
    bases = np.asarray(anchors(20, 16, (8, 12)))
    assert bases.shape == (3 * 2 * 2, 4)
    np.testing.assert_array_equal(bases[0], [0, 0, 8, 8])
    np.testing.assert_array_equal(bases[3], [6, -2, 18, 10])  # second across, side 12
    np.testing.assert_array_equal(bases[4], [0, 8, 8, 16])  # next row


def test_crops_interpolate_between_four_cells():
    """Against bilinear interpolation by a loop, at the borders too."""
    features = np.random.default_rng(0).normal(size=(1, 4, 5, 2)).astype(np.float32)
    regions = np.array([[[4, 6, 30, 28], [-5, -5, 50, 60], [8, 8, 8, 8]]], np.float32)
    found = np.asarray(jax.jit(cropped)(features, regions))
    for r, (left, top, right, bottom) in enumerate(regions[0]):
        for i in range(CROP):
            for j in range(CROP):
                y = np.clip((top + (bottom - top) * (i + 0.5) / CROP) / STRIDE - 0.5, 0, 3)
                x = np.clip((left + (right - left) * (j + 0.5) / CROP) / STRIDE - 0.5, 0, 4)
                y0, x0 = int(y), int(x)
                y1, x1 = min(y0 + 1, 3), min(x0 + 1, 4)
                top_row = features[0, y0, x0] * (1 - (x - x0)) + features[0, y0, x1] * (x - x0)
                low_row = features[0, y1, x0] * (1 - (x - x0)) + features[0, y1, x1] * (x - x0)
                expected = top_row * (1 - (y - y0)) + low_row * (y - y0)
                np.testing.assert_allclose(found[0, r, i, j], expected, rtol=1e-4, atol=1e-5)


def test_suppression_is_the_greedy_one():
    """Against a loop over the sorted boxes."""
    rng = np.random.default_rng(1)
    low = rng.uniform(0, 30, (40, 2))
    boxes = np.concatenate([low, low + rng.uniform(4, 20, (40, 2))], axis=1).astype(np.float32)
    scores = rng.random(40).astype(np.float32)
    which, real = (np.asarray(x) for x in jax.jit(partial(kept, number=40, overlap=0.3))(boxes, scores))
    common, expected = overlaps(boxes, boxes), []
    for i in np.argsort(-scores):
        if all(common[i, j] <= 0.3 for j in expected):
            expected.append(i)
    assert which[real].tolist() == expected and 3 < len(expected) < 40 and not real[len(expected) :].any()
    np.testing.assert_allclose(shared(jnp.asarray(boxes), jnp.asarray(boxes)), common, rtol=1e-4, atol=1e-6)


def test_anchors_and_regions_are_matched_and_drawn():
    bases = jnp.concatenate([anchors(32, 32, (8, 16)), jnp.zeros((5, 4))])
    run = jax.jit(partial(assigned, little=0.3, best=True), static_argnames=("number", "objects"))
    things = jnp.zeros((4, 5)).at[:2].set(jnp.array([[8, 8, 16, 16, 3], [0, 20, 5, 25, 1]]))
    found = jax.tree.map(np.asarray, run(bases, things, jax.random.key(0), number=12, objects=6))
    labels, counts = found.labels, found.counts
    assert labels[2 * 5] == 3 and (labels[counts] > 0).sum() == (labels > 0).sum() and counts.sum() == 12
    small = np.flatnonzero(labels == 1)
    assert len(small) == 1  # overlaps by less than a half, but none by more
    boxes = jax.jit(decoded, static_argnums=(2, 3))(found.offsets, bases, 32, 32)
    np.testing.assert_allclose(boxes[small[0]], things[1, :4], rtol=1e-4, atol=1e-4)
    none = jax.tree.map(np.asarray, run(bases, jnp.zeros((4, 5)), jax.random.key(0), number=12, objects=6))
    assert not none.labels.any() and none.counts.sum() == 12 and np.isfinite(none.offsets).all()
    few = jax.tree.map(np.asarray, run(bases, things, jax.random.key(1), number=4, objects=1))
    assert (few.counts & (few.labels > 0)).sum() == 1 and few.counts.sum() == 4
    assert not any(x.counts[-5:].any() for x in (found, none, few))  # those have no area


def test_proposals_and_detections_of_what_is_there():
    """Where the heads say exactly what is there, one detection an object comes out."""
    bases = anchors(32, 48, (8, 16))
    things = jnp.array([[8, 8, 16, 16, 3], [24, 2, 38, 18, 1.0]])

    @jax.jit
    def run() -> tuple[jax.Array, tuple[jax.Array, ...]]:
        def nearest(boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
            overlap = shared(boxes, things[:, :4])
            return jnp.max(overlap, axis=1), jnp.argmax(overlap, axis=1)

        inside, best = nearest(bases)
        sure = 20 * (inside - 0.3)
        first = Outputs(jnp.stack([-sure, sure], axis=1), encoded(things[best, :4], bases))
        regions = proposed(first, bases, (32, 48), 6)
        inside, best = nearest(regions)
        named = jnp.where(inside > 0.5, things[best, 4], 0).astype(int)
        second = Outputs(20 * jax.nn.one_hot(named, 4), jnp.zeros((6, 4)))
        return regions, detected(second, regions, (32, 48), 6)

    regions, (boxes, scores, classes) = run()
    np.testing.assert_allclose(regions[:2], things[:, :4], atol=1e-2)
    kept_ones = np.asarray(scores) > 0.5
    assert sorted(np.asarray(classes)[kept_ones].tolist()) == [1, 3]
    found = Detections(*(np.asarray(x)[kept_ones] for x in (boxes, scores, classes)))
    assert mean_average_precision([found], np.asarray(things)[None], classes=3)[0] == 1


def test_a_heads_loss_by_hand():
    """Equations 2 to 4: two anchors that count, one of them matched, and one that does not count."""
    rng = np.random.default_rng(0)
    s, t = (Outputs(*(jnp.asarray(rng.normal(size=(3, n)), jnp.float32) for n in (2, 4))) for _ in range(2))
    wanted = distill_detection.Assigned(
        jnp.array([1, 0, 1]), jnp.asarray(rng.normal(size=(3, 4)), jnp.float32), jnp.array([True, True, False])
    )
    log_s, p_t = np.log(np.asarray(jax.nn.softmax(s.logits))), np.asarray(jax.nn.softmax(t.logits))
    hard = [-log_s[0, 1], -log_s[1, 0]]
    soft = [-(1.5 * p_t[i, 0] * log_s[i, 0] + p_t[i, 1] * log_s[i, 1]) for i in (0, 1)]
    off = np.abs(np.asarray(s.offsets - wanted.offsets)[0])
    smooth = np.where(off < 1, off**2 / 2, off - 0.5).sum()
    squares = [(np.asarray(x.offsets - wanted.offsets)[0] ** 2).sum() for x in (s, t)]
    bounded = squares[0] if squares[0] > squares[1] else 0
    run = jax.jit(partial(head_loss, background=1.5))
    plain = run(s, t, wanted, {key: 0.0 for key in ("soft", "bound")})
    assert float(plain) == pytest.approx((sum(hard) + smooth) / 2, rel=1e-5)
    both = run(s, t, wanted, {"soft": 0.4, "bound": 0.5})
    assert float(both) == pytest.approx((0.6 * sum(hard) + 0.4 * sum(soft) + smooth + 0.5 * bounded) / 2, rel=1e-5)


def test_the_detector_learns_and_its_students_run(tmp_path):
    room = SceneRoom(dataclasses.replace(SHORT, epochs=60))
    model = Detector((8, 8, 16), SHORT.sides)
    variables = room.learner(model, detection_loss(room.config, room, model))("alone", 0)
    whole, each = room.precision(model, variables, room.dataset.validation)
    assert whole > 25 and len(each) == 3  # untrained: below 2

    result = distill_detection.main(dataclasses.replace(SHORT, out=tmp_path))
    assert _results.read(tmp_path / f"{result.name}.json") == result
    rows = {row.name: row.ours for row in result.rows}
    assert len(rows) == 1 + 2 * 5 == len(result.test_reads)
    sizes = {name: ours["size"].mean for name, ours in rows.items()}
    assert len({size for name, size in sizes.items() if not name.endswith("teacher")}) == 1  # no adaptation layer
    assert sizes["student alone"] < sizes["small teacher"] < sizes["large teacher"]
