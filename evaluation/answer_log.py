"""Answers as they come: in the files of a folder, from which a stopped run continues, or in memory.

A folder holds `settings.json`, what must be the same for a run to continue, and `answers-N.jsonl`, the answers of process N.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from ..files.reading import shorten
from ..files.writing import write_file
from .answering import Answer
from .benchmarks import Sample


class AnswerLog:
    """Answers of one run.

    Args:
        folder: where they are kept; `None` keeps them in memory.
        state: the processes of the run. All of them make their own log.

    Raises:
        OSError: the folder cannot be written.
        ValueError: the folder holds other files, or a run with other settings.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any], state: PartialState) -> None:
        self.folder, self.state = folder, state
        self.rows: list[dict[str, Any]] = []  # of this process, where there is no folder
        if folder is not None:
            claim_folder(folder, settings, state)
            self.path = folder / f"answers-{state.process_index}.jsonl"

    def start(self) -> set[str]:
        """Ids of the samples that are answered already. To be called by all processes, before the first answer."""
        if self.folder is None:
            return set()
        done = {row["id"] for row in read_rows(self.folder)}
        self.state.wait_for_everyone()  # before any process writes, so that all agree on what is done
        self.path.touch()
        return done

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Keeps answers. Those in a file are on the disk when this returns.

        Raises:
            OSError: naming the file; the rows may be there in part.
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
            text = f"{error.strerror}, so answers are missing in {self.path}; free some space and run again to continue"
            raise OSError(error.errno, text) from error

    def finish(self) -> list[dict[str, Any]]:
        """All rows of all processes, on every process. To be called by all of them."""
        if self.folder is None:
            return gather_object(self.rows) if self.state.num_processes > 1 else self.rows
        self.state.wait_for_everyone()
        return list(read_rows(self.folder))


def claim_folder(folder: Path, settings: dict[str, Any], state: PartialState) -> None:
    """Writes the settings into a new or empty folder, or checks that they are those of the run that the folder holds."""
    path = folder / "settings.json"
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            # What a killed run has not finished writing is hidden.
            foreign = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(f".{path.name}."))
            if foreign:
                raise ValueError(f"{folder} holds {shorten(foreign)} but no run: choose an empty folder.")
            write_file(path, json.dumps(settings, indent=1) + "\n")
    state.wait_for_everyone()
    stored = json.loads(path.read_text(encoding="utf-8"))
    for name in sorted({*stored, *settings}):
        if stored.get(name) != settings.get(name):
            raise ValueError(
                f"{folder} holds a run with {name} = {stored.get(name)!r}, not {settings.get(name)!r}: "
                "choose another folder, or delete that one."
            )


def read_rows(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("answers-*.jsonl")):
        text = path.read_bytes()
        if text and not text.endswith(b"\n"):  # killed while the line was written
            text = text[: text.rfind(b"\n") + 1]
            with path.open("r+b") as file:
                file.truncate(len(text))
        # Not `splitlines`, which would also split at line breaks that JSON leaves as they are, such as U+2028.
        for line in text.decode("utf-8").split("\n")[:-1]:
            yield json.loads(line)


def as_row(sample: Sample, answer: Answer) -> dict[str, Any]:
    return {"id": sample.id, "text": answer.text, "yes": answer.yes_probability, "truncated": answer.truncated}


def as_answer(row: dict[str, Any]) -> Answer:
    """A question about a missing image has the empty answer, which is wrong."""
    return Answer(row.get("text", ""), row.get("yes"), row.get("truncated", False))
