"""What a row says is read whole or rejected by name: its forms, its fields, its boxes, streams of rows, and messages."""

import json
import logging

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_training import ANSWER, QUESTION, llava_row, tiny_processor, write_images
from torch.utils.data import DataLoader
from trl.data_utils import prepare_multimodal_messages

from mfrsvlm.processing_mfrsvlm import parse_boxes
from mfrsvlm.training import BadRow, ConversationCollator, ConversationDataset, ConversationStream
from mfrsvlm.training.data import READ, to_messages, unread_fields, written_boxes


CHAT = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
LONG = [*CHAT, {"role": "user", "content": "And a lake?"}, {"role": "assistant", "content": "No."}]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 4)


def turns(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


# Forms


@pytest.mark.parametrize("messages", [CHAT, LONG, [{"role": "system", "content": "Be brief."}, *CHAT]])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_images_beside_messages_go_where_trl_puts_them(messages, count):
    names = [f"{index}.png" for index in range(count)]
    expected = prepare_multimodal_messages(messages, names)
    assert to_messages({"messages": messages, "images": names}) == expected


def test_messages_with_markers_keep_them():
    late = [*CHAT, {"role": "user", "content": "<image>And here?"}, {"role": "assistant", "content": "No."}]
    found = to_messages({"messages": late, "image": "a.png"})
    assert [part["type"] for part in found[0]["content"]] == ["text"]
    assert found[2]["content"][0] == {"type": "image", "image": "a.png"}
    with pytest.raises(BadRow, match="2 images, but 1 <image> markers"):
        to_messages({"messages": late, "images": ["a.png", "b.png"]})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": QUESTION, "completion": ANSWER},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"prompt": CHAT[:1], "completion": ANSWER, "messages": None, "conversations": []},
    ],
)
def test_a_prompt_and_its_completion_are_a_conversation(row):
    assert to_messages(row) == to_messages({"messages": CHAT})
    with_image = to_messages({**row, "images": ["a.png"]})
    assert with_image == to_messages({"messages": CHAT, "images": ["a.png"]})


def test_only_the_completion_is_learned(images):
    collator = ConversationCollator(tiny_processor())
    whole = collator.encode(to_messages({"messages": LONG, "image": str(images / "0.png")}))
    part = collator.encode(to_messages({"prompt": LONG[:3], "completion": LONG[3:], "image": str(images / "0.png")}))
    assert whole["input_ids"] == part["input_ids"]
    last = tiny_processor().tokenizer.decode([label for label in part["labels"] if label != -100])
    assert last.split("</s>")[0].strip() == "No."
    learned = np.array(part["labels"]) != -100
    both = np.array(whole["labels"]) != -100
    assert learned.sum() < both.sum() and not (learned & ~both).any()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Hi?"}, "Both are needed"),
        ({"prompt": "Hi?", "completion": ""}, "Both are needed"),
        ({"prompt": 5, "completion": "x"}, "`prompt` must be text or a list"),
        ({"prompt": "Hi?", "completion": {"a": 1}}, "`completion` must be text or a list"),
        ({"prompt": "Hi?", "completion": "x", "messages": CHAT}, "`messages` and `prompt`"),
        ({"conversations": turns("a", "b"), "messages": CHAT}, "more than one conversation"),
        ({"image": "a.png", "images": ["b.png"], "messages": CHAT}, "both `image` and `images`"),
        ({"text": "A river."}, r"no conversation.*\['text'\]"),
        ({"prompt": [*CHAT], "completion": CHAT}, None),
        ({"prompt": CHAT[1:], "completion": CHAT[1:]}, "must alternate"),
    ],
)
def test_forms_that_contradict_themselves(row, reason):
    if reason is None:
        assert [message.get("learn", True) for message in to_messages(row)] == [True, False, True, True]
        return
    with pytest.raises(BadRow, match=reason):
        to_messages(row)


# Fields

MEDIA = [
    {"video": "a.mp4"},
    {"video": ["a.png", "b.png"]},
    {"videos": ["clip"]},
    {"img": "a.png"},
    {"image_path": "images/a.png"},
    {"image_a": "before"},
    {"pixel_values": [[0.0]]},
    {"audio": b"x"},
    {"thumbnail": b"\x89PNG"},
    {"picture_of_it": Image.new("RGB", (2, 2))},
    {"extra": {"bytes": b"\x89PNG", "path": None}},
    {"before": "before/17.TIF"},
    {"files": ["a.jpg", "b.jpg"]},
    {"array": np.zeros((4, 4, 3))},
    {"tensor": torch.zeros(2)},
]


@pytest.mark.parametrize("field", MEDIA, ids=lambda field: next(iter(field)))
@pytest.mark.parametrize("image", [False, True])
def test_media_in_a_field_that_is_not_read_is_an_error(field, image):
    (name,) = field
    with pytest.raises(BadRow, match=f"media in `{name}`, which is not supported"):
        to_messages({**llava_row(0, image=image), **field})
    turn = {"from": "human", "value": "Hi?", **field}
    with pytest.raises(BadRow, match=f"turn 1 has media in `{name}`"):
        to_messages({"conversations": [turn, *turns("Hi?", "Yes.")[1:]]})


def test_parts_hold_media_in_known_places_only():
    part = {"type": "text", "text": QUESTION, "image": "a.png"}
    with pytest.raises(BadRow, match=r"a part of turn 1 has media in `image`"):
        to_messages({"messages": [{"role": "user", "content": [part]}, CHAT[1]]})
    arrow = [{"type": "image", "text": None}, {"type": "text", "text": QUESTION, "image": None}]
    assert to_messages({"messages": [{"role": "user", "content": arrow}, CHAT[1]], "image": "a.png"})


def test_fields_that_are_no_media():
    row = {**llava_row(0), "image_id": 17, "width": 512, "score": 0.5, "note": "Drawn from a.png\nand b.png", "frames": 3}
    row |= {"file_name": "0.png", "video": None, "img": "", "images": [], "audio": [None], "masks": {}}
    assert to_messages(row)
    assert unread_fields(row) == ["image_id", "width", "score", "note", "frames", "file_name"]


@pytest.mark.parametrize("name", ["system", "system_prompt", "instruction", "tools"])
def test_instructions_in_a_field_are_an_error(name):
    with pytest.raises(BadRow, match=f"instructions in `{name}`.*role system"):
        to_messages({**llava_row(0), name: "Answer in French."})
    assert to_messages({**llava_row(0), name: ""})


TAGS = ["<video>", "<img>", "<Image>", "<image_1>", "<image 2>", "<|image_pad|>", "<|vision_start|>", "<ImageHere>"]


@pytest.mark.parametrize("tag", TAGS)
def test_markers_of_other_projects_are_an_error(tag):
    with pytest.raises(BadRow, match=f"marker {tag.replace('|', '.')}, which is not supported"):
        to_messages({"conversations": turns(f"{tag}\nWhat is it?", "A road.")})
    with pytest.raises(BadRow, match="is not supported"):
        to_messages({**llava_row(0), "conversations": turns(f"<image>{tag}What is it?", "A road.")})


def test_markup_and_answers_are_no_markers():
    for question in ('What does <img src="a.png"> do?', "Is a < b > c?", "<imagine> a river", "an image"):
        assert to_messages({"conversations": turns(question, "Use <img> or <video>.")})


def test_unread_fields_are_told_once_with_their_number(caplog):
    rows = [{**llava_row(i, image=False), "width": 5, **({"split": "a"} if i else {"split": ""})} for i in range(3)]
    dataset = ConversationDataset(rows)
    (record,) = [record for record in caplog.records if "not used" in record.message]
    assert record.message == "list: these fields are not used: width (3 rows), split (2 rows)."
    assert dataset.unread == {"width": 3, "split": 2}


@settings(deadline=None, max_examples=200)
@given(
    st.dictionaries(
        st.sampled_from([*sorted(READ), "video", "img", "width", "system", "note"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
            max_leaves=6,
        ),
        max_size=5,
    )
)
def test_any_row_is_read_or_bad(row):
    """Never another error, and never text alone where something else was given."""
    try:
        messages = to_messages(row)
    except BadRow as error:
        assert len(str(error)) < 1000
    else:
        assert not {"video", "img", "system"} & set(unread_fields(row)) - {
            name for name in ("video", "img") if isinstance(row.get(name), (int, float))
        }
        assert messages[-1]["role"] == "assistant"


def test_any_error_of_a_row_belongs_to_it(caplog):
    class Row(dict):
        def get(self, *args):
            raise ZeroDivisionError("by zero")

        __getitem__ = get

    class Rows(list):
        def __getitem__(self, index):
            if index == 1:
                raise UnicodeError("a broken shard")
            return super().__getitem__(index)

    rows = Rows([llava_row(0, image=False), llava_row(1, image=False), Row(llava_row(2)), llava_row(3, image=False)])
    with pytest.raises(BadRow, match=r"^Rows, row 1: a broken shard"):
        ConversationDataset(rows)
    dataset = ConversationDataset(rows, on_bad_row="skip")
    assert (len(dataset), dataset.num_bad_rows) == (2, 2)
    assert any("Rows, row 2: ZeroDivisionError: by zero" in record.message for record in caplog.records)

    def encode(messages):
        raise KeyError("a bug")

    dataset = ConversationDataset([llava_row(0, image=False)], encode=encode)
    with pytest.raises(BadRow, match=r"list, row 0 \(id '0'\): KeyError: 'a bug'"):
        dataset[0]


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": "x" * 400_000},
        {"conversations": [{"from": "x" * 400_000, "value": "y"}]},
        {"messages": [{"role": "user", "content": [{"type": "x" * 400_000}]}]},
        {**llava_row(0), "id": "x" * 400_000, "image": "y" * 400_000},
        {**llava_row(0), "video": "x" * 400_000},
        {"prompt": "Hi?", "completion": {"x" * 400_000: 1}},
        {"x" * 400_000: 1},
    ],
)
def test_messages_are_short(row):
    with pytest.raises(BadRow) as error:
        ConversationDataset([row])[0]
    assert len(str(error.value)) < 1200


# Boxes


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ("[100, 200, 1500, 900]", "likely in pixels"),
        ("[0, 0, 1000.5, 10]", "likely in pixels"),
        ("[-5, 0, 10, 10]", "partly outside of its image"),
        ("[0, 0, 1000, 1000]", None),
    ],
)
def test_boxes_lie_in_their_image(box, reason, tmp_path):
    row = {**llava_row(0), "conversations": turns("<image>Where?", f"Here: {box} and [1, 2, 3, 4].")}
    if reason is None:
        assert written_boxes(to_messages(row)) == [(0, 0, 1000, 1000), (1, 2, 3, 4)]
        return
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(BadRow, match=f"line 1 .*{reason}"):
        ConversationDataset(path)
    assert to_messages({"conversations": turns("Which years?", "[1990, 2000, 2010, 2020]")})  # no image, no box


@given(st.lists(st.tuples(*[st.integers(0, 1000)] * 4), max_size=3))
@settings(deadline=None)
def test_boxes_are_those_that_the_processor_reads(boxes):
    text = " and ".join(f"[{a}, {b}, {c}, {d}]" for a, b, c, d in boxes) or "none"
    found = written_boxes(to_messages({**llava_row(0), "conversations": turns("<image>Where?", text)}))
    as_read = [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in found]
    assert as_read == parse_boxes(text)


def test_boxes_that_are_fractions_are_told(caplog):
    rows = [{**llava_row(i), "conversations": turns("<image>Where?", f"[0.{i}, 0.2, 0.8, 1]")} for i in range(3)]
    rows.append({**llava_row(3), "conversations": turns("<image>Where?", "[1, 0, 500, 600]")})
    ConversationDataset(rows)
    (record,) = [record for record in caplog.records if "fractions" in record.message]
    assert "in 3 rows no box exceeds 1, first in row 0" in record.message and "multiply them by 1000" in record.message


# Streams


def stream(rows, features=None):
    return datasets.Dataset.from_list(rows, features).to_iterable_dataset()


def test_a_stream_gives_what_a_dataset_gives(images):
    rows = [{"messages": CHAT, "images": [str(images / f"{index}.png")]} for index in range(4)]
    features = datasets.Features(
        {
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
            "images": datasets.List(datasets.Image()),
        }
    )
    encode = ConversationCollator(tiny_processor()).encode
    expected = list(ConversationDataset(datasets.Dataset.from_list(rows, features), encode=encode))
    streamed = ConversationStream(stream(rows, features), encode=encode)
    for _ in range(2):
        found = list(streamed)
        assert [sample["input_ids"] for sample in found] == [sample["input_ids"] for sample in expected]
        assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(found, expected, strict=True))
    from_paths = ConversationStream(stream(rows), images, encode=encode)
    assert [sample["input_ids"] for sample in from_paths] == [sample["input_ids"] for sample in expected]


def test_bad_rows_of_a_stream(images, caplog):
    rows = [llava_row(0), {**llava_row(1), "image": "none.png"}, llava_row(2), llava_row(3)]
    encode = ConversationCollator(tiny_processor()).encode
    with pytest.raises(BadRow, match=r"IterableDataset, row 1 \(id '1'\): .*none\.png.*on_bad_row='skip'"):
        list(ConversationStream(stream(rows), images, encode=encode))
    streamed = ConversationStream(stream(rows), images, "skip", encode)
    assert len(list(streamed)) == 3 and streamed.num_bad_rows == 1
    with pytest.raises(BadRow, match="none of 1 rows"):
        list(ConversationStream(stream(rows[1:2]), images, "skip", encode))
    with pytest.raises(ValueError, match="'ignore'"):
        ConversationStream(stream(rows), on_bad_row="ignore")
    # Images of the rows stay in the folder, unless it is the caller who made the rows.
    outside = [{**llava_row(0), "image": str(images / "0.png")}]
    with pytest.raises(BadRow, match="only files in there"):
        list(ConversationStream(stream(outside), images / "inner", encode=encode))


@pytest.mark.integration
def test_workers_share_a_stream(images):
    rows = [{**llava_row(index % 4), "id": str(index), "note": "x"} for index in range(8)]
    sharded = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2)
    collator = ConversationCollator(tiny_processor())
    streamed = ConversationStream(sharded, images, encode=collator.encode)
    batches = list(DataLoader(streamed, batch_size=2, num_workers=2, collate_fn=collator))
    assert sum(len(batch["input_ids"]) for batch in batches) == 8


def test_a_stream_is_shuffled_anew_each_epoch():
    rows = [{"id": str(index), "messages": CHAT} for index in range(50)]
    order = stream(rows).shuffle(seed=0, buffer_size=50)
    seen = []
    streamed = ConversationStream(order, encode=lambda messages: {"n": len(seen)})
    streamed.set_epoch(1)
    first = [row["id"] for row in streamed.rows]
    streamed.set_epoch(2)
    assert sorted([row["id"] for row in streamed.rows]) == sorted(first) and [row["id"] for row in streamed.rows] != first


def test_unread_fields_of_a_stream_are_told_once(caplog):
    rows = [{"messages": CHAT, "width": 5}] * 3
    with caplog.at_level(logging.WARNING):
        assert len(list(ConversationStream(stream(rows)))) == 3
    assert len([record for record in caplog.records if "not used: width" in record.message]) == 1
