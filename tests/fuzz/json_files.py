"""JSON files and rows: valid ones come back as Python reads them, all others are rejected with the name of the file."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from fuzz.harness import REJECTED, RIGHT, Case, outcome, random_of

from mfrsvlm.files.reading import NotJSON, read_json, read_rows


AREA = "JSON files"
TEXTS = ("", "a", "Fluß", "河", "a\u2028b", '"', "\\", "\0", "\U0001f600", "<image>", "NaN", "\ufeff", "]", "{")
BROKEN = (
    "NaN", "-Infinity", "1e999", "-1e400", "1" * 5000, "1" * 310, r'"\ud800"', r'"\udfff\ud800"', '{"a": 1, "a": 2}',
    "[" * 100_000, '{"a":' * 5000, "[" * 150 + "]" * 150, "\0", "'a'", "01", "+1", ".5", "[1,]", "{1: 2}", '"\t"', "\ufeff1",
    "nul", "True", '"\\x"', "1 2", "//", "\ud800", "b''",
)  # fmt: skip


def make_value(random: Random, depth: int = 0) -> Any:
    kind = random.randrange(8 if depth < 4 else 6)
    if kind < 6:
        scalars = (None, True, random.randint(-(10**20), 10**20), random.uniform(-1e9, 1e9), random.choice(TEXTS), 10**300)
        return scalars[kind]
    if kind == 6:
        return [make_value(random, depth + 1) for _ in range(random.randrange(4))]
    return {f"{random.choice(TEXTS)}{i}": make_value(random, depth + 1) for i in range(random.randrange(4))}


def make_text(random: Random) -> tuple[str, bytes, bool | None]:
    """What was done, a JSON text, and whether it is valid (`None`: see `is_valid`)."""
    value = make_value(random)
    text = json.dumps(value, ensure_ascii=random.random() < 0.5)
    if random.random() < 0.3:
        return "valid", text.encode(), True
    if random.random() < 0.5:
        number = random.randrange(len(BROKEN))
        text = json.dumps({"first": value, "second": "?"}, ensure_ascii=False).replace('"?"', BROKEN[number])
        return f"broken value {number}", text.encode("utf-8", "surrogatepass"), False
    content = bytearray(text.encode())
    place = random.randrange(len(content))
    content[place] ^= 1 << random.randrange(8)
    return f"flip at {place}", bytes(content).replace(b"\n", b" ").replace(b"\r", b" "), None


def parsed(content: bytes) -> Any:
    """The value as Python reads it. Raises ValueError for what the package must reject."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("repeated")
        return dict(pairs)

    if b"\0" in content:
        raise ValueError("NUL")
    value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=unique)
    for number in numbers(value):
        if math.isinf(float(number)) or math.isnan(float(number)):
            raise ValueError("no number")
    json.dumps(value, ensure_ascii=False).encode()
    return value


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers(item)


def cases(seed: int, count: int, folder: Path) -> Iterator[Case]:
    for number in range(count):
        random = random_of(seed, number)
        what, content, is_valid = make_text(random)
        form = random.choice(("file", "JSONL", "list"))
        if form == "list":
            content = b"[1, " + content + b"]"
        yield Case(f"{number}: {form}, {what}", lambda c=content, v=is_valid, f=form: run(f, c, v, folder))


def run(form: str, content: bytes, is_valid: bool | None, folder: Path) -> str:
    try:
        expected = parsed(content)
    except (ValueError, OverflowError, RecursionError):
        expected = NotJSON
    if is_valid is not None:
        assert (expected is not NotJSON) or not is_valid, "the generator is wrong"
        expected = expected if is_valid else NotJSON  # Python reads deep nesting, which is not accepted
    path = folder / ("a.jsonl" if form == "JSONL" else "a.json")
    path.write_bytes(b"1\n" + content + b"\n2" if form == "JSONL" else content)
    if form == "file":
        return outcome(lambda: read_json(path), lambda value: same(value, expected), str(path))
    rows: list[Any] = []

    def read() -> Any:
        rows[:] = [row for _, row in read_rows(path)]
        return rows[1]

    row = expected[1] if form == "list" and expected is not NotJSON else expected
    found = outcome(read, lambda value: isinstance(value, NotJSON) or same(value, row), str(path))
    if found == RIGHT and isinstance(rows[1], NotJSON):
        assert expected is NotJSON and "\n" not in rows[1].reason and len(rows[1].reason) < 300, rows[1].reason
        return REJECTED
    return found


def same(value: Any, expected: Any) -> bool:
    return expected is not NotJSON and json.dumps(value) == json.dumps(expected)
