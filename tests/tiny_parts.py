"""Tiny trained parts of models in folders, and what tests say of folders that commands write."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from tiny_models import STAGE_SIZES, VIT_SIZES
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)


CHECKPOINT = Path(__file__).parent / "reference" / "checkpoint"
VOCAB = 512  # of the checkpoint; the model has one row more, for <image>


def refused(main: Callable[[list[str]], int], capsys, command: list[str], *needles: str) -> None:
    """Runs the command line: it must fail with one line on stderr that holds every needle."""
    capsys.readouterr()
    assert main(command) == 1
    captured = capsys.readouterr()
    before, error, message = captured.err.partition("error: ")  # a progress bar may stand before it
    assert error and "Traceback" not in before and captured.out == ""
    assert len(message.splitlines()) == 1 or "clean process" in message
    for needle in needles:
        assert needle in message, f"{needle!r} not in {message!r}"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert sorted(left) == sorted(right)
    assert not [key for key in left if left[key].dtype != right[key].dtype or not torch.equal(left[key], right[key])]


TEXT_SIZES = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BACKBONE = {"image_size": 28, "patch_size": 7, "vision_feature_size": 24}
# Other families: classes of the checkpoint and of its config, and what differs from the sizes above.
DECODERS = {
    "mistral": ("MistralForCausalLM", "MistralConfig", {}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {"logits_scaling": 2.0, "embedding_multiplier": 3.0}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {}),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", {}),
}
TOWERS = {
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", VIT_SIZES),
    "siglip, no whole patches": ("SiglipVisionModel", "SiglipVisionConfig", {**VIT_SIZES, "image_size": 30}),
    "siglip2": ("Siglip2VisionModel", "Siglip2VisionConfig", {**VIT_SIZES, "num_patches": 16}),
    "dinov2": ("Dinov2Model", "Dinov2Config", VIT_SIZES),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {**VIT_SIZES, "num_register_tokens": 2}),
    "vit": ("ViTForImageClassification", "ViTConfig", VIT_SIZES),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", STAGE_SIZES),
    "convnextv2": ("ConvNextV2ForImageClassification", "ConvNextV2Config", STAGE_SIZES),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2, "patch_size": 2},
    ),
}


def tiny_models() -> dict[str, Callable[[], Any]]:
    """Trained parts by name: language models and vision towers."""

    def member(model: str, config: str, sizes: dict) -> Callable[[], Any]:
        return lambda: getattr(transformers, model)(getattr(transformers, config)(**sizes))

    return {
        **{name: member(model, config, {**TEXT_SIZES, **more}) for name, (model, config, more) in DECODERS.items()},
        **{name: member(*family) for name, family in TOWERS.items()},
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT_SIZES)),
        "half": lambda: LlamaForCausalLM(LlamaConfig(**TEXT_SIZES)).to(torch.bfloat16),
        "spare rows": lambda: LlamaForCausalLM(LlamaConfig(**{**TEXT_SIZES, "vocab_size": 520})),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**TEXT_SIZES)),
        "tied": lambda: Qwen3ForCausalLM(Qwen3Config(**TEXT_SIZES, tie_word_embeddings=True)),
        "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**VIT_SIZES)),
        "full-clip": lambda: CLIPModel(
            CLIPConfig(vision_config=VIT_SIZES, text_config={"vocab_size": 9, "num_hidden_layers": 1})
        ),
        "resnet": lambda: ResNetForImageClassification(ResNetConfig(embedding_size=8, **STAGE_SIZES)),
    }


def write_parts(folder: Path) -> Path:
    """Folders of tiny trained parts, as `save_pretrained` leaves them."""
    torch.manual_seed(1)
    tokenizer = LlamaTokenizer.from_pretrained(CHECKPOINT)
    for name, make in tiny_models().items():
        model = make()
        model.save_pretrained(folder / name)
        if hasattr(model, "lm_head"):
            tokenizer.save_pretrained(folder / name)
        else:
            content = json.loads((CHECKPOINT / "vision_tower" / "preprocessor_config.json").read_text())
            # Many towers say another size here than the one that they were trained at.
            content.update(size={"shortest_edge": 32}, crop_size={"height": 14, "width": 14}, image_mean=[0.1, 0.2, 0.3])
            (folder / name / "preprocessor_config.json").write_text(json.dumps(content))
    return folder


def expected_parts(language_model: Path, tower: Path) -> dict[str, torch.Tensor]:
    """Tensors of the files of both parts under the names of the assembled model."""
    names = {}
    for key, value in load_file(language_model / "model.safetensors").items():
        names[key.replace("model.", "model.language_model.", 1) if key.startswith("model.") else key] = value
    for key, value in load_file(tower / "model.safetensors").items():
        if not key.startswith(("text_model.", "text_projection.", "visual_projection.", "logit_scale", "classifier.")):
            names["model.vision_tower." + key.removeprefix("vision_model.").removeprefix("resnet.")] = value
    return names
