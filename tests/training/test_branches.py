"""Questions packed behind one image: the same computation as separate conversations, and the attention that is used."""

import pytest
import torch
from tiny_scenes import SCENES, Drawn, encode, make_model

from mfrsvlm.processing_mfrsvlm import MFRSVLMProcessor
from mfrsvlm.scenes import KINDS, ask, draw
from mfrsvlm.training import BadRow
from mfrsvlm.training.branches import BranchCollator, short_attention
from mfrsvlm.training.demo_model.architecture import make_config, make_processor, make_tokenizer
from mfrsvlm.training.demo_model.scene_images import plan
from mfrsvlm.training.demo_model.scene_questions import NOUN, NOUNS, SceneQuestions, dialogues, to_turns
from mfrsvlm.training.image_features import project


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(dialogues(plan("train", index) for index in range(60)))


ARCHITECTURES = [
    {},
    {"window_sizes": [], "injection_layers": []},
    {"routing": "token", "routing_size": 16},
    {"injection_type": "cross_attention", "cross_attention_size": 48, "cross_attention_heads": 4},
]


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "pixels"])
@pytest.mark.parametrize("overrides", ARCHITECTURES, ids=["gated", "global", "token", "cross"])
def test_packed_questions_are_what_separate_conversations_are(tokenizer, overrides, cached, tmp_path):
    model, images = make_model(tokenizer, **overrides), Drawn(SCENES[:2])
    processor = make_processor(model.config, tokenizer)
    collator = BranchCollator(processor)
    features = encode(model, images, tmp_path) if cached else None
    mix = dict.fromkeys(["classification", "presence", "count", "comparison", "position", "grounding", "caption"], 1)
    rows = SceneQuestions(images, collator, model.config, features, rounds=1, mix=mix)
    batch = collator([rows[0], rows[1]])
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask")}
    with torch.inference_mode():
        if cached:
            inputs["mm_encoder_outputs"] = {"image": project(model, batch["image_features"])}
        else:
            inputs["pixel_values"] = batch["pixel_values"]
        logits = model(**inputs).logits
    labels, compared = batch["labels"], 0
    for row, scene in enumerate(images.scenes):
        image = draw(scene)
        answered = (labels[row] != -100).nonzero().flatten().tolist()
        for question in ask(scene, tuple(mix)):
            content = [{"type": "image", "image": image}, {"type": "text", "text": question.text}]
            conversation = [
                {"role": "user", "content": content},
                {"role": "assistant", "content": [{"type": "text", "text": question.answer}]},
            ]
            alone = processor.apply_chat_template(
                conversation, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
            )
            length = int(alone.pop("assistant_masks").sum())
            places, answered = answered[:length], answered[length:]
            assert labels[row, places].tolist() == alone["input_ids"][0, -length:].tolist()
            with torch.inference_mode():
                expected = model(**alone).logits[0, -length - 1 : -1]
            packed = logits[row, [place - 1 for place in places]]
            # Cached features are float16.
            torch.testing.assert_close(packed, expected, rtol=1e-2, atol=1e-2)
            compared += 1
        assert not answered
    assert compared > 8


def test_answers_count_once_and_by_their_weight(tokenizer):
    model, images = make_model(tokenizer), Drawn(SCENES)
    collator = BranchCollator(make_processor(model.config, tokenizer))
    rows = SceneQuestions(images, collator, model.config, rounds=1)
    batch = collator([rows[index] for index in range(len(rows))])
    for row, scene in enumerate(SCENES):
        turns = [turn for question in ask(scene, rows.tasks) for turn in to_turns(question)]
        expected = sum(turn["weight"] for turn in turns if turn["role"] == "assistant")
        assert batch["loss_weights"][row].sum() == pytest.approx(expected, rel=1e-5)
    assert ((batch["loss_weights"] > 0) == (batch["labels"] != -100)).all()


def test_nouns_are_found_at_their_last_token(tokenizer):
    model, images = make_model(tokenizer), Drawn(SCENES)
    collator = BranchCollator(make_processor(model.config, tokenizer))
    rows = SceneQuestions(images, collator, model.config, rounds=1)
    batch = collator([rows[index] for index in range(len(rows))])
    spoken = [noun for scene in SCENES for question in ask(scene, rows.tasks) for noun in NOUN.findall(question.text)]
    assert len(batch["marks"]) == len(spoken) > len(SCENES)
    for (row, position, kind), noun in zip(batch["marks"].tolist(), spoken, strict=True):
        text = tokenizer.decode(batch["input_ids"][row, position - 8 : position + 1])
        assert text.endswith(noun) and list(KINDS)[kind] == list(KINDS)[NOUNS[noun]]


def test_rows_of_a_file_are_branches_too(tokenizer):
    processor = make_processor(make_config(len(tokenizer)), tokenizer)
    collator = BranchCollator(processor)
    row = {
        "images": [draw(SCENES[0])],
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "<image>Is there a car?"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "How many cars are there?"},
            {"role": "assistant", "content": "2"},
        ],
    }
    batch = collator([row])
    assert batch["pixel_values"].shape[0] == 1 and batch["input_ids"].shape[0] == 1
    text = tokenizer.decode(batch["input_ids"][0])
    assert text.count("Be short.") == 1 and text.count("USER:") == 1
    said = [tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100])]
    assert said == [" yes</s> 2</s>"]

    row["messages"][3]["content"] = "<image>How many cars are there?"
    row["images"] *= 2
    with pytest.raises(BadRow, match="question 2 has an image"):
        collator([row])
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    with pytest.raises(BadRow, match="without loss"):
        collator([{"prompt": turns, "completion": "d"}])
    row["messages"][3]["content"] = "How many cars are there?"
    row["images"] = row["images"][:1]
    with pytest.raises(BadRow, match="max_length=50"):
        BranchCollator(processor, max_length=50)([row])


def test_prefix_placement_is_rejected(converted):
    with pytest.raises(ValueError, match="'prefix'"):
        BranchCollator(MFRSVLMProcessor.from_pretrained(converted))


@pytest.mark.parametrize("heads", [4, 2], ids=["as many heads", "fewer heads of keys"])
def test_short_attention_is_attention(heads):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 30, 8)  # (B, H, S, d) each
    key, value = key[:, :heads], value[:, :heads]
    mask = torch.rand(2, 1, 30, 30) < 0.5
    mask |= torch.eye(30, dtype=torch.bool)  # no row sees nothing
    ours, _ = short_attention(None, query, key, value, mask, 8**-0.5)
    theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    torch.testing.assert_close(ours, theirs.transpose(1, 2))
