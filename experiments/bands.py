"""Compares ways to show a model more than red, green and blue, on scenes whose twins look the same in RGB.

    python -m mfrsvlm.experiments.bands --work DIR --table docs/bands/table.md

All arms start from the small model, with a frozen vision encoder, and train an adapter (LoRA) of the decoder with the same
questions: two that RGB cannot answer, about vegetation (near infrared) and moisture (radar), and ordinary ones about the
objects. Every scene is seen once. Arms with new bands also train their layer. `bands` shows all bands as one image. `bands
beside RGB` shows the new ones as an image of their own, before a second one of red, green and blue, and so do the arms with
narrow bands. Two controls answer with its model: `shuffled` shows the new bands of another scene, and `missing` RGB alone.
Answers are generated, and must be right to the letter.

`--split validation` scores other scenes than those of the table, to choose settings by.

A finished run is a line in DIR/runs.jsonl: started again, the command continues where it stopped.
"""

import argparse
import json
import math
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.optim.lr_scheduler import LambdaLR

from ..convert_checkpoint import widen
from ..evaluation.answering import Answerer, Prompt
from ..files.model_folder import load_model
from ..files.reading import read_rows
from ..files.writing import check_file, whole_file, write_file
from ..geospatial.composites import COMPOSITES
from ..geospatial.runs import describe_views
from ..scenes import Scene, ask, ask_sensors, plan_scene, scene_seed, sense
from ..scenes.questions import Question
from ..scenes.sensors import RGB, narrow_bands
from ..training.branches import BranchCollator
from ..training.demo_model.photograph_questions import turn
from ..training.finetune import ModelArguments, add_lora
from ..training.trainer import drop_bands, freeze_parts
from . import SCENE_MODEL
from .estimates import over_seeds


SCENE_SIZE, CANVAS, OBJECT_PIXELS = 512, 256, (8.0, 16.0)  # as the small model was trained
TWINS, ORDINARY = ("vegetation", "moisture"), ("presence", "count", "classification", "area")
BROAD = [*RGB, "nir", "vv"]
# True color is last: the small model was trained with one image, right before the question.
VIEWS = {"rgb": ["true_color"], "composite": ["false_color"], "views": ["false_color", "true_color"]}
BESIDE = "bands beside RGB"
SPECTRA = {"10 bands": 7, "30 bands": 27}  # narrow bands beside red, green and blue
ARMS = (*VIEWS, "bands", BESIDE, *SPECTRA)
CONTROLS = ("shuffled", "missing")
RATES = {"lora": 1e-3, "extra_bands": 5e-3}
SCENES_A_STEP, BAND_DROPOUT = 2, 0.1


def bands_of(arm: str) -> list[str]:
    """The bands that an arm needs of a scene."""
    return [*RGB, *narrow_bands(SPECTRA[arm])] if arm in SPECTRA else BROAD


class Scenes:
    """Scenes of a split with their bands, drawn once and kept in a folder.

    Args:
        folder: where they are kept.
        split: see `scene_seed`.
        start, count: which scenes of the split.
    """

    def __init__(self, folder: Path, split: str, start: int, count: int) -> None:
        self.folder = folder
        self.plans = [plan_scene(scene_seed(split, start + index), SCENE_SIZE, OBJECT_PIXELS) for index in range(count)]
        folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self.plans)

    def bands(self, index: int, arm: str) -> dict[str, np.ndarray]:
        """(CANVAS, CANVAS) uint8 by band."""
        scene, names = self.plans[index], bands_of(arm)
        path = self.folder / f"{scene.seed}-{len(names)}.npz"
        if not path.exists():
            factor = SCENE_SIZE // CANVAS
            planes = {name: Image.fromarray(plane).reduce(factor) for name, plane in sense(scene, names).items()}
            with whole_file(path) as unfinished, open(unfinished, "xb") as file:
                np.savez(file, **{name: np.asarray(plane) for name, plane in planes.items()})
        with np.load(path) as file:
            return {name: file[name] for name in names}


def images_of(bands: dict[str, np.ndarray], arm: str) -> list[Any]:
    """What an arm shows of a scene: pictures, or bands by name."""
    if arm == "bands":
        return [bands]
    if arm not in VIEWS:  # objects in both images would be counted twice
        new = {name: plane for name, plane in bands.items() if name not in RGB}
        return [*([new] if new else []), {name: bands[name] for name in RGB}]
    shown = {"true_color": RGB, "false_color": ("nir", "red", "green")}
    return [Image.fromarray(np.stack([bands[name] for name in shown[view]], axis=2)) for view in VIEWS[arm]]


def prompt_begins(arm: str) -> str:
    return describe_views([COMPOSITES[view].title for view in VIEWS[arm]]) if arm in VIEWS else ""


def questions_of(scene: Scene, arm: str, ordinary: Sequence[str] = ORDINARY) -> list[Question]:
    """Those that RGB does not answer, then ordinary ones. Narrow bands hold no radar, so nothing tells moisture."""
    twins = TWINS if arm not in SPECTRA else TWINS[:1]
    return [*ask_sensors(scene, twins), *ask(scene, ordinary)]


def load(arm: str, model: str, work: Path) -> tuple[Any, Any]:
    """The model that an arm starts from, and its processor."""
    if arm in VIEWS:
        return load_model(model, dtype=torch.float32)
    folder = work / f"wide-{len(bands_of(arm))}"
    if not folder.exists():
        widen(model, bands_of(arm), folder, dtype="float32")
    return load_model(folder, dtype=torch.float32)


def adapt(model: Any, processor: Any, scenes: Scenes, arm: str) -> Any:
    """Trains an adapter and, for an arm with bands, the layer of new bands."""
    frozen = ["projector", "injectors", *(["vision_tower"] if arm in VIEWS else [])]
    options = ModelArguments(lora=True, lora_r=16, lora_alpha=32, lora_dropout=0.0)
    model = add_lora(model, options, frozen)
    freeze_parts(model, frozen, only_new_bands=True)
    groups: dict[str, list[Any]] = {name: [] for name in RATES}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["extra_bands" if "extra_bands" in name else "lora"].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr": RATES[name]} for name, parameters in groups.items() if parameters], weight_decay=0.0
    )
    steps = len(scenes) // SCENES_A_STEP
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / 5, (steps - step) / steps))
    collator, begin = BranchCollator(processor), prompt_begins(arm)
    model.train()
    for step in range(steps):
        samples = []
        for index in range(step * SCENES_A_STEP, (step + 1) * SCENES_A_STEP):
            images = images_of(scenes.bands(index, arm), arm)
            turns = [
                message
                for question in questions_of(scenes.plans[index], arm)
                for message in turn(begin + question.text, question.answer)
            ]
            turns[0]["content"][:0] = [{"type": "image"}] * len(images)
            pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
            pixel_values = drop_bands(pixel_values, model.config, BAND_DROPOUT)
            samples.append(collator.encode(turns, pixel_values=pixel_values))
        batch = collator(samples)
        inputs = ("input_ids", "position_ids", "attention_mask", "labels", "pixel_values")
        loss = model(**{name: batch[name] for name in inputs}, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in groups.values() for p in group], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"{arm}: step {step} of {steps}, loss {loss:.3f}", flush=True)
    return model.eval()


def score(model: Any, processor: Any, scenes: Scenes, arm: str, control: str | None = None) -> dict[str, list[float]]:
    """1 for every right answer and 0 for every wrong one, by task."""
    answerer, begin = Answerer(model, processor, max_new_tokens=12), prompt_begins(arm)
    scores: dict[str, list[float]] = {}
    size = 8
    for start in range(0, len(scenes), size):
        indices = range(start, min(start + size, len(scenes)))
        groups, prompts, asked = [], [], []
        for group, index in enumerate(indices):
            bands = scenes.bands(index, arm)
            if control == "missing":
                bands = {name: bands[name] for name in RGB}
            elif control == "shuffled":
                other = scenes.bands((index + len(scenes) // 2) % len(scenes), arm)
                bands = {name: (bands if name in RGB else other)[name] for name in bands}
            groups.append(images_of(bands, arm))
            questions = questions_of(scenes.plans[index], arm)
            asked += questions
            prompts += [Prompt(begin + question.text, group) for question in questions]
        encoded = answerer.encode_images(groups, prompts)
        answers = [
            answer
            for first in range(0, len(prompts), 16)
            for answer in answerer.answer(prompts[first : first + 16], encoded)
        ]
        for question, answer in zip(asked, answers, strict=True):
            scores.setdefault(question.task, []).append(float(answer.text.strip().lower() == question.answer.lower()))
    return scores


@torch.no_grad()
def drift_of(model: Any, start: Any, processor: Any, scenes: Scenes) -> float:
    """Largest change of the feature maps of the encoder for RGB images since the start."""
    images = [images_of(scenes.bands(index, "rgb"), "rgb")[0] for index in range(min(4, len(scenes)))]
    pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    (length, *_), side = model.config.packed_lengths, model.config.image_size
    views = pixel_values[:, :length].view(len(images), -1, side, side)
    features = [each.model.vision_tower(views).feature_maps for each in (model, start)]
    return max(float((a - b).abs().max()) for a, b in zip(*features, strict=True))


def run(arm: str, seed: int, start: str, work: Path, settings: Sequence[Any]) -> list[dict[str, Any]]:
    """Trains and measures an arm with one seed, and its controls. `settings`: steps, split and number of scenes to score."""
    steps, split, count = settings
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    train = Scenes(work / "scenes", "train", seed * steps * SCENES_A_STEP, steps * SCENES_A_STEP)
    test = Scenes(work / "scenes", split, 0, count)
    for scenes in (train, test):  # drawn before the clock starts
        for index in range(len(scenes)):
            scenes.bands(index, arm)
    model, processor = load(arm, start, work)
    began = time.perf_counter()
    model = adapt(model, processor, train, arm)
    seconds = time.perf_counter() - began
    drift = None
    if arm not in VIEWS:
        drift = drift_of(model.get_base_model(), load(arm, start, work)[0], processor, test)
    rows = []
    for control in (None, *(CONTROLS if arm == BESIDE else ())):
        rows.append(
            {
                "arm": control or arm,
                "seed": seed,
                "settings": settings,
                "scores": score(model, processor, test, arm, control),
                "drift": drift,
                "bands": len(bands_of(arm)) if arm not in VIEWS else 3,
                "images": len(images_of(test.bands(0, arm), arm)),
                "seconds": round(seconds, 1),
                "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            }
        )
    return rows


def before(start: str, work: Path, settings: Sequence[Any]) -> dict[str, Any]:
    """The scores of the small model as it is, without training."""
    torch.set_num_threads(1)
    test = Scenes(work / "scenes", settings[1], 0, settings[2])
    model, processor = load("rgb", start, work)
    return {"arm": "before training", "seed": 0, "settings": settings, "scores": score(model, processor, test, "rgb")}


def interval(values: Sequence[float]) -> str:
    """Mean and half width of the 95 % interval of the mean over seeds (Student's t), in per cent."""
    mean, half = over_seeds([100 * value for value in values])
    return f"{mean:.1f} ± {half:.1f}" if math.isfinite(half) else f"{mean:.1f}"


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """The figures in Markdown."""
    head = ["arm", "bands", "images", "seeds", *TWINS, "ordinary", "drift of RGB", "train s", "peak GB"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        runs = [row for row in rows if row["arm"] == arm]
        cells = [arm, str(runs[0].get("bands", 3)), str(runs[0].get("images", 1)), str(len(runs))]
        for task in TWINS:
            found = [np.mean(row["scores"][task]) for row in runs if task in row["scores"]]
            cells.append(interval(found) if found else "-")
        cells.append(interval([np.mean([s for task in ORDINARY for s in row["scores"][task]]) for row in runs]))
        drifts = [row["drift"] for row in runs if row.get("drift") is not None]
        cells.append(f"{max(drifts):g}" if drifts else "-")
        cells += [
            f"{np.mean([row[name] for row in runs]):.3g}" if name in runs[0] else "-"
            for name in ("seconds", "peak_memory_gb")
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mfrsvlm.experiments.bands", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for scenes, widened models and finished runs")
    parser.add_argument("--table", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--model", default=SCENE_MODEL, help="the model to start from (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="run only these arms")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help=f"of {SCENES_A_STEP} scenes each (default: %(default)s)")
    parser.add_argument("--split", choices=["validation", "test"], default="test", help="scenes to score")
    parser.add_argument("--scenes", type=int, default=60, help="how many to score (default: %(default)s)")
    args = parser.parse_args(arguments)
    check_file(args.table)
    args.work.mkdir(parents=True, exist_ok=True)
    settings, log = [args.steps, args.split, args.scenes], args.work / "runs.jsonl"
    rows = [row for _, row in read_rows(log)] if log.exists() else []
    rows = [row for row in rows if row["settings"] == settings]
    finished = {(row["arm"], row["seed"]) for row in rows}
    for arm, seed in [("before training", 0), *((arm, seed) for seed in range(args.seeds) for arm in args.arms)]:
        if (arm, seed) in finished:
            continue
        made: list[dict[str, Any]] = []
        if arm == "before training":
            made.append(before(args.model, args.work, settings))
        else:
            made += run(arm, seed, args.model, args.work, settings)
        with log.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in made)
        rows += made
        write_file(args.table, tables(rows))
    order = ("before training", *VIEWS, "bands", BESIDE, *CONTROLS, *SPECTRA)
    rows.sort(key=lambda row: (order.index(row["arm"]), row["seed"]))
    write_file(args.table, tables(rows))
    print(tables(rows))


if __name__ == "__main__":
    main()
