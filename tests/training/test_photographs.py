"""The demo model of photographs: splits, near-duplicates, rows, the ImageNet tower, and the command."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from external_data import external_data
from PIL import Image
from safetensors.torch import load_file
from tiny_photographs import BLOCKS, CLASSES, LABELS, lite0_state, make_photographs, texture
from torch.nn import functional as F
from transformers import EfficientNetModel

from mfrsvlm.evaluation.benchmarks import BenchmarkError
from mfrsvlm.modeling_mfrsvlm import MFRSVLMForConditionalGeneration
from mfrsvlm.training import train_demo_model
from mfrsvlm.training.branches import BranchCollator
from mfrsvlm.training.data import ConversationDataset
from mfrsvlm.training.demo_model import aerial_cars, near_duplicates, photograph_questions, pretrained_tower
from mfrsvlm.training.demo_model.aerial_cars import inside, video_of, write_car_rows
from mfrsvlm.training.demo_model.architecture import efficientnet_lite0, make_config, make_processor, make_tokenizer
from mfrsvlm.training.demo_model.near_duplicates import prepare, similarities
from mfrsvlm.training.demo_model.photograph_figures import figure_table, label_f1, not_above_majority
from mfrsvlm.training.demo_model.photograph_questions import PhotographQuestions, choose_transforms, make_turns
from mfrsvlm.training.demo_model.photographs import (
    SPLITS,
    load_split,
    names_direction,
    place_cells,
    read_photographs,
    split_photographs,
    transform,
    transform_answer,
)
from mfrsvlm.training.demo_model.pretrained_tower import convert_efficientnet_lite, find_weights
from mfrsvlm.training.trainer import SettingsError


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return make_photographs(tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="module")
def splits(real, tmp_path_factory):
    return split_photographs(real, tmp_path_factory.mktemp("work") / "photographs")


# Near-duplicates


def test_similarity_is_the_correlation_of_what_two_photographs_have_in_common():
    mosaic = torch.from_numpy(np.random.default_rng(0).normal(size=(48, 48)).astype(np.float32))
    one, other, alien = mosaic[:32, :32], mosaic[5:37, 9:41], torch.from_numpy(texture(5, 32)[..., 0].astype(np.float32))
    same, different = similarities(one[None], torch.stack([other, alien]))[0].tolist()
    assert same == pytest.approx(1, abs=1e-4)
    best = -1.0
    for down in range(-31, 32):
        for right in range(-31, 32):
            height, width = 32 - abs(down), 32 - abs(right)
            if height * width < near_duplicates.LEAST_OVERLAP * 32 * 32:
                continue
            top, left = max(0, down), max(0, right)
            a = one[top : top + height, left : left + width].flatten()
            b = alien[top - down : top - down + height, left - right : left - right + width].flatten()
            best = max(best, np.corrcoef(a, b)[0, 1])
    assert different == pytest.approx(best, abs=1e-3)


def test_overlapping_photographs_are_found_and_others_are_not():
    mosaic = texture(0, 512)
    crops = [mosaic[:256, :256], mosaic[:256, 100:356], mosaic[:256, 256:], texture(1)]
    squares = torch.stack([prepare(Image.fromarray(crop)) for crop in crops])
    found = similarities(squares[:1], squares)[0] >= near_duplicates.SAME_PLACE
    assert found.tolist() == [True, True, False, False]


# Splits and rows


def test_no_held_out_photograph_or_near_duplicate_of_one_is_trained_on(real, splits):
    images = {split: {item.path.name for item in read_photographs(splits, split).items} for split in SPLITS}
    assert images["test"] == {f"{name.replace(' ', '')}03.png" for name in CLASSES}
    assert not images["train"] & images["test"] and not images["train"] & images["validation"]
    assert not images["validation"] & images["test"]
    dropped = json.loads((splits / "splits.json").read_text())["dropped"]
    assert dropped["Images/airplane/airplane00.png"]["same_place_as"] == "Images/airplane/airplane03.png"
    assert "airplane00.png" not in set.union(*images.values())
    assert sum(map(len, images.values())) + len(dropped) == 4 * len(CLASSES)


@pytest.mark.integration
def test_no_photograph_of_uc_merced_in_training_resembles_one_of_the_test_split(tmp_path):
    """On the real photographs of a few classes, by full resolution and another measure than the one that drops them."""
    root = external_data("real/ucm")
    rows = json.loads((root / "captions.json").read_text())
    chosen = [row for row in rows if row["image"].split("/")[1] in ("airplane", "runway", "tenniscourt")]
    held_out = [root / row["image"] for row in chosen if row["split"] == "test"]
    others = [root / row["image"] for row in chosen if row["split"] != "test"]
    dropped = near_duplicates.same_places(held_out, others)
    assert root / "Images/airplane/airplane85.jpg" in dropped  # shows three airplanes of airplane90
    assert len(dropped) < 60
    # Repeats, also turned or mirrored, would have nearly the same histogram of gray levels.
    histograms = {
        path: np.bincount(np.asarray(Image.open(path).convert("L")).ravel(), minlength=256)
        for path in chosen_paths(root, chosen)
    }
    kept = [path for path in others if path not in dropped]
    least = min(np.abs(histograms[a] - histograms[b]).sum() for a in held_out for b in kept)
    assert least > 0.02 * 256 * 256


def chosen_paths(root: Path, rows: list[dict]) -> list[Path]:
    return [root / row["image"] for row in rows]


def test_splits_load_as_benchmarks(splits):
    benchmarks = load_split(splits, "test")
    assert {b.name: len(b.samples) for b in benchmarks} == {
        "uc-merced": 21,
        "ucm-captions": 21,
        "ucm-multilabel": 21 * 17,
        "rsivqa-ucm": 42,
    }
    assert benchmarks[-1].left_out == {"a missing word": 21} or sum(benchmarks[-1].left_out.values()) == 21


def test_missing_files_are_named(tmp_path):
    with pytest.raises(BenchmarkError, match="ucm has no Images"):
        split_photographs(tmp_path, tmp_path / "out")


def test_transforms_are_the_eight_of_a_square():
    image = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert np.array_equal(transform(image, 0), image)
    assert len({transform(image, number).tobytes() for number in range(8)}) == 8
    mirrored = transform(transform(image, 4), 4)
    assert np.array_equal(mirrored, image)
    chosen = choose_transforms(50, 5)
    assert (chosen[:, 0] == 0).all() and all(len(set(row)) == 5 for row in chosen.tolist())


# Number 1 of `transform` brings what is on the right to the top, and number 4 exchanges left and right.
@pytest.mark.parametrize(
    ("answer", "rotated", "mirrored"),
    [
        ("left and right", "up and bottom", "left and right"),
        ("right", "up", "left"),
        ("Upper left, center", "lower left and center", "center and upper right"),
        ("main diagonal", "minor diagonal", "minor diagonal"),
        ("center", "center", "center"),
        ("up, center and bottom", "left, center and right", "up, center and bottom"),
        ("i cannot see it", "i cannot see it", "i cannot see it"),
        ("diagonal", None, None),  # either of the two
        ("top left corner", None, None),  # not in `PLACES`
        ("lower right", None, None),  # no answer of the split names the upper right or the lower left
    ],
)
def test_answers_that_name_places_turn_with_the_photograph(answer, rotated, mirrored):
    written = ["up and bottom", "left and right", "up", "left", "lower left and center", "center and upper right"]
    written += ["minor diagonal", "left, center and right", "up, center and bottom"]
    names = {place_cells(text).tobytes(): text for text in written}
    assert [transform_answer(answer, number, names) for number in (0, 1, 4)] == [answer, rotated, mirrored]


def test_questions_about_places_are_asked_where_the_split_has_words_for_the_answer(splits):
    photographs = read_photographs(splits, "train")
    place, count = "What is the location of the cars in this picture?", "How many cars in the picture?"
    item = next(
        item for item in photographs.items if (place, "upper left") in [(q[1].split("\n")[0], q[2]) for q in item.questions]
    )

    def asked(number):
        turns = make_turns(item, photographs, number, random.Random(0))
        answers = [turn["content"][0]["text"] for turn in turns[1::2]]
        return dict(zip([turn["content"][-1]["text"].split("\n")[0] for turn in turns[::2]], answers, strict=True))

    assert asked(0)[place] == "upper left" and place not in asked(3)
    assert asked(3)[count] == asked(0)[count]
    photographs.place_names[place_cells("upper right").tobytes()] = "upper right"
    assert asked(3)[place] == "upper right"
    assert names_direction("Upper left, center") and not names_direction("center") and not names_direction("i cannot see it")


def test_prompts_are_those_of_the_harness_and_captions_weigh_as_often_as_they_occur(splits):
    photographs = read_photographs(splits, "train")
    assert photographs.class_prompt.startswith("What is the class of this scene? Choose one of: agricultural, ")
    item = photographs.items[0]
    assert len(item.labels) == len(LABELS)
    assert "Does this image show cars?\nAnswer with a single word or phrase." in item.labels
    turns = make_turns(item, photographs, 0, random.Random(1))
    weights = {turn["content"][0]["text"]: turn["weight"] for turn in turns[1::2]}
    assert weights[item.captions[0]] == 2 * weights[item.captions[2]]
    assert turns[0]["content"][0] == {"type": "image"}


def test_features_of_a_row_are_those_of_its_transformed_photograph(splits, tmp_path):
    photographs = read_photographs(splits, "test")
    photographs.items = photographs.items[:2]
    tokenizer = make_tokenizer(photograph_questions.photograph_dialogues(photographs), 400)
    torch.manual_seed(0)
    model = MFRSVLMForConditionalGeneration(make_config(len(tokenizer), "efficientnet", 64)).eval()
    processor = make_processor(model.config, tokenizer)
    rows = PhotographQuestions(photographs, BranchCollator(processor), model, tmp_path / "features.npy", copies=2, rounds=2)
    assert len(rows) == 8
    row = rows[7]  # the second round of the second copy of the second photograph
    number = int(rows.transforms[1, 1])
    with Image.open(photographs.items[1].path) as image:
        turned = Image.fromarray(transform(np.asarray(image.convert("RGB").resize((256, 256), Image.BICUBIC)), number))
    pixels = torch.from_numpy(np.stack(list(processor.image_processor([turned], return_tensors="np")["pixel_values"])))
    model.model.multi_modal_projector = torch.nn.Identity()
    model.config.visual_position_embeddings = False
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        features = model.model.get_image_features(pixels, return_dict=True)
    expected = torch.stack([features.pooler_output[0], *(stack[0] for stack in features.deepstack_features)])
    assert row["image_features"].shape == (1, 9, 64, 256)
    torch.testing.assert_close(row["image_features"][0], expected.half().float(), atol=1e-2, rtol=1e-2)


# Cars


def test_boxes_of_a_crop_are_in_thousandths_of_it():
    objects = [
        {"class": kind, "box": box}
        for kind, box in (("car", [10, 20, 30, 40]), ("car", [0, 0, 8, 8]), ("bus", [0, 0, 9, 9]))
    ]
    assert inside(objects, "car", 10, 20, 40, 80).tolist() == [[0, 0, 500, 250]]
    # A box whose center is inside is clipped, and one whose center is outside is not listed. From top to bottom:
    assert inside(objects, "car", 2, 2, 20, 40).tolist() == [[0, 0, 300, 150], [400, 450, 1000, 950]]
    assert inside([], "car", 0, 0, 1, 1).shape == (0, 4)


def test_boxes_turn_with_their_crop():
    boxes = np.array([[100, 200, 400, 300], [700, 0, 1000, 50]])
    for number in range(8):
        marked = np.zeros((1000, 1000), dtype=bool)
        for left, top, right, bottom in boxes:
            marked[top:bottom, left:right] = True
        turned = aerial_cars.transform_boxes(boxes, number)
        expected = transform(marked, number)
        for left, top, right, bottom in turned:
            assert expected[top:bottom, left:right].all()
        assert sum((box[2] - box[0]) * (box[3] - box[1]) for box in turned) == expected.sum()
        assert (np.diff(turned[:, 1]) >= 0).all()


def test_held_out_videos_are_not_trained_on(real, tmp_path):
    path = write_car_rows(real, tmp_path / "cars")
    rows = json.loads(path.read_text())
    assert len(rows) == aerial_cars.CROPS and all(row["image"].startswith("images/DJI_0005-0001-") for row in rows)
    assert video_of("images/DJI_0005-0001.png") == "DJI_0005" and video_of("images/MOS74.jpg") == "MOS"
    conversations = ConversationDataset(str(path), str(path.parent))
    assert len(conversations) == aerial_cars.CROPS
    for row in rows:
        turns = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
        asked = dict(zip(turns[::2], turns[1::2], strict=True))
        count = next(
            int(answer) for question, answer in asked.items() if question.startswith("How many") and "car" in question
        )
        boxes = next((answer for question, answer in asked.items() if "every car" in question), "")
        assert boxes.count("[") == count


def test_count_error_is_the_sum_over_tiles_and_frames(real, monkeypatch):
    replies = iter([["1", "0", "0", "none", "2", "1"], ["1"] * 6])

    class Replies:
        def __init__(self, *args, **kwargs):
            pass

        def encode_images(self, tiles, prompts):
            assert [tile.size for (tile,) in tiles] == [(512, 512)] * 6

        def answer(self, prompts, encoded):
            return [SimpleNamespace(text=text) for text in next(replies)]

    monkeypatch.setattr(aerial_cars, "Answerer", Replies)
    figures = aerial_cars.count_figures(None, None, real)
    assert figures["true"] == [3, 3] and figures["counted"] == [4, 6]
    assert figures["error"]["value"] == pytest.approx(4 / 6)


# The tower


def plain_lite0(state: dict[str, torch.Tensor], pixels: torch.Tensor) -> list[torch.Tensor]:
    """EfficientNet-lite0 in plain functions: the stem, the output of every block, and the last map."""

    def convolve(name, x, stride=1, groups=1):
        weight = state[f"{name}.weight"]
        size, side = weight.shape[-1], x.shape[-1]
        pad = max((-(-side // stride) - 1) * stride + size - side, 0)  # TensorFlow's "same": more at the end
        x = F.pad(x, [pad // 2, pad - pad // 2] * 2)
        return F.conv2d(x, weight, stride=stride, groups=groups)

    def norm(name, x):
        mean, var, weight, bias = (
            state[f"{name}.{kind}"].view(-1, 1, 1) for kind in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-3).sqrt() * weight + bias

    x = norm("_bn0", convolve("_conv_stem", pixels, 2)).clamp(0, 6)
    maps = [x]
    for number, (inner, outer, ratio, _, stride) in enumerate(BLOCKS):
        name, before = f"_blocks.{number}", x
        if ratio > 1:
            x = norm(f"{name}._bn0", convolve(f"{name}._expand_conv", x)).clamp(0, 6)
        x = norm(f"{name}._bn1", convolve(f"{name}._depthwise_conv", x, stride, x.shape[1])).clamp(0, 6)
        x = norm(f"{name}._bn2", convolve(f"{name}._project_conv", x))
        x = x + before if inner == outer and stride == 1 else x
        maps.append(x)
    return [*maps, norm("_bn1", convolve("_conv_head", x)).clamp(0, 6)]


@pytest.mark.parametrize("side", [256, 128, 64])
def test_efficientnet_lite_is_an_efficientnet_of_transformers_exactly(side):
    state = lite0_state()
    model = EfficientNetModel(efficientnet_lite0()).eval()
    model.load_state_dict(convert_efficientnet_lite(state))
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        outputs = model(pixels, output_hidden_states=True)
        expected = plain_lite0(state, pixels)
    found = [*outputs.hidden_states, outputs.last_hidden_state]
    assert len(found) == len(expected) == 18
    for own, plain in zip(found, expected, strict=True):
        assert (own - plain).abs().max() <= 1e-4 * max(1, plain.abs().max())
    assert expected[-1].std() > 0.1


def test_the_package_agrees_with_the_reference():
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="the package of the plain implementation is absent")
    model = package.EfficientNet.from_name("efficientnet-lite0").eval()
    state = lite0_state()
    model.load_state_dict(state)
    pixels = torch.rand(1, 3, 224, 224) * 2 - 1
    with torch.no_grad():
        assert (model.extract_features(pixels) - plain_lite0(state, pixels)[-1]).abs().max() <= 1e-4


def test_the_identity_layers_are_exact_in_bfloat16_and_stay_frozen():
    assert torch.sigmoid(torch.tensor(pretrained_tower.OPEN, dtype=torch.bfloat16)) == 1
    model = EfficientNetModel(efficientnet_lite0())
    pretrained_tower.freeze_squeeze_excitation(model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert len(frozen) == 4 * 16 and all("squeeze_excite" in name for name in frozen)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(SettingsError, match=r"encoder_weights=.*nothing.pth is no file"):
        find_weights(str(tmp_path / "nothing.pth"))


# Figures


def test_macro_f1_of_labels_is_that_of_scikit_learn():
    f1_score = pytest.importorskip("sklearn.metrics").f1_score
    rng = np.random.default_rng(0)
    truth, given = rng.random((30, 4)) < 0.4, rng.random((30, 4)) < 0.5
    truth[:, 3] = False  # a label without a "yes" has no F1
    rows = [
        {"images": [f"{image}.png"], "group": f"label{label}", "parsed": "yes" if given[image, label] else "no"}
        | {"references": ["yes" if truth[image, label] else "no"]}
        for image in range(30)
        for label in range(4)
    ]
    figures = label_f1(rows)
    expected = [f1_score(truth[:, label], given[:, label]) for label in range(3)]
    assert figures["macro_f1"]["value"] == pytest.approx(np.mean(expected))
    assert figures["macro_f1"]["low"] < np.mean(expected) < figures["macro_f1"]["high"]
    assert [figures["per_label"][f"label{label}"] for label in range(3)] == pytest.approx(expected)


def test_the_table_shows_what_was_measured():
    number = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 21}
    table = figure_table({"image": {"uc-merced": {"classification": {"accuracy": number}}}, "blind": {}, "majority": {}})
    majority = {"uc-merced": {"classification": {"accuracy": number | {"value": 0.45}}}}
    image = {"uc-merced": {"classification": {"accuracy": number}}}
    assert not_above_majority({"image": image, "majority": majority}) == "Not above the majority baseline: class, accuracy."
    assert not_above_majority({"image": image, "majority": {}}) == "All are above the majority baseline."
    assert table.splitlines()[2:] == ["| class, accuracy | 50.0 | 40.0 - 60.0 | 21 | - | - | - |"]


# The command


def test_settings_that_exclude_each_other_are_named(tmp_path):
    config = str(Path(train_demo_model.__file__).with_name("configs") / "demo_model_photographs.yaml")
    common = ["--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    for words, message in (
        (["--train_file", "rows.json"], "need each other"),
        (["--real_data", str(tmp_path), "--train_encoder", "true"], "cannot be combined"),
        (["--real_data", str(tmp_path), "--copies", "9"], "copies=9 must be 1 to 8"),
    ):
        with pytest.raises(SettingsError, match=message):
            train_demo_model.main([config, *common, *words])


@pytest.mark.slow
def test_command_from_photographs_to_a_model_folder(tmp_path, monkeypatch):
    real = make_photographs(tmp_path / "real", each=3)
    torch.save(lite0_state(), tmp_path / "lite0.pth")
    config = str(Path(train_demo_model.__file__).with_name("configs") / "demo_model_photographs.yaml")
    words = ["--real_data", str(real), "--work", str(tmp_path / "work"), "--output", str(tmp_path / "out")]
    words += ["--encoder_weights", str(tmp_path / "lite0.pth"), "--encoder_steps", "2", "--max_steps", "2", "--copies", "1"]
    folder = train_demo_model.main(
        [
            config,
            *words,
            "--scenes",
            "2",
            "--test_scenes",
            "0",
            "--decoder_width",
            "64",
            "--per_device_train_batch_size",
            "2",
        ]
    )
    card = (folder / "README.md").read_text()
    assert "| class, accuracy |" in card and "no license stated" in card and "splits 0 minutes" in card
    assert "also trained on 2 synthetic scenes" in card and "First the encoder was tuned" in card
    assert not list(folder.glob("*.png"))
    monkeypatch.setattr(train_demo_model, "evaluate_photographs", lambda *_: {"image": {}, "majority": {}})
    words[3], words[5] = str(tmp_path / "more"), str(tmp_path / "continued")
    continued = train_demo_model.main([config, *words, "--start", str(folder), "--test_scenes", "0"])
    before, after = (load_file(path / "model.safetensors") for path in (folder, continued))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any("vision_tower" in name for name in changed) and any("language_model" in name for name in changed)
    assert "continues an earlier model, with its encoder" in (continued / "README.md").read_text()
