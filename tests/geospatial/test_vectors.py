"""Layers that are written: read back with pyogrio, with their record, whole or not at all."""

import json
import re
import shutil
import sqlite3
import subprocess
import xml.etree.ElementTree as ElementTree

import geopandas
import numpy as np
import pandas
import pyogrio
import pytest
import shapely
from tiny_assistants import perfect, rectangles
from tiny_rasters import NORTH_UP, write

from mfrsvlm.files.writing import WriteError
from mfrsvlm.geospatial import RasterError, read_record, write_layer
from mfrsvlm.geospatial.vectors import MARKER, OUTLINE, WRITERS


BOXES = [[5, 7, 25, 17], [40, 3, 44, 33], [60, 40, 80, 55]]


@pytest.fixture(scope="module")
def ships(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("rasters") / "scene.tif", rectangles(90, 61, BOXES))
    return perfect().detect(path, "ship", tile=32, overlap=8)


@pytest.mark.parametrize("ending", WRITERS)
def test_every_form_is_read_back(ships, ending, tmp_path):
    path = tmp_path / f"ships{ending}"
    write_layer(ships, path)
    assert read_record(path) == ships.attrs["record"]
    if ending == ".parquet":
        read = geopandas.read_parquet(path)
    else:
        read = pyogrio.read_dataframe(path, **({"layer": "answers"} if ending == ".gpkg" else {}))
    if ending == ".csv":
        read = geopandas.GeoDataFrame(
            read.drop(columns="geometry"), geometry=geopandas.GeoSeries.from_wkt(read["geometry"], crs=ships.crs)
        ).astype({"count": float})
    assert read["question"].tolist() == ships["question"].tolist() and read["tile"].tolist() == ships["tile"].tolist()
    assert {"question", "answer", "count", "score", "tile", "object"} <= set(read.columns)
    assert read["count"].tolist() == [1.0] * 3
    assert read.to_crs(ships.crs).geometry.hausdorff_distance(ships.geometry).max() < 0.02


DRIVERS = {".gpkg": "GPKG", ".geojson": "GeoJSON", ".csv": "CSV", ".parquet": "Parquet"}


@pytest.mark.parametrize("ending", WRITERS)
def test_ogrinfo_reads_every_form(ships, ending, tmp_path):
    """GDAL's own tool, of another build than pyogrio's."""
    if shutil.which("ogrinfo") is None:
        pytest.skip("ogrinfo of GDAL is not installed")
    if f"  {DRIVERS[ending]} -" not in subprocess.run(["ogrinfo", "--formats"], capture_output=True, text=True).stdout:
        pytest.skip(f"this GDAL was built without the driver {DRIVERS[ending]}")
    path = tmp_path / f"ships{ending}"
    write_layer(ships, path)
    command = ["ogrinfo", "-ro", "-so", str(path), "ships" if ending == ".csv" else "answers"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "Feature Count: 3" in result.stdout and "ERROR" not in result.stderr
    assert all(re.search(rf"^{name}: ", result.stdout, re.MULTILINE) for name in ("question", "answer", "score", "object"))
    if ending != ".csv":
        assert "Geometry: Polygon" in result.stdout
        assert f'ID["EPSG",{4326 if ending == ".geojson" else 32631}]]' in result.stdout


@pytest.mark.parametrize("ending", WRITERS)
def test_equal_layers_give_equal_files(ships, ending, tmp_path):
    for name in ("a", "b"):
        write_layer(ships, tmp_path / f"{name}{ending}")
    assert (tmp_path / f"a{ending}").read_bytes() == (tmp_path / f"b{ending}").read_bytes()


@pytest.mark.parametrize("ending", WRITERS)
def test_a_layer_without_features_is_written(tmp_path, ending):
    path = write(tmp_path / "empty.tif", rectangles(90, 61, np.zeros((0, 4))) + 1)
    nothing = perfect().detect(path, "ship")
    write_layer(nothing, tmp_path / f"nothing{ending}")
    assert read_record(tmp_path / f"nothing{ending}")["images"]["answered"] == 1
    if ending == ".gpkg":
        assert pyogrio.read_info(tmp_path / "nothing.gpkg", layer="answers")["features"] == 0


def test_geojson_is_that_of_rfc_7946(tmp_path):
    """WGS 84, counter-clockwise, divided at the antimeridian, without the member `crs`."""
    boxes = [shapely.box(166_000, 0, 166_050, 50), shapely.box(500_000, 0, 500_040, 40)]  # the first crosses it
    frame = geopandas.GeoDataFrame({"answer": ["a", "b"]}, geometry=boxes, crs="EPSG:32601")
    frame.attrs = {"record": {"model": "m"}}
    write_layer(frame, tmp_path / "a.geojson")
    content = json.loads((tmp_path / "a.geojson").read_text())
    assert content["type"] == "FeatureCollection" and "crs" not in content and content["record"] == {"model": "m"}
    shapes = [shapely.geometry.shape(feature["geometry"]) for feature in content["features"]]
    assert [shape.geom_type for shape in shapes] == ["MultiPolygon", "Polygon"]
    for part in [*shapes[0].geoms, shapes[1]]:
        west, south, east, north = part.bounds
        assert -180 <= west <= east <= 180 and east - west < 1 and -90 <= south <= north <= 90
        assert part.exterior.is_ccw
    nowhere = geopandas.GeoDataFrame({"answer": ["a"]}, geometry=boxes[:1])
    with pytest.raises(RasterError, match=r"has no CRS: write \.gpkg or \.csv"):
        write_layer(nowhere, tmp_path / "b.geojson")
    write_layer(nowhere, tmp_path / "b.gpkg")
    read = pyogrio.read_dataframe(tmp_path / "b.gpkg", layer="answers")
    assert read.geometry.geom_equals(nowhere.geometry).all()


@pytest.mark.parametrize("points", [False, True])
def test_geopackage_has_a_style_that_labels_it(ships, points, tmp_path):
    frame = ships.set_geometry(ships.centroid) if points else ships
    frame.attrs = ships.attrs
    write_layer(frame, tmp_path / "a.gpkg")
    with sqlite3.connect(tmp_path / "a.gpkg") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        (style,) = database.execute(
            "SELECT styleQML FROM layer_styles JOIN gpkg_geometry_columns ON f_table_name = table_name "
            "AND f_geometry_column = column_name WHERE useAsDefault"
        ).fetchone()
        assert {name for (name,) in database.execute("SELECT table_name FROM gpkg_contents")} == {"answers", "layer_styles"}
    database.close()
    root = ElementTree.fromstring(style)
    assert root.tag == "qgis" and root.get("labelsEnabled") == "1"
    assert [child.tag for child in root] == ["renderer-v2", "labeling"]
    assert root.find("labeling/settings/text-style").get("fieldName") == "object"
    (symbol,) = root.findall("renderer-v2/symbols/symbol")
    assert symbol.get("type") == ("marker" if points else "fill") and symbol.get("name") == "0"
    look = {option.get("name"): option.get("value") for option in symbol.findall("layer/Option[@type='Map']/Option")}
    assert look == (MARKER if points else OUTLINE)


def test_styles_lie_where_qgis_looks_for_them(ships, tmp_path):
    """Its table, and the query by which it finds the default style of a layer."""
    write_layer(ships, tmp_path / "a.gpkg")
    with sqlite3.connect(tmp_path / "a.gpkg") as database:
        columns = [(name, kind) for _, name, kind, *_ in database.execute("PRAGMA table_info(layer_styles)")]
        query = (
            "SELECT styleQML FROM layer_styles WHERE f_table_schema = '' AND f_table_name = 'answers' AND "
            "f_geometry_column = 'geom' ORDER BY CASE WHEN useAsDefault THEN 1 ELSE 2 END, update_time DESC LIMIT 1"
        )
        assert len(database.execute(query).fetchall()) == 1
    database.close()
    texts = ["f_table_catalog", "f_table_schema", "f_table_name", "f_geometry_column"]
    assert columns == [
        ("id", "INTEGER"),
        *[(name, "TEXT(256)") for name in texts],
        ("styleName", "TEXT(30)"),
        ("styleQML", "TEXT"),
        ("styleSLD", "TEXT"),
        ("useAsDefault", "BOOLEAN"),
        ("description", "TEXT"),
        ("owner", "TEXT(30)"),
        ("ui", "TEXT(30)"),
        ("update_time", "DATETIME"),
    ]


QGIS = """import sys
from qgis.core import QgsApplication, QgsVectorLayer
application = QgsApplication([], False)
application.initQgis()
layer = QgsVectorLayer(sys.argv[1] + "|layername=answers", "answers", "ogr")  # with its default style
(symbol,) = layer.renderer().symbol().symbolLayers()
label = layer.labeling().settings().fieldName
print(layer.featureCount(), layer.labelsEnabled(), label, symbol.layerType(), symbol.color().name())
"""


@pytest.mark.integration
@pytest.mark.parametrize("points", [False, True])
def test_qgis_draws_and_labels_the_layer(ships, points, tmp_path):
    python = shutil.which("python3", path="/usr/bin")  # QGIS is installed there, and not by pip
    if python is None or subprocess.run([python, "-c", "import qgis.core"], capture_output=True).returncode:
        pytest.skip("QGIS is not installed")
    frame = ships.set_geometry(ships.centroid) if points else ships
    frame.attrs = ships.attrs
    write_layer(frame, tmp_path / "a.gpkg")
    environment = {"QT_QPA_PLATFORM": "offscreen", "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    command = [python, "-c", QGIS, str(tmp_path / "a.gpkg")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    symbol = "SimpleMarker" if points else "SimpleLine"
    assert result.stdout.split() == ["3", "True", "object", symbol, "#ff7f00"], result.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.shp", r"must end in one of \.gpkg, \.geojson, \.csv, \.parquet"),
        ("lost/a.gpkg", "lost does not exist, so"),
        ("here.gpkg", "exists: name another file"),
    ],
)
def test_bad_outputs_are_named(ships, name, message, tmp_path):
    (tmp_path / "here.gpkg").write_text("mine")
    with pytest.raises((RasterError, WriteError), match=message):
        write_layer(ships, tmp_path / name)
    assert (tmp_path / "here.gpkg").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("ending", WRITERS)
def test_a_full_disk_leaves_nothing(ships, ending, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, f"No space left on device, so {path} was not written", str(path))

    monkeypatch.setattr("mfrsvlm.geospatial.vectors.write_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_layer(ships, tmp_path / f"a{ending}")
    assert not list(tmp_path.iterdir())


def test_answers_of_features_keep_the_layer(tmp_path):
    """Column by column, in its own CRS, and of several kinds of polygons."""
    path = write(tmp_path / "scene.tif", rectangles(90, 61, BOXES))
    left, top = NORTH_UP.c, NORTH_UP.f
    several = shapely.MultiPolygon([shapely.box(left + 80, top - 80, left + 90, top)])
    shapes = [shapely.box(left, top - 60, left + 60, top), several]
    parcels = geopandas.GeoDataFrame({"name": ["a", "b"]}, geometry=shapes, crs="EPSG:32631").to_crs("EPSG:3857")
    parcels.to_file(tmp_path / "parcels.gpkg")
    layer = perfect().query(path, "How many ships?", features=tmp_path / "parcels.gpkg")
    write_layer(layer, tmp_path / "answers.gpkg")
    read = pyogrio.read_dataframe(tmp_path / "answers.gpkg", layer="answers")
    assert read.crs == "EPSG:3857" and read["name"].tolist() == layer["name"].tolist() and len(read) == 2
    pandas.testing.assert_series_equal(read["count"], layer["count"], check_dtype=False)
