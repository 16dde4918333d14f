"""Calls of one processor and one model: answers of valid inputs, computed once, and inputs that are rejected."""

import ctypes
import functools
import gc
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from fuzz.harness import PACKAGE, outcome
from PIL import Image

from mfrsvlm.evaluation.answering import load


MODEL = PACKAGE / "demo" / "model"
NEW_TOKENS = 5
QUESTION = "How many ships are there?"


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def turn(*content: Any, role: str = "user") -> dict[str, Any]:
    parts = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in content
    ]
    return {"role": role, "content": parts}


def text(images: Any, texts: Any) -> Callable[[Any], Any]:
    return lambda processor: processor(images, texts, padding=True, return_tensors="pt")


def chat(*chats: Any) -> Callable[[Any], Any]:
    """One chat, or a batch of them."""
    options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    options["processor_kwargs"] = {"padding": True}
    return lambda processor: processor.apply_chat_template(chats[0] if len(chats) == 1 else list(chats), **options)


SIZES = ((1, 1), (7, 300), (300, 7), (64, 64), (97, 64), (128, 128), (333, 222), (640, 480), (1600, 1200))
VALID: dict[str, Callable[[Any], Any]] = {
    **{f"image of {w} x {h}": chat([turn(picture(w, h), QUESTION)]) for w, h in SIZES},
    **{f"image of mode {mode}": chat([turn(picture(60, 40, mode), QUESTION)]) for mode in ("L", "RGBA", "P", "1")},
    "array": chat([turn(np.asarray(picture(50, 70)), QUESTION)]),
    "text only": chat([turn("Hello")]),
    "long text": chat([turn("Is it a river? " * 40)]),
    "two images": chat([turn(picture(64, 64), picture(65, 65), "What has changed?")]),
    "several turns": chat([turn(picture(64, 64), QUESTION), turn("Two.", role="assistant"), turn("Where are they?")]),
    "batch": chat([turn(picture(64, 64), QUESTION)], [turn(picture(90, 20), "Is there a river? Answer yes or no.")]),
    "batch of images and text": chat(
        [turn(picture(64, 64), QUESTION)], [turn("Hello")], [turn(picture(9, 9), "What is it?")]
    ),
    "prompt": text(picture(80, 60), "USER: <image>\nHow many ships are there? ASSISTANT:"),
    "prompts": text([[picture(80, 60)], []], ["USER: <image>\nHow many? ASSISTANT:", "USER: Hello ASSISTANT:"]),
}
INVALID: dict[str, Callable[[Any], Any]] = {
    "empty chat": chat([]),
    "chat that is a text": chat("hello"),
    "turn that is a text": chat(["hello"]),
    "unknown role": chat([turn("Hello", role="pilot")]),
    "no user": chat([turn("Hello", role="assistant")]),
    "text part without text": chat([{"role": "user", "content": [{"type": "text"}]}]),
    "content None": chat([{"role": "user", "content": None}]),
    "image part without image": chat([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]),
    "missing file": chat([turn(Path("missing.png").name, {"no": "image"})]),
    "image None": text([None], "USER: <image>\nWhat? ASSISTANT:"),
    "empty array": text(np.zeros((0, 4, 3), np.uint8), "USER: <image>\nWhat? ASSISTANT:"),
    "too few images": text(picture(9, 9), "USER: <image> <image>\nWhat? ASSISTANT:"),
    "too many images": text([picture(9, 9), picture(8, 8)], "USER: <image>\nWhat? ASSISTANT:"),
    "array of infinities": text(np.full((4, 5, 3), np.inf), "USER: <image>\nWhat? ASSISTANT:"),
}


@dataclass
class Soak:
    """The loaded model, and what it answers."""

    model: Any
    processor: Any

    def answer(self, name: str) -> list[list[int]]:
        inputs = VALID[name](self.processor).to(self.model.device, self.model.dtype)
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        return tokens.tolist()

    @functools.cached_property
    def answers(self) -> dict[str, list[list[int]]]:
        return {name: self.answer(name) for name in VALID}

    def call(self, name: str) -> str:
        """One call: "right" or "rejected", see `outcome`."""
        if name in VALID:
            return outcome(lambda: self.answer(name), self.answers[name].__eq__)
        return outcome(lambda: INVALID[name](self.processor), lambda _: False)


@functools.cache
def soak() -> Soak:
    return Soak(*load(str(MODEL), device="cpu"))


def draw(random: Random) -> str:
    """A valid input, three times of four, or an invalid one."""
    return random.choice(list(VALID if random.random() < 0.75 else INVALID))


def resident() -> float:
    """Memory in MB that the process uses, without what is free but not given back."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        pass
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE / 2**20
