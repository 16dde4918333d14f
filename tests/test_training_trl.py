"""TRL's trainer takes the same model, processor and collator."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import ANSWER, QUESTION, tiny_folder, tiny_processor, write_images
from transformers import AutoModelForImageTextToText


pytest.importorskip("trl")
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from mfrsvlm.training import ConversationCollator
from mfrsvlm.training.sft_example import main


def conversations(count: int) -> list[dict]:
    """Of two turns and one or two images, and answers of different length."""
    return [
        {
            "messages": [
                {"role": "user", "content": "<image>" * (1 + index % 2) + QUESTION},
                {"role": "assistant", "content": f"{ANSWER} {index}" * (index + 1)},
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "It is wide and blue."},
            ],
            "images": [picture(index), picture(index + 9)][: 1 + index % 2],
        }
        for index in range(count)
    ]


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def for_trl(rows: list[dict]) -> list[dict]:
    """TRL puts the images of a row into its first turn by itself."""
    copies = copy.deepcopy(rows)
    for row in copies:
        row["messages"][0]["content"] = row["messages"][0]["content"].replace("<image>", "")
    return copies


def test_trls_own_collator_gives_the_same_batch():
    """With the loss on the answers, it is ours to the last id: `<s>` once, first, and no label on `<s>` or an image."""
    processor = tiny_processor()
    ours = ConversationCollator(processor)(conversations(3))
    theirs = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)(for_trl(conversations(3)))
    for name in ("input_ids", "attention_mask", "labels", "pixel_values"):
        assert torch.equal(ours[name], theirs[name]), name
    bos, image = processor.tokenizer.bos_token_id, processor.image_token_id
    assert (ours["input_ids"] == bos).sum(1).tolist() == [1, 1, 1] and (ours["input_ids"][:, 0] == bos).all()
    assert (ours["labels"] != -100).sum() > 0
    assert not (ours["labels"] == image).any()


def test_labels_that_are_a_copy_of_the_ids_train(tmp_path):
    """TRL's own trainer and collator; its loss is that of the model, although the labels name placeholders."""
    folder = tiny_folder(tmp_path / "model")
    processor, model = tiny_processor(), AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "max_steps": 1}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path / "out"),
            per_device_eval_batch_size=3,
            per_device_train_batch_size=3,
            max_length=None,
            **options,
        ),
        train_dataset=Dataset.from_list(for_trl(conversations(3))),
        eval_dataset=Dataset.from_list(for_trl(conversations(3))),
        processing_class=processor,
    )
    (batch,) = trainer.get_eval_dataloader()
    assert (batch["labels"] == processor.image_token_id).any()
    with torch.no_grad():
        expected = model(**batch).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert trainer.train().metrics["train_loss"] > 0


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
