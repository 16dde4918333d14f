"""Each measurement of the look inside against an independent computation or a planted truth, and the command."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import r2_score
from tiny_scenes import plan

from mfrsvlm.experiments.estimates import plain, r_squared, ratio
from mfrsvlm.experiments.linear_probe import PENALTIES, linear_probe
from mfrsvlm.experiments.look_inside.__main__ import look_inside, main
from mfrsvlm.experiments.look_inside.attention import measure_attention
from mfrsvlm.experiments.look_inside.probes import OBJECTS, auc, cell_counts, probe_prompts, probe_tokens
from mfrsvlm.experiments.look_inside.reading import (
    Reading,
    attention_mass,
    count_questions,
    load,
    prompts_and_answers,
    read,
    switched_off,
)
from mfrsvlm.experiments.look_inside.routing import (
    measure_routing,
    read_routers,
    recorded_routers,
    relative_entropy,
    routing_shift,
    summarize_router,
)
from mfrsvlm.modeling_mfrsvlm import MFRSVLMForConditionalGeneration, stitch_windows
from mfrsvlm.scenes import KINDS, Scene, SceneObject, ask, draw
from mfrsvlm.scenes.questions import possible_kinds
from mfrsvlm.training.demo_model.architecture import make_config, make_processor, make_tokenizer
from mfrsvlm.training.demo_model.scene_questions import dialogues


SCENES = [plan("train", index) for index in range(12)]


def save_folder(folder, seed: int = 0, **overrides) -> None:
    """A Hub folder of an untrained model whose attention and routing are far from uniform."""
    tokenizer = make_tokenizer(dialogues(SCENES))
    torch.manual_seed(seed)
    config = make_config(len(tokenizer), **overrides)
    model = MFRSVLMForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "vision_tower" not in name:
                parameter.mul_(4)
    model.save_pretrained(folder)
    make_processor(config, tokenizer).save_pretrained(folder)


@pytest.fixture(scope="module")
def with_injection(tmp_path_factory):
    folder = tmp_path_factory.mktemp("with")
    save_folder(folder, window_sizes=[128, 64], window_overlap=0)
    return folder


@pytest.fixture(scope="module")
def with_token_routing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("token")
    save_folder(folder, routing="token", routing_size=16)
    return folder


@pytest.fixture(scope="module")
def without_injection(tmp_path_factory):
    folder = tmp_path_factory.mktemp("without")
    save_folder(folder, seed=1, window_sizes=[], injection_layers=[])
    return folder


@pytest.fixture(scope="module")
def scene() -> Scene:
    return SCENES[0]


# Attention mass and states


def turned(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


@torch.inference_mode()
def mass_by_hand(model, inputs) -> np.ndarray:
    """(S, L): attention mass on visual tokens of one unpadded prompt, from what goes into each attention layer."""
    masses = []
    visual = (inputs["input_ids"][0] == model.config.image_token_id).tolist()

    def hook(module, args, kwargs):
        hidden, (cos, sin) = kwargs["hidden_states"][0], kwargs["position_embeddings"]
        length = len(hidden)
        query, key = (
            turned(project(hidden).view(length, -1, module.head_dim), cos[0][:, None], sin[0][:, None])
            for project in (module.q_proj, module.k_proj)
        )
        rows = []
        for position in range(length):
            scores = torch.einsum("hc,shc->hs", query[position], key[: position + 1]) / module.head_dim**0.5
            weights = scores.softmax(-1)
            rows.append(sum(weights[:, s].mean().item() for s in range(position + 1) if visual[s]))
        masses.append(rows)

    handles = [
        layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True) for layer in model.model.language_model.layers
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return np.array(masses).T


@pytest.mark.parametrize("folder", ["with_injection", "without_injection"])
def test_attention_mass_equals_a_computation_by_hand_on_each_prompt_alone(folder, scene, request):
    model, processor = load(request.getfixturevalue(folder))
    image = draw(scene)
    questions = ask(scene, ["classification", "caption", "count"])
    assert len({len(processor.tokenizer(question.text).input_ids) for question in questions}) > 1  # so that some are padded
    reading = read(model, processor, image, questions)

    for index, question in enumerate(questions):
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}],
            add_generation_prompt=True,
        )
        length = processor(images=image, text=prompt, return_tensors="pt")["input_ids"].shape[1]
        inputs = processor(images=image, text=f"{prompt} {question.answer}", return_tensors="pt")
        mass = mass_by_hand(model, inputs)
        # Rounding differs between processors, by up to 1e-5 in the last layer; another row or a wrong mask by 1e-3 and more.
        np.testing.assert_allclose(reading.first_mass[index], mass[length - 1], atol=5e-5)
        np.testing.assert_allclose(reading.answer_mass[index], mass[length - 1 :].mean(0), atol=5e-5)
        assert reading.uniform_mass[index] == pytest.approx(model.config.image_seq_length / length)

        with torch.inference_mode():
            states = model(**inputs, output_hidden_states=True).hidden_states
        visual = inputs["input_ids"][0] == model.config.image_token_id
        for layer, state in enumerate(states):
            scale = state.abs().max().item()
            np.testing.assert_allclose(reading.prompt_states[index, layer], state[0, length - 1], atol=1e-4 * scale)
            # Those of the first question are everyone's: the question comes after the image.
            np.testing.assert_allclose(reading.visual_states[layer], state[0, visual], atol=1e-4 * scale)
    assert reading.first_mass.std() > 1e-3


@torch.inference_mode()
def test_attention_rows_sum_to_one(with_injection, scene):
    model, processor = load(with_injection)
    batch = prompts_and_answers(processor, draw(scene), ask(scene, ["area"]))
    batch.pop("first"), batch.pop("predicts")
    outputs = model.model(**batch, output_attentions=True)
    assert len(outputs.attentions) == model.config.text_config.num_hidden_layers
    everywhere = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    for attention in outputs.attentions:
        torch.testing.assert_close(attention_mass(attention, everywhere), everywhere.float())


def test_mean_mass_weighs_every_question_alike_and_leaves_the_probes_questions_out(scene):
    def reading(tasks, masses):
        questions = [*ask(scene, tasks), *count_questions(scene)]
        masses = np.array([*masses, *[9.0] * (len(questions) - len(masses))])
        empty = np.zeros(0)
        return Reading(questions, masses[:, None] * [1, 2], masses[:, None] * [3, 4], masses, empty, empty)

    measured = measure_attention([reading(["area", "classification"], [0.1, 0.2]), reading(["area"], [0.6])])
    np.testing.assert_allclose(measured["first"].value, [0.3, 0.6])
    np.testing.assert_allclose(measured["answer"].value, [0.9, 1.2])
    assert measured["uniform"].value == pytest.approx(0.3)
    np.testing.assert_allclose(measured["by_task"]["area"], [0.35, 0.7])
    np.testing.assert_allclose(measured["by_task"]["classification"], [0.2, 0.4])


# Estimates


def test_ratio_and_its_interval():
    rng = np.random.default_rng(1)
    values = rng.normal(0.5, 0.1, (400, 1))
    estimate = ratio(values, np.ones_like(values))
    numbers = estimate.numbers()
    assert estimate.value[0] == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert numbers["low"][0] == pytest.approx(values.mean() - half, abs=0.2 * half)
    assert numbers["high"][0] == pytest.approx(values.mean() + half, abs=0.2 * half)

    # A difference is paired: what two models share does not widen it.
    difference = (ratio(values + 0.1, np.ones_like(values)) - estimate).numbers()
    np.testing.assert_allclose([difference[name][0] for name in ("low", "mean", "high")], 0.1)


def test_a_ratio_without_anything_to_divide_by_is_null():
    assert plain(ratio(np.zeros((3, 2)), np.array([[0, 1]] * 3))) == {
        "mean": [None, 0.0],
        "low": [None, 0.0],
        "high": [None, 0.0],
    }


# Probes


def planted(signal: float, seed: int = 0):
    """States, a target that is linear in them and one that is noise, and rows of 50 scenes."""
    rng = np.random.default_rng(seed)
    states = rng.normal(3, 1, (1000, 20)) * np.geomspace(0.01, 100, 20)
    direction = np.random.default_rng(9).normal(size=20) / np.geomspace(0.01, 100, 20)
    target = (states - states.mean(0)) @ direction
    return (
        states,
        np.column_stack([signal * target + rng.normal(0, 0.1, 1000), rng.normal(size=1000)]),
        np.arange(1000) // 20,
    )


def test_probe_recovers_a_planted_signal_and_fails_on_noise():
    states, targets, scenes = planted(1.0)
    test_states, test_targets, test_scenes = planted(1.0, seed=1)
    predicted = linear_probe(states, targets, scenes, test_states)
    estimate = r_squared(predicted, test_targets, test_scenes)
    np.testing.assert_allclose(estimate.value, r2_score(test_targets, predicted, multioutput="raw_values"))
    assert estimate.value[0] > 0.98
    assert abs(estimate.value[1]) < 0.05
    numbers = estimate.numbers()
    assert (numbers["low"] <= estimate.value).all() and (estimate.value <= numbers["high"]).all()
    assert auc(predicted[:, 0], test_targets[:, 0] > 0) > 0.98
    assert auc(predicted[:, 1], test_targets[:, 1] > 0) == pytest.approx(0.5, abs=0.08)
    # The scale of the states plays no part.
    np.testing.assert_allclose(
        linear_probe(100 * states, targets, scenes, 100 * test_states), predicted, rtol=1e-3, atol=1e-3
    )


def test_probe_is_the_ridge_of_the_best_strength():
    states, targets, scenes = planted(0.02)
    test_states = planted(0.02, seed=1)[0]
    held_out = scenes >= 40

    def ridge(states, target, new, penalty):
        mean, scale = states.mean(0), states.std(0)
        z = (states - mean) / scale
        weights = np.linalg.solve(z.T @ z + penalty * len(z) * np.eye(20), z.T @ (target - target.mean()))
        return (new - mean) / scale @ weights + target.mean()

    predicted = linear_probe(states, targets, scenes, test_states)
    for column, target in enumerate(targets.T):
        errors = [
            np.square(ridge(states[~held_out], target[~held_out], states[held_out], p) - target[held_out]).sum()
            for p in PENALTIES
        ]
        best = PENALTIES[int(np.argmin(errors))]
        np.testing.assert_allclose(predicted[:, column], ridge(states, target, test_states, best), rtol=1e-3, atol=1e-4)


def test_auc_counts_pairs():
    rng = np.random.default_rng(0)
    scores, present = rng.integers(0, 5, 60).astype(float), rng.random(60) < 0.3
    pairs = [np.sign(a - b) / 2 + 0.5 for a in scores[present] for b in scores[~present]]
    assert auc(scores, present) == pytest.approx(np.mean(pairs))
    assert math.isnan(auc(scores, np.zeros(60, dtype=bool)))


def test_cell_counts():
    objects = (
        SceneObject("car", 10, 70, 9, 0, 0.1),
        SceneObject("car", 20, 80, 15, 0, 0.1),
        SceneObject("tank", 511.9, 0, 10, 0, 0.1),
    )
    counts = cell_counts(Scene(0, 512, "desert", objects), 8).reshape(8, 8, -1)
    column = {name: index for index, name in enumerate(OBJECTS)}
    assert counts[1, 0].tolist() == [2 if n in ("all", "car") else 1 if n == "small" else 0 for n in column]
    assert counts[0, 7, column["tank"]] == 1
    assert counts[..., column["all"]].sum() == 3
    for kind in KINDS:
        assert counts[..., column[kind]].sum() == sum(item.kind == kind for item in objects)


def planted_readings(scenes, signal: bool):
    """Readings whose states hold the truth (or not) in layer 1 and noise in layer 0, and are otherwise empty."""
    rng = np.random.default_rng(len(scenes))
    readings = []
    for scene in scenes:
        questions = [*ask(scene, ["area"]), *count_questions(scene)]
        visual, prompt = rng.normal(size=(2, 64, 9)), rng.normal(size=(len(questions), 2, 9))
        if signal:
            visual[1, :, : len(OBJECTS)] = 0.01 * visual[1, :, : len(OBJECTS)] + cell_counts(scene, 8)
            for row, kind in zip(prompt[1:, 1], possible_kinds(scene), strict=True):
                row[0] = scene.counts[kind]
                row[1 : 1 + len(KINDS)] = [kind == other for other in KINDS]
        mass = np.zeros((len(questions), 1))
        readings.append(Reading(questions, mass, mass, mass[:, 0], visual, prompt))
    return readings


@pytest.mark.parametrize("signal", [True, False])
def test_probes_read_the_right_target_of_the_right_row(signal):
    scenes, test_scenes = [plan("validation", i) for i in range(60)], [plan("test", i) for i in range(30)]
    arguments = planted_readings(scenes, signal), scenes, planted_readings(test_scenes, signal), test_scenes
    tokens, prompts = probe_tokens(*arguments), probe_prompts(*arguments)
    assert tokens["count"].value.shape == tokens["presence_auc"].shape == (2, len(OBJECTS))
    assert prompts["asked_count"].value.shape == (2,)
    assert prompts["any_count"].value.shape == (2, len(KINDS))
    for values in (tokens["count"].value[0], prompts["asked_count"].value[0], prompts["any_count"].value):
        assert np.max(values) < (0.1 if values.ndim < 2 else 0.6)
    if signal:
        assert tokens["count"].value[1].min() > 0.95
        assert tokens["presence_auc"][1].min() > 0.99
        assert prompts["asked_count"].value[1] > 0.95
    else:
        assert tokens["count"].value[1].max() < 0.05
        assert abs(tokens["presence_auc"][1, 0] - 0.5) < 0.08
        assert prompts["asked_count"].value[1] < 0.1


# Routing


@torch.inference_mode()
def router_weights(model, processor, image: Image.Image, questions) -> np.ndarray:
    """(J, questions, K, T or 1)."""
    batch = prompts_and_answers(processor, image, questions)
    length = len(questions)
    with recorded_routers(model) as records:
        model(
            batch["input_ids"],
            batch["pixel_values"].repeat(length, 1),
            batch["attention_mask"],
        )
    assert all(len(record) == 1 for record in records)
    model(batch["input_ids"][:1], batch["pixel_values"], batch["attention_mask"][:1])
    assert all(len(record) == 1 for record in records)  # the hooks are gone
    return np.stack([record[0] for record in records])


@pytest.mark.parametrize("folder", ["with_injection", "with_token_routing"])
def test_router_weights_sum_to_one_and_do_not_depend_on_the_question(folder, scene, request):
    model, processor = load(request.getfixturevalue(folder))
    weights = router_weights(model, processor, draw(scene), ask(scene, ["area", "caption"]))
    config = model.config
    tokens = config.image_seq_length if config.routing == "token" else 1
    assert weights.shape == (len(config.injection_layers), 2, config.num_detail_stacks, tokens)
    np.testing.assert_allclose(weights.sum(2), 1, atol=1e-5)
    np.testing.assert_allclose(weights[:, 0], weights[:, 1], atol=1e-4)
    assert relative_entropy(weights, 2).max() < 0.9999

    grids = read_routers(model, processor, [scene])
    np.testing.assert_allclose(grids, weights[:, :1], atol=1e-4)


@pytest.mark.parametrize("stack", [(0, 1, 0, 1), (1, 0, 1, 0)])
@torch.inference_mode()
def test_the_preferred_stack_of_a_rigged_stack_router_has_the_right_name(with_injection, scene, stack):
    model, processor = load(with_injection)
    scale, depth, row, column = stack
    config, inner = model.config, model.model
    (pixels,) = prompts_and_answers(processor, draw(scene), ask(scene, ["area"]))["pixel_values"]
    parts = pixels.split(config.packed_lengths)[1:]

    # The mean token of every stack by name, made from its windows without any list of stacks.
    names, keys = [], []
    for s, (window, part) in enumerate(zip(config.windows, parts, strict=True)):
        pixels = part.view(-1, 3, window.size, window.size)
        for d, features in enumerate(inner._encode_windows(pixels, window, None)):
            canvas = stitch_windows(features.unflatten(0, (1, -1)), window, 16, config.window_weighting)
            for r, c in ((0, 0), (1, 1), (0, 1), (1, 0)):
                tokens = inner.multi_modal_projector(canvas[0, :, r::2, c::2].flatten(1).T)
                names.append((s, d, r, c))
                keys.append(torch.nn.functional.layer_norm(tokens.mean(0), [192]))
    others = torch.stack(keys)
    # The query that singles the wanted key out, as keys are the normalized mean tokens themselves.
    wanted = torch.tensor([1.0 if name == stack else 0.0 for name in names])
    query = torch.linalg.lstsq(others.double(), wanted.double()[:, None], driver="gelsd").solution[:, 0].float()
    for injector in inner.injectors:
        router = injector.router
        router.query_proj.weight.zero_()
        router.query_proj.bias.copy_(10 * 192**0.5 * query)
        router.key_proj.weight.copy_(torch.eye(192))
        router.key_proj.bias.zero_()
    for weights in read_routers(model, processor, [scene]):
        summary = summarize_router(weights, config)
        assert summary["mean"][stack] > 0.9
        assert summary["by_scale"][scale] > 0.9
        assert summary["by_depth"][depth] > 0.9
        assert summary["by_scale_and_depth"][scale, depth] > 0.9
        assert summary["by_phase"][row, column] > 0.9


@pytest.mark.parametrize("stack", [(0, 0, 1, 0), (0, 1, 0, 1)])
@torch.inference_mode()
def test_the_preferred_stack_of_a_rigged_token_router_has_the_right_name(with_token_routing, scene, stack):
    model, processor = load(with_token_routing)
    mark = torch.randn(16, generator=torch.Generator().manual_seed(0))
    for injector in model.model.injectors:
        injector.stack_embedding.zero_()
        injector.stack_embedding[np.ravel_multi_index(stack, (1, 2, 2, 2)), :16] = 1e4 * mark
        router = injector.router
        router.query_proj.weight.zero_()
        router.query_proj.bias.copy_(10 * mark)
        router.key_proj.weight.copy_(torch.eye(16, 192))
        router.key_proj.bias.zero_()
    for weights in read_routers(model, processor, [scene]):
        summary = summarize_router(weights, model.config)
        assert summary["mean"][stack] > 0.9
        assert summary["by_phase"][stack[2:]] > 0.9
        assert summary["entropy"] < 0.2


def test_summary_of_known_weights():
    config = make_config(100, window_sizes=[128, 64])
    uniform = summarize_router(np.full((3, 16, 1), 1 / 16), config)
    assert uniform["entropy"] == pytest.approx(1) and uniform["entropy_of_mean"] == pytest.approx(1)
    # Every image (and token) picks one stack, each another one: decided choices that cancel in the mean.
    picky = summarize_router(np.eye(16)[:, :, None], config)
    assert picky["entropy"] == pytest.approx(0) and picky["entropy_of_mean"] == pytest.approx(1)
    for name in ("mean", "by_scale", "by_depth", "by_scale_and_depth", "by_phase"):
        assert picky[name].sum() == pytest.approx(1)


def test_routing_shift_is_told_from_chance():
    rng = np.random.default_rng(0)
    one, other = (rng.dirichlet(np.full(8, 5.0), 40)[..., None] for _ in range(2))
    same = routing_shift(one, other)
    assert same["distance"] < 1.3 * same["by_chance"]
    moved = one[:, ::-1] * np.linspace(0.2, 2, 8)[:, None]
    different = routing_shift(one, moved / moved.sum(1, keepdims=True))
    assert different["distance"] > 2 * different["by_chance"]
    assert routing_shift(np.eye(2)[[0, 0], :, None], np.eye(2)[[1, 1], :, None])["distance"] == 1


# The command


@pytest.mark.integration
def test_command(with_injection, without_injection, tmp_path, monkeypatch):
    results = []
    monkeypatch.setattr(f"{main.__module__}.look_inside", lambda *given: results.append(look_inside(*given)) or results[0])
    table, figure = tmp_path / "table.md", tmp_path / "inside.png"
    folders = [str(with_injection), str(without_injection)]
    main([*folders, "--table", str(table), "--plot", str(figure), "--scenes", "2", "--probe-scenes", "4"])
    result = results[0]
    for name in ("with", "without"):
        assert len(result[name]["attention"]["first"]["mean"]) == 6
        assert all(0 < mass < 1 for mass in result[name]["attention"]["first"]["mean"])
        assert np.shape(result[name]["visual_tokens"]["count"]["mean"]) == (7, len(OBJECTS))
        assert np.shape(result[name]["visual_tokens"]["presence_auc"]) == (7, len(OBJECTS))
        assert np.shape(result[name]["last_prompt_position"]["asked_count"]["mean"]) == (7,)
    layers = result["routing"]["layers"]
    assert len(layers) == 4
    for layer in layers:
        for group in ("small", "large"):
            assert np.shape(layer[group]["mean"]) == (2, 2, 2, 2)
            assert np.sum(layer[group]["mean"]) == pytest.approx(1, abs=1e-3)
    assert figure.stat().st_size < 200_000
    with Image.open(figure) as picture:
        assert picture.width == 1200
    rows = [line for line in table.read_text().splitlines() if line.startswith("| ")]
    first = next(row for row in rows if row.startswith("| first token of the answer, without"))
    mean, low, high = (result["without"]["attention"]["first"][name][5] for name in ("mean", "low", "high"))
    assert first.endswith(f"| {mean:.3f} [{low:.3f}, {high:.3f}] |")
    assert sum(row.split(" | ")[1] in ("small", "large") for row in rows) == 8  # router weights of each layer


def test_switching_off_leaves_the_language_model_and_the_global_view(with_injection, scene):
    model, processor = load(with_injection)
    silenced = switched_off(model)
    questions = ask(scene)[:2]
    off, on = (read(each, processor, draw(scene), questions) for each in (silenced, model))
    with torch.no_grad():
        for injector in model.model.injectors:
            injector.residual_scale.zero_()
    zero = read(model, processor, draw(scene), questions)
    np.testing.assert_allclose(off.prompt_states, zero.prompt_states, atol=1e-4)
    assert abs(off.prompt_states - on.prompt_states).max() > 1e-2


def test_a_model_without_routers_has_no_routing(without_injection):
    assert measure_routing(*load(without_injection), 2) is None


def test_too_few_scenes_are_rejected():
    with pytest.raises(ValueError, match="--scenes 1 must be at least 2"):
        look_inside("a", "b", 1, 4)
