"""Sharing images and prefixes of prompts changes no answer, whatever the model, and nothing of the model."""

import functools
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_peers import tiny_llava, tiny_qwen2_vl
from tiny_training import tiny_folder
from transformers import GenerationConfig

from mfrsvlm.checksums_mfrsvlm import update_checksums
from mfrsvlm.configuration_mfrsvlm import GENERATE_ENCODES_IMAGES
from mfrsvlm.evaluation.answering import Answerer, Prompt, YesProbability, fingerprint, load


def padded_on_the_right(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "right"}))
    update_checksums(folder)
    return folder


FOLDERS = {
    "inline": lambda folder: tiny_folder(folder, "inline"),
    "prefix": lambda folder: tiny_folder(folder, "prefix"),
    "cross-attention": lambda folder: tiny_folder(folder, injection_type="cross_attention"),
    "token routing": lambda folder: tiny_folder(folder, routing="token"),
    "global view only": lambda folder: tiny_folder(folder, window_sizes=[], injection_layers=[]),
    "padded on the right": lambda folder: padded_on_the_right(tiny_folder(folder)),
}
if GENERATE_ENCODES_IMAGES:  # before, other families take no encoded images, and every question is processed on its own
    FOLDERS |= {"llava": tiny_llava, "qwen2-vl": tiny_qwen2_vl}
QUESTIONS = ("Is there a river?", "How many ships are there?", "What?")


@pytest.fixture(scope="module", params=FOLDERS)
def loaded(request, tmp_path_factory):
    folder = FOLDERS[request.param](tmp_path_factory.mktemp("models") / "model")
    return load(str(folder), dtype="float32", trust_remote_code=request.param == "qwen2-vl")


def picture(seed, size=(40, 60)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


GROUPS = [[picture(0)], [picture(1), picture(2, (60, 40))], [picture(3, (28, 84))]]


def test_shared_answers_are_those_of_one_question_at_a_time(loaded):
    model, processor = loaded
    prompts = [Prompt(text, group) for group in range(len(GROUPS)) for text in QUESTIONS]
    shared, alone = Answerer(model, processor, 6), Answerer(model, processor, 6, share_images=False)
    for answerer in (shared, alone):  # any two tokens will do: this tokenizer begins yes and no alike
        answerer.first_tokens = [5, 6], [7, 8]
    encoded = shared.encode_images(GROUPS, prompts)
    assert shared.share_images
    together = [answer for batch in (prompts[:5], prompts[5:]) for answer in shared.answer(batch, encoded)]
    single = [alone.answer([prompt], alone.encode_images(GROUPS, [prompt]))[0] for prompt in prompts]
    assert [answer.text for answer in together] == [answer.text for answer in single]
    expected = [answer.yes_probability for answer in single]
    assert [answer.yes_probability for answer in together] == pytest.approx(expected, abs=1e-4)
    assert np.ptp(expected[:: len(QUESTIONS)]) > 1e-3  # the images matter


def test_every_image_is_encoded_once(loaded, monkeypatch):
    model, processor = loaded
    answerer = Answerer(model, processor, 3)
    answerer.checked = True  # what checking encodes is not counted
    counts = []
    encode = type(model.model).get_image_features

    @functools.wraps(encode)  # its parameters are looked at
    def counted(*args, **kwargs):
        outputs = encode(*args, **kwargs)
        counts.append(len(outputs.pooler_output))
        return outputs

    monkeypatch.setattr(type(model.model), "get_image_features", counted)
    prompts = [Prompt(text, group) for group in range(len(GROUPS)) for text in QUESTIONS]
    encoded = answerer.encode_images(GROUPS, prompts)
    for prompt in prompts:
        answerer.answer([prompt], encoded)
    assert counts == [4]


def test_questions_without_an_image(loaded):
    model, processor = loaded
    answerer = Answerer(model, processor, 4)
    prompts = [Prompt(text) for text in QUESTIONS]
    together = answerer.answer(prompts, answerer.encode_images([], prompts))
    alone = [answerer.answer([prompt], answerer.encode_images([], [prompt]))[0] for prompt in prompts]
    assert [a.text for a in together] == [a.text for a in alone]


def test_images_are_not_shared_where_prompts_differ(tmp_path, monkeypatch, caplog):
    model, processor = load(str(tiny_folder(tmp_path / "model")), dtype="float32")
    honest = Answerer(model, processor, 4, share_images=False)
    prompts = [Prompt(QUESTIONS[0], 0)]
    expected = honest.answer(prompts, honest.encode_images(GROUPS[:1], prompts))
    answerer = Answerer(model, processor, 4)
    token_ids = answerer._token_ids
    monkeypatch.setattr(answerer, "_token_ids", lambda *args: token_ids(*args)[:-1])
    assert answerer.answer(prompts, answerer.encode_images(GROUPS[:1], prompts)) == expected
    assert not answerer.share_images and "the prompts differ" in caplog.text


def wrong_features(answerer, honest):
    def encode(groups):
        encoded = honest(groups)
        encoded.outputs.pooler_output = [tokens.roll(1, 0) for tokens in encoded.outputs.pooler_output]
        return encoded

    return encode


def other_family(answerer, honest):
    def encode(groups):
        raise TypeError("get_image_features() misses an argument")

    return encode


@pytest.mark.parametrize(
    ("broken", "reason"),
    [(wrong_features, "probabilities of the next tokens differ by"), (other_family, "misses an argument")],
)
def test_features_that_do_not_stand_for_the_pixels_are_not_used(tmp_path, monkeypatch, caplog, broken, reason):
    model, processor = load(str(tiny_folder(tmp_path / "model")), dtype="float32")
    prompts = [Prompt(QUESTIONS[0], 0)]
    honest = Answerer(model, processor, 4, share_images=False)
    expected = honest.answer(prompts, honest.encode_images(GROUPS[:1], prompts))
    answerer = Answerer(model, processor, 4)
    monkeypatch.setattr(answerer, "_encode", broken(answerer, answerer._encode))
    assert answerer.answer(prompts, answerer.encode_images(GROUPS[:1], prompts)) == expected
    assert not answerer.share_images and reason in caplog.text


@pytest.mark.parametrize("name", sorted(FOLDERS.keys() & {"inline", "prefix", "cross-attention", "llava"}))
def test_rounding_does_not_keep_from_sharing(name, tmp_path):
    """In half precision, two ways to compute the same are never quite the same."""
    model, processor = load(str(FOLDERS[name](tmp_path / "model")), dtype="bfloat16")
    answerer = Answerer(model, processor, 8)
    answerer.encode_images(GROUPS, [Prompt(QUESTIONS[0], 0)])
    assert answerer.checked and answerer.share_images


def test_whether_to_share_does_not_depend_on_what_is_asked_first(tmp_path, monkeypatch):
    """Or else a run that goes on could answer otherwise than one that was never stopped."""
    model, processor = load(str(tiny_folder(tmp_path / "model")), dtype="float32")
    compared = []
    for group in range(2):
        answerer = Answerer(model, processor, 4)
        monkeypatch.setattr(answerer, "_next_token_probs", lambda inputs: compared.append(inputs) or [])
        answerer.encode_images([GROUPS[group]], [Prompt(QUESTIONS[group], 0)])
    half = len(compared) // 2
    for first, second in zip(compared[:half], compared[half:], strict=True):
        assert torch.equal(first["input_ids"], second["input_ids"])
        if "pixel_values" in first:
            assert torch.equal(first["pixel_values"], second["pixel_values"])


def test_generation_is_greedy_whatever_the_model_asks_for(tmp_path):
    model, processor = load(str(tiny_folder(tmp_path / "model")), dtype="float32")
    prompts = [Prompt(text, 0) for text in QUESTIONS]
    plain = Answerer(model, processor, 6)
    expected = plain.answer(prompts, plain.encode_images(GROUPS[:1], prompts))
    first = processor.tokenizer(expected[0].text, add_special_tokens=False).input_ids[0]
    for settings in (
        {"do_sample": True, "temperature": 5.0, "top_k": 3},
        {"repetition_penalty": 3.0, "num_beams": 2},
        {"no_repeat_ngram_size": 1, "suppress_tokens": [first], "min_new_tokens": 6},
    ):
        model.generation_config = GenerationConfig(**settings, bos_token_id=1, eos_token_id=2)
        swayed = Answerer(model, processor, 6)
        assert swayed.answer(prompts, swayed.encode_images(GROUPS[:1], prompts)) == expected


def test_truncated_answers_are_reported(tmp_path):
    model, processor = load(str(tiny_folder(tmp_path / "model")), dtype="float32")
    prompts = [Prompt(text, 0) for text in QUESTIONS]
    honest = Answerer(model, processor, 6)
    assert all(answer.truncated for answer in honest.answer(prompts, honest.encode_images(GROUPS[:1], prompts)))
    inputs = honest._plain_inputs(prompts[:1], GROUPS[:1])
    words = model.generate(**inputs, generation_config=honest.generation)[0, inputs["input_ids"].shape[1] :].tolist()
    for end, length in ((words[-1], 6), (words[2], 6), (words[5], 5)):
        model.generation_config.eos_token_id = [2, end]
        answerer = Answerer(model, processor, length)
        [answer] = answerer.answer(prompts[:1], answerer.encode_images(GROUPS[:1], prompts[:1]))
        assert answer.truncated == (end not in words[:length])


def test_tokens_have_the_probabilities_that_transformers_computes(loaded):
    model, processor = loaded
    answerer = Answerer(model, processor, 6)
    prompts = [Prompt(text, 0) for text in QUESTIONS]
    answers = answerer.answer(prompts, answerer.encode_images(GROUPS[:1], prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        with answerer._greedy():
            inputs = answerer._plain_inputs([prompt], GROUPS)
            outputs = model.generate(
                **inputs, generation_config=answerer.generation, return_dict_in_generate=True, output_logits=True
            )
        new = outputs.sequences[:, inputs["input_ids"].shape[1] :]
        scores = model.compute_transition_scores(outputs.sequences, outputs.logits, normalize_logits=True)[0]
        ids, likelihoods = zip(*answer.tokens, strict=True)
        assert list(ids) == new[0, : len(ids)].tolist() and not answerer.end_tokens & set(ids)
        assert likelihoods == pytest.approx(scores[: len(ids)].tolist(), abs=1e-4)


def test_probability_of_yes():
    first = YesProbability([1], [2])
    logits = torch.tensor([[0.0, 2.0, 1.0], [0.0, -1.0, 1.0]])
    assert first(None, logits) is logits
    assert first.probabilities == pytest.approx([1 / (1 + np.exp(-1.0)), 1 / (1 + np.exp(2.0))])
    first(None, logits.flip(0))  # only the first word counts
    assert first.probabilities[0] > 0.5


def test_fingerprint_changes_with_the_weights(tmp_path):
    model, _ = load(str(tiny_folder(tmp_path / "model")), dtype="float32")
    before = fingerprint(model)
    assert before == fingerprint(model)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    changed = fingerprint(model)
    weights = model.model.language_model.embed_tokens.weight.data
    assert weights.numel() > 2 * 4096
    weights[-1, -1] += 1
    assert len({before, changed, fingerprint(model)}) == 3
    weights.copy_(weights.flip(0))  # the same numbers elsewhere
    assert fingerprint(model) not in (before, changed)


def test_a_model_without_a_chat_template_is_rejected(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    for name in ("chat_template.jinja", "checksums.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="no chat template"):
        load(str(folder))


def state_of(model, processor):
    return (
        [module.training for module in model.modules()],
        model.generation_config.to_dict(),
        model.config.to_dict(),
        (processor.tokenizer.padding_side, processor.tokenizer.pad_token),
        model.device,
    )


@pytest.mark.parametrize("share_images", [True, False])
def test_model_and_processor_stay_as_they_were(tmp_path, share_images):
    model, processor = load(str(tiny_folder(tmp_path / "model")), dtype="float32")
    model.train()
    model.model.vision_tower.eval()  # as with a frozen tower
    model.config.use_cache = False  # as with gradient checkpointing
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.3, eos_token_id=2, bos_token_id=1)
    processor.tokenizer.padding_side = "right"
    processor.tokenizer.pad_token = None
    before, generation = state_of(model, processor), model.generation_config
    answerer = Answerer(model, processor, 4, share_images)
    prompts = [Prompt(text, 0) for text in QUESTIONS]
    first = answerer.answer(prompts, answerer.encode_images(GROUPS[:1], prompts))
    assert state_of(model, processor) == before and model.generation_config is generation
    assert first == answerer.answer(prompts, answerer.encode_images(GROUPS[:1], prompts))  # no dropout
    with pytest.raises(AttributeError):
        answerer.answer([None], answerer.encode_images(GROUPS[:1], prompts))
    assert state_of(model, processor) == before
    with answerer._greedy():
        inputs = answerer._plain_inputs(prompts[:1], GROUPS[:1])
    model(**inputs, labels=inputs["input_ids"]).loss.backward()  # no tensor of inference mode is left behind


def test_a_model_with_an_adapter_shares_images(tmp_path):
    peft = pytest.importorskip("peft")
    model, processor = load(str(tiny_folder(tmp_path / "model")), dtype="float32")
    prompts = [Prompt(text, 0) for text in QUESTIONS]
    base = Answerer(model, processor, 6, share_images=False)
    before = base.answer(prompts, base.encode_images(GROUPS[:1], prompts))
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    answerer = Answerer(adapted, processor, 6)
    together = answerer.answer(prompts, answerer.encode_images(GROUPS[:1], prompts))
    assert answerer.share_images and [a.text for a in together] != [a.text for a in before]
    inputs = Answerer(adapted, processor, 6, share_images=False)._plain_inputs(prompts[:1], GROUPS[:1])
    tokens = adapted.generate(**inputs, generation_config=answerer.generation)[0, inputs["input_ids"].shape[1] :]
    assert together[0].text == processor.decode(tokens, skip_special_tokens=True).strip()


def test_no_argument_is_deprecated(loaded):
    """transformers 5.24 renames the cache of forward and generate."""
    model, processor = loaded
    answerer = Answerer(model, processor, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        prompts = [Prompt(text, 0) for text in QUESTIONS]
        answerer.answer(prompts, answerer.encode_images(GROUPS[:1], prompts))


def test_fingerprint_of_quantized_weights():
    layer = torch.nn.Linear(8, 8)
    found = set()
    for change in (0.0, 0.5):
        with torch.no_grad():
            layer.weight[0, 0] += change
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantized = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(layer), {torch.nn.Linear})
        found.add(fingerprint(quantized))
        float8 = torch.nn.Module()
        float8.register_buffer("weight", layer.weight.detach().to(torch.float8_e4m3fn))
        found.add(fingerprint(float8))
    assert len(found) == 4


@pytest.mark.parametrize(
    ("saved", "cpu", "asked", "loaded"),
    [
        ("bfloat16", "AVX2", "auto", "float32"),
        ("bfloat16", "AVX512", "auto", "bfloat16"),
        ("float16", "AVX512", "auto", "float32"),
        ("float32", "AVX2", "auto", "float32"),
        ("bfloat16", "AVX2", "bfloat16", "bfloat16"),
    ],
)
def test_weights_are_float32_on_a_cpu_that_is_slow_in_their_type(tmp_path, monkeypatch, caplog, saved, cpu, asked, loaded):
    folder = tiny_folder(tmp_path / "model")
    model, _ = load(str(folder), dtype=saved)
    model.save_pretrained(folder)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cpu)
    caplog.clear()
    again, _ = load(str(folder), dtype=asked, device="cpu")
    assert {value.dtype for value in again.parameters()} == {getattr(torch, loaded)}
    assert (f"--dtype {saved} keeps it" in caplog.text) == (saved != loaded)
    assert all(torch.equal(value.float(), model.get_parameter(name).float()) for name, value in again.named_parameters())
