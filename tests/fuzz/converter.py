"""Mutated released checkpoints into the converter.

What is converted holds the same tensors, and loads. Without a mutation of the configs or the tokenizer, every file of the
result is the same. An edit of a config that is valid is the user's choice, and may change the config of the result.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import torch
from fuzz._mutations import BYTE_MUTATIONS, edit_json, restored
from fuzz.harness import Case, outcome, random_of
from tiny_parts import CHECKPOINT

from mfrsvlm.convert_checkpoint import convert_released
from mfrsvlm.files.model_folder import load_model


AREA = "converter"
TEST_COUNT = 40
INDEX = "pytorch_model.bin.index.json"

Output = dict[str, bytes]


def cases(seed: int, count: int, folder: Path) -> Iterator[Case]:
    source = shutil.copytree(CHECKPOINT, folder / "source")
    expected = convert(source, folder / "expected")
    for number in range(count):
        random = random_of(seed, number)
        make = random.choice((damaged, damaged, edited, edited, lost, retensored, retensored))
        path, kind, change, is_same = make(source, random)
        yield case(f"{number} {path.name}: {kind}", folder, source, path, change, expected, is_same)


def convert(source: Path, output: Path) -> Output:
    """The files of the result, without the card, which names the folder, and what depends on it."""
    convert_released(source, str(source / "vision_tower"), output)
    load_model(output)
    return {path.name: path.read_bytes() for path in sorted(output.iterdir()) if path.suffix not in (".md", ".py")}


def case(
    name: str, folder: Path, source: Path, path: Path, change: Callable[[], object], expected: Output, is_same: bool
) -> Case:
    def run() -> str:
        output = folder / "output"
        try:
            with restored(path):
                change()
                return outcome(lambda: convert(source, output), lambda found: is_right(found, expected, is_same))
        finally:
            shutil.rmtree(output, ignore_errors=True)

    return Case(name, run)


def is_right(found: Output, expected: Output, is_same: bool) -> bool:
    different = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    allowed = () if is_same else [name for name in different if not name.endswith(".safetensors")]
    assert set(different) <= set(allowed), f"{different} differ"
    return True


def damaged(source: Path, random: Random) -> tuple[Path, str, Callable[[], object], bool]:
    """Bytes of one file are changed. The bytes of a tokenizer have no checksum, so that another one may be read."""
    path = random.choice(sorted(path for path in source.rglob("*") if path.is_file()))
    kind = random.choice(list(BYTE_MUTATIONS))
    content = BYTE_MUTATIONS[kind](path.read_bytes(), random)
    return path, kind, lambda: path.write_bytes(content), path.suffix == ".bin"


def edited(source: Path, random: Random) -> tuple[Path, str, Callable[[], object], bool]:
    path = random.choice(sorted(source.rglob("*.json")))
    kind, content = edit_json(path.read_bytes(), random)
    return path, kind, lambda: path.write_bytes(content), path.name == INDEX


def lost(source: Path, random: Random) -> tuple[Path, str, Callable[[], object], bool]:
    path = random.choice(sorted(path for path in source.rglob("*") if path.is_file()))
    kind = random.choice(("missing", "empty"))
    return path, kind, path.unlink if kind == "missing" else lambda: path.write_bytes(b""), path.suffix == ".bin"


def retensored(source: Path, random: Random) -> tuple[Path, str, Callable[[], object], bool]:
    path = random.choice(sorted(source.rglob("*.bin")))
    tensors = torch.load(path, weights_only=True)
    key = random.choice(sorted(tensors))
    kinds = ["drop", "rename", "nan", "shape", "extra", "integers", "no tensor", "no dictionary"]
    kind = random.choice(kinds + ["half"] * (path.parent == source))  # the type of a tower is stated nowhere
    value = tensors[key]
    if kind == "drop":
        del tensors[key]
    elif kind == "rename":
        tensors[f"{key}s"] = tensors.pop(key)
    elif kind == "nan":
        tensors[key] = value.clone()
        tensors[key].view(-1)[random.randrange(value.numel())] = float("nan")
    elif kind == "half":
        tensors[key] = value.half()
    elif kind == "shape":
        tensors[key] = torch.cat([value.reshape(-1), value.reshape(-1)])
    elif kind == "extra":
        tensors[f"{key}.more"] = value.clone()
    elif kind == "integers":
        tensors[key] = value.to(torch.int32)
    elif kind == "no tensor":
        tensors[key] = value.tolist() if value.numel() < 1000 else "text"
    content = [tensors] if kind == "no dictionary" else tensors
    return path, f"{kind} {key}", lambda: torch.save(content, path), True
