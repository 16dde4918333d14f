"""Measures accuracy against encoder passes where only some windows are encoded (`window_budget`), at twice the canvas.

    python -m mfrsvlm.experiments.window_budget --model experiments/scene_model --work DIR \
        --table docs/speed/window_budget.md --plot docs/speed/window_budget.png

The scenes are synthetic and have few small objects. The canvas has four times the side of the global view, twice that of the
small model: 16 windows side by side. The small model is trained further with windows that are chosen in several ways: by a
scorer from the global view and the question, by one from the global view alone, at random, from the centre outwards, all and
none. Both scorers learn from the loss of the answers. The rows of every step are shared out over the ways, and its budget is
drawn from `BUDGETS`, so one decoder serves all ways and budgets, and differences are those of the choice.

All ways then answer the same questions about held-out scenes. A further one knows the objects and chooses the windows with
most of those that are asked for. It tells what a perfect scorer could reach with this decoder.

The encoder is frozen, and the features of all windows are cached. A finished seed is a line of `runs.jsonl` in the work
folder: started again, the command continues with the next.
"""

import argparse
import copy
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from ..configuration_mfrsvlm import MFRSVLMConfig
from ..evaluation.intervals import mean_interval
from ..files.model_folder import load_model, slow_on_cpu
from ..files.reading import read_rows
from ..files.writing import check_file, write_figure, write_file, write_tensors
from ..modeling_mfrsvlm import (
    MFRSVLMForConditionalGeneration,
    choose_windows,
    fill_windows,
    split_phases,
    stitch_windows,
)
from ..processing_mfrsvlm import MFRSVLMProcessor, cut_windows
from ..scenes import KINDS, Scene, ask, plan_scene, scene_seed
from ..training.branches import BranchCollator
from ..training.demo_model.architecture import make_processor
from ..training.demo_model.scene_images import canvas_and_view, to_pixels
from ..training.demo_model.scene_questions import NOUN, NOUNS, to_turns
from ..training.image_features import freeze_encoder, project
from . import SCENE_MODEL
from .window_modes import spread


SIZE, CANVAS_SCALE = 512, 4  # pixels of a scene and of the canvas; canvas over global view
OBJECT_PIXELS, MOST_OBJECTS = (6.0, 12.0), 6
TASKS = ("presence", "count", "comparison", "position")
BUDGETS = (1, 2, 4, 8)
QUESTION, CONTENT, RANDOM, CENTRE = "scorer, image and question", "scorer, image alone", "random", "centre"
KNOWN, ALL, NONE = "known objects", "all windows", "global view only"
CHOSEN = (QUESTION, CONTENT, RANDOM, CENTRE, KNOWN)
SHARES = {QUESTION: 6, CONTENT: 6, RANDOM: 1, CENTRE: 1, ALL: 1, NONE: 1}  # rows of a step
BATCH = sum(SHARES.values())
DECODER_RATE, SCORER_RATE = 5e-4, 3e-3


def few_objects(split: str, count: int) -> list[Scene]:
    """The first scenes of a split with at most `MOST_OBJECTS` objects."""
    plans = (plan_scene(scene_seed(split, index), SIZE, OBJECT_PIXELS) for index in itertools.count())
    return list(itertools.islice((scene for scene in plans if len(scene.objects) <= MOST_OBJECTS), count))


def make_model(source: str) -> tuple[MFRSVLMForConditionalGeneration, MFRSVLMProcessor]:
    """The small model at twice its canvas, in float32, with a new scorer, and its processor."""
    small, processor = load_model(source, dtype=torch.float32)
    fields = {"canvas_scale": CANVAS_SCALE, "window_overlap": 0.0, "window_budget": BUDGETS[0], "dtype": "float32"}
    config = MFRSVLMConfig.from_dict(small.config.to_dict() | fields)
    state = {
        name: spread(value, small.config, config) if name.endswith(".stack_embedding") else value
        for name, value in small.state_dict().items()
    }
    model = MFRSVLMForConditionalGeneration(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    strange = [*unexpected, *(name for name in missing if ".window_scorer." not in name)]
    if strange:
        raise RuntimeError(f"{source} is no model of the kind of the small model: {strange[:3]}.")
    freeze_encoder(model)
    return model.eval(), make_processor(config, processor.tokenizer)


class Data:
    """Questions about scenes of a split, and the features of their global views and windows.

    Args:
        model: its encoder computes the features, unless they are in the folder.
        processor: encodes the questions.
        folder: where features are kept.
        split: see `scene_seed`.
        count: number of scenes.
        rounds: different sets of questions about each scene.

    Attributes:
        questions: (scene, question).
        samples: the questions as `BranchCollator.encode` returns them.
        question_ids: (questions, S), see `MFRSVLMProcessor.question_ids`.
        features: float16 by name: `visual` (N, T, C); `map 0`, ... (N, C, h, w) of the global view, one per depth; `windows`
            (N, n, depths, C, t, t).
    """

    def __init__(
        self,
        model: MFRSVLMForConditionalGeneration,
        processor: MFRSVLMProcessor,
        folder: Path,
        split: str,
        count: int,
        rounds: int = 1,
    ) -> None:
        self.scenes = few_objects(split, count)
        self.questions = [
            (number, question)
            for number, scene in enumerate(self.scenes)
            for question in {q.text: q for seed in range(rounds) for q in ask(scene, TASKS, seed)}.values()
        ]
        self.collator = BranchCollator(processor)
        self.samples = []
        for _, question in self.questions:
            turns = to_turns(question)
            turns[0]["content"].insert(0, {"type": "image"})
            self.samples.append(self.collator.encode(turns, image_features=torch.empty(0)))  # they come later
        self.question_ids = processor.question_ids([question.text for _, question in self.questions])
        path = folder / f"features-{split}-{count}.pt"
        if not path.exists():
            write_tensors(path, encode(model, self.scenes, split))
        self.features = torch.load(path, weights_only=True)

    def __len__(self) -> int:
        return len(self.questions)


@torch.inference_mode()
def encode(model: MFRSVLMForConditionalGeneration, scenes: Sequence[Scene], split: str) -> dict[str, torch.Tensor]:
    """The features of `Data`."""
    config, inner = model.config, model.model
    (window,) = config.windows
    parts: dict[str, list[torch.Tensor]] = {}
    for scene in tqdm(scenes, desc=f"features, {split}", unit="scene", mininterval=5):
        canvas, view = (to_pixels(image[None]) for image in canvas_and_view(scene, (SIZE, config.image_size)))
        _, (visual, *maps) = inner._encode(view, [config.vision_feature_layer, *config.detail_feature_layers])
        pixels = torch.from_numpy(cut_windows(canvas[0].numpy(), config.windows))
        pixels = pixels.view(window.num_windows, config.num_channels, window.size, window.size)
        found = {
            "visual": visual.flatten(2).transpose(1, 2),
            "windows": torch.stack(inner._encode_windows(pixels, window, None), dim=1)[None],
        }
        found |= {f"map {number}": depth for number, depth in enumerate(maps)}
        for name, values in found.items():
            parts.setdefault(name, []).append(values.half())
    return {name: torch.cat(values) for name, values in parts.items()}


def asked_objects(scene: Scene, question: str, windows_per_side: int) -> torch.Tensor:
    """(n,), the number of objects in each window whose kind the question names."""
    kinds = {KINDS[NOUNS[noun.group()]] for noun in NOUN.finditer(question)}
    counts = torch.zeros(windows_per_side, windows_per_side)
    for item in scene.objects:
        if item.kind in kinds:
            counts[int(item.y * windows_per_side / scene.size), int(item.x * windows_per_side / scene.size)] += 1
    return counts.flatten()


class Choices:
    """Ways to choose windows: the model's scorer with questions, another one for images alone, and fixed ways."""

    def __init__(self, model: MFRSVLMForConditionalGeneration) -> None:
        scorer = model.model.window_scorer
        self.model, self.scorers = model, {QUESTION: scorer, CONTENT: copy.deepcopy(scorer)}

    def scores(self, way: str, data: Data, rows: Sequence[int], maps: list[torch.Tensor], seed: int) -> torch.Tensor:
        """(rows, n), higher for windows to encode first. `maps` (rows, C, h, w) are those of the global view."""
        (window,), inner = self.model.config.windows, self.model.model
        if way in self.scorers:
            inner.window_scorer = self.scorers[way]  # the model scores with the one that it holds
            return inner.score_windows(maps, data.question_ids[list(rows)] if way == QUESTION else None)
        if way == KNOWN:
            asked = [(data.scenes[scene], question.text) for scene, question in (data.questions[row] for row in rows)]
            return torch.stack([asked_objects(scene, text, window.windows_per_side) for scene, text in asked])
        if way == RANDOM:
            generators = [torch.Generator().manual_seed(seed * len(data) + row) for row in rows]
            return torch.stack([torch.rand(window.num_windows, generator=generator) for generator in generators])
        places = torch.arange(window.windows_per_side) - (window.windows_per_side - 1) / 2
        distances = (places[:, None] ** 2 + places**2).flatten()
        return -distances.expand(len(rows), -1)


def show(
    model: MFRSVLMForConditionalGeneration,
    choices: Choices,
    data: Data,
    rows: Sequence[int],
    way: str,
    budget: int,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (rows, 1 + K, T, C) with `budget` windows chosen in a way, and which were chosen (rows, k)."""
    config = model.config
    (window,) = config.windows
    scenes = [data.questions[row][0] for row in rows]
    maps = [data.features[f"map {number}"][scenes].float() for number in range(len(config.detail_feature_layers))]
    windows = data.features["windows"][scenes].float()  # (rows, n, depths, C, t, t)
    scores = choices.scores(CENTRE if way in (ALL, NONE) else way, data, rows, maps, seed)
    chosen = choose_windows(scores, {ALL: window.num_windows, NONE: 0}.get(way, budget))
    learns = model.training and way in choices.scorers
    if not learns:
        windows = windows[torch.arange(len(rows))[:, None], chosen]
    stacks = [data.features["visual"][scenes].float()[None]]
    for shown in fill_windows(maps, windows, chosen, window, scores if learns else None).unbind(2):
        canvas = stitch_windows(shown, window, config.canvas_scale * config.tokens_per_side, config.window_weighting)
        stacks.append(split_phases(canvas, config.canvas_scale))
    return torch.cat(stacks).transpose(0, 1), chosen


def answer(
    model: MFRSVLMForConditionalGeneration, data: Data, rows: Sequence[int], features: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss, and for every row whether the model would write its answer: each token of it is the most likely one."""
    batch = data.collator([data.samples[row] for row in rows])
    with torch.autocast("cpu", torch.bfloat16, enabled=not slow_on_cpu(torch.bfloat16)):
        outputs = model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=batch["attention_mask"],
            mm_encoder_outputs={"image": project(model, features)},
            use_cache=False,
        )
    labels, weights, logits = batch["labels"][:, 1:], batch["loss_weights"][:, 1:], outputs.logits[:, :-1]
    answered = labels != -100
    losses = F.cross_entropy(logits[answered].float(), labels[answered], reduction="none")
    right = (logits.argmax(-1) == labels) | ~answered
    return (losses * weights[answered]).sum() / weights.sum(), right.all(dim=1)


def batches(count: int, steps: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Rows of every step, in random order."""
    order: list[int] = []
    for _ in range(steps):
        while len(order) < BATCH:
            order += torch.randperm(count, generator=generator).tolist()
        yield order[:BATCH]
        del order[:BATCH]


def train(model: MFRSVLMForConditionalGeneration, choices: Choices, data: Data, steps: int, seed: int) -> None:
    """Trains decoder, projector, injectors and both scorers."""
    scorers = [each for scorer in choices.scorers.values() for each in scorer.parameters()]
    others = [each for name, each in model.named_parameters() if each.requires_grad and ".window_scorer." not in name]
    groups = [{"params": others, "lr": DECODER_RATE}, {"params": scorers, "lr": SCORER_RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / 10, (steps - step) / steps))
    model.set_attn_implementation({"text_config": "short"})
    model.train()
    generator, start = torch.Generator().manual_seed(seed), time.perf_counter()
    for step, rows in enumerate(batches(len(data), steps, generator)):
        budget = BUDGETS[int(torch.randint(len(BUDGETS), (), generator=generator))]
        parts, first = [], 0
        for way, share in SHARES.items():
            parts.append(show(model, choices, data, rows[first : first + share], way, budget, seed=step)[0])
            first += share
        loss, right = answer(model, data, rows, torch.cat(parts))
        loss.backward()
        nn.utils.clip_grad_norm_(others, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            spent = time.perf_counter() - start
            print(
                f"seed {seed}: step {step} of {steps}, {spent:.0f} s, loss {loss:.3f}, right {right.float().mean():.2f}",
                flush=True,
            )
    model.eval()


@torch.inference_mode()
def score(model: MFRSVLMForConditionalGeneration, choices: Choices, data: Data, seed: int) -> list[dict[str, Any]]:
    """For every way and budget: each answer right (1) or wrong, and the share of asked objects in chosen windows."""
    found = []
    for way in (ALL, *CHOSEN, NONE):
        for budget in {ALL: (model.config.windows[0].num_windows,), NONE: (0,)}.get(way, BUDGETS):
            right: list[float] = []
            seen: list[float] = []
            for first in range(0, len(data), 32):
                rows = range(first, min(first + 32, len(data)))
                features, chosen = show(model, choices, data, rows, way, budget, seed)
                right += answer(model, data, rows, features)[1].float().tolist()
                known = choices.scores(KNOWN, data, rows, [], seed)
                shares = known.gather(1, chosen).sum(1) / known.sum(1)  # not a number where there is none
                seen += shares[known.sum(1) > 0].tolist()
            found.append({"way": way, "budget": budget, "right": right, "seen": seen})
            print(f"{way}, {budget}: {100 * np.mean(right):.1f} % right, {100 * np.mean(seen):.0f} % of objects", flush=True)
    return found


def run(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model, processor = make_model(args.model)
    choices = Choices(model)
    data = Data(model, processor, args.work, "train", args.train_scenes, rounds=3)
    test = Data(model, processor, args.work, "test", args.test_scenes)
    began = time.process_time()
    train(model, choices, data, args.steps, seed)
    seconds = time.process_time() - began
    return {
        "seed": seed,
        "settings": settings_of(args),
        "tasks": [question.task for _, question in test.questions],
        "answers": [question.answer for _, question in test.questions],
        "scores": score(model, choices, test, seed),
        "seconds": round(seconds, 1),
    }


def settings_of(args: argparse.Namespace) -> list[int]:
    return [args.train_scenes, args.test_scenes, args.steps]


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every way and budget, the score of each question averaged over seeds, and what follows from it."""
    tasks = np.array(rows[0]["tasks"])
    right = {
        (first["way"], first["budget"]): np.mean([row["scores"][index]["right"] for row in rows], axis=0)
        for index, first in enumerate(rows[0]["scores"])
    }
    (reference,) = (values for (way, _), values in right.items() if way == ALL)
    return [
        {
            "way": way,
            "budget": budget,
            "passes": 1 + budget,
            "right": mean_interval(values),
            "difference": mean_interval(values - reference),
            "seeds": [float(np.mean(row["scores"][index]["right"])) for row in rows],
            "tasks": {task: float(values[tasks == task].mean()) for task in TASKS if (tasks == task).any()},
            "seen": float(np.mean([row["scores"][index]["seen"] for row in rows])),
        }
        for index, ((way, budget), values) in enumerate(right.items())
    ]


def tables(rows: Sequence[dict[str, Any]], summary: Sequence[dict[str, Any]]) -> str:
    """The figures in Markdown."""
    tasks, answers = np.array(rows[0]["tasks"]), np.array(rows[0]["answers"])
    majority = {}
    for task in summary[0]["tasks"]:
        _, counts = np.unique(answers[tasks == task], return_counts=True)
        majority[task] = counts.max() / counts.sum()
    _, scenes, steps = rows[0]["settings"]
    lines = [
        f"{len(tasks)} questions about {scenes} held-out scenes, {len(rows)} seeds of {steps} steps. Intervals are over "
        "questions, whose scores are means over the seeds.",
        "",
        "| windows chosen by | windows | encoder passes | right, % | of the seeds | difference to all windows | "
        + " | ".join(majority)
        + " | objects asked for in chosen windows, % |",
        "|---|" + "--:|" * (6 + len(majority)),
    ]
    cells = [f"{100 * share:.1f}" for share in majority.values()]
    lines.append(f"| always the most frequent answer to a task | 0 | 0 | - | - | - | {' | '.join(cells)} | - |")
    for row in summary:
        mean, low, high = (100 * value for value in row["right"])
        cells = [row["way"], f"{row['budget']}", f"{row['passes']}", f"{mean:.1f} [{low:.1f}, {high:.1f}]"]
        cells.append(f"{100 * min(row['seeds']):.1f} to {100 * max(row['seeds']):.1f}")
        mean, low, high = (100 * value for value in row["difference"])
        cells.append("-" if row["way"] == ALL else f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]")
        cells += [f"{100 * value:.1f}" for value in row["tasks"].values()] + [f"{100 * row['seen']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Fewest passes that do as well as all windows:", ""]
    lines += ["| windows chosen by | at most one point less | the interval of the difference holds zero |", "|---|--:|--:|"]
    for way in CHOSEN:
        own = [row for row in summary if row["way"] == way]
        near = [row["passes"] for row in own if row["difference"][0] >= -0.01]
        equal = [row["passes"] for row in own if row["difference"][2] >= 0]
        more = f"more than {1 + max(BUDGETS)}"
        lines.append(f"| {way} | {min(near, default=more)} | {min(equal, default=more)} |")
    return "\n".join(lines) + "\n"


def write_plot(summary: Sequence[dict[str, Any]], path: Path) -> None:
    """Right answers over encoder passes, one line a way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained", facecolor="white")
    axis = figure.subplots()
    (none,) = (row for row in summary if row["way"] == NONE)
    (everything,) = (row for row in summary if row["way"] == ALL)
    for way, style in zip(CHOSEN, ("o-", "s-", "^--", "v--", "d:"), strict=True):
        line = [none, *(row for row in summary if row["way"] == way), everything]
        means = 100 * np.array([row["right"] for row in line])
        errors = np.abs(means[:, 1:] - means[:, :1]).T
        axis.errorbar([row["passes"] for row in line], means[:, 0], yerr=errors, fmt=style, label=way, capsize=2)
    axis.axhline(100 * everything["right"][0], color="#999999", linewidth=0.8)
    axis.set_xscale("log", base=2)
    passes = [row["passes"] for row in summary if row["way"] in (NONE, QUESTION, ALL)]
    axis.set_xticks(passes, [str(number) for number in passes])
    axis.set(xlabel="encoder passes an image", ylabel="right answers, per cent, with 95 % intervals")
    axis.legend()
    axis.grid(alpha=0.3)
    write_figure(path, figure, dpi=90)


def report(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    """Writes table and plot of the seeds that are finished."""
    summary = summarize(rows)
    write_file(args.table, tables(rows, summary))
    if args.plot:
        write_plot(summary, args.plot)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mfrsvlm.experiments.window_budget", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for features and finished seeds")
    parser.add_argument("--table", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--plot", type=Path, help="figure to write")
    parser.add_argument("--model", default=SCENE_MODEL, help="the model to start from (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--train-scenes", type=int, default=400)
    parser.add_argument("--test-scenes", type=int, default=150)
    args = parser.parse_args(arguments)
    for path in (args.table, args.plot):
        if path is not None:
            check_file(path)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    log = args.work / "runs.jsonl"
    done = [row for _, row in read_rows(log)] if log.exists() else []
    done = [row for row in done if row["settings"] == settings_of(args) and row["seed"] < args.seeds]
    for seed in sorted(set(range(args.seeds)) - {row["seed"] for row in done}):
        done.append(run(args, seed))
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(done[-1]) + "\n")
        report(done, args)
    report(done, args)  # also if all were finished


if __name__ == "__main__":
    main()
