"""Recognizes model folders and loads their model and processor. Used by fine-tuning, evaluation, demo and converter."""

import contextlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from ..modeling_mfrsvlm import MFRSVLMForConditionalGeneration
from ..processing_mfrsvlm import MFRSVLMProcessor
from .reading import read_json


logger = logging.getLogger(__name__)

MODEL_TYPES = ("mfrsvlm", "vhm")  # released folders have either
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
NAMED = 5  # tensors listed in a message
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
        return ModelFolder(source, "adapter", adapter, adapter.get("base_model_name_or_path"), is_checkpoint)
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

    Args:
        source: a full MF-RSVLM, an adapter, or another image-text-to-text model.
        revision: branch, tag or commit of a Hub id.
        dtype: type of the weights in memory; `"auto"` for the saved type.
        attn_implementation: see `from_pretrained` of transformers.
        trust_remote_code: run the code in the folder.
        base_model: folder or Hub id that replaces the base model in the adapter's config.
        allow_incomplete: warn, instead of raising, if tensors are missing, unknown or of another shape. Missing tensors
            are then random.

    Returns:
        (model, processor).

    Raises:
        ModelFolderError: see `classify`; or the folder is in the released layout, the base of an adapter is missing, or
            its weights are incomplete.
    """
    folder = classify(source, revision)
    processor = load_processor(source, revision, trust_remote_code, base_model)
    options = {"dtype": dtype, "attn_implementation": attn_implementation}
    if folder.kind == "adapter":
        base = _base_of(folder, base_model)
        with _explain_base(folder):
            model, _ = load_model(base, trust_remote_code=trust_remote_code, allow_incomplete=allow_incomplete, **options)
        model = _merge_adapter(model, folder, base, revision)
    else:
        model = _load_full(folder, revision, trust_remote_code, allow_incomplete, options)
    return model.eval(), processor


def load_processor(
    source: str | Path, revision: str | None = None, trust_remote_code: bool = False, base_model: str | None = None
) -> Any:
    """Loads the processor alone. Arguments and errors are those of `load_model`."""
    folder = classify(source, revision)
    if folder.kind == "released":
        raise ModelFolderError(
            f"{source} is in the released layout. Convert it first: mfrsvlm convert released {source} "
            "--vision-tower DIR_OR_HUB_ID --output OUT"
        )
    has_own = any(_read_config(folder.source, name, revision) is not None for name in PROCESSOR_FILES)
    if folder.kind == "adapter" and not has_own:  # PEFT saves no processor
        with _explain_base(folder):
            return load_processor(_base_of(folder, base_model), trust_remote_code=trust_remote_code)
    place = folder.source
    if folder.is_checkpoint and not has_own:
        place = str(Path(place).parent)  # some trainers save the processor only in the parent folder
    if folder.kind == "other" or trust_remote_code:
        return AutoProcessor.from_pretrained(place, revision=revision, trust_remote_code=trust_remote_code)
    return MFRSVLMProcessor.from_pretrained(place, revision=revision)


def _read_config(source: str, name: str, revision: str | None) -> dict[str, Any] | None:
    """A JSON file of a folder or Hub id, `None` if there is none."""
    folder = Path(source)
    if folder.is_dir():
        path = folder / name if (folder / name).is_file() else None
    elif not HUB_ID.fullmatch(source):
        path = None
    else:
        try:
            path = cached_file(
                source,
                name,
                revision=revision,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        except OSError as error:
            raise ModelFolderError(f"{source} cannot be read: {' '.join(str(error).split())}") from error
    if path is None:
        return None
    try:
        content = read_json(path)
    except ValueError as error:
        raise ModelFolderError(str(error)) from error
    if not isinstance(content, dict):
        raise ModelFolderError(f"{path} holds a {type(content).__name__}, not fields and values.")
    return content


def _load_full(
    folder: ModelFolder, revision: str | None, trust_remote_code: bool, allow_incomplete: bool, options: dict[str, Any]
) -> Any:
    model_class: Any = MFRSVLMForConditionalGeneration
    if folder.kind == "other" or trust_remote_code:
        model_class = AutoModelForImageTextToText
        options = {**options, "trust_remote_code": trust_remote_code}
    with _quiet():  # the library also prints the errors below, as a table
        model, info = model_class.from_pretrained(
            folder.source, revision=revision, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    _check_complete(folder, info, allow_incomplete)
    return model


def _check_complete(folder: ModelFolder, info: dict[str, Any], allow_incomplete: bool) -> None:
    """Raises, or warns, where a checkpoint and its model differ. Other models may leave tensors unread."""
    shapes = [f"{key} {tuple(stored)} instead of {tuple(wanted)}" for key, stored, wanted in info["mismatched_keys"]]
    problems = {
        "missing": sorted(info["missing_keys"]),
        "unknown to the model": sorted(info["unexpected_keys"]) if folder.kind == "full" else [],
        "of another shape": sorted(shapes),
    }
    found = [
        f"{len(keys)} tensors are {problem}: {', '.join(keys[:NAMED])}{', ...' if len(keys) > NAMED else ''}"
        for problem, keys in problems.items()
        if keys
    ]
    if not found:
        return
    message = f"The weights of {folder.source} do not fit its config.json. {'; '.join(found)}."
    if not allow_incomplete:
        raise ModelFolderError(f"{message} Copy or save it again.")
    logger.warning(message)


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


def _merge_adapter(model: Any, folder: ModelFolder, base: str, revision: str | None) -> Any:
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ModelFolderError(f"{folder.source} is an adapter and needs PEFT: pip install 'mfrsvlm[training]'") from error
    misfit = f"The adapter {folder.source} does not fit its base model {base}"
    hub: dict[str, Any] = {"revision": revision} if revision else {}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        # Not `PeftModel.from_pretrained`, which only warns of missing tensors and ignores unknown ones.
        adapted = PeftModel(model, PeftConfig.from_pretrained(folder.source, **hub))
        result = adapted.load_adapter(folder.source, "default", **hub)
    except (RuntimeError, ValueError) as error:
        raise ModelFolderError(f"{misfit}: {' '.join(str(error).split())[:500]}") from error
    for problem, keys in {"missing": result.missing_keys, "without a place in it": result.unexpected_keys}.items():
        if keys:
            raise ModelFolderError(f"{misfit}: {len(keys)} tensors are {problem}, among them {sorted(keys)[:NAMED]}.")
    merged = adapted.merge_and_unload()
    for name, parameter in merged.named_parameters():  # PEFT has frozen all of them
        parameter.requires_grad = name in trainable
    return merged


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
