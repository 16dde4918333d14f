"""Checks the body of a chat request before any work is done for it.

The fields are those of OpenAI's `POST /v1/chat/completions` that a vision-language model can follow. All others are
rejected: a field without effect, such as `n` or `response_format`, would give another answer than the client asked for.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ..files.reading import shorten
from ..image_sources_mfrsvlm import is_public


ROLES = ("system", "user", "assistant")
FIELDS = frozenset(
    {"model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "stream", "user"}
)
MOST_STOPS = 4
LARGEST_SEED = 2**63 - 1


class BadRequest(ValueError):
    """A request that cannot be answered. The message names the field."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        max_body_bytes: size of the request, images included.
        max_images: images in all messages together.
        max_characters: characters in all messages together.
        max_tokens: generated tokens, also of a request that names no number.
        allow_fetch: accept addresses of images. Otherwise images must be inside the request, as `data:` URLs.
    """

    max_body_bytes: int = 32 * 2**20
    max_images: int = 8
    max_characters: int = 100_000
    max_tokens: int = 1024
    allow_fetch: bool = False


def check_request(body: Any, limits: Limits) -> dict[str, Any]:
    """Returns a copy of the body with `max_tokens` set and without fields that are empty.

    Raises:
        BadRequest: a field is unknown or has a wrong value, or a message has a part that is neither text nor an image.
    """
    if not isinstance(body, Mapping):
        raise BadRequest(f"The request must be a JSON object, got {shorten(body)}.")
    body = {name: value for name, value in body.items() if value is not None}
    unknown = sorted(set(body) - FIELDS)
    if unknown:
        raise BadRequest(f"The server does not support {shorten(unknown)}. Supported fields: {', '.join(sorted(FIELDS))}.")
    body.pop("user", None)  # identifies the client, and changes nothing
    _check_messages(body.get("messages"), limits)
    if not isinstance(body.get("model", ""), str):
        raise BadRequest(f"`model` must be text, got {shorten(body['model'])}.")
    if not isinstance(body.get("stream", False), bool):
        raise BadRequest(f"`stream` must be true or false, got {shorten(body['stream'])}.")
    asked = [body.pop(name) for name in ("max_completion_tokens", "max_tokens") if name in body]
    for number in asked:
        if not _is_number(number, int) or not 1 <= number <= limits.max_tokens:
            raise BadRequest(f"`max_tokens` must be a whole number from 1 to {limits.max_tokens}, got {shorten(number)}.")
    body["max_tokens"] = asked[0] if asked else limits.max_tokens
    for name, largest in {"temperature": 2, "top_p": 1}.items():
        if name in body and not (_is_number(body[name], (int, float)) and 0 <= body[name] <= largest):
            raise BadRequest(f"`{name}` must be a number from 0 to {largest}, got {shorten(body[name])}.")
    if "seed" in body and not (_is_number(body["seed"], int) and 0 <= body["seed"] <= LARGEST_SEED):
        raise BadRequest(f"`seed` must be a whole number from 0 to 2**63 - 1, got {shorten(body['seed'])}.")
    if "stop" in body:
        stops = [body["stop"]] if isinstance(body["stop"], str) else body["stop"]
        if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
            raise BadRequest(f"`stop` must be text or up to {MOST_STOPS} texts, got {shorten(body['stop'])}.")
        body["stop"] = stops
    return body


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


def _check_messages(messages: Any, limits: Limits) -> None:
    if not isinstance(messages, list) or not messages:
        raise BadRequest(f"`messages` must be a list of messages, got {shorten(messages)}.")
    images = characters = 0
    for number, message in enumerate(messages, start=1):
        place = f"message {number}"
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise BadRequest(f"{place} must be an object with a role of {', '.join(ROLES)}, got {shorten(message)}.")
        unknown = sorted(set(message) - {"role", "content", "name"})
        if unknown:
            raise BadRequest(f"{place} has the unsupported fields {shorten(unknown)}.")
        content = message.get("content")
        if isinstance(content, str):
            characters += len(content)
            continue
        if not isinstance(content, list) or not content:
            raise BadRequest(f"the content of {place} must be text or a list of parts, got {shorten(content)}.")
        for index, part in enumerate(content, start=1):
            _check_part(part, f"part {index} of {place}", message["role"], limits)
            images += part["type"] == "image_url"
            characters += len(part.get("text", ""))
    if images > limits.max_images:
        raise BadRequest(f"The request has {images} images. At most {limits.max_images} are allowed.")
    if characters > limits.max_characters:
        raise BadRequest(f"The messages have {characters} characters. At most {limits.max_characters} are allowed.")
    if messages[-1]["role"] != "user":
        raise BadRequest(f"The last message must be of the user, got the role {messages[-1]['role']!r}.")


def _check_part(part: Any, place: str, role: str, limits: Limits) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return
    if kind != "image_url":
        raise BadRequest(f"{place} must have the type text or image_url, got {shorten(part)}.")
    if role != "user":
        raise BadRequest(f"{place} is an image. Only messages of the user may have images.")
    image = part.get("image_url")
    address = image.get("url") if isinstance(image, Mapping) else image
    if not isinstance(address, str):
        raise BadRequest(f"{place} has no `image_url` with a `url`, got {shorten(part)}.")
    if address.startswith("data:"):
        return
    if not address.startswith(("http://", "https://")):  # never a file of the server
        raise BadRequest(f"{place} must be a data: URL, got {shorten(address)}.")
    if not limits.allow_fetch:
        raise BadRequest(f"{place} is an address. This server fetches none: send the image as a data: URL.")
    if not is_public(urlsplit(address).hostname or "localhost"):
        raise BadRequest(f"{place} is an address in a private network, which is not fetched: {shorten(address)}.")
