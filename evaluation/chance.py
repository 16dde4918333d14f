"""What the best guesser scores who sees neither image nor question: always the answer that is right most often.

It knows how often each answer occurs among the questions asked, so that no guesser who always says the same is right more
often. Questions count as the same kind if they share task, group and template (the question without its nouns, where the
benchmark has templates). Boxes and captions have no such best guess; what is said of them is typical.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from .benchmarks import Benchmark, Sample
from .protocols import Protocol, bounds


def guesses(benchmark: Benchmark, samples: Sequence[Sample], protocol: Protocol) -> list[str]:
    """One answer a sample, in the words that the protocol asks for.

    Answers that the protocol reads alike count together, such as counts of one class. A box is the median of those of its
    kind, relative to the image; a caption is the most frequent one.
    """
    kinds: dict[tuple[str, str, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        kinds[_kind(sample)].append(sample)
    boxes, answers = {}, {}
    for kind, same in kinds.items():
        if kind[0] == "grounding":
            relative = [np.array(bounds(box)) / (sample.image_size * 2) for sample in same for box in sample.boxes]
            boxes[kind] = np.median(relative, axis=0)
        else:
            said = [protocol.ideal_answer(sample) for sample in same]
            read = said if kind[0] == "captioning" else protocol.score(benchmark, kind[0], same, said)[1]
            most = _most_frequent(read)
            answers[kind] = _most_frequent([text for text, one in zip(said, read, strict=True) if one == most])
    return [
        protocol.write_box(tuple(boxes[kind] * (sample.image_size * 2)), sample.image_size)
        if (kind := _kind(sample))[0] == "grounding"
        else answers[kind]
        for sample in samples
    ]


def _most_frequent(texts: Sequence[str]) -> str:
    """Of those that are as frequent, the first in order."""
    counts = Counter(texts)
    return max(sorted(counts), key=counts.__getitem__)


def _kind(sample: Sample) -> tuple[str, str, str]:
    # The group of a classification is its answer.
    return sample.task, "" if sample.task == "classification" else sample.group, sample.template
