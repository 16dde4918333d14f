"""Fine-tuning that learns nothing returns the model that it started from, whatever its kind and the settings."""

import json
import logging
import shutil

import datasets
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_training import llava_row, tiny_folder, write_data

from mfrsvlm import MFRSVLMForConditionalGeneration
from mfrsvlm.evaluation.answering import load
from mfrsvlm.files.model_folder import ModelFolderError, load_model
from mfrsvlm.output_folders import locked
from mfrsvlm.training.finetune import DECODER_LINEARS, main, run
from mfrsvlm.training.trainer import SettingsError


pytestmark = pytest.mark.integration

SETTINGS = {
    "whole": {},
    "bf16": {"bf16": True},
    "frozen": {"freeze_vision_tower": True, "freeze_decoder": True},
    "checkpointed": {"gradient_checkpointing": True},
    "low precision": {"dtype": "bfloat16", "bf16": True},
    "lora": {"lora": True, "lora_r": 2},
    "lora, frozen": {"lora": True, "lora_r": 2, "freeze_injectors": True, "freeze_projector": True},
    "lora, low precision": {"lora": True, "lora_r": 2, "dtype": "bfloat16", "bf16": True},
    "lora, merged": {"lora": True, "lora_r": 2, "lora_merge": True},
    "lora, merged, low precision": {"lora": True, "lora_r": 2, "lora_merge": True, "dtype": "bfloat16", "bf16": True},
}
# What is rejected before training, and what the message says.
REJECTED = {
    ("whole", "low precision"): "would round the float32 weights",
    ("whole", "lora, merged, low precision"): "would round the float32 weights",
    ("checkpoint", "low precision"): "would round the float32 weights",
    ("checkpoint", "lora, merged, low precision"): "would round the float32 weights",
    ("adapter", "low precision"): "would round the float32 weights",
    ("adapter", "lora"): "is an adapter",
    ("adapter", "lora, frozen"): "is an adapter",
    ("adapter", "lora, low precision"): "is an adapter",
    ("adapter", "lora, merged, low precision"): "would round the float32 weights",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("starts")
    whole = tiny_folder(folder / "whole")
    backbone = tiny_folder(folder / "half", vision="resnet")
    MFRSVLMForConditionalGeneration.from_pretrained(backbone, dtype="bfloat16").save_pretrained(backbone)
    shutil.copytree(whole, folder / "checkpoint-3")
    (folder / "checkpoint-3" / "trainer_state.json").write_text("{}")
    torch.manual_seed(0)
    config = LoraConfig(target_modules=DECODER_LINEARS, modules_to_save=["injectors.0"], r=2, init_lora_weights=False)
    get_peft_model(MFRSVLMForConditionalGeneration.from_pretrained(whole), config).save_pretrained(folder / "adapter")
    return {"whole": whole, "half": folder / "half", "checkpoint": folder / "checkpoint-3", "adapter": folder / "adapter"}


def write_config(start, data, folder, **changes):
    values = {
        "model_name_or_path": str(start),
        "train_file": str(data / "train.json"),
        "image_root": str(data),
        "output_dir": str(folder / "run"),
        "learning_rate": 0.0,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "weight_decay": 0.1,
        "save_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}))
    return str(path)


@pytest.mark.parametrize("kind", ["whole", "half", "checkpoint", "adapter"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_nothing_learned_is_the_model_from_before(kind, settings, starts, data, tmp_path):
    config = write_config(starts[kind], data, tmp_path, **SETTINGS[settings])
    if (kind, settings) in REJECTED:
        with pytest.raises(SettingsError, match=REJECTED[kind, settings]):
            main([config])
        assert not (tmp_path / "run").exists()
        return
    main([config])
    before, processor = load_model(starts[kind], dtype="float32")
    expected = before.state_dict()
    for result in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        if "merged" in settings and result.name == "checkpoint-1":
            continue  # the adapter alone, whose base has no name yet
        after, own = load_model(result, dtype="float32")
        state = after.state_dict()
        assert state.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(state[name], expected[name])] == []
        image = Image.open(data / "1.png")
        inputs = [p(image, "USER: <image>\nIs there a river? ASSISTANT:", return_tensors="pt") for p in (processor, own)]
        assert all(torch.equal(inputs[0][name], inputs[1][name]) for name in inputs[0])
    load(str(tmp_path / "run"))


def test_other_models_and_the_released_layout_are_rejected_in_a_line(starts, data, tmp_path, reference, capsys):
    with pytest.raises(ModelFolderError, match=r"mfrsvlm convert released"):
        main([write_config(reference / "checkpoint", data, tmp_path)])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llava"}')
    (tmp_path / "other" / "model.safetensors").touch()
    with pytest.raises(SettingsError, match="is a llava, but only an MF-RSVLM"):
        main([write_config(tmp_path / "other", data, tmp_path)])
    assert run([write_config(tmp_path / "none", data, tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {tmp_path / 'none'} is no folder")


def test_a_missing_extra_is_said_with_what_to_install(starts, data, tmp_path, capsys, monkeypatch):
    def parse(parser, words):
        raise ImportError("The Trainer requires accelerate:\nrun pip")

    monkeypatch.setattr("mfrsvlm.training.finetune.find_spec", lambda name: None)
    monkeypatch.setattr("mfrsvlm.training.finetune.ConfigParser.parse_args_into_dataclasses", parse)
    assert run([write_config(starts["whole"], data, tmp_path)]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert (
        line
        == "error: The Trainer requires accelerate: run pip. Install what training needs: pip install 'mfrsvlm[training]'"
    )


def test_files_that_are_no_settings_and_no_rows_are_rejected_in_a_line(starts, data, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("# A page\n")
    good = write_config(starts["whole"], data, tmp_path)
    for arguments in (
        [str(data)],
        [str(tmp_path / "none.yaml")],
        [good, "--train_file", str(data)],
        [good, "--train_file", str(page)],
        [good, "--train_file", str(tmp_path / "none.json")],
    ):
        assert run(arguments) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: ") and arguments[-1] in line


def test_a_finished_training_is_not_trained_again(starts, data, tmp_path, caplog, monkeypatch):
    config = write_config(starts["whole"], data, tmp_path, learning_rate=1e-3)
    main([config])
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    logging.getLogger("mfrsvlm").propagate = True
    with caplog.at_level(logging.INFO, "mfrsvlm"):
        assert main([config, "--resume_from_checkpoint", "last"]) is None
    assert any("Nothing to do: training ended" in record.message for record in caplog.records)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    # The result was not saved, or more is asked for.
    (tmp_path / "run" / "train_results.json").unlink()
    (tmp_path / "run" / "model.safetensors").unlink()
    assert main([config, "--resume_from_checkpoint", "last"]).state.global_step == 1
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    assert main([config, "--resume_from_checkpoint", "last", "--max_steps", "2"]).state.global_step == 2


def test_an_incomplete_start_is_trained_only_if_asked_and_the_card_says_so(data, tmp_path, capsys):
    start = tiny_folder(tmp_path / "start")
    tensors = load_file(start / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "injectors" not in n}, start / "model.safetensors", {"format": "pt"})
    (start / "checksums.json").unlink()
    config = write_config(start, data, tmp_path)
    assert run([config]) == 1
    assert "tensors are missing: model.injectors.0" in capsys.readouterr().err.splitlines()[-1]
    assert run([config, "--allow_incomplete", "true"]) == 0
    card = (tmp_path / "run" / "README.md").read_text()
    assert "was incomplete" in card and "tensors are missing: model.injectors.0" in card
    load_model(tmp_path / "run")


def test_two_trainings_to_one_folder(starts, data, tmp_path, capsys):
    with locked(tmp_path / "run"):
        assert run([write_config(starts["whole"], data, tmp_path)]) == 1
    assert f"{tmp_path / 'run'} is being written by another run" in capsys.readouterr().err.splitlines()[-1]


def test_a_flipped_byte_of_a_trained_adapter_is_found(starts, data, tmp_path):
    main([write_config(starts["whole"], data, tmp_path, **SETTINGS["lora"])])
    load_model(tmp_path / "run")
    path = tmp_path / "run" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelFolderError, match=r"adapter_model\.safetensors has another content than was saved"):
        load_model(tmp_path / "run")


# Datasets by name

FEATURES = {"messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})}
CHAT = [{"role": "user", "content": "Is there a river?"}, {"role": "assistant", "content": "Yes, a wide river."}]


@pytest.fixture(scope="module")
def parquet(data, tmp_path_factory):
    """A folder as the Hub has them, of two splits with images inside."""
    folder = tmp_path_factory.mktemp("parquet") / "data"
    folder.mkdir()
    features = datasets.Features({**FEATURES, "images": datasets.List(datasets.Image())})
    for split, count in {"train": 6, "test": 2}.items():
        rows = [
            {"messages": CHAT, "images": [{"bytes": (data / f"{i}.png").read_bytes(), "path": None}]} for i in range(count)
        ]
        datasets.Dataset.from_list(rows, features).to_parquet(folder / f"{split}.parquet")
    return folder


NAMED = {"train_file": None, "image_root": None}


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_by_name(streaming, starts, data, parquet, tmp_path):
    changes = {"dataset_name": str(parquet), "dataset_streaming": streaming, "eval_strategy": "steps", "eval_steps": 2}
    changes |= {"learning_rate": 5e-3, "max_steps": 6, "logging_steps": 1, "save_strategy": "no", **NAMED}
    trainer = main([write_config(starts["whole"], data, tmp_path, **changes)])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.3
    assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) >= 3
    assert json.loads((tmp_path / "run" / "eval_results.json").read_text())["bad_rows"] == 0
    assert "datasets:" not in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dataset_streaming": True, "max_steps": -1}, "dataset_streaming=true needs max_steps"),
        ({"dataset_train_split": "validation"}, r"has no split 'validation', but 'test', 'train'|but 'train', 'test'"),
        ({"dataset_name": "no/such-data"}, "dataset_name=no/such-data cannot be loaded"),
        ({"train_file": "rows.json"}, "name only one of them"),
        ({"dataset_name": None}, "train_file is missing"),
        ({"dataset_name": None, "train_file": "a.json", "dataset_streaming": True}, "needs a dataset_name"),
    ],
)
def test_datasets_that_cannot_be_had(changes, reason, starts, data, parquet, tmp_path):
    with pytest.raises(SettingsError, match=reason):
        main([write_config(starts["whole"], data, tmp_path, **{"dataset_name": str(parquet), **NAMED, **changes})])
    assert not (tmp_path / "run").exists()


def test_rows_of_a_folder_name_files_in_it(starts, data, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(data / "1.png", tmp_path / "outside.png")
    rows = [llava_row(index) for index in range(4)]
    for row in rows:
        shutil.copy(data / row["image"], folder)
    changes = {"dataset_name": str(folder), "save_strategy": "no", **NAMED}
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main([write_config(starts["whole"], data, tmp_path, **changes)]).state.global_step == 1
    (folder / "train.jsonl").write_text(json.dumps({**rows[0], "image": "../outside.png"}))
    changes["output_dir"] = str(tmp_path / "other")
    with pytest.raises(ValueError, match="only files in there"):
        main([write_config(starts["whole"], data, tmp_path, **changes)])
