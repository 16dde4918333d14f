"""Fine-tuning of MF-RSVLM: `mfrsvlm finetune CONFIG.yaml`, or the classes below with any trainer."""

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .collator import ConversationCollator
    from .data import BadRow, ConversationDataset, ConversationStream
    from .trainer import MFRSVLMTrainer, MFRSVLMTrainingArguments

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "BadRow": "data",
        "ConversationCollator": "collator",
        "ConversationDataset": "data",
        "ConversationStream": "data",
        "MFRSVLMTrainer": "trainer",
        "MFRSVLMTrainingArguments": "trainer",
    },
)

__all__ = [
    "BadRow",
    "ConversationCollator",
    "ConversationDataset",
    "ConversationStream",
    "MFRSVLMTrainer",
    "MFRSVLMTrainingArguments",
]
