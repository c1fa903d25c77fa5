"""`wmtp profile`: peak memory of the losses over the vocabulary, for long-vocabulary runs."""

import importlib
import os
import platform
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from wmtp.backends import choose_backend
from wmtp.cli.bench import SETTINGS
from wmtp.cli.console import console, errors_shown
from wmtp.files import check_writable, json_by_line, writing

DIM = 1024


class Dtype(StrEnum):
    """Of the logits, or of hidden states and unembedding."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def profile(
    vocab: Annotated[str, typer.Option(help="Vocabulary sizes, separated by commas.")] = (
        "32000,128256,256000"
    ),
    seq_len: Annotated[
        str, typer.Option(help="Tokens. With --linear: several, separated by commas.")
    ] = "128",
    horizon: Annotated[int, typer.Option(min=1, help="Heads.")] = 4,
    dtype: Annotated[
        Dtype, typer.Option(help="Of the logits, or the hidden states.")
    ] = Dtype.BFLOAT16,
    backend: Annotated[
        str, typer.Option(help="Of the fused loss: auto, cpu (runs all on the CPU), triton, eager.")
    ] = "auto",
    linear: Annotated[
        bool,
        typer.Option(
            "--linear",
            help="The loss of hidden states and unembedding instead: over V at the first length, "
            "over the lengths at the first V.",
        ),
    ] = False,
    dim: Annotated[
        int | None, typer.Option(min=1, help="With --linear: the hidden size. Default: 1024.")
    ] = None,
    chunk_bytes: Annotated[
        int | None, typer.Option(min=1, help="With --linear: of the fused loss. Default: its own.")
    ] = None,
    snapshot: Annotated[
        Path | None,
        typer.Option(
            help="On CUDA: write the memory history of an eager and a fused step, at the first "
            "vocabulary, for pytorch.org/memory_viz here."
        ),
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw peak bytes over V (and S) as PNG here.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write environment and results here.")
    ] = None,
) -> None:
    """Peak bytes of loss + gradient beyond the logits: eager torch, compiled, fused, in place.

    Exact on the CPU (torch's every allocation is counted) and on CUDA (the allocator's statistics).
    A case that does not fit is said not to. torch.compile takes some seconds for each vocabulary.
    With --linear: beyond hidden states, weight and their gradients; eager torch and fused.
    """
    vocabularies = _whole_numbers("--vocab", vocab)
    lengths = _whole_numbers("--seq-len", seq_len, least=2)
    if not linear and (len(lengths) > 1 or dim or chunk_bytes):
        raise typer.BadParameter("several --seq-len, --dim and --chunk-bytes go with --linear")
    device = "cuda" if torch.cuda.is_available() and backend != "cpu" else "cpu"
    if snapshot is not None and device == "cpu":
        raise typer.BadParameter(
            "--snapshot records CUDA's allocator and needs a CUDA device: leave it out, the table "
            "is exact on the CPU"
        )
    outputs = {"--snapshot": snapshot, "--plot": plot_file, "--json": json_file}
    with errors_shown():
        for option, file in outputs.items():
            check_writable(file, f"choose another {option}")  # now, not after a minute
    if plot_file is not None:
        importlib.import_module("matplotlib")
    common: tuple[Any, ...] = (
        horizon,
        getattr(torch, dtype),
        device,
        _chosen(backend, device, dtype),
    )
    options = f"--vocab {vocab} --seq-len {seq_len} --horizon {horizon} --dtype {dtype}"
    options += f" --backend {backend}"
    if linear:
        dim = dim or DIM
        options += f" --linear --dim {dim}" + (f" --chunk-bytes {chunk_bytes}" * bool(chunk_bytes))
        common = (*common, dim, chunk_bytes)
    measured = _measured(vocabularies, lengths, common, snapshot)
    with errors_shown():
        _write(measured, options, json_file)
        _draw(measured, plot_file)


def _measured(
    vocabularies: list[int], lengths: list[int], common: tuple[Any, ...], snapshot: Path | None
) -> dict[str, Any]:
    from wmtp.benchmarks import profile as sweeps

    setting, sizes = sweeps.Setting(*common), sweeps.sweep(vocabularies, lengths)
    long = "the products of large sizes take minutes"
    slow = long if setting.dim else "torch.compile takes some seconds a vocabulary"
    with console.status(f"measuring; {slow}"):
        measured = sweeps.profile(sizes, setting, _section_writer(sweeps.table))
    console.print(sweeps.caption(measured), style="italic")
    if snapshot is not None:
        sweeps.write_snapshot(snapshot, sizes[0], setting)
    return measured


def _section_writer(table: Callable[[dict[str, Any], bool], Table]) -> Callable[..., None]:
    """Prints a part of the results when it comes, the first one with headings."""
    first = True

    def show(part: dict[str, Any]) -> None:
        nonlocal first
        console.print(table(part, first))
        first = False

    return show


def _whole_numbers(option: str, given: str, least: int = 1) -> list[int]:
    try:
        numbers = [int(number) for number in given.split(",")]
        if min(numbers) < least:
            raise ValueError
    except ValueError:
        kind = "positive whole numbers" if least == 1 else f"whole numbers from {least} on"
        raise typer.BadParameter(
            f"{option} takes {kind} separated by commas, got {given!r}"
        ) from None
    return numbers


def _chosen(backend: str, device: str, dtype: Dtype) -> str:
    try:
        return choose_backend(backend, device, getattr(torch, dtype))
    except (RuntimeError, ValueError) as error:  # unknown, not available, not for this device
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error


def _write(measured: dict[str, Any], options: str, file: Path | None) -> None:
    if file is not None:
        with writing(file, "choose another --json"):
            file.write_text(json_by_line(_with_environment(measured, options)) + "\n")


def _draw(measured: dict[str, Any], file: Path | None) -> None:
    if file is not None:
        from wmtp.benchmarks.plot import plot_profile

        with writing(file, "choose another --plot"):
            plot_profile(measured, file)


def _with_environment(measured: dict[str, Any], options: str) -> dict[str, Any]:
    from wmtp.benchmarks.report import environment

    settings = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    return {
        "command": " ".join((*settings, "wmtp profile", options)),
        "environment": environment(platform.processor() or platform.machine()),
        **measured,
    }
