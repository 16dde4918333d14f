"""Answers many questions with any image-text-to-text model of transformers, encoding every image once.

The images of a chunk of questions go through the vision tower together; then the decoder reads what all questions about the
same images begin with, visual tokens above all, once, and its cache is what every question goes on from. A model that cannot
take features in place of pixels, or answers otherwise then, is asked the slow way and the log says so.
"""

import copy
import hashlib
import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from PIL import Image
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.utils import ModelOutput

from ..files.model_folder import load_model


logger = logging.getLogger(__name__)

# First words that count as yes and no, as a model may write them.
YES, NO = ("yes", "Yes", " yes", " Yes"), ("no", "No", " no", " No")


@dataclass(frozen=True)
class Prompt:
    """What to ask, and which group of images it is about, by its index (`None`: no image at all)."""

    text: str
    group: int | None = None


@dataclass(frozen=True)
class Answer:
    """What was generated.

    Attributes:
        text: without special tokens and the space around it.
        yes_probability: P(yes) against P(no) as its first word; `None` where the tokenizer begins both alike.
        cut_off: whether it was not at its end when the longest length was reached.
    """

    text: str
    yes_probability: float | None = None
    cut_off: bool = False


def load(
    name: str,
    revision: str | None = None,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Model and processor of a folder or Hub id, see `mfrsvlm.files.model_folder.load_model`.

    Raises:
        ValueError: the folder holds no model that can be loaded, or has no chat template.
    """
    model, processor = load_model(name, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
    if not getattr(processor, "chat_template", None):
        raise ValueError(
            f"{name} has no chat template, so it is not known how a question is put to it. Add one to its folder."
        )
    return model.to(device).eval(), processor


def fingerprint(model: torch.nn.Module) -> str:
    """Sixteen hex digits that change with the weights: with the bits of any, and with the order of some.

    All numbers of a tensor are folded into one where they lie, since 7B weights take long to fetch from a GPU and hash.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        folded = torch.hash_tensor(tensor).item() if tensor.numel() else 0
        some = tensor.flatten()[:: max(1, tensor.numel() // 4096)]
        digest.update(f"{name}{tuple(tensor.shape)}{folded}".encode() + some.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class Answerer:
    """Puts questions to one model, greedily.

    Args:
        model: an image-text-to-text model in eval mode, on its device. Its settings for generation are replaced.
        processor: its processor, with a chat template.
        max_new_tokens: length of an answer at most.
        share: whether to encode an image once for all its questions. A picture is then described both ways first, and where
            that differs every question is processed on its own.
    """

    def __init__(self, model: Any, processor: Any, max_new_tokens: int, share: bool = True) -> None:
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        ends = model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        self.generation = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            bos_token_id=model.generation_config.bos_token_id,
            eos_token_id=ends,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        # What a call leaves open is taken from the model: sampling, beams, penalties, words that are suppressed.
        self.model.generation_config = self.generation
        self.share = share and "mm_encoder_outputs" in inspect.signature(model.forward).parameters
        if share and not self.share:
            logger.warning("%s takes no encoded images: every question is processed on its own.", type(model).__name__)
        self.checked = not self.share
        yes, no = ({self.tokenizer(word, add_special_tokens=False).input_ids[0] for word in words} for words in (YES, NO))
        self.first_words = sorted(yes - no), sorted(no - yes)

    @torch.inference_mode()
    def look(self, groups: Sequence[Sequence[Image.Image]], prompts: Sequence[Prompt]) -> "Seen":
        """Takes in the images of a chunk.

        Args:
            groups: images; a prompt about a group sees all of its images, in order.
            prompts: all that will be asked about them.
        """
        seen = Seen(groups, None, {}, None)
        if not self.share or not any(groups):
            return seen
        if not self.checked:
            self._check_sharing()
        return self._share(groups, prompts) if self.share else seen

    @torch.inference_mode()
    def answer(self, batch: Sequence[Prompt], seen: "Seen") -> list[Answer]:
        """Answers prompts together."""
        if seen.encoded is None or all(prompt.group is None for prompt in batch):
            return self._generate(self._plain_inputs(batch, seen.groups))
        return self._generate(self._shared_inputs(batch, seen))

    def _generate(self, inputs: dict[str, Any]) -> list[Answer]:
        first = FirstWord(*self.first_words)
        tokens = self.model.generate(
            **inputs, generation_config=self.generation, logits_processor=LogitsProcessorList([first])
        )
        tokens = tokens[:, inputs["input_ids"].shape[1] :]
        said = self.processor.batch_decode(tokens, skip_special_tokens=True)
        # A row that came to its end earlier than others is filled up.
        ended = self.ends | {self.generation.pad_token_id}
        cut_off = [
            tokens.shape[1] == self.generation.max_new_tokens and last not in ended for last in tokens[:, -1].tolist()
        ]
        return [Answer(t.strip(), p, cut) for t, p, cut in zip(said, first.yes_probabilities, cut_off, strict=True)]

    def _conversation(self, prompt: Prompt, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        content = [{"type": "image", "image": image} for image in images]
        return [{"role": "user", "content": [*content, {"type": "text", "text": prompt.text}]}]

    def _plain_inputs(self, batch: Sequence[Prompt], groups: Sequence[Sequence[Image.Image]]) -> dict[str, Any]:
        """As any user of the model would prepare them."""
        conversations = [self._conversation(p, [] if p.group is None else groups[p.group]) for p in batch]
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        return dict(inputs.to(self.model.device, self.model.dtype))

    def _share(self, groups: Sequence[Sequence[Image.Image]], prompts: Sequence[Prompt]) -> "Seen":
        encoded = self._encode(groups)
        ids = {prompt: self._prompt_ids(prompt, encoded) for prompt in prompts}
        # Models that place tokens in time, height and width keep offsets of a batch on themselves: no cache for them.
        begun = None if encoded.grids else self._begin(encoded, ids)
        return Seen(groups, encoded, ids, begun)

    def _encode(self, groups: Sequence[Sequence[Image.Image]]) -> "EncodedImages":
        images = [image for group in groups for image in group]
        owners = [index for index, group in enumerate(groups) for _ in group]
        inputs = self.processor.image_processor(images, return_tensors="pt").to(self.model.device, self.model.dtype)
        taken = inspect.signature(self.model.get_image_features).parameters
        outputs = self.model.get_image_features(**{k: v for k, v in inputs.items() if k in taken}, return_dict=True)
        grids = {name: value for name, value in inputs.items() if name.endswith("_thw")}
        return EncodedImages(outputs, owners, grids)

    def _begin(self, encoded: "EncodedImages", ids: dict[Prompt, list[int]]) -> "Beginnings | None":
        """Reads what the prompts of each group have in common, if that holds all of their visual tokens."""
        groups = sorted({prompt.group for prompt in ids if prompt.group is not None})
        starts = []
        for group in groups:
            rows = [row for prompt, row in ids.items() if prompt.group == group]
            first, last = min(rows), max(rows)  # as lists are ordered, so what these share, all share
            same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
            starts.append(first[: min(same, *(len(row) - 1 for row in rows))])  # some of every prompt is left to read
            if any(self.model.config.image_token_id in row[len(starts[-1]) :] for row in rows):
                return None  # images stand behind text that differs
        inputs = self.tokenizer.pad({"input_ids": starts}, return_tensors="pt").to(self.model.device)
        mask = inputs["attention_mask"]
        chosen = [index for group in groups for index in encoded.of(group)]
        outputs = self.model(
            input_ids=inputs["input_ids"],
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),  # as `generate` counts them
            mm_encoder_outputs={"image": encoded.choose(chosen)},
            use_cache=True,
            logits_to_keep=1,
        )
        lengths = dict(zip(groups, map(len, starts), strict=True))
        return Beginnings(groups, lengths, inputs["input_ids"], mask, outputs.past_key_values)

    def _shared_inputs(self, batch: Sequence[Prompt], seen: "Seen") -> dict[str, Any]:
        rows, begun, encoded = [seen.ids[prompt] for prompt in batch], seen.begun, seen.encoded
        if begun is not None:
            tails = [row[begun.lengths[prompt.group] :] for row, prompt in zip(rows, batch, strict=True)]
            tail = self.tokenizer.pad({"input_ids": tails}, return_tensors="pt").to(self.model.device)
            which = torch.tensor([begun.groups.index(prompt.group) for prompt in batch], device=self.model.device)
            cache = copy.deepcopy(begun.cache)
            cache.batch_select_indices(which)
            return {
                "input_ids": torch.cat([begun.input_ids[which], tail["input_ids"]], dim=1),
                "attention_mask": torch.cat([begun.mask[which], tail["attention_mask"]], dim=1),
                "past_key_values": cache,
            }
        inputs = dict(self.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self.model.device))
        chosen = [index for prompt in batch for index in encoded.of(prompt.group)]
        inputs |= {name: grid[chosen] for name, grid in encoded.grids.items()}
        if encoded.grids:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.model.config.image_token_id).int()
        return inputs | {"mm_encoder_outputs": {"image": encoded.choose(chosen)}}

    def _prompt_ids(self, prompt: Prompt, encoded: "EncodedImages") -> list[int]:
        which = encoded.of(prompt.group)
        text = self.processor.apply_chat_template(
            self._conversation(prompt, [None] * len(which)), add_generation_prompt=True
        )
        return self._token_ids(text, [len(encoded.outputs.pooler_output[index]) for index in which])

    def _token_ids(self, text: str, lengths: Sequence[int]) -> list[int]:
        """Ids of a prompt whose image markers stand for so many visual tokens each."""
        marker = self.processor.image_token
        pieces = text.split(marker)
        if len(pieces) != len(lengths) + 1:
            raise ValueError(f"A prompt has {len(pieces) - 1} image markers for {len(lengths)} images: {text[:200]!r}.")
        bos = self.tokenizer.bos_token
        special = not (bos and text.startswith(bos))  # which the template wrote
        if getattr(self.processor, "image_placement", "inline") == "prefix":
            visual = [self.model.config.image_token_id] * sum(lengths)
            return visual + self.tokenizer(pieces, is_split_into_words=True, add_special_tokens=special).input_ids
        widened = pieces[0] + "".join(marker * n + piece for n, piece in zip(lengths, pieces[1:], strict=True))
        return self.tokenizer(widened, add_special_tokens=special).input_ids

    def _check_sharing(self) -> None:
        """Describes a picture both ways. It is always the same one, so that every part of a run decides alike."""
        self.checked = True
        picture = [Image.radial_gradient("L").resize((96, 64)).convert("RGB")]
        prompts = [Prompt("Describe this image.", 0), Prompt("Is this an image of a city?", 0)]
        plain = self._plain_inputs(prompts, [picture])
        try:
            seen = self._share([picture], prompts)
            rows = self.tokenizer.pad({"input_ids": [seen.ids[prompt] for prompt in prompts]}, return_tensors="pt")
            if torch.equal(plain["input_ids"].cpu(), rows["input_ids"]):
                together = self._words_to_come(plain)
                alone = [row for p in prompts for row in self._words_to_come(self._plain_inputs([p], [picture]))]
                distance = apart(together, self._words_to_come(self._shared_inputs(prompts, seen)))
                rounding = apart(together, alone)
                self.share = distance <= max(1e-3, torch.finfo(self.model.dtype).eps, 5 * rounding)
                reason = f"the words to come are {distance:.2g} apart, and {rounding:.2g} by rounding"
            else:
                self.share, reason = False, "the prompts differ"
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            self.share, reason = False, f"{type(error).__name__}: {error}"  # a family that wants more than features
        if not self.share:
            logger.warning(
                "%s does not answer about encoded images as it does about pixels (%s): every question is processed alone.",
                type(self.model).__name__,
                reason,
            )

    def _words_to_come(self, inputs: dict[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The first words of each answer, (T,), and how likely all words were there, (T, V)."""
        length = {"max_new_tokens": min(8, self.generation.max_new_tokens), "return_dict_in_generate": True}
        outputs = self.model.generate(**inputs, **length, output_logits=True)
        said = outputs.sequences[:, inputs["input_ids"].shape[1] :]
        return list(zip(said, torch.stack(outputs.logits, dim=1).float().softmax(-1), strict=True))


def apart(some: Sequence[tuple[torch.Tensor, torch.Tensor]], others: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """How far apart two ways to answer are: total variation of the words to come, at most.

    Words are compared for as long as both have said the same. Which ones are said would not do: two that are as good as
    equally likely change places by rounding.
    """
    largest = 0.0
    for (said, chances), (also_said, also_chances) in zip(some, others, strict=True):
        steps = min(len(said), len(also_said))
        same = int((said[:steps] == also_said[:steps]).int().cumprod(0).sum())
        compared = slice(0, min(same + 1, steps))
        largest = max(largest, float((chances[compared] - also_chances[compared]).abs().sum(-1).max()) / 2)
    return largest


@dataclass(frozen=True)
class Seen:
    """The images of a chunk; their features, the ids of all prompts, and what was read of them, if that is shared."""

    groups: Sequence[Sequence[Image.Image]]
    encoded: "EncodedImages | None"
    ids: dict[Prompt, list[int]]
    begun: "Beginnings | None"


@dataclass(frozen=True)
class Beginnings:
    """What the prompts about each group begin with, read into a cache: (G, P) ids and mask, padded on the left."""

    groups: list[int]
    lengths: dict[int, int]
    input_ids: torch.Tensor
    mask: torch.Tensor
    cache: Any


@dataclass(frozen=True)
class EncodedImages:
    """Features of the images of a chunk.

    Attributes:
        outputs: of `get_image_features`: `pooler_output` holds one (tokens, width) per image; `deepstack_features`, where
            a model has them, a list of such lists.
        owners: the group of each image.
        grids: further inputs, one row an image, that the decoder needs to place visual tokens.
    """

    outputs: Any
    owners: list[int]
    grids: dict[str, torch.Tensor]

    def of(self, group: int | None) -> list[int]:
        return [index for index, owner in enumerate(self.owners) if owner == group]

    def choose(self, chosen: Sequence[int]) -> ModelOutput:
        """Features of the chosen images, in that order, in the class that the model made."""
        kept: dict[str, Any] = {"pooler_output": [self.outputs.pooler_output[index] for index in chosen]}
        stacks = getattr(self.outputs, "deepstack_features", None)
        if stacks is not None:
            kept["deepstack_features"] = [[stack[index] for index in chosen] for stack in stacks]
        names = {field.name for field in fields(self.outputs)}
        return type(self.outputs)(**{name: value for name, value in kept.items() if name in names})


class FirstWord(LogitsProcessor):
    """Notes P(yes) / (P(yes) + P(no)) of the first generated token, and changes nothing."""

    def __init__(self, yes: Sequence[int], no: Sequence[int]) -> None:
        self.yes, self.no = yes, no
        self.yes_probabilities: list[float | None] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.yes_probabilities and not (self.yes and self.no):
            self.yes_probabilities = [None] * len(scores)
        elif not self.yes_probabilities:
            logits = scores.float()
            margin = logits[:, self.yes].logsumexp(-1) - logits[:, self.no].logsumexp(-1)
            self.yes_probabilities = margin.sigmoid().tolist()
        return scores
