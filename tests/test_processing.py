"""The processor: the published ids and labels, both placements, every shape of batch, and clear errors."""

import base64
import builtins
import json
import shutil
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from fake_network import fake_network
from hypothesis import HealthCheck, given, settings
from PIL import ExifTags, Image, ImageOps
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, processing_utils

from mfrsvlm import MFRSVLMImageProcessor, MFRSVLMProcessor
from mfrsvlm.convert_checkpoint import IMAGE_TOKEN, read_tokenizer
from mfrsvlm.processing_mfrsvlm import make_chat_template


REFERENCE = Path(__file__).parent / "reference"
BOX = Path(__file__).parents[1] / "demo" / "model"
MANIFEST = json.loads((REFERENCE / "manifest.json").read_text())
MARKER = -200  # stands for the <image> marker in the manifest
TINY = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, "patch_size": 7, "window_sizes": [28, 14]}
TOKENS = 16  # visual tokens of a tiny image
OPENING = "<s> "  # of the chat template: the tokenizers here take a word after `<s>` for a new one only with a space
PLACEMENTS = ["inline", "prefix"]
SIDES = ["left", "right"]


def picture(seed: int = 0, height: int = 20, width: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def tokenizer_of_release(legacy: bool):
    tokenizer = LlamaTokenizer.from_pretrained(REFERENCE / "checkpoint", legacy=legacy)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.padding_side = "left"
    return tokenizer


def make(placement: str = "inline", legacy: bool = False) -> MFRSVLMProcessor:
    tokenizer = tokenizer_of_release(legacy)
    template = make_chat_template(tokenizer)
    return MFRSVLMProcessor(MFRSVLMImageProcessor(**TINY), tokenizer, chat_template=template, image_placement=placement)


TINY_PROCESSORS = {placement: make(placement) for placement in PLACEMENTS}


@pytest.fixture(params=PLACEMENTS)
def tiny(request) -> MFRSVLMProcessor:
    """A processor of 16 tokens an image, in each placement."""
    return TINY_PROCESSORS[request.param]


def expected_ids(processor: MFRSVLMProcessor, prompt: str) -> list[int]:
    """Ids of one prompt without padding: from the tokenizer alone."""
    image = [processor.image_token_id] * TOKENS
    if processor.image_placement == "inline":
        return processor.tokenizer(prompt.replace(IMAGE_TOKEN, IMAGE_TOKEN * TOKENS)).input_ids
    pieces = prompt.split(IMAGE_TOKEN)
    ids = processor.tokenizer(pieces[0]).input_ids
    for piece in pieces[1:]:
        ids += processor.tokenizer(piece, add_special_tokens=False).input_ids
    return image * (len(pieces) - 1) + ids


def user(text: str, images: int = 0, **content) -> dict:
    return {"role": "user", "content": [{"type": "image", **content}] * images + [{"type": "text", "text": text}]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


# The published ids


def prefix_ids(ids: list[int], tokens: int, image_token_id: int) -> list[int]:
    """Ids of the manifest in the order of the model: all visual tokens first."""
    return [image_token_id] * (tokens * ids.count(MARKER)) + [token for token in ids if token != MARKER]


@pytest.mark.parametrize("name", MANIFEST["samples"])
def test_ids_of_the_reference(processor, name):
    sample = MANIFEST["samples"][name]
    files = sample.get("images", [sample["image"]] if "image" in sample else [])
    images = [Image.open(REFERENCE / file) for file in files]
    outputs = processor(images=images or None, text=sample["prompt"], window_sizes=[])
    assert outputs["input_ids"] == [prefix_ids(sample["input_ids"], 576, processor.image_token_id)]
    assert len(outputs["input_ids"][0]) == sample["layout"]["total"]
    assert outputs["input_ids"][0].index(processor.tokenizer.bos_token_id) == sample["layout"]["bos_position"]
    assert len(outputs.get("pixel_values", [])) == len(files)


@pytest.mark.parametrize("legacy", [False, True])
def test_ids_of_both_tokenizers(legacy):
    sample = MANIFEST["samples"]["two_turn"]
    processor = make("prefix", legacy)
    ids = sample["input_ids_tokenizer_legacy_true" if legacy else "input_ids"]
    assert sample["input_ids_tokenizer_legacy_true"] != sample["input_ids"]
    assert processor(picture(), sample["prompt"])["input_ids"] == [prefix_ids(ids, TOKENS, processor.image_token_id)]


@pytest.mark.parametrize("flag", [True, False, None])
def test_legacy_flag_of_a_release_survives_saving(flag, tmp_path):
    """A missing flag counts as set, as it did when the checkpoints were released."""
    source = tmp_path / "release"
    shutil.copytree(REFERENCE / "checkpoint", source, ignore=shutil.ignore_patterns("*.bin", "vision_tower"))
    content = json.loads((source / "tokenizer_config.json").read_text())
    content.pop("legacy")
    if flag is not None:
        content["legacy"] = flag
    (source / "tokenizer_config.json").chmod(0o644)
    (source / "tokenizer_config.json").write_text(json.dumps(content))
    tokenizer = read_tokenizer(source)
    tokenizer.save_pretrained(tmp_path / "saved")
    sample = MANIFEST["samples"]["two_turn"]
    ids = sample["input_ids" if flag is False else "input_ids_tokenizer_legacy_true"]
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        encoded = each(sample["prompt"].split(IMAGE_TOKEN), is_split_into_words=True).input_ids
        assert encoded == [token for token in ids if token != MARKER]


@pytest.mark.parametrize("entry", MANIFEST["preprocess_v1"], ids=lambda e: f"{e['template']}-{e['tokenizer_legacy']}")
def test_ids_and_labels_of_published_training(entry):
    """Labels are the ids of the assistant mask; both templates, both tokenizers, with and without an image."""
    processor = make("prefix", entry["tokenizer_legacy"])
    conversation = []
    for index, (question, answer) in enumerate(entry["turns"]):
        with_image = entry["has_image"] and index == 0
        conversation += [user(question, int(with_image), **({"image": picture()} if with_image else {})), assistant(answer)]
    outputs = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, prompt_version=entry["template"]
    )
    assert outputs["input_ids"] == [prefix_ids(entry["input_ids"], TOKENS, processor.image_token_id)]
    labels = [
        token if mask else -100 for token, mask in zip(outputs["input_ids"][0], outputs["assistant_masks"][0], strict=True)
    ]
    expected = [label for label, token in zip(entry["labels"], entry["input_ids"], strict=True) if token != MARKER]
    assert labels == [-100] * (TOKENS * entry["has_image"]) + expected
    assert sum(outputs["assistant_masks"][0]) == entry["n_label"]


@pytest.mark.parametrize("legacy", [False, True])
def test_ids_survive_generations_of_saving(legacy, tmp_path):
    """A derived checkpoint of a derived checkpoint reads text as the first one did."""
    processor = make("prefix", legacy)
    prompt = MANIFEST["samples"]["two_turn"]["prompt"]
    expected = processor(picture(), prompt)["input_ids"]
    for generation in range(3):
        processor.save_pretrained(tmp_path / str(generation))
        processor = MFRSVLMProcessor.from_pretrained(tmp_path / str(generation))
        assert processor(picture(), prompt)["input_ids"] == expected, generation


# Prompts and images

PROMPTS = {
    "text_only": "Is there a river?",
    "image_first": "USER: <image>\nIs there a river? ASSISTANT:",
    "image_last": "What is this? <image>",
    "image_alone": "<image>",
    "two_images": "<image>\n<image>\nWhat changed? ASSISTANT:",
    "two_images_apart": "Before: <image> after: <image> what changed?",
    "three_images_touching": "<image><image><image>",
    "after_an_answer": "USER: <image>\nHi ASSISTANT: Hello.</s>USER: <image> and this? ASSISTANT:",
    "empty": "",
    "spaces": "  <image>  \n ",
    "unicode": "Où est le 港口? <image> 🛰️",
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_every_marker_becomes_the_tokens_of_an_image(tiny, prompt):
    count = prompt.count(IMAGE_TOKEN)
    images = [picture(seed) for seed in range(count)]
    outputs = tiny(images=images or None, text=prompt, return_tensors="pt")
    assert outputs["input_ids"].tolist() == [expected_ids(tiny, prompt)]
    assert outputs["attention_mask"].tolist() == [[1] * outputs["input_ids"].shape[1]]
    visual = outputs["input_ids"][0] == tiny.image_token_id
    assert visual.sum() == TOKENS * count
    if tiny.image_placement == "prefix":
        assert visual[: TOKENS * count].all()
        assert outputs["input_ids"][0, TOKENS * count] == tiny.tokenizer.bos_token_id
    else:
        assert outputs["input_ids"][0, 0] == tiny.tokenizer.bos_token_id
    assert ("pixel_values" in outputs) == bool(count)
    if count:
        alone = tiny.image_processor(images, return_tensors="pt")
        assert torch.equal(outputs["pixel_values"], alone["pixel_values"])


BATCHES = {
    "one_two_none": ["One: <image>", "Two: <image> and <image>, what changed between them?", "None at all."],
    "none": ["Short.", "A prompt of a few more words."],
    "one_each": ["<image>\nShort.", "<image>\nA prompt of a few more words."],
    "single": ["One: <image>"],
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("batch", BATCHES)
def test_batches_are_their_samples_padded(tiny, batch, nested, side):
    prompts = BATCHES[batch]
    counts = [prompt.count(IMAGE_TOKEN) for prompt in prompts]
    groups = [[picture(10 * row + column) for column in range(count)] for row, count in enumerate(counts)]
    images = groups if nested else [image for group in groups for image in group]
    outputs = tiny(images=images, text=prompts, padding=True, padding_side=side, return_tensors="pt")
    rows = [expected_ids(tiny, prompt) for prompt in prompts]
    width = max(map(len, rows))
    for index, row in enumerate(rows):
        fill = width - len(row)
        pads, zeros, ones = [tiny.tokenizer.pad_token_id] * fill, [0] * fill, [1] * len(row)
        assert outputs["input_ids"][index].tolist() == (pads + row if side == "left" else row + pads)
        assert outputs["attention_mask"][index].tolist() == (zeros + ones if side == "left" else ones + zeros)
    if any(counts):
        flat = [image for group in groups for image in group]
        assert torch.equal(outputs["pixel_values"], tiny.image_processor(flat, return_tensors="pt")["pixel_values"])
    else:
        assert "pixel_values" not in outputs


def test_images_and_text_alone(tiny):
    assert set(tiny(images=picture())) == {"pixel_values"}
    assert set(tiny(text="Hello")) == {"input_ids", "attention_mask"}
    assert set(tiny(text=["Hello"], images=[])) == {"input_ids", "attention_mask"}
    assert set(tiny(text=["Hello", "you"], images=[[], []])) == {"input_ids", "attention_mask"}


def test_outputs_are_those_that_the_model_names(tiny):
    assert tiny.model_input_names == ["pixel_values", "input_ids", "attention_mask"]
    assert set(tiny(picture(), "<image>")) == set(tiny.model_input_names)


@pytest.mark.parametrize(
    ("images", "text", "numbers"),
    [
        (1, "none", (0, 1)),
        (0, "<image>", (1, 0)),
        (1, "<image><image>", (2, 1)),
        (3, "<image> <image>", (2, 3)),
        (3, ["<image>", "<image>"], (2, 3)),
        ([1, 1], ["<image><image>", "none"], ([2, 0], [1, 1])),
        ([2, 0], ["<image>", "<image>"], ([1, 1], [2, 0])),
        ([1], ["<image>", "none"], ([1, 0], [1])),
        ([1, 1, 1], ["<image>", "<image>"], ([1, 1], [1, 1, 1])),
    ],
)
def test_counts_that_differ_are_both_named(tiny, images, text, numbers):
    """Also where only the counts of the single prompts differ, in a nested list."""
    if isinstance(images, list):
        images = [[picture()] * count for count in images]
    else:
        images = [picture()] * images or None
    with pytest.raises(ValueError) as error:
        tiny(images=images, text=text, padding=True)
    message = str(error.value).replace(" tokens, prompt by prompt,", " tokens")
    assert f"found {numbers[0]} tokens and {numbers[1]} images" in message
    assert IMAGE_TOKEN in message


def test_lists_and_single_images_do_not_mix(tiny):
    with pytest.raises(ValueError, match="mix lists and single images"):
        tiny(images=[picture(), [picture()]], text=["<image>", "<image>"])


@pytest.mark.parametrize("text", [5, b"bytes", ["a", None], [["a", "b"]], {"text": "a"}, [3]])
def test_wrong_types_of_text(tiny, text):
    with pytest.raises(TypeError, match="text must be a string or a list of strings"):
        tiny(text=text)


def test_nothing_given(tiny):
    with pytest.raises(ValueError, match="at least one"):
        tiny()
    with pytest.raises(ValueError, match="empty list"):
        tiny(text=[])
    with pytest.raises(ValueError, match=r"No images given|at least one"):
        tiny(images=[])


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((0, 4, 3), np.uint8), ValueError, "Image 1 of 2: it is empty"),
        (np.full((4, 4, 3), np.nan), ValueError, "Image 1 of 2: .*NaN"),
        (Image.new("F", (4, 4)), ValueError, "Image 1 of 2: its mode is 'F'"),
        ("missing.png", ValueError, r"missing\.png"),
        (None, TypeError, "Image 1 of 2: expected a PIL image.*NoneType"),
        (5, TypeError, "Image 1 of 2: expected a PIL image.*int"),
        (np.zeros((5, 5), np.uint16), ValueError, "Image 1 of 2: .*uint16"),
    ],
)
def test_bad_images_are_named(tiny, image, error, message):
    for images in ([picture(), image], [[picture(), image]]):
        with pytest.raises(error, match=message):
            tiny(images=images, text="<image><image>")
    with pytest.raises(error, match=message):
        tiny(images=[[picture()], [image]], text=["<image>", "<image>"])


@pytest.mark.parametrize("array", [np.zeros((20, 30), np.uint8), np.zeros((1, 20, 30, 3), np.uint8), torch.zeros(3, 20, 30)])
def test_single_arrays(tiny, array):
    outputs = tiny(images=array, text="<image>")
    assert outputs["input_ids"] == [expected_ids(tiny, "<image>")]


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"canvas_source": "x"}, ValueError, "canvas_source='x'"),
        ({"window_sizes": [100]}, ValueError, "100"),
        ({"window_sizes": 28}, TypeError, "window_sizes"),
        ({"images_kwargs": {"window_packing": "x"}}, ValueError, "window_packing='x'"),
        ({"do_resize": "yes"}, TypeError, "do_resize"),
        ({"padding": "sometimes"}, ValueError, "sometimes"),
        ({"max_length": "long"}, TypeError, "max_length"),
        ({"max_length": 0, "truncation": True}, ValueError, "max_length=0"),
        ({"text_kwargs": {"max_length": -1}, "truncation": True}, ValueError, "max_length=-1"),
        ({"pad_to_multiple_of": 0, "padding": True}, ValueError, "pad_to_multiple_of=0"),
        ({"return_tensors": "x"}, ValueError, "x"),
    ],
)
def test_nonsensical_settings(tiny, setting, error, message):
    with pytest.raises(error, match=message):
        tiny(images=picture(), text="<image>", **setting)


def test_settings_of_the_images_reach_them(tiny):
    outputs = tiny(picture(), "<image>", window_sizes=[14], window_overlap=0, return_tensors="pt")
    assert outputs["pixel_values"].shape == (1, 3 * 28**2 + 16 * 3 * 14**2)
    larger = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}, "return_tensors": "pt"}
    assert (tiny(picture(), "<image>", **larger)["input_ids"] == tiny.image_token_id).sum() == 64
    assert (tiny(picture(), "<image>", patch_size=14)["input_ids"][0]).count(tiny.image_token_id) == 4


# Length


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("padding", ["max_length", True])
def test_padding_to_a_length(tiny, padding, side):
    prompts = ["One: <image>", "None, but a good deal of text, which goes on and on."]
    rows = [expected_ids(tiny, prompt) for prompt in prompts]
    kwargs = {"max_length": 128} if padding == "max_length" else {"pad_to_multiple_of": 64}
    outputs = tiny(picture(), prompts, padding=padding, padding_side=side, return_tensors="pt", **kwargs)
    assert outputs["input_ids"].shape == (2, 128 if padding == "max_length" else 64)
    assert outputs["attention_mask"].sum(1).tolist() == [len(row) for row in rows]
    for ids, mask, row in zip(outputs["input_ids"], outputs["attention_mask"].bool(), rows, strict=True):
        assert ids[mask].tolist() == row
        assert mask[-1 if side == "left" else 0]


def test_ragged_batches_need_padding(tiny):
    prompts = ["Short.", "A prompt of a few more words."]
    assert [len(row) for row in tiny(text=prompts)["input_ids"]] == [len(expected_ids(tiny, prompt)) for prompt in prompts]
    with pytest.raises(ValueError, match="padding"):
        tiny(text=prompts, return_tensors="pt")


@pytest.mark.parametrize("truncation_side", SIDES)
def test_prefix_placement_truncates_text_only(truncation_side):
    processor = make("prefix")
    processor.tokenizer.truncation_side = truncation_side
    prompt = "One: <image> and then a good deal of text, which goes on and on."
    full = expected_ids(processor, prompt)
    text = full[TOKENS:]
    outputs = processor(picture(), prompt, truncation=True, max_length=TOKENS + 9)["input_ids"][0]
    assert len(outputs) == TOKENS + 9
    assert outputs[:TOKENS] == full[:TOKENS]
    # The tokenizer keeps <s>, and cuts its own side of the rest.
    assert outputs[TOKENS:] == (text[:9] if truncation_side == "right" else [text[0], *text[-8:]])
    assert processor(picture(), prompt, truncation=True, max_length=len(full))["input_ids"] == [full]
    with pytest.raises(ValueError, match=f"max_length={TOKENS} leaves no room for text after {TOKENS} image tokens"):
        processor(picture(), prompt, truncation=True, max_length=TOKENS)
    # Without images, all of the length is text; the tokenizer's own limit holds where none is given.
    assert len(processor(text="word " * 99, truncation=True, max_length=9)["input_ids"][0]) == 9
    assert len(processor(picture(), "word " * 3000 + "<image>", truncation=True)["input_ids"][0]) == 2048


def test_inline_placement_refuses_to_truncate_images():
    processor = TINY_PROCESSORS["inline"]
    prompt = "One: <image> and then a good deal of text, which goes on and on."
    full = expected_ids(processor, prompt)
    end = len(full) - full[::-1].index(processor.image_token_id)
    assert processor(picture(), prompt, truncation=True, max_length=end)["input_ids"] == [full[:end]]
    for length in (end - 1, end - TOKENS, 1):
        with pytest.raises(ValueError, match=r"image.*max_length"):
            processor(picture(), prompt, truncation=True, max_length=length)


def test_token_types_and_offsets(tiny):
    prompts = ["Before <image> after", "No image, but a few words"]
    for side in SIDES:
        outputs = tiny(
            picture(),
            prompts,
            padding=True,
            padding_side=side,
            return_mm_token_type_ids=True,
            return_offsets_mapping=True,
        )
        for ids, types, offsets in zip(
            outputs["input_ids"], outputs["mm_token_type_ids"], outputs["offset_mapping"], strict=True
        ):
            assert types == [int(token == tiny.image_token_id) for token in ids]
            assert len(offsets) == len(ids)
            for token, (start, end) in zip(ids, offsets, strict=True):
                written = tiny.tokenizer.decode([token]).strip()
                if tiny.image_placement == "inline" and token == tiny.image_token_id:
                    assert prompts[0][start:end] == IMAGE_TOKEN
                elif start == end:
                    assert token in tiny.tokenizer.all_special_ids
                else:
                    assert written in prompts["No" in tiny.tokenizer.decode(ids)][start:end]
    assert "attention_mask" not in tiny(text="Hello", return_attention_mask=False)
    bare = tiny(text="Hello", add_special_tokens=False)["input_ids"][0]
    assert bare == tiny.tokenizer("Hello", add_special_tokens=False).input_ids


def test_prefix_placement_refuses_what_it_cannot_do():
    for name in ("return_overflowing_tokens", "return_special_tokens_mask", "return_length"):
        with pytest.raises(ValueError, match=name):
            TINY_PROCESSORS["prefix"](text="Hello", **{name: True})


# Conversations

HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the human's questions. "
)
USER = HUMAN.replace("human", "user")


@pytest.mark.parametrize(("version", "preamble"), [(None, HUMAN), ("mfrsvlm_v1", HUMAN), ("v1", USER)])
def test_prompts(tiny, version, preamble):
    kwargs = {} if version is None else {"prompt_version": version}
    conversation = [user("Is it <b>big</b>?", 2), assistant("Yes."), user("Why?")]
    preamble = OPENING + preamble
    expected = preamble + "USER: <image>\n<image>\nIs it <b>big</b>? ASSISTANT: Yes.</s>USER: Why? "
    assert tiny.apply_chat_template(conversation, **kwargs) == expected
    assert tiny.apply_chat_template(conversation, add_generation_prompt=True, **kwargs) == expected + "ASSISTANT:"
    batch = tiny.apply_chat_template([conversation, [user("Hi")]], add_generation_prompt=True, **kwargs)
    assert batch == [expected + "ASSISTANT:", preamble + "USER: Hi ASSISTANT:"]


@pytest.mark.parametrize("name", [name for name in MANIFEST["samples"] if name not in ("text_only", "two_turn")])
def test_conversations_give_the_published_prompts(tiny, name):
    sample = MANIFEST["samples"][name]
    count = len(sample.get("images", [sample.get("image")]))
    question = sample["prompt"].split("<image>\n")[-1].removesuffix(" ASSISTANT:")
    prompt = tiny.apply_chat_template([user(question, count)], add_generation_prompt=True)
    assert prompt == OPENING + sample["prompt"]


def test_content_may_be_a_string(tiny):
    lists = [user("Hi"), assistant("Hello."), user("Why?")]
    strings = [{"role": message["role"], "content": message["content"][0]["text"]} for message in lists]
    assert tiny.apply_chat_template(strings) == tiny.apply_chat_template(lists)


@pytest.mark.parametrize("content", ["Be brief.", [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]])
def test_a_system_message_replaces_the_preamble(tiny, content):
    conversation = [{"role": "system", "content": content}, user("Hi", 1)]
    assert tiny.apply_chat_template(conversation) == OPENING + "Be brief. USER: <image>\nHi "


def test_images_come_first_in_their_turn(tiny):
    content = [{"type": "text", "text": "What "}, {"type": "image"}, {"type": "text", "text": "is this?"}, {"type": "image"}]
    prompt = tiny.apply_chat_template([{"role": "user", "content": content}])
    assert prompt == OPENING + HUMAN + "USER: <image>\n<image>\nWhat is this? "


@pytest.mark.parametrize(
    ("conversation", "kwargs", "message"),
    [
        ([user("Hi")], {"prompt_version": "v9"}, "Unknown prompt_version v9: use one of mfrsvlm_v1, v1"),
        ([{"role": "tool", "content": "4"}], {}, "Unknown role 'tool' of turn 1"),
        ([{"content": "Hi"}], {}, "Unknown role None of turn 1"),
        ([user("Hi"), {"role": "system", "content": "Late"}], {}, "Unknown role system.*first"),
        ([{"role": "user", "content": [{"type": "video"}]}], {}, "Content of type 'video' in part 1 of turn 1"),
        ([{"role": "user", "content": [{"text": "Hi"}]}], {}, "Content of type None in part 1 of turn 1"),
        ([{"role": "system", "content": [{"type": "image"}]}, user("Hi")], {}, "system message may hold text only"),
        ([user("Hi"), {"role": "assistant", "content": [{"type": "image"}]}], {}, "assistant message holds an image"),
    ],
)
def test_bad_conversations(tiny, conversation, kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny.apply_chat_template(conversation, **kwargs)


def byte_level_tokenizer(*before: str) -> PreTrainedTokenizerFast:
    """That of the model in the box, which puts the tokens `before` before every text."""
    tokenizer = Tokenizer.from_file(str(BOX / "tokenizer.json"))
    known = [(token, tokenizer.token_to_id(token)) for token in before]
    tokenizer.post_processor = TemplateProcessing(single=" ".join([*before, "$A"]), special_tokens=known)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=[IMAGE_TOKEN],
        **({"bos_token": before[0]} if before else {}),
    )


TOKENIZERS = {
    "released": lambda: tokenizer_of_release(False),
    "released, legacy": lambda: tokenizer_of_release(True),
    "in the box": lambda: byte_level_tokenizer("<s>"),
    "without a token for the beginning": byte_level_tokenizer,
}
TALK = [user("Is there a <b>river</b>?", 2, image=picture()), assistant("Yes, two."), user("Where?", 1, image=picture(1))]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("make_tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_every_way_from_a_conversation_gives_the_same_ids(make_tokenizer, placement):
    """Those of the conversation as text, to which the tokenizer adds its own `<s>`: models in use were trained with them."""
    tokenizer = make_tokenizer()
    template = make_chat_template(tokenizer)
    processor = MFRSVLMProcessor(MFRSVLMImageProcessor(**TINY), tokenizer, chat_template=template, image_placement=placement)
    written = (
        HUMAN + "USER: <image>\n<image>\nIs there a <b>river</b>? ASSISTANT: Yes, two.</s>USER: <image>\nWhere? ASSISTANT:"
    )
    expected = expected_ids(processor, written)
    assert expected.count(tokenizer.bos_token_id) == (tokenizer.bos_token is not None)
    text, images = processor.apply_chat_template(TALK, add_generation_prompt=True), [picture(), picture(), picture(1)]
    ways = {
        "apply_chat_template": processor.apply_chat_template(
            TALK, add_generation_prompt=True, tokenize=True, return_dict=True
        ),
        "processor": processor(images, text),
        "batch": processor(images + images, [text, text], padding=True),
    }
    ways["trainers"] = processor(images, text, add_special_tokens=False)
    ways["trainers, nested"] = processor(images, text, text_kwargs={"add_special_tokens": False})
    if placement == "inline":  # where the visual tokens lie elsewhere, only the processor knows
        widened = text.replace(IMAGE_TOKEN, IMAGE_TOKEN * TOKENS)
        ways["servers"] = tokenizer([widened], add_special_tokens=False)
    for way, outputs in ways.items():
        assert all(ids == expected for ids in outputs["input_ids"]), way


def test_a_template_writes_the_first_token_only_where_the_tokenizer_would():
    silent = byte_level_tokenizer()
    silent.bos_token = "<s>"  # known, but not put before texts, as in SmolLM
    assert not make_chat_template(silent).startswith("{{- bos_token")
    assert make_chat_template(byte_level_tokenizer("<s>")).startswith("{{- bos_token")
    with pytest.raises(ValueError, match=r"<s>A chat between.*write a chat template"):
        make_chat_template(byte_level_tokenizer("<s>", "<pad>"))


def test_one_batch_begins_in_one_way(tiny):
    with pytest.raises(ValueError, match="1 of 2 prompts begin with '<s>'"):
        tiny(text=["<s> Hello", "Hello"])
    twice = tiny(text=["<s> Hello", "Hello"], add_special_tokens=True)["input_ids"]
    assert twice[0] == [tiny.tokenizer.bos_token_id, *twice[1]]


@pytest.mark.filterwarnings("error")
def test_template_settings_do_not_warn(tiny, monkeypatch):
    warnings = []
    for name in ("warning", "warning_once"):
        monkeypatch.setattr(processing_utils.logger, name, lambda *args: warnings.append(args))
    tiny.apply_chat_template(
        [user("Hi", 1, image=picture())],
        prompt_version="v1",
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    tiny(picture(), "<image>", padding=True, return_tensors="pt", return_mm_token_type_ids=True)
    tiny(picture(), ["<image>", "a"], padding=True, truncation=True, max_length=64)
    assert warnings == []


@pytest.fixture(scope="module")
def doors(tmp_path_factory):
    """Parts of a message that all show one JPEG, whose EXIF data turn it by a quarter."""
    folder = tmp_path_factory.mktemp("doors")
    file = folder / "image.jpg"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture().save(file, exif=exif)
    coded = base64.b64encode(file.read_bytes()).decode()
    data = f"data:image/jpeg;base64,{coded}"

    return {
        "picture": {"type": "image", "image": Image.open(file)},
        "path": {"type": "image", "path": str(file)},
        "path_object": {"type": "image", "image": file},
        "path_as_url": {"type": "image", "url": str(file)},
        "file_url": {"type": "image", "url": file.as_uri()},
        "web": {"type": "image", "url": "https://example.com/image.jpg"},
        "data_uri": {"type": "image", "url": data},
        "base64": {"type": "image", "base64": coded},
        "image_url": {"type": "image_url", "image_url": {"url": data}},
    }


DOORS = ["picture", "path", "path_object", "path_as_url", "file_url", "web", "data_uri", "base64", "image_url"]


@pytest.mark.parametrize("door", DOORS)
def test_images_of_a_conversation(tiny, doors, door, monkeypatch):
    """Whatever names an image, the model sees one frame: the upright one."""
    file = Path(doors["path"]["path"])
    fake_network(monkeypatch, file.read_bytes())
    outputs = tiny.apply_chat_template(
        [{"role": "user", "content": [doors[door], {"type": "text", "text": "Hi"}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    upright = ImageOps.exif_transpose(Image.open(file))
    assert upright.height > upright.width
    expected = tiny(np.array(upright), HUMAN + "USER: <image>\nHi ASSISTANT:", return_tensors="pt")
    assert outputs.keys() == expected.keys()
    assert all(torch.equal(outputs[name], expected[name]) for name in expected)


def test_an_image_without_pixels_is_an_error(tiny):
    with pytest.raises(ValueError, match="Part 1 of turn 1 has no image"):
        tiny.apply_chat_template([user("Hi", 1)], tokenize=True, return_dict=True)


@pytest.mark.parametrize("side", SIDES)
def test_assistant_masks_cover_the_answers(tiny, side):
    """Several turns and images, batched: the masked ids are those of the answers and their ends, nothing else."""
    answers = [["Yes, two.", "One."], ["A harbor with ships, seen from above."], ["No.", "Because it is night.", "Bye."]]
    images = [[2, 0], [1], [0, 1, 1]]
    conversations = []
    for row, texts in enumerate(answers):
        conversation = []
        for turn, text in enumerate(texts):
            conversation += [user(f"Question {turn}?", images[row][turn], image=picture(row)), assistant(text)]
        conversations.append(conversation)
    outputs = tiny.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": side},
    )
    assert outputs["assistant_masks"].shape == outputs["input_ids"].shape
    for row, texts in enumerate(answers):
        masked = outputs["input_ids"][row][outputs["assistant_masks"][row].bool()]
        decoded = tiny.tokenizer.decode(masked).replace("</s> ", "</s>")
        assert decoded == "".join(text + "</s>" for text in texts)
        assert (masked == tiny.tokenizer.eos_token_id).sum() == len(texts)
        assert not outputs["assistant_masks"][row][outputs["attention_mask"][row] == 0].any()
        assert not outputs["assistant_masks"][row][outputs["input_ids"][row] == tiny.image_token_id].any()


# Around the model


def test_answers_are_decoded(tiny):
    ids = tiny(picture(), ["<image>\nIs there a bridge?"], return_tensors="pt")["input_ids"]
    for decode in (tiny.post_process_image_text_to_text, tiny.batch_decode):
        (text,) = decode(ids, skip_special_tokens=True)
        assert text.strip() == "Is there a bridge?"
    assert tiny.decode(ids[0], skip_special_tokens=False).count(IMAGE_TOKEN) == TOKENS


def test_token_counts_are_known_without_pixels(tiny):
    counts = tiny._get_num_multimodal_tokens(image_sizes=[(20, 30), (1000, 2)])
    assert counts["num_image_tokens"] == [TOKENS, TOKENS]
    assert counts["num_image_patches"] == [1, 1]
    assert tiny._get_num_multimodal_tokens(image_sizes=[(9, 9)], patch_size=14)["num_image_tokens"] == [4]
    larger = {"height": 56, "width": 56}
    assert tiny._get_num_multimodal_tokens(image_sizes=[(9, 9)], crop_size=larger)["num_image_tokens"] == [64]


def test_saved_and_loaded_unchanged(tiny, tmp_path, monkeypatch):
    """Without a question whether the code in the folder may be run: the class is here already."""

    def ask(*args):
        raise AssertionError("asked on stdin")

    monkeypatch.setattr(builtins, "input", ask)
    tiny.save_pretrained(tmp_path)
    loaded = MFRSVLMProcessor.from_pretrained(tmp_path)
    assert type(loaded) is MFRSVLMProcessor
    assert type(loaded.image_processor) is MFRSVLMImageProcessor
    assert loaded.image_placement == tiny.image_placement
    assert loaded.chat_template == tiny.chat_template
    assert loaded.to_dict() == tiny.to_dict()
    prompts, images = ["<image> a <image>", "b"], [[picture(1), picture(2)], []]
    first, second = (each(images, prompts, padding=True, return_tensors="pt") for each in (tiny, loaded))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_converted_processor(processor):
    """What the released weights were trained with."""
    assert processor.image_placement == "prefix"
    assert processor.image_processor.canvas_source == "global_view"
    assert processor.image_processor.window_packing == "channels_first"
    assert processor.image_processor.window_sizes == [336, 168]
    assert processor.image_processor.num_image_tokens == 576
    assert processor.tokenizer.padding_side == "left"


def test_a_processor_needs_its_parts():
    tokenizer = tokenizer_of_release(False)
    with pytest.raises(ValueError, match="image_placement='middle'"):
        MFRSVLMProcessor(MFRSVLMImageProcessor(), tokenizer, image_placement="middle")
    with pytest.raises(ValueError, match="tokenizer=None"):
        MFRSVLMProcessor(MFRSVLMImageProcessor(), None)
    with pytest.raises(ValueError, match=r"does not know '<picture>' as one token.*add_special_tokens"):
        MFRSVLMProcessor(MFRSVLMImageProcessor(), tokenizer, image_token="<picture>")


# Anything else

TEXT_SETTINGS = {
    "padding": [True, False, "longest", "max_length", "nonsense"],
    "truncation": [True, False, "longest_first", "nonsense"],
    "max_length": [1, 9, 17, 40, 100, 0, -3, 10**30],
    "pad_to_multiple_of": [8, 1, 0],
    "return_tensors": ["pt", "np", None, "nonsense"],
    "add_special_tokens": [True, False],
    "return_offsets_mapping": [True],
    "return_mm_token_type_ids": [True],
    "return_attention_mask": [True],
    "return_token_type_ids": [True],
    "return_length": [True],
    "return_special_tokens_mask": [True],
    "return_overflowing_tokens": [True],
    "window_sizes": [[14], [], [100]],
    "canvas_source": ["global_view", "nonsense"],
    "do_convert_rgb": [True, "nonsense"],
}
text_setting = st.sampled_from([(name, value) for name, values in TEXT_SETTINGS.items() for value in values])
words = st.text(max_size=12) | st.sampled_from(["USER: ", " ASSISTANT:", "</s>", "<s>", "\n", "a", "  ", "<unk>", "é", "🛰️"])


@st.composite
def batches(draw):
    """Prompts of 0 to 3 markers with as many images, in one call out of four with another number."""
    prompts, groups = [], []
    for row in range(draw(st.integers(1, 3))):
        count = draw(st.integers(0, 3))
        prompts.append(draw(words) + "".join(IMAGE_TOKEN + draw(words) for _ in range(count)))
        given_images = draw(st.integers(0, 3)) if draw(st.integers(0, 7)) == 0 else count
        groups.append([picture(row, draw(st.integers(1, 9)), draw(st.integers(1, 9))) for _ in range(given_images)])
    nested = draw(st.booleans())
    images = groups if nested else [image for group in groups for image in group]
    if len(prompts) == 1 and draw(st.booleans()):
        prompts = prompts[0]
    overrides = dict(draw(st.lists(text_setting, max_size=4)))
    if draw(st.booleans()):
        overrides.setdefault("padding", True)
    return images or None, prompts, overrides


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=1000, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(batch=batches(), placement=st.sampled_from(PLACEMENTS), side=st.sampled_from(SIDES))
def test_any_call_gives_a_batch_or_a_clear_error(batch, placement, side):
    """Whatever comes in: every image token in place and attended to, or an error with a message."""
    images, prompts, overrides = batch
    processor = TINY_PROCESSORS[placement]
    try:
        outputs = processor(images=images, text=prompts, padding_side=side, **overrides)
    except (ValueError, TypeError) as error:
        assert str(error).strip()
        return
    prompts = [prompts] if isinstance(prompts, str) else prompts
    counts = [prompt.count(IMAGE_TOKEN) for prompt in prompts]
    rows, masks = [np.asarray(row) for row in outputs["input_ids"]], [np.asarray(row) for row in outputs["attention_mask"]]
    assert [int((row == processor.image_token_id).sum()) for row in rows] == [TOKENS * count for count in counts]
    assert len(rows) == len(masks) == len(prompts)
    for row, mask in zip(rows, masks, strict=True):
        assert row.shape == mask.shape and row.dtype.kind == "i"
        assert set(mask.tolist()) <= {0, 1}
        assert mask[row == processor.image_token_id].all()
        padded = np.flatnonzero(mask == 0)  # at one end, in one piece
        assert (row[padded] == processor.tokenizer.pad_token_id).all()
        ends = range(len(padded)) if side == "left" else range(len(mask) - len(padded), len(mask))
        assert padded.tolist() == list(ends)
    if overrides.get("return_tensors") == "pt" or overrides.get("padding") in (True, "longest"):
        assert len({len(row) for row in rows}) == 1
    assert len(outputs.get("pixel_values", [])) == sum(counts)
    assert all(np.isfinite(np.asarray(image)).all() for image in outputs.get("pixel_values", []))
