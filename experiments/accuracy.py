"""Marks a model on held-out scenes, through the ordinary processor and `generate`.

    python -m mfrsvlm.experiments.accuracy MODEL --output accuracy.json [--scenes 1000] [--blind]

Every scene is encoded once for all its questions. `--blind` asks the same questions without the image, which shows what
language alone scores; chance is what the best guesser scores who sees no image.
"""

import argparse
import json
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from mfrsvlm.evaluation.answering import Answerer, Prompt
from mfrsvlm.evaluation.intervals import mean_interval
from mfrsvlm.experiments.dataset import OBJECT_PIXELS, SCENE_SIZE, plan
from mfrsvlm.scenes import TASKS, Question, ask, draw
from mfrsvlm.scenes.scoring import caption_facts, chance, score


def measure(model: Any, processor: Any, scenes: int, blind: bool = False, batch: int = 8) -> dict[str, dict[str, float]]:
    """Accuracy of every task on the first scenes of the test split, with its 95 % interval, n and chance."""
    answerer = Answerer(model, processor, max_new_tokens=64)
    marked: dict[str, list[Question]] = {task: [] for task in TASKS}
    scores: dict[str, list[float]] = {task: [] for task in (*TASKS, "caption facts")}
    for start in tqdm(range(0, scenes, batch), desc="blind" if blind else "seeing", mininterval=5):
        group = [plan("test", index) for index in range(start, min(start + batch, scenes))]
        asked = [ask(scene) for scene in group]
        prompts = [
            Prompt(question.text, None if blind else index)
            for index, questions in enumerate(asked)
            for question in questions
        ]
        encoded = answerer.encode_images([] if blind else [[draw(scene)] for scene in group], prompts)
        said = [reply.text for reply in answerer.answer(prompts, encoded)]
        for question, text in zip(chain(*asked), said, strict=True):
            scores[question.task].append(score(question, text, SCENE_SIZE))
            marked[question.task].append(question)
            if question.task == "caption":
                scores["caption facts"].append(caption_facts(question, text))
    result = {}
    for task, values in scores.items():
        mean, low, high = mean_interval(values)
        result[task] = {"accuracy": mean, "low": low, "high": high, "n": len(values)}
        if task in marked and task != "grounding":  # a constant box may overlap without being equal
            result[task]["chance"] = chance(marked[task])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mfrsvlm.experiments.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model folder or Hub id")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--blind", action="store_true", help="ask without the image")
    args = parser.parse_args()
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True, dtype=torch.float32).eval()
    result = {
        "model": args.model,
        "scenes": args.scenes,
        "object_pixels": OBJECT_PIXELS,
        "blind": args.blind,
        "tasks": measure(model, processor, args.scenes, args.blind),
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    for task, row in result["tasks"].items():
        print(f"{task:16} {row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}]  n={row['n']}")


if __name__ == "__main__":
    main()
