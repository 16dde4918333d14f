"""Makes a new, untrained model from a trained language model and a trained vision tower.

    mfrsvlm assemble --language-model ID --vision-tower ID --output OUT [--projector FILE]

The injectors have random weights, and so has the projector if none is given. The output folder is written atomically.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import set_seed

from ..configuration_mfrsvlm import MFRSVLMConfig, efficient_windows
from ..convert_checkpoint import (
    NOTHING,
    add_image_token,
    exit_on_termination,
    load_model,
    make_image_processor,
    read_shard,
    refuse_missing,
    resolve_folder,
    run,
    save_folder,
    whole_output,
)
from ..model_card.card import write_model_card
from ..modeling_mfrsvlm import MFRSVLMForConditionalGeneration
from ..processing_mfrsvlm import MFRSVLMProcessor, make_chat_template
from ..released_layout import (
    ConversionError,
    explained,
    make_config,
    refuse_eva,
    rename,
    resolve_depths,
    resolve_window_sizes,
)
from .arguments import assemble_parser


# Parameters that may be missing in the parts. In a tower: the pooler, which is not used, and the norms after the stages of a
# backbone, which classifiers lack. With initial weights, the norms only normalize.
UNTRAINED = r"model\.(injectors|multi_modal_projector|stage_projections|visual_position_embedding|window_scorer)\."
UNTRAINED_TOWER = r"(.*\.)?(pooler|hidden_states_norms)\."


def assemble(
    language_model: str,
    vision_tower: str,
    output: Path,
    projector: Path | None = None,
    overrides: dict[str, Any] | None = None,
    efficient: bool = False,
    image_placement: str = "inline",
    dtype: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Makes a new model from trained parts. The injectors, and the projector if none is given, have random weights.

    Args:
        language_model: folder or Hub id of a causal language model with a list of layers.
        vision_tower: folder or Hub id of a ViT (CLIP, SigLIP, DINO, ...) or a hierarchical backbone (ResNet, Swin, ...).
        output: folder to write.
        projector: `mm_projector.bin` of LLaVA (the paper starts from Vicuna, CLIP and LLaVA's projector).
        overrides: fields of `MFRSVLMConfig`, for example `{"injection_type": "cross_attention"}`.
        image_placement: `"inline"` or `"prefix"`, see `MFRSVLMProcessor`.
        dtype: type of the weights; `None`: that of the language model.
        seed: seed of the random weights.
        overwrite: whether an existing model folder at `output` may be replaced.

    Raises:
        ConversionError: the parts do not fit together, one of them is incomplete, or the projector does not fit.
    """
    with explained(f"The config of language model {language_model} cannot be read"):
        text_config = AutoConfig.from_pretrained(language_model)
    with explained(f"The config of vision tower {vision_tower} cannot be read"):
        tower_config = AutoConfig.from_pretrained(vision_tower)
    refuse_eva(vision_tower, tower_config.to_dict())
    config = assembled_config(
        getattr(tower_config, "vision_config", tower_config), text_config, overrides or {}, dtype, efficient
    )
    with explained(f"{language_model} and {vision_tower} make no model"), torch.device("meta"):
        tower_class = type(MFRSVLMForConditionalGeneration(config).model.vision_tower)
    image_processor = make_image_processor(resolve_folder(vision_tower, []), config)
    with explained(f"The tokenizer of {language_model} cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(language_model)
    with whole_output(output, overwrite, [Path(language_model), Path(vision_tower)]) as folder:
        decoder = load_part(AutoModelForCausalLM, language_model, dtype=config.dtype)
        # Not AutoBackbone, which cannot load from a folder. Of a full CLIP or a classifier, only the tower is loaded.
        tower = load_part(tower_class, vision_tower, UNTRAINED_TOWER, dtype=config.dtype, config=config.vision_config)
        with explained(f"{language_model} has no decoder, or no head"):
            state = {f"model.language_model.{key}": value for key, value in decoder.get_decoder().state_dict().items()}
            state |= {f"lm_head.{key}": value for key, value in decoder.get_output_embeddings().state_dict().items()}
        state |= {f"model.vision_tower.{key}": value for key, value in tower.state_dict().items()}
        new = UNTRAINED
        if projector is not None:
            new = UNTRAINED.replace("multi_modal_projector|", "")
            for key, tensor in read_shard(projector).items():
                if "mm_projector." not in key:
                    raise ConversionError(f"{projector} contains {key}, which is not a tensor of a projector.")
                state |= rename(f"model.{key.removeprefix('model.')}", tensor.to(config.dtype))
        set_seed(seed)
        model = load_model(config, state, new)
        add_image_token(tokenizer, model)
        template = make_chat_template(tokenizer)
        processor = MFRSVLMProcessor(image_processor, tokenizer, chat_template=template, image_placement=image_placement)
        parts = {"language model": language_model, "vision tower": vision_tower}
        save_folder(folder, model, processor, decoder.generation_config)
        write_model_card(folder, model.config, origin="assembled", parts=parts)


def assembled_config(
    vision_config: Any, text_config: Any, options: dict[str, Any], dtype: str | None, efficient: bool = False
) -> MFRSVLMConfig:
    """The config of a new model. Fields that are not in `options` are derived from the sizes of the parts.

    Windows have the size of the global view and half of it, or are those of `efficient_windows`. Features are taken at one
    third, two thirds and all of a ViT's layers, or at the last three stages of a backbone. Injection is before layers 3, 7,
    11 and 15 (0-based), as far as the decoder has them, or before the last layer of a decoder with fewer than four layers.
    """
    fields = set(MFRSVLMConfig.__annotations__) - {"vision_config", "text_config", "image_token_id", "tie_word_embeddings"}
    unknown = sorted(set(options) - fields)
    if unknown:
        raise ConversionError(f"Fields {unknown} cannot be set; those that can are {sorted(fields)}.")
    with explained("These parts and options make no model"):
        side, patch_size = (getattr(vision_config, name, None) for name in ("image_size", "patch_size"))
        if not hasattr(vision_config, "depths") and isinstance(side, int) and isinstance(patch_size, int):
            # Some ViTs ignore pixels beyond the last full patch: SigLIP so400m uses 378 of 384.
            options = {"image_size": side - side % patch_size, **options}
        sizes: dict[str, Any] = {name: options[name] for name in ("image_size", "patch_size") if name in options}
        bare: dict[str, Any] = {"window_sizes": [], "injection_layers": [], "detail_feature_layers": []}
        probe = MFRSVLMConfig(vision_config=vision_config, text_config=text_config, **sizes, **bare)
        depth, num_layers = probe.num_vision_layers, text_config.num_hidden_layers
        if depth is None:  # a convolutional model, whose config does not say how many outputs it has
            if "detail_feature_layers" not in options:
                raise ValueError(
                    f"detail_feature_layers is missing: an encoder of type {vision_config.model_type!r} does not say which "
                    "of its hidden states to read the windows at."
                )
            depth = max(1, *options["detail_feature_layers"])
        stages = list(range(max(1, depth - 2), depth + 1))
        layers = [layer for layer in (3, 7, 11, 15) if layer < num_layers] or [num_layers - 1]
        windows = {"window_sizes": resolve_window_sizes([1.0, 0.5], probe.tokens_per_side, probe.patch_size)}
        if efficient:
            windows = efficient_windows(probe.image_size, probe.patch_size, options.get("canvas_scale", probe.canvas_scale))
        defaults = {
            **windows,
            "detail_feature_layers": stages if probe.is_hierarchical else resolve_depths([1 / 3, 2 / 3, 1.0], depth),
            "injection_layers": layers if options.get("window_sizes", True) else [],
        }
        return make_config(vision_config, text_config, dtype or text_config.dtype or "float32", **{**defaults, **options})


def load_part(model_class: Any, name: str, new: str = NOTHING, **kwargs: Any) -> Any:
    """Loads a trained part. Raises if tensors are missing, which `transformers` would initialize randomly."""
    with explained(f"{name} cannot be loaded"):
        part, info = model_class.from_pretrained(name, output_loading_info=True, **kwargs)
    refuse_missing(name, info["missing_keys"], new)
    return part


def main(argv: list[str] | None = None) -> int:
    return run(assemble, vars(assemble_parser().parse_args(argv)))


if __name__ == "__main__":
    exit_on_termination()
    sys.exit(main())
