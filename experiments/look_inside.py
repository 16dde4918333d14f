"""Looks inside two trained models, one with injection and one without, to see whether injection does what it is for.

Three measurements on synthetic scenes of the test split:

1. *Attention mass*: how much of its attention an answering position gives to the visual tokens, layer by layer.
2. *Visual forgetting*: what a linear probe still reads from the hidden states, layer by layer. From a visual token: how
   many objects have their centre in its cell. From the last position of "How many ... are there?": that number. Probes are
   ridge regressions in closed form, fitted on scenes of the validation split.
3. *Routing*: how the routers weigh the detail stacks, for scenes of small and of large objects. Of gated injection the
   weights depend on the image and not on the question: routers read the visual positions and the details only, and in a
   causal decoder a visual position sees nothing of a question that comes after it. So images are compared, not questions.

    python -m mfrsvlm.experiments.look_inside WITH_INJECTION_DIR [WITHOUT_INJECTION_DIR] --output docs/inside --scenes 200

With one folder, the second model is the first with its injection switched off: what it reads then is what injection adds
to this model, not how well a model does that was trained without. It writes `inside.json`, all numbers with 95 % intervals
over scenes, and `inside.png`.

Letters in shapes: Q questions about a scene, B samples, S positions, T visual tokens, L decoder layers, d decoder channels,
n scenes, K detail stacks, J injection layers.
"""

import argparse
import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from mfrsvlm.configuration_mfrsvlm import MFRSVLMConfig
from mfrsvlm.experiments.dataset import OBJECT_PIXELS, SCENE_SIZE, plan
from mfrsvlm.modeling_mfrsvlm import MFRSVLMForConditionalGeneration
from mfrsvlm.processing_mfrsvlm import MFRSVLMProcessor
from mfrsvlm.scenes import KINDS, Question, Scene, ask, draw, plan_scene, scene_seed
from mfrsvlm.scenes.questions import PLURALS, possible_kinds


# Lengths of the objects in the two groups of scenes whose routing is compared, pixels of a scene of 512.
SMALL_OBJECTS, LARGE_OBJECTS = (8.0, 12.0), (16.0, 32.0)
# Strengths of the ridge, relative to the mean variance of a feature (1, as features are standardised).
PENALTIES = np.logspace(-4, 2, 13)
# Share of the scenes that choose the strength.
HELD_OUT = 0.2
RESAMPLES = 1000
# Task name of the questions that are asked for the probes only, one for every kind that a scene could hold.
COUNT_EACH = "count each"


# Estimates


@dataclass
class Estimate:
    """A number (or an array of them) and its bootstrap over scenes.

    Attributes:
        value: (...).
        resampled: (RESAMPLES, ...). All estimates resample the same scenes in the same way, so that the difference of two
            models' estimates is a paired one.
    """

    value: np.ndarray
    resampled: np.ndarray

    def __sub__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.value - other.value, self.resampled - other.resampled)

    def __rsub__(self, number: float) -> "Estimate":
        return Estimate(number - self.value, number - self.resampled)

    def numbers(self) -> dict[str, Any]:
        """The value and its 95 % interval, ready for JSON."""
        low, high = np.quantile(self.resampled, [0.025, 0.975], axis=0)
        return {"mean": self.value, "low": low, "high": high}


def ratio(numerators: np.ndarray, denominators: np.ndarray) -> Estimate:
    """Ratio of two sums over scenes, (n, ...) each; not a number where the denominators are all zero."""
    num_scenes = len(numerators)
    chosen = np.random.default_rng(0).multinomial(num_scenes, np.full(num_scenes, 1 / num_scenes), RESAMPLES)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.where(denominators.any(0), numerators.sum(0) / denominators.sum(0), np.nan)
        resampled = np.tensordot(chosen, numerators, 1) / np.tensordot(chosen, denominators, 1)
    return Estimate(value, np.where(np.isfinite(resampled), resampled, value))


def sums_by_scene(values: np.ndarray, scene_of_row: np.ndarray, num_scenes: int) -> np.ndarray:
    """(rows, ...) to (n, ...)."""
    sums = np.zeros((num_scenes, *values.shape[1:]))
    np.add.at(sums, scene_of_row, values)
    return sums


# Reading a model


@dataclass
class Reading:
    """What questions about one scene leave in a model.

    Attributes:
        first_mass: (Q, L), attention mass on visual tokens at the position that predicts the first token of the answer.
        answer_mass: (Q, L), its mean over the positions that predict the tokens of the true answer, the end included.
        uniform_mass: (Q,), what `first_mass` would be if a position attended to all that it sees alike.
        visual_states: (L + 1, T, d), hidden states of the visual tokens (of the first question; the others' are the same).
            State i enters decoder layer i, before an injection there, which shows in state i + 1; the last is normalised.
        prompt_states: (Q, L + 1, d), hidden states at the last position of the prompts.
    """

    questions: list[Question]
    first_mass: np.ndarray
    answer_mass: np.ndarray
    uniform_mass: np.ndarray
    visual_states: np.ndarray
    prompt_states: np.ndarray


def load(folder: str | Path) -> tuple[MFRSVLMForConditionalGeneration, MFRSVLMProcessor]:
    """The model and processor of a Hub folder. Only eager attention tells what it attends to."""
    model = MFRSVLMForConditionalGeneration.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return model.eval(), MFRSVLMProcessor.from_pretrained(folder)


def switched_off(model: MFRSVLMForConditionalGeneration) -> MFRSVLMForConditionalGeneration:
    """The same weights without windows and injectors."""
    config = copy.deepcopy(model.config)
    config.window_sizes, config.injection_layers = [], []
    silenced = MFRSVLMForConditionalGeneration._from_config(config, attn_implementation="eager")
    silenced.load_state_dict({name: value for name, value in model.state_dict().items() if ".injectors." not in name})
    return silenced.eval()


def attention_mass(attention: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """Share of every position's attention that goes to visual positions, mean over heads.

    Args:
        attention: (B, heads, S, S), rows sum to one.
        visual: (B, S) bool.

    Returns:
        (B, S)
    """
    return (attention * visual[:, None, None]).sum(-1).mean(1)


def prompts_and_answers(processor: MFRSVLMProcessor, image: Image.Image, questions: Sequence[Question]) -> dict[str, Any]:
    """Inputs of questions about one image, each followed by its true answer.

    Prompts are padded on the left and answers on the right, so that all answers are predicted from one position on.

    Returns:
        `input_ids` and `attention_mask` (Q, S), `pixel_values` (1, L) of the one image; `first`, the last position
        of every prompt; `predicts` (Q, S) bool, the positions that predict an answer.
    """
    tokenizer = processor.tokenizer
    prompts = []
    for question in questions:
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        prompts.append(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    inputs = processor(images=[image] * len(prompts), text=prompts, padding=True, padding_side="left", return_tensors="pt")
    answers = [
        [*tokenizer(f" {question.answer}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        for question in questions
    ]
    lengths = torch.tensor([len(answer) for answer in answers])
    width = int(lengths.max())
    ids = torch.tensor([answer + [tokenizer.pad_token_id] * (width - len(answer)) for answer in answers])
    answered = torch.arange(width) < lengths[:, None]  # (Q, width)
    first = inputs["input_ids"].shape[1] - 1
    batch = {
        "input_ids": torch.cat([inputs["input_ids"], ids], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], answered.long()], dim=1),
        "first": first,
    }
    batch["predicts"] = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
    batch["predicts"][:, first : first + width] = answered
    batch["pixel_values"] = inputs["pixel_values"][:1]
    return batch


@torch.inference_mode()
def read(
    model: MFRSVLMForConditionalGeneration, processor: MFRSVLMProcessor, image: Image.Image, questions: Sequence[Question]
) -> Reading:
    """Asks a model about an image, with the true answers, and keeps what the measurements need."""
    batch = prompts_and_answers(processor, image, questions)
    # The global view comes first; a model that is switched off has no use for the windows behind it.
    features = model.get_image_features(batch["pixel_values"][:, : sum(model.config.packed_lengths)], return_dict=True)
    # Encoded once: every question sees the same image.
    features.pooler_output = features.pooler_output * len(questions)
    if features.deepstack_features is not None:
        features.deepstack_features = [stack * len(questions) for stack in features.deepstack_features]
    outputs = model.model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        mm_encoder_outputs={"image": features},
        use_cache=False,
        output_attentions=True,
        output_hidden_states=True,
    )
    visual, first, predicts = batch["input_ids"] == model.config.image_token_id, batch["first"], batch["predicts"]
    mass = torch.stack([attention_mass(layer, visual) for layer in outputs.attentions], dim=-1)  # (Q, S, L)
    states = torch.stack(outputs.hidden_states, dim=1)  # (Q, L + 1, S, d)
    return Reading(
        questions=list(questions),
        first_mass=mass[:, first].numpy(),
        answer_mass=((mass * predicts[..., None]).sum(1) / predicts.sum(1, keepdim=True)).numpy(),
        uniform_mass=(visual.sum(1) / batch["attention_mask"][:, : first + 1].sum(1)).numpy(),
        visual_states=states[0][:, visual[0]].numpy(),
        prompt_states=states[:, :, first].numpy(),
    )


def count_questions(scene: Scene) -> list[Question]:
    """How many there are of each kind in `possible_kinds`."""
    counts = scene.counts
    return [
        Question(COUNT_EACH, f"How many {PLURALS[kind]} are there?", str(counts[kind])) for kind in possible_kinds(scene)
    ]


# Attention mass


def measure_attention(readings: Sequence[Reading]) -> dict[str, Any]:
    """Attention mass on visual tokens: means over all questions of all scenes, by layer, and by task and layer.

    Returns:
        Estimates `first` and `answer` (L,) and `uniform` (), see `Reading`, and `by_task`, a mean of `first` (L,) for
        every task.
    """
    scene_of_row, tasks, rows = [], [], []
    for index, reading in enumerate(readings):
        for question, first, answer, uniform in zip(
            reading.questions, reading.first_mass, reading.answer_mass, reading.uniform_mass, strict=True
        ):
            if question.task != COUNT_EACH:
                scene_of_row.append(index)
                tasks.append(question.task)
                rows.append(np.concatenate([first, answer, [uniform]]))
    values = np.array(rows, dtype=np.float64)  # (questions, 2 L + 1)
    num_layers = values.shape[1] // 2

    def mean(columns: np.ndarray) -> Estimate:
        num_scenes, scenes = len(readings), np.array(scene_of_row)
        return ratio(sums_by_scene(columns, scenes, num_scenes), sums_by_scene(np.ones_like(columns), scenes, num_scenes))

    by_task = {task: values[[t == task for t in tasks], :num_layers].mean(0) for task in dict.fromkeys(tasks)}
    return {
        "first": mean(values[:, :num_layers]),
        "answer": mean(values[:, num_layers:-1]),
        "uniform": mean(values[:, -1]),
        "by_task": by_task,
    }


# Probes


class Ridge:
    """Ridge regression in closed form, with the strength left open until it predicts.

    Features are standardised and nothing is asked of the intercept, so that the scale of a layer's states, which grows
    with depth, plays no part.
    """

    def __init__(self, states: np.ndarray, targets: np.ndarray) -> None:
        """Fits (rows, d) to (rows, q)."""
        states = states.astype(np.float64)
        self.mean, self.scale, self.offset = states.mean(0), states.std(0) + 1e-6, targets.mean(0)
        states = (states - self.mean) / self.scale
        self.values, self.vectors = np.linalg.eigh(states.T @ states / len(states))
        self.products = self.vectors.T @ (states.T @ (targets - self.offset) / len(states))  # (d, q)

    def predict(self, states: np.ndarray, penalties: np.ndarray) -> np.ndarray:
        """(rows, d) and one strength for each target, (q,), to (rows, q)."""
        weights = self.vectors @ (self.products / (self.values[:, None] + penalties))
        return ((states - self.mean) / self.scale) @ weights + self.offset


def probe(states: np.ndarray, targets: np.ndarray, scene_of_row: np.ndarray, test_states: np.ndarray) -> np.ndarray:
    """Predicts targets from new states with a ridge whose strength, one for each target, the last scenes choose.

    Args:
        states: (rows, d).
        targets: (rows, q).
        scene_of_row: (rows,). Whole scenes are held out, because rows of one scene tell of each other.
        test_states: (test rows, d).

    Returns:
        (test rows, q)
    """
    targets = targets.astype(np.float64)
    held_out = scene_of_row >= round((1 - HELD_OUT) * (scene_of_row.max() + 1))
    trial = Ridge(states[~held_out], targets[~held_out])
    errors = [
        np.square(trial.predict(states[held_out], np.full(targets.shape[1], penalty)) - targets[held_out]).sum(0)
        for penalty in PENALTIES
    ]
    best = PENALTIES[np.argmin(errors, axis=0)]
    return Ridge(states, targets).predict(test_states, best)


def r_squared(predicted: np.ndarray, targets: np.ndarray, scene_of_row: np.ndarray) -> Estimate:
    """1 - squared error / squared deviation from the mean; (rows, ...) and (rows, ...) to (...).

    Zero is what the mean alone gets; not a number where targets do not vary.
    """
    num_scenes = int(scene_of_row.max()) + 1
    errors = sums_by_scene(np.square(predicted - targets), scene_of_row, num_scenes)
    deviations = sums_by_scene(np.square(targets - targets.mean(0)), scene_of_row, num_scenes)
    return 1 - ratio(errors, deviations)


def auc(scores: np.ndarray, present: np.ndarray) -> float:
    """Chance that a row with the object scores above one without it, ties counted half; (rows,) and (rows,) bool."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # ties share their mean rank
    positive, negative = int(present.sum()), int((~present).sum())
    if not positive or not negative:
        return math.nan
    return float((ranks[present].sum() - positive * (positive + 1) / 2) / (positive * negative))


# Which objects a column of the targets counts.
OBJECTS: dict[str, Callable[[Any], bool]] = {
    "all": lambda item: True,
    "small": lambda item: item.length < SMALL_OBJECTS[1],
    **{kind: lambda item, kind=kind: item.kind == kind for kind in KINDS},
}


def cell_counts(scene: Scene, side: int) -> np.ndarray:
    """How many objects have their centre in each of side x side cells, row by row; (side * side, len(OBJECTS))."""
    counts = np.zeros((side, side, len(OBJECTS)))
    for item in scene.objects:
        row, column = (min(int(place / scene.size * side), side - 1) for place in (item.y, item.x))
        counts[row, column] += [wanted(item) for wanted in OBJECTS.values()]
    return counts.reshape(side * side, -1)


def probe_tokens(
    readings: Sequence[Reading], scenes: Sequence[Scene], test_readings: Sequence[Reading], test_scenes: Sequence[Scene]
) -> dict[str, Any]:
    """What the visual tokens still tell about their own cells.

    Returns:
        `count`: an estimate of R² (L + 1, len(OBJECTS)) for the number of objects in a token's cell, and `presence_auc`,
        the AUC (L + 1, len(OBJECTS)) for whether there is any.
    """
    layers, tokens = readings[0].visual_states.shape[:2]
    side = math.isqrt(tokens)
    counts, test_counts = (np.concatenate([cell_counts(s, side) for s in group]) for group in (scenes, test_scenes))
    targets = np.concatenate([counts, counts > 0], axis=1)
    scene_of_row = np.repeat(np.arange(len(scenes)), tokens)
    predicted = np.stack(
        [
            probe(
                np.concatenate([reading.visual_states[layer] for reading in readings]),
                targets,
                scene_of_row,
                np.concatenate([reading.visual_states[layer] for reading in test_readings]),
            )
            for layer in range(layers)
        ],
        axis=1,
    )  # (test rows, L + 1, 2 * len(OBJECTS))
    number, presence = np.split(predicted, 2, axis=-1)
    true = np.broadcast_to(test_counts[:, None], number.shape)
    return {
        "count": r_squared(number, true, np.repeat(np.arange(len(test_scenes)), tokens)),
        "presence_auc": np.array(
            [
                [auc(presence[:, layer, column], test_counts[:, column] > 0) for column in range(len(OBJECTS))]
                for layer in range(layers)
            ]
        ),
    }


def probe_prompts(
    readings: Sequence[Reading], scenes: Sequence[Scene], test_readings: Sequence[Reading], test_scenes: Sequence[Scene]
) -> dict[str, Estimate]:
    """What the last position of "How many ... are there?" knows, whichever kind is asked for.

    Returns:
        `asked_count`: R² (L + 1,) for the number of the kind that the question asks for. Numbers are taken relative to the
        mean number of their kind, so that knowing the question is worth nothing. `any_count`: R² (L + 1, kinds) for the
        number of each kind, asked for or not.
    """

    def rows(readings: Sequence[Reading], scenes: Sequence[Scene]) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray]:
        states, counts, kinds, indices = [], [], [], []
        for index, (reading, scene) in enumerate(zip(readings, scenes, strict=True)):
            asked = [question.task == COUNT_EACH for question in reading.questions]
            states.append(reading.prompt_states[asked])
            kinds += possible_kinds(scene)
            counts += [list(scene.counts.values())] * sum(asked)
            indices += [index] * sum(asked)
        return np.concatenate(states), np.array(counts, dtype=np.float64), kinds, np.array(indices)

    states, counts, kinds, scene_of_row = rows(readings, scenes)
    test_states, test_counts, test_kinds, test_scene_of_row = rows(test_readings, test_scenes)
    usual = {kind: counts[[k == kind for k in kinds], i].mean() for i, kind in enumerate(KINDS) if kind in kinds}

    def with_asked(counts: np.ndarray, kinds: list[str]) -> np.ndarray:
        asked = [row[KINDS.index(kind)] - usual.get(kind, 0.0) for row, kind in zip(counts, kinds, strict=True)]
        return np.column_stack([asked, counts])

    targets, true = with_asked(counts, kinds), with_asked(test_counts, test_kinds)
    layers = range(states.shape[1])
    predicted = np.stack([probe(states[:, i], targets, scene_of_row, test_states[:, i]) for i in layers], axis=1)
    score = r_squared(predicted, np.broadcast_to(true[:, None], predicted.shape), test_scene_of_row)
    return {
        "asked_count": Estimate(score.value[:, 0], score.resampled[..., 0]),
        "any_count": Estimate(score.value[:, 1:], score.resampled[..., 1:]),
    }


# Routing


@contextmanager
def recorded_routers(model: MFRSVLMForConditionalGeneration) -> Iterator[list[list[np.ndarray]]]:
    """Yields a list for every injection layer that fills with its router's weights, (N, K, T) of each forward pass.

    With `"stack"` routing the last axis has length 1.
    """
    injectors = model.model.injectors
    records: list[list[np.ndarray]] = [[] for _ in injectors]

    def keep(record: list[np.ndarray]) -> Callable[..., None]:
        def hook(module: Any, args: Any, weights: torch.Tensor) -> None:
            by_token = model.config.routing == "token"
            # (K, N, 1, T) or (N, 1, K) to (N, K, T)
            weights = weights[:, :, 0].movedim(1, 0) if by_token else weights[:, 0, :, None]
            record.append(weights.detach().float().cpu().numpy())

        return hook

    handles = [
        injector.router.register_forward_hook(keep(record)) for injector, record in zip(injectors, records, strict=True)
    ]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def has_routers(config: MFRSVLMConfig) -> bool:
    return config.has_details and config.injection_type == "gated"


@torch.inference_mode()
def read_routers(model: MFRSVLMForConditionalGeneration, processor: MFRSVLMProcessor, scenes: Sequence[Scene]) -> np.ndarray:
    """Router weights of every scene, (J, n, K, T), or (J, n, K, 1) with `"stack"` routing; see `recorded_routers`."""
    with recorded_routers(model) as records:
        for scene in tqdm(scenes, desc="routers", leave=False):
            inputs = prompts_and_answers(processor, draw(scene), count_questions(scene)[:1])
            for name in ("first", "predicts"):
                del inputs[name]
            model.model(**inputs, use_cache=False)
    return np.stack([np.concatenate(record) for record in records])


def relative_entropy(weights: np.ndarray, axis: int) -> np.ndarray:
    """Entropy along an axis as a share of the largest possible: 1 weighs all stacks alike, 0 picks one."""
    entropy = -(weights * np.log(np.clip(weights, 1e-30, None))).sum(axis)
    return entropy / math.log(max(weights.shape[axis], 2))


def summarise_router(weights: np.ndarray, config: MFRSVLMConfig) -> dict[str, Any]:
    """Mean weights of one injection layer.

    Args:
        weights: (n, K, T) or (n, K, 1).
        config: says what the stacks are. Their order is scale, depth, row phase, column phase.

    Returns:
        `mean` (scales, depths, row phases, column phases), its sums `by_scale`, `by_depth`, `by_scale_and_depth` and
        `by_phase` (rows, columns); `deviation` of the K weights over scenes; `entropy`, the mean of each choice's own, and
        `entropy_of_mean`. Both are relative to uniform. Where the first is lower, the router chooses differently from
        image to image (or from token to token).
    """
    factor = config.canvas_scale
    shape = (len(config.window_sizes), len(config.detail_feature_layers), factor, factor)
    by_scene = weights.mean(-1, dtype=np.float64)  # (n, K)
    mean = by_scene.mean(0)
    grid = mean.reshape(shape)
    return {
        "mean": grid,
        "deviation": by_scene.std(0).reshape(shape),
        "by_scale": grid.sum((1, 2, 3)),
        "by_depth": grid.sum((0, 2, 3)),
        "by_scale_and_depth": grid.sum((2, 3)),
        "by_phase": grid.sum((0, 1)),
        "entropy": relative_entropy(weights, 1).mean(),
        "entropy_of_mean": relative_entropy(mean, 0),
    }


def routing_shift(first: np.ndarray, second: np.ndarray, shuffles: int = 200) -> dict[str, float]:
    """How differently two groups of scenes are routed by one layer, (n, K, T) and (m, K, T).

    Returns:
        `distance`: the share of weight (0 to 1) that moves to other stacks between the groups' means, and `by_chance`:
        the 95 % quantile of the same with the groups mixed at random.
    """
    both = np.concatenate([first.mean(-1), second.mean(-1)])
    rng = np.random.default_rng(0)

    def distance(order: np.ndarray) -> float:
        one, other = both[order[: len(first)]].mean(0), both[order[len(first) :]].mean(0)
        return float(np.abs(one - other).sum() / 2)

    by_chance = [distance(rng.permutation(len(both))) for _ in range(shuffles)]
    return {"distance": distance(np.arange(len(both))), "by_chance": float(np.quantile(by_chance, 0.95))}


def measure_routing(
    model: MFRSVLMForConditionalGeneration, processor: MFRSVLMProcessor, num_scenes: int
) -> dict[str, Any] | None:
    """Routing of test scenes with small and with large objects, layer by layer; `None` for a model without routers."""
    config = model.config
    if not has_routers(config):
        return None
    seeds = [scene_seed("test", index) for index in range(num_scenes)]
    groups = {
        name: read_routers(model, processor, [plan_scene(seed, SCENE_SIZE, pixels) for seed in seeds])
        for name, pixels in (("small", SMALL_OBJECTS), ("large", LARGE_OBJECTS))
    }
    return {
        "injection_layers": config.injection_layers,
        "window_sizes": config.window_sizes,
        "detail_feature_layers": config.detail_feature_layers,
        "routing": config.routing,
        "object_pixels": {"small": SMALL_OBJECTS, "large": LARGE_OBJECTS},
        "layers": [
            {
                "small": summarise_router(small, config),
                "large": summarise_router(large, config),
                "small_to_large": routing_shift(small, large),
            }
            for small, large in zip(groups["small"], groups["large"], strict=True)
        ],
    }


# The command


def look_inside(
    with_injection: str | Path, without_injection: str | Path | None, output: Path, num_scenes: int, num_probe_scenes: int
) -> dict[str, Any]:
    """Makes all measurements and writes `inside.json` and `inside.png`; returns the content of the former.

    Without a second folder, the same model is measured with its injection switched off.

    Raises:
        ValueError: too few scenes, or models whose layers cannot be compared.
    """
    if num_scenes < 2 or num_probe_scenes < 4:
        raise ValueError(f"--scenes {num_scenes} must be at least 2, and --probe-scenes {num_probe_scenes} at least 4.")
    model, processor = load(with_injection)
    other = (switched_off(model), processor) if without_injection is None else load(without_injection)
    models = {"with": (model, processor), "without": other}
    depths = [model.config.text_config.num_hidden_layers for model, _ in models.values()]
    if depths[0] != depths[1]:
        raise ValueError(f"The decoders have {depths[0]} and {depths[1]} layers, which cannot be compared one by one.")

    scenes = [plan("test", index) for index in range(num_scenes)]
    probe_scenes = [plan("validation", index) for index in range(num_probe_scenes)]
    readings: dict[str, list[Reading]] = {name: [] for name in models}
    probe_readings: dict[str, list[Reading]] = {name: [] for name in models}
    for split, kept, questions_of in (
        (scenes, readings, lambda scene: [*ask(scene), *count_questions(scene)]),
        (probe_scenes, probe_readings, count_questions),
    ):
        for scene in tqdm(split, desc="scenes", leave=False):
            image = draw(scene)
            for name, (model, processor) in models.items():
                kept[name].append(read(model, processor, image, questions_of(scene)))

    measured = {
        name: {
            "injection_layers": model.config.injection_layers,
            "attention": measure_attention(readings[name]),
            "visual_tokens": probe_tokens(probe_readings[name], probe_scenes, readings[name], scenes),
            "last_prompt_position": probe_prompts(probe_readings[name], probe_scenes, readings[name], scenes),
        }
        for name, (model, _) in models.items()
    }
    differences = {
        f"{group}: {name}": measured["with"][group][name] - measured["without"][group][name]
        for group, name in (
            ("attention", "first"),
            ("attention", "answer"),
            ("visual_tokens", "count"),
            ("last_prompt_position", "asked_count"),
            ("last_prompt_position", "any_count"),
        )
    }
    result = {
        "scenes": {
            "test": num_scenes,
            "validation (probes)": num_probe_scenes,
            "size": SCENE_SIZE,
            "object_pixels": OBJECT_PIXELS,
        },
        "columns of count and presence_auc": list(OBJECTS),
        "columns of any_count": list(KINDS),
        **measured,
        "with minus without": differences,
        "routing": measure_routing(*models["with"], num_scenes),
    }
    result = plain(result)
    output.mkdir(parents=True, exist_ok=True)
    (output / "inside.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    plot(result, output / "inside.png")
    return result


def plain(value: Any) -> Any:
    """Estimates, arrays and numbers as JSON has them: rounded, and null where there is no number."""
    if isinstance(value, Estimate):
        value = value.numbers()
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, (float, np.floating)):
        return round(float(value), 5) if math.isfinite(value) else None
    return value


def plot(result: dict[str, Any], path: Path) -> None:
    """Three panels: attention mass, probes, and routing of small- and large-object scenes."""
    # Only the figure needs it, not the numbers.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = {"with": "#0b6e99", "without": "#c8553d"}
    figure, (attention, probes, routing) = plt.subplots(1, 3, figsize=(12, 4.6), dpi=100, width_ratios=[1, 1, 1.15])

    def line(axes: Any, numbers: dict[str, Any], column: int | None, label: str, **style: Any) -> None:
        rows = {name: np.array(numbers[name], dtype=np.float64) for name in ("mean", "low", "high")}
        if column is not None:
            rows = {name: values[:, column] for name, values in rows.items()}
        layers = np.arange(len(rows["mean"]))
        axes.plot(layers, rows["mean"], label=label, marker="o", markersize=4, **style)
        axes.fill_between(layers, rows["low"], rows["high"], color=style["color"], alpha=0.15, linewidth=0)

    for name, colour in colours.items():
        measured = result[name]
        line(attention, measured["attention"]["first"], None, f"{name} injection", color=colour)
        everything = result["columns of count and presence_auc"].index("all")
        line(probes, measured["visual_tokens"]["count"], everything, f"visual token, {name}", color=colour)
        asked = measured["last_prompt_position"]["asked_count"]
        line(probes, asked, None, f"last prompt token, {name}", color=colour, linestyle="--")
    uniform = result["with"]["attention"]["uniform"]["mean"]
    attention.axhline(uniform, color="grey", linewidth=1, linestyle=":", label="all positions alike")
    injected = result["with"]["injection_layers"]
    attention.plot(injected, [0] * len(injected), "^", color=colours["with"], clip_on=False, label="injected before")
    attention.set(title="Attention mass on visual tokens\nwhen the answer begins", xlabel="decoder layer", ylabel="mass")
    attention.set_ylim(bottom=0)

    probes.axhline(0, color="grey", linewidth=1, linestyle=":")
    # A probe that overfits may fall far below zero, which says no more than zero does.
    bottom, top = probes.get_ylim()
    probes.set_ylim(max(bottom, -0.25), max(top, 0.1))
    probes.set(
        title="What a linear probe reads\n(objects in the cell; number asked for)", xlabel="hidden state", ylabel="R²"
    )

    if result["routing"] is None:
        routing.axis("off")
        routing.text(0.5, 0.5, "no routers", ha="center", va="center")
    else:
        plot_routing(routing, result["routing"], plt.get_cmap("viridis"))
    for axes in (attention, probes):
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in (attention, probes, routing):
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def plot_routing(axes: Any, routing: dict[str, Any], colour_map: Any) -> None:
    """A bar of small- and one of large-object scenes for every injection layer, cut into scales and depths."""
    sizes, depths = routing["window_sizes"], routing["detail_feature_layers"]
    parts = [(s, d) for s in range(len(sizes)) for d in range(len(depths))]
    for index, layer in enumerate(routing["layers"]):
        for shift, group in ((-0.21, "small"), (0.21, "large")):
            shares = layer[group]["by_scale_and_depth"]
            bottom = 0.0
            for number, (s, d) in enumerate(parts):
                label = f"window {sizes[s]}, depth {depths[d]}" if index == 0 and group == "small" else None
                colour = colour_map(0.15 + 0.75 * number / max(len(parts) - 1, 1))
                axes.bar(index + shift, shares[s][d], 0.38, bottom, color=colour, label=label)
                bottom += shares[s][d]
            axes.text(index + shift, 1.01, f"{layer[group]['entropy']:.2f}", ha="center", va="bottom", fontsize=8)
            axes.text(index + shift, 0.01, group, ha="center", va="bottom", fontsize=8, rotation=90, color="white")
    axes.set_xticks(range(len(routing["layers"])), [str(layer) for layer in routing["injection_layers"]])
    axes.set_ylim(0, 1.08)
    axes.set(title="Router weights, small and large objects\n(above: entropy, 1 = uniform)", xlabel="injection before layer")
    axes.set_ylabel("share")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mfrsvlm.experiments.look_inside", description=__doc__.splitlines()[0])
    parser.add_argument("with_injection", metavar="WITH_INJECTION_DIR", help="Hub folder of the model with injection")
    parser.add_argument(
        "without_injection",
        metavar="WITHOUT_INJECTION_DIR",
        nargs="?",
        help="and of the one without; else the first, switched off",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for inside.json and inside.png")
    parser.add_argument("--scenes", type=int, default=200, help="scenes of the test split")
    parser.add_argument("--probe-scenes", type=int, default=400, help="scenes of the validation split, to fit the probes on")
    args = parser.parse_args(arguments)
    look_inside(args.with_injection, args.without_injection, args.output, args.scenes, args.probe_scenes)


if __name__ == "__main__":
    main()
