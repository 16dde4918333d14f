"""Images come in by one door: whatever holds them, the pixels are those of the source, or they are refused.

The grid writes files of every depth, number of bands, compression and color by GDAL and by Pillow, and compares what the
processor sees with the array that was written. The doors hand the same turned photograph over in every form.
"""

import base64
import io
import pickle
import struct
import zlib
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from external_data import external_data
from fake_network import fake_network
from PIL import Image, ImageOps

from mfrsvlm import MFRSVLMImageProcessor, image_sources_mfrsvlm
from mfrsvlm.image_sources_mfrsvlm import image_size, open_image


try:
    import rasterio
    from rasterio import shutil
except ImportError:
    rasterio = None
needs_gdal = pytest.mark.skipif(
    rasterio is None, reason="the grid is written by GDAL, through rasterio, which is not installed"
)
HEIGHT, WIDTH = 40, 24
pytestmark = pytest.mark.filterwarnings("ignore")


def processor(**overrides) -> MFRSVLMImageProcessor:
    return MFRSVLMImageProcessor(window_sizes=[], **overrides)


def samples(dtype: str, bands: int, seed: int = 0) -> np.ndarray:
    """Random values over the range of a type, (bands, height, width); floats in [0, 1]."""
    generator, shape = np.random.default_rng(seed), (bands, HEIGHT, WIDTH)
    if np.dtype(dtype).kind in "fc":
        return generator.random(shape).astype(dtype)
    limits = np.iinfo(dtype)
    return generator.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)


def verdict(path: Path, expected: np.ndarray, tolerance: float = 0) -> str:
    """`"exact"`, `"refused"` or what is wrong about how the processor sees a file. expected: (3, H, W) or (1, H, W)."""
    try:
        seen = processor().process_image(path)
    except ValueError as error:
        message = str(error)
        return "refused" if "\n" not in message and len(message) < 700 else f"unclear: {message!r}"
    if seen.shape != (3, HEIGHT, WIDTH) or seen.dtype != np.uint8:
        return f"shape {seen.shape} of {seen.dtype}"
    difference = np.abs(seen.astype(int) - expected.astype(int)).max()
    return "exact" if difference <= tolerance else f"differs by up to {difference}"


def attempt(function, *args, **kwargs):
    """What a writer returns, or `None` where it does not write such a file."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        # GDAL's own errors share no public class, and mistakes of ours are of other kinds.
        if isinstance(error, (TypeError, NameError, AttributeError, AssertionError)):
            raise
        return None


def write(path: Path, array: np.ndarray, driver: str = "GTiff", **options) -> Path:
    bands, height, width = array.shape
    with rasterio.open(
        path, "w", driver=driver, width=width, height=height, count=bands, dtype=array.dtype, **options
    ) as dataset:
        dataset.write(array)
    return path


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as dataset:
        return dataset.read()


def check_cells(cells: list[tuple[str, str, str]]) -> None:
    """cells: name, verdict, and what it must be: `"exact"`, `"refused"` or, where codecs differ by build, `"any"`."""
    assert cells
    allowed = {"exact": {"exact"}, "refused": {"refused"}, "any": {"exact", "refused"}}
    wrong = [f"{name}: {seen}, must be {must}" for name, seen, must in cells if seen not in allowed[must]]
    assert not wrong, "\n".join([f"{len(wrong)} of {len(cells)} cells:", *wrong])


# The grid: TIFF

DTYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64", "complex64"]
# Compressions without loss that every build of Pillow has.
COMPRESSIONS = ["none", "lzw", "deflate", "packbits", "lzw-predicted", "deflate-predicted"]
LAYOUTS = [
    {"interleave": interleave, **tiles}
    for interleave in ("pixel", "band")
    for tiles in ({}, {"tiled": True, "blockxsize": 16, "blockysize": 16}, {"blockysize": 1})
]


def compression(name: str) -> dict:
    options = {"compress": name.removesuffix("-predicted"), "predictor": 2 if "-" in name else None}
    return {key: value for key, value in options.items() if value and value != "none"} | (
        {"webp_lossless": True} if name == "webp" else {}
    )


@pytest.mark.parametrize(
    ("compress", "dtype"),
    [*product(COMPRESSIONS, DTYPES), *product(["zstd", "lzma", "lerc"], ["uint8", "uint16"]), ("webp", "uint8")],
)
@needs_gdal
def test_tiffs_by_type_bands_and_layout(dtype, compress, tmp_path):
    """As GDAL writes them by default: one band is gray, three and four of 8 bits are colors, all others nothing."""
    cells = []
    for bands, (number, layout) in product((1, 2, 3, 4, 5, 6), enumerate(LAYOUTS)):
        array = samples(dtype, bands)
        path = attempt(write, tmp_path / f"{bands}-{number}.tif", array, **layout, **compression(compress))
        if path is None:
            continue
        must = "exact" if dtype == "uint8" and bands in (1, 3, 4) else "refused"
        if must == "exact" and compress not in COMPRESSIONS:
            must = "any"
        cells.append((f"{bands} bands, {layout}", verdict(path, array[:3]), must))
    check_cells(cells)


@pytest.mark.integration
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@needs_gdal
def test_tiffs_by_color_and_alpha(dtype, tmp_path):
    """Declared colors are read, whatever bands follow; bands beside a gray one are refused, unless they are alpha."""
    cells = []
    alphas = (None, "YES", "NO", "PREMULTIPLIED", "NON-PREMULTIPLIED", "UNSPECIFIED")
    for bands, photometric, alpha, layout in product(
        (1, 2, 3, 4, 5, 6), ("MINISBLACK", "MINISWHITE", "RGB", "CMYK", "CIELAB"), alphas, LAYOUTS[::3]
    ):
        array = samples(dtype, bands)
        options = {"photometric": photometric, **({"alpha": alpha} if alpha else {}), **layout}
        path = attempt(write, tmp_path / "image.tif", array, **options)
        if path is None:
            continue
        with rasterio.open(path) as dataset:
            colors = [color.name for color in dataset.colorinterp]
        expected = 255 - array[:1] if photometric == "MINISWHITE" else array[: 3 if bands > 2 else 1]
        if photometric == "CMYK" and bands == 4:
            wide = 255 - array.astype(int)
            expected = np.rint(wide[:3] * wide[3] / 255)
        gray_with_alpha = bands == 2 and colors[1] == "alpha"
        if dtype != "uint8":
            must = "refused"
        elif photometric in ("MINISBLACK", "MINISWHITE"):
            must = "any" if bands == 1 or gray_with_alpha else "refused"
            if bands == 1 and (photometric == "MINISBLACK" or layout["interleave"] == "pixel"):
                must = "exact"
        elif photometric == "RGB":
            must = "exact" if bands == 3 else "refused" if alpha == "PREMULTIPLIED" and bands > 3 else "any"
        else:
            must = "any"
        tolerance = 1 if photometric == "CMYK" else 0
        cells.append((f"{bands} bands, {options}", verdict(path, expected, tolerance), must))
    check_cells(cells)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 9, 10, 12, 14])
@needs_gdal
def test_tiffs_of_odd_depths(bits, tmp_path):
    """Fewer than 8 bits are seen as viewers show them: the largest number is white."""
    cells = []
    for bands, compress, white, layout in product((1, 3), ("none", "deflate"), ("MINISBLACK", "MINISWHITE"), LAYOUTS):
        largest = 2**bits - 1
        dtype = "uint8" if bits < 8 else "uint16"
        array = np.random.default_rng(bits).integers(0, largest, (bands, HEIGHT, WIDTH), dtype=dtype, endpoint=True)
        options = {"nbits": bits, "photometric": "RGB" if bands == 3 else white, **compression(compress), **layout}
        path = write(tmp_path / "image.tif", array, **options)
        expected = array.astype(int) * 255 // largest
        expected = 255 - expected if options["photometric"] == "MINISWHITE" else expected
        must = (
            "refused"
            if bits > 8 or bands == 3
            else "exact"
            if bits in (1, 2, 4) and layout["interleave"] == "pixel"
            else "any"
        )
        cells.append((str(options), verdict(path, expected), must))
    check_cells(cells)


@pytest.mark.parametrize("options", [{"bigtiff": "YES"}, {"endianness": "BIG"}, {"bigtiff": "YES", "endianness": "BIG"}])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@needs_gdal
def test_tiffs_by_byte_order(dtype, options, tmp_path):
    cells = []
    for bands, layout in product((1, 2, 3, 4), LAYOUTS):
        array = samples(dtype, bands)
        path = write(tmp_path / "image.tif", array, **options, **layout)
        must = "refused" if dtype != "uint8" or bands == 2 else "any" if len(options) == 2 else "exact"
        cells.append((f"{bands} bands, {layout}", verdict(path, array[:3]), must))
    check_cells(cells)


@pytest.mark.parametrize("photometric", ["RGB", "YCBCR", "MINISBLACK"])
@needs_gdal
def test_tiffs_in_jpeg(photometric, tmp_path):
    """With loss, so what GDAL itself reads is the truth; decoders may round differently."""
    cells = []
    smooth = np.cumsum(samples("uint8", 3).astype(int) % 3, axis=2).astype(np.uint8)
    for number, (bands, layout) in enumerate(product((1, 3, 4), LAYOUTS)):
        options = {"compress": "jpeg", "photometric": photometric, **layout}
        path = attempt(write, tmp_path / f"{number}.tif", np.resize(smooth, (bands, HEIGHT, WIDTH)), **options)
        expected = None if path is None else attempt(read, path)
        if expected is None:
            continue
        must = "refused" if photometric == "MINISBLACK" and bands > 1 else "any"
        cells.append((f"{bands} bands, {options}", verdict(path, expected[:3], 8), must))
    check_cells(cells)


@needs_gdal
def test_tiffs_with_a_palette(tmp_path):
    indices = samples("uint8", 1)
    colors = {index: (index, 255 - index, index // 2, 255) for index in range(256)}
    path = write(tmp_path / "image.tif", indices, photometric="palette")
    with rasterio.open(path, "r+") as dataset:
        dataset.write_colormap(1, colors)
    expected = np.stack([indices[0], 255 - indices[0], indices[0] // 2])
    assert verdict(path, expected) == "exact"


@pytest.mark.parametrize("driver", ["GTiff", "COG"])
@pytest.mark.parametrize("layout", [{"compress": "deflate"}, {"compress": "lzw", "interleave": "band"}, {}])
@pytest.mark.parametrize("bands", [1, 3])
@needs_gdal
def test_masks_and_overviews_inside_a_tiff(driver, layout, bands, tmp_path):
    """They are no frames, and what lies under the mask is seen as it is stored."""
    array = samples("uint8", bands)
    mask = samples("uint8", 1)[0] > 128
    path = tmp_path / "plain.tif"
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        write(path, array, **layout)
        with rasterio.open(path, "r+") as dataset:
            dataset.write_mask(mask)
            dataset.build_overviews([2, 4])
        if driver == "COG":
            shutil.copy(path, tmp_path / "cog.tif", driver="COG", compress="deflate", blocksize=128)
            path = tmp_path / "cog.tif"
    with rasterio.open(path) as dataset:
        assert (dataset.dataset_mask() > 0).tolist() == mask.tolist() and dataset.overviews(1)
        expected = dataset.read()
    assert verdict(path, expected) == "exact"
    opened = Image.open(path)
    np.testing.assert_array_equal(processor().process_image(opened), np.broadcast_to(expected, (3, HEIGHT, WIDTH)))


@needs_gdal
def test_tiffs_that_do_not_say_what_they_show(tmp_path):
    """Readers disagree about a TIFF without a photometric interpretation. Camera files begin with a small copy."""
    path = write(tmp_path / "image.tif", samples("uint8", 1))
    content = path.read_bytes()
    entry = struct.pack("<HHI", 262, 3, 1)
    assert content.count(entry) == 1
    path.write_bytes(content.replace(entry, struct.pack("<HHI", 263, 3, 1)))
    assert verdict(path, samples("uint8", 1)) == "refused"
    Image.fromarray(samples("uint8", 1)[0]).save(path, tiffinfo={254: 1})
    with Image.open(path) as opened:
        assert opened.tag_v2[254] == 1
    assert verdict(path, samples("uint8", 1)) == "refused"


# The grid: other formats


@pytest.mark.parametrize(
    ("driver", "options", "readable"),
    [
        ("PNG", {}, {1, 3, 4}),
        ("JPEG", {"quality": 100}, {1, 3}),
        ("JP2OpenJPEG", {"quality": 100, "reversible": "YES", "ycc": "NO"}, {1, 3}),
        ("JP2OpenJPEG", {"quality": 100, "reversible": "YES", "ycc": "YES"}, {1, 3}),
        ("WEBP", {"lossless": True}, {3}),
        ("GIF", {}, set()),
        ("BMP", {}, {3}),
        ("PNM", {}, set()),
        ("SGI", {}, set()),
        ("HFA", {}, set()),
        ("ENVI", {}, set()),
    ],
)
@needs_gdal
def test_other_formats_of_gdal(driver, options, readable, tmp_path):
    cells = []
    for dtype, bands in product(("uint8", "uint16", "int16", "float32"), (1, 2, 3, 4, 5)):
        array = samples(dtype, bands)
        if driver == "JPEG":  # whose decoders differ in how they smooth colors
            array = np.broadcast_to(np.arange(WIDTH, dtype=dtype) * 3, array.shape)
        source = write(tmp_path / "source.tif", array, photometric="MINISBLACK")
        path = tmp_path / ("image.ppm" if driver == "PNM" and bands == 3 else "image.pgm")
        if attempt(shutil.copy, source, path, driver=driver, **options) is None and not path.is_file():
            continue
        expected = read(path)
        must = "refused" if dtype != "uint8" else "exact" if bands in readable else "any"
        if bands == 2 and driver != "PNG":  # where the second band is alpha by definition
            must = "refused"
        seen = verdict(path, expected[:3] if bands > 2 else expected[:1], 2 if driver == "JPEG" else 0)
        cells.append((f"{dtype}, {bands} bands", seen, must))
        path.unlink()
    check_cells(cells)


def png(values: np.ndarray, bits: int, color: int) -> bytes:
    """A PNG encoder of our own, (height, width, channels): Pillow does not write all depths."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = values.shape[:2]
    rows = values.reshape(height, -1)
    if bits == 16:
        lines = [row.astype(">u2").tobytes() for row in rows]
    else:
        digits = (rows[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        lines = [np.packbits(line.ravel().astype(np.uint8)).tobytes() for line in digits]
    palette = chunk(b"PLTE", bytes(3 * 2**bits - 1 - i for i in range(3 * 2**bits))) if color == 3 and bits < 8 else b""
    content = zlib.compress(b"".join(b"\0" + line for line in lines))
    parts = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)) + palette
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IDAT", content) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("color", "bits"), [*product([0], [1, 2, 4, 8, 16]), *product([2, 4, 6], [8, 16]), *product([3], [1, 2, 4])]
)
def test_pngs_of_every_depth(color, bits, tmp_path):
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    values = np.random.default_rng(0).integers(0, 2**bits, (HEIGHT, WIDTH, channels))
    path = tmp_path / "image.png"
    path.write_bytes(png(values, bits, color))
    expected = np.moveaxis(values[..., :3] if channels > 2 else values[..., :1], -1, 0) * 255 // (2**bits - 1)
    if color == 3:
        expected = 3 * 2**bits - 1 - (3 * values[..., 0] + np.arange(3)[:, None, None])
    assert verdict(path, expected) == ("exact" if bits <= 8 else "refused")


LOSSLESS = {"WEBP": {"lossless": True}}


@pytest.mark.parametrize(
    "format",
    ["PNG", "TIFF", "GIF", "BMP", "WEBP", "TGA", "JPEG2000", "PPM", "SGI", "PCX", "IM", "DDS", "ICO", "QOI", "AVIF"],
)
def test_files_of_pillow(format, tmp_path):
    """What Pillow writes and Pillow reads, and formats whose depth nobody looks into, which are refused."""
    cells, colors = [], Image.fromarray(np.moveaxis(samples("uint8", 3), 0, -1))
    for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F"):
        image = colors.convert("P").convert("PA") if mode == "PA" else colors.convert(mode)
        path = tmp_path / mode
        attempt(image.save, path, format, **LOSSLESS.get(format, {}))
        try:
            with Image.open(path) as opened:
                written, expected = opened.mode, np.moveaxis(np.asarray(opened.convert("RGB")), -1, 0)
        except (OSError, ValueError):
            continue
        must = "exact" if written in ("1", "L", "LA", "P", "RGB", "RGBA") else "any"
        if written in ("LAB", "I", "I;16", "F") or (format == "JPEG2000" and written == "LA"):
            must = "refused"
        if format in ("PPM", "SGI", "PCX", "IM", "DDS", "ICO", "QOI", "AVIF"):
            must = "refused"
        cells.append((f"{mode} as {format}", verdict(path, expected), must))
    if not cells:
        pytest.skip(f"this Pillow has no {format}")
    check_cells(cells)


# Sources that were decoded, or that lie on disk


@pytest.mark.parametrize("bits", [8, 16])
def test_decoded_pngs_still_tell_their_depth(bits, tmp_path):
    """As `datasets` hands them over: opened and loaded, from a path or from bytes."""
    content = png(np.random.default_rng(0).integers(0, 2**bits, (HEIGHT, WIDTH, 3)), bits, 2)
    (tmp_path / "image.png").write_bytes(content)
    for source in (tmp_path / "image.png", io.BytesIO(content)):
        image = Image.open(source)
        image.load()
        if bits == 8:
            processor().process_image(image)
        else:
            with pytest.raises(ValueError, match="bits"):
                processor().process_image(image)
    image = pickle.loads(pickle.dumps(Image.open(io.BytesIO(content))))
    with pytest.raises(ValueError, match=r"its file is gone.*image\.copy"):
        processor().process_image(image)
    processor().process_image(image.copy())


CASES = {
    "cases/images/depth-png16_grey.png": "white",
    "cases/images/depth-tiff16_rgb_chunky.tif": "16 bits",
    "cases/images/depth-tiff16_rgb_planar.tif": "16 bits",
    "cases/images/depth-tiff16_rgba.tif": "16 bits",
    "cases/images/depth-tiff_8bit_2band.tif": "bands",
    "cases/images/depth-tiff_8bit_4_band.tif": None,
    "cases/images/depth-tiff_8bit_6_band.tif": None,
    "cases/images/depth-tiff_float32_rgb.tif": "rasterio",
    "cases/images/depth-tiff_int8_signed_rgb.tif": "rasterio",
    "cases/images/depth-tiff_miniswhite.tif": None,
    "cases/images/tf-planar.tif": "16 bits",
    "cases/images/tf-planar_deflate.tif": "16 bits",
    "cases/images/tf-uint8_4_bands_rgb_nir.tif": None,
    "cases/images/tf-uint8_5_bands_minisblack_separate.tif": "rasterio",
    "images/rasterio_RGB.byte.tif": None,
    "images/rt_colorado.tif": None,
    "images/og_naip_2020.tif": None,
    "images/rt_mosaic_cog1.tif": "rasterio",
    "images/og_landsat_2020.tif": "rasterio",
    "real/sensors/spacenet6_ms1.tif": "rasterio",
    "real/sensors/spacenet6_pan1.tif": "white",
    "real/sensors/spacenet6_rgb_unmasked.tif": None,
    "real/sensors/spacenet6_sar_hh.tif": "rasterio",
    "real/sensors/spacenet6_sar_masked.tif": "rasterio",
}


@pytest.mark.parametrize("name", CASES)
@needs_gdal
def test_real_files(name):
    path = external_data(name)
    if CASES[name]:
        with pytest.raises(ValueError, match=CASES[name]):
            processor(max_image_pixels=10**9).process_image(path)
        return
    with rasterio.open(path) as dataset:
        expected = dataset.read()[:3]
        if "miniswhite" in name:
            expected = 255 - expected
    np.testing.assert_array_equal(processor().process_image(path), np.broadcast_to(expected, (3, *expected.shape[1:])))


# Doors: the same turned photograph, in every form


def photograph(format: str, orientation: int | None = None) -> bytes:
    """24 x 40 pixels that look different from every side, with EXIF data that tell how they lie."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:10], pixels[:, :6] = (255, 40, 0), (0, 40, 255)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    return buffer.getvalue()


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Stored pixels (height, width, 3) as they are to be seen, from the EXIF standard."""
    pixels = pixels.transpose(1, 0, 2) if orientation in (5, 6, 7, 8) else pixels
    rows, columns = (-1 if orientation in turns else 1 for turns in ((3, 4, 7, 8), (2, 3, 6, 7)))
    return pixels[::rows, ::columns]


def doors(folder: Path) -> dict:
    """One photograph in every form that a user, a data file or a chat may name it in."""
    content, path = photograph("JPEG", 6), folder / "a photo.jpg"
    path.write_bytes(content)
    text = base64.b64encode(content).decode()
    loaded = Image.open(path)
    loaded.load()
    address = "https://example.com/photo.jpg"
    return {
        "path": str(path),
        "path object": path,
        "file address": path.as_uri(),
        "file address of this machine": path.as_uri().replace("file://", "file://localhost"),
        "bytes": content,
        "bytearray": bytearray(content),
        "dictionary of bytes": {"bytes": content, "path": "elsewhere.jpg"},
        "dictionary of a path": {"bytes": None, "path": str(path)},
        "data URI": f"data:image/jpeg;base64,{text}",
        "base64": text,
        "base64 in lines": "\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
        "address": address,
        "chat, address": {"type": "image", "url": address},
        "PIL": Image.open(path),
        "PIL, decoded": loaded,
        "PIL, of bytes": Image.open(io.BytesIO(content)),
        "PIL, turned by datasets": ImageOps.exif_transpose(Image.open(path)),
        "chat, image": {"type": "image", "image": str(path)},
        "chat, PIL": {"type": "image", "image": Image.open(path)},
        "chat, path": {"type": "image", "path": str(path)},
        "chat, base64": {"type": "image", "base64": text},
        "chat, data URI": {"type": "image", "url": f"data:image/jpeg;base64,{text}"},
        "chat, image_url": {"type": "image_url", "image_url": {"url": address}},
        "chat, plain image_url": {"type": "image_url", "image_url": f"data:image/jpeg;base64,{text}"},
    }


def test_a_turned_photograph_is_the_same_through_every_door(tmp_path, monkeypatch):
    """Pixels and size, of what the processor makes, fetches and shows, and of what `open_image` gives."""
    fake_network(monkeypatch, photograph("JPEG", 6), "/photo.jpg")
    stored = np.asarray(Image.open(io.BytesIO(photograph("JPEG"))))
    expected = turned(stored, 6)
    assert expected.shape == (WIDTH, HEIGHT, 3)
    ours = processor()
    tensor = ours(np.ascontiguousarray(expected), return_tensors="pt")["pixel_values"]
    for name, source in doors(tmp_path).items():
        opened = open_image(source)
        assert image_size(opened) == (WIDTH, HEIGHT) == opened.size[::-1], name
        np.testing.assert_array_equal(np.asarray(opened), expected, err_msg=name)
        (fetched,) = ours.fetch_images([source])
        assert fetched.size[::-1] == (WIDTH, HEIGHT), name
        np.testing.assert_array_equal(ours.process_image(source), expected.transpose(2, 0, 1), err_msg=name)
        for images in (source, [[source]], opened):
            assert torch.equal(ours(images, return_tensors="pt")["pixel_values"], tensor), name


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_every_format(format, orientation, tmp_path):
    stored = np.asarray(Image.open(io.BytesIO(photograph(format))))
    expected = turned(stored, orientation)
    content = photograph(format, orientation)
    for source in (content, Image.open(io.BytesIO(content))):
        assert image_size(Image.open(io.BytesIO(content))) == expected.shape[:2]
        opened = open_image(source)
        np.testing.assert_array_equal(np.asarray(opened), expected)
        np.testing.assert_array_equal(processor().process_image(source), expected.transpose(2, 0, 1))
        np.testing.assert_array_equal(np.asarray(open_image(opened)), expected)  # once, not twice


def test_images_of_datasets(tmp_path):
    """A column of images, decoded by `datasets` or not."""
    datasets = pytest.importorskip("datasets")
    content = photograph("JPEG", 6)
    (tmp_path / "photo.jpg").write_bytes(content)
    rows = [{"image": {"bytes": content, "path": None}}, {"image": {"bytes": None, "path": str(tmp_path / "photo.jpg")}}]
    expected = processor().process_image(content)
    for decode in (True, False):
        column = datasets.Dataset.from_list(rows, datasets.Features({"image": datasets.Image(decode=decode)}))["image"]
        for value in column:
            np.testing.assert_array_equal(processor().process_image(value), expected)
            assert image_size(open_image(value)) == (WIDTH, HEIGHT)


def test_arrays_pass_and_have_a_size():
    for array, size in ((np.zeros((5, 7, 3), np.uint8), (5, 7)), (torch.zeros(3, 5, 7), (5, 7)), (np.zeros((5, 7)), (5, 7))):
        assert open_image(array) is array
        assert image_size(array) == size
    assert image_size(np.zeros((4, 5, 7), np.uint8), num_channels=4) == (5, 7)


# Images that a data file names


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "data" / "images").mkdir(parents=True)
    for name in ("outside.png", "data/inside.png", "data/images/deep.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "outside.png")
    (tmp_path / "data" / "inner.png").symlink_to(tmp_path / "data" / "images" / "deep.png")
    return tmp_path / "data"


def test_files_of_the_folder_and_content_are_opened(folder):
    content = (folder / "inside.png").read_bytes()
    text = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    inside = [
        "inside.png",
        "images/deep.png",
        "images/../inside.png",
        "inner.png",
        str(folder / "inside.png"),
        Path("inside.png"),
    ]
    inside += [
        (folder / "inside.png").as_uri(),
        {"path": "inside.png", "bytes": None},
        {"type": "image", "image": "inside.png"},
    ]
    for source in (
        *inside,
        content,
        {"bytes": content, "path": "../x"},
        text,
        Image.new("RGB", (4, 4)),
        np.zeros((4, 4, 3)),
    ):
        open_image(source, folder)
        open_image(source, str(folder))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("../outside.png", "leaves"),
        ("images/../../outside.png", "leaves"),
        ("link.png", "leaves"),
        ("{folder}/../outside.png", "leaves"),
        ("/etc/passwd", "leaves"),
        ("file:///etc/passwd", "leaves"),
        ({"path": "../outside.png"}, "leaves"),
        ("https://example.com/a.png", "address"),
        ("HTTP://example.com/a.png", "address"),
        ({"type": "image_url", "image_url": {"url": "http://example.com/a.png"}}, "address"),
        ("missing.png", "no file"),
        ("s3://bucket/a.png", "no file"),
        ("images", "it is a folder: name one of its files"),
        ("iVBORw0KGgo=", "no file"),
        ("a\0b", "cannot open image"),
    ],
)
def test_what_leaves_the_folder_is_refused(folder, source, message, monkeypatch):
    monkeypatch.setattr(image_sources_mfrsvlm, "get_session", None)  # nothing may be fetched
    source = source.format(folder=folder) if isinstance(source, str) else source
    with pytest.raises(ValueError, match=message) as error:
        open_image(source, folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("source", [{}, {"type": "image"}, {"bytes": None, "path": None}, b"", b"x" * 5000, "x" * 5000])
def test_what_is_no_image_is_said_in_one_line(source):
    with pytest.raises(ValueError, match="image") as error:
        open_image(source)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("source", [None, 3, ["a.png"], {"image": 3}])
def test_what_cannot_name_an_image_is_a_type_error(source):
    with pytest.raises(TypeError, match="expected a PIL image"):
        open_image(source)
