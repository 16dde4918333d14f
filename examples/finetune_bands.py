"""Teaches the small model to see the near infrared, on a CPU in minutes: as a view of its own, or as a band of its encoder.

    python examples/finetune_bands.py [views|bands] [OUTPUT]

The question is whether the vegetation of a synthetic scene is healthy, which red, green and blue do not show. In both ways
the last image shows red, green and blue as before, so that other questions are still answered. For your own data, replace
`write_rows`; docs/bands.md describes both ways.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from mfrsvlm.convert_checkpoint import widen
from mfrsvlm.demo import MODEL
from mfrsvlm.evaluation.answering import Answerer, Prompt, load
from mfrsvlm.image_sources_mfrsvlm import open_image
from mfrsvlm.scenes import ask_sensors, plan_scene, scene_seed, sense
from mfrsvlm.training import MFRSVLMTrainingArguments
from mfrsvlm.training.finetune import DataArguments, ModelArguments, finetune


BANDS = ["red", "green", "blue", "nir"]
SIDE = 256
VIEWS = "Image 1 shows false color (near infrared, red, green), image 2 shows true color. "


def write_rows(folder: Path, split: str, count: int, way: str) -> list[dict]:
    """Images of scenes with vegetation, and conversations about them; also as `{split}.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    index = 0
    while len(rows) < count:
        scene = plan_scene(scene_seed(split, index))
        name, index = f"{split}-{index}", index + 1
        for question in ask_sensors(scene, ["vegetation"]):
            bands = {
                band: np.asarray(Image.fromarray(plane).resize((SIDE, SIDE), Image.Resampling.BOX))
                for band, plane in sense(scene, BANDS).items()
            }
            names = [f"{name}.npz" if way == "bands" else f"{name}-nir.png", f"{name}-rgb.png"]
            for file, shown in zip(names, (["nir", "red", "green"], BANDS[:3]), strict=True):
                if file.endswith(".npz"):
                    np.savez(folder / file, nir=bands["nir"])
                else:
                    Image.fromarray(np.stack([bands[band] for band in shown], axis=2)).save(folder / file)
            prompt = question.text if way == "bands" else VIEWS + question.text
            rows.append({"images": names, "prompt": prompt, "completion": question.answer})
    (folder / f"{split}.json").write_text(json.dumps(rows), encoding="utf-8")
    return rows


def main(way: str, output: Path, scenes: int = 160, steps: int = 60, new_scenes: int = 20) -> float:
    """Trains, and returns the share of right answers about new scenes."""
    write_rows(output / "data", "train", scenes, way)
    start = MODEL
    if way == "bands":
        start = str(output / "wide")
        widen(MODEL, BANDS, output / "wide", dtype="float32")
    finetune(
        ModelArguments(model_name_or_path=start, lora=True, lora_r=16, lora_alpha=32, lora_merge=True),
        DataArguments(train_file=str(output / "data" / "train.json"), image_root=str(output / "data")),
        MFRSVLMTrainingArguments(
            output_dir=str(output / "model"),
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            vision_tower_learning_rate=5e-3,  # of the new bands
            band_dropout=0.0,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
    )
    answerer = Answerer(*load(str(output / "model"), device="cpu"), max_new_tokens=8)
    rows = write_rows(output / "data", "test", new_scenes, way)
    prompts = [Prompt(row["prompt"], index) for index, row in enumerate(rows)]
    images = [[open_image(name, output / "data") for name in row["images"]] for row in rows]
    answers = answerer.answer(prompts, answerer.encode_images(images, prompts))
    right = [answer.text == row["completion"] for answer, row in zip(answers, rows, strict=True)]
    print(f"{way}: {np.mean(right):.0%} of {len(right)} answers about new scenes are right")
    return float(np.mean(right))


if __name__ == "__main__":
    chosen = sys.argv[1] if len(sys.argv) > 1 else "bands"
    main(chosen, Path(sys.argv[2] if len(sys.argv) > 2 else f"runs/finetune_{chosen}"))
