"""The ablation on photographs: what the arms see, how answers are ranked, intervals over seeds, and the command."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from tiny_photographs import lite0_state, make_photographs, texture

from mfrsvlm.experiments import photograph_ablation
from mfrsvlm.experiments.estimates import over_seeds
from mfrsvlm.experiments.photograph_ablation import (
    ARMS,
    REFERENCE,
    arms_table,
    as_tiles,
    build,
    log_probabilities,
    make_encoder,
)
from mfrsvlm.modeling_mfrsvlm import resample_to_grid
from mfrsvlm.training.branches import BranchCollator
from mfrsvlm.training.demo_model.architecture import make_tokenizer
from mfrsvlm.training.demo_model.photograph_questions import turn
from mfrsvlm.training.image_features import cache_image_features, project


QUESTIONS = [("What kind of place is this?", "a river"), ("Is there water?", "yes"), ("Is there water?", "no")]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(QUESTIONS, 300)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "lite0.pth"
    torch.save(lite0_state(), path)
    return path


def test_tiles_are_the_windows_encoded_one_by_one(weights, tokenizer, tmp_path):
    model, processor = make_encoder(weights, "image", tokenizer)
    photograph = Image.fromarray(texture(0, 256))
    pixels = torch.from_numpy(np.stack(processor.image_processor([photograph], return_tensors="np")["pixel_values"]))
    features = cache_image_features(model, [pixels], 1, tmp_path / "features.npy")
    tokens = as_tiles(features)[0, 0].reshape(8, 8, -1)
    canvas = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        for row in range(2):
            for column in range(2):
                tile = canvas[..., 128 * row : 128 * row + 128, 128 * column : 128 * column + 128]
                _, (deepest,) = model.model._encode(tile, [model.config.detail_feature_layers[-1]])
                expected = resample_to_grid(deepest, 4)[0].permute(1, 2, 0)
                found = tokens[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                np.testing.assert_allclose(found, expected.numpy(), atol=2e-2, rtol=2e-2)  # cached in float16


@pytest.mark.parametrize("name", [REFERENCE, "windows as decoder tokens"])
@pytest.mark.parametrize("questions", [QUESTIONS, QUESTIONS[1:]], ids=["different", "the same"])
def test_packed_answers_are_as_probable_as_alone(name, questions, tokenizer):
    seen = np.random.default_rng(0).normal(size=(10, 9, 16, 256)).astype(np.float16)
    features = photograph_ablation.features_of(ARMS[name], seen)
    model, processor = build(ARMS[name], tokenizer, features, seed=0)
    model.eval()
    turns = [message for question, answer in questions for message in turn(question, answer)]
    turns[0]["content"].insert(0, {"type": "image"})
    image = torch.from_numpy(features[:1]).float()
    packed = log_probabilities(model, BranchCollator(processor), turns, image)
    for (question, answer), found in zip(questions, packed, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        whole = processor.apply_chat_template([*chat, {"role": "assistant", "content": [{"type": "text", "text": answer}]}])
        count = processor.image_processor.num_image_tokens
        ids, start = (
            processor.tokenizer(
                text.replace("<image>", "<image>" * count), add_special_tokens=False, return_tensors="pt"
            ).input_ids
            for text in (whole, prompt)
        )
        with torch.no_grad():
            logits = model(input_ids=ids, mm_encoder_outputs={"image": project(model, image)}).logits[0].log_softmax(-1)
        place = torch.arange(start.shape[1], ids.shape[1])
        torch.testing.assert_close(found, logits[place - 1, ids[0, place]], atol=1e-4, rtol=1e-4)


def test_intervals_over_seeds_are_those_of_a_paired_t_test():
    one, other = np.array([51.0, 53.5, 52.0, 55.0]), np.array([50.0, 51.0, 52.5, 52.0])
    mean, half = over_seeds(one - other)
    expected = stats.ttest_rel(one, other).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((expected.low, expected.high))
    assert over_seeds([3.0]) == (3.0, math.inf)


def test_table_compares_seed_by_seed():
    def row(name, seed, right):
        scores = {"class": [1.0] * right + [0.0] * (10 - right), "labels": [0.5] * 10, "caption": [2.0 + seed] * 10}
        return {"arm": name, "seed": seed, "scores": scores, "visual_tokens": 16, "decoder_tokens": 2e6}

    rows = [row(REFERENCE, seed, 5 + seed) for seed in range(2)] + [
        row("stack routing", seed, 4 + seed) for seed in range(2)
    ]
    rows.append(row("cross-attention", 0, 7))
    lines = arms_table(rows)
    assert "| stack routing | 2 | 16 | 2.00 | 45.0 (40.0 to 50.0) | 50.0 (50.0 to 50.0) | 2.500 (2.000 to 3.000) |" in lines
    assert "| stack routing | 2 | -10.0 [-10.0, -10.0] | +0.0 [+0.0, +0.0] | +0.000 [+0.000, +0.000] |" in lines
    assert "| cross-attention | 1 | +20.0 | +0.0 | +0.000 |" in lines  # one seed has no interval


@pytest.mark.slow
def test_command_continues_where_it_stopped(weights, tmp_path, capsys):
    real = make_photographs(tmp_path / "real", each=3)
    words = ["--real", str(real), "--work", str(tmp_path / "work"), "--table", str(tmp_path / "table.md")]
    words += ["--encoder-weights", str(weights), "--steps", "1", "--batch", "2", "--copies", "1", "--float32"]
    words += ["--arms", "global view only", REFERENCE]
    photograph_ablation.main([*words, "--seeds", "0"])
    probes = (tmp_path / "table.md").read_text()
    assert "| windows of the original pixels |" in probes and probes.count("\n") == 5
    assert not (tmp_path / "work" / "runs.jsonl").exists()
    photograph_ablation.main([*words, "--seeds", "1"])
    first = (tmp_path / "work" / "runs.jsonl").read_text()
    capsys.readouterr()
    photograph_ablation.main([*words, "--seeds", "2"])
    log = (tmp_path / "work" / "runs.jsonl").read_text()
    assert log.startswith(first) and "[1/2," in capsys.readouterr().out
    done = [json.loads(line) for line in log.splitlines()]
    assert [(row["arm"], row["seed"]) for row in done] == [(n, s) for s in range(2) for n in ("global view only", REFERENCE)]
    table = (tmp_path / "table.md").read_text()
    assert table.startswith(probes) and "| global view only | 2 | 16 |" in table
