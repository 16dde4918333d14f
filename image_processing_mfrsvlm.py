"""Image processor of MF-RSVLM: packs the global view and the windows of every scale into one row per image.

It uses numpy and Pillow, without torchvision. Images are opened by `open_image` of `image_sources_mfrsvlm`.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs

from .configuration_mfrsvlm import MFRSVLMConfig, WindowScale, packed_lengths, window_table
from .image_sources_mfrsvlm import ROWS_PIXELS, image_size, open_image, open_source, read_planes, shown


# What saved settings hold besides the settings themselves, and those that have to be there.
METADATA = {"auto_map", "feature_extractor_type", "image_processor_type", "processor_class"}
SAVED = ("size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std")
RGB = ("red", "green", "blue")
LARGEST_SIDE, MOST_VALUES = 2**14, 2**28  # pixels of a view, values of a row (1 GiB in float32)
PIXEL_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "uint8": torch.uint8}


def cut_windows(
    canvas: np.ndarray,
    windows: Sequence[WindowScale],
    packing: str = "windows_first",
    out: np.ndarray | None = None,
    stem: Sequence[int] | None = None,
) -> np.ndarray:
    """Cuts a canvas (C, side, side) into the windows of all scales, packed scale by scale, windows in row-major order.

    Args:
        canvas: the normalized canvas.
        windows: geometry of the scales.
        packing: `"windows_first"` packs each scale as (n, C, size, size). `"channels_first"` packs it as (C, n, size, size),
            although the model reads it as (n, C, size, size). A window then consists of channel planes of other windows. The
            published weights were trained like this and need it.
        out: 1-D array to write into.
        stem: places of the channels that are packed channels first; the others are packed windows first. `None`: all.

    Returns:
        1-D array, as long as `packed_lengths` says.
    """
    parts = []
    for window in windows:
        tiles = np.lib.stride_tricks.sliding_window_view(canvas, (window.size, window.size), axis=(1, 2))
        tiles = tiles[:, :: window.stride, :: window.stride]  # (C, rows, columns, size, size)
        if packing == "channels_first" and stem is not None:
            mixed = tiles.transpose(1, 2, 0, 3, 4).copy()
            mixed[:, :, stem] = tiles[stem].reshape(*tiles.shape[1:3], len(stem), window.size, window.size)
            parts.append(mixed)
        else:
            parts.append(tiles if packing == "channels_first" else tiles.transpose(1, 2, 0, 3, 4))
    out = np.empty(sum(tiles.size for tiles in parts), canvas.dtype) if out is None else out
    start = 0
    for tiles in parts:
        out[start : start + tiles.size].reshape(tiles.shape)[...] = tiles
        start += tiles.size
    return out


def join_windows(
    packed: np.ndarray, windows: Sequence[WindowScale], canvas_size: int, packing: str = "windows_first", channels: int = 3
) -> list[np.ndarray]:
    """Inverse of `cut_windows`: one canvas (channels, canvas_size, canvas_size) per scale, overlaps averaged."""
    canvases, start = [], 0
    for window, length in zip(windows, packed_lengths(0, windows, channels)[1:], strict=True):
        first = packing == "channels_first"
        shape = (channels, window.num_windows) if first else (window.num_windows, channels)
        tiles = packed[start : start + length].reshape(*shape, window.size, window.size)
        start += length
        total, count = np.zeros((channels, canvas_size, canvas_size)), np.zeros((canvas_size, canvas_size))
        for tile, (top, left) in zip(tiles.swapaxes(0, 1) if first else tiles, window.offsets, strict=True):
            total[:, top : top + window.size, left : left + window.size] += tile
            count[top : top + window.size, left : left + window.size] += 1
        canvases.append((total / count).astype(packed.dtype))
    return canvases


class MFRSVLMImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """
    num_channels: channels of an image. 3 channels are red, green and blue; other numbers need arrays with as many bands.
    image_bands: names of the channels, for example `["red", "green", "blue", "nir"]`. With red, green and blue among them,
        images of three channels are taken too. Bands that an image lacks are zero after normalization.
    value_range: values of black and white, if the dtype does not determine them. Samples are scaled to 8 bits between the
        two values and clipped.
    pixel_dtype: type of the output, `"float32"`, `"bfloat16"` or `"float16"`; or `"uint8"`, a byte a value, which
        `to_device` normalizes on the device of the model.
    patch_size: side of the pixel square that one visual token stands for.
    canvas_scale: side of the canvas in global views.
    canvas_source: `"image"`: the canvas is resized from the original pixels; `"global_view"`: it is upsampled bilinearly
        from the global view, as in the published training, and has no additional detail.
    window_sizes: sides of the windows, pixels. Empty: no windows.
    window_overlap: share of a window that its neighbor covers again.
    window_packing: `"windows_first"`, or `"channels_first"` for the published weights, see `cut_windows`.
    max_aspect_ratio: maximum ratio of the longest to the shortest side. Other images are rejected.
    max_image_pixels: maximum number of pixels after padding to a square. Larger images are rejected.
    """

    num_channels: int
    image_bands: list[str] | tuple[str, ...] | None
    value_range: list[float | int] | tuple[float | int, ...] | None
    pixel_dtype: str
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

    The alpha channel of each image is dropped. The image is then padded to a square in the mean color (`do_pad`), resized,
    center-cropped, scaled and normalized. Output, for N images: `pixel_values` (N, L). A row is the global view (C, crop,
    crop), then scale by scale the windows (n, C, size, size), flattened, see `packed_lengths` and `cut_windows`. With the
    default geometry it takes 30 MB in float32.

    Images may have any type that `open_image` takes. Lists may be nested; a 4-D array is a list of images. Images of more
    bands are arrays with all bands, or `{band: array}` with arrays (height, width) of some of `image_bands`. Arrays and
    tensors, channels first or last, must be uint8, 64-bit integers from 0 to 255, or floats in [0, 1]. All others need
    `value_range`, since their dtype does not determine the value of white.

    Raises:
        ValueError: an image cannot be read, is empty, animated, masked, too large or too elongated, is not finite, or has
            other samples than those above; an array has the wrong shape; a setting is invalid. The message names the image.
        TypeError: an image or a setting has the wrong type.
    """

    valid_kwargs = MFRSVLMImageProcessorKwargs
    model_input_names = ["pixel_values"]

    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"shortest_edge": 336}
    default_to_square = False
    crop_size = {"height": 336, "width": 336}
    do_convert_rgb = do_pad = do_resize = do_center_crop = do_rescale = do_normalize = True
    num_channels = 3
    image_bands = None
    value_range = None
    pixel_dtype = "float32"
    patch_size = 14
    canvas_scale = 2
    canvas_source = "image"
    window_sizes = [336, 168]
    window_overlap = 0.5
    window_packing = "windows_first"
    max_aspect_ratio = 200.0
    max_image_pixels = 178_956_970  # limit of Pillow

    def __init__(self, **kwargs: Any) -> None:
        known = self.valid_kwargs.__annotations__
        unknown = sorted(name for name in kwargs if name not in known and name not in METADATA and name[:1] != "_")
        if unknown:
            raise ValueError(f"The image processor has no settings {', '.join(unknown)}. It has {', '.join(sorted(known))}.")
        with plain_errors():
            validate_typed_dict(self.valid_kwargs, {name: kwargs[name] for name in known if kwargs.get(name) is not None})
            super().__init__(**kwargs)
            self._validate_preprocess_kwargs(**{name: getattr(self, name) for name in self._valid_kwargs_names})

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """An image processor of saved settings. Those that the pixels depend on have no defaults here."""
        missing = [name for name in SAVED if {**image_processor_dict, **kwargs}.get(name) is None]
        if missing:
            raise ValueError(f"The saved settings of the image processor lack {', '.join(missing)}: the file is incomplete.")
        return super().from_dict(image_processor_dict, **kwargs)

    @classmethod
    def for_model(cls, config: MFRSVLMConfig, **overrides: Any) -> "MFRSVLMImageProcessor":
        """An image processor with the geometry of a model. `overrides` are settings that take precedence."""
        settings = {
            "size": {"shortest_edge": config.image_size},
            "crop_size": {"height": config.image_size, "width": config.image_size},
            "num_channels": getattr(config.vision_config, "num_channels", 3),
            "window_sizes": config.window_sizes if config.has_details else [],
            **{name: getattr(config, name) for name in ("patch_size", "canvas_scale", "window_overlap")},
        }
        return cls(**{**settings, **overrides})

    @property
    def num_image_tokens(self) -> int:
        """Visual tokens of one image."""
        return (self.crop_size["height"] // self.patch_size) * (self.crop_size["width"] // self.patch_size)

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """Prepares one image or many; settings given here override those of the processor, see the class."""
        with plain_errors():
            return super().preprocess(images, *args, **kwargs)

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        for name in ("size", "crop_size"):
            if isinstance(kwargs.get(name), (list, tuple)) and len(kwargs[name]) != 2:
                raise ValueError(f"{name}={shown(kwargs[name])} must be a height and a width.")
        return super()._standardize_kwargs(**kwargs)

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        given = SimpleNamespace(**kwargs)
        for name in ("size", "crop_size"):
            for edge, length in dict(kwargs[name] or {}).items():
                if length is not None and not (is_number(length, int) and 0 < length <= LARGEST_SIDE):
                    raise ValueError(f"{name}={dict(kwargs[name])}: {edge} must be > 0 and at most {LARGEST_SIDE} pixels.")
        super()._validate_preprocess_kwargs(**kwargs)
        for name, choices in (
            ("canvas_source", ("image", "global_view")),
            ("window_packing", ("windows_first", "channels_first")),
            ("pixel_dtype", tuple(PIXEL_DTYPES)),
        ):
            if kwargs[name] not in choices:
                raise ValueError(f"{name}={kwargs[name]!r} must be one of {choices}.")
        if given.pixel_dtype == "bfloat16" and kwargs.get("return_tensors") not in (None, "pt"):
            raise ValueError('pixel_dtype="bfloat16" needs return_tensors="pt": numpy has no such type.')
        crop = given.crop_size or SizeDict()
        if not crop.height or crop.height != crop.width:
            raise ValueError(f"crop_size={dict(crop)} must have a height and a width, and they must be equal.")
        size = {edge: length for edge, length in dict(given.size or {}).items() if length}
        if given.do_resize and set(size) not in ({"shortest_edge"}, {"height", "width"}):
            raise ValueError(f"size={size} must have a shortest_edge, or a height and a width.")
        for name in ("patch_size", "canvas_scale", "num_channels", "max_image_pixels"):
            if not is_number(kwargs[name], int) or kwargs[name] < 1:
                raise ValueError(f"{name}={shown(kwargs[name])} must be a whole number and at least 1.")
        bands = given.image_bands
        if bands is not None and not (
            len(bands) == given.num_channels == len(set(bands)) and all(isinstance(name, str) and name for name in bands)
        ):
            raise ValueError(f"image_bands={shown(bands)} must be num_channels={given.num_channels} different names.")
        if not is_number(given.max_aspect_ratio, (int, float)) or not given.max_aspect_ratio >= 1:
            raise ValueError(f"max_aspect_ratio={shown(given.max_aspect_ratio)} must be at least 1.")
        if not all(is_number(size, int) for size in given.window_sizes):
            raise TypeError(f"window_sizes={shown(given.window_sizes)} must be whole numbers.")
        windows = window_table(crop.height, given.patch_size, given.canvas_scale, given.window_sizes, given.window_overlap)
        count = sum(packed_lengths(crop.height, windows, given.num_channels))
        if given.canvas_scale * crop.height > LARGEST_SIDE or count > MOST_VALUES:
            raise ValueError(
                f"canvas_scale={given.canvas_scale}, crop_size={crop.height}, window_sizes={shown(given.window_sizes)} and "
                f"num_channels={given.num_channels} give a canvas of {given.canvas_scale * crop.height} pixels and {count} "
                f"values an image: at most {LARGEST_SIDE} and {MOST_VALUES} are possible."
            )
        if given.window_sizes and given.canvas_source == "image" and not given.do_resize:
            raise ValueError('canvas_source="image" needs do_resize=True. Without, use canvas_source="global_view".')
        limits = (0, 1) if given.value_range is None else given.value_range
        if len(limits) != 2 or not all(is_number(n, (int, float)) for n in limits) or not limits[0] < limits[1]:
            raise ValueError(
                f"value_range={shown(limits)} must be two finite numbers, black and white, the lower one first."
            )
        if given.do_resize and given.resample not in list(PILImageResampling):
            raise ValueError(f"resample={shown(given.resample)} must be one of {[int(way) for way in PILImageResampling]}.")
        self._validate_normalization(given)

    def _validate_normalization(self, given: SimpleNamespace) -> None:
        used = {
            "rescale_factor": given.do_rescale,
            "image_mean": given.do_normalize or given.do_pad,
            "image_std": given.do_normalize,
        }
        for name in (name for name, is_used in used.items() if is_used):
            value = getattr(given, name)
            numbers = list(value) if isinstance(value, (list, tuple)) and name != "rescale_factor" else [value]
            counts = (1,) if name == "rescale_factor" else (1, given.num_channels)
            if len(numbers) not in counts or not all(is_number(number, (int, float)) for number in numbers):
                raise ValueError(
                    f"{name}={shown(value)} must be {' or num_channels='.join(map(str, counts))} finite numbers."
                )
            if name == "image_mean" and not all(0 <= number <= 255 for number in numbers):
                raise ValueError(f"image_mean={shown(value)} must lie in [0, 255]: it is a mean of samples.")
            if name != "image_mean" and not all(number > 0 for number in numbers):
                raise ValueError(f"{name}={shown(value)} must not be 0 or negative.")
        if given.pixel_dtype == "uint8":
            if given.window_packing != "windows_first" or (given.window_sizes and given.canvas_source != "image"):
                raise ValueError(
                    f'pixel_dtype="uint8" does not go with window_packing={given.window_packing!r} and '
                    f'canvas_source={given.canvas_source!r}: use "windows_first" and "image", or "bfloat16".'
                )
            return
        largest = 255 * (given.rescale_factor if given.do_rescale else 1)
        if given.do_normalize:
            largest = max(largest, np.max(given.image_mean)) / np.min(given.image_std)
        if not largest < torch.finfo(PIXEL_DTYPES[given.pixel_dtype]).max:
            raise ValueError(
                f"rescale_factor={given.rescale_factor} and image_std={shown(given.image_std)} make values that pixel_dtype="
                f"{given.pixel_dtype} cannot hold."
            )

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Opens every image, at any depth of nesting, see `open_image`."""
        numbers, count = itertools.count(), len(flatten_images(image_url_or_urls))

        def fetch(images: Any) -> Any:
            if isinstance(images, (list, tuple)):
                return [fetch(image) for image in images]
            with numbered(next(numbers), count):
                return open_image(images)

        return fetch(image_url_or_urls)

    def _prepare_image_like_inputs(self, images: Any, *args: Any, expected_ndims: int = 3, **kwargs: Any) -> list[Any]:
        images, prepared = flatten_images(images), []
        if not images:
            raise ValueError("No images given: pass at least one, or leave `images` out.")
        for index, image in enumerate(images):
            with numbered(index, len(images)):
                prepared.append(read_planes(open_source(image), SimpleNamespace(**kwargs)))
        return prepared

    def process_image(self, image: Any, **kwargs: Any) -> np.ndarray:
        """Checks one image and converts it to (num_channels, height, width), before it is resized.

        An image that lacks bands has as many channels as it has bands.

        Returns:
            uint8; float32 in [0, 1] for a float image with `do_rescale=False`.
        """
        settings = {name: getattr(self, name) for name in self._valid_kwargs_names}
        given = SimpleNamespace(**{**settings, **kwargs})
        planes = [plane for plane in read_planes(open_source(image), given) if plane is not None]
        planes = [plane.convert(working_mode(planes, given.num_channels)) for plane in planes]
        return np.concatenate([np.atleast_3d(plane) for plane in planes], axis=2).transpose(2, 0, 1)

    def _preprocess(self, images: list[list[Image.Image | None]], return_tensors: Any = None, **kwargs: Any) -> BatchFeature:
        given = SimpleNamespace(**kwargs)
        side, channels = given.crop_size.height, given.num_channels
        windows = window_table(side, given.patch_size, given.canvas_scale, given.window_sizes, given.window_overlap)
        length, *packed = packed_lengths(side, windows, channels)
        names = list(given.image_bands or ())
        stem = [names.index(name) for name in RGB] if channels > 3 and set(RGB) <= set(names) else None
        rows = torch.empty(len(images), length + sum(packed), dtype=PIXEL_DTYPES[given.pixel_dtype])
        is_raw = given.pixel_dtype == "uint8"
        held = torch.zeros(len(images), channels, dtype=torch.bool)  # which bands an image has

        def normalized(values: np.ndarray) -> np.ndarray:
            return self._normalized(values, given)

        # Lookup table of the 256 normalized values of each channel, which is faster than arithmetic per pixel.
        table = self._table(given)

        def view(every: list[Image.Image | None], scale: int, index: int) -> np.ndarray:
            """The normalized image at `scale` times the size of the global view, (C, height, width)."""
            planes = [plane for plane in every if plane is not None]
            present = [place for place, plane in enumerate(every) if plane is not None]
            if len(every) != channels:  # one image in color, or red, green and blue apart
                present = stem or list(range(channels))
            held[index, present] = True
            mode, colors = working_mode(planes, len(present)), [None] * len(planes)
            mean = np.broadcast_to(np.asarray(given.image_mean, dtype=np.float64), (channels,))[present]
            if given.do_pad:
                colors = pad_colors(mode, len(planes), mean)
            if given.do_resize:
                target = scaled_size(padded_size(planes[0], given.do_pad), given.size, scale)
                planes = [resize(p, mode, target, given.resample, color) for p, color in zip(planes, colors, strict=True)]
            else:
                planes = [plane.convert(mode) for plane in planes]
                planes = pad_to_square(planes, mean) if given.do_pad else planes
            if given.do_center_crop:
                left, top = ((edge - scale * side) // 2 for edge in planes[0].size)
                planes = [plane.crop((left, top, left + scale * side, top + scale * side)) for plane in planes]
            pixels = np.concatenate([np.atleast_3d(plane) for plane in planes], axis=2)
            result = np.zeros((channels, *pixels.shape[:2]), np.uint8 if is_raw else np.float32)
            if is_raw:
                if pixels.dtype != np.uint8:
                    raise ValueError(f'Image {index} has samples of {pixels.dtype}: pixel_dtype="uint8" takes 8 bits.')
                result[present] = pixels.transpose(2, 0, 1)
                return result
            if pixels.dtype != np.uint8:  # bicubic interpolation overshoots, and 8 bits would be clipped
                whole = np.zeros((channels, *pixels.shape[:2]), pixels.dtype)
                whole[present] = pixels.clip(0, 1).transpose(2, 0, 1)
                result[present] = normalized(whole)[present]
                return result
            for place, channel in enumerate(present):
                np.take(table[channel], pixels[..., place], out=result[channel], mode="clip")
            return result

        for index, (planes, row) in enumerate(zip(images, as_numpy(rows), strict=True)):
            canvas = torch.from_numpy(view(planes, 1, index))
            if canvas.shape[1:] != (side, side):
                raise ValueError(
                    f"Image {index} has {tuple(canvas.shape[1:])} pixels (height, width), but the encoder needs ({side}, "
                    f"{side}): switch do_resize and do_center_crop on, or pass images of that size."
                )
            row[:length] = as_numpy(canvas.to(rows.dtype)).ravel()
            if windows and given.canvas_source == "image":
                canvas = torch.from_numpy(view(planes, given.canvas_scale, index))
            elif windows:
                upsampling = {"scale_factor": given.canvas_scale, "mode": "bilinear", "align_corners": False}
                canvas = torch.nn.functional.interpolate(canvas[None], **upsampling)[0]
            cut_windows(as_numpy(canvas.to(rows.dtype)), windows, given.window_packing, row[length:], stem)
        outputs = {"pixel_values": rows, **({"pixel_bands": held} if is_raw else {})}
        if return_tensors is None:
            return BatchFeature(
                {
                    name: list(tensor if tensor.dtype == torch.bfloat16 else tensor.numpy())
                    for name, tensor in outputs.items()
                }
            )
        arrays = {name: tensor.numpy() if return_tensors == "np" else tensor for name, tensor in outputs.items()}
        return BatchFeature(arrays, tensor_type=return_tensors)

    def _normalized(self, values: np.ndarray, given: SimpleNamespace) -> np.ndarray:
        if given.do_rescale:
            values = self.rescale(values, given.rescale_factor)
        if given.do_normalize:
            values = self.normalize(values, given.image_mean, given.image_std)
        return values.astype(np.float32)

    def _table(self, given: SimpleNamespace) -> np.ndarray:
        """The normalized values of the 256 samples of each channel, (C, 256) float32."""
        samples = np.broadcast_to(np.arange(256, dtype=np.uint8), (given.num_channels, 1, 256))
        return self._normalized(samples, given)[:, 0]

    def to_device(self, inputs: Any, device: Any, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Moves what a processor with `pixel_dtype="uint8"` returned to a device, and normalizes it there.

        The values are those of `pixel_dtype="float32"`, bit for bit, and a quarter of the bytes travels.

        Args:
            inputs: tensors by name, with `pixel_values` (N, L) and `pixel_bands` (N, C).
            device: of the model.
            dtype: of the model; other tensors than the pixels keep theirs.

        Returns:
            The tensors, with normalized `pixel_values` and without `pixel_bands`.
        """
        given = SimpleNamespace(**{name: getattr(self, name) for name in self._valid_kwargs_names})
        moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        rows, bands = moved["pixel_values"], moved.pop("pixel_bands")
        side, channels = given.crop_size["height"], given.num_channels
        windows = window_table(side, given.patch_size, given.canvas_scale, given.window_sizes, given.window_overlap)
        table = torch.from_numpy(self._table(given)).to(device)
        pixels = torch.empty(rows.shape, dtype=dtype, device=device)
        start, sizes = 0, [side, *(window.size for window in windows)]
        for length, size in zip(packed_lengths(side, windows, channels), sizes, strict=True):
            shape = (len(rows), -1, channels, size**2)  # (N, windows, channels, pixels)
            samples, values = (tensor[:, start : start + length].view(shape) for tensor in (rows, pixels))
            for channel in range(channels):  # one at a time: an index takes four bytes
                looked_up = torch.nn.functional.embedding(samples[:, :, channel].int(), table[channel][:, None])[..., 0]
                values[:, :, channel] = looked_up * bands[:, channel, None, None]
            start += length
        return {**moved, "pixel_values": pixels}


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A numpy view of a tensor. bfloat16, which numpy lacks, is viewed as int16."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Gives errors of libraries one line, and turns those of huggingface_hub, bare exceptions, into a `TypeError`."""
    try:
        yield
    except (StrictDataclassError, TypeError, ValueError) as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(" ".join(str(error).split())) from error


def is_number(value: Any, kind: Any) -> bool:
    """Whether a value is a finite number of a type, and no truth value."""
    kinds = (*kind, np.number) if isinstance(kind, tuple) else (kind, np.integer)
    return isinstance(value, kinds) and not isinstance(value, bool) and abs(value) < 1e300


@contextlib.contextmanager
def numbered(index: int, count: int) -> Iterator[None]:
    """Adds the number of the image to an error."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"Image {index} of {count}: {error}") from error


def flatten_images(images: Any) -> list[Any]:
    """One list of images from an image, a list nested to any depth, and 4-D arrays, in reading order."""
    if isinstance(images, (list, tuple)):
        return [image for group in images for image in flatten_images(group)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


def working_mode(planes: list[Image.Image], num_channels: int) -> str:
    """Mode that planes of `read_planes` are resized in."""
    return "RGB" if len(planes) == 1 and num_channels == 3 else planes[0].mode


def padded_size(plane: Image.Image, do_pad: bool | None) -> tuple[int, int]:
    width, height = plane.size
    return (max(width, height),) * 2 if do_pad else (width, height)


def scaled_size(size: tuple[int, int], given: SizeDict, scale: int) -> tuple[int, int]:
    """(width, height) of an image of `size` (width, height), resized to `scale` times the given size."""
    if not given.shortest_edge:
        return scale * given.width, scale * given.height
    short, target = min(size), scale * given.shortest_edge
    width, height = (target if edge == short else int(target * edge / short) for edge in size)
    return width, height


def pad_colors(mode: str, num_planes: int, image_mean: Any) -> list[Any]:
    """The mean color, plane by plane, in values of the mode."""
    bands = Image.getmodebands(mode)
    mean = np.broadcast_to(np.asarray(image_mean, dtype=np.float64), (num_planes * bands,)).reshape(num_planes, bands)
    if mode != "F":
        mean = np.clip(mean * 255, 0, 255).astype(np.uint8)  # truncated, as the published model was trained
    return [tuple(color) if bands > 1 else color[0] for color in mean.tolist()]


def pad_to_square(planes: list[Image.Image], image_mean: Any) -> list[Image.Image]:
    """Centers an image on a square of the mean color; an odd remainder goes to the bottom and the right."""
    colors = pad_colors(planes[0].mode, len(planes), image_mean)
    return [pad(plane, color) for plane, color in zip(planes, colors, strict=True)]


def pad(plane: Image.Image, color: Any) -> Image.Image:
    (width, height), side = plane.size, max(plane.size)
    if height == width:
        return plane
    square = Image.new(plane.mode, (side, side), color)
    square.paste(plane, ((side - width) // 2, (side - height) // 2))
    return square


def resize(plane: Image.Image, mode: str, target: tuple[int, int], resample: Any, color: Any = None) -> Image.Image:
    """Converts an image to `mode`, pads it to a square if there is a color, and resizes it to `target`.

    The result is that of these three steps, to the last bit. From square to square, which is the default, the padded image
    never exists: one of 100 x 10000 pixels would take the memory of 10000 x 10000. Pillow then resizes the rows first and
    the columns afterwards, so that the rows can be resized strip by strip. In other cases, its version decides.
    """
    (width, height), side = plane.size, max(plane.size)
    is_square = target[0] == target[1] and (height == width or color is not None)
    if not is_square or (height == width and mode == plane.mode):
        plane = plane if plane.mode == mode else plane.convert(mode)  # to its own mode, it would be copied
        return (plane if color is None else pad(plane, color)).resize(target, resample)
    left, top, step = (side - width) // 2, (side - height) // 2, max(1, ROWS_PIXELS // side)
    rows = Image.new(mode, (target[0], side), color or 0)
    for start in range(0, height, step):
        strip = plane.crop((0, start, width, min(start + step, height))).convert(mode)
        if width < side:
            wide = Image.new(mode, (side, strip.height), color)
            wide.paste(strip, (left, 0))
            strip = wide
        rows.paste(strip.resize((target[0], strip.height), resample), (0, top + start))
    return rows.resize(target, resample)


# See the end of `configuration_mfrsvlm.py`.
MFRSVLMImageProcessor.register_for_auto_class("AutoImageProcessor")

__all__ = ["MFRSVLMImageProcessor", "cut_windows", "image_size", "join_windows", "open_image"]
