"""The authors' layout of a checkpoint: conversion of its keys and config fields, and rejection of unsupported variants."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, LlamaConfig, LlamaTokenizer

from .arguments import DTYPES
from .configuration_mfrsvlm import MFRSVLMConfig


EVA = re.compile(r"(?<![a-z])eva(?!l)", re.IGNORECASE)  # "EVA02-CLIP", "EvaCLIPModel", but not "retrieval" or "evaluation"

# Released key -> our key. None: dropped on purpose. First match counts; a key that matches nothing is an error.
_LM, _INJ = r"model.language_model", r"model.injectors"
_LAYER = r"self_attn\.[qkvo]_proj\.weight|self_attn\.[qkvo]_proj\.bias|mlp\.(?:gate|up|down)_proj\.weight"
# A CLIP's vision part, alone (transformers 4 writes vision_model., 5 does not) or inside a LLaVA-like checkpoint.
_TOWER = r"(?:model\.vision_tower\.(?:vision_tower\.)?)?(?:vision_model\.)?"
# fmt: off
KEY_TABLE: list[tuple[str, str | None]] = [
    (r"lm_head\.weight",                                                      r"lm_head.weight"),
    (r"model\.((?:embed_tokens|norm)\.weight)",                               rf"{_LM}.\1"),
    (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",                  None),  # recomputed from rope_theta
    (rf"model\.(layers\.\d+\.(?:{_LAYER}))",                                  rf"{_LM}.\1"),
    (r"model\.(layers\.\d+\.(?:input|post_attention)_layernorm\.weight)",     rf"{_LM}.\1"),
    (r"model\.mm_projector\.0\.(weight|bias)",                                r"model.multi_modal_projector.linear_1.\1"),
    (r"model\.mm_projector\.2\.(weight|bias)",                                r"model.multi_modal_projector.linear_2.\1"),
    (r"model\.deepstack_residual_scale",                                      rf"{_INJ}.@.residual_scale"),  # one row each
    (r"model\.deepstack_(hidden|detail)_norms\.(\d+)\.(weight|bias)",         rf"{_INJ}.\2.\1_norm.\3"),
    (r"model\.deepstack_(detail|gate)_proj\.(\d+)\.(weight|bias)",            rf"{_INJ}.\2.\1_proj.\3"),
    (r"model\.deepstack_router_(query|key)\.(\d+)\.0\.(weight|bias)",         rf"{_INJ}.\2.router.\1_norm.\3"),
    (r"model\.deepstack_router_(query|key)\.(\d+)\.1\.(weight|bias)",         rf"{_INJ}.\2.router.\1_proj.\3"),
    (_TOWER + r"embeddings\.position_ids",                                    None),  # a constant range
    (_TOWER + r"((?:embeddings|pre_layrnorm|encoder|post_layernorm)\..+)",    r"model.vision_tower.\1"),
    (r"text_model\..+|text_projection\.weight|visual_projection\.weight|logit_scale", None),  # the rest of a full CLIP
]
# Supported values of the fields of a released config, or types of list items. Other fields that begin with mm_ or deepstack_
# are rejected, so that no setting is ignored.
CHOICES: dict[str, tuple[Any, ...]] = {
    "model_type": ("mfrsvlm", "vhm"),
    "image_aspect_ratio": ("pad", "square", None),
    "mm_projector_type": ("mlp2x_gelu", None),
    "mm_use_im_patch_token": (False, None),
    "mm_use_im_start_end": (False, None),
    "mm_vision_select_feature": ("patch", None),
}
LISTS: dict[str, tuple[type, ...]] = {
    "deepstack_detail_layers": (int, float),
    "deepstack_injection_layers": (int,),
    "deepstack_window_scales": (int, float),
}
OTHERS = ("deepstack_downsample_factor", "mm_hidden_size", "mm_projector_lr", "mm_vision_select_layer", "mm_vision_tower")
# fmt: on


LONGEST_MESSAGE = 900  # characters


class ConversionError(ValueError):
    """A checkpoint that cannot be converted. The message names the file or field, its value, and what to do."""

    def __init__(self, message: str) -> None:
        # Names and values from a damaged file may have any length. What a process printed is kept whole.
        super().__init__(message if len(message) <= LONGEST_MESSAGE or "\n" in message else f"{message[:LONGEST_MESSAGE]}…")


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Converts errors of other libraries on invalid input to a `ConversionError` of one line, with the context `what`."""
    try:
        yield
    except ConversionError:
        raise
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, EOFError) as error:
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ConversionError(f"{what}: {' '.join(text.split())}") from error
    except (StrictDataclassError, SafetensorError) as error:
        raise ConversionError(f"{what}: {' '.join(str(error).split())}") from error


def read_json(path: Path) -> dict[str, Any]:
    with explained(f"{path} cannot be read as a JSON object"):
        return {**json.loads(path.read_text())}


def is_finite(tensor: Any) -> bool:
    """Whether a tensor holds neither NaN nor infinity. Integers and packed weights of quantized layers count as finite."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.element_size() == 1:
        return True
    if not tensor.numel():
        return True
    # Both ends are NaN if one value is. Unlike `isfinite` and sums in another type, this takes no memory.
    return all(bool(end.isfinite()) for end in torch.aminmax(tensor))


def rename(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Renames one released tensor by `KEY_TABLE`: to one tensor, one per injector, or none if it is dropped.

    Raises:
        ConversionError: no row of the table matches.
    """
    for pattern, replacement in KEY_TABLE:
        match = re.fullmatch(pattern, str(key))
        if match is None:
            continue
        if replacement is None:
            return {}
        if "@" not in replacement:
            return {match.expand(replacement): tensor}
        if tensor.ndim != 1:
            raise ConversionError(f"{key} has shape {tuple(tensor.shape)}, not one number an injection layer.")
        return {replacement.replace("@", str(rank)): row.reshape(1).clone() for rank, row in enumerate(tensor)}
    raise ConversionError(
        f"Unknown key {key!r} of shape {tuple(tensor.shape)}: no row of KEY_TABLE matches it, so the checkpoint holds "
        "something that this package would not load."
    )


def resolve_depths(spec: list[float], num_layers: int) -> list[int]:
    """Encoder outputs that a released `deepstack_detail_layers` means, ascending.

    A float in (0, 1] is a share of the depth, rounded half to even; anything else an index, from the end if negative.
    """
    indices = set()
    for value in spec:
        if isinstance(value, float) and 0 < value <= 1:
            index = round(value * num_layers)
        else:
            index = int(value) + (num_layers if value < 0 else 0)
        indices.add(min(max(index, 1), num_layers))
    return sorted(indices)


def resolve_window_sizes(scales: list[float], tokens_per_side: int, patch_size: int) -> list[int]:
    """Window sides in pixels that a released `deepstack_window_scales` means, in its order, 1.0 first if absent."""
    kept = list(dict.fromkeys(min(float(scale), 1.0) for scale in scales if scale > 0))
    if 1.0 not in kept:
        kept.insert(0, 1.0)
    divisors = [n for n in range(1, tokens_per_side + 1) if tokens_per_side % n == 0]
    wanted = [round(scale * tokens_per_side) for scale in kept]
    return [min(divisors, key=lambda n: (abs(n - tokens), n)) * patch_size for tokens in wanted]


def resolve_injection_layers(layers: list[int], num_layers: int) -> list[int]:
    """0-based decoder layers that a released list means: counted from one unless it holds a 0."""
    shift = 0 if 0 in layers else 1
    return sorted({layer - shift for layer in layers if 0 <= layer - shift < num_layers})


def refuse_eva(source: Any, content: dict[str, Any]) -> None:
    """Raises for EVA-CLIP, whose model type is also "clip" but whose biases and norms differ. Detected by names."""
    names = {field: content.get(field) for field in ("model_type", "architectures", "auto_map")}
    names["mm_vision_tower"] = Path(str(content.get("mm_vision_tower"))).name
    for field, value in names.items():
        if EVA.search(str(value)):
            raise ConversionError(f"{source} has {field}={value!r}: EVA towers are not supported.")


def refuse_variants(source: Path, content: dict[str, Any]) -> None:
    """Raises `ConversionError` for unsupported variants, which would otherwise be converted incompletely."""
    for name in ("adapter_config.json", "non_lora_trainables.bin"):
        if (source / name).is_file():
            raise ConversionError(f"{source} is a LoRA folder ({name}): merge it into its base model first.")
    refuse_eva(source, content)
    for field, values in CHOICES.items():
        if content.get(field) not in values:
            raise ConversionError(f"{field}={content.get(field)!r} is not supported: only {' or '.join(map(repr, values))}.")
    known = {*CHOICES, *LISTS, *OTHERS}
    unknown = sorted(field for field in content if field.startswith(("mm_", "deepstack_")) and field not in known)
    if unknown:
        raise ConversionError(f"config.json holds fields that this converter does not know: {unknown}.")
    for field, types in {**LISTS, "deepstack_downsample_factor": (int,)}.items():
        value = content.get(field)
        if value is None:
            raise ConversionError(f"config.json lacks {field}: a checkpoint without detail injection is a plain LLaVA.")
        items = value if field in LISTS and isinstance(value, list) else [value]
        if (field in LISTS) != isinstance(value, list) or not items or any(type(item) not in types for item in items):
            kind = " or ".join(item.__name__ for item in types)
            raise ConversionError(f"{field}={value!r} must be {'a list, not empty, of' if field in LISTS else ''} {kind}.")


def released_config(content: dict[str, Any], tower: Path, dtype: str | None) -> MFRSVLMConfig:
    """The `MFRSVLMConfig` of a released checkpoint, with the settings of the published training."""
    dtype = dtype or content.get("torch_dtype") or content.get("dtype") or "float32"
    if dtype not in DTYPES:
        raise ConversionError(f"torch_dtype={dtype!r} is not supported: pass --dtype {', '.join(DTYPES)}.")
    feature_layer = content.get("mm_vision_select_layer", -1)
    if isinstance(feature_layer, list) and len(feature_layer) == 1:
        (feature_layer,) = feature_layer
    if type(feature_layer) is not int:
        raise ConversionError(f"mm_vision_select_layer={feature_layer!r} must be an int, or a list of one.")
    vision = read_json(tower / "config.json")
    refuse_eva(tower, vision)
    vision = vision.get("vision_config", vision) if vision.get("model_type") == "clip" else vision
    vision = {**vision, "model_type": vision.get("model_type", "clip_vision_model")}
    if vision["model_type"] != "clip_vision_model":
        raise ConversionError(f"Vision tower {tower} is a {vision['model_type']!r}, but released ones are CLIP ViTs.")
    others = ("model_type", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype")
    prefixes = ("mm_", "deepstack_", "image_", "tune_", "freeze_", "vision_tower_", "use_mm_")
    text = {key: value for key, value in content.items() if key not in others and not key.startswith(prefixes)}
    with explained("The config.json files describe no model that this package can hold"):
        vision_config, text_config = AutoConfig.for_model(**vision), LlamaConfig(**text)
        patch_size, num_layers = vision_config.patch_size, text_config.num_hidden_layers
        tokens_per_side = vision_config.image_size // patch_size
        return make_config(
            vision_config,
            text_config,
            dtype,
            vision_feature_layer=feature_layer,
            canvas_scale=content["deepstack_downsample_factor"],
            window_sizes=resolve_window_sizes(content["deepstack_window_scales"], tokens_per_side, patch_size),
            window_encoding="resize",
            window_weighting="hann",
            detail_feature_layers=resolve_depths(content["deepstack_detail_layers"], vision_config.num_hidden_layers),
            injection_layers=resolve_injection_layers(content["deepstack_injection_layers"], num_layers),
            routing="stack",
            routing_scope="sample",
        )


def make_config(vision_config: Any, text_config: Any, dtype: Any, **fields: Any) -> MFRSVLMConfig:
    special = {name: getattr(text_config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = MFRSVLMConfig(vision_config=vision_config, text_config=text_config, dtype=dtype, **special, **fields)
    # The parts may come from folders of another type; a part with a dtype of its own would be built in that.
    config.text_config.dtype = config.vision_config.dtype = config.dtype
    return config


def read_tokenizer(source: Path) -> LlamaTokenizer:
    """The tokenizer of a released checkpoint, which splits the words after a special token as its `legacy` flag says."""
    if not (source / "tokenizer.model").is_file():  # LlamaTokenizer would silently make an empty one
        raise ConversionError(f"{source / 'tokenizer.model'} is missing: copy it from the base language model.")
    path = source / "tokenizer_config.json"
    legacy = read_json(path).get("legacy") if path.is_file() else None
    # Where the flag is missing, the transformers of the time took it for set.
    legacy = legacy is None or bool(legacy)
    with explained(f"The tokenizer of {source} cannot be read"):
        tokenizer = LlamaTokenizer.from_pretrained(source, legacy=legacy)
    tokenizer.init_kwargs["legacy"] = legacy  # it would not be saved otherwise, and a reloaded tokenizer split differently
    return tokenizer
