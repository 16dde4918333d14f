"""Counting questions from your own boxes: the number of objects of a class. The layouts are those of `detection`."""

from .detection import ALL, load_counting
from .info import BenchmarkInfo


BENCHMARK = BenchmarkInfo(
    loader=load_counting,
    splits={ALL: None},
    default_split=ALL,
    own_splits=True,
    tasks=("counting",),
    source="docs/benchmarks.md",
)
