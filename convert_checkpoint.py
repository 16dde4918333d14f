"""Makes Hub folders of this package: from a released checkpoint, or from the parts of a new model.

    python -m mfrsvlm.convert_checkpoint released SRC --vision-tower DIR_OR_HUB_ID --output OUT [--dtype bfloat16] [--verify]
    python -m mfrsvlm.convert_checkpoint assemble --language-model ID --vision-tower ID --output OUT [--projector FILE]

A released checkpoint is read shard by shard, so peak memory is its largest shard and a gigabyte of output. Every key is
matched by `KEY_TABLE`, dropped there on purpose, or the run fails and names it. The output appears whole or not at all.
"""

import argparse
import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaTokenizer,
    set_seed,
)
from transformers.image_processing_utils import get_size_dict
from transformers.utils import logging

from .configuration_mfrsvlm import MFRSVLMConfig
from .model_card.card import write_model_card
from .modeling_mfrsvlm import DECODERS, MFRSVLMForConditionalGeneration
from .processing_mfrsvlm import CHAT_TEMPLATE, MFRSVLMImageProcessor, MFRSVLMProcessor


logger = logging.get_logger(__name__)

PUBLIC_TOWER = "openai/clip-vit-large-patch14-336"
CODE_FILES = ("configuration_mfrsvlm.py", "modeling_mfrsvlm.py", "processing_mfrsvlm.py")
MAX_OUTPUT_SHARD = 10**9  # bytes
DTYPES = ("float32", "float16", "bfloat16")
IMAGE_TOKEN = "<image>"
EVA = re.compile(r"(?<![a-z])eva(?!l)", re.IGNORECASE)  # "EVA02-CLIP", "EvaCLIPModel", but not "retrieval" or "evaluation"

# Released key -> our key. None: dropped on purpose. First match counts; a key that matches nothing is an error.
_LM, _INJ = r"model.language_model", r"model.language_model.injectors.layers"
# A CLIP's vision part, alone (transformers 4 writes vision_model., 5 does not) or inside a LLaVA-like checkpoint.
_TOWER = r"^(?:model\.vision_tower\.(?:vision_tower\.)?)?(?:vision_model\.)?"
_TOWER_PARTS = _TOWER + r"((?:embeddings|pre_layrnorm|encoder|post_layernorm)\..+)$"
# fmt: off
KEY_TABLE: list[tuple[str, str | None]] = [
    (r"^lm_head\.weight$",                                                    r"lm_head.weight"),
    (r"^model\.embed_tokens\.weight$",                                        rf"{_LM}.embed_tokens.weight"),
    (r"^model\.norm\.weight$",                                                rf"{_LM}.norm.weight"),
    (r"^model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$",                None),  # recomputed from rope_theta
    (r"^model\.layers\.(\d+)\.self_attn\.([qkvo]_proj)\.(weight|bias)$",      rf"{_LM}.layers.\1.self_attn.\2.\3"),
    (r"^model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight$",             rf"{_LM}.layers.\1.mlp.\2_proj.weight"),
    (r"^model\.layers\.(\d+)\.(input|post_attention)_layernorm\.weight$",     rf"{_LM}.layers.\1.\2_layernorm.weight"),
    (r"^model\.mm_projector\.0\.(weight|bias)$",                              r"model.multi_modal_projector.linear_1.\1"),
    (r"^model\.mm_projector\.2\.(weight|bias)$",                              r"model.multi_modal_projector.linear_2.\1"),
    (r"^model\.deepstack_residual_scale$",                                    rf"{_INJ}.*.residual_scale"),  # one row each
    (r"^model\.deepstack_hidden_norms\.(\d+)\.(weight|bias)$",                rf"{_INJ}.\1.hidden_norm.\2"),
    (r"^model\.deepstack_detail_norms\.(\d+)\.(weight|bias)$",                rf"{_INJ}.\1.detail_norm.\2"),
    (r"^model\.deepstack_detail_proj\.(\d+)\.(weight|bias)$",                 rf"{_INJ}.\1.detail_proj.\2"),
    (r"^model\.deepstack_gate_proj\.(\d+)\.(weight|bias)$",                   rf"{_INJ}.\1.gate_proj.\2"),
    (r"^model\.deepstack_router_(query|key)\.(\d+)\.0\.(weight|bias)$",       rf"{_INJ}.\2.router.\1_norm.\3"),
    (r"^model\.deepstack_router_(query|key)\.(\d+)\.1\.(weight|bias)$",       rf"{_INJ}.\2.router.\1_proj.\3"),
    (_TOWER + r"embeddings\.position_ids$",                                   None),  # a constant range
    (_TOWER_PARTS,                                                            r"model.vision_tower.\1"),
    (r"^(?:text_model\..+|text_projection\.weight|visual_projection\.weight|logit_scale)$", None),  # rest of a full CLIP
]
# fmt: on

# Fields of a released config that are read below, and those that only steered its training.
READ_FIELDS = {
    "deepstack_detail_layers",
    "deepstack_downsample_factor",
    "deepstack_injection_layers",
    "deepstack_window_scales",
    "mm_hidden_size",
    "mm_projector_type",
    "mm_use_im_patch_token",
    "mm_use_im_start_end",
    "mm_vision_select_feature",
    "mm_vision_select_layer",
    "mm_vision_tower",
}
TRAINING_FIELDS = {"mm_projector_lr"}


class ConversionError(ValueError):
    """A checkpoint that cannot be converted. The message names the file or field, its value, and what to do."""


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns what other libraries raise on bad input into a `ConversionError` that says what it was about."""
    try:
        yield
    except ConversionError:
        raise
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, StrictDataclassError, SafetensorError) as error:
        raise ConversionError(f"{what}: {error}") from error


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
    kept: list[float] = []
    for scale in scales:
        scale = min(float(scale), 1.0)
        if scale > 0 and scale not in kept:
            kept.append(scale)
    if 1.0 not in kept:
        kept.insert(0, 1.0)
    divisors = [n for n in range(1, tokens_per_side + 1) if tokens_per_side % n == 0]
    sizes = []
    for scale in kept:
        wanted = round(scale * tokens_per_side)
        sizes.append(min(divisors, key=lambda n: (abs(n - wanted), n)) * patch_size)
    return sizes


def resolve_injection_layers(layers: list[int], num_layers: int) -> list[int]:
    """0-based decoder layers that a released list means: counted from one unless it holds a 0."""
    shift = 0 if 0 in layers else 1
    return sorted({layer - shift for layer in layers if 0 <= layer - shift < num_layers})


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConversionError(f"{path} is missing.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not an object.")
    return content


def find_shards(folder: Path) -> dict[Path, set[str] | None]:
    """Weight files of a folder, each with the keys that the index lists for it, `None` where there is no index.

    Safetensors come before `.bin`, an index before a single file. Every shard that an index lists must be there.
    """
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            # A name with a folder in it would let an index reach outside its own.
            if (
                not isinstance(weight_map, dict)
                or not weight_map
                or any(Path(str(n)).name != n for n in weight_map.values())
            ):
                raise ConversionError(f"{index} has no weight_map of keys to file names.")
            shards: dict[Path, set[str]] = {folder / name: set() for name in sorted(set(weight_map.values()))}
            missing = [shard.name for shard in shards if not shard.is_file()]
            if missing:
                raise ConversionError(
                    f"{index} lists {len(missing)} shards that are missing: {missing}. Download them again."
                )
            for key, name in weight_map.items():
                shards[folder / name].add(key)
            return dict(shards)
        if (folder / stem).is_file():
            return {folder / stem: None}
    raise ConversionError(
        f"{folder} holds no weights: expected model.safetensors or pytorch_model.bin, or shards of either and their index."
    )


def read_shard(path: Path, listed: set[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of one file, which must be those that its index lists.

    Pickles are read with `weights_only`: one that carries code is refused, and the code does not run.

    Raises:
        ConversionError: the file is missing, damaged, no plain dictionary of tensors, or not what the index says.
    """
    if not path.is_file():
        raise ConversionError(f"{path} is missing.")
    seen = set()
    for key, tensor in (read_safetensors if path.suffix == ".safetensors" else read_pickle)(path):
        if not isinstance(tensor, torch.Tensor):
            raise ConversionError(f"{path} holds a {type(tensor).__name__} at {key!r}, expected tensors only.")
        if listed is not None and key not in listed:
            raise ConversionError(f"{path} holds {key}, which its index does not list there. Download both again.")
        seen.add(key)
        yield key, tensor
    lacking = sorted((listed or set()) - seen)
    if lacking:
        raise ConversionError(f"{path} lacks {len(lacking)} keys that its index lists: {lacking[:5]}. Download both again.")


def read_safetensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                yield key, file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path} cannot be read, it may be truncated: {error}. Download it again.") from error


def read_pickle(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            tensors = torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path} is refused: it is damaged, a Git LFS pointer, or holds more than tensors. Loading the last could run "
            f"code, which was not done. ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConversionError(f"{path} cannot be read, it may be truncated: {reason}. Download it again.") from error
    if not isinstance(tensors, dict):
        raise ConversionError(f"{path} holds a {type(tensors).__name__}, not a dictionary of tensors.")
    yield from tensors.items()


def rename(key: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Our names for one released tensor, per `KEY_TABLE`.

    Raises:
        ConversionError: no row of the table matches.
    """
    for pattern, replacement in KEY_TABLE:
        match = re.fullmatch(pattern, str(key))
        if match is None:
            continue
        if replacement is None:
            return []
        name = match.expand(replacement.replace("*", "@"))
        if "@" not in name:
            return [(name, tensor)]
        if tensor.ndim != 1:
            raise ConversionError(f"{key} has shape {tuple(tensor.shape)}, but it must hold one number an injection layer.")
        return [(name.replace("@", str(rank)), row.reshape(1)) for rank, row in enumerate(tensor)]
    raise ConversionError(
        f"Unknown key {key!r} of shape {tuple(tensor.shape)}: no row of KEY_TABLE matches it, so the checkpoint holds "
        "something that this package would not load."
    )


def released_shards(source: Path, tower: Path) -> dict[Path, set[str] | None]:
    """Weight files of a released checkpoint and of its vision tower. A tower inside the shards wins, and it is said."""
    shards = find_shards(source)
    for shard, listed in shards.items():
        keys = listed if listed is not None else [key for key, _ in read_shard(shard)]
        if any(re.fullmatch(_TOWER_PARTS, key) for key in keys):
            logger.warning(
                "The shards hold a vision tower of their own: it is used, and the weights of --vision-tower are not."
            )
            return shards
    return {**shards, **find_shards(tower)}


def renamed_tensors(shards: dict[Path, set[str] | None]) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of the shards under our names, one shard after the other."""
    for shard, listed in tqdm(shards.items(), desc="shards", unit="shard"):
        for key, tensor in read_shard(shard, listed):
            yield from rename(key, tensor)


def expected_shapes(config: MFRSVLMConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = MFRSVLMForConditionalGeneration(config)
    tied = set(model.all_tied_weights_keys)
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if key not in tied}


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy of its own in the wanted type, so that the shard it came from can be closed."""
    if not tensor.is_floating_point():
        raise ConversionError(f"{name} holds {tensor.dtype}, not floating point: a quantized checkpoint is not supported.")
    copy = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if copy.dtype != tensor.dtype and copy.isinf().any() and not tensor.isinf().any():
        raise ConversionError(
            f"{name} reaches {tensor.abs().max().item():.3g}, which {dtype} cannot hold: choose --dtype bfloat16 or float32."
        )
    return copy


def write_weights(tensors: Iterator[tuple[str, torch.Tensor]], config: MFRSVLMConfig, folder: Path) -> None:
    """Checks every tensor against the model and writes safetensors shards with their index.

    Raises:
        ConversionError: a key is unknown to the model, comes twice, has the wrong shape or type, or never comes.
    """
    expected = expected_shapes(config)
    weight_map: dict[str, int] = {}
    pending: dict[str, torch.Tensor] = {}
    total_size = pending_size = num_shards = 0

    def flush() -> None:
        nonlocal pending, pending_size, num_shards
        if pending:
            num_shards += 1
            weight_map.update(dict.fromkeys(pending, num_shards))
            save_file(pending, folder / f"shard-{num_shards}.safetensors", metadata={"format": "pt"})
            pending, pending_size = {}, 0

    for name, tensor in tensors:
        if name not in expected:
            raise ConversionError(
                f"{name} has no place in the model that config.json describes. Does config.json belong to this checkpoint?"
            )
        if name in weight_map or name in pending:
            raise ConversionError(f"{name} comes twice.")
        if tuple(tensor.shape) != expected[name]:
            raise ConversionError(f"{name} has shape {tuple(tensor.shape)}, but config.json asks for {expected[name]}.")
        tensor = cast(name, tensor, config.dtype)
        size = tensor.numel() * tensor.element_size()
        if pending_size + size > MAX_OUTPUT_SHARD:
            flush()
        pending[name] = tensor
        pending_size += size
        total_size += size
    flush()

    missing = sorted(set(expected) - set(weight_map))
    if missing:
        raise ConversionError(f"{len(missing)} tensors are missing, among them {missing[:5]}. Is a shard lost?")
    if num_shards == 1:
        (folder / "shard-1.safetensors").rename(folder / "model.safetensors")
        return
    names = {number: f"model-{number:05d}-of-{num_shards:05d}.safetensors" for number in range(1, num_shards + 1)}
    for number, name in names.items():
        (folder / f"shard-{number}.safetensors").rename(folder / name)
    index = {
        "metadata": {"total_size": total_size},
        "weight_map": {key: names[number] for key, number in sorted(weight_map.items())},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def resolve_tower(vision_tower: str | None) -> Path:
    """Folder of the vision tower, downloaded if a Hub id is given."""
    if vision_tower is None:
        raise ConversionError(
            "No vision tower: released shards do not describe one. Pass --vision-tower with the checkpoint's own "
            f"vision_tower/ folder, or {PUBLIC_TOWER} for the public CLIP, whose weights it was not trained with."
        )
    if Path(vision_tower).is_dir():
        return Path(vision_tower)
    if Path(vision_tower).exists() or vision_tower.count("/") != 1 or vision_tower.startswith((".", "/")):
        raise ConversionError(f"--vision-tower {vision_tower} is neither a folder nor a Hub id.")
    logger.warning(
        f"Taking the vision tower from the Hub ({vision_tower}). Training of the released models changed theirs, so answers "
        "will differ from the published ones."
    )
    with explained(f"Vision tower {vision_tower} is no folder, and cannot be downloaded from the Hub"):
        return Path(snapshot_download(vision_tower, allow_patterns=["*.json", "*.safetensors", "pytorch_model*.bin"]))


def read_tower_config(folder: Path) -> Any:
    content = read_json(folder / "config.json")
    refuse_eva(folder, content)
    content = content.get("vision_config", content) if content.get("model_type") == "clip" else content
    model_type = content.get("model_type", "clip_vision_model")
    if model_type != "clip_vision_model":
        raise ConversionError(
            f"Vision tower {folder} is a {model_type!r}: released checkpoints are read with a CLIP ViT only."
        )
    with explained(f"{folder / 'config.json'} describes no CLIP ViT"):
        return AutoConfig.for_model(**{**content, "model_type": model_type})


def refuse_eva(tower: Any, content: dict[str, Any]) -> None:
    """EVA-CLIP calls itself "clip" too, and differs in its biases and norms: only the names of its classes tell."""
    said = {field: content.get(field) for field in ("model_type", "architectures", "auto_map") if content.get(field)}
    if EVA.search(str(said)):
        raise ConversionError(f"Vision tower {tower} says {said}: EVA towers are not supported, only CLIP ViT.")


def refuse_variants(source: Path, content: dict[str, Any]) -> None:
    """Refuses, by name, what would otherwise be read by half."""
    for name in ("adapter_config.json", "non_lora_trainables.bin"):
        if (source / name).is_file():
            raise ConversionError(
                f"{source} is a LoRA folder ({name}): merge it into its base model first, then convert that."
            )
    if content.get("model_type") not in ("mfrsvlm", "vhm"):
        raise ConversionError(
            f'model_type={content.get("model_type")!r}: only "mfrsvlm" and "vhm" are released checkpoints.'
        )
    unread = {key for key in content if key.startswith(("mm_", "deepstack_")) and key not in READ_FIELDS | TRAINING_FIELDS}
    if unread:
        raise ConversionError(f"config.json holds fields that this converter does not know: {sorted(unread)}.")
    absent = sorted(field for field in READ_FIELDS if field.startswith("deepstack_") and content.get(field) is None)
    if absent:
        raise ConversionError(f"config.json lacks {absent}: a checkpoint without detail injection is a plain LLaVA.")
    lists: dict[str, tuple[type, ...]] = {
        "deepstack_detail_layers": (int, float),
        "deepstack_injection_layers": (int,),
        "deepstack_window_scales": (int, float),
    }
    for field, types in lists.items():
        value = content[field]
        if not isinstance(value, list) or not value or any(type(item) not in types for item in value):
            raise ConversionError(
                f"{field}={value!r} must be a list of {' or '.join(kind.__name__ for kind in types)}, not empty."
            )
    if type(content["deepstack_downsample_factor"]) is not int:
        raise ConversionError(f"deepstack_downsample_factor={content['deepstack_downsample_factor']!r} must be an int.")
    select_layer = content.get("mm_vision_select_layer", -1)
    select_layers = select_layer if isinstance(select_layer, list) else [select_layer]
    if len(select_layers) != 1:
        raise ConversionError(f"mm_vision_select_layer={select_layer}: visual tokens from several layers are not supported.")
    if type(select_layers[0]) is not int:
        raise ConversionError(f"mm_vision_select_layer={select_layer!r} must be an int, or a list of one.")
    allowed: dict[str, tuple[Any, ...]] = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": ("patch",),
        "mm_use_im_start_end": (False, None),
        "mm_use_im_patch_token": (False, None),
        "image_aspect_ratio": ("pad", "square", None),
    }
    for field, values in allowed.items():
        if content.get(field, values[0]) not in values:
            raise ConversionError(f"{field}={content[field]!r} is not supported: only {' or '.join(map(repr, values))}.")
    if EVA.search(Path(str(content.get("mm_vision_tower", ""))).name):
        raise ConversionError(
            f"mm_vision_tower={content['mm_vision_tower']!r}: EVA towers are not supported, only CLIP ViT."
        )


def released_config(content: dict[str, Any], vision_config: Any, dtype: str | None) -> MFRSVLMConfig:
    """Our config for a released one: its geometry resolved to plain numbers, its quirks switched on."""
    dtype = dtype or content.get("torch_dtype") or content.get("dtype") or "float32"
    if dtype not in DTYPES:
        raise ConversionError(f"torch_dtype={dtype!r} is not supported: pass --dtype {', '.join(DTYPES)}.")
    if content.get("mm_hidden_size", vision_config.hidden_size) != vision_config.hidden_size:
        raise ConversionError(
            f"mm_hidden_size={content['mm_hidden_size']}, but the vision tower has "
            f"hidden_size={vision_config.hidden_size}: it is not the tower of this checkpoint."
        )
    select_layer = content.get("mm_vision_select_layer", -1)
    tokens_per_side = vision_config.image_size // vision_config.patch_size
    with explained("config.json describes no model that this package can hold"):
        text_config = LlamaConfig(
            **{
                key: value
                for key, value in content.items()
                if key not in ("model_type", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype")
                and not key.startswith(("mm_", "deepstack_", "image_", "tune_", "freeze_", "vision_tower_", "use_mm_"))
            }
        )
        config = MFRSVLMConfig(
            vision_config=vision_config,
            text_config=text_config,
            vision_feature_layer=select_layer[0] if isinstance(select_layer, list) else select_layer,
            canvas_scale=content["deepstack_downsample_factor"],
            window_sizes=resolve_window_sizes(content["deepstack_window_scales"], tokens_per_side, vision_config.patch_size),
            window_encoding="resize",
            window_weighting="hann",
            detail_feature_layers=resolve_depths(content["deepstack_detail_layers"], vision_config.num_hidden_layers),
            injection_layers=resolve_injection_layers(content["deepstack_injection_layers"], text_config.num_hidden_layers),
            routing="stack",
            routing_scope="sample",
            tie_word_embeddings=text_config.tie_word_embeddings,
            bos_token_id=text_config.bos_token_id,
            eos_token_id=text_config.eos_token_id,
            pad_token_id=text_config.pad_token_id,
            dtype=dtype,
        )
    return with_one_dtype(config)


def with_one_dtype(config: MFRSVLMConfig) -> MFRSVLMConfig:
    """The parts may come from folders of another type; a part with a dtype of its own would be built in that."""
    config.text_config.dtype = config.vision_config.dtype = config.dtype
    return config


def make_image_processor(tower: Path, config: MFRSVLMConfig, **kwargs: Any) -> MFRSVLMImageProcessor:
    """Image processor with the mean, std, resampling and sizes of the tower's own `preprocessor_config.json`."""
    if not (tower / "preprocessor_config.json").is_file():
        raise ConversionError(
            f"{tower / 'preprocessor_config.json'} is missing: it says how images are normalised. Copy it from where the "
            "vision tower comes from."
        )
    content = read_json(tower / "preprocessor_config.json")
    fields = ("image_mean", "image_std", "resample", "rescale_factor", "do_rescale", "do_normalize", "do_resize")
    missing = [field for field in ("image_mean", "image_std") if field not in content]
    if missing:
        raise ConversionError(f"{tower / 'preprocessor_config.json'} lacks {missing}.")
    side = {"height": config.image_size, "width": config.image_size}
    sizes: dict[str, Any] = {"size": {"shortest_edge": config.image_size}, "crop_size": side}
    if config.has_vit:  # a backbone takes any size, so what it was trained at does not bind it
        sizes.update({field: content[field] for field in sizes if content.get(field) is not None})
    with explained(f"{tower / 'preprocessor_config.json'} describes no image processor"):
        crop_size = get_size_dict(sizes["crop_size"], param_name="crop_size")
        if crop_size != side:
            raise ConversionError(
                f"{tower / 'preprocessor_config.json'} crops images to {crop_size}, but the encoder's image_size is "
                f"{config.image_size}: one of the two files is not of this tower."
            )
        return MFRSVLMImageProcessor(
            **{field: content[field] for field in fields if field in content},
            **sizes,
            patch_size=config.patch_size,
            canvas_scale=config.canvas_scale,
            window_sizes=config.window_sizes if config.has_details else [],
            window_overlap=config.window_overlap,
            **kwargs,
        )


def read_tokenizer(source: Path) -> LlamaTokenizer:
    """The tokenizer of a released checkpoint, which splits the words after a special token as its `legacy` flag says."""
    path = source / "tokenizer_config.json"
    legacy = read_json(path).get("legacy") if path.is_file() else None
    # Where the flag is missing, the transformers of the time took it for set.
    legacy = legacy is None or bool(legacy)
    tokenizer = LlamaTokenizer.from_pretrained(source, legacy=legacy)
    tokenizer.init_kwargs["legacy"] = legacy  # it would not be saved otherwise, and a reloaded tokenizer split differently
    return tokenizer


def add_image_token(tokenizer: Any, config: MFRSVLMConfig) -> None:
    """Gives the tokenizer `<image>` and a padding token, and the config its id."""
    vocab = tokenizer.get_vocab()
    if set(vocab) <= set(tokenizer.all_special_tokens):
        raise ConversionError(f"{tokenizer.name_or_path} holds no tokenizer: its vocabulary is empty.")
    beyond = {
        token: index for token, index in vocab.items() if index >= config.text_config.vocab_size and token != IMAGE_TOKEN
    }
    if beyond:
        raise ConversionError(
            f"The tokenizer has {len(beyond)} tokens beyond vocab_size={config.text_config.vocab_size}, among them "
            f"{list(beyond.items())[:5]}: the embedding has no rows for them. Resize it first, or remove them."
        )
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"  # what generation needs; training pads as its collator says
    config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


def save_folder(
    folder: Path, config: MFRSVLMConfig, processor: MFRSVLMProcessor, generation_config: GenerationConfig, origin: str
) -> None:
    """Writes all of a Hub folder but the weights."""
    config.architectures = ["MFRSVLMForConditionalGeneration"]
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    generation_config.save_pretrained(folder)
    for name in CODE_FILES:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    write_model_card(folder, config, origin=origin)


def is_model_folder(folder: Path) -> bool:
    return (folder / "config.json").is_file() and "model_type" in read_json(folder / "config.json")


@contextlib.contextmanager
def whole_output(output: Path, overwrite: bool, sources: list[Path]) -> Iterator[Path]:
    """A folder that becomes `output` when the block ends well, and vanishes when it does not.

    Until then it is a hidden folder beside `output`, which only a killed run leaves behind.
    """
    output = output.resolve()
    for source in (source.resolve() for source in sources if source.exists()):
        if source.is_relative_to(output) or output.is_relative_to(source):
            raise ConversionError(f"--output {output} and the source {source} lie in one another: choose another --output.")
    if output.exists():
        if not overwrite:
            raise ConversionError(f"{output} exists. Choose another --output, or pass --overwrite to replace it.")
        if not output.is_dir() or (any(output.iterdir()) and not is_model_folder(output)):
            raise ConversionError(
                f"{output} is not a model folder (no config.json with a model_type), so it is not overwritten."
            )
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    try:
        yield partial
        # mkdtemp and safetensors make what only their owner can read, but model folders are shared.
        os.umask(umask := os.umask(0))
        for path in (partial, *partial.rglob("*")):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        if overwrite and output.exists():
            replaced = partial.with_name(partial.name.replace(".partial-", ".replaced-"))
            os.replace(output, replaced)
            try:
                os.replace(partial, output)
            except BaseException:
                os.replace(replaced, output)
                raise
            shutil.rmtree(replaced)
        else:
            os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def convert_released(
    source: Path,
    vision_tower: str | None,
    output: Path,
    dtype: str | None = None,
    overwrite: bool = False,
    verify: bool = False,
) -> None:
    """Converts a checkpoint in the authors' layout to a Hub folder of this package.

    Args:
        source: folder with `config.json`, the shards and the tokenizer.
        vision_tower: folder or Hub id of the vision tower, whose weights released shards do not hold.
        output: folder to make.
        dtype: of the written weights, for example `"bfloat16"`; the checkpoint's own if `None`.
        overwrite: whether an existing model folder at `output` may be replaced.
        verify: reload the result in a clean process and compare every tensor and one forward with the source.

    Raises:
        ConversionError: the checkpoint is incomplete, damaged or of an unsupported variant, or `output` exists.
    """
    content = read_json(source / "config.json")
    refuse_variants(source, content)
    if not (source / "tokenizer.model").is_file():  # LlamaTokenizer would make an empty one without a word
        raise ConversionError(f"{source / 'tokenizer.model'} is missing: copy it from the base language model.")
    tower = resolve_tower(vision_tower)
    config = released_config(content, read_tower_config(tower), dtype)
    shards = released_shards(source, tower)
    with whole_output(output, overwrite, [source, tower]) as folder:
        with explained(f"The tokenizer of {source} cannot be read"):
            tokenizer = read_tokenizer(source)
        add_image_token(tokenizer, config)
        image_processor = make_image_processor(
            tower,
            config,
            canvas_source="global_view",
            window_packing="channels_first",
            do_pad=content.get("image_aspect_ratio") == "pad",
        )
        processor = MFRSVLMProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE, image_placement="prefix")
        settings = GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id)
        if (source / "generation_config.json").is_file():
            with explained(f"{source / 'generation_config.json'} cannot be read"):
                settings = GenerationConfig.from_pretrained(source)
        write_weights(renamed_tensors(shards), config, folder)
        save_folder(folder, config, processor, greedy_or_sampled(settings, tokenizer), origin="converted")
        if verify:
            verify_folder(folder, config, renamed_tensors(shards))


def assemble(
    language_model: str,
    vision_tower: str,
    output: Path,
    projector: Path | None = None,
    overrides: dict[str, Any] | None = None,
    image_placement: str = "inline",
    dtype: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Makes a new model from trained parts; injectors, and the projector if none is given, start untrained.

    Args:
        language_model: folder or Hub id of a causal language model of a supported decoder type.
        vision_tower: folder or Hub id of a CLIP vision model or of a backbone such as ResNet.
        output: folder to make.
        projector: a LLaVA `mm_projector.bin` (the paper starts from Vicuna, CLIP and LLaVA's projector).
        overrides: fields of `MFRSVLMConfig`, for example `{"injection_type": "cross_attention"}`.
        image_placement: `"inline"` or `"prefix"`, see `MFRSVLMProcessor`.
        dtype: of the weights; the language model's own if `None`.
        seed: of the untrained weights.
        overwrite: whether an existing model folder at `output` may be replaced.

    Raises:
        ConversionError: a part is of an unsupported type, or the projector does not fit.
    """
    with explained(f"The config of language model {language_model} cannot be read"):
        text_config = AutoConfig.from_pretrained(language_model)
    if text_config.model_type not in DECODERS:
        raise ConversionError(
            f"{language_model} is a {text_config.model_type!r}; supported language models are {sorted(DECODERS)}."
        )
    with explained(f"The config of vision tower {vision_tower} cannot be read"):
        tower_config = AutoConfig.from_pretrained(vision_tower)
    refuse_eva(vision_tower, tower_config.to_dict())
    tower_config = getattr(tower_config, "vision_config", tower_config)
    if tower_config.model_type != "clip_vision_model" and not hasattr(tower_config, "stage_names"):
        raise ConversionError(
            f"{vision_tower} is a {tower_config.model_type!r}; supported vision towers are CLIP ViTs, and backbones that "
            "yield feature maps, such as ResNet."
        )
    config = assembled_config(tower_config, text_config, dict(overrides or {}), dtype)
    tower_folder = Path(vision_tower)
    if not tower_folder.is_dir():
        with explained(f"Vision tower {vision_tower} cannot be downloaded"):
            tower_folder = Path(snapshot_download(vision_tower, allow_patterns=["*.json"]))
    with whole_output(output, overwrite, [Path(language_model), Path(vision_tower)]) as folder:
        with explained(f"The tokenizer of {language_model} cannot be read"):
            tokenizer = AutoTokenizer.from_pretrained(language_model)
        add_image_token(tokenizer, config)
        processor = MFRSVLMProcessor(
            make_image_processor(tower_folder, config),
            tokenizer,
            chat_template=CHAT_TEMPLATE,
            image_placement=image_placement,
        )
        set_seed(seed)
        with explained("These parts make no model"):
            model = MFRSVLMForConditionalGeneration._from_config(config, dtype=config.dtype)
        decoder = load_whole(AutoModelForCausalLM, language_model, dtype=config.dtype)
        load_part(model.model.language_model, decoder.model.state_dict(), missing=r"^injectors\.")
        load_part(model.lm_head, decoder.lm_head.state_dict())
        # Not through AutoBackbone, which cannot load from a folder. A full CLIP or a classifier holds more than its tower,
        # and that is all that is wanted of it.
        tower_class = type(model.model.vision_tower)
        tower = load_whole(tower_class, vision_tower, dtype=config.dtype, config=config.vision_config)
        load_part(model.model.vision_tower, tower.state_dict())
        if projector is not None:
            state = {}
            for key, tensor in read_shard(projector):
                key = key if key.startswith("model.") else f"model.{key}"
                for name, value in rename(key, tensor):
                    state[name.removeprefix("model.multi_modal_projector.")] = value
            load_part(model.model.multi_modal_projector, state)
        model.save_pretrained(folder, max_shard_size=MAX_OUTPUT_SHARD)
        save_folder(folder, config, processor, greedy_or_sampled(decoder.generation_config, tokenizer), origin="assembled")


def assembled_config(vision_config: Any, text_config: Any, options: dict[str, Any], dtype: str | None) -> MFRSVLMConfig:
    """The config of a new model: what `options` leave open follows the sizes of its parts.

    Windows are as large as the global view and half of it; depths are a third, two thirds and all of a ViT's layers,
    or the last three stages of a backbone; injection is before layers 4, 8, 12 and 16, as far as the decoder has them,
    and before the last one of a decoder with fewer than four.
    """
    fields = set(MFRSVLMConfig.__annotations__) - {"vision_config", "text_config", "image_token_id", "tie_word_embeddings"}
    unknown = sorted(set(options) - fields)
    if unknown:
        raise ConversionError(f"Fields {unknown} cannot be set; those that can are {sorted(fields)}.")
    with explained("These parts and options make no model"):
        bare: dict[str, Any] = {name: options[name] for name in ("image_size", "patch_size") if name in options}
        bare.update(window_sizes=[], injection_layers=[], detail_feature_layers=[])
        probe = MFRSVLMConfig(vision_config=vision_config, text_config=text_config, **bare)
        depth, num_layers = probe.num_vision_layers, text_config.num_hidden_layers
        last_stages = list(range(max(1, depth - 2), depth + 1))
        layers = [layer for layer in (3, 7, 11, 15) if layer < num_layers] or [num_layers - 1]
        options.setdefault("window_sizes", resolve_window_sizes([1.0, 0.5], probe.tokens_per_side, probe.patch_size))
        options.setdefault("injection_layers", layers if options["window_sizes"] else [])
        options.setdefault(
            "detail_feature_layers", resolve_depths([1 / 3, 2 / 3, 1.0], depth) if probe.has_vit else last_stages
        )
        config = MFRSVLMConfig(
            vision_config=vision_config,
            text_config=text_config,
            dtype=dtype or text_config.dtype or "float32",
            **{name: getattr(text_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
            **options,
        )
    return with_one_dtype(config)


def greedy_or_sampled(settings: GenerationConfig, tokenizer: Any) -> GenerationConfig:
    """The language model's own settings, fit to be saved.

    Vicuna and others set a temperature without `do_sample`: it has no effect, and `transformers` refuses to save it.
    """
    if not settings.do_sample:
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            setattr(settings, name, None)
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id
    return settings


def load_whole(model_class: Any, name: str, **kwargs: Any) -> Any:
    """Loads a trained part. `transformers` fills what a checkpoint lacks with random numbers: here that is an error."""
    with explained(f"{name} cannot be loaded"):
        part, info = model_class.from_pretrained(name, output_loading_info=True, **kwargs)
    lacking = sorted(info["missing_keys"])
    if lacking:
        raise ConversionError(f"{name} lacks {len(lacking)} tensors of {type(part).__name__}, among them {lacking[:5]}.")
    return part


def load_part(module: torch.nn.Module, state: dict[str, torch.Tensor], missing: str | None = None) -> None:
    """Loads a part strictly: nothing unexpected, nothing mis-shaped, and missing only what `missing` matches."""
    name = type(module).__name__
    own = module.state_dict()
    wrong = [key for key in state if key not in own or own[key].shape != state[key].shape]
    if wrong:
        shapes = {key: (tuple(state[key].shape), tuple(own[key].shape) if key in own else None) for key in wrong[:3]}
        raise ConversionError(f"{len(wrong)} tensors do not fit {name}; key: (given shape, expected shape) {shapes}.")
    lacking = [key for key in own if key not in state and not (missing and re.match(missing, key))]
    if lacking:
        raise ConversionError(f"{name} lacks {len(lacking)} tensors, among them {lacking[:5]}.")
    module.load_state_dict(state, strict=False)


# Runs in a process of its own, on nothing but the folder: what a stranger would get.
_VERIFY = """
import hashlib
import sys
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, target = sys.argv[1:]
model, info = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
if not type(model).__module__.startswith("transformers_modules."):
    sys.exit(f"{type(model)} does not come from the folder")
if any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
    sys.exit(str(info))
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
image = np.random.default_rng(0).integers(0, 256, (97, 64, 3), dtype=np.uint8)
inputs = processor(images=image, text="USER: <image>\\nWhat is this? ASSISTANT:", return_tensors="pt").to(model.dtype)
with torch.no_grad():
    logits = model(**inputs).logits
digests = {
    name: hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()
    for name, tensor in model.state_dict().items()
}
save_file({**inputs, "logits": logits}, target, metadata=digests)
"""


def verify_folder(folder: Path, config: MFRSVLMConfig, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Reloads a folder in a clean process and compares every tensor and one forward with `config` and `tensors`.

    Raises:
        ConversionError: the folder does not load, or something differs.
    """
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "seen.safetensors"
        # Only what a clean machine would have: no module cache, and not this package from its own folder.
        environment = {**os.environ, "HF_MODULES_CACHE": str(Path(scratch) / "modules"), "PYTHONSAFEPATH": "1"}
        result = subprocess.run(
            [sys.executable, "-c", _VERIFY, str(folder), str(target)], env=environment, capture_output=True, text=True
        )
        if result.returncode:
            raise ConversionError(f"The written folder does not load in a clean process:\n{result.stderr[-2000:]}")
        with safe_open(target, framework="pt") as file:
            digests = file.metadata()
            inputs = {name: file.get_tensor(name) for name in file.keys()}
    expected = inputs.pop("logits")

    model = MFRSVLMForConditionalGeneration._from_config(config, dtype=config.dtype).eval()
    own = model.state_dict()
    differing = set(own) - set(model.all_tied_weights_keys)
    compared = 0
    for name, tensor in tensors:
        tensor = tensor.to(config.dtype).contiguous()
        if hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().data).hexdigest() == digests.get(name):
            differing.discard(name)
        own[name].copy_(tensor)
        compared += 1
    if differing:
        raise ConversionError(f"{len(differing)} tensors changed on the way, among them {sorted(differing)[:5]}.")
    with torch.no_grad():
        logits = model(**inputs).logits
    error = (logits - expected).abs().max().item()
    # Half the digits: two processes need not add in the same order.
    tolerance = torch.finfo(config.dtype).eps ** 0.5 * max(1.0, expected.abs().max().item())
    if not error <= tolerance:
        raise ConversionError(
            f"The reloaded model's logits differ by {error:.3g} from those of the source weights, more than {tolerance:.3g}."
        )
    print(f"verified: {compared} tensors equal, logits of one forward differ by {error:.1e}")


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object.")
    return value


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mfrsvlm.convert_checkpoint", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def add_common(command: argparse.ArgumentParser) -> None:
        command.add_argument("--output", required=True, type=Path, help="folder to make")
        command.add_argument("--dtype", choices=DTYPES, help="of the written weights")
        command.add_argument("--overwrite", action="store_true", help="replace an existing model folder")

    released = commands.add_parser("released", help="convert a checkpoint in the authors' layout")
    released.add_argument("source", type=Path, help="folder with config.json, shards and tokenizer")
    released.add_argument("--vision-tower", help=f"folder or Hub id of its vision tower (public CLIP: {PUBLIC_TOWER})")
    released.add_argument("--verify", action="store_true", help="reload in a clean process and compare everything")
    add_common(released)

    parts = commands.add_parser("assemble", help="make a new, untrained model from parts")
    parts.add_argument("--language-model", required=True, help="folder or Hub id of a causal language model")
    parts.add_argument("--vision-tower", required=True, help="folder or Hub id of a CLIP vision model or a backbone")
    parts.add_argument("--projector", type=Path, help="LLaVA mm_projector.bin")
    parts.add_argument("--config", type=json_object, default={}, metavar="JSON", help="fields of MFRSVLMConfig to set")
    parts.add_argument("--image-placement", choices=["inline", "prefix"], default="inline")
    parts.add_argument("--seed", type=int, default=0, help="of the untrained weights")
    add_common(parts)

    args = parser.parse_args(argv)
    try:
        if args.command == "released":
            convert_released(
                args.source, args.vision_tower, args.output, args.dtype, overwrite=args.overwrite, verify=args.verify
            )
        else:
            assemble(
                args.language_model,
                args.vision_tower,
                args.output,
                projector=args.projector,
                overrides=args.config,
                image_placement=args.image_placement,
                dtype=args.dtype,
                seed=args.seed,
                overwrite=args.overwrite,
            )
    except (ConversionError, OSError, SafetensorError) as error:  # the last two: a full disk, a folder that is not ours
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    # By default a termination would end the process without cleaning up.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
