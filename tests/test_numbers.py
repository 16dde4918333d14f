"""Numbers that were wrong in silence once: losses, packed rows, counts, engines that drop the images, memory."""

import copy
import gc
import pickle

import pytest
import torch
from tiny_models import tiny_config, tiny_inputs, tiny_model
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mfrsvlm import MFRSVLMForConditionalGeneration
from mfrsvlm.configuration_mfrsvlm import CACHE, GENERATE_ENCODES_IMAGES
from mfrsvlm.injection_mfrsvlm import Injection, visual_layout


CHOICES = {
    "stack": {},
    "sample_scope": {"routing_scope": "sample"},
    "token": {"routing": "token"},
    "cross_attention": {"injection_type": "cross_attention"},
    "resnet_cross": {"vision": "resnet", "injection_type": "cross_attention"},
    "global_only": {"window_sizes": [], "injection_layers": []},
}


@pytest.fixture(params=CHOICES)
def model(request):
    return tiny_model(**CHOICES[request.param])


def greedy(model, inputs, **kwargs):
    length = inputs["input_ids"].shape[1]
    return model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, **kwargs)[:, length:]


# --- Loss and logits --------------------------------------------------------------------------------------------------


def test_the_placeholder_is_never_predicted_and_takes_no_share_of_the_loss(model):
    inputs = tiny_inputs(model.config, [1])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    outputs = model(**inputs, labels=labels)
    words = outputs.logits[..., torch.arange(99) != model.config.image_token_id]
    labels = labels - (labels > model.config.image_token_id).long()
    expected = torch.nn.functional.cross_entropy(words[0, :-1], labels[0, 1:])
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    entropy = torch.distributions.Categorical(logits=outputs.logits / 0.1).entropy()
    assert torch.isfinite(entropy).all()


@pytest.mark.parametrize("masked", [True, False])
def test_the_trainers_count_of_labels_gives_the_mean_loss_whoever_made_the_labels(model, masked):
    """The trainer counts labels before the model masks those of image tokens, and divides by that number."""
    inputs = tiny_inputs(model.config, [1, 2], side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    if masked:
        labels = labels.masked_fill(labels == model.config.image_token_id, -100)
    count = (labels[:, 1:] != -100).sum()
    with torch.no_grad():
        mean = model(**inputs, labels=labels).loss
        for given in (count, int(count)):
            loss = model(**inputs, labels=labels, num_items_in_batch=given).loss
            assert loss.item() == pytest.approx(mean.item(), rel=1e-6)


def test_float16_features_that_overflow_do_not_spoil_the_loss():
    model = tiny_model().train()
    torch.nn.init.constant_(model.model.vision_tower.post_layernorm.weight, 1e30)  # of an output that nothing reads
    inputs = tiny_inputs(model.config, [1])
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    assert torch.isfinite(loss)


def test_parameters_that_nothing_reads_are_frozen_and_all_others_have_gradients(model):
    inputs = tiny_inputs(model.config, [2])
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    lacking = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not lacking
    if not model.config.is_hierarchical:
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert frozen == {f"model.vision_tower.post_layernorm.{kind}" for kind in ("weight", "bias")}


def test_a_tower_read_before_its_last_layer_freezes_the_rest():
    model = tiny_model(vision_feature_layer=1, detail_feature_layers=[1, 2])
    frozen = {name for name, p in model.model.vision_tower.named_parameters() if not p.requires_grad}
    assert any(".layers.2." in name for name in frozen) and not any(".layers.1." in name for name in frozen)


# --- Packed rows ------------------------------------------------------------------------------------------------------


def test_packed_rows_equal_the_unpacked_batch(model):
    """Two samples in one row, with positions that restart: neither sees the other's image."""
    batch = tiny_inputs(model.config, [1, 2], side="right")
    rows = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    packed = {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
        "pixel_values": batch["pixel_values"],
    }
    with torch.no_grad():
        together = model(**packed, use_cache=False).logits[0]
        apart = model(**batch, use_cache=False).logits
    start = 0
    for index, row in enumerate(rows):
        assert (together[start : start + len(row)] - apart[index, : len(row)]).abs().max() <= 2e-4
        start += len(row)


def test_positions_count_not_lengths():
    """A row may be longer than the decoder's positions if they restart; a cached part counts."""
    model = tiny_model(routing="token")
    limit = model.config.text_config.max_position_embeddings
    ids = torch.full((1, limit + 10), 5)
    positions = torch.arange(limit + 10)[None] % 100
    with torch.no_grad():
        model(input_ids=ids, position_ids=positions, use_cache=False)
        cache = model(input_ids=ids[:, : limit - 2], use_cache=True).past_key_values
        with pytest.raises(ValueError, match=f"reaches position {limit}.*has {limit}"):
            model(input_ids=ids[:, :3], past_key_values=cache)


# --- Images and placeholders ------------------------------------------------------------------------------------------


def test_embeddings_in_place_of_ids_see_the_images(model):
    inputs = tiny_inputs(model.config, [1, 2])
    with torch.no_grad():
        embedded = {k: v for k, v in inputs.items() if k != "input_ids"}
        embedded["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"])
        assert torch.equal(model(**embedded).logits, model(**inputs).logits)
        seen = model.generate(**embedded, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(seen, greedy(model, inputs))


@pytest.mark.parametrize(
    "options",
    [{"encoder_repetition_penalty": 1.3}, {"encoder_no_repeat_ngram_size": 2}, {"repetition_penalty": 1.3}],
    ids=lambda options: next(iter(options)),
)
def test_penalties_that_index_the_prompt_work(model, options):
    inputs = tiny_inputs(model.config, [1])
    tokens = greedy(model, inputs, **options)
    assert tokens.shape == (1, 6) and (tokens != model.config.image_token_id).all()


def test_an_assistant_of_the_same_kind_equals_greedy(model):
    inputs = tiny_inputs(model.config, [1])
    assert torch.equal(greedy(model, inputs, assistant_model=copy.deepcopy(model)), greedy(model, inputs))


def test_prompt_lookup_stops_before_an_image(model):
    """The words before the image come again at the end, so that the continuation looked up runs into placeholders."""
    inputs = tiny_inputs(model.config, [1])
    inputs["input_ids"][0, -2:] = inputs["input_ids"][0, :2]
    assert torch.equal(greedy(model, inputs, prompt_lookup_num_tokens=5), greedy(model, inputs))


@pytest.mark.parametrize("spelling", ["past_key_values", "cache"])
def test_a_conversation_may_pass_all_its_images_again(model, spelling):
    if model.config.routing_scope == "sample":
        pytest.skip("one routing over all images of a sample needs them all at once")
    inputs = tiny_inputs(model.config, [2], text=10)
    second = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[model.config.image_seq_length].item()
    first = {name: value[:, : second - 1] for name, value in inputs.items() if name != "pixel_values"}
    with torch.no_grad():
        cache = model(**first, pixel_values=inputs["pixel_values"][:1], use_cache=True).past_key_values
    if spelling == "cache" and CACHE != "cache":
        pytest.skip("generate() of this transformers knows past_key_values alone")
    assert torch.equal(greedy(model, inputs, **{spelling: cache}), greedy(model, inputs))


@pytest.mark.parametrize("said", [{}, {"use_cache": None}, {"use_cache": True}], ids=str)
def test_a_cache_that_nobody_forbids_can_be_continued_from(model, said):
    inputs = tiny_inputs(model.config, [1])
    head = {name: value[:, :-2] if name != "pixel_values" else value for name, value in inputs.items()}
    with torch.no_grad():
        first = model(**head, **said)
        rest = model(input_ids=inputs["input_ids"][:, -2:], past_key_values=first.past_key_values)
        assert (rest.logits - model(**inputs).logits[:, -2:]).abs().max() <= 2e-4


@pytest.mark.parametrize("spelling", ["past_key_values", "cache"])
def test_both_names_of_the_cache_work_in_every_forward(model, spelling):
    inputs = tiny_inputs(model.config, [1])
    with torch.no_grad():
        whole = model(**inputs).logits
        for part in (model, model.model):
            cache = DynamicCache(config=model.config.text_config)
            head = {k: v[:, :-2] if k != "pixel_values" else v for k, v in inputs.items()}
            first = part(**head, **{spelling: cache}, use_cache=True)
            rest = part(input_ids=inputs["input_ids"][:, -2:], **{spelling: first.past_key_values})
            logits = rest.logits if part is model else model.lm_head(rest.last_hidden_state)
            words = torch.arange(99) != model.config.image_token_id
            assert (logits - whole[:, -2:])[..., words].abs().max() <= 2e-4


def test_a_lost_placeholder_is_an_error_and_shifts_no_other_sample(model):
    inputs = tiny_inputs(model.config, [1, 1])
    inputs["input_ids"][0, 3] = 5
    with pytest.raises(ValueError, match=r"31 tokens, 32 features"):
        model(**inputs)


def test_pixels_that_were_cached_already_are_refused_by_the_forward(model):
    inputs = tiny_inputs(model.config, [1])
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(ValueError, match=r"0 tokens, 16 features.*with a cache, pass the images that are new"):
            model(input_ids=torch.tensor([[5]]), pixel_values=inputs["pixel_values"], past_key_values=cache)


# --- Engines, copies, compilation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["vllm", "vllm_mla", "sglang"])
def test_an_engine_that_drops_the_details_is_refused(engine):
    model = tiny_model(routing="token")
    inputs = tiny_inputs(model.config, [1])
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    AttentionInterface.register(engine, sdpa_attention_forward)
    model.model.language_model.config._attn_implementation = engine
    with pytest.raises(NotImplementedError, match=f"runs under '{engine}', which does not pass detail stacks"):
        model.model.language_model(inputs_embeds=embeddings)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_injects_through_its_own_injectors(copied):
    model = tiny_model(routing="token")
    inputs = tiny_inputs(model.config, [1])
    twin = copied(model)
    with torch.no_grad():
        before = model(**inputs).logits
        for injector in twin.model.injectors:
            injector.residual_scale.zero_()
        assert torch.equal(model(**inputs).logits, before)
        assert (twin(**inputs).logits - before).abs().max() > 1e-3


INJECTIONS = ["stack", "token", "cross_attention"]


@pytest.mark.slow
@pytest.mark.parametrize("name", INJECTIONS)
def test_fullgraph_compilation_of_a_batch(name):
    model = tiny_model(**CHOICES[name])
    inputs = {**tiny_inputs(model.config, [1, 2]), "use_cache": False}
    with torch.no_grad():
        expected = model(**inputs).logits  # first: transformers installs its output hooks at the first call, behind a lock
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert (compiled(**inputs).logits - expected).abs().max() <= 2e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", INJECTIONS)
def test_export_of_a_batch(name):
    model = tiny_model(**CHOICES[name])
    inputs = tiny_inputs(model.config, [1, 2])
    with torch.no_grad():
        program = torch.export.export(model, (), {**inputs, "use_cache": False}, strict=False)
        seen = program.module()(**inputs, use_cache=False)
        assert (seen.logits - model(**inputs, use_cache=False).logits).abs().max() <= 2e-4


# --- Memory -----------------------------------------------------------------------------------------------------------


def large_tensors(smallest: int) -> int:
    gc.collect()
    seen = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is torch.Tensor
    }
    return sum(size for size in seen.values() if size >= smallest)


@pytest.mark.integration
@pytest.mark.skipif(not GENERATE_ENCODES_IMAGES, reason="this transformers encodes in the forward, which keeps nothing")
@pytest.mark.parametrize("num_beams", [1, 4])
def test_details_do_not_live_through_decoding(num_beams):
    model = tiny_model(routing="token")
    inputs = tiny_inputs(model.config, [1])
    details = 16 * 16 * 32 * 4  # K * T * d in float32
    held = []
    model.lm_head.register_forward_hook(lambda *_: held.append(large_tensors(details)))
    before = large_tensors(details)
    greedy(model, inputs, num_beams=num_beams)
    assert held[0] - before >= details  # at prefill
    assert held[-1] - before < details


def test_beams_share_the_details_of_their_sample():
    model = tiny_model(routing="token")
    inputs = tiny_inputs(model.config, [2, 1])
    seen = []
    model.model.injectors[0].register_forward_pre_hook(lambda module, args: seen.append(args[1].details.shape))
    greedy(model, inputs, num_beams=3)
    assert seen == [(16, 3, 16, 32)]


def test_token_routing_keeps_no_tensor_of_the_size_of_the_details_for_backward():
    """What an injector saves for its backward, beside the details themselves, is smaller than they are."""
    model = tiny_model(routing="token", routing_size=8).train()
    injector = model.model.injectors[0]
    details = torch.randn(16, 1, 16, 32, requires_grad=True)
    layout = visual_layout(torch.ones(1, 16, dtype=torch.bool), 1, 16)
    injection = Injection(details, details.detach().var(-1, correction=0), layout, None)
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        injector(torch.randn(1, 16, 32), injection)
    saved.pop(details.untyped_storage().data_ptr())
    assert max(saved.values()) < details.numel()


def test_cross_attention_masks_images_not_tokens():
    """No tensor of positions x detail tokens is made beside the scores of the attention itself."""
    config = tiny_config(injection_type="cross_attention")
    model = MFRSVLMForConditionalGeneration(config).eval()
    seen = []
    model.model.injectors[0].register_forward_pre_hook(lambda module, args: seen.append(args[1].memory.visible.shape))
    inputs = tiny_inputs(config, [2, 1])
    with torch.no_grad():
        model(**inputs)
    assert seen == [(2, inputs["input_ids"].shape[1], 2)]
