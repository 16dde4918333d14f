"""Image processor of MF-RSVLM: one image becomes one row of numbers, its global view and the windows of every scale.

It works on numpy and Pillow, without torchvision. All images enter by one door, `open_image`, which turns them upright and
refuses what Pillow would read in another way than the file says.
"""

import base64
import contextlib
import io
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import torch
from huggingface_hub import get_session
from huggingface_hub.errors import StrictDataclassError
from PIL import ExifTags, Image, ImageOps
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, ChannelDimension, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs

from .configuration_mfrsvlm import MFRSVLMConfig, WindowScale, packed_lengths, window_table


# Modes that hold 8 bits a channel and convert to RGB, and modes of one channel whose range the caller must state.
EIGHT_BIT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"}
DEEP_MODES = {"I", "I;16", "I;16B", "I;16L", "F"}
# File formats with 8 bits a sample and no bands but colours and alpha. The headers of others are asked.
EIGHT_BIT_FORMATS = {"BMP", "GIF", "JPEG", "MPO", "TGA", "WEBP"}
HEADER_BYTES = 2**20  # a JPEG 2000 file has its size marker by then, behind its metadata
# TIFF tags
SUBFILE_TYPE, BITS, PHOTOMETRIC, FILL_ORDER, SAMPLES, PLANAR, EXTRA_SAMPLES, SAMPLE_FORMAT = (
    254,
    258,
    262,
    266,
    277,
    284,
    338,
    339,
)
COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3}  # bands that a photometric interpretation names
GREY, RGB = 1, 2  # photometric interpretations; 0 is grey from white to black
DEPENDENT_PAGE = 0b101  # bits of the subfile type: a smaller copy, or a mask, of another page (GeoTIFFs hold both)
SOURCE_KEYS = ("bytes", "image", "base64", "image_url", "url", "path")  # of `datasets` images and parts of a chat
FETCH_SECONDS = 30
PIXEL_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ADVICE = "Read it with rasterio, choose its bands, and pass an array: uint8, or any other with value_range=(black, white)."


def cut_windows(
    canvas: np.ndarray, windows: Sequence[WindowScale], packing: str = "windows_first", out: np.ndarray | None = None
) -> np.ndarray:
    """Cuts a canvas (C, side, side) into the windows of all scales, packed scale by scale, windows in row-major order.

    Args:
        canvas: the normalised canvas.
        windows: geometry of the scales.
        packing: `"windows_first"` packs each scale as (n, C, size, size). `"channels_first"` packs it as
            (C, n, size, size), which the model reads as n windows all the same: each then shows successive planes of this
            list, mostly places in one colour. The published weights were trained so and need it.
        out: 1-D array to write into.

    Returns:
        1-D array, as long as `packed_lengths` says.
    """
    parts = []
    for window in windows:
        tiles = np.lib.stride_tricks.sliding_window_view(canvas, (window.size, window.size), axis=(1, 2))
        tiles = tiles[:, :: window.stride, :: window.stride]  # (C, rows, columns, size, size)
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
    num_channels: channels of an image. 3 are red, green and blue; other numbers take arrays with as many bands.
    value_range: the values that stand for black and white, declared where the type of the samples does not tell. They are
        scaled to 8 bits between the two and clipped beyond.
    pixel_dtype: type of the output, `"float32"`, `"bfloat16"` or `"float16"`.
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

    num_channels: int
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

    Each image is dropped its alpha, padded to a square in the mean colour (`do_pad`), resized, centre-cropped, scaled
    and normalised. Output, for N images: `pixel_values` (N, L), one row an image. A row is the global view (C, crop, crop),
    then scale by scale the windows (n, C, size, size), flattened, see `packed_lengths` and `cut_windows`. With the default
    geometry it takes 30 MB in float32.

    An image is whatever `open_image` takes. Lists may be nested; a 4-D array is a list of images. Arrays and tensors,
    channels first or last, hold uint8, 64-bit integers from 0 to 255, or floats in [0, 1]. All others need `value_range`,
    since nothing in them says what is white.

    Raises:
        ValueError: an image cannot be read, is empty, animated, masked, too large or too elongated, is not finite, or holds
            other samples than those above; an array has the wrong shape; a setting makes no sense. The message names the
            image.
        TypeError: an image is none of the above types, or a setting has the wrong type.
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
    value_range = None
    pixel_dtype = "float32"
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

    @classmethod
    def for_model(cls, config: MFRSVLMConfig, **overrides: Any) -> "MFRSVLMImageProcessor":
        """An image processor with the geometry of a model. `overrides` are settings of the processor, and win."""
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

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        super()._validate_preprocess_kwargs(**kwargs)
        given = SimpleNamespace(**kwargs)
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
        window_table(crop.height, given.patch_size, given.canvas_scale, given.window_sizes, given.window_overlap)
        if given.window_sizes and given.canvas_source == "image" and not given.do_resize:
            raise ValueError('canvas_source="image" needs do_resize=True. Without, use canvas_source="global_view".')
        for name in ("max_aspect_ratio", "max_image_pixels", "num_channels"):
            if not kwargs[name] >= 1:
                raise ValueError(f"{name}={kwargs[name]} must be at least 1.")
        limits = (0, 1) if given.value_range is None else given.value_range
        if len(limits) != 2 or not all(map(math.isfinite, limits)) or not limits[0] < limits[1]:
            raise ValueError(f"value_range={limits} must be two finite numbers, black and white, the lower one first.")
        used = {
            "rescale_factor": given.do_rescale,
            "image_mean": given.do_normalize or given.do_pad,
            "image_std": given.do_normalize,
        }
        for name in (name for name, is_used in used.items() if is_used):
            values = np.asarray(kwargs[name], dtype=object).ravel()
            if len(values) not in (1, given.num_channels) or any(v is None or not math.isfinite(v) for v in values):
                raise ValueError(f"{name}={kwargs[name]} must be 1 or num_channels={given.num_channels} finite numbers.")
            if name == "image_std" and not all(values):
                raise ValueError(f"image_std={kwargs[name]} must not be 0.")

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
        """Checks one image and brings it to (num_channels, height, width): what the model sees, before it is resized.

        Returns:
            uint8; float32 in [0, 1] for a float image with `do_rescale=False`.
        """
        settings = {name: getattr(self, name) for name in self._valid_kwargs_names}
        planes = read_planes(open_source(image), SimpleNamespace(**{**settings, **kwargs}))
        return np.concatenate([np.atleast_3d(plane) for plane in planes], axis=2).transpose(2, 0, 1)

    def _preprocess(self, images: list[list[Image.Image]], return_tensors: Any = None, **kwargs: Any) -> BatchFeature:
        given = SimpleNamespace(**kwargs)
        side, channels = given.crop_size.height, given.num_channels
        windows = window_table(side, given.patch_size, given.canvas_scale, given.window_sizes, given.window_overlap)
        length, *packed = packed_lengths(side, windows, channels)
        rows = torch.empty(len(images), length + sum(packed), dtype=PIXEL_DTYPES[given.pixel_dtype])

        def normalised(values: np.ndarray) -> np.ndarray:
            if given.do_rescale:
                values = self.rescale(values, given.rescale_factor)
            if given.do_normalize:
                values = self.normalize(values, given.image_mean, given.image_std)
            return values.astype(np.float32)

        # What becomes of each of the 256 values, channel by channel. Looked up, a pixel costs no arithmetic.
        table = normalised(np.broadcast_to(np.arange(256, dtype=np.uint8), (channels, 1, 256)))[:, 0]

        def view(planes: list[Image.Image], scale: int) -> np.ndarray:
            """The normalised image at `scale` times the size of the global view, (C, height, width)."""
            if given.do_resize:
                target = scaled_size(planes[0], given.size, scale)
                planes = [plane.resize(target, resample=given.resample) for plane in planes]
            if given.do_center_crop:
                left, top = ((edge - scale * side) // 2 for edge in planes[0].size)
                planes = [plane.crop((left, top, left + scale * side, top + scale * side)) for plane in planes]
            pixels = np.concatenate([np.atleast_3d(plane) for plane in planes], axis=2)
            if pixels.dtype != np.uint8:  # bicubic interpolation overshoots, and 8 bits would be clipped
                return normalised(pixels.clip(0, 1).transpose(2, 0, 1))
            result = np.empty((channels, *pixels.shape[:2]), np.float32)
            for channel in range(channels):
                np.take(table[channel], pixels[..., channel], out=result[channel], mode="clip")
            return result

        for index, (planes, row) in enumerate(zip(images, as_numpy(rows), strict=True)):
            planes = pad_to_square(planes, given.image_mean) if given.do_pad else planes
            canvas = torch.from_numpy(view(planes, 1))
            if canvas.shape[1:] != (side, side):
                raise ValueError(
                    f"Image {index} has {tuple(canvas.shape[1:])} pixels (height, width), but the encoder needs ({side}, "
                    f"{side}): switch do_resize and do_center_crop on, or pass images of that size."
                )
            row[:length] = as_numpy(canvas.to(rows.dtype)).ravel()
            if windows and given.canvas_source == "image":
                canvas = torch.from_numpy(view(planes, given.canvas_scale))
            elif windows:
                upsampling = {"scale_factor": given.canvas_scale, "mode": "bilinear", "align_corners": False}
                canvas = torch.nn.functional.interpolate(canvas[None], **upsampling)[0]
            cut_windows(as_numpy(canvas.to(rows.dtype)), windows, given.window_packing, out=row[length:])
        if return_tensors is None:
            return BatchFeature({"pixel_values": list(rows if given.pixel_dtype == "bfloat16" else rows.numpy())})
        return BatchFeature({"pixel_values": rows.numpy() if return_tensors == "np" else rows}, tensor_type=return_tensors)


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a tensor. numpy has no bfloat16: its 16 bits are moved around as integers."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turns the validation errors of huggingface_hub, which derive from bare `Exception`, into a `TypeError`."""
    try:
        yield
    except StrictDataclassError as error:
        raise TypeError(str(error)) from error


@contextlib.contextmanager
def numbered(index: int, count: int) -> Iterator[None]:
    """Says in an error which image it is about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"Image {index} of {count}: {error}") from error


@contextlib.contextmanager
def damage(what: str) -> Iterator[None]:
    """Turns whatever a decoder raises on a damaged file into a `ValueError` of one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{what} cannot be read, the file may be damaged: {reason}") from error


def flatten_images(images: Any) -> list[Any]:
    """One list of images from an image, a list nested to any depth, and 4-D arrays, in reading order."""
    if isinstance(images, (list, tuple)):
        return [image for group in images for image in flatten_images(group)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


# From whatever names an image to an upright image whose samples are those of its source.


def open_image(source: Any, folder: str | os.PathLike[str] | None = None) -> Any:
    """Opens an image, checks that Pillow gives the samples of its source, and turns it upright as its EXIF data say.

    Args:
        source: a path, `file://` or http(s) address, data URI, base64 text, bytes, PIL image, `{"bytes", "path"}` of a
            `datasets` image, or part of a chat (`{"type": "image", ...}`, `{"type": "image_url", ...}`). Arrays and tensors
            are returned as they are.
        folder: where the images of a data file lie. Paths start there; what leaves it, and an address, is refused. `None`
            opens everything.

    Returns:
        A PIL image, or the array. Its width and height are those of the frame that the model sees.

    Raises:
        ValueError: the image cannot be opened or decoded, lies outside of the folder, has several frames, more than 8 bits
            in colour, or other bands than colours and alpha.
        TypeError: the source is none of the above.
    """
    image = open_source(source, folder)
    if not isinstance(image, Image.Image):
        return image
    try:
        check_source(image)
        return upright(image)
    except ValueError as error:
        raise ValueError(f"cannot open image {shown(source)}: {error}") from error


def image_size(image: Any, input_data_format: str | None = None, num_channels: int = 3) -> tuple[int, int]:
    """(height, width) of an opened image or an array in the frame that the model sees, which boxes are written in."""
    if isinstance(image, Image.Image):
        width, height = upright(image).size
        return height, width
    height, width = to_array(image, input_data_format, num_channels).shape[1:]
    return height, width


def open_source(source: Any, folder: str | os.PathLike[str] | None = None) -> Any:
    """Opens an image without decoding it. Arguments and errors are those of `open_image`.

    Not `transformers.image_utils.load_image`, which converts to RGB at once: 16-bit values would be clipped, the frames
    of an animation lost and large images decoded before they can be refused.
    """
    if isinstance(source, (Image.Image, np.ndarray, torch.Tensor)):
        return source
    if isinstance(source, Mapping):
        for key in (key for key in SOURCE_KEYS if source.get(key) is not None):
            return open_source(f"data:;base64,{source[key]}" if key == "base64" else source[key], folder)
        raise ValueError(f"{shown(dict(source))} holds no image: it has none of the keys {', '.join(SOURCE_KEYS)}.")
    if not isinstance(source, (str, bytes, bytearray, os.PathLike)):
        raise TypeError(
            f"expected a PIL image, an array, a tensor, a path, an address or bytes, got {type(source).__name__}."
        )
    try:
        return Image.open(locate(source, folder))
    except Exception as error:  # decoders and networks raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"cannot identify its format, its depth or its bands. If it is a raster: {ADVICE}"
        raise ValueError(f"cannot open image {shown(source)}: {reason}") from error


def locate(source: Any, folder: str | os.PathLike[str] | None) -> str | io.BytesIO:
    """Path or content of an image."""
    if isinstance(source, (bytes, bytearray)):
        return io.BytesIO(source)
    path = text = os.fsdecode(source)
    scheme = text[:8].lower()
    if scheme.startswith("data:"):
        return io.BytesIO(base64.b64decode("".join(text.partition(",")[2].split()), validate=True))
    if scheme.startswith(("http://", "https://")):
        if folder is not None:
            raise ValueError(f"it is an address, and only files in {str(folder)!r} may be opened here")
        response = get_session().get(text, follow_redirects=True, timeout=FETCH_SECONDS)
        response.raise_for_status()
        return io.BytesIO(response.content)
    if scheme.startswith("file://"):
        path = url2pathname(urlsplit(text).path)
    if folder is not None:
        path = os.path.join(folder, path)
        if not Path(path).resolve().is_relative_to(Path(folder).resolve()):
            raise ValueError(f"it leaves {str(folder)!r}, and only files in there may be opened here")
    if os.path.isfile(path):
        return path
    if path != text:
        raise ValueError(f"there is no file {shown(path)}")
    try:
        return io.BytesIO(base64.b64decode("".join(text.split()), validate=True))
    except ValueError as error:
        raise ValueError("it is neither a file, nor an http(s) address, nor base64 text") from error


def shown(source: Any) -> str:
    """A source in an error: content by its length, and what is long shortened."""
    if isinstance(source, (bytes, bytearray)):
        return f"of {len(source)} bytes"
    text = f"{source.format} {source.size}" if isinstance(source, Image.Image) else repr(source)
    return text if len(text) <= 200 else text[:200] + "..."


def check_source(image: Image.Image) -> None:
    """Refuses a PIL image of which Pillow gives other samples than its source has, or one of several frames.

    The header is asked before anything is decoded: Pillow keeps the high byte of 16-bit colours and calls them RGB.
    """
    with damage("its header"):
        frames = count_frames(image)
        lost = lost_samples(image) if frames == 1 else None
    if frames != 1:
        raise ValueError(f"it has {frames} frames. Pass the one you mean, for example after image.seek(i) and image.copy().")
    if lost:
        raise ValueError(f"{lost}. {ADVICE}")


@contextlib.contextmanager
def source_file(image: Image.Image) -> Iterator[IO[bytes]]:
    """The file of a PIL image from its start, also after decoding, when Pillow has let go of it."""
    files: list[Any] = [getattr(image, name, None) for name in ("fp", "_fp")]
    name = getattr(image, "filename", "")
    for file in (file for file in files if hasattr(file, "read") and not file.closed):
        position = file.tell()
        file.seek(0)
        yield file
        file.seek(position)
        return
    if not name or not os.path.isfile(name):
        raise ValueError("it was decoded, and its file is gone. Pass the file, or image.copy() if it held 8 bits a sample")
    with open(name, "rb") as file:
        yield file


def count_frames(image: Image.Image) -> int:
    """Frames that show something of their own.

    The overviews and masks of a GeoTIFF do not count, nor the previews that drones and phones store in a JPEG ("MPO").
    """
    if image.format != "TIFF" or not getattr(image, "is_animated", True):
        return 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))
    with source_file(image) as file:  # not by image.n_frames, which fails on a mask: Pillow has no mode for it
        head = file.read(8)
        directory = ImageFileDirectory_v2(head + file.read(8) if head[2] == 43 else head)  # 43: BigTIFF
        pages: dict[int, int] = {}
        while directory.next and directory.next not in pages:
            start = directory.next
            file.seek(start)
            directory.load(file)
            pages[start] = directory.get(SUBFILE_TYPE, 0)
    return sum(not kind & DEPENDENT_PAGE for kind in pages.values())


def lost_samples(image: Image.Image) -> str | None:
    """What of the source Pillow would drop or change; `None` if every sample of its colours survives."""
    if image.format is None or image.format in EIGHT_BIT_FORMATS:
        return None
    if image.format == "TIFF":
        tags = {
            tag: np.atleast_1d(value).tolist()
            for tag, value in image.tag_v2.items()
            if tag in range(BITS, SAMPLE_FORMAT + 1)
        }
        ((photometric,), bits, (count,)) = tags.get(PHOTOMETRIC, [0]), max(tags.get(BITS, [1])), tags.get(SAMPLES, [1])
        kinds, extra = tags.get(SAMPLE_FORMAT, [1]), tags.get(EXTRA_SAMPLES, [])  # kinds: 1 unsigned, 2 signed, 3 float
        if len(set(kinds)) > 1 or (kinds[0] != 1 if bits <= 8 else bits == 32 and kinds[0] == 1):
            return f"its samples of {bits} bits are signed, mixed, or too large"
        if bits > 8 and photometric != GREY:
            return f"it holds {bits} bits a sample in colour"
        if tags.get(PLANAR) == [2] and (bits < 8 or photometric == 0 or tags.get(FILL_ORDER, [1]) != [1]):
            return "its bands lie apart, and Pillow does not unpack such samples"
        if count > COLOURS.get(photometric, 0) and photometric != RGB and extra != [2]:  # 2: alpha
            return f"it has {count} bands, other bands than red, green and blue"
        return "its colours are multiplied by alpha" if 1 in extra else None
    if image.format == "PNG" and image.mode not in ("RGB", "RGBA"):
        return None  # 16 bits of grey have a mode of their own
    if image.format not in ("PNG", "JPEG2000"):
        return (
            f"nothing here tells the depth of a {image.format} file: pass image.convert('RGB') if it holds 8 bits a sample"
        )
    with source_file(image) as file:
        head = file.read(HEADER_BYTES)
    if image.format == "PNG":
        return "it holds 16 bits a sample in colour" if head[24] == 16 else None
    start = head.index(b"\xff\x4f\xff\x51") + 40  # behind the size marker: count of components, then three bytes for each
    count = int.from_bytes(head[start : start + 2], "big")
    if count == 2 or set(head[start + 2 : start + 2 + 3 * count]) != {7, 1}:  # 8 bits unsigned, no subsampling
        return f"its {count} bands are not colours of 8 bits"
    return None


def upright(image: Image.Image) -> Image.Image:
    """Turns an image as its EXIF data say, for which it is decoded."""
    with damage("it"):
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
        return ImageOps.exif_transpose(image) if turned else image


# From an image to what Pillow resizes.


def read_planes(image: Any, given: SimpleNamespace) -> list[Image.Image]:
    """Checks one image. Returns one image in RGB, or one in grey for every channel (8 bits, or floats in [0, 1])."""
    to_rgb = bool(given.do_convert_rgb) and given.num_channels == 3
    limits = (given.do_pad, given.max_aspect_ratio, given.max_image_pixels)
    if isinstance(image, Image.Image):
        check_extent(image.height, image.width, *limits)
        check_source(image)
        if image.mode not in EIGHT_BIT_MODES and (given.value_range is None or image.mode not in DEEP_MODES):
            raise ValueError(
                f"its mode is {image.mode!r}, not 8 bits a channel, and nothing in it says what is white: state it with "
                "value_range=(black, white), for example the 2nd and the 98th percentile."
            )
        image = upright(image)
        with damage("it"):
            image.load()
            image = image.convert("RGB") if to_rgb and image.mode not in ("RGB", *DEEP_MODES) else image
        if not to_rgb and image.mode not in ({"RGB"} if given.num_channels == 3 else {"1", "L", *DEEP_MODES}):
            raise ValueError(
                f"its mode {image.mode!r} is not num_channels={given.num_channels} bands: pass them as an array."
            )
        if image.mode == "RGB" and to_rgb and given.value_range is None:
            return [image]
        array = np.atleast_3d(image).transpose(2, 0, 1)
        array = array.astype(np.uint8) * 255 if array.dtype == bool else array
    else:
        array = to_array(image, given.input_data_format, given.num_channels)
        check_extent(array.shape[1], array.shape[2], *limits)
    array = to_eight_bits(array, given.value_range, quantise=bool(given.do_rescale))
    if to_rgb and len(array) in (1, 4):
        array = np.repeat(array, 3, axis=0) if len(array) == 1 else array[:3]
    if len(array) != given.num_channels:
        rule = "set do_convert_rgb" if given.num_channels == 3 else "pass an array with as many bands"
        raise ValueError(f"it has {len(array)} channels, but num_channels={given.num_channels}: {rule}.")
    if given.num_channels == 3 and array.dtype == np.uint8:
        return [Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0)))]
    # Apart, because Pillow takes the fourth of four channels for alpha and weighs the others with it.
    return [Image.fromarray(np.ascontiguousarray(channel)) for channel in array]


def check_extent(height: int, width: int, do_pad: bool | None, max_aspect_ratio: float, max_image_pixels: int) -> None:
    """Refuses images that are empty, a thread, or would not fit in memory as a square."""
    pixels, what = f"height {height} and width {width}", " after padding to a square" if do_pad else ""
    if min(height, width) < 1:
        raise ValueError(f"it is empty: {pixels}.")
    if max(height, width) > max_aspect_ratio * min(height, width):
        raise ValueError(f"{pixels} differ by more than max_aspect_ratio={max_aspect_ratio:g}. Cut it into pieces.")
    count = max(height, width) ** 2 if do_pad else height * width
    if count > max_image_pixels:
        raise ValueError(
            f"{pixels} make {count} pixels{what}, more than max_image_pixels={max_image_pixels}. Cut it into pieces."
        )


def to_array(image: Any, input_data_format: str | ChannelDimension | None, num_channels: int) -> np.ndarray:
    """Brings an array or tensor (H, W), (H, W, C) or (C, H, W) with 1, 3, 4 or `num_channels` channels to (C, H, W)."""
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    if np.ma.is_masked(image):
        raise ValueError(f"{np.ma.count_masked(image)} of its values are masked: fill them with what shall be seen there.")
    image = np.ma.getdata(image)
    if image.ndim == 2:
        return image[None]
    if image.ndim != 3:
        raise ValueError(f"an array must have 2 or 3 dimensions, got shape {image.shape}.")
    counts = [count for count in (1, 4, 3) if count != num_channels] + [num_channels]  # the likeliest last
    if input_data_format is None:
        # Both ends may look like channels if the image is tiny or thin.
        first, last = (counts.index(n) if n in counts else -1 for n in (image.shape[0], image.shape[2]))
        if first == last and image.shape != (1, 1, 1):
            which = "neither end" if first < 0 else "more than one end"
            raise ValueError(
                f"{which} of shape {image.shape} is a channel dimension of {sorted(counts)}: pass such an array, or "
                'input_data_format, "channels_first" or "channels_last".'
            )
        input_data_format = ChannelDimension.FIRST if first >= last else ChannelDimension.LAST
    image = np.moveaxis(image, -1, 0) if ChannelDimension(input_data_format) == ChannelDimension.LAST else image
    if len(image) not in counts:
        raise ValueError(f"{len(image)} channels in shape {image.shape} (channels first): pass one of {sorted(counts)}.")
    return image


def to_eight_bits(image: np.ndarray, value_range: Sequence[float] | None, quantise: bool) -> np.ndarray:
    """Checks the values of an array and brings them to uint8, or floats to [0, 1] unless `quantise`.

    What a value means is read from its type or declared, never from the other values: a dark tile must not be read in
    another way than the bright one beside it.
    """
    is_float, limits = image.dtype.kind == "f", (0, 1) if image.dtype.kind == "f" else (0, 255)
    if image.dtype.kind not in "iuf":
        raise ValueError(f"an array must hold integers or floats, got dtype {image.dtype}.")
    if is_float and not np.isfinite(image).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(image))} values are NaN or infinite: fill them first.")
    if value_range is not None:
        black, white = value_range
        if not is_float and not np.iinfo(image.dtype).min <= black < white <= np.iinfo(image.dtype).max:
            raise ValueError(f"value_range={value_range} does not fit samples of {image.dtype}.")
        wide: Any = image.astype(np.float64 if image.itemsize > 2 and image.dtype != np.float32 else np.float32)
        wide -= black
        wide *= 1 / (white - black)
        np.clip(wide, 0, 1, out=wide)
        return np.rint(wide * 255).astype(np.uint8) if quantise else wide.astype(np.float32)
    if image.dtype == np.uint8:
        return image
    if not is_float and image.itemsize < 8:
        raise ValueError(f"samples of {image.dtype} do not say what is white: pass value_range=(black, white), or uint8.")
    low, high = image.min(), image.max()
    if low < limits[0] or high > limits[1]:
        raise ValueError(
            f"values of {image.dtype} range from {low:g} to {high:g}, outside {limits[0]}..{limits[1]}: clip them, or state "
            "what they mean with value_range=(black, white)."
        )
    image = image.astype(np.float32 if is_float else np.uint8)
    return np.rint(image * 255).astype(np.uint8) if is_float and quantise else image


def scaled_size(image: Image.Image, size: SizeDict, scale: int) -> tuple[int, int]:
    """(width, height) of an image resized to `scale` times `size`."""
    if not size.shortest_edge:
        return scale * size.width, scale * size.height
    short, target = min(image.size), scale * size.shortest_edge
    width, height = (target if edge == short else int(target * edge / short) for edge in image.size)
    return width, height


def pad_to_square(planes: list[Image.Image], image_mean: Any) -> list[Image.Image]:
    """Centres an image on a square of the mean colour; an odd remainder goes to the bottom and the right."""
    (width, height), side = planes[0].size, max(planes[0].size)
    if height == width:
        return planes
    bands, squares = len(planes[0].getbands()), []
    mean = np.broadcast_to(np.asarray(image_mean, dtype=np.float64), (len(planes) * bands,)).reshape(len(planes), bands)
    if planes[0].mode != "F":
        mean = np.clip(mean * 255, 0, 255).astype(np.uint8)  # truncated, as the published model was trained
    for plane, colour in zip(planes, mean.tolist(), strict=True):
        squares.append(Image.new(plane.mode, (side, side), tuple(colour) if bands > 1 else colour[0]))
        squares[-1].paste(plane, ((side - width) // 2, (side - height) // 2))
    return squares


__all__ = ["MFRSVLMImageProcessor", "cut_windows", "image_size", "join_windows", "open_image"]
