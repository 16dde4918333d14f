"""Grids of tiles, and the merging of boxes: properties for any size, and a detector that makes no mistakes."""

import itertools
import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
import shapely
from hypothesis import example, given, settings

from mfrsvlm.geospatial.tiles import merge_boxes, overlapping, partition, unite


LENGTH, START = st.integers(1, 700), st.integers(0, 50)
EXTENTS = st.tuples(START, START, LENGTH, LENGTH)
SIDE = st.integers(20, 300)


def covered(extent, windows):
    """How many windows see each pixel of the extent, (height, width)."""
    counts = np.zeros((extent[3], extent[2]), int)
    for column, row, width, height in windows:
        assert width > 0 and height > 0 and column >= extent[0] and row >= extent[1]
        assert column + width <= extent[0] + extent[2] and row + height <= extent[1] + extent[3]
        column, row = column - extent[0], row - extent[1]
        counts[row : row + height, column : column + width] += 1
    return counts


@given(EXTENTS, st.tuples(SIDE, SIDE), st.booleans())
@example((0, 0, 2000, 200), (512, 512), False)
@example((0, 0, 2000, 200), (512, 512), True)
@example((0, 0, 1, 1), (512, 512), True)
@settings(max_examples=60, deadline=None)
def test_partition_covers_every_pixel_once(extent, tile, shifted):
    windows = partition(extent, tile, shifted)
    assert (covered(extent, windows) == 1).all()
    assert all(width <= tile[0] and height <= tile[1] for _, _, width, height in windows)
    if not shifted:  # nearly the same size: no slivers, in which objects would look larger
        assert np.ptp([window[2] for window in windows]) <= 1 and np.ptp([window[3] for window in windows]) <= 1


def test_seams_of_the_shifted_partition_lie_elsewhere():
    plain, shifted = (partition((0, 0, 2048, 1024), (512, 512), value) for value in (False, True))
    seams = [{column for column, _, _, _ in windows} - {0} for windows in (plain, shifted)]
    assert seams == [{512, 1024, 1536}, {256, 768, 1280, 1792}]
    assert partition((0, 0, 500, 100), (512, 512), True) == [(0, 0, 500, 100)]


@given(EXTENTS, st.tuples(SIDE, SIDE), st.integers(0, 19))
@example((0, 0, 2000, 200), (512, 512), 64)
@settings(max_examples=60, deadline=None)
def test_overlapping_tiles_cover_every_pixel_and_share_what_was_asked(extent, tile, overlap):
    windows = overlapping(extent, tile, (overlap, overlap))
    assert (covered(extent, windows) >= 1).all()
    assert len({window[2:] for window in windows}) == 1
    columns, rows = (sorted({window[axis] for window in windows}) for axis in (0, 1))
    for starts, side in ((columns, windows[0][2]), (rows, windows[0][3])):
        assert all(0 < later - start <= side - overlap for start, later in itertools.pairwise(starts))


def test_overlap_of_a_whole_tile_is_rejected():
    with pytest.raises(ValueError, match="overlap=64"):
        overlapping((0, 0, 500, 500), (64, 64), (64, 64))


def scattered(random, size, count, longest):
    """Boxes with whole numbers that do not touch, (n, 4)."""
    kept = np.zeros((0, 4))
    for _ in range(count):
        sides = random.integers(2, np.minimum(np.maximum(longest, 2), size) + 1)
        corner = random.integers(0, np.array(size) - sides + 1)
        box = np.concatenate([corner, corner + sides])
        apart = (kept[:, :2] > box[2:]).any(1) | (kept[:, 2:] < box[:2]).any(1)
        if apart.all():
            kept = np.concatenate([kept, box[None]])
    return kept


def seen_by(windows, boxes, jitter=0.0, random=None):
    """What a detector without mistakes reports: the visible part of each box in each tile, and the tile's index."""
    parts, owners = [], []
    for number, (column, row, width, height) in enumerate(windows):
        limits = np.array([column, row, column + width, row + height])
        seen = np.concatenate([np.maximum(boxes[:, :2], limits[:2]), np.minimum(boxes[:, 2:], limits[2:])], axis=1)
        seen = seen[(seen[:, 2:] > seen[:, :2]).all(1)]
        parts.append(seen + (random.uniform(-jitter, jitter, seen.shape) if jitter else 0))
        owners += [number] * len(seen)
    return np.concatenate(parts), owners


def as_set(boxes):
    return {tuple(box) for box in np.round(boxes, 6)}


@given(st.tuples(st.integers(2, 700), st.integers(2, 700)), st.integers(30, 200), st.integers(1, 29), st.integers(0, 10**6))
@example((2000, 200), 128, 16, 0)
@settings(max_examples=60, deadline=None)
def test_merge_is_exact_for_a_detector_without_mistakes(size, tile, overlap, seed):
    """Also for objects longer than the overlap, and than a tile."""
    random = np.random.default_rng(seed)
    truth = scattered(random, size, 60, [size[0], 25] if seed % 2 else [40, 40])
    windows = overlapping((0, 0, *size), (tile, tile), (overlap, overlap))
    boxes, owners = seen_by(windows, truth)
    groups = merge_boxes(boxes, owners, windows)
    assert sorted(index for group in groups for index in group) == list(range(len(boxes)))
    assert all(len({owners[index] for index in group}) == len(group) for group in groups)  # never two of one tile
    merged = [unite(boxes[group]) for group in groups]
    assert len(merged) == len(truth) and as_set(merged) == as_set(truth)

    order = random.permutation(len(boxes))
    again = merge_boxes(boxes[order], np.array(owners)[order], windows)
    assert {frozenset(order[group].tolist()) for group in again} == {frozenset(group) for group in groups}
    # What is merged stays as it is.
    whole = merge_boxes(np.array(merged).reshape(-1, 4), range(len(merged)), [(0, 0, *size)] * len(merged))
    assert len(whole) == len(merged)


def merged_by_hand(boxes, owners, windows):
    """The same groups, pair by pair and with shapely's areas."""
    shapes = [shapely.box(*box) for box in boxes]
    tiles = [shapely.box(x - 1, y - 1, x + width + 1, y + height + 1) for x, y, width, height in windows]
    pairs = []
    for one, other in itertools.combinations(range(len(boxes)), 2):
        if owners[one] != owners[other]:
            seen = tiles[owners[one]] & tiles[owners[other]]
            some, others = shapes[one] & seen, shapes[other] & seen
            common = (some & others).area
            if common > 0 and common >= 0.5 * min(some.area, others.area):
                ends = sorted((*boxes[index][::-1], owners[index]) for index in (one, other))
                pairs.append((-common, ends, one, other))
    groups = [{index} for index in range(len(boxes))]
    for _, _, one, other in sorted(pairs):
        first, second = (next(group for group in groups if index in group) for index in (one, other))
        if first is not second and not {owners[index] for index in first} & {owners[index] for index in second}:
            first |= second
            groups.remove(second)
    return sorted(sorted(group) for group in groups)


@given(st.lists(st.tuples(*[st.integers(0, 40)] * 2, *[st.integers(1, 25)] * 2, st.integers(0, 3)), max_size=14))
@settings(max_examples=200, deadline=None)
def test_merge_is_that_of_every_pair_by_hand(found):
    """Of any boxes, which need not show the same objects. A detector that errs never loses one of a tile's boxes."""
    windows = overlapping((0, 0, 60, 60), (40, 40), (20, 20))
    boxes, owners = [], []
    for x, y, width, height, owner in found:
        left, top = windows[owner][0] + min(x, 39), windows[owner][1] + min(y, 39)
        boxes.append((left, top, min(left + width, windows[owner][0] + 40), min(top + height, windows[owner][1] + 40)))
        owners.append(owner)
    groups = merge_boxes(np.array(boxes, float).reshape(-1, 4), owners, windows)
    assert groups == merged_by_hand(boxes, owners, windows)
    assert all(len({owners[index] for index in group}) == len(group) for group in groups)


def test_merge_is_supervisions_merge_by_the_smaller_box():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it prefers OpenCV
        supervision = pytest.importorskip("supervision", "0.31")
    random = np.random.default_rng(0)
    truth = scattered(random, (1500, 1000), 400, [90, 90])
    windows = overlapping((0, 0, 1500, 1000), (512, 512), (64, 64))
    boxes, owners = seen_by(windows, truth)
    detections = supervision.Detections(boxes, confidence=np.ones(len(boxes)), class_id=np.zeros(len(boxes), int))
    expected = detections.with_nmm(0.5, overlap_metric=supervision.OverlapMetric.IOS).xyxy
    found = [unite(boxes[group]) for group in merge_boxes(boxes, owners, windows)]
    assert len(truth) >= 100 and len(boxes) > 1.2 * len(truth)
    assert as_set(found) == as_set(expected) == as_set(truth)


@pytest.mark.parametrize("jitter", [0, 1, 2])
def test_dense_rows_of_small_objects(jitter):
    """Cars in parking lots: the count is right within one percent, although neighbours overlap by the jitter."""
    random = np.random.default_rng(jitter)
    columns, rows = np.meshgrid(np.arange(3, 1480, 14), np.arange(4, 980, 34))
    corners = np.stack([columns.ravel(), rows.ravel()], axis=1).astype(float)
    truth = np.concatenate([corners, corners + np.array([12, 28])], axis=1)
    windows = overlapping((0, 0, 1500, 1000), (512, 512), (64, 64))
    boxes, owners = seen_by(windows, truth, jitter, random)
    assert len(boxes) > 1.2 * len(truth)
    assert abs(len(merge_boxes(boxes, owners, windows)) - len(truth)) <= 0.01 * len(truth)


def test_intersection_is_over_the_smaller_box():
    """The part that a tile truncates belongs to the whole box; with IoU it would not."""
    windows = [(0, 0, 100, 100), (80, 0, 100, 100)]
    whole, part = [81, 10, 140, 30], [81, 10, 100, 30]
    assert shapely.box(*whole).intersection(shapely.box(*part)).area / shapely.box(*whole).area < 0.5
    assert merge_boxes(np.array([part, whole]), [0, 1], windows) == [[0, 1]]
    assert merge_boxes(np.array([part, whole]), [1, 1], windows) == [[0], [1]]
    assert merge_boxes(np.zeros((0, 4)), [], windows) == []
    point = [90, 50, 90, 50]  # without area
    assert merge_boxes(np.array([point, point]), [0, 1], windows) == [[0, 1]]
