"""The converter: every tensor arrives, every variant is read whole or refused by name, and output appears whole or not."""

import json
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from external_data import external_data
from huggingface_hub import metadata_load
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_parts import CHECKPOINT, VOCAB, assert_same, refused, weights

from mfrsvlm import MFRSVLMConfig, MFRSVLMForConditionalGeneration, MFRSVLMProcessor, convert_checkpoint
from mfrsvlm.configuration_mfrsvlm import window_table
from mfrsvlm.convert_checkpoint import convert_released, main
from mfrsvlm.files.model_folder import ModelFolderError, load_model
from mfrsvlm.model_card import card
from mfrsvlm.output_folders import whole_folder
from mfrsvlm.released_layout import resolve_depths, resolve_injection_layers, resolve_window_sizes


REFERENCE = Path(__file__).parent / "reference"
MANIFEST = json.loads((REFERENCE / "manifest.json").read_text())
REMOVED = object()
INDEX = "released/pytorch_model.bin.index.json"
FIRST, SECOND = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"


def write_json(path: Path, **fields) -> None:
    """Sets fields of a JSON file; `REMOVED` takes one out."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    content.update(fields)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not REMOVED}))


class Source:
    """A copy of the reference checkpoint to write in."""

    def __init__(self, folder: Path) -> None:
        shutil.copytree(CHECKPOINT, folder)
        self.folder = folder
        self.tower = folder.parent / "tower"  # beside it, so that it can be another one
        shutil.move(folder / "vision_tower", self.tower)
        self.output = folder.parent / "output"

    def configure(self, **fields) -> None:
        write_json(self.folder / "config.json", **fields)

    def tensors(self) -> dict[str, torch.Tensor]:
        shards = sorted(self.folder.glob("*.bin"))
        return {key: tensor for shard in shards for key, tensor in torch.load(shard, weights_only=True).items()}

    def write(self, tensors: dict[str, torch.Tensor], kind: str = "bin", shards: int = 1, **options) -> None:
        """Replaces the weights: `shards` files and their index, or a single file without one."""
        for file in [*self.folder.glob("*.bin"), *self.folder.glob("*.index.json")]:
            file.unlink()
        stem, suffix = ("pytorch_model", "bin") if kind == "bin" else ("model", "safetensors")
        keys = sorted(tensors)
        weight_map = {}
        for number in range(shards):
            name = f"{stem}-{number + 1:05d}-of-{shards:05d}.{suffix}" if shards > 1 else f"{stem}.{suffix}"
            part = {key: tensors[key] for key in keys[number::shards]}
            weight_map.update(dict.fromkeys(part, name))
            if kind == "bin":
                torch.save(part, self.folder / name, **options)
            else:
                save_file(part, self.folder / name)
        if shards > 1:
            (self.folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def convert(self, **options) -> Path:
        convert_released(self.folder, str(self.tower), self.output, **options)
        return self.output

    def command(self, *more: str) -> list[str]:
        return ["released", str(self.folder), "--vision-tower", str(self.tower), "--output", str(self.output), *more]

    def siblings(self) -> set[str]:
        return {path.name for path in self.folder.parent.iterdir()}


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path / "released")


# Names of both sides, written out: one of every kind of tensor.
NAMES = {
    "lm_head.weight": "lm_head.weight",
    "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
    "model.norm.weight": "model.language_model.norm.weight",
    "model.layers.9.self_attn.k_proj.weight": "model.language_model.layers.9.self_attn.k_proj.weight",
    "model.layers.3.mlp.down_proj.weight": "model.language_model.layers.3.mlp.down_proj.weight",
    "model.layers.0.input_layernorm.weight": "model.language_model.layers.0.input_layernorm.weight",
    "model.layers.7.post_attention_layernorm.weight": "model.language_model.layers.7.post_attention_layernorm.weight",
    "model.mm_projector.0.weight": "model.multi_modal_projector.linear_1.weight",
    "model.mm_projector.2.bias": "model.multi_modal_projector.linear_2.bias",
    "model.deepstack_hidden_norms.0.weight": "model.injectors.0.hidden_norm.weight",
    "model.deepstack_detail_norms.1.bias": "model.injectors.1.detail_norm.bias",
    "model.deepstack_detail_proj.2.weight": "model.injectors.2.detail_proj.weight",
    "model.deepstack_gate_proj.3.bias": "model.injectors.3.gate_proj.bias",
    "model.deepstack_router_query.1.0.weight": "model.injectors.1.router.query_norm.weight",
    "model.deepstack_router_query.2.1.weight": "model.injectors.2.router.query_proj.weight",
    "model.deepstack_router_key.3.0.bias": "model.injectors.3.router.key_norm.bias",
    "model.deepstack_router_key.0.1.bias": "model.injectors.0.router.key_proj.bias",
    "vision_model.embeddings.class_embedding": "model.vision_tower.embeddings.class_embedding",
    "vision_model.pre_layrnorm.weight": "model.vision_tower.pre_layrnorm.weight",
    "vision_model.encoder.layers.5.mlp.fc2.bias": "model.vision_tower.encoder.layers.5.mlp.fc2.bias",
    "vision_model.post_layernorm.bias": "model.vision_tower.post_layernorm.bias",
}


def without_image_row(ours: dict[str, torch.Tensor], vocab_size: int = VOCAB) -> dict[str, torch.Tensor]:
    """Tensors without the row of `<image>`, after a look at it."""
    for name, row in (("model.language_model.embed_tokens.weight", None), ("lm_head.weight", 0)):
        table = ours[name]
        assert len(table) == vocab_size + 1
        expected = table[:vocab_size].double().mean(dim=0) if row is None else torch.zeros(table.shape[1]).double()
        torch.testing.assert_close(table[vocab_size].double(), expected, atol=1e-3 * table.float().std().item(), rtol=1e-2)
        ours = {**ours, name: table[:vocab_size]}
    return ours


class TestReleased:
    def test_every_tensor_arrives_under_its_name(self, source: Source, converted: Path):
        ours = without_image_row(weights(converted))
        theirs = source.tensors() | torch.load(source.tower / "pytorch_model.bin", weights_only=True)
        for name in (key for key in theirs if key.endswith("inv_freq")):
            torch.testing.assert_close(theirs[name], 10000 ** -(torch.arange(0, 16, 2) / 16))  # rightly dropped: recomputed
        for theirs_name, our_name in NAMES.items():
            assert torch.equal(ours[our_name], theirs[theirs_name]), our_name
        scales = [ours[f"model.injectors.{rank}.residual_scale"] for rank in range(4)]
        assert torch.equal(torch.cat(scales), theirs["model.deepstack_residual_scale"])
        # The rest by content: the same tensors, none lost, none twice.
        given = [value for key, value in theirs.items() if not key.endswith(("inv_freq", "residual_scale"))]
        written = [value for key, value in ours.items() if not key.endswith("residual_scale")]
        assert sorted(value.numpy().tobytes() for value in given) == sorted(value.numpy().tobytes() for value in written)

    def test_folder_is_complete_and_loads(self, converted: Path):
        code = {path.name for path in Path(convert_checkpoint.__file__).parent.glob("*_mfrsvlm.py")}
        assert {path.name for path in converted.iterdir()} == code | {
            "checksums.json",
            "README.md",
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "processor_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        model, info = MFRSVLMForConditionalGeneration.from_pretrained(converted, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)
        processor = MFRSVLMProcessor.from_pretrained(converted)
        assert processor.tokenizer.is_fast and processor.chat_template and processor.image_placement == "prefix"
        assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id == VOCAB
        assert model.config.text_config.vocab_size == VOCAB + 1 == len(model.get_input_embeddings().weight)
        config = json.loads((converted / "config.json").read_text())
        for reference in [
            *config["auto_map"].values(),
            *json.loads((converted / "processor_config.json").read_text())["auto_map"].values(),
        ]:
            module, name = reference.split(".")
            assert f"class {name}(" in (converted / f"{module}.py").read_text()
        assert "converted from a released checkpoint" in (converted / "README.md").read_text()

    def test_config_holds_plain_numbers(self, converted: Path):
        config = MFRSVLMConfig.from_pretrained(converted)
        expected = {
            **{"image_size": 336, "patch_size": 14, "canvas_scale": 2, "window_sizes": [336, 168], "window_overlap": 0.5},
            "detail_feature_layers": [2, 4, 6],  # (0.33, 0.66, 1.0) of 6 layers
            "injection_layers": [1, 3, 5, 7],  # counted from one in the source
            "vision_feature_layer": 6,
            **{"window_encoding": "resize", "window_weighting": "hann", "injection_type": "gated"},
            **{"routing": "stack", "routing_scope": "sample"},
        }
        assert {name: getattr(config, name) for name in expected} == expected

    @pytest.mark.parametrize(
        "model_type, layout",
        [
            ("vhm", {"kind": "bin", "shards": 1}),
            ("mfrsvlm", {"kind": "bin", "shards": 1, "_use_new_zipfile_serialization": False}),
            ("mfrsvlm", {"kind": "bin", "shards": 3}),
            ("mfrsvlm", {"kind": "safetensors", "shards": 1}),
            ("vhm", {"kind": "safetensors", "shards": 3}),
        ],
        ids=["vhm-bin", "old-bin", "bin-shards", "safetensors", "vhm-safetensors-shards"],
    )
    def test_every_layout_gives_the_same_folder(self, source: Source, converted: Path, model_type: str, layout: dict):
        source.configure(model_type=model_type)
        source.write(source.tensors(), **layout)
        source.convert()
        for path in converted.iterdir():
            same = (source.output / path.name).read_bytes() == path.read_bytes()
            assert same or path.name == "README.md", path.name  # which says where the tower came from

    @pytest.mark.parametrize("prefix", ["vision_model.", ""], ids=["full-clip", "saved-by-transformers-5"])
    def test_other_layouts_of_the_tower(self, source: Source, converted: Path, prefix: str):
        tower = torch.load(source.tower / "pytorch_model.bin", weights_only=True)
        tower = {key.replace("vision_model.", prefix): value for key, value in tower.items()}
        if prefix:
            names = ("logit_scale", "text_model.x", "text_projection.weight", "visual_projection.weight")
            tower |= {name: torch.ones(2) for name in names}
            tower |= {"vision_model.embeddings.position_ids": torch.arange(577)}
            nested = json.loads((source.tower / "config.json").read_text())
            (source.tower / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": nested}))
        (source.tower / "pytorch_model.bin").unlink()
        save_file(tower, source.tower / "model.safetensors")
        assert_same(weights(source.convert()), weights(converted))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_dtype(self, source: Source, converted: Path, dtype: str):
        write_json(source.tower / "config.json", torch_dtype="float64")  # the tower's own type must not leak into the model
        assert main(source.command("--dtype", dtype)) == 0
        torch_dtype = getattr(torch, dtype)
        expected = {key: value.to(torch_dtype) for key, value in without_image_row(weights(converted)).items()}
        assert_same(without_image_row(weights(source.output)), expected)
        for wanted in (torch_dtype, torch.float32):
            model = MFRSVLMForConditionalGeneration.from_pretrained(source.output, dtype=wanted)
            assert {parameter.dtype for parameter in model.parameters()} == {wanted}

    def test_generation_settings_come_along(self, source: Source):
        write_json(source.folder / "generation_config.json", max_length=1234, temperature=0.9)
        saved = json.loads((source.convert() / "generation_config.json").read_text())
        assert (saved["max_length"], saved["bos_token_id"], saved["eos_token_id"], saved["pad_token_id"]) == (1234, 1, 2, 0)
        assert "temperature" not in saved  # of no effect without do_sample, and refused by transformers

    @pytest.mark.parametrize("form", [{"size": 336, "crop_size": 336}, {"size": 448}, {"size": None, "crop_size": None}])
    def test_sizes_come_from_the_tower(self, source: Source, form: dict):
        write_json(source.tower / "preprocessor_config.json", **form)
        image_processor = MFRSVLMProcessor.from_pretrained(source.convert()).image_processor
        assert dict(image_processor.size) == {"shortest_edge": form["size"] or 336}
        assert dict(image_processor.crop_size) == {"height": 336, "width": 336}

    def test_output_shards(self, source: Source, converted: Path, monkeypatch):
        monkeypatch.setattr(convert_checkpoint, "MAX_OUTPUT_SHARD", 500_000)
        source.convert()
        files = sorted(source.output.glob("*.safetensors"))
        assert len(files) > 3 and all(file.stat().st_size < 520_000 for file in files)
        assert_same(weights(source.output), weights(converted))
        _, info = MFRSVLMForConditionalGeneration.from_pretrained(source.output, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]

    @pytest.mark.parametrize("umask, file_mode, folder_mode", [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
    def test_modes_follow_the_umask(self, source: Source, umask: int, file_mode: int, folder_mode: int):
        before = os.umask(umask)
        try:
            source.convert()
            assert os.umask(umask) == umask
        finally:
            os.umask(before)
        modes = {stat.S_IMODE(path.stat().st_mode) for path in source.output.iterdir()}
        assert modes == {file_mode} and stat.S_IMODE(source.output.stat().st_mode) == folder_mode

    def test_only_the_result_goes_to_stdout(self, source: Source, capsys):
        assert main(source.command()) == 0
        assert capsys.readouterr().out == f"wrote {source.output}\n"

    def test_non_finite_and_shared_weights_are_kept(self, source: Source, caplog):
        tensors = source.tensors()
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # one memory under two names
        tensors["lm_head.weight"][0, 0] = float("nan")
        tensors["model.norm.weight"][1] = float("inf")
        source.write(tensors)
        ours = weights(source.convert(dtype="float16"))
        assert ours["lm_head.weight"][0, 0].isnan() and ours["model.language_model.norm.weight"][1].isinf()
        embedding = ours["model.language_model.embed_tokens.weight"]
        for table in (embedding, ours["lm_head.weight"]):
            assert torch.equal(table[1:VOCAB], tensors["lm_head.weight"][1:].half())
        assert "model.norm.weight in" in caplog.text and "NaN or infinity" in caplog.text
        with pytest.raises(ModelFolderError, match=r"3 tensors of .* hold NaN or infinity: lm_head.weight"):
            load_model(source.output)

    def test_a_type_in_the_config_that_is_not_that_of_the_file(self, source: Source, capsys):
        source.configure(torch_dtype="bfloat16")
        refused(main, capsys, source.command(), "torch.float32, but config.json has torch_dtype=torch.bfloat16", "--dtype")
        source.convert(dtype="bfloat16")

    @pytest.mark.parametrize("known", [False, True], ids=["new token", "token of the tokenizer"])
    def test_a_spare_row_is_used(self, source: Source, known: bool):
        """A table that is larger than the vocabulary does not grow, and a row that the tokenizer knew keeps its values."""
        tensors = source.tensors()
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            tensors[name] = torch.cat([tensors[name], torch.full((4, 64), 0.25)])
        source.write(tensors)
        source.configure(vocab_size=VOCAB + 4)
        if known:
            write_json(source.folder / "added_tokens.json", **{"<image>": VOCAB})
        ours = weights(source.convert())
        config = MFRSVLMConfig.from_pretrained(source.output)
        assert (config.image_token_id, config.text_config.vocab_size) == (VOCAB, VOCAB + 4)
        table = ours["model.language_model.embed_tokens.weight"]
        expected = tensors["model.embed_tokens.weight"].clone()
        if not known:
            expected[VOCAB] = expected[:VOCAB].mean(dim=0)
        torch.testing.assert_close(table, expected)
        assert torch.equal(ours["lm_head.weight"], tensors["lm_head.weight"])


class TestVariants:
    def test_three_injection_layers(self, source: Source):
        tensors = {key: value for key, value in source.tensors().items() if ".3." not in key or "deepstack" not in key}
        tensors["model.deepstack_residual_scale"] = tensors["model.deepstack_residual_scale"][:3]
        source.write(tensors)
        source.configure(deepstack_injection_layers=[4, 6, 8])
        source.convert()
        assert MFRSVLMConfig.from_pretrained(source.output).injection_layers == [3, 5, 7]

    @pytest.mark.parametrize("shards", [1, 3])
    def test_tower_inside_the_shards_wins(self, source: Source, caplog, shards: int):
        tower = torch.load(source.tower / "pytorch_model.bin", weights_only=True)
        (source.tower / "pytorch_model.bin").unlink()  # not even needed then
        inside = {f"model.vision_tower.vision_tower.{key}": value + 1 for key, value in tower.items()}
        source.write(source.tensors() | inside, shards=shards)
        convert_checkpoint.logger.addHandler(caplog.handler)  # transformers' loggers do not propagate
        ours = weights(source.convert())
        convert_checkpoint.logger.removeHandler(caplog.handler)
        for theirs_name, our_name in NAMES.items():
            if theirs_name in tower:
                assert torch.equal(ours[our_name], tower[theirs_name] + 1)
        assert "vision tower of their own" in caplog.text

    @pytest.mark.parametrize("ratio, pads", [("pad", True), ("square", False), (None, False), (REMOVED, False)])
    def test_aspect_ratio(self, source: Source, ratio, pads: bool):
        source.configure(image_aspect_ratio=ratio)
        assert MFRSVLMProcessor.from_pretrained(source.convert()).image_processor.do_pad is pads

    def test_pixels_without_padding(self, source: Source):
        reference = external_data("reference")  # images are committed padded only
        source.configure(image_aspect_ratio="square")
        processor = MFRSVLMProcessor.from_pretrained(source.convert())
        golden = load_file(reference / "golden.safetensors")["b_landscape/pixel_values_not_pad_stride8"]
        image = Image.open(reference / "images" / "b_landscape.png")
        row = processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
        pixels = row.flatten()[: 3 * 336 * 336].view(3, 336, 336)  # the global view comes first
        assert image.width != image.height
        torch.testing.assert_close(pixels[:, ::8, ::8].reshape(golden.shape), golden, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("layer, ours", [(-2, -2), ([-1], -1), (REMOVED, -1)], ids=["number", "list-of-one", "default"])
    def test_select_layer(self, source: Source, layer, ours: int):
        source.configure(mm_vision_select_layer=layer)
        assert MFRSVLMConfig.from_pretrained(source.convert()).vision_feature_layer == ours

    def test_rope_scaling(self, source: Source):
        source.configure(rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=5000.0)
        rope = MFRSVLMConfig.from_pretrained(source.convert()).text_config.rope_parameters
        assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("linear", 2.0, 5000.0)

    @pytest.mark.parametrize(
        "fields, needles",
        [
            ({"model_type": "llava"}, ["model_type='llava'", "vhm"]),
            ({"model_type": REMOVED}, ["model_type=None", "vhm"]),
            ({"image_aspect_ratio": "anyres"}, ["image_aspect_ratio='anyres'", "'pad'"]),
            ({"mm_vision_select_layer": [2, 4, 6]}, ["mm_vision_select_layer=[2, 4, 6]"]),
            ({"mm_vision_select_layer": []}, ["mm_vision_select_layer=[]"]),
            ({"mm_vision_select_layer": "6"}, ["mm_vision_select_layer='6'"]),
            ({"mm_vision_select_layer": 9}, ["vision_feature_layer=9", "0 to 6"]),
            ({"mm_vision_select_feature": "cls_patch"}, ["mm_vision_select_feature='cls_patch'", "'patch'"]),
            ({"mm_projector_type": "linear"}, ["mm_projector_type='linear'", "'mlp2x_gelu'"]),
            ({"mm_use_im_start_end": True}, ["mm_use_im_start_end=True"]),
            ({"mm_use_im_patch_token": True}, ["mm_use_im_patch_token=True"]),
            ({"mm_vision_tower": "BAAI/EVA-CLIP-8B-448"}, ["EVA-CLIP-8B-448", "EVA towers"]),
            ({"mm_vision_tower": "/weights/eva02_large/"}, ["eva02_large", "EVA towers"]),
            ({"mm_resampler": "qformer"}, ["mm_resampler"]),
            ({"deepstack_fusion": "sum"}, ["deepstack_fusion"]),
            ({"deepstack_window_scales": REMOVED}, ["deepstack_window_scales", "LLaVA"]),
            ({"deepstack_detail_layers": "0.33,0.66"}, ["deepstack_detail_layers='0.33,0.66'", "list"]),
            ({"deepstack_detail_layers": []}, ["deepstack_detail_layers=[]", "list"]),
            ({"deepstack_injection_layers": [2.5]}, ["deepstack_injection_layers=[2.5]"]),
            ({"deepstack_downsample_factor": 1.5}, ["deepstack_downsample_factor=1.5"]),
            ({"deepstack_downsample_factor": [2]}, ["deepstack_downsample_factor=[2]"]),
            ({"deepstack_window_scales": [0.1, 0.0833]}, ["window_sizes=[336, 28, 28]", "twice"]),
            ({"torch_dtype": "int8"}, ["torch_dtype='int8'", "--dtype"]),
            ({"num_attention_heads": 5}, ["config.json", "64"]),
            ({"vocab_size": 500}, ["weight has shape (512, 64)", "(500, 64)"]),
        ],
        ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
    )
    def test_refused_by_name(self, source: Source, capsys, fields: dict, needles: list[str]):
        source.configure(**fields)
        before = source.siblings()
        refused(main, capsys, source.command(), *needles)
        assert source.siblings() == before

    @pytest.mark.parametrize("name", ["clip-retrieval", "/data/evaluation/clip", "some/evaluation-tower"])
    def test_eva_is_not_found_inside_other_words(self, source: Source, name: str):
        source.configure(mm_vision_tower=name)
        source.convert()

    @pytest.mark.parametrize(
        "fields, needles",
        [
            ({"model_type": "clip", "architectures": ["EvaCLIPModel"], "vision_config": {}}, ["EvaCLIPModel", "EVA towers"]),
            ({"auto_map": {"AutoModel": "modeling_evaclip.EvaCLIPVisionModel"}}, ["EVA towers"]),
            ({"model_type": "evaclip"}, ["EVA towers"]),
            ({"model_type": "siglip_vision_model"}, ["siglip_vision_model", "CLIP ViT"]),
            ({"hidden_size": 48}, ["(64, 32)", "(64, 48)"]),
            ({"patch_size": 28}, ["patch_embedding.weight", "(32, 3, 14, 14)", "(32, 3, 28, 28)"]),
            ({"num_hidden_layers": 5}, ["encoder.layers.5.", "no place"]),
            ({"num_hidden_layers": 7}, ["16 tensors", "encoder.layers.6."]),
        ],
        ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
    )
    def test_wrong_tower(self, source: Source, capsys, fields: dict, needles: list[str]):
        write_json(source.tower / "config.json", **fields)
        if "num_hidden_layers" in fields or "patch_size" in fields:  # keep the rest of the config valid
            source.configure(deepstack_detail_layers=[2, 4], mm_vision_select_layer=4)
        refused(main, capsys, source.command(), *needles)

    @pytest.mark.parametrize("tower", ["no-such-folder", "/no/such/folder", "nobody/no-such-tower"])
    def test_no_tower(self, source: Source, capsys, tower: str):
        command = ["released", str(source.folder), "--output", str(source.output), "--vision-tower", tower]
        refused(main, capsys, command, tower, "no folder, and cannot be downloaded")
        with pytest.raises(SystemExit):  # the usage
            main(command[:-2])


class TestUnitTables:
    @pytest.mark.parametrize("row", MANIFEST["unit_resolve_detail_indices"], ids=str)
    def test_depths(self, row: dict):
        assert resolve_depths(row["spec"], row["hidden_count"] - 1) == row["indices"]

    @pytest.mark.parametrize("row", MANIFEST["unit_window_levels"], ids=lambda row: str(row["window_scales"]))
    def test_windows(self, row: dict):
        sizes = resolve_window_sizes(row["window_scales"], tokens_per_side=24, patch_size=14)
        assert sizes == [level["window_size"] for level in row["levels"]]
        for size, level in zip(sizes, row["levels"], strict=True):
            (window,) = window_table(336, 14, canvas_scale=2, window_sizes=[size], window_overlap=0.5)
            assert window.size == level["window_size"]
            assert window.stride == level["window_stride"]
            assert window.tokens_per_side == level["tokens_side"]
            assert window.token_stride == level["stride_tokens"]
            assert window.windows_per_side == level["num_windows_per_side"]
            assert 24 // window.tokens_per_side == level["pool"]

    @pytest.mark.parametrize(
        "layers, ours",
        [
            ([2, 4, 6, 8], [1, 3, 5, 7]),
            ([4, 6, 8], [3, 5, 7]),
            ([0, 2], [0, 2]),  # a 0 says that all are counted from zero
            ([8, 2, 2], [1, 7]),
            ([10, 11], [9]),
            ([0, 9, 10], [0, 9]),
            ([-1, 3], [2]),
        ],
    )
    def test_injection_layers(self, layers: list[int], ours: list[int]):
        assert resolve_injection_layers(layers, num_layers=10) == ours


def lose(*names: str):
    return lambda source: [(source.folder.parent / name).unlink() for name in names]


def overwrite(name: str, content: bytes):
    return lambda source: (source.folder.parent / name).write_bytes(content)


def add(**tensors: torch.Tensor):
    """Adds tensors, or replaces them, and writes all as one file."""
    given = {key.replace("__", "."): value for key, value in tensors.items()}
    return lambda source: source.write(source.tensors() | given)


def without(name: str):
    return lambda source: source.write({key: value for key, value in source.tensors().items() if key != name})


def key_in_two_shards(source: Source) -> None:
    first = source.folder / FIRST
    torch.save(torch.load(first, weights_only=True) | {"lm_head.weight": torch.zeros(512, 64)}, first)


# fmt: off
DAMAGES = {
    "no config.json": (lose("released/config.json"), ["released/config.json cannot be read", "No such file"]),
    "config.json no JSON": (overwrite("released/config.json", b"{"), ["config.json cannot be read as a JSON object"]),
    "config.json a list": (overwrite("released/config.json", b"[]"), ["config.json cannot be read as a JSON object"]),
    "config.json binary": (overwrite("released/config.json", b"\xff\xfe\x00"), ["config.json cannot be read"]),
    "LoRA config": (overwrite("released/adapter_config.json", b"{}"), ["LoRA", "adapter_config.json", "merge"]),
    "LoRA rest": (overwrite("released/non_lora_trainables.bin", b""), ["LoRA", "non_lora_trainables.bin", "merge"]),
    "no tokenizer.model": (lose("released/tokenizer.model"), ["tokenizer.model is missing"]),
    "tokenizer.model damaged": (overwrite("released/tokenizer.model", b"no"), ["tokenizer of", "released cannot be read"]),
    "no preprocessor": (lose("tower/preprocessor_config.json"), ["tower/preprocessor_config.json cannot be read"]),
    "preprocessor empty": (overwrite("tower/preprocessor_config.json", b"{}"), ["lacks ['image_mean', 'image_std']"]),
    "preprocessor of another tower": (
        overwrite("tower/preprocessor_config.json", b'{"image_mean": [0.5], "image_std": [0.5], "crop_size": 224}'),
        ["preprocessor_config.json describes no image processor of a tower of 336 pixels", "448 pixels"]),
    "generation config no JSON": (overwrite("released/generation_config.json", b"{"), ["generation_config.json"]),
    "no tower config": (lose("tower/config.json"), ["tower/config.json cannot be read"]),
    "no tower weights": (lose("tower/pytorch_model.bin"), ["tower holds no weights"]),
    "no weights": (lose(f"released/{FIRST}", f"released/{SECOND}", INDEX), ["holds no weights"]),
    "no index": (lose(INDEX), ["holds no weights", "index"]),
    "missing shard": (lose(f"released/{SECOND}"), [SECOND, "missing"]),
    "index no JSON": (overwrite(INDEX, b"<html>"), ["index.json cannot be read"]),
    "index without map": (overwrite(INDEX, b"{}"), ["index.json has no weight_map of keys to file names"]),
    "index reaches outside": (
        overwrite(INDEX, f'{{"weight_map": {{"lm_head.weight": "../released/{SECOND}"}}}}'.encode()),
        ["index.json has no weight_map of keys to file names"]),
    "key in two shards": (key_in_two_shards, [SECOND, "lm_head.weight comes twice"]),
    "unknown key": (add(model__adapter__weight=torch.ones(2, 3)), ["'model.adapter.weight'", "(2, 3)"]),
    "known key with a tail": (add(lm_head__weight__lora_A=torch.ones(1)), ["lm_head.weight.lora_A"]),
    "layer too many": (
        add(model__layers__10__mlp__up_proj__weight=torch.ones(128, 64)), ["layers.10.mlp.up_proj.weight has no place"]),
    "injector too many": (add(model__deepstack_residual_scale=torch.ones(5)), ["injectors.4.residual_scale has no place"]),
    "missing key": (without("model.layers.4.mlp.up_proj.weight"), ["1 tensors", "layers.4.mlp.up_proj.weight"]),
    "missing injector": (without("model.deepstack_gate_proj.2.bias"), ["injectors.2.gate_proj.bias"]),
    "mis-shaped": (add(model__norm__weight=torch.ones(65)), ["norm.weight has shape (65,)", "(64,)"]),
    "empty": (add(model__norm__weight=torch.ones(0)), ["norm.weight has shape (0,)", "(64,)"]),
    "mis-shaped scale": (add(model__deepstack_residual_scale=torch.ones(4, 2)), ["residual_scale has shape (4, 2)"]),
    "scale without a dimension": (add(model__deepstack_residual_scale=torch.ones(())), ["residual_scale has shape ()"]),
    "same tensor under two names": (
        add(vision_model__embeddings__class_embedding=torch.ones(32),
            model__vision_tower__vision_tower__vision_model__embeddings__class_embedding=torch.ones(32)),
        ["embeddings.class_embedding comes twice"]),
    "quantized": (add(lm_head__weight=torch.ones(512, 64).to(torch.int8)), ["lm_head.weight", "torch.int8", "quantized"]),
    "no tensor": (add(epoch=3), ["pytorch_model.bin holds a int at 'epoch'"]),
    "nested": (lambda s: s.write({"state_dict": s.tensors()}), ["holds a dict at 'state_dict'"]),
    "no dictionary": (lambda s: torch.save([torch.ones(1)], s.folder / FIRST), [FIRST, "holds a list, not a dictionary"]),
    "LFS pointer": (overwrite(f"released/{FIRST}", b"version https://git-lfs.github.com/spec/v1\noid x\n"), [FIRST, "LFS"]),
}
# fmt: on


class TestDamage:
    @pytest.mark.parametrize("case", DAMAGES)
    def test_fails_and_names_it(self, source: Source, capsys, case: str):
        damage, needles = DAMAGES[case]
        damage(source)
        before = source.siblings()
        refused(main, capsys, source.command(), *needles)
        assert source.siblings() == before  # neither output nor anything half-written

    @pytest.mark.parametrize("kind", ["zip", "old pickle", "safetensors"])
    def test_truncated_at_any_length(self, source: Source, capsys, kind: str):
        options = {"_use_new_zipfile_serialization": False} if kind == "old pickle" else {}
        source.write(source.tensors(), "safetensors" if kind == "safetensors" else "bin", **options)
        (path,) = [*source.folder.glob("*.bin"), *source.folder.glob("*.safetensors")]
        whole = path.read_bytes()
        for length in [0, 1, 8, 100, 1000, len(whole) // 3, len(whole) // 2, len(whole) - 1000, len(whole) - 1]:
            path.write_bytes(whole[:length])
            refused(main, capsys, source.command(), path.name)
        assert not source.output.exists()

    @pytest.mark.parametrize("place", ["checkpoint", "tower"])
    def test_a_changed_bit_is_found(self, source: Source, capsys, place: str):
        """The zip file has checksums, which `torch.load` does not compare."""
        file = source.folder / FIRST if place == "checkpoint" else source.tower / "pytorch_model.bin"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        torch.load(file, weights_only=True, mmap=True)
        refused(main, capsys, source.command(), file.name, "is damaged", "Download it again")

    @pytest.mark.parametrize("place", ["checkpoint", "tower", "bare pickle"])
    def test_code_in_a_pickle_does_not_run(self, source: Source, capsys, tmp_path: Path, place: str):
        marker = tmp_path / "code-ran"

        class Payload:
            def __reduce__(self):
                return os.mkdir, (str(marker),)

        file = source.tower / "pytorch_model.bin" if place == "tower" else source.folder / FIRST
        tensors = torch.load(file, weights_only=True)
        tensors["payload"] = Payload()
        if place == "bare pickle":
            file.write_bytes(pickle.dumps({"payload": Payload()}))
        else:
            torch.save(tensors, file)
        refused(main, capsys, source.command(), str(file), "refused", "run code")
        assert not marker.exists()
        # The payload is real: a loader that trusts the file runs it.
        torch.load(file, weights_only=False) if place != "bare pickle" else pickle.loads(file.read_bytes())
        assert marker.exists()

    def test_overflow_names_the_tensor(self, source: Source, capsys):
        tensors = source.tensors()
        tensors["lm_head.weight"][3, 4] = 1e6
        source.write(tensors)
        refused(main, capsys, source.command("--dtype", "float16"), "lm_head.weight", "1e+06", "bfloat16")
        assert main(source.command("--dtype", "bfloat16")) == 0


class TestOutput:
    @pytest.mark.parametrize("linked", [False, True])
    def test_overwrite_replaces_the_whole_model_folder(self, source: Source, linked: bool):
        folder = source.convert()
        if linked:
            folder = folder.rename(folder.with_name("target"))
            source.output.symlink_to(folder)
        (folder / "left-over.txt").write_text("from the old one")
        assert main(source.command("--overwrite", "--dtype", "bfloat16")) == 0
        assert not (folder / "left-over.txt").exists() and source.output.is_symlink() is linked
        assert {value.dtype for value in weights(folder).values()} == {torch.bfloat16}
        assert source.siblings() == {"released", "tower", "output", folder.name}

    @pytest.mark.parametrize(
        "files, option, needle",
        [
            ({}, None, "--overwrite"),
            ({"config.json": '{"model_type": "other"}'}, None, "--overwrite"),
            ({"thesis.tex": "years of work"}, "--overwrite", "no model folder"),
            ({"thesis.tex": "years of work", "config.json": "{}"}, "--overwrite", "no model folder"),
            ({"thesis.tex": "years of work", "config.json": "not JSON"}, "--overwrite", "config.json"),
            (None, "--overwrite", "no model folder"),
        ],
        ids=str,
    )
    def test_what_is_there_is_spared(self, source: Source, capsys, files: dict | None, option: str | None, needle: str):
        if files is None:
            source.output.write_text("a file")
        else:
            source.output.mkdir()
        for name, text in (files or {}).items():
            (source.output / name).write_text(text)
        refused(main, capsys, source.command(*filter(None, [option])), str(source.output), needle)
        if files is None:
            assert source.output.read_text() == "a file"
        else:
            assert {path.name: path.read_text() for path in source.output.iterdir()} == files

    @pytest.mark.parametrize("output", ["released", "tower", "released/out", "tower/a/b", "."])
    def test_output_and_source_must_lie_apart(self, source: Source, capsys, output: str):
        source.output = source.folder.parent / output
        before = {path: path.stat().st_mtime for path in source.folder.parent.rglob("*")}
        refused(main, capsys, source.command("--overwrite"), "another --output")
        assert {path: path.stat().st_mtime for path in source.folder.parent.rglob("*")} == before

    def test_output_beside_with_a_common_beginning_is_fine(self, source: Source):
        source.output = source.folder.with_name("released-hub")
        source.convert()

    @pytest.mark.parametrize(
        "error, code",
        [(OSError(28, "No space left on device"), 1), (KeyboardInterrupt(), 130), (MemoryError(), None)],
        ids=repr,
    )
    @pytest.mark.parametrize("step", ["cast", "write_model_card"])
    def test_failure_leaves_the_old_and_nothing_else(self, source: Source, monkeypatch, capsys, error, code, step: str):
        def fail(*args, **kwargs):
            raise error

        for old in (False, True):
            siblings = {"released", "tower"}
            if old:
                monkeypatch.undo()
                siblings.add(source.convert().name)
            before = {path: path.read_bytes() for path in source.output.glob("*")}
            monkeypatch.setattr(card if step == "write_model_card" else convert_checkpoint, step, fail)
            if code is None:  # not ours to explain, but it cleans up all the same
                with pytest.raises(type(error)):
                    main(source.command("--overwrite"))
            else:
                assert main(source.command("--overwrite")) == code
                assert ("No space left" if code == 1 else "interrupted") in capsys.readouterr().err
            assert source.siblings() == siblings
            assert {path: path.read_bytes() for path in source.output.glob("*")} == before

    def test_failure_while_swapping_puts_the_old_one_back(self, source: Source, monkeypatch, capsys):
        source.convert()
        replace = os.replace

        def fail_for_new(origin, target):
            if Path(origin).name == "whole":
                raise OSError("the disk is gone")
            replace(origin, target)

        monkeypatch.setattr(convert_checkpoint.os, "replace", fail_for_new)
        refused(main, capsys, source.command("--overwrite", "--dtype", "bfloat16"), "the disk is gone")
        assert {value.dtype for value in weights(source.output).values()} == {torch.float32}
        assert source.siblings() == {"released", "tower", "output"}

    def test_output_that_appears_meanwhile_is_not_replaced(self, source: Source, monkeypatch, capsys):
        save_folder = convert_checkpoint.save_folder

        def save_and_race(*args, **kwargs):
            save_folder(*args, **kwargs)
            source.output.mkdir()
            (source.output / "config.json").write_text('{"model_type": "other"}')

        monkeypatch.setattr(convert_checkpoint, "save_folder", save_and_race)
        refused(main, capsys, source.command(), str(source.output))
        assert [path.name for path in source.output.iterdir()] == ["config.json"]

    def test_two_conversions_to_one_output(self, source: Source, capsys):
        with whole_folder(source.output):
            refused(main, capsys, source.command(), f"{source.output} is being written by another run")

    @pytest.mark.integration
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
    def test_killed_half_way(self, source: Source, number: int):
        """SIGKILL leaves no folder at the output, SIGTERM nothing at all."""
        script = textwrap.dedent(
            """
            import runpy, time
            import mfrsvlm.model_card.card as card
            def stall(*args, **kwargs):
                print("half-way", flush=True)
                time.sleep(300)
            card.write_model_card = stall
            runpy.run_module("mfrsvlm.convert_checkpoint", run_name="__main__", alter_sys=True)
            """
        )
        with subprocess.Popen(
            [sys.executable, "-c", script, *source.command()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ) as process:
            try:
                assert process.stdout.readline() == "half-way\n"
                assert len(source.siblings()) == 3  # the hidden folder is there by now
                process.send_signal(number)
                _, errors = process.communicate(timeout=60)
            finally:
                process.kill()
        left = source.siblings() - {"released", "tower"}
        if number == signal.SIGKILL:
            assert process.returncode == -number and all(name.startswith(".output.partial-") for name in left)
        else:
            assert process.returncode == 128 + number, errors
            assert not left and "Traceback" not in errors
        assert main(source.command()) == 0  # and removes what is left
        assert source.siblings() == {"released", "tower", "output"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_memory_does_not_grow_with_the_checkpoint(source: Source, kind: str, dtype: str):
    """1.6 GB in three shards: next to nothing of it is held, cast or not."""
    hidden, vocab, layers = 1024, 32000, 56
    source.configure(hidden_size=hidden, intermediate_size=2752, num_hidden_layers=layers, num_attention_heads=16)
    source.configure(num_key_value_heads=16, vocab_size=vocab, torch_dtype="float16")
    sizes = {64: hidden, 128: 2752, 512: vocab}
    tensors = {}
    for key, tensor in source.tensors().items():
        if not key.startswith("model.layers."):
            # gate_proj reads twice the width, which is 128 here as well as the width of the MLP
            shape = [2 * hidden if "gate_proj" in key and size == 128 else sizes.get(size, size) for size in tensor.shape]
            tensors[key] = torch.zeros(shape, dtype=torch.float16)
        elif key.startswith("model.layers.0.") and not key.endswith("inv_freq"):
            for layer in range(layers):
                name = key.replace("layers.0.", f"layers.{layer}.")
                tensors[name] = torch.zeros([sizes[size] for size in tensor.shape], dtype=torch.float16)
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert total > 1.5e9
    source.write(tensors, kind=kind, shards=3)
    del tensors
    script = "import sys; from mfrsvlm import convert_checkpoint as c; c.MAX_OUTPUT_SHARD = 2 * 10**8; sys.exit(c.main())"
    held = []
    with subprocess.Popen([sys.executable, "-c", script, *source.command("--dtype", dtype)]) as process:
        while process.poll() is None:
            # Memory of the process itself: what is mapped from files can be taken back at any time.
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            held += [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")]
            time.sleep(0.002)
    assert process.returncode == 0
    print(f"{kind} to {dtype}: {total=:.3g} peak={max(held):.3g}")
    assert max(held) < 0.45e9  # 0.28e9 of them are the libraries


class TestVerify:
    @pytest.mark.integration
    def test_passes(self, source: Source, capsys):
        assert main(source.command("--verify")) == 0
        assert "verified: 268 tensors equal" in capsys.readouterr().out
        assert source.output.is_dir()

    def corrupt(self, monkeypatch, change) -> None:
        save_folder = convert_checkpoint.save_folder

        def save_and_corrupt(folder, *args, **kwargs):
            save_folder(folder, *args, **kwargs)
            change(folder)

        monkeypatch.setattr(convert_checkpoint, "save_folder", save_and_corrupt)

    def test_changed_tensor_is_found(self, source: Source, monkeypatch, capsys):
        def change(folder: Path) -> None:
            saved = load_file(folder / "model.safetensors")
            saved["model.language_model.layers.3.mlp.up_proj.weight"][5, 7] += 1e-6
            save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})

        self.corrupt(monkeypatch, change)
        refused(main, capsys, source.command("--verify"), "changed on the way", "layers.3.mlp.up_proj.weight")
        assert source.siblings() == {"released", "tower"}

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "file, old, new, needle",
        [
            ("config.json", '"vision_feature_layer": 6', '"vision_feature_layer": 2', "logits of the reloaded model differ"),
            ("config.json", '"injection_layers": [', '"injection_layers": [0, ', "does not load"),
            ("configuration_mfrsvlm.py", "class MFRSVLMConfig", "class Other", "does not load"),
        ],
    )
    def test_changed_folder_is_found(self, source: Source, monkeypatch, capsys, file: str, old: str, new: str, needle: str):
        def change(folder: Path) -> None:
            text = (folder / file).read_text()
            assert old in text
            (folder / file).write_text(text.replace(old, new))

        self.corrupt(monkeypatch, change)
        refused(main, capsys, source.command("--verify"), needle)
        assert source.siblings() == {"released", "tower"}


class TestCard:
    def test_converted(self, source: Source):
        """A tower inside the checkpoint's folder is under the checkpoint's card."""
        (source.folder / "README.md").write_text("---\nlicense: llama2\nbase_model: x/y\n---\n")
        data = metadata_load(source.convert() / "README.md")
        assert "license" not in data and data["base_model"] == "x/y"
        convert_released(source.folder, str(shutil.move(source.tower, source.folder)), source.output, overwrite=True)
        data = metadata_load(source.output / "README.md")
        assert (data["license"], data["base_model"]) == ("llama2", "x/y")


def test_the_old_command_of_new_models_points_to_its_place(capsys):
    assert main(["assemble", "--language-model", "a"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: this command converts. To make a new model from parts, run: mfrsvlm assemble --help"
    ]


def test_a_converted_folder_is_not_converted_again(converted: Path, tmp_path: Path, capsys):
    command = [
        "released",
        str(converted),
        "--vision-tower",
        str(CHECKPOINT / "vision_tower"),
        "--output",
        str(tmp_path / "o"),
    ]
    refused(main, capsys, command, str(converted), "needs no conversion")
