"""Pictures of a run and reliability diagrams."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_benchmarks import MAKERS

from mfrsvlm.evaluation.__main__ import main
from mfrsvlm.evaluation.benchmarks import load_benchmark
from mfrsvlm.evaluation.metrics import load_metric
from mfrsvlm.evaluation.pictures import SIDE, choose, draw_predictions
from mfrsvlm.evaluation.plots import plot_reliability, reliability, wilson


def row(number, score, **fields):
    return {"id": f"q{number}", "score": score, "prompt": "What?", "answer": "this", "references": ["that"]} | fields


@pytest.mark.parametrize(("right", "wrong", "shown"), [(20, 20, (6, 6)), (3, 20, (3, 9)), (20, 1, (11, 1)), (2, 1, (2, 1))])
def test_half_of_the_answers_are_wrong_if_there_are_so_many(right, wrong, shown):
    rows = [row(number, float(number < right)) for number in range(right + wrong)]
    chosen = choose(rows, 12)
    assert tuple(sum(each["score"] == score for each in chosen) for score in (1.0, 0.0)) == shown
    assert len({each["id"] for each in chosen}) == len(chosen)


def test_choice_depends_on_ids_alone():
    rows = [row(number, float(number % 3 > 0)) for number in range(40)]
    again = [one | {"answer": "other"} for one in reversed(rows)]
    assert [one["id"] for one in choose(rows, 10)] == [one["id"] for one in choose(again, 10)]
    assert [one["id"] for one in choose(rows, 10)] != [one["id"] for one in rows[:10]]


def test_boxes_are_where_they_belong():
    benchmark = load_benchmark("scenes", None, "test", count=1)
    image = "test-0000000"
    boxes = {"boxes": [[64.0, 64.0, 128.0, 128.0]], "parsed": [[256.0, 256.0, 384.0, 320.0]]}
    sheet = draw_predictions([row(0, 1.0, images=[image], **boxes)], benchmark)
    pixels, scale = np.asarray(sheet).astype(int), SIDE / 512
    margin = 8
    found = {}
    for name, color in (("true", (255, 255, 255)), ("model", (255, 255, 0))):
        inside = np.abs(pixels[margin : margin + SIDE, margin : margin + SIDE] - color).sum(-1) == 0
        ys, xs = np.nonzero(inside)
        rows, columns = (np.bincount(values, minlength=SIDE) for values in (ys, xs))
        found[name] = [np.argsort(-counts)[:2] for counts in (columns, rows)]  # the two longest lines each way
    for name, (x1, y1, x2, y2) in (("true", boxes["boxes"][0]), ("model", boxes["parsed"][0])):
        assert sorted(found[name][0]) == pytest.approx([x1 * scale, x2 * scale], abs=2)
        assert sorted(found[name][1]) == pytest.approx([y1 * scale, y2 * scale], abs=2)


def test_points_and_lists_that_cannot_be_parsed_are_drawn():
    benchmark = load_benchmark("scenes", None, "test", count=1)
    rows = [
        row(0, 1.0, images=["test-0000000"], boxes=[[64, 64, 128, 128]], parsed=places)
        for places in ([[256, 256]], [], None)
    ]
    pointed, nothing, unclear = (np.asarray(draw_predictions([one], benchmark)) for one in rows)
    assert (pointed != nothing).any() and (nothing == unclear).all()


def test_long_texts_and_several_images_fit():
    benchmark = load_benchmark("scenes", None, "test", count=1)
    images = ["test-0000000", "test-0000001"]
    one = row(0, 0.0, images=images, prompt="Why? " * 200, answer="x" * 5000, references=["y " * 999])
    sheet = draw_predictions([one] * 5, benchmark)
    pixels = np.asarray(sheet)
    assert sheet.height == 2 * draw_predictions([one], benchmark).height
    assert (pixels[-8:] == 255).all() and (pixels[:, -8:] == 255).all()


def test_bins_are_those_of_the_calibration_error():
    rng = np.random.default_rng(0)
    probabilities = [*rng.random(200).tolist(), 0.0, 1.0, 0.5, 0.1]
    truths = (rng.random(len(probabilities)) < np.asarray(probabilities) ** 2).tolist()
    rows = reliability(probabilities, truths)
    error = sum(count * abs(mean - share) for mean, share, _, _, count in rows) / len(probabilities)
    words = ["yes" if truth else "no" for truth in truths]
    metric = load_metric("yes_no_calibration").compute(predictions=probabilities, references=words)
    assert error == pytest.approx(metric["ece"]["value"])
    assert sum(count for *_, count in rows) == len(probabilities)
    assert all(low <= share <= high for _, share, low, high, _ in rows)
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)  # Wilson 1927
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    pytest.importorskip("matplotlib")
    upper, lower = plot_reliability(probabilities, truths, "title").axes
    assert upper.get_title() == "title" and len(lower.patches) == len(rows)


def test_report_draws_pictures_and_calibration(tmp_path, capsys):
    arguments = ["run", "--baseline", "majority", "--benchmark", "scenes", "--limit", "30"]
    assert main([*arguments, "--protocol", "strict-without-java", "--output", str(tmp_path / "run")]) == 0
    folder = tmp_path / "run/scenes/test"
    summary = json.loads((folder / "summary.json").read_text())
    report = ["report", str(tmp_path / "run"), "--output"]
    assert main([*report, str(tmp_path / "majority"), "--pictures", "4"]) == 0
    assert not list((tmp_path / "majority").glob("pictures-*"))  # it saw no image

    # As if a model had answered.
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    asked = [line | ({"yes_probability": 0.75} if line.get("references") in (["yes"], ["no"]) else {}) for line in lines]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    figures = {"ece": {"value": 0.2, "low": 0.1, "high": 0.3, "n": 5}}
    model = {"name": "tiny", "weights": "0" * 16}
    changed = {"mode": "image", "model": model, "results": summary["results"] | {"calibration": figures}}
    (folder / "summary.json").write_text(json.dumps(summary | changed))
    capsys.readouterr()
    assert main([*report, str(tmp_path / "report"), "--pictures", "4"]) == 0, capsys.readouterr().err
    name = "scenes-test-strict-without-java-tiny.png"
    with Image.open(tmp_path / "report" / f"pictures-{name}") as picture:
        assert picture.width == 4 * (SIDE + 8) + 8
    assert (tmp_path / "report" / f"calibration-{name}").is_file()


def test_pictures_of_a_folder_of_links_need_the_same_permission_as_the_run(tmp_path, capsys):
    MAKERS["eurosat"](tmp_path / "real")
    (tmp_path / "links").mkdir()
    for path in (tmp_path / "real").iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    benchmark = ["--benchmark", "eurosat", "--data", str(tmp_path / "links"), "--allow-count-mismatch"]
    run = ["run", "--baseline", "majority", *benchmark, "--output", str(tmp_path / "run"), "--allow-outside-images"]
    assert main(run) == 0, capsys.readouterr().err
    (summary,) = (tmp_path / "run").glob("eurosat/*/summary.json")
    model = {"name": "tiny", "weights": "0" * 16}
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"mode": "image", "model": model}))
    report = ["report", str(tmp_path / "run"), "--output", str(tmp_path / "report"), "--no-plots", "--pictures", "4"]
    report += ["--data", str(tmp_path / "links")]
    assert main(report) == 2 and "--allow-outside-images" in capsys.readouterr().err
    assert main([*report, "--allow-outside-images"]) == 0, capsys.readouterr().err
    assert list((tmp_path / "report").glob("pictures-eurosat-*.png"))


@pytest.mark.parametrize("arguments", [["--pictures", "0", "--output", "here"], ["--pictures", "3"]])
def test_bad_arguments_are_one_line(tmp_path, capsys, arguments):
    assert main(["report", str(tmp_path), *arguments]) == 2
    assert "must be at least 1, and needs --output" in capsys.readouterr().err


def test_damaged_predictions_are_named(tmp_path):
    from mfrsvlm.evaluation.pictures import read_predictions
    from mfrsvlm.evaluation.report import ReportError

    (tmp_path / "predictions.jsonl").write_text('{"id": 1}\n{"id"')
    with pytest.raises(ReportError, match=r"predictions\.jsonl cannot be read.*Repeat the run"):
        read_predictions(tmp_path)
