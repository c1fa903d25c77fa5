"""Everything that a GPU can settle, in one command of at most eight minutes.

    python3 -m benchmarks.gpu --out DIR [--steps NAME[,NAME]]     # see `make gpu`

Steps, each in processes of its own with a time limit; one that fails or is cut off does not stop
the others, and the exit status is 1 then:

    compile     what the next steps launch, on all cores                          gpu.json .md
    tests       pytest -m gpu                                                     pytest.txt
    sanitizer   compute-sanitizer's memcheck and racecheck, a call of each tier   memcheck.txt ...
    speed       everyone at every shape, the most important first                 gpu.json .md .png
    linear      hidden states to loss and gradients, against peers and bare products      likewise
    tiers       each tier forced                                                  likewise
    snapshot    every allocation of an eager and of a fused step                  memory.pickle

gpu.json and gpu.md are written after every step. What a step has timed is in STEP.jsonl until then,
a line a case: whatever ends the suite, nothing that was measured is lost.

Without a device it says what it would run, and with --out writes what is predicted: predicted.json
and predicted.md. It needs torch, Triton and pytest, and nothing that only the command `wmtp` needs.
"""

import argparse
import functools
import itertools
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from wmtp.benchmarks import ROOT
from wmtp.benchmarks.gpu_cases import all_cases
from wmtp.benchmarks.gpu_processes import (
    WORKER,
    in_parallel,
    processes,
    run,
    run_in_processes,
    run_tests,
)
from wmtp.benchmarks.gpu_report import compared, gpu_environment, plot, predicted_records, write
from wmtp.benchmarks.gpu_worker import (
    ONE_CALLS,
    Recorder,
    compile_case,
    first_line,
    new_record,
    one_call,
    parts,
    run_cases,
    snapshot,
)
from wmtp.benchmarks.problem import Case, Record
from wmtp.benchmarks.providers import LINEAR, LOGITS, PEERS, UNCOMPILED
from wmtp.benchmarks.providers import absent as absent_providers
from wmtp.benchmarks.timing import Timer

# Seconds.
LIMITS = {
    "compile": 40, "tests": 150, "sanitizer": 40, "speed": 120, "linear": 60, "tiers": 30,
    "snapshot": 30,
}  # fmt: skip
STEPS = tuple(LIMITS)
# What drivers and libraries try and do without is no error of a kernel's.
SANITIZERS = {"memcheck": ("--report-api-errors", "no"), "racecheck": ()}


class Step(NamedTuple):
    """How a step ended: "ok", "failed", "absent" or "not run"."""

    name: str
    outcome: str
    why: str = ""
    seconds: float | None = None


class Suite:
    """The chosen steps, and what they found."""

    def __init__(
        self,
        results: dict[str, Any],
        out: Path,
        chosen: Collection[str] = STEPS,
    ):
        self.out, self.chosen, self.results = out, chosen, results
        why = {name: "" if name in chosen else "not asked for" for name in LIMITS}
        self.steps = {name: [Step(name, "not run", why[name])] for name in LIMITS}
        self.records: list[Record] = []
        self.compiled: list[Record] = []

    def run(self) -> int:
        """In order; the exit status."""
        for name in (*LIMITS, "picture"):
            if name not in (*self.chosen, "picture"):
                continue
            action = getattr(self, name, functools.partial(self.cases, name))
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
            (self.out / f"{name}.jsonl").unlink(missing_ok=True)

    def compile(self, seconds: float) -> list[Step]:
        deadline = time.monotonic() + seconds
        found = compile_in_processes(seconds)
        found += call_in_processes(max(deadline - time.monotonic(), 1.0))
        self.compiled += found
        return [_counted("compile", found)]

    def tests(self, seconds: float) -> list[Step]:
        if not (ROOT / "tests").is_dir():
            return [Step("tests", "absent", "run this from the sources: tests are not installed")]
        passed, told = run_tests("tests", seconds, self.out / "pytest.txt")
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

    def cases(self, name: str, seconds: float) -> list[Step]:
        command = [*WORKER, name]
        file, before = self.out / f"{name}.jsonl", len(self.records)
        run_in_processes(command, file, all_cases()[name], seconds, self.records)
        return [_counted(name, self.records[before:])]

    def snapshot(self, seconds: float) -> list[Step]:
        file = self.out / "memory.pickle"
        status = run([*WORKER, "snapshot", "--records", str(file)], seconds)
        return [_step("snapshot", status, seconds, file.name)]

    def picture(self, _seconds: float) -> list[Step]:
        reason = plot(self.records, self.out / "gpu.png")
        return [Step("picture", "absent", reason)] if reason else []


def compile_in_processes(seconds: float) -> list[Record]:
    """A record a case of those that are compiled, in no order."""
    shares = list(enumerate(filter(None, parts(_to_compile(), processes()))))

    def compile_share(share: tuple[int, list[Case]]) -> list[Record]:
        number, cases = share
        command = [*WORKER, "compile", "--part", f"{number}/{processes()}"]
        found: list[Record] = []
        run_in_processes(command, Path(scratch) / f"{number}.jsonl", cases, seconds, found)
        return found

    with tempfile.TemporaryDirectory() as scratch:
        return list(itertools.chain(*in_parallel(compile_share, shares, processes())))


def call_in_processes(seconds: float) -> list[Record]:
    """Run what compute-sanitizer will run, a process a call: it compiles, and is a sign of life."""

    def call(number: int) -> Record:
        vocabulary, tier = ONE_CALLS[number]
        output = Path(scratch) / f"call-{number}.txt"
        part = f"{number}/{len(ONE_CALLS)}"
        status = run([*WORKER, "one-call", "--part", part], seconds, output)
        last = (output.read_text().strip().splitlines() or [""])[-1][:200]
        why = "" if status == 0 else f"exit status {status}: {last}"
        case = Case("a call", (1, 8, 4, vocabulary), "bfloat16", "", "fused", tier=tier)
        return new_record(case, "failed" if why else "ok", why)

    with tempfile.TemporaryDirectory() as scratch:
        return in_parallel(call, range(len(ONE_CALLS)), processes())


def _to_compile() -> list[Case]:
    return list(itertools.chain(*all_cases().values()))


def _counted(name: str, records: list[Record]) -> Step:
    counts = Counter(record["outcome"] for record in records)
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    return Step(name, "failed" if counts["failed"] else "ok", told)


def _step(name: str, status: int | None, seconds: float, file: str) -> Step:
    if status is None:
        return Step(name, "failed", f"cut off after {seconds:.0f} s, see {file}")
    return Step(name, "failed" if status else "ok", f"exit status {status}, see {file}")


# --- the command ---------------------------------------------------------------------------------


def plan(chosen: Collection[str] = STEPS) -> list[str]:
    """What would be run, a line a step."""
    counts = {name: f"{len(cases)} cases" for name, cases in all_cases().items()}
    ours = sum(map(len, parts(_to_compile(), processes())))
    counts |= {
        "compile": f"{ours} kinds of call in {processes()} processes",
        "tests": f"pytest -m gpu in {processes()} processes",
        "sanitizer": f"{' and '.join(SANITIZERS)} on a call of each tier",
        "snapshot": "memory of an eager and of a fused step",
    }
    return [
        f"{name:10} {counts[name]}, at most {LIMITS[name]} s" for name in LIMITS if name in chosen
    ]


def absent() -> dict[str, str]:
    """Who and what is not here, and why."""
    missing = absent_providers(LINEAR) | absent_providers({**LOGITS, **PEERS})
    return {name: why for name, why in missing.items() if name not in UNCOMPILED}


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 where a step failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--steps", type=_steps, default=STEPS, help="some alone, by commas")
    for name in ("--worker", "--first", "--seconds", "--records", "--part"):  # of a step's process
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        return work(options)
    print("\n".join(plan(options.steps)))
    missing = absent()
    print("\n".join(f"absent: {who}, {why}" for who, why in missing.items()))
    given = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python -m benchmarks.gpu", *given])
    results: dict[str, Any] = {"command": command, "environment": gpu_environment()}
    results["absent"] = missing
    if not torch.cuda.is_available():
        print("no CUDA device")
        if options.out:
            steps = [Step(name, "not run", "no CUDA device")._asdict() for name in LIMITS]
            cases = itertools.chain(*all_cases().values())
            results |= {"steps": steps, "cases": predicted_records(cases)}
            write(results, options.out, "predicted")
        return 0
    if options.out is None:
        parser.error("there is a CUDA device: say where the results go, --out DIR")
    return settle(results, options.out.resolve(), options.steps)


def settle(results: dict[str, Any], out: Path, chosen: Collection[str] = STEPS) -> int:
    """Run the suite and write all of it; the exit status."""
    out.mkdir(parents=True, exist_ok=True)
    # As an exception, so that what was found is written and what runs is ended.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    status = Suite(results, out, chosen).run()
    print(f"{out / 'gpu.md'}")
    return status


def work(options: argparse.Namespace) -> int:
    """What a process of a step does."""
    number, count = map(int, (options.part or "0/1").split("/"))
    if options.worker == "one-call":
        return one_call(ONE_CALLS[number::count])
    records = Path(options.records)
    if options.worker == "snapshot":
        return snapshot(records)
    first, seconds = int(options.first), float(options.seconds)
    if options.worker == "compile":
        mine = parts(_to_compile(), count)[number]
        return run_cases(mine, first, seconds, records, compile_case, lambda line: None)
    cases, recorder = all_cases()[options.worker], Recorder(Timer())
    return run_cases(cases, first, seconds, records, recorder.record)


def _steps(given: str) -> tuple[str, ...]:
    """Those of --steps.

    >>> _steps("speed,tests")
    ('speed', 'tests')
    """
    names = tuple(given.split(","))
    if unknown := [name for name in names if name not in LIMITS]:
        raise argparse.ArgumentTypeError(f"no step {unknown[0]!r}: {', '.join(LIMITS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
