"""Runs one model on one benchmark under one protocol, and can be killed and run again at any moment.

Questions are put into chunks and batches by a plan that depends on nothing but the questions. Answers are written down
batch by batch; a second run asks only the batches whose answers are not there, in the same company as the first would
have, so that it ends with the same files.
"""

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from .answering import Answer, Answerer, Prompt, fingerprint, load
from .benchmarks import BENCHMARKS, Benchmark, BenchmarkError, Sample, load_benchmark
from .chance import guesses
from .metrics import load_metric
from .protocols import PROTOCOLS, Protocol


logger = logging.getLogger(__name__)

FORMAT = 1
# Packages that a figure may depend on.
PACKAGES = (
    "mfrsvlm", "transformers", "tokenizers", "torch", "numpy", "pillow", "accelerate", "evaluate", "pycocoevalcap",
    "sacrebleu", "rouge_score", "nltk", "shapely",
)  # fmt: skip
Batch = list[int]  # indices of samples


def add_arguments(parser: Any) -> None:
    asked = parser.add_argument_group("what is measured")
    asked.add_argument("--model", help="folder or Hub id of an image-text-to-text model")
    asked.add_argument("--revision", help="branch, tag or commit of a Hub id")
    asked.add_argument("--name", help="what reports call the model; default: its Hub id, or the name of its folder")
    asked.add_argument("--benchmark", required=True, help="see docs/benchmarks.md")
    asked.add_argument("--data", type=Path, help="folder of the benchmark")
    asked.add_argument("--split", help="default: the one the protocol names, else the benchmark's test split")
    asked.add_argument("--protocol", default="strict", choices=sorted(PROTOCOLS))
    asked.add_argument("--output", type=Path, required=True, help="folder for predictions.jsonl and summary.json")
    asked.add_argument("--limit", type=int, help="only so many questions, drawn with --seed")
    asked.add_argument("--seed", type=int, default=0, help="of --limit")
    asked.add_argument("--blind", action="store_true", help="leave the images out: what language alone scores")
    asked.add_argument("--baseline", choices=["chance"], help="no model: the best guess for every kind of question")
    how = parser.add_argument_group("how")
    how.add_argument("--batch-size", type=int, default=16, help="questions that are answered together")
    how.add_argument("--images-per-chunk", type=int, default=8, help="images whose features are kept together")
    how.add_argument("--dtype", default="auto", help="float32, bfloat16, ...; default: as saved")
    how.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    how.add_argument("--no-sharing", action="store_true", help="encode an image again for every question")
    how.add_argument("--allow-count-mismatch", action="store_true", help="go on if the split is not as large as published")
    how.add_argument("--allow-outside-images", action="store_true", help="open images outside of --data, also by a link")
    how.add_argument("--missing-images", choices=["error", "wrong"], default="error", help="stop, or count as wrong")


def run(args: Any) -> dict[str, Any]:
    """Returns the summary, which also lies in the output folder.

    Raises:
        ValueError: arguments that contradict each other; an output folder of another run.
        BenchmarkError: see `load_benchmark`.
    """
    if (args.model is None) == (args.baseline is None):
        raise ValueError("Say what to measure: --model, or --baseline chance.")
    if args.blind and args.baseline:
        raise ValueError("--baseline chance sees no image anyway: leave out --blind.")
    for name in ("batch_size", "images_per_chunk", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1.")
    protocol = PROTOCOLS[args.protocol]()
    benchmark = load_benchmark(
        args.benchmark,
        args.data,
        args.split or protocol.default_split(BENCHMARKS.get(args.benchmark)),
        check_counts=not args.allow_count_mismatch,
        check_images=args.missing_images == "error" and not args.blind and not args.baseline,
        allow_outside_images=args.allow_outside_images,
    )
    samples = [sample for sample in benchmark.samples if protocol.keeps(sample, benchmark)]
    if not samples:
        raise ValueError(f"Protocol {protocol.name} asks nothing of {benchmark.name} {benchmark.split}.")
    limit = args.limit if args.limit is not None and args.limit < len(samples) else None
    if limit is not None:
        chosen = np.sort(np.random.default_rng(args.seed).choice(len(samples), limit, replace=False))
        samples = [samples[index] for index in chosen]
    protocol.check(samples)

    # Without `cpu`, processes on CPUs would not know of each other. One that is done waits for the slowest, however long.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    start = time.perf_counter()
    prompts = [protocol.prompt(sample, benchmark) for sample in samples]
    settings: dict[str, Any] = {
        "format": FORMAT,
        "benchmark": benchmark.name,
        "split": benchmark.split,
        "protocol": protocol.name,
        "mode": args.baseline or ("blind" if args.blind else "image"),
        "seed": args.seed,
        "limit": limit,
        "batch_size": args.batch_size,
        "images_per_chunk": args.images_per_chunk,
        "sharing": not args.no_sharing,
        "questions": digest([[s.id, s.images, p] for s, p in zip(samples, prompts, strict=True)]),
    }
    if args.baseline:
        settings |= {"model": {"name": "chance"}, "generation": {}}
        claim_folder(args.output, settings, state)
        answers = [Answer(text) for text in guesses(benchmark, samples, protocol)] if state.is_main_process else []
        missing: set[str] = set()
    else:
        model, processor = load(args.model, args.revision, args.dtype, state.device, args.trust_remote_code)
        answerer = Answerer(model, processor, protocol.max_new_tokens, share=not args.no_sharing)
        settings["model"] = describe_model(args.model, args.name, model, processor)
        settings["generation"] = {"max_new_tokens": protocol.max_new_tokens, "do_sample": False}
        claim_folder(args.output, settings, state)
        reader = ImageReader(benchmark, protocol, args.missing_images)
        answers = answer_all(answerer, samples, prompts, reader, args, state)
        missing = missing_images(args.output)
    if not state.is_main_process:
        return {}

    results, parsed, scores = score(protocol, benchmark, samples, answers)
    rows = [
        prediction(sample, prompt, answer, read, value)
        for sample, prompt, answer, read, value in zip(samples, prompts, answers, parsed, scores, strict=True)
    ]
    write_whole(args.output / "predictions.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    summary = settings | {
        "counts": {
            "samples": len(samples),
            "in_split": len(benchmark.samples),
            "published": BENCHMARKS[benchmark.name].splits.get(benchmark.split),
            **({"left_out": benchmark.left_out} if benchmark.left_out else {}),
            "images": len({name for sample in samples for name in sample.images}),
            "empty_answers": sum(not answer.text for answer in answers),
            "cut_off_answers": sum(answer.cut_off for answer in answers),
            "missing_images": len(missing),
        },
        "results": results,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else state.device.type,
        "processes": state.num_processes,
        "seconds": round(time.perf_counter() - start, 1),
    }
    write_whole(args.output / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return summary


def digest(content: Any) -> str:
    """Sixteen hex digits that change with anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def describe_model(source: str, name: str | None, model: Any, processor: Any) -> dict[str, Any]:
    path = Path(source)
    return {
        # Not the whole path of a folder, which means nothing on another machine.
        "name": name or (path.resolve().name if path.is_dir() else source),
        "revision": getattr(model.config, "_commit_hash", None),
        "fingerprint": fingerprint(model),
        "chat_template": digest(processor.chat_template),
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def claim_folder(output: Path, settings: dict[str, Any], state: PartialState) -> None:
    """Notes the settings in the folder, or checks that they are those of the run that lies there."""
    path = output / "settings.json"
    if state.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            foreign = sorted(entry.name for entry in output.iterdir() if entry.name != f".{path.name}.partial")
            if foreign:
                raise ValueError(f"{output} holds {foreign[:5]} but no run: choose an empty folder.")
            write_whole(path, json.dumps(settings, indent=1) + "\n")
    state.wait_for_everyone()
    there = json.loads(path.read_text())
    for name in sorted({*there, *settings}):
        if there.get(name) != settings.get(name):
            raise ValueError(
                f"{output} holds a run with {name} = {there.get(name)!r}, not {settings.get(name)!r}: "
                "choose another folder, or delete that one."
            )


def make_plan(samples: Sequence[Sample], prompts: Sequence[str], batch_size: int, images: int) -> list[list[Batch]]:
    """Chunks of batches: samples of one group of images stay in one chunk, and a batch holds prompts of like length.

    Args:
        images: groups of images in a chunk; a group with very many questions makes a long chunk, not several.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample.images, []).append(index)
    plan = []
    for chunk in chunks(list(groups.values()), images):
        # Answers of one task are of like length too.
        order = sorted((index for group in chunk for index in group), key=lambda i: (samples[i].task, len(prompts[i]), i))
        plan.append(list(chunks(order, batch_size)))
    return plan


def chunks(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    remaining = iter(items)
    while part := list(islice(remaining, size)):
        yield part


class ImageReader:
    """Images as the protocol wants them; what cannot be read stops the run, or is noted if the user asked for that."""

    def __init__(self, benchmark: Benchmark, protocol: Protocol, missing: str) -> None:
        self.benchmark, self.protocol, self.missing = benchmark, protocol, missing

    def read(self, names: Sequence[str]) -> tuple[list[Image.Image], list[str]]:
        """The images, and the names of those that cannot be read, whose questions count as wrong."""
        images, missing = [], []
        for name in names:
            try:
                images.append(self.protocol.prepare_image(self.benchmark.read_image(name)))
            except BenchmarkError as error:
                if self.missing == "error":
                    raise
                logger.warning("counted as wrong: %s", error)
                missing.append(name)
        return images, missing


def answer_all(
    answerer: Answerer,
    samples: Sequence[Sample],
    prompts: Sequence[str],
    reader: ImageReader,
    args: Any,
    state: PartialState,
) -> list[Answer]:
    """Answers in the order of the samples; on other processes than the first, an empty list."""
    plan = make_plan(samples, prompts, args.batch_size, args.images_per_chunk)
    done = read_answers(args.output, samples)
    state.wait_for_everyone()  # before anybody writes, so that all agree on what is done
    bar = tqdm(total=len(samples), initial=len(done), unit="question", disable=not state.is_main_process, smoothing=0.05)
    log = args.output / f"answers-{state.process_index}.jsonl"
    log.touch()
    for chunk in plan[state.process_index :: state.num_processes]:
        left = [batch for batch in chunk if not all(samples[index].id in done for index in batch)]
        if left:
            answer_chunk(answerer, samples, prompts, reader, args.blind, chunk, left, log)
        # The bar speaks of all processes, which are about as fast as this one.
        bar.update(min(sum(map(len, left)) * state.num_processes, bar.total - bar.n))
    bar.close()
    state.wait_for_everyone()
    if not state.is_main_process:
        return []
    done = read_answers(args.output, samples)
    return [done[sample.id] for sample in samples]


def answer_chunk(
    answerer: Answerer,
    samples: Sequence[Sample],
    prompts: Sequence[str],
    reader: ImageReader,
    blind: bool,
    chunk: Sequence[Batch],
    left: Sequence[Batch],
    log: Path,
) -> None:
    """Answers what is left of a chunk. All of its images are encoded, in the company they always have."""
    images: list[list[Image.Image]] = []
    groups: dict[tuple[str, ...], int] = {}
    missing: dict[tuple[str, ...], list[str]] = {}
    for names in [] if blind else dict.fromkeys(samples[index].images for batch in chunk for index in batch):
        found, lacking = reader.read(names)
        if lacking:
            missing[names] = lacking
        else:
            groups[names] = len(images)
            images.append(found)
    asked = {
        index: Prompt(prompts[index], groups.get(samples[index].images))
        for batch in chunk
        for index in batch
        if samples[index].images not in missing
    }
    seen = answerer.look(images, list(asked.values()))
    for batch in left:
        visible = [index for index in batch if index in asked]
        said = dict(zip(visible, answerer.answer([asked[i] for i in visible], seen), strict=True)) if visible else {}
        rows = []
        for index in batch:
            row: dict[str, Any] = {"id": samples[index].id}
            if index in said:
                row |= {"raw": said[index].text, "yes": said[index].yes_probability, "cut_off": said[index].cut_off}
            else:
                row["missing"] = missing[samples[index].images]
            rows.append(row)
        append_rows(log, rows)


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Adds lines to a file, on the disk when this returns.

    Raises:
        OSError: naming the file; the lines may be there in part.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        text = f"{error.strerror}, so answers are missing in {path}; free some space and run again, which goes on from there"
        raise OSError(error.errno, text) from error


def read_rows(output: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(output.glob("answers-*.jsonl")):
        text = path.read_bytes()
        if text and not text.endswith(b"\n"):  # cut off while it was written
            text = text[: text.rfind(b"\n") + 1]
            with path.open("r+b") as file:
                file.truncate(len(text))
        # Not `splitlines`, which would also split at line breaks that JSON leaves as they are, such as U+2028.
        for line in text.decode("utf-8").split("\n")[:-1]:
            yield json.loads(line)


def read_answers(output: Path, samples: Sequence[Sample]) -> dict[str, Answer]:
    """What has been answered so far; a question about a missing image has the empty answer, which is wrong."""
    known = {sample.id for sample in samples}
    answers = {}
    for row in read_rows(output):
        if row["id"] not in known:
            raise ValueError(
                f"{output} holds an answer to {row['id']!r}, which this run does not ask: choose another folder."
            )
        answers[row["id"]] = Answer(row.get("raw", ""), row.get("yes"), row.get("cut_off", False))
    return answers


def missing_images(output: Path) -> set[str]:
    return {name for row in read_rows(output) for name in row.get("missing", ())}


def score(
    protocol: Protocol, benchmark: Benchmark, samples: Sequence[Sample], answers: Sequence[Answer]
) -> tuple[dict[str, Any], list[Any], list[float]]:
    """Figures by task; what was read from every answer, and its score, in the order of the samples."""
    results: dict[str, Any] = {}
    parsed: list[Any] = [None] * len(samples)
    scores = [0.0] * len(samples)
    for task in sorted({sample.task for sample in samples}):
        chosen = [index for index, sample in enumerate(samples) if sample.task == task]
        said = [answers[index].text for index in chosen]
        results[task], read, values = protocol.score(benchmark, task, [samples[index] for index in chosen], said)
        for index, one, value in zip(chosen, read, values, strict=True):
            parsed[index], scores[index] = one, value
    asked = [(sample.references[0].lower(), a) for sample, a in zip(samples, answers, strict=True) if is_yes_no(sample)]
    if any(answer.yes_probability is not None for _, answer in asked):
        references = [reference for reference, _ in asked]
        # Where the image is missing, there is none; it counts as not knowing.
        probabilities = [0.5 if answer.yes_probability is None else answer.yes_probability for _, answer in asked]
        figures = load_metric("yes_no_calibration").compute(predictions=probabilities, references=references)
        results["calibration"] = {name: value for name, value in figures.items() if name not in ("parsed", "scores")}
    return results, parsed, scores


def is_yes_no(sample: Sample) -> bool:
    return bool(sample.references) and sample.references[0].lower() in ("yes", "no")


def prediction(sample: Sample, prompt: str, answer: Answer, parsed: Any, score: float) -> dict[str, Any]:
    truth = {"boxes": sample.boxes} if sample.task == "grounding" else {"references": sample.references}
    row = {"id": sample.id, "task": sample.task, "group": sample.group, "images": sample.images, "prompt": prompt, **truth}
    row |= {"raw": answer.text, "cut_off": answer.cut_off, "parsed": parsed, "score": score}
    return row | ({"yes_probability": answer.yes_probability} if is_yes_no(sample) else {})


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all.

    Raises:
        OSError: naming the file; what was there before is as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"{error.strerror}, so {path} was not written; free some space and run again", str(path)
        ) from error
