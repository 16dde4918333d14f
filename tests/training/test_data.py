"""Conversations to batches: rows, markers, labels of the published training, truncation, and bad rows."""

import base64
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tiny_training import ANSWER, QUESTION, llava_row, tiny_processor, write_images
from torch.utils.data import DataLoader

from mfrsvlm.training import BadRow, ConversationCollator, ConversationDataset
from mfrsvlm.training.data import to_messages
from mfrsvlm.training.trainer import ModalityLengthSampler


REFERENCE = Path(__file__).parents[1] / "reference"
MANIFEST = json.loads((REFERENCE / "manifest.json").read_text())
MARKER = -200  # stands for the <image> marker in the manifest
TOKENS = 16  # visual tokens of a tiny image
PLACEMENTS = ["inline", "prefix"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 4)


def save(folder, rows, name="rows.json"):
    path = folder / name
    text = json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows))
    path.write_text(text)
    return path


def turns(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def shape(messages):
    """Roles, number of images and text of messages."""
    return [
        (m["role"], sum(p["type"] == "image" for p in m["content"]), "".join(p.get("text", "") for p in m["content"]))
        for m in messages
    ]


# Rows

CHAT = [{"role": "user", "content": f"<image>\n{QUESTION}"}, {"role": "assistant", "content": ANSWER}]
PARTS = [
    {"role": "user", "content": [{"type": "image", "path": "0.png"}, {"type": "text", "text": QUESTION}]},
    {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
]


@pytest.mark.parametrize(
    "row",
    [
        llava_row(0),
        {"image": ["0.png"], "conversations": turns(f"<image>\n{QUESTION}", ANSWER)},
        {"image": "0.png", "conversations": turns(f"{QUESTION}\n<image>", ANSWER)},
        {"image": "0.png", "messages": CHAT},
        {
            "images": ["0.png"],
            "messages": [{"role": "user", "content": [{"type": "image"}, PARTS[0]["content"][1]]}, PARTS[1]],
        },
        {"messages": PARTS},
    ],
    ids=["llava", "list", "marker_last", "chat", "images_apart", "parts"],
)
def test_formats_say_the_same(row):
    messages = to_messages(row)
    assert shape(messages) == [("user", 1, QUESTION), ("assistant", 0, ANSWER)]
    assert messages[0]["content"][0] == {"type": "image", "image": "0.png"}


def test_markers_move_to_the_front_of_their_turn_as_in_the_reference():
    row = {"image": ["a", "b", "c"], "conversations": turns("Before <image> after <image>?", "No.", "And <image>", "Yes.")}
    messages = to_messages(row)
    assert shape(messages) == [
        ("user", 2, "Before  after ?"),
        ("assistant", 0, "No."),
        ("user", 1, "And"),
        ("assistant", 0, "Yes."),
    ]
    assert [p["image"] for m in messages for p in m["content"] if p["type"] == "image"] == ["a", "b", "c"]


def test_text_without_a_marker_stays_as_it_is():
    assert shape(to_messages({"conversations": turns(" Hi \n", " Yes ")})) == [
        ("user", 0, " Hi \n"),
        ("assistant", 0, " Yes "),
    ]


BAD = {
    "no_object": ([1], "not an object"),
    "no_turns": ({"image": "0.png"}, "no conversation"),
    "empty": ({"conversations": []}, "no conversation"),
    "no_answer": ({"conversations": turns("Hi?")}, "each question needs an answer"),
    "last_unanswered": ({"conversations": turns("Hi?", "Yes.", "And?")}, "each question needs an answer"),
    "empty_answer": ({"conversations": turns("Hi?", " ")}, "answer in turn 2 is empty"),
    "answer_first": ({"conversations": turns("Hi?", "Yes.")[::-1]}, "must alternate"),
    "only_system": ({"messages": [{"role": "system", "content": "Be brief."}]}, "must alternate"),
    "role": ({"messages": [{"role": "tool", "content": "x"}]}, "'tool'"),
    "value": ({"conversations": [{"from": "human"}]}, "`from` and `value`"),
    "content": ({"messages": [{"role": "user", "content": 5}]}, "turn 1"),
    "part": ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "video"),
    "more_markers": ({"image": "0.png", "conversations": turns("<image> <image>?", "Yes.")}, "1 images, but 2"),
    "marker_alone": ({"conversations": turns("<image>?", "Yes.")}, "0 images, but 1"),
    "more_images": ({"image": ["0.png", "1.png"], "conversations": turns("<image>?", "Yes.")}, "2 images, but 1"),
    "no_marker": ({"image": "0.png", "conversations": turns("Hi?", "Yes.")}, "1 images, but 0"),
    "marker_in_answer": ({"image": "0.png", "conversations": turns("Hi?", "<image> Yes.")}, "only user turns"),
    "missing_image": (
        {"image": "none.png", "conversations": turns("<image>?", "Yes.")},
        "cannot open image 'none.png': there is no file",
    ),
    "address": ({"image": "https://a.org/0.png", "conversations": turns("<image>?", "Yes.")}, "it is an address"),
    "outside": ({"image": "../0.png", "conversations": turns("<image>?", "Yes.")}, "only files in there may be opened"),
    "damaged_image": ({"image": "damaged.png", "conversations": turns("<image>?", "Yes.")}, "cannot open image"),
    "not_a_path": ({"image": {"a": 1}, "conversations": turns("<image>?", "Yes.")}, "holds no image"),
    "too_many_images": ({"image": ["0.png"] * 5, "conversations": turns("<image>" * 5, "Yes.")}, "80 tokens"),
    "too_long": ({"conversations": turns("Is there a river? " * 20, "Yes.")}, "max_length=80"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_fails_by_name_or_is_skipped_and_counted(case, images, tmp_path, caplog):
    row, reason = BAD[case]
    (images / "damaged.png").write_bytes(b"no image")
    path = save(tmp_path, [llava_row(0), llava_row(1), {**row, "id": "seven"} if isinstance(row, dict) else row])
    encode = ConversationCollator(tiny_processor(), max_length=80).encode
    with pytest.raises(BadRow, match=reason) as error:
        list(ConversationDataset(path, images, encode=encode))
    assert f"{path}, row 2" in str(error.value) and "on_bad_row='skip'" in str(error.value)
    assert "'seven'" in str(error.value) or not isinstance(row, dict)

    dataset = ConversationDataset(path, images, on_bad_row="skip", encode=encode)
    samples = list(dataset) + list(dataset)
    assert dataset.num_bad_rows == 1
    assert len(samples) == 2 * len(dataset)
    good = [sample["input_ids"] for sample in samples[:2]]
    assert all(sample["input_ids"] in good for sample in samples)
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 1 and warned[0].startswith(f"Skipped {path}, row 2")


def test_images_outside_of_the_folder_are_opened_only_if_allowed(images, tmp_path, monkeypatch):
    encode = ConversationCollator(tiny_processor()).encode
    rows = [{**llava_row(0), "image": str(images / "0.png")}, llava_row(1)]
    (images / "inner").mkdir(exist_ok=True)
    path = save(tmp_path, [rows[0]])
    for rows_given in (path, rows[:1]):  # a folder that is named binds rows in memory as well
        with pytest.raises(BadRow, match=r"row 0 \(id '0'\): .*only files in there"):
            ConversationDataset(rows_given, images / "inner", encode=encode)[0]
        assert ConversationDataset(rows_given, images / "inner", encode=encode, allow_outside_images=True)[0]
    monkeypatch.chdir(images / "inner")  # where the images of a file are if no folder is named
    with pytest.raises(BadRow, match="only files in there"):
        ConversationDataset(path, encode=encode)[0]
    (first,) = ConversationDataset(rows[:1], encode=encode)
    expected = ConversationDataset(path, images, encode=encode)[0]
    assert torch.equal(first["pixel_values"], expected["pixel_values"])
    bound = ConversationCollator(tiny_processor(), image_root=images / "inner")
    with pytest.raises(ValueError, match="only files in there"):
        bound(rows[:1])


def test_an_oriented_photo_is_the_same_through_every_door(tmp_path):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8))
    exif = photo.getexif()
    exif[0x0112] = 6
    path = tmp_path / "photo.jpg"
    photo.save(path, exif=exif, quality=95)
    content = path.read_bytes()
    collator = ConversationCollator(tiny_processor())
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
        }
    )
    stored = datasets.Dataset.from_list([{"image": {"bytes": content, "path": None}, "messages": CHAT}], features)
    doors = [[{"image": image, "messages": CHAT}] for image in (str(path), path.as_uri(), content, Image.open(path))]
    doors.append("data:image/jpeg;base64," + base64.b64encode(content).decode())
    doors[-1] = [{"image": doors[-1], "messages": CHAT}]
    expected = tiny_processor().image_processor(ImageOps.exif_transpose(Image.open(path)), return_tensors="pt")
    for rows in (*doors, stored):
        seen = ConversationDataset(rows, encode=collator.encode)[0]["pixel_values"]
        assert torch.equal(seen, expected["pixel_values"])


def test_columns_that_a_row_does_not_use():
    """Tables have every column in every row."""
    for unused in ({"images": []}, {"images": None}):
        assert shape(to_messages({**llava_row(0), **unused}))[0][:2] == ("user", 1)
    for unused in ("", None, []):
        assert shape(to_messages({"image": unused, "conversations": turns("Hi?", "Yes.")}))[0][:2] == ("user", 0)
    rows = [{"source_dataset": source, "conversations": turns("Hi?", "Yes.")} for source in (["DOTA"], {"a": 1}, "", "x")]
    assert ConversationDataset(rows).sources == {"['DOTA']": 1, "{'a': 1}": 1, "unknown": 1, "x": 1}


def test_a_byte_order_mark_is_no_part_of_a_row(tmp_path):
    rows = [{"conversations": turns("Hi?", "Yes.")}] * 2
    for name, text in {"a.json": json.dumps(rows), "a.jsonl": "\r\n".join(map(json.dumps, rows))}.items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert len(ConversationDataset(tmp_path / name)) == 2


def test_a_file_that_cannot_be_read_always_fails(tmp_path):
    path = tmp_path / "rows.json"
    for text, reason in {"[{": "not JSON", "{}": "not a list", "[]": "no rows"}.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=reason) as error:
            ConversationDataset(path, on_bad_row="skip")
        assert str(path) in str(error.value)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        ConversationDataset(path)
    with pytest.raises(FileNotFoundError):
        ConversationDataset(tmp_path / "none.json")
    path.write_text("no JSON")  # one kind of error for all that is wrong with the data
    with pytest.raises(BadRow, match="is not JSON"):
        ConversationDataset(path)


def test_a_bad_line_of_jsonl_is_named_by_its_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps({"conversations": turns("Hi?", "Yes.")}) + "\n{oops\n")
    with pytest.raises(BadRow, match=r"rows.jsonl, line 3: it is not JSON.*[^.]\. To skip such rows, set"):
        ConversationDataset(path)
    dataset = ConversationDataset(path, on_bad_row="skip")
    assert (len(dataset), dataset.num_bad_rows) == (1, 1)


def test_no_good_row_at_all_is_an_error(tmp_path):
    rows = [{"image": "none.png", "conversations": turns("<image>?", "Yes.")}] * 2
    dataset = ConversationDataset(save(tmp_path, rows), on_bad_row="skip")
    with pytest.raises(BadRow, match="none of 2 rows"):
        dataset[0]


def test_workers_of_a_loader_count_into_the_same_number(images, tmp_path):
    rows = [llava_row(0), {"image": "none.png", "conversations": turns("<image>?", "Yes.")}, llava_row(1), llava_row(2)]
    collator = ConversationCollator(tiny_processor())
    dataset = ConversationDataset(save(tmp_path, rows), images, "skip", collator.encode)
    batches = list(DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=collator))
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2]
    assert dataset.num_bad_rows == 1


def test_datasets_objects_with_images_inside(images):
    rows = {"messages": [CHAT, CHAT], "images": [[str(images / "0.png")], [str(images / "1.png")]]}
    features = {"messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})}
    stored = datasets.Dataset.from_dict(rows, datasets.Features({**features, "images": datasets.List(datasets.Image())}))
    collator = ConversationCollator(tiny_processor())
    from_object = ConversationDataset(stored, encode=collator.encode)
    from_lists = ConversationDataset([llava_row(0), llava_row(1)], images, encode=collator.encode)
    for seen, expected in zip(from_object, from_lists, strict=True):
        assert seen["input_ids"] == expected["input_ids"]
        assert torch.equal(seen["pixel_values"], expected["pixel_values"])
    single = datasets.Dataset.from_dict({"messages": [CHAT], "image": [str(images / "0.png")]}).cast_column(
        "image", datasets.Image()
    )
    assert ConversationDataset(single, encode=collator.encode)[0]["input_ids"] == from_object[0]["input_ids"]
    with pytest.raises(TypeError, match="no length"):
        ConversationDataset(stored.to_iterable_dataset())


# Labels


@pytest.mark.parametrize("entry", MANIFEST["preprocess_v1"], ids=lambda e: f"{e['template']}-{e['tokenizer_legacy']}")
def test_labels_of_the_published_training(entry, images):
    values = [value for turn in entry["turns"] for value in turn]
    row = {"conversations": turns(*values)}
    if entry["has_image"]:
        row["image"] = "0.png"
        row["conversations"][0]["value"] += "\n<image>"
    collator = ConversationCollator(tiny_processor("prefix", entry["tokenizer_legacy"]), prompt_version=entry["template"])
    sample = ConversationDataset([row], images, encode=collator.encode)[0]
    visual = TOKENS * entry["has_image"]
    real = [(i, label) for i, label in zip(entry["input_ids"], entry["labels"], strict=True) if i != MARKER]
    assert sample["input_ids"] == [collator.processor.image_token_id] * visual + [i for i, _ in real]
    assert sample["labels"] == [-100] * visual + [label for _, label in real]


def test_batch_of_the_published_training(processor):
    """Right padding, ids and labels of the batch that the published code trained on."""
    entry = MANIFEST["train_batch2_right_padded"]
    conversations = [e["turns"] for e in MANIFEST["preprocess_v1"] if e["template"] == "mfrsvlm_v1" and e["has_image"]]
    texts = conversations[:2]
    rows = [
        {"image": image, "conversations": turns(*[v for turn in text for v in turn])}
        for image, text in zip(entry["images"], texts, strict=True)
    ]
    for row in rows:
        row["conversations"][0]["value"] = "<image>\n" + row["conversations"][0]["value"]
    collator = ConversationCollator(processor)
    batch = collator([collator.encode(m["messages"]) for m in ConversationDataset(rows, REFERENCE)])
    for ids, labels, seen_ids, seen_labels in zip(
        entry["input_ids"], entry["labels"], batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True
    ):
        real = [(i, label) for i, label in zip(ids, labels, strict=True) if i != MARKER]
        n = max(k for k, (_, label) in enumerate(real) if label != -100) + 1
        assert seen_ids[: 576 + n] == [processor.image_token_id] * 576 + [i for i, _ in real[:n]]
        assert seen_labels[: 576 + n] == [-100] * 576 + [label for _, label in real[:n]]
        assert set(seen_labels[576 + n :]) <= {-100}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_plain_template_labels_the_caption_only(placement, images):
    """Image tokens, the caption and a line break, with the loss on the last two."""
    processor = tiny_processor(placement)
    collator = ConversationCollator(processor, template="plain")
    sample = ConversationDataset([llava_row(0)], images, encode=collator.encode)[0]
    assert "Is" not in processor.tokenizer.decode(sample["input_ids"])
    labeled = [label for label in sample["labels"] if label != -100]
    visual, bos = [processor.image_token_id] * TOKENS, [processor.tokenizer.bos_token_id]
    assert sample["input_ids"] == (visual + bos if placement == "prefix" else bos + visual) + labeled
    assert processor.tokenizer.decode(labeled).strip(" ") == ANSWER + "\n"
    if placement == "prefix":
        assert labeled == processor.tokenizer(ANSWER + "\n", add_special_tokens=False).input_ids
    for row, reason in {"turns": turns("<image>?", "A", "B?", "C"), "image": turns("?", "A")}.items():
        rows = [{"conversations": reason, **({"image": "0.png"} if row == "turns" else {})}]
        with pytest.raises(BadRow, match=row):
            ConversationDataset(rows, images, encode=collator.encode)[0]


# Truncation and batches


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("max_length", range(17, 110, 4))
def test_truncation_cuts_text_only_and_from_the_end(placement, max_length, images):
    row = {"image": ["0.png", "1.png"], "conversations": turns("<image>?", "A river.", "<image> And?", "A bridge.")}
    processor = tiny_processor(placement)
    whole = ConversationDataset([row], images, encode=ConversationCollator(processor).encode)[0]
    dataset = ConversationDataset([row], images, encode=ConversationCollator(processor, max_length=max_length).encode)
    image = processor.image_token_id
    text = [(i, label) for i, label in zip(whole["input_ids"], whole["labels"], strict=True) if i != image]
    room = max_length - 2 * TOKENS
    if room < 1:
        with pytest.raises(BadRow, match="images alone have 32 tokens"):
            dataset[0]
    elif all(label == -100 for _, label in text[:room]):
        with pytest.raises(BadRow, match="truncates all answers"):
            dataset[0]
    else:
        cut = dataset[0]
        assert len(cut["input_ids"]) == min(max_length, len(whole["input_ids"]))
        assert cut["input_ids"].count(image) == 2 * TOKENS and len(cut["pixel_values"]) == 2
        seen = [(i, label) for i, label in zip(cut["input_ids"], cut["labels"], strict=True) if i != image]
        assert seen == text[:room]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_batch_mixes_samples_with_and_without_images(placement, images):
    rows = [llava_row(0), {"conversations": turns("Hi?", "Yes.")}, {**llava_row(1), "id": "x"}]
    collator = ConversationCollator(tiny_processor(placement))
    samples = list(ConversationDataset(rows, images, encode=collator.encode))
    batch = collator(samples)
    lengths = [len(sample["input_ids"]) for sample in samples]
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    assert batch["input_ids"].shape == batch["labels"].shape == (3, max(lengths))
    assert torch.equal(batch["pixel_values"], torch.cat([samples[0]["pixel_values"], samples[2]["pixel_values"]]))
    assert (batch["labels"][1, lengths[1] :] == -100).all()
    assert "pixel_values" not in collator(samples[1:2])
    raw = list(ConversationDataset(rows, images))
    assert all(torch.equal(tensor, batch[name]) for name, tensor in collator(raw).items())


def test_settings_that_make_no_sense():
    with pytest.raises(ValueError, match="'sharegpt'"):
        ConversationCollator(tiny_processor(), template="sharegpt")
    with pytest.raises(ValueError, match="max_length=1"):
        ConversationCollator(tiny_processor(), max_length=1)
    with pytest.raises(ValueError, match="'ignore'"):
        ConversationDataset([llava_row(0)], on_bad_row="ignore")


# Order


def test_groups_are_of_one_modality_and_like_length():
    rng = np.random.default_rng(0)
    lengths = [int(n) if n % 3 else -int(n) for n in rng.integers(1, 500, 203)]
    sampler = ModalityLengthSampler(lengths, group_size=8, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(203))
    assert order == list(sampler)
    groups = [[lengths[i] for i in order[start : start + 8]] for start in range(0, 203, 8)]
    mixed = [group for group in groups if min(group) < 0 < max(group)]
    assert len(mixed) <= 2
    spread = np.mean([np.ptp(np.abs(group)) for group in groups])
    random = rng.permutation(np.abs(lengths))[:200].reshape(-1, 8)
    assert spread < 0.5 * np.mean(np.ptp(random, axis=1))
    sampler.set_epoch(1)
    assert list(sampler) != order
    assert sorted(ModalityLengthSampler([-5], 4)) == [0]
    assert sorted(ModalityLengthSampler([5, -5, 6], 2)) == [0, 1, 2]


def test_lengths_tell_modalities_apart(images):
    dataset = ConversationDataset([llava_row(0), {"conversations": turns("a b", "c")}], images)
    words = len((QUESTION + " " + ANSWER).split())
    assert dataset.modality_lengths(TOKENS) == [TOKENS + words, -3]
    assert dataset.sources == {"tiny": 1, "unknown": 1}
