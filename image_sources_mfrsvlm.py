"""Opens images from all supported sources, checks them, and applies their EXIF orientation.

Pillow changes the samples of some files without a warning: it keeps the high byte of 16-bit colors, or the first of two
bands. The header is therefore checked before decoding, and such files are rejected. The meaning of a value is determined by
its type or by the caller, never from other values.
"""

import base64
import contextlib
import io
import ipaddress
import os
import socket
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any
from urllib.parse import urljoin, urlsplit
from urllib.request import url2pathname

import numpy as np
import torch
from huggingface_hub import get_session
from PIL import ExifTags, Image, ImageOps
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from transformers.image_utils import ChannelDimension


# Modes with 8 bits per channel, which convert to RGB, and modes with one channel whose range the caller must declare.
EIGHT_BIT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"}
DEEP_MODES = {"I", "I;16", "I;16B", "I;16L", "F"}
# File formats that have only 8 bits per sample, and only color bands and alpha. The headers of others are checked.
EIGHT_BIT_FORMATS = {"BMP", "GIF", "JPEG", "MPO", "TGA", "WEBP"}
ROWS_PIXELS = 2**22  # of a large image at a time, where it is converted
HEADER_BYTES = 2**20  # a JPEG 2000 file has its size marker by then, behind its metadata
TAGS = (254, 258, 262, 266, 277, 284, 338, 339)  # of a TIFF
SUBFILE_TYPE, BITS, PHOTOMETRIC, FILL_ORDER, SAMPLES, PLANAR, EXTRA_SAMPLES, SAMPLE_FORMAT = TAGS
COLORS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3}  # bands that a photometric interpretation names
GRAY, RGB = 1, 2  # photometric interpretations; 0 is gray from white to black
DEPENDENT_PAGE = 0b101  # bits of the subfile type: a smaller copy, or a mask, of another page (GeoTIFFs hold both)
SOURCE_KEYS = ("bytes", "image", "base64", "image_url", "url", "path")  # of `datasets` images and parts of a chat
BANDS_BYTES = 2**31  # of an `.npz` file, decompressed
FETCH_BYTES, FETCH_SECONDS, FETCH_REDIRECTS = 256 * 2**20, 30, 5
ADVICE = "Read it with rasterio, choose its bands, and pass an array: uint8, or any other with value_range=(black, white)."


def open_image(source: Any, folder: str | os.PathLike[str] | None = None, allow_outside: bool = False) -> Any:
    """Opens an image, checks that Pillow does not change its samples, and applies its EXIF orientation.

    Args:
        source: a path, `file://` or http(s) URL, data URI, base64 text, bytes, PIL image, `{"bytes", "path"}` of a
            `datasets` image, or content part of a chat message (`{"type": "image", ...}`, `{"type": "image_url", ...}`).
            Arrays and tensors are returned unchanged, alone or as `{band: array}`, which an `.npz` file also holds.
        folder: folder of the images. Paths are relative to it. Paths that leave it, and URLs, are rejected. `None`: no
            restriction.
        allow_outside: accept URLs and paths that leave the folder.

    Returns:
        A PIL image with its final width and height, or the array, or arrays by band.

    Raises:
        ValueError: the image cannot be opened or decoded, is outside of the folder, has several frames, more than 8 bits per
            color sample, or other bands than colors and alpha.
        TypeError: the source has another type.
    """
    image = open_source(source, folder, allow_outside)
    if not isinstance(image, Image.Image):
        return image
    try:
        check_source(image)
        return upright(image)
    except ValueError as error:
        raise ValueError(f"cannot open image {shown(source)}: {error}") from error


def image_size(image: Any, input_data_format: str | None = None, num_channels: int = 3) -> tuple[int, int]:
    """(height, width) in pixels of an opened image after its EXIF orientation, or of an array. Boxes refer to this size."""
    if isinstance(image, Image.Image):
        width, height = upright(image).size
        return height, width
    if isinstance(image, Mapping):
        height, width = next(iter(image.values())).shape
        return height, width
    height, width = to_array(image, input_data_format, num_channels).shape[1:]
    return height, width


def open_source(source: Any, folder: str | os.PathLike[str] | None = None, allow_outside: bool = False) -> Any:
    """Opens an image without decoding it. Arguments and errors are those of `open_image`.

    Not `transformers.image_utils.load_image`, which converts to RGB at once: it clips 16-bit values, drops the frames of an
    animation, and decodes large images before they can be rejected.
    """
    if isinstance(source, (Image.Image, np.ndarray, torch.Tensor)):
        return source
    if isinstance(source, Mapping):
        for key in (key for key in SOURCE_KEYS if source.get(key) is not None):
            inner = f"data:;base64,{source[key]}" if key == "base64" else source[key]
            return open_source(inner, folder, allow_outside)
        if source and all(isinstance(band, (np.ndarray, torch.Tensor)) for band in source.values()):
            return dict(source)
        raise ValueError(f"{shown(dict(source))} holds no image: it has none of the keys {', '.join(SOURCE_KEYS)}.")
    if not isinstance(source, (str, bytes, bytearray, os.PathLike)):
        raise TypeError(
            f"expected a PIL image, an array, a tensor, a path, an address or bytes, got {type(source).__name__}."
        )
    try:
        found = locate(source, folder, allow_outside)
        return load_bands(found) if isinstance(found, str) and found.lower().endswith(".npz") else Image.open(found)
    except Exception as error:  # decoders and networks raise many types
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"cannot identify its format, its depth or its bands. If it is a raster: {ADVICE}"
        raise ValueError(f"cannot open image {shown(source)}: {reason}") from error


def load_bands(path: str) -> dict[str, np.ndarray]:
    """Arrays by band, of a file that `numpy.savez` wrote."""
    with zipfile.ZipFile(path) as file:
        size = sum(part.file_size for part in file.infolist())
    if size > BANDS_BYTES:
        raise ValueError(f"its bands take {size} bytes, more than {BANDS_BYTES}")
    with np.load(path, allow_pickle=False) as file:
        return {str(name): file[name] for name in file.files}


def locate(source: Any, folder: str | os.PathLike[str] | None, allow_outside: bool = False) -> str | io.BytesIO:
    """Path or content of an image."""
    if isinstance(source, (bytes, bytearray)):
        return io.BytesIO(source)
    path = text = os.fsdecode(source)
    scheme = text[:8].lower()
    if scheme.startswith("data:"):
        return io.BytesIO(base64.b64decode("".join(text.partition(",")[2].split()), validate=True))
    if scheme.startswith(("http://", "https://")):
        if folder is not None and not allow_outside:
            raise ValueError(f"it is an address, and only files in {str(folder)!r} may be opened here")
        return fetch(text)
    if scheme.startswith("file://"):
        path = url2pathname(urlsplit(text).path)
    if folder is not None:
        path = os.path.join(folder, path)
        if not allow_outside and not is_inside(path, folder):
            raise ValueError(f"it leaves {str(folder)!r}, and only files in there may be opened here")
    if os.path.isfile(path):
        return path
    if os.path.isdir(path):  # whose name may also be base64
        raise ValueError("it is a folder: name one of its files")
    if path != text:
        raise ValueError(f"there is no file {shown(path)}")
    try:
        return io.BytesIO(base64.b64decode("".join(text.split()), validate=True))
    except ValueError as error:
        raise ValueError("it is neither a file, nor an http(s) address, nor base64 text") from error


def fetch(address: str) -> io.BytesIO:
    """Content of an http(s) address, of at most `FETCH_BYTES`, within `FETCH_SECONDS` and `FETCH_REDIRECTS`.

    Raises:
        ValueError: a limit is exceeded, or the address redirects to a private network or another scheme.
        Exception: those of the HTTP library.
    """
    result: list[Any] = []

    def work() -> None:
        try:
            result.append(download(address, time.monotonic() + FETCH_SECONDS))
        except Exception as error:
            result.append(error)

    # A thread, since a server may send a header byte by byte for hours, and the library limits every byte alone.
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(FETCH_SECONDS)
    if not result:
        raise ValueError(f"it was not complete after {FETCH_SECONDS} s")
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def download(address: str, deadline: float) -> io.BytesIO:
    """Reads an address until the deadline, a time of `time.monotonic`. See `fetch`."""
    session, first = get_session(), urlsplit(address)
    for _ in range(FETCH_REDIRECTS + 1):
        options = {"follow_redirects": False, "timeout": FETCH_SECONDS, "headers": {"Accept-Encoding": "identity"}}
        with session.stream("GET", address, **options) as response:
            if response.has_redirect_location:
                address = urljoin(address, response.headers["location"])
                target = urlsplit(address)
                if target.scheme not in ("http", "https"):
                    raise ValueError(f"it redirects to {shown(address)}, which is no http(s) address")
                # Nobody typed this address, so it must not reach what only this machine can reach.
                if target.netloc != first.netloc and not is_public(target.hostname or ""):
                    raise ValueError(f"it redirects to {shown(address)}, which is an address of a private network")
                continue
            response.raise_for_status()
            if response.headers.get("content-encoding", "identity") != "identity":  # a small answer may become a huge one
                raise ValueError("the server compresses it, although it was asked not to")
            content = io.BytesIO()
            for part in response.iter_raw(2**16):
                content.write(part)
                if content.tell() > FETCH_BYTES:
                    raise ValueError(f"it is larger than {FETCH_BYTES / 2**20:g} MiB")
                if time.monotonic() > deadline:
                    raise ValueError(f"it was not complete after {FETCH_SECONDS} s")
            content.seek(0)
            return content
    raise ValueError(f"it redirects more than {FETCH_REDIRECTS} times")


def is_public(host: str) -> bool:
    """Whether every address of a host is in the public internet. A name that is not known here counts as public."""
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:  # the fetch says so, or a proxy knows it
        return True
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    addresses = [getattr(address, "ipv4_mapped", None) or address for address in addresses]
    return all(address.is_global and not address.is_multicast for address in addresses)


def is_inside(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    """Whether a path lies in a folder, after symbolic links are followed."""
    return Path(path).resolve().is_relative_to(Path(folder).resolve())


def shown(source: Any) -> str:
    """A source for an error message, in one line: bytes by their length, long text truncated."""
    if isinstance(source, (bytes, bytearray)):
        return f"of {len(source)} bytes"
    if isinstance(source, Image.Image):
        return f"{source.format} {source.size}"
    try:
        text = repr(source[:201] if isinstance(source, str) else source)
    except Exception as error:  # nested too deeply, for example
        text = f"{type(source).__name__} without a text ({type(error).__name__})"
    text = text if text.isascii() and "\n" not in text else " ".join(text.split()).encode(errors="replace").decode()
    return text if len(text) <= 200 else text[:200] + "..."


def check_source(image: Image.Image) -> None:
    """Raises `ValueError` for a PIL image with several frames, or whose samples Pillow changes in decoding.

    The header is checked before decoding. For example, Pillow keeps the high byte of 16-bit colors and reports RGB.
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
    """The file of a PIL image, from its start. Reopens it if Pillow has closed it after decoding."""
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
    """Number of independent frames. Overviews and masks of a GeoTIFF, and previews in a JPEG ("MPO"), do not count."""
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
    """Reason why Pillow would drop or change samples of the source; `None` if it keeps all color samples."""
    if image.format is None or image.format in EIGHT_BIT_FORMATS:
        return None
    if image.format == "TIFF":
        tags = {tag: np.atleast_1d(value).tolist() for tag, value in image.tag_v2.items() if tag in TAGS}
        if PHOTOMETRIC not in tags or tags.get(SUBFILE_TYPE, [0])[0] & DEPENDENT_PAGE:
            return "it does not say what its samples stand for, or this page is a smaller copy or a mask of another"
        (photometric,), bits, (count,) = tags[PHOTOMETRIC], max(tags.get(BITS, [1])), tags.get(SAMPLES, [1])
        kinds, extra = tags.get(SAMPLE_FORMAT, [1]), tags.get(EXTRA_SAMPLES, [])  # kinds: 1 unsigned, 2 signed, 3 float
        if len(set(kinds)) > 1 or (kinds[0] != 1 if bits <= 8 else bits == 32 and kinds[0] == 1):
            return f"its samples of {bits} bits are signed, mixed, or too large"
        if bits > 8 and photometric != GRAY:
            return f"it holds {bits} bits a sample in color"
        if tags.get(PLANAR) == [2] and (bits < 8 or photometric == 0 or tags.get(FILL_ORDER, [1]) != [1]):
            return "its bands lie apart, and Pillow does not unpack such samples"
        if count > COLORS.get(photometric, 0) and photometric != RGB and extra != [2]:  # 2: alpha
            return f"it has {count} bands, other bands than red, green and blue"
        return "its colors are multiplied by alpha" if 1 in extra else None
    if image.format == "PNG" and image.mode not in ("RGB", "RGBA"):
        return None  # 16 bits of gray have a mode of their own
    if image.format not in ("PNG", "JPEG2000"):
        return (
            f"nothing here tells the depth of a {image.format} file: pass image.convert('RGB') if it holds 8 bits a sample"
        )
    with source_file(image) as file:
        head = file.read(HEADER_BYTES)
    if image.format == "PNG":
        return "it holds 16 bits a sample in color" if head[24] == 16 else None
    start = head.index(b"\xff\x4f\xff\x51") + 40  # behind the size marker: count of components, then three bytes for each
    count = int.from_bytes(head[start : start + 2], "big")
    if count == 2 or set(head[start + 2 : start + 2 + 3 * count]) != {7, 1}:  # 8 bits unsigned, no subsampling
        return f"its {count} bands are not colors of 8 bits"
    return None


def upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation. This decodes the image if it is rotated or mirrored."""
    with damage("it"):
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
        return ImageOps.exif_transpose(image) if turned else image


@contextlib.contextmanager
def damage(what: str) -> Iterator[None]:
    """Converts any error of a decoder on a damaged file to a `ValueError` of one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{what} cannot be read (the file may be damaged): {reason}") from error


def read_planes(image: Any, given: SimpleNamespace) -> list[Image.Image | None]:
    """Checks one image and decodes it.

    Returns:
        One image of three channels, or one in gray for every channel (8 bits, or floats in [0, 1]), `None` for a band that
        bands by name lack. An image of three channels may still have another mode, such as RGBA or P: converted at once, it
        would need its memory twice.
    """
    if isinstance(image, Mapping):
        return read_bands(image, given)
    channels = given.num_channels
    takes_rgb = channels == 3 or {"red", "green", "blue"} <= set(given.image_bands or ())
    if takes_rgb and isinstance(image, Image.Image):
        channels = 3
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
        to_rgb = bool(given.do_convert_rgb) and channels == 3
        if not to_rgb and image.mode not in ({"RGB"} if channels == 3 else {"1", "L", *DEEP_MODES}):
            raise ValueError(f"its mode {image.mode!r} is not num_channels={channels} bands: pass them as an array.")
        if to_rgb and image.mode not in DEEP_MODES:
            if given.value_range is None:
                return [image]
            image = image.convert("RGB")
        array = np.atleast_3d(image).transpose(2, 0, 1)
        array = array.astype(np.uint8) * 255 if array.dtype == bool else array
    else:
        array = to_array(image, given.input_data_format, channels)
        channels = 3 if takes_rgb and len(array) == 3 else channels
        to_rgb = bool(given.do_convert_rgb) and channels == 3
        check_extent(array.shape[1], array.shape[2], *limits)
    array = to_eight_bits(array, given.value_range, quantize=bool(given.do_rescale))
    if to_rgb and len(array) == 1:
        plane = Image.fromarray(np.ascontiguousarray(array[0]))
        return [plane] if plane.mode == "L" else [plane] * 3
    array = array[:3] if to_rgb and len(array) == 4 else array
    if len(array) != channels:
        rule = "set do_convert_rgb" if channels == 3 else "pass an array with as many bands"
        raise ValueError(f"it has {len(array)} channels, but num_channels={channels}: {rule}.")
    if channels == 3 and array.dtype == np.uint8:
        return [Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0)))]
    # Apart, because Pillow takes the fourth of four channels for alpha and weighs the others with it.
    return [Image.fromarray(np.ascontiguousarray(channel)) for channel in array]


def read_bands(bands: Mapping[str, Any], given: SimpleNamespace) -> list[Image.Image | None]:
    """The planes of `read_planes` for arrays (H, W) by band, in the order of `image_bands`."""
    names = list(given.image_bands or (("red", "green", "blue") if given.num_channels == 3 else ()))
    unknown = sorted(map(str, set(bands) - set(names)))
    if unknown:
        raise ValueError(f"it has the bands {', '.join(unknown)}, but image_bands={names}: leave them out, or rename them.")
    shapes = {name: tuple(band.shape) for name, band in bands.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
        raise ValueError(f"its bands have the shapes {shown(shapes)}: resample them to one height and width.")
    planes: dict[str, Image.Image] = {}
    for name, band in bands.items():
        array = to_array(band, None, 1)
        height, width = array.shape[1:]
        check_extent(height, width, given.do_pad, given.max_aspect_ratio, given.max_image_pixels)
        try:
            array = to_eight_bits(array, given.value_range, quantize=bool(given.do_rescale))
        except ValueError as error:
            raise ValueError(f"band {name}: {error}") from error
        planes[name] = Image.fromarray(np.ascontiguousarray(array[0]))
    if given.num_channels == 3 and len(planes) == 3 and all(plane.mode == "L" for plane in planes.values()):
        return [Image.merge("RGB", [planes[name] for name in names])]
    return [planes.get(name) for name in names]


def check_extent(height: int, width: int, do_pad: bool | None, max_aspect_ratio: float, max_image_pixels: int) -> None:
    """Raises `ValueError` for images that are empty, too elongated, or too large after padding to a square."""
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


def to_eight_bits(image: np.ndarray, value_range: Sequence[float] | None, quantize: bool) -> np.ndarray:
    """Checks the values of an array and converts them to uint8, or to floats in [0, 1] without `quantize`.

    The range is determined by the dtype or by `value_range`, never from the values, so that dark and bright tiles of one
    scene are treated in the same way.
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
        result = np.empty(image.shape, np.uint8 if quantize else np.float32)
        step = max(1, ROWS_PIXELS // max(1, image.shape[2]))
        for top in range(0, image.shape[1], step):  # in strips, since wide numbers take eight times the memory
            rows = image[:, top : top + step]
            wide: Any = rows.astype(np.float64 if image.itemsize > 2 and image.dtype != np.float32 else np.float32)
            wide -= black
            wide *= 1 / (white - black)
            np.clip(wide, 0, 1, out=wide)
            result[:, top : top + step] = np.rint(wide * 255) if quantize else wide
        return result
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
    return np.rint(image * 255).astype(np.uint8) if is_float and quantize else image


__all__ = ["image_size", "is_inside", "open_image"]
