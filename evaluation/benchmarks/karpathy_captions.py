"""Captions of RSICD, Sydney captions, UCM captions and RSITMD, in Karpathy's JSON file or in text files.

Karpathy's layout is one JSON file for all splits. The other layout, `NAME_precomp` in image-text retrieval, has two text
files per split: `train_caps.txt` with one caption per line, and `train_filename.txt` with the names of the images.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...files.reading import shorten
from .reading import find, left_out, read_json, read_text, take, take_text
from .sample import Benchmark, BenchmarkError, Sample


logger = logging.getLogger(__name__)

# Splits of the benchmark -> splits of the JSON file. The text files merge train and val to "trainval".
PARTS = {"train": ("train",), "val": ("val",), "test": ("test",), "trainval": ("train", "val")}
SPLITS = ("train", "val", "test")
Captions = tuple[str, list[str]]  # the name of an image, and its captions


@dataclass(frozen=True)
class CaptionFiles:
    """Published names of the caption files and of the image folder.

    Attributes:
        captions: names of the JSON file.
        images: names of the image folder.
        total: published number of images in the JSON file, of all splits together.
        precomp: folders of the text files. They may also be in the root.
        precomp_splits: split of the benchmark -> split of the text files.
    """

    captions: tuple[str, ...]
    images: tuple[str, ...]
    total: int
    precomp: tuple[str, ...] = ()
    precomp_splits: Mapping[str, str] = field(default_factory=dict)

    def load(self, name: str, root: Path, split: str, check_counts: bool, broken_rows: str = "error") -> Benchmark:
        """One sample for each image of the split, with all its captions as references.

        The text files are read if there is no JSON file.

        Args:
            broken_rows: "error", or "skip" to skip images without a caption. They are counted in `left_out`.

        Raises:
            BenchmarkError: see `reading`; or a row of an unknown split, an image without a caption, or text files that do
                not match.
        """
        texts = next((root / place for place in ("", *self.precomp) if any((root / place).glob("*_caps.txt"))), None)
        if texts is not None and not any((root / file).exists() for file in self.captions):
            path, captions_of = self._read_texts(name, texts, split)
            folder = next((place for place in self.images if (root / place).is_dir()), self.images[0])
            return self._benchmark(name, root, split, captions_of, folder, path, broken_rows)
        path = find(root, self.captions, "file of captions")
        folder = find(root, self.images, "folder of images").name
        captions_of = []
        rows = take(read_json(path, dict), "images", list, path, "0")
        if check_counts:
            require_total(name, path, len(rows), self.total)
        for number, row in enumerate(rows):
            if take_split(row, path, number) not in PARTS[split]:
                continue
            file = take_text(row, "filename", path, number)
            sentences = take(row, "sentences", list, path, number)
            captions = [take(sentence, "raw", str, path, f"{number} ({file})") for sentence in sentences]
            captions_of.append((file, captions))
        return self._benchmark(name, root, split, captions_of, folder, path, broken_rows)

    @staticmethod
    def _benchmark(
        name: str, root: Path, split: str, captions_of: list[Captions], folder: str, path: Path, broken_rows: str
    ) -> Benchmark:
        blank = {
            number: file for number, (file, captions) in enumerate(captions_of, start=1) if not any(map(str.strip, captions))
        }
        left = left_out(blank, len(captions_of), path, "no caption", broken_rows) if broken_rows != "error" else {}
        samples = [
            Sample(file, (f"{folder}/{file}",), "captioning", "", references(captions, path, file))
            for number, (file, captions) in enumerate(captions_of, start=1)
            if not left or number not in blank
        ]
        return Benchmark(name, split, root, samples, left_out=left)

    def _read_texts(self, name: str, texts: Path, split: str) -> tuple[Path, list[Captions]]:
        """The file of the captions, and its content."""
        if split not in self.precomp_splits:
            raise BenchmarkError(
                f"{name}: the text files in {texts} have the splits {', '.join(self.precomp_splits)}, not {split!r}."
            )
        part = self.precomp_splits[split]
        path, names_path = texts / f"{part}_caps.txt", texts / f"{part}_filename.txt"
        captions, names = _lines(path), _lines(names_path)
        files = list(dict.fromkeys(names))
        # A name is listed once per image, or once per caption.
        if "" in files or not files or len(names) not in (len(files), len(captions)) or len(captions) % len(files):
            raise BenchmarkError(
                f"{path} has {len(captions)} captions and {names_path} {len(names)} names of {len(files)} images. "
                "Each image needs the same number of captions. Its name must be listed once, or once per caption."
            )
        each = len(captions) // len(files)
        if len(names) == len(captions) and names != [file for file in files for _ in range(each)]:
            raise BenchmarkError(f"{names_path}: the {each} captions of an image are not consecutive.")
        return path, [(file, captions[each * number : each * (number + 1)]) for number, file in enumerate(files)]


def _lines(path: Path) -> list[str]:
    """Lines of a text file, including blank ones, since the position of a line determines its image."""
    return [line.strip() for line in read_text(path).removesuffix("\n").split("\n")]


def require_total(name: str, path: Path, found: int, published: int) -> None:
    """Raises a `BenchmarkError` if the file of all splits has another number of images than published."""
    if found != published:
        raise BenchmarkError(
            f"{name}: {path} has {found} images in all splits, not the published {published}. Download it again, or set "
            "check_counts=False for a deliberate subset."
        )


def take_split(row: Any, path: Path, number: int | str) -> str:
    split = take(row, "split", str, path, number)
    if split not in SPLITS:
        raise BenchmarkError(f"{path}, row {number}: split {shorten(split)} is none of {', '.join(SPLITS)}.")
    return split


def references(captions: list[str], path: Path, image: str) -> tuple[str, ...]:
    """The captions of one image. Blank captions, which some releases contain, are skipped with a warning."""
    kept = tuple(caption.strip() for caption in captions if caption.strip())
    if not kept:
        raise BenchmarkError(
            f"{path}: image {image} has no caption. Set broken_rows='skip', if the benchmark takes this option, to skip "
            "such images; the summary then counts them."
        )
    if len(kept) < len(captions):
        logger.warning(f"{path}: {len(captions) - len(kept)} of {len(captions)} captions of {image} are blank and skipped.")
    return kept
