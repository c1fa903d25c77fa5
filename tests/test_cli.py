import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.command_line import SMALL, unwrapped, wmtp
from support.tiny_runs import read_metrics
from wmtp.cli import options

ROOT = Path(__file__).parents[1]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for processes of their own


@pytest.mark.parametrize("command", ["train", "compare", "profile", "info"])
def test_every_command_explains_itself(command):
    result = wmtp(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output
    listed = wmtp("--help")
    assert command in listed.output


def test_info_says_what_runs_and_what_is_missing(monkeypatch):
    monkeypatch.setattr("wmtp.backends.cpu.unavailable", lambda: "no compiler: get one")
    output = unwrapped(wmtp("info").output)
    assert "backend cpu not available: no compiler: get one" in output
    assert "backend eager ready" in output
    monkeypatch.setattr("wmtp.backends.cpu.unavailable", lambda: None)
    monkeypatch.setattr("wmtp.backends.cpu.instruction_set", lambda: "avx9000")
    output = unwrapped(wmtp("info").output)
    assert "backend cpu ready" in output
    assert "avx9000" in output


def test_train_refuses_what_cannot_be(corpus, tmp_path):
    used = tmp_path / "used"
    used.mkdir()
    (used / "letter.txt").touch()
    for arguments, message in (
        (["--algo", "rho2"], "'rho2' is not one of mtp-baseline, critic-wmtp, rho1-wmtp"),
        (["--algo", "mtp-baseline", "--out", used], "is not empty and holds no run"),
        (
            ["--algo", "mtp-baseline", "--steps", 0],
            "steps must be a whole number from 1 to 2147483647, got 0",
        ),
        (["--algo", "mtp-baseline", "--loss", "cce"], "loss must be one of ('linear', 'fused', "),
        (["--algo", "mtp-baseline", "--seq-len", 9999], "pass more text or a smaller --seq-len"),
        (["--algo", "rho1-wmtp", "--ref", tmp_path], "no model in"),
    ):
        out = [] if "--out" in arguments else ["--out", tmp_path / "-".join(map(str, arguments))]
        result = wmtp("train", *SMALL, "--data", corpus, *arguments, *out)
        assert result.exit_code in (1, 2), arguments
        assert message in unwrapped(result.output)
        assert isinstance(result.exception, SystemExit)


def test_rho1_trains_its_reference_first_and_says_so(corpus, tmp_path):
    arguments = ["train", "--algo", "rho1-wmtp", *SMALL, "--data", corpus, "--out", tmp_path / "a"]
    result = wmtp(*arguments)
    assert result.exit_code == 0, result.output
    assert "training the reference model first" in unwrapped(result.output)
    assert json.loads((tmp_path / "a/reference/final/config.json").read_text())["horizon"] == 1

    other = [*arguments[:-1], tmp_path / "b", "--ref", tmp_path / "a/reference"]
    result = wmtp(*other)
    assert result.exit_code == 0, result.output
    assert "training the reference" not in result.output
    assert not (tmp_path / "b/reference").exists()
    assert read_metrics(tmp_path / "a") == read_metrics(tmp_path / "b")

    result = wmtp(*other[:-2], "--resume", "--ref", tmp_path / "a")
    assert result.exit_code == 1
    assert "model.safetensors has changed" in unwrapped(result.output)


def test_a_killed_command_resumes_to_the_same_numbers(corpus, tmp_path):
    def arguments(out: Path) -> list[str]:
        small = [*SMALL, "--data", str(corpus), "--save-every", "5", "--steps", "30"]
        return ["train", "--algo=critic-wmtp", *small, f"--out={out}"]

    out = tmp_path / "killed"
    command = [sys.executable, "-m", "wmtp", *arguments(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "step-5").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "result.json").exists()

    subprocess.run([*command, "--resume"], check=True, stdout=subprocess.DEVNULL)
    assert wmtp(*arguments(tmp_path / "whole")).exit_code == 0
    assert read_metrics(out) == read_metrics(tmp_path / "whole")
    assert len(read_metrics(out)) == 32
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["save_every"], settings["algo"]) == (5, "critic-wmtp")
    weights = out / "final" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    again = wmtp(*arguments(out), "--resume")
    assert again.exit_code == 1
    assert "model.safetensors has changed since it was written" in " ".join(again.output.split())


def test_missing_packages_have_a_remedy_and_no_traceback():
    """In a process that has imported none of them; torch takes most of its time, so it is one."""
    program = (
        "import sys\n"
        "from wmtp.cli import main\n"
        "sys.argv = ['wmtp', 'info']\n"
        "for missing in ('typer', 'accelerate'):\n"
        "    sys.modules[missing] = None\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as ended:\n"
        "        print(ended.code)\n"
        "    del sys.modules[missing]\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert finished.stdout.splitlines() == [
        f"wmtp: this command needs {missing}: pip install 'wmtp[train]'"
        for missing in ("typer", "accelerate")
    ]
    assert finished.stderr == ""


def test_presets_and_overrides():
    config = options.make_config("mtp-baseline", tiny=True, steps=7, lr=None)
    assert (config.steps, config.lr) == (7, options.TINY["lr"])


def test_a_file_of_settings_and_the_command_line_wins(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('steps = 9\nlr = 0.5\nreduction = "weight_mean"\n')
    config = options.make_config("mtp-baseline", tiny=True, config_file=file, steps=7)
    assert (config.steps, config.lr, config.reduction) == (7, 0.5, "weight_mean")
    assert config.seq_len == options.TINY["seq_len"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("steps 9", "is not TOML"),
        ("step = 9", "no setting 'step': known are steps, batch_size"),
        ('steps = "many"', "steps must be a whole number from 1 to 2147483647, got many"),
    ],
)
def test_files_of_settings_that_cannot_be(content, message, corpus, tmp_path):
    file = tmp_path / "run.toml"
    if content is not None:
        file.write_text(content)
    arguments = ["train", "--algo=mtp-baseline", "--data", corpus, "--config", file]
    result = wmtp(*arguments, "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert message in unwrapped(result.output)


def test_every_setting_is_an_option_and_reaches_the_run(corpus, tmp_path):
    out = tmp_path / "run"
    given = {"--discount": 0.5, "--gamma": 0.25, "--gae-lambda": 0.125, "--value-lr": 0.01}
    given |= {"--excess": "signed", "--temperature": 0.3, "--reduction": "sum", "--dim": 16}
    given |= {"--trunk-layers": 1, "--grad-accum": 2, "--eval-batches": 3, "--eval-every": 4}
    flags = [f"{name}={value}" for name, value in given.items()]
    result = wmtp("train", "--algo=mtp-baseline", *SMALL, *flags, "--data", corpus, "--out", out)
    assert result.exit_code == 0, result.output
    config = json.loads((out / "config.json").read_text())
    for name, value in given.items():
        assert config[name.removeprefix("--").replace("-", "_")] == value
    evaluated = [record["step"] for record in read_metrics(out) if "validation" in record]
    assert evaluated == [4]


def test_the_version_is_said():
    assert wmtp("--version").output.startswith("wmtp 0.")
