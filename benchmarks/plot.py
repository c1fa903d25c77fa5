"""The pictures: time or GB/s per provider against what bounds it; peak bytes over V and over S."""

from collections.abc import Iterator
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt

from wmtp.benchmarks.memory import MEBI
from wmtp.benchmarks.problem import Record, Shape
from wmtp.benchmarks.profile import allowed_bytes, chunk_scratch_bytes, scratch_bytes
from wmtp.benchmarks.report import cases_by_key, spread

INK, MUTED, GRID, RED = "#22262b", "#6c7480", "#e6e8eb", "#d23f3f"
GREY, AMBER, BROWN, PINK, VIOLET = "#c3c9d0", "#e0a23c", "#b5651d", "#d98cb3", "#8457c9"
BLUE, LIGHT, LIGHTER, GREEN = "#2a78d6", "#6ba3e5", "#a9c9f0", "#15966a"
# By provider, in the order of the bars; of the linear loss and of memory some have more to say.
COLOURS = {
    **{"eager": GREY, "eager_float": MUTED, "compiled": AMBER},
    **{"linear_cross_entropy": BROWN, "liger": PINK, "cce": VIOLET, "cce_kernel": VIOLET},
    **{"quack": "#7a8f3c", "flash_attn": "#3c8f86", "fused": BLUE},
    **{"fused, given": LIGHT, "fused, ref_ce": LIGHTER, "fused, frozen": GREEN},
    **{"two_products": MUTED, "fused_inplace": GREEN, "fused, its chunk": GREEN},
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
BOTH = ("forward+backward", "inplace")
GROUP = 0.84  # the width of a group of bars
Heights = tuple[float, float, float]  # median, least, most


class Panel(NamedTuple):
    """A group of bars for each shape, one for each name, and a line across each group."""

    title: str
    bars: dict[str, dict[Shape, Heights]]
    line: dict[Shape, float]


def plot_loss(results: dict[str, Any], file: Path) -> None:
    """Write loss + gradient as PNG, of logits or of hidden states: a panel for each dtype, a group
    of bars for each shape.

    Args:
        results: of `report.gather`, of the suite "loss" or "linear".
        file: where.
    """
    panels: dict[str, Panel] = {}
    line = "copy of the logits"
    for case, row in cases_by_key(results).items():
        if case.study not in ("loss", "linear") or case.direction == "forward":
            continue
        what = "Linear loss and gradients" if case.dim else "Loss and gradient"
        panel = panels.setdefault(case.dtype, Panel(f"{what}, {case.dtype}", {}, {}))
        if case.provider in ("copy", "three_products"):
            line = "three products" if case.dim else line
            if case.direction == "forward+backward":
                panel.line[case.shape], *_ = spread(row["median_ms"])
            continue
        frozen = case.provider == "fused" and case.direction == "frozen"
        told = "frozen" if frozen else case.weighting
        named = case.dim and told != "uniform"
        name = f"{case.provider}, {told}" if named else case.provider
        panel.bars.setdefault(name, {})[case.shape] = spread(row["median_ms"])
    draw_bars(list(panels.values()), line, "median ms, log scale", file)


def draw_bars(panels: list[Panel], line: str, unit: str, file: Path) -> None:
    names = {name for panel in panels for name in panel.bars}
    groups = len({shape for panel in panels for bars in panel.bars.values() for shape in bars})
    size = (4 + 0.2 * len(names) * groups, 3.6 * len(panels))
    with _figure(file, (len(panels), 1), size) as grid:
        for axes, panel in zip(grid, panels, strict=True):
            _draw_panel(axes, panel, line, unit)


def _draw_panel(axes: Any, panel: Panel, line: str, unit: str) -> None:
    shapes = list(dict.fromkeys(shape for bars in panel.bars.values() for shape in bars))
    names = [name for name in COLOURS if name in panel.bars]
    width = GROUP / max(len(names), 1)
    for place, name in enumerate(names):
        bars = panel.bars[name]
        axes.bar(
            [shapes.index(shape) + place * width - GROUP / 2 for shape in bars],
            [middle for middle, _, _ in bars.values()],
            width,
            align="edge",
            color=COLOURS[name],
            label=name,
            yerr=[
                [middle - least for middle, least, _ in bars.values()],
                [most - middle for middle, _, most in bars.values()],
            ],
            ecolor=INK,
        )
    for shape, height in panel.line.items():
        place = shapes.index(shape)
        label = line if place == 0 else None
        axes.hlines(height, place - 0.48, place + 0.48, color=RED, linewidth=2, label=label)
    axes.set_title(panel.title)
    if "log" in unit:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y")
    axes.set_ylabel(unit)
    axes.set_xticks(range(len(shapes)), ["x".join(map(str, shape)) for shape in shapes])
    axes.tick_params(axis="x", labelrotation=15)


def plot_profile(results: dict[str, Any], file: Path) -> None:
    """Write the peak of loss + gradients as PNG: a line for each provider; a panel over V, and one
    over S where it was varied.

    Args:
        results: of `profile.profile`.
        file: where.
    """
    dim, heads = results["dim"], results["heads"]
    what = f"{results['dtype']}, {results['device']}"
    sweeps = _sweeps([record for record in results["cases"] if record["direction"] in BOTH])
    with _figure(file, (1, len(sweeps)), (3 + 5 * len(sweeps), 4.5)) as grid:
        for axes, ((field, told), records) in zip(grid, sweeps.items(), strict=True):
            (_draw_linear_sweep if dim else _draw_sweep)(axes, records, field)
            _set_log_axes(axes, list(dict.fromkeys(record[field] for record in records)))
            axes.set_xlabel(f"{told}, log scale" if dim else "V, log scale")
        length = results["cases"][0]["length"]
        title = f"Loss and gradient of [1, {length}, {heads}, V] logits, {what}"
        if dim:
            title = f"Linear loss and gradients, H = {heads}, D = {dim}, {what}"
        beyond = "inputs and gradients" if dim else "the logits"
        grid[0].set_ylabel(f"peak MiB beyond {beyond}, log scale")
        grid[0].figure.suptitle(title)


def _sweeps(records: list[Record]) -> dict[tuple[str, str], list[Record]]:
    """Over V at the first S, over S at the first V, where they were varied; by field and words."""
    length, vocabulary = records[0]["length"], records[0]["vocabulary"]
    over_v = [record for record in records if record["length"] == length]
    over_s = [record for record in records if record["vocabulary"] == vocabulary]
    found = {
        ("vocabulary", f"V, at S = {length}"): sorted(over_v, key=itemgetter("vocabulary")),
        ("length", f"S, at V = {vocabulary}"): sorted(over_s, key=itemgetter("length")),
    }
    varied = {key: mine for key, mine in found.items() if mine[0][key[0]] != mine[-1][key[0]]}
    return varied or dict(list(found.items())[:1])


def _set_log_axes(axes: Any, sizes: list[int]) -> None:
    axes.set(xscale="log", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y")
    axes.set_xticks(sizes, list(map(str, sizes)))
    axes.minorticks_off()
    axes.tick_params(axis="x", labelrotation=15)


def _draw_sweep(axes: Any, records: list[Record], field: str) -> None:
    sizes = {record[field]: record["logits_bytes"] / MEBI for record in records}
    axes.plot(*zip(*sizes.items(), strict=True), "--", color=RED, lw=1, label="the logits")
    names = dict.fromkeys(record["provider"] for record in records)
    for place, name in enumerate(names):
        mine = [record for record in records if record["provider"] == name]
        fit = [record for record in mine if record["peak_bytes"] is not None]
        unfit = ", ".join(str(one[field]) for one in mine if one["peak_bytes"] is None)
        axes.plot(
            [record[field] for record in fit],
            [record["peak_bytes"] / MEBI for record in fit],
            "o-",
            color=COLOURS[name],
            lw=7 - place,  # what is drawn first is wider: lines that coincide can all be seen
            zorder=1,
            label=f"{name}, does not fit:\n{unfit}" if unfit else name,
        )


def _draw_linear_sweep(axes: Any, records: list[Record], field: str) -> None:
    """What was not measured but derived is hollow."""
    ours = [record for record in records if record["provider"] == "fused"]
    lines = {
        name: [(one, scratch_bytes(one)) for one in records if one["provider"] == name]
        for name in dict.fromkeys(record["provider"] for record in records)
    }
    lines["fused, its chunk"] = [(record, chunk_scratch_bytes(record)) for record in ours]
    # What is drawn first is wider: lines that coincide can all be seen.
    for width, (name, points) in zip((2, 2, 6, 2), lines.items(), strict=True):
        known = [(one[field], peak / MEBI, one) for one, peak in points if peak is not None]
        colour = COLOURS[name]
        axes.plot(
            [x for x, _, _ in known], [y for _, y, _ in known], color=colour, lw=width, label=name
        )
        for x, height, one in known:
            inside = "white" if one["peak_bytes"] is None else colour
            axes.plot(x, height, "o", color=colour, markerfacecolor=inside)
    allowed = {one[field]: allowed_bytes(one["chunk_bytes"]) / MEBI for one in ours}
    label = "1.25 chunk_bytes + 8 MiB"
    axes.plot(*zip(*allowed.items(), strict=True), "--", color=RED, lw=1, label=label)


@contextmanager
def _figure(file: Path, cells: tuple[int, int], size: tuple[float, float]) -> Iterator[list[Any]]:
    """The axes of a figure, which is written with the first one's legend."""
    mpl.use("Agg")
    with mpl.rc_context(STYLE):
        figure, grid = plt.subplots(*cells, figsize=size, layout="constrained", squeeze=False)
        yield list(grid.flat)
        known = grid.flat[0].get_legend_handles_labels()
        figure.legend(*known, loc="outside right upper", frameon=False)
        figure.savefig(file, dpi=150)
        plt.close(figure)
