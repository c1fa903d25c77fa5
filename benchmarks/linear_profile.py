"""Peak memory of the linear loss over V and over S: the sweeps of `wmtp profile --linear`, table.

What is counted is beyond hidden states, weight and their gradients. The library's own figure is
given once more without the float32 sum that a 16-bit weight's gradient is made in: what is left is
a chunk, which neither V nor S makes larger.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from wmtp.benchmarks.linear_problem import plan_of
from wmtp.benchmarks.linear_providers import DIRECTIONS
from wmtp.benchmarks.memory import available_bytes, linear_peak_bytes
from wmtp.benchmarks.memory_profile import (
    GIBI,
    MARGIN,
    MEBI,
    SPARE,
    if_it_fits,
    record_history,
    sections,
)
from wmtp.benchmarks.problem import Case, Shape
from wmtp.benchmarks.report import gradient_bytes

if TYPE_CHECKING:
    from rich.table import Table

PROFILED = ("eager", "eager_float", "fused")
SMALL = (8, 16)  # vocabularies, in units of D, from which a case that does not fit is derived


class LinearSetting(NamedTuple):
    """What all cases have in common."""

    dim: int
    heads: int
    dtype: torch.dtype
    device: str
    backend: str  # of the fused loss
    chunk_bytes: int | None  # None: the library's choice


def sweep(vocabularies: list[int], lengths: list[int]) -> list[tuple[int, int]]:
    """(S, V): every V at the first S, then every S at the first V.

    >>> sweep([32000, 128256], [128, 2048])
    [(128, 32000), (128, 128256), (2048, 32000)]
    """
    over_vocabulary = [(lengths[0], vocabulary) for vocabulary in vocabularies]
    return over_vocabulary + [(length, vocabularies[0]) for length in lengths[1:]]


def profile_linear(
    sizes: list[tuple[int, int]],
    setting: LinearSetting,
    show: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Peak bytes of every provider and direction at every (S, V); ready for JSON.

    Args:
        show: is given the same of each size alone, when it is measured.
    """
    free = available_bytes() if setting.device == "cpu" else None
    results = {
        **setting._asdict(),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "free_bytes": free,
        "cases": [],
    }
    for length, vocabulary in sizes:
        cases = [
            _case(direction, provider, (1, length, setting.heads, vocabulary), setting)
            for direction in DIRECTIONS
            for provider in PROFILED
        ]
        show({**results, "cases": cases})
        results["cases"] += cases
    return results


def scratch_bytes(case: dict[str, Any]) -> int | None:
    """Beyond hidden states, weight and their gradients; at least so much, if only derived."""
    peak = case["derived_bytes"] if case["peak_bytes"] is None else case["peak_bytes"]
    return None if peak is None else peak - case["gradient_bytes"]


def chunk_scratch_bytes(case: dict[str, Any]) -> int | None:
    """The same of the fused loss without the sum of the weight's gradient."""
    scratch = scratch_bytes(case)
    return None if scratch is None else scratch - case["sum_bytes"]


def allowed_bytes(chunk_bytes: int) -> int:
    """What `chunk_scratch_bytes` may be: a chunk, a quarter more, and 8 MiB."""
    return chunk_bytes + chunk_bytes // 4 + 8 * MEBI


def linear_table(results: dict[str, Any], first: bool = True) -> Table:
    """A section for each size, in MiB; the first one has the headings."""
    dim, heads = results["dim"], results["heads"]
    title = (
        "peak MiB beyond hidden states, weight and their gradients\n"
        f"[1, S, {heads}, {dim}] and [V, {dim}], {results['dtype']}, {results['device']}, "
        f"backend {results['backend']}"
    )
    table = sections(title, ("S, V", *PROFILED, "its chunk", "allowed"), first)
    cases = {
        (case["length"], case["vocabulary"], case["direction"], case["provider"]): case
        for case in results["cases"]
    }
    for size in dict.fromkeys((length, vocabulary) for length, vocabulary, *_ in cases):
        table.add_row(f"{size[0]}, {size[1]}")
        for direction in DIRECTIONS:
            row = [cases[*size, direction, provider] for provider in PROFILED]
            chunk = _mebi(chunk_scratch_bytes(row[-1]))
            allowed = _mebi(allowed_bytes(row[-1]["chunk_bytes"]))
            table.add_row(f"  {direction}", *map(_cell, row), chunk, allowed)
        table.add_section()
    return table


def write_linear_snapshot(file: Path, length: int, vocabulary: int, setting: LinearSetting) -> None:
    """CUDA's memory history of an eager and of a fused step, for pytorch.org/memory_viz."""
    shape = (1, length, setting.heads, vocabulary)
    steps = [
        functools.partial(_peak, "forward+backward", provider, shape, setting)
        for provider in ("eager", "fused")
    ]
    record_history(file, steps, setting.device)


def _case(direction: str, provider: str, shape: Shape, setting: LinearSetting) -> dict[str, Any]:
    linear = plan_of(shape, setting.dim, setting.dtype, setting.chunk_bytes)
    dtype = str(setting.dtype).removeprefix("torch.")
    gradients = gradient_bytes(Case("", shape, dtype, direction, provider, dim=setting.dim))
    summed = direction == "forward+backward" and linear.sum_dtype != setting.dtype
    case: dict[str, Any] = {
        "length": shape[1],
        "vocabulary": shape[3],
        "direction": direction,
        "provider": provider,
        "gradient_bytes": gradients,
        "sum_bytes": linear.weight.numel() * linear.sum_dtype.itemsize if summed else 0,
        "chunk_bytes": linear.most_chunk_bytes,
    }
    run, derived = True, None
    if setting.device == "cpu":
        room = available_bytes() - SPARE
        room -= (linear.hidden.numel() + linear.weight.numel()) * setting.dtype.itemsize
        if provider == "fused":
            run = gradients + case["sum_bytes"] + allowed_bytes(case["chunk_bytes"]) <= room
        else:
            run, derived = _eager_fits(direction, provider, shape, setting, room)
    measure = functools.partial(_peak, direction, provider, shape, setting)
    peak = if_it_fits(measure, setting.device) if run else None
    return {**case, "run": run, "peak_bytes": peak, "derived_bytes": derived}


def _eager_fits(
    direction: str, provider: str, shape: Shape, setting: LinearSetting, room: int
) -> tuple[bool, int | None]:
    """Whether it does, and at least what it takes, by the same with two smaller V.

    All that is held at one moment grows evenly with V; a peak, the most of all moments, grows so
    or, where another moment becomes the largest, faster.
    """
    few, more = (factor * setting.dim for factor in SMALL)
    if _at_most(min(shape[3], more), shape, setting.dim) > room:
        return False, None
    if shape[3] <= more:
        return True, None
    # Without oneDNN, which holds a copy of its own for some V and for larger ones none.
    with torch.backends.mkldnn.flags(enabled=False):
        least, most = (
            _peak(direction, provider, (*shape[:3], vocabulary), setting)
            for vocabulary in (few, more)
        )
    derived = least + (most - least) * (shape[3] - few) // (more - few)
    return MARGIN * derived <= room, derived


def _at_most(vocabulary: int, shape: Shape, dim: int) -> int:
    """Three float32 copies of the logits and of the weight are all that eager torch has held."""
    rows = torch.Size(shape[:3]).numel()
    return 4 * torch.float32.itemsize * vocabulary * (rows + dim)


def _peak(direction: str, provider: str, shape: Shape, setting: LinearSetting) -> int:
    return linear_peak_bytes(
        *(provider, direction, shape, setting.dim, setting.dtype, setting.device),
        chunk_bytes=setting.chunk_bytes,
        backend=setting.backend,
    )


def _cell(case: dict[str, Any]) -> str:
    scratch = scratch_bytes(case)
    if case["peak_bytes"] is not None:
        return _mebi(scratch)
    return "does\nnot fit" if scratch is None else f"does\nnot fit\n>= {_mebi(scratch)}"


def _mebi(count: int | None) -> str:
    return "" if count is None else f"{count / MEBI:.1f}"


def linear_caption(results: dict[str, Any]) -> str:
    """What the table's words mean, and what did not fit."""
    lines = [
        "frozen: no gradient of the weight; its chunk: fused without the float32 sum of a 16-bit "
        "weight's gradient, which itself is not there yet while there are chunks; allowed: 1.25 "
        "chunk_bytes + 8 MiB",
    ]
    unfit = [case for case in results["cases"] if case["peak_bytes"] is None]
    if any(case["run"] for case in unfit):
        lines.append(f"does not fit: ran out of {results['device']} memory")
    if any(not case["run"] for case in unfit):
        few, more = (factor * results["dim"] for factor in SMALL)
        lines.append(
            f"does not fit: not run, of {results['free_bytes'] / GIBI:.1f} GiB free "
            f"{SPARE / GIBI:.1f} are spared; >=: derived, the line through the peaks of the "
            f"same case at V = {few} and {more}"
        )
    return "\n".join(lines)
