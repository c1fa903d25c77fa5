"""`wmtp train --resume` in a process of its own, struck at a chosen moment.

A moment is an operation on a file of the run, as Python's audit events tell of it. So a run can be
struck before each of them: between a rename and the sync of its folder, or inside a write.
"""

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

OPERATIONS = frozenset({"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"})
# How the process ends that is struck so.
EXITS = {
    "killed": -signal.SIGKILL,
    "killed inside a write": -signal.SIGXFSZ,
    "killed by the clock": -signal.SIGKILL,
    "disk full": 1,
}


@dataclass(frozen=True)
class Strike:
    """What happens to a run, and when.

    Attributes:
        kind: of `EXITS`.
        part: of the run's folder, as `Moments` names it. nth: operation on it, from 1.
        room: bytes that the file then written may have, beyond what the metrics have already.
        seconds: of the clock, which the parent watches.
    """

    kind: str
    part: str = ""
    nth: int = 0
    room: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.kind == "killed by the clock":
            return f"{self.kind} after {self.seconds:.2f} s"
        room = "" if self.kind == "killed" else f", {self.room} bytes into a file"
        return f"{self.kind} at operation {self.nth} on {self.part}{room}"


class Moments:
    """An audit hook that counts the operations on a run's files by part, and strikes.

    Attributes:
        seen: (part, what was renamed to or "") of each, in order.
    """

    def __init__(self, out: Path, strike: Strike | None) -> None:
        self.seen: list[tuple[str, str]] = []
        self._root = f"{out}{os.sep}"
        self._strike = strike
        self._left = 0 if strike is None else strike.nth
        self._removed = ""  # the part that rmtree is at, which names its files by descriptor

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in OPERATIONS:
            return
        path = arguments[1 if event == "os.rename" else 0]
        if event in ("os.remove", "os.rmdir") and arguments[1] != -1:
            self._at(self._removed, "", "")
        elif isinstance(path, str | Path) and str(path).startswith(self._root):
            name = str(path).removeprefix(self._root)
            part = _part(name)
            if event == "shutil.rmtree":
                self._removed = part
            self._at(part, str(path), name if event == "os.rename" else "")

    def _at(self, part: str, path: str, renamed: str) -> None:
        if not part:
            return
        self.seen.append((part, renamed))
        if self._strike is not None and part == self._strike.part:
            self._left -= 1
            if self._left == 0:
                _happen(self._strike, path)


def _part(name: str) -> str:
    """metrics.jsonl, checkpoints, final ..., those of the reference apart."""
    first, _, rest = name.partition(os.sep)
    if first == "reference" and rest:
        return f"reference/{_part(rest)}"
    return first.removesuffix(".tmp")


def _happen(strike: Strike, path: str) -> None:
    if strike.kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if strike.kind == "killed inside a write":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    grows = strike.part.endswith("metrics.jsonl") and os.path.exists(path)
    there = os.path.getsize(path) if grows else 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (there + strike.room, resource.RLIM_INFINITY))


def train(
    arguments: list[str], out: Path, errors: Connection, strike: Strike | None, seen: Path | None
) -> None:
    """The command, for `multiprocessing`.

    Args:
        errors: a pipe, for the standard error.
        seen: where to write the seconds it took and the moments.
    """
    import torch

    from wmtp.cli.app import app

    os.dup2(errors.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    moments = Moments(out, strike)
    _tell_of_native_writes()
    sys.addaudithook(moments)
    began = time.perf_counter()
    try:
        app(["train", *arguments, "--out", str(out), "--resume"])
    finally:
        if seen is not None:
            seen.write_text(json.dumps([time.perf_counter() - began, moments.seen]))


def _tell_of_native_writes() -> None:
    """Tensors are written in C++ and Rust, which open files without an audit event."""
    import safetensors.torch
    import torch

    def announced(write: Callable[..., Any]) -> Callable[..., Any]:
        def announce(content: Any, file: Any, *others: Any, **more: Any) -> Any:
            sys.audit("open", file, "w", 0)
            return write(content, file, *others, **more)

        return announce

    torch.save = announced(torch.save)
    safetensors.torch.serialize_file = announced(safetensors.torch.serialize_file)
