"""Fixtures: the committed part of the reference, and the folder converted from it."""

import os
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch
from transformers.utils import logging

from mfrsvlm import MFRSVLMProcessor
from mfrsvlm.convert_checkpoint import convert_released


REFERENCE = Path(__file__).parent / "reference"

torch.set_num_threads(1)  # the models are tiny, and tests may run side by side
logging.disable_progress_bar()


@pytest.fixture(scope="session")
def reference() -> Path:
    """Random-weight checkpoint in the released layout, its images, and numbers of every stage (see its README)."""
    return REFERENCE


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hub folder made by the converter from the reference checkpoint."""
    folder = tmp_path_factory.mktemp("converted") / "model"
    checkpoint = REFERENCE / "checkpoint"
    convert_released(checkpoint, str(checkpoint / "vision_tower"), folder)
    return folder


@pytest.fixture(scope="session")
def processor(converted: Path) -> MFRSVLMProcessor:
    """Processor of the converted folder: prefix placement, 576 tokens an image."""
    return MFRSVLMProcessor.from_pretrained(converted)
