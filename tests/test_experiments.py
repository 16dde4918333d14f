"""The experiments: packing changes nothing, greedy decoding is what is scored, targets say what stands where."""

import json

import numpy as np
import pytest
import torch

from mfrsvlm.experiments import ablation, box, decoder, encoder, readout
from mfrsvlm.experiments.dataset import CANVAS, canvas_and_view, plan
from mfrsvlm.experiments.decoder import (
    Prompts,
    encode_scenes,
    find_nouns,
    generate_answers,
    greedy_exact,
    make_processor,
    make_tokenizer,
    pack,
    packed_logits,
    start_places,
    train_decoder,
)
from mfrsvlm.experiments.encoder import LOSS_WEIGHT, load_encoder, object_table, pretrain, token_targets
from mfrsvlm.experiments.geometry import make_config
from mfrsvlm.experiments.guidance import Guidance
from mfrsvlm.modeling_mfrsvlm import MFRSVLMForConditionalGeneration
from mfrsvlm.scenes import CLASSES, KINDS, ask, draw


SCENES = [plan("train", index) for index in range(4)]


class Drawn:
    """What `SceneImages` holds, in memory."""

    def __init__(self, scenes):
        self.scenes = scenes
        self.canvases, self.views = map(np.stack, zip(*map(canvas_and_view, scenes), strict=True))

    def __len__(self):
        return len(self.scenes)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer([plan("train", index) for index in range(60)])


def make_model(tokenizer, **overrides):
    torch.manual_seed(0)
    model = MFRSVLMForConditionalGeneration(make_config(len(tokenizer), **overrides)).eval()
    # Untrained features are nearly the same everywhere: larger weights make a mix-up visible.
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(20)
    return model


ARCHITECTURES = [
    {},
    {"window_sizes": [], "injection_layers": []},
    {"routing": "token", "routing_size": 16},
    {"injection_type": "cross_attention", "cross_attention_size": 48, "cross_attention_heads": 4},
]


@pytest.mark.parametrize("overrides", ARCHITECTURES, ids=["gated", "global", "token", "cross"])
def test_packed_questions_are_what_separate_prompts_are(tokenizer, overrides, tmp_path):
    model = make_model(tokenizer, **overrides)
    processor = make_processor(model.config, tokenizer)
    prompts = Prompts(processor)
    features = encode_scenes(model, Drawn(SCENES[:2]), tmp_path / "features.npy", "image")
    rows = [ask(scene) for scene in SCENES[:2]]
    packed = pack([[prompts.branch(q) for q in row] for row in rows], prompts.prefix, tokenizer.pad_token_id)
    with torch.inference_mode():
        logits, labels, _ = packed_logits(model, packed, torch.from_numpy(features.astype(np.float32)))
    at = 0
    for scene, row in zip(SCENES, rows, strict=False):
        image = draw(scene)
        for question in row:
            content = [{"type": "image", "image": image}, {"type": "text", "text": question.text}]
            conversation = [
                {"role": "user", "content": content},
                {"role": "assistant", "content": [{"type": "text", "text": question.answer}]},
            ]
            inputs = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt")
            length = len(prompts.branch(question).answer)
            assert labels[at : at + length].tolist() == inputs["input_ids"][0, -length:].tolist()
            with torch.inference_mode():
                alone = model(**inputs).logits[0, -length - 1 : -1]
            # Cached features are float16.
            torch.testing.assert_close(logits[at : at + length], alone, rtol=1e-2, atol=1e-2)
            at += length
    assert at == len(labels)


def test_training_learns_and_exact_scores_are_those_of_generate(tokenizer, tmp_path):
    model = make_model(tokenizer)
    prompts = Prompts(make_processor(model.config, tokenizer))
    features = encode_scenes(model, Drawn(SCENES), tmp_path / "features.npy", "image")
    tower = {name: value.clone() for name, value in model.model.vision_tower.state_dict().items()}
    mix = {"presence": 1, "classification": 1}
    packed = pack(
        [[prompts.branch(q) for q in ask(scene, tuple(mix))] for scene in SCENES], prompts.prefix, tokenizer.pad_token_id
    )

    @torch.inference_mode()
    def loss():
        logits, labels, _ = packed_logits(model, packed, torch.from_numpy(np.array(features)).float())
        return torch.nn.functional.cross_entropy(logits, labels).item()

    before = loss()
    train_decoder(model, prompts, SCENES, features, steps=25, batch=4, rounds=1, mix=mix)
    assert loss() < 0.5 * before
    for name, value in model.model.vision_tower.state_dict().items():
        assert torch.equal(value, tower[name]), f"{name} was not frozen"
    scores = greedy_exact(model, prompts, SCENES, features, tasks=("presence", "classification"))
    questions = [(i, q) for i, scene in enumerate(SCENES) for q in ask(scene, ("presence", "classification"))]
    said = generate_answers(model, prompts, questions, features)
    for task, values in scores.items():
        generated = [float(a == q.answer) for (_, q), a in zip(questions, said, strict=True) if q.task == task]
        assert values == generated


def test_short_attention_is_attention():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 30, 8)  # (B, H, S, d) each
    mask = torch.rand(2, 1, 30, 30) < 0.5
    mask |= torch.eye(30, dtype=torch.bool)  # no row sees nothing
    ours, _ = decoder.short_attention(None, query, key, value, mask, 8**-0.5)
    theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(ours, theirs.transpose(1, 2))


def test_nouns_are_found_at_their_last_token(tokenizer):
    prompts = Prompts(make_processor(make_config(len(tokenizer)), tokenizer))
    rows = [[prompts.branch(question) for question in ask(scene)] for scene in SCENES]
    packed = pack(rows, prompts.prefix, tokenizer.pad_token_id)
    found = find_nouns(rows, len(prompts.prefix))
    spoken = [noun for row in rows for branch in row for noun in decoder.NOUN.findall(branch.question.text)]
    assert len(found) == len(spoken) > len(SCENES)
    for (row, position, kind), noun in zip(found.tolist(), spoken, strict=True):
        text = tokenizer.decode(packed["input_ids"][row, position - 8 : position + 1])
        assert text.endswith(noun) and list(KINDS)[kind] == list(KINDS)[decoder.NOUNS[noun]]


def test_guidance_is_satisfied_by_attention_to_the_objects(tokenizer, tmp_path):
    """Attention as it shall be has no loss, and what `Guidance` computes is what the attention layers do."""
    model = make_model(tokenizer)
    model.set_attn_implementation("eager")
    prompts = Prompts(make_processor(model.config, tokenizer))
    features = encode_scenes(model, Drawn(SCENES), tmp_path / "features.npy", "image")
    rows = [[prompts.branch(question) for question in ask(scene)] for scene in SCENES]
    packed = pack(rows, prompts.prefix, tokenizer.pad_token_id)
    prefix, first = len(prompts.prefix), prompts.prefix.index(prompts.processor.image_token_id)
    # The scenes of the batch are others than the first of all scenes: an index that is mixed up shows.
    guidance = Guidance(model, [plan("validation", 0), *SCENES], first, prefix)
    weights, inputs = {}, {}
    for number, attention in guidance.layers.items():
        attention.register_forward_hook(lambda module, args, output, number=number: weights.update({number: output[1]}))
        attention.register_forward_pre_hook(
            lambda module, args, kwargs, number=number: inputs.update({number: kwargs["hidden_states"]}), with_kwargs=True
        )
    with torch.no_grad():
        packed_logits(model, packed, torch.from_numpy(np.array(features)).float())
        nouns = find_nouns(rows, prefix)
        losses = guidance(np.arange(len(SCENES)) + 1, nouns)
        targets = torch.from_numpy(np.stack([token_targets(object_table(scene), 0, 0, CANVAS, 8) for scene in SCENES]))
        classes = torch.tensor([list(CLASSES).index(scene.scene_class) for scene in SCENES])
        seen = sum(
            LOSS_WEIGHT[name] * value.item()
            for head, states in zip(guidance.seen, inputs.values(), strict=True)
            for name, value in encoder.losses(head, states[:, first : first + 64], targets, classes).items()
        )
    assert losses["seen"].item() == pytest.approx(seen, rel=1e-4)
    expected = 0.0
    for number in guidance.layers:
        for row, position, kind in nouns.tolist():
            held = torch.zeros(prefix)
            for name, x, y, *_ in object_table(SCENES[row]):
                if name == kind:
                    held[first + int(y // 32) * 8 + int(x // 32)] += 1
            for head, shares in enumerate((held.clone(), held.clone())):
                if head == 0 or held.sum() == 0:
                    shares[0] = 1
                goal = shares / shares.sum()
                seen = weights[number][row, head, position, :prefix]
                seen = seen / seen.sum()  # what a noun attends to in its own branch is left out
                expected += torch.nn.functional.kl_div(seen.log(), goal, reduction="sum").item() / (2 * len(nouns))
    assert losses["attention"].item() == pytest.approx(expected, rel=1e-3)
    assert set(losses) == set(decoder.GUIDANCE_WEIGHT) and all(value > 0 for value in losses.values())
    guidance.stop()
    guidance.heard.clear()
    with torch.no_grad():
        packed_logits(model, packed, torch.from_numpy(np.array(features)).float())
    assert not guidance.heard


def test_places_start_apart_and_as_large_as_the_visual_tokens(tokenizer, tmp_path):
    model = make_model(tokenizer)
    features = encode_scenes(model, Drawn(SCENES), tmp_path / "features.npy", "image")
    start_places(model, features)
    table = model.model.visual_position_embedding.weight.detach()  # (T, D)
    with torch.no_grad():
        visual = model.model.multi_modal_projector(torch.from_numpy(np.array(features[:, 0])).float())
    assert table.pow(2).mean().sqrt() == pytest.approx(visual.std().item(), rel=0.05)
    distances = torch.cdist(table, table) + torch.eye(len(table)) * 1e9
    nearest = distances.argmin(1)  # next to it on the grid of 8 by 8, row by row
    steps = (nearest - torch.arange(64)).abs()
    assert set(steps.tolist()) <= {1, 8}


def test_views_and_canvases_are_those_of_the_processor(tokenizer):
    model = make_model(tokenizer)
    processor = make_processor(model.config, tokenizer)
    canvas, view = canvas_and_view(SCENES[0])
    pixels = processor.image_processor(draw(SCENES[0]), return_tensors="np")
    seen, first = pixels["pixel_values"][0, : 2 * 3 * 128 * 128].reshape(2, 3, 128, 128)
    np.testing.assert_allclose(view.transpose(2, 0, 1) / 127.5 - 1, seen, atol=1e-5)
    np.testing.assert_allclose(canvas[:128, :128].transpose(2, 0, 1) / 127.5 - 1, first, atol=1e-5)


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


def test_encoder_cost_counts_pixels(tokenizer):
    def passes(**overrides):
        return ablation.encoder_passes(make_config(10, **overrides))

    assert passes(window_sizes=[], injection_layers=[]) == 1
    assert passes(window_sizes=[128]) == 1 + 9
    assert passes(window_sizes=[128, 64]) == 1 + 9 + 49 / 4
    assert passes(window_sizes=[64], window_overlap=0.0, window_encoding="resize") == 1 + 16


def test_every_arm_is_a_valid_model():
    for arm in ablation.ARMS.values():
        features = arm.features
        make_config(
            10,
            features.encoder,
            window_sizes=list(features.window_sizes),
            window_overlap=features.window_overlap,
            window_encoding=features.window_encoding,
            window_weighting=features.window_weighting,
            **arm.injection,
        )


def test_summary_compares_question_by_question(tmp_path):
    rng = np.random.default_rng(0)
    base = {task: (rng.random(200) < 0.5).astype(float).tolist() for task in ablation.MEASURES}
    better = {task: np.maximum(values, rng.random(200) < 0.4).tolist() for task, values in base.items()}
    cost = {"encoder_passes": 1.0, "decoder_tokens": 10, "seconds": 1.0, "peak_memory_gb": 1.0}
    rows = [{"arm": ablation.REFERENCE, "seed": 0, "scores": base, **cost}]
    rows += [{"arm": "zero ring", "seed": seed, "scores": scores, **cost} for seed, scores in enumerate((base, better))]
    first, second = ablation.summarise(rows)
    assert first["gain"]["count"] == (0, 0, 0)
    assert second["tasks"]["count"][0] == pytest.approx((np.mean(base["count"]) + np.mean(better["count"])) / 2)
    mean, low, high = second["gain"]["count"]
    assert low < mean < high and low > 0
    ablation.write_table([first, second], {"count": 0.1}, tmp_path / "table.md")
    assert (tmp_path / "table.md").read_text().count("| zero ring |") == 2
    # Without the arm that others are compared with, there is no comparison.
    ablation.write_table(ablation.summarise(rows[1:]), {"count": 0.1}, tmp_path / "table.md")
    assert (tmp_path / "table.md").read_text().count("| zero ring |") == 1
    assert ablation.REFERENCE not in (tmp_path / "table.md").read_text()


def test_a_log_holds_runs_of_other_arms_and_lengths(tmp_path):
    log = tmp_path / "runs.jsonl"
    assert ablation.finished_runs(log, ["zero ring"], 10) == []
    rows = [{"arm": arm, "seed": 0, "steps": steps} for arm in ("zero ring", "no overlap") for steps in (10, 20)]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ablation.finished_runs(log, ["zero ring"], 10) == rows[:1]
    assert ablation.finished_runs(log, ["zero ring", "no overlap"], 20) == rows[1::2]


def test_read_out_pools_tokens_and_phases():
    features = np.random.default_rng(0).normal(size=(3, 1 + 16, 4, 5)).astype(np.float16)
    pooled = readout.pool(features, 4)
    assert pooled.shape == (3, 5 * 5)
    np.testing.assert_allclose(pooled[:, :5], features[:, 0].mean(1), atol=2e-3)
    # Stacks are ordered by scale, depth and phase: four phases make a group.
    np.testing.assert_allclose(pooled[:, 10:15], features[:, 5:9].mean((1, 2)), atol=2e-3)
    np.testing.assert_allclose(readout.pool(features[:, :1], 0), pooled[:, :5])


def test_read_out_counts_objects_and_small_ones():
    table = readout.targets(SCENES)
    assert table[:, : len(KINDS)].tolist() == [list(scene.counts.values()) for scene in SCENES]
    small = [sum(item.length < 12 for item in scene.objects) for scene in SCENES]
    assert table[:, len(KINDS) :].sum(1).tolist() == small


def run_command(monkeypatch, module, *arguments):
    monkeypatch.setattr("sys.argv", [module.__name__, *map(str, arguments)])
    module.main()


TINY = ("--crowded-scenes", 2, "--encoder-steps", 1)


@pytest.mark.slow
def test_ablation_command_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    arms = {name: ablation.Arm(ablation.ARMS[name].features, ablation.ARMS[name].injection) for name in ablation.KEPT}
    monkeypatch.setattr(ablation, "ARMS", arms)
    sizes = (
        "--train-scenes",
        13,
        "--test-scenes",
        4,
        "--start-scenes",
        13,
        "--start-steps",
        2,
        "--steps",
        2,
        "--workers",
        1,
    )
    command = ("--work", tmp_path / "work", "--output", tmp_path / "out", *sizes, *TINY)
    run_command(monkeypatch, ablation, *command)
    assert "[2/2" in capsys.readouterr().out
    table = (tmp_path / "out" / "table.md").read_text()
    assert all(f"| {name} | 1 |" in table for name in arms) and (tmp_path / "out" / "plot.png").stat().st_size > 10_000
    assert len(list((tmp_path / "work" / "models-2").iterdir())) == 2
    run_command(monkeypatch, ablation, *command)
    assert "[1/" not in capsys.readouterr().out
    assert (tmp_path / "out" / "table.md").read_text() == table


@pytest.mark.slow
def test_read_out_command(tmp_path, monkeypatch):
    sets = {name: readout.SETS[name] for name in ("global view only", ablation.REFERENCE)}
    monkeypatch.setattr(readout, "SETS", sets)
    sizes = ("--train-scenes", 12, "--test-scenes", 4)
    run_command(monkeypatch, readout, "--work", tmp_path / "work", "--output", tmp_path / "out", *sizes, *TINY)
    assert (tmp_path / "out" / "readout.md").read_text().count("\n") == 4
    assert (tmp_path / "out" / "encoders.md").read_text().count("global view") == 2


@pytest.mark.slow
def test_box_command_makes_a_hub_folder(tmp_path, monkeypatch):
    command = ("--work", tmp_path / "work", "--output", tmp_path / "model", "--scenes", 12, "--test-scenes", 3, "--steps", 1)
    run_command(monkeypatch, box, *command, *TINY)
    assert "No better than chance:" in (tmp_path / "model" / "README.md").read_text()
    with pytest.raises(SystemExit):
        run_command(monkeypatch, box, *command, *TINY)
    made = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"modeling_mfrsvlm.py", "model.safetensors", "processor_config.json", "accuracy.json"} <= made
