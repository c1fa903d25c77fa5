"""A `wmtp` command in a process of its own."""

import signal
import subprocess
import sys
from types import FrameType

from wmtp.cli.stopping import taken


def run_child(arguments: list[str]) -> int:
    """Its exit status, as a shell has it. It is handed the signals that this process gets, each
    once: it has a session of its own, so that the terminal's do not reach it beside ours."""
    command = [sys.executable, "-m", "wmtp", *arguments]
    with subprocess.Popen(command, start_new_session=True) as child:

        def hand_on(number: int, _frame: FrameType | None) -> None:
            child.send_signal(number)

        before = {each: signal.signal(each, hand_on) for each in taken()}
        try:
            status = child.wait()
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
    return status if status >= 0 else 128 - status
