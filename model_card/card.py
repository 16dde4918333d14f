"""Writes the model card of a model folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download, metadata_load

from ..files.writing import write_file


TEMPLATE = Path(__file__).with_name("template.md")
LICENSE_FIELDS = ("license", "license_name", "license_link")


def read_part(part: str | Path) -> dict[str, Any]:
    """Base models and license of a part, from its model card.

    Args:
        part: folder with a `README.md`, or Hub id of a model.

    Returns:
        `base_model`: for a Hub id, the id itself; for a folder, the base models that its card names, `[]` without a card.
        Also the license fields that the card has.
    """
    is_folder = Path(part).is_dir()
    try:
        card = metadata_load(Path(part) / "README.md" if is_folder else hf_hub_download(str(part), "README.md")) or {}
    except Exception:  # no card, no connection or damaged YAML must not prevent the new card
        card = {}
    bases = card.get("base_model") or [] if is_folder else [str(part)]
    return {
        "base_model": [bases] if isinstance(bases, str) else bases,
        **{field: card[field] for field in LICENSE_FIELDS if card.get(field)},
    }


def write_model_card(
    folder: Path,
    config: Any,
    origin: str,
    name: str | None = None,
    evidence: str | None = None,
    parts: Mapping[str, str | Path] | None = None,
    **details: Any,
) -> None:
    """Writes `README.md` into a model folder.

    Args:
        folder: the model folder.
        config: its `MFRSVLMConfig`, for the architecture table.
        origin: origin of the weights: `"converted"`, `"assembled"` or `"trained"`.
        name: heading of the card; "MF-RSVLM" if `None`.
        evidence: Markdown about training data and results, for the top of the card.
        parts: names of the base models, each with its folder or Hub id. Base models and license are read from their cards.
            The metadata have a license only if all parts have the same one. The table of the card lists all licenses.
        **details: further fields of `ModelCardData` (`datasets`, `license`, `eval_results`, ...). They override those of
            the parts.
    """
    facts = {part: read_part(source) for part, source in (parts or {}).items() if source}
    licenses = [{field: fact[field] for field in LICENSE_FIELDS if field in fact} for fact in facts.values()]
    if licenses and "license" in licenses[0] and all(terms == licenses[0] for terms in licenses):
        details = {**licenses[0], **details}
    bases = list(dict.fromkeys(base for fact in facts.values() for base in fact["base_model"]))
    if details.get("base_model") is None:
        details["base_model"] = bases[0] if len(bases) == 1 else bases or None
    data = ModelCardData(
        language="en",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["remote-sensing", "mfrsvlm", "custom_code"],
        **details,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        config=config,
        origin=origin,
        name=name or "MF-RSVLM",
        evidence=evidence,
        parts=facts,
    )
    write_file(folder / "README.md", str(card))
