"""The report: all numbers as measured, no part of a split as a result, no published row without its source."""

import csv
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import EvalResult, ModelCard
from PIL import Image

from mfrsvlm.configuration_mfrsvlm import MFRSVLMConfig
from mfrsvlm.evaluation.__main__ import main
from mfrsvlm.evaluation.answering import fingerprint, load
from mfrsvlm.evaluation.plots import plot_shares, write_plots
from mfrsvlm.evaluation.report import (
    PUBLISHED,
    ReportError,
    as_latex,
    as_markdown,
    make_tables,
    read_published,
    read_summaries,
    write_report,
)
from mfrsvlm.model_card.card import write_model_card
from mfrsvlm.model_card.results import CardError, update_card


def figure(value, low=None, high=None, n=200):
    return {
        "value": value,
        "low": max(0, value - 0.05) if low is None else low,
        "high": value + 0.05 if high is None else high,
        "n": n,
    }


VQA = {
    "accuracy": figure(0.9123, 0.8987, 0.9241),
    "per_type": {"presence": figure(0.8, n=120), "comparison": figure(0.7, n=80)},
}
CLASSES = {f"class {index}": figure(0.5, n=7) for index in range(30)}
PUBLISHED_ROW = {
    "model": "Other_7B",
    "benchmark": "rsvqa-lr",
    "split": "test",
    "task": "vqa",
    "figures": {"accuracy": 0.907, "per_type": {"presence": 0.9109}},
    "source": {"title": "Other & others", "place": "Table 6", "url": "https://example.org/a_b"},
    "note": "100% of the yes/no questions only.",
}


@pytest.fixture
def run(tmp_path):
    """Writes the folder of a run."""

    def write(name="run", results=None, **fields):
        folder = tmp_path / name
        folder.mkdir()
        model = {"name": "org/tiny", "architecture": "A", "dtype": "float32", "parameters": 1}
        model |= fields.pop("model", {})
        summary = {
            "format": 2,
            "benchmark": "rsvqa-lr",
            "split": "test",
            "protocol": "strict",
            "mode": "image",
            "model": model,
            "seed": 0,
            "limit": None,
            "counts": {
                "samples": 200,
                "in_split": 200,
                "published": 200,
                "images": 100,
                "empty_answers": 0,
                "truncated_answers": 0,
                "missing_images": 0,
            },
            "results": results or {"vqa": VQA},
            "versions": {},
            "generation": {},
            "batch_size": 1,
            "seconds": 1.0,
        }
        summary["counts"] |= fields.pop("counts", {})
        (folder / "summary.json").write_text(json.dumps(summary | fields))
        return folder

    return write


@pytest.fixture
def published(tmp_path):
    """Writes a file of published rows."""

    def write(*rows):
        path = tmp_path / "published.json"
        path.write_text(json.dumps(rows))
        return path

    return write


@pytest.fixture
def card(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    write_model_card(folder, MFRSVLMConfig(), "trained")
    return folder


def rows(markdown):
    return [[text.strip() for text in line.strip("|").split("|")] for line in markdown.splitlines() if line.startswith("|")]


def lines(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Reading


def test_missing_truncated_and_foreign_summaries_are_named(run, tmp_path):
    with pytest.raises(ReportError, match=r"nothing-here has no summary\.json"):
        read_summaries([tmp_path / "nothing-here"])
    folder = run()
    path = folder / "summary.json"
    text = path.read_text()
    path.write_text(text[:200])
    with pytest.raises(ReportError, match=r"Repeat the run: .*run/summary\.json is not JSON"):
        read_summaries([folder])
    path.write_text(text.replace('"format": 2', '"format": 1'))
    with pytest.raises(ReportError, match="has format 1, not 2"):
        read_summaries([folder])
    path.write_text("[]")
    with pytest.raises(ReportError, match="format 'list'"):
        read_summaries([folder])
    with pytest.raises(ReportError, match="nothing to report"):
        read_summaries([])


@pytest.mark.parametrize("field", ["benchmark", "split", "protocol", "mode", "model", "limit", "counts", "results"])
def test_a_missing_field_is_named(run, field):
    folder = run()
    path = folder / "summary.json"
    summary = json.loads(path.read_text())
    del summary[field]
    path.write_text(json.dumps(summary))
    with pytest.raises(ReportError, match=f"no field '{field}'"):
        read_summaries([folder])


def test_a_run_is_given_once(run):
    first, second = run("one"), run("two")
    with pytest.raises(ReportError, match=r"listed twice.*org/tiny on rsvqa-lr, test, protocol strict, image, .*one; .*two"):
        read_summaries([first, second])
    others = [run("blind", mode="blind"), run("split", split="validation"), run("protocol", protocol="geochat")]
    others += [run("model", model={"name": "org/other"}), run("revision", model={"revision": "0123456789"})]
    assert len(read_summaries([first, *others])) == 6


@pytest.mark.parametrize(
    "wrong, message",
    [
        (0.5, "accuracy is 0.5, not an object"),
        ({"value": 0.5}, "not an object with value, low, high and n"),
        (figure(float("nan"), 0, 1), "nothing was measured"),
        (figure(91.2, 90, 92), "is 91.2, but a share lies from 0 to 1"),
    ],
)
def test_what_is_no_figure_is_named(run, wrong, message):
    with pytest.raises(ReportError, match=message):
        read_summaries([run(results={"vqa": {"accuracy": wrong}})])


def test_weights_without_a_revision_are_told_apart_by_their_fingerprint(run):
    folders = [run(name, model={"fingerprint": name * 8}) for name in ("a", "b")]
    assert [summary.weights for summary in read_summaries(folders)] == ["aaaaaaaa", "bbbbbbbb"]
    weights = "\nWeights: org/tiny@aaaaaaa aaaaaaaa in float32, org/tiny@bbbbbbb bbbbbbbb in float32.\n"
    assert weights in as_markdown(make_tables(read_summaries(folders)))


def test_an_unknown_mode_is_named(run):
    with pytest.raises(ReportError, match="mode 'deaf', not one of image, blind, majority"):
        read_summaries([run(mode="deaf")])


# Tables


def test_a_row_shows_values_in_per_cent_with_intervals(run):
    markdown = as_markdown(make_tables(read_summaries([run()])))
    assert "## rsvqa-lr, test, protocol strict: vqa" in markdown
    assert rows(markdown)[0] == ["model", "mode", "n", "accuracy", "presence", "comparison"]
    assert rows(markdown)[2] == [
        "org/tiny",
        "image",
        "200",
        "91.2 [89.9, 92.4]",
        "80.0 [75.0, 85.0]",
        "70.0 [65.0, 75.0]",
    ]


def test_units_of_what_is_no_share(run):
    results = {
        "counting": {"exact": figure(0.5), "mae": figure(1.234, 1.1, 1.4)},
        "captioning": {"bleu_4": figure(0.147), "cider": figure(3.879, 3.5, 4.2)},
        "calibration": {"ece": figure(0.0534, 0.06, 0.07)},
        "detection": {"f1": figure(0.25, 0.2, 0.3), "count_mae": figure(2.345, 2.0, 3.0)},
    }
    markdown = as_markdown(make_tables(read_summaries([run(results=results)])))
    for text in (
        "1.23 [1.10, 1.40]",
        "387.9 [350.0, 420.0]",
        "14.7 [9.7, 19.7]",
        "0.053 [0.060, 0.070]",
        "25.0 [20.0, 30.0] | 2.35 [",
    ):
        assert text in markdown


def test_only_whole_runs_on_images_look_like_results(run):
    folders = [
        run("majority", mode="majority", model={"name": "majority"}),
        run("limited", limit=50, model={"name": "org/big"}),
        run("blind", mode="blind"),
        run("whole"),
        run("holes", counts={"missing_images": 3}, model={"name": "org/holes"}),
        run("subset", counts={"in_split": 40}, model={"name": "org/subset"}),
        run("skipped", counts={"published": None, "left_out": {"broken rows": 2}}, model={"name": "org/skipped"}),
    ]
    table = rows(as_markdown(make_tables(read_summaries(folders))))[2:]
    assert [row[:2] for row in table] == [
        ["*org/big*", "*image, limit 50*"],
        ["*org/holes*", "*image, 3 images missing*"],
        ["*org/skipped*", "*image, 2 broken rows left out*"],
        ["*org/subset*", "*image, 40 of 200 samples*"],
        ["org/tiny", "image"],
        ["*org/tiny*", "*blind*"],
        ["*majority*", "*majority*"],
    ]
    assert [all(text.startswith("*") for text in row) for row in table] == [True, True, True, True, False, True, True]
    latex = as_latex(make_tables(read_summaries(folders)))
    assert latex.count(r"\textit{91.2 [89.9, 92.4]}") == 6


def test_a_task_without_figures_is_an_empty_row(run):
    markdown = as_markdown(make_tables(read_summaries([run(results={"vqa": {}})])))
    assert rows(markdown)[2] == ["org/tiny", "image", "0"]


def test_a_table_holds_one_benchmark_split_protocol_and_task(run):
    results = {"vqa": VQA, "captioning": {"bleu_4": figure(0.1)}}
    tables = make_tables(
        read_summaries([run("a", results=results), run("b", split="validation"), run("c", protocol="geochat")])
    )
    titles = [table.title for table in tables]
    assert titles == [
        "rsvqa-lr, test, protocol strict: vqa",
        "rsvqa-lr, test, protocol strict: captioning",
        "rsvqa-lr, validation, protocol strict: vqa",
        "rsvqa-lr, test, protocol geochat: vqa",
    ]


def test_classes_and_many_types_stay_in_the_csv(run, tmp_path):
    many = {f"type {index}": figure(0.5) for index in range(11)}
    results = {
        "classification": {"accuracy": figure(0.5), "per_class": CLASSES},
        "vqa": {"accuracy": figure(0.5), "per_type": many},
    }
    summaries = read_summaries([run(results=results)])
    write_report(summaries, tmp_path / "out", published=None)
    markdown = (tmp_path / "out/results.md").read_text()
    assert {tuple(row) for row in rows(markdown) if row[0] == "model"} == {("model", "mode", "n", "accuracy")}
    assert "The 30 values of per_class are in results.csv." in markdown
    assert "The 11 values of per_type are in results.csv." in markdown
    assert {line["group"] for line in lines(tmp_path / "out/results.csv")} == {"", *CLASSES, *many}


def test_revisions_are_told_apart_only_where_there_are_several(run):
    folders = [run("a", model={"revision": "aaaaaaaaaa"}), run("b", model={"revision": "bbbbbbbbbb"})]
    assert [row[0] for row in rows(as_markdown(make_tables(read_summaries(folders))))[2:]] == [
        "org/tiny@aaaaaaa",
        "org/tiny@bbbbbbb",
    ]
    assert rows(as_markdown(make_tables(read_summaries(folders[:1]))))[2][0] == "org/tiny"


def test_every_value_of_every_run_is_in_the_csv(run, published, tmp_path):
    folders = [run("a"), run("b", mode="blind", results={"vqa": {"accuracy": figure(1 / 3)}}), run("c", protocol="geochat")]
    write_report(read_summaries(folders), tmp_path / "out", published(PUBLISHED_ROW))
    found = lines(tmp_path / "out/results.csv")
    measured = {
        (line["protocol"], line["mode"], line["figure"], line["group"]): tuple(
            float(line[key]) for key in ("value", "low", "high", "n")
        )
        for line in found
        if line["mode"] != "published"
    }
    expected = {}
    for folder in folders:
        summary = json.loads((folder / "summary.json").read_text())
        place = summary["protocol"], summary["mode"]
        accuracy = summary["results"]["vqa"]["accuracy"]
        expected[*place, "accuracy", ""] = tuple(accuracy.values())
        for group, value in summary["results"]["vqa"].get("per_type", {}).items():
            expected[*place, "per_type", group] = tuple(value.values())
    assert measured == expected
    others = [line for line in found if line["mode"] == "published"]
    assert [(line["model"], line["figure"], line["group"], line["value"]) for line in others] == [
        ("Other_7B", "accuracy", "", "0.907"),  # once, though two protocols show it
        ("Other_7B", "per_type", "presence", "0.9109"),
    ]
    assert all(line["low"] == line["n"] == line["protocol"] == "" for line in others)
    assert all(line["source"] == "Other & others, Table 6, https://example.org/a_b" and line["note"] for line in others)


def test_latex_is_escaped_and_balanced(run, published, tmp_path):
    folder = run(model={"name": "org/my_model & 100%"})
    write_report(read_summaries([folder]), tmp_path / "out", published(PUBLISHED_ROW), latex=True)
    latex = (tmp_path / "out/results.tex").read_text()
    assert r"org/my\_model \& 100\%" in latex
    assert r"Other\_7B\textsuperscript{1} & published &  & 90.7 & 91.09 & -" in latex
    assert r"Other \& others, Table 6, \url{https://example.org/a_b}. 100\% of the yes/no questions only." in latex
    body = latex.replace("https://example.org/a_b", "")
    assert not re.search(r"(?<!\\)[%#$_]", body.split("\n", 1)[1])  # the first line is a comment
    assert latex.count(r"\begin{") == latex.count(r"\end{") and latex.count("{") == latex.count("}")
    widths = {line.count(" & ") for line in latex.splitlines() if line.endswith(r"\\") and "multicolumn" not in line}
    assert widths == {5}
    assert r"\begin{tabular}{llrrrr}" in latex


# Published results


def test_published_rows_stand_apart_with_source_and_note(run, published):
    others = [PUBLISHED_ROW, PUBLISHED_ROW | {"split": "validation"}, PUBLISHED_ROW | {"benchmark": "rsvqa-hr"}]
    others += [PUBLISHED_ROW | {"task": "captioning"}, PUBLISHED_ROW | {"model": "Third", "figures": {"accuracy": 0.85655}}]
    markdown = as_markdown(make_tables(read_summaries([run()]), read_published(published(*others))))
    assert rows(markdown)[3:] == [
        ["**published**", "", "", "", "", ""],
        ["Other_7B [1]", "published", "", "90.7", "91.09", "-"],
        ["Third [1]", "published", "", "85.655", "-", "-"],  # as it was printed
    ]
    assert "[1] Other & others, Table 6, <https://example.org/a_b>. 100% of the yes/no questions only." in markdown
    assert "[2]" not in markdown


@pytest.mark.parametrize(
    "change",
    [
        {"source": None},
        {"source": "a paper"},
        {"source": {}},
        {"source": {"title": "A paper", "place": "Table 1"}},
        {"source": {"title": "A paper", "place": "Table 1", "url": ""}},
        {"note": ""},
        {"note": None},
    ],
)
def test_a_published_row_without_source_or_note_is_rejected(published, change):
    with pytest.raises(ReportError, match=r"row 2 \(Other_7B on rsvqa-lr\) (needs a source|has an empty (url|note))"):
        read_published(published(PUBLISHED_ROW, PUBLISHED_ROW | change))


def test_a_published_share_in_per_cent_is_rejected(published):
    with pytest.raises(ReportError, match=r"accuracy is 90\.7, but a share lies from 0 to 1"):
        read_published(published(PUBLISHED_ROW | {"figures": {"accuracy": 90.7}}))


def test_the_published_rows_that_come_along():
    found = read_published()
    assert len({(row.model, row.benchmark, row.split, row.task) for row in found}) == len(found) > 0
    assert all(row.reference.url.startswith("https://") and row.cells for row in found)
    assert (
        PUBLISHED.read_text(encoding="utf-8")
        == json.dumps(json.loads(PUBLISHED.read_text()), indent=1, ensure_ascii=False) + "\n"
    )


def test_the_published_rows_are_of_benchmarks_that_there_are():
    benchmarks = pytest.importorskip("mfrsvlm.evaluation.benchmarks").BENCHMARKS
    for row in read_published():
        info = benchmarks[row.benchmark]
        assert row.split in info.splits or info.own_splits, row
        assert row.task in info.tasks, row


# Plots


def test_the_plot_shows_every_share(run, tmp_path):
    results = {"vqa": VQA, "counting": {"exact": figure(0.5), "mae": figure(2.0)}, "captioning": {"cider": figure(2.0)}}
    folders = [
        run("a", results=results),
        run("b", mode="blind"),
        run("c", mode="majority"),
        run("d", limit=5, model={"name": "x"}),
    ]
    tables = make_tables(read_summaries(folders))
    shares = [table for table in tables if table.task != "captioning"]
    drawn = plot_shares(shares)
    assert [axis.get_title(loc="left") for axis in drawn.axes] == ["vqa", "counting"]
    assert [label.get_text() for label in drawn.axes[1].get_yticklabels()] == ["exact"]
    marks = [mark for mark in drawn.axes[0].collections if mark.get_offsets().shape[1] and len(mark.get_paths()) == 1]
    marks = [mark for mark in marks if mark.get_zorder() == 3]
    for (_, summary), mark in zip(shares[0].runs, marks, strict=True):
        values = [100 * summary.results["vqa"][column].value for column in shares[0].columns]
        assert np.allclose(np.asarray(mark.get_offsets())[:, 0], values)
        assert np.allclose(mark.get_facecolor()[0, :3], 1) != summary.is_complete
    for name in ("out", "again"):
        (tmp_path / name).mkdir()
        write_plots(tables, tmp_path / name)
    path = tmp_path / "out/plot-rsvqa-lr-test-strict.png"
    assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    with Image.open(path) as image:
        assert image.width == 880 and image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_no_plot_of_what_has_no_share(run, tmp_path):
    write_plots(make_tables(read_summaries([run("a", results={"counting": {"mae": figure(2.0)}})])), tmp_path)
    assert not list(tmp_path.glob("*.png"))


def test_without_matplotlib_the_tables_are_there(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(run()), "--output", str(tmp_path / "out")]) == 2
    assert "pip install matplotlib, or use --no-plots" in capsys.readouterr().err
    assert (tmp_path / "out" / "results.md").exists()


# Model card


def test_the_card_round_trips(run, card):
    before = ModelCard.load(card / "README.md")
    written = update_card(
        card, read_summaries([run("image"), run("blind", mode="blind"), run("other", model={"name": "org/big"})])
    )
    after = ModelCard.load(card / "README.md")
    assert (
        after.data.eval_results
        == written
        == [
            EvalResult(
                task_type="image-text-to-text",
                task_name="Image-Text-to-Text",
                dataset_type="rsvqa-lr",
                dataset_name="rsvqa-lr, protocol strict",
                dataset_config="strict",
                dataset_split="test",
                metric_type="accuracy",
                metric_name="vqa accuracy",
                metric_value=0.9123,
                metric_args={"low": 0.8987, "high": 0.9241, "confidence": 0.95, "n": 200},
            )
        ]
    )
    assert after.data.model_name == "tiny"
    assert after.text == before.text
    assert {key: value for key, value in after.data.to_dict().items() if key != "model-index"} == before.data.to_dict()


def test_the_rest_of_the_card_stays_byte_for_byte(run, card):
    path = card / "README.md"
    before = path.read_bytes()
    update_card(card, read_summaries([run()]))
    after = path.read_bytes()
    start, end = after.index(b"model-index:"), after.index(b"\n---\n") + 1
    assert after[:start] + after[end:] == before
    update_card(card, read_summaries([card.parent / "run"]))
    assert path.read_bytes() == after  # a second time changes nothing


def test_results_of_other_weights_do_not_stay_in_the_card(run, card):
    """A card that is written after the next training speaks of that model alone."""
    for name, weights, benchmark in (("a", "1" * 16, "rsvqa-lr"), ("b", "1" * 16, "aid"), ("c", "2" * 16, "rsvqa-lr")):
        update_card(card, read_summaries([run(name, model={"fingerprint": weights}, benchmark=benchmark)]))
        results = ModelCard.load(card / "README.md").data.eval_results
        assert {result.metric_args["weights"] for result in results} == {weights}
    assert [result.dataset_type for result in results] == ["rsvqa-lr"]


def test_the_card_of_the_small_model_speaks_of_its_weights():
    folder = Path(__file__).parents[2] / "demo" / "model"
    results = ModelCard.load(folder / "README.md").data.eval_results or []
    weights = fingerprint(load(str(folder))[0])
    assert {result.metric_args["weights"] for result in results} <= {weights}, "evaluate it again, see docs/evaluation.md"


def test_results_of_others_and_of_other_benchmarks_are_kept(run, card):
    kept = EvalResult(
        task_type="image-text-to-text",
        dataset_type="rsvqa-lr",
        dataset_name="RSVQA-LR",
        dataset_split="test",
        metric_type="accuracy",
        metric_value=0.5,
        source_name="Somebody",
        source_url="https://example.org",
    )
    loaded = ModelCard.load(card / "README.md")
    loaded.data.model_name, loaded.data.eval_results = "Tiny", [kept]
    loaded.save(card / "README.md")
    update_card(card, read_summaries([run("a"), run("b", benchmark="aid"), run("c", protocol="geochat")]))
    results = {"vqa": {"accuracy": figure(0.25), "average_accuracy": figure(0.5)}}
    update_card(card, read_summaries([run("d", results=results)]))
    data = ModelCard.load(card / "README.md").data
    assert data.model_name == "Tiny"
    assert kept in data.eval_results
    found = [(r.dataset_type, r.dataset_config, r.metric_type, r.metric_value) for r in data.eval_results]
    assert sorted(found, key=str) == [
        ("aid", "strict", "accuracy", 0.9123),
        ("rsvqa-lr", "geochat", "accuracy", 0.9123),
        ("rsvqa-lr", "strict", "accuracy", 0.25),
        ("rsvqa-lr", "strict", "average_accuracy", 0.5),
        ("rsvqa-lr", None, "accuracy", 0.5),
    ]


@pytest.mark.parametrize(
    "change, named",
    [
        ({"limit": 50}, "limit 50"),
        ({"counts": {"missing_images": 2}}, "2 images missing"),
        ({"counts": {"in_split": 40}}, "40 of 200 samples"),
    ],
)
def test_a_run_on_a_part_is_rejected_by_name(run, card, change, named):
    before = (card / "README.md").read_bytes()
    with pytest.raises(CardError, match=rf"full splits.*org/tiny on aid, test, protocol strict, image, {named}"):
        update_card(card, read_summaries([run("whole"), run("part", benchmark="aid", **change)]))
    assert (card / "README.md").read_bytes() == before


def test_a_card_gets_the_results_of_its_own_model(run, card, tmp_path):
    other = run("other", model={"name": "org/big"})
    with pytest.raises(CardError, match=r"no run of tiny with images, but of org/big\."):
        update_card(card, read_summaries([other, run("blind", mode="blind")]))
    assert update_card(card, read_summaries([other]), model="org/big")
    revisions = [run("a", model={"revision": "a"}), run("b", model={"revision": "b"}, benchmark="aid")]
    with pytest.raises(CardError, match="one model with the same weights"):
        update_card(card, read_summaries(revisions))
    with pytest.raises(CardError, match=r"has no README\.md"):
        update_card(tmp_path, read_summaries([other]))


# Command line


def test_the_command_prints_and_writes(run, card, published, tmp_path, capsys):
    folder = str(run())
    assert main(["report", folder, "--published", str(published(PUBLISHED_ROW))]) == 0
    printed = capsys.readouterr().out
    assert "91.2 [89.9, 92.4]" in printed and "Other_7B [1]" in printed
    output = tmp_path / "out"
    assert main(["report", folder, "--output", str(output), "--card", str(card), "--no-plots"]) == 0
    assert sorted(path.name for path in output.iterdir()) == ["results.csv", "results.md"]
    printed = capsys.readouterr().out
    assert printed.startswith((output / "results.md").read_text())
    assert printed.endswith("README.md: 1 figures written\n")
