"""Loaders of benchmarks: every layout gives what is in it, and whatever is missing or wrong is an error that names it."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_benchmarks import (
    COUNTS,
    MAKERS,
    edit_json,
    make_rsvqa,
    make_vrsbench_annotations,
    write_image,
    write_json,
)

from mfrsvlm.evaluation.benchmarks import BENCHMARKS, Benchmark, BenchmarkError, Sample, load_benchmark
from mfrsvlm.evaluation.benchmarks.class_folders import class_name
from mfrsvlm.evaluation.benchmarks.sample import BOX_TASKS, LIST_TASKS
from mfrsvlm.evaluation.benchmarks.vhm_eval import LISTS, WITHOUT_METRIC
from mfrsvlm.scenes import ask, draw
from mfrsvlm.scenes.dataset import DatasetPlan


SPLIT = {"vhm-eval": "cls_AID"}  # where a split has to be named
COUNTED = [name for name, info in BENCHMARKS.items() if info.default_split and info.splits[info.default_split]]
# Their images are listed in a file; those of the others are what the folders hold. An image of BigEarthNet is several files.
LISTED = [name for name, info in BENCHMARKS.items() if not info.own_splits and name not in ("bigearthnet", "so2sat")]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path


def load(name: str, root: Path, split: str | None = None, **options: Any) -> Benchmark:
    """Loads a stand-in, which has fewer samples than the benchmark."""
    # Stand-ins of VRSBench have images of other sizes, since boxes on square ones would hide swapped sides.
    options = {"check_sizes": not name.startswith("vrsbench")} | options
    return load_benchmark(name, root, split or SPLIT.get(name), check_counts=False, **options)


def image_files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.suffix in (".jpg", ".png", ".tif"))


# Every benchmark


def test_every_benchmark_has_a_stand_in() -> None:
    assert MAKERS.keys() | {"so2sat"} == BENCHMARKS.keys()


def test_the_page_for_users_names_every_benchmark_and_its_counts() -> None:
    rows = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text().split("\n")
    for name, info in BENCHMARKS.items():
        (row,) = [row for row in rows if row.startswith(f"| `{name}` |")]
        counts = [f"{count:,}" for count in info.splits.values() if count]
        assert all(count in row for count in counts), row
        assert counts or name == "scenes" or "not checked" in row
        assert info.default_split is None or f"**{info.default_split}**" in row


@pytest.mark.parametrize("name", MAKERS)
def test_samples_are_complete(name: str, root: Path) -> None:
    MAKERS[name](root)
    benchmark = load(name, root)
    assert len(benchmark.samples) == COUNTS.get(name, len(benchmark.samples)) > 0
    assert benchmark.name == name and benchmark.split == (BENCHMARKS[name].default_split or SPLIT[name])
    assert len({sample.id for sample in benchmark.samples}) == len(benchmark.samples)
    assert {sample.task for sample in benchmark.samples} <= set(BENCHMARKS[name].tasks)
    for sample in benchmark.samples:
        assert all(benchmark.read_image(image).mode == "RGB" for image in sample.images)
        assert all(isinstance(text, str) and text.strip() == text != "" for text in sample.references)
        if sample.task in BOX_TASKS:
            assert not sample.references and sample.question
            assert sample.boxes or sample.task in LIST_TASKS
            assert all(len(box) in (4, 8) for box in sample.boxes)
            assert benchmark.read_image(sample.images[0]).size == sample.image_size
        else:
            assert sample.references and not sample.boxes
        if sample.task == "classification":
            assert sample.references[0] in benchmark.class_names and sample.group
        if sample.task == "counting":
            assert sample.references[0].isdecimal()
        if sample.task in ("vqa", "counting"):
            assert sample.question and sample.group and "<image>" not in sample.question


@pytest.mark.parametrize("name", MAKERS)
def test_loading_twice_gives_the_same(name: str, root: Path) -> None:
    MAKERS[name](root)
    assert load(name, root).samples == load(name, root).samples


# Published numbers of all splits together, which are checked before those of a split.
TOTALS = {"dior-rsvg": 38320, "rsicd": 10921, "rsitmd": 4743, "sydney-captions": 613, "ucm-captions": 2100}


@pytest.mark.parametrize("name", COUNTED)
def test_a_count_that_is_not_the_published_one(name: str, root: Path) -> None:
    MAKERS[name](root)
    expected = TOTALS.get(name) or BENCHMARKS[name].splits[BENCHMARKS[name].default_split]
    with pytest.raises(BenchmarkError, match=rf"not the published {expected}\b.*check_counts=False"):
        load_benchmark(name, root)


@pytest.mark.parametrize("name", COUNTED)
def test_the_published_count_passes(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MAKERS[name](root)
    info = BENCHMARKS[name]
    monkeypatch.setitem(BENCHMARKS, name, replace(info, splits={info.default_split: COUNTS[name]}))
    if name in TOTALS and name != "dior-rsvg":
        files = info.loader.__self__
        monkeypatch.setitem(BENCHMARKS, name, replace(BENCHMARKS[name], loader=replace(files, total=3).load))
    monkeypatch.setattr("mfrsvlm.evaluation.benchmarks.dior_rsvg.OBJECTS", 3)
    assert len(load_benchmark(name, root, check_sizes=not name.startswith("vrsbench")).samples) == COUNTS[name]


@pytest.mark.parametrize("name", LISTED)
def test_missing_images_are_counted_and_named(name: str, root: Path) -> None:
    MAKERS[name](root)
    names = [image for sample in load(name, root).samples for image in sample.images]
    gone = [image for image in dict.fromkeys(names) if image != names[-1]]
    assert gone
    for image in gone:
        (root / image).unlink()
    with pytest.raises(
        BenchmarkError, match=rf"{len(gone)} of {len(gone) + 1} images are missing in .*{Path(gone[0]).stem}"
    ):
        load(name, root)


@pytest.mark.parametrize("name", MAKERS)
def test_a_truncated_file_is_an_error_that_names_it(name: str, root: Path) -> None:
    MAKERS[name](root)
    texts = [
        path for path in root.rglob("*") if path.suffix in (".json", ".jsonl", ".xml") and "test_phili" not in path.name
    ]
    if name.startswith("vrsbench"):
        texts = [
            path for path in texts if path.stem.endswith({"capt": "Cap", "vqa": "vqa", "refe": "referring"}[name[9:13]])
        ]
    if name == "vhm-eval":
        texts = [root / "cls_AID.json"]
    for path in texts:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(BenchmarkError, match=path.name):
            load(name, root)
        path.write_bytes(whole)
    assert load(name, root)


@pytest.mark.parametrize("name", MAKERS)
def test_an_empty_folder_is_an_error_that_names_what_is_missing(name: str, root: Path) -> None:
    with pytest.raises(BenchmarkError, match=root.name):
        load(name, root)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "so2sat"])
def test_a_broken_image_is_an_error_that_names_it_and_its_sample(name: str, root: Path) -> None:
    MAKERS[name](root)
    benchmark = load(name, root)
    sample = benchmark.samples[0]
    path = root / sample.images[0]
    (broken,) = [path] if name != "bigearthnet" else root.rglob(f"{path.name}_B02.tif")  # one of several files
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    with pytest.raises(BenchmarkError, match=f"{path.name} of sample '{sample.id}' of {name} cannot be read"):
        benchmark.read_image(sample.images[0])


# Names and splits


def test_unknown_names_and_splits(root: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"Unknown benchmark 'rsvqa'\. Benchmarks are aid, .*, rsvqa-hr, rsvqa-lr, "):
        load_benchmark("rsvqa", root)
    with pytest.raises(BenchmarkError, match="rsvqa-hr has no split 'phili'; its splits are train, val, test, test_phili"):
        load_benchmark("rsvqa-hr", root, "phili")
    with pytest.raises(BenchmarkError, match="vhm-eval has no default split; choose one of cls_AID"):
        load_benchmark("vhm-eval", root)


def test_no_folder(root: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"needs the folder of its files.*zenodo"):
        load_benchmark("rsvqa-lr", None)
    with pytest.raises(BenchmarkError, match=r"absent is no folder.*zenodo"):
        load_benchmark("rsvqa-lr", root / "absent")


# Images


def test_images_that_are_not_eight_bit_rgb_are_refused(root: Path) -> None:
    benchmark = Benchmark("stand-in", "all", root, [])
    Image.fromarray(np.full((4, 4), 3000, dtype=np.uint16)).save(root / "deep.png")
    with pytest.raises(BenchmarkError, match=r"deep\.png.*has mode I;16; convert it to 8-bit RGB"):
        benchmark.read_image("deep.png")
    write_tiff(root / "colors.tif", 3, 16)
    with pytest.raises(BenchmarkError, match=r"colors\.tif.*16 bits a sample in color"):
        benchmark.read_image("colors.tif")
    with pytest.raises(BenchmarkError, match=r"absent\.tif.*cannot be read"):
        benchmark.read_image("absent.tif")


def test_images_outside_of_the_folder_are_opened_only_if_allowed(root: Path) -> None:
    inner = root / "inner"
    write_image(inner / "a.png")
    write_image(root / "b.png", (6, 4))
    (inner / "link.png").symlink_to(root / "b.png")
    sample = Sample("seven", ("../b.png",), "vqa", "?", ("yes",))
    benchmark = Benchmark("stand-in", "all", inner, [sample])
    assert benchmark.read_image("a.png").size == (8, 8)
    for name in ("../b.png", "link.png", str(root / "b.png")):
        with pytest.raises(BenchmarkError, match="only files in there may be opened"):
            benchmark.read_image(name)
    with pytest.raises(BenchmarkError, match=r"b\.png of sample 'seven' of stand-in"):
        benchmark.read_image("../b.png")
    with pytest.raises(BenchmarkError, match="it is an address"):
        benchmark.read_image("https://example.org/a.png")
    benchmark.allow_outside_images = True
    assert {benchmark.read_image(name).size for name in ("../b.png", "link.png", str(root / "b.png"))} == {(6, 4)}
    assert benchmark.read_image("a.png").size == (8, 8)  # names still start at the folder


def test_boxes_are_in_the_frame_that_the_model_sees(root: Path) -> None:
    """A photo that its EXIF data turn by a quarter: as high as it is stored wide."""
    MAKERS["vhm-eval"](root)
    for path in (root / "VG_DOIR_RSVG_test").iterdir():
        photo = Image.new("RGB", (80, 40))
        exif = photo.getexif()
        exif[0x0112] = 6
        photo.save(path, "JPEG", exif=exif)
    edit_json(root / "VG_DOIR_RSVG_test.json", lambda rows: rows[0]["conversations"][1].update(value="[10, 2, 30, 60]"))
    benchmark = load_benchmark("vhm-eval", root, "VG_DOIR_RSVG_test", check_counts=False, check_images=True)
    sizes = {sample.image_size for sample in benchmark.samples}
    assert sizes == {benchmark.read_image(sample.images[0]).size for sample in benchmark.samples} == {(40, 80)}


@pytest.mark.parametrize("name", ["vhm-eval", "dior-rsvg"])
def test_a_box_that_leaves_its_image_is_refused_and_one_at_the_edge_is_cut(name: str, root: Path) -> None:
    MAKERS[name](root)
    split = "VG_DOIR_RSVG_test" if name == "vhm-eval" else "test"
    path = root / f"{split}.json" if name == "vhm-eval" else root / "Annotations" / "00001.xml"
    text = path.read_text()

    def with_right_edge(value: int) -> Benchmark:
        path.write_text(text.replace("[10, 2, 60, 8]", f"[10, 2, {value}, 8]").replace("<xmax>60<", f"<xmax>{value}<"))
        return load_benchmark(name, root, split, check_counts=False)

    assert with_right_edge(81).samples[0].boxes[0][2] == 80  # the images are 80 pixels wide
    with pytest.raises(BenchmarkError, match=rf"{path.name}.*exceeds its image, 80 pixels wide and 40 high"):
        with_right_edge(150)


def test_what_a_mac_writes_beside_images_is_no_image(root: Path) -> None:
    MAKERS["eurosat"](root)
    folder = next(path for path in (root / "2750").iterdir())
    for path in (folder, root / "2750" / "__MACOSX"):
        path.mkdir(exist_ok=True)
        (path / "._1.jpg").write_bytes(b"\0\5\26\7")
    (root / "2750" / "__MACOSX" / "1.jpg").write_bytes(b"\0\5\26\7")
    assert len(load("eurosat", root).samples) == COUNTS["eurosat"]


def test_gray_paletted_and_transparent_images_are_converted(root: Path) -> None:
    benchmark = Benchmark("stand-in", "all", root, [])
    for mode in ("L", "P", "RGBA"):
        Image.new("RGB", (4, 4), (102, 102, 102)).convert(mode).save(root / "image.png")
        assert np.array_equal(np.asarray(benchmark.read_image("image.png")), np.full((4, 4, 3), 102))
    for bands in (3, 4):
        write_tiff(root / "image.tif", bands, 8)
        assert benchmark.read_image("image.tif").size == (2, 2)


def write_tiff(path: Path, bands: int, bits: int) -> None:
    """An uncompressed 2 x 2 TIFF of zeros, as Pillow itself cannot write it."""
    length = 4 * bands * bits // 8
    tags = {256: (3, 2), 257: (3, 2), 258: (3, bits), 259: (3, 1), 262: (3, 2), 273: (4, 0), 277: (3, bands), 278: (3, 2)}
    tags |= {279: (4, length)} | ({338: (3, 0)} if bands > 3 else {})
    counts = {258: bands, 338: bands - 3}
    offset = 8 + 2 + 12 * len(tags) + 4
    extra, entries = b"", b""
    for tag, (kind, value) in sorted(tags.items()):
        count = counts.get(tag, 1)
        values = np.full(count, value, dtype="<u2" if kind == 3 else "<u4").tobytes()
        if len(values) > 4:
            field, extra = (offset + len(extra)).to_bytes(4, "little"), extra + values
        else:
            field = values.ljust(4, b"\0")
        entries += tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + count.to_bytes(4, "little") + field
    strip = (offset + len(extra)).to_bytes(4, "little")
    position = entries.index((273).to_bytes(2, "little") + (4).to_bytes(2, "little")) + 8
    entries = entries[:position] + strip + entries[position + 4 :]
    head = b"II*\0" + (8).to_bytes(4, "little") + len(tags).to_bytes(2, "little")
    path.write_bytes(head + entries + bytes(4) + extra + bytes(length))


# RSVQA


def test_rsvqa_joins_questions_with_their_answers(root: Path) -> None:
    MAKERS["rsvqa-lr"](root)
    samples = load("rsvqa-lr", root).samples
    assert [(s.id, s.images[0], s.group, s.references) for s in samples] == [
        ("10", "Images_LR/5.tif", "presence", ("yes",)),
        ("11", "Images_LR/5.tif", "count", ("3",)),
        ("12", "Images_LR/6.tif", "comp", ("no",)),
        ("13", "Images_LR/6.tif", "rural_urban", ("urban",)),
    ]
    assert samples[0].question == "A question of presence?"


@pytest.mark.parametrize(
    ("name", "stem", "images", "whole"),
    [
        ("rsvqa-lr", "LR_split_test", "Images_LR", ("all_questions.json", "all_answers.json")),
        ("rsvqa-hr", "USGS_split_test", "Data", ("USGSquestions.json", "USGSanswers.json")),
    ],
)
def test_rsvqa_takes_text_from_the_files_of_all_splits(name, stem, images, whole, tmp_path: Path) -> None:
    kinds = ("presence", "count", "comp")
    for folder, files in (("in_the_split", None), ("in_all", whole)):
        make_rsvqa(tmp_path / folder, stem, images, kinds, files)
    samples = [load(name, tmp_path / folder).samples for folder in ("in_the_split", "in_all")]
    assert samples[0] == samples[1] and len(samples[0]) == 3

    edit_json(tmp_path / "in_all" / whole[0], lambda content: content["questions"].pop(0))
    with pytest.raises(BenchmarkError, match=f"{whole[0]} lacks 1 rows that are active in .*such as id 10"):
        load(name, tmp_path / "in_all")
    (tmp_path / "in_all" / whole[0]).unlink()
    with pytest.raises(BenchmarkError, match=f"looked for {whole[0]}"):
        load(name, tmp_path / "in_all")


def test_rsvqa_hr_has_two_test_sets(root: Path) -> None:
    MAKERS["rsvqa-hr"](root)
    assert len(load("rsvqa-hr", root).samples) == 4
    assert len(load("rsvqa-hr", root, "test_phili").samples) == 2
    assert BENCHMARKS["rsvqa-hr"].splits["test_phili"] == 105647


def test_rsvqa_takes_converted_images_and_does_without_the_list_of_images(root: Path) -> None:
    MAKERS["rsvqa-hr"](root)
    for path in image_files(root):
        write_image(path.with_suffix(".png"), (512, 512))
        path.unlink()
    (root / "USGS_split_test_images.json").unlink()
    assert load("rsvqa-hr", root).samples[0].images == ("Data/5.png",)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("answers", lambda c: c["answers"].pop(0), r"question 10 has no active answer in .*LR_split_test_answers"),
        ("answers", lambda c: c["answers"][0].update(active=False), "question 10 has no active answer"),
        ("answers", lambda c: c["answers"].append(c["answers"][0]), "question 10 has two active answers"),
        ("answers", lambda c: c["answers"][1].update(answer=3), r"row 69: 'answer' is 3, a int; expected str"),
        ("answers", lambda c: c["answers"][1].update(answer=["3"]), r"'answer' is \['3'\], a list; expected str"),
        ("answers", lambda c: c["answers"][1].update(answer=" "), "'answer' is blank"),
        ("answers", lambda c: c["answers"][1].update(question_id="11"), "'question_id' is '11', a str; expected int"),
        ("questions", lambda c: c["questions"].pop(0), r"1 active answers have no active question .* to 10"),
        ("questions", lambda c: c["questions"].append(c["questions"][0]), r"1 ids .* occur more than once, such as 10"),
        ("questions", lambda c: c["questions"][0].update(img_id=8), r"question 10 is about image 8, .*not active in"),
        ("questions", lambda c: c["questions"][0].update(active="yes"), "'active' is 'yes', a str; expected bool"),
        ("questions", lambda c: c["questions"][0].update(type=None), "'type' is None, a NoneType; expected str"),
        ("questions", lambda c: c["questions"].insert(0, 7), "row 0: a int where an object is expected"),
        ("questions", lambda c: c.pop("questions"), "'questions' is missing; expected list"),
        ("questions", lambda c: [row.update(active=False) for row in c["questions"]], "have no active question"),
    ],
)
def test_rsvqa_rows_that_are_wrong(file: str, change, message: str, root: Path) -> None:
    MAKERS["rsvqa-lr"](root)
    edit_json(root / f"LR_split_test_{file}.json", change)
    with pytest.raises(BenchmarkError, match=message):
        load("rsvqa-lr", root)


def test_a_file_that_is_not_utf8(root: Path) -> None:
    MAKERS["rsvqa-lr"](root)
    (root / "LR_split_test_questions.json").write_bytes(b'{"questions": "\xff"}')
    with pytest.raises(BenchmarkError, match=r"LR_split_test_questions\.json is not UTF-8"):
        load("rsvqa-lr", root)


# Folders of classes


LAYOUTS = {name: BENCHMARKS[name].loader.__self__ for name in ("aid", "uc-merced", "whu-rs19", "meter-ml")}


def test_class_names_are_readable_whatever_the_folder_is_called() -> None:
    for folder in ("BaseballField", "baseball_field", "baseballfield", "Baseball Field"):
        assert class_name(folder, LAYOUTS["aid"]) == "baseball field"
    assert class_name("mobilehomepark", LAYOUTS["uc-merced"]) == "mobile home park"
    assert class_name("footballField", LAYOUTS["whu-rs19"]) == "football field"
    assert class_name("R&Ts", LAYOUTS["meter-ml"]) == "oil refineries and petroleum terminals"
    assert class_name("Volcano", LAYOUTS["aid"]) is None


@pytest.mark.parametrize(
    ("name", "classes"),
    [("aid", 30), ("nwpu-resisc45", 45), ("whu-rs19", 19), ("siri-whu", 12), ("eurosat", 10), ("uc-merced", 21)],
)
def test_folders_give_all_classes_of_the_benchmark(name: str, classes: int, root: Path) -> None:
    MAKERS[name](root)
    benchmark = load(name, root)
    assert len(benchmark.class_names) == len(set(benchmark.class_names)) == classes
    assert {sample.references[0] for sample in benchmark.samples} == set(benchmark.class_names)


def test_the_folder_is_kept_as_the_group(root: Path) -> None:
    MAKERS["aid"](root)
    sample = next(sample for sample in load("aid", root).samples if sample.references == ("bare land",))
    assert (sample.id, sample.images, sample.group) == ("BareLand/BareLand_1.jpg", ("BareLand/BareLand_1.jpg",), "BareLand")


def test_other_files_beside_the_images_do_not_matter(root: Path) -> None:
    MAKERS["aid"](root)
    (root / "Airport" / "Thumbs.db").write_text("")
    (root / "notes").mkdir()
    assert len(load("aid", root).samples) == COUNTS["aid"]


def test_a_list_makes_a_split(root: Path) -> None:
    MAKERS["eurosat"](root)
    (root / "val.txt").write_text("Forest/Forest_2.jpg\n\n2750/River/River_1.jpg\nSeaLake_1.jpg\n")
    assert [sample.id for sample in load_benchmark("eurosat", root, "val").samples] == [
        "Forest/Forest_2.jpg",
        "River/River_1.jpg",
        "SeaLake/SeaLake_1.jpg",
    ]
    with pytest.raises(BenchmarkError, match=r"eurosat has no official split, and there is no list .*test\.txt"):
        load("eurosat", root, "test")
    (root / "val.txt").write_text("Forest/Forest_2.jpg\nForest/Forest_9.jpg\n")
    with pytest.raises(BenchmarkError, match=r"val\.txt names 1 images that do not exist.*Forest/Forest_9\.jpg"):
        load("eurosat", root, "val")
    (root / "val.txt").write_text("Forest/Forest_2.jpg\n" * 2)
    with pytest.raises(BenchmarkError, match=r"val\.txt names 1 images more than once"):
        load("eurosat", root, "val")
    (root / "val.txt").write_text("\n")
    with pytest.raises(BenchmarkError, match=r"split 'val' in .* has no samples"):
        load("eurosat", root, "val")


def test_a_bare_name_in_two_folders_is_not_guessed(root: Path) -> None:
    MAKERS["siri-whu"](root)
    write_image(root / "12class_tif" / "river" / "0001.tif")
    write_image(root / "12class_tif" / "pond" / "0001.tif")
    (root / "val.txt").write_text("0001.tif\n")
    with pytest.raises(BenchmarkError, match="whose file name is in several folders"):
        load("siri-whu", root, "val")


def test_folders_that_are_wrong(root: Path) -> None:
    MAKERS["aid"](root)
    shutil.rmtree(root / "Airport")
    with pytest.raises(BenchmarkError, match="aid: no images of airport in"):
        load("aid", root)
    write_image(root / "Airport" / "1.jpg", (600, 600))
    write_image(root / "airport_" / "1.jpg", (600, 600))
    with pytest.raises(BenchmarkError, match="are both of class 'airport'"):
        load("aid", root)
    (root / "airport_").rename(root / "Volcano")
    with pytest.raises(BenchmarkError, match=r"Volcano has images but is none of the classes airport, .* another data set"):
        load("aid", root)


def test_meter_ml_may_come_without_negatives(root: Path) -> None:
    MAKERS["meter-ml"](root)
    assert "negative" in load("meter-ml", root).class_names
    shutil.rmtree(root / "negative")
    assert "negative" not in load("meter-ml", root).class_names


# Captions


@pytest.mark.parametrize("name", ["rsicd", "sydney-captions", "ucm-captions", "rsitmd"])
def test_captions_of_the_split(name: str, root: Path) -> None:
    MAKERS[name](root)
    samples = load(name, root).samples
    assert [sample.id.split(".")[0] for sample in samples] == ["airport_1", "airport_2"]
    assert samples[0].references == tuple(f"Many planes, seen {n} times ." for n in range(5))
    assert len(load(name, root, "train").samples) == 1


def test_nwpu_captions(root: Path) -> None:
    MAKERS["nwpu-captions"](root)
    samples = load("nwpu-captions", root).samples
    assert [(sample.id, sample.images[0], sample.group) for sample in samples] == [
        ("airplane_002.jpg", "NWPU_images/airplane/airplane_002.jpg", "airplane"),
        ("river_002.jpg", "NWPU_images/river/river_002.jpg", "river"),
    ]
    assert samples[0].references[::4] == ("A airplane, raw.", "A airplane, raw_4.")
    for path in image_files(root):
        path.rename(root / "NWPU_images" / path.name)
    for folder in ("airplane", "river"):
        (root / "NWPU_images" / folder).rmdir()
    assert load("nwpu-captions", root).samples[0].images == ("NWPU_images/airplane_002.jpg",)


def test_blank_captions_are_left_out_with_a_warning(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    MAKERS["rsitmd"](root)
    path = root / "dataset_RSITMD.json"
    edit_json(path, lambda c: c["images"][1]["sentences"][0].update(raw=" "))
    with caplog.at_level(logging.WARNING):
        assert len(load("rsitmd", root).samples[0].references) == 4
    assert "1 of 5 captions of airport_1.tif are blank" in caplog.text
    edit_json(path, lambda c: [sentence.update(raw="") for sentence in c["images"][1]["sentences"]])
    with pytest.raises(BenchmarkError, match=r"image airport_1\.tif has no caption"):
        load("rsitmd", root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.update(split="testing"), "row 1: split 'testing' is none of train, val, test"),
        (lambda row: row.pop("split"), "row 1: 'split' is missing"),
        (lambda row: row.update(sentences=[]), r"image airport_1\.jpg has no caption"),
        (lambda row: row["sentences"][0].update(raw=5), "'raw' is 5, a int; expected str"),
        (lambda row: row.update(filename="airport_2.jpg"), r"1 ids .* more than once, such as airport_2\.jpg"),
    ],
)
def test_captions_that_are_wrong(change, message: str, root: Path) -> None:
    MAKERS["rsicd"](root)
    edit_json(root / "dataset_rsicd.json", lambda content: change(content["images"][1]))
    with pytest.raises(BenchmarkError, match=message):
        load("rsicd", root)


def test_nwpu_captions_that_are_wrong(root: Path) -> None:
    MAKERS["nwpu-captions"](root)
    edit_json(root / "dataset_nwpu.json", lambda content: content["river"][2].pop("raw_3"))
    with pytest.raises(BenchmarkError, match="row 2 of river: 'raw_3' is missing"):
        load("nwpu-captions", root)


# VRSBench


@pytest.mark.parametrize("name", ["vrsbench-captions", "vrsbench-vqa", "vrsbench-referring"])
def test_both_layouts_of_vrsbench_give_the_same(name: str, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    MAKERS[name](tmp_path / "files")
    make_vrsbench_annotations(tmp_path / "annotations")
    samples = [
        [replace(sample, id="") for sample in load(name, tmp_path / folder).samples] for folder in ("files", "annotations")
    ]
    assert samples[0] == samples[1] and len(samples[0]) == 2


def test_vrsbench_boxes_are_in_pixels(root: Path) -> None:
    MAKERS["vrsbench-referring"](root)
    first, second = load("vrsbench-referring", root).samples
    assert first.boxes == ((50.0, 40.0, 66.0, 60.0),) and first.image_size == (200, 100)
    assert (first.question, first.group, second.group) == ("The ship on the left.", "unique", "non unique")


def test_a_vrsbench_box_without_area_is_kept(root: Path) -> None:
    MAKERS["vrsbench-referring"](root)
    edit_json(root / "VRSBench_EVAL_referring.json", lambda c: c[0].update(ground_truth="{<92><0><96><0>}"))
    assert load("vrsbench-referring", root).samples[0].boxes == ((184.0, 0.0, 192.0, 0.0),)


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        (
            "referring",
            lambda r: r.update(ground_truth="{<25><40><33>}"),
            r"row 1: 'ground_truth' '\{<25><40><33>\}' is not a box",
        ),
        ("referring", lambda r: r.update(ground_truth="{<250><40><330><60>}"), "integers from 0 to 100"),
        ("referring", lambda r: r.pop("unique"), "'is_unique' is missing"),
        ("vqa", lambda r: r.update(ground_truth=True), "'ground_truth' is True, a bool"),
        ("vqa", lambda r: r.update(ground_truth=["2"]), r"'ground_truth' is \['2'\], a list"),
        ("vqa", lambda r: r.update(question_id=0), "1 ids .* more than once, such as 0"),
        ("Cap", lambda r: r.update(ground_truth=None), "'ground_truth' is None, a NoneType"),
        ("Cap", lambda r: r.pop("image_id"), "'image_id' is missing"),
    ],
)
def test_vrsbench_rows_that_are_wrong(task: str, change, message: str, root: Path) -> None:
    name = {"referring": "vrsbench-referring", "vqa": "vrsbench-vqa", "Cap": "vrsbench-captions"}[task]
    MAKERS[name](root)
    edit_json(root / f"VRSBench_EVAL_{task}.json", lambda content: change(content[1]))
    with pytest.raises(BenchmarkError, match=message):
        load(name, root)


@pytest.mark.parametrize(
    ("corner", "message"),
    [
        ([10, 10, 90, 10, 90, 90, 10, 90], "must be relative to the sides of the image, not pixels"),
        ([0.1, 0.2, 0.3], "expected 8 finite numbers"),
        ([0.1] * 7 + ["x"], "expected 8 finite numbers"),
        (None, "'obj_corner' is None, a NoneType; expected list"),
    ],
)
def test_vrsbench_corners_that_are_wrong(corner: Any, message: str, root: Path) -> None:
    make_vrsbench_annotations(root)
    path = root / "Annotations_val" / "P0003_0002.json"
    edit_json(path, lambda content: content["objects"][0].update(obj_corner=corner))
    with pytest.raises(BenchmarkError, match=rf"P0003_0002\.json, row 0: .*{message}"):
        load("vrsbench-referring", root)


def test_vrsbench_corners_that_are_not_numbers(root: Path) -> None:
    make_vrsbench_annotations(root)
    path = root / "Annotations_val" / "P0003_0002.json"
    edit_json(path, lambda content: content["objects"][0].update(obj_corner=[0.1] * 7 + [float("nan")]))
    with pytest.raises(BenchmarkError, match=r"P0003_0002\.json is not JSON: NaN is no number of JSON"):
        load("vrsbench-referring", root)


# DIOR-RSVG


def test_dior_rsvg_counts_objects_over_files(root: Path) -> None:
    MAKERS["dior-rsvg"](root)
    first, second = load("dior-rsvg", root).samples
    assert (first.id, first.question, first.group) == ("00001-0", "A large ship", "ship")
    assert (first.boxes, first.image_size) == (((0.0, 2.0, 60.0, 8.0),), (80, 40))
    assert (second.id, second.images) == ("00002-0", ("JPEGImages/00002.jpg",))
    assert [sample.id for sample in load("dior-rsvg", root, "val").samples] == ["00001-1"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("0\n3\n", r"test\.txt: 1 lines are not numbers from 0 to 2, such as 3"),
        ("0\n-1\nx\n", r"2 lines are not numbers from 0 to 2, such as -1, x"),
        ("2\n0\n2\n", r"1 objects are listed more than once, such as \[2\]"),
        ("", "has no samples"),
    ],
)
def test_dior_rsvg_lists_that_are_wrong(lines: str, message: str, root: Path) -> None:
    MAKERS["dior-rsvg"](root)
    (root / "test.txt").write_text(lines)
    with pytest.raises(BenchmarkError, match=message):
        load("dior-rsvg", root)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<description>A large dam</description>", "", "<object> has no <description>"),
        ("<xmin>10</xmin>", "<xmin>left</xmin>", "object 1: .* is not a box"),
        ("<ymax>8</ymax>", "", "<object> has no <bndbox/ymax>"),
        ("<width>80</width>", "", "<annotation> has no <size/width>"),
    ],
)
def test_dior_rsvg_annotations_that_are_wrong(old: str, new: str, message: str, root: Path) -> None:
    MAKERS["dior-rsvg"](root)
    path = root / "Annotations" / "00001.xml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(BenchmarkError, match=rf"00001\.xml.*{message}"):
        load("dior-rsvg", root)


# VHM


def test_vhm_lists(root: Path) -> None:
    MAKERS["vhm-eval"](root)
    scenes = load("vhm-eval", root, "cls_AID")
    assert scenes.class_names == ["airport", "bare land"]
    assert scenes.samples[1].references == ("bare land",) and scenes.samples[1].images == ("cls_AID/1.png",)
    counts = load("vhm-eval", root, "counting_dota-test_open").samples
    assert [sample.references for sample in counts] == [("12",), ("7",)]
    position = load("vhm-eval", root, "abspos_dota-test_mc").samples[0]
    assert position.choices == ("top left", "bottom right") and position.references == ("A",)
    ship = load("vhm-eval", root, "VG_DOIR_RSVG_test").samples[0]
    assert ship.boxes == ((10.0, 2.0, 60.0, 8.0),) and ship.image_size == (80, 40)


def test_vhm_lists_may_lie_in_the_folder_of_the_archive(root: Path) -> None:
    (root / "datasets_eval").mkdir()
    MAKERS["vhm-eval"](root / "datasets_eval")
    assert load("vhm-eval", root).samples[0].images == ("datasets_eval/cls_AID/0.png",)


def test_vhm_lists_that_nothing_here_can_score(root: Path) -> None:
    assert not LISTS.keys() & WITHOUT_METRIC.keys()
    for split in WITHOUT_METRIC:
        with pytest.raises(BenchmarkError, match=f"{split} asks for .*no metric here scores that"):
            load("vhm-eval", root, split)


@pytest.mark.parametrize(
    ("split", "change", "message"),
    [
        ("cls_AID", lambda row: row["conversations"].pop(), r"row 1: expected one question .* got \['human'\]"),
        ("cls_AID", lambda row: row["conversations"][1].update(value=None), "'value' is None"),
        ("cls_AID", lambda row: row.pop("image_path"), "'image_path' is missing"),
        ("counting_dota-test_open", lambda row: row["conversations"][1].update(value="many"), "'many' is not an integer"),
        ("VG_DOIR_RSVG_test", lambda row: row["conversations"][1].update(value="[1, 2, 3]"), "expected 4 finite numbers"),
    ],
)
def test_vhm_rows_that_are_wrong(split: str, change, message: str, root: Path) -> None:
    MAKERS["vhm-eval"](root)
    edit_json(root / f"{split}.json", lambda content: change(content[1]))
    with pytest.raises(BenchmarkError, match=message):
        load("vhm-eval", root, split)


def test_a_list_where_an_object_is_expected(root: Path) -> None:
    write_json(root / "cls_AID.json", {"rows": []})
    with pytest.raises(BenchmarkError, match=r"cls_AID\.json holds a dict where a list is expected"):
        load("vhm-eval", root)


# Synthetic scenes


def test_scenes_are_drawn_when_there_is_no_folder() -> None:
    benchmark = load_benchmark("scenes", None, count=4)
    plan = DatasetPlan("test", 4)
    asked = [question for index in range(4) for question in ask(plan.scene(index))]
    assert [sample.question for sample in benchmark.samples] == [question.text for question in asked]
    for sample, question in zip(benchmark.samples, asked, strict=True):
        tasks = {"count": "counting", "caption": "captioning"}
        assert sample.task == tasks.get(question.task, question.task) or (sample.task, sample.group) == (
            "vqa",
            question.task,
        )
        assert sample.references == (() if question.task in BOX_TASKS else (question.answer,))
        assert sample.boxes == tuple(question.boxes)
    last = benchmark.samples[-1]
    assert np.array_equal(np.asarray(benchmark.read_image(last.images[0])), np.asarray(draw(plan.scene(3))))


@pytest.mark.slow
def test_the_scenes_of_the_test_split() -> None:
    benchmark = load_benchmark("scenes", None)
    assert len(benchmark.samples) == 8784 and len({sample.images for sample in benchmark.samples}) == 1000


def test_scenes_on_disk_are_the_scenes_that_were_drawn(root: Path) -> None:
    MAKERS["scenes"](root)
    benchmark = load("scenes", root)
    plan = DatasetPlan("test", 3, 128, (2.0, 4.0))
    change = [sample for sample in benchmark.samples if sample.group == "change"]
    assert [len(sample.images) for sample in change] == [2] and change[0].task == "vqa"
    asked = [question for index in range(3) for question in ask(plan.scene(index))]
    written = [sample for sample in benchmark.samples if sample.group != "change"]
    assert [sample.question for sample in written] == [question.text for question in asked]
    assert [sample.boxes for sample in written] == [tuple(question.boxes) for question in asked]
    assert np.array_equal(np.asarray(benchmark.read_image("images/test-0000002.png")), np.asarray(draw(plan.scene(2))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("answer"), "row 1: 'answer' is missing"),
        (lambda row: row.update(boxes=[[1, 2, 3]]), "expected 4 finite numbers"),
        (lambda row: row.update(task="grounding", boxes=[]), "a grounding question without a box"),
        (lambda row: row.update(task="detection", answer="none", boxes=[[1, 2, 3, 4]]), "'none' to a detection .* 1 boxes"),
        (lambda row: row.update(task="pointing", answer="[1, 2]", boxes=[]), r"'\[1, 2\]' to a pointing .* 0 boxes"),
        (lambda row: row.update(conversations=[]), "'value' is missing"),
    ],
)
def test_scene_rows_that_are_wrong(change, message: str, root: Path) -> None:
    MAKERS["scenes"](root)
    path = root / "test.jsonl"
    first, *rest = path.read_text().split("\n")
    row = json.loads(first)
    change(row)
    path.write_text("\n".join([json.dumps(row), *rest]))
    with pytest.raises(BenchmarkError, match=message):
        load("scenes", root)
