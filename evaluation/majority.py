"""The majority baseline: the most frequent answer to each kind of question. It uses no image and no model.

It counts the references of the evaluated questions, so that no constant answer to a kind of question scores higher. A kind
is a combination of task, group and template (the question without its nouns, if the benchmark has templates). For the box of
one object and for captions, it predicts a typical one, which need not be optimal. For lists of boxes or points, it predicts
that there is no object.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from .benchmarks import Benchmark, Sample
from .benchmarks.sample import LIST_TASKS
from .protocols import NOTHING, Protocol, bounds


def majority_answers(benchmark: Benchmark, samples: Sequence[Sample], protocol: Protocol) -> list[str]:
    """One answer for each sample, in the format of the protocol.

    References that the protocol parses to the same answer are counted together, such as counts in the same bin. A box is the
    median box of its kind, relative to the image. A caption is the most frequent one.
    """
    kinds: dict[tuple[str, str, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        kinds[_kind(sample)].append(sample)
    boxes, answers = {}, {}
    for kind, members in kinds.items():
        if kind[0] in LIST_TASKS:
            answers[kind] = NOTHING
        elif kind[0] == "grounding":
            relative = [np.array(bounds(box)) / (sample.image_size * 2) for sample in members for box in sample.boxes]
            boxes[kind] = np.median(relative, axis=0)
        else:
            ideal = [protocol.ideal_answer(sample) for sample in members]
            parsed = ideal if kind[0] == "captioning" else protocol.score(benchmark, kind[0], members, ideal)[1]
            most = _most_frequent(parsed)
            answers[kind] = _most_frequent([text for text, one in zip(ideal, parsed, strict=True) if one == most])
    return [
        protocol.write_box(tuple(boxes[kind] * (sample.image_size * 2)), sample.image_size)
        if (kind := _kind(sample))[0] == "grounding"
        else answers[kind]
        for sample in samples
    ]


def _most_frequent(texts: Sequence[str]) -> str:
    """The most frequent text; of several, the first in alphabetical order."""
    counts = Counter(texts)
    return max(sorted(counts), key=counts.__getitem__)


def _kind(sample: Sample) -> tuple[str, str, str]:
    # The group of a classification is its answer.
    return sample.task, "" if sample.task == "classification" else sample.group, sample.template
