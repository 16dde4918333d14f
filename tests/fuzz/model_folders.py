"""Mutated model folders: damaged, exchanged, edited and missing files, and tensors that are missing, renamed or not finite.

What loads must hold the same tensors, give bit-identical logits, and process an image and a text to identical tensors.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from fuzz._mutations import BYTE_MUTATIONS, edit_json, restored
from fuzz.harness import Case, outcome, random_of
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_training import tiny_folder

from mfrsvlm import MFRSVLMForConditionalGeneration
from mfrsvlm.checksums_mfrsvlm import CHECKSUMS, read_checksums
from mfrsvlm.files.model_folder import load_model


AREA = "model folders"
TEST_COUNT = 120
SHARD = "100KB"

Tensors = dict[str, torch.Tensor]


def cases(seed: int, count: int, folder: Path) -> Iterator[Case]:
    folders = {"one file": tiny_folder(folder / "one"), "shards": tiny_folder(folder / "shards")}
    MFRSVLMForConditionalGeneration.from_pretrained(folders["shards"]).save_pretrained(
        folders["shards"], max_shard_size=SHARD
    )
    expected = {kind: facts(load_model(whole)) for kind, whole in folders.items()}
    for number in range(count):
        random = random_of(seed, number)
        kind = random.choice(list(folders))
        make = random.choice((damaged, damaged, edited, exchanged, lost, retensored))
        yield make(folders[kind], expected[kind], f"{number} {kind}", random)


def facts(loaded: tuple[Any, Any]) -> Tensors:
    """Everything that a loaded folder determines: its tensors, those of the processor, and logits."""
    model, processor = loaded
    image = Image.effect_mandelbrot((40, 30), (-2, -1.5, 1, 1.5), 40).convert("RGB")
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]}]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**inputs.to(model.dtype)).logits
    return {"logits": logits, **{f"input {key}": value for key, value in inputs.items()}, **model.state_dict()}


def same(found: Tensors, expected: Tensors) -> bool:
    assert found.keys() == expected.keys()
    different = [
        key for key in found if found[key].dtype != expected[key].dtype or not torch.equal(found[key], expected[key])
    ]
    assert not different, f"{len(different)} tensors differ, such as {different[:3]}"
    return True


def case(name: str, folder: Path, paths: list[Path], change: Callable[[], object], is_right: Callable[[Any], bool]) -> Case:
    def run() -> str:
        with restored(*paths):
            change()
            return outcome(lambda: facts(load_model(folder)), is_right, str(folder))

    return Case(name, run)


def listed(folder: Path) -> list[Path]:
    return [folder / name for name in sorted(read_checksums(folder / CHECKSUMS))]


def damaged(folder: Path, expected: Tensors, name: str, random: Random) -> Case:
    """Bytes of one file are changed. A flipped bit in the weights is found by their checksum alone."""
    path = random.choice([*listed(folder), folder / CHECKSUMS])
    kind = random.choice(list(BYTE_MUTATIONS))
    content = BYTE_MUTATIONS[kind](path.read_bytes(), random)
    change = lambda: path.write_bytes(content)  # noqa: E731
    return case(f"{name}: {kind} {path.name}", folder, [path], change, lambda found: same(found, expected))


def edited(folder: Path, expected: Tensors, name: str, random: Random) -> Case:
    """A JSON file is edited, with and without checksums. Without them, an edit that is valid is the user's choice."""
    path = random.choice([path for path in listed(folder) if path.suffix == ".json"])
    checked = random.random() < 0.5
    kind, content = edit_json(path.read_bytes(), random)

    def change() -> None:
        path.write_bytes(content)
        if not checked:
            (folder / CHECKSUMS).unlink()

    name = f"{name}: {path.name} {kind}{'' if checked else ' without checksums'}"
    right = (lambda found: same(found, expected)) if checked else (lambda _: True)
    return case(name, folder, [path, folder / CHECKSUMS], change, right)


def exchanged(folder: Path, expected: Tensors, name: str, random: Random) -> Case:
    """Two files have each other's content."""
    first, second = random.sample(listed(folder), 2)

    def change() -> None:
        one, other = first.read_bytes(), second.read_bytes()
        first.write_bytes(other)
        second.write_bytes(one)

    name = f"{name}: exchange {first.name} and {second.name}"
    return case(name, folder, [first, second], change, lambda found: same(found, expected))


def lost(folder: Path, expected: Tensors, name: str, random: Random) -> Case:
    path = random.choice([*listed(folder), folder / CHECKSUMS])
    kind = random.choice(("missing", "empty"))
    change = path.unlink if kind == "missing" else lambda: path.write_bytes(b"")
    return case(f"{name}: {path.name} {kind}", folder, [path], change, lambda found: same(found, expected))


def retensored(folder: Path, expected: Tensors, name: str, random: Random) -> Case:
    """Tensors are changed in a folder without checksums, so that each change has to be found by itself."""
    path = random.choice(sorted(folder.glob("*.safetensors")))
    tensors = load_file(path)
    key = random.choice(sorted(tensors))
    kind = random.choice(
        ("drop", "rename", "nan", "infinity", "half", "all half", "shape", "extra", "integers", "drop many")
    )
    value = tensors[key]
    if kind == "drop":
        del tensors[key]
    elif kind == "drop many":
        part = random.choice(("projector", "injectors", "layers.1", "layers.2", "vision_tower", "lm_head"))
        tensors = {other: tensor for other, tensor in tensors.items() if part not in other} or {"x": value}
    elif kind == "rename":
        tensors[f"{key}s"] = tensors.pop(key)
    elif kind in ("nan", "infinity"):
        changed = value.clone().float()
        changed.view(-1)[random.randrange(changed.numel())] = float("nan" if kind == "nan" else "-inf")
        tensors[key] = changed.to(value.dtype) if value.is_floating_point() else changed
    elif kind == "half":
        tensors[key] = value.half()
    elif kind == "all half":
        tensors = {other: tensor.half() for other, tensor in tensors.items()}
    elif kind == "shape":
        tensors[key] = torch.cat([value.view(-1), value.view(-1)])
    elif kind == "extra":
        tensors[f"{key}.more"] = value.clone()
    else:
        tensors[key] = value.to(torch.int32)

    def change() -> None:
        save_file(tensors, path, metadata={"format": "pt"})
        (folder / CHECKSUMS).unlink()

    paths = [path, folder / CHECKSUMS]
    return case(f"{name}: {kind} {key} of {path.name}", folder, paths, change, lambda found: same(found, expected))
