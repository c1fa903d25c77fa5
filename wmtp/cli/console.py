"""What the commands show: one console, the progress of a run, and errors without a traceback."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from wmtp.data import DataError
from wmtp.files import FileError
from wmtp.trainers import ConfigError, NonFiniteError, RunError, WeightsError

console = Console()
LINES_WITHOUT_TERMINAL = 10


def say(line: str) -> None:
    """What the user should know and need not mend: once, beside the output."""
    if not console.quiet:
        typer.secho(f"note: {line}", fg="yellow", err=True)


@contextlib.contextmanager
def errors_shown() -> Iterator[None]:
    """What the user can mend is one line; anything else is a bug and keeps its traceback."""
    try:
        yield
    except (ConfigError, DataError, FileError, NonFiniteError, RunError, WeightsError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error


@contextlib.contextmanager
def progress(title: str, total: int, done: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Shows each step's record: a bar in a terminal, some ten lines elsewhere.

    Args:
        title: of the run.
        total: its steps.
        done: of them already, when it was resumed.
    """
    if not console.is_terminal:
        yield _line_writer(title, total)
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss [cyan]{task.fields[loss]:.3f}"),
        TextColumn("[green]{task.fields[speed]:,.0f}[/] tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total, completed=done, loss=float("nan"), speed=0.0)

        def show(record: dict[str, Any]) -> None:
            bar.update(
                task,
                completed=record["step"],
                loss=record["loss"],
                speed=record["tokens_per_s"],
                description=title if record["stage"] == "train" else f"{title} ({record['stage']})",
            )

        yield show


def _line_writer(title: str, total: int) -> Callable[[dict[str, Any]], None]:
    every = max(1, total // LINES_WITHOUT_TERMINAL)

    def show(record: dict[str, Any]) -> None:
        if record["step"] % every == 0 or record["step"] == total:
            console.print(
                f"{title} {record['stage']} {record['step']}/{total} loss {record['loss']:.3f} "
                f"{record['tokens_per_s']:,.0f} tokens/s",
                highlight=False,
            )

    return show
