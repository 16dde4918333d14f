"""Losses of a plain training loop: `torchrun --nproc-per-node 2 training_worker.py FOLDER DATA OUT`, sharded by FSDP2.

Sample i of a step goes to rank i, and the loss is that of all tokens of the step.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from mfrsvlm import MFRSVLMForConditionalGeneration, MFRSVLMProcessor
from mfrsvlm.training import ConversationCollator, ConversationDataset


STEPS, GROUP = 6, 2


def losses_of(folder: Path, data: str, rank: int, world_size: int) -> list[float]:
    """Loss of every step, over all ranks."""
    collator = ConversationCollator(MFRSVLMProcessor.from_pretrained(folder / "model"))
    dataset = ConversationDataset(folder / f"{data}.json", folder, encode=collator.encode)
    model = MFRSVLMForConditionalGeneration.from_pretrained(folder / "model", window_chunk_size=None).train()
    if world_size > 1:
        for layer in [*model.model.language_model.layers, *model.model.vision_tower.encoder.layers]:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(STEPS):
        samples = [dataset[step * GROUP + i] for i in range(GROUP)]
        num_items = sum(label != -100 for sample in samples for label in sample["labels"])
        batch = collator(samples[rank::world_size])
        loss = model(**batch, num_items_in_batch=num_items).loss  # its share of the step's
        (loss * world_size).backward()  # gradients are averaged over the ranks
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if world_size > 1:
            dist.all_reduce(total)
        losses.append(total.item())
    return losses


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder, data, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    found = losses_of(folder, data, int(os.environ["RANK"]), dist.get_world_size())
    if dist.get_rank() == 0:
        torch.save(torch.tensor(found), out)
    dist.destroy_process_group()
