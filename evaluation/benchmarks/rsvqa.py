"""RSVQA, low and high resolution: separate JSON files for the questions, answers and images of a split.

Each file lists all ids. Rows with `active: false` belong to another split. The text of an active row is in the row, or in a
file of all splits.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...files.reading import shorten
from .reading import find, read_json, take, take_known, take_text
from .sample import Benchmark, BenchmarkError, Sample


@dataclass(frozen=True)
class RSVQAFiles:
    """Published names of the files of one of the two data sets.

    Attributes:
        prefix: first part of the names of the files of a split.
        images: names of the image folder.
        types: types of the questions. Accuracy is averaged over them.
        all_questions, all_answers: names of the files of all splits.
    """

    prefix: str
    images: tuple[str, ...]
    types: tuple[str, ...]
    all_questions: tuple[str, ...]
    all_answers: tuple[str, ...]

    def load(self, name: str, root: Path, split: str, check_counts: bool) -> Benchmark:
        """Every active question of the split with its active answer; the group is the type of the question.

        Answers are kept as published: "yes", "urban", "3" or "17m2". The metric bins counts and areas.

        Raises:
            BenchmarkError: see `reading`; or a question without an answer, an answer without a question, two answers to one
                question, or a question about an image of another split.
        """
        stem = f"{self.prefix}_{split}"
        questions_path, answers_path, images_path = (
            root / f"{stem}_{key}.json" for key in ("questions", "answers", "images")
        )
        questions = _active(questions_path, "questions", "question", self.all_questions)
        answers: dict[int, str] = {}
        for row in _active(answers_path, "answers", "answer", self.all_answers):
            question_id = take(row, "question_id", int, answers_path, _id(row))
            if question_id in answers:
                raise BenchmarkError(f"{answers_path}: question {question_id} has two active answers.")
            answers[question_id] = take_text(row, "answer", answers_path, _id(row))
        images = None
        if images_path.is_file():
            rows = _active(images_path, "images", "id", ())
            images = {take(row, "id", int, images_path, _id(row)) for row in rows}

        folder = find(root, self.images, "folder of images").name
        samples = []
        suffix = ".tif"
        for row in questions:
            question_id = take(row, "id", int, questions_path, _id(row))
            image_id = take(row, "img_id", int, questions_path, _id(row))
            if question_id not in answers:
                raise BenchmarkError(f"{questions_path}: question {question_id} has no active answer in {answers_path}.")
            if images is not None and image_id not in images:
                raise BenchmarkError(
                    f"{questions_path}: question {question_id} is about image {image_id}, which is not active in "
                    f"{images_path}."
                )
            if not samples and not (root / folder / f"{image_id}.tif").exists():
                suffix = ".png" if (root / folder / f"{image_id}.png").exists() else ".tif"  # images may be converted
            samples.append(
                Sample(
                    id=str(question_id),
                    images=(f"{folder}/{image_id}{suffix}",),
                    task="vqa",
                    question=take_text(row, "question", questions_path, _id(row)),
                    references=(answers[question_id],),
                    group=take_known(
                        take_text(row, "type", questions_path, _id(row)), self.types, "type", questions_path, _id(row)
                    ),
                )
            )
        orphans = answers.keys() - {int(sample.id) for sample in samples}
        if orphans:
            raise BenchmarkError(
                f"{answers_path}: {len(orphans)} active answers have no active question in {questions_path}, such as the "
                f"answer to {min(orphans)}. The two files are not of the same split or release."
            )
        return Benchmark(name, split, root, samples)


def _active(path: Path, key: str, text: str, everything: tuple[str, ...]) -> list[dict[str, Any]]:
    """Active rows of a split. Rows without the field `text` are taken from the file of all splits, by their id."""
    rows = take(read_json(path, dict), key, list, path, "0")
    active = [row for number, row in enumerate(rows) if take(row, "active", bool, path, number)]
    if all(text in row for row in active):
        return active
    all_path = find(path.parent, everything, f"file with the text of the rows of {path.name}")
    every = take(read_json(all_path, dict), key, list, all_path, "0")
    all_rows = {take(row, "id", int, all_path, number): row for number, row in enumerate(every)}
    if len(all_rows) < len(every):
        raise BenchmarkError(f"{all_path}: {len(every) - len(all_rows)} of {len(every)} rows have the id of another row.")
    ids = {index: take(row, "id", int, path, index) for index, row in enumerate(active) if text not in row}
    absent = [row_id for row_id in ids.values() if row_id not in all_rows]
    if absent:
        raise BenchmarkError(f"{all_path} lacks {len(absent)} rows that are active in {path}, such as id {absent[0]}.")
    return [all_rows[ids[index]] if index in ids else row for index, row in enumerate(active)]


def _id(row: Any) -> Any:
    """The id of a row for a message."""
    return shorten(row.get("id") if isinstance(row, dict) else row)
