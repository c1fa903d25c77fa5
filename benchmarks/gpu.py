"""Everything that a GPU can settle, in one command of at most eight minutes.

    python3 -m benchmarks.gpu --out DIR [--cubins FOLDER] [--steps NAME[,NAME]]     # see `make gpu`

Steps, each in processes of its own with a time limit; one that fails or is cut off does not stop
the others, and the exit status is 1 then:

    occupancy   rows in one or two CTAs an SM, or read twice: one minute          gpu.json .md
    compile     what the next steps launch, on all cores                          likewise
    tests       pytest -m gpu                                                     pytest.txt
    sanitizer   compute-sanitizer's memcheck and racecheck, a call of each tier   memcheck.txt ...
    speed       everyone at every shape, the most important first                 gpu.json .md .png
    linear      hidden states to loss and gradients, against peers and bare products      likewise
    tiers       each tier forced; with --cubins also where Triton is too old      likewise
    snapshot    every allocation of an eager and of a fused step                  memory.pickle

gpu.json and gpu.md are written after every step. What a step has timed is in STEP.jsonl until then,
a line a case: whatever ends the suite, nothing that was measured is lost.

Without a device it says what it would run, and with --out writes what is predicted: predicted.json
and predicted.md. It needs torch, Triton and pytest, and nothing that only the command `wmtp` needs.
"""

import argparse
import contextlib
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from wmtp.benchmarks import ROOT, cubins, gpu_peers, linear_providers
from wmtp.benchmarks.gpu_cases import Job, speed_jobs, tier_jobs
from wmtp.benchmarks.gpu_compile import (
    call_in_processes,
    compile_in_processes,
    compile_jobs,
    parts,
    processes,
)
from wmtp.benchmarks.gpu_linear import linear_jobs
from wmtp.benchmarks.gpu_occupancy import occupancy_jobs
from wmtp.benchmarks.gpu_processes import (
    WORKER,
    Record,
    read_records,
    run,
    run_jobs_in_processes,
)
from wmtp.benchmarks.gpu_report import compared, gpu_environment, plot, predicted_records, write
from wmtp.benchmarks.gpu_tests import run_tests
from wmtp.benchmarks.gpu_worker import (
    ONE_CALLS,
    first_line,
    new_record,
    one_call,
    run_jobs,
    snapshot,
)

# Seconds.
LIMITS = {
    "occupancy": 50, "compile": 40, "tests": 150, "sanitizer": 40,
    "speed": 90, "linear": 48, "tiers": 30, "snapshot": 30,
}  # fmt: skip
# The workers that compile, and whose jobs; the first leaves half of its step's time to these.
COMPILED = {"compile-occupancy": ("occupancy",), "compile": ("speed", "linear", "tiers")}
# What drivers and libraries try and do without is no error of a kernel's.
SANITIZERS = {"memcheck": ("--report-api-errors", "no"), "racecheck": ()}


class Step(NamedTuple):
    """How a step ended: "ok", "failed", "absent" or "not run"."""

    name: str
    outcome: str
    why: str = ""
    seconds: float | None = None


class Suite:
    """The steps, and what they found."""

    def __init__(
        self,
        results: dict[str, Any],
        out: Path,
        folder: Path | None,
        chosen: Collection[str] = tuple(LIMITS),
    ):
        self.out, self.folder, self.chosen = out, folder, chosen
        self.results = results
        self.steps = {
            name: [Step(name, "not run", "" if name in chosen else "not asked for")]
            for name in LIMITS
        }
        self.records: list[Record] = []
        self.compiled: list[Record] = []

    def run(self) -> int:
        """The chosen steps, in order; the exit status."""
        actions: dict[str, Callable[[float], list[Step]]] = {
            "occupancy": self.occupancy,
            "compile": self.compile,
            "tests": self.tests,
            "sanitizer": self.sanitizer,
            "speed": lambda seconds: self.jobs("speed", seconds),
            "linear": lambda seconds: self.jobs("linear", seconds),
            "tiers": lambda seconds: self.jobs("tiers", seconds),
            "snapshot": self.snapshot,
            "picture": self.picture,
        }
        for name, action in actions.items():
            if name not in (*self.chosen, "picture"):
                continue
            start = time.monotonic()
            self.steps[name] = [Step(name, "failed", "interrupted")]
            try:
                self.steps[name] = action(LIMITS.get(name, 0))
            except Exception as error:  # the suite's own, which costs this step alone
                self.steps[name] = [Step(name, "failed", first_line(error))]
            finally:
                seconds = time.monotonic() - start
                self.steps[name] = [step._replace(seconds=seconds) for step in self.steps[name]]
                self.write()
            for step in self.steps[name]:
                print(f"{step.name}: {step.outcome} {step.why}", flush=True)
        return int(any(step.outcome == "failed" for steps in self.steps.values() for step in steps))

    def write(self) -> None:
        """What was found up to now; the files that kept it until then have done their duty."""
        steps = [step._asdict() for found in self.steps.values() for step in found]
        found = {"steps": steps, "compiled": self.compiled, "cases": compared(self.records)}
        write({**self.results, **found}, self.out, "gpu")
        for name in LIMITS:
            self._file(name).unlink(missing_ok=True)

    def occupancy(self, seconds: float) -> list[Step]:
        deadline = time.monotonic() + seconds
        self._compile("compile-occupancy", seconds / 2)
        return self.jobs("occupancy", deadline - time.monotonic())

    def compile(self, seconds: float) -> list[Step]:
        start = time.monotonic()
        found = self._compile("compile", seconds)
        with tempfile.TemporaryDirectory() as scratch:
            left = seconds - (time.monotonic() - start)
            called = call_in_processes(max(left, 1.0), Path(scratch))
        self.compiled += called
        return [_counted("compile", found + called)]

    def tests(self, seconds: float) -> list[Step]:
        if not (ROOT / "tests").is_dir():
            return [Step("tests", "absent", "run this from the sources: tests are not installed")]
        passed, told = run_tests("tests", seconds, self.out / "pytest.txt", processes())
        return [Step("tests", "ok" if passed else "failed", told)]

    def sanitizer(self, seconds: float) -> list[Step]:
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            return [Step("sanitizer", "absent", "compute-sanitizer is not on PATH")]
        steps = []
        for name, options in SANITIZERS.items():
            command = [tool, "--tool", name, *options, "--error-exitcode", "1"]
            command += [*WORKER, "one-call"]
            limit = seconds / len(SANITIZERS)
            # Each tensor gets memory of its own, so that what lies beyond it is nobody's.
            own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            status = run(command, limit, self.out / f"{name}.txt", own)
            steps.append(_step(name, status, limit, f"{name}.txt"))
        return steps

    def jobs(self, name: str, seconds: float) -> list[Step]:
        jobs, file = all_jobs()[name], self._file(name)
        command = [*WORKER, name, *(["--cubins", str(self.folder)] if self.folder else [])]
        file.unlink(missing_ok=True)
        why = "interrupted"
        try:
            why = run_jobs_in_processes(
                command, file, len(jobs), seconds, lambda i, why: new_record(jobs[i], "failed", why)
            )
        finally:
            found = read_records(file)
            found += [new_record(job, "not run", why) for job in jobs[len(found) :]]
            self.records += found
        return [_counted(name, found)]

    def snapshot(self, seconds: float) -> list[Step]:
        file = self.out / "memory.pickle"
        status = run([*WORKER, "snapshot", "--records", str(file)], seconds)
        return [_step("snapshot", status, seconds, file.name)]

    def picture(self, _seconds: float) -> list[Step]:
        reason = plot(self.records, self.out / "gpu.png")
        return [Step("picture", "absent", reason)] if reason else []

    def _compile(self, name: str, seconds: float) -> list[Record]:
        with tempfile.TemporaryDirectory() as scratch:
            found = compile_in_processes(name, _to_compile(name), seconds, Path(scratch))
        self.compiled += found
        return found

    def _file(self, name: str) -> Path:
        return self.out / f"{name}.jsonl"


def all_jobs() -> dict[str, list[Job]]:
    """Of the steps that time something."""
    return {
        "occupancy": occupancy_jobs(),
        "speed": speed_jobs(gpu_peers.absent()),
        "linear": linear_jobs(linear_providers.absent(compiling=True)),
        "tiers": tier_jobs(),
    }


def plan(chosen: Collection[str] = tuple(LIMITS)) -> list[str]:
    """What would be run, a line a step."""
    counts = {name: f"{len(jobs)} cases" for name, jobs in all_jobs().items()}
    ours = sum(map(len, parts(_to_compile("compile"), processes())))
    counts |= {
        "compile": f"{ours} kinds of call in {processes()} processes",
        "tests": f"pytest -m gpu in {processes()} processes",
        "sanitizer": f"{' and '.join(SANITIZERS)} on a call of each tier",
        "snapshot": "memory of an eager and of a fused step",
    }
    return [
        f"{name:10} {counts[name]}, at most {LIMITS[name]} s" for name in LIMITS if name in chosen
    ]


def absent(folder: Path | None) -> dict[str, str]:
    """Who and what is not here, and why."""
    missing = linear_providers.absent(compiling=True) | gpu_peers.absent()
    if reason := cubins.unavailable(folder):
        missing["cubins"] = reason
    return missing


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 where a step failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--cubins", type=Path, help="of python -m benchmarks.static_gpu --cubins")
    parser.add_argument(
        "--steps", type=_steps, default=tuple(LIMITS), help="some of them alone, by commas"
    )
    for name in ("--worker", "--first", "--seconds", "--records", "--part"):  # of a step's process
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    folder = options.cubins.resolve() if options.cubins else None
    if options.worker:
        return work(options, folder)
    print("\n".join(plan(options.steps)))
    missing = absent(folder)
    print("\n".join(f"absent: {who}, {why}" for who, why in missing.items()))
    given = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python -m benchmarks.gpu", *given])
    results: dict[str, Any] = {"command": command, "environment": gpu_environment()}
    results["absent"] = missing
    if not torch.cuda.is_available():
        print("no CUDA device")
        if options.out:
            steps = [Step(name, "not run", "no CUDA device")._asdict() for name in LIMITS]
            jobs = [job for jobs in all_jobs().values() for job in jobs]
            results |= {"steps": steps, "cases": predicted_records(jobs)}
            write(results, options.out, "predicted")
        return 0
    if options.out is None:
        parser.error("there is a CUDA device: say where the results go, --out DIR")
    return settle(results, options.out.resolve(), folder, options.steps)


def settle(
    results: dict[str, Any],
    out: Path,
    folder: Path | None,
    chosen: Collection[str] = tuple(LIMITS),
) -> int:
    """Run the suite and write all of it; the exit status."""
    out.mkdir(parents=True, exist_ok=True)
    # As an exception, so that what was found is written and what runs is ended.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    status = Suite(results, out, folder, chosen).run()
    print(f"{out / 'gpu.md'}")
    return status


def work(options: argparse.Namespace, folder: Path | None) -> int:
    """What a process of a step does."""
    number, count = map(int, (options.part or "0/1").split("/"))
    if options.worker == "one-call":
        return one_call(ONE_CALLS[number::count])
    records = Path(options.records)
    if options.worker == "snapshot":
        return snapshot(records)
    first, seconds = int(options.first), float(options.seconds)
    if options.worker in COMPILED:
        mine = parts(_to_compile(options.worker), count)[number]
        return compile_jobs(mine, first, seconds, records)
    with contextlib.ExitStack() as stack:
        if options.worker in ("occupancy", "tiers") and folder and not cubins.unavailable(folder):
            stack.enter_context(cubins.installed(folder, clusters_only=options.worker != "tiers"))
        return run_jobs(all_jobs()[options.worker], first, seconds, records)


def _steps(given: str) -> tuple[str, ...]:
    """Those of --steps.

    >>> _steps("speed,tests")
    ('speed', 'tests')
    """
    names = tuple(given.split(","))
    if unknown := [name for name in names if name not in LIMITS]:
        raise argparse.ArgumentTypeError(f"no step {unknown[0]!r}: {', '.join(LIMITS)}")
    return names


def _to_compile(worker: str) -> list[Job]:
    jobs = all_jobs()
    return [job for name in COMPILED[worker] for job in jobs[name]]


def _counted(name: str, records: list[Record]) -> Step:
    counts = Counter(record["outcome"] for record in records)
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    return Step(name, "failed" if counts["failed"] else "ok", told)


def _step(name: str, status: int | None, seconds: float, file: str) -> Step:
    if status is None:
        return Step(name, "failed", f"cut off after {seconds:.0f} s, see {file}")
    return Step(name, "failed" if status else "ok", f"exit status {status}, see {file}")


if __name__ == "__main__":
    sys.exit(main())
