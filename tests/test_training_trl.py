"""TRL's trainer takes the same model, processor and collator."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import ANSWER, QUESTION, tiny_folder, tiny_processor, write_images
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments


pytest.importorskip("trl")
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from mfrsvlm.configuration_mfrsvlm import TRANSFORMERS
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


OPTIONS = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "per_device_eval_batch_size": 3}


def test_labels_that_are_a_copy_of_the_ids(tmp_path):
    """The stock trainer's loss is the model's, although the labels of TRL's collator name placeholders."""
    model = AutoModelForImageTextToText.from_pretrained(tiny_folder(tmp_path / "model"), trust_remote_code=True)
    collator = DataCollatorForVisionLanguageModeling(tiny_processor())
    batch = collator(for_trl(conversations(3)))
    assert (batch["labels"] == model.config.image_token_id).any()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path / "out"), remove_unused_columns=False, **OPTIONS),
        data_collator=collator,
        eval_dataset=for_trl(conversations(3)),
    )
    with torch.no_grad():
        expected = model(**batch).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(TRANSFORMERS < (5, 18), reason="TRL refuses assistant_only_loss with images before transformers 5.18")
def test_trls_trainer_with_its_own_collator(tmp_path):
    """TRL puts its own computation of the loss into the model, so placeholders must have no labels: the answers have."""
    folder = tiny_folder(tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(tmp_path / "out"), max_length=None, max_steps=1, assistant_only_loss=True, **OPTIONS),
        train_dataset=Dataset.from_list(for_trl(conversations(3))),
        processing_class=tiny_processor(),
    )
    before = model.lm_head.weight.detach().clone()
    assert trainer.train().metrics["train_loss"] > 0
    assert not torch.equal(before, model.lm_head.weight)


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
