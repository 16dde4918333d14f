"""The figure of the look inside."""

from pathlib import Path
from typing import Any

import numpy as np

from ...files.writing import write_figure


def plot(result: dict[str, Any], path: Path) -> None:
    """Three panels: attention mass, probes, and routing of small- and large-object scenes."""
    # Only the figure needs it, not the numbers.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colors = {"with": "#0b6e99", "without": "#c8553d"}
    figure, (attention, probes, routing) = plt.subplots(1, 3, figsize=(12, 4.6), dpi=100, width_ratios=[1, 1, 1.15])

    def line(axes: Any, numbers: dict[str, Any], column: int | None, label: str, **style: Any) -> None:
        rows = {name: np.array(numbers[name], dtype=np.float64) for name in ("mean", "low", "high")}
        if column is not None:
            rows = {name: values[:, column] for name, values in rows.items()}
        layers = np.arange(len(rows["mean"]))
        axes.plot(layers, rows["mean"], label=label, marker="o", markersize=4, **style)
        axes.fill_between(layers, rows["low"], rows["high"], color=style["color"], alpha=0.15, linewidth=0)

    for name, color in colors.items():
        measured = result[name]
        line(attention, measured["attention"]["first"], None, f"{name} injection", color=color)
        everything = result["columns of count and presence_auc"].index("all")
        line(probes, measured["visual_tokens"]["count"], everything, f"visual token, {name}", color=color)
        asked = measured["last_prompt_position"]["asked_count"]
        line(probes, asked, None, f"last prompt token, {name}", color=color, linestyle="--")
    uniform = result["with"]["attention"]["uniform"]["mean"]
    attention.axhline(uniform, color="gray", linewidth=1, linestyle=":", label="all positions alike")
    injected = result["with"]["injection_layers"]
    attention.plot(injected, [0] * len(injected), "^", color=colors["with"], clip_on=False, label="injected before")
    attention.set(title="Attention mass on visual tokens\nwhen the answer begins", xlabel="decoder layer", ylabel="mass")
    attention.set_ylim(bottom=0)

    probes.axhline(0, color="gray", linewidth=1, linestyle=":")
    # A probe that overfits may fall far below zero, which says no more than zero does.
    bottom, top = probes.get_ylim()
    probes.set_ylim(max(bottom, -0.25), max(top, 0.1))
    probes.set(
        title="What a linear probe reads\n(objects in the cell; number asked for)", xlabel="hidden state", ylabel="R²"
    )

    if result["routing"] is None:
        routing.axis("off")
        routing.text(0.5, 0.5, "no routers", ha="center", va="center")
    else:
        plot_routing(routing, result["routing"], plt.get_cmap("viridis"))
    for axes in (attention, probes):
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in (attention, probes, routing):
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    figure.tight_layout()
    write_figure(path, figure)
    plt.close(figure)


def plot_routing(axes: Any, routing: dict[str, Any], color_map: Any) -> None:
    """A bar of small- and one of large-object scenes for every injection layer, cut into scales and depths."""
    sizes, depths = routing["window_sizes"], routing["detail_feature_layers"]
    parts = [(s, d) for s in range(len(sizes)) for d in range(len(depths))]
    for index, layer in enumerate(routing["layers"]):
        for shift, group in ((-0.21, "small"), (0.21, "large")):
            shares = layer[group]["by_scale_and_depth"]
            bottom = 0.0
            for number, (s, d) in enumerate(parts):
                label = f"window {sizes[s]}, depth {depths[d]}" if index == 0 and group == "small" else None
                color = color_map(0.15 + 0.75 * number / max(len(parts) - 1, 1))
                axes.bar(index + shift, shares[s][d], 0.38, bottom, color=color, label=label)
                bottom += shares[s][d]
            axes.text(index + shift, 1.01, f"{layer[group]['entropy']:.2f}", ha="center", va="bottom", fontsize=8)
            axes.text(index + shift, 0.01, group, ha="center", va="bottom", fontsize=8, rotation=90, color="white")
    axes.set_xticks(range(len(routing["layers"])), [str(layer) for layer in routing["injection_layers"]])
    axes.set_ylim(0, 1.08)
    axes.set(title="Router weights, small and large objects\n(above: entropy, 1 = uniform)", xlabel="injection before layer")
    axes.set_ylabel("share")
