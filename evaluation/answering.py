"""Answers many questions with any image-text-to-text model of transformers, and encodes every image once.

The images of a chunk of questions are encoded together. The decoder then processes the common prefix of all prompts about
the same images, mostly visual tokens, once. Every question continues from a copy of this cache. Some models do not accept
encoded images, or answer differently with them. Their images are encoded again for every question, and a warning is logged.
"""

import copy
import hashlib
import inspect
import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

from ..configuration_mfrsvlm import CACHE
from ..files.model_folder import load_model, slow_on_cpu
from ..files.reading import shorten


logger = logging.getLogger(__name__)

# First words that count as yes and no.
YES, NO = ("yes", "Yes", " yes", " Yes"), ("no", "No", " no", " No")


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the index of its image group (`None`: no image)."""

    text: str
    group: int | None = None


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Attributes:
        text: the generated text, without special tokens and surrounding space.
        yes_probability: P(yes) / (P(yes) + P(no)) of the first token. `None` if "yes" and "no" start with the same token.
        truncated: whether generation stopped at the maximum length.
        tokens: id and log probability of each generated token, without special tokens at the end.
    """

    text: str
    yes_probability: float | None = None
    truncated: bool = False
    tokens: tuple[tuple[int, float], ...] = ()


def load(
    name: str,
    revision: str | None = None,
    dtype: str = "auto",
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    allow_incomplete: bool = False,
) -> tuple[Any, Any]:
    """Loads the model, in eval mode on its device, and the processor of a folder or Hub id.

    Args:
        name, revision, trust_remote_code, allow_incomplete: see `mfrsvlm.files.model_folder.load_model`.
        dtype: type of the weights; `"auto"`: as saved, or float32 if the CPU computes many times slower in the saved type.
        device: of the model; `None`: an accelerator, if there is one.

    Raises:
        ValueError: the device does not exist here; the folder contains no model that can be loaded, has no chat template,
            or needs `trust_remote_code`.
    """
    device = torch.device(find_device(device if device is None else str(device)))
    model, processor = load_model(
        name, revision, dtype, trust_remote_code=trust_remote_code, allow_incomplete=allow_incomplete
    )
    check_chat_template(processor, name)
    if dtype == "auto" and device.type == "cpu" and slow_on_cpu(model.dtype):
        saved = str(model.dtype).removeprefix("torch.")
        logger.warning(f"{name} is loaded in float32: this CPU is many times slower in {saved}. --dtype {saved} keeps it.")
        model = model.float()
    return model.to(device).eval(), processor


def find_device(device: str | None = None) -> str:
    """A device that can be used here; for `None`, an accelerator, if there is one.

    Raises:
        ValueError: the device does not exist here.
    """
    if device is None:
        accelerator = torch.accelerator.current_accelerator()
        device = "cpu" if accelerator is None else str(accelerator)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an unknown name, or a device that this machine or this torch lacks
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={device!r} cannot be used here: {reason}. Name another, such as cpu.") from error
    return device


def check_chat_template(processor: Any, name: str = "The processor") -> None:
    """Raises `ValueError` if the processor cannot put a question to the model."""
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"{name} has no chat template, so no prompt can be built. Add a chat_template.jinja to its folder.")


def fingerprint(model: torch.nn.Module) -> str:
    """Sixteen hex digits that change if any bit of the weights changes or if large parts are exchanged.

    Each tensor is reduced to one number on its device, because copying and hashing 7B weights would take minutes.
    """
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        _add_to_digest(digest, name, value)
    return digest.hexdigest()[:16]


def _add_to_digest(digest: Any, name: str, value: Any) -> None:
    if isinstance(value, (tuple, list)):  # packed weights of a quantized layer
        for index, member in enumerate(value):
            _add_to_digest(digest, f"{name}.{index}", member)
    elif not isinstance(value, torch.Tensor):
        digest.update(f"{name}{value!r}".encode())
    elif type(value).__module__.startswith("torchao."):  # consists of other tensors
        for member in value.__tensor_flatten__()[0]:
            _add_to_digest(digest, f"{name}.{member}", getattr(value, member))
    else:
        tensor = value.detach()
        if tensor.is_quantized:
            tensor = tensor.dequantize()
        if tensor.is_floating_point() and tensor.element_size() == 1:  # float8
            tensor = tensor.view(torch.uint8)
        folded = torch.hash_tensor(tensor).item() if tensor.numel() else 0
        some = tensor.flatten()[:: max(1, tensor.numel() // 4096)]
        digest.update(f"{name}{tuple(tensor.shape)}{folded}".encode() + some.double().cpu().numpy().tobytes())


class Answerer:
    """Answers questions with one model, by greedy decoding. Calls do not change the state of model and processor.

    Args:
        model: image-text-to-text model on its device, optionally with an active LoRA adapter of PEFT.
        processor: its processor, with a chat template.
        max_new_tokens: maximum length of an answer.
        share_images: encode an image once for all of its questions.
        check_sharing: compare the answers with and without sharing at the first call, see `_check_sharing`. If they differ,
            images are not shared.
    """

    def __init__(
        self, model: Any, processor: Any, max_new_tokens: int, share_images: bool = True, check_sharing: bool = True
    ) -> None:
        self.model, self.processor, self.tokenizer = without_peft(model), processor, processor.tokenizer
        end = self.model.generation_config.eos_token_id
        self.end_tokens = set(end if isinstance(end, list) else [] if end is None else [end])
        pad = self.tokenizer.pad_token_id
        self.generation = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            bos_token_id=self.model.generation_config.bos_token_id,
            eos_token_id=end,
            pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
        )
        parameters = inspect.signature(self.model.forward).parameters
        # The name of the cache in forward and generate. MF-RSVLM takes both names.
        is_mfrsvlm = self.model.config.model_type == "mfrsvlm"
        self.cache_name = CACHE if is_mfrsvlm else "cache" if "cache" in parameters else "past_key_values"
        self.share_images = share_images and "mm_encoder_outputs" in parameters
        if share_images and not self.share_images:
            logger.warning(
                "%s does not accept encoded images: images are encoded again for every question.", type(self.model).__name__
            )
        self.checked = not (self.share_images and check_sharing)
        yes, no = ({self.tokenizer(word, add_special_tokens=False).input_ids[0] for word in words} for words in (YES, NO))
        self.first_tokens = sorted(yes - no), sorted(no - yes)

    def encode_images(self, groups: Sequence[Sequence[Image.Image]], prompts: Sequence[Prompt]) -> "EncodedImages":
        """Encodes the images of a chunk.

        Args:
            groups: images by group. A prompt about a group gets all of its images, in order.
            prompts: all prompts about these images.
        """
        encoded = EncodedImages(groups)
        if not self.share_images or not any(groups):
            return encoded
        with self._greedy():
            if not self.checked:
                self._check_sharing()
            return self._encode_and_prefill(groups, prompts) if self.share_images else encoded

    def answer(self, batch: Sequence[Prompt], encoded: "EncodedImages", max_new_tokens: int | None = None) -> list[Answer]:
        """Answers prompts in one batch.

        Args:
            batch: prompts about the encoded images.
            encoded: from `encode_images`.
            max_new_tokens: maximum length of these answers, if it differs from that of the others.
        """
        with self._greedy():
            if encoded.features is None or all(prompt.group is None for prompt in batch):
                inputs = self._plain_inputs(batch, encoded.groups)
            else:
                inputs = self._shared_inputs(batch, encoded)
            return self._generate(inputs, max_new_tokens or self.generation.max_new_tokens)

    @contextmanager
    def _greedy(self) -> Iterator[None]:
        """Sets greedy decoding, evaluation mode and left padding, and restores the previous state at the end."""
        model, tokenizer = self.model, self.tokenizer
        training = [(module, module.training) for module in model.modules()]
        before = model.generation_config, tokenizer.padding_side, tokenizer.pad_token
        model.eval()
        # `generate` reads settings that a call does not pass from the model: sampling, beams, penalties, suppressed tokens.
        model.generation_config = self.generation
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        try:
            # Not inference mode, since modules may keep tensors, which could then not be used in training.
            with torch.no_grad():
                yield
        finally:
            model.generation_config, tokenizer.padding_side, tokenizer.pad_token = before
            for module, was_training in training:  # one by one, since some modules may stay in evaluation mode
                module.training = was_training

    def _generate(self, inputs: dict[str, Any], max_new_tokens: int) -> list[Answer]:
        recorder, likelihood = YesProbability(*self.first_tokens), GreedyLikelihood()
        generation = copy.copy(self.generation)
        generation.max_new_tokens = max_new_tokens
        tokens = self.model.generate(
            **inputs, generation_config=generation, logits_processor=LogitsProcessorList([recorder, likelihood])
        )
        tokens = tokens[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        # A row that ends before the others is padded.
        ends = self.end_tokens | {self.generation.pad_token_id}
        full = tokens.shape[1] == max_new_tokens
        truncated = [full and last not in ends for last in tokens[:, -1].tolist()]
        rows = [
            tuple(itertools.takewhile(lambda pair: pair[0] not in ends, zip(*row, strict=True)))
            for row in zip(tokens.tolist(), likelihood.of(tokens), strict=True)
        ]
        columns = zip(texts, recorder.probabilities, truncated, rows, strict=True)
        return [Answer(text.strip(), *rest) for text, *rest in columns]

    def _conversation(self, prompt: Prompt, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        content = [{"type": "image", "image": image} for image in images]
        return [{"role": "user", "content": [*content, {"type": "text", "text": prompt.text}]}]

    def _plain_inputs(self, batch: Sequence[Prompt], groups: Sequence[Sequence[Image.Image]]) -> dict[str, Any]:
        """Inputs from the chat template and the processor, without sharing."""
        conversations = [self._conversation(p, [] if p.group is None else groups[p.group]) for p in batch]
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        return self._on_device(inputs)

    def _on_device(self, inputs: Any) -> dict[str, Any]:
        """Inputs on the device of the model; those that hold samples are normalized there."""
        device, dtype = self.model.device, self.model.dtype
        if "pixel_bands" in inputs:
            return self.processor.image_processor.to_device(inputs, device, dtype)
        return dict(inputs.to(device, dtype))

    def _encode_and_prefill(self, groups: Sequence[Sequence[Image.Image]], prompts: Sequence[Prompt]) -> "EncodedImages":
        features = self._encode(groups)
        ids = {prompt: self._prompt_ids(prompt, features) for prompt in prompts}
        # Models with 3D position ids (time, height, width) store offsets of a batch on the module, so no cache for them.
        prefix_cache = None if features.grids else self._prefill_prefixes(features, ids)
        return EncodedImages(groups, features, ids, prefix_cache)

    def _encode(self, groups: Sequence[Sequence[Image.Image]]) -> "ImageFeatures":
        images = [image for group in groups for image in group]
        owners = [index for index, group in enumerate(groups) for _ in group]
        inputs = self._on_device(self.processor.image_processor(images, return_tensors="pt"))
        accepted = inspect.signature(self.model.get_image_features).parameters
        outputs = self.model.get_image_features(**{k: v for k, v in inputs.items() if k in accepted}, return_dict=True)
        grids = {name: value for name, value in inputs.items() if name.endswith("_thw")}
        return ImageFeatures(outputs, owners, grids)

    def _prefill_prefixes(self, features: "ImageFeatures", ids: dict[Prompt, list[int]]) -> "PrefixCache | None":
        """Processes the common prefix of each group's prompts, if it contains all of their visual tokens."""
        groups = sorted({prompt.group for prompt in ids if prompt.group is not None})
        prefixes = []
        for group in groups:
            rows = [row for prompt, row in ids.items() if prompt.group == group]
            first, last = min(rows), max(rows)  # lexicographic order: a prefix of these two is a prefix of all rows
            same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
            prefixes.append(first[: min(same, *(len(row) - 1 for row in rows))])  # at least one token of a prompt is left
            if any(self.model.config.image_token_id in row[len(prefixes[-1]) :] for row in rows):
                return None  # images come after text that differs
        inputs = self.tokenizer.pad({"input_ids": prefixes}, return_tensors="pt").to(self.model.device)
        mask = inputs["attention_mask"]
        indices = [index for group in groups for index in features.indices_of(group)]
        outputs = self.model(
            input_ids=inputs["input_ids"],
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),  # as in `generate`
            mm_encoder_outputs={"image": features.select(indices)},
            use_cache=True,
            logits_to_keep=1,
        )
        lengths = dict(zip(groups, map(len, prefixes), strict=True))
        return PrefixCache(groups, lengths, inputs["input_ids"], mask, outputs[self.cache_name])

    def _shared_inputs(self, batch: Sequence[Prompt], encoded: "EncodedImages") -> dict[str, Any]:
        rows, prefix, features = [encoded.input_ids[prompt] for prompt in batch], encoded.prefix_cache, encoded.features
        if prefix is not None:
            tails = [row[prefix.lengths[prompt.group] :] for row, prompt in zip(rows, batch, strict=True)]
            tail = self.tokenizer.pad({"input_ids": tails}, return_tensors="pt").to(self.model.device)
            which = torch.tensor([prefix.groups.index(prompt.group) for prompt in batch], device=self.model.device)
            cache = copy.deepcopy(prefix.cache)
            cache.batch_select_indices(which)
            return {
                "input_ids": torch.cat([prefix.input_ids[which], tail["input_ids"]], dim=1),
                "attention_mask": torch.cat([prefix.mask[which], tail["attention_mask"]], dim=1),
                self.cache_name: cache,
            }
        inputs = dict(self.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self.model.device))
        indices = [index for prompt in batch for index in features.indices_of(prompt.group)]
        inputs |= {name: grid[indices] for name, grid in features.grids.items()}
        if features.grids:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.model.config.image_token_id).int()
        return inputs | {"mm_encoder_outputs": {"image": features.select(indices)}}

    def _prompt_ids(self, prompt: Prompt, features: "ImageFeatures") -> list[int]:
        indices = features.indices_of(prompt.group)
        text = self.processor.apply_chat_template(
            self._conversation(prompt, [None] * len(indices)), add_generation_prompt=True
        )
        return self._token_ids(text, [len(features.outputs.pooler_output[index]) for index in indices])

    def _token_ids(self, text: str, lengths: Sequence[int]) -> list[int]:
        """Ids of a prompt in which each image marker becomes as many visual tokens as `lengths` says."""
        marker = self.processor.image_token
        pieces = text.split(marker)
        if len(pieces) != len(lengths) + 1:
            raise ValueError(f"A prompt has {len(pieces) - 1} image markers for {len(lengths)} images: {shorten(text)}.")
        bos = self.tokenizer.bos_token
        special = not (bos and text.startswith(bos))  # the template may already have written it
        if getattr(self.processor, "image_placement", "inline") == "prefix":
            visual = [self.model.config.image_token_id] * sum(lengths)
            return visual + self.tokenizer(pieces, is_split_into_words=True, add_special_tokens=special).input_ids
        expanded = pieces[0] + "".join(marker * n + piece for n, piece in zip(lengths, pieces[1:], strict=True))
        return self.tokenizer(expanded, add_special_tokens=special).input_ids

    def _check_sharing(self) -> None:
        """Answers two questions about a test image with and without sharing. Disables sharing if the results differ.

        The total variation distance of next-token probabilities may be at most max(1e-3, eps of the dtype, 5 * rounding).
        Rounding is the distance between a batch and single questions, both without sharing. Image and questions are fixed,
        so that all processes and all parts of a run get the same result.
        """
        self.checked = True
        picture = [Image.radial_gradient("L").resize((96, 64)).convert("RGB")]
        prompts = [Prompt("Describe this image.", 0), Prompt("Is this an image of a city?", 0)]
        plain = self._plain_inputs(prompts, [picture])
        try:
            encoded = self._encode_and_prefill([picture], prompts)
            ids = [encoded.input_ids[prompt] for prompt in prompts]
            rows = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt")
            if torch.equal(plain["input_ids"].cpu(), rows["input_ids"]):
                batch = self._next_token_probs(plain)
                single = [row for p in prompts for row in self._next_token_probs(self._plain_inputs([p], [picture]))]
                distance = largest_distance(batch, self._next_token_probs(self._shared_inputs(prompts, encoded)))
                rounding = largest_distance(batch, single)
                self.share_images = distance <= max(1e-3, torch.finfo(self.model.dtype).eps, 5 * rounding)
                reason = f"probabilities of the next tokens differ by {distance:.2g}, and by {rounding:.2g} from rounding"
            else:
                self.share_images, reason = False, "the prompts differ"
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            self.share_images, reason = False, f"{type(error).__name__}: {error}"  # the model needs further inputs
        if not self.share_images:
            logger.warning(
                "%s answers differently with encoded images than with pixels (%s): images are encoded for every question.",
                type(self.model).__name__,
                reason,
            )

    def _next_token_probs(self, inputs: dict[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The first tokens of each answer, (T,), and the probabilities of all tokens at each step, (T, V)."""
        options = {"max_new_tokens": min(8, self.generation.max_new_tokens), "return_dict_in_generate": True}
        outputs = self.model.generate(**inputs, **options, output_logits=True)
        tokens = outputs.sequences[:, inputs["input_ids"].shape[1] :]
        return list(zip(tokens, torch.stack(outputs.logits, dim=1).float().softmax(-1), strict=True))


def without_peft(model: Any) -> Any:
    """The model inside a PEFT wrapper, whose layers contain the adapter. Other models are returned unchanged.

    The wrapper hides the signature of the model. For prompt learning it is kept, since it adds the tokens.
    """
    if hasattr(model, "get_base_model") and not model.active_peft_config.is_prompt_learning:
        return model.get_base_model()
    return model


def largest_distance(
    some: Sequence[tuple[torch.Tensor, torch.Tensor]], others: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> float:
    """The largest total variation distance between two lists of `_next_token_probs`.

    Steps are compared until the answers differ. The tokens themselves are not compared, since rounding may exchange two
    tokens with nearly the same probability.
    """
    largest = 0.0
    for (tokens, probs), (other_tokens, other_probs) in zip(some, others, strict=True):
        steps = min(len(tokens), len(other_tokens))
        same = int((tokens[:steps] == other_tokens[:steps]).int().cumprod(0).sum())
        compared = slice(0, min(same + 1, steps))
        largest = max(largest, float((probs[compared] - other_probs[compared]).abs().sum(-1).max()) / 2)
    return largest


@dataclass(frozen=True)
class ImageFeatures:
    """Features of the images of a chunk.

    Attributes:
        outputs: output of `get_image_features`. `pooler_output` is a list of (tokens, width) tensors, one per image;
            `deepstack_features`, if the model has them, is a list of such lists.
        owners: the group of each image.
        grids: further inputs with one row per image, from which the decoder computes positions of visual tokens.
    """

    outputs: Any
    owners: list[int]
    grids: dict[str, torch.Tensor]

    def indices_of(self, group: int | None) -> list[int]:
        """Indices of the images of a group."""
        return [index for index, owner in enumerate(self.owners) if owner == group]

    def select(self, indices: Sequence[int]) -> ModelOutput:
        """Features of the images at these indices, in the output class of the model."""
        kept: dict[str, Any] = {"pooler_output": [self.outputs.pooler_output[index] for index in indices]}
        stacks = getattr(self.outputs, "deepstack_features", None)
        if stacks is not None:
            kept["deepstack_features"] = [[stack[index] for index in indices] for stack in stacks]
        names = {field.name for field in fields(self.outputs)}
        return type(self.outputs)(**{name: value for name, value in kept.items() if name in names})


@dataclass(frozen=True)
class PrefixCache:
    """The common prefix of the prompts of each group, and the decoder's cache of it.

    Attributes:
        groups: the G groups, in the order of the rows.
        lengths: length of each group's prefix, without padding.
        input_ids: (G, P), padded on the left.
        mask: (G, P), 0 where padded.
        cache: keys and values of G rows.
    """

    groups: list[int]
    lengths: dict[int, int]
    input_ids: torch.Tensor
    mask: torch.Tensor
    cache: Any


@dataclass(frozen=True)
class EncodedImages:
    """The images of a chunk, ready for questions about them.

    Attributes:
        groups: the images by group.
        features: `None` if images are not shared; the questions are then processed with the images themselves.
        input_ids: ids of each prompt.
        prefix_cache: `None` if the prompts have no common prefix that contains all images.
    """

    groups: Sequence[Sequence[Image.Image]]
    features: ImageFeatures | None = None
    input_ids: dict[Prompt, list[int]] | None = None
    prefix_cache: PrefixCache | None = None


class YesProbability(LogitsProcessor):
    """Records P(yes) / (P(yes) + P(no)) of the first generated token. Does not change the scores."""

    def __init__(self, yes: Sequence[int], no: Sequence[int]) -> None:
        self.yes, self.no = yes, no
        self.probabilities: list[float | None] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.probabilities and not (self.yes and self.no):
            self.probabilities = [None] * len(scores)
        elif not self.probabilities:
            logits = scores.float()
            margin = logits[:, self.yes].logsumexp(-1) - logits[:, self.no].logsumexp(-1)
            self.probabilities = margin.sigmoid().tolist()
        return scores


class GreedyLikelihood(LogitsProcessor):
    """Records the log probability of the most likely token of every step. Does not change the scores."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits = scores.float()
        self.steps.append(logits.amax(-1) - logits.logsumexp(-1))
        return scores

    def of(self, tokens: torch.Tensor) -> list[list[float]]:
        """Rows of log probabilities, as long as those of the generated tokens (B, T)."""
        return torch.stack(self.steps, dim=1)[:, : tokens.shape[1]].tolist()
