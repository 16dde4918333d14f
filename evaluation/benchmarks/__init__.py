"""Loads the benchmarks that a user has on disk, each in the layout it is published in. Nothing is downloaded.

`load_benchmark` gives the samples of one split; `BENCHMARKS` says which there are. Every benchmark is one file of this
folder that holds a `BENCHMARK`. The other files read layouts that benchmarks share. docs/benchmarks.md says which files each
benchmark needs, and how to add one.
"""

from .info import BenchmarkInfo
from .registry import BENCHMARKS, load_benchmark
from .sample import Benchmark, BenchmarkError, Metric, Sample


__all__ = ["BENCHMARKS", "Benchmark", "BenchmarkError", "BenchmarkInfo", "Metric", "Sample", "load_benchmark"]
