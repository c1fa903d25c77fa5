"""`wmtp compare`: the three algorithms from one seed, one data order and one initialisation."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from wmtp.cli import options
from wmtp.cli.console import console, errors_shown
from wmtp.cli.train import run_identity
from wmtp.data import find_corpus, prepare_data
from wmtp.data.prepare import DEFAULT_VOCABULARY
from wmtp.registry import trainer_registry
from wmtp.trainers import RunFolder
from wmtp.trainers.evaluation import Evaluation


def compare(
    tiny: options.Tiny = False,
    data: options.Data = None,
    tokenizer: options.TokenizerFile = None,
    vocab_size: options.VocabSize = DEFAULT_VOCABULARY,
    steps: options.Steps = None,
    batch_size: options.BatchSize = None,
    seq_len: options.SeqLen = None,
    horizon: options.Horizon = None,
    seed: options.Seed = None,
    lr: options.LearningRate = None,
    precision: options.Precision = None,
    loss: options.Loss = None,
    value_warmup_steps: options.ValueWarmupSteps = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/compare"),
) -> None:
    """Train all algorithms alike and compare them.

    Prints a table and writes OUT/compare.png and OUT/compare.json; each run is in OUT/ALGO. What is
    finished there with the same settings is not trained again, what was interrupted continues.
    """
    given: dict[str, Any] = {
        "steps": steps,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "horizon": horizon,
        "seed": seed,
        "lr": lr,
        "precision": precision,
        "loss": loss,
        "value_warmup_steps": value_warmup_steps,
    }
    source = {"data": data, "tokenizer": tokenizer, "vocab_size": vocab_size}
    with errors_shown():
        prepared = prepare_data(
            find_corpus(data),
            vocab_size=vocab_size,
            tokenizer_file=tokenizer,
        )
        folders = {name: RunFolder(out / name) for name in trainer_registry.names()}
        for algo, folder in folders.items():
            config = options.make_config(algo, tiny=tiny, **given)
            if folder.result_of(run_identity(config, prepared)) is None:
                _train(algo, tiny, {**source, **given, "out": folder.path})
        results = {algo: folder.result() for algo, folder in folders.items()}
        metrics = {algo: folder.read_metrics() for algo, folder in folders.items()}
    console.print(_table(results))
    (out / "compare.json").write_text(json.dumps(results, indent=2) + "\n")
    from wmtp.cli.plot import plot_comparison

    plot_comparison(metrics, out / "compare.png")
    console.print(f"curves in {out / 'compare.png'}, numbers in {out / 'compare.json'}")


def _train(algo: str, tiny: bool, settings: dict[str, Any]) -> None:
    """In a process of its own, so that peak memory and speed are this algorithm's alone."""
    arguments = [f"--algo={algo}", "--resume"] + ["--tiny"] * tiny
    for name, value in settings.items():
        if value is not None:
            arguments.append(f"--{name.replace('_', '-')}={value}")
    finished = subprocess.run([sys.executable, "-m", "wmtp", "train", *arguments], check=False)
    if finished.returncode:
        raise typer.Exit(finished.returncode)


def _table(results: dict[str, Any]) -> Table:
    start = next(iter(results.values()))["start"]  # of the one initialisation
    table = Table(
        title="validation cross entropy, nats per token", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("algorithm", style="bold", no_wrap=True)
    titles = [f"head {k}" for k in range(len(start["ce_per_head"]))]
    for title in (*titles, "accuracy", "tokens/s", "MiB"):
        table.add_column(title, justify="right")
    table.add_row("untrained", *_scores(start), "", "", style="dim")
    for algo, result in results.items():
        memory = f"{result['peak_memory_bytes'] / 2**20:,.0f}"
        table.add_row(algo, *_scores(result["end"]), f"{result['tokens_per_s']:,.0f}", memory)
    table.caption = "accuracy: head 0's next token; MiB: peak memory of the process"
    return table


def _scores(evaluation: Evaluation) -> list[str]:
    by_head = [f"{ce:.3f}" for ce in evaluation["ce_per_head"]]
    return [*by_head, f"{evaluation['next_token_accuracy']:.1%}"]
