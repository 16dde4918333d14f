"""Teaches the small model of photographs a question of your own with LoRA, on a CPU in minutes.

    python examples/finetune_photographs.py FOLDER "Is this a place of traffic?" OUTPUT [--images 200] [--steps 50]

Photographs in FOLDER/yes and FOLDER/no have this answer. Those in FOLDER/test.txt, one path relative to FOLDER per line, are
held out for the evaluation before and after; without this file, every third one is. OUTPUT/model is a whole model with
its code and card, for `mfrsvlm ask`, `mfrsvlm evaluate` and `examples/push_to_hub.py`.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mfrsvlm.demo import PHOTO_MODEL
from mfrsvlm.evaluation import EvaluationSettings, evaluate, evaluate_majority
from mfrsvlm.evaluation.answering import load
from mfrsvlm.evaluation.benchmarks import Benchmark
from mfrsvlm.evaluation.benchmarks.sample import Sample
from mfrsvlm.training import MFRSVLMTrainingArguments
from mfrsvlm.training.finetune import DataArguments, ModelArguments, finetune


ANSWERS = ("yes", "no")
PROTOCOL = "strict-without-java"


def read_images(folder: Path) -> tuple[dict[str, list[str]], set[str]]:
    """The images of each answer, as paths relative to the folder, and which of all are held out."""
    images = {
        answer: sorted(path.relative_to(folder).as_posix() for path in (folder / answer).iterdir()) for answer in ANSWERS
    }
    if (folder / "test.txt").is_file():
        held_out = {line.strip() for line in (folder / "test.txt").read_text(encoding="utf-8").splitlines()}
    else:
        held_out = {image for names in images.values() for image in names[::3]}
    return images, held_out


def write_rows(folder: Path, question: str, output: Path, count: int) -> Path:
    """A JSON file with conversations about `count` images, half of them for each answer."""
    images, held_out = read_images(folder)
    rows: list[dict[str, Any]] = []
    for answer, names in images.items():
        others = [name for name in names if name not in held_out]
        for name in random.Random(0).sample(others, min(len(others), count // 2)):
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            rows.append({"images": [name], "messages": messages})
    output.mkdir(parents=True, exist_ok=True)
    path = output / "train.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def make_benchmark(folder: Path, question: str) -> Benchmark:
    """The held-out images."""
    images, held_out = read_images(folder)
    samples = [
        Sample(id=name, images=(name,), task="vqa", question=question, references=(answer,), group="presence")
        for answer, names in images.items()
        for name in names
        if name in held_out
    ]
    return Benchmark("own question", "test", folder, samples, complete_prompts=True)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Trains, and returns the accuracy before and after with its 95 % interval, and that of the most frequent answer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("question")
    parser.add_argument("output", type=Path)
    parser.add_argument("--images", type=int, default=200, help="number of images to train on")
    parser.add_argument("--steps", type=int, default=50, help="steps of 8 images")
    args = parser.parse_args(arguments)
    finetune(
        ModelArguments(model_name_or_path=PHOTO_MODEL, lora=True, lora_r=16, lora_alpha=32, lora_merge=True),
        DataArguments(
            train_file=str(write_rows(args.folder, args.question, args.output, args.images)), image_root=str(args.folder)
        ),
        MFRSVLMTrainingArguments(
            output_dir=str(args.output / "model"),
            max_steps=args.steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
    )
    benchmark = make_benchmark(args.folder, args.question)
    summaries = {"most frequent answer": evaluate_majority([benchmark], PROTOCOL)}
    for name, model_folder in {"before": PHOTO_MODEL, "after": str(args.output / "model")}.items():
        model, processor = load(model_folder, device="cpu")
        settings = EvaluationSettings(output=args.output / name, model_name=name, progress=False)
        summaries[name] = evaluate(model, processor, [benchmark], PROTOCOL, settings)
    figures = {name: summary["own question/test"]["results"]["vqa"]["accuracy"] for name, summary in summaries.items()}
    for name, cell in figures.items():
        print(f"{name}: accuracy {cell['value']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}] on {cell['n']} photographs")
    return figures


if __name__ == "__main__":
    main()
