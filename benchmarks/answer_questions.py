"""Measures questions per second: one `generate` call per question, and `Answerer`, which shares images and uses batches.

    python benchmarks/answer_questions.py [--model experiments/scene_model] [--scenes 4] [--questions 32] [--rounds 3]

Both ways answer the same questions about the same synthetic scenes, in turns. The harness also writes its answers to a file,
as in a run; images lie in memory for both, and loading the model is not counted. Answers that differ are counted.
"""

import argparse
import statistics
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

import torch
from accelerate import PartialState

from mfrsvlm.evaluation.answer_log import AnswerLog
from mfrsvlm.evaluation.answering import Answerer, Prompt, load
from mfrsvlm.evaluation.batches import ImageReader, answer_all
from mfrsvlm.evaluation.benchmarks import Benchmark, Sample
from mfrsvlm.evaluation.protocols import PROTOCOLS
from mfrsvlm.evaluation.settings import EvaluationSettings
from mfrsvlm.experiments import SCENE_MODEL
from mfrsvlm.scenes import ask, draw, plan_scene, scene_seed


TASKS = ("classification", "area", "presence", "count", "comparison", "position")
LENGTH = 16  # of an answer at most, in tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=SCENE_MODEL)
    parser.add_argument("--scenes", type=int, default=4)
    parser.add_argument("--questions", type=int, default=32, help="about each scene; repeated where it has not as many")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--images-per-chunk", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    model, processor = load(args.model, dtype=args.dtype, device=args.device)
    answerer = Answerer(model, processor, LENGTH)
    images, samples = {}, []
    for index in range(args.scenes):
        scene = plan_scene(scene_seed("test", index), 512, (8.0, 16.0))
        name = f"scene-{index}"
        images[name] = draw(scene)
        texts = dict.fromkeys(question.text for seed in range(50) for question in ask(scene, TASKS, seed))
        for number, text in enumerate(islice(cycle(texts), args.questions)):
            samples.append(Sample(f"{name}-{number}", (name,), "vqa", text, ("-",)))
    benchmark = Benchmark("scenes", "test", None, samples, open_image=images.__getitem__, complete_prompts=True)
    reader = ImageReader(benchmark, PROTOCOLS["strict"](), "error")
    settings = EvaluationSettings(batch_size=args.batch_size, images_per_chunk=args.images_per_chunk)

    def one_by_one() -> list[str]:
        answers = []
        for sample in samples:
            with torch.inference_mode():
                inputs = answerer._plain_inputs([Prompt(sample.question, 0)], [[images[sample.images[0]]]])
                tokens = model.generate(**inputs, generation_config=answerer.generation)
            answers.append(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
        return answers

    def harness() -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            state, prompts = PartialState(), [sample.question for sample in samples]
            log = AnswerLog(Path(folder) / "answers", {}, state)
            return [row["text"] for row in answer_all(answerer, samples, prompts, reader, settings, state, log)]

    ways = {"one generate a question": one_by_one, "harness": harness}
    answers = [way() for way in ways.values()]  # warm, and compared
    differ = sum(a != b for a, b in zip(*answers, strict=True))
    print(f"{len(samples)} questions about {len(images)} images, {differ} answers differ; {torch.get_num_threads()} threads")
    ratios = []
    for _ in range(args.rounds):
        rates = []
        for way in ways.values():
            start = time.perf_counter()
            way()
            rates.append(len(samples) / (time.perf_counter() - start))
        ratios.append(rates[1] / rates[0])
        print(f"{rates[0]:.1f} and {rates[1]:.1f} questions a second: {ratios[-1]:.1f} times")
    print(f"median: {statistics.median(ratios):.1f} times")


if __name__ == "__main__":
    main()
