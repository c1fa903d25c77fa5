"""What `compute_head_weights` may return, and whose its errors are."""

import traceback

import pytest
import torch

from support.command_line import SMALL, wmtp
from support.tiny_runs import make_trainer
from wmtp.data import Batch
from wmtp.data.batches import Rows
from wmtp.trainers import TrainConfig, WeightsError
from wmtp.trainers.hook import what_weighs_nothing
from wmtp.weightings import Excess, Given

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (2, 16, 3)


def step_with(returned, data, tmp_path, monkeypatch, **settings):
    """The record of a step of a trainer that returns it, or raises it."""

    def compute_head_weights(self, batch: Batch, output):
        if isinstance(returned, BaseException):
            raise returned
        return returned

    trainer = make_trainer("support.outside_algorithms:HeadZeroTrainer", data, tmp_path, **settings)
    monkeypatch.setattr(type(trainer), "compute_head_weights", compute_head_weights)
    return trainer.train_step(trainer._next_batch())


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.full(SHAPE, float("nan")), r"head_weights\[0, 0, 0\] is nan"),
        (torch.full(SHAPE, float("inf")), "is inf"),
        (torch.full(SHAPE, 1e200, dtype=torch.float64), "is inf"),
        (torch.full(SHAPE, -1.0), r"is -1\.0: weights must be finite and >= 0"),
        (torch.ones(2, 16), r"must be \[B, S, H\] = \(2, 16, 3\), got \(2, 16\)"),
        (torch.ones(SHAPE, dtype=torch.int64), r"must be floating point, got torch\.int64"),
        (torch.ones(SHAPE, dtype=torch.bool), r"must be floating point, got torch\.bool"),
        (torch.ones(SHAPE, dtype=torch.complex64), r"must be floating point, got torch\.complex64"),
        (torch.ones(SHAPE, device="meta"), "head_weights is on meta, and the model on cpu"),
        (torch.ones(SHAPE).to_sparse(), "must be a dense tensor"),
        (torch.ones(SHAPE).numpy(), "numpy|ndarray"),
        (None, "NoneType"),
        ("uniform", "str"),
    ],
)
def test_what_is_no_weighting_is_named_with_step_and_algorithm(
    returned, message, given, data, tmp_path, monkeypatch
):
    returned = Given(returned) if given else returned
    with pytest.raises(WeightsError, match=message) as raised:
        step_with(returned, data, tmp_path, monkeypatch)
    said = str(raised.value)
    assert said.startswith("step 1, support.outside_algorithms:HeadZeroTrainer: ")
    assert "\n" not in said
    if not given and not isinstance(returned, torch.Tensor):
        assert "HeadZeroTrainer.compute_head_weights must return weights [B, S, H] or" in said


@pytest.mark.parametrize(
    ("excess", "message"),
    [
        (Excess(torch.zeros(2, 16)), r"ref_ce must be \[B, T-1\]"),
        (Excess(torch.zeros(2, 18), temperature=0), "temperature must be a finite number > 0"),
        (Excess(torch.zeros(2, 18), excess="both"), "excess must be one of"),
        (Excess(None), "Excess has nothing to compare with"),
    ],
)
def test_an_excess_that_does_not_fit_is_named(excess, message, data, tmp_path, monkeypatch):
    with pytest.raises(WeightsError, match=f"step 1, .*{message}"):
        step_with(excess, data, tmp_path, monkeypatch)


def test_weights_where_there_is_no_target_may_be_anything(data, tmp_path, monkeypatch):
    weights = torch.ones(SHAPE)
    weights[:, -1] = float("nan")
    monkeypatch.setattr(TrainConfig, "rows", property(lambda config: Rows(config.seq_len)))
    assert step_with(weights, data, tmp_path, monkeypatch)["loss"] > 0


def test_an_error_of_the_algorithms_own_is_said_to_be_its(data, tmp_path, monkeypatch):
    with pytest.raises(ZeroDivisionError) as raised:
        step_with(ZeroDivisionError("mine"), data, tmp_path, monkeypatch)
    last = traceback.format_exception(raised.value)[-1]
    assert last.startswith(
        "step 1: raised in the compute_head_weights of support.outside_algorithms:HeadZeroTrainer"
    )
    with pytest.raises(WeightsError, match=r"called sys\.exit\(0\)"):
        step_with(SystemExit(0), data, tmp_path, monkeypatch)


@pytest.mark.parametrize("weight", [0.0, 1e-9])
def test_weights_that_are_all_0_are_said_once(weight, data, tmp_path, monkeypatch, capsys):
    record = step_with(torch.full(SHAPE, weight), data, tmp_path, monkeypatch)
    said = "all weights of support.outside_algorithms:HeadZeroTrainer are 0 in a step"
    assert capsys.readouterr().err.count(said) == 1
    assert record["loss"] == 0
    assert what_weighs_nothing({**record, "stage": "value_warmup"}, "x") is None


@pytest.mark.parametrize("reduction", ["token_mean", "weight_mean"])
def test_weights_whose_sum_is_beyond_float32_are_recorded_as_they_train(
    reduction, data, tmp_path, monkeypatch
):
    def record(weight):
        weights, out = torch.full(SHAPE, weight), tmp_path / f"{weight}"
        found = step_with(weights, data, out, monkeypatch, reduction=reduction)
        return {name: number for name, number in found.items() if name != "stage"}

    assert record(3e38) == pytest.approx(record(1.0), rel=1e-5)
    assert record(3e38)["weight_head_0"] == pytest.approx(1 / 3)


def test_the_command_says_it_in_one_line(corpus, tmp_path):
    words = ["--algo", "support.outside_algorithms:WordsTrainer", "--data", corpus]
    result = wmtp("train", *SMALL, *words, "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    errors = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: step 1, support.outside_algorithms:WordsTrainer: ")
