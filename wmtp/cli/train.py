"""`wmtp train`: one algorithm, from text to a trained model in a folder."""

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import PartialState

from wmtp.cli import options
from wmtp.cli.console import console, errors_shown, progress
from wmtp.cli.stopping import stopping
from wmtp.data import PreparedData
from wmtp.data.prepare import DEFAULT_VOCABULARY
from wmtp.registry import trainer_registry
from wmtp.trainers import ConfigError, RunFolder, TrainConfig, find_trainer
from wmtp.trainers.reference_model import (
    Reference,
    find_reference,
    load_reference,
    reference_digests,
)
from wmtp.trainers.settings import parse_settings


@options.with_settings
def train(
    algo: Annotated[
        str,
        typer.Option(
            help="Which weights the heads get: "
            f"{', '.join(trainer_registry.names())}, or package.module:Class for a trainer of "
            "your own.",
            metavar="NAME",
        ),
    ],
    tiny: options.Tiny = False,
    config: options.ConfigFile = None,
    own: options.Set = None,
    data: options.Data = None,
    tokenizer: options.TokenizerFile = None,
    vocab_size: options.VocabSize = DEFAULT_VOCABULARY,
    skip_unreadable: options.SkipUnreadable = False,
    ref: options.Ref = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in OUT, if there is one.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the run (default runs/ALGO).")] = None,
    **given: Any,
) -> None:
    """Train a model with one of the algorithms.

    Writes OUT/settings.json, OUT/metrics.jsonl (a line a step), OUT/checkpoints, OUT/final and
    OUT/result.json. A run that was killed continues with the same command and --resume, to the same
    numbers.
    """
    with errors_shown():
        trainer_class = find_trainer(algo)
        settings = options.make_config(
            algo,
            tiny=tiny,
            config_file=config,
            settings=parse_settings(trainer_class.settings_type, own or []),
            reference=None if ref is None else str(find_reference(str(ref))),
            **given,
        )
        if ref is not None and not trainer_class.needs_reference:
            raise ConfigError(f"{algo} compares with no reference model: leave --ref out")
        _make_repeatable()
        # Several processes on CPUs are found only when it is said that there is nothing else.
        processes = PartialState(cpu=not torch.accelerator.is_available())
        console.quiet = not processes.is_main_process
        with processes.main_process_first():
            prepared = options.prepare(data, tokenizer, vocab_size, skip_unreadable)
        console.print(
            f"{len(prepared.train):,} training and {len(prepared.validation):,} validation tokens, "
            f"vocabulary {prepared.train.vocab_size:,}",
            highlight=False,
        )
        folder = Path("runs", run_name(algo)) if out is None else out
        with stopping() as asked:
            result = train_run(
                settings, prepared, RunFolder(folder), resume=resume, stop_asked=asked
            )
    start, end = result["start"]["ce_per_head"], result["end"]["ce_per_head"]
    heads = "  ".join(f"{a:.3f} -> {b:.3f}" for a, b in zip(start, end, strict=True))
    console.print(f"validation cross entropy by head: {heads}", highlight=False)
    console.print(
        f"next-token accuracy {result['end']['next_token_accuracy']:.1%}, model in {folder}/final",
        highlight=False,
    )


def train_run(
    config: TrainConfig,
    data: PreparedData,
    folder: RunFolder,
    *,
    resume: bool,
    stop_asked: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train, or continue, or read the result of a finished run; the reference model first.

    Raises:
        ConfigError, DataError, FileError, RunError, NonFiniteError: what the user can mend.
        StoppedError: `stop_asked` said so.
    """
    identity, is_main = run_identity(config, data), PartialState().is_main_process
    if resume and (finished := folder.result_of(identity)) is not None:
        check_finished(folder, restore=is_main)
        return finished  # which takes no lock: the folder may be read-only
    with folder.locked() if is_main else contextlib.nullcontext():
        with PartialState().main_process_first():
            if is_main:
                folder.open(identity, resume=resume)
                folder.write_settings(asdict(config))
        return folder.result() or _train_locked(config, data, folder, stop_asked)


def _train_locked(
    config: TrainConfig, data: PreparedData, folder: RunFolder, stop_asked: Callable[[], bool]
) -> dict[str, Any]:
    trainer_class, reference = find_trainer(config.algo), None
    if trainer_class.needs_reference:
        reference = _reference(config, data, folder, stop_asked)
    trainer = trainer_class(config, data, folder, reference)
    trainer.setup()
    with progress(folder.path.name, trainer.total_steps, trainer.step) as show:
        return trainer.run(show, stop_asked)


def check_finished(folder: RunFolder, *, restore: bool = True) -> None:
    """Of a finished run, the model and, with `restore`, the metrics, which a checkpoint has, too.

    Raises:
        RunError: they are not as the run ended with them.
    """
    folder.check_final()
    if restore and (restored := folder.restore_metrics()) is not None:
        print(restored, file=sys.stderr)


def run_name(algo: str) -> str:
    """A folder's, of package.module:Class too."""
    return algo.replace(":", "-")


def run_identity(config: TrainConfig, data: PreparedData) -> dict[str, Any]:
    """What must be equal for a run to be continued: settings, data, and the reference model."""
    reference = config.reference and reference_digests(Path(config.reference))
    return {**config.identity(), **data.identity, "reference": reference}


def _reference(
    config: TrainConfig, data: PreparedData, folder: RunFolder, stop_asked: Callable[[], bool]
) -> Reference:
    if config.reference is not None:
        console.print(f"using the reference model in {config.reference}", highlight=False)
        return load_reference(Path(config.reference), data.tokenizer, config.longest)
    reference_folder = RunFolder(folder.path / "reference")
    if reference_folder.result() is None:
        console.print(
            f"training the reference model first, in {reference_folder.path} (--ref takes one "
            "that exists)",
            highlight=False,
        )
    else:
        console.print(f"using the reference model in {reference_folder.path}", highlight=False)
    small = replace(config, algo="mtp-baseline", settings={}, horizon=1)
    train_run(small, data, reference_folder, resume=True, stop_asked=stop_asked)
    return load_reference(reference_folder.path, data.tokenizer, config.longest)


def _make_repeatable() -> None:
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
