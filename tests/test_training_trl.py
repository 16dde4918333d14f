"""TRL's trainer takes the same model, processor and collator."""

import json

import pytest
import torch
from tiny_training import ANSWER, QUESTION, tiny_folder, write_images
from transformers import AutoModelForImageTextToText


pytest.importorskip("trl")
from mfrsvlm.training import ConversationCollator
from mfrsvlm.training.sft_example import main


def test_sft_example(tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": ("<image>\n" if index % 2 else "") + QUESTION},
                {"role": "assistant", "content": f"{ANSWER} {index}"},
            ],
            "images": [f"{index}.png"] if index % 2 else [],
        }
        for index in range(8)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    folder = tiny_folder(tmp_path / "model")
    write_images(tmp_path, 8)
    options = {"use_cpu": True, "bf16": False, "learning_rate": 2e-3, "logging_steps": 1, "num_train_epochs": 2}
    options |= {"per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True}
    trainer = main(str(folder), str(tmp_path / "rows.json"), str(tmp_path), str(tmp_path / "out"), **options)

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.3
    batch = next(iter(trainer.get_train_dataloader()))
    expected = ConversationCollator(trainer.processing_class)(rows_of(batch, trainer, rows, tmp_path))
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(loaded.lm_head.weight, trainer.model.lm_head.weight)


def rows_of(batch, trainer, rows, folder):
    """The rows whose answers a batch holds, in its order."""
    found = []
    for ids in batch["input_ids"]:
        text = trainer.processing_class.tokenizer.decode(ids, skip_special_tokens=True)
        (row,) = [row for row in rows if text.rstrip().endswith(row["messages"][1]["content"])]
        found.append({**row, "images": [str(folder / image) for image in row["images"]]})
    return found
