"""Every example runs as it stands; where that takes long, with smaller numbers."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from external_data import external_data
from hub_server import HubServer
from PIL import Image
from tiny_photographs import texture

from mfrsvlm.demo import SCENE
from mfrsvlm.geospatial import Raster


EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = EXAMPLES.parent / "demo" / "model"


def load_example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_listed():
    page = (EXAMPLES / "README.md").read_text()
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert all(f"({name})" in page for name in files)


def run_notebook(name: str, folder: Path, monkeypatch) -> str:
    """Runs a notebook cell by cell in a folder, and returns what it prints."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("HF_MODULES_CACHE", str(folder / "modules"))
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # committed without: nothing can go stale
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return "".join(output["text"] for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output)


@pytest.mark.integration
def test_quickstart_notebook(tmp_path, monkeypatch):
    printed = run_notebook("quickstart.ipynb", tmp_path, monkeypatch)
    assert "What is the class of this scene? -> harbor" in printed
    assert "How many aircraft are there? -> 9" in printed
    assert "ship -> yes" in printed and "tank -> no" in printed
    assert "counting exact: " in printed


@pytest.mark.integration
def test_rasters_notebook(tmp_path, monkeypatch):
    printed = run_notebook("rasters.ipynb", tmp_path, monkeypatch)
    assert "('red', 'green', 'blue') colour interpretation none" in printed and "EPSG:32631 (0.5, 0.5) metre" in printed
    assert "{'How many aircraft are there?': '9', 'Is there a ship in this scene?': 'yes'}" in printed
    assert (
        "aircraft: {'total': " in printed
        and "'shifted_total': " in printed
        and "parcels: {'A': 'yes', 'B': 'no', 'C': 'no', 'D': 'no'}" in printed
    )
    assert "boxes: [[50019" in printed
    assert (tmp_path / "buildings.gpkg").is_file() and (tmp_path / "parcels.gpkg").is_file()


@pytest.mark.integration
def test_finetune_lora(tmp_path):
    shares = load_example("finetune_lora").main(tmp_path / "run", scenes=8, steps=2, new_scenes=2)
    assert set(shares) == {"before", "after"} and all(0 <= share <= 1 for share in shares.values())
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def make_own_photographs(folder: Path, yes: list[Path], no: list[Path], held_out: int) -> Path:
    """A folder as `finetune_photographs.py` takes it; the last `held_out` of each answer are held out."""
    lines = []
    for answer, paths in (("yes", yes), ("no", no)):
        (folder / answer).mkdir(parents=True)
        for path in paths:
            shutil.copy(path, folder / answer / path.name)
        lines += [f"{answer}/{path.name}\n" for path in paths[-held_out:]]
    (folder / "test.txt").write_text("".join(lines))
    return folder


@pytest.mark.integration
def test_finetune_photographs(tmp_path):
    scenes = []
    for index in range(6):
        scenes.append(tmp_path / f"{index}.png")
        Image.fromarray(texture(index, 64)).save(scenes[-1])
    folder = make_own_photographs(tmp_path / "photographs", scenes[:3], scenes[3:], held_out=1)
    example = load_example("finetune_photographs")
    figures = example.main([str(folder), "Is it green?", str(tmp_path / "run"), "--images", "4", "--steps", "1"])
    assert {name: cell["n"] for name, cell in figures.items()} == {"most frequent answer": 2, "before": 2, "after": 2}
    trained = [row["images"][0] for row in json.loads((tmp_path / "run" / "train.json").read_text())]
    assert sorted(trained) == ["no/3.png", "no/4.png", "yes/0.png", "yes/1.png"]
    (folder / "test.txt").unlink()
    assert {sample.id for sample in example.make_benchmark(folder, "Is it green?").samples} == {"yes/0.png", "no/3.png"}


@pytest.mark.slow
def test_a_question_of_ones_own_is_learned_from_a_few_photographs(tmp_path):
    """The model has no word for traffic, but it has seen such places."""
    images = external_data("real/ucm/Images")
    places = ("freeway", "harbor", "overpass", "runway"), ("beach", "forest", "golfcourse", "sparseresidential")
    yes, no = ([path for name in names for path in sorted((images / name).iterdir())[:15]] for names in places)
    yes, no = (sorted(paths, key=lambda path: path.stem[-2:]) for paths in (yes, no))  # the last ones of every place
    folder = make_own_photographs(tmp_path / "photographs", yes, no, held_out=16)
    example = load_example("finetune_photographs")
    words = [str(folder), "Is this a place of traffic?", str(tmp_path / "run"), "--images", "88", "--steps", "40"]
    figures = example.main(words)
    assert figures["most frequent answer"]["value"] == 0.5  # as many of either answer are held out
    assert figures["after"]["low"] > max(0.5, figures["before"]["value"])


@pytest.mark.integration
@pytest.mark.parametrize("way", ["views", "bands"])
def test_finetune_bands(way, tmp_path):
    share = load_example("finetune_bands").main(way, tmp_path / "run", scenes=4, steps=2, new_scenes=2)
    assert 0 <= share <= 1 and (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.integration
def test_evaluate_model(capsys):
    summaries = load_example("evaluate_model").main(str(MODEL), 8, "strict-without-java")
    assert set(summaries) == {"image", "blind"}
    assert "with images" in capsys.readouterr().out


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::mfrsvlm.geospatial.RasterWarning")
def test_ask_parcels(tmp_path, capsys):
    example = load_example("ask_parcels")
    layer = example.main(*example.make_demo(tmp_path), "How many aircraft are there?", str(tmp_path / "answers.gpkg"))
    assert layer["parcel"].tolist() == list("ABCD") and (layer["count"] >= 0).all()
    assert (tmp_path / "answers.gpkg").is_file() and "How many aircraft are there?" in capsys.readouterr().out


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::mfrsvlm.geospatial.RasterWarning")
def test_folder_to_geopackage(tmp_path):
    example = load_example("folder_to_geopackage")
    layer = example.main(example.make_demo(tmp_path), "building", str(tmp_path / "buildings.gpkg"))
    assert layer["source"].tolist() == ["east.tif", "west.tif"] and layer.crs == "EPSG:32631"
    east, west = layer.geometry.bounds.to_numpy()
    assert east - west == pytest.approx([256, 0, 256, 0]) and len(layer.attrs["record"]["runs"]) == 2
    assert (tmp_path / "buildings.gpkg").is_file()


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::mfrsvlm.geospatial.RasterWarning")
def test_ask_stac_item(tmp_path):
    """Stored as reflectance of 16 bits, the scene is the same within a grey level, and so is the answer."""
    example = load_example("ask_stac_item")
    path = example.make_demo(tmp_path)
    answers = example.main(path, "How many aircraft are there?")
    assert answers["answer"].tolist() == ["9"] and answers.crs == "EPSG:32631"
    with Raster.open(example.read_item(path), stretch="physical") as raster, Image.open(SCENE) as scene:
        shown, drawn = (np.asarray(image, dtype=int) for image in (raster.read().image, scene))
    assert abs(shown - drawn).max() <= 1


@pytest.mark.integration
def test_push_to_hub(tmp_path):
    with HubServer() as hub:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        environment |= {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path / "huggingface"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": "hf_none",
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, str(EXAMPLES / "push_to_hub.py"), str(MODEL), "reader/derived"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        files = hub.files("reader/derived")
        assert not hub.unsupported
    code = {path.name for path in EXAMPLES.parent.glob("*_mfrsvlm.py")}
    assert {"config.json", "model.safetensors", "processor_config.json", "chat_template.jinja", "README.md", *code} <= set(
        files
    )
    assert files["README.md"].decode() == (MODEL / "README.md").read_text()
    assert files["modeling_mfrsvlm.py"] == (EXAMPLES.parent / "modeling_mfrsvlm.py").read_bytes()
