"""What two gloo ranks do in `test_scale.py`: `torchrun --nproc-per-node 2 distributed_worker.py CASE FOLDER`."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_models import tiny_inputs
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from mfrsvlm import MFRSVLMForConditionalGeneration


def loss_of(model, inputs):
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return model(**inputs, labels=labels).loss


def step(model, rank, images):
    """One SGD step on this rank's batch; returns the parameters after it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, tiny_inputs(model.config, [images[rank]], seed=rank)).backward()
    optimizer.step()


def ddp(folder, rank):
    """Both ranks with an image, then one with text only: the averaged gradients of the two batches."""
    for name, images in {"images": [1, 2], "text": [1, 0]}.items():
        model = MFRSVLMForConditionalGeneration.from_pretrained(folder).train()
        wrapped = DistributedDataParallel(model)
        wrapped.config = model.config
        step(wrapped, rank, images)
        if rank == 0:
            torch.save(model.state_dict(), folder / f"ddp-{name}.pt")


def fsdp(folder, rank):
    """Sharded parameters: a step with text on one rank, then generation with text on one rank."""
    model = MFRSVLMForConditionalGeneration.from_pretrained(folder, window_chunk_size=None).train()
    for layer in [*model.model.language_model.layers, *model.model.vision_tower.encoder.layers]:
        fully_shard(layer)
    fully_shard(model)
    # generate() encodes images before the first forward, so it has to gather the parameters as well.
    register_fsdp_forward_method(model, "generate")
    step(model, rank, [1, 0])
    state = {name: value.full_tensor() for name, value in model.state_dict().items()}
    if rank == 0:
        torch.save(state, folder / "fsdp.pt")
    model.eval()
    inputs = tiny_inputs(model.config, [1 - rank], seed=rank)
    tokens = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, synced_gpus=True)
    torch.save(tokens, folder / f"fsdp-tokens-{rank}.pt")


def tensor_parallel(folder, rank):
    model = MFRSVLMForConditionalGeneration.from_pretrained(folder, tp_plan="auto").eval()
    query = model.model.language_model.layers[0].self_attn.q_proj.weight
    sharded = query.shape != getattr(query, "to_local", lambda: query)().shape or query.shape[0] * 2 == 32
    inputs = tiny_inputs(model.config, [1, 2])
    with torch.no_grad():
        logits = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    if rank == 0:
        torch.save({"logits": logits, "tokens": tokens, "sharded": sharded}, folder / "tp.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    case, target = sys.argv[1:]
    if case != "tensor_parallel":  # which sets up its own process group
        dist.init_process_group("gloo")
    globals()[case](Path(target), int(os.environ["RANK"]))
    dist.barrier()
    dist.destroy_process_group()
