"""Answers and boxes on the map: with a model without mistakes, with the demo, and against rasterio, shapely and pyproj."""

import json
import warnings

import geopandas
import hypothesis.strategies as st
import numpy as np
import pyproj
import pytest
import rasterio
import rasterio.shutil
import rasterio.vrt
import shapely
from demo_scene import BUILDING
from hypothesis import given, settings
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.io import MemoryFile
from rasterio.rpc import RPC
from rasterio.transform import Affine, AffineTransformer
from tiny_assistants import FORM, PerfectAnswerer, perfect, rectangles
from tiny_peers import tiny_llava, tiny_qwen2_vl
from tiny_rasters import CRS, NORTH_UP, pixels, write

from mfrsvlm.demo import MODEL, SCENE
from mfrsvlm.geospatial import GeoAssistant, Raster, RasterError, RasterWarning
from mfrsvlm.geospatial.grid import Grid
from mfrsvlm.scenes import draw, plan_scene, scene_seed


BOXES = np.array([[5, 7, 25, 17], [40, 3, 44, 33], [100, 60, 260, 72], [255, 10, 290, 40], [10, 80, 13, 83]])
SIZE = (300, 100)
TRANSFORMS = {
    "north up": NORTH_UP,
    "south up": Affine(2, 0, 500_000, 0, 2, 4_000_000),
    "rotated": Affine.translation(500_000, 4_000_000) @ Affine.rotation(35) @ Affine.scale(2, -2),
    "sheared": Affine(2, 0.7, 500_000, 0.3, -1.5, 4_000_000),
    "flat": Affine(0.5, 0, 500_000, 0, -4, 4_000_000),
}


def truth_on_map(transform, boxes=BOXES):
    """Polygons of boxes, by the corners of the pixels; rows of the file, as rasterio has them."""
    transformer = AffineTransformer(transform)
    polygons = []
    for left, top, right, bottom in boxes:
        x, y = transformer.xy([top, top, bottom, bottom], [left, right, right, left], offset="ul")
        polygons.append(shapely.Polygon(zip(x, y, strict=True)))
    return polygons


def same_shapes(found, expected, tolerance):
    """Each expected polygon has one found polygon whose corners lie within the tolerance, and there are no others."""
    assert len(found) == len(expected)
    left = list(found)
    for polygon in expected:
        nearest = min(left, key=lambda shape: shape.hausdorff_distance(polygon))
        assert nearest.hausdorff_distance(polygon) <= tolerance
        assert len(nearest.exterior.coords) == 5
        left.remove(nearest)


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_boxes_lie_where_the_objects_are(kind, tmp_path):
    """Half a pixel at most; in fact a thousandth. Objects on seams are whole, also one longer than a tile."""
    transform = TRANSFORMS[kind]
    path = write(tmp_path / "scene.tif", rectangles(*SIZE, BOXES), transform=transform)
    frame = perfect().detect(path, "ship", tile=64, overlap=16)
    assert frame.crs == CRS and set(frame["object"]) == {"ship"} and (frame["count"] == 1).all()
    same_shapes(frame.geometry, truth_on_map(transform), 0.01)
    points = perfect().point(path, "ship", tile=64, overlap=16)
    assert set(points.geom_type) == {"Point"} and points.distance(frame.centroid).max() < 1e-6
    assert points.crs == frame.crs and points.attrs["record"] == frame.attrs["record"] | {"task": "point"}


numbers = st.floats(-20, 20)


@given(numbers, numbers, numbers, numbers, st.data())
@settings(max_examples=60, deadline=None)
def test_any_affine_leads_to_the_map_and_back(a, b, d, e, data):
    transform = Affine(a, b, 400_000, d, e, 5_000_000)
    if abs(transform.determinant) < 1e-3:
        return
    with MemoryFile() as memory:
        shape = {"width": 70, "height": 50, "count": 1, "dtype": "uint8"}
        with memory.open(driver="GTiff", transform=transform, crs=CRS, **shape) as dataset:
            dataset.write(np.ones((1, 50, 70), np.uint8))
        with memory.open() as dataset:
            grid = Grid.of(dataset)
    points = np.array([[data.draw(st.floats(0, 70)), data.draw(st.floats(0, 50))] for _ in range(3)])
    assert np.abs(grid.to_pixels(grid.to_map(points)) - points).max() <= 1e-3
    rows, columns = grid.flipped
    stored = np.abs(points - np.array([70 * columns, 50 * rows]))  # in the file's own rows and columns
    x, y = AffineTransformer(transform).xy(stored[:, 1], stored[:, 0], offset="ul")
    np.testing.assert_allclose(grid.to_map(points), np.stack([x, y], axis=1), rtol=0, atol=1e-6)


@given(numbers, numbers, numbers, numbers, st.data())
@settings(max_examples=60, deadline=None)
def test_any_ground_control_points_lead_to_the_map_and_back(a, b, d, e, data):
    """Half a pixel at most, on a grid of points that some affine has placed."""
    transform = Affine(a, b, 400_000, d, e, 5_000_000)
    if abs(transform.determinant) < 0.1:
        return
    places = [(row, column) for row in (0, 25, 50) for column in (0, 35, 70)]
    points = tuple(GroundControlPoint(row, column, *(transform @ (column, row))) for row, column in places)
    grid = Grid(70, 50, Affine.identity(), rasterio.crs.CRS.from_string(CRS), points, None, (False, False))
    pixels = np.array([[data.draw(st.floats(0, 70)), data.draw(st.floats(0, 50))] for _ in range(3)])
    assert np.abs(grid.to_pixels(grid.to_map(pixels)) - pixels).max() <= 0.5
    assert np.abs(grid.to_pixels([transform @ pixel for pixel in pixels.tolist()]) - pixels).max() <= 0.5


def test_boxes_by_ground_control_points(tmp_path):
    transform = TRANSFORMS["rotated"]
    places = [(row, column) for row in (0, 50, 100) for column in (0, 150, 300)]
    points = [GroundControlPoint(row, column, *(transform @ (column, row))) for row, column in places]
    path = write(
        tmp_path / "gcps.tif", rectangles(*SIZE, BOXES), transform=None, crs=rasterio.crs.CRS.from_string(CRS), gcps=points
    )
    frame = perfect().detect(path, "ship", tile=64, overlap=16)
    assert frame.crs == CRS and frame.attrs["record"]["rasters"][0]["georeferencing"] == "gcps"
    same_shapes(frame.geometry, truth_on_map(transform), 1.0)  # half a pixel
    with Raster.open(path) as raster:
        corners = np.array([[0, 0], [300, 0], [300, 100], [17.25, 33.5]])
        assert np.abs(raster.grid.to_pixels(raster.grid.to_map(corners)) - corners).max() <= 0.5


def test_boxes_by_polynomials(tmp_path):
    """One degree wide, one high, from (10, 50) in the upper left corner; heights do not matter here."""
    one = [1.0] + [0.0] * 19
    x, y = [0.0, 1.0] + [0.0] * 18, [0.0, 0.0, -1.0] + [0.0] * 17
    rpc = RPC(
        height_off=100,
        height_scale=1,
        lat_off=49.5,
        lat_scale=0.5,
        line_den_coeff=one,
        line_num_coeff=y,
        line_off=49.5,
        line_scale=50,
        long_off=10.5,
        long_scale=0.5,
        samp_den_coeff=one,
        samp_num_coeff=x,
        samp_off=149.5,
        samp_scale=150,
    )
    path = write(tmp_path / "rpc.tif", rectangles(*SIZE, BOXES), transform=None, crs=None, rpcs=rpc)
    frame = perfect().detect(path, "ship", tile=64, overlap=16)
    assert frame.crs == "EPSG:4326" and any("mean height" in note for note in frame.attrs["record"]["notes"])
    same_shapes(frame.geometry, truth_on_map(Affine(1 / 300, 0, 10, 0, -1 / 100, 50)), 0.5 / 300)
    area = (10, 49.6, 10.1, 50)  # columns 0 to 30, rows 0 to 40: the first box
    assert len(perfect().detect(path, "ship", area=area, tile=64)) == 1
    with Raster.open(path) as raster:
        corners = np.array([[0, 0], [300, 0], [300, 100], [17.25, 33.5]])
        assert np.abs(raster.grid.to_pixels(raster.grid.to_map(corners)) - corners).max() <= 0.5


def test_resolution_is_metres_on_the_ground(tmp_path):
    """Degrees, and the metres of Web Mercator, which are shorter on the ground the farther north."""
    path = write(tmp_path / "degrees.tif", pixels(), transform=Affine(1e-4, 0, 10, 0, -1e-4, 60), crs="EPSG:4326")
    with Raster.open(path) as raster:
        width, height = raster.grid.pixel_size()
    middle = 60 - 61e-4 / 2
    geod = pyproj.Geod(ellps="WGS84")
    assert width == pytest.approx(geod.inv(10, middle, 10 + 1e-4, middle)[2], rel=1e-6)
    assert height == pytest.approx(geod.inv(10, middle - 5e-5, 10, middle + 5e-5)[2], rel=1e-6)
    path = write(tmp_path / "web.tif", pixels(), transform=Affine(1, 0, 1e6, 0, -1, 8_399_737), crs="EPSG:3857")
    with Raster.open(path) as raster:
        assert raster.grid.pixel_size() == pytest.approx((0.5, 0.5), rel=5e-3)
    answerer = PerfectAnswerer(blurred=True)
    path = write(tmp_path / "utm.tif", rectangles(*SIZE, BOXES[2:3]))  # pixels of 2 m
    frame = perfect(answerer=answerer).detect(path, "ship", tile=64, overlap=16, resolution=1)
    assert {image.size for (image,) in answerer.images} == {(64, 64)}
    assert {tuple(map(int, tile.split(",")))[2:] for tile in frame["tile"]} == {(32, 32)}
    same_shapes(frame.geometry, truth_on_map(NORTH_UP, BOXES[2:3]), 1.0)


def test_a_resolution_beside_the_training_images_is_reported(tmp_path):
    path = write(tmp_path / "scene.tif", rectangles(*SIZE, BOXES))
    with pytest.warns(RasterWarning, match=r"shown at 2 m a pixel, .* 0.2 to 1 m"):
        frame = perfect(ground_resolution=(0.2, 1)).count(path, "ships")
    assert any("0.2 to 1 m" in note for note in frame.attrs["record"]["notes"])
    assert frame.attrs["record"]["grid"]["pixel_metres"] == pytest.approx([2, 2], rel=1e-3)
    large = np.broadcast_to(np.uint8(7), (3, 3000, 300))  # as one image it is reduced
    with pytest.warns(RasterWarning, match=r"shown at 2\.93 m a pixel"):
        perfect(ground_resolution=(1.5, 2.1)).query(write(tmp_path / "large.tif", large), "Why?")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RasterWarning)
        perfect(ground_resolution=(0.2, 1)).count(path, "ships", resolution=1)


def test_counts_come_from_two_partitions(tmp_path):
    boxes = [[x, y, x + 6, y + 6] for x in range(10, 500, 32) for y in range(10, 200, 32)]
    path = write(tmp_path / "scene.tif", rectangles(512, 200, boxes), nodata=255)
    frame = perfect().count(path, ["ships", "cars"], tile=64)
    assert len(frame) == 2 * 8 * 4 and frame.attrs["label"] == "count"
    ships = frame[frame["object"] == "ships"]
    assert ships["count"].sum() == len(boxes) == frame.attrs["totals"]["ships"]["total"]
    assert frame.attrs["totals"]["ships"].keys() == {"total", "unanswered", "shifted_total", "shifted_unanswered"}
    assert frame.attrs["record"]["totals"] == frame.attrs["totals"]
    once = perfect().count(path, ["ships", "cars"], tile=64, spread=False)
    assert once.equals(frame) and once.attrs["totals"]["ships"].keys() == {"total", "unanswered"}
    outline = shapely.union_all(ships.geometry)
    assert outline.equals(shapely.box(500_000, 4_000_000 - 400, 501_024, 4_000_000)) and ships.area.sum() == outline.area


def test_every_tile_is_encoded_once_for_all_questions(tmp_path):
    answerer = PerfectAnswerer()
    frame = perfect(answerer=answerer).query(write(tmp_path / "a.tif", pixels()), ["One?", "Two?", "Three?"], tile=32)
    assert len(answerer.images) == 2 * 3 and len(answerer.prompts) == len(frame) == 18


def test_tiles_without_data_are_counted_and_not_asked_about(tmp_path):
    values = rectangles(*SIZE, BOXES) + 1
    values[:, :, :150] = 0
    answerer = PerfectAnswerer()
    frame = perfect(answerer=answerer).query(write(tmp_path / "a.tif", values, nodata=0), "Why?", tile=50)
    assert len(frame) == len(answerer.images) == 6
    assert frame.attrs["record"]["images"] == {"answered": 6, "without_data": 6, "truncated": 0, "failed": []}


def test_area_limits_what_is_seen(tmp_path):
    """Counts see black beyond the area. Boxes are kept whole if their centre lies in it."""
    path = write(tmp_path / "scene.tif", rectangles(*SIZE, BOXES))
    bounds = (500_000, 4_000_000 - 2 * 50, 500_000 + 2 * 41, 4_000_000)  # columns 0 to 41, rows 0 to 50
    answerer = PerfectAnswerer()
    frame = perfect(answerer=answerer).count(path, "ships", area=bounds)
    assert frame.attrs["totals"]["ships"]["total"] == 2 and answerer.images[0][0].size == (41, 50)
    for area in (bounds, ",".join(map(str, bounds)), shapely.box(*bounds)):
        boxes = perfect().detect(path, "ship", area=area, tile=32, overlap=8)
        same_shapes(boxes.geometry, truth_on_map(NORTH_UP, BOXES[:1]), 0.01)
    triangle = shapely.Polygon([(500_000, 4_000_000), (500_600, 4_000_000), (500_000, 4_000_000 - 200)])
    layer = geopandas.GeoDataFrame(geometry=[triangle], crs=CRS).to_crs("EPSG:4326")  # in another CRS
    layer.to_file(tmp_path / "area.gpkg")
    answerer = PerfectAnswerer()
    found = perfect(answerer=answerer).detect(path, "ship", area=tmp_path / "area.gpkg", tile=32, overlap=8)
    centres = np.array([(left + right, top + bottom) for left, top, right, bottom in BOXES]) / 2
    inside = [shapely.Point(500_000 + 2 * x, 4_000_000 - 2 * y).within(triangle) for x, y in centres]
    assert len(found) == sum(inside) and 0 < sum(inside) < len(BOXES)
    assert len(answerer.images) < 50  # tiles beyond the hypotenuse are not read


def test_a_question_about_every_polygon(tmp_path):
    path = write(tmp_path / "scene.tif", rectangles(*SIZE, BOXES))
    parcels = geopandas.GeoDataFrame(
        {"owner": ["A", "B", "C", "D"], "answer": [1, 2, 3, 4]},
        geometry=[*truth_on_map(NORTH_UP, [[0, 0, 50, 50], [240, 0, 300, 50], [-90, 0, -80, 10]]), None],
        crs=CRS,
    ).to_crs("EPSG:4326")
    answerer = PerfectAnswerer()
    layer = perfect(answerer=answerer).query(path, "How many ships?", features=parcels)
    assert layer.crs == "EPSG:4326" and layer.geometry.equals(parcels.geometry) and list(layer["owner"]) == list("ABCD")
    assert list(layer["answer"]) == [1, 2, 3, 4]  # a column of the layer stays
    assert layer["answer_new"].dropna().tolist() == ["There are 2.", "There are 1."]
    assert layer["error"].fillna("").tolist() == ["", "", "outside of the raster", "outside of the raster"]
    (image,) = answerer.images[0]
    assert abs(image.width - 50) <= 2 and abs(image.height - 50) <= 2
    several = perfect().query(path, ["How many?", "What?"], features=parcels)
    assert {"answer_1", "answer_2", "question_2", "count_1", "score_2"} <= set(several.columns)


def test_pixels_around_a_polygon_are_not_shown(tmp_path):
    answerer = PerfectAnswerer()
    path = write(tmp_path / "scene.tif", pixels(height=100, width=300))
    shape = shapely.Polygon([(500_000, 4_000_000), (500_200, 4_000_000), (500_000, 3_999_900)])
    perfect(answerer=answerer).query(path, "Why?", features=geopandas.GeoDataFrame(geometry=[shape], crs=CRS))
    shown = (np.asarray(answerer.images[0][0]) != 127).any(-1)
    assert shown.shape == (50, 100) and shown[0, 0] and not shown[-1, -1] and shown.mean() == pytest.approx(0.5, abs=0.03)


def test_half_tiles_have_the_padding_colour_of_the_model(tmp_path):
    """On the shifted partition, and where a raster holds no data."""
    answerer = PerfectAnswerer()
    values = np.full((3, 64, 128), 200, np.uint8)
    values[:, :10] = 0
    path = write(tmp_path / "scene.tif", values, nodata=0)
    perfect(answerer=answerer, fill=(10, 20, 30)).count(path, "ships", tile=64)
    images = [np.asarray(image) for (image,) in answerer.images]
    assert [image.shape for image in images] == [(64, 64, 3)] * 5
    for image in images:
        assert (image[:10] == (10, 20, 30)).all()
    assert (images[2][10:, :32] == 200).all() and (images[2][:, 32:] == (10, 20, 30)).all()


def test_a_failing_tile_is_reported(tmp_path):
    path = write(tmp_path / "scene.tif", rectangles(*SIZE, BOXES))
    answerer = PerfectAnswerer(fails=lambda image: np.asarray(image)[7, 5].any())  # the tile with the first box
    with pytest.warns(RasterWarning, match=r"1 of 8 images of .* failed\. The first: RuntimeError: out of memory"):
        frame = perfect(answerer=answerer).query(path, "How many ships?", tile=80)
    assert frame["error"].fillna("").tolist() == ["RuntimeError: out of memory", *[""] * 7]
    assert frame["answer"].isna().tolist() == [True] + [False] * 7
    with pytest.warns(RasterWarning):
        assert perfect(answerer=answerer).count(path, "ships", tile=80).attrs["totals"]["ships"]["unanswered"] == 1
    assert frame.attrs["record"]["images"]["failed"] == [{"tile": "0,0,75,50", "reason": "RuntimeError: out of memory"}]
    with pytest.raises(RasterError, match=r"none of 8 images could be answered\. The first: RuntimeError: out of memory"):
        perfect(answerer=PerfectAnswerer(fails=lambda image: True)).count(path, "ships", tile=80)


def test_a_damaged_tile_is_reported(tmp_path):
    """The file is truncated behind its first rows."""
    values = pixels(height=400, width=64)
    path = tmp_path / "damaged.tif"
    write(path, values, blockysize=64)
    path.write_bytes(path.read_bytes()[: -64 * 64 * 3])
    with pytest.warns(RasterWarning, match="may be damaged"):
        frame = perfect().query(str(path), "Why?", tile=64)
    assert frame["error"].notna().sum() >= 1 and frame["error"].isna().sum() >= 4


def test_a_checkpoint_continues_with_the_same_settings_only(tmp_path):
    path, log = write(tmp_path / "scene.tif", rectangles(*SIZE, BOXES)), tmp_path / "run.jsonl"
    whole = perfect().detect(path, "ship", tile=32, overlap=8)
    perfect().detect(path, "ship", tile=32, overlap=8, checkpoint=log)
    lines = log.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + -(-13 * 4 // 8)
    log.write_bytes(b"".join(lines[:3]) + lines[3][: len(lines[3]) // 2])  # killed while it wrote the third group
    answerer = PerfectAnswerer()
    resumed = perfect(answerer=answerer).detect(path, "ship", tile=32, overlap=8, checkpoint=log)
    assert len(answerer.images) == 13 * 4 - 2 * 8 and log.read_bytes() == b"".join(lines)
    assert resumed.equals(whole) and resumed.attrs == whole.attrs
    with pytest.raises(RasterError, match="belongs to a run with grid = "):
        perfect().detect(path, "ship", tile=32, overlap=4, checkpoint=log)
    write(tmp_path / "scene.tif", rectangles(*SIZE, BOXES[:2]))
    with pytest.raises(RasterError, match="belongs to a run with files = "):
        perfect().detect(path, "ship", tile=32, overlap=8, checkpoint=log)
    log.write_text("no log\n")
    with pytest.raises(RasterError, match="is no log of a run"):
        perfect().detect(path, "ship", tile=32, overlap=8, checkpoint=log)


@pytest.fixture(scope="module")
def demo():
    with pytest.warns(RasterWarning, match="trained on synthetic images alone"):
        return GeoAssistant.from_pretrained(MODEL, device="cpu")


QUESTIONS = ["How many aircraft are there?", "Is there a ship in this scene?", "Describe this image."]


def scene_raster(folder, collar=37):
    """The scene of the demo in 16 bits, with a collar of pixels without data."""
    scene = np.asarray(Image.open(SCENE).convert("RGB")).transpose(2, 0, 1).astype(np.uint16) * 257
    padded = np.pad(np.maximum(scene, 1), [(0, 0), (collar, collar), (collar, collar)])
    transform = NORTH_UP @ Affine.translation(-collar, -collar)
    return write(folder / "scene.tif", padded, nodata=0, transform=transform)


@pytest.mark.integration
def test_answers_about_a_raster_are_those_about_its_picture(demo, tmp_path):
    """16 bits, a collar and a place change no answer, no score and no box."""
    side = 512 * 2
    area = (500_000, 4_000_000 - side, 500_000 + side, 4_000_000)
    with Raster.open(scene_raster(tmp_path), stretch="0,65535") as raster:
        some, others = demo.query(raster, QUESTIONS, area=area), demo.query(SCENE, QUESTIONS)
        boxes, expected = demo.detect(raster, "building", area=area, overlap=0), demo.detect(SCENE, "building")
        counts = demo.count(raster, ["aircraft", "ships"], area=area, tile=256)
    assert some["answer"].tolist() == others["answer"].tolist() == ["9", "yes", others["answer"][2]]
    np.testing.assert_allclose(some["score"], others["score"], rtol=1e-4)
    assert some["count"][:1].tolist() == [9] and (0 < some["score"]).all() and (some["score"] <= 1).all()
    same_shapes(
        boxes.geometry,
        [shapely.transform(shape, lambda xy: xy * [2, -2] + [500_000, 4_000_000]) for shape in expected.geometry],
        1e-3,
    )
    np.testing.assert_allclose(expected.total_bounds, BUILDING, atol=4)
    assert expected.crs is None and boxes["score"][0] == pytest.approx(expected["score"][0], rel=1e-4)
    assert counts.attrs["totals"] == demo.count(SCENE, ["aircraft", "ships"], tile=256).attrs["totals"]
    record = json.loads(json.dumps(some.attrs["record"]))
    assert (
        record["rasters"][0]["stretch"]["high"] == [65535] * 3
        and record["model"]["weights"]
        and record["questions"] == QUESTIONS
    )


@pytest.mark.integration
def test_scores_of_boxes_are_those_of_their_tokens(demo):
    frame = demo.detect(SCENE, "building", prompt="Give the bounding box of the {object}.")
    whole = demo.query(SCENE, "Give the bounding box of the building.")
    assert frame["answer"][0] == whole["answer"][0]
    assert 0 < frame["score"][0] <= 1 and frame["score"][0] == pytest.approx(whole["score"][0], rel=0.2)


def test_two_dates(tmp_path):
    """The second raster has other pixels and another CRS, and is shown on those of the first, with its stretch."""
    answerer = PerfectAnswerer()
    values = pixels("uint16", height=100, width=120)
    before, after = write(tmp_path / "before.tif", values), tmp_path / "after.tif"
    with rasterio.open(write(tmp_path / "later.tif", values // 2 + 100)) as later:
        with rasterio.vrt.WarpedVRT(later, crs="EPSG:3857", nodata=0) as vrt:
            rasterio.shutil.copy(vrt, after)
    frame = perfect(answerer=answerer).compare(before, str(after), tile=64)
    assert len(frame) == 4 and frame.crs == CRS and all(len(group) == 2 for group in answerer.images)
    first, second = (record["stretch"] for record in frame.attrs["record"]["rasters"])
    assert first == second and first["kind"].startswith("percentile")
    with rasterio.open(after) as dataset:  # the same by rasterio alone
        grid = {"crs": CRS, "transform": NORTH_UP, "width": 120, "height": 100}
        with rasterio.vrt.WarpedVRT(dataset, **grid, resampling=rasterio.enums.Resampling.cubic) as vrt:
            stored = vrt.read()
    low, high = (np.array(first[name])[:, None, None] for name in ("low", "high"))
    expected = np.where((stored != 0).any(0), np.clip((stored - low) * 255 / (high - low), 0, 255), 127)
    top = np.concatenate([np.asarray(group[1]) for group in answerer.images[:2]], axis=1)
    bottom = np.concatenate([np.asarray(group[1]) for group in answerer.images[2:]], axis=1)
    shown = np.concatenate([top, bottom]).transpose(2, 0, 1)
    assert shown.shape == expected.shape and np.abs(shown - expected).max() <= 1
    same = PerfectAnswerer()
    perfect(answerer=same).compare(before, before)
    one, two = same.images[0]
    assert np.array_equal(np.asarray(one), np.asarray(two))


def test_dates_without_a_common_place_are_rejected(tmp_path):
    before = write(tmp_path / "before.tif", pixels())
    after = write(tmp_path / "after.tif", pixels(), transform=Affine(2, 0, 700_000, 0, -2, 4_000_000))
    with pytest.raises(RasterError, match="no valid pixel in common"):
        perfect().compare(before, after)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"area": (0, 0, 1, 1)}, "the area and .* do not overlap"),
        ({"area": (5, 0, 1, 1)}, "must be left, bottom, right, top"),
        ({"area": "lost.gpkg"}, "area 'lost.gpkg' cannot be read"),
        ({"area": geopandas.GeoDataFrame(geometry=[shapely.box(0, 0, 1, 1)])}, "area names no CRS"),
        ({"area": geopandas.GeoDataFrame(geometry=[shapely.Point(0, 0)], crs=CRS)}, "area holds Point: pass polygons"),
        ({"area": geopandas.GeoDataFrame(geometry=[], crs=CRS)}, "area holds no features"),
        ({"tile": 0}, "tile=0 must be 1 to 2048"),
        ({"resolution": -1}, "resolution=-1 must be a positive length"),
        ({"resolution": 0.01}, r"pixels of 2 m: a resolution of 0\.01 m would enlarge them more than 32 times"),
        ({"overlap": 64, "tile": 64}, "overlap=64 must be 0 to less than the tile"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(options, message, tmp_path):
    path = write(tmp_path / "scene.tif", rectangles(*SIZE, BOXES))
    with pytest.raises(RasterError, match=message):
        perfect().detect(path, "ship", **options)


def test_what_needs_a_place_is_rejected_without_one(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    parcels = geopandas.GeoDataFrame(geometry=[shapely.box(0, 0, 1, 1)], crs=CRS)
    for options, message in (
        ({"area": (0, 0, 1, 1)}, "has no CRS, so an area"),
        ({"features": parcels}, "has no CRS, so features"),
        ({"resolution": 1}, "no place on the Earth"),
    ):
        with pytest.raises(RasterError, match=message):
            perfect().query(path, "Why?", **options)
    with Raster.open(write(tmp_path / "b.tif", pixels())) as raster, pytest.raises(RasterError, match="no feature overlaps"):
        perfect().query(raster, "Why?", features=parcels)


def test_an_answer_of_none_is_no_answer_without_a_box(tmp_path):
    """The record counts answers that hold no box, since they say that the model writes boxes in another form."""
    path = write(tmp_path / "scene.tif", rectangles(*SIZE, BOXES[:1]))
    answerer = PerfectAnswerer()
    frame = perfect(answerer=answerer).detect(path, "ship", tile=64)
    assert len(frame) == 1 and len(answerer.images) == 12 and 'or answer "none".' in answerer.prompts[0]
    assert frame.attrs["record"]["images"]["answers_without_box"] == 0
    other = perfect().detect(path, "ship", tile=64, prompt="Where is the {object}?")
    assert len(other) == 0 and other.attrs["record"]["images"]["answers_without_box"] == 12


def test_how_boxes_are_written_is_never_guessed(tmp_path):
    path = write(tmp_path / "scene.tif", rectangles(*SIZE, BOXES))
    silent = GeoAssistant(PerfectAnswerer(), {"name": "other"})
    with pytest.raises(RasterError, match="the processor of other does not say how the model writes boxes"):
        silent.detect(path, "ship")
    assert len(GeoAssistant(PerfectAnswerer(), box_format=FORM).detect(path, "ship")) == len(BOXES)
    with pytest.raises(ValueError, match="order='xywh'"):
        GeoAssistant(PerfectAnswerer(), box_format={"order": "xywh"})


@pytest.mark.integration
def test_tiles_count_what_one_view_misses(demo, tmp_path):
    """A mosaic of 16 scenes, truncated so that no seam of the tiles is an edge of a scene."""
    side, truth = 1812, {"cars": 0, "buildings": 0}
    mosaic = Image.new("RGB", (side, side))
    for number in range(16):
        left, top = 512 * (number % 4), 512 * (number // 4)
        scene = plan_scene(scene_seed("test", number))
        mosaic.paste(draw(scene), (left, top))
        for item in scene.objects:
            if f"{item.kind}s" in truth and left + item.x < side and top + item.y < side:
                truth[f"{item.kind}s"] += 1
    mosaic.save(tmp_path / "mosaic.png")
    tiles = demo.count(str(tmp_path / "mosaic.png"), list(truth)).attrs["totals"]
    view = demo.count(str(tmp_path / "mosaic.png"), list(truth), tile=None).attrs["totals"]
    for name, number in truth.items():
        assert abs(tiles[name]["total"] - number) <= 1 and abs(tiles[name]["shifted_total"] - number) <= 3
        assert view[name]["total"] <= 0.6 * number


@pytest.mark.integration
@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
def test_any_model_of_transformers_answers(family, tmp_path):
    make = {"llava": tiny_llava, "qwen2-vl": tiny_qwen2_vl}[family]
    folder = make(tmp_path / "model")
    options = {"device": "cpu", "dtype": "float32", "max_new_tokens": 4, "trust_remote_code": family == "qwen2-vl"}
    assistant = GeoAssistant.from_pretrained(str(folder), **options)
    path = write(tmp_path / "scene.tif", pixels())
    frame = assistant.query(path, ["How many ships?", "Why?"], tile=64)
    assert len(frame) == 4 and frame.crs == CRS and frame["score"].between(0, 1).all() and frame["error"].isna().all()
    assert len(assistant.compare(path, path)) == 1
    with pytest.raises(RasterError, match="does not say how the model writes boxes"):
        assistant.detect(path, "ship")
    boxes = GeoAssistant.from_pretrained(str(folder), **options, box_format=FORM).detect(path, "ship")
    assert not len(boxes) and boxes.attrs["record"]["images"]["answers_without_box"] == 1
