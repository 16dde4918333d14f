"""Fine-tuning runs of tiny models: what is trained, resumed, saved, published, and refused."""

import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import HubServer
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_model
from tiny_training import tiny_folder, write_data
from transformers import Trainer

from mfrsvlm import MFRSVLMForConditionalGeneration, MFRSVLMProcessor
from mfrsvlm.training import ConversationCollator, ConversationDataset, MFRSVLMTrainingArguments
from mfrsvlm.training import finetune as module
from mfrsvlm.training.finetune import ConfigParser, main
from mfrsvlm.training.trainer import PARTS, MFRSVLMTrainer, freeze_parts, part_of


CONFIGS = Path(module.__file__).parent / "configs"
CODE = {path.name for path in Path(module.__file__).parents[1].glob("*_mfrsvlm.py")}
# A machine without the package: an import of it fails.
CLEAN = """
import sys
from PIL import Image
import torch


class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mfrsvlm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NotInstalled())
from transformers import AutoModelForImageTextToText, AutoProcessor

torch.set_num_threads(1)
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = processor(Image.open(sys.argv[2]), "USER: <image>\\nIs there a river? ASSISTANT:", return_tensors="pt")
with torch.no_grad():
    torch.save(model(**inputs).logits, sys.argv[3])
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Folder of a tiny model, and one of data."""
    folder = tmp_path_factory.mktemp("start")
    return tiny_folder(folder / "model"), write_data(folder)


def write_config(start, folder, **changes) -> Path:
    model, data = start
    values = {
        "model_name_or_path": str(model),
        "train_file": str(data / "train.json"),
        "image_root": str(data),
        "output_dir": str(folder / "run"),
        "learning_rate": 2e-3,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_steps": 3,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        **changes,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def load_elsewhere(folder, image, out, **environment):
    """Logits of the model in `folder`, loaded in one line where the package is not installed."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", CLEAN, str(folder), str(image), str(out / "logits.pt")],
        env={**clean, "HF_MODULES_CACHE": str(out / "modules"), "PYTHONSAFEPATH": "1", **environment},
        cwd=out,
        check=True,
        timeout=600,
    )
    return torch.load(out / "logits.pt")


def logits_of(model, processor, image):
    inputs = processor(Image.open(image), "USER: <image>\nIs there a river? ASSISTANT:", return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits


# Parts


@pytest.mark.parametrize(
    "overrides",
    [{}, {"routing": "token"}, {"injection_type": "cross_attention"}, {"vision": "resnet"}, {"text": "qwen3"}],
    ids=lambda o: "-".join(o.values()) or "gated",
)
def test_every_parameter_is_in_exactly_one_part(overrides):
    model = tiny_model(**overrides)
    names = [name for name, _ in model.named_parameters()]
    parts = {part: [name for name in names if part_of(name) == part] for part in PARTS}
    assert sum(map(len, parts.values())) == len(names)
    inner = model.model
    counts = {
        "vision_tower": [inner.vision_tower],
        "projector": [inner.multi_modal_projector, *([inner.stage_projections] if "vision" in overrides else [])],
        "injectors": [inner.injectors],
    }
    for part, modules in counts.items():
        assert len(parts[part]) == sum(len(list(module.parameters())) for module in modules) > 0
    assert "lm_head.weight" in parts["decoder"] and "model.language_model.embed_tokens.weight" in parts["decoder"]
    with pytest.raises(ValueError, match=r"other\.weight belongs to no part"):
        part_of("other.weight")


@pytest.mark.integration
def test_frozen_parts_stay_and_others_move_at_their_own_rate(start, tmp_path):
    rates = {"injectors_learning_rate": 0.0, "projector_learning_rate": 5e-3}
    config = write_config(
        start, tmp_path, freeze_vision_tower=True, num_train_epochs=1, lr_scheduler_type="constant", **rates
    )
    trainer = main([str(config)])
    seen = {part_of_group(trainer.model, group): group["lr"] for group in trainer.optimizer.param_groups}
    assert seen == {"projector": 5e-3, "injectors": 0.0, "decoder": 2e-3}
    before, after = weights(start[0]), weights(tmp_path / "run")
    moved = {part: [] for part in PARTS}
    for name in before:
        moved[part_of(name)].append(not torch.equal(before[name], after[name]))
    assert not any(moved["vision_tower"]) and not any(moved["injectors"])
    assert all(moved["projector"]) and sum(moved["decoder"]) > 0.9 * len(moved["decoder"])


def part_of_group(model, group):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    (part,) = {part_of(names[id(parameter)]) for parameter in group["params"]}
    return part


def test_freezing_everything_is_refused():
    with pytest.raises(ValueError, match="Nothing is left to train"):
        freeze_parts(tiny_model(), list(PARTS))


# Runs


@pytest.fixture(scope="module")
def whole_run(start, tmp_path_factory):
    """An uninterrupted run of two epochs, six steps each, with evaluation and TensorBoard."""
    folder = tmp_path_factory.mktemp("whole")
    data = start[1]
    config = write_config(start, folder, eval_file=str(data / "train.json"), eval_strategy="epoch", report_to="tensorboard")
    return main([str(config)]), folder / "run"


@pytest.mark.integration
def test_loss_falls_and_is_logged(whole_run):
    trainer, folder = whole_run
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.5
    assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) == 3
    assert list(folder.glob("runs/*/events.out.tfevents.*"))
    assert json.loads((folder / "train_results.json").read_text())["bad_rows"] == 0


@pytest.mark.integration
def test_result_loads_in_one_line_without_the_package(whole_run, start, tmp_path):
    trainer, folder = whole_run
    assert {path.name for path in folder.glob("*.py")} == CODE
    assert "The weights were trained with this package" in (folder / "README.md").read_text()
    assert str(start[0]) not in (folder / "README.md").read_text()
    image = start[1] / "1.png"
    seen = load_elsewhere(folder, image, tmp_path)
    assert torch.allclose(seen, logits_of(trainer.model, trainer.processing_class, image), atol=1e-5)
    for name in ("config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json"):
        before, after = (json.loads((each / name).read_text()) for each in (start[0], folder))
        changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
        # The two configs now name their dtype, and older trainers note the tokenizer's special tokens.
        noted = {"bos_token_id", "eos_token_id", "pad_token_id"}
        assert changed <= {"use_cache", "text_config", "vision_config", *noted}, name


@pytest.mark.integration
@pytest.mark.parametrize("step", [3, 6, 9])
def test_resumed_run_ends_with_the_same_bits(whole_run, start, step, tmp_path):
    """Within the first epoch, between two, and within the second."""
    trainer, folder = whole_run
    config = write_config(start, tmp_path, eval_file=str(start[1] / "train.json"), eval_strategy="epoch")
    resumed = main([str(config), "--resume_from_checkpoint", str(folder / f"checkpoint-{step}")])
    assert resumed.state.global_step == 12
    assert same(weights(tmp_path / "run"), weights(folder))
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (trainer, resumed)]
    assert losses[0] == losses[1]


@pytest.mark.integration
def test_adapter_resumes_with_the_same_bits(start, tmp_path):
    """Dropout draws random numbers, so their state has to come back as well."""
    options = {"lora": True, "lora_r": 4, "num_train_epochs": 1, "gradient_checkpointing": True}
    main([str(write_config(start, tmp_path, **options))])
    config = write_config(start, tmp_path, **options, output_dir=str(tmp_path / "again"))
    main([str(config), "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-3")])
    first, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("run", "again"))
    assert same(first, again)


@pytest.mark.integration
def test_stage_of_captions(start, tmp_path):
    data = start[1]
    rows = [row for row in json.loads((data / "train.json").read_text()) if "image" in row]
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    changes = {"template": "plain", "train_file": str(tmp_path / "captions.json"), "max_steps": 2}
    trainer = main([str(write_config(start, tmp_path, **changes))])
    batch = next(iter(trainer.get_train_dataloader()))
    text = trainer.processing_class.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert all(line.strip().startswith("Yes, a wide river") for line in text)
    with pytest.raises(ValueError, match="takes a caption of an image"):
        main([str(write_config(start, tmp_path, template="plain", output_dir=str(tmp_path / "other")))])


@pytest.mark.integration
@pytest.mark.parametrize("labels", ["answers only", "a copy of the ids"])
@pytest.mark.parametrize("trainer_class", [Trainer, MFRSVLMTrainer])
def test_the_trainers_loss_is_the_models(start, tmp_path, labels, trainer_class):
    """The trainer counts the labels before the model masks the placeholders in them, where stock collators copy the ids."""
    processor = MFRSVLMProcessor.from_pretrained(start[0])
    own = ConversationCollator(processor)

    def collate(samples):
        batch = own(samples)
        assert not (batch["labels"] == processor.image_token_id).any()
        if labels == "a copy of the ids":
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch

    dataset = ConversationDataset(start[1] / "train.json", start[1], encode=own.encode)
    model = MFRSVLMForConditionalGeneration.from_pretrained(start[0])
    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "remove_unused_columns": False}
    args = MFRSVLMTrainingArguments(
        str(tmp_path), per_device_eval_batch_size=len(dataset), per_device_train_batch_size=6, logging_steps=1,
        max_steps=1, learning_rate=0.0, gradient_accumulation_steps=2, save_strategy="no", **options,
    )  # fmt: skip
    trainer = trainer_class(model, args, data_collator=collate, train_dataset=dataset, eval_dataset=dataset)
    batch = collate(list(dataset))
    with torch.no_grad():
        outputs = model.eval()(**batch)
    words = batch["labels"][:, 1:].masked_fill(batch["labels"][:, 1:] == processor.image_token_id, -100)
    expected = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), words.flatten()).item()
    assert outputs.loss.item() == pytest.approx(expected, abs=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)
    # The model, told how many labels there are, makes the same of it.
    items = int((batch["labels"][:, 1:] != -100).sum())
    with torch.no_grad():
        assert model(**batch, num_items_in_batch=torch.tensor(items)).loss.item() == pytest.approx(expected, abs=1e-5)
    if labels == "answers only":  # one step of two halves, each of which has its share of the step's labels
        trainer.train()
        (logged,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert logged == pytest.approx(expected, abs=1e-4)


# Adapters


@pytest.mark.integration
def test_adapter_trains_the_decoder_and_loads_and_merges(start, tmp_path):
    from peft import PeftModel

    trainer = main([str(write_config(start, tmp_path, lora=True, lora_r=4, max_steps=3))])
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    kinds = {re.sub(r".*(lora_[AB]|modules_to_save).*", r"\1", name) for name in trained}
    assert kinds == {"lora_A", "lora_B", "modules_to_save"}
    assert {part_of(name) for name in trained} == {"decoder", "injectors", "projector"}
    adapted = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in trained if "lora_" in name}
    layer = {f"self_attn.{n}_proj" for n in "qkvo"} | {f"mlp.{n}_proj" for n in ("gate", "up", "down")}
    assert adapted == {f"model.language_model.layers.{i}.{name}" for i in range(4) for name in layer}
    # The copies that PEFT trains are those that the decoder runs through.
    injectors = trainer.model.base_model.model.model.injectors
    scales = [(module.original_module.residual_scale, module.residual_scale) for module in injectors]
    assert len(scales) == 2 and not any(torch.equal(before, after) for before, after in scales)

    image = start[1] / "1.png"
    expected = logits_of(trainer.model, trainer.processing_class, image)
    base = MFRSVLMForConditionalGeneration.from_pretrained(start[0])
    assert not torch.allclose(logits_of(base, trainer.processing_class, image), expected, atol=1e-3)
    adapter = PeftModel.from_pretrained(base, tmp_path / "run")
    assert torch.allclose(logits_of(adapter, trainer.processing_class, image), expected, atol=1e-5)
    merged = adapter.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = MFRSVLMForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits_of(loaded, trainer.processing_class, image), expected, atol=1e-4)


@pytest.mark.integration
def test_adapter_of_a_model_with_a_backbone(start, tmp_path):
    """Its projections of stages are trained whole, one by one, and so are the places of its visual tokens."""
    from peft import PeftModel

    folder = tiny_folder(tmp_path / "resnet", vision="resnet", visual_position_embeddings=True)
    trainer = main([str(write_config((folder, start[1]), tmp_path, lora=True, lora_r=4, max_steps=2))])
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert any("stage_projections.4.modules_to_save" in name for name in trained)
    assert any("visual_position_embedding.modules_to_save" in name for name in trained)
    expected = logits_of(trainer.model, trainer.processing_class, start[1] / "1.png")
    adapter = PeftModel.from_pretrained(MFRSVLMForConditionalGeneration.from_pretrained(folder), tmp_path / "run")
    for model in (adapter, adapter.merge_and_unload()):
        found = logits_of(model, trainer.processing_class, start[1] / "1.png")
        assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.integration
def test_adapter_can_be_merged_at_the_end(start, tmp_path):
    config = write_config(start, tmp_path, lora=True, lora_merge=True, max_steps=2, lora_dropout=0.0)
    trainer = main([str(config)])
    assert not (tmp_path / "run" / "adapter_config.json").exists()
    image = start[1] / "1.png"
    merged = MFRSVLMForConditionalGeneration.from_pretrained(tmp_path / "run")
    assert torch.allclose(
        logits_of(merged, trainer.processing_class, image),
        logits_of(trainer.model, trainer.processing_class, image),
        atol=1e-5,
    )


@pytest.mark.integration
def test_adapter_and_freezing_that_disagree_are_refused(start, tmp_path):
    with pytest.raises(ValueError, match=r"decoder is to be frozen, but the adapter would train .*lora_A"):
        main([str(write_config(start, tmp_path, lora=True, freeze_decoder=True))])
    trainer = main([str(write_config(start, tmp_path, lora=True, freeze_injectors=True, max_steps=1))])
    trained = {part_of(name) for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained == {"decoder", "projector"}


# Checkpoints


KILLED = """
import os, signal, sys
import torch
from mfrsvlm.training.finetune import main

torch.set_num_threads(1)
save, calls = torch.save, []


def save_until_the_second(content, path, *args, **kwargs):
    if str(path).endswith("optimizer.pt"):
        calls.append(path)
        if len(calls) == 2:
            open(path, "wb").write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    save(content, path, *args, **kwargs)


torch.save = save_until_the_second
main(sys.argv[1:])
"""


@pytest.mark.integration
def test_run_killed_while_saving_goes_on_from_the_last_whole_checkpoint(whole_run, start, tmp_path):
    config = write_config(start, tmp_path, eval_file=str(start[1] / "train.json"), eval_strategy="epoch", save_total_limit=1)
    result = subprocess.run([sys.executable, "-c", KILLED, str(config)], capture_output=True, text=True, timeout=600)
    assert result.returncode == -signal.SIGKILL, result.stderr[-2000:]
    run = tmp_path / "run"
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["_unfinished", "checkpoint-3"]
    with pytest.raises(ValueError, match=r"contains checkpoints of another run .*checkpoint-3"):
        main([str(config), "--overwrite_output_dir"])
    trainer = main([str(config), "--resume_from_checkpoint", "last"])
    assert trainer.state.global_step == 12
    assert same(weights(run), weights(whole_run[1]))
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["checkpoint-12"]


@pytest.mark.integration
def test_full_disk_is_an_error_that_names_the_folder_and_spares_the_last_checkpoint(start, tmp_path, monkeypatch):
    """A limit on the size of files stands for the disk: it holds the weights, but not the optimizer's state."""
    config = write_config(start, tmp_path)
    room = 3 * (start[0] / "model.safetensors").stat().st_size // 2
    save = MFRSVLMTrainer._save_checkpoint

    def save_on_a_small_disk(self, *args):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if self.state.global_step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            save(self, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch, pytest.raises((OSError, RuntimeError)) as error:
        patch.setattr(MFRSVLMTrainer, "_save_checkpoint", save_on_a_small_disk)
        main([str(config)])
    (note,) = error.value.__notes__
    run = tmp_path / "run"
    assert "checkpoint-6 could not be saved" in note and f"GiB are free in {run}" in note
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-3"]
    assert main([str(config), "--resume_from_checkpoint", "last"]).state.global_step == 12
    assert not (run / "_unfinished").exists()


@pytest.mark.integration
def test_best_checkpoint_is_known_by_its_final_name(start, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    trainer = main([str(write_config(start, tmp_path, eval_file=str(start[1] / "train.json"), **options))])
    best = tmp_path / "run" / f"checkpoint-{trainer.state.best_global_step}"
    assert trainer.state.best_model_checkpoint == str(best)
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)


@pytest.mark.integration
def test_output_folder_is_not_overwritten_unasked(start, tmp_path):
    config = write_config(start, tmp_path, max_steps=1, save_strategy="no")
    (tmp_path / "run").mkdir()
    precious = tmp_path / "run" / "precious.txt"
    precious.write_text("mine")
    with pytest.raises(ValueError, match=r"not empty \(1 entries, such as precious.txt\)"):
        main([str(config)])
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        main([str(config), "--resume_from_checkpoint", "last"])
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        main([str(config), "--resume_from_checkpoint", str(tmp_path)])
    main([str(config), "--overwrite_output_dir"])
    assert precious.read_text() == "mine" and (tmp_path / "run" / "model.safetensors").exists()


# Configs


@pytest.mark.parametrize("name", ["stage1_alignment", "stage2_instruction", "lora"])
def test_ready_configs(name, tmp_path):
    options, data, args = ConfigParser().read(CONFIGS / f"{name}.yaml", ["--bf16", "false", "--output_dir", str(tmp_path)])
    assert (args.lr_scheduler_type, args.warmup_steps, args.weight_decay, args.num_train_epochs) == ("cosine", 0.03, 0, 1)
    assert data.max_length == 2048 and yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["bf16"] is True
    if options.lora:
        assert args.frozen_parts == ["vision_tower"]
        return
    assert {args.learning_rate_of(part) for part in PARTS} == {2e-5} and args.frozen_parts == []
    assert (data.template, data.prompt_version) == (("plain", None) if name == "stage1_alignment" else ("chat", "v1"))


def test_unknown_keys_name_the_closest(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("learning_rat: 1")
    with pytest.raises(ValueError, match=r"config.yaml: unknown key 'learning_rat'. Did you mean 'learning_rate'"):
        ConfigParser().read(path, [])
    path.write_text("learning_rate: 2e-5")
    with pytest.raises(ValueError, match=r"command line: unknown key 'freeze_decode'. Did you mean 'freeze_decoder'"):
        ConfigParser().read(path, ["--freeze_decode", "true"])


def test_data_of_the_command_line_replace_those_of_the_file(tmp_path):
    base = ["--output_dir", str(tmp_path), "--bf16", "false"]
    _, data, _ = ConfigParser().read(CONFIGS / "lora.yaml", [*base, "--dataset_name=a/b"])
    assert (data.train_file, data.image_root, data.dataset_name) == (None, None, "a/b")
    path = tmp_path / "config.yaml"
    path.write_text(f"output_dir: {tmp_path}\ndataset_name: a/b\ndataset_streaming: true")
    _, data, _ = ConfigParser().read(path, ["--train_file", "a.json"])
    assert (data.train_file, data.dataset_name, data.dataset_streaming) == ("a.json", None, False)


def test_values_are_checked_and_the_command_line_goes_first(tmp_path):
    path = tmp_path / "config.yaml"
    base = f"output_dir: {tmp_path}\nuse_cpu: true\n"
    path.write_text(
        base + "learning_rate: 2e-5\nlr_scheduler_kwargs: {num_cycles: 1}\nlora_target_modules: [q_proj, v_proj]"
    )
    options, _, args = ConfigParser().read(path, ["--max_steps=-1", "--freeze_decoder", "--seed", "7"])
    assert (args.learning_rate, args.seed, args.freeze_decoder, args.max_steps) == (2e-5, 7, True, -1)
    assert options.lora_target_modules == ["q_proj", "v_proj"] and args.lr_scheduler_kwargs == {"num_cycles": 1}
    for text, reason in {
        "learning_rate: fast": "learning_rate.*invalid float value: 'fast'",
        "on_bad_row: ignore": "invalid choice: 'ignore'",
        "a: [": "not YAML",
        "- 1": "contains a list",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=reason):
            ConfigParser().read(path, [])


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
        ({"train_file": None}, "train_file is missing"),
        ({"eval_strategy": "epoch"}, "needs an eval_file"),
        ({"lora_merge": True}, "needs lora=true"),
    ],
)
def test_settings_that_make_no_sense(start, tmp_path, changes, reason):
    with pytest.raises(ValueError, match=reason):
        main([str(write_config(start, tmp_path, **changes))])


# Publishing

PUSH = """
import sys
import torch
from mfrsvlm.training.finetune import main

torch.set_num_threads(1)
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_push_sends_model_processor_code_and_card(start, tmp_path):
    options = {"push_to_hub": True, "hub_model_id": "author/tuned", "num_train_epochs": 1, "hub_strategy": "every_save"}
    options |= {"base_model": "author/MF-RSVLM", "card_datasets": ["author/data"]}
    config = write_config(start, tmp_path, **options)
    with HubServer() as hub:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_TOKEN": "hf_none", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-c", PUSH, str(config)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr[-3000:]
        assert hub.unsupported == []
        files = hub.files("author/tuned")
        commits = hub.repositories["author/tuned"].commits
        during = [files for files in list(commits.values())[1:-1] if "model.safetensors" in files]
        for each in during:
            for name, entry in json.loads(each["checksums.json"]).items():
                assert entry["sha256"] == hashlib.sha256(each[name]).hexdigest(), name
        assert during and all(CODE | {"README.md", "processor_config.json"} <= each.keys() for each in during)
        environment |= {"HF_HUB_OFFLINE": "0", "PYTHONPATH": ""}
        seen = load_elsewhere("author/tuned", start[1] / "1.png", tmp_path, **environment)
    assert not [name for name in files if name.startswith(("_", "checkpoint-"))]
    card = files["README.md"].decode()
    for text in ("base_model: author/MF-RSVLM", "- author/data", "# tuned", "mfrsvlm", "trained with this package"):
        assert text in card, text
    model = MFRSVLMForConditionalGeneration.from_pretrained(tmp_path / "run")
    processor = MFRSVLMProcessor.from_pretrained(tmp_path / "run")
    assert torch.allclose(seen, logits_of(model, processor, start[1] / "1.png"), atol=1e-5)


@pytest.mark.parametrize(("cpu", "warned"), [("AVX2", True), ("AVX512", False)])
def test_bfloat16_on_a_cpu_that_emulates_it_is_warned_of(tmp_path, monkeypatch, caplog, cpu, warned):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cpu)
    args = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    MFRSVLMTrainer(model=tiny_model(), args=MFRSVLMTrainingArguments(bf16=False, **args))
    assert "Pass --bf16 false" not in caplog.text
    MFRSVLMTrainer(model=tiny_model(), args=MFRSVLMTrainingArguments(bf16=True, **args))
    assert ("Pass --bf16 false" in caplog.text) == warned
