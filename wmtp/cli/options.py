"""The options that `train` and `compare` share, and what --tiny stands for."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from wmtp.trainers import TrainConfig

Tiny = Annotated[
    bool, typer.Option("--tiny", help="A model for a laptop: minutes on two CPU cores.")
]
Data = Annotated[
    Path | None,
    typer.Option(
        help='A text file, or a folder of them (.txt, .md, .py ..., .jsonl with a "text" and '
        'optionally a "reward" a line). Default: the Python standard library\'s own sources.',
        show_default=False,
    ),
]
TokenizerFile = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer",
        help="A tokenizer.json. Default: a byte-level BPE trained on the data.",
        show_default=False,
    ),
]
VocabSize = Annotated[int, typer.Option(help="Of the trained tokenizer.")]
Steps = Annotated[int | None, typer.Option(help="Updates of the model.")]
BatchSize = Annotated[int | None, typer.Option(help="Sequences a step.")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens a sequence.")]
Horizon = Annotated[int | None, typer.Option(help="Heads: how many tokens ahead (default 4).")]
Seed = Annotated[int | None, typer.Option(help="Of weights and batches (default 0).")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Peak learning rate.")]
Precision = Annotated[str | None, typer.Option(help="fp32, or bf16 for autocast (default fp32).")]
Loss = Annotated[
    str | None,
    typer.Option(
        help="linear makes the logits a chunk at a time, fused all of them, eager all of them in "
        "plain torch; the same numbers to rounding (default linear)."
    ),
]
ValueWarmupSteps = Annotated[
    int | None, typer.Option(help="critic-wmtp: steps of the value head alone, before the model's.")
]
SaveEvery = Annotated[int | None, typer.Option(help="Steps between checkpoints.")]
KeepLast = Annotated[int | None, typer.Option(help="Checkpoints that stay (default 2).")]

TINY: dict[str, Any] = {
    "steps": 160,
    "batch_size": 8,
    "seq_len": 128,
    "dim": 128,
    "trunk_layers": 2,
    "attention_heads": 4,
    "lr": 3e-3,
    "value_warmup_steps": 20,
    "eval_batches": 8,
    "save_every": 50,
}


def make_config(algo: str, *, tiny: bool, **given: Any) -> TrainConfig:
    """The preset, with what was given (is not None) in its place."""
    preset = TrainConfig(algo=algo, **(TINY if tiny else {}))
    return replace(preset, **{name: value for name, value in given.items() if value is not None})
