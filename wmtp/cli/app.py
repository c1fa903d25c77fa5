"""The commands of `wmtp`, and how their errors are shown."""

import typer

from wmtp.cli.bench import bench
from wmtp.cli.compare import compare
from wmtp.cli.info import info
from wmtp.cli.profile import profile
from wmtp.cli.train import train

app = typer.Typer(
    name="wmtp",
    help="Weighted multi-token prediction: train, compare, and look at what runs here.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(train)
app.command()(compare)
app.command()(bench)
app.command()(profile)
app.command()(info)
