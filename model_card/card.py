"""Fills the Hub card template for a model folder."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData


TEMPLATE = Path(__file__).with_name("template.md")


def write_model_card(
    folder: Path, config: Any, origin: str, name: str | None = None, evidence: str | None = None, **details: Any
) -> None:
    """Writes `README.md` into a model folder.

    Args:
        folder: the Hub folder.
        config: its `MFRSVLMConfig`, from which the architecture table is filled.
        origin: how the weights came to be: `"converted"`, `"assembled"` or `"trained"`.
        name: heading of the card; "MF-RSVLM" if `None`.
        evidence: Markdown on what the weights were trained on and how well they do, for the top of the card.
        **details: further fields of `ModelCardData` (`datasets`, `base_model`, `eval_results`, ...).
    """
    data = ModelCardData(
        language="en",
        license=details.pop("license", "apache-2.0"),
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["remote-sensing", "mfrsvlm", "custom_code"],
        **details,
    )
    card = ModelCard.from_template(
        data, template_path=str(TEMPLATE), config=config, origin=origin, name=name or "MF-RSVLM", evidence=evidence
    )
    card.save(folder / "README.md")
