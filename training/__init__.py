"""Fine-tuning of MF-RSVLM: `python -m mfrsvlm.training.finetune CONFIG.yaml`, or the pieces below with any trainer."""

from .collator import ConversationCollator
from .data import BadRow, ConversationDataset, ConversationStream
from .trainer import MFRSVLMTrainer, MFRSVLMTrainingArguments


__all__ = [
    "BadRow",
    "ConversationCollator",
    "ConversationDataset",
    "ConversationStream",
    "MFRSVLMTrainer",
    "MFRSVLMTrainingArguments",
]
