"""Processor of MF-RSVLM: converts prompts to ids with image placeholders, and images to pixels."""

import bisect
import copy
import inspect
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin
from transformers.tokenization_utils_base import LARGE_INTEGER

from .checksums_mfrsvlm import PROCESSOR_FILES, update_checksums
from .conversations_mfrsvlm import (
    ControlTokens,
    check_conversations,
    check_settings,
    check_text,
    control_tokens,
    rename_control_tokens,
)
from .image_processing_mfrsvlm import (
    MFRSVLMImageProcessor,
    MFRSVLMImageProcessorKwargs,
    cut_windows,
    flatten_images,
    join_windows,
    plain_errors,
)
from .image_sources_mfrsvlm import shown


ASSISTANT = "ASSISTANT:"  # what the chat template ends a prompt with
NUMBER = r"\s*([0-9]+(?:\.[0-9]+)?)\s*"
WRITTEN_BOX = re.compile(rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]")
WRITTEN_POINT = re.compile(rf"\[{NUMBER},{NUMBER}\]")
BOX_FORMAT = {"scale": 1000, "order": "xyxy", "padded": False}


def parse_boxes(text: str, box_scale: float = 1000) -> list[tuple[float, float, float, float]]:
    """The boxes `[x1, y1, x2, y2]` in a text, in its order, as (x_min, y_min, x_max, y_max) from 0 to `box_scale`.

    Swapped corners are sorted. What is not four numbers from 0 to `box_scale` in brackets is no box and is left out; a box
    without area is one, since rounding can make it from something tiny.
    """
    boxes = []
    for match in WRITTEN_BOX.finditer(text):
        x1, y1, x2, y2 = (float(number) for number in match.groups())
        if max(x1, y1, x2, y2) <= box_scale:
            boxes.append((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)))
    return boxes


def parse_points(text: str, scale: float = 1000) -> list[tuple[float, float]]:
    """The points `[x, y]` in a text, in its order, from 0 to `scale`. Brackets with anything else are left out."""
    points = [(float(x), float(y)) for x, y in WRITTEN_POINT.findall(text)]
    return [point for point in points if max(point) <= scale]


def locate_boxes(
    texts: list[str], image_sizes: Any, scale: float = 1000, order: str = "xyxy", padded: bool = False
) -> list[torch.Tensor]:
    """Boxes of generated texts in pixels, see `MFRSVLMProcessor.post_process_boxes`. Arguments are those of a box format."""
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"texts must be a list of strings, one per image, got {type(texts).__name__} {str(texts)[:200]!r}.")
    if not 0 < scale < math.inf:
        raise ValueError(f"box_scale={scale} must be a positive number.")
    sizes = image_sizes.tolist() if isinstance(image_sizes, (torch.Tensor, np.ndarray)) else image_sizes
    if not isinstance(sizes, (list, tuple)) or len(sizes) != len(texts):
        raise ValueError(f"{len(texts)} texts need as many image_sizes, (height, width) each, got {str(image_sizes)[:200]}.")
    located = []
    for index, (text, size) in enumerate(zip(texts, sizes, strict=True)):
        try:
            height, width = (float(length) for length in size)
        except (TypeError, ValueError):
            raise ValueError(f"image_sizes[{index}]={size!r} must be two numbers, (height, width).") from None
        if not (0 < height < math.inf and 0 < width < math.inf):
            raise ValueError(f"image_sizes[{index}]={size!r}: height and width must be positive.")
        limits = torch.tensor([width, height] * 2)
        boxes = torch.tensor(parse_boxes(text, scale)).reshape(-1, 4) / scale
        if order == "yxyx":
            boxes = boxes[:, [1, 0, 3, 2]]
        if padded:
            side = max(height, width)
            left, top = (side - width) // 2, (side - height) // 2  # see pad_to_square
            boxes = boxes * side - torch.tensor([left, top] * 2)
            boxes = boxes[((boxes[:, 2:] >= 0) & (boxes[:, :2] <= limits[:2])).all(1)]
            located.append(boxes.clamp(torch.zeros(4), limits))
        else:
            located.append(boxes * limits)
    return located


def check_box_format(box_format: Any) -> dict[str, Any]:
    """A box format, with defaults for fields that it lacks.

    Raises:
        ValueError: it is no box format.
    """
    known = {*BOX_FORMAT, "prompt"}
    if not isinstance(box_format, dict) or set(box_format) - known:
        raise ValueError(f"box_format={box_format!r} must be a dict with some of {sorted(known)}.")
    box_format = {**BOX_FORMAT, **box_format}
    scale, order, padded, prompt = (box_format.get(name) for name in ("scale", "order", "padded", "prompt"))
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise ValueError(f"box_format: scale={scale!r} must be a positive number.")
    if order not in ("xyxy", "yxyx") or not isinstance(padded, bool):
        raise ValueError(f'box_format: order={order!r} must be "xyxy" or "yxyx", and padded={padded!r} true or false.')
    if prompt is not None and "{object}" not in str(prompt):
        raise ValueError(f"box_format: prompt={prompt!r} must contain {{object}}.")
    return box_format


def make_chat_template(tokenizer: Any) -> str:
    """The chat template of this package for a tokenizer.

    It writes the beginning-of-sequence token if the tokenizer adds one, since trainers and servers tokenize rendered
    templates without adding special tokens.

    Raises:
        ValueError: no way to write the token gives the ids that the tokenizer itself gives.
    """
    template = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
    bos, rest = template.split("\n", 1)
    start = "A chat between"
    expected = tokenizer(start)["input_ids"]
    if tokenizer.bos_token is None or expected[:1] != [tokenizer.bos_token_id]:
        return rest
    # Some tokenizers encode a word after a special token as inside of a text. A space avoids this.
    for space, opening in {"": bos, " ": '{{- bos_token + " " -}}'}.items():
        if tokenizer(tokenizer.bos_token + space + start, add_special_tokens=False)["input_ids"] == expected:
            return f"{opening}\n{rest}"
    raise ValueError(
        f"The tokenizer reads {tokenizer.bos_token + start!r} in another way than {start!r} with the special tokens that it "
        "adds: write a chat template for it."
    )


class MFRSVLMProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    images_kwargs: MFRSVLMImageProcessorKwargs
    _defaults = {"text_kwargs": {"padding": False}}


class MFRSVLMProcessor(ProcessorMixin):
    """Image processor and tokenizer in one; every `<image>` of a prompt becomes the visual tokens of one image.

    Args:
        image_processor: an `MFRSVLMImageProcessor`.
        tokenizer: a tokenizer that knows `image_token` as one token.
        chat_template: Jinja template, such as `make_chat_template` gives.
        image_token: the marker of an image in a prompt.
        image_placement: `"inline"`: visual tokens stand where the marker stood; `"prefix"`: those of all images of a
            prompt come first, before `<s>`, and the pieces of text around the markers are tokenized apart, as the
            published model was trained.
        box_format: how the model was trained to write boxes. "scale" is the value of the right and lower edge; "order" is
            "xyxy" or "yxyx"; "padded" says whether boxes refer to the image padded to a square; "prompt" asks for the boxes
            of an "{object}". `None`: not stated.
        ground_resolution: the finest and the coarsest pixel of the training images, in metres. `None`: not stated.
    """

    # Saved only where they are stated.
    box_format: dict[str, Any] | None = None
    ground_resolution: tuple[float, float] | None = None
    valid_processor_kwargs = MFRSVLMProcessorKwargs
    _control_tokens: ControlTokens | None = None  # of a copy that reads a conversation with stand-ins

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        image_placement: str = "inline",
        box_format: dict[str, Any] | None = None,
        ground_resolution: Any = None,
    ) -> None:
        if box_format is not None:
            self.box_format = check_box_format(box_format)
        if ground_resolution is not None:
            finest, coarsest = ground_resolution
            if not 0 < finest <= coarsest < math.inf:
                raise ValueError(f"ground_resolution={ground_resolution!r} must be two lengths in metres, the finer first.")
            self.ground_resolution = (finest, coarsest)
        if image_placement not in ("inline", "prefix"):
            raise ValueError(f'image_placement={image_placement!r} must be "inline" or "prefix".')
        if image_processor is None or tokenizer is None:
            raise ValueError(f"image_processor={image_processor} and tokenizer={tokenizer}: both are needed.")
        if image_placement == "prefix" and not tokenizer.is_fast:
            raise ValueError(f'image_placement="prefix" needs a fast tokenizer, got {type(tokenizer).__name__}.')
        self.image_placement = image_placement
        self.image_token = image_token
        # Set by saving otherwise, so that a processor would differ from itself after a round trip.
        self.auto_map = {"AutoProcessor": "processing_mfrsvlm.MFRSVLMProcessor"}
        ids = tokenizer.encode(image_token, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ValueError(
                f"The tokenizer does not know {image_token!r} as one token, but reads it as {ids}. Add it first: "
                f"tokenizer.add_special_tokens({{'additional_special_tokens': [{image_token!r}]}})."
            )
        self.image_token_id = ids[0]
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        known = set(inspect.signature(cls.__init__).parameters) | {"auto_map", "processor_class"}
        unknown = sorted(name for name in processor_dict or {} if name not in known and name[:1] != "_")
        if unknown:
            raise ValueError(f"The saved settings of the processor have unknown names: {', '.join(unknown)}.")
        # Through the Auto classes this would ask whether to run the code in the folder, although this is that code, and
        # load a second copy of it. The tokenizer needs none, but looks at the model's config unless it is given one.
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **{**kwargs, "config": PreTrainedConfig()})
        kwargs.pop("backend", None)  # an option of AutoImageProcessor, and a read-only property of what it loads
        return [MFRSVLMImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs), tokenizer]

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        # Where the tokenizer was loaded from is noted among its options and would be published with them.
        for name in ("is_local", "local_files_only"):
            self.tokenizer.init_kwargs.pop(name, None)
        # Only what stands among the options is saved, and a loaded Llama tokenizer keeps its flag elsewhere: after a second
        # round trip, one that was trained with it would split the text after a special token in another way.
        if getattr(self.tokenizer, "legacy", None) is not None:
            self.tokenizer.init_kwargs["legacy"] = self.tokenizer.legacy
        # As a string, because pushing takes the repository's name from it in a way that fails for a Path.
        written = super().save_pretrained(os.fspath(save_directory), push_to_hub=push_to_hub, **kwargs)
        update_checksums(save_directory, PROCESSOR_FILES)
        return written

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        # `save_pretrained` of transformers uploads before it returns.
        update_checksums(working_dir, PROCESSOR_FILES)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        (tokens,) = self._get_num_multimodal_tokens([(0, 0)], **kwargs).num_image_tokens
        return self.image_token * tokens

    def _get_num_multimodal_tokens(self, image_sizes: list[Any] | None = None, **kwargs: Any) -> MultiModalData:
        """Visual tokens and encoder images of images of the given (height, width); the same for every size."""
        if image_sizes is None:
            return MultiModalData()
        crop_size, patch_size = self.image_processor.crop_size["height"], self.image_processor.patch_size
        if kwargs.get("crop_size") is not None:
            crop_size = self.image_processor._standardize_kwargs(crop_size=kwargs["crop_size"])["crop_size"].height
        tokens = (crop_size // (kwargs.get("patch_size") or patch_size)) ** 2
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[tokens] * count, num_image_patches=[1] * count)

    def validate_inputs(self, images: Any = None, text: list[str] | None = None, **kwargs: Any) -> None:
        """Raises `ValueError` where the number of images differs from the number of markers, naming both."""
        if images is None and text is None:
            raise ValueError("Neither images nor text given: pass at least one.")
        if text is None:
            return
        markers = [prompt.count(self.image_token) for prompt in text]
        rule = f"The number of {self.image_token} tokens in the prompts should be the same as the number of images: "
        groups = images if isinstance(images, (list, tuple)) else [images]
        nested = [isinstance(group, (list, tuple)) for group in groups]
        if not any(nested):
            count = 0 if images is None else len(flatten_images(images))
            if sum(markers) != count:
                raise ValueError(f"{rule}found {sum(markers)} tokens and {count} images.")
            return
        if not all(nested):
            raise ValueError("The images mix lists and single images: pass one list per prompt, or a flat list for all.")
        counts = [len(flatten_images(group)) for group in groups]
        if markers != counts:
            raise ValueError(f"{rule}found {markers} tokens, prompt by prompt, and {counts} images, list by list.")

    def question_ids(self, questions: str | list[str]) -> torch.Tensor:
        """What is asked about each image, for a model with `window_budget`, which chooses the windows to encode by it.

        Args:
            questions: one text an image, in reading order over the batch: the question alone, without its answer.

        Returns:
            (N, S) ids without special tokens, padded with -100. `forward` and `generate` take them.

        Raises:
            TypeError: questions are not a string or a list of strings.
        """
        texts = [questions] if isinstance(questions, str) else questions
        if not isinstance(texts, (list, tuple)) or not all(isinstance(each, str) for each in texts):
            raise TypeError(f"questions must be a string or a list of strings, got {shown(questions)}.")
        for number, question in enumerate(texts, start=1):
            check_text(question, f"question {number} of {len(texts)}")
        rows = [torch.tensor(self.tokenizer.encode(each, add_special_tokens=False), dtype=torch.long) for each in texts]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)

    def post_process_boxes(
        self, texts: list[str], image_sizes: Any, box_scale: float | None = None, padded: bool | None = None
    ) -> list[torch.Tensor]:
        """Boxes `[x1, y1, x2, y2]` of generated texts, in pixels of the original images.

        Args:
            texts: one generated text per image, decoded.
            image_sizes: (height, width) of each original image: pairs, or a tensor (N, 2). Note that `PIL.Image.size` is
                the other way round.
            box_scale: value of the right and lower edge in a text. `None`: that of `box_format`, else 1000.
            padded: whether the texts speak of the image padded to a square, as the image processor pads it with `do_pad`,
                or of the image itself. The padding is taken off, and boxes are clipped to the image. Boxes in the padding
                are left out. `None`: as `box_format` says, else of the image itself.

        Returns:
            For each text a float32 tensor (n, 4), one row (x_min, y_min, x_max, y_max) per box in the order of the text,
            (0, 4) if there is none. Swapped corners are sorted; what is not four numbers from 0 to `box_scale` in brackets
            is left out.

        Raises:
            ValueError: the numbers of texts and sizes differ, a size is not two positive numbers, or `box_scale` is not
                positive.
            TypeError: texts are not a list of strings.
        """
        written = check_box_format({} if self.box_format is None else self.box_format)
        scale = written["scale"] if box_scale is None else box_scale
        return locate_boxes(texts, image_sizes, scale, written["order"], written["padded"] if padded is None else padded)

    def _merge_kwargs(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        merged = super()._merge_kwargs(*args, **kwargs)
        for name in ("max_length", "pad_to_multiple_of"):
            value = merged["text_kwargs"].get(name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise TypeError(f"{name}={shown(value)} must be a whole number.")
            if value is not None and not 1 <= value < 2**31:  # the tokenizer would answer with an OverflowError
                raise ValueError(f"{name}={shown(value)} must lie in [1, 2**31).")
        for name in ("padding", "truncation"):
            value = merged["text_kwargs"].get(name)
            if value is not None and not isinstance(value, (bool, str)):  # or an enum of transformers, which is a string
                raise TypeError(f"{name}={shown(value)} must be True, False or the name of a strategy.")
        return merged

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: Any = None,
        documents: Any = None,
        add_generation_prompt: bool = False,
        sanitize_control_tokens: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Renders a conversation, or a batch, after checking it; see `ProcessorMixin.apply_chat_template`.

        Args:
            conversation: messages with a `role` and a `content`, which is text or a list of parts:
                `{"type": "text", "text": ...}`, or `{"type": "image"}` with one image as `image`, `url`, `path` or `base64`.
            sanitize_control_tokens: read control tokens in the messages, such as `</s>` and `<image>`, as ordinary text. For
                text of strangers. Needs `tokenize=True` and a fast tokenizer. transformers has it since 5.24, but not for
                `image_placement="prefix"` and not together with `return_assistant_tokens_mask`.
            **kwargs: all others of transformers, and variables of the template, such as `prompt_version`.

        Raises:
            ValueError: a conversation is malformed, or the template rejects it. The message names conversation, turn and
                part, counted from 1.
            TypeError: something has the wrong type.
        """
        settings = {"add_generation_prompt": add_generation_prompt, "sanitize_control_tokens": sanitize_control_tokens}
        check_settings({**kwargs, **settings, "chat_template": chat_template, "tools": tools, "documents": documents})
        templates = self.chat_template
        template = chat_template or templates or ""
        if isinstance(templates, dict):
            template = templates.get(chat_template or "default", chat_template or "")
        images = {**(kwargs.get("processor_kwargs") or {}), **kwargs}.get("images")
        opens_images = bool(kwargs.get("tokenize")) and images is None
        conversations, is_batch = check_conversations(conversation, template, opens_images)
        rendered_by = self
        if sanitize_control_tokens:
            if not kwargs.get("tokenize"):
                raise ValueError(
                    "sanitize_control_tokens=True needs tokenize=True, since a rendered text does not tell who wrote what."
                )
            tokens = ControlTokens(control_tokens(self.tokenizer, template))
            rendered_by = copy.copy(self)
            rendered_by._control_tokens = tokens
            conversations = [tokens.hide_in_messages(messages) for messages in conversations]
            tools, documents = tokens.hide(tools), tokens.hide(documents)
            kwargs = {name: value if name == "processor_kwargs" else tokens.hide(value) for name, value in kwargs.items()}
        options = {"chat_template": chat_template, "tools": tools, "documents": documents, **kwargs}
        options["add_generation_prompt"] = add_generation_prompt
        render = super(MFRSVLMProcessor, rendered_by).apply_chat_template
        try:
            return render(conversations if is_batch else conversations[0], **options)
        except Exception:
            # Was it the template? Which conversation?
            for name in ("tokenize", "return_dict", "return_tensors", "processor_kwargs", "return_assistant_tokens_mask"):
                options.pop(name, None)
            for number, messages in enumerate(conversations, start=1):
                try:
                    render(messages, **options)
                except Exception as error:  # a template may raise anything
                    where = f"Conversation {number} of {len(conversations)}: " if is_batch else ""
                    reason = " ".join(str(error).split()) or type(error).__name__
                    raise ValueError(f"{where}the chat template does not render it: {reason}") from error
            raise

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        image_inputs = self.image_processor(images, **kwargs)
        count = len(image_inputs["pixel_values"])
        return image_inputs, [self.replace_image_token(image_inputs, index, **kwargs) for index in range(count)]

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Prepares prompts and their images for the model.

        Args:
            images: one image, a list, or a list of lists (one per prompt), in reading order over all prompts.
            text: one prompt or a list. Each `<image>` in it takes the next image. Prompts that begin with the
                beginning-of-sequence token, as those of the chat template do, get no second one.
            **kwargs: of the tokenizer and the image processor. Truncation never cuts visual tokens: inline placement
                refuses it where it would, prefix placement cuts text only.

        Returns:
            `input_ids`, `attention_mask` (B, S), and, for N > 0 images, `pixel_values` (N, L), one row an image.

        Raises:
            ValueError: the number of images differs from the number of markers (both are named); an image is bad;
                no room for text is left by `max_length`; only some prompts begin with the beginning-of-sequence token; a
                setting makes no sense.
            TypeError: an input or a setting has the wrong type.
        """
        for name in ("text_kwargs", "images_kwargs", "common_kwargs"):
            if kwargs.get(name) is None:
                kwargs.pop(name, None)
            elif not isinstance(kwargs[name], Mapping):
                raise TypeError(f"{name}={shown(kwargs[name])} must be a mapping of settings.")
        prompts = [text] if text is None or isinstance(text, str) else text
        if not isinstance(prompts, (list, tuple)) or not all(text is None or isinstance(prompt, str) for prompt in prompts):
            raise TypeError(f"text must be a string or a list of strings, got {type(text).__name__} {str(text)[:200]!r}.")
        if not prompts:
            raise ValueError("text is an empty list: pass at least one prompt.")
        if text is not None and isinstance(images, (list, tuple)) and not flatten_images(images):
            images = None  # a batch of prompts without any image
        for index, prompt in enumerate(prompts):
            check_text(prompt or "", f"prompt {index + 1} of {len(prompts)}")
        if self._control_tokens is not None:
            return self._call_with_stand_ins(self._control_tokens, images, prompts, **kwargs)
        bos = self.tokenizer.bos_token
        begun = [bool(bos) and prompt.startswith(bos) for prompt in prompts if prompt is not None]
        if any(begun) and "add_special_tokens" not in {**kwargs, **(kwargs.get("text_kwargs") or {})}:
            if not all(begun):
                raise ValueError(
                    f"{sum(begun)} of {len(begun)} prompts begin with {bos!r}, the others without: write it before all or "
                    "before none, or set add_special_tokens."
                )
            kwargs["add_special_tokens"] = False
        with plain_errors():
            if text is not None and self.image_placement == "prefix":
                return self._call_prefix(images, text, **kwargs)
            self._check_truncation(prompts, **kwargs)
            outputs = super().__call__(images=images, text=text, **kwargs)
        if "offset_mapping" in outputs:
            found = outputs["offset_mapping"]
            rows = zip(
                outputs.get("overflow_to_sample_mapping", range(len(found))), outputs["input_ids"], found, strict=True
            )
            offsets: Any = [self._offsets_in_prompt(prompts[int(row)], ids, pairs) for row, ids, pairs in rows]
            as_found: dict[type, Any] = {torch.Tensor: torch.tensor, np.ndarray: np.array}
            outputs["offset_mapping"] = as_found.get(type(found), list)(offsets)
            if "text_replacement_offsets" in outputs:
                outputs["text_replacement_offsets"] = [[] for _ in prompts]
        return outputs

    def _call_with_stand_ins(self, tokens: ControlTokens, images: Any, prompts: Any, **kwargs: Any) -> BatchFeature:
        """Reads prompts in which control tokens and stand-ins have changed places, see `ControlTokens`."""
        reader = copy.copy(self)
        reader._control_tokens = None
        reader.tokenizer = rename_control_tokens(self.tokenizer, tokens.stand_ins)
        reader.image_token = tokens.stand_ins[self.image_token]
        try:
            return reader(images, [tokens.exchange(prompt) for prompt in prompts], **kwargs)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(tokens.exchange(str(error))) from error

    def _check_truncation(self, prompts: Any, **kwargs: Any) -> None:
        """Raises `ValueError` where truncation would remove the end of a prompt for the assistant. For inline placement."""
        ending = [prompt for prompt in prompts if prompt is not None and prompt.rstrip().endswith(ASSISTANT)]
        if not ending or self.tokenizer.truncation_side != "right":
            return
        merged = self._merge_kwargs(
            ModelProcessorKwargs=self.valid_processor_kwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        given, limit = merged["text_kwargs"], merged["text_kwargs"].get("max_length") or self.tokenizer.model_max_length
        # Without a word on either, transformers truncates to a max_length.
        implied = given.get("truncation") is None and given.get("max_length") and not given.get("padding")
        if given.get("return_overflowing_tokens") or not (implied or given.get("truncation")):
            return
        if given.get("truncation") == "do_not_truncate":
            return
        (tokens,) = self._get_num_multimodal_tokens([(0, 0)], **merged["images_kwargs"]).num_image_tokens
        for prompt in ending:
            ids = self.tokenizer(prompt, add_special_tokens=given.get("add_special_tokens", True), verbose=False).input_ids
            _check_length(len(ids) + ids.count(self.image_token_id) * (tokens - 1), limit)

    def _check_special_mm_tokens(self, text: list[str], text_inputs: Any, modalities: list[str]) -> None:
        expected = [prompt.count(self.image_token) for prompt in text]
        found = [[int(token) for token in row].count(self.image_token_id) for row in text_inputs["input_ids"]]
        # With return_overflowing_tokens, a prompt may have several rows.
        if expected != found and (len(expected) == len(found) or sum(expected) != sum(found)):
            lengths = [len(row) for row in text_inputs["input_ids"]]
            raise ValueError(
                f"The prompts have {shown(expected)} image tokens, but the {shown(lengths)} tokens that are left have "
                f"{shown(found)}: image tokens are never truncated. Raise max_length, pass fewer images, or leave out "
                "split_special_tokens."
            )

    def _offsets_in_prompt(self, prompt: str, ids: Any, offsets: Any) -> list[tuple[int, int]]:
        """Offsets into a prompt as it was given, from those into the prompt with each marker as often as it has tokens.

        With them, and with padding where the text ended, every version of transformers finds the answers in a conversation.
        """
        markers = [match.span() for match in re.finditer(re.escape(self.image_token), prompt)]
        visual = sum(int(token) == self.image_token_id for token in ids)
        added = (visual // max(1, len(markers)) - 1) * len(self.image_token)
        ends = [end + number * added for number, (_, end) in enumerate(markers, start=1)]  # with all tokens of each
        result: list[tuple[int, int]] = []
        for start, end in ((int(start), int(end)) for start, end in offsets):
            before = bisect.bisect_right(ends, start)
            start, end = start - before * added, end - before * added
            if start == end:
                start = end = max(end, result[-1][1] if result else 0)
            elif before < len(markers) and start >= markers[before][0]:
                start, end = markers[before]
            result.append((start, end))
        return result

    def _call_prefix(self, images: Any, text: Any, **kwargs: Any) -> BatchFeature:
        images, text, _, _ = self.prepare_inputs_layout(images=images, text=text)
        self.validate_inputs(images=images, text=text)
        merged = self._merge_kwargs(
            ModelProcessorKwargs=self.valid_processor_kwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        image_inputs: dict[str, Any] = {}
        tokens_per_image: list[int] = []
        if images is not None:
            image_inputs, replacements = self._process_images(images, **merged["images_kwargs"])
            tokens_per_image = [replacement.count(self.image_token) for replacement in replacements]
        text_kwargs = merged["text_kwargs"]
        for name in ("return_mm_token_type_ids", "return_text_replacement_offsets"):
            # Settings of the processor since transformers 5.23, of the text before.
            text_kwargs.setdefault(name, merged.get(name, False))
        return_tensors = text_kwargs.pop("return_tensors", None)
        text_inputs = self._tokenize_after_images(text, tokens_per_image, **text_kwargs)
        return BatchFeature({**text_inputs, **image_inputs}, tensor_type=return_tensors)

    def _tokenize_after_images(
        self,
        text: list[str],
        tokens_per_image: list[int],
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_offsets_mapping: bool = False,
        return_mm_token_type_ids: bool = False,
        return_text_replacement_offsets: bool = False,
        return_attention_mask: bool | None = None,
        add_special_tokens: bool = True,
        verbose: bool = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Ids of each prompt: the visual tokens of its images, then `<s>` and the pieces of text between the markers.

        Offsets, where asked for, point into the prompt as it was given, with its markers unexpanded.
        """
        unsupported = sorted(name for name, value in kwargs.items() if value)
        if unsupported:
            raise ValueError(f'{unsupported} cannot be used with image_placement="prefix".')
        longest = self.tokenizer.model_max_length if max_length is None else max_length
        remaining = iter(tokens_per_image)
        rows: dict[str, list[list[Any]]] = {"input_ids": [], "attention_mask": [], "offset_mapping": []}
        for prompt in text:
            pieces = prompt.split(self.image_token)
            num_visual = sum(next(remaining) for _ in pieces[1:])
            limit = None
            if truncation and longest < LARGE_INTEGER:  # what a tokenizer without a limit has for one
                limit = longest - num_visual
                if limit < 1:
                    raise ValueError(
                        f"max_length={longest} leaves no room for text after {num_visual} image tokens, which are never "
                        "truncated. Raise max_length or pass fewer images."
                    )
                if prompt.rstrip().endswith(ASSISTANT) and self.tokenizer.truncation_side == "right":
                    whole = self.tokenizer(
                        pieces, is_split_into_words=True, add_special_tokens=add_special_tokens, verbose=False
                    )
                    _check_length(num_visual + len(whole.input_ids), longest)
            encoding = self.tokenizer(
                pieces,
                is_split_into_words=True,
                truncation=truncation or False,
                max_length=limit,
                return_offsets_mapping=True,
                add_special_tokens=add_special_tokens,
                verbose=verbose,
            )
            starts, start = [], 0
            for piece in pieces:
                starts.append(start)
                start += len(piece) + len(self.image_token)
            offsets = [
                (0, 0) if word is None else (begin + starts[word], end + starts[word])
                for word, (begin, end) in zip(encoding.word_ids(), encoding["offset_mapping"], strict=True)
            ]
            rows["input_ids"].append([self.image_token_id] * num_visual + encoding["input_ids"])
            rows["attention_mask"].append([1] * (num_visual + len(encoding["input_ids"])))
            rows["offset_mapping"].append([(0, 0)] * num_visual + offsets)

        padded = self.tokenizer.pad(
            {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"]},
            padding=padding,
            max_length=max_length if padding == "max_length" else None,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
        )
        outputs = dict(padded)
        if return_attention_mask is False:
            outputs.pop("attention_mask")
        if return_mm_token_type_ids:
            outputs["mm_token_type_ids"] = self.create_mm_token_type_ids(outputs["input_ids"])
        if return_offsets_mapping:
            side = padding_side or self.tokenizer.padding_side
            outputs["offset_mapping"] = []
            for ids, offsets in zip(outputs["input_ids"], rows["offset_mapping"], strict=True):
                end = offsets[-1][1] if offsets and side == "right" else 0
                fill = [(end, end)] * (len(ids) - len(offsets))
                outputs["offset_mapping"].append(fill + offsets if side == "left" else offsets + fill)
        if return_text_replacement_offsets:
            outputs["text_replacement_offsets"] = [[] for _ in text]
        return outputs


def _check_length(length: int, limit: int) -> None:
    if length > limit:
        raise ValueError(
            f"The prompt has {length} tokens, and truncation to max_length={limit} would remove {ASSISTANT!r} at its end. "
            "Raise max_length, shorten the prompt, or set tokenizer.truncation_side to 'left'."
        )


# See the end of `configuration_mfrsvlm.py`.
MFRSVLMProcessor.register_for_auto_class("AutoProcessor")

__all__ = [
    "MFRSVLMImageProcessor",
    "MFRSVLMProcessor",
    "cut_windows",
    "join_windows",
    "locate_boxes",
    "make_chat_template",
    "parse_boxes",
    "parse_points",
]
