"""Files of benchmarks that somebody made to do harm, or that lost a part: each is an error that names file and value."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_benchmarks import COUNTS, MAKERS, edit_json, write_image

from mfrsvlm.evaluation.benchmarks import BENCHMARKS, BenchmarkError, load_benchmark
from mfrsvlm.evaluation.evaluate import evaluate_majority


def edit_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def first_row(key: str) -> Callable[[Path, str], None]:
    return lambda path, name: edit_json(path, lambda rows: rows[0].update({key: name}))


# Benchmark, split -> what sets the name of the first image.
NAMES: dict[tuple[str, str], Callable[[Path, str], None]] = {
    ("vrsbench-captions", "val"): lambda root, name: first_row("image_id")(root / "VRSBench_EVAL_Cap.json", name),
    ("vrsbench-vqa", "val"): lambda root, name: first_row("image_id")(root / "VRSBench_EVAL_vqa.json", name),
    ("vrsbench-referring", "val"): lambda root, name: first_row("image_id")(root / "VRSBench_EVAL_referring.json", name),
    ("vhm-eval", "VG_DOIR_RSVG_test"): lambda root, name: first_row("image")(root / "VG_DOIR_RSVG_test.json", name),
    ("vhm-eval", "cls_AID"): lambda root, name: first_row("image_path")(root / "cls_AID.json", name),
    ("dior-rsvg", "test"): lambda root, name: edit_text(root / "Annotations/00001.xml", "00001.jpg", name),
    ("rsvg-hr", "test"): lambda root, name: edit_text(root / "rsvg_hr_test.txt", "a_ship.jpg", name),
    ("rsicd", "test"): lambda root, name: edit_json(
        root / "dataset_rsicd.json", lambda content: content["images"][1].update(filename=name)
    ),
    ("nwpu-captions", "test"): lambda root, name: edit_json(
        root / "dataset_nwpu.json", lambda content: content["airplane"][2].update(filename=name)
    ),
}  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("check_images", [False, True])
@pytest.mark.parametrize(("name", "split"), NAMES)
def test_images_outside_of_the_folder_are_rejected(
    name: str, split: str, check_images: bool, absolute: bool, root: Path, tmp_path: Path
) -> None:
    MAKERS[name](root)
    write_image(tmp_path / "secret.png", (80, 40))
    NAMES[name, split](root, str(tmp_path / "secret.png") if absolute else "../" * 8 + str(tmp_path / "secret.png")[1:])
    if absolute and name != "vhm-eval":  # joined to the folder of the images, where there is no such file
        check_images = True
    with pytest.raises(BenchmarkError, match=r"outside of|images are missing|there is no image"):
        load_benchmark(name, root, split, check_counts=False, check_images=check_images, check_sizes=False)


@pytest.mark.parametrize("name", ["vrsbench-referring", "rsvg-hr", "detection-counting", "detection-all", "rsicd", "aid"])
def test_links_that_leave_the_folder_are_rejected(name: str, root: Path, tmp_path: Path) -> None:
    MAKERS[name](root)
    options = {"check_counts": False, "check_sizes": False}
    benchmark = load_benchmark(name, root, **options)
    image = root / benchmark.samples[0].images[0]
    shutil.move(image, tmp_path / "moved")
    image.symlink_to(tmp_path / "moved")
    with pytest.raises(BenchmarkError, match=r"outside of .*--allow-outside-images|it leaves "):
        load_benchmark(name, root, **options)
    assert load_benchmark(name, root, allow_outside_images=True, **options).samples == benchmark.samples
    image.unlink()
    image.symlink_to(shutil.move(tmp_path / "moved", root / "inside"))  # a link that stays inside
    assert load_benchmark(name, root, **options).samples == benchmark.samples


BOMB = "".join(f'<!ENTITY x{n} "{f"&x{n - 1};" * 10 if n else "boom"}">' for n in range(9))


@pytest.mark.parametrize(
    "entities", [BOMB, '<!ENTITY x8 SYSTEM "file:///etc/hostname">', '<!ENTITY % x8 SYSTEM "http://127.0.0.1/x.dtd"> %x8;']
)
@pytest.mark.parametrize("name", ["dior-rsvg", "detection-counting", "detection-all"])
def test_entities_of_xml_are_rejected(name: str, entities: str, root: Path) -> None:
    MAKERS["dior-rsvg"](root)
    path = root / "Annotations" / "00001.xml"
    path.write_text(f"<!DOCTYPE annotation [{entities}]>" + path.read_text().replace("ship", "&x8;"))
    with pytest.raises(BenchmarkError, match=r"00001\.xml defines the entity 'x\d'\. .*attack"):
        load_benchmark(name, root, check_counts=False)


@pytest.mark.parametrize("check_images", [False, True])
@pytest.mark.parametrize("width", ["-1", "0", "5", "80.5", "nan", "1e999", "9" * 5000])
def test_a_width_that_is_not_that_of_the_image(width: str, check_images: bool, root: Path) -> None:
    MAKERS["dior-rsvg"](root)
    edit_text(root / "Annotations" / "00001.xml", "<width>80<", f"<width>{width}<")
    with pytest.raises(BenchmarkError, match=r"00001\.(xml|jpg)") as error:
        load_benchmark("dior-rsvg", root, check_counts=False, check_images=check_images)
    assert len(str(error.value)) < 1000 and "\n" not in str(error.value)


def test_a_width_without_a_box_to_betray_it(root: Path) -> None:
    """The boxes lie in the image of 70 pixels that the annotation claims."""
    MAKERS["dior-rsvg"](root)
    edit_text(root / "Annotations" / "00001.xml", "<width>80<", "<width>70<")
    for check_images in (False, True):
        with pytest.raises(BenchmarkError, match=r"00001\.jpg has 80 x 40, not 70 x 40"):
            load_benchmark("dior-rsvg", root, check_counts=False, check_images=check_images)


def test_a_misspelt_task_is_rejected(root: Path) -> None:
    MAKERS["scenes"](root)
    edit_text(root / "test.jsonl", '"task": "grounding"', '"task": "groundign"')
    with pytest.raises(BenchmarkError, match=r"test\.jsonl, row \d+: task 'groundign' is none of .*grounding.*change"):
        load_benchmark("scenes", root)


@pytest.mark.parametrize("task", ["detection", "pointing"])
@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[0, 0, 1, 129.5]], "exceeds its image, 128 pixels wide"),
        ([[200, 200, 900, 900]], "exceeds its image.*fit a scale of 0 to 1000"),
        ([[1, 1, 9, 9], [1, 1, 9]], "is not a box: expected 4 finite numbers"),
        ([[1, 1, 9, True]], "is not a box"),
        ([[1, 1, 9, "1_0"]], "is not a box"),
        ([[1, 1, 9, 10**400]], "is beyond the range of float64"),
        ([[[1, 1, 9, 9]]], "is not a box"),
        ([None] * 9999, "is not a box"),
        ({"0": [1, 1, 9, 9]}, "'boxes' is .*, a dict; expected list"),
        ([], "with 0 boxes. Without boxes, it must be 'none'"),
    ],
)
def test_boxes_of_lists_that_are_none(boxes: object, message: str, task: str, root: Path) -> None:
    MAKERS["scenes"](root)
    rows = [json.loads(line) for line in (root / "test.jsonl").read_text().splitlines()]
    chosen = next(row for row in rows if row["task"] == task and row["boxes"])
    chosen["boxes"] = boxes
    (root / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(BenchmarkError, match=rf"test\.jsonl, row {1 + rows.index(chosen)}\b.*{message}") as error:
        load_benchmark("scenes", root)
    assert len(str(error.value)) < 1000 and "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "stem"), [("rsvqa-lr", "LR_split_test"), ("rsvqa-hr", "USGS_split_test")])
def test_a_misspelt_type_is_rejected(name: str, stem: str, root: Path) -> None:
    MAKERS[name](root)
    edit_text(root / f"{stem}_questions.json", '"type": "presence"', '"type": "presense"')
    with pytest.raises(BenchmarkError, match=r"questions\.json, row 10: type 'presense' is none of presence, count, comp"):
        load_benchmark(name, root, check_counts=False, check_sizes=False)


@pytest.mark.parametrize("task", ["captions", "vqa", "referring"])
def test_a_list_of_vrsbench_that_lost_a_row(task: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, file = f"vrsbench-{task}", {"captions": "Cap"}.get(task, task)
    MAKERS[name](root)
    monkeypatch.setitem(BENCHMARKS, name, replace(BENCHMARKS[name], splits={"val": 2}))
    assert len(load_benchmark(name, root, check_sizes=False).samples) == 2
    edit_json(root / f"VRSBench_EVAL_{file}.json", lambda rows: rows.pop())
    with pytest.raises(BenchmarkError, match="has 1 samples, not the published 2"):
        load_benchmark(name, root, check_sizes=False)


@pytest.mark.parametrize("name", ["nwpu-captions", "rsicd", "sydney-captions", "ucm-captions", "rsitmd"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_file_of_captions_that_lost_a_row(name: str, split: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a split whose own number is not published."""
    MAKERS[name](root)
    with pytest.raises(BenchmarkError, match=r"images in all splits, not the published \d+\..*check_counts=False"):
        load_benchmark(name, root, split)
    info = BENCHMARKS[name]
    if name == "nwpu-captions":
        monkeypatch.setattr("mfrsvlm.evaluation.benchmarks.nwpu_captions.IMAGES", 6)
    else:
        info = replace(info, loader=replace(info.loader.__self__, total=3).load)
    monkeypatch.setitem(BENCHMARKS, name, replace(info, splits=dict.fromkeys(info.splits)))
    assert load_benchmark(name, root, split).samples
    (path,) = root.glob("dataset*.json")
    edit_json(path, lambda content: (content["airplane"] if name == "nwpu-captions" else content["images"]).pop())
    with pytest.raises(BenchmarkError, match=r"images in all splits, not the published \d\."):
        load_benchmark(name, root, split)


def test_a_summary_names_the_published_number_of_an_incomplete_split(root: Path) -> None:
    MAKERS["vrsbench-vqa"](root)
    benchmark = load_benchmark("vrsbench-vqa", root, check_counts=False, check_sizes=False)
    counts = evaluate_majority([benchmark])["vrsbench-vqa/val"]["counts"]
    assert (counts["in_split"], counts["published"]) == (COUNTS["vrsbench-vqa"], 37409)
