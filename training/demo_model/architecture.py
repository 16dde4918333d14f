"""Architecture for two CPU cores, tokenizer, processor, and initial weights."""

import math
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import CLIPVisionConfig, EfficientNetConfig, LlamaConfig, PreTrainedTokenizerFast, ResNetConfig

from ...configuration_mfrsvlm import MFRSVLMConfig
from ...modeling_mfrsvlm import MFRSVLMForConditionalGeneration
from ...processing_mfrsvlm import MFRSVLMImageProcessor, MFRSVLMProcessor, make_chat_template
from ...scenes.questions import BOX_SCALE
from ..trainer import SettingsError


IMAGE_SIZE, PATCH_SIZE = 128, 16  # 64 visual tokens
NUM_DECODER_LAYERS = 6
# The geometry for photographs of 256 pixels: 64 visual tokens, and four windows of the canvas of 512.
PHOTOGRAPHS = {
    "image_size": 256,
    "patch_size": 32,
    "vision_feature_size": 256,
    "window_sizes": [256],
    "window_overlap": 0.0,
    "window_chunk_size": 4,  # sixteen at once take 1.6 times as long on a CPU
    "visual_position_embeddings": True,
}
# How the scenes write boxes, and ask for one, or for all of a kind.
SCENE_BOXES = {"scale": BOX_SCALE, "order": "xyxy", "padded": False, "prompt": "Give the bounding box of the {object}."}
SCENE_LISTS = SCENE_BOXES | {"prompt": "Give the bounding box of every {object}."}


def efficientnet_lite0() -> EfficientNetConfig:
    """The config of EfficientNet-lite0, see `pretrained_tower`."""
    return EfficientNetConfig(
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        hidden_act="relu6",
        squeeze_expansion_ratio=0.0,  # one channel, which does nothing
        image_size=224,
        batch_norm_momentum=0.01,
    )


def make_config(vocab_size: int, encoder: str = "resnet", width: int = 192, **overrides: Any) -> MFRSVLMConfig:
    """The config of a small model.

    Args:
        vocab_size: of the tokenizer, whose last token is the image placeholder.
        encoder: `"resnet"` or `"vit"`; the two cost the same number of multiplications a window. Or `"efficientnet"`, a
            larger one for photographs, with larger views.
        width: of the decoder, a multiple of 64.
        **overrides: fields of `MFRSVLMConfig`.
    """
    vision_config: Any
    fields: dict[str, Any] = {}
    if encoder == "resnet":
        vision_config = ResNetConfig(
            embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 2], layer_type="basic", num_channels=3
        )
        depths = [2, 3]
        fields["visual_position_embeddings"] = True
    elif encoder == "vit":
        vision_config = CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=5,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            projection_dim=128,
        )
        depths = [3, 5]
    elif encoder == "efficientnet":
        vision_config = efficientnet_lite0()
        depths = [11, 17]  # the last map of 1/16 of the side, and the last map
        fields |= PHOTOGRAPHS
    else:
        raise ValueError(f'encoder={encoder!r} must be "resnet", "vit" or "efficientnet".')
    head_size = 64 if encoder == "efficientnet" else 32  # half the heads take half the time of attention
    text_config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=NUM_DECODER_LAYERS,
        num_attention_heads=width // head_size,
        num_key_value_heads=width // head_size,
        max_position_embeddings=1024,
        initializer_range=0.06,  # the usual 0.02 suits widths of thousands
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    fields = {
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "vision_feature_size": 128,
        "canvas_scale": 2,
        "window_sizes": [128],
        "window_chunk_size": 16,
        "detail_feature_layers": depths,
        "injection_layers": [1, 2, 3, 4],
        "routing": "stack",
        "injection_init": 0.5,
        **fields,
    }
    fields.update(overrides)
    return MFRSVLMConfig(
        vision_config=vision_config, text_config=text_config, bos_token_id=0, eos_token_id=1, pad_token_id=2, **fields
    )


def make_tokenizer(dialogues: Iterable[tuple[str, str]], vocab_size: int = 700) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on questions and answers. Digits stand alone, and `<image>` is the last token.

    Args:
        dialogues: (question, answer).
        vocab_size: at most, without `<image>`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    preamble = "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    preamble += "detailed, and polite answers to the human's questions. USER: \n"
    tokenizer.train_from_iterator([f"{preamble}{question} ASSISTANT: {answer}" for question, answer in dialogues], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return fast


def make_processor(config: Any, tokenizer: Any, canvas_source: str = "image") -> MFRSVLMProcessor:
    image_processor = MFRSVLMImageProcessor.for_model(
        config, canvas_source=canvas_source, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    template = make_chat_template(tokenizer)
    return MFRSVLMProcessor(image_processor, tokenizer, chat_template=template, box_format=SCENE_BOXES)


def view_fields(image_size: int, canvas_scale: int) -> dict[str, Any]:
    """Fields of the config of a model of scenes: windows are half as long as the canvas, and overlap by half."""
    window = canvas_scale * image_size // 2
    chunk = 16 if window <= IMAGE_SIZE else 4  # on a CPU, few large windows at once are faster
    return {
        "image_size": image_size,
        "canvas_scale": canvas_scale,
        "window_sizes": [window],
        "window_chunk_size": chunk,
    }


@torch.no_grad()
def enlarge(model: MFRSVLMForConditionalGeneration, image_size: int, canvas_scale: int) -> MFRSVLMForConditionalGeneration:
    """A copy of a small model of scenes with a larger global view or canvas: more visual tokens, more detail stacks.

    All other weights are the same. The embeddings of the positions are interpolated. The embedding of a detail stack is that
    of the coarser phase that contains its own.

    Raises:
        SettingsError: `image_size` or `canvas_scale` is no multiple of that of the model.
    """
    old = model.config
    for name, value in (("image_size", image_size), ("canvas_scale", canvas_scale)):
        if value % getattr(old, name):
            raise SettingsError(f"{name}={value} must be a multiple of {getattr(old, name)}, that of the model.")
    parts = {"vision_config": deepcopy(old.vision_config), "text_config": deepcopy(old.text_config)}
    parts["text_config"].max_position_embeddings *= (image_size // old.image_size) ** 2  # as many images fit as before
    config = MFRSVLMConfig(**old.to_dict() | view_fields(image_size, canvas_scale) | parts)
    larger = MFRSVLMForConditionalGeneration(config)
    weights = model.state_dict()
    for name, weight in weights.items():
        if name.endswith(".stack_embedding"):
            phases = weight.unflatten(0, (-1, old.canvas_scale, old.canvas_scale))  # (depths, r, c, d)
            for axis in (1, 2):
                phases = phases.repeat_interleave(canvas_scale // old.canvas_scale, axis)
            weights[name] = phases.flatten(0, 2)
        elif name.endswith("visual_position_embedding.weight"):
            grid = weight.T.unflatten(1, (old.tokens_per_side, old.tokens_per_side))[None]  # (1, d, t, t)
            side = config.tokens_per_side
            grid = functional.interpolate(grid, size=(side, side), mode="bilinear", align_corners=False)
            weights[name] = grid[0].flatten(1).T
    larger.load_state_dict(weights)
    larger.generation_config = model.generation_config
    return larger


@torch.no_grad()
def add_number_tokens(model: MFRSVLMForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    """Makes each whole number from 10 to `BOX_SCALE` a token, so that a coordinate is one prediction and not one a digit.

    Text and answers stay the same. The rows of new tokens start as sines and cosines of the number, so that close numbers
    are similar. Numbers that are tokens already are left alone.
    """
    first = len(tokenizer)
    known = tokenizer.get_vocab()
    numbers = [number for number in range(10, BOX_SCALE + 1) if str(number) not in known]
    if not numbers:
        return
    digits = tokenizer.convert_tokens_to_ids([str(digit) for digit in range(10)])
    tokenizer.add_tokens([AddedToken(str(number), normalized=False) for number in numbers])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    width = model.config.text_config.hidden_size
    periods = torch.logspace(math.log10(BOX_SCALE), math.log10(8), width // 2)
    angles = 2 * math.pi * torch.tensor(numbers)[:, None] / periods
    waves = torch.cat([angles.sin(), angles.cos()], dim=1) * 2**0.5  # (numbers, D), of variance 1
    for rows in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        rows[first:] = rows[digits].mean(0) + waves * rows[:first].std()


@torch.no_grad()
def settle_placeholder(model: MFRSVLMForConditionalGeneration) -> None:
    """Sets the rows of the image placeholder, which nothing trains: the mean of the others, and zero in the head."""
    place = model.config.image_token_id
    rows = model.get_input_embeddings().weight
    rows[place] = rows[:place].mean(0)
    model.get_output_embeddings().weight[place] = 0


@torch.no_grad()
def start_positions(model: MFRSVLMForConditionalGeneration, features: np.ndarray) -> None:
    """Initializes position embeddings, if any, by sines and cosines of row and column, scaled to the visual tokens."""
    if not model.config.visual_position_embeddings:
        return
    table = model.model.visual_position_embedding.weight
    side, width = model.config.tokens_per_side, table.shape[1]
    frequencies = 100.0 ** -torch.linspace(0, 1, width // 4)
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D / 2)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    visual = model.model.multi_modal_projector(torch.from_numpy(np.array(features[:50, 0])).float())
    table.copy_(torch.cat([rows, columns], dim=-1).flatten(0, 1) * 2**0.5 * visual.std())


@torch.no_grad()
def whiten_projector(model: MFRSVLMForConditionalGeneration, features: np.ndarray, seed: int = 0) -> None:
    """Initializes the projector with whitened features.

    A few directions of the features, such as brightness, have nearly all of the variance, and small objects very little.
    With a random projector, a decoder learns the large directions first. The first layer is therefore initialized as a
    random rotation of features with unit covariance. A hundredth of the mean variance is added to each direction, so that
    noise is not amplified.

    Args:
        model: the model.
        features: (N, 1 + K, T, C), see `cache_image_features`; every tenth image is used.
        seed: seed of the rotation.
    """
    states = torch.from_numpy(np.array(features[::10])).flatten(0, -2).float()  # (tokens, C)
    mean, (variances, directions) = states.mean(0), torch.linalg.eigh(torch.cov(states.T))
    whitening = directions * (variances + 0.01 * variances.mean()).rsqrt() @ directions.T
    first, second = model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2
    generator = torch.Generator().manual_seed(seed)
    first.weight.copy_(torch.randn(first.weight.shape, generator=generator) * first.in_features**-0.5 @ whitening)
    first.bias.copy_(-first.weight @ mean)
    second.weight.copy_(torch.randn(second.weight.shape, generator=generator) * model.config.text_config.initializer_range)
