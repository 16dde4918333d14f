"""SECURITY.md: every promise names tests, and each of them exists."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
PROMISES = re.findall(r"^- (.+?)(?=^- |^\n|^#|\Z)", PAGE, re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: " ".join(promise.split())[:60])
def test_a_promise_names_tests_that_exist(promise: str) -> None:
    tests = NAMED.findall(promise)
    assert tests, "it names no test"
    for path, name in tests:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{path} has no {name}"


def test_every_test_on_the_page_belongs_to_a_promise() -> None:
    assert len(PROMISES) > 15
    assert sum(len(NAMED.findall(promise)) for promise in PROMISES) == len(NAMED.findall(PAGE)) == PAGE.count("::")
