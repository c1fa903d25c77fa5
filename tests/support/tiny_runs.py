"""Small corpora and runs of seconds, for the tests of data, trainers and commands."""

import itertools
import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import wmtp
from wmtp.data import PreparedData, find_corpus, prepare_data
from wmtp.models import MTPConfig, MTPTransformer
from wmtp.trainers import BaseWmtpTrainer, RunFolder, TrainConfig, find_trainer
from wmtp.trainers.checkpoints import Checkpoints
from wmtp.trainers.reference_model import Reference

ALGORITHMS = ("mtp-baseline", "critic-wmtp", "rho1-wmtp")
VOCABULARY = 290
SMALL: dict[str, Any] = {
    "steps": 6,
    "batch_size": 2,
    "seq_len": 16,
    "horizon": 3,
    "dim": 16,
    "trunk_layers": 1,
    "attention_heads": 2,
    "lr": 1e-2,
    "value_warmup_steps": 3,
    "eval_batches": 2,
    "save_every": 2,
}


def write_corpus(folder: Path, files: int = 6) -> Path:
    """Text files of simple sentences, no two alike."""
    folder.mkdir(parents=True, exist_ok=True)
    animals, places = ("cat", "dog", "cow", "owl"), ("mat", "hill", "roof", "road", "farm")
    sentences = [f"the {a} sat on the {p}.\n" for a, p in itertools.product(animals, places)]
    for number in range(files):
        turned = sentences[number:] + sentences[:number]
        (folder / f"story{number}.txt").write_text(f"story {number}\n" + "".join(turned))
    return folder


def write_rewarded_corpus(folder: Path) -> Path:
    """Two .jsonl files; the reward of a line is 1 when it is about a cat."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("a", "b"):
        lines = [
            json.dumps({"text": f"the {who} sat on the mat {name}", "reward": float(who == "cat")})
            for who in ("cat", "dog", "cow", "cat")
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def prepare(corpus: Path) -> PreparedData:
    return prepare_data(find_corpus(corpus), vocab_size=VOCABULARY)


def small_model(vocab_size: int, horizon: int = 1) -> MTPTransformer:
    """Of random weights."""
    shape = MTPConfig(vocab_size, horizon, dim=16, trunk_layers=1, attention_heads=2)
    return MTPTransformer(shape)


def record_of(step):
    """A line of metrics.jsonl, of nothing but what every one has."""
    return {"step": step, "stage": "train", "loss": 1.0, "tokens_per_s": 1.0}


def make_trainer(
    algo: str,
    data: PreparedData,
    out: Path,
    reference: Reference | None = None,
    **settings: Any,
) -> BaseWmtpTrainer:
    """Set up and ready to step, with a reference of random weights where one is needed."""
    config = TrainConfig(algo=algo, **{**SMALL, **settings})
    folder = RunFolder(out)
    folder.open(config.identity(), resume=True)
    trainer_class = find_trainer(algo)
    if trainer_class.needs_reference and reference is None:
        reference = small_model(data.train.vocab_size)
    trainer: BaseWmtpTrainer = trainer_class(config, data, folder, reference)
    trainer.setup()
    return trainer


def train_small(algo: str, corpus: Path, out: Path, kill: tuple[str, str, int] | None) -> None:
    """`wmtp train --resume` on a small model, in a process of its own, killed at a given moment.

    Args:
        kill: (name of the run's folder, a method of RunFolder, the step), or None to finish.
    """
    from wmtp.cli.train import train_run

    torch.set_num_threads(1)  # models this small gain nothing from two
    if kill is not None:
        _kill_at(*kill)
    config = TrainConfig(algo=algo, **SMALL)
    train_run(config, prepare(corpus), RunFolder(out), resume=True)


def _kill_at(folder_name: str, method: str, step: int) -> None:
    owner = Checkpoints if method in ("begin", "commit") else RunFolder
    original = getattr(owner, method)

    def die_there(self: Any, argument: Any, *rest: Any) -> None:
        at = argument["step"] if method == "append_metrics" else argument
        folder = self.path.parent if owner is Checkpoints else self.path
        if folder.name != folder_name or (isinstance(at, int) and at != step):
            original(self, argument, *rest)
            return
        if method == "append_metrics":  # half a line is on the disk
            with open(self.path / "metrics.jsonl", "a") as file:
                file.write(json.dumps(argument)[:20])
        if method == "begin":  # half a checkpoint is
            original(self, argument)
            (self.in_progress(step) / "model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, method, die_there)


def train_in_processes(algo: str, corpus: Path, out: Path, processes: int, **settings: Any) -> None:
    """One run of several processes, which exchange their gradients by gloo; one is this one."""
    if processes == 1:
        _train(algo, corpus, out, settings)
        return
    assert in_processes(processes, _train, algo, corpus, out, settings) == [0] * processes


def in_processes(processes: int, target: Callable[..., None], *arguments: Any) -> list[int | None]:
    """The exit statuses of `target(*arguments)` in processes that know one another."""
    context = fork_server()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        context.Process(
            target=_as_rank,
            args=({**names, "RANK": rank, "LOCAL_RANK": rank}, target, arguments),
        )
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=120)
    return [process.exitcode for process in started]


def _as_rank(
    environment: dict[str, Any], target: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    from accelerate import PartialState

    torch.set_num_threads(1)
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ["OMP_NUM_THREADS"] = "1"  # else accelerate chooses
    PartialState(cpu=True)
    target(*arguments)


def _train(algo: str, corpus: Path, out: Path, settings: dict[str, Any]) -> None:
    from wmtp.cli.train import train_run

    config = TrainConfig(algo=algo, **{**SMALL, **settings})
    train_run(config, prepare(corpus), RunFolder(out), resume=False)


def fork_server() -> Any:
    """The server imports once; each run is a fork of it that has never used a thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "wmtp.cli.train"])
    return context


def largest_allocation(call: Callable[[], object]) -> int:
    """Bytes of the largest single tensor memory that `call` asks for."""
    wmtp.release_memory()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


def differences(curve: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, float]:
    """By quantity, the largest difference of the two curves, relative to 1 where it is smaller."""
    assert [record["stage"] for record in curve] == [record["stage"] for record in other]
    numbers = {name for record in curve for name in record if name not in ("step", "stage", "lr")}
    return {
        name: max(
            abs(a[name] - b[name]) / max(1, abs(b[name]))
            for a, b in zip(curve, other, strict=True)
            if name in a
        )
        for name in numbers
    }


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, less the one number that no two runs share."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        del record["tokens_per_s"]
    return records
