"""TRL's trainers take the same model and processor, and its supervised one the same collator; offline, on the CPU."""

import functools
import json
import runpy
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from tiny_training import ANSWER, QUESTION, tiny_folder, write_images
from transformers import AutoModelForImageTextToText


pytest.importorskip("trl")
import trl
from peft import LoraConfig

import mfrsvlm
from mfrsvlm import MFRSVLMForConditionalGeneration, MFRSVLMProcessor
from mfrsvlm.training import ConversationCollator
from mfrsvlm.training.finetune import DECODER_LINEARS
from mfrsvlm.training.trainer import PARTS, part_of


pytestmark = pytest.mark.integration
EXAMPLE = Path(mfrsvlm.__file__).parent / "examples" / "finetune_with_trl.py"


def test_sft_example(tmp_path):
    main = runpy.run_path(str(EXAMPLE))["main"]
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
    options = {"learning_rate": 2e-3, "logging_steps": 1, "num_train_epochs": 2}
    options |= {"per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True}
    trainer = main(str(folder), str(tmp_path / "rows.json"), str(tmp_path), str(tmp_path / "out"), **options)

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.3
    batch = next(iter(trainer.get_train_dataloader()))
    expected = ConversationCollator(trainer.processing_class)(rows_of(batch, trainer, rows, tmp_path))
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(loaded.lm_head.weight, trainer.model.lm_head.weight.cpu())


def rows_of(batch, trainer, rows, folder):
    """The rows whose answers a batch holds, in its order."""
    found = []
    for ids in batch["input_ids"]:
        text = trainer.processing_class.tokenizer.decode(ids, skip_special_tokens=True)
        (row,) = [row for row in rows if text.rstrip().endswith(row["messages"][1]["content"])]
        found.append({**row, "images": [str(folder / image) for image in row["images"]]})
    return found


# TRL's own collators and objectives, of which each trains one step

FOLDERS = {
    "inline": {},
    "prefix": {"image_placement": "prefix"},
    "cross-attention": {"injection_type": "cross_attention"},
    "backbone": {"vision": "resnet"},
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return functools.cache(lambda name: tiny_folder(tmp_path_factory.mktemp("models") / name, **FOLDERS[name]))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 2)


def table(images, *columns) -> Dataset:
    """Two questions about an image each, with the answers that an objective asks for."""
    turns = {
        "messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}],
        "prompt": [{"role": "user", "content": QUESTION}],
        "completion": [{"role": "assistant", "content": ANSWER}],
        "chosen": [{"role": "assistant", "content": ANSWER}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    rows = {column: [turns[column]] * 2 for column in columns}
    features = {column: List({"role": Value("string"), "content": Value("string")}) for column in columns}
    rows["images"] = [[str(images / f"{index}.png")] for index in range(2)]
    return Dataset.from_dict(rows, Features({**features, "images": List(Image())}))


def later_is_better(completions, **kwargs):
    return [float(index) for index in range(len(completions))]


def make_trainer(kind, folder, images, output, adapter):
    sampled = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
    columns, options = {
        "SFT": (("prompt", "completion"), {"max_length": None}),
        "DPO": (("prompt", "chosen", "rejected"), {"max_length": None}),
        "GRPO": (("prompt",), sampled),
        "RLOO": (("prompt",), sampled),
    }[kind]
    common = {"use_cpu": True, "bf16": False, "max_steps": 1, "learning_rate": 1e-2, "save_strategy": "no"}
    common |= {"per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    # The reference model of full training is loaded from the folder, with the code in there.
    common |= {"trust_remote_code": True, "gradient_checkpointing": False, "lr_scheduler_type": "constant"}
    more = {"reward_funcs": later_is_better} if "num_generations" in options else {}
    lora = LoraConfig(target_modules=DECODER_LINEARS, modules_to_save=["injectors.0", "injectors.1"], r=4)
    return getattr(trl, f"{kind}Trainer")(
        model=MFRSVLMForConditionalGeneration.from_pretrained(folder),
        args=getattr(trl, f"{kind}Config")(output_dir=str(output), **options, **common),
        train_dataset=table(images, *columns),
        processing_class=MFRSVLMProcessor.from_pretrained(folder),
        peft_config=lora if adapter else None,
        **more,
    )


CASES = [(kind, "inline", adapter) for kind in ("SFT", "DPO", "GRPO", "RLOO") for adapter in (False, True)]
CASES += [(kind, name, False) for name in ("prefix", "cross-attention", "backbone") for kind in ("SFT", "DPO", "GRPO")]


@pytest.mark.parametrize(
    ("kind", "name", "adapter"), CASES, ids=lambda value: {True: "lora", False: "whole"}.get(value, value)
)
def test_a_step_reaches_every_part(kind, name, adapter, model_folder, images, tmp_path):
    """Through the injectors, so the windows were there, and were not lost on the way."""
    trainer = make_trainer(kind, model_folder(name), images, tmp_path, adapter)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    moved = dict.fromkeys(PARTS, False)
    for name, parameter in trainer.model.named_parameters():
        assert parameter.isfinite().all()
        moved[part_of(name)] |= not torch.equal(before[name], parameter)
    trained = {"injectors", "decoder"} if adapter else set(PARTS)
    assert {part for part, has_moved in moved.items() if has_moved} == trained


def sft_trainer(folder, images, output, *columns):
    model, processor = MFRSVLMForConditionalGeneration.from_pretrained(folder), MFRSVLMProcessor.from_pretrained(folder)
    args = trl.SFTConfig(output_dir=str(output), use_cpu=True, bf16=False, max_length=None, report_to="none")
    rows = table(images, *columns)
    return trl.SFTTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows, processing_class=processor)


def test_trl_scores_answers_as_the_model_does(model_folder, images, tmp_path):
    trainer = sft_trainer(model_folder("inline"), images, tmp_path, "prompt", "completion")
    batch = next(iter(trainer.get_eval_dataloader()))
    with torch.no_grad():
        # TRL replaces the forward and its head, in which the placeholder keeps its score.
        logits = trainer.model.lm_head(trainer.model.model(**{**batch, "labels": None}).last_hidden_state)[:, :-1]
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        own = trainer.model(**batch).loss
    loss = trainer.evaluate()["eval_loss"]
    assert loss == pytest.approx(float(expected), rel=1e-5)
    placeholder = logits.softmax(-1)[batch["labels"][:, 1:] != -100][:, trainer.model.config.image_token_id]
    assert loss - float(own) == pytest.approx(float(-torch.log1p(-placeholder).mean()), abs=1e-6)


def test_trl_may_not_score_image_tokens(model_folder, images, tmp_path):
    trainer = sft_trainer(model_folder("inline"), images, tmp_path, "messages")
    with pytest.raises(ValueError, match=r"labels hold image tokens.*assistant_only_loss=True"):
        trainer.evaluate()
