"""Mutations of files that several areas share."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any


# Values that a field of a JSON file, a cell or an element may hold instead of its own.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 5, 1e308, 10**400, 0.5, "", " ", "x", "-1", "nan", "1e999", "9" * 5000, "x" * 3000, "a\nb",
    "\x00", "../../x.png", "/etc/hostname", "http://127.0.0.1:9/x.png", "\ud800", "\u202e", [], {}, [[]], [None], {"a": 1},
    ["x"] * 7,
)  # fmt: skip
TEXTS = tuple(value for value in VALUES if isinstance(value, str) and value != "\ud800")


@contextmanager
def restored(*paths: Path) -> Iterator[None]:
    """Gives files their old content back, and removes those that were not there."""
    before = {path: path.read_bytes() if path.is_file() else None for path in paths}
    try:
        yield
    finally:
        for path, content in before.items():
            if path.is_symlink():
                path.unlink()
            if content is not None:
                path.write_bytes(content)
            elif path.exists():
                path.unlink()


def flip(content: bytes, random: Random) -> bytes:
    """One bit changed."""
    position = random.randrange(len(content))
    return content[:position] + bytes([content[position] ^ (1 << random.randrange(8))]) + content[position + 1 :]


def truncate(content: bytes, random: Random) -> bytes:
    return content[: random.randrange(len(content))]


def insert(content: bytes, random: Random) -> bytes:
    """A few random bytes inserted."""
    position = random.randrange(len(content) + 1)
    return content[:position] + random.randbytes(random.randint(1, 8)) + content[position:]


def swap(content: bytes, random: Random) -> bytes:
    """Two blocks exchanged."""
    first, second = sorted(random.sample(range(len(content) + 1), 2))
    return content[second:] + content[first:second] + content[:first]


BYTE_MUTATIONS: dict[str, Callable[[bytes, Random], bytes]] = {
    "flip": flip,
    "truncate": truncate,
    "insert": insert,
    "swap": swap,
}


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a JSON value with every key of it."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        container = waiting.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], (dict, list)):
                waiting.append(container[key])
    return found


def edit_json(content: bytes, random: Random) -> tuple[str, bytes]:
    """One edit of a JSON file or of a line of a JSONL file: its name, and the new content."""
    text = content.decode()
    try:
        value, before, after = json.loads(text), "", ""
    except json.JSONDecodeError:
        lines = text.splitlines(keepends=True)
        number = random.randrange(len(lines))
        value, before, after = json.loads(lines[number]), "".join(lines[:number]), "\n" + "".join(lines[number + 1 :])
    container, key = random.choice(places(value))
    kind = random.choice(("value", "value", "value", "drop", "rename", "repeat", "deep"))
    if kind == "value":
        new = random.choice(VALUES)
        container[key] = new
        kind = f"{key!r} = {repr(new)[:40]}"
    elif kind == "drop":
        del container[key]
        kind = f"drop {key!r}"
    elif kind == "rename" and isinstance(container, dict):
        container[f"{key}_"] = container.pop(key)
        kind = f"rename {key!r}"
    elif kind == "deep":
        container[key] = "DEEP"
    elif isinstance(container, list):
        container.append(container[key])
        kind = "repeat"
    written = json.dumps(value).replace('"DEEP"', "[" * 100_000 + "]" * 100_000)
    return kind, (before + written + after).encode(errors="surrogatepass")


def edit_lines(content: bytes, random: Random) -> tuple[str, bytes]:
    """One edit of a line of a text file: its name, and the new content."""
    lines = content.decode().splitlines()
    number = random.randrange(len(lines))
    kind = random.choice(("drop", "repeat", "blank", "cell", "cell", "cell"))
    if kind == "drop":
        del lines[number]
    elif kind == "repeat":
        lines.insert(number, lines[number])
    elif kind == "blank":
        lines[number] = ""
    else:
        mark = next((mark for mark in "\t,: " if mark in lines[number]), " ")
        cells = lines[number].split(mark)
        cells[random.randrange(len(cells))] = random.choice(TEXTS)
        lines[number] = mark.join(cells)
    return f"{kind} line {number}", ("\n".join(lines) + "\n").encode()


def edit_xml(content: bytes, random: Random) -> tuple[str, bytes]:
    """One edit of an XML file: its name, and the new content."""
    text = content.decode()
    start = random.choice([index for index, letter in enumerate(text) if letter == ">"])
    end = text.find("<", start)
    kind = random.choice(("text", "text", "element", "bomb"))
    if kind == "bomb":
        entities = "".join(f'<!ENTITY x{n} "{f"&x{n - 1};" * 10 if n else "boom"}">' for n in range(9))
        return kind, f"<!DOCTYPE annotation [{entities}]>{text[: start + 1]}&x8;{text[start + 1 :]}".encode()
    if kind == "element":
        cut = text.find(">", end)
        return kind, (text[: start + 1] + text[cut + 1 :]).encode()
    new = random.choice(TEXTS)
    return f"text = {new[:40]!r}", (text[: start + 1] + new + (text[end:] if end >= 0 else "")).encode()
