"""`wmtp bench`: the loss against eager torch and against a plain copy, with pytest-benchmark."""

import importlib
import importlib.util
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from wmtp.cli.console import console, errors_shown
from wmtp.files import check_writable, json_by_line, writing

SETTINGS = ("OMP_NUM_THREADS", "WMTP_CPU_ISA", "WMTP_KEEP_GRADIENT")  # what changes the numbers


class Suite(StrEnum):
    """What can be run alone."""

    LOSS = "loss"
    SCALING = "scaling"
    OPTIONS = "options"
    LINEAR = "linear"


def bench(
    quick: Annotated[
        bool,
        typer.Option("--quick", help="One shape and tiny ones, no torch.compile: half a minute."),
    ] = False,
    runs: Annotated[
        int, typer.Option(min=1, help="Runs, each a process of its own; ratios get their spread.")
    ] = 1,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write environment and results here.")
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw loss + gradients as PNG here.")
    ] = None,
    only: Annotated[
        Suite | None,
        typer.Option(
            help="loss: against the peers; scaling: from tiny to large, threads, weights; "
            "options: head numerics, metrics and rules, against the call without; linear: --linear."
        ),
    ] = None,
    linear: Annotated[
        bool,
        typer.Option(
            "--linear",
            help="The loss of hidden states and unembedding instead, against its peers and the "
            "bare matrix products: also some ten minutes.",
        ),
    ] = False,
) -> None:
    """Time the loss with and without gradient, count peak bytes, and print both beside the peers'.

    Outputs are compared before anything is timed. The whole suite takes some ten minutes a run.
    """
    from wmtp.benchmarks.report import OF_LOGITS, gather, run_suites

    if linear and only not in (None, Suite.LINEAR):
        raise typer.BadParameter(f"--linear is a suite by itself: leave out --only {only}")
    only = Suite.LINEAR if linear else only
    if importlib.util.find_spec("pytest_benchmark") is None:
        sys.exit("wmtp: bench needs pytest-benchmark: pip install 'wmtp[bench]'")
    if plot_file is not None and only in (Suite.SCALING, Suite.OPTIONS):
        raise typer.BadParameter(f"--plot draws the suite that --only {only} leaves out")
    with errors_shown():
        for option, file in (("--json", json_file), ("--plot", plot_file)):
            check_writable(file, f"choose another {option}")  # now, not after ten minutes
    if plot_file is not None:
        importlib.import_module("matplotlib")
    size = "quick" if quick else "full"
    measured = []
    try:
        for run in range(runs):
            console.print(f"run {run + 1} of {runs}", highlight=False)
            measured.append(run_suites([only] if only else OF_LOGITS, size, _show_case))
    except RuntimeError as error:
        typer.secho(str(error), fg="red", err=True)
        raise typer.Exit(1) from error
    results = gather(_command(quick, runs, only), size, measured)
    with errors_shown():
        _show(results, json_file, plot_file)


def _show_case(line: str) -> None:
    console.print(line, style="dim", highlight=False, soft_wrap=True)


def _command(quick: bool, runs: int, only: Suite | None) -> str:
    options = (
        *(["--quick"] if quick else []),
        *([f"--runs {runs}"] if runs > 1 else []),
        *(["--linear"] if only == Suite.LINEAR else [f"--only {only}"] if only else []),
    )
    chosen = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    settings = (f"{name}={value}" for name, value in chosen.items())
    return " ".join((*settings, "wmtp bench", *options))


def _show(results: dict, json_file: Path | None, plot_file: Path | None) -> None:
    from wmtp.benchmarks.tables import tables

    for table in tables(results):
        console.print(table)
    if json_file is not None:
        with writing(json_file, "choose another --json"):
            json_file.write_text(json_by_line(results) + "\n")
    if plot_file is not None:
        from wmtp.benchmarks.plot import plot_loss

        with writing(plot_file, "choose another --plot"):
            plot_loss(results, plot_file)
