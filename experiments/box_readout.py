"""Where a small model loses the position of an object: linear read-outs of its box along the way to the answer.

    python -m mfrsvlm.experiments.box_readout MODEL [MODEL ...] --work DIR --table docs/ablation/box_readout.md

The models are those of `train_demo_model` for scenes. Each question asks for the box of the one object of a kind. Ridge
regression predicts this box from the features of the encoder in the cell that contains its center, from that visual token
in every layer of the decoder, and from the noun of the question. Their shares of correct boxes are compared to that of the
answers. A read-out that knows the cell says what can be read if the right place is found. All scenes of the read-out's
training are of the training split, and all that are measured are of the validation split.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..evaluation import EvaluationSettings, evaluate, load_benchmark
from ..evaluation.answering import fingerprint
from ..evaluation.intervals import mean_interval
from ..evaluation.metrics.visual_grounding import iou
from ..files.model_folder import load_model
from ..files.writing import check_file, write_file
from ..modeling_mfrsvlm import MFRSVLMForConditionalGeneration
from ..scenes import ask
from ..training.branches import BranchCollator
from ..training.demo_model.scene_images import SCENE_SIZE, SceneImages
from ..training.demo_model.scene_questions import SceneQuestions
from ..training.image_features import cache_image_features, project
from ..training.train_demo_model import PROTOCOL
from .linear_probe import linear_probe


CORRECT = 0.5  # intersection over union of a correct box
BATCH = 8


@torch.inference_mode()
def read_states(
    model: MFRSVLMForConditionalGeneration, images: SceneImages, collator: BranchCollator, features: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """States of the model at the objects.

    Returns:
        By place, states (n, d): the encoder's features in the cell with the center of the object, and its visual token and
        the noun in each layer. Boxes (n, 4) as center x, y, width and height, and the corner of the visual token's
        cell and of the encoder's, (n, 2) each, all in pixels of the scene.
    """
    side, scale = model.config.tokens_per_side, model.config.canvas_scale
    cell, phase = SCENE_SIZE / side, SCENE_SIZE / side / scale
    states: dict[str, list[np.ndarray]] = {}
    boxes, corners = [], []
    asked = SceneQuestions(images, collator, model.config, features, rounds=1, mix={"grounding": 1})
    questions = ((number, ask(scene, asked.tasks)) for number, scene in enumerate(images.scenes))
    rows = [(number, np.array(found[0].boxes[0])) for number, found in questions if found]  # some scenes have no such object
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        inputs = collator([asked[number] for number, _ in batch])
        encoded = {"image": project(model, inputs["image_features"])}
        outputs = model(
            input_ids=inputs["input_ids"],
            position_ids=inputs["position_ids"],
            attention_mask=inputs["attention_mask"],
            mm_encoder_outputs=encoded,
            output_hidden_states=True,
            use_cache=False,
        )
        first = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0])
        for row, (number, box) in enumerate(batch):
            center, size = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
            column, line = (center // cell).astype(int)
            right, down = (center % cell // phase).astype(int)
            stacks = 1 + np.arange(len(model.config.detail_feature_layers)) * scale**2 + down * scale + right
            seen = {"encoder": np.array(features[number, stacks, line * side + column]).astype(np.float32).flatten()}
            noun = int(inputs["marks"][row, 1])
            for place, position in (("visual token", first + line * side + column), ("noun", noun)):
                for layer, hidden in enumerate(outputs.hidden_states):
                    seen[f"{place}, layer {layer}"] = hidden[row, position].numpy()
            for name, state in seen.items():
                states.setdefault(name, []).append(state)
            boxes.append([*center, *size])
            corners.append([column * cell, line * cell, center[0] // phase * phase, center[1] // phase * phase])
    corner = np.array(corners)
    return {name: np.array(rows) for name, rows in states.items()}, np.array(boxes), corner[:, :2], corner[:, 2:]


def read_boxes(folder: Path, counts: dict[str, int], work: Path) -> list[dict[str, Any]]:
    """Rows of the table of a model: where a box is read, the share of correct boxes, and the error of the center."""
    model, processor = load_model(folder, dtype=torch.float32)
    sides = (model.config.canvas_scale * model.config.image_size, model.config.image_size)
    read = {}
    for split, count in counts.items():
        images = SceneImages(work / "scenes", split, count, sides=sides)
        path = work / f"features-{fingerprint(model)}-{split}-{count}.npy"
        features = cache_image_features(model, images.batches(model.config), count, path)
        read[split] = read_states(model, images, BranchCollator(processor), features)
    (states, boxes, cells, phases), (test_states, test_boxes, test_cells, test_phases) = read["train"], read["validation"]
    rows = []
    for name in states:
        known = {"encoder": (phases, test_phases)}.get(name, (cells, test_cells) if "visual" in name else (0, 0))
        target = boxes - np.pad(np.broadcast_to(known[0], (len(boxes), 2)), ((0, 0), (0, 2)))
        predicted = linear_probe(states[name], target, np.arange(len(boxes)), test_states[name])
        predicted[:, :2] += known[1]
        rows.append({"read from": name, **compare(predicted, test_boxes)})
    benchmark = load_benchmark("scenes", None, "validation", count=counts["validation"])
    benchmark.samples = [sample for sample in benchmark.samples if sample.task == "grounding"]
    summary = evaluate(model, processor, [benchmark], PROTOCOL, EvaluationSettings(progress=False))
    answers = summary["scenes/validation"]["results"]["grounding"]["accuracy_0.5"]
    rows.append({"read from": "answer", "correct": [answers[key] for key in ("value", "low", "high")], "error": None})
    return rows


def compare(predicted: np.ndarray, truths: np.ndarray) -> dict[str, Any]:
    """Boxes (n, 4) as center and size: the share of correct ones with its interval, and the median error of the center."""

    def corners(boxes: np.ndarray) -> list[list[float]]:
        half = np.maximum(boxes[:, 2:], 1) / 2
        return np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], axis=1).tolist()

    right = [iou(*pair) >= CORRECT for pair in zip(corners(predicted), corners(truths), strict=True)]
    error = np.median(np.abs(predicted[:, :2] - truths[:, :2]).max(1))
    return {"correct": list(mean_interval(list(map(float, right)))), "error": float(error)}


def to_table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown, with a pair of columns for each model."""
    lines = ["| read from | " + " | ".join(f"{name}, IoU ≥ {CORRECT:g} | error of the center" for name in results) + " |"]
    lines.append("|---" * (1 + 2 * len(results)) + "|")
    for rows in zip(*results.values(), strict=True):
        cells = [rows[0]["read from"]]
        for row in rows:
            value, low, high = (100 * number for number in row["correct"])
            cells += [f"{value:.1f} [{low:.1f}, {high:.1f}]", "" if row["error"] is None else f"{row['error']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mfrsvlm.experiments.box_readout", description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+", help="model folders of `train_demo_model`, of different names")
    parser.add_argument("--work", type=Path, required=True, help="folder for scenes and features")
    parser.add_argument("--table", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--train-scenes", type=int, default=2500)
    parser.add_argument("--validation-scenes", type=int, default=500)
    args = parser.parse_args(arguments)
    check_file(args.table)
    if len({folder.name for folder in args.models}) < len(args.models):
        parser.error(f"models: {', '.join(map(str, args.models))} must have different names, which head the columns.")
    counts = {"train": args.train_scenes, "validation": args.validation_scenes}
    write_file(args.table, to_table({folder.name: read_boxes(folder, counts, args.work) for folder in args.models}))


if __name__ == "__main__":
    main()
