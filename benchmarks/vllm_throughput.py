"""Measures requests per second of `generate`, one by one and in batches, and of vLLM with the plugin of this package.

    make .venv-vllm/.ready
    .venv-vllm/bin/python benchmarks/vllm_throughput.py [--requests 100] [--questions 1] [--rounds 3] [--compiled]

All answer the same requests about synthetic scenes, in turns, and each round has scenes of its own, so that no cache holds
them. Images lie in memory, loading is not counted, and answers that differ are counted. vLLM runs in a process of its own,
as in a server. CPU time is that of both processes, and depends less on what else the computer does.
"""

import argparse
import os
import statistics
import time
from typing import Any


os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import psutil
import torch
from vllm import LLM, SamplingParams

from mfrsvlm.experiments import SCENE_MODEL
from mfrsvlm.files.model_folder import load_model
from mfrsvlm.scenes import ask, draw, plan_scene, scene_seed


TASKS = ("classification", "area", "presence", "count", "comparison", "position")
LENGTH = 16  # of an answer at most, in tokens


def make_requests(first: int, count: int, questions: int) -> list[tuple[Any, str]]:
    """Images and questions: `questions` for each scene from the given number on."""
    requests: list[tuple[Any, str]] = []
    while len(requests) < count:
        scene = plan_scene(scene_seed("test", first), 512, (8.0, 16.0))
        image = draw(scene)
        texts = dict.fromkeys(question.text for seed in range(50) for question in ask(scene, TASKS, seed))
        requests += [(image, text) for text in list(texts)[:questions]]
        first += 1
    return requests[:count]


def cpu_seconds() -> float:
    """Of this process and those that it started, user and system."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=SCENE_MODEL)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--questions", type=int, default=1, help="about each scene (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="of generate in batches (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu", help="of generate; vLLM chooses its own")
    parser.add_argument("--compiled", action="store_true", help="let vLLM compile the decoder")
    args = parser.parse_args()
    model, processor = load_model(args.model)
    model.to(args.device, getattr(torch, args.dtype))
    engine = LLM(args.model, dtype=args.dtype, enforce_eager=not args.compiled, max_model_len=1024, block_size=32)

    def generate(requests: list[tuple[Any, str]], batch_size: int) -> list[str]:
        answers = []
        for start in range(0, len(requests), batch_size):
            inputs = processor.apply_chat_template(
                [
                    [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
                    for image, text in requests[start : start + batch_size]
                ],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            ).to(model.device, model.dtype)
            with torch.inference_mode():
                tokens = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)
            answers += processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [answer.strip() for answer in answers]

    def vllm(requests: list[tuple[Any, str]]) -> list[str]:
        conversations = [
            [{"role": "user", "content": [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": text}]}]
            for image, text in requests
        ]
        outputs = engine.chat(conversations, SamplingParams(temperature=0, max_tokens=LENGTH), use_tqdm=False)
        return [output.outputs[0].text.strip() for output in outputs]

    ways = {
        "generate, one by one": lambda requests: generate(requests, 1),
        f"generate, batches of {args.batch_size}": lambda requests: generate(requests, args.batch_size),
        "vLLM, compiled" if args.compiled else "vLLM, eager": vllm,
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    costs: dict[str, list[float]] = {name: [] for name in ways}
    differ = dict.fromkeys(ways, 0)
    for number in range(args.rounds + 1):  # the first one warms up
        requests = make_requests(number * args.requests, args.requests, args.questions)
        expected = None
        for name, way in ways.items():
            start, used = time.perf_counter(), cpu_seconds()
            answers = way(requests)
            if number:
                rates[name].append(len(requests) / (time.perf_counter() - start))
                costs[name].append((cpu_seconds() - used) / len(requests) * 1000)
            expected = expected or answers
            differ[name] += sum(a != b for a, b in zip(answers, expected, strict=True))
    total = args.requests * (args.rounds + 1)
    print(f"{args.requests} requests, {args.questions} about each scene, {args.rounds} rounds, {args.dtype}")
    for name, found in rates.items():
        speed = f"{statistics.median(found):6.1f} requests/s ({min(found):.1f} to {max(found):.1f})"
        print(f"{name:<25}{speed}, {statistics.median(costs[name]):.0f} ms of CPU each, {differ[name]} of {total} differ")


if __name__ == "__main__":
    main()
