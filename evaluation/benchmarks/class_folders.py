"""Scene classification with one folder for each class: AID, NWPU-RESISC45, WHU-RS19, SIRI-WHU, EuroSAT, UC Merced, METER-ML.

None of them comes with a split of its own. The split "all" is every image; any other split is a list that the user puts
beside the folders, `ROOT/SPLIT.txt`, with one image a line: its path from the folder of the classes, or its bare name.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .reading import SHOWN, read_text
from .sample import Benchmark, BenchmarkError, Sample


ALL = "all"
MAC_ARCHIVE = "__MACOSX"
IMAGES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp")


@dataclass(frozen=True)
class ClassFolders:
    """Where the folders are and what they mean.

    Attributes:
        classes: readable names. A folder belongs to the class whose name has the same letters (see `class_name`).
        inside: folders of the published archive that may lie around the folders of the classes.
        aliases: other spellings of folders, by their letters.
        optional: classes whose folder may be absent.
    """

    classes: tuple[str, ...]
    inside: tuple[str, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()


def class_name(folder: str, layout: ClassFolders) -> str | None:
    """The readable name of a folder: the class with the same letters and digits, whatever their case and what is between.

    "BaseballField", "baseball_field" and "baseballfield" are all "baseball field". A table knows the names, since no rule
    finds the words in "mobilehomepark". `None` if no class is called so.
    """
    return layout.aliases.get(_letters(folder)) or next(
        (name for name in layout.classes if _letters(name) == _letters(folder)), None
    )


def load_class_folders(layout: ClassFolders, name: str, root: Path, split: str, check_counts: bool) -> Benchmark:
    """Every image in the folder of its class, by class and name; or those that `ROOT/SPLIT.txt` lists.

    Raises:
        BenchmarkError: a class has no images, a folder is of no known class, or the list names an image twice or one that
            is not there.
    """
    base = next((root / inner for inner in ("", *layout.inside) if _holds_classes(root / inner, layout)), None)
    if base is None:
        looked = " or ".join(str(root / inner) for inner in ("", *layout.inside))
        raise BenchmarkError(
            f"{name}: found no folder of a class in {looked}. Expected one for each of {', '.join(layout.classes)}."
        )
    samples: list[Sample] = []
    folder_of: dict[str, Path] = {}
    for folder in sorted(path for path in base.iterdir() if path.is_dir() and path.name != MAC_ARCHIVE):
        # "._x.jpg" is no image, but what a Mac writes beside one on other disks.
        files = sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGES and not f.name.startswith("."))
        if not files:
            continue
        label = class_name(folder.name, layout)
        if label is None:
            raise BenchmarkError(
                f"{name}: folder {folder} holds images but is none of the classes {', '.join(layout.classes)}. "
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
    absent = [label for label in layout.classes if label not in folder_of and label not in layout.optional]
    if absent:
        raise BenchmarkError(f"{name}: no images of {', '.join(absent)} under {base}. Unpack the folder of every class.")
    if split != ALL:
        samples = _listed(samples, root / f"{split}.txt", name)
    return Benchmark(name, split, root, samples, [label for label in layout.classes if label in folder_of])


def _listed(samples: list[Sample], path: Path, name: str) -> list[Sample]:
    """The samples that a list names, in its order."""
    if not path.is_file():
        raise BenchmarkError(
            f"{name} has no official split, and there is no list {path}. Use split={ALL!r}, or write one image a line."
        )
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    repeated = [line for line, count in Counter(lines).items() if count > 1]
    if repeated:
        raise BenchmarkError(f"{path} names {len(repeated)} images more than once: {', '.join(repeated[:SHOWN])}.")
    by_path = {key: sample for sample in samples for key in (sample.id, sample.images[0])}
    bare = Counter(Path(sample.id).name for sample in samples)
    by_path |= {Path(s.id).name: s for s in samples if bare[Path(s.id).name] == 1}
    unknown = [line for line in lines if line not in by_path]
    if unknown:
        raise BenchmarkError(
            f"{path} names {len(unknown)} images that are not there, or whose bare name is in several folders: "
            f"{', '.join(unknown[:SHOWN])}."
        )
    return [by_path[line] for line in lines]


def _holds_classes(folder: Path, layout: ClassFolders) -> bool:
    return folder.is_dir() and any(path.is_dir() and class_name(path.name, layout) for path in folder.iterdir())


def _letters(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


AID = ClassFolders(
    (
        "airport", "bare land", "baseball field", "beach", "bridge", "center", "church", "commercial", "dense residential",
        "desert", "farmland", "forest", "industrial", "meadow", "medium residential", "mountain", "park", "parking",
        "playground", "pond", "port", "railway station", "resort", "river", "school", "sparse residential", "square",
        "stadium", "storage tanks", "viaduct",
    ),
    inside=("AID",),
)  # fmt: skip
NWPU_RESISC45 = ClassFolders(
    (
        "airplane", "airport", "baseball diamond", "basketball court", "beach", "bridge", "chaparral", "church",
        "circular farmland", "cloud", "commercial area", "dense residential", "desert", "forest", "freeway", "golf course",
        "ground track field", "harbor", "industrial area", "intersection", "island", "lake", "meadow", "medium residential",
        "mobile home park", "mountain", "overpass", "palace", "parking lot", "railway", "railway station",
        "rectangular farmland", "river", "roundabout", "runway", "sea ice", "ship", "snowberg", "sparse residential",
        "stadium", "storage tank", "tennis court", "terrace", "thermal power station", "wetland",
    ),
    inside=("NWPU-RESISC45",),
)  # fmt: skip
WHU_RS19 = ClassFolders(
    (
        "airport", "beach", "bridge", "commercial", "desert", "farmland", "football field", "forest", "industrial", "meadow",
        "mountain", "park", "parking", "pond", "port", "railway station", "residential", "river", "viaduct",
    ),
    inside=("WHU-RS19", "RSDataset"),
)  # fmt: skip
SIRI_WHU = ClassFolders(
    (
        "agriculture", "commercial", "harbor", "idle land", "industrial", "meadow", "overpass", "park", "pond",
        "residential", "river", "water",
    ),
    inside=("12class_tif", "Google dataset of SIRI-WHU_earth_im_tiff/12class_tif"),
)  # fmt: skip
EUROSAT = ClassFolders(
    (
        "annual crop", "forest", "herbaceous vegetation", "highway", "industrial", "pasture", "permanent crop",
        "residential", "river", "sea lake",
    ),
    inside=("2750", "EuroSAT", "EuroSAT_RGB", "EuroSAT/2750"),
)  # fmt: skip
UC_MERCED = ClassFolders(
    (
        "agricultural", "airplane", "baseball diamond", "beach", "buildings", "chaparral", "dense residential", "forest",
        "freeway", "golf course", "harbor", "intersection", "medium residential", "mobile home park", "overpass",
        "parking lot", "river", "runway", "sparse residential", "storage tanks", "tennis court",
    ),
    inside=("Images", "UCMerced_LandUse/Images"),
)  # fmt: skip
METER_ML = ClassFolders(
    (
        "concentrated animal feeding operations", "coal mines", "landfills", "natural gas processing plants",
        "oil refineries and petroleum terminals", "wastewater treatment plants", "negative",
    ),
    inside=("METER_ML", "METER-ML"),
    aliases={
        "cafos": "concentrated animal feeding operations",
        "mines": "coal mines",
        "procplants": "natural gas processing plants",
        "rts": "oil refineries and petroleum terminals",
        "wwtps": "wastewater treatment plants",
        "negatives": "negative",
    },
    optional=("negative",),
)  # fmt: skip
