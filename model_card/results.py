"""Writes evaluation results into the model card of a model folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from ..files.writing import write_file


class CardError(ValueError):
    """Results that cannot be written into a card. The message names them and the reason."""


def update_card(folder: str | Path, summaries: Sequence[Any], model: str | None = None) -> list[EvalResult]:
    """Writes the results of a model's runs on images into the `model-index` of its README.md.

    Runs of other models, blind runs, the majority baseline and values by group are skipped. Results of the same benchmark,
    split and protocol are replaced. Results of other weights are removed; results without a fingerprint are kept. The text
    below the front matter does not change.

    Args:
        folder: the model folder.
        summaries: what `mfrsvlm.evaluation.report.read_summaries` returns.
        model: name of the model in the summaries, and in a card that has none yet. `None`: the name of the folder. It
            also matches names with an organization, such as "organization/folder".

    Returns:
        The results that were written.

    Raises:
        CardError: no card, no run of the model, a run on a part of a split, or runs with different weights. The card is not
            changed.
        OSError: the card cannot be written.
    """
    path = Path(folder) / "README.md"
    if not path.is_file():
        raise CardError(f"{folder} has no README.md. Name a model folder, or write its card with `write_model_card`.")
    own = Path(folder).resolve().name
    on_images = [summary for summary in summaries if summary.mode == "image"]
    chosen = [s for s in on_images if (s.model == model if model else s.model.split("/")[-1] == own)]
    if not chosen:
        names = ", ".join(sorted({summary.model for summary in on_images})) or "no model"
        raise CardError(f"There is no run of {model or own} with images, but of {names}. Pass the name of the model.")
    for summary in chosen:
        if not summary.is_complete:
            raise CardError(f"A card takes only results on full splits. Leave out this run, or complete it: {summary}")
    if len({(summary.model, summary.weights) for summary in chosen}) > 1:
        runs = "; ".join(f"{summary}, weights {summary.weights}" for summary in chosen)
        raise CardError(f"A card takes only results of one model with the same weights. Leave out some of: {runs}")

    written = [result for summary in chosen for result in card_results(summary)]
    replaced = {result.unique_identifier for result in written}
    card = ModelCard.load(path)
    current = [result for result in card.data.eval_results or [] if weights_of(result) in (None, chosen[0].weights)]
    kept = [result for result in current if result.unique_identifier not in replaced]
    card.data.model_name = card.data.model_name or model or own
    card.data.eval_results = kept + written
    write_file(path, str(card))
    return written


def weights_of(result: EvalResult) -> str | None:
    """The fingerprint of the weights of a result, if it has one."""
    return (result.metric_args or {}).get("weights")


def card_results(summary: Any) -> list[EvalResult]:
    """The figures of a summary as entries of a `model-index`.

    The protocol is written as the configuration of the data set. The Hub merges results with the same task type, data set,
    split and configuration. Results of two protocols must not be merged.
    """
    return [
        EvalResult(
            task_type="image-text-to-text",  # of all tasks; `metric_name` names the task
            task_name="Image-Text-to-Text",
            dataset_type=summary.benchmark,
            dataset_name=f"{summary.benchmark}, protocol {summary.protocol}",
            dataset_config=summary.protocol,
            dataset_split=summary.split,
            metric_type=column.figure,
            metric_name=f"{task} {column.figure}{' of incomplete weights' if summary.incomplete else ''}".replace("_", " "),
            metric_value=cell.value,
            metric_args={"low": cell.low, "high": cell.high, "confidence": 0.95, "n": cell.n}
            | ({"weights": summary.weights} if summary.weights else {})
            | ({"incomplete": " ".join(summary.incomplete)} if summary.incomplete else {}),
        )
        for task, cells in summary.results.items()
        for column, cell in cells.items()
        if not column.group
    ]
