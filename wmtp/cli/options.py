"""The options that `train` and `compare` share, what --tiny stands for, and --config.

Each field of `TrainConfig` is an option, in the words of the field.
"""

import functools
import inspect
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import Field, replace
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from wmtp.cli.console import say
from wmtp.data import PreparedData, find_corpus, prepare_data
from wmtp.trainers import ConfigError, TrainConfig
from wmtp.trainers.config import adjustable

Tiny = Annotated[
    bool, typer.Option("--tiny", help="A model for a laptop: minutes on two CPU cores.")
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="A TOML file of the settings below, by their names; what is on the command line wins.",
        show_default=False,
    ),
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
SkipUnreadable = Annotated[
    bool, typer.Option("--skip-unreadable", help="Go on without the text that cannot be read.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="A setting of an algorithm's own; may be repeated.",
        show_default=False,
    ),
]

Ref = Annotated[
    Path | None,
    typer.Option(
        help="rho1-wmtp: the reference model, a run folder of ours (--horizon 1), a Hugging Face "
        "folder, or an id that the hub's cache holds. Default: a small one is trained first, in "
        "the run's folder.",
        show_default=False,
    ),
]

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


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """The command, which takes `**given`, with an option for each field of `TrainConfig`; those
    that the user gives arrive as `given`."""
    signature = inspect.signature(command)
    own = [each for each in signature.parameters.values() if each.name != "given"]
    offered = [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[Optional[each.type], _option(each)],  # noqa: UP045  (of a value)
        )
        for each in adjustable()
    ]

    @functools.wraps(command)
    def with_options(**values: Any) -> None:
        command(**{name: value for name, value in values.items() if value is not None})

    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own] + offered
    with_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {each.name: each.annotation for each in parameters}
    del with_options.__wrapped__
    return with_options


def _option(each: Field[Any]) -> Any:
    choices = each.metadata["one_of"]
    listed = f" One of {', '.join(choices)}." if choices else ""
    default = f" (default {each.default})"
    name = "--" + each.name.replace("_", "-")
    return typer.Option(
        f"{name}/--no{name[1:]}" if each.type is bool else name,
        help=each.metadata["about"].removesuffix(".") + "." + listed + default,
        show_default=False,
    )


def prepare(
    data: Path | None, tokenizer: Path | None, vocab_size: int, skip_unreadable: bool
) -> PreparedData:
    """The tokenised text; what is not as asked for is said."""
    corpus = find_corpus(data, skip_unreadable=skip_unreadable)
    prepared = prepare_data(corpus, vocab_size=vocab_size, tokenizer_file=tokenizer)
    for skipped in corpus.skipped:
        say(f"without {skipped}")
    for note in prepared.notes:
        say(note)
    learned = prepared.train.vocab_size
    if tokenizer is None and learned < vocab_size:
        say(f"a vocabulary of {vocab_size:,} was asked for, the text has tokens for {learned:,}")
    return prepared


def read_config(file: Path | None) -> dict[str, Any]:
    """The settings in a TOML file; none without a file.

    Raises:
        ConfigError: no such file, not TOML, or a name that is no setting.
    """
    if file is None:
        return {}
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--config {file} is not TOML: {error}") from error
    known = [each.name for each in adjustable()]
    for name in found:
        if name not in known:
            raise ConfigError(f"--config {file}: no setting {name!r}: known are {', '.join(known)}")
    return found


def make_config(
    algo: str, *, tiny: bool, config_file: Path | None = None, **given: Any
) -> TrainConfig:
    """The preset, with what the file says in its place, and what was given in that."""
    preset = TrainConfig(algo=algo, **(TINY if tiny else {}))
    chosen: Mapping[str, Any] = {
        **read_config(config_file),
        **{name: value for name, value in given.items() if value is not None},
    }
    return replace(preset, **chosen)
