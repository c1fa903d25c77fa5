"""A run on disk: what it leaves, what it refuses, and that kill -9 changes no number."""

import errno
import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from support import tiny_runs
from support.tiny_runs import make_trainer, read_metrics
from wmtp.cli.train import train_run
from wmtp.files import FileError
from wmtp.trainers import RunError, RunFolder, TrainConfig
from wmtp.trainers.run_folder import METRICS

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_leaves_what_it_promises(data, tmp_path):
    trainer = make_trainer("critic-wmtp", data, tmp_path, keep_last=2)
    shown = []
    result = trainer.run(shown.append)
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == list(range(1, 10))
    assert [record["stage"] for record in records] == ["value_warmup"] * 3 + ["train"] * 6
    assert len(shown) == 9
    checkpoints = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert checkpoints == ["step-8", "step-9"]
    names = {path.name for path in (tmp_path / "checkpoints" / "step-9").iterdir()}
    assert {"model.safetensors", "optimizer.bin", "scheduler.bin", "progress.json"} <= names
    assert {path.name for path in (tmp_path / "final").iterdir()} == {
        "config.json",
        "digests.json",
        "model.safetensors",
        "tokenizer.json",
        "value_head.safetensors",
    }
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert not list(tmp_path.rglob("*.tmp"))
    reused = make_trainer("critic-wmtp", data, tmp_path)
    assert reused.step == 9


def test_a_folder_in_use_is_refused(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open({"steps": 9, "lr": 0.1}, resume=False)
    folder.open({"steps": 3, "lr": 0.1}, resume=False)  # nothing was computed yet
    folder.append_metrics({"step": 1})
    with pytest.raises(RunError, match=r"already holds a run: continue it with --resume"):
        folder.open({"steps": 3, "lr": 0.1}, resume=False)
    folder.open({"steps": 3, "lr": 0.1}, resume=True)
    with pytest.raises(RunError, match=r"steps: 3 there, 4 asked"):
        folder.open({"steps": 4, "lr": 0.1}, resume=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    for resume in (True, False):
        with pytest.raises(RunError, match=r"holds no run \(found cat.png\)"):
            RunFolder(tmp_path / "photos").open({}, resume=resume)


def finished(tmp_path, *steps, **identity):
    """A folder with a checkpoint of each step, and a record of all."""
    folder = RunFolder(tmp_path)
    folder.open({"steps": 4, **identity}, resume=False)
    for step in range(1, max(steps) + 1):
        folder.append_metrics({"step": step, "loss": 1.5})
        if step in steps:
            folder.checkpoints.begin(step)
            (folder.checkpoints.in_progress(step) / "model.safetensors").touch()
            folder.commit_checkpoint(step)
    return folder


def without_a_line(file):
    file.write_text("".join(file.read_text().splitlines(keepends=True)[::3]))


def with_another_number(file):
    file.write_text(file.read_text().replace('"step": 3, "loss": 1.5', '"step": 3, "loss": 1.4'))


def as_a_pipe(file):
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize("damage", [Path.unlink, without_a_line, with_another_number, as_a_pipe])
def test_metrics_that_are_damaged_are_restored_from_the_checkpoint_and_it_is_said(damage, tmp_path):
    folder = finished(tmp_path, 2, 4)
    whole = (tmp_path / METRICS).read_text()
    assert folder.cut_metrics_back(folder.newest_whole()[0]) is None
    damage(tmp_path / METRICS)
    checkpoint, complaints = folder.newest_whole()
    assert checkpoint[0] == 4
    assert complaints == []
    assert "metrics.jsonl has lost or changed" in folder.cut_metrics_back(checkpoint)
    assert (tmp_path / METRICS).read_text() == whole
    assert folder.cut_metrics_back((2, tmp_path / "checkpoints/step-2")) is None
    assert len(folder.read_metrics()) == 2


def test_records_that_are_lost_under_a_run_end_it(tmp_path):
    folder = finished(tmp_path, 2)
    without_a_line(tmp_path / METRICS)
    folder.append_metrics({"step": 3})
    folder.checkpoints.begin(3)
    message = r"has lost 1 of 3 records .* step 2: go on from the last checkpoint with --resume"
    with pytest.raises(RunError, match=message):
        folder.commit_checkpoint(3)


def test_another_runs_model_is_not_taken_for_the_reference(corpus, tmp_path):
    for seed in (0, 1):
        config = TrainConfig(algo="rho1-wmtp", **{**tiny_runs.SMALL, "steps": 1}, seed=seed)
        data = tiny_runs.prepare(corpus)
        train_run(config, data, RunFolder(tmp_path / f"{seed}"), resume=False)
    (tmp_path / "0/result.json").unlink()
    final = tmp_path / "0/reference/final"
    whole = (final / "model.safetensors").read_bytes()
    shutil.rmtree(final)
    shutil.copytree(tmp_path / "1/reference/final", final)
    config = TrainConfig(algo="rho1-wmtp", **{**tiny_runs.SMALL, "steps": 1}, seed=0)
    with pytest.raises(RunError, match=r"reference/final .*\(it is of another run\): restore it"):
        train_run(config, data, RunFolder(tmp_path / "0"), resume=True)
    (tmp_path / "0/reference/result.json").unlink()  # as it says
    train_run(config, data, RunFolder(tmp_path / "0"), resume=True)
    assert (final / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("of", [".", "reference"])
@pytest.mark.parametrize(
    "damage", [lambda text: text + b"\xff\xfe\n", lambda text: text[:-9], lambda text: b"", None]
)
def test_the_metrics_of_a_finished_run_are_restored(of, damage, corpus, tmp_path, capsys):
    def train():
        config = TrainConfig(algo="rho1-wmtp", **{**tiny_runs.SMALL, "steps": 1})
        train_run(config, tiny_runs.prepare(corpus), RunFolder(tmp_path), resume=True)

    train()
    metrics, result = tmp_path / of / METRICS, tmp_path / "result.json"
    whole, ended = metrics.read_bytes(), result.read_bytes()

    def spoil():
        metrics.unlink() if damage is None else metrics.write_bytes(damage(whole))
        if of == "reference":
            result.unlink(missing_ok=True)

    spoil()
    train()
    assert metrics.read_bytes() == whole
    assert f"{METRICS} is not as the run ended with it: restored from" in capsys.readouterr().err
    if of == ".":
        assert result.read_bytes() == ended
    shutil.rmtree(tmp_path / of / "checkpoints")
    spoil()
    with pytest.raises(RunError, match=r"metrics\.jsonl is not as .*: restore it, or delete"):
        train()


def test_metrics_that_are_a_folder_are_named(tmp_path):
    folder = finished(tmp_path, 2)
    (tmp_path / METRICS).unlink()
    (tmp_path / METRICS).mkdir()
    with pytest.raises(FileError, match=r"metrics\.jsonl: Is a directory .*: move it away, then"):
        folder.cut_metrics_back(folder.newest_whole()[0])


def test_a_checkpoint_of_another_run_or_step_is_passed_over_by_name(tmp_path):
    finished(tmp_path / "other", 3, 4, seed=1)
    folder = finished(tmp_path / "run", 2, 3)
    shutil.copytree(tmp_path / "other/checkpoints/step-4", tmp_path / "run/checkpoints/step-4")
    shutil.copytree(tmp_path / "run/checkpoints/step-2", tmp_path / "run/checkpoints/step-6")
    (step, _), complaints = folder.newest_whole()
    assert step == 3
    assert complaints[0].endswith("step-6 holds the state after step 2")
    assert complaints[1].endswith("step-4 is of another run")
    folder.checkpoints.drop_old(1, 3)  # those of others do not push it out
    assert folder.checkpoints.steps() == [3, 4, 6]


@pytest.mark.parametrize("name", ["config.json", "result.json", "lock"])
def test_a_pipe_is_not_waited_for(name, tmp_path):
    folder = finished(tmp_path, 2)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)

    def read():
        with folder.locked():
            folder.open({"steps": 4}, resume=True)
            folder.result()

    with pytest.raises(RunError, match=rf"{name}.*no regular file"):
        read()


WHOLE = {"ce_per_head": [1.0], "next_token_accuracy": 0.5}


@pytest.mark.parametrize(
    ("result", "missing"),
    [
        ({"a": 1}, "start"),
        ({"start": WHOLE, "end": {}}, "end.ce_per_head"),
        ({"start": WHOLE, "end": {**WHOLE, "next_token_accuracy": None}}, "end.next_token_acc"),
        ({"start": WHOLE, "end": WHOLE}, "tokens_per_s"),
    ],
)
def test_a_result_that_lacks_something_is_named(result, missing, tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(result))
    with pytest.raises(RunError, match=rf"result\.json has no {missing}.*: restore it, or delete"):
        RunFolder(tmp_path).result()


def test_a_finished_run_is_read_where_nothing_can_be_written(corpus, tmp_path, monkeypatch):
    def train(**settings):
        config = TrainConfig(algo="mtp-baseline", **{**tiny_runs.SMALL, **settings})
        data = tiny_runs.prepare(corpus)
        return train_run(config, data, RunFolder(tmp_path / "run"), resume=True)

    result = train()
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    monkeypatch.setattr(os, "open", read_only(os.open))
    assert train() == result
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before
    with pytest.raises(FileError, match=r"cannot write .*lock: Read-only file system"):
        train(steps=7)


def read_only(opened):
    def refuse(path, flags, *more, **others):
        if str(path).endswith("lock"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *more, **others)

    return refuse


# ---- kill -9 ----

# The run's folder, the method of RunFolder it dies in, and the step: half a line of metrics
# written, half a checkpoint written, a whole one that has no name yet, the last moment.
KILLS = {
    "mtp-baseline": [
        ("run", "append_metrics", 1),
        ("run", "append_metrics", 4),
        ("run", "begin", 4),
        ("run", "commit", 6),
        ("run", "write_folder", 6),
        ("run", "write_result", 6),
    ],
    "critic-wmtp": [
        ("run", "append_metrics", 2),
        ("run", "begin", 2),
        ("run", "append_metrics", 3),
        ("run", "commit", 4),
        ("run", "append_metrics", 7),
    ],
    "rho1-wmtp": [
        ("reference", "append_metrics", 3),
        ("reference", "commit", 4),
        ("reference", "write_result", 6),
        ("run", "append_metrics", 1),
        ("run", "append_metrics", 5),
    ],
}


@pytest.mark.parametrize("algo", KILLS)
def test_killed_at_any_step_and_resumed_ends_the_same_to_the_last_digit(algo, corpus, tmp_path):
    context = tiny_runs.fork_server()

    def run(out: Path, kill) -> int | None:
        process = context.Process(target=tiny_runs.train_small, args=(algo, corpus, out, kill))
        process.start()
        process.join(timeout=120)
        return process.exitcode

    assert run(tmp_path / "whole" / "run", None) == 0
    out = tmp_path / "killed" / "run"
    for kill in KILLS[algo]:
        assert run(out, kill) == -signal.SIGKILL, kill
        assert not (out / "result.json").exists()
    assert run(out, None) == 0

    for part in (".", "reference") if algo == "rho1-wmtp" else (".",):
        whole, killed = tmp_path / "whole" / "run" / part, out / part
        for one, other in itertools.zip_longest(read_metrics(whole), read_metrics(killed)):
            assert one == other
        results = [json.loads((run / "result.json").read_text()) for run in (whole, killed)]
        assert results[0]["start"] == results[1]["start"]
        assert results[0]["end"] == results[1]["end"]
        weights = [(run / "final" / "model.safetensors").read_bytes() for run in (whole, killed)]
        assert weights[0] == weights[1]
        assert not list(killed.glob("*.tmp"))


def test_other_peoples_files_are_left_alone(tmp_path):
    folder = RunFolder(tmp_path)
    theirs = [tmp_path / "notes.tmp", folder.checkpoints.path / "step-mine.tmp"]
    ours = [tmp_path / "result.json.tmp", folder.checkpoints.path / "step-6.tmp"]
    ours.append(folder.checkpoints.path / "step-6.old.tmp")
    for path in (*theirs, *ours):
        path.mkdir(parents=True)
    folder.remove_leftovers()
    assert all(path.exists() for path in theirs)
    assert not any(path.exists() for path in ours)
