"""Loads the benchmarks that a user has on disk, each in the layout it is published in. Nothing is downloaded.

`load_benchmark` gives the samples of one split; `BENCHMARKS` says which there are. See docs/benchmarks.md for the files that
each of them needs.
"""

from .registry import BENCHMARKS, BenchmarkInfo, load_benchmark
from .sample import Benchmark, BenchmarkError, Sample


__all__ = ["BENCHMARKS", "Benchmark", "BenchmarkError", "BenchmarkInfo", "Sample", "load_benchmark"]
