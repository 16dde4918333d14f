"""The pixel grid of a raster as it is shown: north up where the file stores it the other way round."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from rasterio.crs import CRS
from rasterio.io import DatasetReader
from rasterio.transform import Affine, GCPTransformer, RPCTransformer
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
            transform = transform @ Affine(1, 0, 0, 0, -1, dataset.height)
        if columns:
            transform = transform @ Affine(-1, 0, dataset.width, 0, 1, 0)
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

    @property
    def map_crs(self) -> Any:
        """CRS of `to_map`; `None` if the raster has no place, and `to_map` gives pixels."""
        return CRS.from_epsg(4326) if self.georeferencing == "rpcs" else self.crs

    def to_map(self, pixels: np.ndarray) -> np.ndarray:
        """Points (N, 2), columns and rows from corners of shown pixels, to x and y in `map_crs`.

        Polynomial coefficients are evaluated at their mean height, so places on slopes are approximate.
        """
        columns, rows = np.asarray(pixels, dtype=float).reshape(-1, 2).T
        if self.georeferencing in ("affine", "none"):
            a, b, c, d, e, f = tuple(self.transform)[:6]
            return np.stack([a * columns + b * rows + c, d * columns + e * rows + f], axis=1)
        with self._transformer() as transformer:
            return np.stack(transformer.xy(rows, columns, zs=self._heights(rows), offset="ul"), axis=1)

    def to_pixels(self, places: np.ndarray) -> np.ndarray:
        """The inverse of `to_map`: x and y (N, 2) to columns and rows, not rounded."""
        x, y = np.asarray(places, dtype=float).reshape(-1, 2).T
        if self.georeferencing in ("affine", "none"):
            a, b, c, d, e, f = tuple(~self.transform)[:6]
            return np.stack([a * x + b * y + c, d * x + e * y + f], axis=1)
        with self._transformer() as transformer:
            rows, columns = transformer.rowcol(x, y, zs=self._heights(x), op=lambda value: value)
            return np.stack([columns, rows], axis=1).astype(float)

    def _transformer(self) -> Any:
        return GCPTransformer(self.gcps) if self.georeferencing == "gcps" else RPCTransformer(self.rpcs)

    def _heights(self, like: np.ndarray) -> np.ndarray | None:
        return np.full(len(like), float(self.rpcs.height_off)) if self.georeferencing == "rpcs" else None

    def pixel_size(self) -> tuple[float, float] | None:
        """Width and height of the pixel in the centre, in metres on the ground; `None` without a place on the Earth.

        On the ellipsoid, since degrees are no lengths and the metres of some projections are no metres on the ground.
        """
        import pyproj  # not needed to read

        if self.map_crs is None or self.georeferencing == "none":
            return None
        try:
            to_degrees = pyproj.Transformer.from_crs(self.map_crs.to_wkt(), "EPSG:4326", always_xy=True)
        except pyproj.exceptions.ProjError:  # coordinates of a site, for instance
            return None
        x, y = self.width / 2, self.height / 2
        ends = self.to_map(np.array([[x - 0.5, y], [x + 0.5, y], [x, y - 0.5], [x, y + 0.5]]))
        longitudes, latitudes = to_degrees.transform(*ends.T)
        if not np.isfinite([longitudes, latitudes]).all():
            return None
        geod = pyproj.Geod(ellps="WGS84")
        _, _, lengths = geod.inv(longitudes[::2], latitudes[::2], longitudes[1::2], latitudes[1::2])
        return float(lengths[0]), float(lengths[1])

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
        return self.transform @ Affine.translation(window[0], window[1]) @ scale
