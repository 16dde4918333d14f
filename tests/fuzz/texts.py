"""Texts and settings of the processors: ids as those of the tokenizer and finite pixels, or rejected."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from fuzz.chats import IMAGE, TOKENS, processor
from fuzz.harness import Case, outcome, random_of

from mfrsvlm import MFRSVLMImageProcessor
from mfrsvlm.configuration_mfrsvlm import packed_lengths, window_table


AREA = "texts and settings"
LETTERS = "aé河 \n\t\0🛰\u200f\u0301<>/s[]{}%'\"\\0123456789"
WORDS = (
    "USER: ",
    " ASSISTANT:",
    "</s>",
    "<s>",
    "<unk>",
    "<pad>",
    "<image>",
    "\ud800",
    "\ufeff",
    "ASSISTANT:",
    "\x85",
    "a" * 5000,
)
TEXT: dict[str, tuple[Any, ...]] = {
    "padding": (True, False, "longest", "max_length", "nonsense", 3, None, [], b"x"),
    "truncation": (True, False, "longest_first", "only_second", "nonsense", 3, None),
    "max_length": (1, 9, 17, 40, 100, 0, -3, 10**30, "9", 9.0, True, None),
    "pad_to_multiple_of": (8, 1, 0, -1, "8", 2.5),
    "padding_side": ("left", "right", "middle", 3),
    "return_tensors": ("pt", "np", None, "nonsense", 3),
    "add_special_tokens": (True, False, "yes", None),
    "return_offsets_mapping": (True, False, "x"),
    "return_mm_token_type_ids": (True, "x"),
    "return_attention_mask": (True, False, 3),
    "return_token_type_ids": (True,),
    "return_length": (True,),
    "return_special_tokens_mask": (True,),
    "return_overflowing_tokens": (True,),
    "stride": (1, -1, 10**6, "x"),
    "split_special_tokens": (True, False),
    "is_split_into_words": (True, False),
    "text_kwargs": ({}, {"padding": True}, 3, "x", None, {"nonsense": 1}),
    "nonsense": (1,),
    "text_pair": ("x", 3),
}
PIXELS: dict[str, tuple[Any, ...]] = {
    "do_resize": (True, False, "yes", 1),
    "do_pad": (True, False, 0, "no"),
    "do_center_crop": (True, False, "x"),
    "do_rescale": (True, False, 1),
    "do_normalize": (True, False, []),
    "do_convert_rgb": (True, False, None, "x"),
    "size": (
        {"shortest_edge": 28},
        {"height": 40, "width": 30},
        {"shortest_edge": -1},
        {},
        28,
        [28, 28],
        9**9,
        {"x": 1},
        "a",
    ),
    "crop_size": ({"height": 28, "width": 28}, {"height": 14, "width": 28}, 28, {"height": 9**9, "width": 9**9}, "a", [1]),
    "patch_size": (7, 14, 0, -7, 3, 28, "7", True, 10**400),
    "resample": (0, 1, 2, 3, 4, 5, 6, -1, "a", None, 2.5),
    "rescale_factor": (1 / 255, 1.0, 0, 1e300, [1], float("nan"), "1", True),
    "image_mean": (0.5, [0.1, 0.2, 0.3], (0.5,), [1, 2], 1e30, "a", [], [0.5] * 4, [None] * 3, float("nan"), {}),
    "image_std": (0.5, [0.1, 0.2, 0.3], 0, 1e-40, -1.0, [float("inf")] * 3, "a", [[0.5]]),
    "num_channels": (3, 1, 4, 0, 10**9, True, "3"),
    "value_range": ((0, 255), [0, 1], (1, 0), "ab", 3, (0, float("nan")), [0, 1, 2]),
    "pixel_dtype": ("float32", "bfloat16", "float16", "int8", 3),
    "canvas_scale": (1, 2, 3, 0, 10**9, 2.0, "2"),
    "canvas_source": ("image", "global_view", "none", 3),
    "window_sizes": ([28, 14], [], [14], (28,), [7], [10**9], 28, [0], ["a"], [14, 14]),
    "window_overlap": (0.5, 0, 0.9, 1, -1, 0.3, "a", float("nan")),
    "window_packing": ("windows_first", "channels_first", "x", 1),
    "max_aspect_ratio": (200.0, 1, 0, float("inf"), float("nan"), "x"),
    "max_image_pixels": (10**6, 100, -1, 1.5, "x"),
    "input_data_format": ("channels_first", "channels_last", "x", 3),
    "device": ("cpu", "nonsense", 3),
    "data_format": ("channels_first", "x"),
    "nonsense": (1,),
}
TINY = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, "patch_size": 7, "window_sizes": [28, 14]}


@cache
def images() -> tuple[Any, ...]:
    generator = np.random.default_rng(1)
    return (
        IMAGE,
        IMAGE.convert("RGBA"),
        IMAGE.convert("L"),
        np.asarray(IMAGE),
        generator.random((4, 20, 30)),
        np.full((20, 30), 100, np.uint16),
        generator.random((1, 28, 28), dtype=np.float32),
        np.array(["a"]),
        np.zeros((2, 0, 3)),
        np.full((9, 9), np.nan),
        np.zeros((3, 9, 9), complex),
        np.ma.masked_array(np.zeros((9, 9), np.uint8), np.eye(9)),
    )


def text_of(random: Random) -> str:
    return "".join(
        random.choice(WORDS) if random.random() < 0.2 else random.choice(LETTERS) for _ in range(random.randrange(12))
    )


def expected_ids(placement: str, prompt: str, special: bool) -> list[int]:
    tokenizer, marker = processor(placement).tokenizer, "<image>"
    if placement == "inline":
        return tokenizer(prompt.replace(marker, marker * TOKENS), add_special_tokens=special).input_ids
    pieces = prompt.split(marker)
    ids = tokenizer(pieces[0], add_special_tokens=special).input_ids
    for piece in pieces[1:]:
        ids += tokenizer(piece, add_special_tokens=False).input_ids
    return [tokenizer.convert_tokens_to_ids(marker)] * (TOKENS * (len(pieces) - 1)) + ids


def run_text(placement: str, prompts: list[str], count: int, options: dict[str, Any]) -> str:
    def is_right(outputs: Any) -> bool:
        reader = processor(placement)
        expected = sum(prompt.count("<image>") for prompt in prompts)
        rows = [np.asarray(row).tolist() for row in outputs["input_ids"]]
        if sum(row.count(reader.image_token_id) for row in rows) != TOKENS * expected or expected != count:
            return False
        changed = {
            "truncation",
            "max_length",
            "split_special_tokens",
            "is_split_into_words",
            "return_overflowing_tokens",
            "stride",
            "text_pair",
        }
        if changed & {name for name in options if options[name]}:
            return True
        special = options.get("add_special_tokens", True)
        if "add_special_tokens" not in options and any(prompt.startswith("<s>") for prompt in prompts):
            special = False
        for row, prompt in zip(rows, prompts, strict=True):
            wanted = expected_ids(placement, prompt, bool(special))
            fill = len(row) - len(wanted)
            pads = [reader.tokenizer.pad_token_id] * fill
            if fill < 0 or row not in (pads + wanted, wanted + pads):
                return False
        return True

    return outcome(lambda: processor(placement)([IMAGE] * count or None, prompts, **options), is_right)


def run_pixels(image: Any, settings: dict[str, Any], at_call: bool) -> str:
    def call() -> Any:
        reader = MFRSVLMImageProcessor(**TINY) if at_call else MFRSVLMImageProcessor(**{**TINY, **settings})
        return reader, reader(image, **(settings if at_call else {}))["pixel_values"]

    def is_right(result: Any) -> bool:
        reader, (row,) = result
        given = {name: getattr(reader, name) for name in reader._valid_kwargs_names}
        if at_call:
            standard = reader._standardize_kwargs(**{k: v for k, v in settings.items() if v is not None})
            given |= {name: standard[name] for name in settings if settings[name] is not None}
        side = given["crop_size"]["height"]
        windows = window_table(side, *(given[n] for n in ("patch_size", "canvas_scale", "window_sizes", "window_overlap")))
        values = row.float().numpy() if hasattr(row, "float") else np.asarray(row)
        return values.shape == (sum(packed_lengths(side, windows, given["num_channels"])),) and bool(
            np.isfinite(values).all()
        )

    return outcome(call, is_right)


def cases(seed: int, count: int, folder: Path) -> Iterator[Case]:
    for number in range(count):
        random = random_of(seed, number)
        if random.random() < 0.5:
            prompts = [text_of(random) for _ in range(random.randint(1, 3))]
            wanted = sum(prompt.count("<image>") for prompt in prompts)
            images_given = wanted if random.random() < 0.9 else random.randrange(3)
            options = {n: random.choice(TEXT[n]) for n in random.sample(list(TEXT), random.choice([0, 0, 1, 1, 2, 4]))}
            placement = random.choice(["inline", "prefix"])
            yield Case(
                f"{number}: {placement} text, {', '.join(f'{k}={v}' for k, v in options.items())}",
                lambda p=placement, t=prompts, c=images_given, o=options: run_text(p, t, c, o),
            )
        else:
            settings = {n: random.choice(PIXELS[n]) for n in random.sample(list(PIXELS), random.randint(1, 4))}
            image, at_call = random.choice(images()), random.random() < 0.5
            yield Case(
                f"{number}: pixels, {str(settings)[:150]}",
                lambda i=image, s=settings, a=at_call: run_pixels(i, s, a),
            )
