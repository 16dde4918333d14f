"""Converts a checkpoint in the authors' layout to a model folder of this package, or a model folder to one of more bands.

    mfrsvlm convert released SRC --vision-tower DIR_OR_HUB_ID --output OUT [--dtype bfloat16] [--verify]
    mfrsvlm convert widen SRC --bands red,green,blue,nir --output OUT

A released checkpoint is memory-mapped, so that it need not fit into memory. Every key must be in
`released_layout.KEY_TABLE`, which also lists dropped keys. An unknown key stops the conversion. The output folder is written
atomically.
"""

import contextlib
import copy
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import GenerationConfig
from transformers.utils import logging

from .arguments import converter_parser
from .configuration_mfrsvlm import MFRSVLMConfig
from .image_processing_mfrsvlm import RGB, MFRSVLMImageProcessor
from .modeling_mfrsvlm import MFRSVLMForConditionalGeneration
from .output_folders import clean_up, unwritten, whole_folder
from .processing_mfrsvlm import MFRSVLMProcessor, make_chat_template
from .released_layout import (
    ConversionError,
    explained,
    is_finite,
    read_json,
    read_tokenizer,
    refuse_variants,
    released_config,
    rename,
)


logger = logging.get_logger(__name__)

MAX_OUTPUT_SHARD = 10**9  # bytes
IMAGE_TOKEN = "<image>"
# Of the published prompts for boxes: over the sides of the image, although the model sees it padded to a square.
RELEASED_BOXES = {
    "scale": 1000,
    "order": "xyxy",
    "padded": False,
    "prompt": "{VG} {object} Answer with bounding box coordinates [x_min, y_min, x_max, y_max] "
    "scaled to 0-1000 (inclusive).",
}
NOTHING = r"(?!)"
ASSEMBLE = "To make a new model from parts, run: mfrsvlm assemble --help"


def find_shards(folder: Path) -> list[Path]:
    """Weight files of a folder. Safetensors come before `.bin`, an index before a single file."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            # A name with a folder in it would let an index reach outside its own.
            if not isinstance(weight_map, dict) or any(Path(str(file)).name != file for file in weight_map.values()):
                raise ConversionError(f"{index} has no weight_map of keys to file names.")
            return [folder / file for file in sorted(set(weight_map.values()))]
        if (folder / name).is_file():
            return [folder / name]
    raise ConversionError(
        f"{folder} holds no weights: expected model.safetensors or pytorch_model.bin, or shards of either and their index."
    )


def read_shard(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of one file. They stay in the file until they are used.

    Pickles are read with `weights_only`: one that carries code is refused, and the code does not run.

    Raises:
        ConversionError: the file is missing, damaged, or no plain dictionary of tensors.
    """
    with explained(f"{path} cannot be read, it may be missing or truncated (download it again)"):
        try:
            if path.suffix == ".safetensors":
                return load_file(path)
            mapped = zipfile.is_zipfile(path)  # files from before torch 1.6 are not, and are read whole
            if mapped and (changed := first_changed(path)):
                raise ConversionError(f"{path} is damaged: {changed} in it does not have its checksum. Download it again.")
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            raise ConversionError(
                f"{path} is refused: it is damaged, a Git LFS pointer, or holds more than tensors. Loading the last could "
                f"run code, which was not done. ({str(error).splitlines()[0]})"
            ) from error
    if not isinstance(tensors, dict):
        raise ConversionError(f"{path} holds a {type(tensors).__name__}, not a dictionary of tensors.")
    for key, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise ConversionError(f"{path} holds a {type(value).__name__} at {key!r}, expected tensors only.")
    return tensors


def first_changed(path: Path) -> str | None:
    """The first part of a zip file whose checksum is wrong, which `torch.load` does not compare."""
    with zipfile.ZipFile(path) as file:
        return file.testzip()


def read_renamed(
    shards: list[Path], dtype: torch.dtype, scratch: Path, stated: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """All tensors of the files, renamed and in the wanted type. Tensors of another type are converted in `scratch`.

    Raises:
        ConversionError: see `read_shard` and `rename`; or a tensor comes twice, or is not of the type `stated`, if any.

    Tensors that are not finite are kept, with a warning, since the loader of the result rejects them.
    """
    state: dict[str, torch.Tensor] = {}
    storages = set()
    for shard in shards:
        for key, tensor in read_shard(shard).items():
            for name, value in rename(key, tensor).items():
                if name in state:
                    raise ConversionError(f"{name} comes twice, the second time in {shard}.")
                if not is_finite(value):
                    logger.warning(
                        f"{key} in {shard} holds NaN or infinity, so the result loads only with allow_incomplete."
                    )
                if value.is_floating_point() and stated not in (None, value.dtype):
                    raise ConversionError(
                        f"{key} in {shard} is {value.dtype}, but config.json has torch_dtype={stated}. Pass --dtype to "
                        "choose the type of the written weights."
                    )
                value = cast(name, value, dtype, scratch)
                storage = value.untyped_storage().data_ptr()
                state[name] = value.clone() if storage in storages else value  # tensors that share memory are not saved
                storages.add(storage)
    return state


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype, scratch: Path) -> torch.Tensor:
    """The tensor in the wanted type. A converted tensor is memory-mapped from a file in `scratch`."""
    if not tensor.is_floating_point():
        raise ConversionError(f"{name} holds {tensor.dtype}, not floating point: a quantized checkpoint is not supported.")
    if tensor.dtype == dtype or not tensor.numel():
        return tensor.to(dtype)
    if hasattr(os, "posix_fallocate"):  # a write to a map kills the process if the disk is full
        file = os.open(scratch / name, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            os.posix_fallocate(file, 0, tensor.numel() * dtype.itemsize)
        finally:
            os.close(file)
    copy = torch.from_file(str(scratch / name), shared=True, size=tensor.numel(), dtype=dtype).view(tensor.shape)
    # In pieces: the allocator keeps the room of large intermediate results.
    for given, taken in zip(tensor.reshape(-1).split(2**16), copy.view(-1).split(2**16), strict=True):
        taken.copy_(given)
        if taken.isinf().any() and not given.isinf().any():
            largest = given.abs().max().item()
            raise ConversionError(f"{name} reaches {largest:.3g}, beyond {dtype}: choose --dtype bfloat16 or float32.")
    return copy


def load_model(config: MFRSVLMConfig, state: dict[str, torch.Tensor], new: str = NOTHING) -> MFRSVLMForConditionalGeneration:
    """The model with these tensors, without copies. Only keys that match `new` may be missing; they are random.

    Raises:
        ConversionError: a key is unknown to the model, has the wrong shape, or is missing.
    """
    options = {"dtype": config.dtype, "ignore_mismatched_sizes": True, "output_loading_info": True}
    with explained("These parts make no model"), contextlib.ExitStack() as stack:
        stack.callback(logging.set_verbosity, logging.get_verbosity())
        logging.set_verbosity_error()  # the library also prints the errors below, as a table
        model, info = MFRSVLMForConditionalGeneration.from_pretrained(None, config=config, state_dict=state, **options)
    for name in sorted(info["unexpected_keys"]):
        raise ConversionError(f"{name} has no place in the model: does config.json belong to this checkpoint?")
    for name, shape, expected in sorted(info["mismatched_keys"]):
        raise ConversionError(f"{name} has shape {tuple(shape)}, but its place in the model {tuple(expected)}.")
    refuse_missing("the weights", info["missing_keys"], new)
    return model


def refuse_missing(what: str, keys: set[str], allowed: str) -> None:
    missing = sorted(key for key in keys if not re.match(allowed, key))
    if missing:
        raise ConversionError(f"{len(missing)} tensors are missing from {what}, among them {missing[:5]}. Is a file lost?")


def resolve_folder(part: str, patterns: list[str]) -> Path:
    """Folder of a vision tower, downloaded if a Hub id is given."""
    if Path(part).is_dir():
        return Path(part)
    with explained(f"Vision tower {part} is no folder, and cannot be downloaded from the Hub"):
        return Path(snapshot_download(part, allow_patterns=["*.json", *patterns]))


def make_image_processor(
    tower: Path, config: MFRSVLMConfig, fields: tuple[str, ...] = (), **settings: Any
) -> MFRSVLMImageProcessor:
    """Image processor of the config's sizes, with the mean, std and resampling of the tower's own file, and `fields`."""
    path = tower / "preprocessor_config.json"
    content = read_json(path)  # without it, nothing says how images are normalized
    missing = [field for field in ("image_mean", "image_std") if field not in content]
    if missing:
        raise ConversionError(f"{path} lacks {missing}.")
    fields += ("image_mean", "image_std", "resample", "rescale_factor", "do_rescale", "do_normalize", "do_resize")
    with explained(f"{path} describes no image processor of a tower of {config.image_size} pixels"):
        kept = {field: content[field] for field in fields if content.get(field) is not None}
        processor = MFRSVLMImageProcessor.for_model(config, **kept, **settings)
        if processor.crop_size["height"] != config.image_size:
            raise ValueError(f"crop_size={content['crop_size']}")
    return processor


def add_image_token(tokenizer: Any, model: Any) -> None:
    """Gives the tokenizer `<image>` and a padding token, and the model a row for the first.

    No word is read from the row, but it marks the place of an image, so it must differ from every other row and from zero:
    it is the mean of the rows before it. A row that is added to the head is zero, and the model masks its logit.
    """
    vocab, size = tokenizer.get_vocab(), model.config.text_config.vocab_size
    if set(vocab) <= set(tokenizer.all_special_tokens):
        raise ConversionError(f"{tokenizer.name_or_path} holds no tokenizer: its vocabulary is empty.")
    known = vocab.get(IMAGE_TOKEN, size) < size
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    beyond = {token: index for token, index in vocab.items() if index >= size and token != IMAGE_TOKEN}
    if beyond or image_token_id > size:
        raise ConversionError(
            f"The tokenizer has {len(beyond)} tokens beyond vocab_size={size}, among them {list(beyond.items())[:5]}: the "
            "embedding has no rows for them. Resize it first, or remove them."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"  # what generation needs; training pads as its collator says
    if image_token_id == size:
        model.resize_token_embeddings(size + 1, mean_resizing=False)
        if not model.config.tie_word_embeddings:
            model.get_output_embeddings().weight.data[size] = 0
    if not known:
        rows = model.get_input_embeddings().weight.data
        rows[image_token_id] = rows[:image_token_id].mean(dim=0, dtype=torch.float32)
    model.config.image_token_id = image_token_id


def is_model_folder(folder: Path) -> bool:
    return (folder / "config.json").is_file() and "model_type" in read_json(folder / "config.json")


@contextlib.contextmanager
def whole_output(output: Path, overwrite: bool, sources: list[Path]) -> Iterator[Path]:
    """A temporary folder that becomes `output` if the block succeeds, see `whole_folder`.

    Raises:
        ConversionError: the output exists or is no model folder, or lies inside a source.
        FolderInUse: another run is writing it.
    """
    output = Path(os.path.realpath(output))
    if output.is_symlink():
        raise ConversionError(f"--output {output} is a link in a circle: choose another --output.")
    for source in (source.resolve() for source in sources if source.exists()):
        if source.is_relative_to(output) or output.is_relative_to(source):
            raise ConversionError(f"--output {output} and the source {source} lie in one another: choose another --output.")
    clean_up(output)
    if output.exists() and not overwrite:
        raise ConversionError(f"{output} exists. Choose another --output, or pass --overwrite to replace it.")
    if output.is_file() or (output.exists() and any(output.iterdir()) and not is_model_folder(output)):
        raise ConversionError(f"{output} is no model folder (no config.json with a model_type), so it is not overwritten.")
    with whole_folder(output) as folder:
        yield folder


def save_folder(folder: Path, model: Any, processor: Any, settings: GenerationConfig) -> None:
    """Writes a Hub folder: weights, configs, processor and code."""
    if not settings.do_sample:  # Vicuna sets a temperature all the same: it has no effect, and is refused when saved
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            setattr(settings, name, None)
    if settings.pad_token_id is None:
        settings.pad_token_id = processor.tokenizer.pad_token_id
    model.generation_config = settings
    model.save_pretrained(folder, max_shard_size=MAX_OUTPUT_SHARD)
    processor.save_pretrained(folder)


def convert_released(
    source: Path,
    vision_tower: str,
    output: Path,
    dtype: str | None = None,
    overwrite: bool = False,
    verify: bool = False,
) -> None:
    """Converts a checkpoint in the authors' layout to a Hub folder of this package.

    Args:
        source: folder with `config.json`, the shards and the tokenizer.
        vision_tower: folder or Hub id of the vision tower, whose weights released shards do not hold.
        output: folder to make.
        dtype: of the written weights, for example `"bfloat16"`; the checkpoint's own if `None`.
        overwrite: whether an existing model folder at `output` may be replaced.
        verify: compare the result, tensor by tensor and by one forward in a clean process, with the source.

    Raises:
        ConversionError: the checkpoint is incomplete, damaged or of an unsupported variant, or `output` exists.
    """
    # Here, since modules of the root import no room when they are loaded.
    from .model_card.card import write_model_card

    content = read_json(source / "config.json")
    if content.get("model_type") == "mfrsvlm" and "text_config" in content:  # the released config is flat
        raise ConversionError(f"{source} is a model folder of this package already: it needs no conversion.")
    refuse_variants(source, content)
    tokenizer = read_tokenizer(source)
    tower = resolve_folder(vision_tower, ["*.safetensors", "pytorch_model*.bin"])
    if tower != Path(vision_tower):
        logger.warning(
            f"Training changed the towers of released models: with {vision_tower}, answers will differ from theirs."
        )
    config = released_config(content, tower, dtype)
    image_processor = make_image_processor(
        tower,
        config,
        ("size", "crop_size"),
        canvas_source="global_view",
        window_packing="channels_first",
        do_pad=content.get("image_aspect_ratio") == "pad",
    )
    settings = GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id)
    if (source / "generation_config.json").is_file():
        with explained(f"{source / 'generation_config.json'} cannot be read"):
            settings = GenerationConfig.from_pretrained(source)
    with whole_output(output, overwrite, [source, tower]) as folder:
        parts: dict[str, Any] = {"released checkpoint": source}
        stated = None if dtype or not content.get("torch_dtype") else config.dtype
        state = read_renamed(find_shards(source), config.dtype, folder.parent, stated)
        if any(name.startswith("model.vision_tower.") for name in state):
            logger.warning("The shards hold a vision tower of their own: it is used, not the weights of --vision-tower.")
        else:
            state |= read_renamed(find_shards(tower), config.dtype, folder.parent)
            if not tower.resolve().is_relative_to(source.resolve()):
                parts["vision tower"] = vision_tower
        model = load_model(config, state)
        add_image_token(tokenizer, model)
        template = make_chat_template(tokenizer)
        processor = MFRSVLMProcessor(
            image_processor, tokenizer, chat_template=template, image_placement="prefix", box_format=RELEASED_BOXES
        )
        save_folder(folder, model, processor, settings)
        write_model_card(folder, model.config, origin="converted", parts=parts)
        if verify:
            verify_folder(folder, model)


# Runs in a process of its own, on nothing but the folder: what a stranger would get.
_VERIFY = """
import sys, numpy, torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, target = sys.argv[1:]
model, info = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
if not type(model).__module__.startswith("transformers_modules.") or any(info.values()):
    sys.exit(f"{type(model)} {info}")
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
image = numpy.random.default_rng(0).integers(0, 256, (97, 64, 3), dtype=numpy.uint8)
inputs = processor(images=image, text="USER: <image>\\nWhat is this? ASSISTANT:", return_tensors="pt").to(model.dtype)
with torch.no_grad():
    save_file({**inputs, "logits": model(**inputs).logits}, target)
"""


def verify_folder(folder: Path, model: MFRSVLMForConditionalGeneration) -> None:
    """Compares every written tensor, and one forward in a clean process on the folder, with the model.

    Raises:
        ConversionError: the folder does not load, or something differs.
    """
    written = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, tensor in written.items():
        if not torch.equal(tensor.flatten().view(torch.uint8), model.state_dict()[name].flatten().view(torch.uint8)):
            raise ConversionError(f"{name} changed on the way to {folder}: is the disk sound?")
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "seen.safetensors"
        # Only what a clean machine would have: no module cache, and not this package from its own folder.
        environment = {**os.environ, "HF_MODULES_CACHE": str(Path(scratch) / "modules"), "PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-c", _VERIFY, str(folder), str(target)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode:
            raise ConversionError(f"The written folder does not load in a clean process:\n{result.stderr[-2000:]}")
        inputs = load_file(target)
    expected = inputs.pop("logits")
    with torch.no_grad():
        error = (model(**inputs).logits - expected).abs().max().item()
    # Half the digits: two processes need not add in the same order.
    bound = torch.finfo(model.dtype).eps ** 0.5 * max(1.0, expected.abs().max().item())
    if not error <= bound:
        raise ConversionError(
            f"The logits of the reloaded model differ by {error:.3g} from the source's (bound: {bound:.3g})."
        )
    print(f"verified: {len(written)} tensors equal, logits of one forward differ by {error:.1e}")


def widen(
    source: str,
    bands: list[str],
    output: Path,
    mean: float | None = None,
    std: float | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """Gives a model an encoder of more bands. The weights of new bands are zero, so that answers about RGB stay the same.

    New bands have a layer of their own, see `MFRSVLMConfig.stem_channels`. Images of three channels still work: their new
    bands are zero after normalization.

    Args:
        source: model folder or Hub id.
        bands: names of all bands in their order; those of the source are among them. Without `image_bands`, these are red,
            green and blue.
        output: folder to make.
        mean: of the new bands, of samples from 0 to 1; `None`: the mean of those of the source.
        std: standard deviation, as for `mean`.
        dtype: of the written weights; that of the source if `None`.
        overwrite: whether an existing model folder at `output` may be replaced.

    Raises:
        ConversionError: the names do not fit the source, or its encoder is of an unknown kind; or `output` exists.
    """
    from .files.model_folder import load_model as load_folder
    from .model_card.card import write_model_card

    with explained(f"{source} cannot be loaded"):
        model, processor = load_folder(source, dtype=getattr(torch, dtype) if dtype else "auto")
        image_processor = processor.image_processor
    old = list(image_processor.image_bands or RGB)
    is_wider = len(bands) == len(set(bands)) and set(bands) > set(old) and all(bands)
    if not is_wider or model.config.num_channels != len(old):
        raise ConversionError(
            f"bands={bands} must be different names, with the bands {old} of {source} and more among them; the source has "
            f"{model.config.num_channels} channels."
        )
    config = copy.deepcopy(model.config)
    config.dtype = model.dtype
    config.vision_config.num_channels = len(bands)
    stem = [old[place] for place in model.config.stem_channels or range(len(old))]
    config.stem_channels = [bands.index(name) for name in stem]
    extra = [name for name in bands if name not in stem]
    with explained(f"The encoder of {source} cannot be widened"), torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in type(model)(config).state_dict().items()}
    state = dict(model.state_dict())
    (name,) = (name for name in shapes if name.endswith(".extra_bands.weight"))
    state[name] = widen_weight(state.get(name), shapes[name], model.dtype, [extra.index(b) for b in old if b not in stem])
    places = [bands.index(name) for name in old]
    settings = image_processor.to_dict() | {
        "num_channels": len(bands),
        "image_bands": list(bands),
        "image_mean": of_all_bands(image_processor.image_mean, mean, places, len(bands)),
        "image_std": of_all_bands(image_processor.image_std, std, places, len(bands)),
    }
    with explained(f"bands={bands}, mean={mean} and std={std} are no settings of an image processor"):
        processor.image_processor = type(image_processor).from_dict(settings)
    with whole_output(output, overwrite, [Path(source)]) as folder:
        widened = load_model(config, state)
        save_folder(folder, widened, processor, model.generation_config)
        write_model_card(folder, widened.config, origin="converted", parts={"model": source})


def of_all_bands(values: Any, new: float | None, places: list[int], count: int) -> list[float]:
    """A setting of the image processor for `count` bands: that of the source at `places`, elsewhere `new` or their mean."""
    given = np.broadcast_to(np.asarray(values, dtype=np.float64), (len(places),))
    every = np.full(count, given.mean() if new is None else new)
    every[places] = given
    return every.tolist()


def widen_weight(tensor: torch.Tensor | None, shape: torch.Size, dtype: torch.dtype, places: list[int]) -> torch.Tensor:
    """Weights of `shape` for all new bands. They are zero but for the columns at `places`, which are those of the tensor."""
    wide = torch.zeros(shape, dtype=dtype)
    if tensor is not None and tensor.ndim == 4:  # a convolution: (out, channels, height, width)
        wide[:, places] = tensor
    elif tensor is not None:  # patches as rows: (out, height * width * channels)
        old = tensor.unflatten(1, (-1, len(places)))
        wide.view(shape[0], old.shape[1], -1)[..., places] = old
    return wide


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["assemble"]:
        print(f"error: this command converts. {ASSEMBLE}", file=sys.stderr)
        return 2
    options = vars(converter_parser().parse_args(argv))
    commands: dict[str, Callable[..., None]] = {"released": convert_released, "widen": widen}
    return run(commands[options.pop("command")], options)


def run(command: Callable[..., None], options: dict[str, Any]) -> int:
    """Runs a command that writes `options["output"]`, and returns the exit status. Errors go to stderr in one line."""
    try:
        command(**options)
    except (ConversionError, OSError, SafetensorError) as error:  # the last two: full disk, no permission
        print(f"error: {unwritten(error) or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT
    print(f"wrote {options['output']}")
    return 0


def exit_on_termination() -> None:
    """Turns SIGTERM into `SystemExit`, so that temporary files are removed."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


if __name__ == "__main__":
    exit_on_termination()
    sys.exit(main())
