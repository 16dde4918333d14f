"""MF-RSVLM: a vision-language model for remote sensing imagery (FUSE-RSVLM, arXiv 2512.24022)."""

from .configuration_mfrsvlm import MFRSVLMConfig
from .image_processing_mfrsvlm import MFRSVLMImageProcessor
from .modeling_mfrsvlm import MFRSVLMForConditionalGeneration, MFRSVLMModel, MFRSVLMPreTrainedModel
from .processing_mfrsvlm import MFRSVLMProcessor


# Saving any of these writes their code beside it, so that a derived checkpoint loads with `trust_remote_code=True`. (Not
# the same as registering with the Auto classes, which would make an installed package win over the code on the Hub.)
MFRSVLMConfig.register_for_auto_class()
MFRSVLMModel.register_for_auto_class("AutoModel")
MFRSVLMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
MFRSVLMImageProcessor.register_for_auto_class("AutoImageProcessor")
MFRSVLMProcessor.register_for_auto_class("AutoProcessor")

__version__ = "0.1.0"

__all__ = [
    "MFRSVLMConfig",
    "MFRSVLMForConditionalGeneration",
    "MFRSVLMImageProcessor",
    "MFRSVLMModel",
    "MFRSVLMPreTrainedModel",
    "MFRSVLMProcessor",
]
