"""Bands of scenes: they follow from the materials, twins look the same in RGB, and answers follow from the bands."""

from dataclasses import replace

import numpy as np
import pytest

from mfrsvlm.scenes import CLASSES, ask_sensors, draw, plan_scene, scene_seed, sense
from mfrsvlm.scenes.sensors import (
    LOOKS,
    MATERIALS,
    NAMES,
    RADAR_RANGE,
    REFLECTANCE_RANGE,
    WAVELENGTHS,
    materials,
    measure,
    narrow_bands,
    twins_of,
)


def scenes(count, size=128, split="test"):
    return [plan_scene(scene_seed(split, index), size, (6.0, 8.0)) for index in range(count)]


def test_red_green_and_blue_are_the_drawn_scene_and_depend_on_the_seed_alone():
    for scene in scenes(4):
        bands = sense(scene, ["blue", "vv", "red", "nm850", "green", "nir"])
        assert np.array_equal(np.stack([bands[name] for name in ("red", "green", "blue")], axis=2), np.asarray(draw(scene)))
        again = sense(scene, ["nir", "vv"])
        assert all(np.array_equal(again[name], bands[name]) for name in again)
        later = sense(scene, ["nir", "vv"], look=1)
        assert not any(np.array_equal(again[name], later[name]) for name in again)


def test_twins_look_the_same_in_red_green_and_blue(monkeypatch):
    """Whichever twin is there, the picture is the same, and the other bands are not."""
    scene = next(scene for scene in scenes(60) if scene.counts["building"] > 1 and scene.scene_class == "meadow")
    found, first = [], twins_of(scene)
    roofs = first.metal_roofs
    other = replace(first, vegetation="dry", ground="dry", metal_roofs=tuple(not roof for roof in roofs))
    for twins in (replace(first, vegetation="healthy", ground="wet"), other):
        monkeypatch.setattr("mfrsvlm.scenes.sensors.twins_of", lambda _, twins=twins: twins)
        found.append((sense(scene, ["red", "green", "blue", "nir", "swir16", "vv"]), materials(scene)))
    (one, labels), (two, _) = found
    assert all(np.array_equal(one[name], two[name]) for name in ("red", "green", "blue"))
    for name in ("nir", "swir16", "vv"):
        assert (one[name] != two[name]).mean() > 0.8
    visible = [[material.reflectance[:3] for material in map(MATERIALS.get, pair)] for pair in (
        ("healthy grass", "dry grass"), ("healthy trees", "dry trees"), ("tile roof", "metal roof"),
    )]  # fmt: skip
    assert all(a == b for a, b in visible)
    roof_pixels = np.isin(labels, [NAMES.index("tile roof"), NAMES.index("metal roof")])
    assert 10 < roof_pixels.sum() < labels.size / 10


def test_materials_lie_where_the_scene_has_them():
    """Against the picture itself: water is blue, sand is bright, and objects lie in their boxes."""
    for scene in scenes(40):
        labels, picture = materials(scene), np.asarray(draw(scene), dtype=float)
        red, _, blue = picture.transpose(2, 0, 1)
        water = labels == NAMES.index("water")
        assert water.any() == scene.has_water == CLASSES[scene.scene_class][1]
        if water.any():
            assert np.median((blue - red)[water]) > 15 > np.median((blue - red)[~water])
        built = np.isin(labels, [NAMES.index(name) for name in ("metal", "tile roof", "metal roof")])
        inside = np.zeros_like(built)
        for item in scene.objects:
            left, top, right, bottom = item.box
            rows, columns = slice(int(top), int(bottom) + 2), slice(int(left), int(right) + 2)
            assert built[rows, columns].mean() > 0.1
            inside[rows, columns] = True
        assert not (built & ~inside).any()


def test_bands_have_the_reflectance_of_their_materials_and_radar_the_speckle_of_its_looks():
    for scene in scenes(6, 256):
        labels = materials(scene)
        values, counts = np.unique(labels, return_counts=True)
        for label in values[counts > 2000]:
            place, material = labels == label, MATERIALS[NAMES[label]]
            for index, band in enumerate(WAVELENGTHS):
                measured = measure(scene, labels, band)[place]
                assert 0.8 < (measured.mean() + 0.002) / (material.reflectance[index] + 0.002) < 1.2
                assert measured.std() == pytest.approx(0.02, rel=0.1)
            power = 10 ** (measure(scene, labels, "vv")[place].astype(float) / 10)
            assert (power.mean() / power.std()) ** 2 == pytest.approx(LOOKS, rel=0.15)  # equivalent number of looks
            wet = twins_of(scene).ground == "wet" and NAMES[label] not in ("water", "metal", "tile roof", "metal roof")
            assert 10 * np.log10(power.mean()) == pytest.approx(material.backscatter[0] + 5 * wet, abs=0.3)


def test_answers_follow_from_the_bands():
    """By thresholds on what is stored, which know nothing of the plan but where the land is."""
    seen = {}
    for scene in scenes(80):
        bands, labels = sense(scene, ["nir", "swir16", "vv"]), materials(scene)
        plants = np.array([name.endswith(("grass", "trees")) for name in NAMES])[labels]
        land = ~np.isin(labels, [NAMES.index(name) for name in ("water", "metal", "tile roof", "metal roof")])
        for question in ask_sensors(scene):
            if question.task == "vegetation":
                nir, swir = (bands[name][plants].astype(float).mean() for name in ("nir", "swir16"))
                truth = "yes" if nir > swir else "no"
            elif question.task == "moisture":
                expected = np.mean([MATERIALS[NAMES[label]].backscatter[0] for label in labels[land]])
                low, high = RADAR_RANGE
                mean = bands["vv"][land].astype(float).mean() * (high - low) / 255 + low
                truth = "yes" if mean > expected + 1.5 else "no"  # the mean of dB lies a little below that of power
            else:
                truth = str(sum(twins_of(scene).metal_roofs))
            assert question.answer == truth, (scene.scene_class, question)
            seen.setdefault(question.task, []).append(question.answer)
    assert set(seen) == {"vegetation", "moisture", "roofs"}
    for task in ("vegetation", "moisture"):
        share = np.mean([answer == seen[task][0] for answer in seen[task]])
        assert 0.35 < share < 0.65


def test_narrow_bands_cover_the_spectrum():
    names = narrow_bands(30)
    assert len(set(names)) == 30 and names[0] == "nm450" and names[-1] == "nm2400"
    scene = scenes(1)[0]
    labels = materials(scene)
    low, high = REFLECTANCE_RANGE
    assert np.array_equal(
        sense(scene, ["nm860"])["nm860"], np.rint((measure(scene, labels, "nm860") - low) * 255 / (high - low)).clip(0, 255)
    )


@pytest.mark.parametrize("band", ["nmx", "thermal", "nm", "nm85.5"])
def test_unknown_bands_and_tasks_are_named(band):
    with pytest.raises(ValueError, match=f"unknown band '{band}': bands are blue, green, red, nir"):
        sense(scenes(1)[0], [band])
    with pytest.raises(ValueError, match=r"Unknown tasks \['color'\]"):
        ask_sensors(scenes(1)[0], ["color"])
