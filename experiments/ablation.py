"""Compares windows, injection and encoders, with the same data, steps and optimizer for every arm.

    python -m mfrsvlm.experiments.ablation --work DIR --table docs/ablation/table.md --plot docs/ablation/plot.png

All arms of an encoder start from one small LLaVA-style model, trained on the global view only, since a decoder needs
hundreds of steps before it uses the image. Each arm then adds its windows and injectors, and is trained on the frozen
features of its encoder, on the same scenes and questions, for the same number of steps. All arms are evaluated on the same
held-out scenes. The training settings are those of `training/configs/demo_model.yaml`. `linear_probe` compares features
without a decoder, and `encoders` compares encoders.

Features that arms have in common are encoded once. A finished run is a line of `runs.jsonl` in the work folder: started
again, the command continues where it stopped.
"""

import argparse
import dataclasses
import json
import math
import resource
import time
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

from ..evaluation import EvaluationSettings, evaluate, load_benchmark
from ..evaluation.evaluate import evaluate_majority
from ..evaluation.intervals import mean_interval
from ..evaluation.metrics.visual_grounding import matched_ious
from ..files.reading import read_rows
from ..files.writing import check_file, write_figure, write_file, write_tensors
from ..modeling_mfrsvlm import MFRSVLMForConditionalGeneration
from ..training.branches import BranchCollator
from ..training.demo_model.architecture import (
    make_config,
    make_processor,
    make_tokenizer,
    start_positions,
    whiten_projector,
)
from ..training.demo_model.encoder import load_encoder, pretrain
from ..training.demo_model.scene_images import OBJECT_PIXELS, SceneImages
from ..training.demo_model.scene_questions import SceneQuestions, dialogues
from ..training.demo_model.trainer import DemoModelTrainer
from ..training.image_features import cache_image_features, freeze_encoder
from ..training.train_demo_model import CONFIG, PROTOCOL, DemoModelConfig


TASKS = ("classification", "presence", "count", "comparison", "position", "grounding")
# Two more measures of boxes, which say more than accuracy while most boxes miss: mean IoU, and the share of boxes whose
# center is at most the length of the longest object away from the true one.
MEASURES = (*TASKS, "mean IoU", "pointing")
MIX = {"classification": 1, "presence": 2, "count": 3, "comparison": 2, "position": 2, "grounding": 3}


@dataclass(frozen=True)
class Features:
    """Everything that decides which features an arm sees."""

    window_sizes: tuple[int, ...] = (128, 64)
    canvas_source: str = "image"
    window_overlap: float = 0.5
    window_encoding: str = "native"
    window_weighting: str = "hann_nonzero"
    encoder: str = "resnet"

    @property
    def name(self) -> str:
        return "-".join(str(value).replace(", ", "_").strip("()").replace(",", "") for value in asdict(self).values())


@dataclass(frozen=True)
class Arm:
    """One row of the table: its features, how they are injected, and how many seeds it is given."""

    features: Features = Features()
    injection: dict[str, Any] = field(default_factory=lambda: {"injection_layers": [1, 2, 3, 4]})
    seeds: int = 1


BOTH = Features()
DECODER_WIDTH = 128
REFERENCE = "both, canvas from the original pixels"
KEPT = ("global view only", REFERENCE)  # their models of the first seed are saved, for `look_inside`
ARMS = {
    "global view only": Arm(Features(window_sizes=()), {"injection_layers": []}, seeds=3),
    "+ large windows": Arm(Features(window_sizes=(128,))),
    "+ small windows": Arm(Features(window_sizes=(64,))),
    "both, canvas from the global view": Arm(Features(canvas_source="global_view"), seeds=3),
    "both, canvas from the original pixels": Arm(BOTH, seeds=3),
    "injected at the input only": Arm(BOTH, {"injection_layers": [0]}),
    "injected before one layer": Arm(BOTH, {"injection_layers": [2]}),
    "injected before early layers": Arm(BOTH, {"injection_layers": [0, 1, 2, 3]}),
    "injected before spread layers": Arm(BOTH, {"injection_layers": [1, 2, 4, 5]}),
    "token routing": Arm(BOTH, {"injection_layers": [1, 2, 3, 4], "routing": "token", "routing_size": 32}, seeds=3),
    "cross-attention": Arm(
        BOTH,
        {
            "injection_layers": [1, 2, 3, 4],
            "injection_type": "cross_attention",
            "cross_attention_size": 96,
            "cross_attention_heads": 4,
        },
        seeds=3,
    ),
    "no overlap": Arm(Features(window_overlap=0.0)),
    "small windows, no overlap, native": Arm(Features(window_sizes=(64,), window_overlap=0.0)),
    "small windows, no overlap, resized": Arm(Features(window_sizes=(64,), window_overlap=0.0, window_encoding="resize")),
    "zero ring": Arm(Features(window_weighting="hann")),
    "ViT, global view only": Arm(Features(window_sizes=(), encoder="vit"), {"injection_layers": []}),
    "ViT, both, canvas from the original pixels": Arm(Features(encoder="vit")),
}


def pretrain_encoders(encoders: Iterable[str], work: Path, crowded_scenes: int, steps: int) -> None:
    """Trains those of the encoders that have not been."""
    for encoder in encoders:
        path = work / f"encoder-{encoder}.pt"
        if not path.exists():
            pretrain(encoder, SceneImages(work / "scenes", "train", crowded_scenes, crowding=4), path, steps)


def build(arm: Arm, vocabulary: int, work: Path, seed: int) -> MFRSVLMForConditionalGeneration:
    features = arm.features
    torch.manual_seed(seed)
    config = make_config(
        vocabulary,
        features.encoder,
        DECODER_WIDTH,
        window_sizes=list(features.window_sizes),
        window_overlap=features.window_overlap,
        window_encoding=features.window_encoding,
        window_weighting=features.window_weighting,
        **arm.injection,
    )
    model = MFRSVLMForConditionalGeneration(config)
    load_encoder(model.model, work / f"encoder-{features.encoder}.pt")
    return model


def start_file(encoder: str, work: Path) -> Path:
    return work / f"start-{encoder}.pt"


def load_start(model: MFRSVLMForConditionalGeneration, path: Path) -> None:
    """Puts the model that all arms of an encoder start from into one with injectors, which stay as they are."""
    missing, unexpected = model.load_state_dict(torch.load(path, weights_only=True), strict=False)
    strange = [*unexpected, *(name for name in missing if ".injectors." not in name)]
    if strange:
        raise RuntimeError(f"{path} is a start for another architecture: {strange[:3]}. Remove it.")


def train_decoder(
    model: MFRSVLMForConditionalGeneration,
    processor: Any,
    rows: Dataset[Any],
    file: Path = CONFIG,
    callbacks: Sequence[TrainerCallback] = (),
    **settings: Any,
) -> dict[str, float]:
    """Trains as a file of `training/configs` says, on cached features, but for `settings`.

    Returns:
        `seconds` and `decoder_tokens` that it took.
    """
    fixed = {"save_strategy": "no", "include_num_input_tokens_seen": "true"}
    _, args = DemoModelConfig().read(file, [f"--{name}={value}" for name, value in (settings | fixed).items()])
    freeze_encoder(model)
    trainer = DemoModelTrainer(
        model=model,
        args=args,
        data_collator=BranchCollator(processor),
        train_dataset=rows,
        processing_class=processor,
        callbacks=list(callbacks),
    )
    start = time.perf_counter()
    trainer.train()
    model.eval()
    return {"seconds": time.perf_counter() - start, "decoder_tokens": trainer.state.num_input_tokens_seen}


def train_start(encoder: str, work: Path, scenes: int, steps: int) -> None:
    """Trains the model that all arms of an encoder start from, if it has not been."""
    path = start_file(encoder, work)
    if path.exists():
        return
    torch.set_num_threads(1)
    arm = Arm(Features(window_sizes=(), encoder=encoder), {"injection_layers": []})
    images = SceneImages(work / "scenes", "train", scenes)
    tokenizer = make_tokenizer(dialogues(images.scenes[:500]))
    model = build(arm, len(tokenizer), work, seed=0)
    features = encode(arm.features, "train", scenes, work)
    whiten_projector(model, features)
    start_positions(model, features)
    processor = make_processor(model.config, tokenizer)
    rows = SceneQuestions(images, BranchCollator(processor), model.config, features, rounds=2, mix=MIX)
    with TemporaryDirectory(dir=work) as scratch:
        train_decoder(model, processor, rows, max_steps=steps, output_dir=scratch)
    write_tensors(path, model.state_dict())


def encoded_features(features: Features) -> Features:
    """The features to encode. Those with fewer scales are slices of the features with both scales."""
    if features.window_overlap == BOTH.window_overlap and features.window_encoding == BOTH.window_encoding:
        return replace(features, window_sizes=BOTH.window_sizes)
    return features


def feature_file(features: Features, split: str, count: int, work: Path) -> Path:
    return work / f"features-{split}-{count}-{features.name}.npy"


def encode(features: Features, split: str, count: int, work: Path) -> np.ndarray:
    """(scenes, 1 + K, T, C), from a file if they have been encoded before."""
    torch.set_num_threads(1)
    images = SceneImages(work / "scenes", split, count)
    arm = Arm(features) if features.window_sizes else Arm(features, {"injection_layers": []})
    model = build(arm, 8, work, seed=0)
    batches = images.batches(model.config, features.canvas_source)
    return cache_image_features(model, batches, count, feature_file(features, split, count, work))


def encode_both(features: Features, counts: dict[str, int], work: Path) -> str:
    for split, count in counts.items():
        encode(features, split, count, work)
    return features.name


def features_of(features: Features, split: str, count: int, work: Path) -> np.ndarray:
    """(scenes, 1 + K, T, C) with the stacks that an arm sees."""
    full = encoded_features(features)
    encoded = encode(full, split, count, work)
    per_scale = (encoded.shape[1] - 1) // len(full.window_sizes)
    kept = [0]
    for size in features.window_sizes:
        first = 1 + full.window_sizes.index(size) * per_scale
        kept += range(first, first + per_scale)
    return encoded if len(kept) == encoded.shape[1] else encoded[:, kept]


def test_questions(scenes: int) -> Any:
    """The held-out questions as a benchmark: one of each of `TASKS` about every scene."""
    benchmark = load_benchmark("scenes", None, "test", count=scenes)
    wanted = [sample for sample in benchmark.samples if task_of(sample.task, sample.group) in TASKS]
    return dataclasses.replace(benchmark, samples=wanted)


def task_of(task: str, group: str) -> str:
    """Task of a scene, from that of the benchmark."""
    return {"counting": "count", "vqa": group}.get(task, task)


def scores_of(predictions: Iterable[dict[str, Any]]) -> dict[str, list[float]]:
    """Scores of all questions by measure, from the rows that an evaluation writes."""
    scores: dict[str, list[float]] = {name: [] for name in MEASURES}
    for row in predictions:
        scores[task_of(row["task"], row["group"])].append(row["score"])
        if row["task"] == "grounding":
            scores["mean IoU"] += matched_ious(row["parsed"], row["boxes"])
            scores["pointing"].append(float(center_distance(row["parsed"], row["boxes"][0]) <= OBJECT_PIXELS[1]))
    return {name: values for name, values in scores.items() if values}


def center_distance(boxes: Sequence[Sequence[float]], true: Sequence[float]) -> float:
    """Distance between the centers of the first of the boxes and the true one; infinite without a box."""
    if not boxes:
        return math.inf
    (x, y), (true_x, true_y) = (((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in (boxes[0], true))
    return math.hypot(x - true_x, y - true_y)


def run(name: str, seed: int, work: Path, steps: int, batch: int, counts: dict[str, int]) -> dict[str, Any]:
    """Trains and evaluates one arm with one seed."""
    torch.set_num_threads(1)
    arm = ARMS[name]
    images = SceneImages(work / "scenes", "train", counts["train"])
    tokenizer = make_tokenizer(dialogues(images.scenes[:500]))
    model = build(arm, len(tokenizer), work, seed)
    load_start(model, start_file(arm.features.encoder, work))
    processor = make_processor(model.config, tokenizer, arm.features.canvas_source)
    features = features_of(arm.features, "train", counts["train"], work)
    rows = SceneQuestions(images, BranchCollator(processor), model.config, features, rounds=3, mix=MIX)
    with TemporaryDirectory(dir=work) as scratch:
        spent = train_decoder(
            model,
            processor,
            rows,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=1e-3,
            seed=seed,
            output_dir=scratch,
        )
        settings = EvaluationSettings(output=Path(scratch) / "evaluation", model_name=name, progress=False)
        evaluate(model, processor, [test_questions(counts["test"])], PROTOCOL, settings)
        predictions = read_rows(Path(scratch) / "evaluation" / "scenes" / "test" / "predictions.jsonl")
    if seed == 0 and name in KEPT:
        folder = work / f"models-{steps}" / name.replace(",", "").replace(" ", "-")
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return {
        "arm": name,
        "seed": seed,
        "steps": steps,
        "scores": scores_of(row for _, row in predictions),
        "encoder_passes": model.config.encoder_passes,
        "decoder_tokens": spent["decoder_tokens"],
        "seconds": round(spent["seconds"], 1),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def finished_runs(log: Path, arms: Collection[str], steps: int) -> list[dict[str, Any]]:
    """Lines of the log that are runs of these arms and of this length."""
    rows = [row for _, row in read_rows(log)] if log.exists() else []
    return [row for row in rows if row["arm"] in arms and row["steps"] == steps]


def run_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Encoders, start, features, then every run that is not finished."""
    work = args.work
    log = work / "runs.jsonl"
    done = finished_runs(log, args.arms, args.steps)
    finished = {(row["arm"], row["seed"]) for row in done}
    # All first seeds before any second: a table can be drawn from whatever there is.
    wanted = [(name, seed) for seed in range(args.seeds) for name in args.arms if seed < ARMS[name].seeds]
    wanted = [each for each in wanted if each not in finished]
    start = time.perf_counter()
    encoders = dict.fromkeys(ARMS[name].features.encoder for name in args.arms)
    pretrain_encoders(encoders, work, args.crowded_scenes, args.encoder_steps)
    counts = {"train": args.train_scenes, "test": args.test_scenes}
    for split, count in counts.items():
        SceneImages(work / "scenes", split, count)
    SceneImages(work / "scenes", "train", args.start_scenes)
    with ProcessPoolExecutor(args.workers, max_tasks_per_child=1, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(train_start, each, work, args.start_scenes, args.start_steps) for each in encoders]:
            future.result()
        sets = dict.fromkeys(encoded_features(ARMS[name].features) for name, _ in wanted)
        for future in [pool.submit(encode_both, each, counts, work) for each in sets]:
            print(f"[{time.perf_counter() - start:.0f} s] encoded {future.result()}", flush=True)
        futures = [pool.submit(run, name, seed, work, args.steps, args.batch, counts) for name, seed in wanted]
        for number, future in enumerate(as_completed(futures), start=1):
            row = future.result()
            done.append(row)
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            means = " ".join(f"{task} {np.mean(values):.3f}" for task, values in row["scores"].items())
            spent = time.perf_counter() - start
            print(f"[{number}/{len(wanted)}, {spent:.0f} s] {row['arm']}, seed {row['seed']}: {means}", flush=True)
    return done


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row an arm: the mean of its seeds per task, with the 95 % interval over the held-out questions.

    All arms and seeds answer the same questions, so a question's score is its mean over seeds, and `gain` compares
    question by question with the arm `REFERENCE`.
    """
    questions: dict[str, dict[str, np.ndarray]] = {}
    for name in ARMS:
        runs = [row["scores"] for row in rows if row["arm"] == name]
        if runs:
            questions[name] = {task: np.mean([run[task] for run in runs], axis=0) for task in MEASURES}
    summary = []
    for name, scores in questions.items():
        runs = [row for row in rows if row["arm"] == name]
        summary.append(
            {
                "arm": name,
                "seeds": len(runs),
                "tasks": {task: mean_interval(values) for task, values in scores.items()},
                "gain": {task: mean_interval(scores[task] - questions[REFERENCE][task]) for task in MEASURES}
                if REFERENCE in questions
                else {},
                "spread": {task: float(np.ptp([np.mean(run["scores"][task]) for run in runs])) for task in MEASURES},
                "encoder_passes": runs[0]["encoder_passes"],
                "decoder_tokens": runs[0]["decoder_tokens"],
                "seconds": float(np.mean([run["seconds"] for run in runs])),
                "peak_memory_gb": max(run["peak_memory_gb"] for run in runs),
            }
        )
    return summary


def majority_baseline(test_scenes: int) -> dict[str, float]:
    """Share of right answers of always the most frequent one to a kind of question. Boxes have no such baseline here."""
    [summary] = evaluate_majority([test_questions(test_scenes)], PROTOCOL).values()
    results = summary["results"]
    figures = {"classification": results["classification"]["accuracy"], "count": results["counting"]["exact"]}
    figures |= results["vqa"]["per_type"]
    return {task: figures[task]["value"] for task in TASKS if task in figures}


def write_table(summary: list[dict[str, Any]], majority: dict[str, float], path: Path) -> None:
    """Markdown: accuracy in per cent with the half width of its interval, what the arm costs, differences, and spreads."""
    lines = [
        "| arm | seeds | " + " | ".join(MEASURES) + " | encoder passes | decoder tokens (M) | train s | peak GB |",
        "|---" * (len(MEASURES) + 6) + "|",
    ]
    cells = [f"{100 * majority[task]:.1f}" if task in majority else "-" for task in MEASURES]
    lines.append("| majority baseline | | " + " | ".join(cells) + " | | | | |")
    for row in summary:
        cells = [f"{100 * m:.1f} ± {50 * (high - low):.1f}" for m, low, high in row["tasks"].values()]
        cells += [f"{row['encoder_passes']:g}", f"{row['decoder_tokens'] / 1e6:.2f}"]
        cells += [f"{row['seconds']:.0f}", f"{row['peak_memory_gb']:.1f}"]
        lines.append(f"| {row['arm']} | {row['seeds']} | " + " | ".join(cells) + " |")
    others = [row for row in summary if row["arm"] != REFERENCE and row["gain"]]
    if others:
        lines += ["", f"Difference to “{REFERENCE}”, question by question, in points (95 % interval):", ""]
        lines += ["| arm | " + " | ".join(MEASURES) + " |", "|---" * (len(MEASURES) + 1) + "|"]
    for row in others:
        cells = [f"{100 * m:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]" for m, low, high in row["gain"].values()]
        lines.append(f"| {row['arm']} | " + " | ".join(cells) + " |")
    several = [row for row in summary if row["seeds"] > 1]
    if several:
        lines += ["", "Range of the means of the seeds, in points:", ""]
        lines += ["| arm | " + " | ".join(MEASURES) + " |", "|---" * (len(MEASURES) + 1) + "|"]
    for row in several:
        lines.append(f"| {row['arm']} | " + " | ".join(f"{100 * row['spread'][task]:.1f}" for task in MEASURES) + " |")
    write_file(path, "\n".join(lines) + "\n")


def write_plot(summary: list[dict[str, Any]], majority: dict[str, float], path: Path) -> None:
    """One panel a task. The dotted line is the majority baseline, the solid one the arm `REFERENCE`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 4, figsize=(15, 9), sharey=True, layout="constrained")
    names = [f"{row['arm']} ({row['seeds']})" for row in summary]
    places = np.arange(len(names))[::-1]
    for axis, task in zip(axes.flat, MEASURES, strict=True):
        means, lows, highs = (np.array(values) for values in zip(*(row["tasks"][task] for row in summary), strict=True))
        axis.errorbar(100 * means, places, xerr=100 * np.stack([means - lows, highs - means]), fmt="o", color="#1f5f8b")
        if task in majority:
            axis.axvline(100 * majority[task], color="#b04a3a", linestyle=":")
        for row in summary:
            if row["arm"] == REFERENCE:
                axis.axvline(100 * row["tasks"][task][0], color="#999999", linewidth=0.8)
        axis.set(title=task, yticks=places, yticklabels=names)
        axis.grid(axis="x", alpha=0.3)
    figure.supxlabel("correct answers on held-out scenes, per cent, with 95 % intervals (number of seeds)")
    write_figure(path, figure, dpi=90)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mfrsvlm.experiments.ablation", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for scenes, encoders, features and finished runs")
    parser.add_argument("--table", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--plot", type=Path, help="figure to write")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="run only these arms")
    parser.add_argument("--seeds", type=int, default=3, help="maximum number of seeds per arm")
    parser.add_argument("--steps", type=int, default=250, help="training steps of every arm")
    parser.add_argument("--batch", type=int, default=12, help="scenes per step")
    parser.add_argument("--train-scenes", type=int, default=1600)
    parser.add_argument("--test-scenes", type=int, default=400)
    parser.add_argument("--crowded-scenes", type=int, default=4000, help="of the encoders")
    parser.add_argument("--encoder-steps", type=int, default=3000)
    parser.add_argument("--start-scenes", type=int, default=12000)
    parser.add_argument("--start-steps", type=int, default=1500)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(arguments)
    for path in (args.table, args.plot):
        if path is not None:
            check_file(path)
    summary, majority = summarize(run_all(args)), majority_baseline(args.test_scenes)
    write_table(summary, majority, args.table)
    if args.plot:
        write_plot(summary, majority, args.plot)


if __name__ == "__main__":
    main()
