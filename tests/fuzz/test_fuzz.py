"""A few hundred cases of every area, and the harness itself."""

import itertools
import json
import time
from pathlib import Path

import pytest
from fuzz import harness
from fuzz.harness import AREAS, Case, Result, area_module, outcome, random_of, run_area, run_case

from mfrsvlm.files.reading import read_json


COUNT = 200  # unless the module says otherwise in TEST_COUNT


@pytest.mark.integration
@pytest.mark.parametrize("stem", AREAS)
def test_every_case_is_right_or_rejected(stem: str) -> None:
    module = area_module(stem)
    if reason := getattr(module, "why_not", lambda: None)():
        pytest.skip(reason)
    count = getattr(module, "TEST_COUNT", COUNT)
    result = run_area(stem, seed=0, count=count)
    assert result.tried == count
    assert not result.failed, f"{dict(result.counts)}\n" + "\n".join(map(str, result.failures))


@pytest.mark.integration
@pytest.mark.parametrize("stem", AREAS)
def test_cases_depend_on_seed_and_number_alone(stem: str, tmp_path: Path) -> None:
    """The first cases have the same names, however many are drawn."""
    (tmp_path / "few").mkdir()
    (tmp_path / "many").mkdir()
    few = [case.name for case in area_module(stem).cases(3, 5, tmp_path / "few")]
    many = [case.name for case in itertools.islice(area_module(stem).cases(3, 50, tmp_path / "many"), 5)]
    assert few == many and len(few) == 5


def run(call) -> tuple[str, str]:
    """What becomes of one case, and its error."""
    result = Result("an area")
    run_case(Case("a case", call), 0, result)
    (found,) = result.counts
    return found, "".join(failure.error for failure in result.failures)


def test_right_and_rejected(tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text("[1]")
    (tmp_path / "bad.json").write_text("[1")
    assert run(lambda: outcome(lambda: read_json(tmp_path / "good.json"), [1].__eq__)) == ("right", "")
    assert run(lambda: outcome(lambda: read_json(tmp_path / "bad.json"), [1].__eq__, "bad.json")) == ("rejected", "")


def test_wrong_values_and_messages_without_names(tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text("[2]")
    (tmp_path / "bad.json").write_text("[1")
    assert run(lambda: outcome(lambda: read_json(tmp_path / "good.json"), [1].__eq__))[0] == "wrong"
    found, error = run(lambda: outcome(lambda: read_json(tmp_path / "bad.json"), [1].__eq__, "row 7"))
    assert found == "wrong" and "does not name ['row 7']" in error


def test_errors_of_libraries_are_crashes() -> None:
    assert run(lambda: outcome(lambda: json.loads("["), bool))[0] == "crashed"
    assert run(lambda: outcome(lambda: {}["key"], bool))[0] == "crashed"
    assert run(lambda: outcome(lambda: int("x"), bool))[0] == "crashed"  # raised in this file
    assert run(lambda: "fine")[0] == "crashed"


@pytest.mark.parametrize("wait", [lambda: time.sleep(10), lambda: [None for _ in iter(int, 1)]])
def test_hanging_cases_are_interrupted(monkeypatch: pytest.MonkeyPatch, wait) -> None:
    monkeypatch.setattr(harness, "SLOW_SECONDS", 0.1)
    monkeypatch.setattr(harness, "HANGING_SECONDS", 0.4)
    assert run(wait)[0] == "slow"


def test_random_of_a_case() -> None:
    assert random_of(1, 2).random() == random_of(1, 2).random() != random_of(2, 1).random()


def test_peak_memory_is_that_of_the_area() -> None:
    result = Result("an area")
    with harness.peak_memory(result):
        content = b"1" * 200_000_000
    assert len(content) == 200_000_000 and result.peak > 100  # other memory may be freed in between
