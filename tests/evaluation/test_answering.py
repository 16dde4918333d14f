"""Sharing images and beginnings of prompts changes no answer, whatever the model."""

import functools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_peers import tiny_llava, tiny_qwen2_vl
from tiny_training import tiny_folder
from transformers import GenerationConfig

from mfrsvlm.configuration_mfrsvlm import GENERATE_ENCODES_IMAGES
from mfrsvlm.evaluation.answering import Answerer, FirstWord, Prompt, fingerprint, load


def padded_on_the_right(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "right"}))
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
    shared, alone = Answerer(model, processor, 6), Answerer(model, processor, 6, share=False)
    for answerer in (shared, alone):  # any two tokens will do: this tokenizer begins yes and no alike
        answerer.first_words = [5, 6], [7, 8]
    seen = shared.look(GROUPS, prompts)
    assert shared.share
    together = [answer for batch in (prompts[:5], prompts[5:]) for answer in shared.answer(batch, seen)]
    single = [alone.answer([prompt], alone.look(GROUPS, [prompt]))[0] for prompt in prompts]
    assert [answer.text for answer in together] == [answer.text for answer in single]
    expected = [answer.yes_probability for answer in single]
    assert [answer.yes_probability for answer in together] == pytest.approx(expected, abs=1e-4)
    assert np.ptp(expected[:: len(QUESTIONS)]) > 1e-3  # the images matter


def test_every_image_is_encoded_once(loaded, monkeypatch):
    model, processor = loaded
    answerer = Answerer(model, processor, 3)
    answerer.checked = True  # what checking encodes is not counted
    encoded = []
    encode = type(model.model).get_image_features

    @functools.wraps(encode)  # its parameters are looked at
    def counted(*args, **kwargs):
        outputs = encode(*args, **kwargs)
        encoded.append(len(outputs.pooler_output))
        return outputs

    monkeypatch.setattr(type(model.model), "get_image_features", counted)
    prompts = [Prompt(text, group) for group in range(len(GROUPS)) for text in QUESTIONS]
    seen = answerer.look(GROUPS, prompts)
    for prompt in prompts:
        answerer.answer([prompt], seen)
    assert encoded == [4]


def test_questions_without_an_image(loaded):
    model, processor = loaded
    answerer = Answerer(model, processor, 4)
    prompts = [Prompt(text) for text in QUESTIONS]
    together = answerer.answer(prompts, answerer.look([], prompts))
    alone = [answerer.answer([prompt], answerer.look([], [prompt]))[0] for prompt in prompts]
    assert [a.text for a in together] == [a.text for a in alone]


def test_a_model_that_answers_otherwise_is_not_shared_with(tmp_path, monkeypatch, caplog):
    model, processor = load(str(tiny_folder(tmp_path / "model")), dtype="float32")
    honest = Answerer(model, processor, 4, share=False)
    prompts = [Prompt(QUESTIONS[0], 0)]
    expected = honest.answer(prompts, honest.look(GROUPS[:1], prompts))
    answerer = Answerer(model, processor, 4)
    token_ids = answerer._token_ids
    monkeypatch.setattr(answerer, "_token_ids", lambda *args: token_ids(*args)[:-1])
    assert answerer.answer(prompts, answerer.look(GROUPS[:1], prompts)) == expected
    assert not answerer.share and "the prompts differ" in caplog.text


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
    ("broken", "reason"), [(wrong_features, "the words to come are"), (other_family, "misses an argument")]
)
def test_features_that_do_not_stand_for_the_pixels_are_not_used(tmp_path, monkeypatch, caplog, broken, reason):
    model, processor = load(str(tiny_folder(tmp_path / "model")), dtype="float32")
    prompts = [Prompt(QUESTIONS[0], 0)]
    honest = Answerer(model, processor, 4, share=False)
    expected = honest.answer(prompts, honest.look(GROUPS[:1], prompts))
    answerer = Answerer(model, processor, 4)
    monkeypatch.setattr(answerer, "_encode", broken(answerer, answerer._encode))
    assert answerer.answer(prompts, answerer.look(GROUPS[:1], prompts)) == expected
    assert not answerer.share and reason in caplog.text


@pytest.mark.parametrize("name", sorted(FOLDERS.keys() & {"inline", "prefix", "cross-attention", "llava"}))
def test_rounding_does_not_keep_from_sharing(name, tmp_path):
    """In half precision, two ways to compute the same are never quite the same."""
    model, processor = load(str(FOLDERS[name](tmp_path / "model")), dtype="bfloat16")
    answerer = Answerer(model, processor, 8)
    answerer.look(GROUPS, [Prompt(QUESTIONS[0], 0)])
    assert answerer.checked and answerer.share


def test_whether_to_share_does_not_depend_on_what_is_asked_first(tmp_path, monkeypatch):
    """Or else a run that goes on could answer otherwise than one that was never stopped."""
    model, processor = load(str(tiny_folder(tmp_path / "model")), dtype="float32")
    compared = []
    for group in range(2):
        answerer = Answerer(model, processor, 4)
        monkeypatch.setattr(answerer, "_words_to_come", lambda inputs: compared.append(inputs) or [])
        answerer.look([GROUPS[group]], [Prompt(QUESTIONS[group], 0)])
    half = len(compared) // 2
    for first, second in zip(compared[:half], compared[half:], strict=True):
        assert torch.equal(first["input_ids"], second["input_ids"])
        if "pixel_values" in first:
            assert torch.equal(first["pixel_values"], second["pixel_values"])


def test_generation_is_greedy_whatever_the_model_asks_for(tmp_path):
    model, processor = load(str(tiny_folder(tmp_path / "model")), dtype="float32")
    prompts = [Prompt(text, 0) for text in QUESTIONS]
    plain = Answerer(model, processor, 6)
    expected = plain.answer(prompts, plain.look(GROUPS[:1], prompts))
    first = processor.tokenizer(expected[0].text, add_special_tokens=False).input_ids[0]
    for settings in (
        {"do_sample": True, "temperature": 5.0, "top_k": 3},
        {"repetition_penalty": 3.0, "num_beams": 2},
        {"no_repeat_ngram_size": 1, "suppress_tokens": [first], "min_new_tokens": 6},
    ):
        model.generation_config = GenerationConfig(**settings, bos_token_id=1, eos_token_id=2)
        swayed = Answerer(model, processor, 6)
        assert swayed.answer(prompts, swayed.look(GROUPS[:1], prompts)) == expected


def test_answers_that_were_cut_off_are_told_apart(tmp_path):
    model, processor = load(str(tiny_folder(tmp_path / "model")), dtype="float32")
    prompts = [Prompt(text, 0) for text in QUESTIONS]
    honest = Answerer(model, processor, 6)
    assert all(answer.cut_off for answer in honest.answer(prompts, honest.look(GROUPS[:1], prompts)))
    inputs = honest._plain_inputs(prompts[:1], GROUPS[:1])
    words = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :].tolist()
    for end, length in ((words[-1], 6), (words[2], 6), (words[5], 5)):
        model.generation_config.eos_token_id = [2, end]
        answerer = Answerer(model, processor, length)
        [answer] = answerer.answer(prompts[:1], answerer.look(GROUPS[:1], prompts[:1]))
        assert answer.cut_off == (end not in words[:length])


def test_probability_of_yes():
    first = FirstWord([1], [2])
    logits = torch.tensor([[0.0, 2.0, 1.0], [0.0, -1.0, 1.0]])
    assert first(None, logits) is logits
    assert first.yes_probabilities == pytest.approx([1 / (1 + np.exp(-1.0)), 1 / (1 + np.exp(2.0))])
    first(None, logits.flip(0))  # only the first word counts
    assert first.yes_probabilities[0] > 0.5


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


def test_a_model_without_a_chat_template_is_refused(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        load(str(folder))
