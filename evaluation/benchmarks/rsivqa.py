"""RSIVQA: a text file with one question and answer per line, `1.tif:How many cars in the picture?two`."""

import re
from dataclasses import dataclass
from pathlib import Path

from ...files.reading import list_images, shorten
from .reading import as_index, find, find_images, left_out, read_lines
from .sample import Benchmark, BenchmarkError, Sample


SOURCE = "https://github.com/spectralpublic/RSIVQA"

_LINE = re.compile(r"([^:?]+):([^?]+)\?(.*)")
# First words of a question, in lower case -> its type.
_TYPES = {
    "what is the theme": "theme",
    "what is the location": "location",
    "does this picture contain": "presence",
    "how many": "count",
}
_GAP = re.compile(r"\S {2,}\S")


@dataclass(frozen=True)
class RSIVQAFiles:
    """Published names of the question files and image folders.

    Attributes:
        files: split -> text files.
        images: names of the image folder. Subfolders are also searched.
        numbered: number of images, if image numbers such as "1.tif" may refer to the images sorted by path. UCM numbers the
            images of UC Merced like this. 0: they may not.
    """

    files: dict[str, tuple[str, ...]]
    images: tuple[str, ...] = ("images", "imgs", "Images")
    numbered: int = 0

    def load(self, name: str, root: Path, split: str, check_counts: bool, broken_rows: str = "error") -> Benchmark:
        """One sample per line; the group is the type of the question: theme, location, presence or count.

        Args:
            broken_rows: "error", or "skip" to skip lines whose question lacks a word, such as "How many  in the
                picture?". They are counted in `left_out`.

        Raises:
            BenchmarkError: see `reading`; or a line that is not image, question and answer.
        """
        folder = find(root, self.images, "folder of images")
        known = find_images(folder, root)
        paths = list_images(folder, recursive=True) if self.numbered else []
        samples, left = [], {}
        for file in self.files[split]:
            path = find(root, (file, Path(file).name), "file of questions")
            broken, total = {}, 0
            for number, line in read_lines(path):
                match = _LINE.fullmatch(line.strip())
                image, question, answer = (part.strip() for part in match.groups()) if match else ("", "", "")
                kind = next((kind for start, kind in _TYPES.items() if question.lower().startswith(start)), None)
                if not (image and answer and kind):
                    raise BenchmarkError(
                        f"{path}, row {number}: {shorten(line)} is not IMAGE:QUESTION?ANSWER with a question of RSIVQA. "
                        f"Questions begin with {', '.join(_TYPES)}."
                    )
                total += 1
                # Two consecutive spaces mark a missing word.
                if _GAP.search(match[2].strip()):
                    broken[number] = line
                    continue
                place = known.get(image) or known.get(Path(image).stem)
                index = as_index(Path(image).stem, len(paths) + 1)
                if place is None and len(paths) == self.numbered and index:
                    place = paths[index - 1].relative_to(root).as_posix()
                samples.append(
                    Sample(
                        id=f"{path.stem}-{number}",
                        images=(place or f"{folder.relative_to(root).as_posix()}/{image}",),
                        task="vqa",
                        question=f"{question}?",
                        references=(answer,),
                        group=kind,
                    )
                )
            for what, count in left_out(broken, total, path, "a missing word", broken_rows).items():
                left[what] = left.get(what, 0) + count
        return Benchmark(name, split, root, samples, left_out=left)
