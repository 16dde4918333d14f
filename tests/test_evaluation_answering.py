"""Sharing images and beginnings of prompts changes no answer, whatever the model."""

import functools

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_peers import tiny_llava, tiny_qwen2_vl
from tiny_training import tiny_folder

from mfrsvlm.evaluation.answering import Answerer, FirstWord, Prompt, fingerprint, load


FOLDERS = {
    "inline": lambda folder: tiny_folder(folder, "inline"),
    "prefix": lambda folder: tiny_folder(folder, "prefix"),
    "cross-attention": lambda folder: tiny_folder(folder, injection_type="cross_attention"),
    "token routing": lambda folder: tiny_folder(folder, routing="token"),
    "global view only": lambda folder: tiny_folder(folder, window_sizes=[], injection_layers=[]),
    "llava": tiny_llava,
    "qwen2-vl": tiny_qwen2_vl,
}
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
    assert not answerer.share and "processed alone" in caplog.text


def test_generation_is_greedy_whatever_the_model_asks_for(tmp_path):
    model, processor = load(str(tiny_folder(tmp_path / "model")), dtype="float32")
    prompts = [Prompt(text, 0) for text in QUESTIONS]
    plain = Answerer(model, processor, 6)
    expected = plain.answer(prompts, plain.look(GROUPS[:1], prompts))
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=3.0, num_beams=2)
    swayed = Answerer(model, processor, 6)
    assert swayed.answer(prompts, swayed.look(GROUPS[:1], prompts)) == expected


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
    assert fingerprint(model) != before


def test_a_model_without_a_chat_template_is_refused(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        load(str(folder))
