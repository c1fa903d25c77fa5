"""The `wmtp` command. Training needs the extra packages; without them it says how to get them."""

import sys

# What `pip install wmtp` leaves out and the commands import.
EXTRA_PACKAGES = frozenset(
    {"accelerate", "matplotlib", "numpy", "rich", "safetensors", "tokenizers", "transformers"}
    | {"typer"}
)


def main() -> None:
    """Run the command line in `sys.argv`; a package that is missing is named with its remedy."""
    try:
        from wmtp.cli.app import app

        app()
    except ModuleNotFoundError as error:
        if error.name not in EXTRA_PACKAGES:
            raise
        sys.exit(f"wmtp: this command needs {error.name}: pip install 'wmtp[train]'")
