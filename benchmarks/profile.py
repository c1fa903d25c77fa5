"""The sweeps of `wmtp profile`: peak memory over vocabularies and lengths.

Whether a case fits is found out on CUDA by running it. A CPU process that takes too much is killed
by the system, so there it is foreseen, from smaller cases.

Of logits what is counted is beyond these. Of hidden states and unembedding it is beyond both and
their gradients, and the library's own figure is given once more without the float32 sum that a
16-bit weight's gradient is made in: what is left is a chunk, which neither V nor S makes larger.
"""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from wmtp.benchmarks.memory import MEBI, available_bytes, loss_peak_bytes
from wmtp.benchmarks.problem import Case, Record, plan_of
from wmtp.benchmarks.providers import DIRECTIONS, FLOORS, LOGITS, absent

if TYPE_CHECKING:
    from rich.table import Table

PROFILED = ("eager", "eager_float", "compiled", "fused", "fused_inplace")
LINEAR_PROFILED = ("eager", "eager_float", "fused")
FEW = (8, 16)  # vocabularies, in units of D, from which a linear case that does not fit is derived
SPARE = 2**29  # bytes left to the rest of the machine, torch.compile's compiler among it
MARGIN = 1.1  # over what smaller cases say
GIBI = 2**30


# --- the sweeps ----------------------------------------------------------------------------------


class Setting(NamedTuple):
    """What all cases have in common."""

    heads: int
    dtype: torch.dtype
    device: str
    backend: str  # of the fused losses
    dim: int = 0  # D; 0: logits are given
    chunk_bytes: int | None = None  # None: the library's choice

    def case(self, size: tuple[int, int], direction: str, provider: str) -> Case:
        """Of S and V."""
        shape = (1, size[0], self.heads, size[1])
        dtype = str(self.dtype).removeprefix("torch.")
        return Case("memory", shape, dtype, direction, provider, dim=self.dim)

    def peak(self, case: Case) -> int:
        options: Record = {"chunk_bytes": self.chunk_bytes} if self.dim else {}
        return loss_peak_bytes(
            *(case.provider, case.direction, case.shape, self.dtype, self.device, self.dim),
            backend=self.backend,
            **options,
        )


def sweep(vocabularies: list[int], lengths: list[int]) -> list[tuple[int, int]]:
    """(S, V): every V at the first S, then every S at the first V.

    >>> sweep([32000, 128256], [128, 2048])
    [(128, 32000), (128, 128256), (2048, 32000)]
    """
    over_vocabulary = [(lengths[0], vocabulary) for vocabulary in vocabularies]
    return over_vocabulary + [(length, vocabularies[0]) for length in lengths[1:]]


def profile(
    sizes: list[tuple[int, int]], setting: Setting, show: Callable[[Record], None] = lambda _: None
) -> Record:
    """Peak bytes of every provider and direction at every (S, V); ready for JSON.

    Args:
        show: is given the same of each size alone, when it is measured.
    """
    contests, left_out = _contests(sizes[0][0], setting)
    results = {
        **setting._asdict(),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "free_bytes": available_bytes() if setting.device == "cpu" else None,
        "absent": left_out,
        "cases": [],
    }
    for size in sizes:
        cases = [
            _record(setting.case(size, *contest), setting, per_element)
            for contest, per_element in contests.items()
        ]
        show({**results, "cases": cases})
        results["cases"] += cases
    return results


def _contests(length: int, setting: Setting) -> tuple[dict[tuple[str, str], float], dict[str, str]]:
    """(direction, provider), each with its bytes per element at a few elements of logits, of what
    can run here; what cannot, and why.

    torch.compile decides by the shape what it materialises, so it is charged with no less than the
    loss that materialises everything.
    """
    if setting.dim:
        return {(way, name): 0.0 for way in FLOORS for name in LINEAR_PROFILED}, {}
    why = absent(LOGITS).get("compiled")
    left_out = {"compiled": why} if why else {}
    per_element = {}
    for direction, contestants in DIRECTIONS.items():
        for provider in PROFILED:
            if provider not in contestants or provider in left_out:
                continue
            case = setting.case((min(length, 32), 1024), direction, provider)
            try:
                per_element[direction, provider] = setting.peak(case) / math.prod(case.shape)
            except RuntimeError as error:
                if provider != "compiled":
                    raise
                left_out[provider] = f"torch.compile fails: {str(error).strip().splitlines()[0]}"
                continue
            if provider == "compiled":
                most = per_element[direction, "eager_float"]
                per_element[direction, provider] = max(per_element[direction, provider], most)
    return per_element, left_out


def _record(case: Case, setting: Setting, per_element: float) -> Record:
    record: Record = {
        "length": case.shape[1],
        "vocabulary": case.shape[3],
        "direction": case.direction,
        "provider": case.provider,
        "logits_bytes": case.logits_bytes(),
    }
    if setting.dim:
        record |= _of_chunks(case, setting)
    run, foreseen = True, None
    if setting.device == "cpu" and setting.dim:
        run, foreseen = _linear_fits(case, setting, record)
    elif setting.device == "cpu":
        foreseen = needed_bytes(case, per_element)
        run = foreseen <= available_bytes() - SPARE
    record["derived_bytes" if setting.dim else "needed_bytes"] = foreseen
    peak = if_it_fits(lambda: setting.peak(case), setting.device) if run else None
    return {**record, "run": run, "peak_bytes": peak}


def _of_chunks(case: Case, setting: Setting) -> Record:
    linear = plan_of(case.shape, setting.dim, setting.dtype, setting.chunk_bytes)
    summed = case.direction == "forward+backward" and linear.sum_dtype != setting.dtype
    return {
        "gradient_bytes": case.gradient_bytes(),
        "sum_bytes": linear.weight.numel() * linear.sum_dtype.itemsize if summed else 0,
        "chunk_bytes": linear.most_chunk_bytes,
    }


def needed_bytes(case: Case, per_element: float) -> int:
    """At most what a loss of logits takes on the CPU, the two copies of these included.

    A peak is a constant, something for each row of the logits and something for each element:
    scaled by the elements it is too high, if anything. A row of float32 a thread is the kernel's
    scratch, of which a small case, on one thread, shows less.
    """
    scratch = torch.get_num_threads() * case.shape[3] * torch.float32.itemsize
    return int(2 * case.logits_bytes() + MARGIN * per_element * math.prod(case.shape)) + scratch


def _linear_fits(case: Case, setting: Setting, record: Record) -> tuple[bool, int | None]:
    """Whether it does, and of eager torch at least what it takes, by the same with two smaller V.

    All that is held at one moment grows evenly with V; a peak, the most of all moments, grows so
    or, where another moment becomes the largest, faster.
    """
    rows, vocabulary = math.prod(case.shape[:3]), case.shape[3]
    inputs = (rows + vocabulary) * setting.dim * setting.dtype.itemsize
    room = available_bytes() - SPARE - inputs
    if case.provider == "fused":
        most = allowed_bytes(record["chunk_bytes"])
        return record["gradient_bytes"] + record["sum_bytes"] + most <= room, None
    few, more = (factor * setting.dim for factor in FEW)
    # Three float32 copies of the logits and of the weight are all that eager torch has held.
    if 4 * torch.float32.itemsize * min(vocabulary, more) * (rows + setting.dim) > room:
        return False, None
    if vocabulary <= more:
        return True, None
    # Without oneDNN, which holds a copy of its own for some V and for larger ones none.
    with torch.backends.mkldnn.flags(enabled=False):
        least, most = (
            setting.peak(case._replace(shape=(*case.shape[:3], size))) for size in (few, more)
        )
    derived = least + (most - least) * (vocabulary - few) // (more - few)
    return MARGIN * derived <= room, derived


def if_it_fits(measure: Callable[[], int], device: str) -> int | None:
    """The peak bytes measured; None where memory ran out."""
    try:
        return measure()
    except RuntimeError as error:
        # The CPU's allocator raises a plain RuntimeError, as torch.compile may while it compiles.
        said = str(error)
        if not (
            isinstance(error, torch.OutOfMemoryError)
            or "out of memory" in said
            or "can't allocate memory" in said
        ):
            raise
    gc.collect()  # only here are the frames gone that held its tensors
    if device == "cuda":
        torch.cuda.empty_cache()
    return None


def write_snapshot(file: Path, size: tuple[int, int], setting: Setting) -> None:
    """CUDA's memory history of an eager and a fused step, for pytorch.org/memory_viz; one that does
    not fit is cut short."""
    torch.cuda.memory._record_memory_history()
    try:
        for provider in ("eager", "fused"):
            case = setting.case(size, "forward+backward", provider)
            if_it_fits(functools.partial(setting.peak, case), setting.device)
        torch.cuda.memory._dump_snapshot(str(file))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


# --- what is said of them ------------------------------------------------------------------------


def scratch_bytes(record: Record) -> int | None:
    """Beyond hidden states, weight and their gradients; at least so much, if only derived."""
    peak = record["derived_bytes"] if record["peak_bytes"] is None else record["peak_bytes"]
    return None if peak is None else peak - record["gradient_bytes"]


def chunk_scratch_bytes(record: Record) -> int | None:
    """The same of the fused loss without the sum of the weight's gradient."""
    scratch = scratch_bytes(record)
    return None if scratch is None else scratch - record["sum_bytes"]


def allowed_bytes(chunk_bytes: int) -> int:
    """What `chunk_scratch_bytes` may be: a chunk, a quarter more, and 8 MiB."""
    return chunk_bytes + chunk_bytes // 4 + 8 * MEBI


def table(results: Record, first: bool = True) -> Table:
    """A section for each size; the first one has the headings, all are of the same widths."""
    from rich import box
    from rich.table import Table

    dim, (title, *columns) = results["dim"], _headings(results)
    found = Table(
        title=title if first else None, show_header=first, box=box.SIMPLE, padding=(0, 1, 0, 0)
    )
    found.add_column(columns[0], no_wrap=True, min_width=len("  forward+backward"))
    for name in columns[1:]:
        found.add_column(name, justify="right", min_width=max(7, len(name)))
    by_size: dict[tuple[int, int], list[Record]] = {}
    for record in results["cases"]:
        by_size.setdefault((record["length"], record["vocabulary"]), []).append(record)
    for (length, vocabulary), records in by_size.items():
        logits = f"{vocabulary}: {records[0]['logits_bytes'] / MEBI:.1f} MiB"
        found.add_row(f"{length}, {vocabulary}" if dim else logits)
        for direction in FLOORS if dim else DIRECTIONS:
            of = {one["provider"]: one for one in records if one["direction"] == direction}
            found.add_row(f"  {direction}", *(_linear_cells(of) if dim else _cells(of)))
        found.add_section()
    return found


def _headings(results: Record) -> list[str]:
    """The title, and the columns'."""
    dim, heads, length = results["dim"], results["heads"], results["cases"][0]["length"]
    what = f"{results['dtype']}, {results['device']}, backend {results['backend']}"
    if not dim:
        return [f"peak memory beyond the logits [1, {length}, {heads}, V], {what}", "V", *PROFILED]
    title = "peak MiB beyond hidden states, weight and their gradients\n"
    title += f"[1, S, {heads}, {dim}] and [V, {dim}], {what}"
    return [title, "S, V", *LINEAR_PROFILED, "its chunk", "allowed"]


def _cells(records: dict[str, Record]) -> Iterator[str]:
    for name in PROFILED:
        record = records.get(name)
        if record is None:
            yield ""
        elif record["peak_bytes"] is None:
            yield "does\nnot fit"
        else:
            yield f"{record['peak_bytes'] / record['logits_bytes']:.3f}"


def _linear_cells(records: dict[str, Record]) -> Iterator[str]:
    for name in LINEAR_PROFILED:
        scratch = _mebi(scratch_bytes(records[name]))
        if records[name]["peak_bytes"] is not None:
            yield scratch
        else:
            yield f"does\nnot fit\n>= {scratch}" if scratch else "does\nnot fit"
    yield _mebi(chunk_scratch_bytes(records["fused"]))
    yield _mebi(allowed_bytes(records["fused"]["chunk_bytes"]))


def _mebi(count: int | None) -> str:
    return "" if count is None else f"{count / MEBI:.1f}"


def caption(results: Record) -> str:
    """What the table's words mean, what was left out, and what did not fit."""
    dim = results["dim"]
    lines = ["in units of the logits; forward: without gradient"]
    if dim:
        lines = [
            "frozen: no gradient of the weight; its chunk: fused without the float32 sum of a "
            "16-bit weight's gradient, which itself is not there yet while there are chunks; "
            "allowed: 1.25 chunk_bytes + 8 MiB"
        ]
    lines += [f"absent: {name}, {why}" for name, why in results["absent"].items()]
    unfit = [record for record in results["cases"] if record["peak_bytes"] is None]
    if any(record["run"] for record in unfit):
        lines.append(f"does not fit: ran out of {results['device']} memory")
    if not_run := [record for record in unfit if not record["run"]]:
        free, spare = f"{results['free_bytes'] / GIBI:.1f} GiB free", f"{SPARE / GIBI:.1f}"
        if dim:
            lines.append(
                f"does not fit: not run, of {free} {spare} are spared; >=: derived, the line "
                f"through the peaks of the same case at V = {FEW[0] * dim} and {FEW[1] * dim}"
            )
        else:
            least = min(record["needed_bytes"] for record in not_run) / GIBI
            lines.append(
                "does not fit: not run. A small case's peak (for compiled at least "
                "eager_float's), scaled up and a tenth more, and two copies of the logits come to "
                f"{least:.1f} GiB and more, of {free}, {spare} of them spared"
            )
    return "\n".join(lines)
