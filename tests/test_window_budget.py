"""Windows that a scorer chooses: what is encoded, what is shown, and what the scorer learns from."""

import copy

import pytest
import torch
from tiny_models import tiny_config, tiny_inputs, tiny_model
from torch.nn.functional import interpolate

from mfrsvlm import MFRSVLMConfig, MFRSVLMForConditionalGeneration, MFRSVLMProcessor
from mfrsvlm.modeling_mfrsvlm import ScoreBySensitivity, choose_windows
from mfrsvlm.training.finetune import ModelArguments, add_lora
from mfrsvlm.training.image_features import cache_image_features
from mfrsvlm.training.trainer import part_of


SIDE_BY_SIDE = {"window_sizes": [14], "window_overlap": 0.0}  # 16 windows of 2 x 2 tokens
CHOICES = {
    "ViT, token routing": {"routing": "token"},
    "backbone, stack routing": {"vision": "resnet"},
    "cross-attention": {"injection_type": "cross_attention"},
    "resized windows": {"window_encoding": "resize"},
}
QUESTIONS = torch.tensor([[5, 6, 7, 8], [9, 10, -100, -100], [11, 12, 13, -100]])


def budget_model(budget: int | None, **overrides) -> MFRSVLMForConditionalGeneration:
    """A model whose weights, but for those of the scorer, do not depend on the budget."""
    model = tiny_model(tiny_config(**{**SIDE_BY_SIDE, **overrides}, window_budget=budget))
    state = tiny_model(tiny_config(**{**SIDE_BY_SIDE, **overrides})).state_dict()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(".window_scorer." in name for name in missing) and bool(missing) == bool(budget)
    return model


def count_pixels(model, run) -> int:
    """How many pixels the tower sees in a call."""
    seen = []
    tower = model.model.vision_tower
    hook = tower.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0] * args[0].shape[-1] ** 2))
    with torch.no_grad():
        run()
    hook.remove()
    return sum(seen)


@pytest.fixture(params=CHOICES.values(), ids=CHOICES)
def overrides(request):
    return request.param


@torch.no_grad()
def test_a_budget_of_all_windows_changes_nothing(overrides):
    full, budget = budget_model(None, **overrides), budget_model(16, **overrides)
    inputs = tiny_inputs(full.config, [1, 2])
    assert torch.equal(budget(**inputs, question_ids=QUESTIONS).logits, full(**inputs).logits)


@torch.no_grad()
@pytest.mark.parametrize("vision", ["clip", "resnet"])
def test_chosen_windows_are_encoded_and_the_others_show_the_global_view(vision):
    full, budget = (budget_model(count, vision=vision).model for count in (None, 3))
    pixels = tiny_inputs(full.config, [2])["pixel_values"]
    view = pixels[:, : 3 * 28**2].view(2, 3, 28, 28)
    if vision == "clip":
        states = full.vision_tower(view, output_hidden_states=True).hidden_states
        maps = [states[layer][:, 1:].transpose(1, 2).unflatten(2, (4, 4)) for layer in (1, 3)]
    else:
        maps = full.vision_tower(view).feature_maps
        maps = [
            full.stage_projections[key](each.movedim(1, -1)).movedim(-1, 1) for key, each in zip("24", maps, strict=True)
        ]
    chosen = choose_windows(budget.score_windows(maps), 3)
    assert chosen.shape == (2, 3) and (chosen.diff(dim=1) > 0).all()

    def canvases(model) -> torch.Tensor:
        """(depths, N, C, 8, 8), phases put together again."""
        stacks = model.get_detail_features(pixels)  # (depths * 4, N, 16, C)
        return stacks.view(2, 2, 2, 2, 4, 4, -1).permute(0, 3, 6, 4, 1, 5, 2).reshape(2, 2, -1, 8, 8)

    seen, whole = canvases(budget), canvases(full)
    for depth in range(2):
        size = maps[depth].shape[-1]
        if size <= 8:
            filled = interpolate(maps[depth], size=(8, 8), mode="bilinear")
        else:
            filled = maps[depth].unflatten(3, (8, -1)).unflatten(2, (8, -1)).mean((3, 5))
        for image in range(2):
            for number in range(16):
                place = slice(number // 4 * 2, number // 4 * 2 + 2), slice(number % 4 * 2, number % 4 * 2 + 2)
                source = whole[depth] if number in chosen[image] else filled
                assert torch.allclose(seen[depth, image][:, *place], source[image][:, *place], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget, windows", [(None, 16), (16, 16), (5, 5), (1, 1)])
def test_the_tower_sees_no_more_than_the_budget(budget, windows):
    model = budget_model(budget)
    inputs = tiny_inputs(model.config, [1, 2])
    pixels = count_pixels(model, lambda: model(**inputs))
    assert pixels == 3 * (28**2 + windows * 14**2)
    assert model.config.encoder_passes == pixels / 3 / 28**2


@torch.no_grad()
def test_batches_equal_single_images(overrides):
    model = budget_model(4, **overrides)
    inputs = tiny_inputs(model.config, [3])
    encode = model.model.get_detail_features
    together = encode(inputs["pixel_values"], question_ids=QUESTIONS)
    assert torch.equal(together, encode(inputs["pixel_values"], question_ids=QUESTIONS))
    for chunk_size in (1, 5):
        pieces = encode(inputs["pixel_values"], chunk_size, QUESTIONS)
        assert torch.allclose(together, pieces, rtol=1e-4, atol=1e-5)
    for image in range(3):
        # The padding of the longest question does not matter either.
        question = QUESTIONS[image][QUESTIONS[image] >= 0][None]
        alone = encode(inputs["pixel_values"][image : image + 1], question_ids=question)
        assert torch.allclose(together[:, image : image + 1], alone, rtol=1e-4, atol=1e-5)


def test_equal_scores_choose_the_first_windows():
    scores = torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert choose_windows(scores, 3).tolist() == [[1, 2, 3], [0, 1, 2]]


@torch.no_grad()
def test_the_question_chooses():
    """A scorer that looks for a channel of the embedding: two questions, two opposite orders."""
    model = budget_model(4)
    scorer = model.model.window_scorer
    embedding = model.get_input_embeddings().weight
    embedding[5], embedding[6] = torch.ones(32), -torch.ones(32)
    embedding[5:7, 1::2] = 0
    scorer.question_proj.weight.fill_(1.0)  # after the norm, the means are zero: one channel is read
    scorer.question_proj.weight[:, 1::2] = 0
    scorer.question_proj.bias.fill_(-1.0)  # of 1 + ...
    maps = [torch.randn(2, 24, 4, 4)] * 2
    scores = model.model.score_windows([each[:1].expand(2, -1, -1, -1) for each in maps], torch.tensor([[5], [6]]))
    assert torch.allclose(scores[0], -scores[1], atol=1e-5) and scores[0].std() > 0.1
    chosen = choose_windows(scores, 8)
    assert sorted(chosen.flatten().tolist()) == list(range(16))

    inputs = tiny_inputs(model.config, [1])
    answers = [model(**inputs, question_ids=torch.tensor([[word]])).logits for word in (5, 6)]
    assert (answers[0] - answers[1]).abs().max() > 1e-3
    same = model(**inputs, question_ids=torch.tensor([[5, -100, -100]])).logits
    assert torch.equal(same, answers[0])


def test_training_shows_what_answering_shows_and_teaches_the_scorer(overrides):
    model = budget_model(2, **overrides)
    inputs = tiny_inputs(model.config, [1, 2])
    with torch.no_grad():
        expected = model(**inputs, question_ids=QUESTIONS).logits
    model.train()
    for question_ids in (QUESTIONS, None):
        model.zero_grad()
        outputs = model(**inputs, labels=inputs["input_ids"], question_ids=question_ids)
        if question_ids is not None:
            assert torch.allclose(outputs.logits, expected, rtol=1e-4, atol=1e-4)
        outputs.loss.backward()
        for name, parameter in model.model.window_scorer.named_parameters():  # each of them: DDP would wait for others
            assert parameter.grad is not None, name
            assert question_ids is None or parameter.grad.abs().max() > 0, name


def test_scores_learn_how_strongly_the_loss_depends_on_each_window():
    """Of every window, chosen or not: the derivative of the loss in the share of its features that is shown."""
    model = budget_model(3, injection_init=1.0).double()
    inputs = tiny_inputs(model.config, [1, 1])
    inputs["pixel_values"] = inputs["pixel_values"].double()
    inner = model.model
    views, pixels = inner._unpack(inputs["pixel_values"])
    (window,) = model.config.windows
    with torch.no_grad():
        _, maps = inner._encode(views, [1, 3])
        windows = inner._encode_windows(pixels, window, None)  # (2 * 16, C, 2, 2) per depth
        scores = inner.score_windows(maps)
        chosen = choose_windows(scores, 3)

    def loss_of(logits: torch.Tensor) -> torch.Tensor:  # in float64, unlike that of the model
        return logits.log_softmax(-1)[..., 7].mean()

    def loss_with(shares: torch.Tensor) -> torch.Tensor:
        """The loss where a share (2 * 16,) of each window is shown."""
        rows = []
        for depth, own in zip(maps, windows, strict=True):
            canvas = interpolate(depth, size=(8, 8), mode="bilinear")
            pieces = [canvas[:, :, i : i + 2, j : j + 2] for i in range(0, 8, 2) for j in range(0, 8, 2)]
            filled = torch.stack(pieces, dim=1).flatten(0, 1)
            rows.append(filled + shares[:, None, None, None] * (own - filled))
        encode, inner._encode_windows = inner._encode_windows, lambda *_: rows
        inner.config.window_budget, budget = None, inner.config.window_budget
        try:
            return loss_of(model(**inputs).logits)
        finally:
            inner._encode_windows, inner.config.window_budget = encode, budget

    shares = torch.zeros(2, 16, dtype=torch.double).scatter(1, chosen, 1).flatten()
    (slopes,) = torch.autograd.grad(loss_with(shares.requires_grad_()), [shares])
    sensitivity = slopes.view(2, 16).abs()
    assert (sensitivity > 1e-7).all()  # windows that are not shown teach as well
    total = sensitivity.sum(1, keepdim=True)
    expected = (scores.softmax(1) - sensitivity / total) * total.mean()

    found = []
    inner.window_scorer.register_forward_hook(lambda module, args, output: found.append(output))
    inner.window_scorer.register_forward_hook(lambda module, args, output: output.retain_grad())
    model.train()
    loss_of(model(**inputs).logits).backward()
    assert torch.allclose(found[0].grad, expected, rtol=1e-3, atol=1e-6)
    assert torch.allclose(found[0].grad.sum(1), torch.zeros(2, dtype=torch.double), atol=1e-6)


def test_a_loss_without_the_image_teaches_nothing():
    scores, shown = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4, 3)
    output = ScoreBySensitivity.apply(shown, torch.ones(2, 4, 3), scores)
    assert torch.equal(output, shown)
    (output[0] * torch.tensor([1.0, -1.0, 0.0, 2.0])[:, None]).sum().backward()
    probabilities = scores[0].softmax(0)
    expected = (probabilities - torch.tensor([0.25, 0.25, 0.0, 0.5])) * 12 / 2  # of the sums 12 and 0
    assert torch.allclose(scores.grad, torch.stack([expected, torch.zeros(4)]).detach(), atol=1e-6)


def test_a_frozen_scorer_trains_with_few_windows():
    model = budget_model(2).train()
    model.model.window_scorer.requires_grad_(False)
    inputs = tiny_inputs(model.config, [1])
    assert count_pixels(model, lambda: model(**inputs)) == 28**2 + 2 * 14**2
    model.model.window_scorer.requires_grad_(True)
    seen = []
    model.model.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    model(**inputs)
    assert sum(seen) == 1 + 16


@torch.no_grad()
@pytest.mark.parametrize("injection", ["gated", "cross_attention"])
def test_generation_hands_the_question_on(injection):
    model = budget_model(2, injection_type=injection)
    inputs = tiny_inputs(model.config, [1, 2])
    options = {"max_new_tokens": 5, "do_sample": False}
    pixels = count_pixels(model, lambda: model.generate(**inputs, question_ids=QUESTIONS, num_beams=3, **options))
    assert pixels == 3 * (28**2 + 2 * 14**2)  # once an image, for all beams and tokens
    answers = model.generate(**inputs, question_ids=QUESTIONS, **options)
    assert torch.equal(answers, model.generate(**inputs, question_ids=QUESTIONS, use_cache=False, **options))
    # As with the images that were chosen for the question.
    features = model.get_image_features(inputs["pixel_values"], question_ids=QUESTIONS)
    logits = model(**inputs, question_ids=QUESTIONS).logits
    inputs.pop("pixel_values")
    assert torch.equal(model(**inputs, mm_encoder_outputs={"image": features}).logits, logits)


@torch.no_grad()
def test_a_conversation_goes_on_with_the_questions_of_new_images():
    model = budget_model(2)
    inputs, question_ids = tiny_inputs(model.config, [2]), QUESTIONS[:2]
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**inputs, question_ids=question_ids, **options)
    cached = 2 + model.config.image_seq_length  # all of the first image
    first = model(
        input_ids=inputs["input_ids"][:, :cached],
        pixel_values=inputs["pixel_values"][:1],
        question_ids=question_ids[:1],
        use_cache=True,
    )
    answers = []

    def go_on() -> None:
        options["past_key_values"] = first.past_key_values
        answers.append(model.generate(**inputs, question_ids=question_ids, **options))

    assert count_pixels(model, go_on) == 28**2 + 2 * 14**2  # of the second image
    assert torch.equal(answers[0], expected)


@torch.no_grad()
def test_round_trip(tmp_path):
    model = budget_model(3)
    inputs = tiny_inputs(model.config, [1])
    model.save_pretrained(tmp_path / "budget")
    again = MFRSVLMForConditionalGeneration.from_pretrained(tmp_path / "budget").eval()
    assert again.config.window_budget == 3
    logits = [each(**inputs, question_ids=QUESTIONS[:1]).logits for each in (again, model)]
    assert torch.allclose(*logits, rtol=1e-4, atol=1e-5)
    # A model of all windows starts with a new scorer.
    budget_model(None).save_pretrained(tmp_path / "full")
    started, info = MFRSVLMForConditionalGeneration.from_pretrained(
        tmp_path / "full", window_budget=2, output_loading_info=True
    )
    assert all(".window_scorer." in name for name in info["missing_keys"]) and started.config.encoder_passes == 1.5
    assert torch.isfinite(started(**inputs).logits).all()


def test_configs_without_a_budget_do_not_mention_it():
    config = tiny_config(**SIDE_BY_SIDE)
    assert "window_budget" not in config.to_json_string() and not hasattr(budget_model(None).model, "window_scorer")
    assert MFRSVLMConfig.from_dict(tiny_config(**SIDE_BY_SIDE, window_budget=5).to_dict()).window_budget == 5


@pytest.mark.parametrize(
    "overrides, values",
    [
        ({"window_budget": 0}, ["window_budget=0", "16 windows"]),
        ({"window_budget": 17}, ["window_budget=17", "16 windows"]),
        ({"window_budget": 2, "window_overlap": 0.5}, ["window_budget=2", "window_overlap=0.5"]),
        ({"window_budget": 2, "window_sizes": [28, 14]}, ["window_budget=2", "[28, 14]"]),
        ({"window_budget": 2, "window_sizes": [], "injection_layers": []}, ["window_budget=2", "window_sizes=[]"]),
        ({"window_budget": 2, "injection_layers": []}, ["window_budget=2", "injection_layers=[]"]),
        ({"window_budget": 2.5}, ["window_budget", "2.5"]),
    ],
)
def test_config_refuses(overrides, values):
    with pytest.raises(Exception, match="window_budget") as caught:
        tiny_config(**{**SIDE_BY_SIDE, **overrides})
    assert all(value in str(caught.value) for value in values)


def test_questions_that_choose_nothing_are_refused(tmp_path):
    inputs = tiny_inputs(tiny_config(**SIDE_BY_SIDE), [1, 2])
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="window_budget=None"):
        budget_model(None)(**inputs, question_ids=QUESTIONS)
    model = budget_model(2)
    for run in (model, model.generate):
        with pytest.raises(ValueError, match=r"shape \(2, 4\), but there are 3 images"):
            run(**inputs, question_ids=QUESTIONS[:2])
        with pytest.raises(ValueError, match="pixel_values"):
            run(**text, question_ids=QUESTIONS)
    with pytest.raises(ValueError, match="cannot be cached"):
        cache_image_features(model, [], 0, tmp_path / "features.npy")


def test_the_scorer_is_trained_with_the_projector_and_with_adapters():
    model = budget_model(2)
    scorer = [name for name, _ in model.named_parameters() if "window_scorer" in name]
    assert {part_of(name) for name in scorer} == {"projector"}
    adapted = add_lora(copy.deepcopy(model), ModelArguments(lora=True, lora_r=2), [])
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad and "window_scorer" in name]
    assert len(trained) == len(scorer)
    inputs = tiny_inputs(model.config, [1])
    adapted.train()(**inputs, labels=inputs["input_ids"], question_ids=QUESTIONS[:1]).loss.backward()
    assert all(adapted.get_parameter(name).grad is not None for name in trained)


@torch.no_grad()
def test_bfloat16_and_an_empty_question():
    model = budget_model(2).bfloat16()
    inputs = tiny_inputs(model.config, [1, 2])
    assert model(**inputs, question_ids=QUESTIONS).logits.dtype == torch.bfloat16
    model = budget_model(2)
    nothing = torch.full((3, 2), -100)  # such as a question that was dropped
    assert torch.equal(model(**inputs, question_ids=nothing).logits, model(**inputs).logits)


def test_the_processor_reads_questions(small_processor):
    tokenizer = small_processor.tokenizer
    texts = ["Where?", "How many ships are there?"]
    ids = small_processor.question_ids(texts)
    assert ids.dtype == torch.long and ids.shape[0] == 2
    assert [tokenizer.decode(row[row >= 0]) for row in ids] == texts
    assert (ids[0] == -100).any() and small_processor.question_ids(texts[1]).tolist() == [ids[1].tolist()]
    with pytest.raises(TypeError, match="questions"):
        small_processor.question_ids([3])


@pytest.fixture(scope="module")
def small_processor():
    from mfrsvlm.demo import MODEL

    return MFRSVLMProcessor.from_pretrained(MODEL)
