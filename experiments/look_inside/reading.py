"""What questions about a scene leave in a model: attention to the visual tokens, and hidden states.

Letters in shapes, here and in the other files: Q questions about a scene, B samples, S positions, T visual tokens, L decoder
layers, d decoder channels, n scenes, K detail stacks, J injection layers.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...files.model_folder import load_model
from ...modeling_mfrsvlm import MFRSVLMForConditionalGeneration
from ...processing_mfrsvlm import MFRSVLMProcessor
from ...scenes import Question, Scene
from ...scenes.questions import PLURALS, possible_kinds


# Task name of the questions that are asked for the probes only, one for every kind that a scene could hold.
COUNT_EACH = "count each"


@dataclass
class Reading:
    """What questions about one scene leave in a model.

    Attributes:
        first_mass: (Q, L), attention mass on visual tokens at the position that predicts the first token of the answer.
        answer_mass: (Q, L), its mean over the positions that predict the tokens of the true answer, the end included.
        uniform_mass: (Q,), what `first_mass` would be if a position attended to all that it sees alike.
        visual_states: (L + 1, T, d), hidden states of the visual tokens (of the first question; the others' are the same).
            State i enters decoder layer i, before an injection there, which shows in state i + 1; the last is normalized.
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
    return load_model(folder, dtype=torch.float32, attn_implementation="eager")


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
