"""Boxes in generated texts: what counts as one, and where it lies in the original image."""

import json

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from PIL import Image

from mfrsvlm import MFRSVLMProcessor
from mfrsvlm.image_processing_mfrsvlm import pad_to_square
from mfrsvlm.processing_mfrsvlm import locate_boxes, parse_boxes, parse_points


post_process = locate_boxes
SIDES = st.integers(1, 2000)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1, 2, 3, 4]", [(1, 2, 3, 4)]),
        ("The ship is at [010,020,030,040].", [(10, 20, 30, 40)]),
        ("[ 1.5 ,2, 3 , 4.25 ]", [(1.5, 2, 3, 4.25)]),
        ("[30, 2, 1, 40]", [(1, 2, 30, 40)]),
        ("[5, 5, 5, 5]", [(5, 5, 5, 5)]),
        ("[0, 0, 1000, 1000]", [(0, 0, 1000, 1000)]),
        ("[[1, 2, 3, 4], [5, 6, 7, 8]]", [(1, 2, 3, 4), (5, 6, 7, 8)]),
        ("[1, 2, 3] then [5, 6, 7, 8]", [(5, 6, 7, 8)]),
        *((text, []) for text in ("", "none", "[]", "1, 2, 3, 4", "[1, 2, 3]", "[1, 2, 3, 4, 5]", "[1, 2, 3, 4")),
        *((text, []) for text in ("[-1, 2, 3, 4]", "[1, 2, 3, 1001]", "[a, 2, 3, 4]", "[1 2 3 4]", "[nan, 1, 2, 3]")),
        *((text, []) for text in ("[1, 2, 3, " + "9" * 5000 + "]", "[" * 3000, "[1," * 3000, "[٣, 1, 2, 3]")),
    ],
)
def test_parse_boxes(text, expected):
    assert parse_boxes(text) == expected
    [located] = post_process([text], [(1000, 1000)])
    assert located.shape == (len(expected), 4) and located.dtype == torch.float32
    assert located.tolist() == [pytest.approx(box) for box in expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1, 2]", [(1, 2)]),
        ("The ships are at [010,020] and [ 1.5 , 1000 ].", [(10, 20), (1.5, 1000)]),
        ("[[1, 2], [3, 4]]", [(1, 2), (3, 4)]),
        ("[9, 8], [9, 8]", [(9, 8), (9, 8)]),
        ("[1, 2, 3, 4] [5] [6, 7]", [(6, 7)]),
        *((text, []) for text in ("", "none", "[]", "1, 2", "[1]", "[1, 2, 3]", "[1, 2", "(1, 2)", "[1 2]", "[1, 2,]")),
        *((text, []) for text in ("[-1, 2]", "[1, 1000.5]", "[a, 2]", "[nan, 1]", "[1e2, 1]", "[٣, 1]", "[1,\u066b2]")),
        *((text, []) for text in ("[1, " + "9" * 5000 + "]", "[" * 3000, "[1," * 3000, "[" + " " * 3000)),
    ],
)
def test_parse_points(text, expected):
    assert parse_points(text) == expected
    assert parse_points(text, 2000 / 3) == [point for point in expected if max(point) < 2000 / 3]


def test_sides_are_not_mixed_up():
    [boxes] = post_process(["[100, 200, 300, 400]"], [(50, 1000)])
    assert boxes.tolist() == [pytest.approx([100, 10, 300, 20])]
    [boxes] = post_process(["[1, 2, 3, 4]"], torch.tensor([[40, 80]]), scale=4)
    assert boxes.tolist() == [pytest.approx([20, 20, 60, 40])]


def test_batch_keeps_its_order():
    boxes = post_process(["[1, 2, 3, 4]", "no", "[5, 6, 7, 8][1, 1, 2, 2]"], [(1000, 1000)] * 3)
    assert [len(found) for found in boxes] == [1, 0, 2]
    assert boxes[2].tolist() == [[5, 6, 7, 8], [1, 1, 2, 2]]
    assert post_process([], []) == []


def test_padding_is_taken_off():
    # 100 high, 200 wide: 50 rows of padding above and below.
    texts = ["[0, 250, 1000, 750] [0, 0, 100, 500] [10, 10, 900, 240] [10, 760, 900, 990]"]
    [boxes] = post_process(texts, [(100, 200)], padded=True)
    assert boxes.tolist() == [[0, 0, 200, 100], [0, 0, 20, 50]]


@given(st.integers(1, 60), st.integers(1, 60), st.data())
@settings(max_examples=60, deadline=None)
def test_padded_box_covers_the_same_pixels(height, width, data):
    """What the padded image shows inside a box is what the original shows inside the box found for it."""
    image = np.arange(height * width, dtype=np.float32).reshape(height, width) + 1
    (square,) = map(np.asarray, pad_to_square([Image.fromarray(image)], (0.0,)))
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    y, x = (int(place[0]) for place in np.nonzero(square == image[top, left]))
    side = max(height, width)
    [boxes] = post_process([f"[{x}, {y}, {x + 1}, {y + 1}]"], [(height, width)], scale=side, padded=True)
    assert boxes.round().tolist() == [[left, top, left + 1, top + 1]]


@given(SIDES, SIDES, st.booleans(), st.data())
@settings(max_examples=100, deadline=None)
def test_round_trip(height, width, padded, data):
    """A box of the image, written as text and read back, moves by no more than the rounding of the text."""
    xs = sorted(data.draw(st.floats(0, width)) for _ in range(2))
    ys = sorted(data.draw(st.floats(0, height)) for _ in range(2))
    box = np.array([xs[0], ys[0], xs[1], ys[1]])
    side = max(height, width)
    extent = np.array([side] * 4 if padded else [width, height] * 2)
    offset = np.array([(side - width) // 2, (side - height) // 2] * 2) if padded else 0
    text = str(np.rint((box + offset) / extent * 1000).astype(int).tolist())
    [boxes] = post_process([text], [(height, width)], padded=padded)
    if not len(boxes):  # rounded into the padding, which only a box at the very edge can be
        assert padded
        return
    assert (np.abs(boxes[0].numpy() - box) <= extent / 2000 + 1e-3).all()


@given(st.text("[]0123456789., -", max_size=80), SIDES, SIDES, st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_text_gives_sorted_boxes_inside_the_image(text, height, width, padded):
    [boxes] = post_process([text], [(height, width)], padded=padded)
    assert boxes.shape[1:] == (4,)
    assert (boxes[:, :2] <= boxes[:, 2:]).all()
    assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height] * 2) * (1 + 1e-6)).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("[1, 2, 3, 4]", [(10, 10)]), TypeError, "list of strings.*str"),
        (([3], [(10, 10)]), TypeError, "list of strings"),
        ((["a", "b"], [(10, 10)]), ValueError, r"2 texts.*\[\(10, 10\)\]"),
        ((["a"], None), ValueError, "1 texts.*None"),
        ((["a"], [10]), ValueError, r"image_sizes\[0\]=10 "),
        ((["a", "b"], [(10, 10), (3, 4, 5)]), ValueError, r"image_sizes\[1\]=\(3, 4, 5\)"),
        ((["a"], [(10, 0)]), ValueError, r"image_sizes\[0\]=\(10, 0\).*positive"),
        ((["a"], [(float("nan"), 4)]), ValueError, "positive"),
        ((["a"], [(10, 10)], 0), ValueError, "box_scale=0"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        post_process(*arguments)


def test_box_format_is_a_field_of_the_processor(processor, tmp_path):
    """It is saved where it is stated, read back, and used; a processor that does not state it writes no field."""
    text, size = "[1, 2, 3, 4]", (10, 20)
    parts = {"image_processor": processor.image_processor, "tokenizer": processor.tokenizer}
    silent = MFRSVLMProcessor(**parts)
    silent.save_pretrained(tmp_path / "silent")
    assert not {"box_format", "ground_resolution"} & set(json.loads((tmp_path / "silent/processor_config.json").read_text()))
    assert silent.post_process_boxes([text], [size])[0].tolist() == [pytest.approx([0.02, 0.02, 0.06, 0.04])]
    stated = {"scale": 4, "order": "yxyx", "padded": True}
    MFRSVLMProcessor(**parts, box_format=stated, ground_resolution=(0.2, 1)).save_pretrained(tmp_path / "stated")
    loaded = MFRSVLMProcessor.from_pretrained(tmp_path / "stated")
    assert loaded.box_format == stated and loaded.ground_resolution == (0.2, 1)
    # (x, y) from (10, 5) to (20, 15) of a square of 20, whose upper 5 rows are padding.
    assert loaded.post_process_boxes([text], [size])[0].tolist() == [[10, 0, 20, 10]]
    assert loaded.post_process_boxes([text], [size], box_scale=8, padded=False)[0].tolist() == [[5, 1.25, 10, 3.75]]


def test_converter_states_how_boxes_are_written(processor):
    assert processor.box_format["scale"] == 1000 and not processor.box_format["padded"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"box_format": {"scal": 1}}, "'scal'"),
        ({"box_format": {"scale": 0}}, "scale=0"),
        ({"box_format": {"order": "xywh"}}, "order='xywh'"),
        ({"box_format": {"prompt": "Where?"}}, "{object}"),
        ({"ground_resolution": (2, 1)}, r"ground_resolution=\(2, 1\)"),
    ],
)
def test_bad_fields_are_named(processor, fields, message):
    with pytest.raises(ValueError, match=message):
        MFRSVLMProcessor(processor.image_processor, processor.tokenizer, **fields)
