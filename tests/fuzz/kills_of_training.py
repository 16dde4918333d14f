"""Trainings that are killed: the last checkpoint is whole, and the resumed training ends with the same weights."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from fuzz._kills import MOST, TEST_COUNT, Command, Kills, assert_same, content
from fuzz.harness import Case, outcome
from tiny_training import tiny_folder, write_data
from transformers.trainer_utils import get_last_checkpoint

from mfrsvlm.files.model_folder import load_model
from mfrsvlm.training.trainer import UNFINISHED


__all__ = ["AREA", "MOST", "TEST_COUNT", "cases"]
AREA = "kills of training"
PICKLED = ("optimizer.pt", "scheduler.pt", "rng_state.pth")  # compared by their values
TIMED = ("trainer_state.json", "training_args.bin", "train_results.json", "all_results.json")  # of each run, and no result


class Training(Command):
    module, function = "mfrsvlm.training.finetune", "run"

    def prepare(self, folder: Path) -> None:
        self.folder = folder
        tiny_folder(folder / "model")
        (folder / "data").mkdir()
        write_data(folder / "data")
        values = {
            "model_name_or_path": str(folder / "model"),
            "train_file": str(folder / "data" / "train.json"),
            "image_root": str(folder / "data"),
            "learning_rate": 2e-3,
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "save_steps": 2,
            "save_total_limit": 2,
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(values))

    def arguments(self, root: Path) -> list[str]:
        return [str(self.folder / "config.yaml"), "--output_dir", str(root / "out")]

    def again(self, root: Path) -> list[str]:
        out, arguments = root / "out", self.arguments(root)
        if last_checkpoint(out):
            return [*arguments, "--resume_from_checkpoint", "last"]
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)  # as the message says
        return [*arguments, "--overwrite_output_dir", "true"]

    def check_killed(self, root: Path, whole: Path, had_old: bool) -> None:
        out = root / "out"
        checkpoint = last_checkpoint(out)
        if checkpoint is not None and (whole / "out" / checkpoint.name).exists():
            assert_same_checkpoint(checkpoint, whole / "out" / checkpoint.name)
        if (out / "model.safetensors").exists():  # the result is whole, or the loader says that it is not
            expected = (whole / "out" / "model.safetensors").read_bytes()
            outcome(lambda: load_model(str(out)), lambda _: (out / "model.safetensors").read_bytes() == expected)

    def check_end(self, root: Path, whole: Path) -> None:
        out, expected = root / "out", whole / "out"
        names = sorted(path.name for path in expected.glob("checkpoint-*"))
        assert sorted(path.name for path in out.glob("checkpoint-*")) == names, "other checkpoints"
        assert_same(content(out, *PICKLED, *TIMED), content(expected, *PICKLED, *TIMED))
        for name in names:
            assert_same_checkpoint(out / name, expected / name)
        results = (json.loads((folder / "train_results.json").read_text()) for folder in (out, expected))
        assert len({result["bad_rows"] for result in results}) == 1


def last_checkpoint(out: Path) -> Path | None:
    name = get_last_checkpoint(out) if out.is_dir() else None
    return None if name is None else Path(name)


def assert_same_checkpoint(found: Path, expected: Path) -> None:
    assert_same(content(found, *PICKLED, *TIMED), content(expected, *PICKLED, *TIMED))
    for name in PICKLED:
        pair = [torch.load(folder / name, weights_only=False) for folder in (found, expected)]
        assert is_same(*pair), f"another {name} in {found.name}"
    losses = [[entry.get("loss") for entry in state(folder)["log_history"]] for folder in (found, expected)]
    assert losses[0] == losses[1], f"other losses in {found.name}: {losses}"


def state(folder: Path) -> Any:
    return json.loads((folder / "trainer_state.json").read_text())


def is_same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(is_same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(is_same, left, right))
    if isinstance(left, (torch.Tensor, np.ndarray)):
        return bool((torch.equal if isinstance(left, torch.Tensor) else np.array_equal)(left, right))
    return bool(left == right)


def cases(seed: int, count: int, folder: Path) -> Iterator[Case]:
    yield from Kills(Training(), folder).cases(seed, count)
