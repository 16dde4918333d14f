"""Scene classification with one folder per class, such as AID, NWPU-RESISC45 or EuroSAT.

These data sets have no official split. The split "all" contains every image. Any other split is a list by the user,
`ROOT/SPLIT.txt`, with one image per line: its path relative to the folder of the classes, or its file name.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from ...files.reading import list_folders, list_images
from .reading import SHOWN, chosen_classes, read_lines
from .sample import Benchmark, BenchmarkError, Sample


ALL = "all"


@dataclass(frozen=True)
class ClassFolders:
    """Layout of a benchmark with one folder per class.

    Attributes:
        classes: readable names. A folder belongs to the class whose name has the same letters (see `class_name`).
        inside: parent folders of the class folders in the published archive.
        aliases: class names by other spellings of folders (letters and digits only, lower case).
        optional: classes whose folder may be missing.
    """

    classes: tuple[str, ...]
    inside: tuple[str, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()

    def load(self, name: str, root: Path, split: str, check_counts: bool, classes: Sequence[str] | None = None) -> Benchmark:
        """Every image in the folder of its class, sorted by class and name; or the images listed in `ROOT/SPLIT.txt`.

        Args:
            classes: readable names of the classes to load; the answer is then one of these. Default: all.

        Raises:
            BenchmarkError: a class has no images, a folder has no known class, or the list names an image twice or a
                missing image.
        """
        chosen = chosen_classes(classes, self.classes, name)
        base = next((root / inner for inner in ("", *self.inside) if _holds_classes(root / inner, self)), None)
        if base is None:
            looked = " or ".join(str(root / inner) for inner in ("", *self.inside))
            raise BenchmarkError(
                f"{name}: found no folder of a class in {looked}. Expected one for each of {', '.join(self.classes)}."
            )
        samples: list[Sample] = []
        folder_of: dict[str, Path] = {}
        for folder in list_folders(base):
            files = list_images(folder)
            if not files:
                continue
            label = class_name(folder.name, self)
            if label is None:
                raise BenchmarkError(
                    f"{name}: folder {folder} has images but is none of the classes {', '.join(self.classes)}. "
                    "Is it another data set?"
                )
            if label in folder_of:
                raise BenchmarkError(f"{name}: {folder_of[label]} and {folder} are both of class {label!r}. Keep one.")
            folder_of[label] = folder
            samples += [
                Sample(
                    id=file.relative_to(base).as_posix(),
                    images=(file.relative_to(root).as_posix(),),
                    task="classification",
                    question="",
                    references=(label,),
                    group=folder.name,
                )
                for file in files
            ]
        absent = [label for label in chosen if label not in folder_of and label not in self.optional]
        if absent:
            raise BenchmarkError(f"{name}: no images of {', '.join(absent)} in {base}. Unpack the folder of every class.")
        if split != ALL:
            samples = _listed(samples, root / f"{split}.txt", name)
        return Benchmark(
            name,
            split,
            root,
            [sample for sample in samples if sample.references[0] in chosen],
            [label for label in chosen if label in folder_of],
            left_out={} if classes is None else {"classes": len(self.classes) - len(chosen)},
        )


def class_name(folder: str, layout: ClassFolders) -> str | None:
    """The class of a folder: the one with the same letters and digits, ignoring case and separators; `None` if none.

    "BaseballField", "baseball_field" and "baseballfield" are all "baseball field".
    """
    return layout.aliases.get(_letters(folder)) or next(
        (name for name in layout.classes if _letters(name) == _letters(folder)), None
    )


def _listed(samples: list[Sample], path: Path, name: str) -> list[Sample]:
    """The samples in a list, in its order."""
    if not path.is_file():
        raise BenchmarkError(
            f"{name} has no official split, and there is no list {path}. Use split={ALL!r}, or write one image per line."
        )
    lines = [line.strip() for _, line in read_lines(path)]
    repeated = [line for line, count in Counter(lines).items() if count > 1]
    if repeated:
        raise BenchmarkError(f"{path} names {len(repeated)} images more than once: {', '.join(repeated[:SHOWN])}.")
    by_path = {key: sample for sample in samples for key in (sample.id, sample.images[0])}
    bare = Counter(Path(sample.id).name for sample in samples)
    by_path |= {Path(s.id).name: s for s in samples if bare[Path(s.id).name] == 1}
    unknown = [line for line in lines if line not in by_path]
    if unknown:
        raise BenchmarkError(
            f"{path} names {len(unknown)} images that do not exist, or whose file name is in several folders: "
            f"{', '.join(unknown[:SHOWN])}."
        )
    return [by_path[line] for line in lines]


def _holds_classes(folder: Path, layout: ClassFolders) -> bool:
    return folder.is_dir() and any(class_name(path.name, layout) for path in list_folders(folder))


def _letters(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def __getattr__(name: str) -> ClassFolders:
    """The layout in the file of a benchmark: `class_folders.AID` is that of `aid.py`."""
    try:
        return import_module(f".{name.lower()}", __package__).BENCHMARK.loader.__self__
    except (ImportError, AttributeError) as error:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from error
