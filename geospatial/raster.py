"""A raster of any kind that GDAL opens, read by window and overview as the image that the model sees."""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import rasterio
from PIL import Image
from rasterio.enums import MaskFlags, Resampling
from rasterio.env import getenv, hasenv
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader
from rasterio.vrt import WarpedVRT

from .bands import COLOURS, name_bands, select_bands, select_image_bands
from .composites import ALL_BANDS, COMPOSITES, find_composite
from .errors import NoValidPixelError, RasterError, RasterWarning
from .grid import Grid
from .sensors import find_sensor, reflectance_of
from .sources import find_bands, open_dataset, reason
from .stretch import PERCENTILES, REFLECTANCE, Stretch, limits_of, parse_stretch
from .view import ReadRecord, View


FILL = (127, 127, 127)  # of pixels without data: what models are padded with, or nearly
MAX_SIDE = 2048  # of an image: three times the canvas of the default geometry
SAMPLE_SIDE = 2048  # statistics take every pixel of scenes up to here
PATCHES, PATCH_SIDE = 16, 64  # and of larger ones without an overview that small, 16 x 16 patches of 64 x 64 pixels
MANY_PIXELS = 50_000_000  # from here on, a read without overviews takes long
GDAL_OPTIONS = {
    "GDAL_CACHEMAX": 64,  # MB; GDAL's own default is a share of the machine's memory
    "GDAL_HTTP_CONNECTTIMEOUT": 10,  # s
    "GDAL_HTTP_TIMEOUT": 60,
}


Fill = tuple[int, int, int] | Mapping[str, int]


class Raster:
    """A raster whose bands are known and whose stretch is one for the whole scene. Made by `Raster.open`.

    Close it, or use it in a `with` statement. Pixels are those of the raster with north up: files that store their rows
    from the south are turned.

    Attributes:
        name: for messages and records.
        grid: size, transform, CRS, ground control points.
        selection: the bands that are shown, and what the choice rests on.
        files: names of the datasets that are read.
        notes: assumptions and advice; each was also issued as a `RasterWarning`.
    """

    @classmethod
    def open(
        cls,
        source: Any,
        bands: str | int | Sequence[int | str] | None = None,
        sensor: str | None = None,
        composite: str | None = None,
        stretch: str | Sequence[float] | Stretch | None = None,
        nodata: float | None = None,
        like: "Raster | None" = None,
        image_bands: Sequence[str] | None = None,
        missing_bands: str = "fill",
    ) -> "Raster":
        """Opens a raster and decides which bands are shown.

        Args:
            source: path, any name that GDAL opens (`/vsizip/...`, `https://...`, a subdataset), rasterio dataset, xarray
                DataArray, `{band: path}` with one file per band, or STAC item (as a dict or of pystac).
            bands: numbers from one, or names, of the bands for red, green and blue, or of one band for grey. `None`: by
                colour interpretation, else by description, else by sensor; three unnamed bands are taken as red, green and
                blue, with a warning.
            sensor: key in `sensors.SENSORS`; `None` looks at the file's name.
            composite: key in `composites.COMPOSITES`; `None` shows true colours.
            stretch: `"none"` (8 bits as they are), `"percentile"` (2 to 98) or `"percentile:1,99"`, `"physical"`
                (reflectance 0 to 0.3) or `"physical:0,0.5"`, `"LOW,HIGH"` in the numbers of the file, or the `Stretch` of
                another raster. `None`, `"auto"`: none for 8 bits, percentile for others.
            nodata: value that stands for no data, against what the file says.
            like: another raster, over whose pixels this one is laid with cubic resampling, such as an earlier date. Its
                stretch is used unless another one is given.
            image_bands: names of the bands of a model with more than three, see `image_bands` of its image processor. All
                of them that the raster has are read, each with a stretch of its own, and `View.bands` holds them.
            missing_bands: "fill": a model's band that the raster lacks is noted, and is zero for the model; "refuse": it is
                an error.

        Raises:
            RasterError: it cannot be opened, or shown, or nothing says which bands are which. The message is one line.
            TypeError: the source is none of the above.
        """
        if image_bands is not None and not (bands is None and composite is None):
            raise RasterError("image_bands shows all bands of a model: give no bands and no composite with it.")
        composite = find_composite(composite)
        if like is not None and stretch is None:
            stretch = like.stretch
        request = stretch if isinstance(stretch, Stretch) else parse_stretch(stretch)
        stack = ExitStack()
        try:
            with gdal():
                return cls(source, bands, sensor, composite, request, nodata, like, stack, image_bands, missing_bands)
        except BaseException:
            stack.close()
            raise

    def __init__(
        self,
        source: Any,
        bands: Any,
        sensor: str | None,
        composite: str,
        request: Any,
        nodata: float | None,
        like: "Raster | None",
        stack: ExitStack,
        image_bands: Sequence[str] | None = None,
        missing_bands: str = "fill",
    ) -> None:
        self._stack, self._request = stack, request
        self.notes: list[str] = []
        found = find_bands(source, nodata, stack)
        self.name = found.shown
        preset = find_sensor(sensor, found.file_name)
        self.sensor = preset.name if preset else None
        self.naming = name_bands([band.label for band in found.bands], preset, sensor is not None)
        selection = None
        if image_bands is not None:
            selection = select_image_bands(self.naming, image_bands, missing_bands, self.name)
        self.selection = selection or select_bands(self.naming, bands, composite, self.name)
        self._composite = ALL_BANDS if selection else COMPOSITES[composite]
        if self.selection.note:
            self.note(self.selection.note)
        chosen = [found.bands[position] for position in self.selection.positions]
        opened: dict[str, DatasetReader] = {}
        datasets = []
        for band in chosen:
            if isinstance(band.location, str):
                if band.location not in opened:
                    marker = band.nodata if nodata is None else nodata
                    opened[band.location] = open_dataset(band.location, marker, stack)
                datasets.append(opened[band.location])
                scale, offset = datasets[-1].scales[band.index - 1], datasets[-1].offsets[band.index - 1]
                if band.scale is None and (scale, offset) != (1.0, 0.0):
                    band.scale, band.offset = scale, offset
            else:
                datasets.append(band.location)
        finest = max(datasets, key=lambda dataset: dataset.width * dataset.height)
        self._file = finest if like is None else like._file
        self.grid = Grid.of(self._file)
        self._bands = [
            (self._aligned(dataset, self._file), band.index) for dataset, band in zip(datasets, chosen, strict=True)
        ]
        self.driver = finest.driver
        self.files = tuple(dict.fromkeys(str(dataset.name) for dataset in datasets))
        self.overviews: list[int] = finest.overviews(self._bands[datasets.index(finest)][1])
        self.dtypes = tuple(dataset.dtypes[band.index - 1] for dataset, band in zip(datasets, chosen, strict=True))
        preset_scale = reflectance_of(preset, found.file_name, found.tags) if preset else None
        self._scales = [
            preset_scale if band.scale is None and band.offset is None else (band.scale or 1.0, band.offset or 0.0)
            for band in chosen
        ]
        self._unit = self._find_unit()
        if self._composite.scaled and preset and preset.scale and None in self._scales:
            self.note(f"{self.name} does not say how its numbers become reflectance; {composite} is made of them as stored.")

    def _aligned(self, dataset: DatasetReader, target: DatasetReader) -> DatasetReader | WarpedVRT:
        """A dataset on the grid of another one."""
        size, other = (target.width, target.height), (dataset.width, dataset.height)
        if size == other and (dataset.transform, dataset.crs) == (target.transform, target.crs):
            return dataset
        if dataset.crs is None or target.crs is None:
            raise RasterError(
                f"{self.name}: {other[0]} x {other[1]} and {size[0]} x {size[1]} pixels cannot be laid over each other, "
                "since a file has no CRS. Pass files of one size, or add it: gdal_edit.py -a_srs EPSG:... FILE."
            )
        grid = {"crs": target.crs, "transform": target.transform, "width": target.width, "height": target.height}
        return self._stack.enter_context(
            WarpedVRT(dataset, **grid, resampling=Resampling.cubic, add_alpha=dataset.nodata is None)
        )

    def note(self, text: str, stacklevel: int = 4) -> None:
        if text not in self.notes:
            self.notes.append(text)
            warnings.warn(text, RasterWarning, stacklevel=stacklevel)

    @property
    def width(self) -> int:
        return self.grid.width

    @property
    def height(self) -> int:
        return self.grid.height

    @cached_property
    def stretch(self) -> Stretch:
        """The limits of each channel, from the whole scene.

        Raises:
            RasterError: it has no valid pixel.
        """
        request, composite = self._request, self._composite
        if isinstance(request, Stretch):
            return request
        channels = self._num_channels
        limits: tuple[float, float] | None = request.values
        if request.kind == "none" or (request.kind == "auto" and self._unit == "stored" and set(self.dtypes) == {"uint8"}):
            kind, limits = "none", (0.0, 255.0)
        elif request.kind == "auto" and composite.limits:
            kind, limits = "limits", composite.limits
        elif request.kind == "physical":
            kind, limits = "physical", limits or REFLECTANCE
        elif request.kind == "limits":
            kind = "limits"
        else:
            percentiles = limits or PERCENTILES
            with gdal():
                values, valid = self._sample()
            names = None if composite.formula else self.selection.names
            low, high = limits_of(values, valid, percentiles, self.name, names)
            return Stretch("percentile:{:g},{:g}".format(*percentiles), low, high, self._unit)
        return Stretch(kind, (limits[0],) * channels, (limits[1],) * channels, self._unit)

    @property
    def title(self) -> str:
        """What the picture is called in a prompt."""
        return self._composite.title

    @property
    def _num_channels(self) -> int:
        """Channels that are stretched."""
        return self._composite.channels if self._composite.formula else len(self._bands)

    def _find_unit(self) -> str:
        """Unit of the numbers that are stretched. Rejects what the bands do not allow."""
        request, composite = self._request, self._composite
        kind = request.kind
        if kind == "none" and (composite.formula or set(self.dtypes) != {"uint8"}):
            held = self.selection.composite if composite.formula else ", ".join(sorted(set(self.dtypes)))
            raise RasterError(f"{self.name}: stretch none shows 8 bits as they are, and this is {held}.")
        wants_reflectance = request.unit == "reflectance" if isinstance(request, Stretch) else kind == "physical"
        if composite.formula:
            if wants_reflectance:
                raise RasterError(f"{self.selection.composite} is no reflectance: give it another --stretch (stretch=).")
            unit = "index" if composite.limits else "dB"
        else:
            unit = "reflectance" if wants_reflectance else "stored"
        if wants_reflectance and None in self._scales:
            raise RasterError(
                f"{self.name}: nothing says how its numbers become reflectance. Give --sensor (sensor=) or limits such as "
                "--stretch 0,3000; Sentinel-2 from processing baseline 04.00 on needs 1000,4000."
            )
        channels = self._num_channels
        if isinstance(request, Stretch) and (len(request.low), request.unit) != (channels, unit):
            raise RasterError(
                f"{self.name}: the stretch is for {len(request.low)} channels in {request.unit}, the picture has {channels} "
                f"in {unit}."
            )
        return unit

    def read(
        self,
        window: tuple[int, int, int, int] | None = None,
        max_side: int = MAX_SIDE,
        size: tuple[int, int] | None = None,
        fill: Fill = FILL,
    ) -> View:
        """Reads a window as an image, by the overview that fits, with cubic resampling.

        Args:
            window: column, row, width, height in pixels of the raster, north up; `None` is all of it.
            max_side: longest side of the image, pixels. A larger window is reduced to it; nothing is enlarged.
            size: width and height of the image, against `max_side`. Larger than the window, it is enlarged.
            fill: colour of pixels without data, or values by band. A model takes black for something.

        Raises:
            RasterError: the window lies outside, cannot be read, or holds no valid pixel.
        """
        window = (0, 0, self.width, self.height) if window is None else tuple(int(edge) for edge in window)
        column, row, width, height = window
        inside = 0 <= column < column + width <= self.width and 0 <= row < row + height <= self.height
        if not inside:
            raise RasterError(f"{self.name}: window {window} leaves its {self.width} x {self.height} pixels.")
        if size is None:
            factor = min(1.0, max_side / max(width, height))
            size = (max(1, round(width * factor)), max(1, round(height * factor)))
        if size[0] < width and width * height > MANY_PIXELS and not self.overviews:
            self.note(
                f"{self.name} has no overviews, so {width} x {height} pixels are read for {size[0]} x {size[1]}. "
                "Build them once: gdaladdo -r average FILE.",
                stacklevel=3,
            )
        stretch = self.stretch
        with gdal():
            values, valid = self._channels(window, size, Resampling.cubic)
        shown = valid.any(axis=0)
        if not shown.any():
            raise NoValidPixelError(
                f"{self.name} has no valid pixel in window {window}: all are nodata, masked or not finite."
            )
        planes = pixels = stretch.apply(values)
        bands: dict[str, np.ndarray] | None = None
        if self._composite is ALL_BANDS:
            bands = self._filled(planes, valid, fill)
            colours = [bands[name] for name in COLOURS if name in bands]
            pixels = np.stack(colours) if len(colours) == 3 else planes[:1]
        pixels = np.ascontiguousarray(np.broadcast_to(pixels, (3, *shown.shape)).transpose(1, 2, 0))  # (H, W, 3)
        pixels[~shown] = colour_of(fill)
        return View(Image.fromarray(pixels), shown, self._record(window, size, stretch, 1 - float(shown.mean())), bands)

    def _filled(self, planes: np.ndarray, valid: np.ndarray, fill: Fill) -> dict[str, np.ndarray]:
        """Planes by name. A band without data, where others have some, gets its own value."""
        bands = {}
        some = valid.any(axis=0)
        for name, plane, mask in zip(self.selection.names, planes, valid, strict=True):
            value = fill.get(name, FILL[0]) if isinstance(fill, Mapping) else FILL[0]
            bands[str(name)] = np.where(mask, plane, np.uint8(value))
            if not mask.any() and some.any():
                self.note(f"{self.name} has places where band {name} holds no data and others do: it is {value} there.")
        return bands

    def describe(self) -> dict[str, Any]:
        """What every image of this raster has in common, for the record of a run.

        Raises:
            RasterError: it has no valid pixel.
        """
        record = self._record((0, 0, self.width, self.height), (self.width, self.height), self.stretch, 0.0).as_dict()
        return {name: value for name, value in record.items() if name not in ("nodata_share", "window")}

    def _record(
        self, window: tuple[int, int, int, int], size: tuple[int, int], stretch: Stretch, nodata_share: float
    ) -> ReadRecord:
        transform = self.grid.transform_of(window, size)
        resolution = transform and (float(np.hypot(transform.a, transform.d)), float(np.hypot(transform.b, transform.e)))
        return ReadRecord(
            source=self.name,
            bands=tuple(position + 1 for position in self.selection.positions),
            names=self.selection.names,
            bands_from=self.selection.origin,
            composite=self.selection.composite,
            stretch=stretch,
            nodata_share=nodata_share,
            crs=self.grid.crs.to_string() if self.grid.crs else None,
            georeferencing=self.grid.georeferencing,
            transform=transform and tuple(transform)[:6],
            resolution=resolution,
            unit=self.grid.unit,
            window=window,
            size=size,
            notes=tuple(self.notes),
        )

    def sample(self) -> tuple[np.ndarray, np.ndarray]:
        """Values before the stretch and where they are data, both (channels, n) or (channels, h, w), for a histogram."""
        with gdal():
            return self._sample()

    def _sample(self) -> tuple[np.ndarray, np.ndarray]:
        """Values and validity, (channels, n), for the statistics of the scene."""
        longest = max(self.width, self.height)
        # An overview is read pixel by pixel: GDAL takes many seconds to pick the nearest pixels of a larger one.
        level = next((level for level in (1, *self.overviews) if longest / level <= SAMPLE_SIDE), None)
        if level is not None:
            size = (-(-self.width // level), -(-self.height // level))
            parts = [self._channels((0, 0, self.width, self.height), size, Resampling.nearest)]
        else:
            width, height = min(PATCH_SIDE, self.width), min(PATCH_SIDE, self.height)
            columns = np.unique(np.linspace(0, self.width - width, PATCHES).astype(int)).tolist()
            rows = np.unique(np.linspace(0, self.height - height, PATCHES).astype(int)).tolist()
            windows = [(column, row, width, height) for row in rows for column in columns]
            parts = [self._channels(window, (width, height), Resampling.nearest) for window in windows]
        values, valid = zip(*parts, strict=True)
        if len(parts) == 1:
            return parts[0]
        return tuple(np.concatenate([part.reshape(len(part), -1) for part in group], axis=1) for group in (values, valid))

    def _channels(
        self, window: tuple[int, int, int, int], size: tuple[int, int], resampling: Resampling
    ) -> tuple[np.ndarray, np.ndarray]:
        """What the composite shows of a window: values, float32, and validity, both (channels, height, width)."""
        composite = self._composite
        values, valid = self._read(window, size, resampling)
        if (composite.scaled or self._unit == "reflectance") and None not in self._scales:
            for channel, (scale, offset) in enumerate(self._scales):
                values[channel] = values[channel] * scale + offset
        if composite.formula:
            made = composite.formula(*values).reshape(composite.channels, *valid.shape[1:])
            values, valid = made, np.broadcast_to(valid.all(axis=0), made.shape).copy()
        valid &= ~np.isnan(values)
        return values, valid

    def _read(
        self, window: tuple[int, int, int, int], size: tuple[int, int], resampling: Resampling
    ) -> tuple[np.ndarray, np.ndarray]:
        """The bands of a window: values, float32, and validity, both (bands, height, width)."""
        place, shape = self.grid.in_file(window), (size[1], size[0])
        values = np.empty((len(self._bands), *shape), np.float32)
        valid = np.empty(values.shape, bool)
        # Bands of one file together: their samples often lie side by side, and would be decoded again for every band.
        files: dict[tuple[int, str], list[int]] = {}
        for channel, (dataset, index) in enumerate(self._bands):
            files.setdefault((id(dataset), dataset.dtypes[index - 1]), []).append(channel)
        try:
            for channels in files.values():
                dataset, indexes = self._bands[channels[0]][0], [self._bands[channel][1] for channel in channels]
                stored = dataset.read(indexes, window=place, out_shape=(len(indexes), *shape), resampling=resampling)
                if resampling == Resampling.cubic and window[2] > size[0] and np.isnan(stored).any():
                    # GDAL's cubic kernel passes NaN on, declared as nodata or not. Its average leaves them out.
                    average = Resampling.average
                    means = dataset.read(indexes, window=place, out_shape=stored.shape, resampling=average)
                    stored = np.where(np.isnan(stored), means, stored)
                for channel, index, plane in zip(channels, indexes, stored, strict=True):
                    values[channel] = self.grid.turn(plane)
                    valid[channel] = self.grid.turn(validity(dataset, index, plane, place))
        except (RasterioError, OSError) as error:
            raise RasterError(f"{self.name} cannot be read, it may be damaged or cut short: {reason(error)}.") from error
        return values, valid

    def close(self) -> None:
        """Closes the files that `open` opened. A dataset that was passed in stays open."""
        self._stack.close()

    def __enter__(self) -> "Raster":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def colour_of(fill: Fill) -> tuple[int, int, int]:
    """The colour, of values by band."""
    if not isinstance(fill, Mapping):
        return fill
    red, green, blue = (fill.get(name, FILL[0]) for name in COLOURS)
    return red, green, blue


def validity(dataset: DatasetReader, index: int, stored: np.ndarray, window: Any) -> np.ndarray:
    """Where the values read from a window, (height, width), are data: by nodata, mask band or alpha, and finite."""
    flags = dataset.mask_flag_enums[index - 1]
    finite = np.isfinite(stored) if stored.dtype.kind == "f" else np.ones(stored.shape, bool)
    if flags == [MaskFlags.all_valid]:
        return finite
    if flags == [MaskFlags.nodata]:  # a resampled value is nodata only where no pixel under it is valid
        marker = dataset.nodatavals[index - 1]
        return finite if np.isnan(marker) else finite & (stored != marker)
    return finite & (dataset.read_masks(index, window=window, out_shape=stored.shape, resampling=Resampling.average) > 0)


@contextmanager
def gdal() -> Iterator[None]:
    """Bounds GDAL's memory and waiting, without overriding what the user has set."""
    given: Mapping[str, Any] = {**os.environ, **(getenv() if hasenv() else {})}
    with warnings.catch_warnings(), rasterio.Env(**{key: value for key, value in GDAL_OPTIONS.items() if key not in given}):
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # the record says so
        yield


def is_georeferenced(name: str) -> bool:
    """Whether GDAL opens it and knows where it lies."""
    try:
        with gdal(), rasterio.open(name) as dataset:
            return dataset.crs is not None or bool(dataset.gcps[0]) or dataset.rpcs is not None
    except RasterioError:
        return False
