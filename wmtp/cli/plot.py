"""The picture of a comparison: what all are measured by, and how they spread their weight."""

import itertools
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

Records = list[dict[str, Any]]

INK, MUTED, GRID = "#22262b", "#6c7480", "#e6e8eb"
COLOURS = ("#2a78d6", "#e0662f", "#15966a", "#8457c9", "#b0893a", "#5b6b7f")
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


def plot_comparison(runs: dict[str, Records], results: dict[str, Any], file: Path) -> None:
    """Write the picture of the runs' training steps as PNG.

    Args:
        runs: the records of `metrics.jsonl`, by algorithm.
        results: what the runs came to, of plain next-token training too where there was one.
        file: where.
    """
    mpl.use("Agg")
    trained = {
        algo: [record for record in records if record["stage"] == "train"]
        for algo, records in runs.items()
    }
    weighted = {algo: records for algo, records in trained.items() if not _is_uniform(records)}
    with mpl.rc_context(STYLE):
        figure = plt.figure(figsize=(12, 6.6 if weighted else 3.8), layout="constrained")
        heights = (1.2, 1) if weighted else (1,)
        panels: Any = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)
        curves, ends = panels[0, 0].subplots(1, 2, width_ratios=(1.7, 1))
        _plot_curves(curves, trained, results)
        _plot_ends(ends, results)
        if weighted:
            _plot_all_weights(panels[1, 0], weighted)
        figure.savefig(file, dpi=150)
        plt.close(figure)


def _is_uniform(records: Records) -> bool:
    """Whether each head's share is the same at every step: a picture of it says nothing."""
    return all(np.ptp(_column(records, f"weight_head_{k}")) == 0 for k in _heads(records))


def _plot_curves(axes: Axes, runs: dict[str, Records], results: dict[str, Any]) -> None:
    for colour, (algo, records) in zip(itertools.cycle(COLOURS), runs.items(), strict=False):
        steps = np.arange(1, len(records) + 1)
        means = np.mean([_column(records, f"ce_head_{k}") for k in _heads(records)], axis=0)
        axes.plot(steps, means, color=colour, alpha=0.18, linewidth=0.8)
        axes.plot(steps, _smooth(means), color=colour, linewidth=2, label=algo)
        validated = _validation(records, results[algo])
        axes.plot(
            list(validated),
            list(validated.values()),
            color=colour,
            linewidth=1,
            linestyle=(0, (4, 3)),
            marker="o",
            markersize=5,
            markerfacecolor="white",
        )
    axes.plot([], [], color=MUTED, linestyle=(0, (4, 3)), marker="o", label="validation")
    axes.set_title("Cross entropy, unweighted mean of the heads")
    axes.set_xlabel("step (lines: training, a mean over about a tenth of the steps)")
    axes.set_ylabel("nats per token")
    axes.legend(frameon=False, labelcolor=INK)
    axes.margins(x=0.01)


def _validation(records: Records, result: dict[str, Any]) -> dict[int, float]:
    """The mean of the heads on the validation text, by step."""
    within = {
        step: record["validation"]
        for step, record in enumerate(records, start=1)
        if "validation" in record
    }
    every = {0: result["start"], **within, len(records): result["end"]}
    return {step: float(np.mean(found["ce_per_head"])) for step, found in every.items()}


def _plot_ends(axes: Axes, results: dict[str, Any]) -> None:
    for colour, (algo, result) in zip(itertools.cycle(COLOURS), results.items(), strict=False):
        of_heads = result["end"]["ce_per_head"]
        heads = range(len(of_heads))
        axes.plot(heads, of_heads, color=colour, linewidth=2, marker="o", markersize=6, label=algo)
    most = max(len(result["end"]["ce_per_head"]) for result in results.values())
    axes.set_title("Validation cross entropy at the end")
    axes.set_xticks(range(most), [f"head {k}" for k in range(most)])
    axes.legend(frameon=False, labelcolor=INK)
    axes.margins(x=0.12)


def _plot_all_weights(panel: Any, runs: dict[str, Records]) -> None:
    every = panel.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for axes, (algo, records) in zip(every, runs.items(), strict=True):
        _plot_weights(axes, algo, records)
    every[0].set_ylabel("mean share of the weight")
    panel.legend(
        *every[0].get_legend_handles_labels(),
        loc="outside right center",
        frameon=False,
        labelcolor=INK,
    )


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
    axes.set_title(f"Weight per head, {algo}, smoothed alike")
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
