"""The counts of `benchmarks/count_operations.py` against models of transformers and against counting step by step."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mfrsvlm import MFRSVLMConfig, MFRSVLMForConditionalGeneration
from mfrsvlm.configuration_mfrsvlm import CACHE


PATH = Path(__file__).parents[1] / "benchmarks" / "count_operations.py"
VISION = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": 112,
    "patch_size": 14,
}
TEXT = {
    "vocab_size": 200,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def counting():
    spec = importlib.util.spec_from_file_location("count_operations", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def config():
    return MFRSVLMConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT),
        window_sizes=[112, 56],
        detail_feature_layers=[2, 4, 6],
        injection_layers=[0, 2],
        image_token_id=3,
    )


def operations(call):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def llava():
    """(encoding, prefill of 64 visual and 10 text tokens) of LLaVA with the same parts."""
    config = LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT), vision_feature_layer=-1)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
        pixels, embeds = torch.empty(1, 3, 112, 112), torch.empty(1, 74, 96)
    encoding = operations(lambda: model.model.get_image_features(pixels))
    return encoding, operations(lambda: model(inputs_embeds=embeds, logits_to_keep=1))


def test_one_view_costs_what_llava_of_transformers_costs(counting, config, llava):
    rows = counting.count_all(config, text_tokens=10, answer_tokens=3)
    for name in ("global view only", "LLaVA-1.5: one view"):
        # The class token, and nothing else, is left out of the sizes.
        assert rows[name].encode == pytest.approx(llava[0], rel=0.03)
        assert rows[name].prefill == pytest.approx(llava[1], rel=0.01)  # norms are among the sizes
    assert rows["global view only"].decode == pytest.approx(rows["LLaVA-1.5: one view"].decode, rel=0.01)
    assert rows["global view only"].decode_bytes == rows["LLaVA-1.5: one view"].decode_bytes
    assert rows["global view only"].prefill_bytes == pytest.approx(rows["LLaVA-1.5: one view"].prefill_bytes, rel=0.01)


def test_counts_are_those_of_a_real_answer(counting, config):
    """Encoding, prefill and four further tokens of a model with values, counted step by step."""
    cost = counting.count_model(config, text_tokens=10, answer_tokens=5, bytes_each=4)
    model = MFRSVLMForConditionalGeneration(config).eval().requires_grad_(False)
    model.set_attn_implementation("eager")  # the counter knows no formula of the CPU's fused attention
    ids = torch.tensor([[3] * config.image_seq_length + [5] * 10])
    pixels = torch.zeros(1, sum(config.packed_lengths))
    features = model.get_image_features(pixels, return_dict=True)
    assert cost.encode == operations(lambda: model.get_image_features(pixels, return_dict=True))
    outputs = model(input_ids=ids, mm_encoder_outputs={"image": features}, use_cache=True, logits_to_keep=1)
    assert cost.prefill == operations(lambda: model(input_ids=ids, mm_encoder_outputs={"image": features}, logits_to_keep=1))
    cache = outputs[CACHE]
    assert cost.decode == sum(operations(lambda: model(input_ids=ids[:, -1:], **{CACHE: cache})) for _ in range(4))
    weights = sum(parameter.numel() for parameter in model.parameters()) - model.get_input_embeddings().weight.numel()
    assert cost.encode_bytes + cost.prefill_bytes == 4 * weights


def test_a_budget_saves_the_windows_that_are_not_encoded(counting, config):
    """Twelve of sixteen windows, but for the operations of the scorer."""
    fields = {"window_sizes": [56], "window_overlap": 0.0}
    full, budget = (
        counting.count_model(counting.change(config, fields | more), text_tokens=10, answer_tokens=3, bytes_each=2)
        for more in ({}, {"window_budget": 4})
    )
    with torch.device("meta"):
        tower = MFRSVLMForConditionalGeneration(config).model.vision_tower.eval().requires_grad_(False)
        windows = torch.empty(12, 3, 56, 56)
    saved = operations(lambda: tower(windows, interpolate_pos_encoding=True))
    assert saved * 0.97 < full.encode - budget.encode < saved
    assert (budget.prefill, budget.decode) == (full.prefill, full.decode)


def test_config_of_a_folder_or_a_file(counting, config, tmp_path):
    config.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        assert counting.read_config(path).to_dict() == config.to_dict()


def test_modes_cost_less_from_row_to_row(counting, config):
    rows = counting.count_all(config, text_tokens=10, answer_tokens=2)
    encodings = [rows[name].encode for name in counting.MODES]
    assert encodings == sorted(encodings, reverse=True) and len(set(encodings)) == len(encodings)
    table = counting.as_table(rows, 1e12, 1e9)
    assert table.count("\n") == 1 + len(rows) and all(name in table for name in rows)
