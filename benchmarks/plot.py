"""The pictures: milliseconds per provider against what bounds it; peak bytes over V and over S."""

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt

from wmtp.benchmarks.linear_profile import allowed_bytes, chunk_scratch_bytes, scratch_bytes
from wmtp.benchmarks.memory_profile import MEBI
from wmtp.benchmarks.problem import Shape
from wmtp.benchmarks.report import cases_by_key, spread

INK, MUTED, GRID, RED = "#22262b", "#6c7480", "#e6e8eb", "#d23f3f"
COLOURS = {
    "eager": "#c3c9d0",
    "eager_float": MUTED,
    "compiled": "#e0a23c",
    "cce": "#8457c9",
    "fused": "#2a78d6",
    "fused_inplace": "#15966a",
}
LINEAR_COLOURS = {
    "eager": "#c3c9d0",
    "compiled": "#e0a23c",
    "linear_cross_entropy": "#b5651d",
    "liger": "#d98cb3",
    "cce": "#8457c9",
    "fused": "#2a78d6",
    "fused, given": "#6ba3e5",
    "fused, ref_ce": "#a9c9f0",
    "fused, frozen": "#15966a",
    "two_products": MUTED,
}
PROFILE_COLOURS = {
    "eager": LINEAR_COLOURS["eager"],
    "eager_float": MUTED,
    "fused": LINEAR_COLOURS["fused"],
    "fused, its chunk": LINEAR_COLOURS["fused, frozen"],
}
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


class Panel(NamedTuple):
    """A group of bars for each shape, one for each name, and a line across each group."""

    title: str
    bars: dict[str, dict[Shape, tuple[float, float, float]]]  # milliseconds: median, least, most
    line: dict[Shape, float]


def plot_loss(results: dict[str, Any], file: Path) -> None:
    """Write loss + gradient as PNG: a panel for each dtype, a group of bars for each shape.

    Args:
        results: of `report.gather`, of the suite "loss".
        file: where.
    """
    panels: dict[str, Panel] = {}
    for case, row in cases_by_key(results).items():
        if case.study != "loss" or case.direction == "forward":
            continue
        panel = panels.setdefault(case.dtype, Panel(f"Loss and gradient, {case.dtype}", {}, {}))
        if case.provider != "copy":
            panel.bars.setdefault(case.provider, {})[case.shape] = spread(row["median_ms"])
        elif case.direction == "forward+backward":
            panel.line[case.shape], *_ = spread(row["median_ms"])
    _draw(list(panels.values()), COLOURS, "copy of the logits", file)


def plot_linear(results: dict[str, Any], file: Path) -> None:
    """Write the linear loss and its gradients as PNG, as `plot_loss` does.

    Args:
        results: of `report.gather`, of the suite "linear".
        file: where.
    """
    panels: dict[str, Panel] = {}
    for case, row in cases_by_key(results).items():
        title = f"Linear loss and gradients, {case.dtype}"
        panel = panels.setdefault(case.dtype, Panel(title, {}, {}))
        if case.provider == "three_products":
            panel.line[case.shape], *_ = spread(row["median_ms"])
            continue
        frozen = case.provider == "fused" and case.direction == "frozen"
        told = "frozen" if frozen else case.weighting if case.weighting != "uniform" else ""
        name = f"{case.provider}, {told}" if told else case.provider
        panel.bars.setdefault(name, {})[case.shape] = spread(row["median_ms"])
    _draw(list(panels.values()), LINEAR_COLOURS, "three products", file)


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
        axes.plot(*zip(*sizes.items(), strict=True), "--", color=RED, lw=1, label="the logits")
        for place, (provider, colour) in enumerate(COLOURS.items()):
            mine = [case for case in cases if case["provider"] == provider]
            if mine:
                # What is drawn first is wider: lines that coincide can all be seen.
                width = 7 - place
                axes.plot(*_peaks(mine), "o-", color=colour, lw=width, zorder=1, label=_label(mine))
        axes.set_title(
            f"Loss and gradient of [1, {results['length']}, {results['heads']}, V] logits, "
            f"{results['dtype']}, {results['device']}"
        )
        _log_axes(axes, list(sizes))
        axes.set_ylabel("peak MiB beyond the logits, log scale")
        axes.set_xlabel("V, log scale")
        figure.legend(loc="outside right upper", frameon=False)
        figure.savefig(file, dpi=150)
        plt.close(figure)


def plot_linear_profile(results: dict[str, Any], file: Path) -> None:
    """Write the linear loss's memory as PNG: a panel over V, one over S, where these were varied.

    Args:
        results: of `linear_profile.profile_linear`.
        file: where.
    """
    mpl.use("Agg")
    both = [case for case in results["cases"] if case["direction"] == "forward+backward"]
    length, vocabulary = both[0]["length"], both[0]["vocabulary"]
    sweeps = {
        f"V, at S = {length}": [case for case in both if case["length"] == length],
        f"S, at V = {vocabulary}": [case for case in both if case["vocabulary"] == vocabulary],
    }
    varied = {axis: cases for axis, cases in sweeps.items() if len({*map(_size, cases)}) > 1}
    varied = varied or dict(list(sweeps.items())[:1])
    with mpl.rc_context(STYLE):
        figure, grid = plt.subplots(
            1, len(varied), figsize=(3 + 5 * len(varied), 4.5), layout="constrained", squeeze=False
        )
        for axes, (axis, cases) in zip(grid.flat, varied.items(), strict=True):
            field = "vocabulary" if axis.startswith("V") else "length"
            _draw_sweep(axes, sorted(cases, key=lambda case: case[field]), field)
            axes.set_xlabel(f"{axis}, log scale")
        grid.flat[0].set_ylabel("peak MiB beyond inputs and gradients, log scale")
        figure.suptitle(
            f"Linear loss and gradients, H = {results['heads']}, D = {results['dim']}, "
            f"{results['dtype']}, {results['device']}"
        )
        figure.legend(
            *grid.flat[0].get_legend_handles_labels(), loc="outside right upper", frameon=False
        )
        figure.savefig(file, dpi=150)
        plt.close(figure)


def _draw_sweep(axes: Any, cases: list[dict[str, Any]], field: str) -> None:
    """A line for each provider; what was not measured but derived is hollow."""
    sizes = list(dict.fromkeys(case[field] for case in cases))
    mine = [case for case in cases if case["provider"] == "fused"]
    lines = {
        name: [(case, scratch_bytes(case)) for case in cases if case["provider"] == name]
        for name in dict.fromkeys(case["provider"] for case in cases)
    }
    lines["fused, its chunk"] = [(case, chunk_scratch_bytes(case)) for case in mine]
    # What is drawn first is wider: lines that coincide can all be seen.
    for width, (name, points) in zip((2, 2, 6, 2), lines.items(), strict=True):
        known = [(case, peak / MEBI) for case, peak in points if peak is not None]
        colour = PROFILE_COLOURS[name]
        axes.plot(
            [c[field] for c, _ in known], [y for _, y in known], color=colour, lw=width, label=name
        )
        for case, height in known:
            inside = "white" if case["peak_bytes"] is None else colour
            axes.plot(case[field], height, "o", color=colour, markerfacecolor=inside)
    allowed = [allowed_bytes(case["chunk_bytes"]) / MEBI for case in mine]
    axes.plot(sizes, allowed, "--", color=RED, lw=1, label="1.25 chunk_bytes + 8 MiB")
    _log_axes(axes, sizes)


def _log_axes(axes: Any, sizes: list[int]) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y")
    axes.set_xscale("log")
    axes.set_xticks(sizes, list(map(str, sizes)))
    axes.minorticks_off()
    axes.tick_params(axis="x", labelrotation=15)


def _size(case: dict[str, Any]) -> tuple[int, int]:
    return case["length"], case["vocabulary"]


def _peaks(cases: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    fit = [case for case in cases if case["peak_bytes"] is not None]
    return [case["vocabulary"] for case in fit], [case["peak_bytes"] / 2**20 for case in fit]


def _label(cases: list[dict[str, Any]]) -> str:
    unfit = [str(case["vocabulary"]) for case in cases if case["peak_bytes"] is None]
    name = cases[0]["provider"]
    return f"{name}, does not fit:\n{', '.join(unfit)}" if unfit else name


def _draw(panels: list[Panel], colours: dict[str, str], line_name: str, file: Path) -> None:
    mpl.use("Agg")
    bars = [bars for panel in panels for bars in panel.bars.values()]
    groups = len({shape for shapes in bars for shape in shapes})
    names = {name for panel in panels for name in panel.bars}
    size = (4 + 0.2 * len(names) * groups, 3.6 * len(panels))
    with mpl.rc_context(STYLE):
        figure, grid = plt.subplots(len(panels), figsize=size, layout="constrained", squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=True):
            _draw_panel(axes, panel, colours, line_name)
        figure.legend(
            *grid.flat[0].get_legend_handles_labels(), loc="outside right upper", frameon=False
        )
        figure.savefig(file, dpi=150)
        plt.close(figure)


def _draw_panel(axes: Any, panel: Panel, colours: dict[str, str], line_name: str) -> None:
    shapes = list(dict.fromkeys(shape for bars in panel.bars.values() for shape in bars))
    names = [name for name in colours if name in panel.bars]
    width = GROUP / len(names)
    for place, name in enumerate(names):
        bars = panel.bars[name]
        middle, least, most = zip(*bars.values(), strict=True)
        axes.bar(
            [shapes.index(shape) + place * width - GROUP / 2 for shape in bars],
            middle,
            width,
            align="edge",
            color=colours[name],
            label=name,
            yerr=[_difference(middle, least), _difference(most, middle)],
            ecolor=INK,
        )
    for shape, height in panel.line.items():
        place = shapes.index(shape)
        label = line_name if place == 0 else None
        axes.hlines(height, place - 0.48, place + 0.48, color=RED, linewidth=2, label=label)
    axes.set_title(panel.title)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y")
    axes.set_ylabel("median ms, log scale")
    axes.set_xticks(range(len(shapes)), ["x".join(map(str, shape)) for shape in shapes])
    axes.tick_params(axis="x", labelrotation=15)


def _difference(upper: tuple[float, ...], lower: tuple[float, ...]) -> list[float]:
    return [high - low for high, low in zip(upper, lower, strict=True)]
