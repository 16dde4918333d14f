"""Teaches the small model a new kind of question with a LoRA adapter, on a CPU in minutes.

    python examples/finetune_lora.py [OUTPUT]

The model was trained on questions about objects, but not on questions about water. For your own data, replace `write_rows`
and pass your files to `DataArguments`; docs/training.md describes the format of rows.
"""

import json
import sys
from pathlib import Path

from mfrsvlm.demo import MODEL
from mfrsvlm.demo.answering import answer
from mfrsvlm.evaluation.answering import load
from mfrsvlm.scenes import CLASSES, Scene, draw, plan_scene, scene_seed
from mfrsvlm.training import MFRSVLMTrainingArguments
from mfrsvlm.training.finetune import DataArguments, ModelArguments, finetune


QUESTION = "Is there water in this scene?"


def true_answer(scene: Scene) -> str:
    _, has_water = CLASSES[scene.scene_class]
    return "yes" if has_water else "no"


def write_rows(folder: Path, count: int) -> Path:
    """Images and a JSON file of conversations about them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        scene = plan_scene(scene_seed("train", index))
        draw(scene).save(folder / f"{index}.png")
        messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": true_answer(scene)}]
        rows.append({"images": [f"{index}.png"], "messages": messages})
    path = folder / "train.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def main(output: Path, scenes: int = 200, steps: int = 30, new_scenes: int = 20) -> dict[str, float]:
    """Trains, and returns the share of right answers about new scenes, before and after."""
    train_file = write_rows(output / "data", scenes)
    finetune(
        ModelArguments(model_name_or_path=MODEL, lora=True, lora_r=16, lora_alpha=32, lora_merge=True),
        DataArguments(train_file=str(train_file), image_root=str(train_file.parent)),
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
        ),
    )
    shares = {}
    unseen = [plan_scene(scene_seed("test", index)) for index in range(new_scenes)]
    for name, folder in {"before": MODEL, "after": str(output / "model")}.items():
        model, processor = load(folder, device="cpu")
        texts = [answer(model, processor, draw(scene), [QUESTION])[0].text for scene in unseen]
        shares[name] = sum(text == true_answer(scene) for text, scene in zip(texts, unseen, strict=True)) / len(texts)
        print(f"{name}: {shares[name]:.0%} of {len(texts)} answers about new scenes are right")
    return shares


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/finetune_lora"))
