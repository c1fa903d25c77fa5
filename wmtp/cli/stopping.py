"""SIGTERM, SIGINT, SIGHUP: finish the step, save, say how to go on. A second one stops at once.

A SIGHUP that is ignored, as under nohup, stays so.
"""

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from types import FrameType

import typer

from wmtp.cli.console import console, say
from wmtp.trainers.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STATUSES = tuple(128 + number for number in SIGNALS)  # of a command that they have stopped


class StopAsked:
    """Whether one of the signals has come; a trainer's `stop_asked`."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Take the first signal; the next one finds its default."""
        self.signal = number
        for each in taken():
            signal.signal(each, signal.SIG_DFL)
        name = signal.Signals(number).name
        say(f"{name}: finishing the step and saving; once more stops at once")


@contextlib.contextmanager
def stopping() -> Iterator[StopAsked]:
    """Take the signals while the block runs. Where they stop it, print the command that goes on and
    leave with the status that a shell expects, 128 + the signal's number."""
    asked = StopAsked()
    before = {each: signal.signal(each, asked.handle) for each in taken()}
    try:
        yield asked
    except StoppedError as stopped:
        console.print(f"{stopped}, continue with:\n  {own_command('--resume')}", soft_wrap=True)
        raise typer.Exit(128 + (asked.signal or signal.SIGTERM)) from stopped
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def taken() -> list[signal.Signals]:
    """Those of the signals that this process is to get."""
    hung_up = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    return [each for each in SIGNALS if each != signal.SIGHUP or hung_up]


def own_command(*more: str) -> str:
    """What this process was started with, and more options if they are not there."""
    arguments = sys.argv[1:]
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    program = ["torchrun", f"--nproc-per-node={processes}", "-m", "wmtp"] if processes else ["wmtp"]
    return shlex.join([*program, *arguments, *(each for each in more if each not in arguments)])
