"""Grounding questions from your own boxes: objects that are the only one of their class. Layouts: see `detection`."""

from .detection import ALL, load_grounding
from .info import BenchmarkInfo


BENCHMARK = BenchmarkInfo(
    loader=load_grounding,
    splits={ALL: None},
    default_split=ALL,
    own_splits=True,
    tasks=("grounding",),
    source="docs/benchmarks.md",
)
