"""Benchmarks of Sentinel-2 with more than three bands, on stand-ins in their formats."""

from pathlib import Path

import numpy as np
import pytest
from tiny_benchmarks import BIGEARTHNET_SIDES, EUROSAT, MAKERS, camel, write_bands

from mfrsvlm.evaluation.benchmarks import BenchmarkError, load_benchmark


BANDS = ["red", "green", "blue", "nir", "swir16"]


def level(stored: int, white: float) -> int:
    return round(255 * stored / (10_000 * white))


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path


@pytest.mark.parametrize(
    ("name", "side", "stored"),
    [
        # The stand-in of EuroSAT holds 500 + 100 times the number of the band, whose last is B8A; the other, of its place.
        ("eurosat-ms", 64, {"red": 900, "green": 800, "blue": 700, "nir": 1300, "swir16": 1600, "nir08": 1800}),
        ("bigearthnet", 120, {"red": 800, "green": 700, "blue": 600, "nir": 1200, "swir16": 1500, "nir08": 1300}),
    ],
)
def test_bands_are_those_of_the_file_and_stretched_alike(name, side, stored, root):
    MAKERS[name](root)
    benchmark = load_benchmark(name, root, check_counts=False, bands=[*BANDS, "nir08"])
    bands = benchmark.read_image(benchmark.samples[0].images[0])
    assert list(bands) == [*BANDS, "nir08"]
    for band, plane in bands.items():
        white = 0.3 if band in ("red", "green", "blue") else 0.6
        assert plane.shape == (side, side) and plane.dtype == np.uint8
        assert (plane == level(stored[band], white)).all(), band
    picture = load_benchmark(name, root, check_counts=False).read_image(benchmark.samples[0].images[0])
    assert picture.size == (side, side) and np.array_equal(np.asarray(picture)[..., 0], bands["red"])


def test_questions_of_bigearthnet_ask_for_each_class(root):
    MAKERS["bigearthnet"](root)
    benchmark = load_benchmark("bigearthnet", root)
    answers = {sample.group: sample.references[0] for sample in benchmark.samples}
    assert len(answers) == 19 and [group for group, answer in answers.items() if answer == "yes"] == [
        "Arable land",
        "Pastures",
    ]
    assert benchmark.samples[4].question == "Does this image show pastures?"
    assert len(load_benchmark("bigearthnet", root, "train", classes=["Pastures"]).samples) == 1


@pytest.mark.parametrize("name", ["eurosat-ms", "bigearthnet"])
@pytest.mark.parametrize("bands", [["red", "thermal"], ["red", "red"], []], ids=str)
def test_wrong_bands_are_named(name, bands, root):
    MAKERS[name](root)
    with pytest.raises(BenchmarkError, match=rf"{name}: bands=.* must be different ones of coastal, blue, green"):
        load_benchmark(name, root, check_counts=False, bands=bands)


@pytest.mark.parametrize("name", ["eurosat-ms", "bigearthnet"])
def test_links_out_of_the_folder_are_followed_on_wish_alone(name, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    MAKERS[name](root)
    file = next(path for path in sorted(root.rglob("*.tif")) if "B02" in path.name or name == "eurosat-ms")
    file.rename(tmp_path / "outside.tif")
    file.symlink_to(tmp_path / "outside.tif")
    with pytest.raises(BenchmarkError, match=r"images are outside of .*allow_outside_images"):
        benchmark = load_benchmark(name, root, check_counts=False)
        benchmark.read_image(benchmark.samples[0].images[0])
    benchmark = load_benchmark(name, root, check_counts=False, allow_outside_images=True)
    assert benchmark.read_image(benchmark.samples[0].images[0]).mode == "RGB"


def test_damaged_files_are_named(root):
    MAKERS["bigearthnet"](root)
    benchmark = load_benchmark("bigearthnet", root, bands=BANDS)
    (patch,) = benchmark.samples[0].images
    (file,) = root.rglob(f"{patch}_B11.tif")
    file.write_bytes(b"no tiff")
    with pytest.raises(BenchmarkError, match=r"_B11\.tif.* cannot be read"):
        benchmark.read_image(patch)
    (root / "metadata.parquet").write_bytes(b"no parquet")
    with pytest.raises(BenchmarkError, match="is no parquet file"):
        load_benchmark("bigearthnet", root)
    assert len(BIGEARTHNET_SIDES) == 12
    with pytest.raises(BenchmarkError, match="has no band 13"):
        broken = load_benchmark("eurosat-ms", short_files(root), check_counts=False, bands=["nir08"])
        broken.read_image(broken.samples[0].images[0])


def short_files(root: Path) -> Path:
    for label in EUROSAT:
        write_bands(root / "short" / camel(label) / f"{camel(label)}_1.tif", 12, 8, 0)
    return root / "short"


def test_so2sat_joins_optical_and_radar(root):
    h5py = pytest.importorskip("h5py", reason="h5py is no dependency of this package")
    MAKERS["so2sat"](root)
    benchmark = load_benchmark("so2sat", root, bands=["nir", "vv", "red"])
    assert [sample.references[0] for sample in benchmark.samples] == ["water", "compact high-rise", "heavy industry"]
    bands = benchmark.read_image("1")
    with h5py.File(root / "testing.h5") as file:
        optical, radar = file["sen2"][1], file["sen1"][1]
    assert list(bands) == ["nir", "vv", "red"]
    for name, expected in (
        ("red", optical[..., 2] / 0.3),
        ("nir", optical[..., 6] / 0.6),
        ("vv", (10 * np.log10(radar[..., 5]) + 30) / 36),
    ):
        assert np.abs(bands[name] - 255 * expected.clip(0, 1)).max() <= 0.51, name
    with h5py.File(root / "testing.h5", "a") as file:
        file["label"][...] = 0
    with pytest.raises(BenchmarkError, match="does not mark one of 17 classes in each row"):
        load_benchmark("so2sat", root)
    (root / "testing.h5").write_bytes(b"no file")
    with pytest.raises(BenchmarkError, match=r"testing\.h5 cannot be read, or has no label"):
        load_benchmark("so2sat", root)
