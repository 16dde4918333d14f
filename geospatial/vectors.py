"""Writes answers as a vector layer: GeoPackage, GeoJSON, CSV or Parquet, with the record of the run.

The record is `frame.attrs["record"]`. A GeoPackage holds it among the metadata of its layer, a GeoJSON as the member
`record`, a Parquet file under that key of its schema. For CSV, it is a file beside it that ends in `.record.json`.
"""

import io
import json
import os
import sqlite3
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import geopandas
import pandas
import pyogrio

from ..files.reading import parse_json, read_json, shorten
from ..files.writing import check_file, write_file
from .errors import RasterError


LAYER = "answers"
# In the file instead of the time of writing, so that equal answers give equal files.
DATE = "2000-01-01T00:00:00.000Z"


def check_output(path: str | os.PathLike[str]) -> Path:
    """The path of a file that can be written.

    Raises:
        RasterError: its ending is unknown, or it exists.
        WriteError: nothing can be written there.
    """
    path = Path(path)
    if path.suffix.lower() not in WRITERS:
        raise RasterError(f"output {shorten(str(path))} must end in one of {', '.join(WRITERS)}.")
    if path.exists():
        raise RasterError(f"output {shorten(str(path))} exists: name another file, or delete it.")
    check_file(path)
    return path


def combine_layers(frames: Sequence[geopandas.GeoDataFrame]) -> geopandas.GeoDataFrame:
    """One layer of several results of `GeoAssistant`, in the CRS of the first, with the records of all.

    Raises:
        RasterError: some have a CRS and some have none.
    """
    first = frames[0]
    if len(frames) == 1:
        return first
    if any((frame.crs is None) != (first.crs is None) for frame in frames):
        raise RasterError("some of the rasters have a CRS and some have none: ask about them one by one.")
    plain = [_plain(frame if frame.crs == first.crs else frame.to_crs(first.crs)) for frame in frames]
    whole = pandas.concat(plain, ignore_index=True)
    whole.attrs = {
        "record": {"runs": [frame.attrs.get("record", {}) for frame in frames]},
        "label": first.attrs.get("label", "answer"),
    }
    return whole


def write_layer(frame: geopandas.GeoDataFrame, path: str | os.PathLike[str]) -> None:
    """Writes a result of `GeoAssistant` in the form that its ending names: .gpkg, .geojson, .csv or .parquet.

    The file appears when it is complete. A GeoPackage has a style, by which QGIS labels it. GeoJSON is that of RFC 7946:
    WGS 84, counter-clockwise, divided at the antimeridian.

    Raises:
        RasterError: see `check_output`; or the form cannot hold the layer.
        OSError: it cannot be written, and is not.
    """
    path = check_output(path)
    WRITERS[path.suffix.lower()](frame, path)


def _write_geopackage(frame: geopandas.GeoDataFrame, path: Path) -> None:
    metadata = {"record": _record(frame)}
    content = _to_bytes(frame, "GPKG", layer_metadata=metadata, layer=LAYER)
    with sqlite3.connect(":memory:") as database:
        database.deserialize(content)
        _add_style(database, frame)
        database.commit()
        content = database.serialize()
    database.close()
    write_file(path, content)


def _write_geojson(frame: geopandas.GeoDataFrame, path: Path) -> None:
    if frame.crs is None:
        raise RasterError("GeoJSON needs places on the Earth, and the raster has no CRS: write .gpkg or .csv.")
    content = _to_bytes(frame, "GeoJSON", layer=LAYER, RFC7946="YES").decode()
    head = '"type": "FeatureCollection",'
    write_file(path, content.replace(head, f'{head}\n"record": {_record(frame)},', 1))


def _write_csv(frame: geopandas.GeoDataFrame, path: Path) -> None:
    table = pandas.DataFrame(frame.drop(columns=frame.geometry.name)).assign(geometry=frame.geometry.to_wkt())
    write_file(path.with_suffix(".record.json"), json.dumps(frame.attrs.get("record", {}), indent=1) + "\n")
    write_file(path, table.to_csv(index=False))


def _write_parquet(frame: geopandas.GeoDataFrame, path: Path) -> None:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise RasterError("Parquet needs pyarrow: pip install pyarrow") from error
    buffer = io.BytesIO()
    _plain(frame).to_parquet(buffer, index=False)
    buffer.seek(0)
    table = parquet.read_table(buffer)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), b"record": _record(frame).encode()})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    write_file(path, buffer.getvalue())


WRITERS: dict[str, Callable[[geopandas.GeoDataFrame, Path], None]] = {
    ".gpkg": _write_geopackage,
    ".geojson": _write_geojson,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The record of the run in a file that `write_layer` has written."""
    path = Path(path)
    ending = path.suffix.lower()
    if ending == ".gpkg":
        text = (pyogrio.read_info(path, layer=LAYER)["layer_metadata"] or {}).get("record", "{}")
    elif ending == ".geojson":
        return dict(read_json(path).get("record", {}))
    elif ending == ".csv":
        return dict(read_json(path.with_suffix(".record.json")))
    else:
        from pyarrow import parquet

        text = parquet.read_schema(path).metadata.get(b"record", b"{}").decode()
    return dict(parse_json(text))


def _record(frame: geopandas.GeoDataFrame) -> str:
    return json.dumps(frame.attrs.get("record", {}))


def _plain(frame: geopandas.GeoDataFrame) -> geopandas.GeoDataFrame:
    """The frame without attributes, which some writers would copy into the file a second time."""
    frame = frame.copy()
    frame.attrs = {}
    return frame


def _to_bytes(frame: geopandas.GeoDataFrame, driver: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    # An empty layer has no shapes that would tell their kind.
    kind = {"geometry_type": "Polygon"} if not len(frame) else {}
    with fixed_date(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'crs' was not provided")  # pixels have none
        pyogrio.write_dataframe(_plain(frame), buffer, driver=driver, **kind, **options)
    return buffer.getvalue()


@contextmanager
def fixed_date() -> Iterator[None]:
    before = pyogrio.get_gdal_config_option("OGR_CURRENT_DATE")
    pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": DATE})
    try:
        yield
    finally:
        pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": before})


# The table that QGIS looks for in a GeoPackage.
STYLES = """CREATE TABLE layer_styles (id INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL, f_table_catalog TEXT(256),
f_table_schema TEXT(256), f_table_name TEXT(256), f_geometry_column TEXT(256), styleName TEXT(30), styleQML TEXT,
styleSLD TEXT, useAsDefault BOOLEAN, description TEXT, owner TEXT(30), ui TEXT(30), update_time DATETIME)"""
STYLE = """<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>
<qgis version="3.28.0" styleCategories="Symbology|Labeling" labelsEnabled="1">
 <renderer-v2 type="singleSymbol" symbollevels="0" enableorderby="0" forceraster="0">
  <symbols><symbol type="{kind}" name="0" alpha="1" clip_to_extent="1" force_rhr="0">
   <layer class="{symbol}" enabled="1" locked="0" pass="0"><Option type="Map">
{options}
   </Option></layer>
  </symbol></symbols>
 </renderer-v2>
 <labeling type="simple"><settings calloutType="simple">
  <text-style fieldName={label} isExpression="0" fontSize="9" textColor="0,0,0,255" textOpacity="1">
   <text-buffer bufferDraw="1" bufferSize="1" bufferColor="255,255,255,255" bufferOpacity="1"/>
  </text-style>
 </settings></labeling>
</qgis>
"""
OUTLINE = {"line_color": "255,127,0,255", "line_width": "0.5", "line_style": "solid", "line_width_unit": "MM"}
MARKER = {"name": "circle", "color": "255,127,0,255", "size": "2.5", "size_unit": "MM", "outline_color": "0,0,0,255"}


def _add_style(database: sqlite3.Connection, frame: geopandas.GeoDataFrame) -> None:
    points = bool(len(frame)) and set(frame.geom_type.dropna()) == {"Point"}
    kind, symbol, look = ("marker", "SimpleMarker", MARKER) if points else ("fill", "SimpleLine", OUTLINE)
    options = "\n".join(f'    <Option type="QString" name="{name}" value="{value}"/>' for name, value in look.items())
    label = quoteattr(frame.attrs.get("label", "answer"))
    style = STYLE.format(kind=kind, symbol=symbol, options=options, label=label)
    database.execute(STYLES)
    database.execute(
        "INSERT INTO gpkg_contents (table_name, data_type, identifier, description, last_change, srs_id) "
        "VALUES ('layer_styles', 'attributes', 'layer_styles', '', ?, 0)",
        (DATE,),
    )
    column = database.execute("SELECT column_name FROM gpkg_geometry_columns").fetchone()[0]
    database.execute(
        "INSERT INTO layer_styles (f_table_catalog, f_table_schema, f_table_name, f_geometry_column, styleName, styleQML, "
        "styleSLD, useAsDefault, description, owner, update_time) VALUES ('', '', ?, ?, ?, ?, '', 1, '', '', ?)",
        (LAYER, column, LAYER, style, DATE),
    )
