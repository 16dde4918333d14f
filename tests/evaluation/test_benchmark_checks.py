"""What loaders check beyond rows and counts: sizes of images, scales of boxes, classes, broken rows, odd files."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from PIL import Image
from tiny_benchmarks import COUNTS, MAKERS, edit_json, write_image, write_json

from mfrsvlm.evaluation import benchmarks
from mfrsvlm.evaluation.benchmarks import BENCHMARKS, Benchmark, BenchmarkError, Sample, load_benchmark, registry
from mfrsvlm.evaluation.benchmarks.reading import check_boxes, inside
from mfrsvlm.evaluation.benchmarks.vhm_eval import LISTS
from mfrsvlm.evaluation.protocols import PROTOCOLS


PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path


def load(name, root, split=None, **options):
    return load_benchmark(name, root, split, check_counts=False, **options)


def resize(root, size):
    for path in root.rglob("*"):
        if path.suffix in (".jpg", ".tif", ".png"):
            Image.open(path).resize(size).save(path)


# Adding a benchmark


def test_the_page_says_how_to_add_a_benchmark(root, monkeypatch):
    """The file of the page is written as it stands there, found, and loaded."""
    section = PAGE.read_text().split("## Add a benchmark")[1].split("\n## ")[0]
    name, text = re.search(r"`evaluation/benchmarks/(\w+)\.py`.*?```python\n(.*?)```", section, re.S).groups()
    assert len(text.strip().split("\n")) <= 12
    (root / f"{name}.py").write_text(text)
    monkeypatch.setattr(benchmarks, "__path__", [*benchmarks.__path__, str(root)])
    found = registry.find_benchmarks(benchmarks.__path__)
    assert found.keys() == {*BENCHMARKS, name.replace("_", "-")}
    info = found[name.replace("_", "-")]
    monkeypatch.setitem(BENCHMARKS, name.replace("_", "-"), info)
    for label in info.loader.__self__.classes:
        write_image(root / "data" / label.title().replace(" ", "") / "1.png", info.image_size or (8, 8))
    benchmark = load(name.replace("_", "-"), root / "data")
    assert {sample.references[0] for sample in benchmark.samples} == set(info.loader.__self__.classes)
    protocol = PROTOCOLS["strict"]()
    answers = [protocol.ideal_answer(sample) for sample in benchmark.samples]
    assert set(protocol.score(benchmark, info.tasks[0], benchmark.samples, answers)[2]) == {1.0}


def test_no_protocol_names_a_benchmark():
    import mfrsvlm.evaluation.protocols as module

    text = Path(module.__file__).read_text()
    assert "benchmark.name" not in text and "benchmark.split" not in text
    assert not [name for name in BENCHMARKS if re.search(rf"[\"']{name}[\"']", text)]


# The ideal answer


def splits():
    for name in MAKERS:
        listed = [
            "cls_AID",
            "RSVQA_LR-rural_urban_RSVQA",
            "VG_DOIR_RSVG_test",
            "counting_dota-test_open",
            "abspos_dota-test_mc",
        ]
        for split in listed if name == "vhm-eval" else [None]:
            yield name, split


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    made = {}
    for name, split in splits():
        folder = tmp_path_factory.getbasetemp() / f"ideal-{name}"
        if not folder.exists():
            folder.mkdir()
            MAKERS[name](folder)
        made[name, split] = load(name, folder, split, check_sizes=not name.startswith("vrsbench"))
    return made


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_ideal_answer_to_every_sample_is_right(protocol, stand_ins):
    protocol = PROTOCOLS[protocol]()
    for benchmark in stand_ins.values():
        for task in {sample.task for sample in benchmark.samples} - {"captioning"}:
            samples = [sample for sample in benchmark.samples if sample.task == task and protocol.keeps(sample, benchmark)]
            if samples:
                scores = protocol.score(benchmark, task, samples, [protocol.ideal_answer(sample) for sample in samples])[2]
                assert set(scores) == {1.0}, (benchmark.name, benchmark.split, task)


def test_captions_of_scenes_have_their_facts_beside_the_shared_words(stand_ins):
    protocol, benchmark = PROTOCOLS["strict-without-java"](), stand_ins["scenes", None]
    samples = [sample for sample in benchmark.samples if sample.task == "captioning"]
    figures, _, scores = protocol.score(benchmark, "captioning", samples, [sample.references[0] for sample in samples])
    assert figures["caption_facts"]["value"] == figures["caption_exact"]["value"] == figures["rouge_l"]["value"] == 1
    assert {"cider", "bleu_4"} <= figures.keys() and set(scores) == {1.0}
    figures, _, _ = protocol.score(benchmark, "captioning", samples, [""] * len(samples))
    assert figures["caption_facts"]["value"] == figures["caption_exact"]["value"] == 0


SIDE = st.integers(40, 1500)


@settings(max_examples=40, deadline=None)
@given(
    width=SIDE, height=SIDE, corners=st.tuples(*[st.floats(-0.009, 1.009)] * 4), protocol=st.sampled_from(list(PROTOCOLS))
)
def test_a_box_that_loads_can_be_answered(width, height, corners, protocol):
    """Boxes of more than a hundredth of each side, near the edge above all: written, read and compared, each is found."""
    (x1, x2), (y1, y2) = sorted((corners[0], corners[1])), sorted((corners[2], corners[3]))
    box = inside((x1 * width, y1 * height, x2 * width, y2 * height), (width, height), Path("a"), 1) if (
        x2 - x1 > 0.02 and y2 - y1 > 0.02
    ) else (0.0, 0.0, float(width), float(height))  # fmt: skip
    sample = Sample("1", ("a",), "grounding", "x", (), boxes=(box,), image_size=(width, height))
    benchmark, protocol = Benchmark("stand-in", "test", None, [sample]), PROTOCOLS[protocol]()
    assert protocol.score(benchmark, "grounding", [sample], [protocol.ideal_answer(sample)])[2] == [1.0]


# Sizes of images


def test_images_of_another_size_than_published_are_rejected(root):
    MAKERS["aid"](root)
    resize(root, (150, 150))
    message = r"60 of 60 images .* the published size of 600 x 600 pixels: Airport/Airport_1\.jpg with 150 x 150, "
    with pytest.raises(BenchmarkError, match=message):
        load("aid", root)
    assert len(load("aid", root, check_sizes=False).samples) == len(load("aid", root, check_images=False).samples) == 60
    write_image(root / "Airport" / "Airport_1.jpg", (600, 600))
    with pytest.raises(BenchmarkError, match="59 of 60 images"):
        load("aid", root)


@pytest.mark.parametrize("name", [name for name, info in BENCHMARKS.items() if info.image_size])
def test_every_fixed_size_is_checked(name, root):
    MAKERS[name](root)
    width, height = BENCHMARKS[name].image_size
    resize(root, (width + BENCHMARKS[name].size_tolerance, height))
    load(name, root)
    resize(root, (width, height + 100))
    with pytest.raises(BenchmarkError, match=f"the published size of {width} x {height}"):
        load(name, root)


def test_an_image_on_its_side_has_the_size_that_it_is_seen_with(root, monkeypatch):
    MAKERS["aid"](root)
    monkeypatch.setitem(BENCHMARKS, "aid", replace(BENCHMARKS["aid"], image_size=(40, 80)))
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in root.rglob("*.jpg"):
        Image.new("RGB", (80, 40)).save(path, exif=exif)
    benchmark = load("aid", root)
    assert benchmark.read_image(benchmark.samples[0].images[0]).size == (40, 80)


def test_an_image_that_was_resized_after_it_was_annotated(root):
    MAKERS["dior-rsvg"](root)
    write_image(root / "JPEGImages" / "00002.jpg", (40, 20))
    with pytest.raises(BenchmarkError, match=r"1 of 2 images .*00002\.jpg has 40 x 20, not 80 x 40"):
        load("dior-rsvg", root)
    assert len(load("dior-rsvg", root, check_sizes=False).samples) == 2


# Scales of boxes


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ("[100, 200, 950, 999]", r"row 0: box .* 80 pixels wide and 40 high\. Its numbers fit a scale of 0 to 1000 over"),
        ("[10, 20, 95, 99]", "Its numbers fit a scale of 0 to 100 over the sides"),
        ("[10, 20, 1500, 999]", "It fits an image of at least 1500 x 999 pixels"),
        ("[-30, 20, 60, 30]", "Negative numbers are no pixels"),
        ("[80, 2, 81, 8]", "lies outside of its image"),
        ("[0.125, 0.05, 0.75, 0.2]", "no number of the 2 boxes is above 1, .* of sample 0, .* scaled to 0-1"),
    ],
)
def test_a_box_on_another_scale_is_rejected_with_its_row_and_likely_scale(box, message, root):
    MAKERS["vhm-eval"](root)

    def change(rows):
        rows[0]["conversations"][1]["value"] = box
        rows[1]["conversations"][1]["value"] = "[0.1, 0.2, 0.3, 0.4]" if "0.125" in box else "[10, 2, 60, 8]"

    edit_json(root / "VG_DOIR_RSVG_test.json", change)
    with pytest.raises(BenchmarkError, match=message):
        load("vhm-eval", root, "VG_DOIR_RSVG_test")


def test_hundredths_are_noticed_where_many_boxes_are_in_one_corner():
    def samples(n, scale):
        boxes = [(10 + i, 5 + i, 20 + i, 30 + i) for i in range(n)]
        pixels = [tuple(value * scale for value in box) for box in boxes]
        return [
            Sample(str(i), ("a",), "grounding", "x", (), boxes=(box,), image_size=(800, 800)) for i, box in enumerate(pixels)
        ]

    check_boxes("stand-in", samples(60, 8))
    check_boxes("stand-in", samples(10, 1))  # too few to tell
    with pytest.raises(BenchmarkError, match="no number of the 60 boxes is above 100"):
        check_boxes("stand-in", samples(60, 1))


def test_no_loader_can_let_a_box_through_that_leaves_its_image(root, monkeypatch):
    sample = Sample("7", ("a.png",), "grounding", "x", (), boxes=((0, 0, 90, 10),), image_size=(80, 40))
    info = replace(
        BENCHMARKS["rsvg-hr"], loader=lambda name, root, split, check_counts: Benchmark(name, split, root, [sample])
    )
    monkeypatch.setitem(BENCHMARKS, "rsvg-hr", info)
    with pytest.raises(BenchmarkError, match="rsvg-hr, row of sample 7: box"):
        load("rsvg-hr", root)


def test_answers_with_shares_of_the_sides_are_noticed(stand_ins, caplog):
    benchmark = stand_ins["dior-rsvg", None]
    for name, form, scale in (("strict", "[0.1, 0.2, 0.5, 0.9]", 1000), ("vrsbench", "{<0.1><0.2><0.5><0.9>}", 100)):
        caplog.clear()
        protocol = PROTOCOLS[name]()
        protocol.score(benchmark, "grounding", benchmark.samples, [form, "nothing"])
        assert (
            f"No number of the 1 boxes in the answers is above 1. Protocol {name} asks for boxes scaled to 0-{scale}"
            in caplog.text
        )
        caplog.clear()
        protocol.score(benchmark, "grounding", benchmark.samples, [form, protocol.ideal_answer(benchmark.samples[1])])
        protocol.score(benchmark, "grounding", benchmark.samples, ["", "nothing"])
        assert not caplog.text


# Classes


def test_a_subset_of_classes(root):
    MAKERS["aid"](root)
    benchmark = load_benchmark("aid", root, classes=["beach", "airport"])  # no number is published for these
    assert benchmark.class_names == ["airport", "beach"] and len(benchmark.samples) == 4
    assert {sample.references[0] for sample in benchmark.samples} == {"airport", "beach"}
    assert benchmark.left_out == {"classes": 28}
    assert "bridge" not in PROTOCOLS["strict"]().prompt(benchmark.samples[0], benchmark)
    for folder in root.iterdir():
        if folder.name not in ("Airport", "Beach"):
            shutil.rmtree(folder)
    assert load_benchmark("aid", root, classes=["beach", "airport"]).samples == benchmark.samples
    with pytest.raises(BenchmarkError, match="no images of bare land"):
        load("aid", root)


@pytest.mark.parametrize("classes", [["volcano"], [], "beach"])
def test_classes_that_are_none(classes, root):
    MAKERS["aid"](root)
    with pytest.raises(BenchmarkError, match=r"aid .*pass a list of some of airport, bare land"):
        load("aid", root, classes=classes)


def test_a_subset_of_labels(root):
    MAKERS["ucm-multilabel"](root)
    benchmark = load("ucm-multilabel", root, classes=["cars", "sea"])
    assert [(s.id, s.references, s.question) for s in benchmark.samples[:2]] == [
        ("beach00-cars", ("yes",), "Does this image show cars?"),
        ("beach00-sea", ("yes",), "Does this image show the sea?"),
    ]
    assert benchmark.left_out == {"classes": 15}


def test_an_option_that_a_benchmark_does_not_take(root):
    MAKERS["rsvqa-lr"](root)
    with pytest.raises(BenchmarkError, match="rsvqa-lr takes no option classes; it takes none"):
        load("rsvqa-lr", root, classes=["urban"])
    with pytest.raises(BenchmarkError, match="scenes takes no option clases; it takes count"):
        load_benchmark("scenes", None, clases=["harbor"])


# Broken rows


def test_rows_of_rsivqa(root):
    MAKERS["rsivqa-ucm"](root)
    samples = load("rsivqa-ucm", root).samples
    assert [(s.group, s.references[0], s.question) for s in samples[:4]] == [
        ("theme", "harbor", "what is the theme of this picture?"),
        ("presence", "yes", "does this picture contain ship?"),
        ("count", "12", "how many ships are there in this picture?"),
        ("location", "top left", "What is the location of the ships in this picture?"),
    ]
    assert samples[0].images == ("images/1.tif",) and samples[4].id == "ucm_res-5"


def test_rows_with_a_missing_word_are_rejected_unless_the_user_leaves_them_out(root, monkeypatch):
    MAKERS["rsivqa-ucm"](root)
    path = root / "UCM" / "ucm_res.txt"
    path.write_text(
        path.read_text() + "2.tif:How many  in the picture?zero\n2.tif:What is the location of the  in this picture?left\n"
    )
    message = r"ucm_res\.txt: 2 of 7 rows have a missing word: row 6 .2\.tif:How many  in.*row 7 .*broken_rows='skip'"
    with pytest.raises(BenchmarkError, match=message):
        load("rsivqa-ucm", root)
    benchmark = load("rsivqa-ucm", root, broken_rows="skip")
    assert len(benchmark.samples) == 5 and benchmark.left_out == {"rows with a missing word": 2}
    monkeypatch.setitem(BENCHMARKS, "rsivqa-ucm", replace(BENCHMARKS["rsivqa-ucm"], splits={"all": 7}))
    assert len(load_benchmark("rsivqa-ucm", root, broken_rows="skip").samples) == 5  # those left out are counted
    with pytest.raises(BenchmarkError, match="broken_rows='drop' must be 'error' or 'skip'"):
        load("rsivqa-ucm", root, broken_rows="drop")


@pytest.mark.parametrize(
    "line", ["1.tif What is the theme of this picture?beach", "1.tif:what?x", ":how many?3", "1.tif:how many?"]
)
def test_rows_of_rsivqa_that_are_none(line, root):
    MAKERS["rsivqa-dota"](root)
    path = root / "DOTA" / "dota_val_vqa2.txt"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(BenchmarkError, match=r"dota_val_vqa2\.txt, row 6: .* is not IMAGE:QUESTION\?ANSWER"):
        load("rsivqa-dota", root)


def test_a_box_with_a_comma_in_a_number(root):
    MAKERS["rsvg-hr"](root)
    path = root / "rsvg_hr_test.txt"
    path.write_text(path.read_text() + "b.jpg,170.0,774.0,216,00,803.21,find a pool\n")
    with pytest.raises(BenchmarkError, match=r"1 of 3 rows have a box out of order: row 3 'b\.jpg,170"):
        load("rsvg-hr", root)
    benchmark = load("rsvg-hr", root, broken_rows="skip")
    assert benchmark.left_out == {"rows with a box out of order": 1}
    assert [sample.question for sample in benchmark.samples] == ["a ship, on the left", "find a pool"]
    assert benchmark.samples[1].boxes == ((408.0, 772.0, 1024.0, 800.49),)  # cut at the edge


def test_a_table_of_labels_that_is_wrong(root):
    MAKERS["ucm-multilabel"](root)
    path = root / "LandUse_Multilabeled.txt"
    whole = path.read_text()
    path.write_text(whole.replace("beach00\t1", "beach00\t2"))
    with pytest.raises(BenchmarkError, match=r"row 2: .*beach00.* is not a name and 17 times 0 or 1"):
        load("ucm-multilabel", root)
    path.write_text(whole.replace("airplane", "helicopter"))
    with pytest.raises(BenchmarkError, match=r"its header has the labels \['helicopter'"):
        load("ucm-multilabel", root)


# Captions in text files


def make_precomp(root, repeated, folder="rsicd_precomp"):
    captions = [f"Caption {n} of image {i}." for i in range(3) for n in range(5)]
    names = [f"airport_{i}.jpg" for i in range(3) for _ in range(5 if repeated else 1)]
    for split in ("train", "test"):
        (root / folder).mkdir(exist_ok=True)
        (root / folder / f"{split}_caps.txt").write_text("\n".join(captions) + "\n")
        (root / folder / f"{split}_filename.txt").write_text("\n".join(names) + "\n")
    for name in names:
        write_image(root / "RSICD_images" / name, (224, 224))


@pytest.mark.parametrize("repeated", [True, False])
@pytest.mark.parametrize("folder", ["rsicd_precomp", ""])
def test_captions_in_text_files(repeated, folder, root):
    make_precomp(root, repeated, folder)
    for split in ("test", "trainval"):
        samples = load("rsicd", root, split).samples
        assert [(sample.id, sample.images, len(sample.references)) for sample in samples] == [
            (f"airport_{i}.jpg", (f"RSICD_images/airport_{i}.jpg",), 5) for i in range(3)
        ]
        assert samples[2].references[4] == "Caption 4 of image 2."
    with pytest.raises(BenchmarkError, match="have the splits trainval, test, not 'train'"):
        load("rsicd", root, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, n: (c[:-1], n), "14 captions and .* 3 names of 3 images"),
        (lambda c, n: (c, [*n, n[0]]), "4 names of 3 images"),
        (lambda c, n: (c, [n[i % 3] for i in range(15)]), "are not consecutive"),
        (lambda c, n: (["", *c[1:]], n), None),
    ],
)
def test_text_files_that_do_not_fit(change, message, root, caplog):
    make_precomp(root, repeated=False)
    paths = [root / "rsicd_precomp" / f"test_{kind}.txt" for kind in ("caps", "filename")]
    lines = change(*(path.read_text().strip().split("\n") for path in paths))
    for path, content in zip(paths, lines, strict=True):
        path.write_text("\n".join(content) + "\n")
    if message:
        with pytest.raises(BenchmarkError, match=message):
            load("rsicd", root)
    else:  # a blank line is a caption, so that the others keep their images
        samples = load("rsicd", root).samples
        assert [len(sample.references) for sample in samples] == [4, 5, 5] and "1 of 5 captions" in caplog.text


def test_both_splits_of_training_in_one(root):
    MAKERS["rsicd"](root)
    edit_json(root / "dataset_rsicd.json", lambda content: content["images"][1].update(split="val"))
    assert [len(load("rsicd", root, split).samples) for split in ("train", "val", "trainval", "test")] == [1, 1, 2, 1]


# Odd files


def test_marks_line_ends_and_what_systems_leave_behind(root):
    """The same samples, after Windows edited the text and a Mac packed the folders."""
    for name in ("rsvqa-lr", "dior-rsvg", "eurosat", "rsivqa-sydney", "vrsbench-vqa", "scenes", "ucm-multilabel"):
        folder = root / name
        folder.mkdir()
        MAKERS[name](folder)
        (folder / "own.txt").write_text("Forest/Forest_1.jpg\nForest/Forest_2.jpg\n") if name == "eurosat" else None
        split = "own" if name == "eurosat" else None
        before = load(name, folder, split, check_sizes=name != "vrsbench-vqa").samples
        for path in [path for path in folder.rglob("*") if path.is_file()]:
            if path.suffix in (".txt", ".json", ".jsonl"):
                path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
            (path.parent / f"._{path.name}").write_bytes(b"\0\5\26\7")
        (folder / "__MACOSX").mkdir()
        (folder / "__MACOSX" / "._1.jpg").write_bytes(b"\0\5\26\7")
        assert load(name, folder, split, check_sizes=name != "vrsbench-vqa").samples == before, name


def test_suffixes_in_capitals(root):
    MAKERS["aid"](root)
    for path in root.rglob("*.jpg"):
        path.rename(path.with_suffix(".JPG"))
    assert len(load("aid", root).samples) == COUNTS["aid"]


def test_utf_16_is_named(root):
    MAKERS["vhm-eval"](root)
    path = root / "cls_AID.json"
    path.write_bytes(path.read_text().encode("utf-16"))
    with pytest.raises(BenchmarkError, match=r"cls_AID\.json is UTF-16, not UTF-8"):
        load("vhm-eval", root, "cls_AID")


def test_a_long_value_is_shortened(root):
    write_json(root / "cls_AID.json", [{"image": "a.png", "image_path": ["x" * 300000]}])
    with pytest.raises(BenchmarkError) as error:
        load("vhm-eval", root, "cls_AID")
    assert len(str(error.value)) < 600


def test_the_tags_of_lists_are_those_of_rsevalkit():
    """`{IDK}` where the thing asked for may be absent; no list but those of questions has a tag that is not its task's."""
    tagged = {name: tag for name, (task, _, tag) in LISTS.items() if tag}
    assert set(tagged.values()) == {"{IDK}", "{IT}"} and all(LISTS[name][0] == "vqa" for name in tagged)
    assert [name for name, (task, _, tag) in LISTS.items() if task == "vqa" and not tag] == [
        name for name in LISTS if name.startswith("RSVQA")
    ]


def test_rows_of_scenes_that_are_no_json(root):
    MAKERS["scenes"](root)
    path = root / "test.jsonl"
    lines = path.read_text().strip().split("\n")
    path.write_text("\n".join([lines[0], lines[1][:40], *lines[2:]]))
    with pytest.raises(BenchmarkError, match=r"test\.jsonl, row 2 is not JSON"):
        load("scenes", root)
    row = json.loads(lines[0]) | {"boxes": [[0, 0, 999, 999]]}
    path.write_text(json.dumps(row))
    with pytest.raises(
        BenchmarkError, match=r"row 1: box .* 128 pixels wide and 128 high. Its numbers fit a scale of 0 to 1000"
    ):
        load("scenes", root)
