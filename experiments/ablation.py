"""What multi-scale windows and injection are worth: the same data, budget and optimiser for every arm.

    python -m mfrsvlm.experiments.ablation --work DIR --output docs/ablation

All arms of an encoder start from one small LLaVA-style model (see `geometry`), trained on the global view only: a decoder
needs hundreds of steps before it reads anything from an image, and no arm should be judged by its luck in that. Each arm
then gets its windows and injectors and goes on, on the frozen features of its encoder, on the same scenes and questions, for
the same number of steps, and is marked on the same held-out scenes. The arms "global view only" go on as they are. `readout`
compares encoders, and features, before any language.

Features that arms have in common are encoded once. A finished run is a line of `runs.jsonl` in the work folder: started
again, the command goes on where it stopped.
"""

import argparse
import json
import resource
import time
from collections.abc import Collection, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mfrsvlm.evaluation.intervals import mean_interval
from mfrsvlm.experiments.dataset import OBJECT_PIXELS, SCENE_SIZE, SceneImages, plan
from mfrsvlm.experiments.decoder import (
    Prompts,
    encode_scenes,
    generate_answers,
    greedy_exact,
    make_processor,
    make_tokenizer,
    start_places,
    train_decoder,
    whiten_projector,
)
from mfrsvlm.experiments.encoder import load_encoder, pretrain
from mfrsvlm.experiments.geometry import make_config
from mfrsvlm.modeling_mfrsvlm import MFRSVLMForConditionalGeneration
from mfrsvlm.scenes import ask
from mfrsvlm.scenes.scoring import centre_distance, chance, overlap, score


TASKS = ("classification", "presence", "count", "comparison", "position", "grounding")
# Two more of the boxes, which say more than their accuracy while most of them miss: mean IoU, and the share of boxes whose
# centre is no farther from the true one than the longest object is long.
MEASURES = (*TASKS, "mean IoU", "pointing")
MIX = {"classification": 1, "presence": 2, "count": 3, "comparison": 2, "position": 2, "grounding": 3}


@dataclass(frozen=True)
class Features:
    """What the encoder is asked for: everything that decides which features an arm sees."""

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
KEPT = ("global view only", REFERENCE)  # whose first model is saved, for `look_inside`
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


def train_start(encoder: str, work: Path, scenes: int, steps: int) -> None:
    """Trains the model that all arms of an encoder start from, if it has not been."""
    path = start_file(encoder, work)
    if path.exists():
        return
    torch.set_num_threads(1)
    arm = Arm(Features(window_sizes=(), encoder=encoder), {"injection_layers": []})
    images = SceneImages(work / "scenes", "train", scenes)
    tokenizer = make_tokenizer(images.scenes[:500])
    model = build(arm, len(tokenizer), work, seed=0)
    features = encode_scenes(model, images, feature_file(arm.features, "train", scenes, work), "image", chunk=16)
    whiten_projector(model, features)
    start_places(model, features)
    prompts = Prompts(make_processor(model.config, tokenizer))
    train_decoder(model, prompts, images.scenes, features, steps, batch=12, mix=MIX, rounds=2)
    torch.save(model.state_dict(), path)


def whole(features: Features) -> Features:
    """What is encoded for them: fewer scales are slices of the features with both."""
    if features.window_overlap == BOTH.window_overlap and features.window_encoding == BOTH.window_encoding:
        return replace(features, window_sizes=BOTH.window_sizes)
    return features


def feature_file(features: Features, split: str, count: int, work: Path) -> Path:
    return work / f"features-{split}-{count}-{features.name}.npy"


def encode(features: Features, split: str, count: int, work: Path) -> None:
    torch.set_num_threads(1)
    images = SceneImages(work / "scenes", split, count)
    model = build(Arm(features), 8, work, seed=0)
    encode_scenes(model, images, feature_file(features, split, count, work), features.canvas_source)


def encode_both(features: Features, counts: dict[str, int], work: Path) -> str:
    for split, count in counts.items():
        encode(features, split, count, work)
    return features.name


def features_of(features: Features, split: str, count: int, work: Path) -> np.ndarray:
    """(scenes, 1 + K, T, C) with the stacks that an arm sees."""
    whole_features = whole(features)
    path = feature_file(whole_features, split, count, work)
    if not path.exists():
        encode(whole_features, split, count, work)
    encoded = np.load(path, mmap_mode="r")
    per_scale = (encoded.shape[1] - 1) // len(whole_features.window_sizes)
    kept = [0]
    for size in features.window_sizes:
        first = 1 + whole_features.window_sizes.index(size) * per_scale
        kept += range(first, first + per_scale)
    return encoded if len(kept) == encoded.shape[1] else encoded[:, kept]


def encoder_passes(config: Any) -> float:
    """Passes an image, in passes of the global view's size: smaller windows encoded at their own size cost less."""
    passes = 1.0
    for window in config.windows if config.has_details else ():
        share = 1.0 if config.window_encoding == "resize" else (window.size / config.image_size) ** 2
        passes += window.num_windows * share
    return passes


def run(name: str, seed: int, work: Path, steps: int, batch: int, counts: dict[str, int]) -> dict[str, Any]:
    """Trains and marks one arm with one seed."""
    torch.set_num_threads(1)
    arm = ARMS[name]
    train, test = (SceneImages(work / "scenes", split, count) for split, count in counts.items())
    tokenizer = make_tokenizer(train.scenes[:500])
    model = build(arm, len(tokenizer), work, seed)
    load_start(model, start_file(arm.features.encoder, work))
    prompts = Prompts(make_processor(model.config, tokenizer, arm.features.canvas_source))
    seen = features_of(arm.features, "train", counts["train"], work)
    spent = train_decoder(model, prompts, train.scenes, seen, steps, batch, peak=1e-3, seed=seed, mix=MIX, rounds=3)
    if seed == 0 and name in KEPT:
        folder = work / f"models-{steps}" / name.replace(",", "").replace(" ", "-")
        model.save_pretrained(folder)
        prompts.processor.save_pretrained(folder)
    held_out = features_of(arm.features, "test", counts["test"], work)
    scores = greedy_exact(model, prompts, test.scenes, held_out, tasks=TASKS)
    boxes = [(i, q) for i, scene in enumerate(test.scenes) for q in ask(scene, ("grounding",))]
    answers = generate_answers(model, prompts, boxes, held_out)
    said = [(q, answer) for (_, q), answer in zip(boxes, answers, strict=True)]
    scores["grounding"] = [score(q, answer, SCENE_SIZE) for q, answer in said]
    scores["mean IoU"] = [overlap(q, answer, SCENE_SIZE) for q, answer in said]
    scores["pointing"] = [float(centre_distance(q, answer, SCENE_SIZE) <= OBJECT_PIXELS[1]) for q, answer in said]
    return {
        "arm": name,
        "seed": seed,
        "steps": steps,
        "scores": {task: values for task, values in scores.items() if values},
        "encoder_passes": encoder_passes(model.config),
        "decoder_tokens": spent["decoder_tokens"],
        "seconds": round(spent["seconds"], 1),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def finished_runs(log: Path, arms: Collection[str], steps: int) -> list[dict[str, Any]]:
    """Lines of the log that are runs of these arms and of this length."""
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
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
        sets = dict.fromkeys(whole(ARMS[name].features) for name, _ in wanted)
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


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
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


def guesses(test_scenes: int) -> dict[str, float]:
    """What the best guesser scores on the held-out questions of each task. A box cannot be guessed so simply."""
    asked = [question for index in range(test_scenes) for question in ask(plan("test", index), TASKS)]
    return {task: chance([q for q in asked if q.task == task]) for task in TASKS if task != "grounding"}


def write_table(summary: list[dict[str, Any]], guessed: dict[str, float], path: Path) -> None:
    """Markdown: accuracy in per cent with the half width of its interval, and what the arm costs."""
    lines = [
        "| arm | seeds | " + " | ".join(MEASURES) + " | encoder passes | decoder tokens (M) | train s | peak GB |",
        "|---" * (len(MEASURES) + 6) + "|",
    ]
    cells = [f"{100 * guessed[task]:.1f}" if task in guessed else "-" for task in MEASURES]
    lines.append("| chance | | " + " | ".join(cells) + " | | | | |")
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
    path.write_text("\n".join(lines) + "\n")


def write_plot(summary: list[dict[str, Any]], guessed: dict[str, float], path: Path) -> None:
    """One panel a task; the dotted line is chance, the solid one the arm `REFERENCE`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 4, figsize=(15, 9), sharey=True, layout="constrained")
    names = [f"{row['arm']} ({row['seeds']})" for row in summary]
    places = np.arange(len(names))[::-1]
    for axis, task in zip(axes.flat, MEASURES, strict=True):
        means, lows, highs = (np.array(values) for values in zip(*(row["tasks"][task] for row in summary), strict=True))
        axis.errorbar(100 * means, places, xerr=100 * np.stack([means - lows, highs - means]), fmt="o", color="#1f5f8b")
        if task in guessed:
            axis.axvline(100 * guessed[task], color="#b04a3a", linestyle=":")
        for row in summary:
            if row["arm"] == REFERENCE:
                axis.axvline(100 * row["tasks"][task][0], color="#999999", linewidth=0.8)
        axis.set(title=task, yticks=places, yticklabels=names)
        axis.grid(axis="x", alpha=0.3)
    figure.supxlabel("correct answers on held-out scenes, per cent, with 95 % intervals (number of seeds)")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mfrsvlm.experiments.ablation", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for scenes, encoders, features and finished runs")
    parser.add_argument("--output", type=Path, required=True, help="folder for the table and the plot")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="only these")
    parser.add_argument("--seeds", type=int, default=3, help="of an arm, at most")
    parser.add_argument("--steps", type=int, default=250, help="of every arm")
    parser.add_argument("--batch", type=int, default=12, help="scenes a step")
    parser.add_argument("--train-scenes", type=int, default=1600)
    parser.add_argument("--test-scenes", type=int, default=400)
    parser.add_argument("--crowded-scenes", type=int, default=4000, help="of the encoders")
    parser.add_argument("--encoder-steps", type=int, default=3000)
    parser.add_argument("--start-scenes", type=int, default=12000)
    parser.add_argument("--start-steps", type=int, default=1500)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    rows = run_all(args)
    args.output.mkdir(parents=True, exist_ok=True)
    summary = summarise(rows)
    guessed = guesses(args.test_scenes)
    (args.output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    write_table(summary, guessed, args.output / "table.md")
    write_plot(summary, guessed, args.output / "plot.png")


if __name__ == "__main__":
    main()
