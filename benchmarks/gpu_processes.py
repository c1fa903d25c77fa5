"""The processes that the GPU suite starts: each ends by itself, by its limit, or with the suite."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from wmtp.benchmarks import ROOT
from wmtp.benchmarks.gpu_worker import AGAIN

WORKER = (sys.executable, "-m", "wmtp.benchmarks.gpu", "--worker")
MOST_SILENT = 3  # processes in a row that ended without a record: the fault is not a job's
OUT_OF_TIME = "out of time"
GRACE = 3.0  # seconds in which a process that is cut off may say what it has found
Record = dict[str, Any]
T = TypeVar("T")
R = TypeVar("R")

_running: set[subprocess.Popen] = set()
_lock = threading.Lock()
_ended = False


def run(
    command: Iterable[str],
    seconds: float,
    output: Path | None = None,
    own: dict[str, str] | None = None,
) -> int | None:
    """The exit status, None where it was cut off; what it printed goes into the file, if any."""
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(output.open("w")) if output else None
        process = _start(list(command), stream, own or {})
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            return None
        finally:
            _signal(process, signal.SIGKILL)  # compilers may outlive what began them
            process.wait()
            with _lock:
                _running.discard(process)


def in_parallel(function: Callable[[T], R], items: Iterable[T], processes: int) -> list[R]:
    """[function(item)], each of which waits for processes of its own; so many at a time."""
    with ThreadPoolExecutor(processes) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except (KeyboardInterrupt, SystemExit):
            _end_all()
            raise


def run_jobs_in_processes(
    command: Iterable[str],
    file: Path,
    count: int,
    seconds: float,
    failed: Callable[[int, str], Record],
) -> str:
    """Have a line of JSON a job written to the file, whatever happens to who writes them.

    Args:
        command: measures the jobs from `--first` on, writes their lines, and ends with AGAIN where
            the rest needs a new process.
        count: of the jobs.
        failed: the record of a job that ended its process, and why.

    Returns:
        why the last jobs have none, if that is so.
    """
    deadline = time.monotonic() + seconds
    file.touch()
    silent = 0
    while (left := deadline - time.monotonic()) > 0:
        first = len(read_records(file))
        if first == count:
            break
        arguments = ["--first", str(first), "--records", str(file), "--seconds", str(left)]
        status = run([*command, *arguments], left)
        if status in (0, None):  # all done, or out of time
            break
        done = len(read_records(file))
        silent = 0 if done > first else silent + 1
        if silent == MOST_SILENT:
            return f"{silent} processes in a row ended before their first record"
        if status != AGAIN and done < count:
            with file.open("a") as stream:
                record = failed(done, f"its process ended with status {status}")
                stream.write(json.dumps(record) + "\n")
    return OUT_OF_TIME


def read_records(file: Path) -> list[Record]:
    """Those whose line is whole; a part of one, whose process was killed, is cut off the file."""
    if not file.exists():
        return []
    whole, newline, rest = file.read_text().rpartition("\n")
    if rest:
        file.write_text(whole + newline)
    return [json.loads(line) for line in whole.splitlines()]


def _start(command: list[str], stream: Any, own: dict[str, str]) -> subprocess.Popen:
    with _lock:
        if _ended:
            raise RuntimeError("the suite was ended")
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT if stream else None, cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **own},
            process_group=0,  # no session: whoever ends the suite's session ends these as well
        )  # fmt: skip
        _running.add(process)
        return process


def _end_all() -> None:
    """Whatever runs, and nothing starts any more: the suite itself is ended."""
    global _ended
    with _lock:
        _ended = True
        for process in _running:
            _signal(process, signal.SIGKILL)


def _signal(process: subprocess.Popen, number: int) -> None:
    """To the process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
