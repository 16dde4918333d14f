"""Boxes of object detection as questions: every layout gives the same, and what is wrong is named."""

import pytest
from tiny_benchmarks import OBJECTS, make_boxes_json, make_csv, make_voc, make_yolo, write_image

from mfrsvlm.evaluation.benchmarks import BenchmarkError, load_benchmark
from mfrsvlm.evaluation.evaluate import evaluate_majority
from mfrsvlm.evaluation.protocols import PROTOCOLS
from mfrsvlm.evaluation.report import parse_summary


LAYOUTS = {"yolo": make_yolo, "voc": make_voc, "csv": make_csv, "json": make_boxes_json}


@pytest.fixture
def root(tmp_path):
    return tmp_path


def facts(root, **options):
    asked = load_benchmark("detection-counting", root, **options).samples
    found = load_benchmark("detection-grounding", root, **options).samples
    counts = {(sample.images[0].split("/")[-1], sample.group): sample.references for sample in asked}
    boxes = {(sample.images[0].split("/")[-1], sample.question): sample.boxes for sample in found}
    rounded = {key: [tuple(round(value, 6) for value in box) for box in value] for key, value in boxes.items()}
    return counts, rounded, found[0].image_size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same(layout, root):
    LAYOUTS[layout](root)
    counts, boxes, size = facts(root)
    assert counts == {("a.jpg", "ship"): ("3",), ("a.jpg", "car"): ("1",), ("b.jpg", "car"): ("2",)}
    assert boxes == {("a.jpg", "the car"): [OBJECTS["a"][3][1]]} and size == (80, 40)
    assert facts(root, classes=["car"])[0] == {("a.jpg", "car"): ("1",), ("b.jpg", "car"): ("2",)}
    assert load_benchmark("detection-counting", root, classes=["car"]).left_out == {"classes": 1}
    with pytest.raises(BenchmarkError, match=r"has no classes \['plane'\]; pass a list of some of car, ship"):
        facts(root, classes=["plane"])
    (root / "val.txt").write_text("b.jpg\n")
    assert [sample.references for sample in load_benchmark("detection-counting", root, "val").samples] == [("2",)]
    (root / "val.txt").write_text("c.jpg\n")
    with pytest.raises(BenchmarkError, match=r"names 1 images without annotations: \['c\.jpg'\]"):
        load_benchmark("detection-counting", root, "val")


def test_names_of_yolo_in_yaml_and_labels_beside_images(root):
    make_yolo(root)
    expected = facts(root)[:2]
    (root / "classes.txt").unlink()
    with pytest.raises(BenchmarkError, match=r"no class names: add classes\.txt"):
        facts(root)
    for names in ("[car, ship]", "{0: car, 1: ship}"):
        (root / "data.yaml").write_text(f"path: .\nnc: 2\nnames: {names}\n")
        assert facts(root)[:2] == expected
    for path in (root / "labels").iterdir():
        path.rename(root / "images" / path.name)
    (root / "labels").rmdir()
    assert facts(root)[:2] == expected


def test_oriented_boxes_of_yolo(root):
    make_yolo(root)
    (root / "labels" / "a.txt").write_text("0 0.5 0.25 0.75 0.5 0.5 0.75 0.25 0.5\n")
    sample = load_benchmark("detection-grounding", root).samples[0]
    assert sample.boxes == ((40.0, 10.0, 60.0, 20.0, 40.0, 30.0, 20.0, 20.0),)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.1", r"a\.txt, row 1: .* is not a box: expected 4 or 8 finite numbers"),
        ("0 40 20 8 6", "must be relative to the sides, from 0 to 1"),
        ("2 0.5 0.5 0.1 0.1", "class '2' is none of the 2 names"),
        ("car 0.5 0.5 0.1 0.1", "class 'car' is none of the 2 names"),
        ("0 0.99 0.5 0.5 0.1", "exceeds its image, 80 pixels wide and 40 high"),
    ],
)
def test_rows_of_yolo_that_are_wrong(line, message, root):
    make_yolo(root)
    (root / "labels" / "a.txt").write_text(line + "\n")
    with pytest.raises(BenchmarkError, match=message):
        facts(root)


def test_annotations_without_an_image_or_of_another_size(root):
    make_voc(root)
    write_image(root / "JPEGImages" / "b.jpg", (40, 20))
    with pytest.raises(
        BenchmarkError, match=r"b\.xml: the annotation states 80 x 40 pixels, but JPEGImages/b\.jpg has 40 x 20"
    ):
        facts(root)
    (root / "JPEGImages" / "b.jpg").unlink()
    with pytest.raises(BenchmarkError, match=r"b\.xml, row 0: there is no image 'b\.jpg'"):
        facts(root)


def test_a_folder_with_several_kinds_of_annotations(root):
    make_voc(root)
    (root / "labels").mkdir()
    (root / "labels" / "a.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    (root / "classes.txt").write_text("car\n")
    with pytest.raises(BenchmarkError, match=r"annotations in several formats: yolo, voc\. Set annotations='yolo'"):
        facts(root)
    assert ("a.jpg", "ship") in facts(root, annotations="voc")[0]
    assert facts(root, annotations="yolo")[0] == {("a.jpg", "car"): ("1",)}
    with pytest.raises(BenchmarkError, match="annotations='coco' is none of yolo, voc, csv, json"):
        facts(root, annotations="coco")
    with pytest.raises(BenchmarkError, match="has no annotations: looked for yolo, voc, csv, json"):
        (root / "empty").mkdir()
        facts(root / "empty")


def test_an_image_that_two_folders_hold_is_not_guessed(root):
    make_csv(root)
    write_image(root / "copies" / "a.jpg", (80, 40))
    with pytest.raises(BenchmarkError, match=r"boxes\.csv, row 2: there is no image 'a\.tif'"):
        facts(root)


def test_all_boxes_of_a_class(root):
    make_boxes_json(root)
    benchmark = load_benchmark("detection-all", root)
    ships, cars = [[tuple(map(float, box)) for label, box in OBJECTS["a"] if label == name] for name in ("ship", "car")]
    asked = {sample.id: (sample.question, sample.boxes, sample.image_size) for sample in benchmark.samples}
    assert asked == {
        "images/a.jpg-car": ("car", tuple(cars), (80, 40)),
        "images/a.jpg-ship": ("ship", tuple(ships), (80, 40)),
        "images/b.jpg-car": ("car", tuple(tuple(map(float, box)) for _, box in OBJECTS["b"]), (80, 40)),
    }
    assert not benchmark.left_out
    prompt = PROTOCOLS["strict"]().prompt(benchmark.samples[1], benchmark)
    assert prompt.startswith("Give the bounding box of every ship as [x_min, ") and "none" in prompt


@pytest.mark.parametrize(("most", "left"), [(1, {"a.jpg": ["car"]}), (2, {"a.jpg": ["car"], "b.jpg": ["car"]})])
def test_classes_with_many_objects_are_left_out_and_counted(most, left, root):
    make_csv(root)
    benchmark = load_benchmark("detection-all", root, max_objects=most)
    found = {}
    for sample in benchmark.samples:
        found.setdefault(sample.images[0], []).append(sample.group)
    assert found == left
    assert benchmark.left_out == {f"questions about more than {most} objects": 3 - sum(map(len, left.values()))}
    chosen = load_benchmark("detection-all", root, max_objects=most, classes=["car"])
    assert chosen.left_out["classes"] == 1 and {sample.group for sample in chosen.samples} == {"car"}


def test_limits_that_leave_nothing(root):
    make_csv(root)
    with pytest.raises(BenchmarkError, match="detection-all: max_objects=0 must be at least 1"):
        load_benchmark("detection-all", root, max_objects=0)
    with pytest.raises(BenchmarkError, match="takes no option max_objects"):
        load_benchmark("detection-counting", root, max_objects=5)
    with pytest.raises(BenchmarkError, match="has no samples"):
        load_benchmark("detection-all", root, max_objects=1, classes=["ship"])


def test_crowded_questions_are_no_full_result(root):
    """A report names them, since figures of other limits are not comparable."""
    make_csv(root)
    summaries = evaluate_majority([load_benchmark("detection-all", root, max_objects=2)])
    summary = parse_summary(summaries["detection-all/all"], root)
    assert "1 questions about more than 2 objects left out" in summary.mode_in_words
