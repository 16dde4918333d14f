"""Plots of the tables of a report."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files.writing import write_figure
from .report import ReportError, Table


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
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ReportError(f"Plots need matplotlib ({error}): pip install matplotlib, or use --no-plots.") from error

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


def write_plots(tables: Sequence[Table], output: Path) -> None:
    """Writes `plot-BENCHMARK-SPLIT-PROTOCOL.png` for each benchmark, split and protocol that has shares."""
    plots: dict[str, list[Table]] = {}
    for table in tables:
        if table.shares:
            plots.setdefault(f"{table.benchmark}-{table.split}-{table.protocol}", []).append(table)
    for name, members in plots.items():
        path = output / f"plot-{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}.png"
        write_figure(path, plot_shares(members), dpi=110)
