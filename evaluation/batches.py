"""Asks all questions of a benchmark, in batches that depend only on the questions.

A resumed run repeats unfinished batches, each with the same questions as before. The answers therefore do not depend on
interruptions or on the number of processes.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any

from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from .answer_log import AnswerLog, as_row
from .answering import Answerer, Prompt
from .benchmarks import Benchmark, BenchmarkError, Sample
from .protocols import Protocol
from .settings import EvaluationSettings


logger = logging.getLogger(__name__)

Batch = list[int]  # indices of samples


def make_plan(
    samples: Sequence[Sample], prompts: Sequence[str], limits: Sequence[int], batch_size: int, images: int
) -> list[list[Batch]]:
    """Chunks of batches. All samples about the same images are in one chunk.

    A batch has prompts of similar length, and answers of the same maximum length.

    Args:
        samples: all samples.
        prompts: their prompts.
        limits: maximum lengths of their answers.
        batch_size: prompts per batch.
        images: image groups per chunk. A group with many questions makes a longer chunk.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample.images, []).append(index)
    plan = []
    for chunk in chunks(list(groups.values()), images):
        # Answers of one task have similar lengths too.
        order = sorted(
            (index for group in chunk for index in group),
            key=lambda i: (limits[i], samples[i].task, len(prompts[i]), i),
        )
        same_limit = groupby(order, key=limits.__getitem__)
        plan.append([batch for _, members in same_limit for batch in chunks(members, batch_size)])
    return plan


def chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    remaining = iter(items)
    while part := list(islice(remaining, size)):
        yield part


class ImageReader:
    """Reads images as the protocol prepares them.

    Args:
        missing: "error" raises for images that cannot be read; "wrong" returns their names, so that their questions score 0.
    """

    def __init__(self, benchmark: Benchmark, protocol: Protocol, missing: str) -> None:
        self.benchmark, self.protocol, self.missing = benchmark, protocol, missing

    def read(self, names: Sequence[str]) -> tuple[list[Image.Image], list[str]]:
        """The images, and the names of images that cannot be read."""
        images, missing = [], []
        for name in names:
            try:
                images.append(self.protocol.prepare_image(self.benchmark.read_image(name)))
            except BenchmarkError as error:
                if self.missing == "error":
                    raise
                logger.warning("Questions about this image score 0: %s", error)
                missing.append(name)
        return images, missing


def answer_all(
    answerer: Answerer,
    samples: Sequence[Sample],
    prompts: Sequence[str],
    reader: ImageReader,
    settings: EvaluationSettings,
    state: PartialState,
    log: AnswerLog,
) -> list[dict[str, Any]]:
    """Answers all samples. Returns the rows of the log in the order of the samples, on every process."""
    limits = [reader.protocol.max_new_tokens_of(sample.task) for sample in samples]
    plan = make_plan(samples, prompts, limits, settings.batch_size, settings.images_per_chunk)
    done = log.start()
    hidden = not settings.progress or not state.is_main_process
    bar = tqdm(total=len(samples), initial=len(done), unit="question", disable=hidden, smoothing=0.05)
    for chunk in plan[state.process_index :: state.num_processes]:
        left = [batch for batch in chunk if not all(samples[index].id in done for index in batch)]
        if left:
            answer_chunk(answerer, samples, prompts, limits, reader, settings.blind, chunk, left, log)
        # An estimate: the other processes are about as fast as this one.
        bar.update(min(sum(map(len, left)) * state.num_processes, bar.total - bar.n))
    bar.close()
    rows = {row["id"]: row for row in log.finish()}
    unknown = rows.keys() - {sample.id for sample in samples}
    if unknown:
        raise ValueError(
            f"{settings.output} contains an answer to {min(unknown)!r}, which is not in this run: choose another folder."
        )
    return [rows[sample.id] for sample in samples]


def answer_chunk(
    answerer: Answerer,
    samples: Sequence[Sample],
    prompts: Sequence[str],
    limits: Sequence[int],
    reader: ImageReader,
    blind: bool,
    chunk: Sequence[Batch],
    left: Sequence[Batch],
    log: AnswerLog,
) -> None:
    """Answers the unfinished batches of a chunk. The images of a chunk are always encoded together."""
    images: list[list[Image.Image]] = []
    groups: dict[tuple[str, ...], int] = {}
    missing: dict[tuple[str, ...], list[str]] = {}
    for names in [] if blind else dict.fromkeys(samples[index].images for batch in chunk for index in batch):
        found, unreadable = reader.read(names)
        if unreadable:
            missing[names] = unreadable
        else:
            groups[names] = len(images)
            images.append(found)
    asked = {
        index: Prompt(prompts[index], groups.get(samples[index].images))
        for batch in chunk
        for index in batch
        if samples[index].images not in missing
    }
    encoded = answerer.encode_images(images, list(asked.values()))
    for batch in left:
        shown = [index for index in batch if index in asked]
        answers = answerer.answer([asked[index] for index in shown], encoded, limits[batch[0]]) if shown else []
        answered = dict(zip(shown, answers, strict=True))
        log.add(
            [
                as_row(samples[index], answered[index])
                if index in answered
                else {"id": samples[index].id, "missing": missing[samples[index].images]}
                for index in batch
            ]
        )
