"""Marks a model on held-out scenes, through the ordinary processor and `generate`.

    python -m mfrsvlm.experiments.accuracy MODEL --output accuracy.json [--scenes 1000] [--blind]

Every scene is encoded once for all its questions. `--blind` asks the same questions without the image, which shows what
language alone scores; chance is what the best constant
answer would score.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from mfrsvlm.experiments.dataset import OBJECT_PIXELS, SCENE_SIZE, plan
from mfrsvlm.modeling_mfrsvlm import MFRSVLMImageFeatures
from mfrsvlm.scenes import TASKS, Question, ask, draw
from mfrsvlm.scenes.scoring import accuracy_interval, caption_facts, score


@torch.inference_mode()
def answer(model: Any, processor: Any, image: Image.Image | None, texts: list[str], max_new_tokens: int = 64) -> list[str]:
    """Answers several questions about one image (or none), which is processed and encoded once.

    Gives what one `processor.apply_chat_template` and one `generate` a question would give.
    """
    conversations = [
        [{"role": "user", "content": [*([{"type": "image"}] if image else []), {"type": "text", "text": text}]}]
        for text in texts
    ]
    prompts = processor.apply_chat_template(conversations, add_generation_prompt=True)
    encoded = {}
    if image is not None:
        pixels = processor.image_processor(image, return_tensors="pt").to(model.dtype)
        features = model.get_image_features(**pixels, return_dict=True)
        stacks = features.deepstack_features
        features = MFRSVLMImageFeatures(
            pooler_output=features.pooler_output * len(texts),
            deepstack_features=None if stacks is None else [stack * len(texts) for stack in stacks],
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
    said = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in said]


def measure(model: Any, processor: Any, scenes: int, blind: bool = False) -> dict[str, dict[str, float]]:
    """Accuracy of every task on the first scenes of the test split, with its 95 % interval and n.

    `chance` is the share of the most frequent true answer: what the best constant answer would score.
    """
    truths: dict[str, Counter[str]] = {task: Counter() for task in TASKS}
    scores: dict[str, list[float]] = {task: [] for task in (*TASKS, "caption facts")}
    for index in tqdm(range(scenes), desc="blind" if blind else "scenes", mininterval=5):
        scene = plan("test", index)
        questions: list[Question] = ask(scene)
        said = answer(model, processor, None if blind else draw(scene), [question.text for question in questions])
        for question, text in zip(questions, said, strict=True):
            scores[question.task].append(score(question, text, SCENE_SIZE))
            truths[question.task][question.answer] += 1
            if question.task == "caption":
                scores["caption facts"].append(caption_facts(question, text))
    result = {}
    for task, values in scores.items():
        mean, low, high = accuracy_interval(values)
        result[task] = {"accuracy": mean, "low": low, "high": high, "n": len(values)}
        if task in truths and task != "grounding":  # a constant box may overlap without being equal
            result[task]["chance"] = max(truths[task].values()) / len(values)
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
