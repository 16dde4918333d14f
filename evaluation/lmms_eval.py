"""Exchanges benchmarks and samples with lmms-eval, without importing it.

    export_task(benchmark, "tasks")  # then: lmms_eval --include_path tasks --tasks scenes_test --log_samples ...
    score_samples("logs/20261127_120000_samples_scenes_test.jsonl", benchmark)  # scores answers of lmms-eval
    export_samples("runs/mine/scenes/test", "logs/mine")  # writes a run of this package in the format of lmms-eval

Samples are the `*_samples_*.jsonl` files that `--log_samples` writes. A row has `doc_id`, `target`, `input`,
`filtered_resps`, `doc_hash` and the scores of the metrics. It has `resps` if they differ from `filtered_resps`. Files of old
versions also have `doc` and `arguments`.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ..files.reading import NotJSON, read_json, read_rows, shorten
from ..files.writing import write_file, write_image
from .answering import Answer
from .benchmarks import Benchmark, Sample
from .evaluate import get_protocol, score
from .protocols import NOTHING, Protocol


TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: generate_until
doc_to_visual: !function {name}.doc_to_visual
doc_to_text: prompt
doc_to_target: target
generation_kwargs:
  max_new_tokens: {max_new_tokens}
  do_sample: false
  temperature: 0
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
metadata:
  version: 1.0
"""
FUNCTIONS = """\
from PIL import Image


def doc_to_visual(doc):
    return [Image.open(path).convert("RGB") for path in doc["images"]]
"""


def export_task(benchmark: Benchmark, folder: str | Path, protocol: str | Protocol = "strict") -> str:
    """Writes a benchmark as a task of lmms-eval, with the prompts and the prepared images of a protocol.

    lmms-eval reports `exact_match` for it, which suits few tasks. Use `score_samples` for the metrics of the protocol. All
    answers have the same maximum length, that of the task with the longest answers.

    Args:
        benchmark: from `load_benchmark`.
        folder: folder for `--include_path`. Images are written to it as PNG.
        protocol: a key of `PROTOCOLS`, or a protocol of your own.

    Returns:
        The name of the task, BENCHMARK_SPLIT.

    Raises:
        BenchmarkError: an image cannot be read.
        OSError: a file cannot be written.
    """
    folder, protocol = Path(folder).resolve(), get_protocol(protocol)
    name = re.sub(r"\W", "_", f"{benchmark.name}_{benchmark.split}")
    images: dict[str, str] = {}
    (folder / f"{name}_images").mkdir(parents=True, exist_ok=True)
    rows = []
    for sample in kept_samples(benchmark, protocol):
        for image in sample.images:
            if image not in images:
                path = folder / f"{name}_images" / f"{len(images)}.png"
                write_image(path, protocol.prepare_image(benchmark.read_image(image)))
                images[image] = str(path)
        target = target_text(sample.references or sample.boxes)
        row = {"id": sample.id, "images": [images[image] for image in sample.images], "target": target}
        rows.append(row | {"prompt": protocol.prompt(sample, benchmark)})
    path = folder / f"{name}.jsonl"
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_file(folder / f"{name}.py", FUNCTIONS)
    longest = max(protocol.max_new_tokens_of(task) for task in {sample.task for sample in kept_samples(benchmark, protocol)})
    task = TASK.format(name=name, rows=json.dumps(str(path)), max_new_tokens=longest)
    write_file(folder / f"{name}.yaml", task)
    return name


def kept_samples(benchmark: Benchmark, protocol: Protocol) -> list[Sample]:
    """The samples that the protocol uses. Their positions are the `doc_id` of an exported task."""
    return [sample for sample in benchmark.samples if protocol.keeps(sample, benchmark)]


def export_samples(run: str | Path, output: str | Path) -> list[Path]:
    """Writes the predictions of a finished run in the format of lmms-eval, one file per task.

    Args:
        run: folder of one benchmark, `OUTPUT/BENCHMARK/SPLIT`.
        output: folder for the files; created if it does not exist.

    Returns:
        The files `DATE_samples_BENCHMARK_SPLIT_TASK.jsonl`. The date is that of the summary.

    Raises:
        ValueError: the run is not finished.
        OSError: a file cannot be written.
    """
    run, output = Path(run), Path(output)
    if not (run / "summary.json").is_file():
        raise ValueError(f"{run} has no summary.json. Name the folder of a finished run, OUTPUT/BENCHMARK/SPLIT.")
    summary = read_json(run / "summary.json", allow_nan=True)
    date = datetime.fromtimestamp((run / "summary.json").stat().st_mtime).strftime("%Y%m%d_%H%M%S")
    tasks: dict[str, list[dict[str, Any]]] = {}
    for index, (_, row) in enumerate(read_rows(run / "predictions.jsonl")):
        tasks.setdefault(row["task"], []).append(_as_logged(index, row))
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for task, rows in tasks.items():
        name = re.sub(r"\W", "_", f"{summary['benchmark']}_{summary['split']}_{task}")
        written.append(output / f"{date}_samples_{name}.jsonl")
        write_file(written[-1], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return written


def _as_logged(index: int, row: dict[str, Any]) -> dict[str, Any]:
    asked = {name: row[name] for name in ("id", "images", "prompt")}
    return {
        "doc_id": index,
        "sample_id": row["id"],
        "target": target_text(row.get("references") or row["boxes"]),
        "input": row["prompt"],
        "filtered_resps": row["answer"],
        "doc_hash": hashlib.sha256(json.dumps(asked, indent=2, ensure_ascii=False).encode()).hexdigest(),
        "score": row["score"],
    }


def target_text(references: Any) -> str:
    """References in the format of lmms-eval: a single one as text, several as a Python list, no boxes as "none"."""
    if not references:
        return NOTHING
    references = [list(one) if isinstance(one, tuple) else one for one in references]
    return str(references[0] if len(references) == 1 else references)


def read_samples(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file of samples, each with `response`, the text of the answer.

    Raises:
        OSError: the file cannot be read.
        ValueError: a row is not JSON, lacks a field, or has several responses, for example one per choice.
    """
    rows = []
    for number, row in read_rows(path):
        where = f"{path}, row {number}"
        if isinstance(row, NotJSON):
            raise ValueError(f"{where} is not JSON: {row.reason}.")
        for name in ("doc_id", "target", "filtered_resps"):
            if not isinstance(row, dict) or name not in row:
                raise ValueError(f"{where} has no {name}. Name a *_samples_*.jsonl that lmms-eval wrote with --log_samples.")
        response = row["filtered_resps"]
        while isinstance(response, list) and len(response) == 1:
            response = response[0]
        if not isinstance(response, str):
            raise ValueError(f"{where}: filtered_resps is {shorten(response)}, not the text of one generated answer.")
        rows.append({**row, "response": response})
    return rows


def score_samples(
    path: str | Path,
    benchmark: Benchmark,
    protocol: str | Protocol = "strict",
    sample_id: Callable[[dict[str, Any]], str] | None = None,
) -> dict[str, Any]:
    """Scores answers logged by lmms-eval with the metrics of a protocol.

    The prompts are those of lmms-eval, which may differ from those of the protocol.

    Args:
        path: a file of samples.
        benchmark: the same questions, from `load_benchmark`.
        protocol: a key of `PROTOCOLS`, or a protocol of your own.
        sample_id: function that returns the id of the sample for a row. `None`: the field `sample_id` of an exported file,
            or the sample at position `doc_id`, as in an exported task.

    Returns:
        Figures by task, as `results` of a summary, over the samples in the file.

    Raises:
        ValueError: as `read_samples`; or a row has no sample in the benchmark, two rows have the same sample, or the target
            of a row is not the reference of its sample.
    """
    protocol = get_protocol(protocol)
    kept = kept_samples(benchmark, protocol)
    samples = {sample.id: sample for sample in kept}
    answers: dict[str, Answer] = {}
    for number, row in enumerate(read_samples(path), start=1):
        where = f"{path}, row {number}"
        found = sample_id(row) if sample_id else _default_id(row, kept)
        if found not in samples:
            raise ValueError(f"{where}: doc_id {row['doc_id']!r} is not a sample of {benchmark.name} {benchmark.split}.")
        if found in answers:
            raise ValueError(f"{where} answers sample {found!r}, like an earlier row.")
        if not _has_target(samples[found], str(row["target"])):
            reference = target_text(samples[found].references or samples[found].boxes)
            raise ValueError(
                f"{where}: target {shorten(row['target'])} is not the reference of sample {found!r}, {shorten(reference)}. "
                "Pass `sample_id`, which returns the id of the sample for a row."
            )
        answers[found] = Answer(row["response"])
    asked = [sample for sample in kept if sample.id in answers]
    return score(protocol, benchmark, asked, [answers[sample.id] for sample in asked])[0]


def _default_id(row: dict[str, Any], samples: Sequence[Sample]) -> str | None:
    if "sample_id" in row:
        return row["sample_id"]
    position = row["doc_id"]
    return samples[position].id if isinstance(position, int) and 0 <= position < len(samples) else None


def _has_target(sample: Sample, target: str) -> bool:
    return target in (*sample.references, target_text(sample.references or sample.boxes))
