"""Command-line options of `assemble` and `finetune`. Imports neither torch nor transformers, so that `--help` is fast."""

import argparse
import json
from pathlib import Path
from typing import Any

from ..arguments import ArgumentParser, add_output_arguments


KEYS = """common keys, in the YAML file or as --key value:
  model_name_or_path     folder or Hub id of the model to start from
  train_file, eval_file  JSON or JSONL of conversations
  image_root             folder of the images
  output_dir             folder for the trained model
  max_steps, num_train_epochs, learning_rate, per_device_train_batch_size
  lora, lora_r, lora_merge
  freeze_vision_tower, freeze_projector, freeze_injectors, freeze_decoder
  bf16, gradient_checkpointing, resume_from_checkpoint, push_to_hub, hub_model_id
Every field of transformers' TrainingArguments is a key. `mfrsvlm finetune --help-all` lists all of them."""


def assemble_parser() -> ArgumentParser:
    """The options of `assemble`."""
    parser = ArgumentParser(
        prog="mfrsvlm assemble", description="Joins a language model and a vision tower into a new, untrained model."
    )
    parser.add_argument("--language-model", required=True, help="folder or Hub id of a causal language model")
    parser.add_argument("--vision-tower", required=True, help="folder or Hub id of a ViT or a hierarchical backbone")
    parser.add_argument("--projector", type=Path, help="mm_projector.bin of LLaVA (default: random weights)")
    parser.add_argument(
        "--config", type=json_object, dest="overrides", metavar="JSON", help="fields of MFRSVLMConfig to set"
    )
    parser.add_argument(
        "--image-placement",
        choices=["inline", "prefix"],
        default="inline",
        help="visual tokens at <image>, or before the text (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: %(default)s)")
    add_output_arguments(parser)
    return parser


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text} is no JSON object, such as {{"routing": "token"}}')
    return value


class AllKeys(argparse.Action):
    """`--help-all` lists all keys. They are fields of dataclasses that take seconds to import."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        from .finetune import main

        main(["--help"])


def finetune_parser() -> ArgumentParser:
    """The help of `finetune`, which parses its keys itself."""
    parser = ArgumentParser(
        prog="mfrsvlm finetune",
        usage="mfrsvlm finetune CONFIG.yaml [--key value ...]",
        description="Fine-tunes a model on conversations about images. Keys on the command line override the file.",
        epilog=KEYS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="YAML file of keys and values, see training/configs")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, help=argparse.SUPPRESS).required = False
    parser.add_argument("--help-all", nargs=0, action=AllKeys, help="list all keys and exit")
    return parser
