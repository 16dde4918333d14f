"""Evaluates a model in memory on benchmarks with one protocol. A stopped evaluation can be resumed."""

import hashlib
import json
import platform
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..files.model_folder import problems_of
from ..files.reading import SURROGATE, shorten
from ..files.writing import check_folder, write_file
from ..output_folders import locked
from .answer_log import AnswerLog, as_answer, claim_folder
from .answering import Answer, Answerer, check_chat_template, fingerprint
from .batches import ImageReader, answer_all
from .benchmarks import BENCHMARKS, Benchmark, Sample, load_benchmark
from .benchmarks.sample import BOX_TASKS
from .majority import majority_answers
from .metrics import load_metric
from .metrics._checked import SCORED_CHARACTERS
from .protocols import PROTOCOLS, Protocol
from .report import FORMAT
from .settings import EvaluationSettings


IMAGE_TOKEN = "<image>"  # the marker of images in prompts; a question that contains it would ask for a further image

# Packages whose version may change a figure.
PACKAGES = (
    "mfrsvlm", "transformers", "tokenizers", "torch", "numpy", "pillow", "accelerate", "evaluate", "pycocoevalcap",
    "sacrebleu", "rouge_score", "nltk", "shapely",
)  # fmt: skip


def evaluate(
    model: Any,
    processor: Any,
    benchmarks: Sequence[Benchmark | str],
    protocol: str | Protocol = "strict",
    settings: EvaluationSettings | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluates one model on one or more benchmarks.

    The state of model and processor does not change: training mode, generation settings, device and padding side. Processes
    that were started together, for example by `accelerate launch`, share the questions. Each needs a copy of the model.

    Args:
        model: any `image-text-to-text` model of transformers on its device. It may be quantized or have an active LoRA
            adapter.
        processor: its processor, with a chat template.
        benchmarks: from `load_benchmark`, or names of those that need no files, such as "scenes" or "scenes/validation".
        protocol: a key of `PROTOCOLS`, or a protocol of your own.
        settings: see `EvaluationSettings`.

    Returns:
        For each "benchmark/split", the content of its summary.json. It is the same on all processes.

    Raises:
        ValueError: unknown or repeated benchmarks, an unknown protocol, no chat template, or an output folder that contains
            another run.
        OSError: captions need Java and it is not installed, or files cannot be written.
    """
    settings = settings or EvaluationSettings()
    protocol = get_protocol(protocol)
    check_chat_template(processor)
    state = process_state()
    runs = make_runs(benchmarks, protocol, settings, mode="blind" if settings.blind else "image")
    answerer = Answerer(model, processor, protocol.max_new_tokens, settings.share_images)
    described = describe_model(model, processor, settings.model_name)
    summaries = {}
    for run in runs:
        start = time.perf_counter()
        run.identity |= {"model": described, "generation": describe_generation(protocol, run.samples)}
        folder = run.folder(settings)
        with locked(folder) if folder is not None and state.is_main_process else nullcontext():
            log = AnswerLog(folder, run.identity, state)
            reader = ImageReader(run.benchmark, protocol, settings.missing_images)
            rows = answer_all(answerer, run.samples, run.prompts, reader, settings, state, log)
            if state.is_main_process:
                missing = {name for row in rows for name in row.get("missing", ())}
                facts = {"device": device_name(model.device), "processes": state.num_processes}
                answers = [as_answer(row) for row in rows]
                summaries[run.key] = summarize(run, protocol, settings, answers, len(missing), facts, start)
    if state.num_processes > 1:
        [summaries] = broadcast_object_list([summaries])
    return summaries


def evaluate_majority(
    benchmarks: Sequence[Benchmark | str],
    protocol: str | Protocol = "strict",
    settings: EvaluationSettings | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluates the majority baseline, which needs no model: the most frequent answer to each kind of question.

    Args, returns and raises: as `evaluate`.
    """
    settings = settings or EvaluationSettings()
    if settings.blind:
        raise ValueError("The majority baseline never uses images: remove blind.")
    protocol = get_protocol(protocol)
    state = process_state()
    described = {"model": {"name": "majority"}, "generation": {}}
    summaries = {}
    for run in make_runs(benchmarks, protocol, settings, mode="majority"):
        start = time.perf_counter()
        run.identity |= described
        if (folder := run.folder(settings)) is not None:
            claim_folder(folder, run.identity, state)
        if state.is_main_process:
            answers = [Answer(text) for text in majority_answers(run.benchmark, run.samples, protocol)]
            facts = {"device": "cpu", "processes": 1}
            summaries[run.key] = summarize(run, protocol, settings, answers, 0, facts, start)
    if state.num_processes > 1:
        [summaries] = broadcast_object_list([summaries])
    return summaries


def process_state() -> PartialState:
    """The processes of this evaluation; a single one without a launcher."""
    # Without `cpu`, processes on CPUs would not find each other. Fast processes may wait long for slow ones.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))


def get_protocol(protocol: str | Protocol) -> Protocol:
    if not isinstance(protocol, str):
        return protocol
    if protocol not in PROTOCOLS:
        raise ValueError(f"Unknown protocol {protocol!r}. Protocols are {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[protocol]()


@dataclass
class Run:
    """One benchmark of an evaluation.

    Attributes:
        benchmark: the benchmark.
        samples: its samples that are asked.
        prompts: their prompts.
        identity: settings that must not change when the run is resumed.
    """

    benchmark: Benchmark
    samples: list[Sample]
    prompts: list[str]
    identity: dict[str, Any]

    @property
    def key(self) -> str:
        return f"{self.benchmark.name}/{self.benchmark.split}"

    def folder(self, settings: EvaluationSettings) -> Path | None:
        return None if settings.output is None else Path(settings.output) / self.benchmark.name / self.benchmark.split


def make_runs(
    benchmarks: Sequence[Benchmark | str], protocol: Protocol, settings: EvaluationSettings, mode: str
) -> list[Run]:
    """The questions of all benchmarks, checked before the model runs."""
    if isinstance(benchmarks, (str, Benchmark)) or not benchmarks:
        raise ValueError(f"benchmarks must be a list of one or more benchmarks, not {str(benchmarks)[:80]!r}.")
    runs: list[Run] = []
    for benchmark in benchmarks:
        if isinstance(benchmark, str):
            name, _, split = benchmark.partition("/")
            benchmark = load_benchmark(name, None, split or protocol.default_split(BENCHMARKS.get(name)))
        run = make_run(benchmark, protocol, settings, mode)
        if run.key in {other.key for other in runs}:
            raise ValueError(f"{run.key} is listed twice.")
        if (folder := run.folder(settings)) is not None:
            check_folder(folder)
        runs.append(run)
    return runs


def make_run(benchmark: Benchmark, protocol: Protocol, settings: EvaluationSettings, mode: str) -> Run:
    samples = [sample for sample in benchmark.samples if protocol.keeps(sample, benchmark)]
    if not samples:
        raise ValueError(f"Protocol {protocol.name} uses no question of {benchmark.name} {benchmark.split}.")
    limit = settings.limit if settings.limit is not None and settings.limit < len(samples) else None
    if limit is not None:
        drawn = np.sort(np.random.default_rng(settings.seed).choice(len(samples), limit, replace=False))
        samples = [samples[index] for index in drawn]
    protocol.check(samples)
    prompts = [make_prompt(sample, benchmark, protocol) for sample in samples]
    if mode == "image" and settings.missing_images == "error":
        check_images(samples, benchmark)
    identity = {
        "format": FORMAT,
        "benchmark": benchmark.name,
        "split": benchmark.split,
        "protocol": protocol.name,
        "mode": mode,
        "seed": settings.seed,
        "limit": limit,
        "batch_size": settings.batch_size,
        "images_per_chunk": settings.images_per_chunk,
        "share_images": settings.share_images,
        "questions": digest([[s.id, s.images, p] for s, p in zip(samples, prompts, strict=True)]),
    }
    return Run(benchmark, samples, prompts, identity)


def make_prompt(sample: Sample, benchmark: Benchmark, protocol: Protocol) -> str:
    """The prompt of a sample.

    Raises:
        ValueError: the protocol raises any error, or the prompt is not text that a model can read. Names the sample.
    """
    where = f"{benchmark.name} {benchmark.split}, sample {shorten(sample.id)}"
    try:
        prompt = protocol.prompt(sample, benchmark)
    except Exception as error:  # the sample and the protocol may be the user's own
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{where}: protocol {protocol.name} makes no prompt of it: {reason}") from error
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where}: its prompt must be text, got {shorten(prompt)}.")
    if IMAGE_TOKEN in prompt:
        raise ValueError(f"{where}: its prompt contains {IMAGE_TOKEN}: {shorten(prompt)}. Images are added to it later.")
    if SURROGATE.search(prompt):
        raise ValueError(f"{where}: its prompt contains a lone surrogate, which is no character: {shorten(prompt)}.")
    return prompt


def check_images(samples: Sequence[Sample], benchmark: Benchmark) -> None:
    """Raises `BenchmarkError` if an image of a sample is not a file that may be opened. Images are not decoded."""
    checked: set[str] = set()
    for sample in samples:
        for name in sample.images:
            if benchmark.root is not None and name not in checked:
                benchmark.check_image(name, sample.id)
                checked.add(name)


def digest(content: Any) -> str:
    """Sixteen hex digits of a value that can be written as JSON."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def describe_generation(protocol: Protocol, samples: Sequence[Sample]) -> dict[str, Any]:
    """The maximum length of answers, also that of tasks that have another one."""
    limits = {task: protocol.max_new_tokens_of(task) for task in sorted({sample.task for sample in samples})}
    longer = {task: limit for task, limit in limits.items() if limit != protocol.max_new_tokens}
    by_task = {"max_new_tokens_by_task": longer} if longer else {}
    return {"max_new_tokens": protocol.max_new_tokens, **by_task, "do_sample": False}


def describe_model(model: Any, processor: Any, name: str | None = None) -> dict[str, Any]:
    source = model.config.name_or_path
    path = Path(source)
    incomplete = {"incomplete": problems_of(model)} if problems_of(model) else {}
    return incomplete | {
        # Only the name of a folder, since its path has no meaning on another machine.
        "name": name or (path.resolve().name if path.is_dir() else source) or type(model).__name__,
        # Commit of the loaded files. Only the fingerprint shows whether the model was trained since.
        "revision": getattr(model.config, "_commit_hash", None),
        "fingerprint": fingerprint(model),
        "chat_template": digest(processor.chat_template),
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def summarize(
    run: Run,
    protocol: Protocol,
    settings: EvaluationSettings,
    answers: Sequence[Answer],
    missing_images: int,
    facts: dict[str, Any],
    start: float,
) -> dict[str, Any]:
    """Scores the answers and returns the summary. Writes predictions and summary if there is an output folder."""
    benchmark, samples = run.benchmark, run.samples
    results, parsed, scores = score(protocol, benchmark, samples, answers)
    known = BENCHMARKS.get(benchmark.name)
    summary = run.identity | {
        "counts": {
            "samples": len(samples),
            "in_split": len(benchmark.samples),
            "published": known.splits.get(benchmark.split) if known else None,
            "left_out": benchmark.left_out,
            "images": len({name for sample in samples for name in sample.images}),
            "empty_answers": sum(not answer.text for answer in answers),
            "truncated_answers": sum(map(is_truncated, answers)),
            "missing_images": missing_images,
        },
        "results": results,
        "versions": {"python": platform.python_version()} | {name: version_of(name) for name in PACKAGES},
        **facts,
        "seconds": round(time.perf_counter() - start, 1),
    }
    folder = run.folder(settings)
    if folder is not None:
        rows = map(prediction, samples, run.prompts, answers, parsed, scores)
        write_file(folder / "predictions.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        write_file(folder / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return summary


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None  # for example this package, if it is on the path but not installed


def score(
    protocol: Protocol, benchmark: Benchmark, samples: Sequence[Sample], answers: Sequence[Answer]
) -> tuple[dict[str, Any], list[Any], list[float]]:
    """Scores the answers of all tasks.

    Returns:
        Figures by task; the parsed answers and the scores, both in the order of the samples.
    """
    results: dict[str, Any] = {}
    parsed: list[Any] = [None] * len(samples)
    scores = [0.0] * len(samples)
    for task in sorted({sample.task for sample in samples}):
        indices = [index for index, sample in enumerate(samples) if sample.task == task]
        texts = [answers[index].text for index in indices]
        figures, of_task, values = protocol.score(benchmark, task, [samples[index] for index in indices], texts)
        results[task] = figures
        for index, one, value in zip(indices, of_task, values, strict=True):
            parsed[index], scores[index] = one, value
    asked = [(sample.references[0].lower(), a) for sample, a in zip(samples, answers, strict=True) if is_yes_no(sample)]
    if any(answer.yes_probability is not None for _, answer in asked):
        references = [reference for reference, _ in asked]
        # Without an image there is no probability.
        probabilities = [0.5 if answer.yes_probability is None else answer.yes_probability for _, answer in asked]
        figures = load_metric("yes_no_calibration").compute(predictions=probabilities, references=references)
        results["calibration"] = {name: value for name, value in figures.items() if name not in ("parsed", "scores")}
    return results, parsed, scores


def is_yes_no(sample: Sample) -> bool:
    return bool(sample.references) and sample.references[0].lower() in ("yes", "no")


def is_truncated(answer: Answer) -> bool:
    """Whether only the beginning of an answer was generated or scored."""
    return answer.truncated or len(answer.text) > SCORED_CHARACTERS


def prediction(sample: Sample, prompt: str, answer: Answer, parsed: Any, score: float) -> dict[str, Any]:
    """A line of predictions.jsonl."""
    truth = {"boxes": sample.boxes} if sample.task in BOX_TASKS else {"references": sample.references}
    row = {"id": sample.id, "task": sample.task, "group": sample.group, "images": sample.images, "prompt": prompt, **truth}
    row |= {"answer": answer.text, "truncated": is_truncated(answer), "parsed": parsed, "score": score}
    return row | ({"yes_probability": answer.yes_probability} if is_yes_no(sample) else {})
