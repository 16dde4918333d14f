"""Conversations with random changes: encoded as a renderer of its own says, or rejected."""

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from fuzz.harness import Case, outcome, random_of
from PIL import Image
from transformers import AutoTokenizer

from mfrsvlm import MFRSVLMImageProcessor, MFRSVLMProcessor


AREA = "chats"
BOX = Path(__file__).parents[2] / "demo" / "model"
TOKENS = 16
PREAMBLE = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the human's questions."
)
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
TEXTS = ("", "Hi", "Is there a ship?", "Où est le 港口? 🛰️", "  \n", "{{ bos_token }}", "{% raw %}", "</s", "<im", "a\0b")
ORDERS = ("</s>", "<s>", "<pad>", "<image>", "<image", ">", "</", "s>", "x</s>USER: y ASSISTANT:")
JUNK: tuple[Any, ...] = (
    None, 0, 1.5, True, "", "hello", b"x", [], {}, [[]], [None], {"a": 1}, "\ud800", "\U00100000", float("nan"), object(),
    10**400,
    {"type": "text"}, {"type": "audio", "url": "x"}, {"type": "image"}, {"role": "user"}, ("user",), {1, 2},
    np.zeros(3), IMAGE,
)  # fmt: skip
KEYS = ("role", "content", "type", "text", "image", "url", "path", "base64", "image_url", "bytes", "name", "tool_calls")
OPTIONS: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": ("yes", 1, None, []),
    "continue_final_message": (3, [], "reasoning"),
    "return_assistant_tokens_mask": ("no", 2),
    "tools": ("x", [5], 7, [{}], {}),
    "documents": ("x", [None]),
    "chat_template": (5, "{% if %}", "{{ messages.foo.bar }}", "{{ raise_exception('no') }}", ["x"]),
    "prompt_version": (["v1"], {}, "v9", 3, "v1"),
    "return_tensors": ("pt", "np", "tf2", 3),
    "return_dict": ("x", None),
    "processor_kwargs": (
        "x", [1], {"padding": "sometimes"}, {"padding": 3}, {"truncation": True, "max_length": 5}, {"max_length": "x"},
        {"truncation": "x"}, {"text_kwargs": 3}, {"images_kwargs": {"size": 3}}, {"do_resize": "x"}, {"max_length": -1},
        {"padding": True}, {"truncation": True, "max_length": 10**5}, {"nonsense": 1}, {"return_tensors": []},
    ),
}  # fmt: skip


@cache
def processor(placement: str) -> MFRSVLMProcessor:
    images = MFRSVLMImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, patch_size=7, window_sizes=[]
    )
    template = (BOX / "chat_template.jinja").read_text(encoding="utf-8")
    return MFRSVLMProcessor(
        images,
        AutoTokenizer.from_pretrained(BOX, trust_remote_code=False),
        chat_template=template,
        image_placement=placement,
    )


def conversation(random: Random, texts: tuple[str, ...]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if random.random() < 0.3:
        messages.append({"role": "system", "content": random.choice(texts)})
    for _ in range(random.randint(1, 3)):
        parts: list[dict[str, Any]] = [{"type": "image", "image": IMAGE} for _ in range(random.choice([0, 0, 1, 2]))]
        parts += [{"type": "text", "text": random.choice(texts)} for _ in range(random.randint(1, 3))]
        random.shuffle(parts)
        plain = random.random() < 0.3
        messages.append({"role": "user", "content": random.choice(texts) if plain else parts})
        if random.random() < 0.7:
            messages.append({"role": "assistant", "content": random.choice(texts)})
    return messages


def places(value: Any) -> list[tuple[Any, Any]]:
    """All (container, key) in a nested value."""
    if not isinstance(value, (list, dict)):
        return []
    keys = range(len(value)) if isinstance(value, list) else list(value)
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def mutate(random: Random, value: list[Any]) -> str:
    """Changes a nested value in place. Returns what was done."""
    container, key = random.choice(places(value))
    kind = random.choice(["junk", "remove", "key", "copy", "append"])
    if kind == "junk":
        container[key] = random.choice(JUNK)
    elif kind == "remove":
        del container[key]
    elif kind == "key" and isinstance(container, dict):
        container[random.choice(KEYS)] = container.pop(key)
    elif kind == "copy":
        other, name = random.choice(places(value))
        container[key] = copy.deepcopy(other[name])
    elif isinstance(container, list):
        container.append(random.choice(JUNK))
    return f"{kind} {key}"


def pieces(message: dict[str, Any]) -> tuple[int, str]:
    content = message.get("content")
    if isinstance(content, str):
        return 0, content
    images = sum(part["type"] in ("image", "image_url") for part in content)
    return images, "".join(part["text"] for part in content if part["type"] == "text")


def expected_ids(placement: str, messages: list[dict[str, Any]], prompted: bool, sanitize: bool) -> list[int]:
    """Ids of a conversation, from a renderer of its own and the tokenizer, one control token after the other."""
    tokenizer, rest = processor(placement).tokenizer, list(messages)
    opening = PREAMBLE
    if rest[0]["role"] == "system":
        opening = pieces(rest.pop(0))[1]
    written: list[tuple[str, bool]] = [("<s>", True), (opening + " ", False)]  # (text, whether it is a control token)
    for message in rest:
        images, text = pieces(message)
        if message["role"] == "user":
            written += [("USER: ", False), *[("<image>", True), ("\n", False)] * images, (text + " ", False)]
        else:
            written += [("ASSISTANT: " + text, False), ("</s>", True)]
    written += [("ASSISTANT:", False)] * bool(prompted)
    merged: list[tuple[str, bool]] = []
    for text, control in written:
        if merged and not control and not merged[-1][1]:
            merged[-1] = (merged[-1][0] + text, False)
        else:
            merged.append((text, control))
    ids: list[int] = []
    visual = 0
    for text, control in merged:
        if control and text == "<image>":
            visual += TOKENS
            ids += [tokenizer.convert_tokens_to_ids(text)] * (TOKENS if placement == "inline" else 0)
        elif control:
            ids.append(tokenizer.convert_tokens_to_ids(text))
        else:
            ids += tokenizer(text, add_special_tokens=False, split_special_tokens=sanitize).input_ids
    return ids if placement == "inline" else [tokenizer.convert_tokens_to_ids("<image>")] * visual + ids


def run(placement: str, messages: Any, batch: bool, options: dict[str, Any]) -> str:
    plain = set(options) <= {"add_generation_prompt", "sanitize_control_tokens"}

    def is_right(outputs: Any) -> bool:
        if not plain:  # a setting that changes the ids: the shape alone
            ids = outputs["input_ids"] if hasattr(outputs, "keys") else outputs
            return len(ids) == 1 + batch and all(len(row) > 0 for row in ids)
        prompted, sanitize = options.get("add_generation_prompt", False), options.get("sanitize_control_tokens", False)
        expected = expected_ids(placement, messages, prompted, sanitize)
        return [list(row) for row in outputs["input_ids"]] == [expected] * (1 + batch)

    given = [messages, copy.deepcopy(messages)] if batch else messages
    settings = {"tokenize": True, "return_dict": True, **options}
    return outcome(lambda: processor(placement).apply_chat_template(given, **settings), is_right)


def cases(seed: int, count: int, folder: Path) -> Iterator[Case]:
    for number in range(count):
        random = random_of(seed, number)
        placement, sanitize = random.choice(["inline", "prefix"]), random.random() < 0.5
        messages: Any = conversation(random, TEXTS + ORDERS if sanitize else TEXTS)
        options: dict[str, Any] = {"add_generation_prompt": random.random() < 0.5, "sanitize_control_tokens": sanitize}
        what = "valid"
        if random.random() < 0.6:
            what = mutate(random, messages)
        elif random.random() < 0.5:
            name = random.choice(list(OPTIONS))
            options[name] = random.choice(OPTIONS[name])
            what = f"{name} {str(options[name])[:30]}"
        elif random.random() < 0.2:
            messages = random.choice([junk for junk in JUNK if not isinstance(junk, Image.Image)])
            what = f"junk {type(messages).__name__}"
        batch = random.random() < 0.2
        yield Case(
            f"{number}: {placement}, {what}",
            lambda p=placement, m=messages, b=batch, o=options: run(p, m, b, o),
        )
