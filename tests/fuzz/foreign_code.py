"""Code in files that are no code: in pickles, configs, templates and lists. None of it runs, as a marker file shows."""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import torch
from fuzz.harness import Case, outcome, random_of
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from tiny_benchmarks import make_yolo
from tiny_parts import CHECKPOINT
from tiny_training import tiny_folder

from mfrsvlm import MFRSVLMForConditionalGeneration
from mfrsvlm.checksums_mfrsvlm import CHECKSUMS
from mfrsvlm.convert_checkpoint import convert_released
from mfrsvlm.evaluation.answering import load
from mfrsvlm.evaluation.benchmarks import load_benchmark
from mfrsvlm.files.model_folder import load_model, load_processor
from mfrsvlm.training.finetune import DECODER_LINEARS


AREA = "foreign code"
TEST_COUNT = 40
LOADERS: dict[str, Callable[[Path], Any]] = {
    "model": load_model,
    "processor": load_processor,
    "evaluation": lambda folder: load(str(folder)),
}


class Payload:
    """Runs a function when it is unpickled."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, self.arguments


def payload(marker: Path, random: Random) -> Payload:
    return random.choice(
        (
            Payload(os.mkdir, str(marker)),
            Payload(os.system, f"mkdir '{marker}'"),
            Payload(exec, f"import os; os.mkdir({str(marker)!r})"),
            Payload(eval, f"__import__('os').mkdir({str(marker)!r})"),
        )
    )


def cases(seed: int, count: int, folder: Path) -> Iterator[Case]:
    whole = tiny_folder(folder / "whole")
    adapter = folder / "adapter"
    model = MFRSVLMForConditionalGeneration.from_pretrained(whole)
    get_peft_model(model, LoraConfig(target_modules=DECODER_LINEARS, r=2)).save_pretrained(adapter)
    makers = (pickled_weights, pickled_adapter, pickled_beside, released, auto_map, template, generate, tagged_yaml)
    for number in range(count):
        random = random_of(seed, number)
        maker = makers[number % len(makers)]
        work, marker = folder / "work", folder / "marker"

        def run(maker: Callable[..., Any] = maker, random: Random = random, work: Path = work, marker: Path = marker) -> str:
            shutil.rmtree(work, ignore_errors=True)
            call = maker(whole, adapter, work, marker, random)
            try:
                with mock.patch("builtins.input", lambda *_: "y"):  # whoever is asked says yes
                    return outcome(call, lambda _: not marker.exists())
            finally:
                assert not marker.exists(), "the code ran"

        yield Case(f"{number} {maker.__name__}", run)


def pickled_weights(whole: Path, adapter: Path, work: Path, marker: Path, random: Random) -> Callable[[], Any]:
    """A model folder whose weights are a pickle."""
    shutil.copytree(whole, work, ignore=shutil.ignore_patterns(CHECKSUMS, "*.safetensors"))
    tensors: dict[str, Any] = load_file(whole / "model.safetensors")
    key = random.choice(sorted(tensors))
    tensors[key if random.random() < 0.5 else "payload"] = payload(marker, random)
    write_pickle(tensors, work / "pytorch_model.bin", random)
    loader = LOADERS[random.choice(("model", "evaluation"))]
    return lambda: loader(work)


def pickled_adapter(whole: Path, adapter: Path, work: Path, marker: Path, random: Random) -> Callable[[], Any]:
    shutil.copytree(adapter, work, ignore=shutil.ignore_patterns(CHECKSUMS, "*.safetensors"))
    tensors: dict[str, Any] = load_file(adapter / "adapter_model.safetensors")
    tensors["payload"] = payload(marker, random)
    write_pickle(tensors, work / "adapter_model.bin", random)
    return lambda: load_model(work, base_model=str(whole))


def pickled_beside(whole: Path, adapter: Path, work: Path, marker: Path, random: Random) -> Callable[[], Any]:
    """A training checkpoint with files that are pickles, and weights that are not."""
    shutil.copytree(whole, work)
    (work / "trainer_state.json").write_text("{}")
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"):
        write_pickle(payload(marker, random), work / name, random)
    return lambda: load_model(work)


def released(whole: Path, adapter: Path, work: Path, marker: Path, random: Random) -> Callable[[], Any]:
    shutil.copytree(CHECKPOINT, work)
    path = random.choice(sorted(work.rglob("*.bin")))
    tensors: dict[str, Any] = torch.load(path, weights_only=True)
    tensors["payload"] = payload(marker, random)
    write_pickle(tensors, path, random)
    return lambda: convert_released(work, str(work / "vision_tower"), work.with_name("converted"))


def auto_map(whole: Path, adapter: Path, work: Path, marker: Path, random: Random) -> Callable[[], Any]:
    """Configs that name classes of Python files in the folder."""
    shutil.copytree(whole, work, ignore=shutil.ignore_patterns(CHECKSUMS))
    (work / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Evil: pass\n")
    for path in work.glob("*_mfrsvlm.py"):
        path.write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    names = ("AutoConfig", "AutoModelForImageTextToText", "AutoModel", "AutoProcessor", "AutoImageProcessor")
    mapped = dict.fromkeys(names, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    kind = random.choice(("mfrsvlm", "another type", "tokenizer"))
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        content = json.loads((work / name).read_text())
        content["auto_map"] = mapped
        if kind == "another type" and name == "config.json":
            content["model_type"] = "evil"
        if kind == "tokenizer" and name == "tokenizer_config.json":
            content["tokenizer_class"] = "Evil"
        (work / name).write_text(json.dumps(content))
    loader = LOADERS[random.choice(sorted(LOADERS))]
    return lambda: loader(work)


def template(whole: Path, adapter: Path, work: Path, marker: Path, random: Random) -> Callable[[], Any]:
    """A chat template that leaves its sandbox, if there is none."""
    shutil.copytree(whole, work, ignore=shutil.ignore_patterns(CHECKSUMS))
    escape = random.choice(
        (
            "cycler.__init__.__globals__.os",
            "self.__init__.__globals__.__builtins__.__import__('os')",
            "namespace.__init__.__globals__['sys'].modules['os']",
            "raise_exception.__globals__['os']",
        )
    )
    (work / "chat_template.jinja").write_text(f"{{{{ {escape}.mkdir({str(marker)!r}) }}}}")
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]

    def call() -> Any:
        processor = load_processor(work)
        try:
            return processor.apply_chat_template(messages, add_generation_prompt=True)
        except Exception as error:  # the sandbox raises errors of Jinja
            return error

    return call


def generate(whole: Path, adapter: Path, work: Path, marker: Path, random: Random) -> Callable[[], Any]:
    """A decoding loop in the folder."""
    shutil.copytree(whole, work)
    (work / "custom_generate").mkdir()
    code = f"import os\nos.mkdir({str(marker)!r})\ndef generate(*a, **k): ...\n"
    (work / "custom_generate" / "generate.py").write_text(code)

    def call() -> Any:
        model, processor = load_model(work)
        inputs = processor(images=Image.new("RGB", (28, 28)), text="USER: <image>\nHello ASSISTANT:", return_tensors="pt")
        return model.generate(**inputs, max_new_tokens=1)

    return call


def tagged_yaml(whole: Path, adapter: Path, work: Path, marker: Path, random: Random) -> Callable[[], Any]:
    """Class names of YOLO in YAML with tags of Python."""
    work.mkdir()
    make_yolo(work)
    (work / "classes.txt").unlink()
    tag = random.choice(("os.mkdir", "os.makedirs"))
    (work / "data.yaml").write_text(f"names: !!python/object/apply:{tag} [{json.dumps(str(marker))}]\n")
    return lambda: load_benchmark("detection-counting", work)


def write_pickle(content: Any, path: Path, random: Random) -> None:
    """In a zip file, in the older format, or bare."""
    kind = random.choice(("zip", "old", "bare"))
    if kind == "bare":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
