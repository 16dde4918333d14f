"""Processor of MF-RSVLM: images to a global view and packed windows, prompts to ids with image placeholders.

The image processor needs no torchvision: it works on numpy and Pillow, and takes PIL images, numpy arrays (channels
first or last) and torch tensors, one or many.
"""

import os
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from transformers import AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
)
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin

from .configuration_mfrsvlm import WindowScale, window_table


# Modes that hold 8 bits a channel. Pillow clips the others (16-bit, 32-bit, float) to white without a word.
EIGHT_BIT_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"}
# TIFF tag 254 marks a page as a smaller copy (bit 0) or a mask (bit 2) of another one, as in cloud-optimised GeoTIFF.
TIFF_SUBFILE_TYPE, TIFF_DEPENDENT_PAGE = 254, 0b101


def cut_windows(canvas: np.ndarray, windows: tuple[WindowScale, ...], packing: str = "windows_first") -> np.ndarray:
    """Cuts a canvas (3, side, side) into the windows of all scales, packed scale by scale, windows in row-major order.

    Args:
        canvas: the normalised canvas.
        windows: geometry of the scales.
        packing: `"windows_first"` packs each scale as (n, 3, size, size). `"channels_first"` packs it as
            (3, n, size, size), which the model reads as n windows all the same: each of them then shows three successive
            planes of this list, mostly three places in one colour. The published implementation does so, and weights
            that were trained with it need it.

    Returns:
        1-D array of `sum(window.num_values for window in windows)` values.
    """
    parts = []
    for window in windows:
        tiles = np.lib.stride_tricks.sliding_window_view(canvas, (window.size, window.size), axis=(1, 2))
        tiles = tiles[:, :: window.stride, :: window.stride]  # (3, rows, columns, size, size)
        parts.append((tiles if packing == "channels_first" else tiles.transpose(1, 2, 0, 3, 4)).reshape(-1))
    return np.concatenate(parts)


def join_windows(
    packed: np.ndarray, windows: tuple[WindowScale, ...], canvas_size: int, packing: str = "windows_first"
) -> list[np.ndarray]:
    """Inverse of `cut_windows`: one canvas (3, canvas_size, canvas_size) per scale, overlaps averaged."""
    canvases, start = [], 0
    for window in windows:
        tiles = packed[start : start + window.num_values]
        start += window.num_values
        if packing == "channels_first":
            tiles = tiles.reshape(3, window.num_windows, window.size, window.size).swapaxes(0, 1)
        else:
            tiles = tiles.reshape(window.num_windows, 3, window.size, window.size)
        total = np.zeros((3, canvas_size, canvas_size), dtype=np.float64)
        count = np.zeros((canvas_size, canvas_size), dtype=np.int64)
        for tile, (top, left) in zip(tiles, window.offsets, strict=True):
            total[:, top : top + window.size, left : left + window.size] += tile
            count[top : top + window.size, left : left + window.size] += 1
        canvases.append((total / count).astype(packed.dtype))
    return canvases


class MFRSVLMImageProcessorKwargs(ImagesKwargs, total=False):
    """
    patch_size: side of the pixel square that one visual token stands for.
    canvas_scale: side of the canvas in global views.
    canvas_source: `"image"`: the canvas is resized from the original pixels; `"global_view"`: upsampled bilinearly from
        the global view, as the published model was trained, so that it holds no more detail than that.
    window_sizes: sides of the windows, pixels. Empty: no windows.
    window_overlap: share of a window that its neighbour covers again.
    window_packing: `"windows_first"`, or `"channels_first"` for the published weights, see `cut_windows`.
    max_aspect_ratio: longest side over shortest side beyond which an image is refused.
    max_image_pixels: pixels of the image, after padding to a square, beyond which it is refused.
    """

    patch_size: int
    canvas_scale: int
    canvas_source: str
    window_sizes: list[int]
    window_overlap: float
    window_packing: str
    max_aspect_ratio: float
    max_image_pixels: int


class MFRSVLMImageProcessor(PilBackend):
    """Makes the global view and the sliding windows of every image.

    Each image is dropped its alpha, padded to a square in the mean colour (`do_pad`), resized, centre-cropped, scaled
    and normalised. Output, for N images:

    - `pixel_values` (N, 3, crop, crop): the global views.
    - `pixel_values_local` (N, packed): the windows of all scales in one row, see `cut_windows`. 28.8 MB an image in
      float32 for the default geometry.

    Arrays and tensors hold 8-bit values, or floats in [0, 1] or [0, 255]. 16-bit rasters have no agreed white: stretch
    them to 8 bits first.

    Raises:
        ValueError: an image cannot be read, is empty, animated, too large or too elongated, is not finite, or holds
            more than 8 bits; an array has the wrong shape. The message says which image it is.
    """

    valid_kwargs = MFRSVLMImageProcessorKwargs
    model_input_names = ["pixel_values", "pixel_values_local"]

    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"shortest_edge": 336}
    default_to_square = False
    crop_size = {"height": 336, "width": 336}
    do_convert_rgb = True
    do_pad = True
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    patch_size = 14
    canvas_scale = 2
    canvas_source = "image"
    window_sizes = [336, 168]
    window_overlap = 0.5
    window_packing = "windows_first"
    max_aspect_ratio = 200.0
    max_image_pixels = 178_956_970  # what Pillow itself refuses to open

    @property
    def num_image_tokens(self) -> int:
        """Visual tokens of one image."""
        return (self.crop_size["height"] // self.patch_size) * (self.crop_size["width"] // self.patch_size)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Opens paths and URLs, see `transformers`; what cannot be opened is a `ValueError` that names it."""
        if isinstance(image_url_or_urls, str):
            try:
                return super().fetch_images(image_url_or_urls)
            except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
                raise ValueError(f"Cannot open image {image_url_or_urls[:200]!r}: {error}") from error
        return super().fetch_images(image_url_or_urls)

    def _prepare_image_like_inputs(self, images: Any, *args: Any, expected_ndims: int = 3, **kwargs: Any) -> list:
        images = self._prepare_images_structure(images, expected_ndims=expected_ndims)
        if not images:
            raise ValueError("No images given: pass at least one, or leave `images` out.")
        prepared = []
        for index, image in enumerate(images):
            try:
                prepared.append(self.process_image(image, **kwargs))
            except ValueError as error:
                raise ValueError(f"Image {index} of {len(images)}: {error}") from error
        return prepared

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        do_rescale: bool | None = None,
        do_pad: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        max_aspect_ratio: float = max_aspect_ratio,
        max_image_pixels: int = max_image_pixels,
        **kwargs: Any,
    ) -> np.ndarray:
        """Checks one image and brings it to (channels, height, width).

        Returns:
            uint8; float32 only for a float image with `do_rescale=False`.
        """
        if isinstance(image, Image.Image):
            check_extent(image.height, image.width, do_pad, max_aspect_ratio, max_image_pixels)
            return pil_to_array(image, do_convert_rgb)
        if isinstance(image, torch.Tensor):
            image = image.detach().cpu()
            image = (image.float() if image.is_floating_point() else image).numpy()
        if not isinstance(image, np.ndarray):
            raise ValueError(f"expected a PIL image, a numpy array or a torch tensor, got {type(image).__name__}.")
        image = channels_first(image, input_data_format)
        check_extent(*image.shape[1:], do_pad, max_aspect_ratio, max_image_pixels)
        image = to_eight_bits(image, quantise=bool(do_rescale))
        if do_convert_rgb:
            image = np.repeat(image, 3, axis=0) if len(image) == 1 else image[:3]
        return image

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_center_crop: bool,
        crop_size: SizeDict,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        do_pad: bool,
        patch_size: int,
        canvas_scale: int,
        canvas_source: str,
        window_sizes: list[int],
        window_overlap: float,
        window_packing: str,
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        if canvas_source not in ("image", "global_view"):
            raise ValueError(f'canvas_source={canvas_source!r} must be "image" or "global_view".')
        if window_packing not in ("windows_first", "channels_first"):
            raise ValueError(f'window_packing={window_packing!r} must be "windows_first" or "channels_first".')
        windows: tuple[WindowScale, ...] = ()
        if window_sizes:
            windows = window_table(crop_size.height, patch_size, canvas_scale, window_sizes, window_overlap)

        def view(image: np.ndarray, scale: int) -> np.ndarray:
            """The normalised image at `scale` times the size of the global view, (3, side, side)."""
            if do_resize:
                target = SizeDict(**{edge: scale * length for edge, length in dict(size).items() if length})
                image = self.resize(image, target, resample=resample)
            if do_center_crop:
                image = self.center_crop(image, SizeDict(height=scale * crop_size.height, width=scale * crop_size.width))
            if do_rescale:
                image = self.rescale(image, rescale_factor)
            if do_normalize:
                image = self.normalize(image, image_mean, image_std)
            return image.astype(np.float32)

        data: dict[str, list[np.ndarray]] = {"pixel_values": []}
        if windows:
            data["pixel_values_local"] = []
        for image in images:
            if do_pad:
                image = pad_to_square(image, image_mean)
            global_view = view(image, 1)
            data["pixel_values"].append(global_view)
            if not windows:
                continue
            if canvas_source == "image":
                canvas = view(image, canvas_scale)
            else:
                canvas = torch.nn.functional.interpolate(
                    torch.from_numpy(global_view)[None], scale_factor=canvas_scale, mode="bilinear", align_corners=False
                )[0].numpy()
            side = canvas_scale * crop_size.height
            if canvas.shape[1:] != (side, side):
                raise ValueError(
                    f"the canvas has {canvas.shape[1:]} pixels (height, width), but the windows need ({side}, {side}): switch "
                    "do_resize and do_center_crop on, or pass images of that size."
                )
            data["pixel_values_local"].append(cut_windows(canvas, windows, window_packing))
        return BatchFeature(data=data, tensor_type=return_tensors)


def check_extent(
    height: int, width: int, do_pad: bool | None, max_aspect_ratio: float, max_image_pixels: int
) -> None:
    """Refuses images that are empty, a thread, or would not fit in memory as a square."""
    if min(height, width) < 1:
        raise ValueError(f"it is empty: height {height}, width {width}.")
    if max(height, width) > max_aspect_ratio * min(height, width):
        raise ValueError(
            f"height {height} and width {width} differ by more than max_aspect_ratio={max_aspect_ratio:g}: nothing of it would "
            "be left after resizing. Cut it into pieces."
        )
    pixels = max(height, width) ** 2 if do_pad else height * width
    if pixels > max_image_pixels:
        raise ValueError(
            f"height {height} and width {width} make {pixels} pixels{' after padding to a square' if do_pad else ''}, more than "
            f"max_image_pixels={max_image_pixels}. Cut it into pieces, or raise max_image_pixels if the file is trusted."
        )


def pil_to_array(image: Image.Image, do_convert_rgb: bool | None) -> np.ndarray:
    """Decodes a PIL image to uint8 (channels, height, width). Alpha is dropped, not composited."""
    frames = count_frames(image)
    if frames > 1:
        raise ValueError(f"it has {frames} frames. Pass the frame you mean, for example after image.seek(i) and image.copy().")
    if image.mode not in EIGHT_BIT_MODES:
        raise ValueError(
            f"its mode is {image.mode!r}, which is not 8 bits a channel: stretch its values to 0..255 first, for example from the "
            "2nd to the 98th percentile."
        )
    try:
        array = np.asarray(image.convert("RGB") if do_convert_rgb else image)
    except Exception as error:  # decoders raise almost anything on a damaged file
        raise ValueError(f"it cannot be decoded, the file may be damaged: {error}") from error
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    # (H, W) or (H, W, channels) -> (channels, H, W)
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)


def count_frames(image: Image.Image) -> int:
    """Frames that show something of their own: overviews and masks of a GeoTIFF do not count."""
    frames = getattr(image, "n_frames", 1)
    if frames == 1 or image.format != "TIFF":
        return int(frames)
    current, count = image.tell(), 0
    for index in range(frames):
        image.seek(index)
        count += not image.tag_v2.get(TIFF_SUBFILE_TYPE, 0) & TIFF_DEPENDENT_PAGE
    image.seek(current)
    return count


def channels_first(image: np.ndarray, input_data_format: str | ChannelDimension | None) -> np.ndarray:
    """Brings (H, W), (H, W, channels) or (channels, H, W) with 1, 3 or 4 channels to (channels, H, W)."""
    if image.ndim == 2:
        return image[None]
    if image.ndim != 3:
        raise ValueError(f"an array must have 2 or 3 dimensions, got shape {image.shape}.")
    if input_data_format is None:
        try:
            input_data_format = infer_channel_dimension_format(image, num_channels=(1, 3, 4))
        except ValueError as error:
            raise ValueError(f"neither end of shape {image.shape} is a channel dimension of 1, 3 or 4.") from error
    if ChannelDimension(input_data_format) == ChannelDimension.LAST:
        image = np.moveaxis(image, -1, 0)
    if len(image) not in (1, 3, 4):
        raise ValueError(f"{len(image)} channels in an array of shape {image.shape} (channels first): pass 1, 3 or 4.")
    return image


def to_eight_bits(image: np.ndarray, quantise: bool) -> np.ndarray:
    """Checks the values of an array and casts them to uint8. Floats up to 1 count as scaled to [0, 1]."""
    if image.dtype == np.uint8:
        return image
    if not (np.issubdtype(image.dtype, np.integer) or np.issubdtype(image.dtype, np.floating)):
        raise ValueError(f"an array must hold integers or floats, got dtype {image.dtype}.")
    if not np.isfinite(image).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(image))} values are NaN or infinite: fill them first.")
    low, high = image.min(), image.max()
    if low < 0 or high > 255:
        raise ValueError(
            f"values of dtype {image.dtype} range from {low} to {high}, outside 0..255: stretch them to 8 bits first."
        )
    if np.issubdtype(image.dtype, np.floating):
        if not quantise:
            return image.astype(np.float32)
        image = np.rint(image * 255 if high <= 1 else image)
    return image.astype(np.uint8)


def pad_to_square(image: np.ndarray, image_mean: tuple[float, ...]) -> np.ndarray:
    """Centres (channels, H, W) on a square of the mean colour; an odd remainder goes to the bottom and the right."""
    channels, height, width = image.shape
    if height == width:
        return image
    side = max(height, width)
    mean = np.broadcast_to(np.asarray(image_mean, dtype=np.float64), (channels,))
    if image.dtype == np.uint8:
        mean = (mean * 255).astype(np.uint8)  # truncated, as the published model was trained
    square = np.empty((channels, side, side), dtype=image.dtype)
    square[:] = mean[:, None, None]
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = image
    return square


class MFRSVLMProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: MFRSVLMImageProcessorKwargs
    _defaults = {"text_kwargs": {"padding": False}}


class MFRSVLMProcessor(ProcessorMixin):
    """Image processor and tokenizer in one; every `<image>` of a prompt becomes the visual tokens of one image.

    Args:
        image_processor: an `MFRSVLMImageProcessor`.
        tokenizer: a tokenizer that knows `image_token` as one token.
        chat_template: Jinja template, see `apply_chat_template`.
        image_token: the marker of an image in a prompt.
        image_placement: `"inline"`: visual tokens stand where the marker stood; `"prefix"`: those of all images of a
            prompt come first, before `<s>`, and the pieces of text around the markers are tokenized apart, as the
            published model was trained.
    """

    valid_processor_kwargs = MFRSVLMProcessorKwargs

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        image_placement: str = "inline",
    ) -> None:
        if image_placement not in ("inline", "prefix"):
            raise ValueError(f'image_placement={image_placement!r} must be "inline" or "prefix".')
        self.image_placement = image_placement
        self.image_token = image_token
        ids = tokenizer.encode(image_token, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(
                f"The tokenizer splits {image_token!r} into {len(ids)} tokens. Add it first: "
                f"tokenizer.add_special_tokens({{'additional_special_tokens': [{image_token!r}]}})."
            )
        self.image_token_id = ids[0]
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        # Through the Auto classes this would ask whether to run the code in the folder, although this is that code, and
        # load a second copy of it. The tokenizer needs none, but looks at the model's config unless it is given one.
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **{**kwargs, "config": PreTrainedConfig()})
        kwargs.pop("backend", None)  # an option of AutoImageProcessor, and a read-only property of what it loads
        return [MFRSVLMImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs), tokenizer]

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        # Where the tokenizer was loaded from is noted among its options and would be published with them.
        for name in ("is_local", "local_files_only"):
            self.tokenizer.init_kwargs.pop(name, None)
        # As a string, because pushing takes the repository's name from it in a way that fails for a Path.
        return super().save_pretrained(os.fspath(save_directory), push_to_hub=push_to_hub, **kwargs)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        height, width = np.shape(image_inputs["pixel_values"][image_idx])[-2:]
        patch_size = kwargs.get("patch_size") or self.image_processor.patch_size
        return self.image_token * ((height // patch_size) * (width // patch_size))

    def _get_num_multimodal_tokens(self, image_sizes: list[Any] | None = None, **kwargs: Any) -> MultiModalData:
        """Visual tokens and encoder images of images of the given (height, width); the same for every size."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(
            num_image_tokens=[self.image_processor.num_image_tokens] * count, num_image_patches=[1] * count
        )

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Prepares prompts and their images for the model.

        Args:
            images: one image, a list, or a list of lists (one per prompt), in reading order over all prompts.
            text: one prompt or a list. Each `<image>` in it takes the next image.
            **kwargs: of the tokenizer and the image processor. Truncation never cuts visual tokens: inline placement
                refuses it where it would, prefix placement cuts text only.

        Returns:
            `input_ids`, `attention_mask`, and `pixel_values`, `pixel_values_local` if there are images.

        Raises:
            ValueError: the number of images differs from the number of markers (both are named); an image is bad;
                no room for text is left by `max_length`.
        """
        if isinstance(images, (list, tuple)) and not any(
            len(group) if isinstance(group, (list, tuple)) else True for group in images
        ):
            images = None  # a batch of prompts without any image
        if text is None or self.image_placement == "inline":
            return super().__call__(images=images, text=text, **kwargs)

        images, text, _, _ = self.prepare_inputs_layout(images=images, text=text)
        self.validate_inputs(images=images, text=text, **kwargs)
        merged = self._merge_kwargs(
            ModelProcessorKwargs=self.valid_processor_kwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        image_inputs: dict[str, Any] = {}
        tokens_per_image: list[int] = []
        if images is not None:
            image_inputs, replacements = self._process_images(images, **merged["images_kwargs"])
            tokens_per_image = [replacement.count(self.image_token) for replacement in replacements]
        return_tensors = merged["text_kwargs"].pop("return_tensors", None)
        text_inputs = self._tokenize_after_images(text, tokens_per_image, **merged["text_kwargs"])
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
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Ids of each prompt: the visual tokens of its images, then `<s>` and the pieces of text between the markers.

        Offsets, where asked for, point into the prompt as it was given, with its markers unexpanded.
        """
        remaining = iter(tokens_per_image)
        rows: dict[str, list[list[Any]]] = {"input_ids": [], "attention_mask": [], "offset_mapping": []}
        for prompt in text:
            pieces = prompt.split(self.image_token)
            num_visual = sum(next(remaining) for _ in pieces[1:])
            limit = None
            if truncation:
                limit = (max_length or self.tokenizer.model_max_length) - num_visual
                if limit < 1:
                    raise ValueError(
                        f"max_length={max_length or self.tokenizer.model_max_length} leaves no room for text after "
                        f"{num_visual} image tokens, which are never truncated. Raise max_length or pass fewer images."
                    )
            encoding = self.tokenizer(
                pieces,
                is_split_into_words=True,
                truncation=truncation or False,
                max_length=limit,
                return_offsets_mapping=True,
                **kwargs,
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
            max_length=max_length,
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
                fill = [(0, 0)] * (len(ids) - len(offsets))
                outputs["offset_mapping"].append(fill + offsets if side == "left" else offsets + fill)
        if return_text_replacement_offsets:
            outputs["text_replacement_offsets"] = [[] for _ in text]
        return outputs


# The published prompts. They differ in one word, "human" at inference and "user" in training, so both have a name:
# apply_chat_template(..., prompt_version="v1"). A system message replaces the whole preamble. Images come first in
# their turn. The generation block opens before the space after "ASSISTANT:", so that the loss covers exactly the
# tokens that training of the published model labelled.
CHAT_TEMPLATE = """\
{%- set person = {"mfrsvlm_v1": "human", "v1": "user"}[prompt_version | default("mfrsvlm_v1")] -%}
{%- set preamble = "A chat between a curious " + person + " and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the " + person + "'s questions." -%}
{%- if messages[0].role == "system" -%}
{%- set content = messages[0].content -%}
{%- set preamble = content if content is string else content | map(attribute="text") | join -%}
{%- set messages = messages[1:] -%}
{%- endif -%}
{{- preamble + " " -}}
{%- for message in messages -%}
{%- set body = namespace(images="", text="") -%}
{%- if message.content is string -%}
{%- set body.text = message.content -%}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == "image" or part.type == "image_url" -%}
{%- set body.images = body.images + "<image>\\n" -%}
{%- elif part.type == "text" -%}
{%- set body.text = body.text + part.text -%}
{%- else -%}
{{- raise_exception("Content of type " + part.type + " is not supported, only image and text.") -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message.role == "user" -%}
{{- "USER: " + body.images + body.text + " " -}}
{%- elif message.role == "assistant" -%}
{{- "ASSISTANT:" -}}
{%- generation -%}
{{- " " + body.text + eos_token -}}
{%- endgeneration -%}
{%- else -%}
{{- raise_exception("Unknown role " + message.role + ": a system message may only come first, then user and assistant.") -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "ASSISTANT:" -}}
{%- endif -%}
"""


__all__ = ["CHAT_TEMPLATE", "MFRSVLMImageProcessor", "MFRSVLMProcessor", "cut_windows", "join_windows"]
