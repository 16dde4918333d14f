"""Fine-tunes MF-RSVLM: `python -m mfrsvlm.training.finetune CONFIG.yaml [--key value ...]`.

The keys of the file, and of the command line, which goes first, are the fields of `ModelArguments`, `DataArguments` and
`MFRSVLMTrainingArguments` (all that `transformers.TrainingArguments` has, and freezing and learning rates of the parts).
"""

import difflib
import json
import logging
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils.logging import set_verbosity_info

from mfrsvlm import MFRSVLMForConditionalGeneration, MFRSVLMProcessor

from .collator import ConversationCollator
from .data import ConversationDataset
from .trainer import UNFINISHED, MFRSVLMTrainer, MFRSVLMTrainingArguments, freeze_parts


logger = logging.getLogger("mfrsvlm.training.finetune")  # also where this file is the main program

# Linear layers of the decoder, and of nothing else: neither tower nor injectors.
DECODER_LINEARS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
# Trained whole beside the adapter, as in every stage of the published training: they are small or new. Of a list of
# modules each one, since PEFT refuses the list.
SAVED_WHOLE = {
    r"injectors\.\d+": "injectors",
    "multi_modal_projector": "projector",
    "visual_position_embedding": "projector",
    r"stage_projections\.\d+": "projector",
}


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder or Hub id of the model to start from."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Of the weights in training. With bf16=true, float32 weights are the master copy."},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, flash_attention_2, eager."})
    lora: bool = field(default=False, metadata={"help": "Train an adapter (LoRA) instead of the weights."})
    lora_r: int = field(default=64, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=128, metadata={"help": "Scale of the adapter times its rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of linear layers, or one regular expression. Default: those of the decoder's layers."},
    )
    lora_modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules trained whole beside the adapter. Default: injectors and projector, unless frozen."},
    )
    lora_merge: bool = field(default=False, metadata={"help": "Save the merged model at the end, not the adapter."})


@dataclass
class DataArguments:
    train_file: str | None = field(default=None, metadata={"help": "JSON or JSONL of conversations to train on."})
    eval_file: str | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    image_root: str | None = field(default=None, metadata={"help": "Folder of the images. Default: the current one."})
    allow_outside_images: bool = field(
        default=False, metadata={"help": "Open images at addresses and outside of image_root, too."}
    )
    on_bad_row: str = field(
        default="fail", metadata={"help": "fail, or skip: left out, logged and counted.", "choices": ["fail", "skip"]}
    )
    template: str = field(
        default="chat",
        metadata={"help": "chat, or plain: image and caption only.", "choices": ["chat", "plain"]},
    )
    prompt_version: str | None = field(
        default=None, metadata={"help": "Of the chat template; v1 is what the published model was trained with."}
    )
    max_length: int = field(default=2048, metadata={"help": "Longest sample in tokens, image tokens included."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Write to an output_dir that holds files, replacing those of the same name."}
    )
    base_model: str | None = field(
        default=None,
        metadata={"help": "Hub id for the model card. Default: model_name_or_path, or what that folder's card names."},
    )
    dataset_name: list[str] | None = field(default=None, metadata={"help": "Hub ids of the data, for the model card."})


class ConfigParser(HfArgumentParser):
    """Reads a YAML file and overrides; every complaint is a `ValueError` that names the key."""

    def __init__(self) -> None:
        super().__init__([ModelArguments, DataArguments, MFRSVLMTrainingArguments], allow_abbrev=False, prog="finetune")

    def error(self, message: str) -> Any:
        raise ValueError(message)

    def check_key(self, key: str, place: str) -> None:
        known = [action.dest for action in self._actions]
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"{place}: unknown key {key!r}." + (f" Did you mean {close[0]!r}?" if close else ""))

    def read(self, config: Path, overrides: list[str]) -> tuple[ModelArguments, DataArguments, MFRSVLMTrainingArguments]:
        try:
            values = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{config} is not YAML: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{config} holds a {type(values).__name__}, not keys and values.")
        # Through the command line, so that the type of every value is checked in one place. (YAML reads 2e-5 as text.)
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
        return self.parse_args_into_dataclasses([*words, *overrides])


def check_output_dir(args: MFRSVLMTrainingArguments, overwrite: bool) -> str | None:
    """Finds the checkpoint to go on from, and keeps the user's files from being overwritten.

    Returns:
        The checkpoint that `resume_from_checkpoint` means: a path, or `last` for the last one in `output_dir`.

    Raises:
        ValueError: there is no such checkpoint; or the folder holds files and neither resuming nor overwriting is asked.
    """
    folder = Path(args.output_dir)
    content = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    wanted = args.resume_from_checkpoint
    if wanted is not None:
        checkpoint = (get_last_checkpoint(folder) if content else None) if wanted in ("last", "true", "True") else wanted
        if checkpoint is None or not (Path(checkpoint) / "trainer_state.json").is_file():
            raise ValueError(f"resume_from_checkpoint={wanted}: there is no whole checkpoint in {checkpoint or folder}.")
        return str(checkpoint)
    runs = [name for name in content if name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") or name == UNFINISHED]
    if runs:
        raise ValueError(
            f"output_dir={folder} holds checkpoints of another run ({', '.join(sorted(runs))}). Go on with "
            "--resume_from_checkpoint last, remove them, or choose another folder."
        )
    if content and not overwrite:
        raise ValueError(
            f"output_dir={folder} is not empty ({len(content)} entries, such as {min(content)}). Choose another folder, or "
            "set overwrite_output_dir."
        )
    return None


def add_lora(model: MFRSVLMForConditionalGeneration, options: ModelArguments, frozen_parts: list[str]) -> Any:
    """Wraps the model in an adapter, see `ModelArguments`."""
    from peft import LoraConfig, get_peft_model

    targets: Any = options.lora_target_modules or [DECODER_LINEARS]
    whole = options.lora_modules_to_save
    if whole is None:
        names = [name for name, _ in model.model.named_modules()]
        patterns = [pattern for pattern, part in SAVED_WHOLE.items() if part not in frozen_parts]
        whole = [name for name in names if any(re.fullmatch(pattern, name) for pattern in patterns)]
    config = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=targets[0] if len(targets) == 1 else targets,  # one string is a regular expression
        modules_to_save=whole or None,
    )
    return get_peft_model(model, config)


def load_model(options: ModelArguments, args: MFRSVLMTrainingArguments) -> Any:
    """Loads the model, adds the adapter, freezes parts."""
    set_seed(args.seed)  # for the adapter's first weights
    model = MFRSVLMForConditionalGeneration.from_pretrained(
        options.model_name_or_path, dtype=options.dtype, attn_implementation=options.attn_implementation
    )
    sharded = (
        args.fsdp or args.deepspeed or os.environ.get("ACCELERATE_USE_FSDP") or os.environ.get("ACCELERATE_USE_DEEPSPEED")
    )
    if sharded and model.config.window_chunk_size is not None:
        # Parameters are gathered pass by pass, so ranks with more images would wait for the others for ever.
        logger.warning("window_chunk_size is set to None: where parameters are sharded, ranks must make as many passes.")
        model.config.window_chunk_size = None
    if options.lora:
        model = add_lora(model, options, args.frozen_parts)
    if args.frozen_parts:
        freeze_parts(model, args.frozen_parts)
    return model


def finetune(options: ModelArguments, data: DataArguments, args: MFRSVLMTrainingArguments) -> MFRSVLMTrainer:
    """Trains, evaluates, saves model, processor, code and card to `output_dir`, and pushes if asked to.

    Raises:
        ValueError: an argument is missing or makes no sense; a row is bad and `on_bad_row="fail"`.
    """
    for name, value in {"model_name_or_path": options.model_name_or_path, "train_file": data.train_file}.items():
        if not value:
            raise ValueError(f"{name} is missing.")
    if options.lora_merge and not options.lora:
        raise ValueError("lora_merge=true needs lora=true.")
    if data.eval_file is None and args.eval_strategy != "no":
        raise ValueError(f"eval_strategy={args.eval_strategy.value} needs an eval_file.")
    checkpoint = None
    if args.process_index == 0 or args.resume_from_checkpoint is not None:  # the first rank looks before any writes
        checkpoint = check_output_dir(args, data.overwrite_output_dir)

    processor = MFRSVLMProcessor.from_pretrained(options.model_name_or_path)
    collator = ConversationCollator(processor, data.template, data.prompt_version, data.max_length)
    datasets: dict[str, ConversationDataset] = {}
    for name, path in {"train": data.train_file, "eval": data.eval_file}.items():
        if path is not None:
            datasets[name] = ConversationDataset(
                path, data.image_root, data.on_bad_row, collator.encode, data.allow_outside_images
            )
            logger.info(f"{path}: {len(datasets[name])} conversations {dict(datasets[name].sources)}")

    trainer = MFRSVLMTrainer(
        model=load_model(options, args),
        args=args,
        data_collator=collator,
        train_dataset=datasets["train"],
        eval_dataset=datasets.get("eval"),
        processing_class=processor,
    )
    trainer.card_details = {
        "base_model": data.base_model,
        "datasets": data.dataset_name,
        "name": None if args.hub_model_id is None else args.hub_model_id.rpartition("/")[2],
    }
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    metrics["bad_rows"] = datasets["train"].num_bad_rows
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    if "eval" in datasets:
        metrics = trainer.evaluate()
        metrics["bad_rows"] = datasets["eval"].num_bad_rows
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if options.lora_merge:
        trainer.model = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    trainer.save_model()
    trainer.create_model_card()
    if args.push_to_hub:
        trainer.push_to_hub()
    return trainer


def main(arguments: list[str] | None = None) -> MFRSVLMTrainer:
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


if __name__ == "__main__":
    main()
