"""Measures counts and boxes of cars in frames of aerial videos, of tiles and of one view.

    python -m mfrsvlm.experiments.aerial_cars --model demo/real_model --data DIR --output DIR

The frames are those of the videos that `training.demo_model.aerial_cars` holds out, in the layout that it describes.
The tiles are as large as its crops. Intervals are bootstrapped over frames. There are few videos, whose frames resemble each
other, so the intervals are too narrow for other videos.

A finished frame is a file in the output folder: started again, the command continues where it stopped.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files.writing import check_folder, write_file
from ..geospatial import GeoAssistant
from ..training.demo_model.aerial_cars import HELD_OUT, SHARE, all_boxes_prompt, read_frames, video_of
from .detections import average_precision, center_distances, centers_inside, find_matches, pairwise_iou
from .estimates import plain, ratio
from .large_scenes import (
    MERGED,
    ONE,
    SHIFTED,
    TILES,
    UNMERGED,
    count_objects,
    find_boxes,
    finished_row,
    interval,
    markdown,
    percent,
)


KIND, PLURAL = "car", "cars"
PROMPT = all_boxes_prompt("{object}")  # of the crops that were trained on


def tile_of(frame: dict[str, Any]) -> int:
    """Side of the tiles of a frame, pixels: the mean side of the crops that were trained on."""
    share = sum(SHARE.get(video_of(frame["image"]), SHARE[""])) / 2
    return round(share * max(frame["width"], frame["height"]))


def measure_frames(assistant: GeoAssistant, data: Path, output: Path, prompt: str) -> list[dict[str, Any]]:
    """Rows of the held-out frames. Those of finished frames are read from their files.

    Raises:
        ValueError: there are no frames, or a file was made with other settings.
    """
    rows = []
    frames = [frame for frame in read_frames(data) if video_of(frame["image"]) in HELD_OUT]
    if not frames:
        raise ValueError(f"{data} has no aerial_cars/boxes.json with frames of {' or '.join(HELD_OUT)}.")
    for frame in frames:
        tile = tile_of(frame)
        settings = {"image": frame["image"], "tile": tile, "prompt": prompt, "weights": assistant.model.get("weights")}
        path = output / "frames" / f"{Path(frame['image']).stem}.json"
        row = finished_row(path, settings)
        if row is None:
            image = data / "aerial_cars" / frame["image"]
            row = settings | {"true": [one["box"] for one in frame["objects"] if one["class"] == KIND]}
            row |= count_objects(assistant, image, {KIND: PLURAL}, tile)
            row |= find_boxes(assistant, image, [KIND], tile, prompt)
            write_file(path, json.dumps(row))
            print(f"{frame['image']}: {len(row['true'])} cars, counted {row['counts']}", flush=True)
        rows.append(row)
    return rows


def count_figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Error and bias of the counts by arm, shares of the cars. The best constant is the one that knows the truth."""
    true = np.array([len(row["true"]) for row in rows], dtype=float)
    counted = {arm: np.array([row["counts"][arm][KIND] for row in rows], dtype=float) for arm in (ONE, TILES, SHIFTED)}
    for arm in (ONE, MERGED, UNMERGED):
        counted[f"boxes of {arm}"] = np.array([len(row["boxes"][arm][KIND]) for row in rows], dtype=float)
    counted[f"always {np.median(true):g}, the best constant"] = np.full(len(rows), np.median(true))
    errors = {arm: ratio(np.abs(values - true), true) for arm, values in counted.items()}
    return {
        arm: {"error": errors[arm], "bias": ratio(values - true, true), "gain": errors[arm] - errors[ONE]}
        for arm, values in counted.items()
    }


def box_figures(rows: Sequence[dict[str, Any]], arm: str) -> dict[str, Any]:
    """Precision, recall, F1 and average precision of the boxes of one arm, by IoU and by centers in true boxes."""
    true = np.array([len(row["true"]) for row in rows])
    scores, by_iou, by_center, frame_of = [], [], [], []
    for index, row in enumerate(rows):
        boxes = np.array(row["boxes"][arm][KIND], dtype=float).reshape(-1, 5)
        cars = np.array(row["true"], dtype=float).reshape(-1, 4)
        inside = np.where(centers_inside(boxes[:, :4], cars), -center_distances(boxes[:, :4], cars), -np.inf)
        scores.append(boxes[:, 4])
        by_iou.append(find_matches(pairwise_iou(boxes[:, :4], cars), boxes[:, 4], 0.5))
        by_center.append(find_matches(inside, boxes[:, 4], -np.inf))
        frame_of.append(np.full(len(boxes), index))
    figures: dict[str, Any] = {}
    predicted = np.array([len(row) for row in scores], dtype=float)
    all_scores, all_frames = np.concatenate(scores), np.concatenate(frame_of)
    for name, matched in (("", by_iou), (" by center", by_center)):
        found = np.array([row.sum() for row in matched], dtype=float)
        figures["precision" + name] = ratio(found, predicted)
        figures["recall" + name] = ratio(found, true)
        figures["F1" + name] = ratio(2 * found, predicted + true)
        figures["AP" + name] = precision_over_frames(all_scores, np.concatenate(matched), all_frames, true)
    return figures


def precision_over_frames(scores: np.ndarray, matched: np.ndarray, frame_of: np.ndarray, true: np.ndarray) -> dict[str, Any]:
    """Average precision with its interval over frames. Arguments are those of all boxes, and the cars of each frame."""

    def value(drawn: np.ndarray) -> float:
        times = drawn[frame_of]
        return average_precision(np.repeat(scores, times), np.repeat(matched, times), int(drawn @ true))

    return interval(value, len(true))


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    figures = {arm: box_figures(rows, arm) for arm in (ONE, MERGED, UNMERGED)}
    for arm in figures:
        for name in ("F1", "F1 by center"):
            figures[arm][name.replace("F1", "gain")] = figures[arm][name] - figures[ONE][name]
    cars = sum(len(row["true"]) for row in rows)
    return plain({"frames": len(rows), "cars": cars, "counts": count_figures(rows), "boxes": figures})


def tables(summary: dict[str, Any]) -> str:
    """The figures in Markdown."""
    counts = [
        [arm, percent(row["error"]), percent(row["bias"], "+"), percent(row["gain"], "+")]
        for arm, row in summary["counts"].items()
    ]
    head = f"Counts of {summary['cars']} cars in {summary['frames']} frames:"
    parts = [markdown(head, ["counted on", "error, %", "bias, %", "error minus one view, points"], counts)]
    for title, name in (("Boxes, IoU of at least 0.5:", ""), ("Boxes, center inside of the true box:", " by center")):
        measures = {
            measure + name: "+" if measure == "gain" else "" for measure in ("precision", "recall", "F1", "gain", "AP")
        }
        rows = [[arm, *(percent(row[key], sign) for key, sign in measures.items())] for arm, row in summary["boxes"].items()]
        head = ["boxes of", "precision, %", "recall, %", "F1, %", "F1 minus one view, points", "AP, %"]
        parts.append(markdown(title, head, rows))
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mfrsvlm.experiments.aerial_cars", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or Hub id of a model of photographs")
    parser.add_argument("--data", type=Path, required=True, help="folder with aerial_cars/boxes.json")
    parser.add_argument("--output", type=Path, required=True, help="folder for finished frames and for the results")
    parser.add_argument("--prompt", default=PROMPT, help="request for boxes, with {object}")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args(arguments)
    check_folder(args.output)
    run(GeoAssistant.from_pretrained(args.model, dtype=args.dtype), args.data, args.output, args.prompt)


def run(assistant: GeoAssistant, data: Path, output: Path, prompt: str = PROMPT) -> None:
    """Measures the frames that are not finished, and writes the results of all."""
    (output / "frames").mkdir(parents=True, exist_ok=True)
    summary = summarize(measure_frames(assistant, data, output, prompt))
    record = {"model": assistant.model, "prompt": prompt, "results": summary}
    write_file(output / "results.json", json.dumps(record, indent=1) + "\n")
    write_file(output / "table.md", tables(summary))
    print(tables(summary))


if __name__ == "__main__":
    main()
