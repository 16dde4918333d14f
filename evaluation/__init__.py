"""Evaluation of vision-language models on remote sensing benchmarks.

Example:

from mfrsvlm.evaluation import EvaluationSettings, evaluate, load_benchmark

aid = load_benchmark("aid", "data/AID")
summaries = evaluate(model, processor, [aid, "scenes"], settings=EvaluationSettings(output="runs/mine"))
summaries["scenes/test"]["results"]["counting"]["exact"]  # {"value": ..., "low": ..., "high": ..., "n": ...}
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .benchmarks import load_benchmark
    from .evaluate import evaluate, evaluate_majority
    from .protocols import PROTOCOLS
    from .settings import EvaluationSettings

__all__ = ["PROTOCOLS", "EvaluationSettings", "evaluate", "evaluate_majority", "load_benchmark"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "PROTOCOLS": "protocols",
        "EvaluationSettings": "settings",
        "evaluate": "evaluate",
        "evaluate_majority": "evaluate",
        "load_benchmark": "benchmarks",
    },
)


class _Package(ModuleType):
    """Keeps the function `evaluate` under its name, where an import of the module `evaluate` would put the module."""

    def __setattr__(self, name: str, value: Any) -> None:
        is_module = name == "evaluate" and isinstance(value, ModuleType)
        super().__setattr__(name, value.evaluate if is_module else value)


sys.modules[__name__].__class__ = _Package
