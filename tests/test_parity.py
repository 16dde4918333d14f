"""Parity with the published implementation, measured in a clean process on the folder that the converter wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from external_data import external_data
from measure_parity import BFLOAT16_BOUND, BOUNDS, table


pytestmark = pytest.mark.integration

REFERENCE = Path(__file__).parent / "reference"


@pytest.fixture(scope="module", params=["committed", pytest.param("full", marks=pytest.mark.slow)])
def measured(request, converted, tmp_path_factory):
    reference = REFERENCE if request.param == "committed" else external_data("reference")
    scratch = tmp_path_factory.mktemp("parity")
    command = [sys.executable, str(Path(__file__).with_name("measure_parity.py")), str(reference), str(converted)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(scratch / "modules")}
    result = subprocess.run(
        [*command, "--json", str(scratch / "parity.json")], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((scratch / "parity.json").read_text())


def test_every_stage_keeps_its_bound(measured):
    print("\n" + table(measured))
    assert set(measured["errors"]) == set(BOUNDS)
    for stage, bound in BOUNDS.items():
        assert measured["errors"][stage] <= bound, stage
    assert measured["compared"] > 600  # nothing fell silently out of the comparison


def test_greedy_tokens_agree(measured):
    greedy = measured["greedy"]
    assert greedy["samples"] == 18  # nine samples, with and without cache
    assert greedy["steps"] == 18 * 24 and greedy["steps that differ"] == 0


def test_bfloat16_stays_close(measured):
    assert measured["bfloat16"] <= BFLOAT16_BOUND
