"""Recognizes model folders and loads their model and processor. Used by fine-tuning, evaluation, demo and converter."""

import contextlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from ..checksums_mfrsvlm import (
    ADAPTER_FILES,
    CHECKSUMS,
    INDEX,
    MODEL_FILES,
    PROCESSOR_FILES,
    WEIGHTS,
    difference,
    read_checksums,
)
from ..modeling_mfrsvlm import MFRSVLMForConditionalGeneration
from ..processing_mfrsvlm import MFRSVLMProcessor
from ..released_layout import is_finite
from .reading import read_json, shorten


logger = logging.getLogger(__name__)

MODEL_TYPES = ("mfrsvlm", "vhm")  # released folders have either
PROCESSOR_CONFIGS = ("processor_config.json", "preprocessor_config.json")
HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
NAMED = 5  # tensors listed in a message
REASON = 400  # characters of another library's message
COUNTER = ".num_batches_tracked"  # of batch normalization, the one tensor of integers
STORED_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
}  # of safetensors, all rounded types
BASE_ADVICE = "Name it with base_model, or correct base_model_name_or_path in the adapter_config.json."


class ModelFolderError(ValueError):
    """A folder or Hub id from which no model can be loaded. The message says what it contains, and what to do."""


@dataclass(frozen=True)
class ModelFolder:
    """The content of a folder or Hub id.

    Attributes:
        source: the folder or Hub id.
        kind: `"full"`, a complete MF-RSVLM (saved, merged, or a training checkpoint); `"adapter"`, weights of PEFT without
            their base model (also a training checkpoint); `"released"`, the authors' layout; `"other"`, another model.
        config: its `config.json`, or its `adapter_config.json`.
        base: base model of an adapter, a folder or Hub id.
        is_checkpoint: whether it is a training checkpoint.
    """

    source: str
    kind: str
    config: dict[str, Any] = field(repr=False)
    base: str | None = None
    is_checkpoint: bool = False


def classify(source: str | Path, revision: str | None = None) -> ModelFolder:
    """Determines what a folder or Hub id contains. Only JSON files are read.

    Raises:
        ModelFolderError: it is not a model, or its weights are missing.
    """
    source = str(source)
    if Path(source).is_file():  # and no Hub id, which would be looked for
        raise ModelFolderError(f"{source} is a file. Name the folder of the model.")
    adapter = _read_config(source, "adapter_config.json", revision)
    config = _read_config(source, "config.json", revision)
    folder = Path(source)
    is_checkpoint = (folder / "trainer_state.json").is_file()
    if adapter is not None:  # before config.json, which some trainers write to the same folder
        if folder.is_dir() and not any(folder.glob("adapter_model*")):
            raise ModelFolderError(f"{source} has an adapter_config.json, but no adapter_model.safetensors. Copy it again.")
        base = adapter.get("base_model_name_or_path")
        if not isinstance(base, str | None):
            raise ModelFolderError(
                f"The adapter_config.json of {source} has base_model_name_or_path={shorten(base)}, no name."
            )
        return ModelFolder(source, "adapter", adapter, base, is_checkpoint)
    if config is None:
        if not folder.is_dir():
            raise ModelFolderError(f"{source} is no folder, and no model of that name was found on the Hub or in its cache.")
        inside = sorted(path.name for path in folder.glob("checkpoint-*"))
        advice = f"Name one of its checkpoints: {', '.join(inside)}." if inside else "Name a folder with a config.json."
        raise ModelFolderError(f"{source} is no model folder: it has no config.json and no adapter_config.json. {advice}")
    if folder.is_dir() and not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        raise ModelFolderError(f"{source} has a config.json, but no weights (*.safetensors or *.bin). Copy it again.")
    return ModelFolder(source, kind_of(config), config, is_checkpoint=is_checkpoint)


def kind_of(config: dict[str, Any]) -> str:
    """`"full"`, `"released"` or `"other"`, from the content of a `config.json`."""
    if config.get("model_type") not in MODEL_TYPES:
        return "other"
    return "full" if "text_config" in config else "released"  # the authors have one flat config


def load_model(
    source: str | Path,
    revision: str | None = None,
    dtype: Any = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    base_model: str | None = None,
    allow_incomplete: bool = False,
) -> tuple[Any, Any]:
    """Loads the model, in eval mode on the CPU, and the processor of a folder or Hub id.

    An MF-RSVLM uses the code of this package unless `trust_remote_code` is set. An adapter is merged into its base model.
    The files are compared with `checksums.json`, if there is one.

    Args:
        source: a full MF-RSVLM, an adapter, or another image-text-to-text model.
        revision: branch, tag or commit of a Hub id.
        dtype: type of the weights in memory; `"auto"` for the saved type.
        attn_implementation: see `from_pretrained` of transformers.
        trust_remote_code: run the code in the folder.
        base_model: folder or Hub id that replaces the base model in the adapter's config.
        allow_incomplete: warn, instead of raising, if files differ from their checksums, tensors are missing, unknown, of
            another shape or not finite, or the type in config.json is not that of the file. Missing tensors are then
            random. `problems_of` tells what was found. An adapter must fit its base model all the same.

    Returns:
        (model, processor).

    Raises:
        ModelFolderError: see `classify`; or the folder is in the released layout, is damaged or incomplete, or the base
            model of an adapter is missing.
    """
    folder = classify(source, revision)
    processor, problems = _load_processor(folder, revision, trust_remote_code, base_model, allow_incomplete)
    changed = _changed_files(folder.source, revision, (*MODEL_FILES, *ADAPTER_FILES))
    changed += _unreadable(folder.source, revision, ("generation_config.json",))
    _report(changed, allow_incomplete)
    problems += changed
    options = {"dtype": dtype, "attn_implementation": attn_implementation}
    if folder.kind == "adapter":
        base = _base_of(folder, base_model)
        with _explain_base(folder):
            model, _ = load_model(base, trust_remote_code=trust_remote_code, allow_incomplete=allow_incomplete, **options)
        problems += problems_of(model)
        model = _merge_adapter(model, folder, base, revision, allow_incomplete)
    else:
        model = _load_full(folder, revision, trust_remote_code, allow_incomplete, options)
    if folder.kind != "other":
        misfits = _misfits_of(folder.source, model, processor)
        _report(misfits, allow_incomplete)
        problems += misfits
    model._problems = list(dict.fromkeys([*problems, *problems_of(model)]))
    return model.eval(), processor


def slow_on_cpu(dtype: torch.dtype) -> bool:
    """Whether the CPU emulates products of this type: always float16, and bfloat16 without AVX-512 or SVE."""
    if dtype == torch.bfloat16:
        return not torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "AMX", "SVE"))
    return dtype == torch.float16


def _misfits_of(source: str, model: Any, processor: Any) -> list[str]:
    """Where what the processor makes does not fit the model."""
    found = []
    config, images = model.config, processor.image_processor
    if processor.image_token_id != config.image_token_id:
        found.append(
            f"The tokenizer of {source} has {processor.image_token_id} as id of {processor.image_token}, but the model "
            f"{config.image_token_id}."
        )
    rows, largest = model.get_input_embeddings().num_embeddings, max(processor.tokenizer.get_vocab().values(), default=0)
    if largest >= rows:
        found.append(f"The tokenizer of {source} has ids up to {largest}, but the model only {rows} embeddings.")
    if images.num_image_tokens != config.image_seq_length:
        found.append(
            f"The processor of {source} makes {images.num_image_tokens} visual tokens an image, but the model "
            f"{config.image_seq_length}."
        )
    return found


def problems_of(model: Any) -> list[str]:
    """What `load_model` found with `allow_incomplete`, in sentences. Empty for a sound folder."""
    found: list[str] = getattr(model, "_problems", [])
    return found


def load_processor(
    source: str | Path,
    revision: str | None = None,
    trust_remote_code: bool = False,
    base_model: str | None = None,
    allow_incomplete: bool = False,
) -> Any:
    """Loads the processor alone. Arguments and errors are those of `load_model`."""
    folder = classify(source, revision)
    return _load_processor(folder, revision, trust_remote_code, base_model, allow_incomplete)[0]


def _load_processor(
    folder: ModelFolder, revision: str | None, trust_remote_code: bool, base_model: str | None, allow_incomplete: bool
) -> tuple[Any, list[str]]:
    """The processor, and what was found with `allow_incomplete`."""
    source = folder.source
    if folder.kind == "released":
        raise ModelFolderError(
            f"{source} is in the released layout. Convert it first: mfrsvlm convert released {source} "
            "--vision-tower DIR_OR_HUB_ID --output OUT"
        )
    has_own = any(_read_config(source, name, revision) is not None for name in PROCESSOR_CONFIGS)
    if folder.kind == "adapter" and not has_own:  # PEFT saves no processor
        with _explain_base(folder):
            base = _base_of(folder, base_model)
            return _load_processor(classify(base), None, trust_remote_code, None, allow_incomplete)
    place = source
    if folder.is_checkpoint and not has_own:
        place = str(Path(place).parent)  # some trainers save the processor only in the parent folder
    problems = _changed_files(place, revision, PROCESSOR_FILES)
    problems += _unreadable(place, revision, ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"))
    _report(problems, allow_incomplete)
    with _explain_damage("processor", place):
        if folder.kind == "other" or trust_remote_code:
            processor = AutoProcessor.from_pretrained(place, revision=revision, trust_remote_code=trust_remote_code)
        else:
            # Without the word, transformers asks on the terminal whether to run the code of a tokenizer.
            processor = MFRSVLMProcessor.from_pretrained(place, revision=revision, trust_remote_code=False)
    return processor, problems


def read_image_bands(source: str | Path, revision: str | None = None) -> list[str] | None:
    """Names of the bands of a model's images, from its processor's file; `None` if they are red, green and blue at most.

    Raises:
        ModelFolderError: the file is damaged.
    """
    for name in PROCESSOR_CONFIGS:
        settings = _read_config(str(source), name, revision) or {}
        settings = settings.get("image_processor", settings)
        names = settings.get("image_bands") if isinstance(settings, dict) else None
        if isinstance(names, list) and not {"red", "green", "blue"}.issuperset(map(str, names)):
            return [str(name) for name in names]
    return None


def _find(source: str, name: str, revision: str | None) -> str | None:
    """Path of a file of a folder or Hub id, `None` if there is none. A file of the Hub is downloaded."""
    if Path(source).is_dir():
        path = Path(source) / name
        return str(path) if path.is_file() else None
    if not HUB_ID.fullmatch(source):
        return None
    try:
        return cached_file(
            source,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError as error:
        raise ModelFolderError(f"{source} cannot be read: {' '.join(str(error).split())}") from error


def _read_config(source: str, name: str, revision: str | None) -> dict[str, Any] | None:
    """A JSON file of a folder or Hub id, `None` if there is none."""
    path = _find(source, name, revision)
    if path is None:
        return None
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ModelFolderError(str(error)) from error
    if not isinstance(content, dict):
        raise ModelFolderError(f"{path} holds a {type(content).__name__}, not fields and values.")
    return content


def _changed_files(source: str, revision: str | None, patterns: tuple[str, ...]) -> list[str]:
    """The listed files that match and differ from their checksums, in one sentence."""
    path = _find(source, CHECKSUMS, revision)
    if path is None:
        return []
    try:
        entries = read_checksums(path)
    except (OSError, ValueError) as error:
        return [str(error)]
    listed = sorted(name for name in entries if any(fnmatch(name, pattern) for pattern in patterns))
    found = {name: difference(_find(source, name, revision), entries[name]) for name in listed}
    changes = [f"{name} {change}" for name, change in found.items() if change]
    if not changes:
        return []
    return [
        f"Files differ from the {CHECKSUMS} of {source}: {'; '.join(changes)}. Copy or save them again. If a file was "
        f"changed on purpose, remove its entry from {CHECKSUMS}."
    ]


def _unreadable(source: str, revision: str | None, names: tuple[str, ...]) -> list[str]:
    """JSON files that are damaged. transformers would ignore some of them."""
    problems = []
    for name in names:
        try:
            _read_config(source, name, revision)
        except ModelFolderError as error:
            problems.append(f"{error} Copy it again.")
    return problems


def _report(problems: list[str], allow_incomplete: bool) -> None:
    """Raises, or warns, if there are problems."""
    if problems and not allow_incomplete:
        raise ModelFolderError(f"{' '.join(problems)} (With allow_incomplete, it is loaded all the same.)")
    for problem in problems:
        logger.warning(problem)


def _load_full(
    folder: ModelFolder, revision: str | None, trust_remote_code: bool, allow_incomplete: bool, options: dict[str, Any]
) -> Any:
    model_class: Any = MFRSVLMForConditionalGeneration
    if folder.kind == "other" or trust_remote_code:
        model_class = AutoModelForImageTextToText
        options = {**options, "trust_remote_code": trust_remote_code}
    problems = []
    with _explain_damage("model", folder.source):
        if folder.kind == "full":
            problems += _misfit_of_files(folder, revision)
            _report(problems, allow_incomplete)
        with _quiet():  # the library also prints the errors below, as a table
            model, info = model_class.from_pretrained(
                folder.source, revision=revision, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    found = [*_misfit_of_keys(folder, info), *_not_finite(folder, model)]
    _report(found, allow_incomplete)
    model._problems = problems + found
    return model


def _misfit_of_files(folder: ModelFolder, revision: str | None) -> list[str]:
    """Contradictions between config.json and the stored tensors that loading would hide. Only headers are read."""
    index = _read_config(folder.source, INDEX, revision)
    single = _find(folder.source, WEIGHTS, revision)
    if single is not None and index is not None:
        return [
            f"{folder.source} has {WEIGHTS} and {INDEX}, but only one of them is of its last save. Remove the other one: "
            f"{WEIGHTS}, or the index and its shards."
        ]
    shards = sorted(set(index["weight_map"].values())) if index is not None else [WEIGHTS]
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise ModelFolderError(f"The {INDEX} of {folder.source} names what is no file beside it: {_name(outside)}.")
    paths = [_find(folder.source, shard, revision) for shard in shards]
    missing = [shard for shard, path in zip(shards, paths, strict=True) if path is None]
    if index is not None and missing:
        raise ModelFolderError(f"{folder.source} lacks shards that its {INDEX} names: {_name(missing)}. Copy it again.")
    stated = str(folder.config.get("dtype") or folder.config.get("torch_dtype") or "").removeprefix("torch.")
    if not stated or "quantization_config" in folder.config:
        return []
    others = []
    for path in paths:
        if path is not None:  # a folder of `pytorch_model.bin`
            with safe_open(path, "pt") as file:
                types = {name: file.get_slice(name).get_dtype() for name in file.keys() if not name.endswith(COUNTER)}
            types = {name: STORED_TYPES.get(stored, stored) for name, stored in types.items()}
            others += [f"{name} {stored}" for name, stored in types.items() if stored != stated]
    if not others:
        return []
    return [
        f"The config.json of {folder.source} has dtype={stated}, but {len(others)} tensors are of another type: "
        f"{_name(sorted(others))}. Write the type of the file into config.json, or copy or save it again."
    ]


def _misfit_of_keys(folder: ModelFolder, info: dict[str, Any]) -> list[str]:
    """Where a checkpoint and its model differ. Other models may leave tensors unread."""
    shapes = [f"{key} {tuple(stored)} instead of {tuple(wanted)}" for key, stored, wanted in info["mismatched_keys"]]
    problems = {
        "missing": sorted(info["missing_keys"]),
        "unknown to the model": sorted(info["unexpected_keys"]) if folder.kind == "full" else [],
        "of another shape": sorted(shapes),
    }
    found = [f"{len(keys)} tensors are {problem}: {_name(keys)}" for problem, keys in problems.items() if keys]
    if not found:
        return []
    return [f"The weights of {folder.source} do not fit its config.json. {'; '.join(found)}. Copy or save it again."]


def _not_finite(folder: ModelFolder, model: Any) -> list[str]:
    found = sorted(name for name, tensor in model.state_dict().items() if not is_finite(tensor))
    if not found:
        return []
    return [f"{len(found)} tensors of {folder.source} hold NaN or infinity: {_name(found)}. Copy or train it again."]


def _name(items: list[str]) -> str:
    return f"{', '.join(items[:NAMED])}{', ...' if len(items) > NAMED else ''}"


@contextlib.contextmanager
def _explain_damage(part: str, source: str) -> Iterator[None]:
    """Errors that other libraries raise for damaged files, as a `ModelFolderError` of one line."""
    try:
        yield
    except (ModelFolderError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of tokenizers is no `Exception`
        reason = " ".join(str(error).split())[:REASON] or type(error).__name__
        raise ModelFolderError(
            f"The {part} of {source} cannot be loaded: {reason.rstrip('.')}. Is a file damaged?"
        ) from error


def _base_of(folder: ModelFolder, base_model: str | None) -> str:
    base = base_model or folder.base
    if not base:
        raise ModelFolderError(f"{folder.source} is an adapter that names no base model. {BASE_ADVICE}")
    return base


@contextlib.contextmanager
def _explain_base(folder: ModelFolder) -> Iterator[None]:
    try:
        yield
    except ModelFolderError as error:
        raise ModelFolderError(
            f"{folder.source} is an adapter, and its base model cannot be loaded: {error} {BASE_ADVICE}"
        ) from error


def _merge_adapter(model: Any, folder: ModelFolder, base: str, revision: str | None, allow_incomplete: bool) -> Any:
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ModelFolderError(f"{folder.source} is an adapter and needs PEFT: pip install 'mfrsvlm[training]'") from error
    misfit = f"The adapter {folder.source} does not fit its base model {base}"
    hub: dict[str, Any] = {"revision": revision} if revision else {}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with _explain_damage("adapter", folder.source):
        try:
            # Not `PeftModel.from_pretrained`, which only warns of missing tensors and ignores unknown ones.
            adapted = PeftModel(model, PeftConfig.from_pretrained(folder.source, **hub))
            result = adapted.load_adapter(folder.source, "default", **hub)
        except (RuntimeError, ValueError) as error:
            raise ModelFolderError(f"{misfit}: {' '.join(str(error).split())[:REASON]}") from error
        for problem, keys in {"missing": result.missing_keys, "without a place in it": result.unexpected_keys}.items():
            if keys:
                raise ModelFolderError(f"{misfit}: {len(keys)} tensors are {problem}, among them {sorted(keys)[:NAMED]}.")
        problems = _not_finite(folder, adapted)
        _report(problems, allow_incomplete)
        merged = adapted.merge_and_unload()
    for name, parameter in merged.named_parameters():  # PEFT has frozen all of them
        parameter.requires_grad = name in trainable
    merged._problems = problems
    return merged


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
