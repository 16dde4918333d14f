"""The plugin of vLLM answers as `generate` does. Runs in an environment of its own, with `make test-vllm`."""

import base64
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest


pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

os.environ |= {  # before the first engine
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engines in this process, which records their steps
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

import torch
from openai import OpenAI
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from mfrsvlm.demo import MODEL
from mfrsvlm.demo.answering import answer
from mfrsvlm.files.model_folder import load_model
from mfrsvlm.scenes import ask, draw, plan_scene, scene_seed
from mfrsvlm.serving.vllm_model import MFRSVLMForVLLM


pytestmark = pytest.mark.integration
TOKENS = 64  # of an image
BEFORE = 35  # prompt tokens before the image
TASKS = ("classification", "area", "presence", "count", "comparison", "position", "grounding")
GREEDY = SamplingParams(temperature=0, max_tokens=64)
# Steps of 96 tokens end inside images, and so do blocks of 32 tokens of the prefix cache.
PIECES = {"max_num_batched_tokens": 96, "max_num_seqs": 8}
ENGINES = {
    "whole images": {"enable_prefix_caching": False, "max_num_batched_tokens": 16384},
    "images in pieces": {"enable_prefix_caching": False, **PIECES},
    "prefix cache": {},
    "prefix cache and pieces": PIECES,
    "compiled": {"enforce_eager": False, **PIECES},
    "two workers": {"tensor_parallel_size": 2, **PIECES},
    "prompt lookup": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}},
}


def conversation(images, question):
    parts = [{"type": "image_pil", "image_pil": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


@pytest.fixture(scope="module")
def scenes():
    """12 scenes with 10 questions each."""
    scenes = []
    for index in range(12):
        scene = plan_scene(scene_seed("test", index), 512, (8.0, 16.0))
        texts = dict.fromkeys(question.text for seed in range(20) for question in ask(scene, TASKS, seed))
        scenes.append((draw(scene), list(texts)[:10]))
    return scenes


def generate(model, processor, images, question):
    """The text and the logarithm of the probability of each of its tokens."""
    parts = [{"type": "image", "image": image} for image in images]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=64, output_logits=True, return_dict_in_generate=True)
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :]
    scores = torch.cat(output.logits).log_softmax(dim=1)
    return processor.decode(tokens, skip_special_tokens=True).strip(), scores.gather(1, tokens[:, None])[:, 0]


@pytest.fixture(scope="module")
def expected(scenes):
    """What `generate` gives in float32. Computed before any engine, since vLLM changes the class of the decoder."""
    model, processor = load_model(MODEL)
    model.float()
    return {
        "scenes": [found.text for image, questions in scenes for found in answer(model, processor, image, questions)],
        "scores": [generate(model, processor, [image], questions[0])[1] for image, questions in scenes],
        "pairs": [
            generate(model, processor, [first, second], questions[0])[0]
            for (first, questions), (second, _) in itertools.pairwise(scenes)
        ],
    }


@pytest.fixture(scope="module", params=ENGINES, ids=lambda name: name.replace(" ", "-"))
def engine(request, expected):
    settings = {"enforce_eager": True, **ENGINES[request.param]}
    llm = LLM(MODEL, dtype="float32", block_size=32, max_model_len=1024, limit_mm_per_prompt={"image": 2}, **settings)
    llm.name = request.param
    yield llm
    del llm
    cleanup_dist_env_and_memory()


def texts_of(outputs):
    return [output.outputs[0].text.strip() for output in outputs]


def test_answers_are_those_of_generate(engine, scenes, expected, monkeypatch):
    steps = []  # visual tokens of each step that has some
    embed = MFRSVLMForVLLM.embed_input_ids

    def record(self, *args, **kwargs):
        embeddings = embed(self, *args, **kwargs)
        if self.pending is not None:
            steps.append(self.pending[1].shape[2])
        return embeddings

    monkeypatch.setattr(MFRSVLMForVLLM, "embed_input_ids", record)
    requests = [conversation([image], question) for image, questions in scenes for question in questions]
    outputs = engine.chat(requests, GREEDY, use_tqdm=False)
    assert texts_of(outputs) == expected["scenes"] and len(outputs) == 120

    cached = [output.num_cached_tokens for output in outputs]
    if engine.name in ("whole images", "images in pieces"):
        assert not any(cached) and sum(steps) == 120 * TOKENS
        assert any(step % TOKENS for step in steps) == (engine.name == "images in pieces")
    else:
        assert sum(BEFORE < count < BEFORE + TOKENS for count in cached) > 60


def test_logarithms_of_probabilities_are_those_of_generate(engine, scenes, expected):
    """A small error of the details changes no text."""
    requests = [conversation([image], questions[0]) for image, questions in scenes]
    outputs = engine.chat(requests, SamplingParams(temperature=0, max_tokens=64, logprobs=0), use_tqdm=False)
    for output, scores in zip(outputs, expected["scores"], strict=True):
        found = [next(iter(step.values())).logprob for step in output.outputs[0].logprobs]
        torch.testing.assert_close(torch.tensor(found), scores, atol=2e-4, rtol=0)


def test_two_images_in_a_prompt(engine, scenes, expected):
    pairs = itertools.pairwise(scenes)
    requests = [conversation([first, second], questions[0]) for (first, questions), (second, _) in pairs]
    assert texts_of(engine.chat(requests, GREEDY, use_tqdm=False)) == expected["pairs"]


@pytest.mark.parametrize(
    "file, settings, options, message",
    [
        ("config.json", {"routing": "stack"}, {}, "routing='stack' weighs the details of a whole image"),
        ("config.json", {"injection_type": "cross_attention"}, {}, "injection_type='cross_attention'"),
        ("processor_config.json", {"image_placement": "prefix"}, {}, "image_placement='prefix'"),
        ("config.json", {}, {"pipeline_parallel_size": 2}, "pipeline_parallel_size=2"),
        ("config.json", {}, {"enable_lora": True}, "enable_lora=True"),
        ("config.json", {}, {"compilation_config": {"cudagraph_mode": "FULL"}}, "cudagraph_mode=FULL"),
        ("config.json", {}, {"compilation_config": {"mode": 1}}, "mode=STOCK_TORCH_COMPILE"),
    ],
)
def test_refusals_come_before_the_engine_starts(tmp_path, file, settings, options, message):
    folder = shutil.copytree(MODEL, tmp_path / "model")
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | settings))
    with pytest.raises(ValueError, match=message):
        LLM(str(folder), max_model_len=1024, **options)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of the server of vLLM. Its command `vllm serve` calls the same module, but not from the build for CPUs."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", MODEL, "--served-model-name", "demo"]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--block-size", "32"]
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    log = tmp_path_factory.mktemp("vllm") / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        for _ in range(1200):
            with socket.socket() as client:
                if client.connect_ex(("localhost", port)) == 0:
                    break
            if process.poll() is not None:
                pytest.fail(log.read_text()[-3000:])
            time.sleep(0.25)
        else:
            pytest.fail(log.read_text()[-3000:])
        yield f"http://localhost:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def test_chat_route(address, expected, scenes, tmp_path):
    client = OpenAI(base_url=address, api_key="none")
    image, questions = scenes[0]
    image.save(tmp_path / "scene.png")
    picture = base64.b64encode((tmp_path / "scene.png").read_bytes()).decode()
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
    for question, text in zip(questions, expected["scenes"], strict=False):
        reply = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": [picture, {"type": "text", "text": question}]}],
            temperature=0,
            max_tokens=64,
        )
        assert reply.choices[0].message.content.strip() == text


def test_example_of_the_page(tmp_path):
    root = Path(__file__).parents[2]
    _, example = re.findall(r"```python\n(.*?)```", (root / "docs" / "serving.md").read_text(), flags=re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    command = [sys.executable, str(tmp_path / "example.py")]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1:] == ["9"], result.stderr[-3000:]
