"""Checksums of a model folder: written by every save, and a changed byte is never silently another model."""

import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from tiny_training import tiny_folder

from mfrsvlm import MFRSVLMForConditionalGeneration, MFRSVLMProcessor
from mfrsvlm.checksums_mfrsvlm import CHECKSUMS, INDEX, WEIGHTS, read_checksums, update_checksums
from mfrsvlm.demo import MODEL
from mfrsvlm.files.model_folder import ModelFolderError, load_model, load_processor


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def listed(folder):
    return read_checksums(folder / CHECKSUMS)


def loaded_parts(folder):
    """All that decides what a loaded folder answers."""
    model, processor = load_model(folder)
    settings = [model.config.to_dict(), model.generation_config.to_dict(), processor.to_dict(), processor.chat_template]
    for part in settings[:1]:
        part.pop("_name_or_path", None)
    ids = processor.tokenizer("USER: <image>\nWhat is this? ASSISTANT:")["input_ids"]
    return json.dumps(settings, default=str, sort_keys=True), ids, model.state_dict()


def test_the_list_is_that_of_another_tool(whole):
    entries = listed(whole)
    saved = {path.name for path in whole.iterdir() if path.suffix not in (".py", ".md")} - {CHECKSUMS}
    assert entries.keys() == saved and {"config.json", WEIGHTS, "tokenizer.json", "chat_template.jinja"} <= saved
    for name, entry in entries.items():
        content = (whole / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_the_small_model_has_a_whole_list():
    entries = listed(Path(MODEL))
    assert {WEIGHTS, "config.json", "generation_config.json", "processor_config.json", "tokenizer.json"} <= entries.keys()
    load_processor(MODEL)


def test_each_save_knows_its_own_files_only(whole, tmp_path):
    model, processor = load_model(whole)
    model.save_pretrained(tmp_path / "model")
    assert listed(tmp_path / "model").keys() == {"config.json", "generation_config.json", WEIGHTS}
    processor.save_pretrained(tmp_path / "processor")
    assert not {"config.json", "generation_config.json", WEIGHTS} & listed(tmp_path / "processor").keys()
    # Two pushes to one repository: the second list replaces the first, and the files without an entry still load.
    both = shutil.copytree(tmp_path / "model", tmp_path / "both")
    shutil.copytree(tmp_path / "processor", both, dirs_exist_ok=True)
    load_model(both)
    processor.save_pretrained(tmp_path / "model")
    assert listed(tmp_path / "model").keys() == listed(whole).keys()


def test_a_save_keeps_foreign_entries_and_drops_those_of_lost_files(copy):
    lines = {**listed(copy), "gone.model": {"size": 1, "sha256": "0"}, WEIGHTS: {"size": 7, "sha256": "00"}}
    (copy / CHECKSUMS).write_text(json.dumps(lines))
    MFRSVLMProcessor.from_pretrained(copy).save_pretrained(copy)
    assert "gone.model" not in listed(copy) and listed(copy)[WEIGHTS]["size"] == 7
    (copy / CHECKSUMS).write_text("{")  # damaged: replaced, and no reason to lose a trained model
    tiny_model().save_pretrained(copy)
    assert WEIGHTS in listed(copy)


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_byte_is_found_in_every_file(whole, tmp_path, seed):
    expected = loaded_parts(whole)
    draw = random.Random(seed)
    for path in sorted(whole.iterdir()):
        if path.suffix == ".py":
            continue
        folder = shutil.copytree(whole, tmp_path / path.name)
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (folder / path.name).write_bytes(content)
        try:
            settings, ids, weights = loaded_parts(folder)
        except ModelFolderError as error:
            assert path.name in str(error) and "\n" not in str(error)
        else:
            assert path.name == CHECKSUMS and (settings, ids) == expected[:2]
            assert all(torch.equal(weights[name], value) for name, value in expected[2].items())


def test_a_changed_file_is_named_with_what_to_do(copy, caplog):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "window_overlap": 0.0}))
    (copy / "tokenizer_config.json").unlink()
    for load in (load_model, load_processor):
        with pytest.raises(ModelFolderError, match=r"tokenizer_config\.json is missing.*Copy or save.*remove its entry"):
            load(copy)
    (copy / CHECKSUMS).write_text(json.dumps({n: e for n, e in listed(copy).items() if n != "tokenizer_config.json"}))
    with pytest.raises(ModelFolderError, match=r"config\.json has \d+ bytes instead of \d+.*allow_incomplete"):
        load_model(copy)
    load_model(copy, allow_incomplete=True)
    assert any("config.json has" in record.message for record in caplog.records)
    update_checksums(copy)
    load_model(copy)


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"a": 1}', '{"a/b": {"size": 1, "sha256": ""}}', '{"a": {"size": "1"}}'])
def test_a_damaged_list_is_an_error(copy, text):
    (copy / CHECKSUMS).write_text(text)
    with pytest.raises(ModelFolderError, match=r"checksums\.json is damaged"):
        load_processor(copy)


def test_weights_of_an_earlier_save_do_not_win(copy, tmp_path):
    model = MFRSVLMForConditionalGeneration.from_pretrained(copy)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(copy, max_shard_size=100_000)  # over one file
    assert not (copy / WEIGHTS).exists() and WEIGHTS not in listed(copy)
    assert torch.equal(load_model(copy)[0].lm_head.weight, model.lm_head.weight)
    shards = shutil.copytree(copy, tmp_path / "shards")
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(copy)  # over shards
    assert not (copy / INDEX).exists() and torch.equal(load_model(copy)[0].lm_head.weight, model.lm_head.weight)

    shutil.copy(copy / WEIGHTS, shards)  # as transformers alone leaves it
    with pytest.raises(ModelFolderError, match=r"has model\.safetensors and model\.safetensors\.index\.json"):
        load_model(shards)


def test_an_adapter_saved_over_a_listed_one_is_explained(copy):
    save_file({"a": torch.ones(2)}, copy / "adapter_model.safetensors")
    update_checksums(copy)
    assert load_file(copy / "adapter_model.safetensors").keys() == {"a"}
    save_file({"a": torch.zeros(2)}, copy / "adapter_model.safetensors")
    with pytest.raises(ModelFolderError, match=r"adapter_model\.safetensors has another content than was saved"):
        load_model(copy)
