"""Image processor of MF-RSVLM: an image becomes its global view and the windows of every scale.

It needs no torchvision: it works on numpy and Pillow, and takes PIL images, numpy arrays (channels first or last) and torch
tensors, one or many.
"""

import base64
import contextlib
import io
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from huggingface_hub import get_session
from huggingface_hub.errors import StrictDataclassError
from PIL import Image, ImageOps
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs

from .configuration_mfrsvlm import WindowScale, window_table


# Modes that hold 8 bits a channel and convert to RGB. Pillow clips the others (16-bit, 32-bit, float) to white without
# a word, or cannot convert them.
EIGHT_BIT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"}
CHANNEL_COUNTS = (1, 4, 3)  # the likeliest last
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


class MFRSVLMImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
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
    window_sizes: list[int] | tuple[int, ...]
    window_overlap: float | int
    window_packing: str
    max_aspect_ratio: float | int
    max_image_pixels: int


class MFRSVLMImageProcessor(PilBackend):
    """Makes the global view and the sliding windows of every image.

    Each image is dropped its alpha, padded to a square in the mean colour (`do_pad`), resized, centre-cropped, scaled
    and normalised. Output, for N images:

    - `pixel_values` (N, 3, crop, crop): the global views.
    - `pixel_values_local` (N, packed): the windows of all scales in one row, see `cut_windows`. 28.8 MB an image in
      float32 for the default geometry.

    Arrays and tensors hold 8-bit values, or floats in [0, 1] or [0, 255]. 16-bit rasters have no agreed white: stretch
    them to 8 bits first. Lists may be nested; a 4-D array is a list of images. A path, URL or base64 text is opened,
    and turned upright if its EXIF data say so.

    Raises:
        ValueError: an image cannot be read, is empty, animated, too large or too elongated, is not finite, or holds
            more than 8 bits; an array has the wrong shape; a setting makes no sense. The message names the image.
        TypeError: an image is none of the above types, or a setting has the wrong type.
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

    def __init__(self, **kwargs: Any) -> None:
        with plain_errors():
            super().__init__(**kwargs)
            self._validate_preprocess_kwargs(**{name: getattr(self, name) for name in self._valid_kwargs_names})

    @property
    def num_image_tokens(self) -> int:
        """Visual tokens of one image."""
        return (self.crop_size["height"] // self.patch_size) * (self.crop_size["width"] // self.patch_size)

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """Prepares one image or many; settings given here override those of the processor, see the class."""
        with plain_errors():
            return super().preprocess(images, *args, **kwargs)

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        super()._validate_preprocess_kwargs(**kwargs)
        for name, choices in (
            ("canvas_source", ("image", "global_view")),
            ("window_packing", ("windows_first", "channels_first")),
        ):
            if kwargs[name] not in choices:
                raise ValueError(f"{name}={kwargs[name]!r} must be one of {choices}.")
        crop_size = kwargs["crop_size"] or SizeDict()
        if not crop_size.height or crop_size.height != crop_size.width:
            raise ValueError(f"crop_size={dict(crop_size)} must have a height and a width, and they must be equal.")
        window_table(
            crop_size.height,
            kwargs["patch_size"],
            kwargs["canvas_scale"],
            kwargs["window_sizes"],
            kwargs["window_overlap"],
        )
        if kwargs["window_sizes"] and kwargs["canvas_source"] == "image" and not kwargs["do_resize"]:
            raise ValueError(
                'canvas_source="image" needs do_resize=True: without, the canvas would show more of the image than the '
                'global view. Use canvas_source="global_view".'
            )
        for name in ("max_aspect_ratio", "max_image_pixels"):
            if not kwargs[name] >= 1:
                raise ValueError(f"{name}={kwargs[name]} must be at least 1.")
        used = {
            "rescale_factor": kwargs["do_rescale"],
            "image_mean": kwargs["do_normalize"] or kwargs["do_pad"],
            "image_std": kwargs["do_normalize"],
        }
        for name in (name for name, is_used in used.items() if is_used):
            values = np.asarray(kwargs[name], dtype=object)
            if values.size not in CHANNEL_COUNTS or any(value is None or not math.isfinite(value) for value in values.flat):
                raise ValueError(f"{name}={kwargs[name]} must be a finite number, or one for each of 1, 3 or 4 channels.")
            if name == "image_std" and not all(values.flat):
                raise ValueError(f"image_std={kwargs[name]} must not be 0.")

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Opens the paths, URLs and base64 texts among the images, at any depth of nesting; leaves the rest as it is."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, os.PathLike)):
            return open_image(os.fspath(image_url_or_urls))
        return image_url_or_urls

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list[Any]:
        return flatten_images(images)

    def _prepare_image_like_inputs(self, images: Any, *args: Any, expected_ndims: int = 3, **kwargs: Any) -> list[Any]:
        images = self._prepare_images_structure(images, expected_ndims=expected_ndims)
        if not images:
            raise ValueError("No images given: pass at least one, or leave `images` out.")
        prepared = []
        for index, image in enumerate(images):
            try:
                prepared.append(self.process_image(self.fetch_images(image), **kwargs))
            except TypeError as error:
                raise TypeError(f"Image {index} of {len(images)}: {error}") from error
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
        """Checks one image and brings it to (channels, height, width): 3 channels, or its own without `do_convert_rgb`.

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
            raise TypeError(
                f"expected a PIL image, a numpy array, a torch tensor, a path or a URL, got {type(image).__name__}."
            )
        image = channels_first(image, input_data_format)
        check_extent(image.shape[1], image.shape[2], do_pad, max_aspect_ratio, max_image_pixels)
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
        side = crop_size.height
        windows = window_table(side, patch_size, canvas_scale, window_sizes, window_overlap)

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
        for index, image in enumerate(images):
            for name, values in (("image_mean", image_mean), ("image_std", image_std)):
                if np.size(values) not in (1, len(image)):
                    raise ValueError(f"Image {index} has {len(image)} channels, but {name}={values} has {np.size(values)}.")
            if do_pad:
                image = pad_to_square(image, image_mean)
            global_view = view(image, 1)
            if global_view.shape[1:] != (side, side):
                raise ValueError(
                    f"Image {index} has {global_view.shape[1:]} pixels (height, width), but the encoder needs ({side}, "
                    f"{side}): switch do_resize and do_center_crop on, or pass images of that size."
                )
            data["pixel_values"].append(global_view)
            if not windows:
                continue
            if canvas_source == "image":
                canvas = view(image, canvas_scale)
            else:
                canvas = torch.nn.functional.interpolate(
                    torch.from_numpy(global_view)[None], scale_factor=canvas_scale, mode="bilinear", align_corners=False
                )[0].numpy()
            data["pixel_values_local"].append(cut_windows(canvas, windows, window_packing))
        return BatchFeature(data=data, tensor_type=return_tensors)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turns the validation errors of huggingface_hub, which derive from bare `Exception`, into a `TypeError`."""
    try:
        yield
    except StrictDataclassError as error:
        raise TypeError(str(error)) from error


def flatten_images(images: Any) -> list[Any]:
    """One list of images from an image, a list nested to any depth, and 4-D arrays, in reading order."""
    if isinstance(images, (list, tuple)):
        return [image for group in images for image in flatten_images(group)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


def open_image(source: str) -> Image.Image:
    """Opens a path, an http(s) address, a data URI or base64 text, without decoding it.

    Not `transformers.image_utils.load_image`, which converts to RGB at once: 16-bit values would be clipped, the frames
    of an animation lost and large images decoded before they can be refused.
    """
    try:
        if os.path.isfile(source):
            image = Image.open(source)
        elif source.startswith(("http://", "https://")):
            response = get_session().get(source, follow_redirects=True)
            response.raise_for_status()
            image = Image.open(io.BytesIO(response.content))
        else:
            try:
                content = base64.b64decode(source.partition(",")[2] if source.startswith("data:image/") else source)
            except ValueError as error:
                raise ValueError("it is neither a file, nor an http(s) address, nor base64 text") from error
            image = Image.open(io.BytesIO(content))
    except Exception as error:  # decoders and networks raise almost anything
        shown = source if len(source) <= 200 else source[:200] + "..."
        raise ValueError(
            f"cannot open image {shown!r}: {error}. If it is a raster with more than 8 bits a channel, or with other bands "
            "than red, green and blue, read it with rasterio, choose three bands, stretch them to 8 bits, pass the array."
        ) from error
    image.turn_upright = True  # as EXIF data say, once it may be decoded: files are, PIL images are taken as they are
    return image


def check_extent(height: int, width: int, do_pad: bool | None, max_aspect_ratio: float, max_image_pixels: int) -> None:
    """Refuses images that are empty, a thread, or would not fit in memory as a square."""
    if min(height, width) < 1:
        raise ValueError(f"it is empty: height {height}, width {width}.")
    if max(height, width) > max_aspect_ratio * min(height, width):
        raise ValueError(
            f"height {height} and width {width} differ by more than max_aspect_ratio={max_aspect_ratio:g}: nothing of it "
            "would be left after resizing. Cut it into pieces."
        )
    pixels = max(height, width) ** 2 if do_pad else height * width
    if pixels > max_image_pixels:
        raise ValueError(
            f"height {height} and width {width} make {pixels} pixels{' after padding to a square' if do_pad else ''}, more "
            f"than max_image_pixels={max_image_pixels}. Cut it into pieces, or raise max_image_pixels if you trust it."
        )


def pil_to_array(image: Image.Image, do_convert_rgb: bool | None) -> np.ndarray:
    """Decodes a PIL image to uint8 (channels, height, width). Alpha is dropped, not composited."""
    try:
        frames = count_frames(image)
    except Exception as error:  # decoders raise almost anything on a damaged file
        raise ValueError(f"its frames cannot be counted, the file may be damaged: {error}") from error
    if frames > 1:
        raise ValueError(
            f"it has {frames} frames. Pass the frame you mean, for example after image.seek(i) and image.copy()."
        )
    if image.mode not in EIGHT_BIT_MODES:
        raise ValueError(
            f"its mode is {image.mode!r}, not one of {sorted(EIGHT_BIT_MODES)}: bring it to 8 bits a channel first. For a "
            "16-bit or float raster, stretch its values to 0..255, for example from the 2nd to the 98th percentile."
        )
    try:
        if getattr(image, "turn_upright", False):
            image = ImageOps.exif_transpose(image)
        array = np.asarray(image.convert("RGB") if do_convert_rgb else image)
    except Exception as error:
        raise ValueError(f"it cannot be decoded, the file may be damaged: {error}") from error
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    # (H, W) or (H, W, channels) -> (channels, H, W)
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)


def count_frames(image: Image.Image) -> int:
    """Frames that show something of their own.

    The overviews and masks of a GeoTIFF do not count, nor the previews that drones and phones store in a JPEG ("MPO").
    """
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
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
        # Both ends may look like channels if the image is tiny or thin.
        first, last = (CHANNEL_COUNTS.index(n) if n in CHANNEL_COUNTS else -1 for n in (image.shape[0], image.shape[2]))
        if first == last == -1:
            raise ValueError(f"neither end of shape {image.shape} is a channel dimension of 1, 3 or 4.")
        if first == last and image.shape != (1, 1, 1):
            raise ValueError(
                f"both ends of shape {image.shape} could be channels: pass input_data_format, "
                '"channels_first" or "channels_last".'
            )
        input_data_format = ChannelDimension.FIRST if first >= last else ChannelDimension.LAST
    if ChannelDimension(input_data_format) == ChannelDimension.LAST:
        image = np.moveaxis(image, -1, 0)
    if len(image) not in CHANNEL_COUNTS:
        raise ValueError(f"{len(image)} channels in an array of shape {image.shape} (channels first): pass 1, 3 or 4.")
    return image


def to_eight_bits(image: np.ndarray, quantise: bool) -> np.ndarray:
    """Checks the values of an array and casts them to uint8. Floats up to 1 count as scaled to [0, 1]."""
    if image.dtype == np.uint8:
        return image
    is_float = np.issubdtype(image.dtype, np.floating)
    if not is_float and not np.issubdtype(image.dtype, np.integer):
        raise ValueError(f"an array must hold integers or floats, got dtype {image.dtype}.")
    if image.dtype in (np.int16, np.uint16):
        # Whatever its values are: a dark tile must not be read in another way than the bright one beside it.
        raise ValueError(f"an array of dtype {image.dtype} holds a 16-bit raster: stretch it to 8 bits, as uint8.")
    if not np.isfinite(image).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(image))} values are NaN or infinite: fill them first.")
    low, high = image.min(), image.max()
    if low < 0 or high > 255:
        raise ValueError(
            f"values of dtype {image.dtype} range from {low} to {high}, outside 0..255: stretch them to 8 bits first."
        )
    if is_float and 1 < high < 2:
        # Most likely [0, 1] after an interpolation that overshot, which would turn black if it were read as [0, 255].
        raise ValueError(f"float values range from {low:g} to {high:g}, neither [0, 1] nor [0, 255]: clip or scale them.")
    if is_float and not quantise:
        return image.astype(np.float32)
    if is_float:
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
        mean = np.clip(mean * 255, 0, 255).astype(np.uint8)  # truncated, as the published model was trained
    square = np.empty((channels, side, side), dtype=image.dtype)
    square[:] = mean[:, None, None]
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = image
    return square


__all__ = ["MFRSVLMImageProcessor", "cut_windows", "join_windows"]
