"""What the package says of itself in pyproject.toml, and what its wheel holds."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ONLY_IN_A_CLONE = {"experiments"}


def tracked_files() -> list[str]:
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        return [name for name in subprocess.check_output(command, text=True).splitlines() if (ROOT / name).exists()]
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git, to tell the files of the repository from others")


def test_every_folder_of_the_package_is_listed():
    folders = {Path(name).parent for name in tracked_files() if name.endswith("/__init__.py")}
    rooms = {folder.as_posix() for folder in folders if folder.parts[0] not in ONLY_IN_A_CLONE}
    listed = {name.replace(".", "/").removeprefix("mfrsvlm/") for name in PROJECT["tool"]["setuptools"]["packages"][1:]}
    assert rooms | {"demo/model", "demo/real_model", "training/accelerate", "training/configs"} == listed


def test_version_is_stated_once_more_in_the_citation():
    assert f"version: {PROJECT['project']['version']}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.integration
def test_wheel(tmp_path):
    """It holds the code, the small model and the data files, and nothing of tests, docs or scripts."""
    pytest.importorskip("build")
    for name in tracked_files():  # building writes into the folder
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / "clone" / name, follow_symlinks=False)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
        str(tmp_path / "clone"),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    if "setuptools" in result.stderr and result.returncode:
        pytest.skip("needs the setuptools that pyproject.toml names")
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = {name.removeprefix("mfrsvlm/") for name in zipfile.ZipFile(wheel).namelist() if name.startswith("mfrsvlm/")}
    folders = {name.partition("/")[0] for name in names if "/" in name}
    rooms = {"app", "demo", "evaluation", "files", "geospatial", "inspection", "model_card", "scenes", "serving", "training"}
    assert folders == rooms
    needed = {"py.typed", "cli.py", "chat_template.jinja", "demo/scene.png", "demo/model/model.safetensors"}
    needed |= {
        "demo/model/modeling_mfrsvlm.py",
        "demo/real_model/model.safetensors",
        "demo/real_model/modeling_mfrsvlm.py",
        "model_card/template.md",
        "training/configs/lora.yaml",
        "evaluation/published.json",
    }
    assert needed <= names
    assert {name for name in names if "/" not in name} == {
        *(path.name for path in ROOT.glob("*.py")),
        "py.typed",
        "chat_template.jinja",
    }
