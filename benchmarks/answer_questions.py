"""Questions a second: one `generate` a question, against the harness, which encodes an image once and answers in batches.

    python benchmarks/answer_questions.py [--model demo/model] [--scenes 4] [--questions 32] [--rounds 3]

Both ways answer the same questions about the same synthetic scenes, in turns; the ratio of every round is printed, and the
answers must be the same.
"""

import argparse
import time
from itertools import cycle, islice
from pathlib import Path

import torch

from mfrsvlm.evaluation.answering import Answerer, Prompt, load
from mfrsvlm.scenes import ask, draw, plan_scene, scene_seed


TASKS = ("classification", "area", "presence", "count", "comparison", "position")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(Path(__file__).parents[1] / "demo" / "model"))
    parser.add_argument("--scenes", type=int, default=4)
    parser.add_argument("--questions", type=int, default=32, help="about each scene")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    model, processor = load(args.model, dtype="float32", device=args.device)
    answerer = Answerer(model, processor, max_new_tokens=16)
    scenes = [plan_scene(scene_seed("test", index), 512, (8.0, 16.0)) for index in range(args.scenes)]
    images = [[draw(scene)] for scene in scenes]
    prompts = []
    for index, scene in enumerate(scenes):
        texts = [question.text for seed in range(20) for question in ask(scene, TASKS, seed)]
        prompts += [Prompt(text, index) for text in islice(cycle(texts), args.questions)]

    def one_by_one() -> list[str]:
        said = []
        for prompt in prompts:
            with torch.inference_mode():
                inputs = answerer._plain_inputs([prompt], images)
                tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
            said.append(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
        return said

    def together() -> list[str]:
        seen = answerer.look(images, prompts)
        batches = [prompts[start : start + args.batch_size] for start in range(0, len(prompts), args.batch_size)]
        return [answer.text for batch in batches for answer in answerer.answer(batch, seen)]

    ways = {"one generate a question": one_by_one, "together": together}
    answers = {name: way() for name, way in ways.items()}  # warm, and compared
    same = sum(a == b for a, b in zip(*answers.values(), strict=True))
    print(f"{len(prompts)} questions about {len(images)} images: {same} answers are the same")
    for _ in range(args.rounds):
        rates = {}
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            rates[name] = len(prompts) / (time.perf_counter() - start)
        slow, fast = rates.values()
        print(f"{slow:.1f} and {fast:.1f} questions a second: {fast / slow:.1f} times")


if __name__ == "__main__":
    main()
