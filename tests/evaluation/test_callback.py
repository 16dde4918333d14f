"""Evaluation during training: what is logged, which model is the best, and that training itself does not change."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_benchmarks import MAKERS
from tiny_training import tiny_folder, write_data
from transformers.trainer_callback import TrainerCallback

from mfrsvlm.evaluation import EvaluationSettings, evaluate, load_benchmark
from mfrsvlm.evaluation import callback as module
from mfrsvlm.evaluation.answering import Answer, Answerer, load
from mfrsvlm.evaluation.callback import EvaluationCallback
from mfrsvlm.evaluation.protocols import PROTOCOLS
from mfrsvlm.training import ConversationCollator, ConversationDataset, MFRSVLMTrainer, MFRSVLMTrainingArguments


PROTOCOL = "strict-without-java"
SETTINGS = EvaluationSettings(progress=False)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(PROTOCOLS[PROTOCOL], "max_new_tokens", 3)
    monkeypatch.setattr(PROTOCOLS[PROTOCOL], "max_new_list_tokens", 3)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    root = tmp_path_factory.mktemp("start")
    return tiny_folder(root / "model"), write_data(root)


@pytest.fixture(scope="module")
def rsvqa(tmp_path_factory):
    root = tmp_path_factory.mktemp("rsvqa")
    MAKERS["rsvqa-lr"](root)
    return load_benchmark("rsvqa-lr", root, check_counts=False)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    MAKERS["scenes"](root)
    return load_benchmark("scenes", root, check_counts=False)


def make_trainer(start, output, evaluated=True, **changes):
    folder, data = start
    model, processor = load(str(folder), dtype="float32")
    collator = ConversationCollator(processor)
    rows = ConversationDataset(data / "train.json", data, encode=collator.encode)
    arguments = MFRSVLMTrainingArguments(
        output_dir=str(output),
        learning_rate=2e-3,
        per_device_train_batch_size=2,
        logging_steps=1,
        eval_strategy="steps" if evaluated else "no",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        **{"max_steps": 4, "eval_steps": 2, **changes},
    )
    return MFRSVLMTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows if evaluated else None,
        data_collator=collator,
        processing_class=processor,
    )


def logged(trainer, name):
    return [(row["step"], row[name]) for row in trainer.state.log_history if name in row]


@pytest.mark.integration
def test_figures_are_logged_and_choose_the_best_model(start, scenes, tmp_path, monkeypatch):
    trainer = make_trainer(start, tmp_path, metric_for_best_model="eval_scenes_grounding_mean_iou", greater_is_better=True)
    trainer.add_callback(EvaluationCallback(trainer, [scenes], PROTOCOL, SETTINGS))
    boxes = {2: "[0, 0, 1000, 1000]", 4: "[0, 0, 500, 500]"}
    monkeypatch.setattr(
        Answerer, "answer", lambda self, batch, *_: [Answer(boxes[trainer.state.global_step]) for _ in batch]
    )
    trainer.train()
    assert [step for step, _ in logged(trainer, "eval_loss")] == [2, 4]
    found = logged(trainer, "eval_scenes_grounding_mean_iou")
    assert [step for step, _ in found] == [2, 4] and found[0][1] != found[1][1]
    assert trainer.state.best_metric == max(value for _, value in found) > 0
    now = evaluate(trainer.model, trainer.processing_class, [scenes], PROTOCOL, SETTINGS)["scenes/test"]["results"]
    assert found[-1][1] == now["grounding"]["mean_iou"]["value"]
    assert trainer.evaluate()["eval_scenes_grounding_mean_iou"] == found[-1][1]  # outside of training too


@pytest.mark.integration
def test_training_is_the_same_as_without_an_evaluation(start, rsvqa, tmp_path):
    weights, losses = [], []
    for steps in (None, 1):
        trainer = make_trainer(start, tmp_path / str(steps), evaluated=False, lr_scheduler_type="constant")
        if steps:
            trainer.add_callback(EvaluationCallback(trainer, [rsvqa], PROTOCOL, SETTINGS, steps=steps))
        trainer.train()
        weights.append(trainer.model.state_dict())
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert [step for step, _ in logged(trainer, "eval_rsvqa-lr_accuracy")] == [1, 2, 3, 4]


class Modes(TrainerCallback):
    """Notes whether the model is in training mode at each step."""

    def __init__(self):
        self.modes = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.modes.append(model.training)


@pytest.mark.integration
@pytest.mark.parametrize("changes", [{"bf16": True}, {"gradient_checkpointing": True}])
def test_settings_of_the_trainer(start, rsvqa, tmp_path, changes):
    trainer, modes = make_trainer(start, tmp_path / "run", evaluated=False, **changes), Modes()
    settings = EvaluationSettings(output=tmp_path / "out", progress=False)
    trainer.add_callback(EvaluationCallback(trainer, [rsvqa], PROTOCOL, settings, steps=2))
    trainer.add_callback(modes)
    (tmp_path / "out/step-2").mkdir(parents=True)
    (tmp_path / "out/step-2/old.txt").write_text("of a training that was stopped")
    trainer.train()
    assert modes.modes == [True] * 4
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["step-2", "step-4"]
    assert not (tmp_path / "out/step-2/old.txt").exists()
    summary = json.loads((tmp_path / "out/step-4/rsvqa-lr/test/summary.json").read_text())
    value = summary["results"]["vqa"]["accuracy"]["value"]
    assert logged(trainer, "eval_rsvqa-lr_accuracy")[-1] == (4, value)


@pytest.mark.integration
def test_a_step_is_evaluated_once(start, rsvqa, tmp_path, monkeypatch):
    trainer = make_trainer(start, tmp_path)
    trainer.eval_dataset = {"a": trainer.eval_dataset, "b": trainer.eval_dataset}
    calls = []
    monkeypatch.setattr(module, "evaluate", lambda *args: calls.append(args) or evaluate(*args))
    trainer.add_callback(EvaluationCallback(trainer, [rsvqa], PROTOCOL, SETTINGS, steps=2))
    trainer.train()
    assert len(calls) == 2


def test_names_of_figures(rsvqa, scenes):
    cell = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    nothing = cell | {"value": float("nan")}
    results = {"vqa": {"accuracy": cell, "per_type": {"presence": cell}}, "calibration": {"ece": cell, "brier": nothing}}
    summaries = {"rsvqa-lr/test": {"results": results}, "scenes/test": {"results": {"counting": {"exact": cell}}}}
    assert module.name_figures([rsvqa, scenes], summaries) == {
        "eval_rsvqa-lr_accuracy": 0.5,
        "eval_rsvqa-lr_calibration_ece": 0.5,
        "eval_scenes_counting_exact": 0.5,
    }


def test_two_splits_of_one_benchmark_have_their_own_names(scenes):
    from dataclasses import replace

    results = {"results": {"counting": {"exact": {"value": 0.5}}}}
    figures = module.name_figures([scenes, replace(scenes, split="val")], {"scenes/test": results, "scenes/val": results})
    assert set(figures) == {"eval_scenes_test_counting_exact", "eval_scenes_val_counting_exact"}


def test_what_cannot_be_evaluated_is_an_error_before_training(start, rsvqa, tmp_path, monkeypatch):
    trainer = make_trainer(start, tmp_path, evaluated=False)
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        EvaluationCallback(trainer, [rsvqa], PROTOCOL, steps=0)
    with pytest.raises(ValueError, match="Unknown protocol 'ours'"):
        EvaluationCallback(trainer, [rsvqa], "ours")
    with pytest.raises(ValueError, match="needs the folder of its files"):
        EvaluationCallback(trainer, ["aid"], PROTOCOL)
    trainer.add_callback(EvaluationCallback(trainer, [rsvqa], PROTOCOL, steps=1))
    state = module.AcceleratorState()
    monkeypatch.setattr(module, "AcceleratorState", lambda: FakeState)
    FakeState.distributed_type = module.DistributedType.FSDP
    module.AcceleratorState._shared_state = state._shared_state
    with pytest.raises(ValueError, match="needs the full model in each process, but FSDP shards it over 2"):
        trainer.train()
    trainer.processing_class = None
    with pytest.raises(ValueError, match="There is no processor"):
        EvaluationCallback(trainer, [rsvqa], PROTOCOL)


TWO_PROCESSES = """
import sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
import test_callback as test
from mfrsvlm.evaluation import EvaluationSettings, load_benchmark
root = Path(sys.argv[1])
test.PROTOCOLS[test.PROTOCOL].max_new_tokens = 3
trainer = test.make_trainer((root / "model", root), root / "run", max_steps=2, eval_steps=1,
    metric_for_best_model="eval_rsvqa-lr_accuracy", greater_is_better=True)
rsvqa = load_benchmark("rsvqa-lr", root / "rsvqa", check_counts=False)
settings = EvaluationSettings(progress=False, batch_size=1, images_per_chunk=1, output=root / "out")
trainer.add_callback(test.EvaluationCallback(trainer, [rsvqa], test.PROTOCOL, settings))
trainer.train()
found = test.logged(trainer, "eval_rsvqa-lr_accuracy"), trainer.state.best_metric
(root / f"found-{trainer.args.process_index}").write_text(repr(found))
"""


@pytest.mark.slow
def test_two_processes_share_the_questions(start, tmp_path):
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    (tmp_path / "rsvqa").mkdir()
    MAKERS["rsvqa-lr"](tmp_path / "rsvqa")
    shutil.copytree(start[1], tmp_path, dirs_exist_ok=True)
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    here = Path(__file__).parent
    line = [sys.executable, *launch, tmp_path / "script.py", tmp_path, here, here.parent]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(list(map(str, line)), env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for process in range(2):
        assert (tmp_path / f"found-{process}").read_text() == "([(1, 0.0), (2, 0.0)], 0.0)"
    logs = list((tmp_path / "out/step-2/rsvqa-lr/test").glob("answers-*.jsonl"))
    assert len(logs) == 2 and all(len(log.read_text().splitlines()) == 2 for log in logs)


class FakeState:
    num_processes = 2
