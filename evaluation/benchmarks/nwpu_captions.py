"""NWPU-Captions: one JSON file with a list of images for each scene class, and five captions per image."""

from pathlib import Path

from .info import BenchmarkInfo
from .karpathy_captions import references, require_total, take_split
from .reading import find, read_json, take, take_text
from .sample import Benchmark, Sample


IMAGES = 31500  # of all splits together
CAPTIONS = ("raw", "raw_1", "raw_2", "raw_3", "raw_4")


def load_nwpu_captions(name: str, root: Path, split: str, check_counts: bool) -> Benchmark:
    """One sample for each image of the split; the group is the scene class. Images are in one folder, or in one per class.

    Raises:
        BenchmarkError: see `reading` and `karpathy_captions`; or another number of images in all splits than published.
    """
    path = root / "dataset_nwpu.json"
    folder = find(root, ("NWPU_images", "images"), "folder of images").name
    content = read_json(path, dict)
    rows = sum(len(take(content, group, list, path, "0")) for group in content)
    if check_counts:
        require_total(name, path, rows, IMAGES)
    samples = []
    for group in content:
        by_class = f"{group}/" if (root / folder / group).is_dir() else ""
        for number, row in enumerate(take(content, group, list, path, "0")):
            where = f"{number} of {group}"
            if take_split(row, path, where) != split:
                continue
            file = take_text(row, "filename", path, where)
            captions = [take(row, key, str, path, where) for key in CAPTIONS]
            image = f"{folder}/{by_class}{file}"
            samples.append(Sample(file, (image,), "captioning", "", references(captions, path, file), group))
    return Benchmark(name, split, root, samples)


BENCHMARK = BenchmarkInfo(
    loader=load_nwpu_captions,
    splits={"train": None, "val": None, "test": None},
    tasks=("captioning",),
    image_size=(256, 256),
    source="https://github.com/HaiyanHuang98/NWPU-Captions",
)
