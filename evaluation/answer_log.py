"""Stores answers during a run: in the files of a folder, so that a stopped run can be resumed, or in memory.

The folder contains `settings.json`, the settings that must not change when a run is resumed, and `answers-N.jsonl`, the
answers of process N.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from ..files.reading import parse_json, read_json, shorten
from ..files.writing import WriteError, write_file
from .answering import Answer
from .benchmarks import Sample


class AnswerLog:
    """Answers of one run.

    Args:
        folder: folder of the run; `None` keeps the answers in memory.
        settings: settings that must not change when the run is resumed.
        state: the processes of the run. Each process makes its own log.

    Raises:
        OSError: the folder cannot be written.
        ValueError: the folder contains other files, or a run with other settings.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any], state: PartialState) -> None:
        self.folder, self.state = folder, state
        self.rows: list[dict[str, Any]] = []  # of this process, if there is no folder
        if folder is not None:
            claim_folder(folder, settings, state)
            self.path = folder / f"answers-{state.process_index}.jsonl"

    def start(self) -> set[str]:
        """Ids of the samples that are already answered. All processes must call this before the first answer."""
        if self.folder is None:
            return set()
        done = {row["id"] for row in read_rows(self.folder)}
        self.state.wait_for_everyone()  # before any process writes, so that all read the same answers
        self.path.touch()
        return done

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Stores answers. In a file, they are flushed to the disk before this returns.

        Raises:
            OSError: the file, which the message names, cannot be written. It may contain a part of the rows.
        """
        if self.folder is None:
            self.rows += rows
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            text = f"{error.strerror}, so answers are missing in {self.path}; free some space and repeat the command"
            raise WriteError(error.errno, text) from error

    def finish(self) -> list[dict[str, Any]]:
        """All rows of all processes, on every process. All processes must call this."""
        if self.folder is None:
            return gather_object(self.rows) if self.state.num_processes > 1 else self.rows
        self.state.wait_for_everyone()
        return list(read_rows(self.folder))


def claim_folder(folder: Path, settings: dict[str, Any], state: PartialState) -> None:
    """Writes the settings into a new or empty folder, or checks that they equal those of the run in the folder."""
    path = folder / "settings.json"
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            # The unfinished file of a killed run is hidden.
            foreign = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(f".{path.name}."))
            if foreign:
                raise ValueError(f"{folder} contains {shorten(foreign)} but no run: choose an empty folder.")
            write_file(path, json.dumps(settings, indent=1) + "\n")
    state.wait_for_everyone()
    stored = read_json(path)
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds a {type(stored).__name__}, not settings: choose another folder, or delete that one.")
    for name in sorted({*stored, *settings}):
        if stored.get(name) != settings.get(name):
            raise ValueError(
                f"{folder} contains a run with {name} = {stored.get(name)!r}, not {settings.get(name)!r}: "
                "choose another folder, or delete that one."
            )


def read_rows(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("answers-*.jsonl")):
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):  # the process was killed while it wrote the line
            content = content[: content.rfind(b"\n") + 1]
            with path.open("r+b") as file:
                file.truncate(len(content))
        for number, line in enumerate(content.split(b"\n")[:-1], start=1):
            try:
                row = parse_json(line.decode("utf-8"))
            except ValueError:
                row = None
            if not (isinstance(row, dict) and isinstance(row.get("id"), str)):
                raise ValueError(
                    f"{path}, line {number} is no answer: {shorten(line)}. Remove the line, so that it is asked again."
                )
            yield row


def as_row(sample: Sample, answer: Answer) -> dict[str, Any]:
    return {"id": sample.id, "text": answer.text, "yes": answer.yes_probability, "truncated": answer.truncated}


def as_answer(row: dict[str, Any]) -> Answer:
    """The answer of a row. For a missing image it is empty, which scores 0."""
    return Answer(row.get("text", ""), row.get("yes"), row.get("truncated", False))
