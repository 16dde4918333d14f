"""Figures of a model on held-out photographs, by the harness, beside baselines, and the text of its card."""

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...evaluation import EvaluationSettings, evaluate
from ...evaluation.encoder_baselines import evaluate_encoder
from ...evaluation.evaluate import evaluate_majority
from ...evaluation.intervals import corpus_figure
from ...files.model_folder import load_model
from ...files.reading import read_json, read_rows
from .photographs import PROTOCOL, load_split
from .pretrained_tower import ORIGIN, make_tower
from .scene_images import to_pixels


NAME = "mfrsvlm-photographs"  # of the model, in reports
COLUMNS = ("image", "encoder", "blind", "majority")
# Rows of the table: name, benchmark, and where its figure is in the results.
ROWS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("class, accuracy", "uc-merced", ("classification", "accuracy")),
    ("caption, BLEU-4", "ucm-captions", ("captioning", "bleu_4")),
    ("caption, CIDEr", "ucm-captions", ("captioning", "cider")),
    ("17 labels, macro F1", "ucm-multilabel", ("macro_f1",)),
    ("17 labels, accuracy", "ucm-multilabel", ("vqa", "accuracy")),
    ("17 labels, calibration error", "ucm-multilabel", ("calibration", "ece")),
    ("RSIVQA, theme", "rsivqa-ucm", ("vqa", "per_type", "theme")),
    ("RSIVQA, presence", "rsivqa-ucm", ("vqa", "per_type", "presence")),
    ("RSIVQA, count", "rsivqa-ucm", ("vqa", "per_type", "count")),
    ("RSIVQA, location", "rsivqa-ucm", ("vqa", "per_type", "location")),
)


def pooled_imagenet_features(weights: Path) -> Callable[[Any], np.ndarray]:
    """Computes the mean of the last feature map of EfficientNet-lite0 as trained on ImageNet, (1280,), of an image."""
    tower = make_tower(weights=weights).eval().vision_tower

    @torch.inference_mode()
    def encode(image: Any) -> np.ndarray:
        pixels = to_pixels(np.asarray(image.convert("RGB").resize((256, 256)))[None])
        return tower(pixels).last_hidden_state.mean((2, 3))[0].numpy()

    return encode


def evaluate_photographs(
    folder: Path, splits: Path, output: Path, weights: Path | None = None, split: str = "test"
) -> dict[str, dict[str, dict[str, Any]]]:
    """Figures of the model in a folder, loaded as a user would load it.

    Args:
        folder: the model folder.
        splits: see `split_photographs`.
        output: folder for the files of the harness, one for each column. A stopped evaluation resumes there.
        weights: ImageNet weights, for the baselines of the encoder. `None`: those are left out.
        split: the split to evaluate on.

    Returns:
        For `image`, `encoder` (linear probe and nearest training image on frozen ImageNet features), `blind` (without the
        image) and `majority`: results by benchmark, with the macro F1 of the labels.
    """
    model, processor = load_model(folder, dtype=torch.float32)
    benchmarks = load_split(splits, split)
    settings = {
        column: EvaluationSettings(output / split / column, NAME, blind=column == "blind", progress=False)
        for column in COLUMNS
    }
    summaries = {"image": evaluate(model, processor, benchmarks, PROTOCOL, settings["image"])}
    if weights is not None:
        known = {benchmark.name: benchmark for benchmark in load_split(splits, "train")}
        pairs = [(known[benchmark.name], benchmark) for benchmark in benchmarks]
        encode = pooled_imagenet_features(weights)
        summaries["encoder"] = evaluate_encoder(pairs, encode, "EfficientNet-lite0", PROTOCOL, settings["encoder"])
    summaries["blind"] = evaluate(model, processor, benchmarks, PROTOCOL, settings["blind"])
    summaries["majority"] = evaluate_majority(benchmarks, PROTOCOL, settings["majority"])
    figures: dict[str, dict[str, dict[str, Any]]] = {}
    for column, of_column in summaries.items():
        figures[column] = {key.partition("/")[0]: dict(summary["results"]) for key, summary in of_column.items()}
        labels = next((benchmark for benchmark in benchmarks if benchmark.name == "ucm-multilabel"), None)
        if labels is not None:
            path = output / split / column / labels.name / labels.split / "predictions.jsonl"
            figures[column][labels.name] |= label_f1([row for _, row in read_rows(path)])
    return figures


def label_f1(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """F1 of "yes" from lines of predictions.jsonl: `per_label`, and `macro_f1`, the mean over labels with a "yes".

    Images are resampled for the interval, since the labels of an image are not independent.
    """
    images = sorted({row["images"][0] for row in rows})
    labels = sorted({row["group"] for row in rows})
    given, truth = (np.zeros((len(images), len(labels)), dtype=bool) for _ in range(2))
    place = {name: index for index, name in enumerate(images)}
    for row in rows:
        at = place[row["images"][0]], labels.index(row["group"])
        given[at], truth[at] = row["parsed"] == "yes", row["references"][0] == "yes"

    def scores(drawn: np.ndarray) -> np.ndarray:
        both, total = drawn @ (given & truth), drawn @ given + drawn @ truth
        with np.errstate(invalid="ignore"):
            return np.where(drawn @ truth > 0, 2 * both / total, np.nan)

    single = scores(np.ones(len(images), dtype=np.int64))
    return {
        "macro_f1": corpus_figure(lambda drawn: float(np.nanmean(scores(drawn))), len(images)),
        "per_label": {label: float(value) for label, value in zip(labels, single, strict=True)},
    }


def look_up(results: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any] | None:
    for name in path:
        if name not in results:
            return None
        results = results[name]
    return results


def figure_table(figures: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Markdown: one row for each of `ROWS`."""
    lines = [
        "| figure | model | 95 % interval | n | ImageNet encoder | blind | majority |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, benchmark, path in ROWS:
        cells = {column: look_up(results.get(benchmark, {}), path) for column, results in figures.items()}
        own = cells["image"]
        if own is None:
            continue
        others = [
            "-" if cells.get(column) is None else f"{100 * cells[column]['value']:.1f}"  # type: ignore[index]
            for column in COLUMNS[1:]
        ]
        lines.append(
            f"| {name} | {100 * own['value']:.1f} | {100 * own['low']:.1f} - {100 * own['high']:.1f} | {own['n']} "
            f"| {' | '.join(others)} |"
        )
    return "\n".join(lines)


def not_above_majority(figures: dict[str, dict[str, dict[str, Any]]]) -> str:
    """One sentence: which figures are not above the majority baseline by their interval."""
    below = []
    for name, benchmark, path in ROWS:
        own, constant = (look_up(figures[column].get(benchmark, {}), path) for column in ("image", "majority"))
        if own is not None and constant is not None and own["low"] <= constant["value"]:
            below.append(name)
    return f"Not above the majority baseline: {'; '.join(below)}." if below else "All are above the majority baseline."


def photograph_evidence(
    options: Any,
    args: Any,
    seconds: dict[str, float],
    splits: Path,
    figures: dict[str, dict[str, dict[str, Any]]],
    counts: dict[str, Any] | None = None,
) -> str:
    """Markdown for the card: parts, data, figures, with the counts of cars if there are any, and times."""
    summary = read_json(splits / "splits.json")
    sizes, dropped = summary["counts"], summary["dropped"]
    in_test = sum(entry["in"] == "test" for entry in dropped.values())
    cars = ""
    if counts is not None:
        error = counts["error"]
        cars = f"""
It was also trained to count and to locate cars in crops of aerial videos. In {error["n"]} frames of two other videos, the
sum of the errors of the counts, tile by tile, is {100 * error["value"]:.0f} % of the number of cars (95 % interval
{100 * error["low"]:.0f} - {100 * error["high"]:.0f} %). Always answering 0 gives 100 %.
"""
    cached = f"its features of {options.copies} rotated or mirrored copies of each photograph were cached"
    made = (
        f"It continues an earlier model, with its encoder: {cached}, and the decoder was trained for more steps."
        if options.start
        else "First the encoder was tuned to predict classes, labels and words of captions. Then "
        f"{cached}, and the decoder was trained to answer."
    )
    start = " --start FOLDER" if options.start else ""
    chosen = {
        **({} if options.start else {"encoder_steps": options.encoder_steps, "decoder_width": options.decoder_width}),
        "copies": options.copies,
        "max_steps": args.max_steps,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
    }
    settings = ", ".join(f"{name}={value}" for name, value in chosen.items())
    minutes = ", ".join(f"{stage} {value / 60:.0f} minutes" for stage, value in seconds.items())
    threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    return f"""\
**This model is a small demonstration.** It has seen {sizes["train"]} aerial photographs of UC Merced (256 pixels, 0.3 m a
pixel, cities of the USA). It answers short questions about such photographs: class, caption, 17 labels, and, with many
errors, counts and places. Other resolutions, sensors and regions are outside of what it was trained on.

| part | origin | license |
|---|---|---|
| encoder | {ORIGIN}, tuned here | Apache-2.0 |
| decoder, tokenizer | trained here from random weights | Apache-2.0 |
| photographs | UC Merced Land Use (Yang and Newsam 2010), from the USGS National Map | public domain in the USA |
| captions | UCM captions (Qu et al. 2016) | no license stated |
| labels | multi-label UC Merced (Chaudhuri et al. 2018) | no license stated |
| questions | RSIVQA (Zheng et al. 2021) | no license stated |
| videos of cars | KIT AIS Data Set | CC BY 3.0 |
| videos of cars | Yauhen Kharuzhy and Minsk OSM community (jekhor/aerial-cars-dataset) | CC BY-SA |

The table reports per cent, and CIDEr times 100, on the {sizes["test"]} photographs of the official test split (`{PROTOCOL}`
protocol, greedy decoding, free generation). *ImageNet encoder* needs no language model: a linear probe, or the answer of the
nearest training photograph, on the frozen features of the encoder before it was tuned. *Blind* is the same model without the
image. *Majority* always predicts the most frequent answer to a kind of question. The calibration error is better if lower.

{figure_table(figures)}

{not_above_majority(figures)}
{cars}
No photograph of the test split was trained on or chosen by. {len(dropped)} further photographs were dropped because they
resemble a held-out one at some shift ({in_test} of them one of the test split; correlation of {summary["threshold"]} or
more, see `training/demo_model/near_duplicates.py`). Settings were chosen on {sizes["validation"]} other photographs.

{made}

`python -m mfrsvlm.training.train_demo_model training/configs/demo_model_photographs.yaml --real_data DIR{start}` with
{settings}, on {threads} thread(s) of {platform.machine()} ({capability}), torch {torch.__version__}: {minutes}."""
