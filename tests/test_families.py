"""Encoders and decoders of other families: whatever transformers has as a ViT, a hierarchical backbone or a decoder."""

import copy

import pytest
import torch
from tiny_models import STAGE_SIZES, TEXT_CONFIGS, TEXT_SIZES, VIT_SIZES, tiny_config, tiny_inputs, tiny_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    SmolLM3Config,
)
from transformers.models.cohere import CohereConfig
from transformers.models.gemma2 import Gemma2Config

from mfrsvlm import MFRSVLMForConditionalGeneration


# Options that make the family differ from Llama in its forward or behind its head.
DECODERS = {
    "llama": (TEXT_CONFIGS["llama"], {}),
    "mistral": (TEXT_CONFIGS["mistral"], {"sliding_window": 8}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (TEXT_CONFIGS["qwen3"], {}),
    "gemma2": (Gemma2Config, {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}),
    "gemma3": (Gemma3TextConfig, {"sliding_window": 8, "query_pre_attn_scalar": 8}),
    "granite": (GraniteConfig, {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}),
    "cohere": (CohereConfig, {"logit_scale": 0.3}),
    "olmo2": (Olmo2Config, {}),
    "phi3": (Phi3Config, {}),
    "smollm3": (SmolLM3Config, {}),
}
INJECTIONS = {
    "stack": {"routing": "stack"},
    "token": {"routing": "token"},
    "cross_attention": {"injection_type": "cross_attention"},
}
ENCODERS = {
    "clip_vision_model": VIT_SIZES,
    "siglip_vision_model": VIT_SIZES,
    "siglip2_vision_model": {**VIT_SIZES, "num_patches": 16},
    "vit": VIT_SIZES,
    "dinov2": VIT_SIZES,
    "dinov2_with_registers": {**VIT_SIZES, "num_register_tokens": 2},
    "dinov3_vit": {**VIT_SIZES, "num_register_tokens": 2},
    "resnet": {"embedding_size": 8, **STAGE_SIZES},
    "convnext": STAGE_SIZES,
    "convnextv2": STAGE_SIZES,
    "efficientnet": {
        "width_coefficient": 0.25,
        "depth_coefficient": 0.3,
        "hidden_dim": 320,
        "initializer_range": 0.5,  # the usual one makes the last of its outputs vanish
    },
    "mobilenet_v2": {"depth_multiplier": 0.25, "hidden_act": "relu6"},
    "swin": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2, "image_size": 28},
}


def decoder_config(family: str):
    kind, options = DECODERS[family]
    return kind(**{**TEXT_SIZES, "tie_word_embeddings": False, **options})


def greedy(model, inputs, **kwargs):
    length = inputs["input_ids"].shape[1]
    return model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, **kwargs)[:, length:]


@pytest.fixture(params=DECODERS)
def text_config(request):
    return decoder_config(request.param)


def test_text_alone_equals_the_stock_model(text_config):
    model = tiny_model(tiny_config(text_config=text_config))
    stock = AutoModelForCausalLM.from_config(copy.deepcopy(text_config)).eval()
    stock.model.load_state_dict(model.model.language_model.state_dict())
    stock.lm_head.load_state_dict(model.lm_head.state_dict())
    inputs = tiny_inputs(model.config, [0, 0], text=[9, 6])
    with torch.no_grad():
        seen, expected = model(**inputs).logits, stock(**inputs).logits
    words = torch.arange(99) != model.config.image_token_id
    assert torch.equal(seen[..., words], expected[..., words])


@pytest.mark.parametrize("injection", INJECTIONS)
def test_every_injector_reaches_the_logits_of_every_decoder(text_config, injection):
    model = tiny_model(tiny_config(text_config=text_config, **INJECTIONS[injection]))
    inputs = tiny_inputs(model.config, [1])
    with torch.no_grad():
        whole = model(**inputs).logits
        for injector in model.model.injectors:
            gate = injector.gate if hasattr(injector, "gate") else injector.residual_scale
            kept = gate.clone()
            gate.zero_()
            assert (model(**inputs).logits - whole).abs().max() > 1e-4
            gate.copy_(kept)


@pytest.mark.parametrize("injection", INJECTIONS)
def test_generation_with_a_cache_equals_without(text_config, injection):
    model = tiny_model(tiny_config(text_config=text_config, **INJECTIONS[injection]))
    inputs = tiny_inputs(model.config, [1, 2])
    assert torch.equal(greedy(model, inputs), greedy(model, inputs, use_cache=False))


def test_a_decoder_that_cannot_be_injected_into_is_refused_by_what_it_lacks():
    config = tiny_config(text_config=GPT2Config(vocab_size=99, n_embd=32, n_layer=4, n_head=4))
    with pytest.raises(ValueError, match=r"'gpt2' cannot be injected into: GPT2Model lacks a list of `layers`"):
        MFRSVLMForConditionalGeneration(config)


@pytest.fixture(params=ENCODERS)
def encoder(request):
    return encoder_model(request.param)


def encoder_model(family: str, num_channels: int = 3, **overrides) -> MFRSVLMForConditionalGeneration:
    vision_config = AutoConfig.for_model(family, **ENCODERS[family], num_channels=num_channels)
    sizes = {"detail_feature_layers": [1, 3], "routing": "token"}
    if hasattr(vision_config, "depths") or not hasattr(vision_config, "patch_size"):
        sizes.update(image_size=28, patch_size=7, vision_feature_size=24, detail_feature_layers=[2, 4])
    if family.startswith(("convnext", "efficientnet", "mobilenet")):  # their last maps stand for 32 pixels
        sizes.update(image_size=64, patch_size=16, window_sizes=[64, 32])
    return tiny_model(tiny_config(vision_config=vision_config, **{**sizes, **overrides}))


def test_encoder_end_to_end(encoder, tmp_path):
    """Forward, loss with gradients, generation, saving and loading, with windows at their native size."""
    inputs = tiny_inputs(encoder.config, [1, 2])
    outputs = encoder(**inputs, labels=inputs["input_ids"])
    outputs.loss.backward()
    with_gradient = [p for p in encoder.model.vision_tower.parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert torch.isfinite(outputs.loss) and with_gradient
    assert greedy(encoder, inputs).shape == (2, 5)
    encoder.save_pretrained(tmp_path)
    loaded = MFRSVLMForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        assert (loaded(**inputs).logits - outputs.logits).abs().max() <= 1e-5


def test_every_pixel_of_an_image_reaches_the_features_of_any_encoder(encoder):
    config = encoder.config
    pixels = tiny_inputs(config, [1])["pixel_values"].requires_grad_()
    features = encoder.get_image_features(pixels)
    weight = torch.randn(())
    total = sum((f * torch.randn_like(f)).sum() for f in features.pooler_output)
    total = total + weight * sum((f * torch.randn_like(f)).sum() for stack in features.deepstack_features for f in stack)
    total.backward()
    assert (pixels.grad != 0).float().mean() > 0.99


@pytest.mark.parametrize("family", ["vit", "dinov2", "dinov3_vit", "siglip_vision_model", "siglip2_vision_model"])
def test_features_of_a_vit_are_its_hidden_states_without_prefix_tokens(family):
    model = encoder_model(family)
    pixels = torch.randn(1, 3, 14, 14)  # a window at its native size: 2 x 2 tokens
    with torch.no_grad():
        _, maps = model.model._encode(pixels, [1, 3])
        if family == "siglip2_vision_model":
            # Patches in the order of its own image processor: rows, columns, then pixels with channels last.
            patches = pixels.view(1, 3, 2, 7, 2, 7).permute(0, 2, 4, 3, 5, 1).reshape(1, 4, -1)
            ones, shape = torch.ones(1, 4, dtype=torch.long), torch.tensor([[2, 2]])
            states = model.model.vision_tower(patches, ones, shape, output_hidden_states=True).hidden_states
        else:
            flag = {} if family.startswith("dino") else {"interpolate_pos_encoding": True}
            states = model.model.vision_tower(pixels, output_hidden_states=True, **flag).hidden_states
    prefix = {"vit": 1, "dinov2": 1, "dinov3_vit": 3}.get(family, 0)
    for layer, feature_map in zip([1, 3], maps, strict=True):
        assert states[layer].shape[1] == prefix + 4
        assert torch.allclose(feature_map[0].flatten(1).T, states[layer][0, prefix:])


@pytest.mark.parametrize("family", ["clip_vision_model", "resnet", "dinov3_vit"])
def test_four_channels(family, tmp_path):
    model = encoder_model(family, num_channels=4)
    inputs = tiny_inputs(model.config, [1])
    assert inputs["pixel_values"].shape == (1, 4 * (28 * 28 + 9 * 28 * 28 + 49 * 14 * 14))
    with torch.no_grad():
        logits = model(**inputs).logits
        for start in range(4):  # every band of the global view counts
            changed = inputs["pixel_values"].clone()
            changed[:, start * 784 : (start + 1) * 784] += 1
            assert (model(**{**inputs, "pixel_values": changed}).logits - logits).abs().max() > 1e-5
    model.save_pretrained(tmp_path)
    assert MFRSVLMForConditionalGeneration.from_pretrained(tmp_path).config.num_channels == 4


def test_outputs_of_a_convolutional_model_are_its_hidden_states_and_then_its_last():
    model = encoder_model("efficientnet", detail_feature_layers=[2, 7], vision_feature_layer=-1)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        outputs = model.model.vision_tower(pixels, output_hidden_states=True)
        _, maps = model.model._encode(pixels, [2, 7, -1])
    assert len(outputs.hidden_states) == 9
    for layer, own, seen in zip([2, 7, 9], [*outputs.hidden_states[2::5], outputs.last_hidden_state], maps, strict=True):
        projected = model.model.stage_projections[str(layer)](own.movedim(1, -1)).movedim(-1, 1)
        assert torch.equal(seen, projected)
    with pytest.raises(
        ValueError, match=r"\[10\] are out of range: the outputs of the encoder \('efficientnet'\) are 0 to 9"
    ):
        encoder_model("efficientnet", detail_feature_layers=[2, 10])


def test_an_encoder_of_an_unknown_shape_is_refused():
    with pytest.raises(Exception, match=r"vision_config of type 'patches' lacks \['num_hidden_layers'"):
        tiny_config(vision_config=PatchesConfig())
    levit = AutoConfig.for_model("levit", hidden_sizes=[16, 16, 16], num_attention_heads=[2, 2, 2], depths=[1, 1, 1])
    sizes = {"image_size": 224, "patch_size": 16, "vision_feature_size": 24, "window_sizes": [224]}
    with pytest.raises(ValueError, match=r"'levit' has outputs of shape \(1, 196, 16\), but feature maps are needed"):
        tiny_model(tiny_config(vision_config=levit, **sizes))


def test_windows_too_small_for_a_backbone_are_refused():
    with pytest.raises(ValueError, match=r"'convnext' cannot encode 14 pixels: .*window_sizes|other sizes"):
        encoder_model("convnext", image_size=28, patch_size=7, window_sizes=[28, 14])


class PatchesConfig(PreTrainedConfig):
    """A ViT that does not say how many layers it has."""

    model_type, patch_size = "patches", 7


class FixedConfig(PreTrainedConfig):
    """A ViT that knows the positions of one size."""

    model_type = "fixed_vit"

    def __init__(self, **kwargs):
        self.hidden_size, self.num_hidden_layers, self.patch_size, self.image_size = 24, 3, 7, 28
        super().__init__(**kwargs)


class FixedModel(PreTrainedModel):
    config_class = FixedConfig

    def __init__(self, config):
        super().__init__(config)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(24, 24) for _ in range(3))
        self.position_embeddings = torch.nn.Parameter(torch.zeros(16, 24))
        self.post_init()

    def forward(self, pixel_values, **kwargs):
        raise NotImplementedError


def test_windows_that_a_vit_has_no_positions_for_are_refused():
    AutoConfig.register("fixed_vit", FixedConfig, exist_ok=True)
    AutoModel.register(FixedConfig, FixedModel, exist_ok=True)
    config = tiny_config(vision_config=FixedConfig())
    with pytest.raises(ValueError, match=r"positions for 28 pixels only \(position_embeddings\).*cannot encode \[14\]"):
        MFRSVLMForConditionalGeneration(config)
    MFRSVLMForConditionalGeneration(tiny_config(vision_config=FixedConfig(), window_encoding="resize"))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["resnet", "convnext", "swin", "clip_vision_model", "dinov3_vit"])
def test_the_attention_switch_works_for_every_tower(family, implementation, tmp_path):
    model = encoder_model(family)
    model.set_attn_implementation(implementation)
    model.save_pretrained(tmp_path)
    loaded = MFRSVLMForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=implementation)
    assert loaded.config.text_config._attn_implementation == implementation
    inputs = tiny_inputs(model.config, [1])
    with torch.no_grad():
        assert (loaded(**inputs).logits - model(**inputs).logits).abs().max() <= 1e-4
