"""The model by its numbers: batches equal single runs, every part matters, and generation in all its forms."""

import copy

import pytest
import torch
from tiny_models import tiny_config, tiny_inputs, tiny_model
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM, StaticCache

from mfrsvlm import MFRSVLMConfig, MFRSVLMForConditionalGeneration, MFRSVLMModel
from mfrsvlm.configuration_mfrsvlm import CHUNKS_CARRY_IMAGES, GENERATE_ENCODES_IMAGES, window_table
from mfrsvlm.image_processing_mfrsvlm import cut_windows
from mfrsvlm.injection_mfrsvlm import DetailMemory, Injection, visual_layout
from mfrsvlm.modeling_mfrsvlm import split_phases, stitch_windows


CHOICES = {
    "gated": {},
    "sample_scope": {"routing_scope": "sample"},
    "token": {"routing": "token"},
    "cross_attention": {"injection_type": "cross_attention"},
    "resnet": {"vision": "resnet"},
    "resize": {"window_encoding": "resize"},
    "hann": {"window_weighting": "hann", "window_sizes": [28]},
    "no_overlap": {"window_overlap": 0.0},
    "budget": {"window_sizes": [14], "window_overlap": 0.0, "window_budget": 5},
    "qwen3": {"text": "qwen3"},
    "mistral": {"text": "mistral"},
    "resnet_cross_qwen3": {"vision": "resnet", "injection_type": "cross_attention", "text": "qwen3"},
    "global_only": {"window_sizes": [], "injection_layers": []},
}


def largest_difference(a, b):
    return (a.float() - b.float()).abs().max().item()


INJECTIONS = ["gated", "sample_scope", "token", "cross_attention"]
TOLERANCE = 2e-4


@pytest.fixture(params=CHOICES)
def model(request):
    return tiny_model(**CHOICES[request.param])


@pytest.fixture(params=INJECTIONS)
def injecting_model(request):
    return tiny_model(**CHOICES[request.param])


def greedy(model, inputs, tokens=6, **kwargs):
    length = inputs["input_ids"].shape[1]
    return model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **kwargs)[:, length:]


def sample_of(inputs, config, images, index):
    """Inputs of one sample of a batch, without its padding."""
    real = inputs["attention_mask"][index].bool()
    start = sum(images[:index])
    single = {
        "input_ids": inputs["input_ids"][index : index + 1, real],
        "attention_mask": inputs["attention_mask"][index : index + 1, real],
    }
    if images[index]:
        single["pixel_values"] = inputs["pixel_values"][start : start + images[index]]
    return single, real


# --- Geometry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["hann", "hann_nonzero"])
def test_stitching_a_canvas_cut_into_windows_gives_it_back(weighting):
    (window,) = window_table(28, 7, 2, [28], 0.5)
    canvas = torch.randn(2, 5, 8, 8, dtype=torch.float64)
    tokens = window.tokens_per_side
    cuts = [
        canvas[:, :, top : top + tokens, left : left + tokens]
        for top in range(0, 5, window.token_stride)
        for left in range(0, 5, window.token_stride)
    ]
    stitched = stitch_windows(torch.stack(cuts, dim=1), window, 8, weighting)
    ring = torch.ones(8, 8, dtype=torch.bool)
    ring[1:-1, 1:-1] = False
    assert torch.allclose(stitched[..., ~ring], canvas[..., ~ring])
    if weighting == "hann":
        assert (stitched[..., ring] == 0).all()
    else:
        assert torch.allclose(stitched, canvas)


def test_phases_are_shifted_subgrids_row_offset_first():
    canvas = torch.arange(36.0).view(1, 1, 6, 6)
    phases = split_phases(canvas, 3)
    assert phases.shape == (9, 1, 4, 1)
    for row in range(3):
        for column in range(3):
            assert torch.equal(phases[3 * row + column, 0, :, 0], canvas[0, 0, row::3, column::3].flatten())


def test_a_row_of_the_wrong_length_is_refused_with_the_length_it_needs(injecting_model):
    inputs = tiny_inputs(injecting_model.config, [1])
    for pixels in (inputs["pixel_values"][:, :2352], inputs["pixel_values"].view(1, 1, -1)):
        with pytest.raises(
            ValueError, match=r"\(images, 52332\): 3 channels of a global view of 28 pixels, 9 windows of 28"
        ):
            injecting_model(**{**inputs, "pixel_values": pixels})


@pytest.mark.parametrize("repeats", [1, 2])
def test_layout_numbers_visual_tokens_in_reading_order(repeats):
    mask = torch.tensor([[0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]).bool()
    layout = visual_layout(mask.repeat_interleave(repeats, 0), num_images=3, tokens=2, repeats=repeats)
    places = [[(0, 1), (0, 2)], [(0, 4), (0, 5)], [(2, 0), (2, 1)]]  # (sample, column) of the tokens of each image
    expected = [
        [[(row * repeats + copy) * 6 + column for row, column in image] for copy in range(repeats)] for image in places
    ]
    assert layout.position.tolist() == expected
    assert layout.row.tolist() == [0, 0, 2]
    assert layout.same_sample.tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    wide = mask.repeat_interleave(repeats, 0)
    first_copies = wide.view(3, repeats, 6)[:, 0]
    assert layout.token.view(3, repeats, 6)[:, 0][first_copies].tolist() == [0, 1, 2, 3, 4, 5]
    # Every visual position takes the update that was computed from itself.
    assert (layout.position.flatten()[layout.slot.flatten()[wide.flatten()]] == wide.flatten().nonzero()[:, 0]).all()


# --- Against plain loops ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gated", "resize", "hann", "no_overlap", "resnet"])
def test_detail_stacks_equal_a_loop_over_windows(name):
    model = tiny_model(**CHOICES[name])
    config = model.config
    canvas = torch.randn(3, 56, 56)
    windows = torch.from_numpy(cut_windows(canvas.numpy(), config.windows))
    packed = torch.cat([torch.randn(3 * 28 * 28), windows])[None]
    with torch.no_grad():
        seen = model.model.get_detail_features(packed)[:, 0]  # (K, T, C)
        expected = []
        for window in config.windows:
            side = window.tokens_per_side
            ramp = torch.arange(side) + (0 if config.window_weighting == "hann" else 0.5)
            profile = (torch.pi * ramp / (side - 1 if config.window_weighting == "hann" else side)).sin() ** 2
            total = torch.zeros(len(config.detail_feature_layers), 8, 8, config.vision_feature_size)
            weight = torch.zeros(8, 8, 1)
            for top, left in window.offsets:
                crop = canvas[None, :, top : top + window.size, left : left + window.size]
                row, column = top // 7, left // 7
                w = torch.outer(profile, profile)[..., None]
                for depth, features in enumerate(encode_alone(model.model, crop, side)):
                    total[depth, row : row + side, column : column + side] += w * features
                weight[row : row + side, column : column + side] += w
            for stitched in total / weight.clamp(min=1e-6):
                expected += [stitched[r::2, c::2].flatten(0, 1) for r in range(2) for c in range(2)]
    assert largest_difference(seen, torch.stack(expected)) <= 1e-4 * max(1, seen.abs().max().item())


def encode_alone(model, crop, side):
    """Features of one window at every depth, (side, side, C) each, by the tower's own forward."""
    config = model.config
    if config.window_encoding == "resize":
        crop = torch.nn.functional.interpolate(crop, size=28, mode="bilinear")
    if not config.is_hierarchical:
        states = model.vision_tower(crop, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
        maps = [states[layer][0, 1:].T.unflatten(1, (crop.shape[-1] // 7,) * 2) for layer in config.detail_feature_layers]
    else:
        # The backbone gives the stages it was asked for: 2 and 4.
        stages = zip(config.detail_feature_layers, model.vision_tower(crop).feature_maps, strict=True)
        maps = [model.stage_projections[str(layer)](stage[0].permute(1, 2, 0)).permute(2, 0, 1) for layer, stage in stages]
    grown = [
        m.repeat_interleave(side // m.shape[-1], 1).repeat_interleave(side // m.shape[-1], 2) if m.shape[-1] == 1 else m
        for m in maps
    ]
    return [torch.nn.functional.adaptive_avg_pool2d(m, side).permute(1, 2, 0) for m in grown]


def test_token_routing_equals_a_loop_over_tokens():
    model = tiny_model(routing="token")
    injector = model.model.injectors[0]
    torch.nn.init.normal_(injector.stack_embedding)
    hidden, details = torch.randn(1, 20, 32), torch.randn(16, 1, 16, 32)
    mask = torch.zeros(1, 20, dtype=torch.bool)
    mask[0, 3:19] = True
    with torch.no_grad():
        variance = details.var(dim=-1, correction=0)
        seen = injector(hidden, Injection(details, variance, visual_layout(mask, 1, 16), None))
        expected = hidden.clone()
        for token in range(16):
            h = hidden[0, 3 + token]
            stacks = details[:, 0, token] + injector.stack_embedding
            query = injector.router.query_proj(injector.router.query_norm(h))
            scores = torch.stack([injector.router.key_proj(injector.router.key_norm(d)) @ query for d in stacks])
            mixed = injector.detail_norm(((scores / 8**0.5).softmax(0)[:, None] * stacks).sum(0))
            gate = injector.gate_proj(torch.cat([injector.hidden_norm(h), mixed])).sigmoid()
            expected[0, 3 + token] = h + injector.residual_scale * gate * injector.detail_proj(mixed)
    assert largest_difference(seen, expected) <= 1e-4


def test_cross_attention_equals_a_loop_over_positions():
    """Two samples: one sees nothing, then one image, then two; the other holds no image at all."""
    model = tiny_model(injection_type="cross_attention")
    injector = model.model.injectors[1]
    hidden, details = torch.randn(2, 40, 32), torch.randn(16, 2, 16, 32)
    mask = torch.zeros(2, 40, dtype=torch.bool)
    mask[0, 2:18] = mask[0, 20:36] = True
    starts = [2, 20]
    visible = torch.stack([torch.arange(40)[:, None] >= torch.tensor(starts), torch.zeros(40, 2, dtype=torch.bool)])
    memory = DetailMemory(None, torch.tensor([0, 1]), 2, visible)
    with torch.no_grad():
        seen = injector(hidden, Injection(details, None, visual_layout(mask, 2, 16), memory))
        expected = hidden.clone()
        origin = injector.stack_embedding[:, None] + injector.place_embedding
        for position in range(40):
            tokens = [i for i, start in enumerate(starts) if start <= position]
            if not tokens:
                continue
            seen_details = injector.detail_norm(details[:, tokens])  # (K, images, T, d)
            key = (injector.k_proj(seen_details) + origin[:, None]).flatten(0, 2).view(-1, 2, 8)
            value = (injector.v_proj(seen_details) + origin[:, None]).flatten(0, 2).view(-1, 2, 8)
            query = injector.q_proj(injector.hidden_norm(hidden[0, position])).view(2, 8)
            weights = (torch.einsum("lhe,he->hl", key, query) / 8**0.5).softmax(1)
            update = injector.o_proj(torch.einsum("hl,lhe->he", weights, value).flatten())
            expected[0, position] += injector.gate.tanh()[0] * update
    assert largest_difference(seen, expected) <= 1e-4
    assert torch.equal(seen[1], hidden[1])


# --- Batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("images", [[1, 2, 0, 1], [0, 2], [1, 1]], ids=str)
def test_batch_equals_single_runs(model, side, images):
    config = model.config
    inputs = tiny_inputs(config, images, text=[7, 5, 9, 6][: len(images)], side=side)
    with torch.no_grad():
        batch = model(**inputs).logits
    for index in range(len(images)):
        single, real = sample_of(inputs, config, images, index)
        with torch.no_grad():
            alone = model(**single).logits[0]
        assert (batch[index, real] - alone).abs().max() <= TOLERANCE


@pytest.mark.parametrize("use_cache", [True, False])
def test_batched_generation_equals_single_runs(model, use_cache):
    config, images = model.config, [1, 0, 2]
    inputs = tiny_inputs(config, images, text=[7, 9, 5])
    batch = greedy(model, inputs, use_cache=use_cache)
    for index in range(len(images)):
        single, _ = sample_of(inputs, config, images, index)
        assert torch.equal(batch[index], greedy(model, single)[0])


def test_calls_do_not_influence_each_other(injecting_model):
    first = tiny_inputs(injecting_model.config, [1], seed=1)
    second = tiny_inputs(injecting_model.config, [2], seed=2)
    text = tiny_inputs(injecting_model.config, [0], seed=3)
    alone = [greedy(copy.deepcopy(injecting_model), inputs) for inputs in (second, text)]
    greedy(injecting_model, first)
    assert torch.equal(greedy(injecting_model, second), alone[0])
    greedy(injecting_model, first)
    assert torch.equal(greedy(injecting_model, text), alone[1])


@pytest.mark.parametrize("name", ["gated", "token", "cross_attention"])
def test_a_later_image_does_not_reach_back(name):
    model = tiny_model(**CHOICES[name])
    inputs = tiny_inputs(model.config, [2])
    changed = copy.deepcopy(inputs)
    changed["pixel_values"][1] += 1
    second = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[model.config.image_seq_length].item()
    with torch.no_grad():
        difference = (model(**inputs).logits - model(**changed).logits).abs().amax(-1)[0]
    assert difference[:second].max() <= 1e-5
    assert difference[second:].min() > 1e-4


def test_sample_scope_shares_one_routing_over_the_images_of_a_sample():
    model = tiny_model(**CHOICES["sample_scope"])
    seen = []
    for injector in model.model.injectors:
        injector.router.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(**tiny_inputs(model.config, [2, 1]))
    for weights in seen:
        weights = weights[:, 0]  # (N, r, K), one row an image
        assert torch.allclose(weights.sum(1), torch.ones(3))
        assert torch.allclose(weights[0], weights[1])
        assert not torch.allclose(weights[0], weights[2], atol=1e-4)


# --- Every part matters -----------------------------------------------------------------------------------------------


def test_every_stack_and_injector_changes_the_logits(injecting_model):
    model, config = injecting_model, injecting_model.config
    inputs = tiny_inputs(config, [1])
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"])
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        whole = model(**text, mm_encoder_outputs={"image": features}).logits
        assert len(features.deepstack_features) == config.num_detail_stacks
        for stack in range(config.num_detail_stacks):  # every scale, depth and phase has its own
            changed = copy.deepcopy(features)
            noise = torch.randn_like(features.deepstack_features[stack][0])
            changed.deepstack_features[stack] = [image + noise for image in changed.deepstack_features[stack]]
            logits = model(**text, mm_encoder_outputs={"image": changed}).logits
            assert largest_difference(logits, whole) > 1e-5
        for injector in model.model.injectors:
            for name in ("gate", "residual_scale"):
                if hasattr(injector, name):
                    parameter = getattr(injector, name)
                    kept = parameter.clone()
                    parameter.zero_()
                    assert (model(**inputs).logits - whole).abs().max() > 1e-3
                    parameter.copy_(kept)


def test_without_injection_only_the_global_view_is_left(injecting_model):
    inputs = tiny_inputs(injecting_model.config, [1])
    for name, parameter in injecting_model.named_parameters():
        if name.endswith((".gate", ".residual_scale")):
            torch.nn.init.zeros_(parameter)
    plain = tiny_model(window_sizes=[], injection_layers=[])
    state = {k: v for k, v in injecting_model.state_dict().items() if ".injectors." not in k}
    plain.load_state_dict(state)
    without = {**inputs, "pixel_values": inputs["pixel_values"][:, : plain.config.packed_lengths[0]]}
    with torch.no_grad():
        assert largest_difference(injecting_model(**inputs).logits, plain(**without).logits) <= 1e-5


@pytest.mark.integration
def test_perturbing_any_parameter_changes_the_logits(model):
    inputs = tiny_inputs(model.config, [2])
    with torch.no_grad():
        before = model(**inputs).logits
        for name, parameter in model.named_parameters():
            if rightly_idle(name):
                continue
            kept = parameter.clone()
            parameter.add_(torch.randn_like(parameter))
            assert (model(**inputs).logits - before).abs().max() > 1e-6, name
            parameter.copy_(kept)


def rightly_idle(name):
    """Parameters that cancel in a softmax over keys (a shift of all keys), or that no output depends on.

    Those that choose windows have tests of their own.
    """
    if "vision_tower" in name:
        return "post_layernorm" in name or "k_proj.bias" in name
    cancels = ("router.key_proj.bias", "router.key_norm.bias")
    return name.endswith(cancels) or ".window_scorer." in name or (".injectors." in name and name.endswith("k_proj.bias"))


def test_gradients_reach_every_parameter(model):
    inputs = tiny_inputs(model.config, [1, 0, 2])
    model.train()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not rightly_idle(name):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_gradient_checkpointing_gives_the_same_gradients(injecting_model):
    inputs = tiny_inputs(injecting_model.config, [1, 2])
    grads = []
    for enable in (False, True):
        model = copy.deepcopy(injecting_model).train()
        if enable:
            model.gradient_checkpointing_enable()
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        if grad is not None:
            assert torch.allclose(grad, grads[1][name], atol=1e-5), name


def test_batch_norm_stays_in_evaluation_mode():
    model = tiny_model(vision="resnet").train()
    assert model.training
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)
    before = norms[0].running_mean.clone()
    model(**tiny_inputs(model.config, [1]))
    assert torch.equal(norms[0].running_mean, before)


def test_a_new_cross_attention_model_starts_as_its_decoder():
    torch.manual_seed(0)
    model = MFRSVLMForConditionalGeneration(tiny_config(injection_type="cross_attention"))
    assert all(injector.gate.item() == 0 for injector in model.model.injectors)
    torch.manual_seed(0)
    gated = MFRSVLMForConditionalGeneration(tiny_config())
    scales = [injector.residual_scale.item() for injector in gated.model.injectors]
    assert scales == pytest.approx([gated.config.injection_init] * 2)


# --- Switches of the library ------------------------------------------------------------------------------------------


def test_eager_equals_sdpa(injecting_model):
    inputs = tiny_inputs(injecting_model.config, [1, 2])
    eager = copy.deepcopy(injecting_model)
    eager.set_attn_implementation("eager")
    assert eager.config.text_config._attn_implementation == "eager"
    with torch.no_grad():
        real = inputs["attention_mask"].bool()  # what stands at padding differs and counts for nothing
        assert largest_difference(eager(**inputs).logits[real], injecting_model(**inputs).logits[real]) <= TOLERANCE
        outputs = eager(**inputs, output_attentions=True, output_hidden_states=True)
    assert len(outputs.attentions) == 4 and len(outputs.hidden_states) == 5


def test_window_chunks_do_not_change_the_features(model):
    inputs = tiny_inputs(model.config, [2])
    pixels = {name: inputs[name] for name in inputs if name.startswith("pixel")}
    with torch.no_grad():
        whole = model.get_image_features(**pixels, window_chunk_size=1000)
        for chunk in (1, 3, None):  # None: what the config says, "auto"
            pieces = model.get_image_features(**pixels, window_chunk_size=chunk)
            for a, b in zip(whole.deepstack_features or [], pieces.deepstack_features or [], strict=True):
                assert torch.allclose(torch.stack(a), torch.stack(b), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "fields, device, expected",
    [
        ({}, "cpu", [2, 8]),  # 576 and 144 tokens
        ({}, "cuda", [28, 113]),
        ({"window_encoding": "resize"}, "cpu", [2, 2]),  # all are encoded at 336 pixels
        ({"window_chunk_size": 5}, "cpu", [5, 5]),
        ({"window_chunk_size": None}, "cuda", [None, None]),
        ({"image_size": 672, "window_sizes": [672]}, "cpu", [1]),
    ],
)
def test_windows_of_a_pass_are_bounded_by_their_tokens(fields, device, expected):
    config = MFRSVLMConfig(text_config={"hidden_size": 64, "intermediate_size": 64, "vocab_size": 9}, **fields)
    with torch.device("meta"):
        model = MFRSVLMModel(config)
    assert [model.windows_per_pass(window, torch.device(device)) for window in config.windows] == expected


def test_logits_to_keep_and_loss(model):
    inputs = tiny_inputs(model.config, [1, 1])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    with torch.no_grad():
        full = model(**inputs, labels=labels)
        assert torch.allclose(model(**inputs, logits_to_keep=3).logits, full.logits[:, -3:], atol=1e-6)
        index = torch.tensor([0, 5])
        assert torch.allclose(model(**inputs, logits_to_keep=index).logits, full.logits[:, index], atol=1e-6)
        assert torch.equal(model(**inputs, labels=inputs["input_ids"]).loss, full.loss)
    expected = torch.nn.functional.cross_entropy(full.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert full.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_saved_and_loaded_model_is_the_same(model, tmp_path):
    inputs = tiny_inputs(model.config, [1, 0])
    model.save_pretrained(tmp_path)
    loaded = MFRSVLMForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        assert largest_difference(loaded(**inputs).logits, model(**inputs).logits) <= 1e-5
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    for name in ("injection_type", "routing", "window_sizes", "window_encoding", "window_weighting", "window_overlap"):
        assert getattr(loaded.config, name) == getattr(model.config, name)


def test_bfloat16_runs_and_stays_close(injecting_model):
    inputs = tiny_inputs(injecting_model.config, [1])
    half = copy.deepcopy(injecting_model).to(torch.bfloat16)
    with torch.no_grad():
        a, b = injecting_model(**inputs).logits, half(**inputs).logits
    assert b.dtype == torch.bfloat16
    assert (a - b).abs().max() < 0.1 * a.abs().max()


# --- Generation -------------------------------------------------------------------------------------------------------


def test_cached_generation_equals_forward_over_the_whole(model):
    inputs = tiny_inputs(model.config, [2, 1])
    tokens = greedy(model, inputs)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for step in range(tokens.shape[1]):
        grown = {
            **inputs,
            "input_ids": torch.cat([ids, tokens[:, :step]], 1),
            "attention_mask": torch.cat([mask, torch.ones_like(tokens[:, :step])], 1),
        }
        position_ids = (grown["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(**grown, position_ids=position_ids).logits[:, -1]
        logits[:, model.config.text_config.eos_token_id] = -torch.inf  # min_new_tokens
        assert torch.equal(logits.argmax(-1), tokens[:, step])


def test_beam_search_equals_beams_of_single_runs(model):
    config, images = model.config, [2, 1, 0]
    inputs = tiny_inputs(config, images)
    batch = greedy(model, inputs, num_beams=3)
    for index in range(len(images)):
        single, _ = sample_of(inputs, config, images, index)
        assert torch.equal(batch[index], greedy(model, single, num_beams=3)[0])


def test_features_serve_any_number_of_calls(injecting_model):
    """Beams repeat the features for themselves, not on the caller's object."""
    inputs = tiny_inputs(injecting_model.config, [1, 1])
    with torch.no_grad():
        features = injecting_model.get_image_features(inputs["pixel_values"])
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    if not GENERATE_ENCODES_IMAGES:
        with pytest.raises(ValueError, match="does not take mm_encoder_outputs"):
            greedy(injecting_model, text, mm_encoder_outputs={"image": features})
        return
    for kwargs in ({"num_beams": 2}, {"num_beams": 2}, {}):
        seen = greedy(injecting_model, text, mm_encoder_outputs={"image": features}, **kwargs)
        assert torch.equal(seen, greedy(injecting_model, inputs, **kwargs))


def test_quantized_projector_weights_do_not_decide_the_type_of_pixels():
    model = tiny_model()
    inputs = tiny_inputs(model.config, [1])
    pixels = (inputs["pixel_values"],)

    class Quantized(torch.nn.Module):
        """Holds its weights as bytes, as 4-bit layers do."""

        def __init__(self, linear):
            super().__init__()
            self.linear = [linear]
            self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.uint8), requires_grad=False)

        def forward(self, states):
            return self.linear[0](states)

    with torch.no_grad():
        expected = model.get_image_features(*pixels).pooler_output[0]
        model.model.multi_modal_projector.linear_1 = Quantized(model.model.multi_modal_projector.linear_1)
        assert torch.equal(model.get_image_features(*pixels).pooler_output[0], expected)


def test_routing_scores_do_not_overflow_in_float16():
    model = tiny_model(**CHOICES["sample_scope"])
    router = model.model.injectors[0].router
    for proj in (router.query_proj, router.key_proj):
        proj.weight.data = 60 * torch.eye(32)
        torch.nn.init.zeros_(proj.bias)
    details = torch.randn(16, 1, 16, 32)
    visual = details[3][:, None]  # (N, r, T, d), agrees with one stack
    means = details.mean(dim=2).transpose(0, 1)
    layout = visual_layout(torch.ones(1, 16, dtype=torch.bool), 1, 16)
    with torch.no_grad():
        full = router(visual, means, layout)
        half = router.half()(visual.half(), means.half(), layout)
    assert full[0, 0, 3] > 0.99 and half[0, 0, 3] > 0.99


@pytest.mark.parametrize("value", [0, 1])
def test_whole_numbers_are_allowed_as_initial_scale(value):
    MFRSVLMForConditionalGeneration(tiny_config(injection_init=value))


def test_an_assistant_that_cannot_read_the_placeholder_is_refused():
    model = tiny_model()
    assistant = LlamaForCausalLM(LlamaConfig(**{**model.config.text_config.to_dict(), "vocab_size": 98}))
    with pytest.raises(ValueError, match=r"assistant_model has 98 embeddings.*image_token_id=98"):
        greedy(model, tiny_inputs(model.config, [1]), assistant_model=assistant)


def test_sampling_is_seeded_and_returns_several(model):
    inputs = tiny_inputs(model.config, [1])
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(model.generate(**inputs, do_sample=True, max_new_tokens=4, num_return_sequences=3))
    assert torch.equal(*runs) and len(runs[0]) == 3


def test_prompt_lookup_equals_greedy(model):
    inputs = tiny_inputs(model.config, [1])
    inputs["input_ids"][0, -4:-2] = inputs["input_ids"][0, -2:]  # something to look up
    assert torch.equal(greedy(model, inputs, prompt_lookup_num_tokens=3), greedy(model, inputs))


def test_static_cache_equals_dynamic(model):
    inputs = tiny_inputs(model.config, [1, 2])
    assert torch.equal(greedy(model, inputs, cache_implementation="static", disable_compile=True), greedy(model, inputs))


def test_continuing_from_a_cached_image_prefix(model):
    config = model.config
    whole = tiny_inputs(config, [1], text=12)
    prefix = {name: value[:, :-6] if "pixel" not in name else value for name, value in whole.items()}
    with torch.no_grad():
        cache = model(**prefix, past_key_values=DynamicCache(config=config.get_text_config())).past_key_values
    text = {name: whole[name] for name in ("input_ids", "attention_mask")}
    for _ in range(2):  # the prefix serves any number of questions
        continued = greedy(model, text, past_key_values=copy.deepcopy(cache))
        assert torch.equal(continued, greedy(model, whole))


def test_a_second_image_can_follow_in_a_cached_conversation(injecting_model):
    config = injecting_model.config
    inputs = tiny_inputs(config, [2], text=10)
    second = (inputs["input_ids"][0] == config.image_token_id).nonzero()[config.image_seq_length].item()
    if config.routing_scope == "sample":
        pytest.skip("one routing over all images of a sample needs them all at once")
    with torch.no_grad():
        whole = injecting_model(**inputs).logits
        first = injecting_model(
            input_ids=inputs["input_ids"][:, :second],
            pixel_values=inputs["pixel_values"][:1],
            use_cache=True,
        )
        rest = injecting_model(
            input_ids=inputs["input_ids"][:, second:],
            pixel_values=inputs["pixel_values"][1:],
            past_key_values=first.past_key_values,
        )
    assert (torch.cat([first.logits, rest.logits], 1) - whole).abs().max() <= TOLERANCE


# --- Chunked prefill --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gated", "sample_scope", "cross_attention"])
def test_chunked_prefill_that_splits_an_image_is_refused(name):
    model = tiny_model(**CHOICES[name])
    for images in ([1], [1, 1]):
        inputs = tiny_inputs(model.config, images)
        reason = "would split an image of 16 tokens" if CHUNKS_CARRY_IMAGES else "loses images between chunks"
        with pytest.raises(ValueError, match=f"prefill_chunk_size=10.*{reason}"):
            greedy(model, inputs, prefill_chunk_size=10)
        config = GenerationConfig(prefill_chunk_size=10, max_new_tokens=2)
        with pytest.raises(ValueError, match=reason):
            model.generate(**inputs, generation_config=config)


@pytest.mark.skipif(not CHUNKS_CARRY_IMAGES, reason="this transformers loses images between chunks, which is refused")
@pytest.mark.parametrize("name", ["token", "global_only"])
def test_chunked_prefill_may_split_where_no_image_is_seen_as_a_whole(name):
    model = tiny_model(**CHOICES[name])
    inputs = tiny_inputs(model.config, [1, 2])
    assert torch.equal(greedy(model, inputs, prefill_chunk_size=10), greedy(model, inputs))


@pytest.mark.skipif(not CHUNKS_CARRY_IMAGES, reason="this transformers loses images between chunks, which is refused")
def test_chunks_that_end_between_images_are_allowed(injecting_model):
    inputs = tiny_inputs(injecting_model.config, [1])  # two tokens of text, then the image up to column 18
    assert torch.equal(greedy(injecting_model, inputs, prefill_chunk_size=18), greedy(injecting_model, inputs))


def test_continuous_batching_is_refused():
    with pytest.raises(NotImplementedError, match="without images"):
        tiny_model().generate_batch([[5, 6, 7]])


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_counts_of_tokens_and_features_are_both_named(model):
    inputs = tiny_inputs(model.config, [1])
    short = {**inputs, "input_ids": inputs["input_ids"][:, :-8], "attention_mask": inputs["attention_mask"][:, :-8]}
    with pytest.raises(ValueError, match="14 tokens, 16 features"):
        model(**short)


def test_tokens_of_one_image_spread_over_two_samples_are_refused(injecting_model):
    config = injecting_model.config
    inputs = tiny_inputs(config, [1, 1])
    ids = inputs["input_ids"]
    ids[0, 2] = 5
    ids[1, -1] = config.image_token_id
    if injecting_model.model.splits_images:
        injecting_model(**inputs)
    else:
        with pytest.raises(ValueError, match=r"\[15, 17\] image tokens, but an image has 16"):
            injecting_model(**inputs)


def test_a_prompt_longer_than_the_positions_is_refused(model):
    limit = model.config.text_config.max_position_embeddings
    with pytest.raises(ValueError, match=f"reaches position {limit}.*has {limit}"):
        model(input_ids=torch.full((1, limit + 1), 5))


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_plain_cache_without_detail_tokens_is_refused(kind):
    model = tiny_model(injection_type="cross_attention")
    inputs = tiny_inputs(model.config, [1])
    text_config = model.config.get_text_config()
    cache = kind(config=text_config) if kind is DynamicCache else kind(config=text_config, max_cache_len=40)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        with pytest.raises(ValueError, match=r"holds 24 positions but no detail tokens"):
            model(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache)
