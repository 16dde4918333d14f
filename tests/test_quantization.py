"""Weights of 8 and 4 bits: what stays whole, and that answers stay close. Skipped where the packages are not installed."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny_models import TEXT_SIZES, tiny_inputs, tiny_model
from transformers import AutoModelForImageTextToText, LlamaConfig

from mfrsvlm import MFRSVLMForConditionalGeneration, MFRSVLMModel
from mfrsvlm.evaluation.answering import fingerprint
from mfrsvlm.modeling_mfrsvlm import keep_parts_whole


def int8():
    from transformers import TorchAoConfig

    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


def int4():
    from transformers import BitsAndBytesConfig

    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def test_a_config_that_names_modules_is_left_alone():
    named, empty = SimpleNamespace(modules_to_not_convert=["lm_head"]), SimpleNamespace(llm_int8_skip_modules=None)
    assert keep_parts_whole(named) is named
    before = copy.deepcopy(empty)
    skipped = keep_parts_whole(empty).llm_int8_skip_modules
    assert {"injectors", "model.injectors", "model.multi_modal_projector", "model.vision_tower", "lm_head"} <= set(skipped)
    assert empty == before
    other = SimpleNamespace(bits=2)  # a method that names modules otherwise, or not at all
    assert keep_parts_whole(other) is other


@pytest.mark.parametrize("make, bound", [(int8, 0.02), (int4, 0.3)])
@pytest.mark.parametrize("injection", ["gated", "cross_attention"])
def test_only_the_decoder_is_quantized(make, bound, injection, tmp_path):
    quantization_config = make()
    text = LlamaConfig(**TEXT_SIZES | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})  # in blocks of 64
    model = tiny_model(text_config=text, injection_type=injection, routing="token")
    model.save_pretrained(tmp_path)
    inputs = tiny_inputs(model.config, [1, 2])
    with torch.no_grad():
        expected = model(**inputs).logits.softmax(-1)
    for kind in (MFRSVLMForConditionalGeneration, MFRSVLMModel):
        quantized = kind.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=quantization_config)
        whole = {name: type(p) for name, p in quantized.named_parameters() if type(p) is torch.nn.Parameter}
        lacking = {name for name, _ in quantized.named_parameters()} - set(whole)
        decoder = "model.language_model.layers." if kind is MFRSVLMForConditionalGeneration else "language_model.layers."
        assert len(lacking) == 4 * 7 and all(name.startswith(decoder) for name in lacking)  # seven products a layer
    quantized = AutoModelForImageTextToText.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=quantization_config, trust_remote_code=True
    )
    with torch.no_grad():
        distance = (quantized(**inputs).logits.softmax(-1) - expected)[inputs["attention_mask"].bool()].abs().sum(-1) / 2
    assert 0 < distance.mean() < bound
    assert fingerprint(quantized) == fingerprint(quantized) != fingerprint(model)
    tokens = quantized.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 3
