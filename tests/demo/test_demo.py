"""The small model in `demo/model`: complete, current, and as good as its card says."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from external_data import external_data
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from mfrsvlm import demo
from mfrsvlm.demo.answering import answer
from mfrsvlm.evaluation import evaluate, load_benchmark
from mfrsvlm.evaluation.answering import load
from mfrsvlm.experiments import SCENE_MODEL
from mfrsvlm.processing_mfrsvlm import make_chat_template
from mfrsvlm.scenes import ask, plan_scene, scene_seed
from mfrsvlm.training.demo_model.aerial_cars import all_boxes_prompt
from mfrsvlm.training.train_demo_model import PROTOCOL, scene_figures


MODEL, PHOTO_MODEL = Path(demo.MODEL), Path(demo.PHOTO_MODEL)
ROOT = MODEL.parents[1]
CODE = sorted(path.name for path in ROOT.glob("*_mfrsvlm.py"))


@pytest.fixture(params=[MODEL, PHOTO_MODEL, Path(SCENE_MODEL)], ids=["scenes", "photographs", "experiments"])
def folder(request):
    return request.param


def test_folder_is_complete_and_small(folder):
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "processor_config.json", *CODE} <= names
    assert sum(path.stat().st_size for path in folder.iterdir()) < (24e6 if folder == PHOTO_MODEL else 16e6)


@pytest.mark.parametrize("name", CODE)
def test_code_in_the_folder_is_the_code_of_the_package(folder, name):
    assert (folder / name).samefile(ROOT / name), (
        f"{folder / name} is no link: see docs/compatibility.md for what git on Windows needs."
    )


def test_prompts_in_the_folder_are_those_of_the_package(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert (folder / "chat_template.jinja").read_text() == make_chat_template(tokenizer)


def test_placeholder_is_a_row_of_the_embedding_and_no_word(folder):
    """Its row lies among the others, and the head cannot say it."""
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    rows, head = weights["model.language_model.embed_tokens.weight"], weights["lm_head.weight"]
    place = config["image_token_id"]
    assert len(rows) == len(head) == config["text_config"]["vocab_size"] > place
    torch.testing.assert_close(rows[place].float(), rows[:place].float().mean(0), rtol=1e-2, atol=1e-3)
    assert not head[place].any()


def test_saved_files_are_real(tmp_path):
    """Whoever saves the model or the processor gets the code, and no links to where it came from."""
    for auto_class in (AutoModelForImageTextToText, AutoProcessor):
        auto_class.from_pretrained(MODEL, trust_remote_code=True).save_pretrained(tmp_path)
    assert not any(path.is_symlink() for path in tmp_path.iterdir())
    assert {name: (tmp_path / name).read_text() for name in CODE} == {name: (ROOT / name).read_text() for name in CODE}


# Rows of the card's table, and the task, figure and group of docs/evaluation/results.csv that each shows.
FIGURES = {
    "classification": ("classification", "accuracy", ""),
    **{kind: ("vqa", "per_type", kind) for kind in ("area", "presence", "comparison", "position")},
    "count": ("counting", "exact", ""),
    "grounding": ("grounding", "accuracy_0.5", ""),
    "caption": ("captioning", "caption_exact", ""),
    "caption facts": ("captioning", "caption_facts", ""),
}


def reported(mode):
    """The figures of the committed evaluation of this model, as `value`, `low`, `high` and `n`."""
    with (ROOT / "docs" / "evaluation" / "results.csv").open(newline="", encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line["mode"] == mode]
    by_place = {(line["task"], line["figure"], line["group"]): line for line in lines}
    keys = ("value", "low", "high", "n")
    return {row: {key: float(by_place[place][key]) for key in keys} for row, place in FIGURES.items()}


def test_card_shows_the_committed_evaluation():
    card = (MODEL / "README.md").read_text()
    images, blind = reported("image"), reported("blind")
    for row, found in images.items():
        value, low, high = (f"{100 * found[key]:.1f}" for key in ("value", "low", "high"))
        cells = [row, value, f"{low} - {high}", f"{found['n']:.0f}", f"{100 * blind[row]['value']:.1f}"]
        assert found["n"] > 300
        assert "| " + " | ".join(cells) in card
    assert "mfrsvlm.training.train_demo_model" in card and "seed 0" in card


@pytest.mark.integration
def test_the_model_reads_the_image():
    """Accuracy on a few held-out scenes is that of the committed evaluation, within sampling error."""
    processor = AutoProcessor.from_pretrained(MODEL, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(MODEL, trust_remote_code=True, dtype=torch.float32).eval()
    expected = reported("image")
    benchmark = load_benchmark("scenes", None, "test", count=30)
    found = scene_figures(evaluate(model, processor, [benchmark], PROTOCOL)["scenes/test"]["results"])
    for task in ("classification", "presence", "count"):
        share = expected[task]["value"]
        assert found[task]["value"] > share - 4 * np.sqrt(share * (1 - share) / found[task]["n"]) - 0.02


def shares(card):
    """The first column of figures of the card of `demo/real_model`, by row."""
    lines = [line.split("|") for line in card.splitlines() if line.startswith("|")]
    return {line[1].strip(): line[2].strip() for line in lines}


def test_an_image_is_encoded_once_for_all_questions():
    model, processor = load(demo.MODEL, device="cpu")
    encoded = []
    model.model.vision_tower.register_forward_hook(lambda *_: encoded.append(1))
    questions = ["How many aircraft are there?", "Is there a ship in this scene?", "Give the bounding box of the building."]
    with Image.open(demo.SCENE) as image:
        alone = [answer(model, processor, image, [question])[0] for question in questions]
        passes = len(encoded)
        together = answer(model, processor, image, questions)
    assert together == alone and together[2].boxes
    assert len(encoded) - passes == passes / len(questions)


def test_card_of_the_photographs_names_parts_and_splits():
    card = (PHOTO_MODEL / "README.md").read_text()
    figures = shares(card)
    for row in ("class, accuracy", "caption, CIDEr", "17 labels, macro F1", "RSIVQA, count"):
        assert 0 < float(figures[row]) < 500
    assert "Apache-2.0" in card and "no license stated" in card and "near-duplicates" in card.replace("_", "-")


def test_boxes_are_asked_for_as_they_were_in_training():
    prompts = {
        MODEL: ask(plan_scene(scene_seed("train", 2)), ["grounding"])[0].text.replace("car", "{object}"),
        PHOTO_MODEL: all_boxes_prompt("{object}"),
    }
    for folder, prompt in prompts.items():
        assert json.loads((folder / "processor_config.json").read_text())["box_format"]["prompt"] == prompt


@pytest.mark.integration
def test_the_model_of_photographs_reads_photographs():
    """Classes of 63 photographs of the test split, by free generation, within sampling error of the card."""
    root = external_data("real/ucm")
    rows = [row["image"] for row in json.loads((root / "captions.json").read_text()) if row["split"] == "test"]
    chosen = [row for index, row in enumerate(rows) if index % 10 < 3]
    benchmark = load_benchmark("uc-merced", root, "all")
    benchmark.samples = [sample for sample in benchmark.samples if sample.images[0] in chosen]
    assert len(benchmark.samples) == 63
    processor = AutoProcessor.from_pretrained(PHOTO_MODEL, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(PHOTO_MODEL, trust_remote_code=True, dtype=torch.float32).eval()
    found = evaluate(model, processor, [benchmark], PROTOCOL)["uc-merced/all"]["results"]["classification"]["accuracy"]
    share = float(shares((PHOTO_MODEL / "README.md").read_text())["class, accuracy"]) / 100
    assert found["value"] > share - 4 * np.sqrt(share * (1 - share) / 63) - 0.02


@pytest.mark.slow
def test_folder_works_elsewhere(tmp_path):
    """As a stranger would load it: a copy, in a clean process, in one line."""
    folder = shutil.copytree(MODEL, tmp_path / "copy")
    script = (
        "from transformers import AutoModelForImageTextToText as M, AutoProcessor as P;"
        f"m = M.from_pretrained({str(folder)!r}, trust_remote_code=True); P.from_pretrained({str(folder)!r}, "
        "trust_remote_code=True); print(type(m).__module__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "", "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("transformers_modules")
    assert Path(tmp_path / "modules").is_dir()
