"""The recipe of the demo model: its pieces, its trainer, and the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_scenes import SCENES, Drawn, encode, make_model

from mfrsvlm.demo import MODEL
from mfrsvlm.files.model_folder import slow_on_cpu
from mfrsvlm.scenes import CLASSES, KINDS, draw
from mfrsvlm.training import train_demo_model
from mfrsvlm.training.branches import BranchCollator
from mfrsvlm.training.data import ConversationDataset
from mfrsvlm.training.demo_model import encoder
from mfrsvlm.training.demo_model.architecture import (
    add_number_tokens,
    enlarge,
    make_config,
    make_processor,
    make_tokenizer,
    settle_placeholder,
    start_positions,
)
from mfrsvlm.training.demo_model.encoder import LOSS_WEIGHT, load_encoder, object_table, pretrain, token_targets
from mfrsvlm.training.demo_model.guidance import GUIDANCE_WEIGHT, Guidance
from mfrsvlm.training.demo_model.scene_images import CANVAS, canvas_and_view, plan
from mfrsvlm.training.demo_model.scene_questions import SceneQuestions, dialogues
from mfrsvlm.training.demo_model.trainer import GUIDANCE_FILE, DemoModelTrainer, DemoModelTrainingArguments
from mfrsvlm.training.image_features import CachedRows, freeze_encoder, project
from mfrsvlm.training.trainer import SettingsError


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(dialogues(plan("train", index) for index in range(60)))


# Pieces


def test_views_and_canvases_are_those_of_the_processor(tokenizer):
    model = make_model(tokenizer)
    processor = make_processor(model.config, tokenizer)
    canvas, view = canvas_and_view(SCENES[0])
    pixels = processor.image_processor(draw(SCENES[0]), return_tensors="np")
    seen, first = pixels["pixel_values"][0, : 2 * 3 * 128 * 128].reshape(2, 3, 128, 128)
    np.testing.assert_allclose(view.transpose(2, 0, 1) / 127.5 - 1, seen, atol=1e-5)
    np.testing.assert_allclose(canvas[:128, :128].transpose(2, 0, 1) / 127.5 - 1, first, atol=1e-5)
    packed = Drawn(SCENES[:1]).pixel_values(0, 1, model.config)
    np.testing.assert_allclose(packed, pixels["pixel_values"], atol=1e-5)


def test_position_embeddings_start_apart_and_as_large_as_the_visual_tokens(tokenizer, tmp_path):
    model = make_model(tokenizer)
    features = encode(model, Drawn(SCENES), tmp_path)
    start_positions(model, features)
    table = model.model.visual_position_embedding.weight.detach()  # (T, D)
    with torch.no_grad():
        visual = model.model.multi_modal_projector(torch.from_numpy(np.array(features[:, 0])).float())
    assert table.pow(2).mean().sqrt() == pytest.approx(visual.std().item(), rel=0.05)
    distances = torch.cdist(table, table) + torch.eye(len(table)) * 1e9
    nearest = distances.argmin(1)  # next to it on the grid of 8 by 8, row by row
    steps = (nearest - torch.arange(64)).abs()
    assert set(steps.tolist()) <= {1, 8}


def test_a_larger_view_or_canvas_keeps_the_weights(tokenizer):
    model = make_model(tokenizer, routing="token", routing_size=8)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "embedding" in name:
                value.copy_(torch.randn_like(value))
    model.model.visual_position_embedding.weight.data[:] = torch.arange(64.0)[:, None] // 8  # the row
    larger, canvas = enlarge(model, 256, 4), enlarge(model, 128, 4)
    assert (larger.config.window_sizes, larger.config.num_detail_stacks, larger.config.tokens_per_side) == ([512], 32, 16)
    assert canvas.config.window_sizes == [256] and canvas.config.tokens_per_side == 8
    context = [each.config.text_config.max_position_embeddings for each in (model, larger, canvas)]
    assert context == [1024, 4096, 1024]
    for part in ("vision_config", "text_config"):
        assert larger.config.to_diff_dict()[part].keys() == model.config.to_diff_dict()[part].keys()
    for finer in (larger, canvas):
        state = finer.state_dict()
        for name, value in model.state_dict().items():
            if name.endswith("stack_embedding"):
                for depth, row, column in np.ndindex(2, 4, 4):
                    coarse = depth * 4 + row // 2 * 2 + column // 2
                    assert torch.equal(state[name][depth * 16 + row * 4 + column], value[coarse])
            elif "position" not in name:
                assert torch.equal(state[name], value), name
    assert torch.equal(canvas.model.visual_position_embedding.weight, model.model.visual_position_embedding.weight)
    rows = larger.model.visual_position_embedding.weight[:, 0].unflatten(0, (16, 16))
    torch.testing.assert_close(rows[3:-3, 5], torch.arange(3, 13) / 2 - 0.25)  # between the rows, away from the edge
    with pytest.raises(SettingsError, match="canvas_scale=3 must be a multiple of 2"):
        enlarge(model, 128, 3)
    with pytest.raises(SettingsError, match="image_size=200 must be a multiple of 128"):
        enlarge(model, 200, 2)


def test_a_coordinate_is_one_token_and_the_text_stays():
    tokenizer = make_tokenizer(dialogues(SCENES))
    model = make_model(tokenizer)
    boxes = ["[12, 345, 1000, 7]", "[0, 10, 99, 100]"]
    before = [tokenizer.tokenize(box) for box in boxes]
    kept = model.get_output_embeddings().weight.clone()
    add_number_tokens(model, tokenizer)
    assert [token for token in tokenizer.tokenize(boxes[0]) if token.isdigit()] == ["12", "345", "1000", "7"]
    for box, tokens in zip(boxes, before, strict=True):
        ids = tokenizer(box, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == box and len(ids) < len(tokens)
    for rows in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        assert len(rows) == len(tokenizer) == model.config.text_config.vocab_size
        new = rows[tokenizer.convert_tokens_to_ids([str(number) for number in range(400, 440)])]
        distances = (new - new[0]).norm(dim=1)
        assert (distances[1:4].diff() > 0).all() and distances[1] < distances[8:].min()
    assert model.get_output_embeddings().weight[: len(kept)].equal(kept)
    add_number_tokens(model, tokenizer)  # nothing is left to add
    assert len(model.get_input_embeddings().weight) == len(tokenizer)


def test_the_placeholder_lies_among_the_words_and_is_never_said(tokenizer):
    model = make_model(tokenizer)
    settle_placeholder(model)
    place, rows = model.config.image_token_id, model.get_input_embeddings().weight
    torch.testing.assert_close(rows[place], rows[:place].mean(0))
    assert not model.get_output_embeddings().weight[place].any()


def test_token_targets_say_what_stands_where():
    table = object_table(SCENES[0])
    targets = token_targets(table, 0, 0, CANVAS, 8).reshape(8, 8, len(KINDS), -1)
    assert targets[..., 1].sum((0, 1)).tolist() == list(SCENES[0].counts.values())
    for kind, x, y, width, height in table:
        entry = targets[int(y // 32), int(x // 32), int(kind)]
        assert entry[0] == 1
        if entry[1] == 1:
            np.testing.assert_allclose(entry[2:], [x / 32 % 1, y / 32 % 1, width / 32, height / 32], atol=1e-5)
    assert token_targets(table, 300, 300, 64, 4).sum() == 0


def test_encoder_is_trained_and_loaded(tokenizer, tmp_path):
    images = Drawn([plan("train", index, crowding=4) for index in range(4)])
    pretrain("resnet", images, tmp_path / "encoder.pt", steps=3, batch=4)
    model = make_model(tokenizer)
    before = model.model.stage_projections["3"].weight.clone()
    load_encoder(model.model, tmp_path / "encoder.pt")
    assert not torch.equal(before, model.model.stage_projections["3"].weight)
    with pytest.raises(RuntimeError, match="too many"):
        load_encoder(make_model(tokenizer, encoder="vit").model, tmp_path / "encoder.pt")


def test_guidance_is_satisfied_by_attention_to_the_objects(tokenizer, tmp_path):
    """Attention as it shall be has no loss, and what `Guidance` computes is what the attention layers do."""
    model = make_model(tokenizer)
    model.set_attn_implementation("eager")
    features = encode(model, Drawn(SCENES), tmp_path)
    collator = BranchCollator(make_processor(model.config, tokenizer))
    rows = SceneQuestions(Drawn(SCENES), collator, model.config, features, rounds=1)
    batch = collator([rows[index] for index in range(4)])
    prefix = int(batch["prefix_lengths"][0])
    first = batch["input_ids"][0].tolist().index(model.config.image_token_id)
    guidance = Guidance(model)
    weights, inputs = {}, {}
    for number in (1, 2):
        attention = guidance.layers[number]
        attention.register_forward_hook(lambda module, args, output, number=number: weights.update({number: output[1]}))
        attention.register_forward_pre_hook(
            lambda module, args, kwargs, number=number: inputs.update({number: kwargs["hidden_states"]}), with_kwargs=True
        )
    fed = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask")}

    def losses(objects):
        with torch.no_grad(), guidance.recording():
            model(**fed, mm_encoder_outputs={"image": project(model, batch["image_features"])})
            return guidance(batch["input_ids"], batch["prefix_lengths"], batch["marks"], objects)

    found = losses(batch["objects"])
    targets = torch.from_numpy(np.stack([token_targets(object_table(scene), 0, 0, CANVAS, 8) for scene in SCENES]))
    classes = torch.tensor([list(CLASSES).index(scene.scene_class) for scene in SCENES])
    with torch.no_grad():
        seen = sum(
            LOSS_WEIGHT[name] * value.item()
            for head, states in zip(guidance.seen, inputs.values(), strict=True)
            for name, value in encoder.losses(head, states[:, first : first + 64], targets, classes).items()
        )
    assert found["seen"].item() == pytest.approx(seen, rel=1e-4)

    def divergence(rows):
        expected, nouns = 0.0, [mark for mark in batch["marks"].tolist() if mark[0] in rows]
        for number in (1, 2):
            for row, position, kind in nouns:
                held = torch.zeros(prefix)
                for name, x, y, *_ in object_table(SCENES[row]):
                    if name == kind:
                        held[first + int(y // 32) * 8 + int(x // 32)] += 1
                for head, shares in enumerate((held.clone(), held.clone())):
                    if head == 0 or held.sum() == 0:
                        shares[0] = 1
                    goal = shares / shares.sum()
                    given = weights[number][row, head, position, :prefix]
                    given = given / given.sum()  # what a noun attends to in its own branch is left out
                    expected += torch.nn.functional.kl_div(given.log(), goal, reduction="sum").item() / (2 * len(nouns))
        return expected

    assert found["attention"].item() == pytest.approx(divergence(range(4)), rel=1e-3)
    assert set(found) == set(GUIDANCE_WEIGHT) and all(value > 0 for value in found.values())
    # Rows without known objects take no part, and without any there is no loss.
    some = losses([None, *batch["objects"][1:3], None])
    assert some["attention"].item() == pytest.approx(divergence([1, 2]), rel=1e-3)
    assert all(value == 0 for value in losses([None] * 4).values())
    with torch.no_grad():
        model(**fed, mm_encoder_outputs={"image": project(model, batch["image_features"])})
    assert not guidance.recorded


# The trainer

HALF = not slow_on_cpu(torch.bfloat16)  # emulated, it would take minutes


def settings(folder, **overrides):
    values = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "learning_rate": 1.5e-3, "muon": HALF,
        "weight_decay": 0.05, "warmup_steps": 0.03, "lr_scheduler_type": "cosine", "bf16": HALF, "use_cpu": True,
        "guidance": True, "decoder_attention": "short", "report_to": "none", "disable_tqdm": True, "save_steps": 100,
        "save_only_model": False,
    }  # fmt: skip
    return DemoModelTrainingArguments(**values | overrides)


def make_trainer(tokenizer, folder, cached=True, **overrides):
    model = make_model(tokenizer)
    processor = make_processor(model.config, tokenizer)
    collator, images = BranchCollator(processor), Drawn(SCENES)
    features = encode(model, images, folder) if cached else None
    if cached:
        freeze_encoder(model)
    mix = {"presence": 1, "classification": 1}
    rows = SceneQuestions(images, collator, model.config, features, rounds=1, mix=mix)
    arguments = settings(folder / "run", **overrides)
    return DemoModelTrainer(
        model=model, args=arguments, data_collator=collator, train_dataset=rows, processing_class=processor
    )


@pytest.mark.integration
def test_training_learns_and_leaves_no_trace_of_guidance(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, max_steps=20, logging_steps=5)
    model = trainer.model
    frozen = {
        name: value.clone() for name, value in model.state_dict().items() if "vision_tower" in name or "stage_" in name
    }
    names, attention = set(model.state_dict()), model.config.text_config._attn_implementation
    trainer.train()
    losses = [row["answers_loss"] for row in trainer.state.log_history if "answers_loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    assert {f"{name}_loss" for name in GUIDANCE_WEIGHT} < set(trainer.state.log_history[0])
    for name, value in frozen.items():
        assert torch.equal(model.state_dict()[name], value), f"{name} was not frozen"
    trainer.save_model(tmp_path / "saved")
    assert set(model.state_dict()) == names >= set(load_file(tmp_path / "saved" / "model.safetensors"))
    assert model.config.text_config._attn_implementation == attention
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.model.language_model.layers)


@pytest.mark.integration
def test_a_stopped_run_continues_with_its_guidance(tokenizer, tmp_path):
    whole = make_trainer(tokenizer, tmp_path / "a", max_steps=4, save_steps=2)
    whole.train()
    checkpoint = tmp_path / "a" / "run" / "checkpoint-2"
    assert (checkpoint / GUIDANCE_FILE).is_file()
    assert not any("counted" in name for name in load_file(checkpoint / "model.safetensors"))
    resumed = make_trainer(tokenizer, tmp_path / "b", max_steps=4)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for part in ("model", "guidance"):
        states = getattr(resumed, part).state_dict()
        for name, value in getattr(whole, part).state_dict().items():
            torch.testing.assert_close(states[name], value, rtol=0, atol=0, msg=f"{part}: {name}")


@pytest.mark.integration
def test_the_encoder_may_be_trained_too(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, cached=False, max_steps=2, guidance=False, muon=False, bf16=False)
    before = trainer.model.model.stage_projections["3"].weight.detach().clone()
    trainer.train()
    assert not torch.equal(before, trainer.model.model.stage_projections["3"].weight)


def test_rows_of_a_file_can_have_cached_features(tokenizer, tmp_path):
    for index, scene in enumerate(SCENES[:2]):
        draw(scene).save(tmp_path / f"{index}.png")
    turns = [{"from": "human", "value": "<image>Is there a car?"}, {"from": "gpt", "value": "yes"}]
    rows = [{"image": f"{index}.png", "conversations": turns} for index in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = make_model(tokenizer)
    collator = BranchCollator(make_processor(model.config, tokenizer))
    conversations = ConversationDataset(tmp_path / "rows.jsonl", tmp_path)
    cached = CachedRows(conversations, collator, model, tmp_path / "cache.npy")
    drawn = encode(model, Drawn(SCENES[:2]), tmp_path)
    np.testing.assert_allclose(cached.features, drawn, atol=2e-3)
    sample = cached[1]
    assert "pixel_values" not in sample and torch.equal(
        sample["image_features"], torch.from_numpy(np.array(cached.features[1:2])).float()
    )
    with pytest.raises(ValueError, match="not of 1"):
        CachedRows(ConversationDataset(rows[:1], tmp_path), collator, model, tmp_path / "cache.npy")
    with pytest.raises(ValueError, match="row 0 has 0 images"):
        text = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
        CachedRows(ConversationDataset(text), collator, model, tmp_path / "other.npy")


# The command

CONFIG = train_demo_model.__file__.replace("train_demo_model.py", "configs/demo_model.yaml")
TINY = (
    "--scenes=12", "--rounds=1", "--crowded_scenes=2", "--encoder_steps=1", "--max_steps=1", "--test_scenes=3",
    f"--bf16={HALF}", f"--muon={HALF}",
)  # fmt: skip


@pytest.mark.integration
def test_command_makes_a_model_folder(tmp_path, capsys):
    draw(SCENES[0]).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>Is there a car?"}, {"from": "gpt", "value": "yes"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "a.png", "conversations": turns}) + "\n")
    data = (f"--train_file={tmp_path / 'rows.jsonl'}", f"--image_root={tmp_path}")
    command = [CONFIG, f"--output={tmp_path / 'model'}", f"--work={tmp_path / 'work'}", *TINY, *data, "--number_tokens=true"]
    assert train_demo_model.run(command) == 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert "number_tokens=true" in card and '"1000"' in (tmp_path / "model" / "tokenizer.json").read_text()
    assert "the majority baseline" in card and card.count("\n| caption") == 2
    made = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"modeling_mfrsvlm.py", "model.safetensors", "processor_config.json", "README.md"} <= made
    assert not any("guidance" in name for name in made)
    assert train_demo_model.run(command) == 1
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.integration
def test_training_continues_from_a_folder(tmp_path):
    """With its encoder, which is frozen, its tokenizer and its projector."""
    start = str(MODEL)
    command = [CONFIG, f"--start={start}", f"--output={tmp_path / 'model'}", f"--work={tmp_path / 'work'}"]
    settings = (
        "--lists=true",
        "--canvas_scale=4",
        "--guidance=false",
        "--test_scenes=0",
        "--learning_rate=1e-3",
        "--warmup_steps=0",
    )
    assert train_demo_model.run([*command, *TINY, *settings]) == 0
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (start, tmp_path / "model"))
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if name.endswith("stack_embedding"):
            assert len(tensor) == 4 * len(before[name])  # a phase of the larger canvas each
            continue
        difference = (tensor.float() - before[name].float()).abs().max()
        assert difference == 0 if "vision_tower." in name else difference < 0.05, name
    assert any(not torch.equal(before[name], after[name]) for name in before if "_proj.weight" in name)
    assert (tmp_path / "model/tokenizer.json").read_bytes() == (Path(start) / "tokenizer.json").read_bytes()
    assert not list((tmp_path / "work").glob("encoder-*.pt"))
    settings = json.loads((tmp_path / "model/processor_config.json").read_text())
    assert settings["box_format"]["prompt"] == "Give the bounding box of every {object}."
    assert json.loads((tmp_path / "model/generation_config.json").read_text())["max_new_tokens"] == 256
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert (config["canvas_scale"], config["window_sizes"]) == (4, [512])
    assert json.loads((tmp_path / "model/processor_config.json").read_text())["image_processor"]["canvas_scale"] == 4
    card = " ".join((tmp_path / "model/README.md").read_text().split())
    assert "It continues an earlier model, and was trained on 12 synthetic scenes" in card
    assert "--start FOLDER` with max_steps=1, scenes=12, seed=0, canvas_scale=4, lists=true" in card


def test_wrong_settings_are_named(tmp_path, capsys):
    (tmp_path / "empty.yaml").write_text("")
    for words, message in (
        ([], "output is missing"),
        (["--output=x", "--scenes=0"], "nothing to train on"),
        (["--outptu=x"], "Did you mean 'output'"),
        (["--output=x", "--encoder=efficientnet", "--real_data=x", "--canvas_scale=4"], "photographs have their own sizes"),
    ):
        assert train_demo_model.run([str(tmp_path / "empty.yaml"), *words]) == 1
        assert message in capsys.readouterr().err


def test_one_process_only(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(DemoModelTrainingArguments, "world_size", 2)
    with pytest.raises(SettingsError, match="not in 2"):
        make_trainer(tokenizer, tmp_path)


def test_tables_have_lists_only_if_they_were_asked_for():
    def cell(value):
        return {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 9}

    kinds = {task: cell(0.5) for task in ("area", "presence", "comparison", "position")}
    results = {
        "classification": {"accuracy": cell(0.5)}, "vqa": {"per_type": kinds}, "counting": {"exact": cell(0.5)},
        "grounding": {"accuracy_0.5": cell(0.5)}, "captioning": {"caption_exact": cell(0.5), "caption_facts": cell(0.5)},
    }  # fmt: skip
    lists = {"detection": {"f1": cell(0.25), "precision": cell(0.9)}, "pointing": {"f1": cell(0.75)}}
    for found, rows in ((results, 9), (results | lists, 11)):
        figures = train_demo_model.scene_figures(found)
        assert len(figures) == rows
        table = train_demo_model.scene_table(dict.fromkeys(("image", "blind", "majority"), figures), make_config(10))
        assert "4 to 8 pixels long on the canvas of 256, and 2 to 4 in the global view" in table
        assert ("| detection | 25.0 | 24.0 - 26.0 | 9 | 25.0 | 25.0 |" in table) == (rows == 11)
        assert ("*detection* and *pointing* are the F1 scores" in table) == (rows == 11)
