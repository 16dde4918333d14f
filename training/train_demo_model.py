"""Trains the small model in `demo/model` from random weights: encoder, decoder, model folder, evaluation, card.

    python -m mfrsvlm.training.train_demo_model mfrsvlm/training/configs/demo_model.yaml --output DIR [--key value ...]

The keys of the file, and of the command line, which goes first, are the fields of `DemoModelArguments` and
`DemoModelTrainingArguments`. Stages whose result lies in the work folder are not done again, and the decoder resumes from its
last checkpoint, so that a stopped run continues.
"""

import json
import logging
import platform
import sys
import time
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser
from transformers.trainer_utils import get_last_checkpoint

from ..evaluation import EvaluationSettings, evaluate
from ..files.writing import write_file
from ..model_card.card import write_model_card
from ..modeling_mfrsvlm import MFRSVLMForConditionalGeneration
from .branches import BranchCollator
from .data import ConversationDataset, to_messages
from .demo_model.architecture import make_config, make_processor, make_tokenizer, start_positions, whiten_projector
from .demo_model.encoder import load_encoder, pretrain
from .demo_model.scene_images import SceneImages
from .demo_model.scene_questions import SceneQuestions, dialogues
from .demo_model.trainer import DemoModelTrainer, DemoModelTrainingArguments
from .finetune import ConfigParser
from .image_features import cache_image_features, freeze_encoder


logger = logging.getLogger("mfrsvlm.training.train_demo_model")  # also where this file is the main program

TASKS = {"classification": "classification", "count": "counting", "grounding": "grounding", "caption": "captioning"}
NAME = "MF-RSVLM, a small model of synthetic scenes"


@dataclass
class DemoModelArguments:
    output: str | None = field(default=None, metadata={"help": "Model folder to write; must be empty or new."})
    work: str = field(default="runs/demo-model", metadata={"help": "Folder for scenes, encoder, features, checkpoints."})
    encoder: str = field(default="resnet", metadata={"help": "resnet or vit.", "choices": ["resnet", "vit"]})
    crowded_scenes: int = field(default=8000, metadata={"help": "Scenes that the encoder is pretrained on."})
    encoder_steps: int = field(default=8000, metadata={"help": "Steps of its pretraining."})
    train_encoder: bool = field(default=False, metadata={"help": "Train it with the decoder, too. Else features are cached."})
    scenes: int = field(default=24000, metadata={"help": "Synthetic scenes to train the decoder on."})
    rounds: int = field(default=3, metadata={"help": "Sets of questions about each scene."})
    train_file: str | None = field(default=None, metadata={"help": "Further rows, see training.data."})
    image_root: str | None = field(default=None, metadata={"help": "Folder of their images. Default: the current one."})
    vocab_size: int = field(default=700, metadata={"help": "Largest vocabulary of the tokenizer, which is trained first."})
    test_scenes: int = field(default=1000, metadata={"help": "Held-out scenes to evaluate on; 0 for none."})
    name: str = field(default=NAME, metadata={"help": "Heading of the card."})


class Config(ConfigParser):
    """Reads the file and overrides, see `ConfigParser`."""

    def __init__(self) -> None:
        fields = [DemoModelArguments, DemoModelTrainingArguments]
        HfArgumentParser.__init__(self, fields, allow_abbrev=False, prog="train_demo_model")


def train_demo_model(options: DemoModelArguments, args: DemoModelTrainingArguments) -> Path:
    """Trains the model and writes its folder.

    Returns:
        The folder.

    Raises:
        ValueError: an argument is missing or makes no sense, or the output folder is not empty.
    """
    if not options.output:
        raise ValueError("output is missing: --output DIR names the model folder to write.")
    output, work = Path(options.output), Path(options.work)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty: remove it first, or choose another folder.")
    if not options.scenes and not options.train_file:
        raise ValueError("scenes=0 and no train_file: there is nothing to train on.")
    work.mkdir(parents=True, exist_ok=True)
    times = StageTimes(work / "times.json")

    conversations = None
    if options.train_file:
        conversations = ConversationDataset(options.train_file, options.image_root)
    encoder = work / f"encoder-{options.encoder}-{options.crowded_scenes}-{options.encoder_steps}-{args.seed}.pt"
    if not encoder.exists():
        with times.measure("encoder"):
            crowded = SceneImages(work / "scenes", "train", options.crowded_scenes, crowding=4)
            pretrain(options.encoder, crowded, encoder, options.encoder_steps, args.seed)

    with times.measure("features"):
        model, processor, dataset = prepare(options, args.seed, encoder, conversations)
    args.output_dir = str(work / "decoder")
    trainer = DemoModelTrainer(
        model=model,
        args=args,
        data_collator=dataset.collator,
        train_dataset=dataset,
        processing_class=processor,
    )
    checkpoint = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    with times.measure("decoder"):
        trainer.train(resume_from_checkpoint=checkpoint)
    model.generation_config.max_new_tokens = 64
    model.to(torch.bfloat16).save_pretrained(output)
    processor.save_pretrained(output)
    write_model_card(output, model.config, "trained", options.name, evidence(options, args, times, evaluate_folder(output, options)), license="apache-2.0")
    return output
