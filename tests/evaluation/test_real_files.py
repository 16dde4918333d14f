"""Published files read as they are: real ones, from the folder that MFRSVLM_TEST_DATA names."""

import json
import logging
import shutil
from collections import Counter
from pathlib import Path

import pytest
from external_data import external_data
from PIL import Image
from tiny_benchmarks import write_image

from mfrsvlm.evaluation.benchmarks import BenchmarkError, load_benchmark
from mfrsvlm.evaluation.protocols import PROTOCOLS


CLASSES = 21


@pytest.fixture(scope="module")
def real() -> Path:
    return external_data("real")


def link(root: Path, files: dict[str, Path]) -> Path:
    """A folder in the published layout that points to the files."""
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(source)
    return root


def all_right(benchmark, protocol="strict-without-java"):
    protocol = PROTOCOLS[protocol]()
    (task,) = {sample.task for sample in benchmark.samples}
    answers = [protocol.ideal_answer(sample) for sample in benchmark.samples]
    return set(protocol.score(benchmark, task, benchmark.samples, answers)[2]) == {1.0}


# UC Merced


def test_uc_merced_is_whole(real):
    benchmark = load_benchmark("uc-merced", real / "ucm")
    assert len(benchmark.samples) == 2100 and len(benchmark.class_names) == CLASSES and all_right(benchmark)
    assert len(load_benchmark("uc-merced", real / "ucm", classes=["river", "beach"]).samples) == 200


def test_uc_merced_at_another_size_is_noticed(real, tmp_path):
    for path in sorted((real / "ucm" / "Images").glob("*/*00.jpg")):
        (tmp_path / path.parent.name).mkdir()
        Image.open(path).resize((150, 150)).save(tmp_path / path.parent.name / path.name)
    with pytest.raises(BenchmarkError, match=r"21 of 21 images .* the published size of 256 x 256"):
        load_benchmark("uc-merced", tmp_path, check_counts=False)


@pytest.mark.integration
def test_labels_of_uc_merced(real):
    benchmark = load_benchmark("ucm-multilabel", real / "ucm")
    assert len(benchmark.samples) == 35700 and all_right(benchmark)
    # Every image of the class "airplane" shows one.
    planes = [s for s in benchmark.samples if s.group == "airplane" and s.images[0].startswith("Images/airplane/")]
    assert len(planes) == 100 and {sample.references for sample in planes} == {("yes",)}


@pytest.mark.integration
def test_questions_about_uc_merced(real, tmp_path):
    root = link(tmp_path, {"UCM": real / "annotations", "Images": real / "ucm" / "Images"})
    themes = load_benchmark("rsivqa-ucm", root, "theme", allow_outside_images=True)
    by_class = Counter((sample.images[0].split("/")[1], sample.references[0]) for sample in themes.samples)
    assert len(by_class) == CLASSES and set(by_class.values()) == {100}  # the numbers are places among the images
    with pytest.raises(BenchmarkError, match=r"ucm_res\.txt: 294 of 2795 rows have a missing word: row 9 "):
        load_benchmark("rsivqa-ucm", root)
    benchmark = load_benchmark("rsivqa-ucm", root, broken_rows="skip", allow_outside_images=True)
    assert len(benchmark.samples) == 2501 and benchmark.left_out == {"rows with a missing word": 294}
    assert all_right(benchmark) and all_right(benchmark, "rsevalkit")
    assert {sample.group for sample in benchmark.samples} == {"theme", "presence", "count", "location"}
    # The same rows as whoever prepared rsivqa.json found, image by image.
    found = Counter(
        (sample.images[0], sample.question.rstrip("?").strip(), sample.references[0]) for sample in benchmark.samples
    )
    rows = [row for row in json.loads((real / "ucm" / "rsivqa.json").read_text()) if not row["broken"]]
    assert found == Counter((row["image"], row["question"].rstrip("?").strip(), row["answer"]) for row in rows)


def test_captions_of_uc_merced(real, tmp_path):
    """The text files, written from the rows that somebody made of them."""
    rows = json.loads((real / "ucm" / "captions.json").read_text())
    for split in ("train", "test"):
        chosen = [row for row in rows if row["split"] == split]
        (tmp_path / f"{split}_caps.txt").write_text("".join(f"{text}\n" for row in chosen for text in row["captions"]))
        names = "".join(f"{Path(row['image']).relative_to('Images')}\n" for row in chosen)
        (tmp_path / f"{split}_filename.txt").write_text(names)
    link(tmp_path, {"images": real / "ucm" / "Images"})
    for split, count in (("trainval", 1890), ("test", 210)):
        benchmark = load_benchmark("ucm-captions", tmp_path, split, allow_outside_images=True)
        assert len(benchmark.samples) == count and all(len(sample.references) == 5 for sample in benchmark.samples)


# Annotations without their images


@pytest.mark.parametrize(
    ("name", "split", "file", "count"),
    [
        ("rsivqa-aid", "theme", "rsicd_vqa.txt", 10921),
        ("rsivqa-sydney", "theme", "sydney_vqa.txt", 613),
        ("rsivqa-dota", "train", "dota_train_vqa2.txt", 12389),
        ("rsivqa-dota", "val", "dota_val_vqa2.txt", 4041),
        pytest.param("rsivqa-hrrsd", "val", "opt_val_vqa.txt", 78834, marks=pytest.mark.integration),
    ],
)
def test_questions_of_rsivqa(name, split, file, count, real, tmp_path):
    (tmp_path / "images").mkdir()
    root = link(tmp_path, {file: real / "annotations" / file})
    benchmark = load_benchmark(name, root, split, check_images=False)
    assert len(benchmark.samples) == count and not benchmark.left_out
    presence = [sample for sample in benchmark.samples if sample.group == "presence"]
    assert {sample.references[0] for sample in presence} <= {"yes", "no"}
    assert all(sample.references[0].isdecimal() for sample in benchmark.samples if sample.group == "count")
    with pytest.raises(BenchmarkError, match="images are missing"):
        load_benchmark(name, root, split)


@pytest.mark.parametrize(
    ("name", "part", "split", "images", "captions"),
    [
        ("rsicd", "train", "trainval", 9828, 49140),
        ("rsicd", "test", "test", 1093, 5465),
        ("rsitmd", "train", "train", 4287, 21435),  # four images have no caption
        ("rsitmd", "test", "test", 452, 2260),
    ],
)
def test_captions_in_text_files(name, part, split, images, captions, real, tmp_path, caplog):
    files = {f"{part}_{kind}.txt": real / "annotations" / f"{name}_{part}_{kind}.txt" for kind in ("caps", "filename")}
    with caplog.at_level(logging.WARNING):
        root = link(tmp_path, files)
        if images == 4287:
            with pytest.raises(BenchmarkError, match=r"image \w+\.tif has no caption\. Set broken_rows='skip'"):
                load_benchmark(name, root, split, check_images=False)
        benchmark = load_benchmark(name, root, split, check_images=False, broken_rows="skip")
    assert len(benchmark.samples) == images
    assert benchmark.left_out == ({"rows with no caption": 4} if images == 4287 else {})
    assert sum(len(sample.references) for sample in benchmark.samples) == captions
    assert not caplog.text
    # An image of a class is described with the name of its class far more often than any other is.
    words = {"rsicd": "airport", "rsitmd": "baseball"}[name]
    shown = [words in " ".join(sample.references).lower() for sample in benchmark.samples if sample.id.startswith(words)]
    others = [
        words in " ".join(sample.references).lower() for sample in benchmark.samples if not sample.id.startswith(words)
    ]
    assert sum(shown) / len(shown) > 0.9 and sum(others) / len(others) < 0.1


def test_dior_rsvg(real, tmp_path):
    for split, count in (("train", 26991), ("val", 3829), ("test", 7500)):
        numbers = (real / "annotations" / f"dior_rsvg_{split}.txt").read_text().split()
        assert len(numbers) == len(set(numbers)) == count and max(map(int, numbers)) < 38320
    (tmp_path / "Annotations").mkdir()
    shutil.copy(real / "annotations" / "dior_rsvg_00001.xml", tmp_path / "Annotations" / "00001.xml")
    (tmp_path / "test.txt").write_text("0\n")
    write_image(tmp_path / "JPEGImages" / "00001.jpg", (800, 800))
    benchmark = load_benchmark("dior-rsvg", tmp_path, check_counts=False)
    (sample,) = benchmark.samples
    assert (sample.question, sample.group) == ("A green and brown golf field", "golffield")
    assert sample.boxes == ((133.0, 237.0, 684.0, 672.0),) and all_right(benchmark)


@pytest.mark.integration
def test_rsvg_hr(real, tmp_path):
    images = set()
    for split in ("train", "test"):
        path = real / "annotations" / f"rsvg_hr_{split}.txt"
        link(tmp_path, {path.name: path})
        images |= {line.split(",")[0] for line in path.read_text().split("\n") if line}
    write_image(tmp_path / "one.jpg", (1024, 1024))
    link(tmp_path, {f"images/{name}": tmp_path / "one.jpg" for name in images})
    benchmark = load_benchmark("rsvg-hr", tmp_path)
    assert len(benchmark.samples) == 499 and all(all_right(benchmark, name) for name in PROTOCOLS)
    with pytest.raises(BenchmarkError, match=r"2 of 2151 rows have a box out of order: .*216,00"):
        load_benchmark("rsvg-hr", tmp_path, "train")
    assert len(load_benchmark("rsvg-hr", tmp_path, "train", broken_rows="skip").samples) == 2149


# Boxes of detection


def test_aerial_cars(real, tmp_path):
    root = real / "aerial_cars"
    rows = json.loads((root / "boxes.json").read_text())
    counts = Counter(found["class"] for row in rows for found in row["objects"])
    counting = load_benchmark("detection-counting", root)
    totals = Counter()
    for sample in counting.samples:
        totals[sample.group] += int(sample.references[0])
    assert totals == counts and sum(counts.values()) == 3597 and all_right(counting)
    grounding = load_benchmark("detection-grounding", root)
    assert len(grounding.samples) > 40 and all(all_right(grounding, name) for name in PROTOCOLS)

    listed = load_benchmark("detection-all", root, max_objects=10**6)
    assert sum(len(sample.boxes) for sample in listed.samples) == 3597 and len(listed.samples) == len(counting.samples)
    assert all(all_right(listed, name) for name in PROTOCOLS)
    few = load_benchmark("detection-all", root)
    assert max(len(sample.boxes) for sample in few.samples) <= 10
    assert len(few.samples) + sum(few.left_out.values()) == len(listed.samples) and few.left_out

    # The same as YOLO, which the boxes were published in.
    names = sorted(counts)
    (tmp_path / "labels").mkdir()
    (tmp_path / "classes.txt").write_text("\n".join(names))
    link(tmp_path, {"images": root / "images"})
    for row in rows:
        lines = []
        for found in row["objects"]:
            x1, y1, x2, y2 = (v / s for v, s in zip(found["box"], (row["width"], row["height"]) * 2, strict=True))
            lines.append(f"{names.index(found['class'])} {(x1 + x2) / 2} {(y1 + y2) / 2} {x2 - x1} {y2 - y1}")
        (tmp_path / "labels" / f"{Path(row['image']).stem}.txt").write_text("\n".join(lines))
    converted = load_benchmark("detection-grounding", tmp_path, allow_outside_images=True)
    boxes = {sample.id: sample.boxes[0] for sample in grounding.samples}
    assert {sample.id: pytest.approx(sample.boxes[0], abs=1e-6) for sample in converted.samples} == boxes


@pytest.mark.parametrize(
    ("annotation", "counts"),
    [
        ("SOAP_061.xml", {"Alive": 9, "Dead": 28}),
        ("2019_YELL_2_541000_4977000_image_crop.xml", {"Tree": 279}),
        ("OSBS_029.csv", {"Tree": 61}),  # which names OSBS_029.tif, and lies beside OSBS_029.png
        ("2018_SJER_3_252000_4107000_image_477.csv", {"0": 7}),
    ],
)
def test_trees(annotation, counts, real, tmp_path):
    stem = Path(annotation).stem
    root = link(tmp_path, {path.name: path for path in (real / "trees").iterdir() if path.stem == stem})
    benchmark = load_benchmark("detection-counting", root, allow_outside_images=True)
    assert {sample.group: int(sample.references[0]) for sample in benchmark.samples} == counts


def test_all_trees_in_one_folder_are_of_two_kinds(real):
    with pytest.raises(BenchmarkError, match="annotations in several formats: voc, csv"):
        load_benchmark("detection-counting", real / "trees")
    assert len(load_benchmark("detection-counting", real / "trees", annotations="voc").samples) == 3
