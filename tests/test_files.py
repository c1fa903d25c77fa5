"""What cannot be written is named, with its bytes and what to do."""

import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from support import tiny_runs
from support.command_line import SMALL, wmtp
from wmtp.files import FREE, FileError, shown, writing
from wmtp.trainers import RunFolder, TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")


def write_plainly(file):
    file.write_bytes(b"x" * 100_000)


def write_by_torch(file):
    torch.save(torch.zeros(25_000), file)


def write_by_safetensors(file):
    save_file({"x": torch.zeros(25_000)}, file)


def _write_beyond_the_limit(write, file):
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    message = (
        r"cannot write .*file: File too large \(100,000 bytes wanted, .* free there\): "
        r"raise the limit on the size of a file \(ulimit -f\), then"
    )
    with pytest.raises(FileError, match=message), writing(file, f"{FREE}, then", 100_000):
        write(file)


@pytest.mark.parametrize("write", [write_plainly, write_by_torch, write_by_safetensors])
def test_a_limit_is_said_whoever_writes(write, tmp_path):
    process = tiny_runs.fork_server().Process(
        target=_write_beyond_the_limit, args=(write, tmp_path / "file")
    )
    process.start()
    process.join(timeout=60)
    assert process.exitcode == 0


@pytest.mark.parametrize(
    ("free", "reason"), [(10, "No space left on device"), (1000, "PytorchStreamWriter failed")]
)
def test_torch_does_not_tell_the_reason_and_the_disk_does(free, reason, tmp_path, monkeypatch):
    monkeypatch.setattr("wmtp.files._free_bytes", lambda path: free)
    message = rf"^cannot write .*file: {reason}.* \(100 bytes wanted, {free:,} bytes free there\)"
    torch_says = "[enforce fail at inline_container.cc:783] . PytorchStreamWriter failed writing"
    with pytest.raises(FileError, match=message), writing(tmp_path / "file", FREE, 100):
        raise RuntimeError(torch_says)


def test_other_errors_pass():
    with pytest.raises(ZeroDivisionError), writing(Path("x"), "nothing"):
        raise ZeroDivisionError
    with pytest.raises(FileError, match=r"^inner$"), writing(Path("x"), "nothing"):
        raise FileError("inner")


def test_names_that_are_not_utf8():
    assert shown(b"caf\xe9".decode("utf-8", "surrogateescape")) == "caf\\xe9"


def _train_until_the_disk_is_full(corpus, out):
    def limit(record):
        if record["step"] == 5:  # the next checkpoint's are the first files so large
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    torch.set_num_threads(1)
    trainer = tiny_runs.make_trainer("critic-wmtp", tiny_runs.prepare(corpus), out)
    with pytest.raises(FileError, match=r"step-6\.tmp: .*bytes wanted, .* free .*--resume"):
        trainer.run(limit)


def test_a_checkpoint_that_does_not_fit_leaves_the_last_one_and_the_run_goes_on(corpus, tmp_path):
    process = tiny_runs.fork_server().Process(
        target=_train_until_the_disk_is_full, args=(corpus, tmp_path / "run")
    )
    process.start()
    process.join(timeout=60)
    assert process.exitcode == 0
    folder = RunFolder(tmp_path / "run")
    names = {path.name for path in folder.checkpoints.path.iterdir()}
    assert names == {"step-2", "step-4"}
    assert folder.newest_whole()[0][0] == 4
    data = tiny_runs.prepare(corpus)
    tiny_runs.make_trainer("critic-wmtp", data, tmp_path / "run").run()
    tiny_runs.make_trainer("critic-wmtp", data, tmp_path / "whole").run()
    assert tiny_runs.read_metrics(tmp_path / "run") == tiny_runs.read_metrics(tmp_path / "whole")


@pytest.mark.parametrize("command", [["train", "--algo=mtp-baseline"], ["compare"]])
@pytest.mark.parametrize("out", ["file/run", "/proc/run"])
def test_a_folder_that_cannot_be(command, out, corpus, tmp_path, capfd):
    (tmp_path / "file").touch()
    result = wmtp(*command, *SMALL, "--data", corpus, "--out", tmp_path / out)
    assert result.exit_code == 1
    lines = (result.output + capfd.readouterr().err).splitlines()
    errors = [line for line in lines if "error" in line]
    assert len(errors) == 1
    assert errors[0].startswith("error: cannot write")
    assert errors[0].endswith("choose another --out")


def test_a_run_is_not_begun_where_its_settings_do_not_fit(tmp_path):
    config = TrainConfig(algo="mtp-baseline")
    (tmp_path / "run" / "config.json.tmp").mkdir(parents=True)
    with pytest.raises(FileError, match=r"cannot write .*config\.json"):
        RunFolder(tmp_path / "run").open(config.identity(), resume=False)


def test_the_limit_is_met_by_an_error_and_not_by_a_signal():
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
