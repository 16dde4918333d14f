"""Fine-tunes MF-RSVLM with TRL's `SFTTrainer`: `python examples/finetune_with_trl.py MODEL ROWS.json IMAGES OUTPUT`.

`ROWS.json` is a list of `{"messages": [{"role": ..., "content": "<image>\\n..."}, ...], "images": ["a.png", ...]}`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, List
from trl import SFTConfig, SFTTrainer

from mfrsvlm import MFRSVLMForConditionalGeneration, MFRSVLMProcessor
from mfrsvlm.training import ConversationCollator


def main(model_id: str, rows: str, image_root: str, output_dir: str, **options: Any) -> SFTTrainer:
    processor = MFRSVLMProcessor.from_pretrained(model_id)
    model = MFRSVLMForConditionalGeneration.from_pretrained(model_id)
    table = json.loads(Path(rows).read_text())
    for row in table:
        row["images"] = [str(Path(image_root) / image) for image in row["images"]]
    dataset = Dataset.from_list(table).cast_column("images", List(Image()))

    # TRL computes in bfloat16 by default, and rejects that where there is no accelerator and use_cpu is not set.
    options = {"use_cpu": not torch.accelerator.is_available(), **options}
    trainer = SFTTrainer(
        model=model,
        # max_length is the collator's: TRL's own truncation does not know image tokens.
        args=SFTConfig(output_dir=output_dir, max_length=None, remove_unused_columns=False, **options),
        train_dataset=dataset,
        processing_class=processor,
        # TRL's own collator puts the loss on questions and placeholders as well, unless `assistant_only_loss=True`.
        data_collator=ConversationCollator(processor, max_length=2048),
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
