"""Training rows with one odd value, or with damaged bytes, among good rows: from files and objects, failing and skipping.

A bad row must be named, or counted with `on_bad_row="skip"`, and the rows beside it must be used.
"""

import copy
import functools
import io
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import datasets
import numpy as np
import torch
from fuzz.harness import Case, outcome, random_of
from PIL import Image
from tiny_training import tiny_processor, write_images

from mfrsvlm.training import ConversationCollator, ConversationDataset, ConversationStream


AREA = "training rows"
ROWS, MUTATED = 3, 1  # number of rows, and the position of the odd one
BASE = (
    {
        "id": "7",
        "image": "0.png",
        "source_dataset": "tiny",
        "conversations": [
            {"from": "human", "value": "<image>\nA river?"},
            {"from": "gpt", "value": "Yes: [1, 2, 30, 40]."},
        ],
    },
    {
        "images": ["0.png", "1.png"],
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "A river?"}]},
            {"role": "assistant", "content": "No."},
        ],
    },
    {"images": ["0.png"], "prompt": "A river?", "completion": [{"role": "assistant", "content": "Yes."}]},
    {"prompt": [{"role": "user", "content": "A river?"}], "completion": "Yes."},
)


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


def png(size: tuple[int, int] = (5, 4)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size).save(content, "PNG")
    return content.getvalue()


PLAIN: tuple[Any, ...] = (
    None, [], {}, [None], [[None]], {"a": None}, 0, -1, 5, 10**400, 0.5, float("nan"), float("inf"), True, "", " ", "x",
    "<image>", "<image><image>", "<video>", "</s>", "\0", "\ud800", "a\u2028b", "\ufeff", "x" * 20_000, "[0, 0, 5000, 1]",
    "../0.png", "/etc/passwd", "http://localhost:1/a.png", "file:///etc/passwd", ".", "missing.png", "rows.json", "data:,x",
    "human", "user", "gpt", "assistant", "system", "tool", "image", ["human"], {"role": "user"}, [{"type": "image"}],
    [{"type": "text"}], [{"type": "text", "text": 5}], {"bytes": None, "path": None}, {"path": "0.png"}, {"path": ["0.png"]},
    nested(50), nested(150), nested(900), {"": ""}, ["0.png", None, "1.png"], [["0.png"]],
)  # fmt: skip
OBJECTS: tuple[Any, ...] = (
    b"", b"x", png(), png()[:30], {"bytes": b"x", "path": None}, {"bytes": png(), "path": None}, {"bytes": png()[:-20]},
    np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5)), np.zeros(0), np.array("user"), np.array(["0.png"], dtype=object),
    np.str_("user"), np.str_("0.png"), np.int64(3), np.float32("nan"), np.bool_(True), np.datetime64("2026-01-01"),
    torch.zeros(3, 4, 5), torch.zeros(0), Image.new("RGB", (5, 4)), Image.new("I;16", (5, 4)), Path("0.png"), {1, 2},
    object(), {1: 2}, (1, 2), ("0.png",), lambda: None, bytearray(b"x"), complex(1, 2), range(3), {"bytes": 5},
    {b"bytes": b""},
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in a nested value."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def mutate(row: Any, random: Random, values: tuple[Any, ...]) -> tuple[str, Any]:
    """A row with one value replaced, one removed, or one added."""
    path = random.choice(list(places(row)))
    number = random.randrange(len(values))
    if not path:
        return f"value {number} for the row", values[number]
    row = copy.deepcopy(row)
    owner = row
    for key in path[:-1]:
        owner = owner[key]
    kind = random.choice(("set", "set", "set", "remove", "add"))
    if kind == "remove":
        del owner[path[-1]]
    elif kind == "add" and isinstance(owner, dict):
        name = random.choice(("image", "images", "video", "system", "content", "messages", "prompt", "note", "text", "\0"))
        owner[name] = values[number]
        path = (*path[:-1], name)
    elif kind == "add":
        owner.append(values[number])
    else:
        owner[path[-1]] = values[number]
    return f"{kind} value {number} at {'.'.join(map(str, path))}", row


def mutate_text(line: str, random: Random) -> tuple[str, bytes]:
    """A row as bytes, with one byte flipped, removed or repeated, or with a key or number that JSON does not allow."""
    content = bytearray(line.encode("utf-8", "surrogatepass"))
    place = random.randrange(len(content))
    kind = random.choice(("flip", "cut", "double", "key", "number", "deep", "mark", "NUL"))
    if kind == "flip":
        content[place] ^= 1 << random.randrange(8)
    elif kind == "cut":
        del content[place:]
    elif kind == "double":
        content[place:place] = content[place : place + 9]
    elif kind == "NUL":
        content[place] = 0
    else:
        start = {"key": '{"id": 1, "id": 2,', "number": f'{{"n": {random.choice(["1" * 5000, "1e999", "NaN"])},'}
        start |= {"deep": f'{{"n": {"[" * 100_000}', "mark": "\ufeff{"}
        content[:1] = start[kind].encode()
    # A line break would make two rows.
    return f"{kind} at {place}", bytes(content).replace(b"\n", b" ").replace(b"\r", b" ")


def cases(seed: int, count: int, folder: Path) -> Iterator[Case]:
    write_images(folder, 2)
    collator = ConversationCollator(tiny_processor())
    for number in range(count):
        random = random_of(seed, number)
        form = random.choice(("jsonl", "jsonl bytes", "json", "list", "datasets", "stream"))
        mode = random.choice(("fail", "skip"))
        base = random.choice(BASE)
        values = PLAIN if form.startswith("json") or form == "datasets" else PLAIN + OBJECTS
        what, row = mutate(base, random, values)
        rows = [dict(base)] * ROWS
        rows[MUTATED] = row
        source: Any = rows
        named = [f"row {MUTATED}"]
        if form == "jsonl bytes":
            what, line = mutate_text(json.dumps(base), random)
            rows = [json.dumps(base).encode(), line, json.dumps(base).encode()]
            source = write(folder / "rows.jsonl", b"\n".join(rows))
        elif form == "jsonl":
            source = write(folder / "rows.jsonl", "\n".join(map(json.dumps, rows)).encode())
        elif form == "json":
            source = write(folder / "rows.json", json.dumps(rows).encode())
        elif form == "datasets":
            try:
                source = datasets.Dataset.from_list(rows)
            except Exception:  # columns have one type, which this row has not
                source, form = rows, "list"
        if form.startswith("jsonl"):
            named = ["rows.jsonl"]
        elif form == "json":
            named = ["rows.json"]
        call = functools.partial(run, source, form, mode, named, folder, collator)
        yield Case(f"{number}: {form}, {mode}, {what}", call)


def run(source: Any, form: str, mode: str, named: list[str], folder: Path, collator: ConversationCollator) -> str:
    def read() -> tuple[int, int]:
        """Numbers of used and of bad rows."""
        if form == "stream":
            stream = ConversationStream(source, folder, mode, collator.encode)
            return len(collator(list(stream))["input_ids"]), stream.num_bad_rows
        dataset = ConversationDataset(source, folder, mode, collator.encode)
        batch = collator([dataset[index] for index in range(len(dataset))])
        # A row that turns out to be bad when it is used is replaced by the next.
        assert len(batch["input_ids"]) == len(dataset)
        return ROWS - dataset.num_bad_rows, dataset.num_bad_rows

    def is_right(counts: tuple[int, int]) -> bool:
        return sum(counts) == ROWS and counts[1] <= (1 if mode == "skip" else 0)

    return outcome(read, is_right, *named)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
