"""The model in vLLM: its own tower and injectors, and a decoder with vLLM's attention.

vLLM prefills prompts in pieces, of several requests together, and skips what its prefix cache holds, also within an image.
Every visual token carries its details along, so that any piece is whole. vLLM passes them in two calls: `embed_input_ids`
gets them, `forward` needs them, and the model keeps them in between.

Letters in shape comments: T tokens an image, K detail stacks, S positions of a step, M of them visual, d decoder channels.
"""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.models.transformers import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
    TransformersMultiModalForCausalLM,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..injection_mfrsvlm import MASKED_SCORE, Injection, gated_injection, visual_layout


WITHOUT_DETAILS = Injection(None, None, None, None)


@MULTIMODAL_REGISTRY.register_processor(
    MultiModalProcessor, info=MultiModalProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
)
class MFRSVLMForVLLM(TransformersMultiModalForCausalLM):
    """Steps without images run as any decoder does in vLLM, compiled and recorded. Steps with images run eagerly."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:  # vLLM looks for these names
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # The visual positions of the next step (S,), and its details (K, 1, M, d).
        self.pending: tuple[torch.Tensor, torch.Tensor] | None = None
        self.logits_processor.scale /= getattr(self.text_config, "logits_scaling", 1.0)

    def recursive_replace(self) -> None:
        """Gives the decoder vLLM's layers, and no other part: the injectors read their weights, which those may repack."""
        parts = {name: part for name, part in self.model.named_children() if name != "language_model"}
        for name in parts:
            delattr(self.model, name)
        super().recursive_replace()
        for name, part in parts.items():
            setattr(self.model, name, part)

    def embed_multimodal(self, **kwargs: Any) -> list[torch.Tensor]:
        """Of each image (T, (1 + K) * d): its visual tokens and, along the channels, their details.

        Raises:
            ValueError: there are no pixels.
        """
        if kwargs.get("pixel_values") is None:
            raise ValueError(f"Images must come as pixels, got {sorted(kwargs)}. Embeddings of images hold no details.")
        features = self.model.get_image_features(kwargs["pixel_values"], return_dict=True)
        stacks = [features.pooler_output, *(features.deepstack_features or [])]
        return [torch.cat(image, dim=-1) for image in zip(*stacks, strict=True)]

    def embed_input_ids(
        self, input_ids: torch.Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Any = None
    ) -> torch.Tensor:
        """(S,) to (S, d), with the visual tokens at `is_multimodal` (S,)."""
        self.pending = None
        if multimodal_embeddings is not None and len(multimodal_embeddings):
            size = self.text_config.hidden_size
            packed = torch.cat(list(multimodal_embeddings))  # (M, (1 + K) * d)
            multimodal_embeddings = [packed[:, :size]]
            if packed.shape[1] > size:
                # (M, K * d) -> (K, 1, M, d)
                self.pending = is_multimodal, packed[:, size:].unflatten(1, (-1, size)).transpose(0, 1)[:, None]
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Positions (S,) and embeddings (S, d) to hidden states (S, d)."""
        pending, self.pending = self.pending, None
        decoder: Any = self.model.language_model
        injection = WITHOUT_DETAILS
        if inputs_embeds is None:
            inputs_embeds = self.embed_input_ids(input_ids)
        if pending is not None:
            decoder = decoder.forward  # what vLLM compiled has no injection in it
            mask, details = pending
            mask = nn.functional.pad(mask.to(positions.device), (0, len(positions) - len(mask)))  # a step may be padded
            layout = visual_layout(mask[None], num_images=1, tokens=details.shape[2])
            injection = gated_injection(details, layout, "token")
        outputs = decoder(
            inputs_embeds=inputs_embeds[None],
            position_ids=positions[None],
            use_cache=False,
            return_dict=False,
            injection=injection,
        )
        return outputs[0][0]

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        logits = super().compute_logits(hidden_states)
        if logits is not None:  # only one rank has them
            logits[..., self.config.image_token_id] = MASKED_SCORE
        return logits
