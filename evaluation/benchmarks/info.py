"""Facts about a benchmark that are known before it is loaded. The file of a benchmark defines one, `BENCHMARK`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .sample import Benchmark, Metric


@dataclass(frozen=True)
class BenchmarkInfo:
    """Facts about a benchmark. Its name is that of its file, with hyphens.

    Attributes:
        loader: function of name, root, split and check_counts that returns a `Benchmark`. It may take further options. One
            that opens images takes `allow_outside_images` and passes it to `read_size`.
        splits: published number of samples of every split; `None` if no source was found.
        tasks: tasks of its samples, which determine prompts and metrics.
        source: URL of the publication or download.
        default_split: `None` if the user has to choose.
        second_test_split: a further test split that some publications report instead of the default.
        own_splits: whether further splits may be listed in `ROOT/SPLIT.txt`.
        needs_root: `False` if it can be loaded without files.
        without_metric: published splits that no metric of this package can score, and what they ask for.
        image_size: (width, height) in pixels, if all images have the same size.
        size_tolerance: largest difference in pixels of published images from `image_size`.
        metrics, complete_prompts, numeric_types: see `Benchmark`.
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
