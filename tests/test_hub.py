"""Publishing to a Hub and loading by repository id, each in a process of its own, as its readers would.

One process with the installed package publishes. A clean one, that cannot import the package, loads everything and
publishes a derived checkpoint. After the first repository is gone, a last clean one loads the derived checkpoint.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hub_server import HubServer
from safetensors.torch import load_file
from transformers import AutoImageProcessor


# The fixture is made once a worker, so all tests belong on one.
pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("hub")]

AUTO_MAP = {
    "AutoConfig": "configuration_mfrsvlm.MFRSVLMConfig",
    "AutoModel": "modeling_mfrsvlm.MFRSVLMModel",
    "AutoModelForImageTextToText": "modeling_mfrsvlm.MFRSVLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_mfrsvlm.MFRSVLMForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_mfrsvlm.MFRSVLMForConditionalGeneration",
}
IMAGE_PROCESSOR = "image_processing_mfrsvlm.MFRSVLMImageProcessor"
CODE = {
    "checksums_mfrsvlm.py",
    "configuration_mfrsvlm.py",
    "conversations_mfrsvlm.py",
    "image_processing_mfrsvlm.py",
    "image_sources_mfrsvlm.py",
    "modeling_mfrsvlm.py",
    "processing_mfrsvlm.py",
}
ROOT = Path(__file__).parents[1]
LINKS = ROOT / "demo" / "model"  # its code is links to that of the package
PUSHED, BASE, UPLOADED, LINKED, DERIVED = (
    "author/MF-RSVLM",
    "author/base",
    "author/uploaded",
    "author/linked",
    "reader/derived",
)
# In old versions of transformers this class wants torchvision, which nothing here needs.
try:
    HAS_AUTO_IMAGE_PROCESSOR = bool(AutoImageProcessor.from_pretrained)
except ImportError:
    HAS_AUTO_IMAGE_PROCESSOR = False

# Shared by all processes: questions to the user are counted, and one prompt runs through a model.
COMMON = """
import builtins, json, os, sys
from pathlib import Path

asked = []
answer_from_stdin = builtins.input
builtins.input = lambda question="": asked.append(question) or "n"

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

torch.set_num_threads(1)  # small work: more threads would only wait for each other
folder, links, picture, out = map(Path, sys.argv[1:])
image = Image.open(picture)
question = "What is in this image?"
report, tensors = {}, {}
colours = list(np.asarray(image).transpose(2, 0, 1))
bands = dict(zip(["red", "green", "blue", "nir", "vv"], [*colours, 255 - colours[0], colours[1] // 2], strict=True))


def run(name, model, processor, image=image):
    inputs = processor(images=image, text=f"USER: <image>\\n{question} ASSISTANT:", return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    tensors[name] = outputs.logits if "logits" in outputs else outputs.last_hidden_state


def finish(target):
    report["asked"] = asked
    save_file(tensors, out / f"{target}.safetensors")
    (out / f"{target}.json").write_text(json.dumps(report))
"""

PUBLISH = """
from huggingface_hub import HfApi
from mfrsvlm import MFRSVLMForConditionalGeneration, MFRSVLMModel, MFRSVLMProcessor
from mfrsvlm.convert_checkpoint import widen

model = MFRSVLMForConditionalGeneration.from_pretrained(folder)
processor = MFRSVLMProcessor.from_pretrained(folder)
report["image_processor"] = type(processor.image_processor).__module__
base = MFRSVLMModel.from_pretrained(folder)
run("logits", model, processor)
run("hidden", base, processor)

model.push_to_hub("author/MF-RSVLM")
processor.push_to_hub("author/MF-RSVLM")
base.save_pretrained(out / "base", push_to_hub=True, repo_id="author/base")
processor.save_pretrained(out / "base", push_to_hub=True, repo_id="author/base")
HfApi().create_repo("author/uploaded")
HfApi().upload_folder(repo_id="author/uploaded", folder_path=folder)
HfApi().create_repo("author/linked")
HfApi().upload_folder(repo_id="author/linked", folder_path=links)
run("linked", MFRSVLMForConditionalGeneration.from_pretrained(links), MFRSVLMProcessor.from_pretrained(links))

widen(str(folder), list(bands), out / "wide")
wide = MFRSVLMForConditionalGeneration.from_pretrained(out / "wide")
wide_processor = MFRSVLMProcessor.from_pretrained(out / "wide")
run("wide at the start", wide, wide_processor)
torch.nn.init.normal_(next(m for m in wide.modules() if hasattr(m, "extra_bands")).extra_bands.weight)
wide.push_to_hub("author/wide")
wide_processor.push_to_hub("author/wide")
run("wide", wide, wide_processor, bands)
finish("publish")
"""

# A machine without the package: an import of it is noted and fails.
CLEAN = """
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mfrsvlm":
            report["imported"] = name
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NotInstalled())

from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM,
    AutoProcessor, AutoTokenizer, pipeline
)


def load(auto_class, repo):
    options, info = {"trust_remote_code": True}, {}
    if auto_class.__name__.startswith("AutoModel"):
        loaded, info = auto_class.from_pretrained(repo, output_loading_info=True, **options)
    else:
        loaded = auto_class.from_pretrained(repo, **options)
    name = f"{repo} {auto_class.__name__}"
    report[name] = f"{type(loaded).__module__}.{type(loaded).__name__}"
    report[f"{name} keys"] = sorted(key for kind in info for key in info[kind] if kind != "error_msgs")
    return loaded


def visit(repo):
    # First, so that nothing is in memory yet that the later ones fetch.
    refusing = AutoTokenizer.from_pretrained(repo, trust_remote_code=False)
    builtins.input = answer_from_stdin
    by_default = AutoTokenizer.from_pretrained(repo)
    builtins.input = lambda question="": asked.append(question) or "n"
    trusting = AutoTokenizer.from_pretrained(repo, trust_remote_code=True)
    report[f"{repo} ids"] = [t(f"<s> {question} <image>")["input_ids"] for t in (refusing, by_default, trusting)]

    config = load(AutoConfig, repo)
    report[f"{repo} auto_map"] = config.auto_map
    processor = load(AutoProcessor, repo)
    image_processor = processor.image_processor
    report[f"{repo} image processor"] = f"{type(image_processor).__module__}.{type(image_processor).__name__}"
    if HAS_AUTO_IMAGE_PROCESSOR:
        report[f"{repo} same settings"] = load(AutoImageProcessor, repo).to_dict() == image_processor.to_dict()
    tensors[f"{repo} pixel_values"] = image_processor(image, return_tensors="pt")["pixel_values"]

    for auto_class in (AutoModelForCausalLM, AutoModelForMultimodalLM):
        load(auto_class, repo)
    base, model = load(AutoModel, repo), load(AutoModelForImageTextToText, repo)
    run(f"{repo} hidden", base, processor)
    run(f"{repo} logits", model, processor)

    pipe = pipeline("image-text-to-text", model=repo, trust_remote_code=True)
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    report[f"{repo} pipeline"] = pipe(text=chat, return_full_text=False, generate_kwargs=options)[0]["generated_text"]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    report[f"{repo} generate"] = processor.decode(ids, skip_special_tokens=True)
    return model, processor
"""

DERIVE = """
model, processor = visit("author/MF-RSVLM")

uploaded = load(AutoModelForImageTextToText, "author/uploaded")
run("author/uploaded logits", uploaded, load(AutoProcessor, "author/uploaded"))
run("author/linked logits", load(AutoModelForImageTextToText, "author/linked"), load(AutoProcessor, "author/linked"))
run("author/base hidden", load(AutoModel, "author/base"), load(AutoProcessor, "author/base"))
load(AutoModelForImageTextToText, "author/base")
wide, wide_processor = load(AutoModelForImageTextToText, "author/wide"), load(AutoProcessor, "author/wide")
run("author/wide logits", wide, wide_processor, bands)
run("author/wide logits of RGB", wide, wide_processor)

with torch.no_grad():
    model.model.language_model.layers[0].mlp.down_proj.weight.mul_(-2)
model.push_to_hub("reader/derived")
processor.push_to_hub("reader/derived")
run("changed", model, processor)
finish("derive")
"""

REVISIT = """
visit("reader/derived")
finish("revisit")
"""


class Published(NamedTuple):
    files: dict[str, dict[str, bytes]]  # of every repository, by path
    reports: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    unsupported: list[str]  # requests that the server does not know
    last_requests: list[str]  # of the process that loads the derived checkpoint alone


def run_script(script: str, hub: HubServer, arguments: list[Path], home: Path, installed: bool) -> None:
    """Runs a script in another folder, with empty caches and no Hub but `hub`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home / "huggingface"),
        "HF_MODULES_CACHE": str(home / "modules"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "hf_none",
        "NO_PROXY": "127.0.0.1",
        "PYTHONSAFEPATH": "1",
    }
    if not installed:
        environment.pop("PYTHONPATH", None)
    home.mkdir()
    options = f"HAS_AUTO_IMAGE_PROCESSOR = {HAS_AUTO_IMAGE_PROCESSOR}\n"
    result = subprocess.run(
        [sys.executable, "-c", COMMON + ("" if installed else options + CLEAN) + script, *map(str, arguments)],
        cwd=home,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, f"{result.stdout[-1000:]}\n{result.stderr[-6000:]}"


@pytest.fixture(scope="module")
def published(converted: Path, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Published:
    scratch = tmp_path_factory.mktemp("hub")
    arguments = [converted, LINKS, reference / "images" / "b_landscape.png", scratch]
    with HubServer() as hub:
        run_script(PUBLISH, hub, arguments, scratch / "author", installed=True)
        run_script(DERIVE, hub, arguments, scratch / "reader", installed=False)
        files = {repo: hub.files(repo) for repo in (PUSHED, BASE, UPLOADED, LINKED, DERIVED)}
        for repo in (PUSHED, BASE, UPLOADED, LINKED):
            del hub.repositories[repo]
        count = len(hub.requests)
        run_script(REVISIT, hub, arguments, scratch / "stranger", installed=False)
    reports: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name in ("publish", "derive", "revisit"):
        reports[name] = json.loads((scratch / f"{name}.json").read_text())
        tensors |= load_file(scratch / f"{name}.safetensors")
    return Published(files, reports, tensors, hub.unsupported, hub.requests[count:])


def same(tensors: dict[str, torch.Tensor], name: str, expected: str) -> None:
    torch.testing.assert_close(tensors[name], tensors[expected], rtol=1e-5, atol=1e-5)


def test_everything_asked_of_the_hub_was_answered(published: Published) -> None:
    assert published.unsupported == []


def test_repositories_hold_code_and_no_reference_to_another(published: Published) -> None:
    for repo in (PUSHED, BASE, UPLOADED, LINKED, DERIVED):
        files = published.files[repo]
        assert files.keys() >= CODE | {"model.safetensors", "chat_template.jinja", "tokenizer.json"}, repo
        assert json.loads(files["config.json"])["auto_map"] == AUTO_MAP, repo
        processor = json.loads(files["processor_config.json"])
        assert processor["auto_map"]["AutoProcessor"] == "processing_mfrsvlm.MFRSVLMProcessor", repo
        image_processor = processor["image_processor"]["auto_map"]["AutoImageProcessor"]
        assert image_processor == IMAGE_PROCESSOR, repo
        for path, content in files.items():
            if path.endswith(".json"):
                assert b"--" not in content, f"{repo}/{path}"
        assert not {"is_local", "local_files_only"} & json.loads(files["tokenizer_config.json"]).keys(), repo
    for path in CODE:
        for repo in published.files:
            assert published.files[repo][path] == (ROOT / path).read_bytes(), f"{repo}/{path}"


def test_checksums_are_those_of_the_repository(published: Published) -> None:
    for repo, files in published.files.items():
        entries = json.loads(files["checksums.json"])
        assert "tokenizer.json" in entries, repo
        for name, entry in entries.items():
            assert entry["sha256"] == hashlib.sha256(files[name]).hexdigest(), f"{repo}/{name}"
    assert "model.safetensors" in json.loads(published.files[BASE]["checksums.json"])


def test_installed_package_needs_no_code_from_the_folder(published: Published) -> None:
    assert published.reports["publish"] == {"image_processor": "mfrsvlm.image_processing_mfrsvlm", "asked": []}


@pytest.mark.parametrize("stage, repo", [("derive", PUSHED), ("revisit", DERIVED)])
def test_auto_classes_load_by_id_on_a_clean_machine(published: Published, stage: str, repo: str) -> None:
    report = published.reports[stage]
    assert "imported" not in report
    assert report["asked"] == []
    classes = {**AUTO_MAP, "AutoProcessor": "processing_mfrsvlm.MFRSVLMProcessor", "image processor": IMAGE_PROCESSOR}
    if HAS_AUTO_IMAGE_PROCESSOR:
        classes["AutoImageProcessor"] = IMAGE_PROCESSOR
        assert report[f"{repo} same settings"]
    for auto_class, name in classes.items():
        loaded = report[f"{repo} {auto_class}"]
        # Code of this very repository, and not of the one it is derived from.
        assert loaded.startswith(f"transformers_modules.{repo.replace('/', '.').replace('-', '_hyphen_')}."), loaded
        assert loaded.endswith(f".{name}"), loaded
    assert report[f"{repo} auto_map"] == AUTO_MAP
    for auto_class in AUTO_MAP.keys() - {"AutoConfig", "AutoModel"}:
        assert report[f"{repo} {auto_class} keys"] == []
    assert report[f"{repo} AutoModel keys"] == ["lm_head.weight"]


def test_a_widened_model_loads_with_its_new_bands(published: Published) -> None:
    tensors = published.tensors
    same(tensors, "author/wide logits", "wide")
    same(tensors, "author/wide logits of RGB", "logits")
    same(tensors, "wide at the start", "logits")
    assert not torch.allclose(tensors["wide"], tensors["logits"], atol=1e-2)


@pytest.mark.parametrize("stage, repo", [("derive", PUSHED), ("revisit", DERIVED)])
def test_tokenizer_needs_no_trust(published: Published, stage: str, repo: str) -> None:
    refusing, by_default, trusting = published.reports[stage][f"{repo} ids"]
    assert refusing == by_default == trusting
    assert len(trusting) > 3


@pytest.mark.parametrize("stage, repo", [("derive", PUSHED), ("revisit", DERIVED)])
def test_pipeline_answers(published: Published, stage: str, repo: str) -> None:
    report = published.reports[stage]
    assert report[f"{repo} pipeline"].strip()
    assert report[f"{repo} pipeline"] == report[f"{repo} generate"]


def test_numbers_survive_the_hub(published: Published) -> None:
    tensors = published.tensors
    for repo in (PUSHED, UPLOADED):
        same(tensors, f"{repo} logits", "logits")
    for repo in (PUSHED, BASE):
        same(tensors, f"{repo} hidden", "hidden")
    same(tensors, f"{DERIVED} pixel_values", f"{PUSHED} pixel_values")
    same(tensors, f"{LINKED} logits", "linked")


def test_derived_checkpoint_outlives_its_origin(published: Published) -> None:
    tensors = published.tensors
    same(tensors, f"{DERIVED} logits", "changed")
    assert (tensors["changed"] - tensors["logits"]).abs().max() > 1e-3
    assert published.last_requests
    assert all(DERIVED in request for request in published.last_requests), published.last_requests


def test_base_class_saves_all_but_the_head(published: Published) -> None:
    report = published.reports["derive"]
    assert report[f"{BASE} AutoModel keys"] == []
    assert report[f"{BASE} AutoModelForImageTextToText keys"] == ["lm_head.weight"]
