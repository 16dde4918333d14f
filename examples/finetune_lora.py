"""Teaches a small model the classes of your own images: LoRA on 200 of them, in minutes on a CPU.

    python examples/finetune_lora.py [FOLDER] [--output DIR] [--push USER/NAME]

FOLDER has one folder of images for each class. Without it, synthetic scenes with and without water are drawn, a question
that the model does not know. The harness evaluates the model before and after on images that are not trained on.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mfrsvlm.demo import MODEL
from mfrsvlm.evaluation import EvaluationSettings, evaluate
from mfrsvlm.evaluation.answering import load
from mfrsvlm.evaluation.benchmarks import Benchmark, Sample
from mfrsvlm.evaluation.intervals import figure
from mfrsvlm.evaluation.protocols import PROTOCOLS
from mfrsvlm.files.reading import list_folders, list_images
from mfrsvlm.scenes import CLASSES, draw, plan_scene, scene_seed
from mfrsvlm.training import MFRSVLMTrainingArguments
from mfrsvlm.training.finetune import DataArguments, ModelArguments, finetune


PROTOCOL = "strict"


def draw_scenes(folder: Path, count: int) -> None:
    """Images in two folders: scenes with water and without."""
    for index in range(count):
        scene = plan_scene(scene_seed("train", index))
        path = folder / ("water" if CLASSES[scene.scene_class][1] else "dry land") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(scene).save(path)


def split(folder: Path, train: int, test: int, seed: int = 0) -> tuple[Benchmark, Benchmark]:
    """Images of all classes in random order: the first to train on, the others to evaluate on."""
    classes = [(each.name, list_images(each)) for each in list_folders(folder)]
    images = [(str(path.relative_to(folder)), name) for name, paths in classes for path in paths]
    random.Random(seed).shuffle(images)
    samples = [Sample(path, (path,), "classification", "", (name,), group=name) for path, name in images]
    names = [name for name, paths in classes if paths]
    return (
        Benchmark("my-images", "train", folder, samples[:train], names),
        Benchmark("my-images", "test", folder, samples[train : train + test], names),
    )


def write_rows(benchmark: Benchmark, path: Path) -> None:
    """The questions that the harness will ask, with their answers, as rows to train on."""
    rows = []
    for sample in benchmark.samples:
        question = PROTOCOLS[PROTOCOL]().prompt(sample, benchmark)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": sample.references[0]}]
        rows.append({"images": list(sample.images), "messages": messages})
    path.write_text(json.dumps(rows), encoding="utf-8")


def scores(folder: str, benchmark: Benchmark, output: Path) -> list[float]:
    """1.0 or 0.0 for each image, as the harness scores the answers of a model folder."""
    model, processor = load(folder, device="cpu")
    evaluate(model, processor, [benchmark], PROTOCOL, EvaluationSettings(output=output))
    lines = (output / benchmark.name / benchmark.split / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line)["score"] for line in lines]


def main(
    images: Path | None,
    output: Path,
    model: str = MODEL,
    train: int = 200,
    test: int = 200,
    steps: int = 100,
    push: str | None = None,
) -> dict[str, Any]:
    """Evaluates, trains and evaluates again. Returns the accuracy before and after and the gain, with 95 % intervals."""
    output.mkdir(parents=True, exist_ok=True)
    if images is None:
        images = output / "scenes"
        draw_scenes(images, train + test)
    trained_on, tested_on = split(images, train, test)
    write_rows(trained_on, output / "train.json")
    before = scores(model, tested_on, output / "before")
    finetune(
        ModelArguments(
            model_name_or_path=model,
            lora=True,
            lora_r=16,
            lora_alpha=32,
            lora_merge=True,
            # Small parts that see: they are trained whole, beside the adapter of the decoder.
            lora_modules_to_save=["vision_tower", "multi_modal_projector", "visual_position_embedding"],
        ),
        DataArguments(train_file=str(output / "train.json"), image_root=str(images)),
        MFRSVLMTrainingArguments(
            output_dir=str(output / "model"),
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            push_to_hub=push is not None,
            hub_model_id=push,
        ),
    )
    after = scores(str(output / "model"), tested_on, output / "after")
    gain = [later - earlier for earlier, later in zip(before, after, strict=True)]
    figures = {"before": figure(before), "after": figure(after), "gain": figure(gain)}
    for name, row in figures.items():
        low, high = 100 * row["low"], 100 * row["high"]
        print(f"{name}: {100 * row['value']:.1f} % [{low:.1f}, {high:.1f}], {row['n']} images that were not trained on")
    return figures


def parse(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="?", type=Path, metavar="FOLDER", help="one folder of images for each class")
    parser.add_argument("--output", type=Path, default=Path("runs/finetune_lora"), help="default: %(default)s")
    parser.add_argument("--model", default=MODEL, help="folder or Hub id to start from (default: demo/model)")
    parser.add_argument("--train", type=int, default=200, help="images to train on (default: %(default)s)")
    parser.add_argument("--test", type=int, default=200, help="images to evaluate on (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of eight images (default: %(default)s)")
    parser.add_argument("--push", metavar="USER/NAME", help="push the model to this repository of the Hub")
    return vars(parser.parse_args(arguments))


if __name__ == "__main__":
    main(**parse())
