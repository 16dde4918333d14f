"""The tables of the look inside, as Markdown."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...files.writing import write_file


def write_table(result: dict[str, Any], path: Path) -> None:
    """Attention mass, what probes read, and router weights, layer by layer; brackets are 95 % intervals over scenes."""
    layers = len(result["with"]["attention"]["first"]["mean"])
    injected = ", ".join(map(str, result["with"]["injection_layers"]))
    scenes = result["scenes"]
    lines = [
        f"{scenes['test']} test scenes, {scenes['validation (probes)']} validation scenes to fit the probes. Injection is "
        f"before decoder layers {injected} (0-based). Brackets are 95 % intervals over scenes.",
        "",
        "Attention mass on visual tokens, by decoder layer. A position that attends to everything alike has "
        f"{_cell(result['with']['attention']['uniform'])}.",
        "",
        *_head("position, model", range(layers)),
    ]
    for name, title in (("first", "first token of the answer"), ("answer", "all tokens of the answer")):
        lines += _rows(result, "attention", name, title)
    lines += ["", "R² of linear probes, by hidden state (0 enters the first layer; the last is normalized).", ""]
    lines += _head("probe, model", range(layers + 1))
    objects = result["columns of count and presence_auc"]
    for column, title in (("all", "objects in the cell of a token"), ("small", "small objects in the cell of a token")):
        lines += _rows(result, "visual_tokens", "count", title, objects.index(column))
    lines += _rows(result, "last_prompt_position", "asked_count", "number that the question asks for")
    kinds = result["columns of any_count"]
    for column, kind in enumerate(kinds):
        lines += _rows(result, "last_prompt_position", "any_count", f"number of each {kind}, asked for or not", column)
    lines += ["", "Area under the ROC curve of linear probes for the presence of an object in the cell of a token.", ""]
    lines += _head("objects, model", range(layers + 1))
    for column, kind in enumerate(objects):
        for name in ("with", "without"):
            values = [row[column] for row in result[name]["visual_tokens"]["presence_auc"]]
            lines.append(f"| {kind}, {name} injection | " + " | ".join(map(_number, values)) + " |")
    lines += [
        "",
        "Attention mass when the answer begins, by task and decoder layer.",
        "",
        *_head("task, model", range(layers)),
    ]
    for task, values in result["with"]["attention"]["by_task"].items():
        for name in ("with", "without"):
            values = result[name]["attention"]["by_task"][task]
            lines.append(f"| {task}, {name} injection | " + " | ".join(map(_number, values)) + " |")
    if result["routing"] is not None:
        lines += ["", *_routing(result["routing"])]
    write_file(path, "\n".join(lines) + "\n")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _cell(numbers: dict[str, Any], *index: int) -> str:
    mean, low, high = (numbers[name] for name in ("mean", "low", "high"))
    for each in index:
        mean, low, high = mean[each], low[each], high[each]
    return f"{_number(mean)} [{_number(low)}, {_number(high)}]"


def _head(title: str, columns: Sequence[int] | range) -> list[str]:
    return [f"| {title} | " + " | ".join(map(str, columns)) + " |", "|---" * (len(columns) + 1) + "|"]


def _rows(result: dict[str, Any], group: str, name: str, title: str, column: int | None = None) -> list[str]:
    """A row with injection, one without, and one of the difference, question by question."""
    places = () if column is None else (column,)
    sources = {
        "with injection": result["with"][group][name],
        "without": result["without"][group][name],
        "difference": result["with minus without"][f"{group}: {name}"],
    }
    return [
        f"| {title}, {label} | " + " | ".join(_cell(numbers, layer, *places) for layer in range(len(numbers["mean"]))) + " |"
        for label, numbers in sources.items()
    ]


def _routing(routing: dict[str, Any]) -> list[str]:
    """Shares of the weight by window size, depth and phase, for scenes of small and of large objects."""
    sizes = [f"windows of {size} px" for size in routing["window_sizes"]]
    depths = [f"depth {depth}" for depth in routing["detail_feature_layers"]]
    factor = len(routing["layers"][0]["small"]["by_phase"])
    phases = [f"phase {row},{column}" for row in range(factor) for column in range(factor)]
    low, high = ("{:g} to {:g}".format(*routing["object_pixels"][name]) for name in ("small", "large"))
    lines = [
        f"Router weights in per cent, for scenes of small ({low} px) and of large objects ({high} px). Entropies are "
        "relative to uniform weights, of each choice and of the mean. *Moved* is the share of weight that moves from small "
        "to large objects; *by chance* is its 95 % quantile for scenes grouped at random.",
        "",
    ]
    columns = ["before layer", "objects", *sizes, *depths, *phases, "entropy", "entropy of the mean", "moved", "by chance"]
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for number, layer in zip(routing["injection_layers"], routing["layers"], strict=True):
        for group in ("small", "large"):
            shares = layer[group]
            weights = [*shares["by_scale"], *shares["by_depth"], *(share for row in shares["by_phase"] for share in row)]
            cells = [f"{100 * weight:.1f}" for weight in weights] + [_number(shares["entropy"])]
            cells.append(_number(shares["entropy_of_mean"]))
            shift = layer["small_to_large"]
            cells += [f"{100 * shift['distance']:.2f}", f"{100 * shift['by_chance']:.2f}"] if group == "large" else ["", ""]
            lines.append(f"| {number} | {group} | " + " | ".join(cells) + " |")
    return lines
