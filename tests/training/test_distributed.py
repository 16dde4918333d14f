"""Fine-tuning on two gloo ranks gives the losses of one process; the launch files say what their readers understand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from tiny_models import tiny_model
from tiny_training import llava_row, tiny_folder, write_data
from training_worker import losses_of

from mfrsvlm import training


LAUNCH = Path(training.__file__).parent / "accelerate"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Folder of a tiny model; data of which, in order, every first has an image and every second has none."""
    folder = write_data(tmp_path_factory.mktemp("start"))
    rows = [llava_row(index, image=index % 2 == 0) for index in range(12)]
    for index, row in enumerate(rows):
        row["conversations"][1]["value"] += f" {index} ships." * (index % 4)
    (folder / "mixed.json").write_text(json.dumps(rows))
    tiny_folder(folder / "model")
    return folder


def run(command):
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("data", ["train", "mixed"])
def test_ddp_by_accelerate_launch_gives_the_losses_of_one_process(start, tmp_path, data):
    """`mixed` in its order: at every step, one rank has an image and the other has text only."""
    config = {
        "model_name_or_path": str(start / "model"),
        "train_file": str(start / f"{data}.json"),
        "image_root": str(start),
        "learning_rate": 2e-3,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "group_by_modality_length": data == "train",
        "train_sampling_strategy": "random" if data == "train" else "sequential",
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    script = ["-m", "mfrsvlm.training.finetune", str(tmp_path / "config.yaml")]
    script += ["--save_strategy", "steps", "--save_steps", "12"]
    run([sys.executable, *script, "--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "one")])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / "ddp.yaml")]
    launch += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    script += ["--ddp_backend", "gloo"]
    run([*launch, *script, "--per_device_train_batch_size", "1", "--output_dir", str(tmp_path / "two")])
    histories = []
    for name in ("one", "two"):
        state = json.loads((tmp_path / name / "checkpoint-12" / "trainer_state.json").read_text())
        histories.append(torch.tensor([entry["loss"] for entry in state["log_history"] if "loss" in entry]))
    assert len(histories[0]) == 12 and histories[0][-1] < histories[0][0] - 0.5
    assert (histories[0] - histories[1]).abs().max() <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("data", ["train", "mixed"])
def test_fsdp2_gives_the_losses_of_one_process(start, tmp_path, data):
    """By `fully_shard` itself: accelerate ignores FSDP on the CPU without a word."""
    worker = Path(__file__).parents[1] / "training_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)]
    run([*command, str(start), data, str(tmp_path / "losses.pt")])
    seen, expected = torch.load(tmp_path / "losses.pt"), torch.tensor(losses_of(start, data, rank=0, world_size=1))
    assert expected[-1] < expected[0] - 0.5
    assert (seen - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_launch_files_hold_known_keys_only(name):
    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))  # raises for a key that it does not know
    assert isinstance(config, ClusterConfig) and config.mixed_precision == "bf16"
    expected = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}[name]
    assert config.distributed_type == expected
    options = {action.dest for action in launch_command_parser()._actions}
    assert {*config.fsdp_config, *config.deepspeed_config} <= options


def test_layers_to_shard_are_those_of_the_model():
    wanted = load_config_from_file(str(LAUNCH / "fsdp2.yaml")).fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
    names = {type(module).__name__ for module in tiny_model().modules()}
    assert set(wanted.split(",")) <= names
