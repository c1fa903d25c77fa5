"""`wmtp profile`: peak memory of the loss over the vocabulary, for long-vocabulary runs."""

import importlib
import json
import os
import platform
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from wmtp.backends import choose_backend
from wmtp.cli.bench import SETTINGS
from wmtp.cli.console import console


class Dtype(StrEnum):
    """Of the logits."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def profile(
    vocab: Annotated[str, typer.Option(help="Vocabulary sizes, separated by commas.")] = (
        "32000,128256,256000"
    ),
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens.")] = 128,
    horizon: Annotated[int, typer.Option(min=1, help="Heads.")] = 4,
    dtype: Annotated[Dtype, typer.Option(help="Of the logits.")] = Dtype.BFLOAT16,
    backend: Annotated[
        str, typer.Option(help="Of the fused loss: auto, cpu (runs all on the CPU), triton, eager.")
    ] = "auto",
    snapshot: Annotated[
        Path | None,
        typer.Option(
            help="On CUDA: write the memory history of an eager and a fused step, at the first "
            "vocabulary, for pytorch.org/memory_viz here."
        ),
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw peak bytes over V as PNG here.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write environment and results here.")
    ] = None,
) -> None:
    """Peak bytes of loss + gradient beyond the logits: eager torch, compiled, fused, in place.

    Exact on the CPU (torch's every allocation is counted) and on CUDA (the allocator's statistics).
    A case that does not fit is said not to. torch.compile takes some seconds for each vocabulary.
    """
    from wmtp.benchmarks.memory_profile import Setting, profile_losses, write_snapshot

    vocabularies = _whole_numbers(vocab)
    device = "cuda" if torch.cuda.is_available() and backend != "cpu" else "cpu"
    if snapshot is not None and device == "cpu":
        raise typer.BadParameter(
            "--snapshot records CUDA's allocator and needs a CUDA device: leave it out, the table "
            "is exact on the CPU"
        )
    for file in filter(None, (snapshot, plot_file, json_file)):
        file.parent.mkdir(parents=True, exist_ok=True)  # now, not after a minute
    if plot_file is not None:
        importlib.import_module("matplotlib")
    setting = Setting(
        seq_len, horizon, getattr(torch, dtype), device, _chosen(backend, device, dtype)
    )
    with console.status("measuring; torch.compile takes some seconds a vocabulary"):
        measured = profile_losses(vocabularies, setting)
    if snapshot is not None:
        write_snapshot(snapshot, vocabularies[0], setting)
    options = f"--vocab {vocab} --seq-len {seq_len} --horizon {horizon} --dtype {dtype}"
    _show(measured, f"{options} --backend {backend}", json_file, plot_file)


def _whole_numbers(vocab: str) -> list[int]:
    try:
        vocabularies = [int(size) for size in vocab.split(",")]
        if min(vocabularies) < 1:
            raise ValueError
    except ValueError:
        raise typer.BadParameter(
            f"--vocab takes positive whole numbers separated by commas, got {vocab!r}"
        ) from None
    return vocabularies


def _chosen(backend: str, device: str, dtype: Dtype) -> str:
    try:
        return choose_backend(backend, device, getattr(torch, dtype))
    except (RuntimeError, ValueError) as error:  # unknown, not available, not for this device
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error


def _show(
    measured: dict[str, Any], options: str, json_file: Path | None, plot_file: Path | None
) -> None:
    from wmtp.benchmarks.memory_profile import profile_table

    if json_file is not None:
        json_file.write_text(json.dumps(_with_environment(measured, options), indent=1) + "\n")
    if plot_file is not None:
        from wmtp.benchmarks.plot import plot_profile

        plot_profile(measured, plot_file)
    console.print(profile_table(measured))


def _with_environment(measured: dict[str, Any], options: str) -> dict[str, Any]:
    from wmtp.benchmarks.report import environment

    settings = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    return {
        "command": " ".join((*settings, "wmtp profile", options)),
        "environment": environment(platform.processor() or platform.machine()),
        **measured,
    }
