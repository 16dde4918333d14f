"""Evaluations that are killed: the same command continues them, to the same answers and the same summary."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuzz._kills import MOST, TEST_COUNT, Command, Kills, assert_same, content
from fuzz.harness import PACKAGE, Case
from tiny_benchmarks import MAKERS


__all__ = ["AREA", "MOST", "TEST_COUNT", "cases"]
AREA = "kills of evaluation"
BENCHMARKS = ("rsvqa-lr", "aid")
OWN = ("summary.json", "answers-0.jsonl")  # of each run: its duration, and the order of the answers


class Evaluation(Command):
    module, function = "mfrsvlm.evaluation.__main__", "main"

    def prepare(self, folder: Path) -> None:
        self.folder = folder
        for name in BENCHMARKS:
            (folder / name).mkdir()
            MAKERS[name](folder / name)

    def arguments(self, root: Path) -> list[str]:
        benchmarks = [f"{name}={self.folder / name}" for name in BENCHMARKS]
        how = ["--limit", "8", "--batch-size", "2", "--images-per-chunk", "2"]
        allowed = ["--allow-count-mismatch", "--allow-size-mismatch"]
        model, output = ["--model", str(PACKAGE / "demo" / "model")], ["--output", str(root / "out")]
        return ["run", *model, "--benchmark", *benchmarks, *how, *allowed, *output]

    def check_killed(self, root: Path, whole: Path, had_old: bool) -> None:
        for path in (root / "out").rglob("summary.json"):
            expected = whole / path.relative_to(root)
            assert summary(path) == summary(expected), f"a wrong {path.relative_to(root)}"
            for name in ("predictions.jsonl", "settings.json"):
                assert path.with_name(name).read_bytes() == expected.with_name(name).read_bytes(), f"a wrong {name}"

    def check_end(self, root: Path, whole: Path) -> None:
        assert_same(content(root / "out", *OWN), content(whole / "out", *OWN))
        for path in (whole / "out").rglob("summary.json"):
            found = root / path.relative_to(whole)
            assert summary(found) == summary(path), f"another {path.relative_to(whole)}"
            assert answers(found.with_name(OWN[1])) == answers(path.with_name(OWN[1])), "other answers in the log"


def summary(path: Path) -> Any:
    return {**json.loads(path.read_text()), "seconds": None}


def answers(path: Path) -> list[str]:
    return sorted(path.read_text().splitlines())


def cases(seed: int, count: int, folder: Path) -> Iterator[Case]:
    yield from Kills(Evaluation(), folder).cases(seed, count)
