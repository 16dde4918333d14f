"""Fills the Hub card template for a model folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download, metadata_load


TEMPLATE = Path(__file__).with_name("template.md")
LICENSE_FIELDS = ("license", "license_name", "license_link")


def read_part(part: str | Path) -> dict[str, Any]:
    """What the card of a part says, `{}` where there is none to read.

    Args:
        part: folder (its `README.md`) or Hub id of a model.

    Returns:
        `base_model`: the ids to name as a base: the part's own, or those that the card of a folder names; and the fields of
        its license as far as the card states them.
    """
    is_folder = Path(part).is_dir()
    try:
        card = metadata_load(Path(part) / "README.md" if is_folder else hf_hub_download(str(part), "README.md")) or {}
    except Exception:  # no card, no connection, damaged YAML: no reason for a folder to have no card of its own
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
        folder: the Hub folder.
        config: its `MFRSVLMConfig`, from which the architecture table is filled.
        origin: how the weights came to be: `"converted"`, `"assembled"` or `"trained"`.
        name: heading of the card; "MF-RSVLM" if `None`.
        evidence: Markdown on what the weights were trained on and how well they do, for the top of the card.
        parts: what the weights were made from: a name for each, and its folder or Hub id. Base models and license come from
            their cards. The license is left out unless all of them state the same one; the card lists them all.
        **details: further fields of `ModelCardData` (`datasets`, `license`, `eval_results`, ...); they win over the parts'.
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
    card.save(folder / "README.md")
