"""Loads benchmarks from disk, each in its published layout. Nothing is downloaded.

`load_benchmark` loads one split; `BENCHMARKS` lists all benchmarks. Every benchmark is one file of this folder that defines
`BENCHMARK`. The other files read layouts that several benchmarks share. docs/benchmarks.md lists the files that each
benchmark needs, and describes how to add one.
"""

from .info import BenchmarkInfo
from .registry import BENCHMARKS, load_benchmark
from .sample import Benchmark, BenchmarkError, Metric, Sample


__all__ = ["BENCHMARKS", "Benchmark", "BenchmarkError", "BenchmarkInfo", "Metric", "Sample", "load_benchmark"]
