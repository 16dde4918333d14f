"""Plots of the tables of a report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files.writing import write_figure
from .pictures import file_name, read_predictions, safe_name
from .report import ReportError, Summary, Table


def plot_shares(tables: Sequence[Table]) -> Any:
    """Plots the shares of one benchmark, split and protocol with their intervals.

    Each task has a panel, each figure a line and each model a color. Filled markers are results on the full split, hollow
    markers are blind and incomplete runs, and gray markers are the majority baseline. Other figures than shares, and
    published results, which have no intervals, are only in the tables.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ReportError: matplotlib is not installed.
    """
    matplotlib, Figure = import_matplotlib()
    models = list(dict.fromkeys(name for table in tables for name, _ in table.runs))
    palette = matplotlib.colormaps["tab10"] if len(models) <= 10 else matplotlib.colormaps["turbo"].resampled(len(models))
    heights = [len(table.shares) * (0.16 * len(table.runs) + 0.14) for table in tables]
    size = (8, sum(heights) + 0.4 * len(tables) + 0.2 * max(len(table.runs) for table in tables) + 1)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = figure.subplots(len(tables), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    markers = {}
    for axis, table in zip(axes, tables, strict=True):
        shares = table.shares
        for run, (name, summary) in enumerate(table.runs):
            color = "#888888" if summary.mode == "majority" else palette(models.index(name))
            cells = summary.results[table.task]
            lines = [(i, cells[share]) for i, share in enumerate(shares) if share in cells]
            places = [i + 0.8 * ((run + 0.5) / len(table.runs) - 0.5) for i, _ in lines]
            # No error bars, since the interval of a biased figure need not contain its value.
            axis.hlines(places, [100 * cell.low for _, cell in lines], [100 * cell.high for _, cell in lines], color=color)
            label = summary.mode_in_words if summary.mode == "majority" else f"{name} ({summary.mode_in_words})"
            markers[label] = axis.scatter(
                [100 * cell.value for _, cell in lines],
                places,
                s=28,
                marker={"image": "o", "blind": "D", "majority": "s"}[summary.mode],
                facecolor=color if summary.is_complete else "white",
                edgecolor=color,
                zorder=3,
            )
        axis.set(yticks=range(len(shares)), yticklabels=list(map(str, shares)), ylim=(len(shares) - 0.5, -0.5))
        axis.set_title(table.task, loc="left", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    axes[-1].set(xlim=(-2, 102), xlabel="per cent, with 95 % intervals")
    figure.suptitle(f"{tables[0].benchmark}, {tables[0].split}, protocol {tables[0].protocol}", fontsize=11)
    figure.legend(markers.values(), markers.keys(), loc="outside lower center", fontsize=9)
    return figure


def plot_reliability(probabilities: Sequence[float], truths: Sequence[bool], title: str, bins: int = 10) -> Any:
    """A reliability diagram: the share of "yes" among questions, by the probability that the model gave to "yes".

    A calibrated model lies on the diagonal. The bins are those of the metric `yes_no_calibration`. A bar is the 95 %
    interval of Wilson. The lower panel has the number of questions in each bin.

    Args:
        probabilities: of "yes", 0 to 1.
        truths: whether the true answer is "yes".
        title: of the plot.
        bins: number of bins of equal width.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ReportError: matplotlib is not installed.
    """
    _, Figure = import_matplotlib()
    rows = reliability(probabilities, truths, bins)
    figure = Figure(figsize=(4.4, 5.2), layout="constrained", facecolor="white")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(4, 1))
    upper.plot((0, 1), (0, 1), color="#999999", linestyle=":")
    for mean, share, low, high, count in rows:
        upper.vlines(mean, low, high, color="#1f5f8b")
        upper.scatter(mean, share, s=14 + 60 * count / len(probabilities), color="#1f5f8b", zorder=3)
        lower.bar(mean, count, width=0.6 / bins, color="#1f5f8b")
    upper.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel='share of "yes"')
    upper.set_title(title, fontsize=9)
    lower.set(xlabel='probability of "yes"', ylabel="questions", yscale="log")
    return figure


def reliability(
    probabilities: Sequence[float], truths: Sequence[bool], bins: int = 10
) -> list[tuple[float, float, float, float, int]]:
    """Mean probability, share of "yes", its interval (low, high) and number of questions of each bin that has any."""
    members: dict[int, list[int]] = {}
    for index, probability in enumerate(probabilities):
        members.setdefault(min(int(probability * bins), bins - 1), []).append(index)
    rows = []
    for _, indices in sorted(members.items()):
        count = len(indices)
        share = sum(truths[index] for index in indices) / count
        rows.append((sum(probabilities[index] for index in indices) / count, share, *wilson(share, count), count))
    return rows


def wilson(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of Wilson for a share of `count` observations."""
    center = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return max(0.0, center - half), min(1.0, center + half)


def import_matplotlib() -> tuple[Any, Any]:
    """The module, and its class `Figure`."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ReportError(f"Plots need matplotlib ({error}): pip install matplotlib, or use --no-plots.") from error
    return matplotlib, Figure


def write_reliability(summaries: Sequence[Summary], output: Path) -> None:
    """Writes `calibration-BENCHMARK-SPLIT-PROTOCOL-MODEL.png` for each run with probabilities of "yes"."""
    for summary in summaries:
        if summary.mode != "image" or "calibration" not in summary.results:
            continue
        asked = [row for row in read_predictions(summary.folder) if row.get("yes_probability") is not None]
        truths = [row["references"][0].lower() == "yes" for row in asked]
        title = f"{summary.model}: {summary.benchmark}, {summary.split}, protocol {summary.protocol}"
        figure = plot_reliability([row["yes_probability"] for row in asked], truths, title)
        write_figure(output / f"calibration-{file_name(summary)}.png", figure, dpi=110)


def write_plots(tables: Sequence[Table], output: Path) -> None:
    """Writes `plot-BENCHMARK-SPLIT-PROTOCOL.png` for each benchmark, split and protocol that has shares."""
    plots: dict[str, list[Table]] = {}
    for table in tables:
        if table.shares:
            plots.setdefault(f"{table.benchmark}-{table.split}-{table.protocol}", []).append(table)
    for name, members in plots.items():
        write_figure(output / f"plot-{safe_name(name)}.png", plot_shares(members), dpi=110)
