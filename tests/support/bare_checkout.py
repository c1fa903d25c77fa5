"""A checkout in which nobody has installed the package, and a Python that has not either."""

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WHAT_IT_HOLDS = ("wmtp", "kernels", "benchmarks", "tests", "Makefile", "pyproject.toml")
# What only the command line, the trainers and tests of neither need.
OPTIONAL = ("rich", "typer", "matplotlib", "hypothesis", "tokenizers", "accelerate", "xdist")


def bare_checkout(folder):
    """(checkout, python, its environment); OPTIONAL packages seem to be missing there."""
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in WHAT_IT_HOLDS:
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, checkout)
        else:
            shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=_not_tracked)
    hidden = folder / "hidden"
    hidden.mkdir()
    (hidden / "hidden.py").write_text(
        f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL}))\n"
    )
    # Without its `site`, Python takes packages from there, but follows no .pth file to a checkout.
    packages = [path for path in sys.path if path.endswith("-packages")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(hidden), *packages]),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    return checkout, [sys.executable, "-S"], environment


def _not_tracked(folder, names):
    links = {name for name in names if (Path(folder) / name).is_symlink()}
    kinds = (".so", ".pyc", ".json", ".png", "__pycache__")
    return links | {name for name in names if name.endswith(kinds)}
