"""MF-RSVLM: a vision-language model for remote sensing imagery (FUSE-RSVLM, arXiv 2512.24022)."""

from typing import TYPE_CHECKING

from .lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .configuration_mfrsvlm import MFRSVLMConfig
    from .image_processing_mfrsvlm import MFRSVLMImageProcessor
    from .modeling_mfrsvlm import MFRSVLMForConditionalGeneration, MFRSVLMModel, MFRSVLMPreTrainedModel
    from .processing_mfrsvlm import MFRSVLMProcessor

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "MFRSVLMConfig": "configuration_mfrsvlm",
        "MFRSVLMForConditionalGeneration": "modeling_mfrsvlm",
        "MFRSVLMImageProcessor": "image_processing_mfrsvlm",
        "MFRSVLMModel": "modeling_mfrsvlm",
        "MFRSVLMPreTrainedModel": "modeling_mfrsvlm",
        "MFRSVLMProcessor": "processing_mfrsvlm",
    },
)

__version__ = "0.1.0"

__all__ = [
    "MFRSVLMConfig",
    "MFRSVLMForConditionalGeneration",
    "MFRSVLMImageProcessor",
    "MFRSVLMModel",
    "MFRSVLMPreTrainedModel",
    "MFRSVLMProcessor",
]
