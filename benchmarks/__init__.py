"""Speed and memory of the loss against its peers; installed as `wmtp.benchmarks`.

An installation (setup.py) maps two folders into the package. In a checkout that is not installed
links stand in for that; they are made here, before anything imports wmtp.
"""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINKS = {"kernels": "../kernels/gpu", "benchmarks": "../benchmarks"}


def link_folders(root: Path) -> None:
    """Make wmtp/kernels and wmtp/benchmarks in the checkout, unless they are installed from it."""
    for name, folder in LINKS.items():
        link = root / "wmtp" / name
        if (link.parent / folder).is_dir() and not _is_found(f"wmtp.{name}", root):
            try:
                link.symlink_to(folder, target_is_directory=True)
            except FileExistsError:
                if not link.samefile(link.parent / folder):  # else another process was faster
                    raise
            importlib.invalidate_caches()


def _is_found(module: str, root: Path) -> bool:
    """Whether an import would find it in this checkout; `find_spec` alone would import wmtp."""
    for finder in sys.meta_path:
        spec = finder.find_spec(module, [str(root / "wmtp")])
        if spec is not None and spec.origin is not None:
            return Path(spec.origin).resolve().is_relative_to(root)
    return False


link_folders(ROOT)
