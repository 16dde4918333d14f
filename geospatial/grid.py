"""The pixel grid of a raster as it is shown: north up where the file stores it the other way round."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from rasterio.io import DatasetReader
from rasterio.transform import Affine
from rasterio.windows import Window


@dataclass(frozen=True)
class Grid:
    """Size and georeferencing.

    Attributes:
        width, height: pixels.
        transform: from corners of shown pixels (column, row) to the CRS; identity if there is none.
        crs: of the transform or, without one, of the ground control points.
        gcps: ground control points, in pixels of the file.
        rpcs: rational polynomial coefficients, or `None`.
        flipped: whether rows, and whether columns, of the file run against the shown ones.
    """

    width: int
    height: int
    transform: Affine
    crs: Any
    gcps: tuple[Any, ...]
    rpcs: Any
    flipped: tuple[bool, bool]

    @classmethod
    def of(cls, dataset: DatasetReader) -> "Grid":
        transform, (points, points_crs) = dataset.transform, dataset.gcps
        upright = transform.b == transform.d == 0 and not transform.is_identity
        rows, columns = upright and transform.e > 0, upright and transform.a < 0
        if rows:
            transform = transform * Affine(1, 0, 0, 0, -1, dataset.height)
        if columns:
            transform = transform * Affine(-1, 0, dataset.width, 0, 1, 0)
        crs = dataset.crs or points_crs
        return cls(dataset.width, dataset.height, transform, crs, tuple(points), dataset.rpcs, (rows, columns))

    @property
    def georeferencing(self) -> str:
        if not self.transform.is_identity:
            return "affine"
        return "gcps" if self.gcps else "rpcs" if self.rpcs else "none"

    @property
    def unit(self) -> str | None:
        """Of the coordinates, "metre" or "degree" for instance."""
        if self.crs is None:
            return None
        return "degree" if self.crs.is_geographic else self.crs.linear_units

    def in_file(self, window: tuple[int, int, int, int]) -> Window:
        """A window (column, row, width, height) of the shown grid in the file's own pixels."""
        column, row, width, height = window
        rows, columns = self.flipped
        row = self.height - row - height if rows else row
        column = self.width - column - width if columns else column
        return Window(column, row, width, height)

    def turn(self, values: np.ndarray) -> np.ndarray:
        """What was read, (..., height, width), as it is shown."""
        rows, columns = self.flipped
        return values[..., :: -1 if rows else 1, :: -1 if columns else 1]

    def transform_of(self, window: tuple[int, int, int, int], size: tuple[int, int]) -> Affine | None:
        """From corners of the pixels of an image, of size (width, height), to the CRS."""
        if self.georeferencing != "affine":
            return None
        scale = Affine.scale(window[2] / size[0], window[3] / size[1])
        return self.transform * Affine.translation(window[0], window[1]) * scale
