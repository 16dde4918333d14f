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
