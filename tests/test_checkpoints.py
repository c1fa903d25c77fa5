"""Which checkpoints count, and what is said of damaged ones."""

import json
import multiprocessing
import os
import shutil

import pytest

from support.tiny_runs import make_trainer, record_of
from wmtp.digests import DIGESTS, what_is_wrong
from wmtp.trainers import RunError, RunFolder
from wmtp.trainers.checkpoints import Checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def checkpoints(tmp_path):
    """Of steps 2 and 4."""
    found = Checkpoints(tmp_path / "checkpoints", lambda: "this run")
    for step in (2, 4):
        add(found, step)
    return found


def add(checkpoints, step):
    checkpoints.begin(step)
    (checkpoints.in_progress(step) / "model.safetensors").write_bytes(b"weights" * step)
    checkpoints.write_progress(step, {"evaluation_at_start": None})
    checkpoints.commit(step)


def newest(checkpoints):
    (step, _), complaints = checkpoints.newest_whole(recorded=99)
    return step, complaints


def test_only_our_own_names_count(checkpoints):
    shutil.copytree(checkpoints.path / "step-2", checkpoints.path / "step-2-keep")
    shutil.copytree(checkpoints.path / "step-2", checkpoints.path / "step-007")
    assert newest(checkpoints) == (4, [])
    checkpoints.drop_old(1)
    names = {path.name for path in checkpoints.path.iterdir()}
    assert names == {"step-4", "step-2-keep", "step-007"}


def test_those_of_another_run_or_step_are_passed_over(checkpoints, tmp_path):
    other = Checkpoints(tmp_path / "other", lambda: "another run")
    add(other, 6)
    shutil.copytree(other.path / "step-6", checkpoints.path / "step-6")
    shutil.copytree(checkpoints.path / "step-2", checkpoints.path / "step-8")
    step, complaints = newest(checkpoints)
    assert step == 4
    assert "step-8 is damaged (it is of step 2)" in complaints[0]
    assert "step-6 is damaged (it is another run's)" in complaints[1]


@pytest.mark.parametrize("digests", ["{}", '{"model.safetensors": "0"}'])
def test_every_file_must_be_listed(checkpoints, digests):
    (checkpoints.path / "step-4" / DIGESTS).write_text(digests)
    assert newest(checkpoints)[0] == 2


def test_a_pipe_is_not_waited_for(checkpoints):
    (checkpoints.path / "step-4" / DIGESTS).unlink()
    os.mkfifo(checkpoints.path / "step-4" / DIGESTS)
    assert newest(checkpoints)[0] == 2


def test_a_file_in_its_place_is_replaced(checkpoints):
    (checkpoints.path / "step-6").write_text("a note")
    add(checkpoints, 6)
    assert newest(checkpoints) == (6, [])


def test_lost_metrics_are_named(checkpoints):
    with pytest.raises(RunError, match=r"metrics.jsonl lacks step 2, .*: restore .*metrics.jsonl"):
        checkpoints.newest_whole(recorded=1)


def test_an_empty_folder_is_not_the_newest(checkpoints):
    (checkpoints.path / "step-99").mkdir()
    assert newest(checkpoints) == (4, [])
    (checkpoints.path / "step-99" / "note.txt").touch()
    step, (complaint,) = newest(checkpoints)
    assert step == 4
    assert f"step-99 is damaged (it has no {DIGESTS})" in complaint
    checkpoints.drop_old(2)
    assert checkpoints.steps() == [2, 4, 99]


def damage(file, kind):
    content = file.read_bytes()
    if kind == "missing":
        file.unlink()
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        flipped = bytearray(content)
        flipped[len(flipped) // 2] ^= 1
        file.write_bytes(bytes(flipped))


@pytest.mark.parametrize("kind", ["missing", "empty", "truncated", "flipped"])
@pytest.mark.parametrize("name", ["model.safetensors", DIGESTS])
def test_damage_is_named_and_the_one_before_is_taken(checkpoints, name, kind):
    damage(checkpoints.path / "step-4" / name, kind)
    step, (complaint,) = newest(checkpoints)
    assert step == 2
    assert "step-4 is damaged (" in complaint
    assert name in complaint or "has changed" in complaint or "is missing" in complaint


def test_where_none_is_whole_nothing_is_begun_anew(checkpoints):
    for step in (2, 4):
        damage(checkpoints.path / f"step-{step}/model.safetensors", "empty")
    with pytest.raises(RunError, match=r"no whole checkpoint: .*step-4 is damaged .*step-2 is"):
        checkpoints.newest_whole(recorded=99)


def test_a_trainer_goes_on_from_the_one_before_and_says_so(data, tmp_path, capsys):
    trainer = make_trainer("mtp-baseline", data, tmp_path)
    trainer.run()
    damage(tmp_path / "checkpoints/step-6/optimizer.bin", "flipped")
    again = make_trainer("mtp-baseline", data, tmp_path)
    assert again.step == 4
    said = capsys.readouterr().err
    assert "step-6 is damaged (optimizer.bin has changed since it was written)" in said
    assert "going on from" in said
    again.run()
    assert what_is_wrong(tmp_path / "checkpoints/step-6") is None


@pytest.mark.parametrize("name", ["config.json", "result.json"])
@pytest.mark.parametrize("content", ['{"steps": ', "[1]", "\0\0"])
def test_a_record_that_cannot_be_read_is_named(name, content, tmp_path):
    folder = RunFolder(tmp_path)
    folder.open({"steps": 1}, resume=False)
    folder.append_metrics(record_of(1))
    (tmp_path / name).write_text(content)

    def read():
        folder.open({"steps": 1}, resume=True)
        folder.result()

    with pytest.raises(RunError, match=rf"{name}.*(cannot be read|no JSON object).*--out"):
        read()


@pytest.mark.parametrize(
    "tail", ["\0\0\0\0", "\0\n", "garbage\n", '{"no": "step"}\n', '{"step": 3}\n', "[3]\n"]
)
def test_a_damaged_tail_of_the_metrics_costs_nothing(tail, tmp_path):
    folder = RunFolder(tmp_path)
    for step in (1, 2, 2, 3):
        folder.append_metrics(record_of(step))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(tail)
    folder.cut_metrics_back(2)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(
        json.dumps(record_of(step)) + "\n" for step in (1, 2)
    )


def hold(folder, ready, done):
    with RunFolder(folder).locked():
        ready.set()
        done.wait(60)


def test_a_folder_belongs_to_one_process_at_a_time(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    owner = context.Process(target=hold, args=(tmp_path, ready, done))
    owner.start()
    assert ready.wait(60)
    with (
        pytest.raises(RunError, match=rf"in use by process {owner.pid} on .*: wait for it, or"),
        RunFolder(tmp_path).locked(),
    ):
        pass
    owner.kill()  # and its lock is nobody's
    owner.join()
    assert (tmp_path / "lock").exists()
    with RunFolder(tmp_path).locked():
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "lock").exists()


def test_a_lock_of_another_host_is_not_taken_over(tmp_path):
    (tmp_path / "lock").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with (
        pytest.raises(
            RunError, match=r"process 1 on elsewhere: .* if that process is gone, delete"
        ),
        RunFolder(tmp_path).locked(),
    ):
        pass
