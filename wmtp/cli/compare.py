"""`wmtp compare`: algorithms from one seed, one data order and one initialisation."""

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
from wmtp.cli.train import run_identity, run_name
from wmtp.data.prepare import DEFAULT_VOCABULARY
from wmtp.registry import trainer_registry
from wmtp.trainers import ConfigError, RunFolder, find_trainer
from wmtp.trainers.evaluation import Evaluation
from wmtp.trainers.settings import parse_settings, setting_names


@options.with_settings
def compare(
    algo: Annotated[
        list[str] | None,
        typer.Option(
            help="An algorithm, or package.module:Class; may be repeated. Default: all of ours.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
    tiny: options.Tiny = False,
    config: options.ConfigFile = None,
    own: options.Set = None,
    data: options.Data = None,
    tokenizer: options.TokenizerFile = None,
    vocab_size: options.VocabSize = DEFAULT_VOCABULARY,
    skip_unreadable: options.SkipUnreadable = False,
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/compare"),
    **given: Any,
) -> None:
    """Train all algorithms alike and compare them.

    Prints a table and writes OUT/compare.png and OUT/compare.json; each run is in OUT/ALGO. What is
    finished there with the same settings is not trained again, what was interrupted continues.
    """
    shared = {"data": data, "tokenizer": tokenizer, "vocab_size": vocab_size, "config": config}
    shared["skip_unreadable"] = skip_unreadable or None
    with errors_shown():
        algos = list(dict.fromkeys(algo or trainer_registry.names()))
        sets = _settings_of(algos, own or [])
        prepared = options.prepare(data, tokenizer, vocab_size, skip_unreadable)
        folders = {name: RunFolder(out / run_name(name)) for name in algos}
        for name, folder in folders.items():
            parsed = parse_settings(find_trainer(name).settings_type, sets[name])
            asked = options.make_config(
                name, tiny=tiny, config_file=config, settings=parsed, **given
            )
            if folder.result_of(run_identity(asked, prepared)) is None:
                _train(name, tiny, sets[name], {**shared, **given, "out": folder.path})
        results = {algo: folder.result() for algo, folder in folders.items()}
        metrics = {algo: folder.read_metrics() for algo, folder in folders.items()}
    console.print(_table(results))
    (out / "compare.json").write_text(json.dumps(results, indent=2) + "\n")
    from wmtp.cli.plot import plot_comparison

    plot_comparison(metrics, out / "compare.png")
    console.print(f"curves in {out / 'compare.png'}, numbers in {out / 'compare.json'}")


def _settings_of(algos: list[str], own: list[str]) -> dict[str, list[str]]:
    """Each algorithm's of the `--set`: those whose names it knows.

    Raises:
        ConfigError: a name that none of them knows.
    """
    known = {name: setting_names(find_trainer(name).settings_type) for name in algos}
    of_all = sorted({name for names in known.values() for name in names})
    for text in own:
        if text.partition("=")[0] not in of_all:
            listed = ", ".join(of_all) or "none"
            raise ConfigError(f"--set {text}: no algorithm has this setting: known are {listed}")
    return {name: [text for text in own if text.partition("=")[0] in known[name]] for name in algos}


def _train(algo: str, tiny: bool, own: list[str], settings: dict[str, Any]) -> None:
    """In a process of its own, so that peak memory and speed are this algorithm's alone."""
    arguments = [f"--algo={algo}", "--resume"] + ["--tiny"] * tiny
    arguments += [f"--set={text}" for text in own]
    for name, value in settings.items():
        if value is not None:
            flag = f"--{name.replace('_', '-')}"
            arguments.append(flag if value is True else f"{flag}={value}")
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
