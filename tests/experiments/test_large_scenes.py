"""Large scenes and aerial cars: a model without mistakes, matches and figures against references, and resumption."""

import argparse
import csv
import io
import json

import numpy as np
import pytest
import rasterio
from tiny_assistants import PerfectAnswerer, perfect, rectangles

from mfrsvlm.evaluation.metrics.visual_grounding import iou
from mfrsvlm.experiments import aerial_cars, detections, large_scenes
from mfrsvlm.experiments.large_scenes import ALL, BOTH, MERGED, ONE, OVERLAPPING, SHIFTED, TILES, UNMERGED
from mfrsvlm.geospatial import Raster


pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

SIZE, TILE = 256, 64
# No seam at multiples of 32 crosses these. The last two lie in the overlap of two tiles.
BOXES = [(4, 4, 12, 14), (70, 5, 80, 12), (100, 100, 120, 110), (201, 130, 211, 150), (50, 34, 60, 44), (34, 51, 44, 61)]


def random_boxes(rng, count):
    low = rng.uniform(0, 90, (count, 2))
    return np.concatenate([low, low + rng.uniform(2, 25, (count, 2))], axis=1)


@pytest.fixture
def raster(tmp_path):
    form = {"driver": "GTiff", "width": SIZE, "height": SIZE, "count": 3, "dtype": "uint8", "photometric": "RGB"}
    with rasterio.open(tmp_path / "scene.tif", "w", **form) as file:
        file.write(rectangles(SIZE, SIZE, BOXES))
    with Raster.open(tmp_path / "scene.tif") as made:
        yield made


def settings(output, **changes):
    made = {"scenes": 1, "densities": [4, 9], "measures": ["counts", "boxes"], "overlapping": 1, "size": SIZE}
    return argparse.Namespace(**made | {"object_pixels": (8.0, 16.0), "tile": TILE, "output": output} | changes)


def test_overlaps_are_those_of_the_grounding_metric():
    rng = np.random.default_rng(0)
    some, others = random_boxes(rng, 12), random_boxes(rng, 9)
    expected = [[iou(one, other) for other in others.tolist()] for one in some.tolist()]
    np.testing.assert_allclose(detections.pairwise_iou(some, others), expected)
    assert detections.pairwise_iou(some[:0], others).shape == (0, 9)
    assert detections.pairwise_iou(np.zeros((1, 4)), np.zeros((1, 4))) == 0  # boxes without area


def test_centers():
    box, others = np.array([[0, 0, 4, 4.0]]), np.array([[2, 2, 9, 9.0], [2.5, 0, 9, 9], [3, 3, 9, 8]])
    assert detections.centers_inside(box, others).tolist() == [[True, False, False]]
    np.testing.assert_allclose(detections.center_distances(box, others)[0], np.hypot([3.5, 3.75, 4], [3.5, 2.5, 3.5]))


def test_a_true_object_matches_once_and_the_surest_first():
    affinity, scores = np.array([[0.9, 0.6], [0.8, 0.0], [0.4, 0.55]]), np.array([0.5, 0.7, 0.3])
    # The second takes the first object, the first then the other one, and nothing is left.
    assert detections.find_matches(affinity, scores, 0.5).tolist() == [True, True, False]
    assert detections.find_matches(affinity, scores, 0.85).tolist() == [True, False, False]
    assert detections.find_matches(np.zeros((2, 0)), np.ones(2), 0.5).tolist() == [False, False]


def test_average_precision_is_that_of_coco():
    coco, evaluation = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    rng = np.random.default_rng(1)
    annotations, results, all_scores, all_matches = [], [], [], []
    for image in range(4):
        true = random_boxes(rng, 8)
        found = np.concatenate([true[:6] + rng.normal(0, 2, (6, 4)), random_boxes(rng, 5)])
        scores = rng.random(len(found))
        for boxes, rows, more in ((true, annotations, {"iscrowd": 0}), (found, results, {})):
            for index, (x, y, right, bottom) in enumerate(boxes.tolist()):
                row = {"image_id": image, "category_id": 1, "bbox": [x, y, right - x, bottom - y], "id": len(rows) + 1}
                rows.append(row | more | {"area": (right - x) * (bottom - y)} | ({} if more else {"score": scores[index]}))
        all_scores.append(scores)
        all_matches.append(detections.find_matches(detections.pairwise_iou(found, true), scores, 0.5))
    reference = coco.COCO()
    reference.dataset = {"images": [{"id": i} for i in range(4)], "categories": [{"id": 1}], "annotations": annotations}
    reference.createIndex()
    judged = evaluation.COCOeval(reference, reference.loadRes(results), "bbox")
    judged.params.iouThrs = np.array([0.5])
    judged.evaluate()
    judged.accumulate()
    scores, matches = np.concatenate(all_scores), np.concatenate(all_matches)
    expected = judged.eval["precision"][0, :, 0, 0, -1].mean()
    assert 0.2 < expected < 0.9
    assert detections.average_precision(scores, matches, 32) == pytest.approx(expected)
    assert matches.sum() / 32 == pytest.approx(judged.eval["recall"][0, 0, 0, -1])
    assert detections.average_precision(np.zeros(0), np.zeros(0, bool), 3) == 0


def test_a_model_without_mistakes_counts_and_finds_all(raster):
    made = large_scenes.count_objects(perfect(), raster, {"car": "cars"}, TILE, overlapping=True)
    counts = {arm: numbers["car"] for arm, numbers in made["counts"].items()}
    assert counts[ONE] == counts[TILES] == counts[SHIFTED] == len(BOXES)
    assert counts[OVERLAPPING] > len(BOXES)
    assert set(made["unanswered"].values()) == {0}

    row = large_scenes.find_boxes(perfect(), raster, ["car"], TILE) | {"true": {"car": BOXES}, "object_pixels": [8, 16]}
    np.testing.assert_allclose(sorted(box[:4] for box in row["boxes"][MERGED]["car"]), sorted(BOXES), atol=0.01)
    merged, unmerged = (large_scenes.box_figures([row], arm) for arm in (MERGED, UNMERGED))
    assert merged["F1"].value == merged["F1 by center"].value == 1 and merged["error"].value == 0
    assert unmerged["recall"].value == 1 and unmerged["precision"].value < 1 and unmerged["bias"].value > 0


def count_row(density, true, one, tiles, shifted):
    counts = {ONE: one, TILES: tiles, SHIFTED: shifted}
    made = {arm: dict(zip(("car", "tank"), numbers, strict=True)) for arm, numbers in counts.items()}
    true = dict(zip(("car", "tank"), true, strict=True))
    return {"measure": "counts", "density": density, "scene": 0, "class": "desert", "true": true, "counts": made}


def test_figures_of_counts():
    rows = [count_row(1, (10, 0), (4, 3), (9, 1), (11, 0)), count_row(1, (30, 20), (0, 0), (33, 20), (30, 16))]
    figures = large_scenes.count_figures(rows, TILES)
    assert figures["error"].value == pytest.approx((1 + 1 + 3 + 0) / 60)
    assert figures["bias"].value == pytest.approx((-1 + 1 + 3) / 60)
    assert figures["percentage error"].value == pytest.approx((0.1 + 0.1 + 0) / 3)
    assert figures["found of absent kinds"].value == 1
    assert large_scenes.count_figures(rows, BOTH)["error"].value == pytest.approx((0 + 0.5 + 1.5 + 2) / 60)
    summary = large_scenes.summarize(rows, [1])
    assert summary["1"] == summary[ALL]
    gain = summary[ALL]["counts"][TILES]["gain"]
    assert gain["mean"] == pytest.approx(5 / 60 - (6 + 3 + 30 + 20) / 60, abs=1e-5)
    # With two scenes, the interval reaches from one to the other.
    assert gain["low"] == pytest.approx((3 - 50) / 50) and gain["high"] == pytest.approx((2 - 9) / 10)
    spread = summary[ALL]["spread"]  # differences 2, 3, 4 and errors 1, 3, 0
    assert spread["errors of at most the difference"]["mean"] == 1
    assert spread["rank correlation"]["mean"] == pytest.approx(-0.5)
    assert spread["mean error"]["mean"] == pytest.approx(4 / 3, abs=1e-5)


def test_densities_are_mean_counts():
    plans = [large_scenes.plan(13, index, 256, (4, 6)) for index in range(60)]
    assert np.mean([count for made in plans for count in made.counts.values() if count]) == pytest.approx(13, rel=0.2)
    assert plans[0] == large_scenes.plan(13, 0, 256, (4, 6)) != large_scenes.plan(14, 0, 256, (4, 6))


def test_a_run_continues_where_it_stopped(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    large_scenes.run(perfect(), settings(whole))
    assert (whole / "plot.png").stat().st_size > 10_000
    assert (whole / "table.md").read_text().count(f"| 1 | {TILES} |") == 2
    lines = list(csv.DictReader(io.StringIO((whole / "results.csv").read_text())))
    assert {(line["density"], line["measure"]) for line in lines} == {(d, m) for d in "49" for m in ("counts", "boxes")}

    (stopped / "scenes").mkdir(parents=True)
    kept = "counts-4-0.json"
    (stopped / "scenes" / kept).write_text((whole / "scenes" / kept).read_text())
    rows = large_scenes.measure_scenes(perfect(), settings(stopped))
    assert large_scenes.scene_lines(rows) == (whole / "results.csv").read_text()

    answerer = PerfectAnswerer()
    assert large_scenes.measure_scenes(perfect(answerer=answerer), settings(stopped)) == rows
    assert answerer.prompts == []
    with pytest.raises(ValueError, match=r"counts-4-0\.json was made with tile=64, not 128"):
        large_scenes.measure_scenes(perfect(), settings(stopped, tile=128))


@pytest.fixture
def frames(tmp_path):
    """Two frames of a video that is held out, and one of another. PNGs, since JPEG changes colours."""
    from PIL import Image

    folder = tmp_path / "aerial_cars" / "images"
    folder.mkdir(parents=True)
    rows = []
    for name in ("DJI_0013-1", "DJI_0013-2", "other-1"):
        Image.fromarray(rectangles(SIZE, SIZE, BOXES).transpose(1, 2, 0)).save(folder / f"{name}.png")
        objects = [{"class": "car", "box": list(box)} for box in BOXES]
        rows.append({"image": f"images/{name}.png", "width": SIZE, "height": SIZE, "objects": objects})
    (tmp_path / "aerial_cars" / "boxes.json").write_text(json.dumps(rows))
    return tmp_path


def test_cars_of_a_model_without_mistakes(frames, tmp_path):
    output = tmp_path / "output"
    aerial_cars.run(perfect(), frames, output)
    made = json.loads((output / "results.json").read_text())["results"]
    assert made["frames"] == 2 and made["cars"] == 2 * len(BOXES)
    for name in ("precision", "recall", "F1", "AP", "F1 by center", "AP by center"):
        assert made["boxes"][MERGED][name] == {"mean": 1, "low": 1, "high": 1}, name
    assert made["counts"][ONE]["error"]["mean"] == made["counts"][f"boxes of {MERGED}"]["error"]["mean"] == 0
    assert (output / "table.md").read_text().count(f"| {MERGED} | 100.0 [100.0, 100.0] |") == 2
    answerer = PerfectAnswerer()
    aerial_cars.measure_frames(perfect(answerer=answerer), frames, output, aerial_cars.PROMPT)
    assert answerer.prompts == []
    with pytest.raises(ValueError, match="was made with prompt="):
        aerial_cars.measure_frames(perfect(), frames, output, "Where is every {object}?")


def test_frames_are_needed(tmp_path):
    with pytest.raises(ValueError, match=r"has no aerial_cars/boxes\.json with frames of DJI_0013 or DJI_0762"):
        aerial_cars.measure_frames(perfect(), tmp_path, tmp_path, "")
