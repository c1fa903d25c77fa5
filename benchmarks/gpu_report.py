"""The GPU suite's results as JSON, Markdown and PNG; measured and predicted times side by side."""

import importlib.metadata
import platform
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from wmtp.benchmarks.gpu_cases import (
    COPY_SHARE,
    HEADS,
    PREDICTED_CARD,
    TOKENS,
    Job,
    forced_as,
    predicted_ms,
    predicted_tier,
)
from wmtp.benchmarks.gpu_linear import COLUMNS as LINEAR_COLUMNS
from wmtp.benchmarks.gpu_linear import (
    NOTE,
    case_of,
    compared_linear,
    linear_cells,
    predicted_linear_ms,
)
from wmtp.benchmarks.gpu_peers import LINEAR, PEERS
from wmtp.benchmarks.report import environment, gigabytes_per_second, logits_bytes
from wmtp.files import json_by_line

Record = dict[str, Any]
COLUMNS = (
    "logits", "dtype", "provider", "weights", "tier", "median ms", "20-80 %", "GB/s", "of copy",
    "peak", f"predicted ms ({PREDICTED_CARD.name})",
)  # fmt: skip
COMPARED = ("eager", "compiled", "liger", "quack")
HEADLINE = (
    "V", "dtype", "forward, of copy", "forward + backward, of copy", "in place, of copy",
    "in place, peak", *(f"{peer} / fused" for peer in COMPARED),
)  # fmt: skip
NOTES = (
    "Times are the device's alone, medians; GB/s counts one read of the logits, and one write with "
    "a gradient; `of copy` is that over the measured GB/s of a copy of the same logits; `peak` is "
    "memory beyond the logits, in units of the logits.",
    f"Peers ({', '.join(PEERS)}) have no weights: they compute a mean cross entropy over the same "
    f"rows. {' and '.join(LINEAR)} take hidden states, of size 1 here, and read no logits. liger "
    "overwrites the logits with their gradient.",
    f"*predicted* is a bound, not a measurement: the bytes that the tier moves, at "
    f"{100 * COPY_SHARE:.0f} % of the {PREDICTED_CARD.name}'s bandwidth.",
    NOTE,
)


def gpu_environment() -> dict[str, Any]:
    """What a reader needs to know to repeat the numbers."""
    known = {**environment(platform.processor()), "cuda": torch.version.cuda, "driver": _driver()}
    for package in ("triton", "liger-kernel", "quack-kernels", "flash-attn", "cuda-bindings"):
        known[package] = _version(package)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties()
        known["processors"] = properties.multi_processor_count
        known["l2_bytes"] = properties.L2_cache_size
    return known


def predicted_records(jobs: Iterable[Job]) -> list[Record]:
    """A record for each job that has a prediction, and nothing measured."""
    records = []
    for job in jobs:
        linear = bool(job.case.dim)
        milliseconds = predicted_linear_ms(job.case) if linear else predicted_ms(job)
        if milliseconds is not None:
            case = {key: value for key, value in job.case._asdict().items() if key != "threads"}
            tier = "" if linear else job.tier or predicted_tier(job)
            chosen = {"tier": tier, "ctas_per_sm": job.ctas_per_sm}
            records.append({**case, **chosen, "outcome": "predicted", "predicted_ms": milliseconds})
    return records


def compared(records: list[Record]) -> list[Record]:
    """The records with what follows from them: GB/s, share of the copy, peak, prediction."""
    copies = {
        _problem(record): gigabytes_per_second(case_of(record), record["median_ms"])
        for record in records
        if record["provider"] == "copy" and record["outcome"] == "ok"
    }
    of_logits = [
        _compared(record, copies.get(_problem(record))) for record in records if not record["dim"]
    ]
    return of_logits + compared_linear([record for record in records if record["dim"]])


def write(results: dict[str, Any], folder: Path, name: str) -> None:
    """folder/name.json and folder/name.md; whoever is killed meanwhile leaves those of before."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in (
        (".json", json_by_line(results) + "\n"),
        (".md", markdown(results)),
    ):
        written = folder / f"{name}{suffix}.new"
        written.write_text(text)
        written.replace(folder / f"{name}{suffix}")


def markdown(results: dict[str, Any]) -> str:
    """Everything, as one page."""
    known = [f"{key} {value}" for key, value in results["environment"].items() if value]
    records = results["cases"]
    parts = ["# GPU benchmarks", f"`{results['command']}`", ", ".join(known), *NOTES]
    parts.append(_table(("step", "outcome", ""), [_step_cells(step) for step in results["steps"]]))
    if results["absent"]:
        parts.append("\n".join(f"- absent: {who}, {why}" for who, why in results["absent"].items()))
    if rows := _headline(records):
        parts += [f"## [1, {TOKENS}, {HEADS}, V]", _table(HEADLINE, rows)]
    told = [record for record in records if record["outcome"] in ("ok", "predicted")]
    for (study, direction), group in _groups(told):
        columns, cells = (LINEAR_COLUMNS, linear_cells) if study == "linear" else (COLUMNS, _cells)
        table = _table(columns, [cells(record) for record in group])
        parts += [f"## {study}, {direction}", table]
    others = [record for record in records if record["outcome"] not in ("ok", "predicted")]
    if others:
        parts += ["## Without a time", "\n".join(_without_time(others))]
    compiled = results.get("compiled", [])
    if missed := [record for record in compiled if record["outcome"] not in ("ok", "refused")]:
        lines = [f"- {record['case']}: {record['outcome']} ({record['why']})" for record in missed]
        parts += ["## Not compiled", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def plot(records: list[Record], file: Path) -> str | None:
    """Write loss + gradient as PNG; returns why not, where that is so."""
    try:
        import matplotlib as mpl
        import matplotlib.pyplot as plt

        from wmtp.benchmarks.plot import STYLE
    except ImportError as error:
        return f"no picture: {error}"
    timed = filter(_is_headline, compared(records))
    chosen = [record for record in timed if record["direction"] != "forward"]
    dtypes = list(dict.fromkeys(record["dtype"] for record in chosen))
    if not dtypes:
        return "no picture: no speed was timed"
    mpl.use("Agg")
    with mpl.rc_context(STYLE):
        figure, panels = plt.subplots(
            len(dtypes), figsize=(9, 3.6 * len(dtypes)), layout="constrained", squeeze=False
        )
        for axes, dtype in zip(panels.flat, dtypes, strict=True):
            _plot_panel(axes, [record for record in chosen if record["dtype"] == dtype])
            axes.set_title(f"Loss and gradient, {dtype}")
        figure.legend(
            *panels.flat[0].get_legend_handles_labels(), loc="outside right upper", frameon=False
        )
        figure.savefig(file, dpi=150)
        plt.close(figure)
    return None


def _plot_panel(axes: Any, records: list[Record]) -> None:
    """GB/s: a group of bars for each vocabulary, a line for its copy."""
    vocabularies = list(dict.fromkeys(record["shape"][-1] for record in records))
    names = dict.fromkeys(record["provider"] for record in records)
    providers = [name for name in names if name != "copy"]
    width = 0.84 / max(len(providers), 1)
    for record in records:
        place = vocabularies.index(record["shape"][-1])
        if record["provider"] == "copy":
            label = "copy" if place == 0 else None
            ends = (place - 0.48, place + 0.48)
            axes.hlines(record["gb_s"], *ends, color="#d23f3f", linewidth=2, label=label)
            continue
        number = providers.index(record["provider"])
        axes.bar(
            place - 0.42 + number * width, record["gb_s"], width, align="edge", color=f"C{number}",
            label=record["provider"] if place == 0 else None,
        )  # fmt: skip
    axes.set_xticks(range(len(vocabularies)), [f"V = {v}" for v in vocabularies])
    axes.set_ylabel("effective GB/s")
    axes.grid(axis="y")


def _compared(record: Record, copy: float | None) -> Record:
    case = case_of(record)
    predicted = predicted_ms(Job(case, record["tier"]))
    if record["outcome"] != "ok":
        return {**record, "predicted_ms": predicted}
    bandwidth = gigabytes_per_second(case, record["median_ms"])
    return {
        **record,
        "gb_s": round(bandwidth, 1),
        "of_copy": round(bandwidth / copy, 4) if copy else None,
        "peak": round(record["peak_bytes"] / logits_bytes(case), 4),
        "predicted_ms": predicted,
    }


def _headline(records: list[Record]) -> list[list[str]]:
    """A row for each vocabulary and dtype at the main size: what the library promises."""
    timed = list(filter(_is_headline, records))
    rows = []
    for shape, dtype in dict.fromkeys(map(_problem, timed)):
        found = {
            (record["provider"], record["direction"]): record
            for record in timed
            if _problem(record) == (shape, dtype)
        }
        both, inplace = "forward+backward", found.get(("fused_inplace", "inplace"), {})
        fused = found.get(("fused", both), {})
        rows.append([
            str(shape[-1]), dtype,
            _percent(found.get(("fused", "forward"), {}).get("of_copy")),
            _percent(fused.get("of_copy")),
            _percent(inplace.get("of_copy")),
            _number(inplace.get("peak"), ".4f"),
            *(_ratio(found.get((peer, both)), fused) for peer in COMPARED),
        ])  # fmt: skip
    return rows


def _cells(record: Record) -> list[str]:
    measured = record["outcome"] == "ok"
    spread = f"{record['p20_ms']:.4f}-{record['p80_ms']:.4f}" if measured else ""
    predicted = record["predicted_ms"]
    return [
        "x".join(map(str, record["shape"])),
        record["dtype"],
        record["provider"],
        record["weighting"] if record["provider"] != "copy" else "",
        forced_as(record["tier"], record["ctas_per_sm"]),
        _number(record.get("median_ms"), ".4f"),
        spread,
        _number(record.get("gb_s"), ".0f"),
        _percent(record.get("of_copy")),
        _number(record.get("peak"), ".3f"),
        "" if predicted is None else f"{predicted:.4f} *predicted*",
    ]


def _step_cells(step: Record) -> list[str]:
    seconds = f" ({step['seconds']:.0f} s)" if step.get("seconds") is not None else ""
    return [step["name"], step["outcome"] + seconds, step["why"]]


def _without_time(records: list[Record]) -> list[str]:
    """A line a case; of those that there was no time for, a line a step and reason."""
    not_run = Counter(
        (record["study"], record["why"]) for record in records if record["outcome"] == "not run"
    )
    lines = [_one_without_time(record) for record in records if record["outcome"] != "not run"]
    lines += [f"- {study}: {count} not run ({why})" for (study, why), count in not_run.items()]
    return lines


def _one_without_time(record: Record) -> str:
    tier = f", tier {forced_as(record['tier'], record['ctas_per_sm'])}" if record["tier"] else ""
    why = f" ({record['why']})" if record["why"] else ""
    return f"- {case_of(record)}{tier}: {record['outcome']}{why}"


def _groups(records: list[Record]) -> Iterable[tuple[tuple[str, str], list[Record]]]:
    def key(record: Record) -> tuple[str, str]:
        return record["study"], record["direction"]

    return [(name, list(group)) for name, group in groupby(sorted(records, key=key), key)]


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _problem(record: Record) -> tuple[tuple[int, ...], str]:
    return tuple(record["shape"]), record["dtype"]


def _is_headline(record: Record) -> bool:
    timed = record["study"] == "speed" and record["outcome"] == "ok"
    return timed and record["weighting"] in ("given", "none")


def _ratio(peer: Record | None, ours: Record) -> str:
    return f"{peer['median_ms'] / ours['median_ms']:.1f}x" if peer and ours else ""


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _driver() -> str | None:
    """The driver's version, which torch does not tell."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    return done.stdout.split("\n")[0].strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
