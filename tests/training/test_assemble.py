"""A new model from parts: every trained tensor arrives, the rest is new, and what makes no model is refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_parts import (
    BACKBONE,
    DECODERS,
    TEXT_SIZES,
    TOWERS,
    VOCAB,
    assert_same,
    expected_parts,
    refused,
    weights,
    write_parts,
)
from transformers import LlamaConfig, LlamaForCausalLM

from mfrsvlm import MFRSVLMConfig, MFRSVLMForConditionalGeneration, MFRSVLMProcessor
from mfrsvlm.convert_checkpoint import ConversionError, convert_released
from mfrsvlm.training.assemble import assemble, assembled_config, main


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"))


class TestAssemble:
    @pytest.mark.integration
    @pytest.mark.parametrize(
        "language_model, tower, options",
        [
            ("llama", "clip", {}),
            ("qwen3", "full-clip", {"injection_type": "cross_attention"}),
            ("tied", "clip", {"routing": "stack"}),
            ("spare rows", "clip", {}),
            ("llama", "resnet", BACKBONE),
            ("half", "resnet", BACKBONE),
        ],
    )
    def test_parts_arrive_and_the_rest_is_untrained(
        self, parts: Path, tmp_path: Path, language_model: str, tower: str, options: dict
    ):
        output = tmp_path / "output"
        command = ["--language-model", str(parts / language_model), "--vision-tower", str(parts / tower)]
        assert main([*command, "--output", str(output), "--config", json.dumps(options)]) == 0
        model, info = MFRSVLMForConditionalGeneration.from_pretrained(output, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        dtype = torch.bfloat16 if language_model == "half" else torch.float32
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}

        state = model.state_dict()
        expected = expected_parts(parts / language_model, parts / tower)
        assert model.config.image_token_id == VOCAB
        assert model.config.text_config.vocab_size == (520 if language_model == "spare rows" else VOCAB + 1)
        for name, value in expected.items():
            rows = (
                VOCAB
                if name.endswith(("embed_tokens.weight", "lm_head.weight"))
                else len(state[name])
                if value.ndim
                else None
            )
            assert torch.equal(state[name][:rows], value[:rows].to(state[name].dtype)) if value.ndim else True, name
        embedding = state["model.language_model.embed_tokens.weight"]
        torch.testing.assert_close(embedding[VOCAB].float(), embedding[:VOCAB].float().mean(dim=0), atol=1e-4, rtol=1e-2)
        if language_model == "tied":
            assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
        elif language_model != "spare rows":
            assert not state["lm_head.weight"][VOCAB].any()
        new = {name: value for name, value in state.items() if name not in expected and name != "lm_head.weight"}
        beginnings = ("model.injectors.", "model.multi_modal_projector.", "model.stage_projections.")
        assert all(name.startswith(beginnings) for name in new)
        for name, value in new.items():
            assert value.isfinite().all(), name
            if name.endswith("residual_scale"):
                assert value.item() == pytest.approx(0.1, abs=1e-3)
            elif name.endswith((".bias", ".gate")):
                assert not value.any(), name
            elif "norm.weight" in name:
                assert (value == 1).all(), name
            else:
                assert 0.01 < value.float().std() < 0.04, name  # initializer_range is 0.02

        processor = MFRSVLMProcessor.from_pretrained(output)
        assert processor.image_placement == "inline" and list(processor.image_processor.image_mean) == [0.1, 0.2, 0.3]
        image = Image.effect_noise((50, 40), 60).convert("RGB")
        inputs = processor(images=image, text="<image>What is this?", return_tensors="pt").to(dtype)
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert inputs["input_ids"].shape[1] < tokens.shape[1] <= inputs["input_ids"].shape[1] + 3
        assert model(**inputs).logits.isfinite().all()
        assert "Untrained" in (output / "README.md").read_text()

    @pytest.mark.integration
    @pytest.mark.parametrize(
        "language_model, tower", [*((name, "clip") for name in DECODERS), *(("llama", name) for name in TOWERS)]
    )
    def test_families(self, parts: Path, tmp_path: Path, language_model: str, tower: str):
        """Text alone gives the logits of the stock model; with an image there are a loss and an answer."""
        hierarchical = "depths" in json.loads((parts / tower / "config.json").read_text())
        overrides = {"image_size": 64, "patch_size": 16, "vision_feature_size": 24} if hierarchical else {}
        assemble(str(parts / language_model), str(parts / tower), tmp_path / "output", overrides=overrides)
        model = MFRSVLMForConditionalGeneration.from_pretrained(tmp_path / "output")
        processor = MFRSVLMProcessor.from_pretrained(tmp_path / "output")
        stock = transformers.AutoModelForCausalLM.from_pretrained(parts / language_model)
        tokens = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.equal(model(input_ids=tokens).logits[..., :VOCAB], stock(input_ids=tokens).logits)
            image = Image.effect_noise((50, 40), 60).convert("RGB")
            inputs = processor(images=image, text="<image>What is this?", return_tensors="pt")
            labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == VOCAB, -100)
            outputs = model(**inputs, labels=labels)
            assert outputs.loss.isfinite() and outputs.logits.isfinite().all()
            length = inputs["input_ids"].shape[1]
            assert length < model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] <= length + 3
            again = weights(tmp_path / "output")
            model.save_pretrained(tmp_path / "again")
            assert_same(weights(tmp_path / "again"), again)

    def test_defaults_follow_the_parts(self, parts: Path, tmp_path: Path):
        assemble(str(parts / "llama"), str(parts / "clip"), tmp_path / "vit")
        config = MFRSVLMConfig.from_pretrained(tmp_path / "vit")
        assert (config.image_size, config.window_sizes, config.canvas_scale) == (28, [28, 14], 2)
        assert (config.detail_feature_layers, config.injection_layers) == ([1, 2, 3], [3])  # 5 layers: 4 of (4, 8, 12, 16)
        assert (config.window_encoding, config.window_weighting, config.routing) == ("native", "hann_nonzero", "token")
        image_processor = MFRSVLMProcessor.from_pretrained(tmp_path / "vit").image_processor
        assert image_processor.window_sizes == [28, 14] and image_processor.canvas_source == "image"
        assert image_processor.window_packing == "windows_first"
        assert (dict(image_processor.size), dict(image_processor.crop_size)) == (
            {"shortest_edge": 28},
            {"height": 28, "width": 28},
        )

        assemble(str(parts / "llama"), str(parts / "resnet"), tmp_path / "backbone")
        config = MFRSVLMConfig.from_pretrained(tmp_path / "backbone")
        assert (config.image_size, config.window_sizes, config.patch_size) == (336, [336, 168], 14)
        assert config.detail_feature_layers == [2, 3, 4]

        assemble(str(parts / "llama"), str(parts / "clip"), tmp_path / "global", overrides={"window_sizes": []})
        assert MFRSVLMConfig.from_pretrained(tmp_path / "global").injection_layers == []

    def test_efficient_windows_lie_side_by_side(self, parts: Path, tmp_path: Path):
        assemble(str(parts / "llama"), str(parts / "clip"), tmp_path / "model", efficient=True)
        config = MFRSVLMConfig.from_pretrained(tmp_path / "model")
        assert (config.window_sizes, config.window_overlap, config.detail_feature_layers) == ([14], 0.0, [1, 2, 3])
        assert MFRSVLMProcessor.from_pretrained(tmp_path / "model").image_processor.window_overlap == 0.0
        assert "5 passes" in (tmp_path / "model" / "README.md").read_text()

    def test_published_sizes_get_the_published_layout(self):
        """The defaults for CLIP ViT-L/14-336 and a decoder of 32 layers are those of `MFRSVLMConfig`."""
        default = MFRSVLMConfig()
        config = assembled_config(default.vision_config, LlamaConfig(num_hidden_layers=32), {}, None)
        for name in ("window_sizes", "detail_feature_layers", "injection_layers", "image_size", "patch_size"):
            assert getattr(config, name) == getattr(default, name)
        config = assembled_config(default.vision_config, LlamaConfig(num_hidden_layers=2), {}, None)
        assert config.injection_layers == [1]

    def test_a_convolutional_encoder_needs_the_outputs_to_read(self):
        encoder, decoder = transformers.MobileNetV2Config(), LlamaConfig(num_hidden_layers=4)
        with pytest.raises(ConversionError, match="detail_feature_layers is missing: an encoder of type 'mobilenet_v2'"):
            assembled_config(encoder, decoder, {}, None)
        options = {"detail_feature_layers": [3, 5], "image_size": 64, "patch_size": 16}
        config = assembled_config(encoder, decoder, options, None)
        assert config.detail_feature_layers == [3, 5] and config.window_sizes == [64, 32]

    def test_seed(self, parts: Path, tmp_path: Path):
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            torch.rand(seed + 1)  # what was drawn before does not matter
            assemble(str(parts / "llama"), str(parts / "clip"), tmp_path / name, seed=seed)
        a, b, c = (weights(tmp_path / name) for name in "abc")
        assert_same(a, b)
        differing = {name for name in a if not torch.equal(a[name], c[name])}
        assert differing and all(".injectors." in name or ".multi_modal_projector." in name for name in differing)

    @pytest.mark.parametrize("prefix", ["model.mm_projector", "mm_projector"])
    def test_projector(self, parts: Path, tmp_path: Path, prefix: str):
        projector = {f"{prefix}.{n}.weight": torch.randn(32, width) for n, width in ((0, 24), (2, 32))}
        projector |= {f"{prefix}.{n}.bias": torch.randn(32) for n in (0, 2)}
        torch.save(projector, tmp_path / "mm_projector.bin")
        assemble(str(parts / "llama"), str(parts / "clip"), tmp_path / "output", projector=tmp_path / "mm_projector.bin")
        ours = weights(tmp_path / "output")
        for theirs, mine in ((0, "linear_1"), (2, "linear_2")):
            for kind in ("weight", "bias"):
                given = projector[f"{prefix}.{theirs}.{kind}"]
                assert torch.equal(ours[f"model.multi_modal_projector.{mine}.{kind}"], given)

    @pytest.mark.parametrize(
        "change, needles",
        [
            (lambda p: p.update({"mm_projector.0.weight": torch.ones(32, 48)}), ["(32, 48)", "(32, 24)"]),
            (lambda p: p.pop("mm_projector.2.bias"), ["1 tensors", "linear_2.bias"]),
            (lambda p: p.update({"mm_projector.4.weight": torch.ones(2)}), ["mm_projector.4.weight"]),
            (lambda p: p.update({"norm.weight": torch.ones(32)}), ["norm.weight"]),
            (lambda p: p.update({"steps": 5}), ["holds a int"]),
            (None, ["mm_projector.bin cannot be read", "missing"]),
        ],
        ids=["shape", "missing", "third layer", "other part", "no tensor", "no file"],
    )
    def test_projector_misfits(self, parts: Path, tmp_path: Path, capsys, change, needles: list[str]):
        projector = {f"mm_projector.{n}.weight": torch.ones(32, width) for n, width in ((0, 24), (2, 32))}
        projector |= {f"mm_projector.{n}.bias": torch.ones(32) for n in (0, 2)}
        if change is not None:
            change(projector)
            torch.save(projector, tmp_path / "mm_projector.bin")
        command = ["--language-model", str(parts / "llama"), "--vision-tower", str(parts / "clip")]
        command += ["--projector", str(tmp_path / "mm_projector.bin"), "--output", str(tmp_path / "output")]
        before = sorted(tmp_path.iterdir())
        refused(main, capsys, command, *needles)
        assert sorted(tmp_path.iterdir()) == before

    @pytest.mark.parametrize(
        "language_model, tower, options, needles",
        [
            ("clip", "clip", {}, ["make no model", "vocab_size"]),
            ("llama", "llama", {}, ["make no model"]),
            ("no-such-folder", "clip", {}, ["language model", "no-such-folder"]),
            ("llama", "no-such-folder", {}, ["vision tower", "no-such-folder"]),
            ("no tokenizer", "clip", {}, ["no tokenizer"]),
            ("no weights", "clip", {}, ["no weights", "cannot be loaded"]),
            ("lacks a tensor", "clip", {}, ["1 tensors", "model.norm.weight"]),
            ("mis-shaped", "clip", {}, ["mis-shaped"]),
            ("small vocabulary", "clip", {}, ["vocab_size=500", "12 tokens"]),
            ("llama", "clip without preprocessor", {}, ["preprocessor_config.json cannot be read"]),
            ("llama", "clip", {"window_size": [28]}, ["['window_size']", "'window_sizes'"]),
            ("llama", "clip", {"text_config": {}}, ["['text_config']"]),
            ("llama", "clip", {"window_sizes": [30]}, ["Window size 30", "patch_size=7"]),
            ("llama", "clip", {"injection_layers": [7]}, ["injection_layers=[7]", "0 to 4"]),
            ("llama", "clip", {"injection_type": "sum"}, ["injection_type", "sum"]),
            ("llama", "clip", {"projector_hidden_act": "no-such"}, ["no-such"]),
        ],
        ids=str,
    )
    def test_refused(self, parts: Path, tmp_path: Path, capsys, language_model, tower, options, needles: list[str]):
        def change_weights(change):
            def apply(folder: Path) -> None:
                tensors = load_file(folder / "model.safetensors")
                change(tensors)
                save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

            return apply

        folders = {
            "no tokenizer": ("llama", lambda p: [path.unlink() for path in p.glob("tokenizer*")]),
            "no weights": ("llama", lambda p: (p / "model.safetensors").unlink()),
            "lacks a tensor": ("llama", change_weights(lambda t: t.pop("model.norm.weight"))),
            "mis-shaped": ("llama", change_weights(lambda t: t.update({"model.norm.weight": torch.ones(9)}))),
            "small vocabulary": (
                "llama",
                lambda p: LlamaForCausalLM(LlamaConfig(**{**TEXT_SIZES, "vocab_size": 500})).save_pretrained(p),
            ),
            "clip without preprocessor": ("clip", lambda p: (p / "preprocessor_config.json").unlink()),
        }
        (tmp_path / "parts").mkdir()
        paths = []
        for name in (language_model, tower):
            path = parts / name
            if name in folders:
                origin, change = folders[name]
                path = tmp_path / "parts" / name
                shutil.copytree(parts / origin, path)
                change(path)
            paths.append(str(path))
        command = ["--language-model", paths[0], "--vision-tower", paths[1], "--config", json.dumps(options)]
        refused(main, capsys, [*command, "--output", str(tmp_path / "output")], *needles)
        assert [path.name for path in tmp_path.iterdir()] == ["parts"]

    @pytest.mark.parametrize("text", ["{", "[1]"])
    def test_config_must_be_a_json_object(self, capsys, text: str):
        with pytest.raises(SystemExit) as stop:
            main(["--language-model", "a", "--vision-tower", "b", "--output", "c", "--config", text])
        assert stop.value.code == 2
        assert "is no JSON object" in capsys.readouterr().err

    def test_sampling_settings_without_sampling(self, parts: Path, tmp_path: Path):
        """Vicuna's own generation_config.json, which transformers reads but refuses to save."""
        shutil.copytree(parts / "llama", tmp_path / "vicuna")
        settings = {"bos_token_id": 1, "eos_token_id": 2, "max_length": 4096, "temperature": 0.9, "top_p": 0.6}
        for sampled in (False, True):
            settings.update({"do_sample": True} if sampled else {})
            (tmp_path / "vicuna" / "generation_config.json").write_text(json.dumps(settings))
            assemble(str(tmp_path / "vicuna"), str(parts / "clip"), tmp_path / "output", overwrite=True)
            saved = json.loads((tmp_path / "output" / "generation_config.json").read_text())
            assert (saved["eos_token_id"], saved["pad_token_id"], saved["max_length"]) == (2, 0, 4096)
            assert (saved.get("temperature"), saved.get("top_p")) == ((0.9, 0.6) if sampled else (None, None))

    def test_dtype(self, parts: Path, tmp_path: Path):
        assemble(str(parts / "half"), str(parts / "clip"), tmp_path / "output", dtype="float32")
        assert {value.dtype for value in weights(tmp_path / "output").values()} == {torch.float32}

    def test_conversion_errors_reach_python_callers(self, parts: Path, tmp_path: Path):
        with pytest.raises(ConversionError, match="make no model"):
            assemble(str(parts / "llama"), str(parts / "qwen3"), tmp_path / "output")
        with pytest.raises(ConversionError, match=r"config\.json cannot be read"):
            convert_released(tmp_path / "nothing", "tower", tmp_path / "output")
