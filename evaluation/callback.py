"""Evaluates benchmarks during training, with the `Trainer` of transformers, TRL or this package."""

import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .benchmarks import Benchmark
from .evaluate import evaluate, get_protocol, make_runs
from .protocols import Protocol
from .settings import EvaluationSettings


class EvaluationCallback(TrainerCallback):
    """Evaluates benchmarks whenever the trainer evaluates, or every `steps` steps, and logs the figures.

        trainer.add_callback(EvaluationCallback(trainer, ["scenes/validation"], settings=EvaluationSettings(limit=200)))

    Figures go through `trainer.log` as `eval_<benchmark>_<figure>`, such as `eval_rsvqa-lr_accuracy`. A benchmark with
    several tasks has the task in the name, such as `eval_scenes_counting_exact`. Two splits of one benchmark have the split
    in the name, such as `eval_scenes_val_counting_exact`. Values by group or class are left out.

    After an evaluation of the trainer, the figures are among its metrics, so that `metric_for_best_model` may name one. Set
    `greater_is_better` with it.

    With DistributedDataParallel, every process has a copy of the model, and the processes share the questions. FSDP and
    DeepSpeed ZeRO-3 shard the model, which is not supported: an error is raised when training begins.

    Args:
        trainer: the trainer that the callback is added to.
        benchmarks: as for `evaluate`.
        protocol: as for `evaluate`.
        settings: as for `evaluate`. With an output folder, the files of step 50 are written to `OUTPUT/step-50/`, and
            replace existing ones.
        steps: evaluate every `steps` training steps, in addition to the evaluations of the trainer. `None`: only with the
            trainer.
        processor: `None`: that of the trainer.

    Raises:
        ValueError: as `evaluate`; or there is no processor, or `steps` is below 1, or the model is sharded.
    """

    def __init__(
        self,
        trainer: Trainer,
        benchmarks: Sequence[Benchmark | str],
        protocol: str | Protocol = "strict",
        settings: EvaluationSettings | None = None,
        steps: int | None = None,
        processor: Any = None,
    ) -> None:
        if steps is not None and steps < 1:
            raise ValueError(f"steps={steps} must be at least 1.")
        self.trainer, self.protocol, self.steps = trainer, get_protocol(protocol), steps
        self.settings = settings or EvaluationSettings()
        self.processor = processor or trainer.processing_class
        if self.processor is None:
            raise ValueError("There is no processor: pass `processor`, or `processing_class` to the trainer.")
        # Loaded once, and checked before training.
        self.benchmarks = [run.benchmark for run in make_runs(benchmarks, self.protocol, self.settings, mode="image")]
        self.figures: dict[str, float] = {}
        self.evaluated_step: int | None = None  # of the current training

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.evaluated_step = None
        check_model_is_not_sharded()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.steps is not None and state.global_step % self.steps == 0:
            self._evaluate(state.global_step, control)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        # Once per step, although the trainer calls this for every data set that it evaluates.
        if not self.trainer.is_in_train or self.evaluated_step != state.global_step:
            self._evaluate(state.global_step, control)
        if metrics is not None:
            metrics.update(self.figures)  # the trainer looks for `metric_for_best_model` here

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.evaluated_step = None

    def _evaluate(self, step: int, control: TrainerControl) -> None:
        check_model_is_not_sharded()
        settings = self.settings
        if settings.output is not None:
            folder = Path(settings.output) / f"step-{step}"
            if self.trainer.is_world_process_zero():
                shutil.rmtree(folder, ignore_errors=True)
            self.trainer.accelerator.wait_for_everyone()
            settings = replace(settings, output=folder)
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        summaries = evaluate(model, self.processor, self.benchmarks, self.protocol, settings)
        self.figures = name_figures(self.benchmarks, summaries)
        self.evaluated_step = step
        should_log = control.should_log
        self.trainer.log(dict(self.figures))
        control.should_log = should_log  # the trainer has not logged the loss of this step yet


def name_figures(benchmarks: Sequence[Benchmark], summaries: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The values of all figures except those by group, under the names that a trainer logs."""
    repeated = Counter(benchmark.name for benchmark in benchmarks)
    figures = {}
    for benchmark in benchmarks:
        name = f"{benchmark.name}_{benchmark.split}" if repeated[benchmark.name] > 1 else benchmark.name
        tasks = {sample.task for sample in benchmark.samples}
        for task, results in summaries[f"{benchmark.name}/{benchmark.split}"]["results"].items():
            place = name if tasks == {task} else f"{name}_{task}"
            for figure, cell in results.items():
                if "value" in cell and math.isfinite(cell["value"]):
                    figures[f"eval_{place}_{figure}"] = cell["value"]
    return figures


def check_model_is_not_sharded() -> None:
    """Raises `ValueError` if the processes have shards of the model instead of copies."""
    if not AcceleratorState._shared_state:
        return
    state = AcceleratorState()
    sharded = state.distributed_type in (DistributedType.FSDP, DistributedType.MEGATRON_LM)
    if state.distributed_type == DistributedType.DEEPSPEED:
        sharded = state.deepspeed_plugin.zero_stage == 3
    if sharded and state.num_processes > 1:
        raise ValueError(
            f"EvaluationCallback needs the full model in each process, but {state.distributed_type.value} shards it over "
            f"{state.num_processes} processes. Remove the callback, and evaluate the checkpoints afterwards."
        )
