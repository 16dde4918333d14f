"""Your own boxes: where is the object that is the only one of its class? The layouts are those of `detection`."""

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
