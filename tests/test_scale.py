"""More than one process, less memory than the model, and compilation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from transformers import CompileConfig

from mfrsvlm import MFRSVLMForConditionalGeneration


KINDS = {
    "gated": {},
    "token": {"routing": "token"},
    "cross_attention": {"injection_type": "cross_attention"},
    "budget": {"window_sizes": [14], "window_overlap": 0.0, "window_budget": 5},
}


def run_on_two_ranks(case, folder):
    """Runs a case of `distributed_worker.py`; a hang is a failure."""
    worker = Path(__file__).with_name("distributed_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)]
    result = subprocess.run(
        [*command, case, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-3000:]


pytestmark = pytest.mark.integration


@pytest.fixture(params=["gated", "cross_attention", "budget"])
def saved(request, tmp_path):
    model = tiny_model(**KINDS[request.param])
    model.save_pretrained(tmp_path)
    return model, tmp_path


def stepped_by_hand(model, images):
    """Parameters after the step that two ranks take together: the mean of their losses."""
    model.train()
    losses = []
    for rank, count in enumerate(images):
        inputs = tiny_inputs(model.config, [count], seed=rank)
        losses.append(model(**inputs, labels=inputs["input_ids"]).loss)
    (sum(losses) / 2).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    return model.state_dict()


def test_ddp_averages_and_a_rank_with_text_only_does_not_hang(saved):
    _, folder = saved
    run_on_two_ranks("ddp", folder)
    for name, images in {"images": [1, 2], "text": [1, 0]}.items():
        seen = torch.load(folder / f"ddp-{name}.pt")
        fresh = MFRSVLMForConditionalGeneration.from_pretrained(folder)
        for key, expected in stepped_by_hand(fresh, images).items():
            assert torch.allclose(seen[key], expected, atol=1e-4, rtol=1e-4), (name, key)


def test_sharded_parameters_with_a_rank_of_text_only(saved):
    model, folder = saved
    run_on_two_ranks("fsdp", folder)
    expected = stepped_by_hand(model, [1, 0])
    for key, seen in torch.load(folder / "fsdp.pt").items():
        assert torch.allclose(seen, expected[key], atol=1e-4, rtol=1e-4), key
    model.eval()
    for rank in range(2):
        inputs = tiny_inputs(model.config, [1 - rank], seed=rank)
        tokens = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert torch.equal(torch.load(folder / f"fsdp-tokens-{rank}.pt"), tokens)


def test_tensor_parallel_equals_one_process(saved):
    model, folder = saved
    run_on_two_ranks("tensor_parallel", folder)
    seen = torch.load(folder / "tp.pt")
    assert seen["sharded"]
    inputs = tiny_inputs(model.config, [1, 2])
    with torch.no_grad():
        assert torch.allclose(seen["logits"], model(**inputs).logits, atol=1e-4)
    assert torch.equal(seen["tokens"], model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("kind", KINDS)
def test_disk_offload_runs_and_agrees(kind, tmp_path):
    model = tiny_model(**KINDS[kind])
    model.save_pretrained(tmp_path / "model")
    device_map = {"model.vision_tower": "cpu", "model.multi_modal_projector": "disk", "lm_head": "cpu"}
    device_map.update({f"model.language_model.{name}": "disk" for name in ("embed_tokens", "norm", "injectors")})
    device_map.update({"model.language_model.rotary_emb": "cpu", "model.injectors": "cpu"})
    device_map.update({f"model.language_model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)})
    if kind == "budget":
        device_map["model.window_scorer"] = "disk"
    offloaded = MFRSVLMForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    inputs = tiny_inputs(model.config, [1, 2])
    with torch.no_grad():
        assert torch.allclose(offloaded(**inputs).logits, model(**inputs).logits, atol=1e-5)
    tokens = offloaded.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert torch.equal(tokens, model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False))


@pytest.mark.parametrize("kind", KINDS)
def test_decoder_compiles_without_graph_breaks(kind):
    model = tiny_model(**KINDS[kind])
    inputs = tiny_inputs(model.config, [1, 2])
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"])
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        # The eager backend traces everything and compiles nothing, so no compiler is needed.
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        seen = compiled(**text, mm_encoder_outputs={"image": features}, use_cache=False).logits
        assert torch.allclose(seen, model(**inputs).logits, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_static_cache_and_compiled_decode(kind):
    model = tiny_model(**KINDS[kind])
    inputs = tiny_inputs(model.config, [1, 2])
    compile_config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compile_config._compile_all_devices = True  # on the CPU, transformers compiles only when told
    tokens = model.generate(
        **inputs,
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        cache_implementation="static",
        compile_config=compile_config,
    )
    assert torch.equal(tokens, model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False))
    torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_gpu_agrees_with_cpu_and_does_not_wait_for_it(kind, attention):
    model = tiny_model(**KINDS[kind])
    inputs = tiny_inputs(model.config, [1, 1], side="left")
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs).logits[real]
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
        model.set_attn_implementation(attention)
        model.to(torch.bfloat16)
    model.cuda()
    # Without padding no mask is needed, and transformers reads a given one on the host.
    inputs = {name: tensor.cuda() for name, tensor in inputs.items() if name != "attention_mask"}
    if kind != "cross_attention":  # reads one number at prefill
        torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            logits = model(**inputs).logits
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(logits[real.cuda()].float().cpu(), expected, atol=1e-3 if attention == "sdpa" else 0.5)
