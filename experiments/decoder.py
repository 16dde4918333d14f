"""Trains projector, injectors and decoder on the frozen features of an encoder.

An image costs far more tokens than a question, so the questions of a scene are packed behind one copy of it: every
question with its answer is a branch that sees the image and itself, and no other branch. Token by token a branch is the
same computation as its own prompt.
"""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedTokenizerFast

from mfrsvlm.experiments.dataset import SceneImages, to_pixels
from mfrsvlm.experiments.guidance import Guidance
from mfrsvlm.modeling_mfrsvlm import MASKED_SCORE, MFRSVLMForConditionalGeneration, MFRSVLMImageFeatures
from mfrsvlm.processing_mfrsvlm import MFRSVLMImageProcessor, MFRSVLMProcessor, cut_windows, make_chat_template
from mfrsvlm.scenes import KINDS, TASKS, Question, Scene, ask
from mfrsvlm.scenes.questions import PLURALS


# How often a task is asked of a scene; counts and boxes are learned last.
MIX = {
    "classification": 1,
    "area": 1,
    "presence": 1,
    "count": 4,
    "comparison": 1,
    "position": 2,
    "grounding": 3,
    "caption": 1,
}
# Weight of a task's answer in the loss. An answer counts once, however many tokens it has, but for boxes and captions.
ANSWER_WEIGHT = {"grounding": 4.0, "caption": 3.0}
# Learning rate of Muon in that of AdamW.
MUON_PEAK = 3.0
# Weights of the losses of `guidance`, beside that of the answers.
GUIDANCE_WEIGHT = {"seen": 0.25, "attention": 0.25, "counted": 0.5, "placed": 0.5, "boxed": 0.5}
NOUNS = {noun: number for number, kind in enumerate(KINDS) for noun in (kind, PLURALS[kind])}
NOUN = re.compile(rf"\b({'|'.join(sorted(NOUNS, key=len, reverse=True))})\b")


def make_tokenizer(scenes: Sequence[Scene]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the dialogues of some scenes; digits stand alone, `<image>` comes last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    preamble = "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    preamble += "detailed, and polite answers to the human's questions. USER: \n"
    texts = [f"{preamble}{question.text} ASSISTANT: {question.answer}" for scene in scenes for question in ask(scene)]
    tokenizer.train_from_iterator(texts, trainer)
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
    return MFRSVLMProcessor(image_processor, tokenizer, chat_template=make_chat_template(tokenizer))


def encode_scenes(
    model: MFRSVLMForConditionalGeneration, images: SceneImages, output: Path, canvas_source: str, chunk: int = 4
) -> np.ndarray:
    """Visual tokens and detail stacks of every scene, neither projected nor told their place.

    Returns:
        (scenes, 1 + K, T, C) float16, kept in a file.
    """
    config = model.config
    if output.exists():
        return np.load(output, mmap_mode="r")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".partial")
    stacks = config.num_detail_stacks if config.has_details else 0
    shape = (len(images), 1 + stacks, config.image_seq_length, config.vision_feature_size)
    features = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
    projector, model.model.multi_modal_projector = model.model.multi_modal_projector, nn.Identity()
    places, model.config.visual_position_embeddings = model.config.visual_position_embeddings, False
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(images), chunk):
            views = to_pixels(images.views[start : start + chunk])
            pixels = views.flatten(1)
            if config.has_details:
                if canvas_source == "image":
                    canvases = to_pixels(images.canvases[start : start + chunk])
                else:
                    side = config.canvas_scale * config.image_size
                    canvases = F.interpolate(views, size=(side, side), mode="bilinear", align_corners=False)
                windows = np.stack([cut_windows(canvas, config.windows) for canvas in canvases.numpy()])
                pixels = torch.cat([pixels, torch.from_numpy(windows)], dim=1)
            outputs = model.model.get_image_features(pixels, return_dict=True)
            tokens = [torch.stack(outputs.pooler_output)]
            tokens += [torch.stack(stack) for stack in outputs.deepstack_features or []]
            features[start : start + chunk] = torch.stack(tokens, dim=1).half().numpy()
    model.model.multi_modal_projector = projector
    model.config.visual_position_embeddings = places
    features.flush()
    partial.rename(output)
    return np.load(output, mmap_mode="r")


def project(model: MFRSVLMForConditionalGeneration, features: torch.Tensor) -> MFRSVLMImageFeatures:
    """Cached features (n, 1 + K, T, C) to what `get_image_features` returns, with gradients into the projector."""
    projected = model.model.multi_modal_projector(features)
    details = [list(stack) for stack in projected[:, 1:].unbind(1)] if features.shape[1] > 1 else None
    visual = projected[:, 0]
    if model.config.visual_position_embeddings:
        visual = visual + model.model.visual_position_embedding.weight
    return MFRSVLMImageFeatures(pooler_output=list(visual), deepstack_features=details)


@torch.no_grad()
def start_places(model: MFRSVLMForConditionalGeneration, features: np.ndarray) -> None:
    """Starts position embeddings, if there are any, from sines and cosines of row and column as large as visual tokens."""
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
    """Starts the projector from whitened features.

    A few directions of an encoder's features, such as brightness, carry nearly all of their variance, and small objects
    next to none: from a random projector, a decoder first learns what is large. The first layer is a random rotation of
    features with unit covariance; a hundredth of the mean variance is added to each direction, to leave noise alone.

    Args:
        features: (scenes, 1 + K, T, C), see `encode_scenes`; every tenth scene is read.
    """
    states = torch.from_numpy(np.array(features[::10])).flatten(0, -2).float()  # (tokens, C)
    mean, (variances, directions) = states.mean(0), torch.linalg.eigh(torch.cov(states.T))
    whitening = directions * (variances + 0.01 * variances.mean()).rsqrt() @ directions.T
    first, second = model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2
    generator = torch.Generator().manual_seed(seed)
    first.weight.copy_(torch.randn(first.weight.shape, generator=generator) * first.in_features**-0.5 @ whitening)
    first.bias.copy_(-first.weight @ mean)
    second.weight.copy_(torch.randn(second.weight.shape, generator=generator) * model.config.text_config.initializer_range)


def short_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over a few hundred tokens, all (B, H, S, d), in the precision of the values.

    Half the time of `scaled_dot_product_attention`, whose backward pass in bfloat16 is slow on CPUs.
    """
    batch, heads = query.shape[:2]
    with torch.autocast("cpu", enabled=False):  # it takes softmax in float32
        bias = torch.zeros_like(attention_mask, dtype=value.dtype).masked_fill(~attention_mask, -torch.inf)
        bias = bias.expand(-1, heads, -1, -1).flatten(0, 1)  # (B * H, S, S)
        query, key, value = (states.to(value.dtype).flatten(0, 1) for states in (query, key, value))
        weights = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scaling).softmax(-1)
        states = torch.bmm(weights, value)
    return states.unflatten(0, (batch, heads)).transpose(1, 2), None


AttentionInterface.register("short", short_attention)


@dataclass
class Branch:
    """A question and its answer as ids, without what all prompts share; nouns are (last token, index of the kind)."""

    question: Question
    prompt: list[int]
    answer: list[int]
    nouns: list[tuple[int, int]] = field(default_factory=list)


class Prompts:
    """Turns questions into ids exactly as the processor does, cached by text."""

    def __init__(self, processor: MFRSVLMProcessor) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        rows = [self._prompt_ids(text) for text in ("What?", "How many")]
        same = [a == b for a, b in zip(*rows, strict=False)]
        shared = rows[0][: same.index(False)]
        # The image is one placeholder until the processor widens it.
        where = shared.index(processor.image_token_id)
        tokens = processor.image_processor.num_image_tokens
        self.shared_length = len(shared)
        self.prefix = [*shared[:where], *[processor.image_token_id] * tokens, *shared[where + 1 :]]
        self.prompts: dict[str, list[int]] = {}
        self.nouns: dict[str, list[tuple[int, int]]] = {}
        self.answers: dict[str, list[int]] = {}

    def _prompt(self, text: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def _encode(self, prompt: str, **kwargs: Any) -> Any:
        """Tokenized, with one `<s>`, whether or not the template wrote it."""
        written = prompt.startswith(self.tokenizer.bos_token)
        return self.tokenizer(prompt, add_special_tokens=not written, **kwargs)

    def _prompt_ids(self, text: str) -> list[int]:
        return self._encode(self._prompt(text)).input_ids

    def _find_nouns(self, text: str) -> list[tuple[int, int]]:
        prompt = self._prompt(text)
        ends = [end for _, end in self._encode(prompt, return_offsets_mapping=True).offset_mapping]
        found = NOUN.finditer(prompt, prompt.index(text))
        at = [(next(i for i, end in enumerate(ends) if end >= noun.end()), NOUNS[noun.group()]) for noun in found]
        return [(token - self.shared_length, kind) for token, kind in at]

    def branch(self, question: Question) -> Branch:
        if question.text not in self.prompts:
            self.prompts[question.text] = self._prompt_ids(question.text)[self.shared_length :]
            self.nouns[question.text] = self._find_nouns(question.text)
        if question.answer not in self.answers:
            ids = self.tokenizer(f" {question.answer}", add_special_tokens=False).input_ids
            self.answers[question.answer] = [*ids, self.tokenizer.eos_token_id]
        return Branch(question, self.prompts[question.text], self.answers[question.answer], self.nouns[question.text])


def pack(branches: list[list[Branch]], prefix: list[int], pad: int) -> dict[str, torch.Tensor]:
    """Packs the branches of each sample behind the shared prefix.

    Returns:
        `input_ids` (B, S), `position_ids` (B, S), `attention_mask` (B, 1, S, S) bool, `labels` (B, S) and `weights`
        (B, S), both shifted: they belong to the position that predicts.
    """
    length = max(len(prefix) + sum(len(b.prompt) + len(b.answer) for b in row) for row in branches)
    length += -length % 16
    ids = np.full((len(branches), length), pad)
    positions = np.zeros((len(branches), length), dtype=np.int64)
    labels = np.full((len(branches), length), -100)
    weights = np.zeros((len(branches), length), dtype=np.float32)
    segments = np.full((len(branches), length), -1)
    start = len(prefix)
    for sample, row in enumerate(branches):
        ids[sample, :start], segments[sample, :start], positions[sample, :start] = prefix, 0, np.arange(start)
        at = start
        for number, branch in enumerate(row, start=1):
            text = [*branch.prompt, *branch.answer]
            end = at + len(text)
            ids[sample, at:end], segments[sample, at:end] = text, number
            positions[sample, at:end] = np.arange(start, start + len(text))
            first = at + len(branch.prompt) - 1
            labels[sample, first : end - 1] = branch.answer
            weights[sample, first : end - 1] = ANSWER_WEIGHT.get(branch.question.task, 1.0) / len(branch.answer)
            at = end
    segments_ = torch.from_numpy(segments)
    same = segments_[:, :, None] == segments_[:, None, :]
    mask = (same | (segments_ == 0)[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(positions),
        "attention_mask": mask[:, None],
        "labels": torch.from_numpy(labels),
        "weights": torch.from_numpy(weights),
    }


def find_nouns(branches: list[list[Branch]], prefix: int) -> torch.Tensor:
    """(n, 3): row of the batch, position and index of the kind of every noun in packed branches."""
    found = []
    for sample, row in enumerate(branches):
        at = prefix
        for branch in row:
            found += [(sample, at + token, kind) for token, kind in branch.nouns]
            at += len(branch.prompt) + len(branch.answer)
    return torch.tensor(found)


def packed_logits(
    model: MFRSVLMForConditionalGeneration, batch: dict[str, torch.Tensor], features: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (answer tokens, vocabulary), labels and weights (answer tokens,) of the positions that predict an answer."""
    outputs = model.model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=batch["attention_mask"],
        mm_encoder_outputs={"image": project(model, features)},
        use_cache=False,
    )
    asked = batch["labels"] != -100
    logits = model.lm_head(outputs.last_hidden_state[asked])
    logits[:, model.config.image_token_id] = MASKED_SCORE  # as in the model's own forward
    return logits, batch["labels"][asked], batch["weights"][asked]


def train_decoder(
    model: MFRSVLMForConditionalGeneration,
    prompts: Prompts,
    scenes: Sequence[Scene],
    features: np.ndarray,
    steps: int,
    batch: int = 24,
    peak: float = 1.5e-3,
    seed: int = 0,
    rounds: int = 4,
    mix: dict[str, int] = MIX,
) -> dict[str, float]:
    """Trains everything but the vision tower, guided by what is known of the scenes. Returns seconds and decoder tokens.

    The decoder computes in bfloat16; weights, and losses, stay in float32. Matrices between hidden states are trained by
    Muon, which needs half the steps of AdamW here; embeddings, gains and heads by AdamW.

    Args:
        features: of the same scenes, see `encode_scenes`.
        steps: optimizer steps, on one cosine cycle with a warm-up of 3 %.
        batch: scenes a step.
        peak: learning rate of AdamW.
        rounds: different sets of questions prepared for each scene.
        mix: how often each task is asked of a scene.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tasks = [task for task, times in mix.items() for _ in range(times)]
    pool = [[[prompts.branch(q) for q in ask(scene, tasks, seed=r)] for r in range(rounds)] for scene in scenes]
    hidden = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "vision_tower" not in name and "stage_projections" not in name
        if parameter.requires_grad and parameter.ndim == 2 and not any(part in name for part in ("embed", "lm_head")):
            hidden.append(parameter)
    guidance = Guidance(model, scenes, prompts.prefix.index(prompts.processor.image_token_id), len(prompts.prefix))
    trained = [parameter for parameter in [*model.parameters(), *guidance.parameters()] if parameter.requires_grad]
    known = {id(parameter) for parameter in hidden}
    tables = [parameter for parameter in trained if parameter.ndim > 1 and id(parameter) not in known]
    rest = [parameter for parameter in trained if parameter.ndim <= 1]
    optimizers = [
        torch.optim.AdamW([{"params": tables, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], lr=peak),
        torch.optim.Muon(hidden, lr=MUON_PEAK * peak, weight_decay=0.05 / MUON_PEAK, adjust_lr_fn="match_rms_adamw"),
    ]
    peaks = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    model.train()
    usual_attention = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": "short"})
    start, tokens, running = time.perf_counter(), 0, dict.fromkeys([*mix, *GUIDANCE_WEIGHT], 0.0)
    order = np.empty(0, dtype=int)
    for step in range(steps):
        if len(order) < batch:
            order = np.concatenate([order, rng.permutation(len(scenes))])
        chosen, order = np.sort(order[:batch]), order[batch:]
        rows = [pool[index][int(rng.integers(rounds))] for index in chosen]
        packed = pack(rows, prompts.prefix, prompts.tokenizer.pad_token_id)
        states = torch.from_numpy(np.array(features[chosen])).float()
        share = min((step + 1) / (0.03 * steps + 1), 0.5 * (1 + np.cos(np.pi * step / steps)) + 0.01)
        for group, most in peaks:
            group["lr"] = most * share
        with torch.autocast("cpu", torch.bfloat16):
            logits, labels, weights = packed_logits(model, packed, states)
        each = F.cross_entropy(logits.float(), labels, reduction="none")
        loss = (each * weights).sum() / weights.sum()
        guided = guidance(chosen, find_nouns(rows, len(prompts.prefix)))
        loss = loss + sum(GUIDANCE_WEIGHT[name] * value for name, value in guided.items())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        tokens += packed["input_ids"].numel()
        names = [b.question.task for row in rows for b in row for _ in b.answer]
        for task in mix:
            values = [value for value, name in zip(each.tolist(), names, strict=True) if name == task]
            running[task] += 0.05 * (sum(values) / max(len(values), 1) - running[task])
        for name, value in guided.items():
            running[name] += 0.05 * (value.item() - running[name])
        if (step + 1) % 50 == 0:
            line = {"step": step + 1, "seconds": round(time.perf_counter() - start)}
            print(json.dumps(line | {task: round(value, 3) for task, value in running.items()}), flush=True)
    guidance.stop()
    model.eval()
    model.set_attn_implementation({"text_config": usual_attention})
    return {"seconds": time.perf_counter() - start, "decoder_tokens": tokens}


@torch.inference_mode()
def greedy_exact(
    model: MFRSVLMForConditionalGeneration,
    prompts: Prompts,
    scenes: Sequence[Scene],
    features: np.ndarray,
    seed: int = 0,
    batch: int = 25,
    tasks: Sequence[str] = tuple(TASKS),
) -> dict[str, list[float]]:
    """1 or 0 for every question of every scene: whether greedy decoding gives the exact answer.

    It does if, and only if, every token of the true answer is the most likely one after those before it, so one packed
    pass over questions with their true answers settles it. For boxes this is a strict measure; see `generate_answers`.
    """
    model.eval()
    scores: dict[str, list[float]] = {task: [] for task in tasks}
    for start in range(0, len(scenes), batch):
        rows = [[prompts.branch(q) for q in ask(scene, tasks, seed)] for scene in scenes[start : start + batch]]
        packed = pack(rows, prompts.prefix, prompts.tokenizer.pad_token_id)
        states = torch.from_numpy(np.array(features[start : start + batch])).float()
        logits, labels, _ = packed_logits(model, packed, states)
        right = (logits.argmax(-1) == labels).split([len(b.answer) for row in rows for b in row])
        for branch, each in zip((b for row in rows for b in row), right, strict=True):
            scores[branch.question.task].append(float(each.all()))
    return scores


@torch.inference_mode()
def generate_answers(
    model: MFRSVLMForConditionalGeneration,
    prompts: Prompts,
    questions: Sequence[tuple[int, Question]],
    features: np.ndarray,
    batch: int = 50,
) -> list[str]:
    """What `generate` says, greedily, to each (scene, question); scenes are rows of `features`."""
    model.eval()
    answers: list[str] = []
    for start in range(0, len(questions), batch):
        part = questions[start : start + batch]
        rows = [prompts.prefix + prompts.branch(question).prompt for _, question in part]
        inputs = prompts.tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        states = torch.from_numpy(np.stack([features[index] for index, _ in part])).float()
        tokens = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            mm_encoder_outputs={"image": project(model, states)},
            max_new_tokens=48,
            do_sample=False,
        )
        answers += prompts.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]
