"""The picture of a comparison: loss curves, and how the algorithms spread their weight."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

Records = list[dict[str, Any]]

INK, MUTED, GRID = "#22262b", "#6c7480", "#e6e8eb"
COLOURS = ("#2a78d6", "#e0662f", "#15966a", "#8457c9")
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.facecolor": "white",
}


def plot_comparison(metrics: dict[str, Records], file: Path) -> None:
    """Write the picture of the runs' training steps as PNG.

    Args:
        metrics: the records of `metrics.jsonl`, by algorithm.
        file: where.
    """
    mpl.use("Agg")
    runs = {
        algo: [record for record in records if record["stage"] == "train"]
        for algo, records in metrics.items()
    }
    with mpl.rc_context(STYLE):
        figure = plt.figure(figsize=(12, 6.6), layout="constrained")
        panels: Any = figure.subfigures(2, 1, height_ratios=(1.2, 1), hspace=0.04)
        top, bottom = panels
        _plot_losses(top.subplots(1, 2, width_ratios=(1.7, 1)), runs)
        weight_axes = bottom.subplots(1, len(runs), sharey=True, squeeze=False)[0]
        for axes, (algo, records) in zip(weight_axes, runs.items(), strict=True):
            _plot_weights(axes, algo, records)
        weight_axes[0].set_ylabel("mean share of the weight")
        bottom.legend(
            *weight_axes[0].get_legend_handles_labels(),
            loc="outside right center",
            frameon=False,
            labelcolor=INK,
        )
        figure.savefig(file, dpi=150)
        plt.close(figure)


def _plot_losses(axes: Any, runs: dict[str, Records]) -> None:
    curves, ends = axes
    for colour, (algo, records) in zip(COLOURS, runs.items(), strict=False):
        steps, losses = np.arange(1, len(records) + 1), _column(records, "loss")
        curves.plot(steps, losses, color=colour, alpha=0.18, linewidth=0.8)
        curves.plot(steps, _smooth(losses), color=colour, linewidth=2, label=algo)
        heads = _heads(records)
        last = max(1, len(records) // 10)
        means = [_column(records[-last:], f"ce_head_{k}").mean() for k in heads]
        ends.plot(heads, means, color=colour, linewidth=2, marker="o", markersize=6)
    curves.set_title("Training loss, each with its own weights")
    curves.set_xlabel("step")
    curves.set_ylabel("nats per token")
    curves.legend(frameon=False, labelcolor=INK)
    curves.margins(x=0.01)
    ends.set_title("Cross entropy by head, last tenth of the steps")
    ends.set_xticks(list(heads), [f"head {k}" for k in heads])
    ends.margins(x=0.12)


def _plot_weights(axes: Axes, algo: str, records: Records) -> None:
    heads = _heads(records)
    steps = np.arange(1, len(records) + 1)
    shades = mpl.colormaps["viridis"](np.linspace(0.1, 0.85, len(heads)))
    for k, shade in zip(heads, shades, strict=True):
        shares = _smooth(_column(records, f"weight_head_{k}"))
        axes.plot(steps, shares, color=shade, linewidth=2, label=f"head {k}")
    axes.axhline(
        1 / len(heads), color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=3, label="uniform"
    )
    axes.set_title(f"Weight per head, {algo}")
    axes.set_xlabel("step")
    axes.margins(x=0.01)


def _heads(records: Records) -> range:
    return range(sum(name.startswith("ce_head_") for name in records[0]))


def _column(records: Records, name: str) -> np.ndarray:
    return np.array([record[name] for record in records])


def _smooth(values: np.ndarray) -> np.ndarray:
    """A mean over about a tenth of the curve around each step, less of it at the ends."""
    window = np.hanning(max(1, len(values) // 10) + 2)[1:-1]
    total = np.convolve(values, window, mode="same")
    return total / np.convolve(np.ones_like(values), window, mode="same")
