"""The commands of `wmtp`, and how their errors are shown."""

from typing import Annotated

import typer

import wmtp
from wmtp.cli.bench import bench
from wmtp.cli.compare import compare
from wmtp.cli.info import info
from wmtp.cli.profile import profile
from wmtp.cli.train import train

app = typer.Typer(
    name="wmtp",
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def version(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)
    ] = False,
) -> None:
    """Weighted multi-token prediction: train, compare, and look at what runs here."""
    if version:
        typer.echo(f"wmtp {wmtp.__version__}")
        raise typer.Exit


app.command()(train)
app.command()(compare)
app.command()(bench)
app.command()(profile)
app.command()(info)
