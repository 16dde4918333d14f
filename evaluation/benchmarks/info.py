"""What is known of a benchmark before it is loaded. The file of a benchmark holds one such object, `BENCHMARK`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .sample import Benchmark, Metric


@dataclass(frozen=True)
class BenchmarkInfo:
    """Facts about a benchmark. Its name is that of its file, with hyphens.

    Attributes:
        loader: called with name, root, split and check_counts, and with the options of the user that it takes.
        splits: number of samples of every split; `None` where no source for it was found.
        tasks: tasks of its samples, which also say how they are asked.
        source: where it is published.
        default_split: `None` if the user has to choose.
        second_test_split: a further test split that some publications report in place of the default.
        own_splits: further splits may be listed in `ROOT/SPLIT.txt`.
        needs_root: `False` if it can be loaded without files.
        without_metric: published splits that no metric here can score, and what they ask for.
        image_size: (width, height) in pixels of its images, if that is fixed.
        size_tolerance: pixels by which the sides of published images differ from `image_size`.
        metrics: see `Benchmark`, as the next two.
        complete_prompts: whether the questions already say how to answer.
        numeric_types: groups of questions whose answers are numbers, and that some publications leave out.
    """

    loader: Callable[..., Benchmark]
    splits: Mapping[str, int | None]
    tasks: tuple[str, ...]
    source: str
    default_split: str | None = "test"
    second_test_split: str | None = None
    own_splits: bool = False
    needs_root: bool = True
    without_metric: Mapping[str, str] = field(default_factory=dict)
    image_size: tuple[int, int] | None = None
    size_tolerance: int = 0
    metrics: Mapping[str, tuple[Metric, ...]] = field(default_factory=dict)
    complete_prompts: bool = False
    numeric_types: tuple[str, ...] = ()
