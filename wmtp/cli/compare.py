"""`wmtp compare`: algorithms from one seed, one data order and one initialisation."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from wmtp.cli import options
from wmtp.cli.child import run_child
from wmtp.cli.console import console, errors_shown
from wmtp.cli.stopping import STATUSES, own_command
from wmtp.cli.train import check_finished, run_identity, run_name
from wmtp.data.prepare import DEFAULT_VOCABULARY
from wmtp.files import FREE, write_text, writing
from wmtp.registry import trainer_registry
from wmtp.trainers import ConfigError, RunFolder, find_trainer
from wmtp.trainers.evaluation import Evaluation
from wmtp.trainers.reference_model import find_reference
from wmtp.trainers.settings import parse_settings, setting_names

EVALUATIONS = 4  # in training, unless --eval-every says otherwise
AGAIN = f"{FREE}, and repeat the command: nothing is trained again"
NEXT_TOKEN = "next-token"  # plain training of one head, rho1-wmtp's reference


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
    ref: options.Ref = None,
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
        references = _references_of(algos, ref)
        given |= _evaluations(tiny, config, given)
        prepared = options.prepare(data, tokenizer, vocab_size, skip_unreadable)
        folders = {name: RunFolder(out / run_name(name)) for name in algos}
        for name, folder in folders.items():
            asked = options.make_config(
                name,
                tiny=tiny,
                config_file=config,
                settings=parse_settings(find_trainer(name).settings_type, sets[name]),
                reference=references[name],
                **given,
            )
            if folder.result_of(run_identity(asked, prepared)) is None:
                options_of_run = {**shared, **given, "ref": references[name], "out": folder.path}
                _train(name, tiny, sets[name], options_of_run)
            check_finished(folder)
        runs = {name: folder.read_metrics() for name, folder in folders.items()}
        results = {name: folder.result() for name, folder in folders.items()}
        results |= _next_token(folder for name, folder in folders.items() if not references[name])
        console.print(_table(results))
        _write(results, runs, out)


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


def _references_of(algos: list[str], ref: Path | None) -> dict[str, str | None]:
    """The reference of each algorithm that compares with one; None: it trains its own, or none.

    Raises:
        ConfigError: a reference that nobody compares with.
    """
    place = None if ref is None else str(find_reference(str(ref)))
    found = {name: place if find_trainer(name).needs_reference else None for name in algos}
    if place is not None and not any(found.values()):
        raise ConfigError(f"{', '.join(algos)} compare with no reference model: leave --ref out")
    return found


def _evaluations(tiny: bool, config: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """`eval_every`, where the user has not said it."""
    asked = options.make_config("mtp-baseline", tiny=tiny, config_file=config, **given)
    said = "eval_every" in given or "eval_every" in options.read_config(config)
    return {} if said else {"eval_every": max(1, asked.steps // EVALUATIONS)}


def _next_token(folders: Iterable[RunFolder]) -> dict[str, Any]:
    """The result of the first reference model that was trained here."""
    results = (RunFolder(folder.path / "reference").result() for folder in folders)
    found = next(filter(None, results), None)
    return {} if found is None else {NEXT_TOKEN: found}


def _train(algo: str, tiny: bool, own: list[str], settings: dict[str, Any]) -> None:
    """In a process of its own, so that peak memory and speed are this algorithm's alone."""
    arguments = [f"--algo={algo}", "--resume"] + ["--tiny"] * tiny
    arguments += [f"--set={text}" for text in own]
    for name, value in settings.items():
        if value is not None:
            flag = f"--{name.replace('_', '-')}"
            switch = flag if value else f"--no{flag[1:]}"
            arguments.append(switch if isinstance(value, bool) else f"{flag}={value}")
    status = run_child(["train", *arguments])
    if status in STATUSES:
        console.print(f"compare itself goes on with:\n  {own_command()}", soft_wrap=True)
    if status:
        raise typer.Exit(status)


def _write(results: dict[str, Any], runs: dict[str, Any], out: Path) -> None:
    from wmtp.cli.plot import plot_comparison

    numbers, picture = out / "compare.json", out / "compare.png"
    with writing(numbers, AGAIN):
        write_text(numbers, json.dumps(results, indent=2) + "\n")
    with writing(picture, AGAIN):
        plot_comparison(runs, results, picture)
    console.print(f"curves in {picture}, numbers in {numbers}", highlight=False)


def _table(results: dict[str, Any]) -> Table:
    start = next(iter(results.values()))["start"]  # of the one initialisation
    table = Table(
        title="validation cross entropy, nats per token", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("algorithm", style="bold", no_wrap=True)
    heads = len(start["ce_per_head"])
    for title in (*(f"head {k}" for k in range(heads)), "accuracy", "tokens/s", "MiB"):
        table.add_column(title, justify="right")
    table.add_row("untrained", *_scores(start, heads), "", "", style="dim")
    for algo, result in results.items():
        memory = f"{result['peak_memory_bytes'] / 2**20:,.0f}"
        speed = f"{result['tokens_per_s']:,.0f}"
        table.add_row(algo, *_scores(result["end"], heads), speed, memory)
    lines = ["accuracy: head 0's next token; MiB: peak memory of the process"]
    if NEXT_TOKEN in results:
        lines.append(f"{NEXT_TOKEN}: one head alone (horizon 1), the reference of the excess")
    table.caption = "\n".join(lines)
    return table


def _scores(evaluation: Evaluation, heads: int) -> list[str]:
    by_head = [f"{ce:.3f}" for ce in evaluation["ce_per_head"]]
    blank = [""] * (heads - len(by_head))
    return [*by_head, *blank, f"{evaluation['next_token_accuracy']:.1%}"]
