"""Yes/no questions from a table of labels, with one image per line and 0 or 1 for each label."""

from dataclasses import dataclass
from pathlib import Path

from ...files.reading import shorten
from .reading import chosen_classes, find, find_images, read_lines
from .sample import Benchmark, BenchmarkError, Sample


ANSWERS = {"0": "no", "1": "yes"}


@dataclass(frozen=True)
class PresenceTable:
    """Layout of a table of labels.

    Attributes:
        table: names of the file.
        images: names of the image folder.
        labels: label in the header of the table -> its wording in "Does this image show cars?".
    """

    table: tuple[str, ...]
    images: tuple[str, ...]
    labels: dict[str, str]

    def load(self, name: str, root: Path, split: str, check_counts: bool, classes: list[str] | None = None) -> Benchmark:
        """One question for each image and label; the group is the label.

        Args:
            classes: labels to ask about; default: all.

        Raises:
            BenchmarkError: a header with other labels, a line with another number of fields or a value that is not 0 or 1.
        """
        path = find(root, self.table, "table of labels")
        folder = find(root, self.images, "folder of images")
        places = find_images(folder, root)
        chosen = chosen_classes(classes, list(self.labels), name)
        (_, head), *lines = list(read_lines(path)) or [(0, "")]
        labels = head.split()[1:]
        if set(labels) != set(self.labels) or len(labels) != len(self.labels):
            raise BenchmarkError(f"{path}: its header has the labels {labels}, not {list(self.labels)}.")
        samples = []
        for number, line in lines:
            image, *values = line.split()
            if len(values) != len(labels) or not set(values) <= ANSWERS.keys():
                raise BenchmarkError(f"{path}, row {number}: {shorten(line)} is not a name and {len(labels)} times 0 or 1.")
            place = places.get(image) or f"{folder.relative_to(root).as_posix()}/{image}"
            samples += [
                Sample(
                    id=f"{image}-{label}",
                    images=(place,),
                    task="vqa",
                    question=f"Does this image show {self.labels[label]}?",
                    references=(ANSWERS[value],),
                    group=label,
                )
                for label, value in zip(labels, values, strict=True)
                if label in chosen
            ]
        left = {} if classes is None else {"classes": len(labels) - len(chosen)}
        return Benchmark(name, split, root, samples, left_out=left)
