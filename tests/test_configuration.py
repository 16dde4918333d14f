"""The configuration: published defaults, the window table, round trips, and an error for every number that is wrong."""

import copy
import json
import math
import random
import time

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassError
from packaging.version import Version
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, ResNetConfig

from mfrsvlm import MFRSVLMConfig
from mfrsvlm.configuration_mfrsvlm import WindowScale, packed_lengths, window_table


def backbone_config(**overrides) -> MFRSVLMConfig:
    """A config whose encoder is a backbone of five outputs: the stem and four stages."""
    return MFRSVLMConfig(**{"vision_config": ResNetConfig(), "detail_feature_layers": [2, 3, 4], **overrides})


def test_defaults_are_the_published_sizes():
    config = MFRSVLMConfig()
    assert config.vision_config.model_type == "clip_vision_model"
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    assert [getattr(config.vision_config, size) for size in sizes] == [1024, 4096, 24, 16, 336, 14]
    assert config.text_config.model_type == "llama"
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (4096, 32)
    assert (config.image_size, config.patch_size, config.canvas_scale) == (336, 14, 2)
    assert config.window_sizes == [336, 168]
    assert config.detail_feature_layers == [8, 16, 24]
    assert config.injection_layers == [3, 7, 11, 15]
    assert config.image_token_id == config.text_config.vocab_size - 1
    assert (config.tokens_per_side, config.image_seq_length) == (24, 576)
    assert config.num_detail_stacks == 24
    assert [window.num_windows for window in config.windows] == [9, 49]


def test_a_row_of_an_image_fits_in_32_megabytes():
    values = sum(MFRSVLMConfig().packed_lengths)
    assert values == 3 * 336**2 + 9 * 3 * 336**2 + 49 * 3 * 168**2
    assert values * 4 <= 32e6


def test_window_table_is_the_published_one(reference):
    """The reference names windows by their share of the global view; the integers are the same."""
    tables = json.loads((reference / "manifest.json").read_text())["unit_window_levels"]
    assert tables
    for table in tables:
        for level in table["levels"]:
            (window,) = window_table(336, 14, 2, [level["window_size"]], 0.5)
            assert window.size == level["window_size"]
            assert window.stride == level["window_stride"]
            assert window.tokens_per_side == level["tokens_side"]
            assert window.token_stride == level["stride_tokens"]
            assert window.windows_per_side == level["num_windows_per_side"]


@pytest.mark.parametrize(
    ("image_size", "patch_size", "scale", "size", "overlap", "stride", "per_side"),
    [
        (336, 14, 2, 336, 0.5, 168, 3),
        (336, 14, 2, 168, 0.5, 84, 7),
        (336, 14, 2, 336, 0, 336, 2),
        (336, 14, 2, 168, 0.0, 168, 4),
        (336, 14, 2, 168, 0.75, 42, 13),
        (336, 14, 2, 672, 0.5, 336, 1),
        (336, 14, 1, 336, 0.5, 168, 1),
        (336, 14, 3, 336, 0.5, 168, 5),
        (336, 14, 2, 14, 0.9, 14, 48),  # the stride is never less than a token
        (280, 14, 2, 140, 0.9, 14, 31),  # 10 * (1 - 0.9) is 0.99... in floating point, but one token is meant
        (28, 7, 2, 14, 0.5, 7, 7),
    ],
)
def test_window_table(image_size, patch_size, scale, size, overlap, stride, per_side):
    (window,) = window_table(image_size, patch_size, scale, [size], overlap)
    assert window == WindowScale(size, stride, size // patch_size, stride // patch_size, per_side)
    assert window.num_windows == per_side**2
    for channels in (3, 4):
        assert packed_lengths(7, [window], channels) == [channels * 49, per_side**2 * channels * size**2]
    # The windows lie in row-major order, the first and the last one in the corners of the canvas.
    assert len(window.offsets) == per_side**2
    assert window.offsets == sorted(window.offsets)
    assert window.offsets[0] == (0, 0)
    assert window.offsets[-1] == (scale * image_size - size,) * 2
    assert {
        later - earlier for (_, earlier), (_, later) in zip(window.offsets, window.offsets[1:per_side], strict=False)
    } <= {stride}


def test_no_windows():
    assert window_table(336, 14, 2, [], 0.5) == ()
    config = MFRSVLMConfig(window_sizes=[], injection_layers=[])
    assert config.windows == ()
    assert not config.has_details
    assert config.num_detail_stacks == 0


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        ((336, 14, 2, [100], 0.5), ["100", "14"]),
        ((336, 14, 2, [0], 0.5), ["0", "14"]),
        ((336, 14, 2, [-14], 0.5), ["-14", "14"]),
        ((336, 14, 2, [686], 0.5), ["686", "672"]),
        ((336, 14, 2, [168, 168], 0.5), ["168, 168"]),
        ((336, 14, 2, [252], 0.5), ["252", "126", "672"]),
        ((336, 13, 2, [336], 0.5), ["336", "13"]),
        ((0, 14, 2, [336], 0.5), ["image_size=0", "14"]),
        ((336, 0, 2, [336], 0.5), ["336", "patch_size=0"]),
        ((336, -14, 2, [336], 0.5), ["336", "patch_size=-14"]),
        ((336, 14, 0, [336], 0.5), ["canvas_scale=0"]),
        ((336, 14, 2, [336], 1.0), ["window_overlap=1.0"]),
        ((336, 14, 2, [336], -0.1), ["window_overlap=-0.1"]),
        ((336, 14, 2, [336], math.nan), ["window_overlap=nan"]),
    ],
)
def test_window_table_refuses(arguments, values):
    with pytest.raises(ValueError) as error:
        window_table(*arguments)
    for value in values:
        assert value in str(error.value)


# Overrides of the default config that must fail, and what the message must hold: both sides of the conflict.
WRONG = {
    "image_size": ({"image_size": 300}, ["image_size=300", "14"]),
    "patch_size": ({"patch_size": 16}, ["16", "14"]),
    "negative_patch_size": ({"patch_size": -14}, ["-14", "=14"]),
    "vision_feature_size": ({"vision_feature_size": 512}, ["512", "1024"]),
    "vision_feature_layer_high": ({"vision_feature_layer": 25}, ["25", "24"]),
    "vision_feature_layer_low": ({"vision_feature_layer": -26}, ["-26", "24"]),
    "canvas_scale": ({"canvas_scale": 0}, ["canvas_scale=0"]),
    "canvas_scale_type": ({"canvas_scale": "2"}, ["canvas_scale", "'2'"]),
    "window_multiple": ({"window_sizes": [100]}, ["100", "14"]),
    "window_too_large": ({"window_sizes": [700]}, ["700", "672"]),
    "window_twice": ({"window_sizes": [168, 168]}, ["168, 168"]),
    "window_type": ({"window_sizes": ["a"]}, ["window_sizes", "'a'"]),
    "window_share": ({"window_sizes": [0.5]}, ["window_sizes", "0.5"]),
    "window_overlap": ({"window_overlap": 1.5}, ["window_overlap=1.5"]),
    "window_overlap_nan": ({"window_overlap": math.nan}, ["window_overlap=nan"]),
    "window_overlap_gap": ({"window_sizes": [336], "window_overlap": 0.4}, ["336", "0.4", "672"]),
    "window_encoding": ({"window_encoding": "nope"}, ["window_encoding", "nope"]),
    "window_encoding_pool": (
        {"window_encoding": "resize", "window_sizes": [140], "window_overlap": 0.9},
        ["24", "10", "140"],
    ),
    "window_weighting": ({"window_weighting": "nope"}, ["window_weighting", "nope"]),
    "window_weighting_gap": ({"window_weighting": "hann", "window_overlap": 0.0}, ["24", "hann_nonzero", "0.0"]),
    "window_chunk_size": ({"window_chunk_size": 0}, ["window_chunk_size=0"]),
    "window_chunk_size_word": ({"window_chunk_size": "all"}, ["window_chunk_size", "all"]),
    "detail_layers_high": ({"detail_feature_layers": [8, 25]}, ["25", "24"]),
    "detail_layers_low": ({"detail_feature_layers": [-1, 8]}, ["-1", "24"]),
    "detail_layers_order": ({"detail_feature_layers": [16, 8]}, ["[16, 8]", "ascending"]),
    "detail_layers_twice": ({"detail_feature_layers": [8, 8]}, ["[8, 8]", "duplicates"]),
    "detail_layers_share": ({"detail_feature_layers": [0.33]}, ["detail_feature_layers", "0.33"]),
    "detail_layers_none": ({"detail_feature_layers": []}, ["[336, 168]", "detail_feature_layers"]),
    "injection_layers_high": ({"injection_layers": [3, 32]}, ["32", "31"]),
    "injection_layers_low": ({"injection_layers": [-1]}, ["-1", "31"]),
    "injection_layers_order": ({"injection_layers": [7, 3]}, ["[7, 3]", "ascending"]),
    "injection_of_nothing": ({"window_sizes": []}, ["[3, 7, 11, 15]", "window_sizes"]),
    "injection_type": ({"injection_type": "nope"}, ["injection_type", "nope"]),
    "injection_init": ({"injection_init": math.nan}, ["injection_init=nan"]),
    "injection_init_inf": ({"injection_init": math.inf}, ["injection_init=inf"]),
    "routing": ({"routing": "nope"}, ["routing", "nope"]),
    "routing_scope": ({"routing_scope": "batch"}, ["routing_scope", "batch"]),
    "routing_size": ({"routing_size": 0}, ["routing_size=0"]),
    "cross_attention_size": ({"cross_attention_size": 100}, ["100", "8"]),
    "cross_attention_no_size": ({"cross_attention_size": 0}, ["cross_attention_size=0"]),
    "cross_attention_heads": ({"cross_attention_heads": 0}, ["cross_attention_heads=0"]),
    "image_token_id": ({"image_token_id": -200}, ["-200"]),
    "image_token_id_beyond": ({"image_token_id": 32000}, ["32000", "vocab_size=32000"]),
}


@pytest.mark.parametrize(("overrides", "values"), WRONG.values(), ids=WRONG)
def test_config_refuses(overrides, values):
    with pytest.raises(StrictDataclassError) as error:
        MFRSVLMConfig(**overrides)
    for value in values:
        assert value in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "values"),
    [
        ({"detail_feature_layers": [5]}, ["5", "4"]),
        ({"vision_feature_layer": 5}, ["5", "4"]),
        ({"vision_feature_size": 0}, ["vision_feature_size=0"]),
    ],
)
def test_config_with_backbone_refuses(overrides, values):
    with pytest.raises(StrictDataclassError) as error:
        backbone_config(**overrides)
    for value in values:
        assert value in str(error.value)


def test_config_refuses_an_unknown_decoder():
    with pytest.raises(ValueError, match="no-such-decoder"):
        MFRSVLMConfig(text_config={"model_type": "no-such-decoder"})


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"window_overlap": 0, "injection_init": 1},  # whole numbers count as floats
        {"window_sizes": (336,), "detail_feature_layers": (24,), "injection_layers": (0,)},
        {"window_sizes": [], "injection_layers": []},
        {"window_encoding": "resize", "window_weighting": "hann", "window_chunk_size": None},
        {"window_chunk_size": 16},  # the value of folders that were saved before "auto"
        {"injection_type": "cross_attention", "cross_attention_size": 64, "cross_attention_heads": 4},
        {"routing": "token", "routing_scope": "sample", "image_token_id": 7},
    ],
)
@pytest.mark.parametrize("vision", ["clip", "resnet"])
def test_round_trips(tmp_path, overrides, vision):
    config = (
        MFRSVLMConfig(**overrides) if vision == "clip" else backbone_config(**{**overrides, "detail_feature_layers": [4]})
    )
    assert MFRSVLMConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    loaded = MFRSVLMConfig.from_pretrained(tmp_path)
    assert loaded.to_json_string() == config.to_json_string()
    assert loaded.windows == config.windows


def test_saved_config_names_the_code_of_every_auto_class(tmp_path):
    MFRSVLMConfig().save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoConfig"] == "configuration_mfrsvlm.MFRSVLMConfig"
    assert set(auto_map) >= {"AutoConfig", "AutoModel", "AutoModelForImageTextToText"}
    assert AutoConfig.from_pretrained(tmp_path, trust_remote_code=True).model_type == "mfrsvlm"


def test_sub_configs_may_be_dicts_or_objects():
    text = LlamaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=16, num_attention_heads=4)
    vision = CLIPVisionConfig(hidden_size=24, num_hidden_layers=24, num_attention_heads=2, image_size=28, patch_size=7)
    sizes = {"window_sizes": [28, 14]}
    objects = MFRSVLMConfig(text_config=text, vision_config=vision, **sizes)
    dicts = MFRSVLMConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), **sizes)
    assert objects.to_dict() == dicts.to_dict()
    # What the encoder and the decoder know already need not be said again.
    assert (objects.image_size, objects.patch_size, objects.vision_feature_size) == (28, 7, 24)
    assert objects.image_token_id == 98


def test_a_backbone_returns_the_stages_that_are_read():
    config = backbone_config()
    assert config.is_hierarchical
    assert config.num_vision_layers == 4
    assert config.vision_config.out_indices == [2, 3, 4]
    assert (config.image_size, config.patch_size, config.vision_feature_size) == (336, 14, 1024)
    assert config.num_detail_stacks == 24


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"vision_config": {"num_hidden_layers": 10**6}}, "vision_config.num_hidden_layers=1000000 is beyond .* 1024"),
        ({"vision_config": {"model_type": "resnet", "depths": [3, 10**9]}}, "vision_config.depths=1000000000 is beyond"),
        ({"text_config": {"hidden_size": 10**9}}, "text_config.hidden_size=1000000000 is beyond"),
        # Its config lists the type of every layer.
        ({"text_config": {"model_type": "qwen3", "num_hidden_layers": 10**9}}, "text_config.num_hidden_layers=1000000000"),
        ({"text_config": {"vocab_size": 10**12}}, "text_config.vocab_size=1000000000000 is beyond"),
        ({"text_config": {"max_position_embeddings": 10**5000}}, "max_position_embeddings=a number of more than 300 digits"),
        (
            {"text_config": {"num_hidden_layers": 1000, "hidden_size": 2**16}},
            r"hidden_size=65536.*1e\+12",
        ),
        ({"routing_size": 10**9}, "routing_size=1000000000 is beyond"),
        ({"canvas_scale": 10**6}, "canvas_scale=1000000 is beyond"),
        ({"window_sizes": [336] * 10**4}, "window_sizes has 10000 items"),
        ({"text_config": 3}, "text_config must be a config or its fields, not 3"),
        ({"vision_config": {"model_type": "none"}}, "vision_config makes no config of type 'none'"),
        ({"dtype": "float99"}, "float99"),
        pytest.param(
            {"id2label": 3},
            "wrong type",
            marks=pytest.mark.skipif(
                Version(transformers.__version__) < Version("5.24"), reason="this transformers checks its own fields first"
            ),
        ),
    ],
)
def test_sizes_that_no_machine_could_build_are_rejected_at_once(fields, named):
    start = time.process_time()
    with pytest.raises(ValueError, match=named) as caught:
        MFRSVLMConfig(**fields)
    assert time.process_time() - start < 1 and "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize(("size", "scale", "windows"), [(14, 32, 589_824), (16_380, 1, 1)])
def test_windows_that_no_memory_holds_are_rejected(size, scale, windows):
    with pytest.raises(ValueError, match=rf"image_size=\d+, canvas_scale={scale}.* make {windows} windows and \d+ values"):
        window_table(16_380 if windows == 1 else 336, 14, scale, [size], 0.0)


WRONG = [None, True, -1, 0, 10**9, 10**12, 1e30, math.nan, math.inf, "x", "", [], {}, [1], ["a"], [10**9], {"a": 1}, [[1]]]


def places(value):
    """Every dictionary or list in a value, with each of its keys or indices."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


@pytest.mark.parametrize("seed", range(4))
def test_any_mutated_config_works_or_is_rejected(seed):
    draw = random.Random(seed)
    bases = [MFRSVLMConfig().to_dict(), backbone_config().to_dict()]
    for _ in range(25):
        fields = copy.deepcopy(draw.choice(bases))
        holder, key = draw.choice(list(places(fields)))
        if draw.random() < 0.2 and isinstance(holder, dict):
            del holder[key]
        else:
            holder[key] = copy.deepcopy(draw.choice(WRONG))
        try:
            config = MFRSVLMConfig.from_dict(fields)
        except (ValueError, StrictDataclassError):
            continue
        assert config.windows is not None and sum(config.packed_lengths) > 0 and config.num_detail_stacks >= 0


@pytest.mark.parametrize(
    "image_size, patch_size, canvas_scale, expected",
    [(336, 14, 2, 168), (384, 16, 2, 192), (378, 14, 2, 126), (224, 14, 3, 112)],
)
def test_efficient_windows_tile_the_canvas_and_cost_one_pass_each(image_size, patch_size, canvas_scale, expected):
    vision = {"image_size": image_size, "patch_size": patch_size}
    config = MFRSVLMConfig.efficient(
        vision_config=vision, detail_feature_layers=[6, 12], injection_layers=[1], canvas_scale=canvas_scale
    )
    (window,) = config.windows
    assert (window.size, window.stride) == (expected, expected)
    assert window.windows_per_side * window.size == canvas_scale * image_size
    assert config.encoder_passes == pytest.approx(1 + canvas_scale**2)
    assert (
        MFRSVLMConfig(vision_config=vision, detail_feature_layers=[6], window_sizes=[], injection_layers=[]).encoder_passes
        == 1
    )


def test_fields_win_over_the_efficient_windows():
    config = MFRSVLMConfig.efficient(window_overlap=0.5, routing="stack")
    assert (config.window_sizes, config.window_overlap, config.routing) == ([168], 0.5, "stack")
    assert config.encoder_passes == 1 + 49 / 4
