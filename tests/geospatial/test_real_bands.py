"""Plumbing of real bands, end to end: NAIP, Landsat, and optical and radar images of SpaceNet 6.

The truth of every question is a threshold on the bands themselves. So a right answer shows that the right numbers arrive at
the model, and nothing about the world.
"""

import numpy as np
import pytest
import rasterio
import torch
from external_data import external_data
from tiny_training import tiny_folder

from mfrsvlm.convert_checkpoint import widen
from mfrsvlm.evaluation.answering import Answer, EncodedImages
from mfrsvlm.geospatial import GeoAssistant, Raster, compose


pytestmark = pytest.mark.filterwarnings("ignore::mfrsvlm.geospatial.RasterWarning")
LANDSAT = ["swir16", "nir", "red", "green"]  # the order of the export, which the file does not state


class IndexAnswerer:
    """Answers "yes" if the mean of an index of the bands that it is shown is above a threshold."""

    def __init__(self, composite, threshold):
        self.composite, self.threshold, self.images = composite, threshold, []

    def encode_images(self, groups, prompts):
        self.images += groups
        return EncodedImages(groups)

    def answer(self, batch, encoded):
        means = [np.nanmean(compose(self.composite, encoded.groups[prompt.group][0])) for prompt in batch]
        return [Answer("yes" if mean > self.threshold else "no") for mean in means]


def named(source, names, folder):
    """A copy whose bands have names, as its sensor has them."""
    path = folder / f"{source.stem}.tif"
    with rasterio.open(source) as dataset:
        profile = dataset.profile | {"driver": "GTiff"}
        with rasterio.open(path, "w", **profile) as copy:
            copy.write(dataset.read())
            copy.descriptions, copy.colorinterp = names, dataset.colorinterp
    return str(path)


@pytest.mark.parametrize(
    ("source", "names", "bands", "composite", "threshold"),
    [
        ("images/og_naip_2020.tif", ["red", "green", "blue", "nir"], ["red", "green", "blue", "nir"], "ndvi", 0.0),
        ("images/og_naip_2020.tif", ["red", "green", "blue", "nir"], ["red", "green", "blue", "nir"], "ndwi", 0.0),
        ("images/og_landsat_2020.tif", LANDSAT, ["red", "green", "nir", "swir16"], "ndvi", 0.5),
    ],
)
def test_questions_whose_truth_is_a_threshold_on_the_bands(source, names, bands, composite, threshold, tmp_path):
    path = named(external_data(source), names, tmp_path)
    answerer = IndexAnswerer(composite, threshold)
    assistant = GeoAssistant(answerer, image_bands=bands)
    frame = assistant.query(path, f"Is the mean {composite} above {threshold}?", tile=100)
    with rasterio.open(path) as dataset:
        stored = dict(zip(names, dataset.read(), strict=True))
        valid = np.any([plane != 0 for plane in stored.values()], axis=0)  # 0 is nodata in these files
    right = 0
    for answer, tile in zip(frame["answer"], frame["tile"], strict=True):
        column, row, width, height = map(int, tile.split(","))
        window = slice(row, row + height), slice(column, column + width)
        inside = valid[window]
        means = np.nanmean(compose(composite, {name: plane[window] for name, plane in stored.items()})[0][inside])
        right += answer == ("yes" if means > threshold else "no")
    # Where a band holds no data, what fills it moves a mean that lies near the threshold.
    assert len(frame) > 20 and right / len(frame) > 0.95 and set(frame["answer"]) == {"yes", "no"}
    assert all(set(group[0]) == set(bands) for group in answerer.images)


def test_optical_and_radar_of_one_place_reach_one_model(tmp_path):
    """Four optical bands of one metre and four complex polarisations of another grid and size, each as a file of its own."""
    optical = named(external_data("real/sensors/spacenet6_ms1.tif"), ["blue", "green", "red", "nir"], tmp_path)
    with Raster.open(optical, image_bands=["red", "green", "blue", "nir"], missing_bands="refuse") as raster:
        view = raster.read()
    with rasterio.open(optical) as dataset:
        stored = dataset.read(3)
    low, high = np.percentile(stored, [2, 98])
    assert np.abs(view.bands["red"] - np.clip((stored - low) / (high - low), 0, 1) * 255).max() <= 1
    radar = {
        name: f"DERIVED_SUBDATASET:LOGAMPLITUDE:{external_data(f'real/sensors/spacenet6_sar_{name}.tif')}"
        for name in ("vv", "vh", "hh", "hv")
    }
    with Raster.open(radar, image_bands=["red", "green", "blue", "vv", "vh", "hh", "hv"]) as raster:
        view = raster.read()
    assert set(view.bands) == set(radar) and view.record.nodata_share < 0.5
    with rasterio.open(external_data("real/sensors/spacenet6_sar_vv.tif")) as dataset:
        decibels = 20 * np.log10(np.abs(dataset.read(1)))
    order = np.corrcoef(decibels.ravel(), view.bands["vv"].ravel())[0, 1]
    assert order > 0.98


def test_real_bands_reach_the_answers_of_a_widened_model(tmp_path):
    """The near infrared of NAIP changes answers of a model whose new weights are not zero, and none before."""
    path = named(external_data("images/og_naip_2020.tif"), ["red", "green", "blue", "nir"], tmp_path)
    widen(str(tiny_folder(tmp_path / "narrow")), ["red", "green", "blue", "nir"], tmp_path / "wide")
    options = {"max_new_tokens": 4, "device": "cpu", "dtype": "float32"}
    wide = GeoAssistant.from_pretrained(str(tmp_path / "wide"), **options)
    area = (486_000, 5_206_000, 486_500, 5_206_500)
    scores = [wide.query(path, "Is there water?", area=area)["score"].iloc[0]]
    with Raster.open(path, bands="red,green,blue") as raster:
        scores.append(wide.query(raster, "Is there water?", area=area)["score"].iloc[0])
    (layer,) = (module.extra_bands for module in wide.answerer.model.modules() if hasattr(module, "extra_bands"))
    with torch.no_grad():
        layer.weight.normal_(std=3.0)
    scores.append(wide.query(path, "Is there water?", area=area)["score"].iloc[0])
    assert scores[0] == pytest.approx(scores[1], rel=1e-4) and abs(scores[2] - scores[0]) > 1e-6
