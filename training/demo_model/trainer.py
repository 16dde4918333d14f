"""`MFRSVLMTrainer` for branches behind one image, features of a frozen encoder, and guidance."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from ..image_features import project
from ..trainer import MFRSVLMTrainer, MFRSVLMTrainingArguments, SettingsError
from .guidance import GUIDANCE_WEIGHT, Guidance


GUIDANCE_FILE = "guidance.pt"  # in a checkpoint


@dataclass
class DemoModelTrainingArguments(MFRSVLMTrainingArguments):
    """Arguments of `MFRSVLMTrainer`, guidance, and the attention of the decoder in training."""

    guidance: bool = field(default=False, metadata={"help": "Add the losses of `Guidance`, where rows have known objects."})
    decoder_attention: str | None = field(
        default=None, metadata={"help": "Attention of the decoder in training, such as short, see `short_attention`."}
    )


class ZeroGuidanceGradients(TrainerCallback):
    """Clears the gradients of the guidance after each step. The stock `Trainer` clears those of the model alone."""

    def __init__(self, guidance: Guidance) -> None:
        self.guidance = guidance

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.guidance.zero_grad()


class DemoModelTrainer(MFRSVLMTrainer):
    """`MFRSVLMTrainer` for the batches of `BranchCollator`, and:

    - rows may hold features of a frozen encoder in place of pixels, see `cache_image_features`;
    - answers are weighed in the loss as the rows say;
    - with `guidance`, the losses of `Guidance` are added. Its heads are saved in checkpoints, and not in the model.

    It runs in one process.

    Raises:
        SettingsError: there are several processes.
    """

    args: DemoModelTrainingArguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.world_size > 1:
            raise SettingsError(f"DemoModelTrainer runs in one process, not in {self.args.world_size}.")
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch
        self.guidance = Guidance(self.model).to(self.args.device) if self.args.guidance else None
        if self.guidance is not None:
            self.add_callback(ZeroGuidanceGradients(self.guidance))
        self.loss_parts: dict[str, list[torch.Tensor]] = {}  # since the last log

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        groups = super().parameter_groups(model)
        if self.guidance is not None:
            rate, muon = (
                self.args.decoder_learning_rate or self.args.learning_rate,
                {"muon": False} if self.args.muon else {},
            )
            for matrices, decay in ((True, self.args.weight_decay), (False, 0.0)):
                parameters = [each for each in self.guidance.parameters() if (each.ndim > 1) == matrices]
                groups.append({"params": parameters, "lr": rate, "weight_decay": decay, **muon})
        return groups

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        model = self.model
        attention = model.config.text_config._attn_implementation
        model.set_attn_implementation({"text_config": self.args.decoder_attention or attention})
        try:
            with nullcontext() if self.guidance is None else self.guidance.recording():
                return super().train(*args, **kwargs)
        finally:
            model.set_attn_implementation({"text_config": attention})

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        """Mean over answers of the mean cross-entropy of their tokens, weighted, and the losses of `Guidance`."""
        inputs = dict(inputs)
        labels, weights = inputs.pop("labels")[:, 1:], inputs.pop("loss_weights")[:, 1:]
        marks, lengths = inputs.pop("marks"), inputs.pop("prefix_lengths")
        objects, features = inputs.pop("objects", None), inputs.pop("image_features", None)
        if features is not None:
            with self.accelerator.autocast():
                encoded = project(self.accelerator.unwrap_model(model), features)
            inputs["mm_encoder_outputs"] = {"image": encoded}
        outputs = model(**inputs, use_cache=False)  # a cache would only cost memory
        answered = labels != -100
        losses = F.cross_entropy(outputs.logits[:, :-1][answered].float(), labels[answered], reduction="none")
        parts = {"answers": (losses * weights[answered]).sum() / weights.sum()}
        if self.guidance is not None and objects is not None and model.training:
            parts |= self.guidance(inputs["input_ids"], lengths, marks, objects)
        for name, value in parts.items():
            self.loss_parts.setdefault(f"{name}_loss", []).append(value.detach())
        loss = sum(GUIDANCE_WEIGHT.get(name, 1.0) * value for name, value in parts.items())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs = logs | {name: round(torch.stack(values).mean().item(), 4) for name, values in self.loss_parts.items()}
            self.loss_parts = {}
        super().log(logs, *args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.guidance is None:
            return super()._clip_grad_norm(model)
        parameters = [*model.parameters(), *self.guidance.parameters()]
        return self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.guidance is not None:
            torch.save(self.guidance.state_dict(), Path(output_dir) / GUIDANCE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.guidance is not None:
            self.guidance.load_state_dict(torch.load(Path(checkpoint) / GUIDANCE_FILE, weights_only=True))
