"""What the best guesser scores who sees neither image nor question: always the answer that is right most often.

It knows how often each answer occurs among the questions asked, so it is an upper bound for guessing. Questions count as
the same kind if they share task, group and template (the question without its nouns, where the benchmark has templates).
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from .benchmarks import Sample
from .protocols import Ours, bounds


def guesses(samples: Sequence[Sample], protocol: Ours) -> list[str]:
    """One answer a sample, in the words that the protocol asks for.

    A box is the median of those of its kind, relative to the image; a caption is the most frequent one.
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
            counts = Counter(protocol.ideal_answer(sample) for sample in same)
            answers[kind] = max(sorted(counts), key=counts.__getitem__)
    return [
        protocol.write_box(tuple(boxes[kind] * (sample.image_size * 2)), sample.image_size)
        if (kind := _kind(sample))[0] == "grounding"
        else answers[kind]
        for sample in samples
    ]


def _kind(sample: Sample) -> tuple[str, str, str]:
    # The group of a classification is its answer.
    return sample.task, "" if sample.task == "classification" else sample.group, sample.template
