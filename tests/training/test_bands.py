"""Training of widened models: what moves, what stays, and bands that are dropped."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import tiny_config
from tiny_training import llava_row, tiny_folder

from mfrsvlm.convert_checkpoint import widen
from mfrsvlm.files.model_folder import load_model
from mfrsvlm.training.finetune import main
from mfrsvlm.training.trainer import drop_bands


BANDS = ["red", "green", "blue", "nir", "vv"]
EXTRA = "model.vision_tower.embeddings.patch_embedding.extra_bands.weight"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Folder of a widened model, and one of images with all bands and conversations about them."""
    folder = tmp_path_factory.mktemp("bands")
    widen(str(tiny_folder(folder / "narrow")), BANDS, folder / "model")
    for index in range(4):
        planes = np.random.default_rng(index).integers(0, 256, (5, 20, 30), dtype=np.uint8)
        np.savez(folder / f"{index}.npz", **dict(zip(BANDS, planes, strict=True)))
    rows = [{**llava_row(index), "image": f"{index}.npz"} for index in range(4)]
    (folder / "train.json").write_text(json.dumps(rows))
    return folder


def train(start, folder, *options) -> dict[str, torch.Tensor]:
    """Weights of a run of two steps."""
    settings = {"model_name_or_path": start / "model", "train_file": start / "train.json", "image_root": start}
    settings |= {"output_dir": folder / "run", "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    settings |= {"use_cpu": "true", "report_to": "none", "disable_tqdm": "true"}
    config = folder / "config.yaml"
    config.write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    main([str(config), *options])
    return load_file(folder / "run" / "model.safetensors")


def tower(state):
    return {name: tensor for name, tensor in state.items() if "vision_tower" in name and name != EXTRA}


@pytest.mark.integration
@pytest.mark.parametrize("options", [[], ["--lora=true", "--lora_merge=true", "--lora_r=2"]], ids=["full", "lora"])
def test_only_new_bands_of_the_tower_are_trained(start, tmp_path, options):
    before = load_file(start / "model" / "model.safetensors")
    after = train(start, tmp_path, *options)
    assert after[EXTRA].abs().max() > 0 and not before[EXTRA].any()
    assert sorted(after) == sorted(before)
    assert all(torch.equal(tensor, after[name]) for name, tensor in tower(before).items())
    # So features of red, green and blue do not drift at all.
    models = [load_model(folder)[0].model for folder in (start / "model", tmp_path / "run")]
    for parameter in (p for model in models for p in model.parameters()):
        parameter.data = parameter.data.clone()  # at the same addresses, on which last digits depend
    pixels = torch.randn(1, 5, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = [[model._encode(view, [3])[1][0] for view in (pixels, rgb_of(pixels))] for model in models]
    assert torch.equal(seen[0][1], seen[1][1]) and not torch.equal(seen[0][0], seen[1][0])


def rgb_of(pixels):
    return torch.cat([pixels[:, :3], torch.zeros_like(pixels[:, 3:])], dim=1)


@pytest.mark.integration
def test_the_whole_tower_is_trained_on_wish(start, tmp_path):
    before = load_file(start / "model" / "model.safetensors")
    after = train(start, tmp_path, "--train_only_new_bands=false")
    name = EXTRA.replace("extra_bands.", "")
    assert not torch.equal(before[name], after[name]) and after[EXTRA].any()


@pytest.mark.integration
def test_an_adapter_holds_the_new_bands(start, tmp_path):
    with pytest.raises(FileNotFoundError):  # of the whole model
        train(start, tmp_path, "--lora=true", "--lora_r=2", "--band_dropout=0.5")
    adapter = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert [name for name in adapter if "vision_tower" in name] == [f"base_model.model.{EXTRA}"]
    model, _ = load_model(tmp_path / "run")
    assert torch.equal(model.state_dict()[EXTRA], adapter[f"base_model.model.{EXTRA}"]) and model.state_dict()[EXTRA].any()


@pytest.mark.integration
def test_without_its_adapter_a_model_answers_as_before(start, tmp_path):
    with pytest.raises(FileNotFoundError):  # of the whole model
        train(start, tmp_path, "--lora=true", "--lora_r=2")
    before, processor = load_model(start / "model")
    tuned = PeftModel.from_pretrained(load_model(start / "model")[0], tmp_path / "run").eval()
    planes = np.load(start / "0.npz")
    images = [{name: planes[name] for name in names} for names in (BANDS, BANDS[:3])]
    inputs = processor(text=["<image>What is this?"] * 2, images=[[image] for image in images], return_tensors="pt")
    with torch.no_grad():
        expected = before.eval()(**inputs).logits
        with tuned.disable_adapter():
            assert torch.equal(tuned(**inputs).logits, expected)
        assert not torch.equal(tuned(**inputs).logits, expected)


@pytest.mark.integration
def test_an_adapter_of_the_tower_is_refused_as_it_would_change_rgb(start, tmp_path):
    with pytest.raises(ValueError, match=r"the adapter would train .*vision_tower.*lora_A.* train_only_new_bands"):
        train(start, tmp_path, "--lora=true", "--lora_target_modules=.*q_proj")


@pytest.mark.integration
def test_a_share_of_bands_beyond_one_is_refused(start, tmp_path):
    with pytest.raises(ValueError, match=r"band_dropout=1\.5 must be a share"):
        train(start, tmp_path, "--band_dropout=1.5")


def test_dropped_bands_are_zero_in_all_views_of_an_image():
    config = tiny_config()
    config.vision_config.num_channels, config.stem_channels = 5, [1, 2, 3]
    rows = torch.rand(40, sum(config.packed_lengths)) + 1  # nothing is zero before
    torch.manual_seed(0)
    dropped = drop_bands(rows, config, 0.3)
    torch.manual_seed(0)
    assert torch.equal(drop_bands(rows, config, 0.3), dropped)
    shares, start = [], 0
    for side, count in [(config.image_size, 1), *((w.size, w.num_windows) for w in config.windows)]:
        length = count * 5 * side**2
        pixels, original = (r[:, start : start + length].reshape(40, count, 5, -1) for r in (dropped, rows))
        start += length
        zero = (pixels == 0).all(dim=3).all(dim=1)  # (images, bands)
        assert torch.equal(pixels, torch.where(zero[:, None, :, None], 0, original))
        assert not zero[:, [1, 2, 3]].any()
        shares.append(zero)
    assert all(torch.equal(zero, shares[0]) for zero in shares) and 0.15 < shares[0][:, [0, 4]].float().mean() < 0.45
    assert torch.equal(drop_bands(rows, config, 0.0), rows)
    config.stem_channels = None
    assert drop_bands(rows, config, 0.9) is rows
