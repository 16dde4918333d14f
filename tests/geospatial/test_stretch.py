"""Numbers to 8 bits."""

import numpy as np
import pytest

from mfrsvlm.geospatial.errors import NoValidPixelError, RasterError
from mfrsvlm.geospatial.stretch import Request, Stretch, limits_of, parse_stretch


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, Request("auto")),
        ("Percentile", Request("percentile")),
        ("percentile:1,99.5", Request("percentile", (1.0, 99.5))),
        ("physical:0,0.5", Request("physical", (0.0, 0.5))),
        ("-25,0", Request("limits", (-25.0, 0.0))),
        ((1000, 4000), Request("limits", (1000.0, 4000.0))),
    ],
)
def test_parsed(given, expected):
    assert parse_stretch(given) == expected


@pytest.mark.parametrize(
    "given", ["", "minmax", "1", "1,2,3", "5,5", "9,1", "0,nan", "percentile:-1,50", "percentile:", "x:1,2"]
)
def test_rejected(given):
    with pytest.raises(RasterError, match="stretch"):
        parse_stretch(given)


def test_limits_leave_out_what_is_not_valid_or_not_finite():
    values = np.array([[1.0, 2.0, 3.0, 4.0, 1e9, np.nan, np.inf]])
    valid = np.array([[True, True, True, True, False, True, True]])
    assert limits_of(values, valid, (0, 100), "it") == ((1.0,), (4.0,))
    with pytest.raises(NoValidPixelError, match="it has no valid pixel"):
        limits_of(values, np.zeros_like(valid), (0, 100), "it")


def test_constant_channel_is_middle_grey():
    low, high = limits_of(np.full((1, 9), 500.0), np.ones((1, 9), bool), (2, 98), "it")
    assert Stretch("percentile", low, high, "stored").apply(np.full((1, 1, 1), 500.0)) in (127, 128)


def test_applied_channel_by_channel():
    stretch = Stretch("limits", (0.0, 100.0), (1.0, 200.0), "stored")
    values = np.array([[-np.inf, 0.0, 0.5, 1.0, np.inf, np.nan], [0, 100, 150, 200, 300, np.nan]], np.float32)[:, None]
    assert stretch.apply(values)[:, 0].tolist() == [[0, 0, 128, 255, 255, 0], [0, 0, 128, 255, 255, 0]]
