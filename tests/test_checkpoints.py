"""Which checkpoints count, and what is said of damaged ones."""

import json
import multiprocessing
import os
import shutil

import pytest

from support.tiny_runs import make_trainer
from wmtp.digests import DIGESTS, what_is_wrong
from wmtp.trainers import RunError, RunFolder
from wmtp.trainers.checkpoints import Checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def checkpoints(tmp_path):
    """Of steps 2 and 4."""
    found = Checkpoints(tmp_path / "checkpoints")
    for step in (2, 4):
        found.begin(step)
        (found.in_progress(step) / "model.safetensors").write_bytes(b"weights" * step)
        found.commit(step)
    return found


def newest(checkpoints):
    (step, _), complaints = checkpoints.newest_whole()
    return step, complaints


def test_only_our_own_names_count(checkpoints):
    shutil.copytree(checkpoints.path / "step-2", checkpoints.path / "step-2-keep")
    shutil.copytree(checkpoints.path / "step-2", checkpoints.path / "step-007")
    assert newest(checkpoints) == (4, [])
    checkpoints.drop_old(1)
    names = {path.name for path in checkpoints.path.iterdir()}
    assert names == {"step-4", "step-2-keep", "step-007"}


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


def test_digests_that_lack_something_are_damage(checkpoints):
    file = checkpoints.path / "step-4" / DIGESTS
    record = json.loads(file.read_text())
    for kept in ({}, {**record, "files": {}}, {**record, "step": 3}):
        file.write_text(json.dumps(kept))
        step, (complaint,) = newest(checkpoints)
        assert step == 2
        assert f"{DIGESTS} has changed since it was written" in complaint


def test_digests_that_are_a_pipe_are_not_waited_for(checkpoints):
    file = checkpoints.path / "step-4" / DIGESTS
    file.unlink()
    os.mkfifo(file)
    step, (complaint,) = newest(checkpoints)
    assert step == 2
    assert "no regular file" in complaint


def make_file(path):
    path.write_text("not ours")


def make_link(path):
    path.symlink_to("step-2")


@pytest.mark.parametrize("make", [make_file, make_link, os.mkfifo])
@pytest.mark.parametrize("name", ["step-6", "step-6.tmp", "step-6.old.tmp"])
def test_what_has_the_name_of_a_checkpoint_does_not_stop_it(make, name, checkpoints):
    make(checkpoints.path / name)
    checkpoints.begin(6)
    checkpoints.commit(6)
    assert newest(checkpoints) == (6, [])
    assert (checkpoints.path / "step-2" / "model.safetensors").exists()


def test_where_none_is_whole_nothing_is_begun_anew(checkpoints):
    for step in (2, 4):
        damage(checkpoints.path / f"step-{step}/model.safetensors", "empty")
    with pytest.raises(RunError, match=r"no whole checkpoint: .*step-4 is damaged .*step-2 is"):
        checkpoints.newest_whole()


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


def test_another_algorithms_checkpoint_is_passed_over(data, tmp_path, capsys):
    make_trainer("mtp-baseline", data, tmp_path / "other").run()
    make_trainer("critic-wmtp", data, tmp_path / "run", steps=1, save_every=1).run()
    foreign = tmp_path / "run/checkpoints/step-6"
    shutil.copytree(tmp_path / "other/checkpoints/step-6", foreign)
    again = make_trainer("critic-wmtp", data, tmp_path / "run", steps=1)
    assert again.step == 4
    assert f"{foreign} is of another run: going on from" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "result.json"])
@pytest.mark.parametrize("content", ['{"steps": ', "[1]", "\0\0"])
def test_a_record_that_cannot_be_read_is_named(name, content, tmp_path):
    folder = RunFolder(tmp_path)
    folder.open({"steps": 1}, resume=False)
    folder.append_metrics({"step": 1})
    (tmp_path / name).write_text(content)

    def read():
        folder.open({"steps": 1}, resume=True)
        folder.result()

    with pytest.raises(RunError, match=rf"{name}.*(cannot be read|no JSON object).*--out"):
        read()


@pytest.mark.parametrize("tail", ["\0\0\0\0", "\0\n", "garbage\n", '{"no": "step"}\n', "[3]\n"])
def test_a_damaged_tail_of_the_metrics_costs_nothing(tail, tmp_path):
    folder = RunFolder(tmp_path)
    for step in (1, 2, 2, 3):
        folder.append_metrics({"step": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(tail)
    folder.checkpoints.begin(2)
    folder.commit_checkpoint(2)
    assert folder.cut_metrics_back((2, tmp_path / "checkpoints/step-2")) is None
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


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
