"""Captions in Karpathy's layout, one JSON file for all splits: RSICD, Sydney captions, UCM captions, RSITMD."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .reading import find, read_json, take, take_text
from .sample import Benchmark, BenchmarkError, Sample


logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class CaptionFiles:
    """Names under which the captions and the folder of the images are published."""

    captions: tuple[str, ...]
    images: tuple[str, ...]


RSICD = CaptionFiles(("dataset_rsicd.json",), ("RSICD_images", "images"))
SYDNEY = CaptionFiles(("dataset.json",), ("imgs", "images"))
UCM = CaptionFiles(("dataset.json",), ("imgs", "images"))
RSITMD = CaptionFiles(("dataset_RSITMD.json", "dataset_rsitmd.json"), ("images",))


def load_karpathy_captions(files: CaptionFiles, name: str, root: Path, split: str, check_counts: bool) -> Benchmark:
    """One sample for each image of the split, with all its captions as references.

    Raises:
        BenchmarkError: see `reading`; or a row of an unknown split, or an image without a caption.
    """
    path = find(root, files.captions, "file of captions")
    folder = find(root, files.images, "folder of images").name
    samples = []
    for number, row in enumerate(take(read_json(path, dict), "images", list, path, "0")):
        if take_split(row, path, number) != split:
            continue
        file = take_text(row, "filename", path, number)
        sentences = take(row, "sentences", list, path, number)
        captions = [take(sentence, "raw", str, path, f"{number} ({file})") for sentence in sentences]
        samples.append(Sample(file, (f"{folder}/{file}",), "captioning", "", references(captions, path, file)))
    return Benchmark(name, split, root, samples)


def take_split(row: Any, path: Path, number: int | str) -> str:
    split = take(row, "split", str, path, number)
    if split not in SPLITS:
        raise BenchmarkError(f"{path}, row {number}: split {split!r} is none of {', '.join(SPLITS)}.")
    return split


def references(captions: list[str], path: Path, image: str) -> tuple[str, ...]:
    """The captions of one image. Blank ones, which some releases hold, are left out with a warning."""
    kept = tuple(caption.strip() for caption in captions if caption.strip())
    if not kept:
        raise BenchmarkError(f"{path}: image {image} has no caption.")
    if len(kept) < len(captions):
        logger.warning(f"{path}: {len(captions) - len(kept)} of {len(captions)} captions of {image} are blank; left out.")
    return kept
