"""What a step of the GPU suite does in a process of its own: it can fail or be cut off alone.

`run_cases` writes a line of JSON a case, in order: whoever started the process sees from their
number where it ended, and starts another for the rest.
"""

import contextlib
import functools
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from wmtp.benchmarks.gpu_cases import TIERS, launch_of
from wmtp.benchmarks.memory import MEBI
from wmtp.benchmarks.problem import Case, Problem, Record, case_of
from wmtp.benchmarks.providers import OURS
from wmtp.benchmarks.timing import Bench, Timer

AGAIN = 75  # exit status: a case failed, the next one needs a new process
CASE_SECONDS = 60  # a case that takes longer hangs
CHECKED_ROWS = 2**12  # outputs are compared at this size where the timed one is larger
FEWEST_TOKENS = 8  # some of which have a target for every head
VARIABLE = "WMTP_TRITON_TIER"
# A small call of each tier; the last rows are long: programs of many threads, online.
ONE_CALLS = [(vocabulary, tier) for vocabulary in (1000, 10007, 50257) for tier in TIERS]


def run_cases(
    cases: list[Case],
    first: int,
    seconds: float,
    records: Path,
    record_of: Callable[[Case], Record],
    show: Callable[[str], None] = print,  # its environment lets no line wait
) -> int:
    """Append the records of cases[first:], one by one; returns the exit status."""
    deadline, cut_off = time.monotonic() + seconds, []

    def interrupt(*_: Any) -> None:
        cut_off.append(True)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    for number, case in enumerate(cases[first:], first):
        if time.monotonic() > deadline:
            return 0
        # Its default action ends the process, also out of a call that never returns.
        signal.alarm(CASE_SECONDS)
        record = record_of(case)
        signal.alarm(0)
        if cut_off:  # some compilers make an error of their own of it, which is not the case's
            return 0
        with records.open("a") as file:
            file.write(json.dumps(record) + "\n")
        told = f"{record['outcome']}: {record['why']}"
        told = f"{record['median_ms']:.4f} ms" if "median_ms" in record else told
        show(f"{number + 1}/{len(cases)} {case_of(record)} {told}")
        if record["outcome"] == "failed" or not device_answers():
            return AGAIN
    return 0


def new_record(case: Case, outcome: str, why: str = "", **measured: Any) -> Record:
    """One row of the results. Outcomes: ok, does not fit, refused (it says that it cannot), failed,
    not run."""
    return {**case._asdict(), "outcome": outcome, "why": why, **measured}


def device_answers() -> bool:
    """Whether the device still works; after an illegal access it does not, for this process."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def recorded(case: Case, measure: Callable[[Case], Record]) -> Record:
    """What was measured, or why not: others' errors are their answer, ours are failures."""
    try:
        return new_record(case, "ok", **measure(case))
    except torch.OutOfMemoryError:
        return new_record(case, "does not fit")
    except Exception as error:
        refused = case.provider not in OURS or (case.tier and isinstance(error, ValueError))
        return new_record(case, "refused" if refused else "failed", first_line(error))


def first_line(error: Exception) -> str:
    text = str(error).strip() or "(no message)"
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}"


# --- measure -------------------------------------------------------------------------------------


class Recorder:
    """Compares, counts and times one case after the other."""

    def __init__(self, timer: Timer, device: str = "cuda"):
        self._timer, self._bench = timer, Bench(device, CHECKED_ROWS)

    def record(self, case: Case) -> Record:
        record = recorded(case, self._measure)
        if record["outcome"] != "ok":
            self._bench.forget()
        return record

    def _measure(self, case: Case) -> Record:
        with forced_tier(case.tier):
            peak, _, found = self._bench.first_calls(case)
            ours = case.provider in OURS
            del found
            problem = self._bench.problem_of(case)
            call = problem.call(case.provider, case.direction, case.weighting)
            times = self._timer.time(call, problem.restore)
            chosen = {"tier": self._tier(case)} if ours and not case.dim else {}
            return {**times._asdict(), "peak_bytes": peak, **chosen}

    def _tier(self, case: Case) -> str:
        from wmtp.kernels import tiers

        return launch_of(case, tiers.machine(torch.device(self._bench.device))).tier


@contextlib.contextmanager
def forced_tier(tier: str) -> Iterator[None]:
    """WMTP_TRITON_TIER."""
    before = os.environ.get(VARIABLE, "")
    os.environ[VARIABLE] = tier
    try:
        yield
    finally:
        os.environ[VARIABLE] = before


# --- compile -------------------------------------------------------------------------------------
# The library is called as it will be, on as few tokens as select the same kernels, and what it
# launches is compiled into Triton's cache on disk and not run.


def parts(cases: Iterable[Case], count: int) -> list[list[Case]]:
    """Our cases for so many processes: in one those that share kernels, whatever their tokens are.

    The longest rows, which take longest, come first.
    """
    ours = {case[2:] + case.shape[2:]: case for case in cases if case.provider in OURS}
    ordered = sorted(ours.values(), key=_kernels_of)
    groups = [list(group) for _, group in itertools.groupby(ordered, _kernels_of)]
    return [list(itertools.chain(*groups[number::count])) for number in range(count)]


def _kernels_of(case: Case) -> tuple[int, int, str, int, str]:
    heads, vocabulary = case.shape[2:]
    return -vocabulary, -heads, case.dtype, case.dim, case.weighting


def compile_case(case: Case, device: str = "cuda") -> Record:
    return recorded(case, functools.partial(_compile, device=device))


def _compile(case: Case, device: str) -> Record:
    from wmtp.kernels import tiers

    start = time.monotonic()
    # With fewer tokens than SMs a row would be split between several, by other kernels.
    tokens = max(tiers.machine(torch.device(device)).processors, FEWEST_TOKENS)
    with compile_only() as binaries, forced_tier(case.tier):
        problem = Problem((1, tokens, *case.shape[2:]), case.torch_dtype, device, case.dim)
        problem.call(case.provider, case.direction, case.weighting)()
    return {"seconds": round(time.monotonic() - start, 2), "binaries": sorted(binaries)}


@contextlib.contextmanager
def compile_only() -> Iterator[set[str]]:
    """A launch ends before the device: Triton's own warm-up. Yields the binaries' hashes."""
    from triton.runtime.jit import JITFunction

    whole: Any = JITFunction.run
    binaries = set()

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = whole(self, *arguments, grid=grid, warmup=True, **options)
        binaries.add(kernel.hash)
        return kernel

    JITFunction.run = run
    try:
        yield binaries
    finally:
        JITFunction.run = whole


# --- single calls --------------------------------------------------------------------------------


def one_call(calls: list[tuple[int, str]] = ONE_CALLS, device: str = "cuda") -> int:
    """For compute-sanitizer, and before it, so that it meets compiled kernels."""
    for vocabulary, tier in calls:
        weighting, shape = "given" if tier == "row" else "ref_ce", (1, 8, 4, vocabulary)
        try:
            with forced_tier(tier):
                problem = Problem(shape, torch.bfloat16, device)
                problem.check("fused", "forward+backward", weighting)
                problem.check("fused_inplace", "inplace", weighting)
                linear = Problem(shape, torch.bfloat16, device, dim=16)
                linear.check("fused", "forward+backward", "uniform")
        except ValueError as error:
            print(f"{tier}, V = {vocabulary}: {error}")
        else:
            print(f"{tier}, V = {vocabulary}: ok")
    return 0


def snapshot(file: Path) -> int:
    """Every allocation of an eager and of a fused step, for pytorch.org/memory_viz."""
    problem = Problem((1, 1024, 4, 32000), torch.bfloat16, "cuda")
    problem.call("fused", "forward+backward")()  # what is allocated once
    torch.cuda.memory._record_memory_history(max_entries=100_000)
    for provider in ("eager", "fused"):
        problem.call(provider, "forward+backward")()
    torch.cuda.synchronize()
    torch.cuda.memory._dump_snapshot(str(file))
    torch.cuda.memory._record_memory_history(enabled=None)
    print(f"{file}: {file.stat().st_size / MEBI:.1f} MiB", file=sys.stderr)
    return 0
