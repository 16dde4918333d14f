"""Fine-tunes MF-RSVLM: `python -m mfrsvlm.training.finetune CONFIG.yaml [--key value ...]`.

The keys are the fields of `ModelArguments`, `DataArguments` and `MFRSVLMTrainingArguments`. The last extends
`transformers.TrainingArguments` with settings to freeze parts of the model and to set their learning rates. Keys on the
command line override the file.
"""

import difflib
import json
import logging
import os
import re
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import HfArgumentParser, TrainerState, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils.logging import set_verbosity_info

from ..files.model_folder import ModelFolderError, classify, load_model, load_processor, problems_of
from ..files.reading import read_text
from ..files.writing import WriteError, check_folder
from ..modeling_mfrsvlm import MFRSVLMForConditionalGeneration
from ..output_folders import FolderInUse, locked, unwritten
from .collator import ConversationCollator
from .data import BadRow, ConversationDataset, ConversationStream
from .trainer import UNFINISHED, MFRSVLMTrainer, MFRSVLMTrainingArguments, SettingsError, freeze_parts


logger = logging.getLogger("mfrsvlm.training.finetune")  # the same name if this file is the main program

SHUFFLED_ROWS = 1000  # size of the shuffle buffer of a stream
# Data settings on the command line remove these settings from the file.
OTHER_DATA = {"dataset_name": ("train_file", "image_root"), "train_file": ("dataset_name", "dataset_streaming")}
# Linear layers of the decoder only, not of tower and injectors.
DECODER_LINEARS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
# Modules that are fully trained in addition to the adapter, since they are small or new, and the part of each. PEFT rejects
# a module list, so each of its modules is listed.
FULLY_TRAINED = {
    r"injectors\.\d+": "injectors",
    "multi_modal_projector": "projector",
    "visual_position_embedding": "projector",
    "window_scorer": "projector",
    r"stage_projections\.\d+": "projector",
    r"vision_tower\..*\.extra_bands": "vision_tower",
}


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub id to start from: a model, an adapter or a checkpoint."}
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Type of the weights in training; with lora, of the frozen weights. With bf16=true, float32 weights are "
            "the master copy.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    allow_incomplete: bool = field(
        default=False,
        metadata={"help": "Warn, instead of stopping, if weights are missing, damaged or not those that were saved."},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, flash_attention_2, eager."})
    lora: bool = field(default=False, metadata={"help": "Train an adapter (LoRA) instead of the weights."})
    lora_r: int = field(default=64, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=128, metadata={"help": "Alpha of the adapter; its scale is lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of linear layers, or one regular expression. Default: those of the decoder's layers."},
    )
    lora_modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules that are fully trained. Default: injectors, projector and new bands, unless frozen."},
    )
    lora_merge: bool = field(default=False, metadata={"help": "Save the merged model instead of the adapter."})


@dataclass
class DataArguments:
    train_file: str | None = field(default=None, metadata={"help": "JSON or JSONL file of conversations for training."})
    eval_file: str | None = field(default=None, metadata={"help": "JSON or JSONL file of conversations for evaluation."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Folder or Hub id for `datasets.load_dataset`, instead of train_file."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of the dataset for training."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split for evaluation, if eval_strategy is set and eval_file is not."}
    )
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Read the dataset during training, without a local copy. Needs max_steps."}
    )
    image_root: str | None = field(
        default=None, metadata={"help": "Folder of the images. Default: dataset_name if it is a folder, or the current one."}
    )
    allow_outside_images: bool = field(
        default=False, metadata={"help": "Also open images at URLs and outside of image_root."}
    )
    on_bad_row: str = field(
        default="fail", metadata={"help": "fail: stop; skip: log and count bad rows.", "choices": ["fail", "skip"]}
    )
    template: str = field(
        default="chat",
        metadata={"help": "chat: the chat template; plain: image and caption only.", "choices": ["chat", "plain"]},
    )
    prompt_version: str | None = field(
        default=None, metadata={"help": "Prompt version of the chat template; v1 is that of the published training."}
    )
    max_length: int = field(default=2048, metadata={"help": "Maximum length of a sample in tokens, with image tokens."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Permit an output_dir with files; those of the same name are replaced."}
    )
    base_model: str | None = field(
        default=None,
        metadata={"help": "Hub id for the model card. Default: model_name_or_path, or what that folder's card names."},
    )
    card_datasets: list[str] | None = field(default=None, metadata={"help": "Hub ids of the data, for the model card."})


class ConfigParser(HfArgumentParser):
    """Reads a YAML file and command-line overrides. Every error is a `SettingsError` that names the key."""

    def __init__(self) -> None:
        super().__init__([ModelArguments, DataArguments, MFRSVLMTrainingArguments], allow_abbrev=False, prog="finetune")

    def error(self, message: str) -> Any:
        raise SettingsError(message)

    def check_key(self, key: str, place: str) -> None:
        known = [action.dest for action in self._actions]
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise SettingsError(f"{place}: unknown key {key!r}." + (f" Did you mean {close[0]!r}?" if close else ""))

    def read(self, config: Path, overrides: list[str]) -> tuple[ModelArguments, DataArguments, MFRSVLMTrainingArguments]:
        import yaml

        try:
            text = read_text(config)
        except ValueError as error:
            raise SettingsError(str(error)) from error
        try:
            values = yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise SettingsError(f"{config} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise SettingsError(f"{config} contains a {type(values).__name__}, not keys and values.")
        named = {word[2:].partition("=")[0] for word in overrides if word.startswith("--")}
        for name, others in OTHER_DATA.items():
            if name in named:
                values = {key: value for key, value in values.items() if key not in others}
        # Converted to command-line arguments, so that one parser checks all types. (YAML reads 2e-5 as text.)
        words = []
        for key, value in values.items():
            self.check_key(str(key), str(config))
            if value is None or value == []:
                self.set_defaults(**{key: value})
            elif isinstance(value, list):
                words += [f"--{key}", *map(str, value)]
            else:
                words.append(f"--{key}={json.dumps(value) if isinstance(value, (dict, bool)) else value}")
        for word in overrides:
            if word.startswith("--"):
                self.check_key(word[2:].partition("=")[0].replace("-", "_").removeprefix("no_"), "command line")
        try:
            return self.parse_args_into_dataclasses([*words, *overrides])
        except (ValueError, ImportError) as error:  # contradictory settings, or settings that need another library
            hint = "" if find_spec("accelerate") else ". Install what training needs: pip install 'mfrsvlm[training]'"
            raise SettingsError(" ".join(str(error).split()) + hint) from error


def check_output_dir(args: MFRSVLMTrainingArguments, overwrite: bool) -> str | None:
    """Finds the checkpoint to resume from, and protects existing files.

    Returns:
        The path of the checkpoint in `resume_from_checkpoint`, which may be `last` for the last one in `output_dir`; `None`
        for a new training.

    Raises:
        SettingsError: the checkpoint does not exist, or the folder is not empty and neither resumed nor overwritten.
    """
    folder = Path(args.output_dir)
    content = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    wanted = args.resume_from_checkpoint
    if wanted is not None:
        checkpoint = (get_last_checkpoint(folder) if content else None) if wanted in ("last", "true", "True") else wanted
        if checkpoint is None or not (Path(checkpoint) / "trainer_state.json").is_file():
            raise SettingsError(f"resume_from_checkpoint={wanted}: no complete checkpoint in {checkpoint or folder}.")
        return str(checkpoint)
    runs = [name for name in content if name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") or name == UNFINISHED]
    if runs:
        raise SettingsError(
            f"output_dir={folder} contains checkpoints of another run ({', '.join(sorted(runs))}). Resume it with "
            "--resume_from_checkpoint last, remove them, or choose another folder."
        )
    if content and not overwrite:
        raise SettingsError(
            f"output_dir={folder} is not empty ({len(content)} entries, such as {min(content)}). Choose another folder, or "
            "set overwrite_output_dir."
        )
    return None


def add_lora(model: MFRSVLMForConditionalGeneration, options: ModelArguments, frozen_parts: list[str]) -> Any:
    """Adds an adapter, see `ModelArguments`. Trained parameters become float32, all others `options.dtype`."""
    from peft import LoraConfig, get_peft_model

    targets: Any = options.lora_target_modules or [DECODER_LINEARS]
    saved = options.lora_modules_to_save
    if saved is None:
        names = [name for name, _ in model.model.named_modules()]
        patterns = [pattern for pattern, part in FULLY_TRAINED.items() if part not in frozen_parts]
        saved = [name for name in names if any(re.fullmatch(pattern, name) for pattern in patterns)]
    config = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=targets[0] if len(targets) == 1 else targets,  # one string is a regular expression
        modules_to_save=saved or None,
    )
    model = get_peft_model(model, config)
    for tensor in model.state_dict(keep_vars=True).values():  # without non-persistent buffers, which stay float32
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if tensor.requires_grad else getattr(torch, options.dtype))
    return model


def check_start(options: ModelArguments) -> None:
    """Rejects settings with which training at a learning rate of 0 would not return the same model.

    Raises:
        SettingsError: the start is not an MF-RSVLM, or an adapter that the new adapter would not contain; or `dtype` would
            round saved weights.
        ModelFolderError: there is no model, see `classify`.
    """
    start = classify(options.model_name_or_path)
    stored = start.config.get("dtype") or start.config.get("torch_dtype") or "float32"
    if start.kind == "other":
        raise SettingsError(f"{start.source} is a {start.config.get('model_type')}, but only an MF-RSVLM can be trained.")
    if start.kind == "adapter":
        stored = "float32"  # type of the adapter's own weights
        if options.lora and not options.lora_merge:
            raise SettingsError(
                f"{start.source} is an adapter, and a new adapter would be saved without it. Set lora_merge=true to save "
                "the full model, or resume_from_checkpoint to continue the training of the first adapter."
            )
    keeps_base = options.lora and not options.lora_merge
    if options.dtype not in ("float32", stored) and not keeps_base and start.kind != "released":
        raise SettingsError(
            f"dtype={options.dtype} would round the {stored} weights of {start.source} in the saved model. Set "
            "dtype=float32, and bf16=true to compute in bfloat16."
        )


def prepare_model(options: ModelArguments, args: MFRSVLMTrainingArguments) -> Any:
    """Loads the model, adds the adapter, freezes parts. Errors are those of `load_model`, `add_lora` and `freeze_parts`."""
    set_seed(args.seed)  # for the initial weights of the adapter
    # The fully trained modules are saved with the adapter, so they must not be rounded.
    keeps_base = options.lora and not options.lora_merge
    dtype = "auto" if keeps_base else options.dtype
    model, _ = load_model(
        options.model_name_or_path,
        dtype=dtype,
        attn_implementation=options.attn_implementation,
        allow_incomplete=options.allow_incomplete,
    )
    sharded = (
        args.fsdp or args.deepspeed or os.environ.get("ACCELERATE_USE_FSDP") or os.environ.get("ACCELERATE_USE_DEEPSPEED")
    )
    if sharded and model.config.window_chunk_size is not None:
        # Parameters are gathered in each pass, so ranks with more images would wait for the others forever.
        logger.warning("window_chunk_size is set to None: with sharded parameters, all ranks must make the same passes.")
        model.config.window_chunk_size = None
    if options.lora:
        model = add_lora(model, options, args.frozen_parts)
    only_new_bands = args.train_only_new_bands and model.config.stem_channels is not None
    if args.frozen_parts or only_new_bands:
        freeze_parts(model, args.frozen_parts, only_new_bands)
    return model


def load_data(
    data: DataArguments, args: MFRSVLMTrainingArguments, encode: Any
) -> dict[str, ConversationDataset | ConversationStream]:
    """The conversations for training (`"train"`) and, if given, for evaluation (`"eval"`).

    Raises:
        SettingsError: the dataset or a split of it cannot be loaded.
        BadRow: see `ConversationDataset`.
    """
    rows: dict[str, Any] = {"train": data.train_file, "eval": data.eval_file}
    if data.dataset_name is not None:
        evaluates = data.eval_file is None and args.eval_strategy != "no"
        rows |= load_splits(data, [data.dataset_train_split, *([data.dataset_test_split] if evaluates else [])])
    root = data.image_root
    if root is None and data.dataset_name is not None and Path(data.dataset_name).is_dir():
        root = data.dataset_name
    datasets: dict[str, ConversationDataset | ConversationStream] = {}
    for name, source in rows.items():
        if source is None:
            continue
        if hasattr(source, "__len__"):  # also a path
            dataset = ConversationDataset(source, root, data.on_bad_row, encode, data.allow_outside_images)
            logger.info(f"{name}: {len(dataset)} conversations {dict(dataset.sources.most_common(10))}")
        else:
            source = source.shuffle(args.seed, buffer_size=SHUFFLED_ROWS) if name == "train" else source
            dataset = ConversationStream(source, root, data.on_bad_row, encode, data.allow_outside_images)
        datasets[name] = dataset
    return datasets


def load_splits(data: DataArguments, splits: list[str]) -> dict[str, Any]:
    """Splits of a dataset from `datasets.load_dataset`: the first as `"train"`, the second, if any, as `"eval"`."""
    import datasets

    try:
        loaded = datasets.load_dataset(data.dataset_name, data.dataset_config, streaming=data.dataset_streaming)
    except Exception as error:  # readers of many formats, the Hub and its cache raise many types
        text = " ".join(str(error).split()) or type(error).__name__
        raise SettingsError(f"dataset_name={data.dataset_name} cannot be loaded: {text[:500]}") from error
    for split in splits:
        if split not in loaded:
            raise SettingsError(
                f"dataset_name={data.dataset_name} has no split {split!r}, but {', '.join(map(repr, loaded))}. Set "
                "dataset_train_split, dataset_test_split, or eval_file."
            )
    return {name: loaded[split] for name, split in zip(("train", "eval"), splits, strict=False)}


def is_at_its_end(args: MFRSVLMTrainingArguments, checkpoint: str | None) -> bool:
    """Whether `checkpoint` is the end of the training."""
    if checkpoint is None:
        return False
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    if args.max_steps > 0:
        return state.global_step >= args.max_steps
    return state.global_step >= state.max_steps and state.num_train_epochs >= args.num_train_epochs


def is_saved(args: MFRSVLMTrainingArguments, checkpoint: str | None) -> bool:
    """Whether `output_dir` contains the result of the training that wrote `checkpoint`."""
    folder = Path(args.output_dir)
    is_own = checkpoint is not None and Path(checkpoint).resolve().parent == folder.resolve()
    return is_own and any(folder.glob("*.safetensors")) and (folder / "train_results.json").is_file()


def check_settings(options: ModelArguments, data: DataArguments, args: MFRSVLMTrainingArguments) -> None:
    """Raises `SettingsError` for missing and contradictory settings."""
    if not options.model_name_or_path:
        raise SettingsError("model_name_or_path is missing.")
    if not data.train_file and not data.dataset_name:
        raise SettingsError("train_file is missing: name a file, or a dataset with dataset_name.")
    if data.train_file and data.dataset_name:
        raise SettingsError(f"train_file={data.train_file}, dataset_name={data.dataset_name}: name only one of them.")
    if options.lora_merge and not options.lora:
        raise SettingsError("lora_merge=true needs lora=true.")
    if data.eval_file is None and data.dataset_name is None and args.eval_strategy != "no":
        raise SettingsError(f"eval_strategy={args.eval_strategy.value} needs an eval_file.")
    if data.dataset_streaming and not data.dataset_name:
        raise SettingsError("dataset_streaming=true needs a dataset_name.")
    if data.dataset_streaming and args.max_steps <= 0:
        raise SettingsError("dataset_streaming=true needs max_steps, since a stream has no length.")


def finetune(options: ModelArguments, data: DataArguments, args: MFRSVLMTrainingArguments) -> MFRSVLMTrainer | None:
    """Trains, evaluates, saves model, processor, code and card to `output_dir`, and pushes them with `push_to_hub`.

    Returns:
        The trainer, or `None` if the resumed training had already ended.

    Raises:
        SettingsError: an argument is missing or invalid.
        ModelFolderError: the model cannot be loaded.
        BadRow: a row is bad and `on_bad_row="fail"`.
        FolderInUse: another run writes to `output_dir`.
    """
    check_settings(options, data, args)
    check_folder(args.output_dir)
    with locked(Path(args.output_dir)) if args.process_index == 0 else nullcontext():
        return _finetune(options, data, args)


def _finetune(options: ModelArguments, data: DataArguments, args: MFRSVLMTrainingArguments) -> MFRSVLMTrainer | None:
    """`finetune`, alone in its output folder."""
    checkpoint = None
    if args.process_index == 0 or args.resume_from_checkpoint is not None:  # the first rank checks before any rank writes
        checkpoint = check_output_dir(args, data.overwrite_output_dir)
    is_over = is_at_its_end(args, checkpoint)
    if is_over and is_saved(args, checkpoint):
        logger.info(f"Nothing to do: training ended at {checkpoint}. To continue, raise num_train_epochs or max_steps.")
        return None
    check_start(options)

    processor = load_processor(options.model_name_or_path, allow_incomplete=options.allow_incomplete)
    collator = ConversationCollator(processor, data.template, data.prompt_version, data.max_length)
    datasets = load_data(data, args, collator.encode)
    if data.dataset_streaming and args.accelerator_config.dispatch_batches is None:
        args.accelerator_config.dispatch_batches = False  # accelerate cannot split the images of a batch over processes
    trainer = MFRSVLMTrainer(
        model=prepare_model(options, args),
        args=args,
        data_collator=collator,
        train_dataset=datasets["train"],
        eval_dataset=datasets.get("eval"),
        processing_class=processor,
    )
    problems = problems_of(trainer.model)
    trainer.card_details = {
        "evidence": f"**The model that it was trained from was incomplete.** {' '.join(problems)}" if problems else None,
        "base_model": data.base_model,
        "datasets": data.card_datasets,
        "name": None if args.hub_model_id is None else args.hub_model_id.rpartition("/")[2],
    }
    if is_over:  # the Trainer would make one more step
        logger.info(f"Training ended at {checkpoint}. Its result is saved without a further step.")
        metrics = trainer.load_end(checkpoint)
    else:
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    metrics["bad_rows"] = datasets["train"].num_bad_rows
    trainer.log_metrics("train", metrics)
    if "eval" in datasets:
        eval_metrics = trainer.evaluate()
        eval_metrics["bad_rows"] = datasets["eval"].num_bad_rows
        trainer.log_metrics("eval", eval_metrics)
        trainer.save_metrics("eval", eval_metrics)
    if options.lora_merge:
        merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        trainer.model = merged.to(getattr(torch, options.dtype))  # fully trained modules are float32 until here
    trainer.save_model()
    trainer.create_model_card()
    trainer.save_metrics("train", metrics)  # last, since `is_saved` looks for this file
    if args.push_to_hub:
        trainer.push_to_hub()
    return trainer


def main(arguments: list[str] | None = None) -> MFRSVLMTrainer | None:
    """Reads the command line and trains. Returns and raises what `finetune` does."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = ConfigParser()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        parser.print_help()
        raise SystemExit(0 if arguments else 2)
    logging.basicConfig(format="[%(name)s] %(message)s")
    logging.getLogger("mfrsvlm").setLevel(logging.INFO)
    set_verbosity_info()
    return finetune(*parser.read(Path(arguments[0]), arguments[1:]))


def run(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit status. Errors that the user can correct are printed in one line."""
    try:
        main(arguments)
    except WriteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (
        SettingsError,
        ModelFolderError,
        BadRow,
        FolderInUse,
        FileNotFoundError,
        IsADirectoryError,
        PermissionError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
    except ImportError as error:
        print(f"error: {error}. Install what training needs: pip install 'mfrsvlm[training]'", file=sys.stderr)
    except (OSError, RuntimeError, SafetensorError) as error:
        if (line := unwritten(error)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(run())
