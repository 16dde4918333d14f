"""What a read gives: an image for the model, and the record of how it was made."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from .stretch import Stretch


@dataclass(frozen=True)
class ReadRecord:
    """How an image was made from a raster. `as_dict` gives JSON.

    Attributes:
        source: name of the raster.
        bands: numbers, from one, of the bands in the image, in order. With one file per band, places in their order.
        names: their common names; `None` where nothing names a band.
        bands_from: what the choice of bands rests on.
        composite: key in `composites.COMPOSITES`.
        stretch: the limits that became black and white.
        nodata_share: share of the pixels, 0 to 1, that are nodata, masked, transparent or not finite.
        crs: authority code or WKT; `None` if the raster has none.
        georeferencing: "affine", "gcps", "rpcs" or "none".
        transform: a, b, c, d, e, f with x = a column + b row + c and y = d column + e row + f, from corners of the
            image's pixels to the CRS; `None` unless `georeferencing` is "affine".
        resolution: width and height of a pixel of the image, in `unit`; `None` without a transform.
        unit: of the CRS: "metre", "degree", ...
        window: column, row, width, height in pixels of the raster, north up.
        size: width and height of the image.
        notes: assumptions and advice.
    """

    source: str
    bands: tuple[int, ...]
    names: tuple[str | None, ...]
    bands_from: str
    composite: str
    stretch: Stretch
    nodata_share: float
    crs: str | None
    georeferencing: str
    transform: tuple[float, ...] | None
    resolution: tuple[float, float] | None
    unit: str | None
    window: tuple[int, int, int, int]
    size: tuple[int, int]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class View:
    """A raster, or a window of it, as the model sees it.

    Attributes:
        image: RGB.
        valid: (height, width), bool; False where the raster holds no data, and the image is grey.
        record: how it was made.
        bands: with `image_bands`: 8 bits, (height, width), by band, as the processor of the model takes them.
    """

    image: Image.Image
    valid: np.ndarray
    record: ReadRecord
    bands: dict[str, np.ndarray] | None = None
