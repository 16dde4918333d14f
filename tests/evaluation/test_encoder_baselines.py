"""The linear probe and the nearest training image, on features of any encoder."""

import json

import numpy as np
import pytest
import torch
from tiny_benchmarks import MAKERS

from mfrsvlm.evaluation import EvaluationSettings, load_benchmark
from mfrsvlm.evaluation.benchmarks import Sample
from mfrsvlm.evaluation.encoder_baselines import PENALTY, encoder_answers, evaluate_encoder, nearest, probe


def clusters(seed=0, each=8, classes=3, size=5):
    rng = np.random.default_rng(seed)
    centers = 4 * np.eye(classes, size)
    labels = np.repeat(np.arange(classes), each)
    return (centers[labels] + rng.normal(size=(len(labels), size))).astype(np.float32), labels.tolist()


def test_the_probe_is_at_the_optimum_of_its_loss():
    known, labels = clusters()
    probabilities = torch.from_numpy(probe(known, labels, known)).double()
    rows = torch.from_numpy((known - known.mean(0)) / (known.std(0) + 1e-6)).double()
    residual = (probabilities - torch.nn.functional.one_hot(torch.tensor(labels)).double()) / len(known)
    # There, the gradient of the cross-entropy is minus that of the penalty: weights follow from the residuals,
    weight = -(residual.T @ rows) / (2 * PENALTY)
    scores = rows @ weight.T
    # and these weights give the same probabilities, up to biases, which make the residuals sum to zero.
    assert residual.sum(0).abs().max() < 1e-3
    differences = probabilities.log() - scores
    assert (differences - differences.mean(1, keepdim=True)).std(0).max() < 0.05


def test_nearest_is_by_the_cosine_of_centered_features():
    known, labels = clusters()
    asked, truth = clusters(seed=1)
    centered, others = asked - known.mean(0), known - known.mean(0)
    expected = [max(range(len(others)), key=lambda i: row @ others[i] / np.linalg.norm(others[i])) for row in centered]
    assert nearest(known, asked) == expected
    assert [labels[i] for i in expected] == truth


def sample(number, task, question, reference, group=""):
    return Sample(str(number), (f"{number}.png",), task, question, (reference,), group)


def test_each_kind_of_question_is_answered_in_its_way():
    known, labels = clusters()
    asked, truth = clusters(seed=1)
    scenes = ["beach", "forest", "river"]

    def samples(labels):
        for task, question, answer in (
            ("classification", "", lambda label: scenes[label]),
            ("vqa", "Is there water?", lambda label: "no" if label == 1 else "yes"),
            ("vqa", "Is there air?", lambda label: "yes"),
            ("vqa", "How many?", lambda label: str(label)),
            ("captioning", "", lambda label: f"This is a {scenes[label]}."),
        ):
            yield [sample(i, task, question, answer(label)) for i, label in enumerate(labels)]

    for train, test in zip(samples(labels), samples(truth), strict=True):
        answers = encoder_answers(train, known, test, asked)
        assert [answer.text for answer in answers] == [one.references[0] for one in test]
        if train[0].question == "Is there water?":
            assert all((answer.yes_probability > 0.5) == (answer.text == "yes") for answer in answers)
    # A question that was not asked in training has the answer of the nearest image in its group.
    unseen = [sample(i, "vqa", "How many cars?", str(label), "count") for i, label in enumerate(truth)]
    train = [sample(i, "vqa", f"How many of kind {i}?", str(label), "count") for i, label in enumerate(labels)]
    assert [a.text for a in encoder_answers(train, known, unseen, asked)] == [str(label) for label in truth]


def test_images_with_the_same_features_repeat_the_answers(tmp_path):
    """On the images it was fitted on, the nearest one is the image itself, so every caption is its first one."""
    (tmp_path / "data").mkdir()
    MAKERS["ucm-captions"](tmp_path / "data")
    benchmark = load_benchmark("ucm-captions", tmp_path / "data", "test", check_counts=False)
    settings = EvaluationSettings(output=tmp_path / "out", progress=False)
    rng = np.random.default_rng(0)
    summaries = evaluate_encoder(
        [(benchmark, benchmark)], lambda image: rng.normal(size=8), "noise", "strict-without-java", settings
    )
    figures = summaries["ucm-captions/test"]
    assert figures["model"]["name"] == "linear probe and nearest image, noise"
    lines = (tmp_path / "out" / "ucm-captions" / "test" / "predictions.jsonl").read_text().splitlines()
    assert all(row["answer"] == row["references"][0] for row in map(json.loads, lines))
    assert figures["results"]["captioning"]["bleu_1"]["value"] == pytest.approx(1)
