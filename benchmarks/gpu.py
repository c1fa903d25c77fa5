"""Everything that a GPU can settle, in one command of at most eight minutes.

    python -m benchmarks.gpu --out DIR [--cubins FOLDER]

Steps, each in processes of its own with a time limit; one that fails or is cut off does not stop
the others, and the exit status is 1 then:

    tests       pytest -m gpu                                                     pytest.txt
    sanitizer   compute-sanitizer's memcheck and racecheck, a call of each tier   memcheck.txt ...
    speed       everyone at every shape, the most important first                 gpu.json .md .png
    linear      hidden states to loss and gradients, against peers and bare products      likewise
    tiers       each tier forced; with --cubins also where Triton is too old      likewise
    snapshot    every allocation of an eager and of a fused step                  memory.pickle

Without a device it says what it would run, and with --out writes what is predicted: predicted.json
and predicted.md. It needs torch, Triton and pytest, and nothing that only the command `wmtp` needs.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from wmtp.benchmarks import cubins, gpu_peers, linear_providers
from wmtp.benchmarks.gpu_cases import Job, speed_jobs, tier_jobs
from wmtp.benchmarks.gpu_linear import linear_jobs
from wmtp.benchmarks.gpu_report import compared, gpu_environment, plot, predicted_records, write
from wmtp.benchmarks.gpu_worker import AGAIN, new_record, one_call, run_jobs, snapshot

ROOT = Path(__file__).resolve().parents[1]
# Seconds.
LIMITS = {
    "tests": 120, "sanitizer": 60, "speed": 170, "linear": 60, "tiers": 50, "snapshot": 15
}  # fmt: skip
# What drivers and libraries try and do without is no error of a kernel's.
SANITIZERS = {"memcheck": ("--report-api-errors", "no"), "racecheck": ()}
MOST_TEST_PROCESSES = 8  # each has a CUDA context of its own
WORKER = (sys.executable, "-m", "wmtp.benchmarks.gpu", "--worker")


class Step(NamedTuple):
    """How a step ended: "ok", "failed" or "absent"."""

    name: str
    outcome: str
    why: str = ""
    seconds: float | None = None


class Suite:
    """The steps, and what they found."""

    def __init__(self, out: Path, folder: Path | None):
        self.out, self.folder = out, folder
        self.records: list[dict[str, Any]] = []

    def run(self) -> list[Step]:
        """All steps, in order."""
        actions: dict[str, Callable[[float], list[Step]]] = {
            "tests": self.tests,
            "sanitizer": self.sanitizer,
            "speed": lambda seconds: self.jobs("speed", seconds),
            "linear": lambda seconds: self.jobs("linear", seconds),
            "tiers": lambda seconds: self.jobs("tiers", seconds),
            "snapshot": self.snapshot,
        }
        steps = []
        for name, action in actions.items():
            start = time.monotonic()
            found = action(LIMITS[name])
            steps += [step._replace(seconds=time.monotonic() - start) for step in found]
            for step in found:
                print(f"{step.name}: {step.outcome} {step.why}", flush=True)
        return steps

    def tests(self, seconds: float) -> list[Step]:
        """A test file that needs a package that is not here fails, and does not stop the others."""
        if not (ROOT / "tests").is_dir():
            return [Step("tests", "absent", "run this from the sources: tests are not installed")]
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "tests"]
        options = ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
        if importlib.util.find_spec("xdist"):  # most of the time goes into compiling, on the CPU
            options += ["-n", str(min(os.cpu_count() or 1, MOST_TEST_PROCESSES))]
        status = run([*command, *options], seconds, self.out / "pytest.txt")
        return [_step("tests", status, seconds, "pytest.txt")]

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
        jobs = all_jobs()[name]
        found = run_in_processes(name, jobs, seconds, self.folder)
        self.records += found
        counts = Counter(record["outcome"] for record in found)
        told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        return [Step(name, "failed" if counts["failed"] else "ok", told)]

    def snapshot(self, seconds: float) -> list[Step]:
        file = self.out / "memory.pickle"
        status = run([*WORKER, "snapshot", "--records", str(file)], seconds)
        return [_step("snapshot", status, seconds, file.name)]


def run(
    command: list[str],
    seconds: float,
    output: Path | None = None,
    own: dict[str, str] | None = None,
) -> int | None:
    """The exit status, None where it was cut off; what it printed goes into the file, if any."""
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(output.open("w")) if output else None
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT if output else None, cwd=ROOT,
            env={**os.environ, **(own or {})}, start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):  # compilers may outlive what began them
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_in_processes(
    name: str, jobs: list[Job], seconds: float, folder: Path | None
) -> list[dict[str, Any]]:
    """A record for each job, whatever happens to the processes that measure them."""
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "records.jsonl"
        file.touch()
        while (left := deadline - time.monotonic()) > 0:
            first = len(file.read_text().splitlines())
            if first == len(jobs):
                break
            command = [*WORKER, name, "--first", str(first), "--records", str(file)]
            command += ["--seconds", str(left)]
            command += ["--cubins", str(folder)] if folder else []
            status = run(command, left)
            if status in (0, None):  # all done, or out of time
                break
            if status != AGAIN:
                done = len(file.read_text().splitlines())
                failed = new_record(jobs[done], "failed", f"its process ended with status {status}")
                with file.open("a") as stream:
                    stream.write(json.dumps(failed) + "\n")
        records = [json.loads(line) for line in file.read_text().splitlines()]
    return records + [new_record(job, "not run", "out of time") for job in jobs[len(records) :]]


def all_jobs() -> dict[str, list[Job]]:
    """Of the steps that time something."""
    return {
        "speed": speed_jobs(gpu_peers.absent()),
        "linear": linear_jobs(linear_providers.absent(compiling=True)),
        "tiers": tier_jobs(),
    }


def plan() -> list[str]:
    """What would be run, a line a step."""
    counts = {name: f"{len(jobs)} cases" for name, jobs in all_jobs().items()}
    counts |= {
        "tests": "pytest -m gpu",
        "sanitizer": f"{' and '.join(SANITIZERS)} on a call of each tier",
        "snapshot": "memory of an eager and of a fused step",
    }
    return [f"{name:10} {counts[name]}, at most {limit} s" for name, limit in LIMITS.items()]


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
    for name in ("--worker", "--first", "--seconds", "--records"):  # of the processes of a step
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    folder = options.cubins.resolve() if options.cubins else None
    if options.worker:
        return work(options, folder)
    print("\n".join(plan()))
    missing = absent(folder)
    print("\n".join(f"absent: {who}, {why}" for who, why in missing.items()))
    given = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python -m benchmarks.gpu", *given])
    results = {"command": command, "environment": gpu_environment(), "absent": missing}
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
    return settle(results, options.out.resolve(), folder)


def settle(results: dict[str, Any], out: Path, folder: Path | None) -> int:
    """Run the suite and write all of it; the exit status."""
    out.mkdir(parents=True, exist_ok=True)
    suite = Suite(out, folder)
    steps = suite.run()
    if reason := plot(suite.records, out / "gpu.png"):
        steps.append(Step("picture", "absent", reason))
    results |= {"steps": [step._asdict() for step in steps], "cases": compared(suite.records)}
    write(results, out, "gpu")
    print(f"{out / 'gpu.md'}")
    return int(any(step.outcome == "failed" for step in steps))


def work(options: argparse.Namespace, folder: Path | None) -> int:
    """What a process of a step does."""
    if options.worker == "one-call":
        return one_call()
    records = Path(options.records)
    if options.worker == "snapshot":
        return snapshot(records)
    with contextlib.ExitStack() as stack:
        if options.worker == "tiers" and folder and cubins.unavailable(folder) is None:
            stack.enter_context(cubins.installed(folder))
        jobs = all_jobs()[options.worker]
        return run_jobs(jobs, int(options.first), float(options.seconds), records)


def _step(name: str, status: int | None, seconds: float, file: str) -> Step:
    if status is None:
        return Step(name, "failed", f"cut off after {seconds:.0f} s, see {file}")
    return Step(name, "failed" if status else "ok", f"exit status {status}, see {file}")


if __name__ == "__main__":
    sys.exit(main())
