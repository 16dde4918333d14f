"""What a model folder is: every kind is recognized, loaded to the same numbers, or rejected with what to do."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_training import tiny_folder

from mfrsvlm import MFRSVLMForConditionalGeneration, MFRSVLMProcessor
from mfrsvlm.checksums_mfrsvlm import CHECKSUMS
from mfrsvlm.files.model_folder import ModelFolderError, classify, load_model, load_processor, problems_of
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
    """A copy without checksums, so that changes are found by their effects."""
    return shutil.copytree(whole, tmp_path / "copy", ignore=shutil.ignore_patterns(CHECKSUMS))


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
        (
            lambda t: t["lm_head.weight"].view(-1)[7:8].fill_(math.nan),
            "1 tensors of .* hold NaN or infinity: lm_head.weight",
        ),
        (lambda t: t["lm_head.weight"].view(-1)[7:8].fill_(-math.inf), "hold NaN or infinity: lm_head.weight"),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"].half()}),
            "dtype=float32, but 1 tensors are of another type: lm_head.weight float16",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(whole, copy, change, named, caplog):
    change_weights(copy, change)
    with pytest.raises(ModelFolderError, match=named):
        load_model(copy)
    model, _ = load_model(copy, allow_incomplete=True)
    assert re.search(named, " ".join(problems_of(model)))
    assert [record.message for record in caplog.records if record.name.endswith("model_folder")] == problems_of(model)
    assert problems_of(load_model(whole)[0]) == []


def test_a_type_in_the_config_that_is_not_that_of_the_file(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    with pytest.raises(
        ModelFolderError, match=r"has dtype=bfloat16, but 132 tensors are of another type: lm_head.weight float32"
    ):
        load_model(copy)
    assert load_model(copy, allow_incomplete=True)[0].dtype == torch.bfloat16


def test_values_near_the_largest_are_finite(copy):
    change_weights(copy, lambda tensors: tensors["lm_head.weight"].fill_(torch.finfo(torch.float32).max))
    load_model(copy)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("model.safetensors", b"", "model of .* cannot be loaded"),
        ("model.safetensors", b"\xff" * 90, "model of .* cannot be loaded"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "gone.safetensors"}}', "Remove the other one"),
        ("config.json", b'{"model_type": "mfrsvlm", "text_config": 3}', "model of .* cannot be loaded"),
        ("generation_config.json", b"{", r"generation_config\.json is not JSON"),
        ("tokenizer.json", b"{}", "processor of .* cannot be loaded"),
        ("tokenizer.json", b"null", r"tokenizer\.json holds a NoneType"),
        ("tokenizer.json", None, "The tokenizer of .* as id of <image>"),
        ("tokenizer_config.json", b"[]", r"tokenizer_config\.json holds a list"),
        ("processor_config.json", b'{"image_processor": {"image_mean": "x"}}', "processor of .* cannot be loaded"),
    ],
)
def test_a_damaged_file_is_one_line(copy, name, content, named):
    (copy / name).unlink(missing_ok=True)
    if content is not None:
        (copy / name).write_bytes(content)
    with pytest.raises(ModelFolderError, match=named) as caught:
        load_model(copy)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_a_lost_shard_is_named(copy):
    MFRSVLMForConditionalGeneration.from_pretrained(copy).save_pretrained(copy, max_shard_size=100_000)
    (copy / CHECKSUMS).unlink()
    (copy / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(ModelFolderError, match=r"lacks shards that its .* names: model-00002-of-00004\.safetensors"):
        load_model(copy)


@pytest.mark.parametrize("absolute", [False, True])
def test_an_index_names_files_beside_it_only(whole, copy, absolute):
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    shard = str(whole / "model.safetensors") if absolute else f"../../{whole.parent.name}/model/model.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(whole / "model.safetensors"), shard)}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFolderError, match=r"names what is no file beside it: .*/model\.safetensors"):
        load_model(copy)


def test_an_adapter_that_is_damaged(adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[next(name for name in tensors if "lora_A" in name)][0] = math.nan
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ModelFolderError, match=rf"tensors of {folder} hold NaN or infinity: .*lora_A"):
        load_model(folder)
    assert "NaN" in problems_of(load_model(folder, allow_incomplete=True)[0])[0]
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(ModelFolderError, match=r"adapter of .* cannot be loaded"):
        load_model(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    for change in ({"base_model_name_or_path": [1]}, {"peft_type": "NONE"}, {"r": "x"}):
        (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ModelFolderError):
            load_model(folder)


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        (
            "processor_config.json",
            lambda c: c["image_processor"].update(crop_size={"height": 56, "width": 56}, size={"shortest_edge": 56}),
            "makes 64 visual tokens an image, but the model 16",
        ),
        (
            "tokenizer.json",
            lambda c: c["added_tokens"].append({**c["added_tokens"][-1], "id": 9999, "content": "<x>"}),
            "ids up",
        ),
    ],
)
def test_a_processor_that_does_not_fit_is_named(copy, file, change, named):
    content = json.loads((copy / file).read_text())
    change(content)
    (copy / file).write_text(json.dumps(content))
    for name in copy.glob("*checksums.json"):
        name.unlink()
    with pytest.raises(ModelFolderError, match=named):
        load_model(copy)
