"""What a model folder is: every kind is recognized, loaded to the same numbers, or rejected with what to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_training import tiny_folder

from mfrsvlm import MFRSVLMForConditionalGeneration, MFRSVLMProcessor
from mfrsvlm.files.model_folder import ModelFolderError, classify, load_model, load_processor
from mfrsvlm.training.finetune import DECODER_LINEARS


REFERENCE = Path(__file__).parents[1] / "reference"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture(scope="module")
def adapter(whole, tmp_path_factory):
    """An adapter that changes the model, as PEFT alone saves it."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    torch.manual_seed(0)
    config = LoraConfig(target_modules=DECODER_LINEARS, modules_to_save=["injectors.0"], r=2, init_lora_weights=False)
    get_peft_model(MFRSVLMForConditionalGeneration.from_pretrained(whole), config).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def same_weights(model, other):
    first, second = model.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_kinds(whole, adapter, tmp_path):
    assert classify(whole).kind == "full" and not classify(whole).is_checkpoint
    assert (classify(adapter).kind, classify(adapter).base) == ("adapter", str(whole))
    assert classify(REFERENCE / "checkpoint").kind == "released"
    checkpoint = shutil.copytree(whole, tmp_path / "checkpoint-3")
    (checkpoint / "trainer_state.json").write_text("{}")
    assert classify(checkpoint).kind == "full" and classify(checkpoint).is_checkpoint
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "config.json").write_text('{"model_type": "llava"}')
    (tmp_path / "llava" / "model.safetensors").touch()
    assert classify(tmp_path / "llava").kind == "other"


def test_what_is_no_model_folder_is_said_with_what_to_do(copy, tmp_path):
    with pytest.raises(ModelFolderError, match=r"no/such is no folder, and no model of that name"):
        classify("no/such")
    with pytest.raises(ModelFolderError, match=r"config\.json is a file\. Name the folder"):
        classify(copy / "config.json")  # and does not look for it on the Hub
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(ModelFolderError, match=r"has no config\.json.*checkpoint-3"):
        classify(tmp_path / "run")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelFolderError, match="no weights"):
        classify(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelFolderError, match=r"config\.json is not JSON"):
        classify(copy)
    (copy / "config.json").write_text("[]")
    with pytest.raises(ModelFolderError, match="holds a list"):
        classify(copy)
    for load in (load_model, load_processor):
        with pytest.raises(ModelFolderError, match=r"released layout.*mfrsvlm convert released"):
            load(REFERENCE / "checkpoint")


def test_a_whole_model_loads_as_it_was_saved(whole, tmp_path):
    model, processor = load_model(whole)
    assert same_weights(model, MFRSVLMForConditionalGeneration.from_pretrained(whole)) and not model.training
    assert isinstance(processor, MFRSVLMProcessor)
    assert load_model(whole, dtype="bfloat16")[0].dtype == torch.bfloat16
    checkpoint = tmp_path / "run" / "checkpoint-3"  # its processor lies beside it
    shutil.copytree(whole, checkpoint)
    (checkpoint / "trainer_state.json").write_text("{}")
    (checkpoint / "processor_config.json").unlink()
    processor.save_pretrained(tmp_path / "run")
    assert same_weights(load_model(checkpoint)[0], model)


def test_an_adapter_loads_on_its_base(whole, adapter, copy, tmp_path):
    expected = PeftModel.from_pretrained(MFRSVLMForConditionalGeneration.from_pretrained(whole), adapter).merge_and_unload()
    model, processor = load_model(adapter)
    assert same_weights(model, expected) and isinstance(processor, MFRSVLMProcessor)
    assert not same_weights(model, load_model(whole)[0])

    moved = shutil.copytree(adapter, tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "gone/base"}))
    for load in (load_model, load_processor):
        with pytest.raises(ModelFolderError, match=r"moved is an adapter, and its base model cannot be loaded: gone/base"):
            load(moved)
    assert same_weights(load_model(moved, base_model=str(copy))[0], expected)
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ModelFolderError, match="names no base model"):
        load_model(moved)

    other = tiny_folder(tmp_path / "other", injection_layers=[1])
    with pytest.raises(ModelFolderError, match="does not fit its base model"):
        load_model(shutil.copytree(wider_adapter(tmp_path, other), tmp_path / "copied"), base_model=str(whole))


def wider_adapter(tmp_path, base):
    """An adapter of a decoder layer that the whole model does not have."""
    config = LoraConfig(target_modules=DECODER_LINEARS, r=2)
    model = get_peft_model(MFRSVLMForConditionalGeneration.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "wider")
    tensors = load_file(tmp_path / "wider" / "adapter_model.safetensors")
    tensors = {name.replace(".layers.3.", ".layers.9."): value for name, value in tensors.items()}
    save_file(tensors, tmp_path / "wider" / "adapter_model.safetensors")
    return tmp_path / "wider"


def test_an_adapter_with_lost_weights_is_rejected(adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "lost")
    tensors = load_file(folder / "adapter_model.safetensors")
    lost = next(name for name in tensors if "lora_B" in name)
    save_file({name: value for name, value in tensors.items() if name != lost}, folder / "adapter_model.safetensors")
    with pytest.raises(ModelFolderError, match="does not fit its base model"):
        load_model(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelFolderError, match=r"no adapter_model\.safetensors"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("model.injectors.0.residual_scale"), "1 tensors are missing: model.injectors.0.residual_scale"),
        (lambda t: t.update({"model.spare": torch.ones(2)}), "1 tensors are unknown to the model: model.spare"),
        (lambda t: t.update({"lm_head.weight": torch.ones(3, 4)}), r"of another shape: lm_head.weight \(3, 4\) instead of"),
        (lambda t: [t.pop(n) for n in list(t) if ".layers.1.mlp" in n], r"tensors are missing: .*layers.1.mlp"),
    ],
)
def test_weights_that_do_not_fit_are_named(copy, change, named, caplog):
    change_weights(copy, change)
    with pytest.raises(ModelFolderError, match=named):
        load_model(copy)
    assert load_model(copy, allow_incomplete=True)
    assert any("do not fit its config.json" in record.message for record in caplog.records)
