"""Peak memory of the losses over the vocabulary: the sweep of `wmtp profile`, table, snapshot.

Whether a case fits is found out on CUDA by running it. A CPU process that takes too much is killed
by the system, so there it is decided beforehand, from the same case at a few elements.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from wmtp.benchmarks.memory import available_bytes, loss_peak_bytes
from wmtp.benchmarks.problem import Shape
from wmtp.benchmarks.providers import DIRECTIONS, absent

if TYPE_CHECKING:
    from rich.table import Table

PROFILED = ("eager", "eager_float", "compiled", "fused", "fused_inplace")
SNAPSHOT = (("forward+backward", "eager"), ("forward+backward", "fused"))
SPARE = 2**29  # bytes left to the rest of the machine, torch.compile's compiler among it
MARGIN = 1.1  # over what the small case says
MEBI, GIBI = 2**20, 2**30

Contest = tuple[str, str]  # direction, provider


class Setting(NamedTuple):
    """What all vocabularies have in common."""

    length: int
    heads: int
    dtype: torch.dtype
    device: str
    backend: str  # of the fused losses

    def shape(self, vocabulary: int) -> Shape:
        return 1, self.length, self.heads, vocabulary


def profile_losses(
    vocabularies: list[int],
    setting: Setting,
    show: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Peak bytes of every provider, direction and vocabulary, beyond the logits; ready for JSON.

    Args:
        show: is given the same of each vocabulary alone, when it is measured.
    """
    per_element, left_out = _small_cases(setting)
    free = available_bytes() if setting.device == "cpu" else None
    results = {
        **setting._asdict(),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "free_bytes": free,
        "absent": left_out,
        "cases": [],
    }
    for vocabulary in vocabularies:
        contests = per_element.items()
        cases = [_case(vocabulary, contest, setting, each) for contest, each in contests]
        show({**results, "cases": cases})
        results["cases"] += cases
    return results


def needed_bytes(setting: Setting, vocabulary: int, per_element: float) -> int:
    """At most what a case takes on the CPU, the two copies of its logits included.

    A peak is a constant, something for each row of the logits and something for each element:
    scaled by the elements it is too high, if anything. A row of float32 a thread is the kernel's
    scratch, of which a small case, on one thread, shows less.
    """
    elements = torch.Size(setting.shape(vocabulary)).numel()
    scratch = torch.get_num_threads() * vocabulary * torch.float32.itemsize
    return int(elements * (2 * setting.dtype.itemsize + MARGIN * per_element)) + scratch


def profile_table(results: dict[str, Any], first: bool = True) -> Table:
    """A section for each vocabulary, in units of the logits; the first one has the headings."""
    title = (
        f"peak memory beyond the logits [1, {results['length']}, {results['heads']}, V], "
        f"{results['dtype']}, {results['device']}, backend {results['backend']}"
    )
    table = sections(title, ("V", *PROFILED), first)
    cases = {
        (case["vocabulary"], case["direction"], case["provider"]): case for case in results["cases"]
    }
    for vocabulary in dict.fromkeys(case["vocabulary"] for case in results["cases"]):
        size = cases[vocabulary, "forward", "eager"]["logits_bytes"]
        table.add_row(f"{vocabulary}: {size / MEBI:.1f} MiB")
        for direction in DIRECTIONS:
            cells = [_cell(cases.get((vocabulary, direction, name))) for name in PROFILED]
            table.add_row(f"  {direction}", *cells)
        table.add_section()
    return table


def sections(title: str, columns: Sequence[str], first: bool) -> Table:
    """A table that is printed section by section, all of the same widths."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=title if first else None,
        show_header=first,
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    table.add_column(columns[0], no_wrap=True, min_width=len("  forward+backward"))
    for name in columns[1:]:
        table.add_column(name, justify="right", min_width=max(7, len(name)))
    return table


def write_snapshot(file: Path, vocabulary: int, setting: Setting) -> None:
    """CUDA's memory history of an eager and a fused step, for pytorch.org/memory_viz."""
    shape = setting.shape(vocabulary)
    steps = [functools.partial(_peak, *contest, shape, setting) for contest in SNAPSHOT]
    record_history(file, steps, setting.device)


def record_history(file: Path, steps: Iterable[Callable[[], int]], device: str) -> None:
    """What CUDA's allocator did in these steps; one that does not fit is cut short."""
    torch.cuda.memory._record_memory_history()
    try:
        for step in steps:
            if_it_fits(step, device)
        torch.cuda.memory._dump_snapshot(str(file))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def _small_cases(setting: Setting) -> tuple[dict[Contest, float], dict[str, str]]:
    """Peak bytes per element at a few elements, by what can run here; what cannot, and why.

    torch.compile decides by the shape what it materialises, so it is charged with no less than the
    loss that materialises everything.
    """
    reason = absent(compiling=True).get("compiled")
    left_out = {} if reason is None else {"compiled": reason}
    shape = (1, min(setting.length, 32), setting.heads, 1024)
    per_element = {}
    for direction, contestants in DIRECTIONS.items():
        for provider in PROFILED:
            if provider not in contestants or provider in left_out:
                continue
            try:
                peak = _peak(direction, provider, shape, setting)
            except RuntimeError as error:
                if provider != "compiled":
                    raise
                left_out[provider] = f"torch.compile fails: {str(error).strip().splitlines()[0]}"
                continue
            per_element[direction, provider] = peak / torch.Size(shape).numel()
            if provider == "compiled":
                most = per_element[direction, "eager_float"]
                per_element[direction, provider] = max(per_element[direction, provider], most)
    return per_element, left_out


def _case(
    vocabulary: int, contest: Contest, setting: Setting, per_element: float
) -> dict[str, Any]:
    shape = setting.shape(vocabulary)
    needed = needed_bytes(setting, vocabulary, per_element) if setting.device == "cpu" else None
    run = needed is None or needed <= available_bytes() - SPARE
    return {
        "vocabulary": vocabulary,
        "direction": contest[0],
        "provider": contest[1],
        "logits_bytes": torch.Size(shape).numel() * setting.dtype.itemsize,
        "needed_bytes": needed,
        "run": run,
        "peak_bytes": if_it_fits(lambda: _peak(*contest, shape, setting), setting.device)
        if run
        else None,
    }


def if_it_fits(measure: Callable[[], int], device: str) -> int | None:
    """The peak bytes measured; None where memory ran out."""
    try:
        return measure()
    except RuntimeError as error:
        if not _ran_out_of_memory(error):
            raise
    gc.collect()  # only here are the frames gone that held its tensors
    if device == "cuda":
        torch.cuda.empty_cache()
    return None


def _ran_out_of_memory(error: RuntimeError) -> bool:
    # The CPU's allocator raises a plain RuntimeError, and so may torch.compile while it compiles.
    said = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "out of memory" in said
        or "can't allocate memory" in said
    )


def _peak(direction: str, provider: str, shape: Shape, setting: Setting) -> int:
    return loss_peak_bytes(
        provider, direction, shape, setting.dtype, setting.device, setting.backend
    )


def _cell(case: dict[str, Any] | None) -> str:
    if case is None:
        return ""
    if case["peak_bytes"] is None:
        return "does\nnot fit"
    return f"{case['peak_bytes'] / case['logits_bytes']:.3f}"


def profile_caption(results: dict[str, Any]) -> str:
    """What the table's words mean, and what was left out."""
    lines = ["in units of the logits; forward: without gradient"]
    lines += [f"absent: {name}, {why}" for name, why in results["absent"].items()]
    unfit = [case for case in results["cases"] if case["peak_bytes"] is None]
    if any(case["run"] for case in unfit):
        lines.append(f"does not fit: ran out of {results['device']} memory")
    if not_run := [case["needed_bytes"] / GIBI for case in unfit if not case["run"]]:
        lines.append(
            f"does not fit: not run. A small case's peak (for compiled at least eager_float's), "
            f"scaled up and a tenth more, and two copies of the logits come to {min(not_run):.1f} "
            f"GiB and more, of {results['free_bytes'] / GIBI:.1f} GiB free, {SPARE / GIBI:.1f} of "
            "them spared"
        )
    return "\n".join(lines)
