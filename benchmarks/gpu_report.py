"""The GPU suite's results as JSON, Markdown and PNG; measured and predicted times side by side."""

import platform
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from wmtp.benchmarks.gpu_cases import (
    BOTH,
    COPY_SHARE,
    FLOPS,
    HEADS,
    PREDICTED_CARD,
    PRODUCT_SHARE,
    TOKENS,
    predicted_ms,
    predicted_tier,
    products_flops,
)
from wmtp.benchmarks.problem import Case, Record, case_of
from wmtp.benchmarks.providers import FLOORS, PEERS
from wmtp.benchmarks.report import GPU_PACKAGES, environment, versions
from wmtp.files import json_by_line

PREDICTED = f"predicted ms ({PREDICTED_CARD.name})"
COLUMNS = (
    *("logits", "dtype", "provider", "weights", "tier", "median ms", "20-80 %"),
    *("GB/s", "of copy", "peak", PREDICTED),
)
LINEAR_COLUMNS = (
    *("[B, S, H, V] x D", "dtype", "provider", "weights", "median ms", "20-80 %"),
    *("TFLOP/s", "of products", "MiB", PREDICTED),
)
COMPARED = ("eager", "compiled", "liger", "quack")
HEADLINE = (
    "V", "dtype", "forward, of copy", "forward + backward, of copy", "in place, of copy",
    "in place, peak", *(f"{peer} / fused" for peer in COMPARED),
)  # fmt: skip
FACTORS = [name for name, peer in PEERS.items() if peer.factors]
NOTES = (
    "Times are the device's alone, medians; GB/s counts one read of the logits, and one write with "
    "a gradient; `of copy` is that over the measured GB/s of a copy of the same logits; `peak` is "
    "memory beyond the logits, in units of the logits.",
    f"Peers ({', '.join(PEERS)}) have no weights: they compute a mean cross entropy over the same "
    f"rows. {' and '.join(FACTORS)} take hidden states, of size 1 here, and read no logits. liger "
    "overwrites the logits with their gradient.",
    f"*predicted* is no measurement, but of an {PREDICTED_CARD.name}: what the tier moves, at "
    f"{100 * COPY_SHARE:.0f} % of its bandwidth, or its instructions, whichever takes longer, and "
    "its launches and waves.",
    "Linear: hidden states times unembedding, a loss and gradients; `frozen` is without the "
    "unembedding's. `of products` is the time of the bare matrix products over that of the "
    "provider, TFLOP/s counts these products alone, MiB is memory beyond hidden states, "
    "unembedding and their gradients. linear_cross_entropy and liger have no weights. The gradient "
    "filter of cce drops what is small, which of random logits is nearly all. Predicted: each "
    f"product takes the longer of its operations at {PRODUCT_SHARE * FLOPS / 1e12:.0f} TFLOP/s "
    "and its bytes; what the kernel reads and writes is added, and the host's one wait.",
)


def gpu_environment() -> dict[str, Any]:
    """What a reader needs to know to repeat the numbers."""
    known = {**environment(platform.processor()), "cuda": torch.version.cuda, "driver": _driver()}
    known |= versions(GPU_PACKAGES)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties()
        known["processors"] = properties.multi_processor_count
        known["l2_bytes"] = properties.L2_cache_size
    return known


def _driver() -> str | None:
    """The driver's version, which torch does not tell."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    return done.stdout.split("\n")[0].strip() or None


def predicted_records(cases: Iterable[Case]) -> list[Record]:
    """A record for each case that has a prediction, and nothing measured."""
    found = []
    for case in cases:
        if (milliseconds := predicted_ms(case)) is not None:
            record = case._replace(tier=case.tier or predicted_tier(case))._asdict()
            found.append({**record, "outcome": "predicted", "predicted_ms": milliseconds})
    return found


def compared(records: list[Record]) -> list[Record]:
    """The records with what follows from them: GB/s, share of the copy, peak, prediction; of the
    linear loss TFLOP/s, share of the products, MiB."""
    measured = {
        case_of(record): record["median_ms"] for record in records if record["outcome"] == "ok"
    }
    copies = {
        (case.shape, case.dtype): case.gigabytes_per_second(milliseconds)
        for case, milliseconds in measured.items()
        if case.provider == "copy"
    }
    found = []
    for record in records:
        case = case_of(record)
        more: Record = {"predicted_ms": predicted_ms(case)}
        if record["outcome"] == "ok" and case.dim:
            more |= _linear_figures(case, record, measured.get(case.floor()))
        elif record["outcome"] == "ok":
            more |= _figures(case, record, copies.get((case.shape, case.dtype)))
        found.append({**record, **more})
    return found


def _figures(case: Case, record: Record, copy: float | None) -> Record:
    bandwidth = case.gigabytes_per_second(record["median_ms"])
    return {
        "gb_s": round(bandwidth, 1),
        "of_copy": round(bandwidth / copy, 4) if copy else None,
        "peak": round(record["peak_bytes"] / case.logits_bytes(), 4),
    }


def _linear_figures(case: Case, record: Record, floor_ms: float | None) -> Record:
    return {
        "tflops": round(products_flops(case) / (1e9 * record["median_ms"]), 1),
        "of_products": round(floor_ms / record["median_ms"], 4) if floor_ms else None,
        "mib": round((record["peak_bytes"] - case.gradient_bytes()) / 2**20, 2),
    }


def write(results: dict[str, Any], folder: Path, name: str) -> None:
    """folder/name.json and folder/name.md; whoever is killed meanwhile leaves those of before."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json_by_line(results) + "\n"), (".md", markdown(results))):
        written = folder / f"{name}{suffix}.new"
        written.write_text(text)
        written.replace(folder / f"{name}{suffix}")


# --- Markdown ------------------------------------------------------------------------------------


def markdown(results: dict[str, Any]) -> str:
    """Everything, as one page."""
    known = [f"{key} {value}" for key, value in results["environment"].items() if value]
    records = results["cases"]
    parts = ["# GPU benchmarks", f"`{results['command']}`", ", ".join(known), *NOTES]
    parts.append(_table(("step", "outcome", ""), map(_step_cells, results["steps"])))
    parts.append("\n".join(f"- absent: {who}, {why}" for who, why in results["absent"].items()))
    if rows := list(_headline(records)):
        parts += [f"## [1, {TOKENS}, {HEADS}, V]", _table(HEADLINE, rows)]
    timed = [record for record in records if record["outcome"] in ("ok", "predicted")]
    study_of = itemgetter("study", "direction")
    for (study, direction), group in groupby(sorted(timed, key=study_of), study_of):
        columns = LINEAR_COLUMNS if study == "linear" else COLUMNS
        rows = [[cells[name] for name in columns] for cells in map(_cells, group)]
        parts += [f"## {study}, {direction}", _table(columns, rows)]
    without = [record for record in records if record["outcome"] not in ("ok", "predicted")]
    parts += _section("Without a time", without)
    missed = [one for one in results.get("compiled", []) if one["outcome"] not in ("ok", "refused")]
    parts += _section("Not compiled", missed)
    return "\n\n".join(filter(None, parts)) + "\n"


def _cells(record: Record) -> dict[str, str]:
    """What the tables show of a record, by what stands above it."""
    shape, digits = "x".join(map(str, record["shape"])), 3 if record["dim"] else 4
    unweighted = record["provider"] in ("copy", *FLOORS.values())
    low, high = (_number(record.get(name), f".{digits}f") for name in ("p20_ms", "p80_ms"))
    predicted = _number(record["predicted_ms"], f".{digits}f")
    return {
        "logits": shape,
        "[B, S, H, V] x D": f"{shape} x {record['dim']}",
        "dtype": record["dtype"],
        "provider": record["provider"],
        "weights": "" if unweighted else record["weighting"],
        "tier": case_of(record).tier,
        "median ms": _number(record.get("median_ms"), f".{digits}f"),
        "20-80 %": f"{low}-{high}" if low else "",
        "GB/s": _number(record.get("gb_s"), ".0f"),
        "of copy": _percent(record.get("of_copy")),
        "peak": _number(record.get("peak"), ".3f"),
        "TFLOP/s": _number(record.get("tflops"), ".0f"),
        "of products": _percent(record.get("of_products")),
        "MiB": _number(record.get("mib"), ".1f"),
        PREDICTED: f"{predicted} *predicted*" if predicted else "",
    }


def _headline(records: list[Record]) -> Iterable[list[str]]:
    """A row for each vocabulary and dtype: what the library promises."""
    by_problem: dict[tuple[int, str], dict[tuple[str, str], Record]] = {}
    for record in filter(_is_headline, records):
        case = case_of(record)
        found = by_problem.setdefault((case.shape[3], case.dtype), {})
        found[case.provider, case.direction] = record
    for (vocabulary, dtype), found in by_problem.items():
        inplace, fused = found.get(("fused_inplace", "inplace"), {}), found.get(("fused", BOTH), {})
        peers = [found.get((peer, BOTH)) for peer in COMPARED]
        yield [
            str(vocabulary), dtype,
            _percent(found.get(("fused", "forward"), {}).get("of_copy")),
            _percent(fused.get("of_copy")),
            _percent(inplace.get("of_copy")),
            _number(inplace.get("peak"), ".4f"),
            *(f"{p['median_ms'] / fused['median_ms']:.1f}x" if p and fused else "" for p in peers),
        ]  # fmt: skip


def _is_headline(record: Record) -> bool:
    timed = record["study"] == "speed" and record["outcome"] == "ok"
    return timed and record["weighting"] in ("given", "none")


def _step_cells(step: Record) -> list[str]:
    seconds = f" ({step['seconds']:.0f} s)" if step.get("seconds") is not None else ""
    return [step["name"], step["outcome"] + seconds, step["why"]]


def _section(title: str, records: list[Record]) -> list[str]:
    """A line a case; of those that there was no time for, a line a study and reason."""
    lines, not_run = [], Counter[tuple[str, str]]()
    for record in records:
        why = f" ({record['why']})" if record["why"] else ""
        if record["outcome"] == "not run":
            not_run[record["study"], why] += 1
        else:
            lines.append(f"- {case_of(record)}: {record['outcome']}{why}")
    lines += [f"- {study}: {count} not run{why}" for (study, why), count in not_run.items()]
    return [f"## {title}", "\n".join(lines)] if lines else []


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


# --- PNG -----------------------------------------------------------------------------------------


def plot(records: list[Record], file: Path) -> str | None:
    """Draw GB/s of loss + gradient, and write them as PNG; returns why not, where that is so."""
    try:
        from wmtp.benchmarks.plot import Panel, draw_bars
    except ImportError as error:
        return f"no picture: {error}"
    panels: dict[str, Panel] = {}
    for record in filter(_is_headline, compared(records)):
        case, height = case_of(record), record["gb_s"]
        if case.direction == "forward":
            continue
        panel = panels.setdefault(case.dtype, Panel(f"Loss and gradient, {case.dtype}", {}, {}))
        if case.provider == "copy":
            panel.line[case.shape] = height
        else:
            panel.bars.setdefault(case.provider, {})[case.shape] = (height, height, height)
    if not panels:
        return "no picture: no speed was timed"
    draw_bars(list(panels.values()), "copy", "effective GB/s", file)
    return None
