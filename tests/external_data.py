"""Real rasters, labeled imagery and the full reference, in the folder that MFRSVLM_TEST_DATA names."""

import os
from pathlib import Path

import pytest


def external_data(name: str) -> Path:
    """A file or folder there. Skips the test where it is absent."""
    folder = os.environ.get("MFRSVLM_TEST_DATA")
    if not folder:
        pytest.skip(f"MFRSVLM_TEST_DATA names no folder with {name}")
    path = Path(folder, name)
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path
