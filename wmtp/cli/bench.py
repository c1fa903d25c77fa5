"""`wmtp bench`: the loss against eager torch and against a plain copy, with pytest-benchmark."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from wmtp.cli.console import console


def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="One shape, few rounds: half a minute.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write environment and results here.")
    ] = None,
) -> None:
    """Time loss + gradient, count peak bytes, and print both beside eager torch and a copy.

    Outputs are compared before anything is timed.
    """
    from wmtp.benchmarks.report import run_suite, table

    if importlib.util.find_spec("pytest_benchmark") is None:
        sys.exit("wmtp: bench needs pytest-benchmark: pip install 'wmtp[bench]'")
    try:
        results = run_suite(quick)
    except RuntimeError as error:
        typer.secho(str(error), fg="red", err=True)
        raise typer.Exit(1) from error
    console.print(table(results))
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n")
