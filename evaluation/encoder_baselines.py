"""Baselines without a language model: a linear probe, and the nearest training image, on the features of any encoder.

They say how much of a figure the encoder alone explains, and how much similar images explain. Classes and questions with the
answers yes and no are answered by a linear probe, one for each question. A caption, or the answer to any other question, is
that of the nearest training image with the same question.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from .answer_log import claim_folder
from .answering import Answer
from .benchmarks import Benchmark, Sample
from .evaluate import get_protocol, make_run, process_state, summarize
from .protocols import Protocol
from .settings import EvaluationSettings


PENALTY = 0.01  # of the squared weights of a probe, on standardized features
Encode = Callable[[Image.Image], np.ndarray]


def evaluate_encoder(
    pairs: Sequence[tuple[Benchmark, Benchmark]],
    encode: Encode,
    name: str,
    protocol: str | Protocol = "strict",
    settings: EvaluationSettings | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluates the baselines of one encoder.

    Args:
        pairs: benchmarks to fit on, each with the one to evaluate on.
        encode: the features of an image, (C,).
        name: of the encoder, for reports.
        protocol, settings: as in `evaluate`.

    Returns:
        For each "benchmark/split", the content of its summary.json.
    """
    settings = settings or EvaluationSettings()
    protocol = get_protocol(protocol)
    state = process_state()
    cache: dict[Path, np.ndarray] = {}
    summaries = {}
    for train, benchmark in pairs:
        start = time.perf_counter()
        run = make_run(benchmark, protocol, settings, mode="image")
        run.identity |= {"model": {"name": f"linear probe and nearest image, {name}"}, "generation": {}}
        if (folder := run.folder(settings)) is not None:
            claim_folder(folder, run.identity, state)
        known, asked = (
            _features(which, samples, encode, cache, protocol)
            for which, samples in ((train, train.samples), (benchmark, run.samples))
        )
        answers = encoder_answers(train.samples, known, run.samples, asked)
        summaries[run.key] = summarize(run, protocol, settings, answers, 0, {"device": "cpu", "processes": 1}, start)
    return summaries


def _features(
    benchmark: Benchmark, samples: Sequence[Sample], encode: Encode, cache: dict[Path, np.ndarray], protocol: Protocol
) -> np.ndarray:
    """(samples, C): features of the first image of each sample; an image is encoded once."""
    rows = []
    for sample in samples:
        path = Path(benchmark.root or ".", sample.images[0]).resolve()
        if path not in cache:
            cache[path] = encode(protocol.prepare_image(benchmark.read_image(sample.images[0])))
        rows.append(cache[path])
    return np.stack(rows).astype(np.float32)


def encoder_answers(
    train: Sequence[Sample], known: np.ndarray, samples: Sequence[Sample], asked: np.ndarray
) -> list[Answer]:
    """Answers to `samples`.

    Args:
        train: samples with known answers, of the same benchmark.
        known: their features (n, C).
        samples: the samples to answer.
        asked: their features (m, C).
    """
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        groups[sample.task, sample.question].append(index)
    answers: list[Answer] = [Answer("")] * len(samples)
    for (task, question), members in groups.items():
        same = [i for i, one in enumerate(train) if (one.task, one.question) == (task, question)]
        if not same:  # an unseen question
            same = [i for i, one in enumerate(train) if (one.task, one.group) == (task, samples[members[0]].group)]
        if not same:
            same = [i for i, one in enumerate(train) if one.task == task]
        references = [train[i].references[0] for i in same]
        words = sorted(set(references))
        if len(words) == 1:
            found = [Answer(words[0])] * len(members)
        elif task == "classification" or set(map(str.lower, words)) == {"yes", "no"}:
            probabilities = probe(known[same], [words.index(one) for one in references], asked[members])
            yes = next((i for i, word in enumerate(words) if word.lower() == "yes"), None)
            found = [
                Answer(words[int(row.argmax())], yes_probability=None if yes is None else float(row[yes]))
                for row in probabilities
            ]
        else:
            found = [Answer(references[i]) for i in nearest(known[same], asked[members])]
        for index, answer in zip(members, found, strict=True):
            answers[index] = answer
    return answers


def probe(known: np.ndarray, classes: Sequence[int], asked: np.ndarray) -> np.ndarray:
    """Probabilities (m, classes) by logistic regression on standardized features (n, C), fitted to the optimum."""
    mean, spread = known.mean(0), known.std(0) + 1e-6
    rows, wanted = (torch.from_numpy((part - mean) / spread) for part in (known, asked))
    targets = torch.tensor(classes)
    linear = torch.nn.Linear(rows.shape[1], int(targets.max()) + 1)
    torch.nn.init.zeros_(linear.weight), torch.nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(rows), targets) + PENALTY * linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return linear(wanted).softmax(-1).numpy()


def nearest(known: np.ndarray, asked: np.ndarray) -> list[int]:
    """For each of `asked` (m, C), the index of the most similar of `known` (n, C), by the cosine of centered features."""
    mean = known.mean(0)
    left, right = (part - mean for part in (asked, known))
    left, right = (part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-9) for part in (left, right))
    return [int(index) for index in (left @ right.T).argmax(1)]
