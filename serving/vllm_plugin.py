"""The plugin of vLLM: registers the model, and refuses what vLLM would not answer as `generate` does.

vLLM loads it in each of its processes, also for other models. So the model is imported only where it is needed.
"""

from typing import Any

from ..configuration_mfrsvlm import MFRSVLMConfig


ARCHITECTURE = "MFRSVLMForConditionalGeneration"


def register() -> None:
    """The entry point. Config, processor and model are those of this package, so no code of a model folder runs."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from ..image_processing_mfrsvlm import MFRSVLMImageProcessor
    from ..modeling_mfrsvlm import MFRSVLMModel
    from ..processing_mfrsvlm import MFRSVLMProcessor

    AutoConfig.register(MFRSVLMConfig.model_type, MFRSVLMConfig, exist_ok=True)
    AutoModel.register(MFRSVLMConfig, MFRSVLMModel, exist_ok=True)
    AutoImageProcessor.register(MFRSVLMConfig, MFRSVLMImageProcessor, exist_ok=True)
    AutoProcessor.register(MFRSVLMConfig, MFRSVLMProcessor, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, f"{__package__}.vllm_model:MFRSVLMForVLLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = Checks


class Checks:
    """vLLM calls these before it loads a model of `ARCHITECTURE`."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        from ..processing_mfrsvlm import MFRSVLMProcessor

        settings, _ = MFRSVLMProcessor.get_processor_dict(model_config.model, revision=model_config.revision)
        check_model(model_config.hf_config, settings.get("image_placement", "inline"))

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        check_engine(vllm_config)
        if vllm_config.compilation_config.cudagraph_mode is None:
            from vllm.config import CUDAGraphMode

            vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE


def check_model(config: MFRSVLMConfig, image_placement: str) -> None:
    """Raises `ValueError` for a model whose images vLLM cannot place, cache, or prefill in pieces."""
    advice = "Use generate() or `mfrsvlm serve`."
    if image_placement != "inline":
        raise ValueError(
            f"image_placement={image_placement!r}: vLLM puts visual tokens where the prompt has <image>. {advice}"
        )
    if config.has_details and config.injection_type != "gated":
        raise ValueError(f"injection_type={config.injection_type!r}: vLLM has no cache for detail tokens. {advice}")
    if config.has_details and config.routing != "token":
        raise ValueError(
            f"routing={config.routing!r} weighs the details of a whole image, but vLLM prefills images in pieces. {advice}"
        )


def check_engine(vllm_config: Any) -> None:
    """Raises `ValueError` for settings of vLLM under which details would be lost."""
    parallel, compilation = vllm_config.parallel_config, vllm_config.compilation_config
    if parallel.pipeline_parallel_size > 1:
        raise ValueError(
            f"pipeline_parallel_size={parallel.pipeline_parallel_size}: details do not travel between stages. Use "
            "tensor_parallel_size."
        )
    if parallel.use_ubatching or parallel.prefill_context_parallel_size > 1:
        raise ValueError(
            f"enable_dbo={parallel.enable_dbo}, ubatch_size={parallel.ubatch_size}, prefill_context_parallel_size="
            f"{parallel.prefill_context_parallel_size}: the tokens of a step are split, but not their details. Leave it out."
        )
    if vllm_config.lora_config is not None:
        raise ValueError(
            "enable_lora=True: adapters of this model also hold injectors, which vLLM does not load. Merge the adapter."
        )
    speculation = vllm_config.speculative_config
    if speculation is not None and speculation.method != "ngram":
        raise ValueError(
            f"speculative_config: method={speculation.method!r} is not supported. Use 'ngram', or leave it out."
        )
    if compilation.mode is not None and compilation.mode.name == "STOCK_TORCH_COMPILE":
        raise ValueError(
            f"compilation_config: mode={compilation.mode.name} compiles the choice whether details are injected. Use "
            "VLLM_COMPILE or NONE."
        )
    if compilation.cudagraph_mode is not None and compilation.cudagraph_mode.has_full_cudagraphs():
        raise ValueError(
            f"compilation_config: cudagraph_mode={compilation.cudagraph_mode.name} records the whole model, without "
            "details. Use PIECEWISE or NONE."
        )
