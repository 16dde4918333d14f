"""The `Trainer` of transformers with learning rates per part, batches of similar length, and atomic checkpoints."""

import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from ..checksums_mfrsvlm import ADAPTER_FILES, CHECKSUMS, MODEL_FILES, update_checksums
from ..files.model_folder import slow_on_cpu
from ..files.writing import write_file
from ..model_card.card import write_model_card
from .data import ConversationDataset
from .muon import MuonWithAdamW


logger = logging.getLogger(__name__)

# Names of the parameters of each part. PEFT adds prefixes and inner names, so these patterns are searched for.
PARTS = {
    "vision_tower": re.compile(r"\bvision_tower\."),
    "projector": re.compile(r"\b(multi_modal_projector|visual_position_embedding|stage_projections|window_scorer)\."),
    "injectors": re.compile(r"\binjectors\."),
    "decoder": re.compile(r"\blanguage_model\.|\blm_head\."),
}

# Checkpoints are written to this folder and moved when they are complete. Uploads skip names with a leading underscore.
UNFINISHED = "_unfinished"


class SettingsError(ValueError):
    """Training settings that are missing, invalid or contradictory. The message names them."""


def part_of(name: str) -> str:
    """The part that a parameter belongs to.

    Raises:
        ValueError: it belongs to none, or to several.
    """
    parts = [part for part, pattern in PARTS.items() if pattern.search(name)]
    if len(parts) != 1:
        raise ValueError(f"Parameter {name} belongs to {parts or 'no part'}; each must belong to one of {list(PARTS)}.")
    return parts[0]


def freeze_parts(model: nn.Module, parts: Sequence[str], only_new_bands: bool = False) -> None:
    """Freezes the parameters of the named parts and, with `only_new_bands`, of the tower all but the layer of new bands.

    Raises:
        SettingsError: nothing is left to train, or an adapter or a copy of PEFT would train in a frozen part.
    """
    for name, parameter in model.named_parameters():
        part = part_of(name)
        if part in parts or (only_new_bands and part == "vision_tower" and ".extra_bands." not in name):
            if parameter.requires_grad and re.search(r"\.(lora_|modules_to_save\.)", name):
                raise SettingsError(
                    f"The part {part} is to be frozen, but the adapter would train {name}. Change one of freeze_*, "
                    "train_only_new_bands, lora_target_modules and lora_modules_to_save."
                )
            parameter.requires_grad = False
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise SettingsError(f"Nothing is left to train: {', '.join(parts)} are frozen.")


def drop_bands(pixel_values: torch.Tensor, config: Any, probability: float) -> torch.Tensor:
    """Sets bands that the encoder did not have before it was widened to zero at random, each in all views of an image.

    Args:
        pixel_values: (N, L), as the processor packs them.
        config: of the model.
        probability: for each band of each image. The random numbers are those of `torch.manual_seed`.

    Returns:
        (N, L); the same tensor for a model that was not widened.
    """
    if config.stem_channels is None:
        return pixel_values
    sizes = [config.image_size, *(window.size for window in (config.windows if config.has_details else ()))]
    kept = torch.rand(len(pixel_values), config.num_channels) >= probability
    kept[:, config.stem_channels] = True
    kept = kept.to(pixel_values.device, pixel_values.dtype)[:, None, :, None]
    views = []
    for part, size in zip(pixel_values.split(config.packed_lengths, dim=1), sizes, strict=True):
        pixels = part.unflatten(1, (-1, config.num_channels, size**2))  # (N, windows, channels, pixels)
        views.append((pixels * kept).flatten(1))
    return torch.cat(views, dim=1)


class ModalityLengthSampler(Sampler[int]):
    """Random order in groups of similar length, with images or without. Only the last groups are mixed.

    The sampler of transformers uses the global random state, so that a resumed epoch would have another order. This order
    depends only on the seed and the epoch, and is the same on every rank.

    Args:
        lengths: lengths of the samples; negative for samples without an image.
        group_size: number of samples per optimizer step, over all ranks.
        seed: seed of the order.
    """

    def __init__(self, lengths: Sequence[int], group_size: int, seed: int = 0) -> None:
        self.lengths, self.group_size, self.seed, self.epoch = lengths, group_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        groups: list[list[int]] = []
        remainder: list[int] = []
        for members in (
            [index for index, length in enumerate(self.lengths) if length >= 0],
            [index for index, length in enumerate(self.lengths) if length < 0],
        ):
            if not members:
                continue
            lengths = [abs(self.lengths[index]) for index in members]
            order = [members[i] for i in get_length_grouped_indices(lengths, self.group_size, generator=generator)]
            whole = len(order) // self.group_size * self.group_size
            groups += [order[start : start + self.group_size] for start in range(0, whole, self.group_size)]
            remainder += order[whole:]
        if len(remainder) >= self.group_size:
            groups.append(remainder[: self.group_size])
            remainder = remainder[self.group_size :]
        for group in torch.randperm(len(groups), generator=generator).tolist():
            yield from groups[group]
        yield from remainder


@dataclass
class MFRSVLMTrainingArguments(TrainingArguments):
    """Arguments of the `Trainer`, and freezing and learning rates of the parts.

    The parts are the vision tower, the projector (with the stage projections and position embeddings of a backbone), the
    injectors, and the decoder (with its embeddings and the language modeling head).
    """

    freeze_vision_tower: bool = field(default=False, metadata={"help": "Do not train the vision tower."})
    freeze_projector: bool = field(default=False, metadata={"help": "Do not train the projector."})
    freeze_injectors: bool = field(default=False, metadata={"help": "Do not train the injectors."})
    freeze_decoder: bool = field(default=False, metadata={"help": "Do not train the decoder and the head."})
    vision_tower_learning_rate: float | None = field(default=None, metadata={"help": "Default: learning_rate."})
    projector_learning_rate: float | None = field(default=None, metadata={"help": "Default: learning_rate."})
    injectors_learning_rate: float | None = field(default=None, metadata={"help": "Default: learning_rate."})
    decoder_learning_rate: float | None = field(default=None, metadata={"help": "Default: learning_rate."})
    train_only_new_bands: bool = field(
        default=True,
        metadata={"help": "Of a tower that was widened, train only the layer of the new bands: RGB keeps its features."},
    )
    band_dropout: float = field(
        default=0.1, metadata={"help": "Share of the new bands of a widened tower that are set to zero at random."}
    )
    muon: bool = field(default=False, metadata={"help": "Train matrices between hidden states by Muon, the rest by AdamW."})
    muon_factor: float = field(default=3.0, metadata={"help": "Learning rate of Muon divided by that of AdamW."})
    group_by_modality_length: bool = field(
        default=True, metadata={"help": "Make batches of similar length, with images or without."}
    )
    # The default of transformers is False, which would be written to the saved config. The loss never uses a cache.
    use_cache: bool = field(default=True, metadata={"help": "Value of use_cache in the saved config."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be false: the collator needs all columns."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.band_dropout <= 1:
            raise ValueError(f"band_dropout={self.band_dropout} must be a share, 0 to 1.")

    @property
    def frozen_parts(self) -> list[str]:
        return [part for part in PARTS if getattr(self, f"freeze_{part}")]

    def learning_rate_of(self, part: str) -> float:
        rate = getattr(self, f"{part}_learning_rate")
        return self.learning_rate if rate is None else rate


class ZeroGradients(TrainerCallback):
    """Sets missing gradients to zero in a single process.

    In a step with text only, the tower has no gradients, and the optimizer would skip it together with its momentum. On
    several ranks, the tower encodes a blank image and its gradients are zero. This callback makes both cases equal.
    """

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if args.world_size == 1:
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)


class MFRSVLMTrainer(Trainer):
    """The `Trainer` of transformers, with:

    - a learning rate for each part, and Muon as an optimizer;
    - batches of similar length, with images or without, for a `ConversationDataset`;
    - the same steps on any number of ranks, see `ZeroGradients`;
    - atomic checkpoints, so that the last one can always be resumed;
    - the model card of this package, and the code of the model in every push to the Hub during training.
    """

    args: MFRSVLMTrainingArguments
    card_details: dict[str, Any] = {}  # further fields of the card, see `write_model_card`
    _run_dir: str | None = None  # replaces the output folder while a checkpoint is written

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(ZeroGradients)
        if (self.args.bf16 or self.args.muon) and self.args.device.type == "cpu" and slow_on_cpu(torch.bfloat16):
            logger.warning(
                f"bf16={self.args.bf16} and muon={self.args.muon} compute in bfloat16, which this CPU emulates and is many "
                "times slower in. Pass --bf16 false --muon false."
            )

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups of the optimizer: by part, with or without weight decay, and by Muon or AdamW."""
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                muon = self.args.muon and parameter.ndim == 2 and not re.search(r"embed|\blm_head\b", name)
                groups.setdefault((part_of(name), name in decayed, muon), []).append(parameter)
        return [
            {
                "params": parameters,
                "lr": self.args.learning_rate_of(part) * (self.args.muon_factor if muon else 1.0),
                # A step multiplies the weight decay by the learning rate.
                "weight_decay": (self.args.weight_decay if decay else 0.0) / (self.args.muon_factor if muon else 1.0),
                **({"muon": muon} if self.args.muon else {}),
            }
            for (part, decay, muon), parameters in groups.items()
        ]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            target = self.model if model is None else model
            if self.args.muon:
                options: dict[str, Any] = {"betas": (self.args.adam_beta1, self.args.adam_beta2)}
                self.optimizer_cls_and_kwargs = (MuonWithAdamW, options | {"eps": self.args.adam_epsilon})
            optimizer_class, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, target)
            options["params"] = self.parameter_groups(target)
            self.optimizer_cls_and_kwargs = (optimizer_class, options)
        return super().create_optimizer(model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self.args.group_by_modality_length or not isinstance(dataset, ConversationDataset):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        group_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        lengths = dataset.modality_lengths(self.model.config.image_seq_length)
        return ModalityLengthSampler(lengths, group_size, seed)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if model.training and self.args.band_dropout and inputs.get("pixel_values") is not None:
            pixel_values = drop_bands(inputs["pixel_values"], self.model.config, self.args.band_dropout)
            inputs = {**inputs, "pixel_values": pixel_values}
        # The Trainer disables the cache in the outer config only, but the decoder reads its own config.
        result = super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if torch.is_grad_enabled() and not loss.requires_grad:  # a batch of text, if all parts that process text are frozen
            trained = next(parameter for parameter in model.parameters() if parameter.requires_grad)
            loss = loss + 0 * trained.sum()
        return (loss, *result[1:]) if isinstance(result, tuple) else loss

    def load_end(self, checkpoint: str) -> dict[str, float]:
        """Loads the final weights and state of a training, and returns its metrics."""
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(best or checkpoint)
        if self.args.should_save:  # the run was killed before or while it did so
            shutil.rmtree(Path(self.args.output_dir, UNFINISHED), ignore_errors=True)
            self._rotate(Path(self.args.output_dir))
        return {"epoch": self.state.epoch or 0.0}

    def _get_output_dir(self, trial: Any) -> str:
        return self._run_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        unfinished, finished = run_dir / UNFINISHED / name, run_dir / name
        if self.is_local_process_zero():  # left by a killed run; machines with a shared disk may both find it
            shutil.rmtree(unfinished.parent, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._run_dir = str(unfinished.parent)
        try:
            super()._save_checkpoint(model, trial)
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(finished)
                if self.args.should_save:
                    self.state.save_to_json(str(unfinished / "trainer_state.json"))
        except Exception as error:
            error.add_note(
                f"{name} could not be saved, {shutil.disk_usage(run_dir).free / 2**30:.1f} GiB are free in {run_dir}. The "
                f"incomplete checkpoint is in {unfinished}. Earlier checkpoints are complete; resume_from_checkpoint=last "
                "resumes the last of them."
            )
            raise
        finally:
            self._run_dir = None

        self.accelerator.wait_for_everyone()  # for the random states and shards of every rank
        if self.is_world_process_zero():
            _move(unfinished, finished)
        self.accelerator.wait_for_everyone()
        if self.is_local_process_zero() and unfinished.exists():  # on machines without a shared disk
            _move(unfinished, finished)
        if self.args.should_save:
            self._rotate(run_dir)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(finished))

    def _rotate(self, run_dir: Path) -> None:
        """Removes the checkpoints that `rotate_checkpoints` would remove. A run that is killed leaves no part of one."""
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        checkpoints = sort_checkpoints(str(run_dir), use_mtime=True)
        best = self.state.best_model_checkpoint
        kept = {*checkpoints[-1:], *([] if best is None else [str(Path(best))])}
        surplus = len(checkpoints) - max(limit, len(kept))
        for path in [path for path in checkpoints if path not in kept][: max(surplus, 0)]:
            _discard(Path(path), run_dir / UNFINISHED)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # PEFT saves adapters without
            update_checksums(output_dir or self.args.output_dir, (*MODEL_FILES, *ADAPTER_FILES))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._run_dir is not None or not self.is_world_process_zero():
            return  # incomplete: `_save_checkpoint` calls again
        for code in Path(checkpoint_folder).glob("*.py"):
            write_file(Path(self.args.output_dir, code.name), code.read_bytes())
        checksums = Path(checkpoint_folder, CHECKSUMS)
        if checksums.is_file():  # of the weights and configs that are copied next
            write_file(Path(self.args.output_dir, CHECKSUMS), checksums.read_bytes())
        self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the model card of this package. Arguments are ignored."""
        if self.is_world_process_zero():
            config = self.accelerator.unwrap_model(self.model).config
            details = {"parts": {"trained from": config.name_or_path}, **self.card_details}
            write_model_card(Path(self.args.output_dir), config, origin="trained", **details)


def _move(source: Path, target: Path) -> None:
    if target.exists():  # resumed from an earlier checkpoint than the last
        os.replace(target, source.with_name("replaced"))
    os.replace(source, target)
    shutil.rmtree(source.parent)


def _discard(path: Path, scratch: Path) -> None:
    scratch.mkdir(exist_ok=True)
    os.replace(path, scratch / path.name)
    shutil.rmtree(scratch)
