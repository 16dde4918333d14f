"""`benchmarks/speed.py`: the whole command at tiny sizes, and the algorithm that it compares with. No time is asserted."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import VIT_SIZES, tiny_model
from transformers import CLIPVisionConfig

from mfrsvlm.configuration_mfrsvlm import CACHE


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
AS_PUBLISHED = {"window_encoding": "resize", "window_weighting": "hann", "routing": "stack", "routing_scope": "sample"}


@pytest.fixture(scope="module")
def benchmarks():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))


def test_the_plain_algorithm_answers_as_the_model_does(benchmarks):
    vision = CLIPVisionConfig(**VIT_SIZES | {"image_size": 56})
    model = tiny_model(vision_config=vision, window_sizes=[56, 28], **AS_PUBLISHED)
    config = model.config
    torch.manual_seed(1)
    view, text = torch.randn(1, 3, 56, 56), torch.randint(3, 90, (1, 9))
    canvas = torch.nn.functional.interpolate(view, size=(112, 112), mode="bilinear")
    cut = [canvas[0, :, y : y + w.size, x : x + w.size] for w in config.windows for y, x in w.offsets]
    pixels = torch.cat([view.flatten(), *(window.flatten() for window in cut)])[None]
    ids = torch.cat([torch.full((1, config.image_seq_length), config.image_token_id), text], dim=1)
    plain = benchmarks("published_algorithm").PublishedAlgorithm(model)
    with torch.no_grad():
        logits, cache = plain.prefill(plain.encode(view), text)
        outputs = model(input_ids=ids, pixel_values=pixels, use_cache=True)
        words = torch.arange(config.text_config.vocab_size) != config.image_token_id
        assert torch.allclose(logits[..., words], outputs.logits[..., words], atol=1e-4)
        token = plain.next_token(logits)
        following = model(input_ids=token, **{CACHE: outputs[CACHE]}).logits
        assert plain.step(token, cache) == plain.next_token(following)


def test_every_family_answers_about_every_canvas(benchmarks):
    same_sizes = benchmarks("same_sizes")
    sizes = same_sizes.SIZES["tiny"]
    for build in same_sizes.PEERS.values():
        lengths = []
        for scale in (1, 2):
            model, inputs = build(sizes, scale)
            with torch.no_grad():
                lengths.append(model.eval()(**inputs, logits_to_keep=1).logits.shape[-1])
        assert lengths == [1000, 1000]


@pytest.mark.integration
def test_the_command_measures_every_case(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "speed.py"), "--quick", "--dtype", "float32", "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "speed.md").read_text() == result.stdout
    assert (tmp_path / "speed.png").stat().st_size > 10_000
    measured = json.loads((tmp_path / "speed.json").read_text())["types"]["float32"]
    answers = measured["spans"]["answers"]
    assert {"published algorithm", "as published", "defaults", "LLaVA-NeXT", "Qwen3-VL", "the decoder alone"} <= set(answers)
    for stages in answers.values():
        for encode, first, whole in zip(stages["encode"], stages["first"], stages["whole"], strict=True):
            for clock in (0, 1):  # wall seconds, and user and system seconds
                assert 0 <= encode[clock] < first[clock] < whole[clock]
    operations = measured["operations"]["encode"]
    assert operations["published algorithm"] == pytest.approx(operations["as published"], rel=0.02)
    assert operations["published algorithm"] > operations["defaults"] > operations["smallest windows, no overlap"]
    cases = [case for case, _, _ in measured["must_show"]]
    for word in (
        "first answer",
        "further question",
        "32 questions",
        "decode",
        "preprocessing",
        "ceiling",
        "memory",
        "canvas",
    ):
        assert any(word in case for case in cases), word
