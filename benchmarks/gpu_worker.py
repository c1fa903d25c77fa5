"""What a step of the GPU suite does in a process of its own: it can fail or be cut off alone.

`run_jobs` writes a line of JSON a job, in order: whoever started the process sees from their number
where it ended, and starts another for the rest.
"""

import contextlib
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import wmtp
from wmtp.benchmarks import gpu_occupancy
from wmtp.benchmarks.gpu_cases import OURS, TIERS, Job, forced_as, launch_of
from wmtp.benchmarks.gpu_peers import PEERS, PeerProblem
from wmtp.benchmarks.gpu_timing import Timer
from wmtp.benchmarks.linear_problem import LinearProblem, new_problem
from wmtp.benchmarks.memory import peak_bytes
from wmtp.benchmarks.problem import TOLERANCE, Case, Problem, Shape, assert_close

AGAIN = 75  # exit status: a job failed, the next one needs a new process
JOB_SECONDS = 60  # a job that takes longer hangs
CHECKED_ROWS = 2**12  # outputs are compared at this size where the timed one is larger
MIB = 2**20
VARIABLE = "WMTP_TRITON_TIER"
# A small call of each tier: one CTA a program, then clusters.
ONE_CALLS = [(vocabulary, tier) for vocabulary in (1000, 10007) for tier in TIERS]


def run_jobs(jobs: list[Job], first: int, seconds: float, records: Path) -> int:
    """Measure jobs[first:] and append what was found; returns the exit status."""
    deadline = time.monotonic() + seconds
    bench, cut_off = Bench(Timer()), []

    def interrupt(*_: Any) -> None:
        cut_off.append(True)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    for number, job in enumerate(jobs[first:], first):
        if time.monotonic() > deadline:
            return 0
        # Its default action ends the process, also out of a call that never returns.
        signal.alarm(JOB_SECONDS)
        record = bench.record(job)
        signal.alarm(0)
        if cut_off:  # some compilers make an error of their own of it, which is not the case's
            return 0
        with records.open("a") as file:
            file.write(json.dumps(record) + "\n")
        told = forced_as(record["tier"], job.ctas_per_sm)
        print(f"{number + 1}/{len(jobs)} {job.case} {told} {summary(record)}", flush=True)
        if record["outcome"] == "failed" or not device_answers():
            return AGAIN
    return 0


def new_record(job: Job, outcome: str, why: str = "", **measured: Any) -> dict[str, Any]:
    """One row of the results."""
    case = {key: value for key, value in job.case._asdict().items() if key != "threads"}
    forced = {"tier": job.tier, "ctas_per_sm": job.ctas_per_sm}
    return {**case, **forced, "outcome": outcome, "why": why, **measured}


def summary(record: dict[str, Any]) -> str:
    if record["outcome"] == "ok":
        return f"{record['median_ms']:.4f} ms"
    return f"{record['outcome']}: {record['why']}"


def device_answers() -> bool:
    """Whether the device still works; after an illegal access it does not, for this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


class Bench:
    """Compares and times one job after the other, keeping the problem while it stays the same."""

    def __init__(self, timer: Timer, device: str = "cuda"):
        self._timer, self._device = timer, device
        self._checked: set[tuple[Any, ...]] = set()
        self._problem: tuple[tuple[Any, ...], Problem | LinearProblem] | None = None
        self._first: tuple[Shape, tuple[torch.Tensor, ...]] | None = None

    def record(self, job: Job) -> dict[str, Any]:
        """Outcomes: ok, does not fit, refused (it says that it cannot), failed."""
        try:
            with forced(job, self._device):
                measured = self._measure(job)
                return {**new_record(job, "ok"), **measured}
        except torch.OutOfMemoryError:
            outcome, why = "does not fit", ""
        except Exception as error:  # whatever others raise is their answer, ours is a failure
            refused = job.case.provider not in OURS or (job.tier and isinstance(error, ValueError))
            outcome, why = "refused" if refused else "failed", first_line(error)
        self._forget()
        return new_record(job, outcome, why)

    def _measure(self, job: Job) -> dict[str, Any]:
        case = job.case
        self._check(job)
        problem = self._problem_of(job, case.shape)
        call = problem.call(case.provider, case.direction)
        problem.restore()
        found = call()  # what is allocated once
        if case.study == gpu_occupancy.STUDY and case.provider in OURS:
            self._agree(case, found)
        del found
        problem.restore()
        peak = 0 if case.provider == "copy" else peak_bytes(call, self._device)
        times = self._timer.time(call, problem.restore)
        chosen = {"tier": self._tier(job)} if case.provider in OURS and not case.dim else {}
        return {**times._asdict(), "peak_bytes": peak, **chosen}

    def _check(self, job: Job) -> None:
        case = job.case
        batch, length, heads, vocabulary = case.shape
        shape = (batch, min(length, CHECKED_ROWS // heads), heads, vocabulary)
        key = (shape, *case[2:], job.tier)
        if key not in self._checked:
            problem = self._problem_of(job, shape)
            problem.check(case.provider, case.direction)
            problem.forget_truth()
            self._checked.add(key)

    def _agree(self, case: Case, found: tuple[torch.Tensor, ...]) -> None:
        """At the timed size as well: the kernels of one problem, with the first of them."""
        if self._first is None or self._first[0] != case.shape:
            self._first = case.shape, found
            return
        tolerance = TOLERANCE[found[1].dtype]
        for name, got, want in zip(("loss", "gradient"), found, self._first[1], strict=True):
            assert_close(name, case.provider, got, want.float(), tolerance, "the first tier")

    def _problem_of(self, job: Job, shape: Shape) -> Problem | LinearProblem:
        case = job.case
        peer = case.provider if case.provider in PEERS and not case.dim else ""
        weighting = "uniform" if case.dim else case.weighting  # a linear problem has all of them
        key = (shape, case.dtype, weighting, peer, case.dim)
        if self._problem is None or self._problem[0] != key:
            self._forget()  # before there are two
            torch._dynamo.reset()  # each shape is compiled for itself
            if peer:
                dtype = getattr(torch, case.dtype)
                problem: Problem | LinearProblem = PeerProblem(peer, shape, dtype, self._device)
            else:
                problem = new_problem(*key[:3], case.dim, self._device)
            self._problem = key, problem
        problem = self._problem[1]
        return problem if peer else problem.weighted(case.weighting)

    def _tier(self, job: Job) -> str:
        from wmtp.kernels import tiers

        if job.ctas_per_sm:
            return job.tier
        return launch_of(job, tiers.machine(torch.device(self._device))).tier

    def _forget(self) -> None:
        self._problem = self._first = None
        wmtp.release_memory()
        torch.cuda.empty_cache()


@contextlib.contextmanager
def forced(job: Job, device: str) -> Iterator[None]:
    """What the job says of tier and launch."""
    with forced_tier(job.tier), gpu_occupancy.forced_launch(job, device):
        yield


@contextlib.contextmanager
def forced_tier(tier: str) -> Iterator[None]:
    """WMTP_TRITON_TIER, and no silent way out: falling back to another tier is an error then."""
    before = os.environ.get(VARIABLE, "")
    os.environ[VARIABLE] = tier
    try:
        with warnings.catch_warnings():
            if tier:
                warnings.filterwarnings("error", "this device does not schedule", RuntimeWarning)
            yield
    finally:
        os.environ[VARIABLE] = before


def one_call(calls: list[tuple[int, str]] = ONE_CALLS, device: str = "cuda") -> int:
    """For compute-sanitizer, and before it, so that it meets compiled kernels."""
    for vocabulary, tier in calls:
        weighting = "given" if tier == "row" else "ref_ce"
        try:
            with forced_tier(tier):
                problem = Problem((1, 8, 4, vocabulary), torch.bfloat16, weighting, device)
                problem.check("fused", "forward+backward")
                problem.check("fused_inplace", "inplace")
                linear = LinearProblem((1, 8, 4, vocabulary), 16, torch.bfloat16, device)
                linear.check("fused", "forward+backward")
        except ValueError as error:
            print(f"{tier}, V = {vocabulary}: {error}")
        else:
            print(f"{tier}, V = {vocabulary}: ok")
    return 0


def snapshot(file: Path) -> int:
    """Every allocation of an eager and of a fused step, for pytorch.org/memory_viz."""
    problem = Problem((1, 1024, 4, 32000), torch.bfloat16, "given", "cuda")
    problem.call("fused", "forward+backward")()  # what is allocated once
    torch.cuda.memory._record_memory_history(max_entries=100_000)
    for provider in ("eager", "fused"):
        problem.call(provider, "forward+backward")()
    torch.cuda.synchronize()
    torch.cuda.memory._dump_snapshot(str(file))
    torch.cuda.memory._record_memory_history(enabled=None)
    print(f"{file}: {file.stat().st_size / MIB:.1f} MiB", file=sys.stderr)
    return 0


def first_line(error: Exception) -> str:
    text = str(error).strip() or "(no message)"
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}"
