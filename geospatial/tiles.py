"""Two grids of tiles for scenes larger than one image, and the merging of boxes that several tiles see.

Answers such as counts have no place, so what two tiles see would be counted twice: they take a partition. A box that a tile
truncates is found whole in its neighbour: boxes take tiles that overlap.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import shapely


Window = tuple[int, int, int, int]  # column, row, width, height, pixels of the raster

THRESHOLD = 0.5  # share of the smaller box that two boxes of one object have in common


def partition(extent: Window, tile: tuple[int, int], shifted: bool = False) -> list[Window]:
    """Windows of nearly the same size that cover every pixel of the extent once, row by row.

    Args:
        extent: the window to cover.
        tile: largest width and height of a window.
        shifted: move the inner edges by half a tile, so that the seams lie elsewhere.
    """
    columns, rows = (
        _edges(start, length, side, shifted) for start, length, side in zip(extent[:2], extent[2:], tile, strict=True)
    )
    return [
        (left, top, right - left, bottom - top)
        for top, bottom in itertools.pairwise(rows)
        for left, right in itertools.pairwise(columns)
    ]


def _edges(start: int, length: int, side: int, shifted: bool) -> list[int]:
    count = -(-length // side)
    steps = [0, *(i + 0.5 for i in range(count)), count] if shifted and count > 1 else range(count + 1)
    return sorted({start + int(length * step / count) for step in steps})


def default_overlap(tile: int | None) -> int | None:
    """Of tiles of this size, pixels; `None` without tiles."""
    return None if tile is None else tile // 8


def overlapping(extent: Window, tile: tuple[int, int], overlap: tuple[int, int]) -> list[Window]:
    """Windows of one size that cover the extent, row by row, each sharing at least `overlap` pixels with its neighbours.

    Raises:
        ValueError: the overlap is not smaller than the tile.
    """
    columns, rows = (_starts(*axis) for axis in zip(extent[:2], extent[2:], tile, overlap, strict=True))
    (width, height) = (min(length, side) for length, side in zip(extent[2:], tile, strict=True))
    return [(column, row, width, height) for row in rows for column in columns]


def _starts(start: int, length: int, side: int, overlap: int) -> list[int]:
    if length <= side:
        return [start]
    step = side - overlap
    if step < 1:
        raise ValueError(f"overlap={overlap} must be smaller than the tile, {side} pixels.")
    count = -(-(length - side) // step)
    return [start + index * (length - side) // count for index in range(count + 1)]


def merge_boxes(
    boxes: np.ndarray, owners: Sequence[int], windows: Sequence[Window], threshold: float = THRESHOLD
) -> list[list[int]]:
    """Groups the boxes that show one object. Boxes of one tile never come into one group.

    Two boxes of different tiles are compared where both tiles see, and a pixel around, since one of them may be truncated:
    they belong together if their intersection is at least `threshold` of the smaller one there. Pairs with the largest
    intersections come first.

    Args:
        boxes: (N, 4), x_min, y_min, x_max, y_max in pixels of the raster.
        owners: index of the tile of each box.
        windows: the tiles.

    Returns:
        Indices of the boxes of each group, sorted. The groups do not depend on the order of the boxes.
    """
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4)
    if not len(boxes):
        return []
    boxes = at_least_a_pixel(boxes)
    owners = np.asarray(owners)
    tree = shapely.STRtree(shapely.box(*boxes.T))
    first, second = tree.query(tree.geometries, predicate="intersects")
    kept = (first < second) & (owners[first] != owners[second])
    first, second = first[kept], second[kept]
    corners = np.array([(x, y, x + width, y + height) for x, y, width, height in windows], dtype=float).reshape(-1, 4)
    # Both tiles also see what `at_least_a_pixel` may have added outside of them.
    seen = intersect(corners[owners[first]], corners[owners[second]]) + np.array([-1, -1, 1, 1])
    some, others = intersect(boxes[first], seen), intersect(boxes[second], seen)
    common = area(intersect(some, others))
    smaller = np.minimum(area(some), area(others))
    same = (common > 0) & (common >= threshold * smaller)
    first, second, common = first[same], second[same], common[same]
    # Equal intersections are ordered by the boxes themselves.
    rank = np.empty(len(boxes), int)
    rank[np.lexsort((owners, *boxes.T))] = np.arange(len(boxes))
    low, high = np.minimum(rank[first], rank[second]), np.maximum(rank[first], rank[second])
    group = list(range(len(boxes)))
    members = {index: [index] for index in group}
    for pair in np.lexsort((high, low, -common)):
        one, other = group[first[pair]], group[second[pair]]
        if one == other or {owners[i] for i in members[one]} & {owners[i] for i in members[other]}:
            continue
        for index in members[other]:
            group[index] = one
        members[one] += members.pop(other)
    return sorted(sorted(indices) for indices in members.values())


def at_least_a_pixel(boxes: np.ndarray) -> np.ndarray:
    """Boxes (..., 4) with sides of at least one pixel: rounding can make a box without area of something tiny."""
    low, high = boxes[..., :2], boxes[..., 2:]
    margin = np.maximum(0, 1 - (high - low)) / 2
    return np.concatenate([low - margin, high + margin], axis=-1)


def intersect(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Row by row, the common part of boxes (N, 4). Without one, a side is negative."""
    return np.concatenate([np.maximum(some[:, :2], others[:, :2]), np.minimum(some[:, 2:], others[:, 2:])], axis=1)


def area(boxes: np.ndarray) -> np.ndarray:
    """(N,)"""
    return np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)


def unite(boxes: np.ndarray) -> np.ndarray:
    """The smallest box (4,) around boxes (N, 4)."""
    return np.concatenate([boxes[:, :2].min(0), boxes[:, 2:].max(0)])
