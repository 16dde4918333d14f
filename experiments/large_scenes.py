"""Measures counts and boxes of tiles against those of one view, on synthetic scenes that are larger than an image.

    python -m mfrsvlm.experiments.large_scenes --model demo/model --output DIR

The scenes have the objects that the model knows on its tiles, few or many of them. Counts are those of
`GeoAssistant.count` and boxes those of `GeoAssistant.detect`: of the whole scene in one view, and of tiles. Intervals are
bootstrapped over scenes.

A finished scene is a file in the output folder: started again, the command continues where it stopped.
"""

import argparse
import csv
import io
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import rasterio
from rasterio.io import MemoryFile
from scipy.stats import rankdata

from ..evaluation.intervals import corpus_figure
from ..evaluation.numbers import read_number
from ..files.reading import read_json, read_rows
from ..files.writing import check_folder, write_figure, write_file
from ..geospatial import GeoAssistant, Raster, RasterWarning
from ..geospatial.answers import ask_pieces, show
from ..geospatial.assistant import COUNT
from ..geospatial.runs import plan_tiles
from ..geospatial.tiles import default_overlap
from ..scenes import KINDS, Scene, draw, plan_scene, scene_seed
from ..scenes.questions import PLURALS, possible_kinds
from .detections import center_distances, find_matches, pairwise_iou
from .estimates import Estimate, plain, ratio


MEAN_COUNT = 3.25  # objects of a kind that a scene of `plan_scene` shows on average
ONE, TILES, SHIFTED, BOTH, OVERLAPPING = "one view", "tiles", "shifted tiles", "mean of both", "overlapping tiles, added"
MERGED, UNMERGED = "tiles, merged", "tiles, not merged"
ALL = "all"  # densities


def plan(density: int, index: int, size: int, object_pixels: tuple[float, float]) -> Scene:
    """The scene with this number, in which a kind that is there has `density` objects on average."""
    # Another seed for every density: scenes of one seed would have the same place and kinds.
    return plan_scene(scene_seed("test", 1000 * density + index), size, object_pixels, max(1, round(density / MEAN_COUNT)))


@contextmanager
def opened(scene: Scene) -> Iterator[Raster]:
    """The drawn scene as a raster in tiles, so that windows of it are read quickly."""
    pixels = np.asarray(draw(scene)).transpose(2, 0, 1)
    form = {"driver": "GTiff", "width": scene.size, "height": scene.size, "count": 3, "dtype": "uint8", "tiled": True}
    with warnings.catch_warnings(), MemoryFile() as memory:
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with memory.open(**form, photometric="RGB") as file:
            file.write(pixels)
        with memory.open() as file, Raster.open(file) as raster:
            yield raster


def count_objects(
    assistant: GeoAssistant, raster: Any, plurals: dict[str, str], tile: int, overlapping: bool = False
) -> dict[str, Any]:
    """Counts by arm and kind, and the number of answers without a number by arm.

    Args:
        assistant: the model.
        raster: what `GeoAssistant` takes.
        plurals: what to count, with its plural.
        tile: side of the tiles, pixels.
        overlapping: also add the numbers of overlapping tiles, in which objects are counted twice.
    """
    kinds, names = list(plurals), list(plurals.values())
    whole = assistant.count(raster, names, tile=None).attrs["totals"]
    tiles = assistant.count(raster, names, tile=tile).attrs["totals"]
    arms = {ONE: (whole, ""), TILES: (tiles, ""), SHIFTED: (tiles, "shifted_")}
    counts = {
        arm: {kind: totals[name][f"{form}total"] for kind, name in zip(kinds, names, strict=True)}
        for arm, (totals, form) in arms.items()
    }
    missing = {arm: sum(totals[name][f"{form}unanswered"] for name in names) for arm, (totals, form) in arms.items()}
    if overlapping:
        _, pieces = plan_tiles(raster, None, (1.0, 1.0), tile, default_overlap(tile))
        outcomes = ask_pieces(
            assistant.answerer,
            lambda piece: show([raster], piece, assistant.fill),
            pieces,
            [COUNT.replace("{object}", name) for name in names],
            assistant.batch_size,
        )
        numbers = {
            kind: [read_number(outcome.replies[index].text) for outcome in outcomes if outcome.replies]
            for index, kind in enumerate(kinds)
        }
        counts[OVERLAPPING] = {kind: sum(value or 0 for value in values) for kind, values in numbers.items()}
        missing[OVERLAPPING] = sum(value is None for values in numbers.values() for value in values)
    return {"counts": counts, "unanswered": missing}


def find_boxes(
    assistant: GeoAssistant, raster: Any, kinds: Sequence[str], tile: int, prompt: str | None = None
) -> dict[str, Any]:
    """Boxes by arm and kind: x_min, y_min, x_max, y_max in pixels and the score. Arguments as for `count_objects`."""
    with TemporaryDirectory() as folder:
        answers = Path(folder) / "answers.jsonl"
        frames = {
            ONE: assistant.detect(raster, kinds, tile=None, prompt=prompt),
            MERGED: assistant.detect(raster, kinds, tile=tile, checkpoint=answers, prompt=prompt),
        }
        outcomes = [outcome for _, line in read_rows(answers)[1:] for outcome in line["outcomes"]]
    boxes: dict[str, dict[str, list[Any]]] = {arm: {kind: [] for kind in kinds} for arm in frames}
    for arm, frame in frames.items():
        for name, shape, score in zip(frame["object"], frame.geometry, frame["score"], strict=True):
            boxes[arm][name].append(rounded([*shape.bounds, score]))
    boxes[UNMERGED] = {
        kind: [rounded(box) for outcome in outcomes if outcome["replies"] for box in outcome["replies"][index]["boxes"]]
        for index, kind in enumerate(kinds)
    }
    return {"boxes": boxes}


def rounded(box: Sequence[float | None]) -> list[float]:
    """A box and its score. A model that gives no probabilities is sure of all boxes."""
    *corners, score = box
    return [*(round(value, 2) for value in corners), 1.0 if score is None or np.isnan(score) else round(score, 5)]


MEASURES = ("counts", "boxes")


def finished_row(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The row in a file of an earlier run; `None` if there is none.

    Raises:
        ValueError: it was made with other settings.
    """
    if not path.exists():
        return None
    row = read_json(path)
    for name, value in settings.items():
        if row[name] != value:
            raise ValueError(f"{path} was made with {name}={row[name]}, not {value}: name another folder.")
    return row


def measure_scenes(assistant: GeoAssistant, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of all scenes, one for every scene and measure. Those of finished scenes are read from their files.

    Raises:
        ValueError: a file was made with other settings.
    """
    rows = []
    model = {name: assistant.model.get(name) for name in ("name", "weights")}
    for index in range(args.scenes):
        for density in args.densities:
            settings = {"density": density, "scene": index, "size": args.size, "object_pixels": list(args.object_pixels)}
            settings |= {"tile": args.tile, "weights": model["weights"]}
            for measure in args.measures:
                path = args.output / "scenes" / f"{measure}-{density}-{index}.json"
                row = finished_row(path, settings)
                if row is None:
                    start = time.perf_counter()
                    row = settings | measure_scene(assistant, args, measure, density, index)
                    row["seconds"] = round(time.perf_counter() - start, 1)
                    write_file(path, json.dumps(row))
                    print(f"{measure} of scene {index} with {density} objects of a kind: {row['seconds']} s", flush=True)
                rows.append(row)
    return rows


def measure_scene(assistant: GeoAssistant, args: argparse.Namespace, measure: str, density: int, index: int) -> Any:
    """What a row says of one scene: its class, its true objects, and what the arms answer."""
    scene = plan(density, index, args.size, args.object_pixels)
    kinds = possible_kinds(scene)
    true = {kind: [[round(value, 2) for value in item.box] for item in scene.objects if item.kind == kind] for kind in kinds}
    row: dict[str, Any] = {"measure": measure, "class": scene.scene_class}
    with opened(scene) as raster:
        if measure == "counts":
            row["true"] = {kind: len(boxes) for kind, boxes in true.items()}
            plurals = {kind: PLURALS[kind] for kind in kinds}
            return row | count_objects(assistant, raster, plurals, args.tile, overlapping=index < args.overlapping)
        return row | {"true": true} | find_boxes(assistant, raster, kinds, args.tile)


def count_figures(rows: Sequence[dict[str, Any]], arm: str) -> dict[str, Estimate]:
    """Errors of the counts of one arm, shares of one."""
    true, counted, asked = table_of_counts(rows, arm)
    present, errors = true > 0, np.abs(counted - true)
    relative = np.divide(errors, true, out=np.zeros_like(errors), where=present)
    absent = asked & ~present
    return {
        "error": ratio(errors.sum(1), true.sum(1)),
        "percentage error": ratio(relative.sum(1), present.sum(1)),
        "bias": ratio((counted - true).sum(1), true.sum(1)),
        "found of absent kinds": ratio((counted * absent).sum(1), absent.sum(1)),
    }


def table_of_counts(rows: Sequence[dict[str, Any]], arm: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True and counted objects, and whether they were asked for; (scenes, kinds) each."""
    true = np.array([[row["true"].get(kind, 0) for kind in KINDS] for row in rows], dtype=float)
    asked = np.array([[kind in row["true"] for kind in KINDS] for row in rows])

    def counts(name: str) -> np.ndarray:
        return np.array([[row["counts"][name].get(kind, 0) for kind in KINDS] for row in rows], dtype=float)

    return true, (counts(TILES) + counts(SHIFTED)) / 2 if arm == BOTH else counts(arm), asked


def box_figures(rows: Sequence[dict[str, Any]], arm: str) -> dict[str, Estimate]:
    """Precision, recall and F1 of the boxes of one arm, and the error of their number, shares of one."""
    scenes = [np.array([match_boxes(row, arm, kind) for kind in row["true"]], dtype=float) for row in rows]  # (kinds, 4)
    found, found_by_center, predicted, true = np.array([scene.sum(0) for scene in scenes]).T
    errors = np.array([np.abs(scene[:, 2] - scene[:, 3]).sum() for scene in scenes])
    return {
        "precision": ratio(found, predicted),
        "recall": ratio(found, true),
        "F1": ratio(2 * found, predicted + true),
        "precision by center": ratio(found_by_center, predicted),
        "recall by center": ratio(found_by_center, true),
        "F1 by center": ratio(2 * found_by_center, predicted + true),
        "error": ratio(errors, true),
        "bias": ratio(predicted - true, true),
    }


def match_boxes(row: dict[str, Any], arm: str, kind: str) -> tuple[int, int, int, int]:
    """Boxes that match at IoU 0.5, those whose centers are half of the longest object apart, all boxes, and all objects."""
    boxes = np.array(row["boxes"][arm][kind], dtype=float).reshape(-1, 5)
    true = np.array(row["true"][kind], dtype=float).reshape(-1, 4)
    scores = boxes[:, 4]
    found = find_matches(pairwise_iou(boxes[:, :4], true), scores, 0.5)
    found_by_center = find_matches(-center_distances(boxes[:, :4], true), scores, -row["object_pixels"][1] / 2)
    return int(found.sum()), int(found_by_center.sum()), len(boxes), len(true)


def spread_figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the difference of the two partitions says of the error of the first, over the kinds that are there."""
    true, tiles, _ = table_of_counts(rows, TILES)
    shifted = table_of_counts(rows, SHIFTED)[1]
    present = true > 0
    spread, errors = np.abs(tiles - shifted), np.abs(tiles - true)
    scene_of = np.nonzero(present)[0]

    def correlation(drawn: np.ndarray) -> float:
        times = drawn[scene_of]
        ranks = [rankdata(np.repeat(values[present], times)) for values in (spread, errors)]
        return float(np.corrcoef(ranks)[0, 1]) if all(np.ptp(one) for one in ranks) else math.nan

    def mean(values: np.ndarray) -> Estimate:
        return ratio((values * present).sum(1), present.sum(1))

    return {
        "rank correlation": interval(correlation, len(rows)),
        "errors of at most the difference": mean(errors <= spread),
        "mean difference": mean(spread),
        "mean error": mean(errors),
    }


def interval(statistic: Callable[[np.ndarray], float], samples: int) -> dict[str, float]:
    """A value that is no ratio of sums, in the form of `Estimate.numbers`. Arguments as for `corpus_figure`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)  # there is no value
        made = corpus_figure(statistic, samples)
    return {"mean": made["value"], "low": made["low"], "high": made["high"]}


def summarize(rows: Sequence[dict[str, Any]], densities: Sequence[int]) -> dict[str, Any]:
    """Figures of every density and of all, each a value with the 95 % interval over scenes.

    `gain` is the difference to one view, scene by scene. The numbers of overlapping tiles are compared with those of tiles
    on the scenes that have both.
    """
    summary: dict[str, Any] = {}
    for density in [*densities, ALL]:
        made: dict[str, Any] = {}
        counts, boxes = (
            [row for row in rows if row["measure"] == name and density in (row["density"], ALL)] for name in MEASURES
        )
        if counts:
            figures = {arm: count_figures(counts, arm) for arm in (ONE, TILES, SHIFTED, BOTH)}
            made["counts"] = {"scenes": len(counts), "objects": sum(sum(row["true"].values()) for row in counts)} | {
                arm: {**figures[arm], "gain": figures[arm]["error"] - figures[ONE]["error"]} for arm in figures
            }
            both = [row for row in counts if OVERLAPPING in row["counts"]]
            if both:
                added, tiles = count_figures(both, OVERLAPPING), count_figures(both, TILES)
                made["counts"][OVERLAPPING] = {**added, "gain": added["error"] - count_figures(both, ONE)["error"]}
                made["counts"][OVERLAPPING] |= {"scenes": len(both), "gain over tiles": added["error"] - tiles["error"]}
            made["spread"] = spread_figures(counts)
        if boxes:
            figures = {arm: box_figures(boxes, arm) for arm in (ONE, MERGED, UNMERGED)}
            made["boxes"] = {"scenes": len(boxes)}
            for arm, row in figures.items():
                gains = {"gain": row["F1"] - figures[ONE]["F1"]}
                gains["gain by center"] = row["F1 by center"] - figures[ONE]["F1 by center"]
                made["boxes"][arm] = row | gains
        if made:
            summary[str(density)] = made
    return plain(summary)


def percent(figure: dict[str, float | None], sign: str = "") -> str:
    """A share and its interval in per cent, for a table."""
    if figure["mean"] is None:
        return "-"
    value, low, high = (f"{100 * figure[name]:{sign}.1f}" for name in ("mean", "low", "high"))
    return f"{value} [{low}, {high}]"


def number(figure: dict[str, float | None]) -> str:
    """A number and its interval, for a table."""
    if figure["mean"] is None:
        return "-"
    return "{mean:.2f} [{low:.2f}, {high:.2f}]".format(**figure)


def tables(summary: dict[str, Any]) -> str:
    """The figures in Markdown."""
    parts = []
    if any("counts" in made for made in summary.values()):
        parts = [table_of_errors(summary), table_of_gains(summary), table_of_spread(summary)]
    if any("boxes" in made for made in summary.values()):
        parts.append(table_of_boxes(summary))
    return "\n\n".join(parts) + "\n"


def markdown(title: str, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [[*names], ["---"] * len(names), *rows]
    return f"{title}\n\n" + "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def table_of_errors(summary: dict[str, Any]) -> str:
    names = ["objects of a kind", "scenes", "counted on", "error, %", "mean percentage error", "bias, %", "of absent kinds"]
    rows = []
    for density, made in summary.items():
        figures = made["counts"]
        for arm in (ONE, TILES, SHIFTED, BOTH, OVERLAPPING):
            if arm in figures:
                row = figures[arm]
                cells = [percent(row["error"]), percent(row["percentage error"]), percent(row["bias"], "+")]
                cells.append(number(row["found of absent kinds"]))
                rows.append([density, row.get("scenes", figures["scenes"]), arm, *cells])
    return markdown("Counts:", names, rows)


def table_of_gains(summary: dict[str, Any]) -> str:
    arms = (TILES, SHIFTED, BOTH)
    rows = [[name, *(percent(made["counts"][arm]["gain"], "+") for arm in arms)] for name, made in summary.items()]
    return markdown("Error of the counts minus that of one view, in points:", ["objects of a kind", *arms], rows)


def table_of_spread(summary: dict[str, Any]) -> str:
    names = ["objects of a kind", "rank correlation", "errors of at most the difference, %", "mean difference", "mean error"]
    rows = []
    for density, made in summary.items():
        correlation, within, spread, error = made["spread"].values()
        rows.append([density, number(correlation), percent(within), number(spread), number(error)])
    return markdown("Difference of the two partitions, and the error of the first:", names, rows)


def table_of_boxes(summary: dict[str, Any]) -> str:
    names = ["objects of a kind", "scenes", "boxes of", "precision, %", "recall, %", "F1, %", "F1 minus one view, points"]
    names += ["F1 by center, %", "its difference, points", "error of the number, %", "bias, %"]
    shown = {"precision": "", "recall": "", "F1": "", "gain": "+", "F1 by center": "", "gain by center": "+"}
    shown |= {"error": "", "bias": "+"}
    rows = []
    for density, made in summary.items():
        for arm in (ONE, MERGED, UNMERGED):
            cells = [percent(made["boxes"][arm][name], sign) for name, sign in shown.items()]
            rows.append([density, made["boxes"]["scenes"], arm, *cells])
    return markdown("Boxes:", names, rows)


def scene_lines(rows: Sequence[dict[str, Any]]) -> str:
    """CSV with a line for every scene, kind and arm."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["measure", "density", "scene", "class", "kind", "arm", "true", "counted", "found", "found_by_center"])
    for row in rows:
        start = [row["measure"], row["density"], row["scene"], row["class"]]
        for kind in row["true"]:
            for arm in row[row["measure"]]:
                if row["measure"] == "counts":
                    writer.writerow([*start, kind, arm, row["true"][kind], f"{row['counts'][arm][kind]:g}", "", ""])
                else:
                    found, found_by_center, boxes, true = match_boxes(row, arm, kind)
                    writer.writerow([*start, kind, arm, true, boxes, found, found_by_center])
    return text.getvalue()


COLORS = {ONE: "#b04a3a", TILES: "#1f5f8b", SHIFTED: "#6aa0c7", BOTH: "#2c8c6e", MERGED: "#1f5f8b", UNMERGED: "#b0862a"}


def write_plot(rows: Sequence[dict[str, Any]], summary: dict[str, Any], path: Path) -> None:
    """Errors by density, counts against the truth, the two partitions against the error, and F1 of boxes by density."""
    from matplotlib.figure import Figure

    counts = [row for row in rows if row["measure"] == "counts"]
    boxes = any("boxes" in made for made in summary.values())
    figure = Figure(figsize=(4.6 * (3 * bool(counts) + boxes), 4.4), layout="constrained", facecolor="white")
    axes = list(figure.subplots(1, 3 * bool(counts) + boxes, squeeze=False)[0])
    names = [name for name in summary if name != ALL]

    def bars(axis: Any, measure: str, key: str, arms: Sequence[str]) -> None:
        for place, arm in enumerate(arms):
            made = [summary[name][measure][arm][key] for name in names]
            at = np.arange(len(names)) + 0.12 * (place - (len(arms) - 1) / 2)
            axis.vlines(at, [100 * one["low"] for one in made], [100 * one["high"] for one in made], color=COLORS[arm])
            axis.plot(at, [100 * one["mean"] for one in made], "o", color=COLORS[arm], label=arm)
        axis.set(xticks=range(len(names)), xticklabels=names, xlabel="objects of a kind, mean", ylim=(0, None))
        axis.grid(axis="y", alpha=0.3)
        axis.legend(fontsize=8)

    if counts:
        bars(axes[0], "counts", "error", (ONE, TILES, SHIFTED, BOTH))
        axes[0].set(title="error of the counts, % of the objects")
        for arm in (ONE, TILES):
            true, counted, _ = table_of_counts(counts, arm)
            present = true > 0
            axes[1].plot(true[present], counted[present], ".", color=COLORS[arm], label=arm)
        highest = max(true.max(), 1)
        axes[1].plot([1, highest], [1, highest], color="#999999", linewidth=0.8)
        axes[1].set(title="counts", xlabel="objects", ylabel="counted", xscale="symlog", yscale="symlog")
        axes[1].grid(alpha=0.3)
        axes[1].legend(fontsize=8)
        true, tiles, _ = table_of_counts(counts, TILES)
        spread, present = np.abs(tiles - table_of_counts(counts, SHIFTED)[1]), true > 0
        axes[2].plot(spread[present], np.abs(tiles - true)[present], ".", color=COLORS[TILES])
        axes[2].set(title="does the difference tell the error?", xlabel="difference of the two partitions")
        axes[2].set(ylabel="error of the tiles", xscale="symlog", yscale="symlog")
        axes[2].grid(alpha=0.3)
    if boxes:
        bars(axes[-1], "boxes", "F1 by center", (ONE, MERGED, UNMERGED))
        axes[-1].set(title="F1 of boxes by their centers, %")
    write_figure(path, figure, dpi=90)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mfrsvlm.experiments.large_scenes", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or Hub id of a model of synthetic scenes")
    parser.add_argument("--output", type=Path, required=True, help="folder for finished scenes and for the results")
    parser.add_argument("--scenes", type=int, default=7, help="of each density")
    parser.add_argument("--densities", type=int, nargs="+", default=[6, 25, 75], help="mean numbers of objects of a kind")
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--overlapping", type=int, default=2, help="scenes of each density with sums of overlapping tiles")
    parser.add_argument("--size", type=int, default=4096, help="side of the scenes, pixels")
    parser.add_argument("--object-pixels", type=float, nargs=2, default=(16.0, 32.0), help="shortest and longest, pixels")
    parser.add_argument("--tile", type=int, default=1024, help="side of the tiles, pixels")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args(arguments)
    check_folder(args.output)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RasterWarning)  # a model of synthetic scenes is what is measured
        assistant = GeoAssistant.from_pretrained(args.model, dtype=args.dtype)
        run(assistant, args)


def run(assistant: GeoAssistant, args: argparse.Namespace) -> None:
    """Measures the scenes that are not finished, and writes the results of all."""
    (args.output / "scenes").mkdir(parents=True, exist_ok=True)
    rows = measure_scenes(assistant, args)
    summary = summarize(rows, args.densities)
    record = {"model": assistant.model, "size": args.size, "tile": args.tile, "object_pixels": list(args.object_pixels)}
    write_file(args.output / "results.json", json.dumps(record | {"results": summary}, indent=1) + "\n")
    write_file(args.output / "results.csv", scene_lines(rows))
    write_file(args.output / "table.md", tables(summary))
    write_plot(rows, summary, args.output / "plot.png")
    print(tables(summary))


if __name__ == "__main__":
    main()
