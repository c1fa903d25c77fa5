"""The pictures: milliseconds per provider against the copy of the logits; peak bytes over V."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

from wmtp.benchmarks.problem import Case
from wmtp.benchmarks.providers import PROVIDERS
from wmtp.benchmarks.report import cases_by_key, spread

Medians = dict[Case, tuple[float, float, float]]
INK, MUTED, GRID = "#22262b", "#6c7480", "#e6e8eb"
COLOURS = ("#c3c9d0", MUTED, "#e0a23c", "#8457c9", "#2a78d6", "#15966a")
STYLE: dict[Any, Any] = {
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "figure.facecolor": "white",
}
GROUP = 0.84  # the width of a group of bars


def plot_loss(results: dict[str, Any], file: Path) -> None:
    """Write loss + gradient as PNG: a panel for each dtype, a group of bars for each shape.

    Args:
        results: of `report.gather`, of the suite "loss".
        file: where.
    """
    mpl.use("Agg")
    medians = {
        case: spread(row["median_ms"])
        for case, row in cases_by_key(results).items()
        if case.study == "loss" and case.direction != "forward"
    }
    dtypes = list(dict.fromkeys(case.dtype for case in medians))
    groups = len({case.shape for case in medians})
    size = (4 + 1.2 * groups, 3.6 * len(dtypes))
    with mpl.rc_context(STYLE):
        figure, panels = plt.subplots(
            len(dtypes), figsize=size, layout="constrained", squeeze=False
        )
        for axes, dtype in zip(panels.flat, dtypes, strict=True):
            _plot_panel(axes, {case: ms for case, ms in medians.items() if case.dtype == dtype})
            axes.set_title(f"Loss and gradient, {dtype}")
        figure.legend(
            *panels.flat[0].get_legend_handles_labels(), loc="outside right upper", frameon=False
        )
        figure.savefig(file, dpi=150)
        plt.close(figure)


def plot_profile(results: dict[str, Any], file: Path) -> None:
    """Write the peak of loss + gradient over the vocabulary as PNG: a line for each provider.

    Args:
        results: of `memory_profile.profile_losses`.
        file: where.
    """
    mpl.use("Agg")
    cases = sorted(
        (case for case in results["cases"] if case["direction"] != "forward"),
        key=lambda case: case["vocabulary"],
    )
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        sizes = {case["vocabulary"]: case["logits_bytes"] / 2**20 for case in cases}
        axes.plot(
            *zip(*sizes.items(), strict=True), "--", color="#d23f3f", lw=1, label="the logits"
        )
        for place, (provider, colour) in enumerate(zip(PROVIDERS, COLOURS, strict=True)):
            mine = [case for case in cases if case["provider"] == provider]
            if mine:
                # What is drawn first is wider: lines that coincide can all be seen.
                width = 7 - place
                axes.plot(*_peaks(mine), "o-", color=colour, lw=width, zorder=1, label=_label(mine))
        axes.set_title(
            f"Loss and gradient of [1, {results['length']}, {results['heads']}, V] logits, "
            f"{results['dtype']}, {results['device']}"
        )
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(axis="y")
        axes.set_ylabel("peak MiB beyond the logits, log scale")
        axes.set_xscale("log")
        axes.set_xticks(list(sizes), list(map(str, sizes)))
        axes.minorticks_off()
        axes.tick_params(axis="x", labelrotation=15)
        axes.set_xlabel("V, log scale")
        figure.legend(loc="outside right upper", frameon=False)
        figure.savefig(file, dpi=150)
        plt.close(figure)


def _peaks(cases: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    fit = [case for case in cases if case["peak_bytes"] is not None]
    return [case["vocabulary"] for case in fit], [case["peak_bytes"] / 2**20 for case in fit]


def _label(cases: list[dict[str, Any]]) -> str:
    unfit = [str(case["vocabulary"]) for case in cases if case["peak_bytes"] is None]
    name = cases[0]["provider"]
    return f"{name}, does not fit:\n{', '.join(unfit)}" if unfit else name


def _plot_panel(axes: Any, medians: Medians) -> None:
    shapes = list(dict.fromkeys(case.shape for case in medians))
    providers = [name for name in PROVIDERS if name in {case.provider for case in medians}]
    width = GROUP / len(providers)
    for provider, colour in zip(PROVIDERS, COLOURS, strict=True):
        bars = [(case, ms) for case, ms in medians.items() if case.provider == provider]
        if not bars:
            continue
        left = providers.index(provider) * width - GROUP / 2
        middle, least, most = zip(*(ms for _, ms in bars), strict=True)
        axes.bar(
            [shapes.index(case.shape) + left for case, _ in bars],
            middle,
            width,
            align="edge",
            color=colour,
            label=provider,
            yerr=[_difference(middle, least), _difference(most, middle)],
            ecolor=INK,
        )
    for case, (copy, _, _) in medians.items():
        if (case.provider, case.direction) == ("copy", "forward+backward"):
            place = shapes.index(case.shape)
            label = "copy of the logits" if place == 0 else None
            axes.hlines(copy, place - 0.48, place + 0.48, color="#d23f3f", linewidth=2, label=label)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y")
    axes.set_ylabel("median ms, log scale")
    axes.set_xticks(range(len(shapes)), ["x".join(map(str, shape)) for shape in shapes])
    axes.tick_params(axis="x", labelrotation=15)


def _difference(upper: tuple[float, ...], lower: tuple[float, ...]) -> list[float]:
    return [high - low for high, low in zip(upper, lower, strict=True)]
