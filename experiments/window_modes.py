"""Trains a decoder for every layout of the windows, and shows the accuracy that passes of the encoder buy.

    python -m mfrsvlm.experiments.window_modes --work DIR --table docs/speed/window_modes.md \\
        --plot docs/speed/window_modes.png

All arms continue from the small model, its decoder and injectors included, with its encoder frozen. They differ in their
windows alone: scenes, questions, steps and optimizer are the same, and seeds change the order of the rows. The small model
was trained with large windows that overlap by half, and its own layout is therefore an arm too.

Answers are greedy. The questions are those that `ablation` asks about held-out scenes. Intervals of differences treat the
seeds as the sample, as a paired t-test does.

Features are encoded once for each arm. A finished run is a line of `runs.jsonl` in the work folder: started again, the
command continues where it stopped.
"""

import argparse
import copy
import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..configuration_mfrsvlm import MFRSVLMConfig, efficient_windows
from ..evaluation.answering import Answerer, ImageFeatures, Prompt
from ..evaluation.benchmarks import Benchmark
from ..evaluation.evaluate import get_protocol
from ..files.model_folder import load_model
from ..files.writing import check_file, write_figure, write_file
from ..modeling_mfrsvlm import MFRSVLMForConditionalGeneration, resample_to_grid
from ..scenes import KINDS
from ..training.branches import BranchCollator
from ..training.demo_model.architecture import IMAGE_SIZE, PATCH_SIZE
from ..training.demo_model.scene_images import OBJECT_PIXELS, SCENE_SIZE, VIEW, SceneImages
from ..training.demo_model.scene_questions import SceneQuestions
from ..training.image_features import cache_image_features, project
from ..training.train_demo_model import PROTOCOL
from . import SCENE_MODEL
from .ablation import MIX, finished_runs, scores_of, test_questions, train_decoder
from .estimates import over_seeds, r_squared
from .linear_probe import linear_probe, pool, targets


def efficient(canvas_scale: int) -> dict[str, Any]:
    return {"canvas_scale": canvas_scale} | efficient_windows(IMAGE_SIZE, PATCH_SIZE, canvas_scale)


EFFICIENT, REFERENCE = "efficient: small windows, no overlap", "defaults: both sizes, overlap 0.5"
SMALL_CANVAS, LARGE_CANVAS = "efficient, canvas of 128 pixels", "efficient, canvas of 512 pixels"
# Fields of the config.
ARMS: dict[str, dict[str, Any]] = {
    "global view only": {"window_sizes": [], "injection_layers": []},
    SMALL_CANVAS: efficient(1),
    EFFICIENT: efficient(2),
    "both sizes, no overlap": {"window_sizes": [128, 64], "window_overlap": 0.0},
    "as the small model: large windows, overlap 0.5": {"window_sizes": [128], "window_overlap": 0.5},
    REFERENCE: {"window_sizes": [128, 64], "window_overlap": 0.5},
    LARGE_CANVAS: efficient(4),
}
CANVASES = (SMALL_CANVAS, EFFICIENT, LARGE_CANVAS)
HALF = (OBJECT_PIXELS[0] / 2, OBJECT_PIXELS[1] / 2)
ANSWERED = ("classification", "presence", "count", "comparison", "position")  # right or wrong, without boxes
SHOWN = (*ANSWERED, "mean of these", "grounding", "pointing")
MAX_NEW_TOKENS = 32


class FeatureAnswerer(Answerer):
    """Answers from cached features (N, 1 + K, T, C). A group holds the index of its image in place of the image."""

    def __init__(self, model: Any, processor: Any, features: np.ndarray) -> None:
        super().__init__(model, processor, MAX_NEW_TOKENS, check_sharing=False)
        self.features = features

    def _encode(self, groups: Sequence[Sequence[Any]]) -> ImageFeatures:
        chosen = torch.from_numpy(self.features[[index for (index,) in groups]]).float()
        return ImageFeatures(project(self.model, chosen), list(range(len(groups))), {})


def spread(embedding: torch.Tensor, old: Any, new: Any) -> torch.Tensor:
    """The embeddings of the stacks of one window size, (K, d), for other phases and for as many sizes as the new config has.

    Phases are places within a visual token, so that their embeddings are resampled as an image.
    """
    grid = embedding.unflatten(0, (-1, old.canvas_scale, old.canvas_scale)).permute(0, 3, 1, 2)  # (depths, d, f, f)
    grid = resample_to_grid(grid, new.canvas_scale).permute(0, 2, 3, 1)  # (depths, f', f', d)
    return grid.flatten(0, 2).repeat(len(new.window_sizes), 1)


def load(arm: str, start: str) -> tuple[MFRSVLMForConditionalGeneration, Any]:
    """The small model with the windows of an arm, and its processor."""
    small, processor = load_model(start, dtype=torch.float32)
    config = MFRSVLMConfig.from_dict(small.config.to_dict() | ARMS[arm])
    model = MFRSVLMForConditionalGeneration(config)
    model.load_state_dict(
        {
            name: spread(value, small.config, config) if name.endswith(".stack_embedding") else value
            for name, value in small.state_dict().items()
            if config.has_details or ".injectors." not in name
        }
    )
    model.generation_config = small.generation_config
    return model.eval(), processor


def features_of(model: Any, arm: str, images: SceneImages, split: str, work: Path) -> np.ndarray:
    """(scenes, 1 + K, T, C), from a file if they have been encoded before."""
    config, name = model.config, re.sub(r"\W+", "-", arm)
    path = work / f"features-{split}-{len(images)}-{name}.npy"
    side = config.canvas_scale * config.image_size
    if side != SCENE_SIZE and not path.exists():
        canvases = (Image.fromarray(canvas).resize((side, side), Image.Resampling.BICUBIC) for canvas in images.canvases)
        images = copy.copy(images)
        images.canvases = np.stack([np.asarray(canvas) for canvas in canvases])
    return cache_image_features(model, images.batches(config), len(images), path)


def scenes_of(args: argparse.Namespace, object_pixels: tuple[float, float] = OBJECT_PIXELS) -> dict[str, SceneImages]:
    """The scenes of both splits. Their canvases are the drawn scenes, which each arm resizes."""
    counts = {"train": args.train_scenes, "test": args.test_scenes}
    sides = (SCENE_SIZE, VIEW)
    return {
        split: SceneImages(args.work / "scenes", split, count, workers=1, sides=sides, object_pixels=object_pixels)
        for split, count in counts.items()
    }


def probe(arm: str, args: argparse.Namespace, object_pixels: tuple[float, float] = OBJECT_PIXELS) -> float:
    """R² of the counts of objects that a linear probe finds in the features of an arm. It needs no decoder."""
    model, _ = load(arm, args.model)
    groups = len(model.config.window_sizes) * len(model.config.detail_feature_layers)
    work = args.work if object_pixels == OBJECT_PIXELS else args.work / "objects-{:g}-{:g}".format(*object_pixels)
    states, counts = {}, {}
    for split, images in scenes_of(args, object_pixels).items():
        states[split] = pool(features_of(model, arm, images, split, work), groups)
        counts[split] = targets(images.scenes)[:, : len(KINDS)]
    found = linear_probe(states["train"], counts["train"], np.arange(args.train_scenes), states["test"])
    return float(r_squared(found, counts["test"], np.arange(args.test_scenes)).value.mean())


def score(model: Any, processor: Any, features: np.ndarray, benchmark: Benchmark, batch: int = 16) -> dict[str, list[float]]:
    """Scores of all questions by measure, see `scores_of`. A batch has so many scenes."""
    answerer, protocol = FeatureAnswerer(model, processor, features), get_protocol(PROTOCOL)
    questions: dict[int, list[Any]] = {}
    for sample in benchmark.samples:
        questions.setdefault(int(sample.images[0].rsplit("-", 1)[1]), []).append(sample)
    answers: dict[str, str] = {}
    for first in range(0, len(questions), batch):
        scenes = list(questions)[first : first + batch]
        asked = {
            sample.id: Prompt(protocol.prompt(sample, benchmark), group)
            for group, scene in enumerate(scenes)
            for sample in questions[scene]
        }
        encoded = answerer.encode_images([[scene] for scene in scenes], list(asked.values()))
        boxes = {sample.id for scene in scenes for sample in questions[scene] if sample.boxes}
        for some in (asked.keys() - boxes, boxes):  # apart, since boxes are longer than all other answers
            names = sorted(some)
            if names:
                replies = answerer.answer([asked[name] for name in names], encoded)
                answers |= {name: reply.text for name, reply in zip(names, replies, strict=True)}
    rows = []
    for task in dict.fromkeys(sample.task for sample in benchmark.samples):
        samples = [sample for sample in benchmark.samples if sample.task == task]
        _, parsed, scores = protocol.score(benchmark, task, samples, [answers[sample.id] for sample in samples])
        rows += [
            {"task": task, "group": sample.group, "score": value, "parsed": found, "boxes": sample.boxes}
            for sample, found, value in zip(samples, parsed, scores, strict=True)
        ]
    return scores_of(rows)


def run(arm: str, seed: int, args: argparse.Namespace, benchmark: Benchmark) -> dict[str, Any]:
    """Trains one arm with one seed, and scores it on the test split."""
    model, processor = load(arm, args.model)
    scenes = scenes_of(args)
    features = {split: features_of(model, arm, images, split, args.work) for split, images in scenes.items()}
    rows = SceneQuestions(scenes["train"], BranchCollator(processor), model.config, features["train"], rounds=3, mix=MIX)
    seconds = 0.0
    if args.steps:
        with TemporaryDirectory(dir=args.work) as scratch:
            seconds = train_decoder(
                model,
                processor,
                rows,
                max_steps=args.steps,
                per_device_train_batch_size=args.batch,
                learning_rate=args.learning_rate,
                muon=False,  # a step of AdamW takes a fifth less time
                guidance=False,  # the decoder attends to the right tokens already
                bf16=args.bf16,
                seed=seed,
                output_dir=scratch,
            )["seconds"]
    return {
        "arm": arm,
        "seed": seed,
        "steps": args.steps,
        "settings": settings_of(args),
        "scores": score(model, processor, features["test"], benchmark),
        "encoder_passes": model.config.encoder_passes,
        "canvas": model.config.canvas_scale * model.config.image_size if model.config.has_details else None,
        "seconds": round(seconds, 1),
    }


def settings_of(args: argparse.Namespace) -> list[Any]:
    return [args.train_scenes, args.test_scenes, args.batch, args.learning_rate, args.bf16]


def run_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every run that is not finished."""
    log, benchmark = args.work / "runs.jsonl", test_questions(args.test_scenes)
    done = [row for row in finished_runs(log, args.arms, args.steps) if row["settings"] == settings_of(args)]
    done = [row for row in done if row["seed"] < args.seeds]
    finished = {(row["arm"], row["seed"]) for row in done}
    wanted = [(arm, seed) for seed in range(args.seeds) for arm in args.arms if (arm, seed) not in finished]
    start = time.perf_counter()
    for number, (arm, seed) in enumerate(wanted, start=1):
        row = run(arm, seed, args, benchmark)
        done.append(row)
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = ", ".join(f"{measure} {value:.1f}" for measure, value in figures(row).items())
        spent = time.perf_counter() - start
        print(f"[{number}/{len(wanted)}, {spent:.0f} s] {arm}, seed {seed}: {shown}", flush=True)
    return done


def figures(row: dict[str, Any]) -> dict[str, float]:
    """Measures of one run, in per cent."""
    means = {measure: 100 * float(np.mean(values)) for measure, values in row["scores"].items()}
    means["mean of these"] = float(np.mean([means[measure] for measure in ANSWERED]))
    return {measure: means[measure] for measure in SHOWN}


def summarize(rows: Sequence[dict[str, Any]], probes: dict[str, float]) -> dict[str, dict[str, Any]]:
    """By arm: its passes, canvas, probe and seeds, the mean of each measure, and paired differences to `REFERENCE`.

    Means and differences are pairs of a mean over seeds and half the width of its 95 % interval.
    """
    found = {(row["arm"], row["seed"]): figures(row) for row in rows}
    summary: dict[str, dict[str, Any]] = {}
    for arm in ARMS:
        runs = [row for row in rows if row["arm"] == arm]
        if not runs:
            continue
        seeds = sorted(row["seed"] for row in runs)
        paired = [seed for seed in seeds if (REFERENCE, seed) in found and arm != REFERENCE]
        means, differences = {}, {}
        for measure in SHOWN:
            means[measure] = over_seeds([found[arm, seed][measure] for seed in seeds])
            if paired:
                gains = [found[arm, seed][measure] - found[REFERENCE, seed][measure] for seed in paired]
                differences[measure] = over_seeds(gains)
        summary[arm] = {
            "passes": runs[0]["encoder_passes"],
            "canvas": runs[0]["canvas"],
            "probe": probes[arm],
            "seeds": len(seeds),
            "means": means,
            "differences": differences,
        }
    return summary


def write_table(summary: dict[str, dict[str, Any]], smaller: dict[str, float], path: Path) -> None:
    """Markdown: the measures of every arm in per cent, its differences to `REFERENCE`, and probes of `smaller` objects."""
    heads = "| windows | canvas | encoder passes | R² of a probe | seeds | " + " | ".join(SHOWN) + " |"
    rule = "|---|" + "--:|" * (4 + len(SHOWN))
    lines = [heads, rule]
    differences = [f"Differences to “{REFERENCE}” in points, with 95 % intervals over seeds:", "", heads, rule]
    for arm, row in summary.items():
        start = f"| {arm} | {row['canvas'] or '-'} | {row['passes']:g} | {row['probe']:.3f} | {row['seeds']} | "
        lines.append(start + " | ".join(f"{row['means'][measure][0]:.1f}" for measure in SHOWN) + " |")
        cells = []
        for measure in SHOWN if row["differences"] else ():
            mean, half = row["differences"][measure]
            interval = f" [{mean - half:+.1f}, {mean + half:+.1f}]" if math.isfinite(half) else ""
            cells.append(f"{mean:+.1f}{interval}")
        if cells:
            differences.append(f"{start}{' | '.join(cells)} |")
    if smaller:
        differences += ["", "R² of a probe by the length of the objects in the drawn scene:", ""]
        differences += [
            "| windows | canvas | encoder passes | {:g} to {:g} pixels | {:g} to {:g} pixels |".format(*OBJECT_PIXELS, *HALF)
        ]
        differences += ["|---|--:|--:|--:|--:|"]
    for arm, found in smaller.items():
        row = summary[arm]
        differences.append(f"| {arm} | {row['canvas']} | {row['passes']:g} | {row['probe']:.3f} | {found:.3f} |")
    write_file(path, "\n".join([*lines, "", *differences]) + "\n")


def write_plot(summary: dict[str, dict[str, Any]], path: Path) -> None:
    """The accuracy over the encoder passes of all arms, and over the side of the canvas in efficient mode."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.5), layout="constrained", facecolor="white")
    axes = figure.subplots(1, 2, sharey=True)
    canvases = [arm for arm in CANVASES if arm in summary]
    for axis, arms, key in ((axes[0], list(summary), "passes"), (axes[1], canvases, "canvas")):
        arms.sort(key=lambda arm: summary[arm][key])
        places = [summary[arm][key] for arm in arms]
        for measure, color in (("mean of these", "#1f5f8b"), ("count", "#b04a3a"), ("pointing", "#2c8c6e")):
            means, halves = zip(*(summary[arm]["means"][measure] for arm in arms), strict=True) if arms else ((), ())
            halves = [half if math.isfinite(half) else 0 for half in halves]
            label = "mean of the tasks without boxes" if measure == "mean of these" else measure
            axis.errorbar(
                places,
                means,
                yerr=halves,
                fmt="o" if key == "passes" else "o-",
                markersize=10 if measure == "mean of these" else 5,  # so that equal values show
                color=color,
                label=label,
                capsize=3,
            )
        axis.set_xscale("log", base=2)
        labels = [f"{place:g}: {arm}" if key == "passes" else f"{place:g}" for place, arm in zip(places, arms, strict=True)]
        axis.set_xticks(places, labels, rotation=90 if key == "passes" else 0, fontsize=7 if key == "passes" else None)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set(xlabel="encoder passes of an image", ylabel="right answers on held-out scenes, per cent")
    axes[1].set(xlabel="side of the canvas in efficient mode, pixels")
    axes[1].legend(fontsize="small")
    write_figure(path, figure, dpi=90)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mfrsvlm.experiments.window_modes", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for scenes, features and finished runs")
    parser.add_argument("--table", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--plot", type=Path, help="figure to write")
    parser.add_argument("--model", default=SCENE_MODEL, help="the model to start from (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="run only these arms")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="of every arm; 0: the small model as it is")
    parser.add_argument("--batch", type=int, default=12, help="scenes per step")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--train-scenes", type=int, default=400)
    parser.add_argument("--test-scenes", type=int, default=400)
    parser.add_argument("--float32", dest="bf16", action="store_false", help="train in float32")
    args = parser.parse_args(arguments)
    for path in (args.table, args.plot):
        if path is not None:
            check_file(path)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows = run_all(args)
    summary = summarize(rows, {arm: probe(arm, args) for arm in args.arms})
    write_table(summary, {arm: probe(arm, args, HALF) for arm in CANVASES if arm in args.arms}, args.table)
    if args.plot:
        write_plot(summary, args.plot)


if __name__ == "__main__":
    main()
