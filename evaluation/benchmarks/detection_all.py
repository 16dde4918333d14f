"""Detection questions from your own boxes: all objects of a class. The layouts are those of `detection`."""

from .detection import ALL, load_all
from .info import BenchmarkInfo


BENCHMARK = BenchmarkInfo(
    loader=load_all,
    splits={ALL: None},
    default_split=ALL,
    own_splits=True,
    tasks=("detection",),
    source="docs/benchmarks.md",
)
