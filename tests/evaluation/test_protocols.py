"""Every protocol on every benchmark: the true answer is right, an empty one is wrong, and boxes survive their wording."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from PIL import Image
from tiny_benchmarks import MAKERS

from mfrsvlm.evaluation.answering import Answer
from mfrsvlm.evaluation.benchmarks import BENCHMARKS, Benchmark, Sample, load_benchmark
from mfrsvlm.evaluation.benchmarks.sample import LIST_TASKS, METRICS
from mfrsvlm.evaluation.evaluate import score
from mfrsvlm.evaluation.majority import majority_answers
from mfrsvlm.evaluation.protocols import PROTOCOLS, read_angled_boxes, rotated


WITHOUT_JAVA = [name for name, protocol in PROTOCOLS.items() if protocol.captions == "coco_without_java"]
SPLITS = {"vhm-eval": "cls_AID"}
SIDES = st.integers(50, 2000)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    made = {}

    def loaded(name):
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            MAKERS[name](root)
            made[name] = load_benchmark(name, root, SPLITS.get(name), check_counts=False, check_sizes=False)
        return made[name]

    return loaded


def rsvqa(samples):
    return Benchmark("stand-in", "test", None, samples, metrics=BENCHMARKS["rsvqa-lr"].metrics)


def outcome(protocol, benchmark, answers):
    """Scores of answers, without captions, which are no matter of right and wrong."""
    chosen = [i for i, s in enumerate(benchmark.samples) if s.task != "captioning" and protocol.keeps(s, benchmark)]
    samples = [benchmark.samples[index] for index in chosen]
    return score(protocol, benchmark, samples, [Answer(answers[index]) for index in chosen])


@pytest.mark.parametrize("name", [name for name, info in BENCHMARKS.items() if info.tasks != ("captioning",)])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_true_answers_are_right_and_empty_ones_wrong(load, name, protocol):
    protocol, benchmark = PROTOCOLS[protocol](), load(name)
    _, _, scores = outcome(
        protocol, benchmark, [protocol.ideal_answer(s) if s.task != "captioning" else "" for s in benchmark.samples]
    )
    assert scores and set(scores) == {1.0}
    results, parsed, scores = outcome(protocol, benchmark, [""] * len(benchmark.samples))
    assert set(scores) == {0.0} and not any(parsed)
    for figures in results.values():
        for figure in ("accuracy", "exact", "mean_iou"):
            assert figures.get(figure, {"value": 0})["value"] == 0


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_prompts_hold_the_question_and_nothing_of_the_answer(load, name, protocol):
    protocol, benchmark = PROTOCOLS[protocol](), load(name)
    for sample in benchmark.samples:
        prompt = protocol.prompt(sample, benchmark)
        assert sample.question in prompt or sample.task == "captioning"
        if sample.task == "classification" and not benchmark.complete_prompts:
            assert all(label in prompt for label in benchmark.class_names)


def test_the_published_prompts(load):
    """Word for word, as the protocols are known by them."""
    rsvqa, aid, dior, vrsbench = load("rsvqa-lr"), load("aid"), load("dior-rsvg"), load("vrsbench-captions")
    question, expression = rsvqa.samples[0].question, dior.samples[0].question
    said = {name: protocol().prompt(rsvqa.samples[0], rsvqa) for name, protocol in PROTOCOLS.items()}
    assert said["upstream"] == f"Answer the question based on the remote sensing image.\nQuestion: {question}\nAnswer:"
    assert said["geochat"] == f"{question}\nAnswer the question using a single word or phrase."
    assert said["rsevalkit"].startswith(f"{{VQA}} {question}")
    said = {name: protocol().prompt(dior.samples[0], dior) for name, protocol in PROTOCOLS.items()}
    assert said["upstream"] == (
        f"{{VG}} {expression} Answer with bounding box coordinates [x_min, y_min, x_max, y_max] "
        "scaled to 0-1000 (inclusive)."
    )
    assert said["geochat"] == said["vrsbench"] == f"[refer] Give me the location of <p> {expression} </p>"
    assert said["rsevalkit"].startswith(f"{{VG}} Give the bounding box of {expression} ")
    assert PROTOCOLS["rsevalkit"]().prompt(aid.samples[0], aid).startswith("{CLS} ")
    assert (
        PROTOCOLS["geochat"]()
        .prompt(aid.samples[0], aid)
        .endswith("Classify the image from the following classes. Answer in one word or a short phrase.")
    )
    captions = load("rsicd")
    assert PROTOCOLS["upstream"]().prompt(captions.samples[0], captions) == (
        "Please provide a detailed caption for the remote sensing image."
    )
    assert PROTOCOLS["rsevalkit"]().prompt(captions.samples[0], captions).startswith("{IT} ")
    assert PROTOCOLS["vrsbench"]().prompt(vrsbench.samples[0], vrsbench) == "Describe the image in detail."


def test_lengths_thresholds_and_caption_metrics():
    facts = {
        name: (protocol.max_new_tokens, protocol.thresholds, protocol.captions, protocol.vqa_parsing, protocol.class_parsing)
        for name, protocol in PROTOCOLS.items()
    }
    assert facts == {
        "strict": (128, (0.5, 0.7), "coco", "exact", "exact"),
        "strict-without-java": (128, (0.5, 0.7), "coco_without_java", "exact", "exact"),
        "upstream": (64, (0.5, 0.75), "upstream", "exact", "exact"),
        "rsevalkit": (512, (0.5, 0.7), "coco", "contained", "contained"),
        "geochat": (128, (0.5, 0.7), "coco", "without_spaces", "without_spaces"),
        "vrsbench": (128, (0.5, 0.7), "coco", "exact", "exact"),
    }
    for protocol in (make() for make in PROTOCOLS.values()):
        limits = {task: protocol.max_new_tokens_of(task) for task in METRICS}
        longer = max(protocol.max_new_tokens, 256)
        assert limits == {task: longer if task in LIST_TASKS else protocol.max_new_tokens for task in METRICS}
    for name, info in BENCHMARKS.items():
        expected = "test_phili" if name == "rsvqa-hr" else info.default_split
        assert PROTOCOLS["geochat"]().default_split(info) == expected
        assert all(PROTOCOLS[other]().default_split(info) == info.default_split for other in PROTOCOLS if other != "geochat")


def test_a_protocol_without_java_says_so_before_it_asks(load, monkeypatch):
    monkeypatch.setenv("PATH", "")
    captions, questions = load("rsicd").samples, load("rsvqa-lr").samples
    for protocol in PROTOCOLS.values():
        protocol().check(questions)
        if protocol.captions == "coco":
            with pytest.raises(OSError, match=r"Java.*strict-without-java"):
                protocol().check(captions)
        else:
            protocol().check(captions)


def test_geochat_asks_neither_counts_nor_areas(load):
    protocol = PROTOCOLS["geochat"]()
    asked = [s.group for name in ("rsvqa-lr", "rsvqa-hr") for s in load(name).samples if protocol.keeps(s, load(name))]
    assert asked and not {"count", "area"} & set(asked)
    scenes = load("scenes")  # whose "area" is whether it is rural or urban
    assert all(protocol.keeps(sample, scenes) for sample in scenes.samples)


@settings(max_examples=200, deadline=None)
@given(width=SIDES, height=SIDES, corners=st.tuples(*[st.floats(0, 1)] * 4), name=st.sampled_from(sorted(PROTOCOLS)))
def test_boxes_survive_their_wording(width, height, corners, name):
    """On images that are not square above all: half a thousandth of a side is what rounding may cost."""
    x1, x2 = sorted((corners[0] * width, corners[1] * width))
    y1, y2 = sorted((corners[2] * height, corners[3] * height))
    protocol = PROTOCOLS[name]()
    [box] = protocol.read_boxes(protocol.write_box((x1, y1, x2, y2), (width, height)), (width, height))
    assert box == pytest.approx((x1, y1, x2, y2), abs=0.00051 * max(width, height))


@settings(max_examples=100, deadline=None)
@given(width=SIDES, height=SIDES, corners=st.tuples(*[st.floats(0, 1)] * 4), name=st.sampled_from(sorted(PROTOCOLS)))
def test_points_survive_their_wording(width, height, corners, name):
    box = tuple(value * side for value, side in zip(corners, (width, height) * 2, strict=True))
    protocol, center = PROTOCOLS[name](), ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    [point] = protocol.read_points(protocol.write_point(box, (width, height)), (width, height))
    assert point == pytest.approx(center, abs=0.0001 * max(width, height))
    x1, y1, x2, y2 = box
    assert protocol.write_point((x1, y1, x2, y1, x2, y2, x1, y2), (width, height)) == protocol.write_point(
        box, (width, height)
    )


def asked_for(task, boxes=()):
    """A benchmark with one sample of a task with boxes, in an image of 200 x 100 pixels."""
    sample = Sample("1", ("a",), task, "ship", (), boxes=boxes, image_size=(200, 100))
    return sample, Benchmark("stand-in", "test", None, [sample])


def test_prompts_for_lists():
    sample, benchmark = asked_for("detection")
    said = {name: protocol().prompt(sample, benchmark) for name, protocol in PROTOCOLS.items()}
    box = "Give the bounding box of every ship as [x_min, y_min, x_max, y_max], each number scaled to 0-1000."
    none = "If there is none, answer none."
    assert said["strict"] == f"{box} {none}" and said["rsevalkit"] == f"{{VG}} {box} {none}"
    assert said["upstream"].startswith("{VG} every ship Answer with") and said["upstream"].endswith(f"(inclusive). {none}")
    assert said["geochat"] == said["vrsbench"] == f"[refer] Give me the location of <p> every ship </p> {none}"
    sample, benchmark = asked_for("pointing")
    for name, protocol in PROTOCOLS.items():
        tag = "{VG} " if name == "rsevalkit" else ""
        expected = f"{tag}Point to every ship as [x, y], each number scaled to 0-1000. {none}"
        assert protocol().prompt(sample, benchmark) == expected


BOXES = ((20.0, 10.0, 60.0, 40.0), (100.0, 50.0, 200.0, 100.0))
WRITTEN = {"detection": "[100, 100, 300, 400], [500, 500, 1000, 1000]", "pointing": "[200, 250], [750, 750]"}


@pytest.mark.parametrize("task", LIST_TASKS)
@pytest.mark.parametrize(
    ("answer", "places", "empty", "full"),
    [
        ("none", 0, 1, 0), ("None.", 0, 1, 0), (" NONE\n", 0, 1, 0),
        ("", None, 0, 0), (" . ", None, 0, 0), ("There is none.", None, 0, 0), ("0", None, 0, 0), ("[]", None, 0, 0),
        ("[100, 100, 300]", None, 0, 0), ("none [1, 2, 3, 4, 5]", None, 0, 0),
        ("{both}", 2, 0, 1), ("The ships: [{both}]", 2, 0, 1), ("{both}, [5, 6, 7", 2, 0, 1), ("none {both}", 2, 0, 1),
        ("{both}, {both}", 4, 0, 2 / 3), ("{both}, [1001, 1, 1001, 1]", 2, 0, 1),
    ],
)  # fmt: skip
def test_answers_that_are_lists(task, answer, places, empty, full):
    """An answer without a list is never right, also if there is nothing to list: it has to say so."""
    protocol = PROTOCOLS["strict"]()
    text = answer.format(both=WRITTEN[task])
    for boxes, expected in (((), empty), (BOXES, full)):
        sample, benchmark = asked_for(task, boxes)
        figures, [parsed], [found] = protocol.score(benchmark, task, [sample], [text])
        assert (None if parsed is None else len(parsed)) == places and found == pytest.approx(expected)
        assert figures["exact_count"]["value"] == (places == len(boxes))


@pytest.mark.parametrize("task", LIST_TASKS)
@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_task_of_a_list_is_scored_by_every_protocol(name, task):
    protocol = PROTOCOLS[name]()
    for boxes in ((), BOXES, (rotated(BOXES[0], 30),) if name == "geochat" else BOXES[:1]):
        sample, benchmark = asked_for(task, boxes)
        assert protocol.score(benchmark, task, [sample], [protocol.ideal_answer(sample)])[2] == [1.0]
        results, _, scores = score(protocol, benchmark, [sample], [Answer("")])
        assert scores == [0.0] and set(results) == {task}


def test_points_in_shares_of_the_sides_are_noticed(caplog):
    sample, benchmark = asked_for("pointing", BOXES)
    protocol = PROTOCOLS["geochat"]()  # whose boxes have another scale
    protocol.score(benchmark, "pointing", [sample], ["[0.2, 0.25]"])
    assert (
        "No number of the 1 points in the answers is above 1. Protocol geochat asks for points scaled to 0-1000"
        in caplog.text
    )
    caplog.clear()
    protocol.score(benchmark, "pointing", [sample], [WRITTEN["pointing"]])
    assert not caplog.text


def test_boxes_of_rsevalkit_are_over_the_sides_of_the_image():
    """As its script scales them, though the model sees a square; but width by width, which it swaps with the height."""
    protocol = PROTOCOLS["rsevalkit"]()
    assert protocol.read_boxes("[0, 0, 1000, 500]", (100, 50)) == [pytest.approx((0, 0, 100, 25))]


def test_images_of_rsevalkit_are_padded_to_a_square():
    square = PROTOCOLS["rsevalkit"]().prepare_image(Image.new("RGB", (100, 50), (255, 0, 0)))
    assert square.size == (100, 100)
    assert [square.getpixel((50, y)) for y in (24, 25, 74, 75)] == [
        (122, 116, 104), (255, 0, 0), (255, 0, 0), (122, 116, 104)
    ]  # fmt: skip


TAGS = {
    "cls_AID": "{CLS}",
    "RSVQA_LR-rural_urban_RSVQA": "{VQA}",
    "VG_DOIR_RSVG_test": "{VG}",
    "abspos_dota-test_mc": "{IDK}",
    "counting_dota-test_open": "{IT}",
}


@pytest.mark.parametrize("split", TAGS)
def test_tags_of_rsevalkit(split, load):
    benchmark = load_benchmark("vhm-eval", load("vhm-eval").root, split)
    for sample in benchmark.samples:
        assert PROTOCOLS["rsevalkit"]().prompt(sample, benchmark) == f"{TAGS[split]} {sample.question}"


def test_angled_boxes():
    [upright] = read_angled_boxes("It is {<10><20><30><40>}.", (200, 100))
    assert upright == (20, 20, 60, 40)
    [square] = read_angled_boxes("{<40><40><60><60>|<90>}", (100, 100))
    assert sorted(zip(square[::2], square[1::2], strict=True)) == [
        pytest.approx(c) for c in ((40, 40), (40, 60), (60, 40), (60, 60))
    ]
    # Clockwise on the image: the upper left corner of a wide box goes up and to the right.
    assert rotated((0, 40, 100, 60), 90)[:2] == pytest.approx((60, 0))
    assert read_angled_boxes("{<10><20><30>} {<a><1><2><3>} {<1><2><3><101>} <1><2><3><4>", (100, 100)) == []


@settings(max_examples=100, deadline=None)
@given(angle=st.floats(-89, 89), width=st.floats(5, 40), height=st.floats(5, 40))
def test_oriented_boxes_survive_their_wording(angle, width, height):
    corners = rotated((50 - width / 2, 50 - height / 2, 50 + width / 2, 50 + height / 2), angle)
    protocol = PROTOCOLS["geochat"]()
    [box] = protocol.read_boxes(protocol.write_box(corners, (100, 100)), (100, 100))
    if len(box) == 8:
        assert box == pytest.approx(corners, abs=0.2)
    else:  # rounded to no angle at all
        assert abs(angle) <= 0.05


def test_chance_is_the_most_frequent_answer_of_each_template(load):
    benchmark = load("scenes")
    protocol = PROTOCOLS["strict-without-java"]()
    said = majority_answers(benchmark, benchmark.samples, protocol)
    by_template = {}
    for sample, guess in zip(benchmark.samples, said, strict=True):
        if sample.task in LIST_TASKS:
            assert guess == "none"
        elif sample.task not in ("grounding", "captioning"):
            by_template.setdefault((sample.task, sample.template), []).append((sample.references[0], guess))
    for pairs in by_template.values():
        answers, guessed = zip(*pairs, strict=True)
        assert len(set(guessed)) == 1
        assert answers.count(guessed[0]) == max(answers.count(answer) for answer in answers)
    boxes = [
        protocol.read_boxes(g, s.image_size) for s, g in zip(benchmark.samples, said, strict=True) if s.task == "grounding"
    ]
    assert boxes and all(len(found) == 1 for found in boxes)


def test_chance_counts_answers_that_are_read_alike_together():
    """0 is the most frequent count, but more counts are of the class from 1 to 10, which is what is compared."""
    counts = [0, 0, 0, 3, 3, 5, 7, 8]
    samples = [Sample(str(i), ("a",), "vqa", "How many?", (str(n),), "count") for i, n in enumerate(counts)]
    benchmark, protocol = rsvqa(samples), PROTOCOLS["strict"]()
    said = majority_answers(benchmark, samples, protocol)
    assert set(said) == {"3"}
    assert sum(score(protocol, benchmark, samples, [Answer(text) for text in said])[2]) == 5


@pytest.mark.parametrize(
    ("reference", "answer", "right"),
    [
        ("B", "B. forest", 1), ("(B)", "b", 1), ("B. forest", "B", 1), ("B", "A forest, B", 0),
        ("A forest", "A", 0), ("A forest", "a forest.", 1), ("Beach", "B", 0),
    ],
)  # fmt: skip
def test_letters_are_read_only_where_letters_are_asked_for(reference, answer, right):
    benchmark = Benchmark("vhm-eval", "a list", None, [Sample("1", ("a",), "vqa", "Which?", (reference,), "which")])
    for name in ("strict", "rsevalkit") if reference[1:2] not in (" ", "e") else ("strict",):
        assert score(PROTOCOLS[name](), benchmark, benchmark.samples, [Answer(answer)])[2] == [right]


def test_calibration_counts_a_missing_image_as_not_knowing():
    samples = [Sample(str(i), ("a",), "vqa", "Is it?", (text,), "presence") for i, text in enumerate(("yes", "no", "Yes"))]
    samples.append(Sample("3", ("a",), "vqa", "What?", ("urban",), "rural_urban"))
    benchmark, protocol = rsvqa(samples), PROTOCOLS["strict"]()
    answers = [Answer("yes", 0.9), Answer("no", 0.2), Answer(""), Answer("yes", 0.9)]
    figures = score(protocol, benchmark, samples, answers)[0]["calibration"]
    assert {name: (round(figure["value"], 6), figure["n"]) for name, figure in figures.items()} == {
        "ece": (pytest.approx((0.1 + 0.2 + 0.5) / 3, abs=1e-6), 3),
        "brier": (pytest.approx((0.01 + 0.04 + 0.25) / 3, abs=1e-6), 3),
        "accuracy": (pytest.approx(2 / 3, abs=1e-6), 3),
    }
    unknown = [Answer(answer.text) for answer in answers]  # a tokenizer that begins yes and no alike
    assert "calibration" not in score(protocol, benchmark, samples, unknown)[0]
