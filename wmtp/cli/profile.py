"""`wmtp profile`: peak memory of the loss over the vocabulary, for long-vocabulary runs."""

from enum import StrEnum
from typing import Annotated

import torch
import typer

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
) -> None:
    """Peak bytes of loss + gradient beyond the logits: eager torch, fused, fused in place.

    Exact on the CPU (every allocation is counted) and on CUDA (the allocator's statistics).
    """
    from wmtp.benchmarks.memory import profile_table

    try:
        vocabularies = [int(size) for size in vocab.split(",")]
        if min(vocabularies) < 1:
            raise ValueError
    except ValueError:
        raise typer.BadParameter(
            f"--vocab takes positive whole numbers separated by commas, got {vocab!r}"
        ) from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    console.print(profile_table(vocabularies, seq_len, horizon, getattr(torch, dtype), device))
