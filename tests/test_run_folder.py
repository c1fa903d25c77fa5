"""A run on disk: what it leaves, what it refuses, and that kill -9 changes no number."""

import itertools
import json
import signal
from pathlib import Path

import pytest

from support import tiny_runs
from support.tiny_runs import make_trainer, read_metrics, record_of
from wmtp.digests import write_digests
from wmtp.trainers import RunError, RunFolder

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
    folder.append_metrics(record_of(1))
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


def test_a_checkpoint_ahead_of_the_metrics_is_passed_over(tmp_path):
    folder = RunFolder(tmp_path)
    folder.open({}, resume=False)
    for step in (2, 4):
        folder.checkpoints.begin(step)
        folder.checkpoints.write_progress(step, {})
        folder.checkpoints.commit(step)
    for step in (1, 2, 4):
        folder.append_metrics(record_of(step))
    (step, _), (complaint,) = folder.newest_whole()
    assert step == 2
    assert complaint.endswith("step-4 is ahead of metrics.jsonl, which lacks 3")
    folder.cut_metrics_back(2)
    assert folder.read_metrics() == [record_of(1), record_of(2)]
    folder.cut_metrics_back(1)
    with pytest.raises(RunError, match=r"metrics\.jsonl lacks step 2, and every whole checkpoint"):
        folder.newest_whole()


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


@pytest.mark.parametrize("content", ["{}", '{"a": 1}'])
def test_a_result_that_lacks_its_numbers_is_named(tmp_path, content):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(RunError, match=r"result\.json is damaged \(it lacks end and start\)"):
        RunFolder(tmp_path).result()


def test_metrics_that_are_a_folder_are_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RunError, match=r"metrics\.jsonl is no file: move it away"):
        RunFolder(tmp_path).read_metrics()


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


def test_a_damaged_model_of_a_finished_run_is_named(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_folder(
        "final", lambda path: (path / "model").write_text("x") and write_digests(path)
    )
    folder.write_result({"start": {}, "end": {}})
    assert folder.result() == {"start": {}, "end": {}}
    (tmp_path / "final" / "model").write_text("y")
    with pytest.raises(RunError, match=r"final is damaged \(model has changed .*\): restore it"):
        folder.result()
