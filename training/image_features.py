"""Features of a frozen encoder, computed once and cached in a file."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from ..files.writing import whole_array
from ..modeling_mfrsvlm import MFRSVLMForConditionalGeneration, MFRSVLMImageFeatures
from .branches import BranchCollator
from .data import ConversationDataset


# Parameters of the encoder, before the projector.
ENCODER = ("vision_tower.", "stage_projections.")


def freeze_encoder(model: MFRSVLMForConditionalGeneration) -> None:
    """Freezes the parameters that cached features depend on."""
    for name, parameter in model.model.named_parameters():
        if name.startswith(ENCODER):
            parameter.requires_grad = False


@torch.inference_mode()
def cache_image_features(
    model: MFRSVLMForConditionalGeneration, batches: Iterable[torch.Tensor], count: int, path: Path
) -> np.ndarray:
    """Visual tokens and detail stacks of images, before the projector and without position embeddings.

    Args:
        model: the model, whose encoder computes the features.
        batches: rows of `pixel_values` (n, L), `count` in all. Not used if the file exists.
        count: number of images N.
        path: the cache file. It gets its name when it is complete.

    Returns:
        (N, 1 + K, T, C) float16, memory-mapped.

    Raises:
        ValueError: the file contains another number of images, or the model chooses windows.
    """
    if model.config.window_budget is not None:
        raise ValueError(
            f"window_budget={model.config.window_budget}: which windows are chosen changes in training, so their features "
            "cannot be cached. Set it to None."
        )
    if not path.exists():
        config = model.config
        path.parent.mkdir(parents=True, exist_ok=True)
        stacks = config.num_detail_stacks if config.has_details else 0
        shape = (count, 1 + stacks, config.image_seq_length, config.vision_feature_size)
        projector, model.model.multi_modal_projector = model.model.multi_modal_projector, nn.Identity()
        places, config.visual_position_embeddings = config.visual_position_embeddings, False
        model.eval()
        tower = model.model.vision_tower.to(memory_format=torch.channels_last)  # convolutions on CPUs take two thirds
        start = 0
        bar = tqdm(total=count, desc=path.stem, unit="image", mininterval=5)
        with whole_array(path, np.float16, shape) as features, bar:
            for pixels in batches:
                outputs = model.model.get_image_features(pixels, return_dict=True)
                tokens = [torch.stack(outputs.pooler_output)]
                tokens += [torch.stack(stack) for stack in outputs.deepstack_features or []]
                features[start : start + len(pixels)] = torch.stack(tokens, dim=1).half().numpy()
                start += len(pixels)
                bar.update(len(pixels))
        tower.to(memory_format=torch.contiguous_format)
        model.model.multi_modal_projector, config.visual_position_embeddings = projector, places
    features = np.load(path, mmap_mode="r")
    if len(features) != count:
        raise ValueError(f"{path} has features of {len(features)} images, not of {count}. Remove it to encode again.")
    return features


def project(model: MFRSVLMForConditionalGeneration, features: torch.Tensor) -> MFRSVLMImageFeatures:
    """Projects cached features (N, 1 + K, T, C) to the output of `get_image_features`, with gradients for the projector."""
    projected = model.model.multi_modal_projector(features)
    details = [list(stack) for stack in projected[:, 1:].unbind(1)] if features.shape[1] > 1 else None
    visual = projected[:, 0]
    if model.config.visual_position_embeddings:
        visual = visual + model.model.visual_position_embedding.weight
    return MFRSVLMImageFeatures(pooler_output=list(visual), deepstack_features=details)


class CachedRows(Dataset):
    """Rows of a `ConversationDataset` with cached features instead of images.

    Args:
        conversations: the rows, made without `encode`.
        collator: encodes them.
        model: its encoder computes the features, unless they are in the file.
        path: see `cache_image_features`.

    Raises:
        ValueError: a row has no image or several images.
    """

    def __init__(
        self,
        conversations: ConversationDataset,
        collator: BranchCollator,
        model: MFRSVLMForConditionalGeneration,
        path: Path,
    ) -> None:
        self.conversations, self.collator = conversations, collator
        self.features = cache_image_features(model, self._pixels(), len(conversations), path)

    def _pixels(self) -> Iterator[torch.Tensor]:
        for index in range(len(self.conversations)):
            sample = self.collator.encode(self.conversations[index]["messages"])
            count = len(sample.get("pixel_values", ()))
            if count != 1:
                raise ValueError(
                    f"{self.conversations.where(index)} has {count} images; cached features need one in each row."
                )
            yield sample["pixel_values"]

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        features = torch.from_numpy(np.array(self.features[index : index + 1])).float()
        return self.collator.encode(self.conversations[index]["messages"], image_features=features)
