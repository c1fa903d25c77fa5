"""`wmtp info`: what runs here, and what is missing for the rest."""

import importlib.metadata
import platform

import torch
from rich.table import Table

import wmtp.backends.cpu
import wmtp.kernels
from wmtp.cli.console import console

PACKAGES = ("torch", "triton", "accelerate", "safetensors", "tokenizers", "transformers")


def info() -> None:
    """Show versions, backends (and why one is missing), the CPU's instruction set and the GPU."""
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_row("wmtp", wmtp.__version__)
    table.add_row("python", platform.python_version())
    for package in PACKAGES:
        table.add_row(package, _version(package))
    table.add_section()
    for name, missing in (
        ("cpu", _cpu_missing()),
        ("triton", wmtp.kernels.unavailable()),
        ("eager", None),
    ):
        state = "[green]ready[/]" if missing is None else f"[yellow]not available:[/] {missing}"
        table.add_row(f"backend {name}", state)
    instruction_set = "none" if _cpu_missing() else wmtp.backends.cpu.instruction_set()
    table.add_row("CPU kernels", f"{instruction_set}, {torch.get_num_threads()} threads")
    table.add_row("GPU", _gpu())
    console.print(table)


def _cpu_missing() -> str | None:
    try:
        return wmtp.backends.cpu.unavailable()
    except RuntimeError as wrong_environment:
        return str(wrong_environment)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
