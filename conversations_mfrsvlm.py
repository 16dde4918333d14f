"""Checks conversations before the chat template, and keeps control tokens in the text of users apart from its own.

A chat template renders what it is given: a part without text becomes the word "Undefined", and `</s>` in a question ends it.
"""

import copy
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

from .image_sources_mfrsvlm import SOURCE_KEYS, shown


ROLES = ("system", "user", "assistant")
IMAGE_PARTS = ("image", "image_url")
FLAGS = ("add_generation_prompt", "return_assistant_tokens_mask", "tokenize", "return_dict", "sanitize_control_tokens")
# Characters that nobody types: the name of the n-th control token consists of the n-th, as often as the token is long.
FIRST_STAND_IN, LAST_STAND_IN = 0x100000, 0x10FFFD


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises `TypeError` for arguments of `apply_chat_template` that have the wrong type."""
    for name in FLAGS:
        if settings.get(name) is not None and not isinstance(settings[name], bool):
            raise TypeError(f"{name}={shown(settings[name])} must be True or False.")
    for name in ("tools", "documents"):
        value = settings.get(name)
        if value is not None and (
            not isinstance(value, (list, tuple)) or not all(isinstance(one, Mapping) or callable(one) for one in value)
        ):
            raise TypeError(f"{name}={shown(value)} must be a list of objects.")
    for name, kinds, rule in (
        ("continue_final_message", (bool, str), "True, False or text"),
        ("chat_template", (str,), "text"),
        ("processor_kwargs", (Mapping,), "a mapping of settings of the processor"),
    ):
        if settings.get(name) is not None and not isinstance(settings[name], kinds):
            raise TypeError(f"{name}={shown(settings[name])} must be {rule}.")


def check_conversations(conversation: Any, template: str, opens_images: bool) -> tuple[list[list[dict[str, Any]]], bool]:
    """Checks one conversation or a batch.

    Args:
        conversation: a list of messages, or a list of such lists. Messages and parts are mappings, dataclasses or pydantic
            models.
        template: source of the chat template. A role that it names in quotes is allowed, besides system, user and assistant.
        opens_images: whether every image part must hold its image.

    Returns:
        A copy of the conversations without the keys that are `None`, as files in Arrow format fill them, with every
        `image_url` part as an `image` part; and whether it is a batch.

    Raises:
        ValueError, TypeError: the message names conversation (of a batch), turn and part, counted from 1.
    """
    rows = _as_list(conversation, "A conversation", "messages")
    is_batch = not isinstance(conversation, Mapping) and (isinstance(rows[0], (list, tuple)) or hasattr(rows[0], "messages"))
    if not is_batch:
        return [_check_conversation(rows, "", template, opens_images)], False
    checked = []
    for number, row in enumerate(rows, start=1):
        where = f"conversation {number}"
        checked.append(_check_conversation(_as_list(row, where, "messages"), f" of {where}", template, opens_images))
    return checked, True


def _as_list(value: Any, where: str, what: str) -> Sequence[Any]:
    value = getattr(value, "messages", value)
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{_capital(where)} must be a list of {what}, got {type(value).__name__} {shown(value)}.")
    if not value:
        raise ValueError(f"{_capital(where)} has no {what}: its list is empty.")
    return value


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _as_mapping(value: Any, where: str) -> dict[str, Any]:
    if hasattr(value, "model_dump"):  # pydantic
        value = value.model_dump()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if not isinstance(value, Mapping):
        raise TypeError(f"{_capital(where)} must be an object, got {type(value).__name__} {shown(value)}.")
    return {key: item for key, item in value.items() if item is not None}


def _check_conversation(rows: Sequence[Any], of_which: str, template: str, opens_images: bool) -> list[dict[str, Any]]:
    messages = []
    for number, row in enumerate(rows, start=1):
        where = f"turn {number}{of_which}"
        message = _as_mapping(row, where)
        role = message.get("role")
        if not isinstance(role, str) or (role not in ROLES and f"'{role}'" not in template and f'"{role}"' not in template):
            raise ValueError(f"Unknown role {shown(role)} of {where}: a message has a role of {', '.join(ROLES)}.")
        content = message.get("content")
        if content is None and not (message.get("tool_calls") and "tool_calls" in template):
            raise ValueError(f"{_capital(where)} ({role}) has no content: give it text, or a list of parts.")
        if isinstance(content, str):
            check_text(content, where)
        elif content is not None:
            parts = enumerate(_as_list(content, f"the content of {where}, if it is not text,", "parts"), start=1)
            message["content"] = [_check_part(part, f"part {index} of {where}", opens_images) for index, part in parts]
        messages.append(message)
    if not any(message["role"] == "user" for message in messages):
        raise ValueError(f"No turn{of_which} is of the user: a conversation needs a message with the role user.")
    return messages


def check_text(text: str, where: str) -> None:
    """Raises `ValueError` for text that is no valid Unicode, which no tokenizer can read."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{_capital(where)} has half of a character, {text[error.start]!r}, at position {error.start}: text must be "
                "valid Unicode."
            ) from error


def _check_part(value: Any, where: str, opens_images: bool) -> dict[str, Any]:
    part = _as_mapping(value, where)
    kind = part.get("type")
    if isinstance(kind, str) and kind == "text":
        if "text" not in part:
            raise ValueError(f"{_capital(where)} has the type text, but no text.")
        if not isinstance(part["text"], str):
            raise TypeError(f"The text of {where} must be a string, got {shown(part['text'])}.")
        check_text(part["text"], where)
        return part
    if not isinstance(kind, str) or kind not in IMAGE_PARTS:
        raise ValueError(
            f"Content of type {shown(kind)} in {where} is not supported, only image and text. Nothing is fetched."
        )
    sources = [key for key in SOURCE_KEYS if key in part and not (key == "path" and "bytes" in part)]
    if len(sources) > 1:
        raise ValueError(f"{_capital(where)} has several images, {', '.join(sources)}: give every image a part of its own.")
    if not sources:
        if opens_images:
            raise ValueError(f"{_capital(where)} has no image: it needs one of the keys {', '.join(SOURCE_KEYS)}.")
        return {"type": "image"}
    source = part[sources[0]]
    if sources[0] == "image_url" and isinstance(source, Mapping):
        source = source.get("url")
    if isinstance(source, (list, tuple)):
        raise TypeError(
            f"{_capital(where)} must have one image, got a list of {len(source)}: give every image its own part."
        )
    if isinstance(source, (str, bytes)) and not source:
        raise ValueError(f"{_capital(where)} has no image: its {sources[0]} is empty.")
    if opens_images and not isinstance(source, (str, bytes, bytearray, Mapping, Image.Image, np.ndarray, torch.Tensor)):
        if not hasattr(source, "__fspath__"):
            raise TypeError(f"The {sources[0]} of {where} is no image, address or path: {shown(source)}.")
    if sources[0] == "base64" and not str(source).startswith("data:"):
        source = f"data:;base64,{source}"
    return {"type": "image", "image": source}


# Control tokens in text


def control_tokens(tokenizer: Any, template: str) -> tuple[str, ...]:
    """Special tokens, and other added tokens that the chat template writes; the longest first."""
    added = tokenizer.added_tokens_decoder.values()
    found = {token.content for token in added if token.special or (token.content in template and token.content.strip())}
    return tuple(sorted(found, key=lambda token: (-len(token), token)))


class ControlTokens:
    """Two sets of names for the control tokens of a tokenizer, so that text can have the one and its user the other.

    Control tokens in the text of users are replaced by stand-ins of the same length (`hide`). After the template, control
    tokens and stand-ins change places (`exchange`). The tokenizer of `rename_control_tokens` knows the stand-ins as its
    control tokens, and reads the others as ordinary text. Offsets remain right, since all lengths do.
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        self.stand_ins = {token: chr(FIRST_STAND_IN + index) * len(token) for index, token in enumerate(tokens)}
        self.exchanged = {**self.stand_ins, **{name: token for token, name in self.stand_ins.items()}}
        self.written = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
        self.either = re.compile("|".join(map(re.escape, self.exchanged)) or "(?!)")

    def hide_in_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages with stand-ins. A token whose pieces lie in several parts counts, since templates join them."""
        hidden = []
        for message in messages:
            content = message.get("content")
            hidden.append({key: value if key == "content" else self.hide(value) for key, value in message.items()})
            if isinstance(content, list):
                text, start, parts = self.hide("".join(part.get("text", "") for part in content)), 0, []
                for part in content:
                    end = start + len(part.get("text", ""))
                    parts.append({**part, "text": text[start:end]} if "text" in part else part)
                    start = end
                hidden[-1]["content"] = parts
            elif content is not None:
                hidden[-1]["content"] = self.hide(content)
        return hidden

    def hide(self, value: Any) -> Any:
        """Replaces control tokens in a text, and in all texts of a list or mapping.

        Raises:
            ValueError: a text has characters that stand for control tokens.
        """
        if isinstance(value, str):
            if not value.isascii() and any(FIRST_STAND_IN <= ord(letter) <= LAST_STAND_IN for letter in value):
                raise ValueError(
                    f"{shown(value)} has characters of the private use area, U+100000 to U+10FFFD. Remove them, since "
                    "sanitize_control_tokens=True needs them."
                )
            return self.written.sub(lambda match: self.stand_ins[match.group()], value)
        if isinstance(value, Mapping):
            return {key: self.hide(item) for key, item in value.items()}
        return [self.hide(item) for item in value] if isinstance(value, (list, tuple)) else value

    def exchange(self, text: str) -> str:
        """Swaps control tokens and their stand-ins. A second time, it restores the text."""
        return self.either.sub(lambda match: self.exchanged[match.group()], text)


RENAMED: WeakKeyDictionary[Any, tuple[Any, Tokenizer]] = WeakKeyDictionary()


def rename_control_tokens(tokenizer: Any, names: Mapping[str, str]) -> Any:
    """A copy of a fast tokenizer that has other names for some tokens, and the same ids. The last one is kept.

    Raises:
        ValueError: the tokenizer is not fast, or has a vocabulary in which tokens cannot be renamed.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"sanitize_control_tokens=True needs a fast tokenizer, got {type(tokenizer).__name__}.")
    key = (dict(names), len(tokenizer))
    if RENAMED.get(tokenizer, (None,))[0] != key:
        RENAMED[tokenizer] = (key, _renamed(tokenizer.backend_tokenizer, names))
    renamed = copy.copy(tokenizer)
    renamed._tokenizer = RENAMED[tokenizer][1]
    renamed._special_tokens_map = {
        name: token if token is None else names.get(str(token), str(token))
        for name, token in tokenizer._special_tokens_map.items()
    }
    return renamed


def _renamed(backend: Tokenizer, names: Mapping[str, str]) -> Tokenizer:
    state = json.loads(backend.to_str())
    state["truncation"] = state["padding"] = None  # of the last call
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): index for token, index in vocabulary.items()}
    else:  # Unigram
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:  # those that would make a control token from text
        model["merges"] = [merge for merge in model["merges"] if not names.keys() & set(_of_merge(merge))]
    renamed = Tokenizer.from_str(json.dumps(state))
    lost = [token for token, name in names.items() if renamed.token_to_id(name) != backend.token_to_id(token)]
    if lost:
        raise ValueError(f"sanitize_control_tokens=True cannot rename {shown(lost)} in a {model['type']} tokenizer.")
    return renamed


def _of_merge(merge: Any) -> Iterator[str]:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    yield from parts
    yield "".join(parts)


__all__ = ["check_conversations", "check_settings"]
