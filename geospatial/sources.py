"""From whatever names a raster to its bands: a path, a dataset, a DataArray, one file per band, a STAC item."""

import os
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader, MemoryFile
from rasterio.transform import Affine

from ..files.reading import shorten
from .bands import Label
from .errors import RasterError


COMPLEX = frozenset({"complex64", "complex128", "complex_int16", "complex_int32"})


@dataclass
class BandSource:
    """One band, perhaps of a file that is not yet open.

    Attributes:
        location: path, GDAL name, or the open dataset.
        index: its number in there, from one.
        label: what is said about it.
        scale, offset: from stored to physical numbers, if the source says so.
        nodata: value that stands for no data, if the source says another than the file.
    """

    location: str | DatasetReader
    index: int
    label: Label
    scale: float | None = None
    offset: float | None = None
    nodata: float | None = None


@dataclass
class Found:
    """The bands of a raster, its name for messages, and the file name that may tell its sensor."""

    shown: str
    file_name: str
    bands: list[BandSource]
    tags: dict[str, str] = field(default_factory=dict)


def find_bands(source: Any, nodata: float | None, stack: ExitStack) -> Found:
    """Finds the bands of a raster. A single file is opened; of one file per band, none is.

    Args:
        source: see `Raster.open`.
        nodata: value that stands for no data, against what the file says.
        stack: closes what is opened here.

    Raises:
        RasterError: it cannot be opened, or holds no bands.
        TypeError: it is nothing that names a raster.
    """
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        return bands_of(open_dataset(name, nodata, stack), name)
    if hasattr(source, "to_dict") and hasattr(source, "assets"):  # pystac
        source = source.to_dict()
    if isinstance(source, Mapping):
        return bands_of_item(source) if "assets" in source else bands_of_files(source)
    if hasattr(source, "dims") and hasattr(source, "values"):
        return bands_of_array(source, nodata, stack)
    if hasattr(source, "read_masks"):
        check_dataset(source, source.name)
        return bands_of(source if nodata is None else open_dataset(source.name, nodata, stack), source.name)
    raise TypeError(
        f"expected a path, a GDAL name, a rasterio dataset, a DataArray, {{band: path}} or a STAC item, "
        f"got {type(source).__name__}."
    )


def open_dataset(name: str, nodata: float | None, stack: ExitStack) -> DatasetReader:
    """Opens what GDAL opens, and rejects what holds no picture.

    Raises:
        RasterError: the message is one line.
    """
    check_path(name)
    try:
        dataset = stack.enter_context(rasterio.open(name))
        if dataset.driver == "PNG" and Path(name).is_file():
            check_png(name)
        # Through a VRT where GDAL has to know more than the file says, so that it resamples accordingly.
        options = vrt_options(dataset, name, nodata)
        if options:
            dataset = stack.enter_context(rasterio.open(f"vrt://{name}?{'&'.join(options)}"))
    except Exception as error:  # GDAL's own errors have no public class
        raise RasterError(f"cannot open raster {shorten(name)}: {reason(error)}.") from error
    check_dataset(dataset, name)
    return dataset


def check_png(path: str) -> None:
    """Raises ValueError if a PNG is damaged or truncated. GDAL reads such a file without an error, with random pixels."""
    with open(path, "rb") as file:
        file.seek(8)  # behind the signature
        kind = b""
        while kind != b"IEND":
            head = file.read(8)
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if len(head) < 8:
                raise ValueError("the PNG is truncated")
            found = zlib.crc32(kind)
            while length > 0 and (piece := file.read(min(length, 2**20))):
                found, length = zlib.crc32(piece, found), length - len(piece)
            if length or file.read(4) != found.to_bytes(4, "big"):
                raise ValueError(f"the part {kind!r} of the PNG is damaged")


def vrt_options(dataset: DatasetReader, name: str, nodata: float | None) -> list[str]:
    """What GDAL has to know beyond the file, so that it resamples accordingly."""
    options = []
    if nodata is not None:
        options.append(f"a_nodata={int(nodata) if nodata == nodata // 1 else float(nodata)}")
    elif {"float32", "float64"} & set(dataset.dtypes) and Path(name).is_file() and "?" not in name:
        if all(flags == [MaskFlags.all_valid] for flags in dataset.mask_flag_enums):
            options.append("a_nodata=nan")  # else an average with one NaN is NaN
    if dataset.count and dataset.colorinterp[0] == ColorInterp.palette:
        options.append("expand=rgb")
    return options


def check_path(name: str) -> None:
    """Says what GDAL would say less plainly."""
    path = Path(name)
    if path.is_file() and path.stat().st_size == 0:
        raise RasterError(f"cannot open raster {shorten(name)}: the file is empty.")
    if path.is_dir():
        try:
            rasterio.open(name).close()  # some formats are folders
        except RasterioError as error:
            raise RasterError(f"{shorten(name)} is a folder that GDAL opens as no raster: pass the file in it.") from error


def reason(error: BaseException) -> str:
    """What GDAL said, in one line."""
    inner = error.__cause__ or error.__context__ or error
    return " ".join(str(inner).split()).rstrip(".") or type(inner).__name__


def check_dataset(dataset: DatasetReader, name: str) -> None:
    """Rejects what opens and yet cannot be shown or placed.

    Raises:
        RasterError: it holds subdatasets only, complex samples, or ground control points in no CRS.
    """
    shown = shorten(name)
    if not dataset.count:
        inner = dataset.subdatasets
        listed = ", ".join(inner[:3]) + (", ..." if len(inner) > 3 else "")
        holds = f"{len(inner)} subdatasets and no bands of its own. Open one of them: {listed}" if inner else "no bands"
        raise RasterError(f"{shown} holds {holds}.")
    if COMPLEX & set(dataset.dtypes):
        raise RasterError(
            f"{shown} holds complex samples. Open their amplitude as DERIVED_SUBDATASET:AMPLITUDE:{name}, or its logarithm, "
            f"a twentieth of its dB, as DERIVED_SUBDATASET:LOGAMPLITUDE:{name}."
        )
    points, crs = dataset.gcps
    if points and crs is None and dataset.crs is None:
        raise RasterError(
            f"{shown} has {len(points)} ground control points that name no CRS. "
            f"Write it into a VRT: gdal_translate -of VRT -a_srs EPSG:... {name} OUT.vrt."
        )


def bands_of(dataset: DatasetReader, name: str) -> Found:
    """The bands of an open dataset."""
    bands = []
    for index in dataset.indexes:
        label = Label(dataset.colorinterp[index - 1].name, dataset.descriptions[index - 1] or None)
        scale, offset = dataset.scales[index - 1], dataset.offsets[index - 1]
        known = (scale, offset) != (1.0, 0.0)  # what GDAL says of files without
        bands.append(BandSource(dataset, index, label, scale if known else None, offset if known else None))
    return Found(shorten(name), name, bands, dataset.tags())


def bands_of_files(files: Mapping[Any, Any]) -> Found:
    """One file per band: `{"red": "B04.jp2", ...}`."""
    if not files:
        raise RasterError("no files were given: pass {band: path}.")
    bands = [BandSource(os.fspath(path), 1, Label(description=str(name))) for name, path in files.items()]
    first = str(bands[0].location)
    return Found(shorten(", ".join(str(band.location) for band in bands)), first, bands)


def bands_of_item(item: Mapping[str, Any]) -> Found:
    """The bands in the assets of a STAC item, of versions 1.0 and 1.1."""
    bands, seen = [], set()
    for key, asset in item["assets"].items():
        described = asset.get("bands") or asset.get("eo:bands") or []
        numbers = asset.get("raster:bands") or []
        if len(described) != 1 or "overview" in asset.get("roles", ()):  # pictures of several bands repeat the others
            continue
        band = {**asset, **(numbers[0] if numbers else {}), **described[0]}
        name = band.get("eo:common_name") or band.get("common_name") or band.get("name") or key
        if name in seen:
            continue
        seen.add(name)
        # Statistics of STAC write NaN as text.
        nodata = None if band.get("nodata") is None else float(band["nodata"])
        scale, offset = (band.get(f"raster:{word}", band.get(word)) for word in ("scale", "offset"))
        bands.append(BandSource(asset["href"], 1, Label(description=name), scale, offset, nodata))
    if not bands:
        raise RasterError(f"STAC item {shorten(item.get('id'))} has no asset that names its one band.")
    return Found(f"STAC item {shorten(item.get('id'))}", str(item.get("id", "")), bands)


def bands_of_array(array: Any, nodata: float | None, stack: ExitStack) -> Found:
    """The bands of an xarray DataArray, (band, y, x) or (y, x), with its CRS and transform where rioxarray knows them."""
    values = np.asarray(array.values)
    if values.ndim not in (2, 3):
        raise RasterError(f"a DataArray of dimensions {tuple(array.dims)} is no raster: it takes (band, y, x) or (y, x).")
    values = values[None] if values.ndim == 2 else values
    if values.dtype.kind not in "uif" or values.dtype.itemsize > 8 or not values.size:
        raise RasterError(f"a DataArray of {values.dtype} and shape {values.shape} cannot be shown.")
    rio = getattr(array, "rio", None)
    crs = getattr(rio, "crs", None)
    transform = rio.transform() if rio is not None else _transform_of(array)
    nodata = getattr(rio, "nodata", None) if nodata is None else nodata
    if nodata is None and values.dtype.kind == "f":
        nodata = np.nan
    count, height, width = values.shape
    memory = stack.enter_context(MemoryFile())
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": values.dtype, "nodata": nodata}
    with memory.open(**profile, crs=crs, transform=transform) as dataset:
        dataset.write(values)
    found = bands_of(stack.enter_context(memory.open()), "the DataArray")
    names = getattr(array, "attrs", {}).get("long_name", ())
    if "band" in getattr(array, "coords", {}):
        names = np.atleast_1d(np.asarray(array.coords["band"])).tolist()
    for index, band in enumerate(found.bands):
        named = len(names) == count and isinstance(names[index], str)
        # GDAL calls the first bands of a new TIFF grey, or red, green and blue, by their count alone.
        band.label = Label(description=names[index] if named else None)
    return Found("the DataArray", "", found.bands)


def _transform_of(array: Any) -> Affine | None:
    coords = getattr(array, "coords", {})
    if "x" not in coords or "y" not in coords:
        return None
    x, y = (np.asarray(coords[name], dtype=float) for name in ("x", "y"))
    if min(len(x), len(y)) < 2:
        return None
    width, height = (x[-1] - x[0]) / (len(x) - 1), (y[-1] - y[0]) / (len(y) - 1)
    return Affine(width, 0, x[0] - width / 2, 0, height, y[0] - height / 2)
