"""The command `wmtp` in this process, and what it has printed."""

import io
import re

from rich.console import Console
from typer.testing import CliRunner, Result

from wmtp.cli.app import app

SMALL = ["--tiny", "--steps=6", "--batch-size=2", "--seq-len=16", "--horizon=3"]
SMALL += ["--vocab-size=290", "--value-warmup-steps=2", "--lr=0.01"]


def wmtp(*arguments: object) -> Result:
    """What it prints and its exit status."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def unwrapped(text: str) -> str:
    """In one line, out of its box."""
    return " ".join(re.sub("[│╭╮╰╯─]", "", text).split())


def printed(*parts: object) -> str:
    """As the console shows them."""
    text = io.StringIO()
    Console(file=text, width=80).print(*parts)
    return text.getvalue()
