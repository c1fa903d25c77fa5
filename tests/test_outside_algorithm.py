"""`--algo module:Class`: a trainer that is no part of the library."""

import json

import pytest
import torch
from safetensors.torch import load_file

from support.command_line import SMALL, wmtp
from support.tiny_runs import make_trainer, read_metrics, train_in_processes
from wmtp.trainers import ConfigError, find_trainer

FOCAL = "support.outside_algorithms:FocalTrainer"

pytestmark = pytest.mark.usefixtures("one_thread")


def train(*arguments):
    return wmtp("train", *SMALL, "--save-every=2", *arguments)


def test_what_the_hook_returns_is_what_trains_and_what_is_recorded(data, tmp_path):
    """All weight on head 0: the other heads' parameters are left as they were."""
    trainer = make_trainer(
        "support.outside_algorithms:HeadZeroTrainer", data, tmp_path, weight_decay=0.0
    )
    before = [
        [parameter.clone() for parameter in head.parameters()] for head in trainer.model.heads
    ]
    record = trainer.train_step(trainer._next_batch())
    assert [record[f"weight_head_{k}"] for k in range(3)] == [1, 0, 0]
    assert record["weight_entropy"] == 0
    assert record["loss"] == pytest.approx(record["ce_head_0"], rel=1e-5)
    moved = [
        any(not torch.equal(a, b) for a, b in zip(old, head.parameters(), strict=True))
        for old, head in zip(before, trainer.model.heads, strict=True)
    ]
    assert moved == [True, False, False]


def test_it_trains_by_the_command_resumes_and_its_settings_are_of_the_runs_identity(
    corpus, tmp_path
):
    data, out = ["--data", corpus], tmp_path / "run"
    arguments = ["--algo", FOCAL, "--set", "focus=3", *data]
    assert train(*arguments, "--out", out).exit_code == 0
    assert json.loads((out / "config.json").read_text())["settings"] == {"focus": 3.0}
    (out / "result.json").unlink()  # as if killed at the end
    for newest in ("step-6",):
        for file in (out / "checkpoints" / newest).iterdir():
            file.unlink()
        (out / "checkpoints" / newest).rmdir()
    whole = load_file(out / "final/model.safetensors")
    before = read_metrics(out)
    assert train(*arguments, "--out", out, "--resume").exit_code == 0
    assert read_metrics(out) == before
    again = load_file(out / "final/model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    other = train("--algo", FOCAL, "--set", "focus=4", *data, "--out", out, "--resume")
    assert other.exit_code == 1
    assert "other settings" in other.output


def test_two_processes_train_it_like_one(corpus, tmp_path):
    for processes in (1, 2):
        train_in_processes(FOCAL, corpus, tmp_path / str(processes), processes)
    one, two = (read_metrics(tmp_path / str(processes)) for processes in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_it_is_compared(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(__import__("pathlib").Path(__file__).parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "runs"
    done = wmtp(
        *("compare", "--algo", FOCAL, "--set", "focus=1", *SMALL),
        *("--data", corpus, "--out", out),
    )
    assert done.exit_code == 0, done.output
    assert list(json.loads((out / "compare.json").read_text())) == [FOCAL]
    config = json.loads((out / "support.outside_algorithms-FocalTrainer/config.json").read_text())
    assert config["settings"] == {"focus": 1.0}


@pytest.mark.parametrize(
    ("algo", "message"),
    [
        ("nowhere:Trainer", r"cannot import nowhere"),
        ("support.outside_algorithms:Missing", r"has no trainer Missing"),
        ("support.outside_algorithms:FocalSettings", r"has no trainer FocalSettings"),
        ("support.outside_algorithms:Unfinished", r"is abstract: it lacks compute_head_weights"),
        (":Trainer", r"is no module"),
        (".:Trainer", r"'\.' is no module"),
        ("../x:Trainer", r"'\.\./x' is no module"),
        ("..x:Trainer", r"is no module"),
        ("x.:Trainer", r"is no module"),
        ("rho2", r"'rho2' is not one of mtp-baseline, critic-wmtp, rho1-wmtp"),
    ],
)
def test_what_is_no_trainer(algo, message):
    with pytest.raises(ConfigError, match=message):
        find_trainer(algo)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("raise RuntimeError('no\\nreason')", "RuntimeError: no"),
        ("def", "SyntaxError: "),
        ("nothing", "NameError: name 'nothing' is not defined"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("x = '\0'", "source code string cannot contain null bytes"),
        ("raise Exception", "Exception"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named_with_its_error(
    code, message, tmp_path, monkeypatch
):
    name = f"broken_{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    result = train("--algo", f"{name}:Trainer")
    assert result.exit_code == 1
    line = result.output.strip()
    assert line.startswith(f"error: {name}:Trainer: cannot import {name} (")
    assert message in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--algo", FOCAL, "--set", "focus=nan"], "setting focus must be finite, got nan"),
        (["--algo", FOCAL, "--set", "focus=1", "--set", "focus=2"], "--set focus is given twice"),
        (["--algo", FOCAL, "--seed", "99999999999999999999"], "seed must be a whole number from 0"),
        (["--algo", FOCAL, "--set", "fokus=3"], "no setting 'fokus': known are focus"),
        (["--algo", FOCAL, "--set", "focus=much"], "focus must be of type float, got 'much'"),
        (["--algo", FOCAL, "--set", "focus"], "--set wants name=value, got 'focus'"),
        (["--algo", "mtp-baseline", "--set", "focus=1"], "the algorithm has none"),
    ],
)
def test_settings_that_cannot_be(given, message, corpus, tmp_path):
    result = train(*given, "--data", corpus, "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert message in result.output
    assert not (tmp_path / "run").exists()
