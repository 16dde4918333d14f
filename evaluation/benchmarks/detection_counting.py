"""Your own boxes: how many objects of a class are there? The layouts are those of `detection`."""

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
