"""The Python examples of the front pages run as they stand, each page from top to bottom."""

import ast
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from demo_scene import BUILDING

from mfrsvlm import cli
from mfrsvlm.configuration_mfrsvlm import packed_lengths, window_table
from mfrsvlm.demo import MODEL
from mfrsvlm.evaluation.benchmarks.registry import BENCHMARKS


ROOT = Path(__file__).parents[1]


def run_page(page: str, monkeypatch, tmp_path) -> int:
    monkeypatch.chdir(tmp_path)  # a page may not depend on where it is read
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    namespace: dict = {}
    for block in blocks:
        exec(block, namespace)
    return len(blocks)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_readme(monkeypatch, tmp_path, capsys):
    assert run_page("README.md", monkeypatch, tmp_path) == 1
    assert capsys.readouterr().out.strip() == "9"


@pytest.mark.integration
def test_usage(monkeypatch, tmp_path, capsys):
    pytest.importorskip("transformers", "5.19")  # `mm_encoder_outputs`
    assert run_page("docs/usage.md", monkeypatch, tmp_path) == 5
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert printed[0] == "A harbor scene with 1 ship, 9 aircraft and 1 building."
    assert printed[1].startswith("[[383.4") and printed[2:] == ["yes", "9"]


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::mfrsvlm.geospatial.RasterWarning")
def test_rasters(monkeypatch, tmp_path, capsys):
    assert run_page("docs/rasters.md", monkeypatch, tmp_path) == 2
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == ["['9', 'yes'] 9.0", "{'total': 9.0, 'unanswered': 0}"]
    assert np.allclose(ast.literal_eval(lines[2]), BUILDING, atol=4) and (tmp_path / "building.gpkg").is_file()
    assert lines[3:] == ["colour interpretation none 0.0", "9"]


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::mfrsvlm.geospatial.RasterWarning")
def test_bands(monkeypatch, tmp_path, capsys):
    assert run_page("docs/bands.md", monkeypatch, tmp_path) == 2
    length = 4 * sum(packed_lengths(336, window_table(336, 14, 2, [336, 168], 0.5), 1))
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["Image 1 shows true color, image 2 shows NDVI.", *[f"torch.Size([1, {length}])"] * 3]


def test_speed(monkeypatch, tmp_path, capsys):
    assert run_page("docs/speed.md", monkeypatch, tmp_path) == 1
    assert capsys.readouterr().out.strip() == torch.backends.cpu.get_cpu_capability()


@pytest.fixture(scope="module")
def raster_files(tmp_path_factory):
    """A folder with the files that the first block of docs/raster_features.md makes."""
    pytest.importorskip("geopandas")
    folder = tmp_path_factory.mktemp("rasters")
    with pytest.MonkeyPatch.context() as patch:
        assert run_page("docs/raster_features.md", patch, folder) == 1
    return folder


def raster_commands():
    """Commands in the blocks of docs/rasters.md and in the table of docs/raster_features.md."""
    page, table = ((ROOT / "docs" / name).read_text() for name in ("rasters.md", "raster_features.md"))
    blocks = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    return [*re.findall(r"^mfrsvlm .*$", "".join(blocks), flags=re.MULTILINE), *re.findall(r"`(mfrsvlm [^`]+)`", table)]


@pytest.mark.integration
@pytest.mark.parametrize("command", raster_commands())
def test_commands_about_rasters(command, raster_files, monkeypatch, tmp_path, capsys):
    for path in raster_files.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    arguments = [MODEL if word in ("MODEL", "$MODEL") else word for word in shlex.split(command)[1:]]
    status = cli.main(arguments)
    captured = capsys.readouterr()
    assert status == 0 and captured.out, captured.err
    for option in ("--output", "--preview"):
        if option in arguments:
            assert (tmp_path / arguments[arguments.index(option) + 1]).stat().st_size


def test_tests_that_the_page_of_features_names_exist():
    named = re.findall(r"\[(test_\w+)\]\(\.\./([\w/.]+)\)", (ROOT / "docs" / "raster_features.md").read_text())
    assert len(named) >= 20
    for test, path in named:
        assert re.search(rf"^def {test}\(", (ROOT / path).read_text(), flags=re.MULTILINE), f"{path}: {test}"


@pytest.mark.parametrize("page", ["README.md", "docs/evaluation.md", "docs/benchmarks.md"])
def test_splits_that_pages_name_exist(page):
    """A command of a page may need files that are not here, so no test runs it."""
    text = (ROOT / page).read_text()
    for name, info in BENCHMARKS.items():
        named = set(re.findall(rf"(?<![\w/-]){name}/(\w+)", text))
        assert named <= set(info.splits), name


def test_training_page_writes_to_folders_of_its_own():
    """Fine-tuning and scenes want empty folders, and a reader has run the commands of the first page before."""
    first, page = ((ROOT / name).read_text() for name in ("README.md", "docs/training.md"))
    before = re.findall(r"--output(?:_dir)? (\S+)", first) + re.findall(r"mfrsvlm scenes (\S+)", first)
    own = re.findall(r"--output_dir (\S+)", page) + re.findall(r"mfrsvlm scenes (\S+)", page)
    assert {"runs/lora", "runs/scenes", "data"} <= set(before) and len(own) >= 4
    assert len(set(own)) == len(own) and not set(own) & set(before)


def test_architecture(monkeypatch, tmp_path, capsys):
    """The figure and the table show the numbers that the example prints."""
    assert run_page("docs/architecture.md", monkeypatch, tmp_path) == 1
    page = (ROOT / "docs" / "architecture.md").read_text()
    (large, small, rest) = capsys.readouterr().out.splitlines()
    for line in (large, small):
        size, side, _ = line.split()
        assert f"windows of {size}<br/>{side} \u00d7 {side}" in page
    assert rest == "576 24 [3, 7, 11, 15]"
    assert "24 detail stacks<br/>of 576 tokens" in page and "layers 3, 7, 11, 15" in page


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "examples/README.md", *sorted(p.name for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page):
    path = ROOT / page if (ROOT / page).is_file() else ROOT / "docs" / page
    for link in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
        if "://" not in link:
            assert (path.parent / link).exists(), f"{page}: {link}"
