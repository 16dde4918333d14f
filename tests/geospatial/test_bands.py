"""Which bands are shown: what each source of names is worth, and what is rejected."""

import itertools

import pytest

from mfrsvlm.geospatial.bands import Label, name_bands, select_bands
from mfrsvlm.geospatial.errors import RasterError
from mfrsvlm.geospatial.sensors import SENSORS, common_name, find_sensor, reflectance_of


def select(labels, bands=None, sensor=None, file_name="scene.tif", composite="true_color"):
    naming = name_bands(labels, find_sensor(sensor, file_name), sensor is not None)
    return select_bands(naming, bands, composite, "'scene.tif'")


def labelled(interpretations="", descriptions=""):
    pairs = itertools.zip_longest(interpretations.split(), descriptions.split(","), fillvalue="")
    return [Label(colour or "undefined", name.strip() or None) for colour, name in pairs]


COLOURS, OTHER = "colour interpretation", "undefined"
UNNAMED = "gray undefined undefined undefined"


@pytest.mark.parametrize(
    ("labels", "options", "positions", "origin"),
    [
        (labelled("red green blue"), {}, (0, 1, 2), "colour interpretation"),
        (labelled("blue green red alpha"), {}, (2, 1, 0), "colour interpretation"),
        (labelled("blue green red", "red,green,blue"), {}, (2, 1, 0), "colour interpretation"),
        (labelled(UNNAMED, "nir,Blue,Green,Red"), {}, (3, 2, 1), "descriptions"),
        (labelled(UNNAMED, "nir,blue,green,red"), {"sensor": "naip"}, (3, 2, 1), "descriptions"),
        (labelled("", "B2,B3,B4,B8"), {"sensor": "sentinel-2"}, (2, 1, 0), "descriptions"),
        (labelled("", "SR_B2,SR_B3,SR_B4"), {"sensor": "landsat-8"}, (2, 1, 0), "descriptions"),
        (labelled(UNNAMED), {"sensor": "naip"}, (0, 1, 2), "sensor"),
        (labelled(UNNAMED), {"sensor": "PlanetScope"}, (2, 1, 0), "sensor"),
        (labelled(UNNAMED), {"file_name": "d/m_4709963_se_14_1_20200831.tif"}, (0, 1, 2), "file name"),
        (labelled("", "," * 11), {"file_name": "S2A_MSIL2A_20200831T101031_N0400_R022_T32.tif"}, (3, 2, 1), "file name"),
        (labelled("", "," * 6), {"sensor": "landsat_8_9"}, (3, 2, 1), "sensor"),
        (labelled("gray undefined undefined"), {}, (0, 1, 2), "three unnamed bands"),
        (labelled("gray undefined undefined alpha"), {}, (0, 1, 2), "three unnamed bands"),
        (labelled("gray"), {}, (0,), "the only band"),
        (labelled("gray alpha"), {}, (0,), "the only band"),
        (labelled(UNNAMED), {"bands": "3,4,2"}, (2, 3, 1), "bands given"),
        (labelled(UNNAMED), {"bands": 4}, (3,), "bands given"),
        (labelled("red green blue"), {"bands": ("blue", 2, "red")}, (2, 1, 0), "bands given"),
        (labelled(UNNAMED), {"sensor": "naip", "composite": "false_color"}, (3, 0, 1), "sensor"),
        (labelled(f"red green blue {OTHER}"), {"sensor": "naip", "composite": "ndvi"}, (3, 0), f"{COLOURS} and sensor"),
        (labelled("", "," * 12), {"sensor": "sentinel-2", "composite": "swir"}, (12, 8, 3), "sensor"),
        (labelled("", "VH,VV"), {"composite": "sar"}, (1,), "descriptions"),
    ],
)  # fmt: skip
def test_selection(labels, options, positions, origin):
    selection = select(labels, **options)
    assert (selection.positions, selection.origin) == (positions, origin)
    assert (selection.note is not None) == (origin == "three unnamed bands")


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (labelled(UNNAMED), {}, "4 bands (unnamed), and nothing says which is red, green, blue. Name them: --bands"),
        (labelled("gray undefined"), {}, "2 bands (unnamed)"),
        (labelled("", "VV,VH,ratio"), {}, "3 bands (vv, vh, ratio)"),
        (labelled(UNNAMED), {"sensor": "landsat-8"}, "The preset landsat-8-9 knows files of 7 or 11 bands."),
        (labelled("red green blue"), {"composite": "ndvi"}, "nothing says which is nir or nir08"),
        # NAIP's order contradicts what the file says, so its near infrared is not believed either.
        (
            labelled("blue green red undefined"),
            {"sensor": "naip", "composite": "ndvi"},
            "nothing says which is nir or nir08",
        ),
        (labelled(UNNAMED), {"sensor": "ikonos"}, "unknown sensor 'ikonos'. Presets are sentinel-2, landsat-8-9, naip"),
        (labelled(UNNAMED), {"bands": "1,2,5"}, "has no band 5: it has 4, counted from one"),
        (labelled(UNNAMED), {"bands": "0"}, "has no band 0"),
        (labelled("red green blue"), {"bands": "red,nir,blue"}, "has no band 'nir': it has red, green, blue"),
        (labelled(UNNAMED), {"bands": "1,2"}, "2 bands were given, and it takes 3 bands, or 1 for grey"),
        (labelled(UNNAMED), {"bands": "1,2,3", "composite": "ndvi"}, "3 bands were given, and it takes 2 for ndvi"),
    ],
)
def test_rejected_in_one_line(labels, options, message):
    with pytest.raises(RasterError) as raised:
        select(labels, **options)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    if "nothing says" in message:
        assert "--bands" in str(raised.value) and "--sensor" in str(raised.value)


@pytest.mark.parametrize("order", itertools.permutations(["red", "green", "blue", "nir"]), ids=",".join)
def test_any_order_of_descriptions(order):
    selection = select(labelled(UNNAMED, ",".join(order)))
    assert [order[position] for position in selection.positions] == ["red", "green", "blue"]


def test_presets_agree_with_the_names_of_their_bands():
    for sensor in SENSORS.values():
        for count, layout in sensor.layouts.items():
            assert len(layout) == count == len(set(layout))
            assert {"red", "green", "blue"} <= set(layout)
            assert not sensor.bands or set(layout) <= set(sensor.bands.values())
    assert common_name("B8A", SENSORS["sentinel-2"]) == "nir08" and common_name("B08", SENSORS["sentinel-2"]) == "nir"
    assert common_name("B4, central wavelength 665 nm", SENSORS["sentinel-2"]) == "red"
    assert common_name("B4", None) is None


@pytest.mark.parametrize(
    ("name", "tags", "expected"),
    [
        ("S2A_MSIL2A_20200831T101031_N0214_R022", {}, (1e-4, 0.0)),
        ("S2A_MSIL2A_20220301T101031_N0400_R022", {}, (1e-4, -0.1)),
        ("scene.tif", {"PROCESSING_BASELINE": "05.09"}, (1e-4, -0.1)),
        ("scene.tif", {}, None),
    ],
)
def test_offset_of_sentinel_2_comes_from_its_baseline(name, tags, expected):
    assert reflectance_of(SENSORS["sentinel-2"], name, tags) == expected
