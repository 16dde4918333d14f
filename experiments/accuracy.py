"""Marks a model on held-out scenes, through the ordinary processor and `generate`.

    python -m mfrsvlm.experiments.accuracy MODEL --output accuracy.json [--scenes 1000] [--blind]

Every scene is encoded once for all its questions. `--blind` asks the same questions without the image, which shows what
language alone scores; chance is what the best guesser scores who sees no image.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from mfrsvlm.evaluation.intervals import mean_interval
from mfrsvlm.experiments.dataset import OBJECT_PIXELS, SCENE_SIZE, plan
from mfrsvlm.modeling_mfrsvlm import MFRSVLMImageFeatures
from mfrsvlm.scenes import TASKS, Question, ask, draw
from mfrsvlm.scenes.scoring import caption_facts, chance, score


@torch.inference_mode()
def answer(
    model: Any, processor: Any, images: Sequence[Image.Image | None], texts: Sequence[list[str]], max_new_tokens: int = 64
) -> list[list[str]]:
    """Answers several questions about each image (or about none), which is processed and encoded once.

    Gives what one `processor.apply_chat_template` and one `generate` a question would give.

    Args:
        images: all images, or all `None`.
        texts: the questions about each.
    """
    seeing = images[0] is not None
    conversations = [
        [{"role": "user", "content": [*([{"type": "image"}] if seeing else []), {"type": "text", "text": text}]}]
        for group in texts
        for text in group
    ]
    prompts = processor.apply_chat_template(conversations, add_generation_prompt=True)
    encoded = {}
    if seeing:
        pixels = processor.image_processor(list(images), return_tensors="pt").to(model.dtype)
        features = model.get_image_features(**pixels, return_dict=True)
        owner = [index for index, group in enumerate(texts) for _ in group]
        stacks = features.deepstack_features
        features = MFRSVLMImageFeatures(
            pooler_output=[features.pooler_output[index] for index in owner],
            deepstack_features=None if stacks is None else [[stack[index] for index in owner] for stack in stacks],
        )
        encoded = {"mm_encoder_outputs": {"image": features}}
        widened = processor.image_token * processor.image_processor.num_image_tokens
        prompts = [prompt.replace(processor.image_token, widened) for prompt in prompts]
    inputs = processor.tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    tokens = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        **encoded,
    )
    said = iter(processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return [[next(said).strip() for _ in group] for group in texts]


def measure(model: Any, processor: Any, scenes: int, blind: bool = False, batch: int = 8) -> dict[str, dict[str, float]]:
    """Accuracy of every task on the first scenes of the test split, with its 95 % interval, n and chance."""
    marked: dict[str, list[Question]] = {task: [] for task in TASKS}
    scores: dict[str, list[float]] = {task: [] for task in (*TASKS, "caption facts")}
    for start in tqdm(range(0, scenes, batch), desc="blind" if blind else "seeing", mininterval=5):
        group = [plan("test", index) for index in range(start, min(start + batch, scenes))]
        asked = [ask(scene) for scene in group]
        images = [None if blind else draw(scene) for scene in group]
        said = answer(model, processor, images, [[question.text for question in questions] for questions in asked])
        for question, text in zip(chain(*asked), chain(*said), strict=True):
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
